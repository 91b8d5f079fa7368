"""The cases: what is fitted, on which data, by whom.

A row is a formula and a CSV file. Everything in it is plain data, so that it can be
sent to any peer as JSON; adding a case means adding a :class:`Row` to ``ROWS`` and, if
its data are new, a function that writes them.

    y = 1 + x / 2 + b_g + e,    b_g ~ N(0, 1),  e ~ N(0, 1)      (groups, growth)
    y ~ Poisson(exp(x / 2 + b_g)),  b_g ~ N(0, 1/4)              (groups-poisson)

The responses of refits are drawn at a model's estimates: sleepstudy's, cbpp's and
VerbAgg's own, and for counts of the sleepstudy design beta = (0.1, 0.1),
Q = 0.1 [[1, .25], [.25, 1]].
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ROWS", "NoDataError", "Row", "make_data", "select"]

ROOT = Path(__file__).resolve().parent.parent
SLEEPSTUDY = ROOT / "jaxglmm" / "data_sets" / "sleepstudy.csv"
CBPP = ROOT / "jaxglmm" / "data_sets" / "cbpp.csv"
_N_FITS = 10_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case.

    Parameters
    ----------
    name, family : str
        ``--rows`` takes either; several rows may make up a family, such as ``growth``.
    work : {"fit", "refit", "process"}
        Fit one frame; refit many responses; start a process that prints a table.
    response, fixed : str
        Left side and fixed part of the formula.
    random : tuple of (str, str)
        Random terms as (effects, grouping factor).
    data : str
        Name of the data, see :func:`make_data`.
    factors : tuple of str
        Columns to be read as factors.
    engines : tuple of str
        Who can do this in reasonable time, jaxglmm's own engines first.
    reml : bool
        For Gaussian rows.
    distribution : {"gaussian", "binomial", "poisson"}
        Others than Gaussian are fitted by Laplace, with canonical link.
    """

    name: str
    family: str
    work: str = "fit"
    response: str
    fixed: str
    random: tuple[tuple[str, str], ...]
    data: str
    factors: tuple[str, ...] = ()
    engines: tuple[str, ...] = field(default=("jaxglmm",))
    reml: bool = True
    distribution: str = "gaussian"

    @property
    def formula(self) -> str:
        """The model as lme4 writes it."""
        terms = [f"({effects} | {group})" for effects, group in self.random]
        return f"{self.response} ~ " + " + ".join([self.fixed, *terms])


_SLEEPSTUDY = {
    "response": "Reaction",
    "fixed": "Days",
    "random": (("Days", "Subject"),),
    "data": "sleepstudy",
    "factors": ("Subject",),
}
_CBPP = {
    "response": "cbind(incidence, healthy)",
    "fixed": "period",
    "random": (("1", "herd"),),
    "data": "cbpp",
    "factors": ("herd", "period"),
    "distribution": "binomial",
}
_VERBAGG = {
    "response": "r2y",
    "fixed": "Anger + Gender + btype + situ",
    "random": (("1", "id"), ("1", "item")),
    "data": "verbagg",
    "factors": ("Gender", "btype", "situ", "id", "item"),
    "distribution": "binomial",
}
_ONE_FACTOR = {"response": "y", "fixed": "x", "random": (("1", "g"),)}
_GROWTH = (10_000, 100_000, 1_000_000)

ROWS = (
    Row(
        name="sleepstudy",
        family="sleepstudy",
        engines=(
            "jaxglmm", "jaxglmm-fit", "lme4", "glmmTMB", "glmm", "gpboost", "mixedlm",
            "statsmodels",
        ),
        **_SLEEPSTUDY,
    ),
    Row(
        name="insteval",
        family="insteval",
        response="y",
        fixed="service",
        random=(("1", "s"), ("1", "d"), ("1", "dept:service")),
        data="insteval",
        factors=("service", "s", "d", "dept"),
        engines=("jaxglmm", "lme4", "glmmTMB", "glmm", "gpboost", "mixedlm"),
    ),
    Row(
        name="groups",
        family="groups",
        data="one-factor-375000",
        engines=("jaxglmm", "lme4", "glmmTMB", "glmm", "gpboost", "mixedlm"),
        **_ONE_FACTOR,
    ),
    *(
        Row(name=f"growth-{n}", family="growth", data=f"one-factor-{n}", **_ONE_FACTOR)
        for n in _GROWTH
    ),
    Row(
        name="cbpp",
        family="cbpp",
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmmTMB", "glmm"),
        **_CBPP,
    ),
    Row(
        name="verbagg",
        family="verbagg",
        **_VERBAGG,
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmmTMB", "glmm", "gpboost"),
    ),
    Row(
        name="groups-poisson",
        family="groups-poisson",
        data="poisson-375000",
        distribution="poisson",
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmmTMB", "glmm", "gpboost"),
        **_ONE_FACTOR,
    ),
    Row(
        name="process",
        family="process",
        work="process",
        engines=(
            "jaxglmm", "jaxglmm-first", "lme4", "glmmTMB", "glmm", "mixedlm",
            "statsmodels",
        ),
        **_SLEEPSTUDY,
    ),
    Row(
        name="refit-sleepstudy",
        family="refit",
        work="refit",
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmm", "mixedlm", "statsmodels"),
        **_SLEEPSTUDY,
    ),
    Row(
        name="refit-cbpp",
        family="refit",
        work="refit",
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmm"),
        **_CBPP,
    ),
    Row(
        name="refit-poisson",
        family="refit",
        work="refit",
        distribution="poisson",
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmm"),
        response="Count",
        fixed="Days",
        random=(("Days", "Subject"),),
        data="counts",
        factors=("Subject",),
    ),
    Row(
        name="refit-verbagg",
        family="refit",
        work="refit",
        engines=("jaxglmm", "jaxglmm-fit", "lme4", "glmm"),
        **_VERBAGG,
    ),
)  # fmt: skip


