"""Studies on the command line: ``jaxglmm power``, ``bootstrap`` and ``recover``.

Each fits FORMULA to DATA as ``fit`` does and hands the fit to the Python function of
the study, which gives the same numbers for the same seed. An option has its value from
the command line, else from the TOML file of ``--config``, else its default. Exit
status 0: done; 2: bad input, or a fit that did not converge and is no truth to simulate
from, with one message and no traceback.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from jaxglmm.cli import bad_input, fit_model, main, model_options, notes

if TYPE_CHECKING:
    import pandas as pd

    from jaxglmm.results import Params

__all__ = ["bootstrap", "power", "recover"]


# ---- values of options -------------------------------------------------------------


class _Finite(click.ParamType):
    """A number that is finite."""

    name = "number"

    def convert(self, value, param, ctx) -> float:
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class _List(click.ParamType):
    """Values of one type, with commas between them."""

    def __init__(self, kind: click.ParamType, name: str):
        self.kind, self.name = kind, name

    def convert(self, value, param, ctx) -> tuple:
        if isinstance(value, tuple):
            return value
        return tuple(
            self.kind.convert(part.strip(), param, ctx) for part in value.split(",")
        )


_NUMBERS = _List(_Finite(), "number,...")
_COUNTS = _List(click.IntRange(min=1), "integer,...")
_METHODS = _List(click.Choice(["REML", "ML", "Laplace", "AGQ", "PQL"]), "method,...")


def _joined(lists: tuple[tuple, ...]) -> list | None:
    """The values of a repeatable list option; None where it was not given."""
    return [value for values in lists for value in values] or None


def _configure(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Make the keys of a TOML file the defaults of the options that they name."""
    if path is None:
        return
    import tomllib

    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} cannot be read as TOML: {error}") from None
    known = {
        max(p.opts, key=len).lstrip("-"): p
        for p in ctx.command.params
        if isinstance(p, click.Option) and p is not param
    }
    defaults: dict[str, Any] = {}
    for key, value in given.items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            raise click.BadParameter(
                f"{path} has the unknown key {key!r}; valid are "
                f"{', '.join(sorted(known))}"
            )
        if option.name in defaults:
            raise click.BadParameter(f"{path} has the key {key!r} twice")
        defaults[str(option.name)] = _as_typed(path, key, value, option)
    ctx.default_map = defaults


def _as_typed(path: str, key: str, value: Any, option: click.Option) -> Any:
    """A TOML value as the text that a user would type, so that it is read alike."""
    if isinstance(value, dict) and key == "contrasts":
        value = [f"{name}={kind}" for name, kind in value.items()]
    values = value if isinstance(value, list) else [value]
    several = option.multiple or isinstance(option.type, _List)
    if any(isinstance(v, (list, dict)) for v in values) or (
        isinstance(value, list) and not several
    ):
        raise click.BadParameter(f"{path}: {key} cannot be {value!r}")
    texts = [str(v) for v in values]
    return texts if option.multiple else ",".join(texts)


def _target(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """A file to be written after the study, refused before it."""
    if path is None:
        return None
    if not Path(path).parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(path).parent}")
    if param.name == "out" and Path(path).suffix.lower() != ".csv":
        raise click.BadParameter(f"{path} must end in .csv")
    if param.name == "plot":
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            raise click.BadParameter(
                "plots need matplotlib: pip install 'jaxglmm[plot]'"
            ) from None
        kinds = FigureCanvasBase.get_supported_filetypes()
        if Path(path).suffix.lower().lstrip(".") not in kinds:
            raise click.BadParameter(
                f"{path} must end in one of {', '.join('.' + k for k in sorted(kinds))}"
            )
    file = Path(path).resolve()
    new = not file.exists()
    try:
        open(file, "ab").close()
    except OSError as error:
        raise click.BadParameter(
            f"{path} cannot be written: {error.strerror}"
        ) from None
    if new:
        file.unlink()
    return path


# ---- what the commands share -------------------------------------------------------


class _Run(NamedTuple):
    """The options of every study beside those of the model."""

    seed: int
    out: str | None
    plot: str | None
    checkpoint: str | None
    no_progress: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """As the Python functions have them."""
        return {
            "key": self.seed, "checkpoint": self.checkpoint,
            "progress": not self.no_progress,
        }  # fmt: skip


class _Report(NamedTuple):
    """What a study prints, writes as CSV, and draws."""

    text: str
    table: pd.DataFrame
    draw: Callable[[], Any]


