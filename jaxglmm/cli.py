"""The command line: ``jaxglmm fit DATA "FORMULA"``.

DATA is the name of a bundled data set, a CSV or a Parquet file. Exit status 0: fitted
and converged; 1: fitted but not converged (the table is printed all the same); 2: bad
input, with one message and no traceback. Studies are in cli_studies.py.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from jaxglmm.errors import CheckpointError

__all__ = ["bad_input", "fit_model", "main", "model_options", "notes"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxglmm")
def main() -> None:
    """Mixed models on JAX."""


@main.command()
def data() -> None:
    """List the bundled data sets."""
    from jaxglmm import datasets

    for name in datasets.names():
        click.echo(f"{name:14s} {datasets.citation(name)}")


_MODEL_OPTIONS = (
    click.option("--family", default="gaussian", show_default=True),
    click.option(
        "--method",
        type=click.Choice(["REML", "ML", "Laplace", "AGQ", "PQL"]),
        help="[default: REML for Gaussian models, else Laplace]",
    ),
    click.option("--link", help="Another link than the family's own."),
    click.option("--n-quad", type=int, help="Quadrature nodes per effect, with AGQ."),
    click.option("--zi", metavar="FORMULA", help='Zero inflation, such as "~ x".'),
    click.option("--dispersion", metavar="FORMULA", help='Dispersion model, "~ x".'),
    click.option("--weights", metavar="COLUMN", help="Prior weights."),
    click.option("--offset", metavar="EXPR", help='Such as z, or "log(exposure)".'),
    click.option(
        "--contrasts",
        metavar="NAME=KIND",
        multiple=True,
        help="Such as f=sum; repeatable.",
    ),
    click.option(
        "--factor",
        metavar="COLUMN",
        multiple=True,
        help="Treat as a factor; repeatable.",
    ),
    click.option("--missing", type=click.Choice(["drop", "raise"]), default="drop"),
)


def model_options(command: Callable) -> Callable:
    """Give a command the options that say which model is fitted."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


@contextmanager
def bad_input() -> Iterator[None]:
    """Exit status 2 and one message where something is refused on purpose."""
    try:
        yield
    except (ValueError, OSError, TypeError, CheckpointError) as error:
        click.echo(f"jaxglmm: {error}", err=True)
        sys.exit(2)


@contextmanager
def notes() -> Iterator[None]:
    """Print warnings as notes on standard error, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(w.message) for w in caught):
        click.echo(f"note: {message}", err=True)


@main.command()
@click.argument("source", metavar="DATA")
@click.argument("formula")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the tidy table as CSV.")
@click.option(
    "--save", type=click.Path(dir_okay=False), help="Write the JSON to a file too."
)
def fit(
    source: str,
    formula: str,
    as_json: bool,
    as_csv: bool,
    save: str | None,
    **model_given: Any,
) -> None:
    """Fit FORMULA to DATA (a bundled name, a CSV or a Parquet file)."""
    if as_json and as_csv:
        raise click.UsageError("give --json or --csv, not both")
    with bad_input():
        model = fit_model(source, formula, model_given)
        if save:
            Path(save).write_text(json.dumps(as_record(model), indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(as_record(model), indent=1))
    elif as_csv:
        click.echo(model.tidy().to_csv(index=False), nl=False)
    else:
        click.echo(repr(model.summary()))
    sys.exit(0 if model.converged else 1)


def _pairs(given: tuple[str, ...]) -> dict[str, str] | None:
    out = {}
    for text in given:
        name, equals, kind = text.partition("=")
        if not (name and equals and kind):
            raise click.UsageError(f"--contrasts takes NAME=KIND; found {text!r}")
        if name in out:
            raise click.UsageError(f"--contrasts names {name} twice")
        out[name] = kind
    return out or None


def fit_model(source: str, formula: str, given: dict[str, Any]) -> Any:
    """The GLMM of a command with :func:`model_options`, whose values are ``given``."""
    options = {**given, "contrasts": _pairs(given["contrasts"])}
    factor = options.pop("factor")
    with notes():
        frame = _read(source, factor)
        from jaxglmm.doors import glmm

        for column in factor:
            if column not in frame.columns:
                raise ValueError(
                    f"--factor {column}: there is no such column; "
                    f"there are {', '.join(map(str, frame.columns))}"
                )
            frame[column] = frame[column].astype("category")
        return glmm(formula, frame, **options)


def _read(source: str, factor: tuple[str, ...]) -> Any:
    from jaxglmm import datasets

    path = Path(source)
    if source in datasets.names():
        return datasets.load(source)
    if not path.exists():
        raise ValueError(
            f"{source!r} is neither a file nor a bundled data set "
            f"({', '.join(datasets.names())})"
        )
    import pandas as pd

    is_parquet = path.suffix.lower() in (".parquet", ".pq")
    try:
        if is_parquet:
            return pd.read_parquet(path)
        header = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0]
        repeated = sorted(set(header[header.duplicated()].dropna()))
        if not repeated:
            # factors as the text they are: 007 is not 7
            return pd.read_csv(path, dtype=dict.fromkeys(factor, str))
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from None
    except Exception as error:  # readers raise errors of many kinds
        kind = "Parquet" if is_parquet else "CSV"
        raise ValueError(f"{source} cannot be read as {kind}: {error}") from None
    raise ValueError(
        f"{source} has several columns named {', '.join(repeated)}. Rename them."
    )


def as_record(model: Any) -> dict[str, Any]:
    """Everything a fit says, in plain JSON types (null where not finite)."""
    glance = model.glance().iloc[0].to_dict()
    record = {
        "formula": model.formula,
        **glance,
        "verdict": model.verdict,
        "n_groups": model.n_groups,
        "fixef": model.fixef.to_dict(),
        "se": model.se.to_dict(),
        "vcov": model.vcov.to_numpy().tolist(),
        **{
            f"fixef_{p.name}": dict(zip(p.X_names, beta.tolist()))
            for p, beta in zip(model.frame.others, model.fit.params.others)
        },
        "dispersion": model.dispersion.to_dict(),
        "theta": model.theta.to_numpy().tolist(),
        "varcorr": model.varcorr.to_dict(orient="records"),
        "ranef": {
            g: {str(level): row for level, row in zip(f.index, f.to_dict("records"))}
            for g, f in model.ranef.items()
        },
        "notices": model.frame.notices,
    }
    return _plain(record)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for these
    return value


import jaxglmm.cli_studies  # noqa: E402, F401  (adds its commands to main)