def select(names: list[str]) -> list[Row]:
    """Rows by name or family, in the order of ``ROWS``."""
    known = {r.name for r in ROWS} | {r.family for r in ROWS}
    for name in names:
        if name not in known:
            families = ", ".join(dict.fromkeys(r.family for r in ROWS))
            raise ValueError(f"no row {name!r}; there are {families}")
    return [r for r in ROWS if r.name in names or r.family in names]


# ---- data --------------------------------------------------------------------------


class NoDataError(Exception):
    """The data of a row are not here; the message says where to get them."""


def make_data(row: Row, folder: Path, insteval: Path | None = None) -> dict[str, str]:
    """Files of a row, made where they are not there yet.

    Made in a process of its own: the runner stays small, because a child's peak memory
    is never reported below its parent's.

    Returns
    -------
    dict
        ``data``, and ``responses`` for refits: a CSV file with a response per column.
    """
    if row.data == "insteval":
        where = insteval or _exported(
            "InstEval", "insteval", folder, "--insteval FILE.csv.gz"
        )
        return {"data": str(where)}
    if row.data == "verbagg":
        files = {"data": str(_exported("VerbAgg", "verbagg", folder))}
    elif row.data == "sleepstudy":
        files = {"data": str(SLEEPSTUDY)}
    else:
        files = {"data": str(_made(row.data, folder))}
    if row.work == "refit":
        files["responses"] = str(_made(f"responses-{row.data}", folder))
    return files


def _made(name: str, folder: Path) -> Path:
    path = folder / f"{name}.csv"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, name, str(path)], check=True)
    return path


def _exported(data: str, name: str, folder: Path, other: str = "") -> Path:
    """Find or export a data set of lme4 that is too large to bundle."""
    path = folder / f"{name}.csv.gz"
    if path.exists():
        return path
    hint = "needs R with lme4 to export it" + (f", or {other}" if other else "")
    if shutil.which("Rscript") is None:
        raise NoDataError(hint)
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / f"{name}.csv"
    code = (
        f'data("{data}", package = "lme4"); d <- {data}; '
        'if (!is.null(d$r2)) d$r2y <- as.integer(d$r2 == "Y"); '
        f'write.csv(d, "{raw.as_posix()}", row.names = FALSE)'
    )
    done = subprocess.run(["Rscript", "-e", code], capture_output=True)
    if done.returncode != 0 or not raw.exists():
        raise NoDataError(hint)
    with raw.open("rb") as source, gzip.open(path, "wb") as target:
        shutil.copyfileobj(source, target)
    raw.unlink()
    return path


def _write_one_factor(n: int, path: Path) -> None:
    """Rows in groups of three; the last group may be smaller."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(20240501)
    g = np.arange(n) // 3
    x = rng.standard_normal(n)
    b = rng.standard_normal(g[-1] + 1)
    y = 1.0 + 0.5 * x + b[g] + rng.standard_normal(n)
    _write(pd.DataFrame({"y": y, "x": x, "g": g}), path)


def _write_cbpp(path: Path) -> None:
    """The bundled data, with the healthy counted too: some peers want two columns."""
    import pandas as pd

    frame = pd.read_csv(CBPP)
    _write(frame.assign(healthy=frame["size"] - frame["incidence"]), path)


def _write_poisson(n: int, path: Path) -> None:
    """Counts in groups of three."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(20240503)
    g = np.arange(n) // 3
    x = rng.standard_normal(n)
    b = 0.5 * rng.standard_normal(g[-1] + 1)
    y = rng.poisson(np.exp(0.5 * x + b[g]))
    _write(pd.DataFrame({"y": y, "x": x, "g": g}), path)