_FILE = click.Path(dir_okay=False)
_OPTIONS = (
    click.option(
        "--level",
        type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
        default=0.95,
        show_default=True,
        help="Level of the intervals.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=1,
        show_default=True,
        help="The same seed gives the same numbers.",
    ),
    click.option(
        "--config",
        type=click.Path(dir_okay=False, exists=True),
        metavar="FILE.toml",
        is_eager=True,
        expose_value=False,
        callback=_configure,
        help="Options by name, such as n-sims = 500; the command line wins.",
    ),
    click.option(
        "--out",
        type=_FILE,
        metavar="FILE.csv",
        callback=_target,
        help="Write the table to a file too.",
    ),
    click.option(
        "--plot",
        type=_FILE,
        metavar="FILE.png",
        callback=_target,
        help="Draw the result to a file.",
    ),
    click.option(
        "--checkpoint",
        type=click.Path(file_okay=False),
        metavar="DIR",
        help="Keep finished parts here; the same command goes on where it stopped.",
    ),
    click.option("--no-progress", is_flag=True, help="No progress bar."),
)


_N_SIMS = click.option(
    "--n-sims",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Simulations; of a power curve, at every point.",
)


def _study(command: Callable[..., _Report]) -> Callable:
    """Add what studies share; print and write the report that the command returns."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        run = _Run(*(given.pop(name) for name in _Run._fields))
        with bad_input():
            written = [Path(f).resolve() for f in (run.out, run.plot) if f]
            if Path(given["source"]).resolve() in written:
                raise ValueError(f"the results would overwrite {given['source']}")
            report = command(run=run, **given)
            click.echo(report.text)
            if run.out:
                report.table.to_csv(run.out, index=False)
            if run.plot:
                _draw(report, run.plot)

    out: Callable = call
    for option in reversed(_OPTIONS):
        out = option(out)
    out = click.argument("formula")(model_options(out))
    return click.argument("source", metavar="DATA")(out)


def _fitted(source: str, formula: str, model: dict[str, Any], given: bool = False):
    """The GLMM, whose estimates are the truth unless that is ``given``."""
    m = fit_model(source, formula, model)
    if not (m.converged or given):
        raise ValueError(
            "the fit of FORMULA to DATA did not converge, so its estimates are no "
            "truth to simulate from; `jaxglmm fit` says more"
        )
    return m


def _draw(report: _Report, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report.draw()
    figure = plt.gcf()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the commands ------------------------------------------------------------------


@main.command()
@click.option(
    "--test",
    metavar="NAME",
    multiple=True,
    required=True,
    help="Fixed effect that is tested; repeated, all at once.",
)
@click.option(
    "--effect",
    type=_NUMBERS,
    multiple=True,
    help="True values of the tested effect; repeatable.  [default: the estimate]",
)
@click.option(
    "--n-levels",
    type=_COUNTS,
    multiple=True,
    help="Numbers of groups; repeatable. Fewer than in DATA keep arms and the like "
    "about in proportion.  [default: as in DATA]",
)
@click.option(
    "--rows",
    type=_COUNTS,
    multiple=True,
    help="Numbers of rows in each group, the first in the order of DATA; repeatable.  "
    "[default: as in DATA]",
)
@click.option(
    "--along",
    metavar="G",
    help="The grouping factor of --n-levels and --rows, where there are several.",
)
@click.option(
    "--kind",
    type=click.Choice(["wald", "lr"]),
    default="wald",
    show_default=True,
    help="Wald or likelihood-ratio test.",
)
@_N_SIMS
@click.option(
    "--alpha",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Size of the test.",
)
@_study
def power(
    run: _Run,
    source: str,
    formula: str,
    test: tuple[str, ...],
    effect: tuple[tuple[float, ...], ...],
    n_levels: tuple[tuple[int, ...], ...],
    rows: tuple[tuple[int, ...], ...],
    along: str | None,
    kind: str,
    n_sims: int,
    alpha: float,
    level: float,
    **model: Any,
) -> _Report:
    """Power of a test, with FORMULA fitted to DATA as the truth.

    DATA is a CSV or Parquet file, or the name of a bundled data set.
    Of --effect, --n-levels and --rows all combinations are run.
    """
    m = _fitted(source, formula, model)
    from jaxglmm.studies.power import power_curve

    with notes():
        curve = power_curve(
            m, test[0] if len(test) == 1 else test, effect=_joined(effect),
            n_levels=_joined(n_levels), rows=_joined(rows), along=along, kind=kind,
            n_sims=n_sims, alpha=alpha, level=level, **run.arguments,
        )  # fmt: skip
    return _Report(curve.summary(), curve.to_frame(), curve.plot)


@main.command()
@click.option(
    "-n",
    "n",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Replicates.",
)
@click.option(
    "--kind",
    type=click.Choice(["parametric", "semiparametric", "cases"]),
    default="parametric",
    show_default=True,
    help="Draw from the model, from its residuals, or groups of rows.",
)
@click.option(
    "--by",
    metavar="G",
    help="For cases and bca: the grouping factor, where factors are crossed.",
)
@click.option(
    "--ci",
    type=click.Choice(["percentile", "basic", "bca"]),
    default="percentile",
    show_default=True,
    help="Kind of interval.",
)
@_study
def bootstrap(
    run: _Run,
    source: str,
    formula: str,
    n: int,
    kind: str,
    by: str | None,
    ci: str,
    level: float,
    **model: Any,
) -> _Report:
    """Bootstrap all parameters of FORMULA, fitted to DATA.

    DATA is a CSV or Parquet file, or the name of a bundled data set.
    """
    m = _fitted(source, formula, model)
    from jaxglmm.studies.cases import top_factor

    if by is not None or ci == "bca":
        top_factor(m, by)  # refused now and not after the replicates
    with notes():
        boot = m.bootstrap(n, kind=kind, by=by, **run.arguments)
        interval = boot.confint(level, ci)
        table = boot.summary(level)
    table[["lower", "upper"]] = interval
    failed = int(boot.replicates.isna().all(axis=1).sum())
    head = (
        f"{kind} bootstrap, {n} replicates, {failed} not converged; "
        f"{100 * level:g} % {'BCa' if ci == 'bca' else ci} intervals"
    )
    return _Report(
        f"{head}\n\n{table.round(4).to_string()}",
        table.rename_axis("parameter").reset_index(),
        lambda: boot.plot(interval=interval),
    )


@main.command()
@_N_SIMS
@click.option(
    "--methods",
    type=_METHODS,
    multiple=True,
    help="Ways to fit the same data; repeatable.  [default: that of the fit]",
)
@click.option(
    "--beta",
    type=_NUMBERS,
    help="True fixed effects.  [default: the estimates, as for the next two]",
)
@click.option(
    "--theta",
    type=_NUMBERS,
    help="True relative covariance parameters: of every term the lower triangle of its "
    "factor, by columns.",
)
@click.option("--sigma", type=_Finite(), help="True residual standard deviation.")
@_study
def recover(
    run: _Run,
    source: str,
    formula: str,
    n_sims: int,
    methods: tuple[tuple[str, ...], ...],
    beta: tuple[float, ...] | None,
    theta: tuple[float, ...] | None,
    sigma: float | None,
    level: float,
    **model: Any,
) -> _Report:
    """Bias, RMSE and coverage, with FORMULA fitted to DATA as the truth.

    DATA is a CSV or Parquet file, or the name of a bundled data set.
    """
    asked, n_quad = _joined(methods) or [], model["n_quad"]
    if "AGQ" in asked and model["method"] != "AGQ":
        model["n_quad"] = None  # of the study alone
    m = _fitted(source, formula, model, beta is not None and theta is not None)
    from jaxglmm.studies.recovery import recovery_study

    ways = list(dict.fromkeys(asked)) or [m.method]
    with notes():
        study = recovery_study(
            design=m, params=_truth(m, beta, theta, sigma), n_sims=n_sims,
            methods=ways, n_quad=n_quad if "AGQ" in ways else None, level=level,
            **run.arguments,
        )  # fmt: skip
        return _Report(repr(study), study.summary(), study.plot)


def _truth(m: Any, beta, theta, sigma: float | None) -> Params:
    """The fitted parameters, with those that were given in their place."""
    import numpy as np

    params = m.fit.params
    for name, given, labels in (
        ("beta", beta, m.frame.X_names),
        ("theta", theta, m.theta.index),
    ):
        if given is None:
            continue
        if len(given) != len(labels):
            raise ValueError(
                f"--{name} takes a number for each of {', '.join(labels)}, with commas "
                f"between them; found {len(given)}"
            )
        params = params.replace(**{name: np.array(given)})
    if sigma is None:
        return params
    if m.is_generalized:
        raise ValueError("--sigma is for Gaussian models fitted by REML or ML")
    if sigma <= 0.0:
        raise ValueError(f"--sigma must be positive; found {sigma:g}")
    return params.replace(sigma=np.array(sigma))