def _write_counts(path: Path) -> None:
    """Subject and Days of sleepstudy, with the first of the simulated counts."""
    import pandas as pd

    frame = pd.read_csv(SLEEPSTUDY)
    _write(frame[["Subject", "Days"]].assign(Count=_counts(1)[0]), path)


def _counts(n_fits: int):
    """Poisson responses (n_fits, 180) of the sleepstudy design."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(20240504)
    frame = pd.read_csv(SLEEPSTUDY)
    _, subject = np.unique(frame["Subject"], return_inverse=True)
    days = frame["Days"].to_numpy(float)
    Q = 0.1 * np.array([[1.0, 0.25], [0.25, 1.0]])
    b = rng.multivariate_normal(np.zeros(2), Q, (n_fits, subject.max() + 1))[:, subject]
    return rng.poisson(np.exp(0.1 + 0.1 * days + b[..., 0] + b[..., 1] * days))


def _write_proportions(path: Path) -> None:
    """Numbers of cases in cbpp's herds and periods, drawn at its Laplace estimates."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(20240505)
    frame = pd.read_csv(CBPP)
    _, herd = np.unique(frame["herd"], return_inverse=True)
    beta = np.array([0.0, -0.9923, -1.1287, -1.5803])
    _, period = np.unique(frame["period"], return_inverse=True)
    b = 0.6423 * rng.standard_normal((_N_FITS, herd.max() + 1))
    eta = -1.3985 + beta[period] + b[:, herd]
    y = rng.binomial(frame["size"].to_numpy(), 1.0 / (1.0 + np.exp(-eta)))
    _write(pd.DataFrame(y.T, columns=[f"y{i + 1}" for i in range(len(y))]), path)


def _write_count_responses(path: Path) -> None:
    import pandas as pd

    y = _counts(_N_FITS)
    _write(pd.DataFrame(y.T, columns=[f"y{i + 1}" for i in range(len(y))]), path)


def _write_answers(path: Path, n_fits: int = 1_000) -> None:
    """Answers in VerbAgg, whose file lies beside, drawn at its Laplace estimates."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(20240506)
    frame = pd.read_csv(path.parent / "verbagg.csv.gz")
    eta = 0.1991 + 0.05743 * frame["Anger"].to_numpy(float)
    eta += 0.3207 * (frame["Gender"] == "M") - 1.0555 * (frame["situ"] == "self")
    eta += frame["btype"].map({"curse": 0.0, "scold": -1.0588, "shout": -2.1054})
    eta = np.broadcast_to(eta, (n_fits, len(frame))).copy()
    for group, sd in (("id", 1.3397), ("item", 0.4953)):
        _, level = np.unique(frame[group], return_inverse=True)
        eta += sd * rng.standard_normal((n_fits, level.max() + 1))[:, level]
    y = rng.binomial(1, 1.0 / (1.0 + np.exp(-eta)))
    _write(pd.DataFrame(y.T, columns=[f"y{i + 1}" for i in range(n_fits)]), path)


def _write_responses(path: Path, n_fits: int = _N_FITS) -> None:
    """Responses of sleepstudy, drawn at its REML estimates."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(20240502)
    frame = pd.read_csv(SLEEPSTUDY)
    _, subject = np.unique(frame["Subject"], return_inverse=True)
    days = frame["Days"].to_numpy(float)
    covariance = np.array([[612.09, 9.604], [9.604, 35.072]])
    shape = (n_fits, subject.max() + 1)
    b = rng.multivariate_normal(np.zeros(2), covariance, size=shape)[:, subject]
    e = 25.592 * rng.standard_normal((n_fits, len(days)))
    y = 251.405 + 10.467 * days + b[..., 0] + b[..., 1] * days + e
    _write(pd.DataFrame(y.T, columns=[f"y{i + 1}" for i in range(n_fits)]), path)


def _write(frame, path: Path) -> None:
    part = path.with_suffix(".part")
    frame.to_csv(part, index=False)
    part.replace(path)


def _main(name: str, path: Path) -> None:
    whole = {
        "responses-sleepstudy": _write_responses,
        "responses-cbpp": _write_proportions,
        "responses-counts": _write_count_responses,
        "responses-verbagg": _write_answers,
        "counts": _write_counts,
        "cbpp": _write_cbpp,
    }
    if name in whole:
        whole[name](path)
    else:
        kind, _, n = name.rpartition("-")
        {"poisson": _write_poisson, "one-factor": _write_one_factor}[kind](int(n), path)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
