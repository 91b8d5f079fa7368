"""Power of tests in mixed models, by simulation.

Point j of a curve has parameters, and weights that say which rows of the largest design
it has (extend.py). Lane i is replicate i mod R of point i div R; all points run in one
compiled program. With p-values p_r of R replicates

    power = #{p_r <= alpha} / R,      interval of Clopper and Pearson

A replicate whose fit did not converge rejects nothing, and is counted; where none did,
there is no power to tell. A point at which many failed is warned of.

References: Green and MacLeod (2016), Methods Ecol. Evol. 7(4),
doi:10.1111/2041-210X.12504; Clopper and Pearson (1934), Biometrika 26(4),
doi:10.1093/biomet/26.4.404.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxglmm.control import Control
from jaxglmm.designs import Design
from jaxglmm.errors import ConvergenceWarning, DesignError, Status
from jaxglmm.families import Family, family_by_name, is_linear
from jaxglmm.fitting import What, fit_checked
from jaxglmm.linalg import spd_inverse
from jaxglmm.results import Fit, Params
from jaxglmm.simulation import simulate
from jaxglmm.studies.arrange import arrange
from jaxglmm.studies.batch import check_batch
from jaxglmm.studies.checkpoint import design_facts
from jaxglmm.studies.extend import Extended, extend
from jaxglmm.studies.lanes import Outcome, check_count
from jaxglmm.studies.study import (
    Running,
    as_key,
    run_study,
    warn_if_lost,
)
from jaxglmm.typing import Array

__all__ = ["PowerCurve", "power", "power_curve"]

_MANY = 0.1  # share of fits of a point that did not converge, from which on it is said


@dataclass(frozen=True, repr=False)
class PowerCurve:
    """Power at one point or along a curve; made by :func:`power_curve`.

    Attributes
    ----------
    points : DataFrame
        What differs between points: ``effect``, ``n_levels``, ``rows``.
    p_values, status : array (points, n_sims)
        P-values, not a number where the fit did not converge; the
        :class:`jaxglmm.Status` code of every fit.
    test : str
    alpha, level : float
        Size of the test; level of the intervals.
    """

    points: pd.DataFrame
    p_values: np.ndarray
    status: np.ndarray
    test: str
    alpha: float
    level: float

    def to_frame(self) -> pd.DataFrame:
        """One row per point: power, its binomial interval, share of failed fits.

        Power is not a number where all of them failed.
        """
        from scipy.stats import beta

        n = self.p_values.shape[1]
        hits = np.sum(self.p_values <= self.alpha, axis=1)
        tail = (1.0 - self.level) / 2.0
        with np.errstate(invalid="ignore"):
            lower = beta.ppf(tail, hits, n - hits + 1)
            upper = beta.ppf(1.0 - tail, hits + 1, n - hits)
        table = self.points.copy()
        table["n_sims"], table["successes"], table["power"] = n, hits, hits / n
        table["lower"] = np.where(hits == 0, 0.0, lower)
        table["upper"] = np.where(hits == n, 1.0, upper)
        table["failed"] = np.mean(np.isnan(self.p_values), axis=1)
        table.loc[table["failed"] == 1.0, ["power", "lower", "upper"]] = np.nan
        return table

    def summary(self) -> str:
        """The table, with the test in front."""
        percent = f"{100 * self.level:g} % intervals"
        table = self.to_frame().round(4).to_string(index=False)
        return f"Power of {self.test} at alpha = {self.alpha:g}, {percent}\n\n{table}"

    def plot(self, ax: Any = None) -> Any:
        """Power against what varies, with its intervals; the matplotlib Axes."""
        from jaxglmm.studies.plots import plot_power

        return plot_power(self, ax)

    def __repr__(self) -> str:
        return self.summary()


def power(model: Any, test: Any, *, key: Any, **options: Any) -> PowerCurve:
    """Power at one point: :func:`power_curve` with single values.

    Parameters
    ----------
    model, test, key, **options
        As for :func:`power_curve`; ``n_levels``, ``rows`` and ``effect`` are numbers.

    Returns
    -------
    PowerCurve
        Of one point.

    Examples
    --------
    >>> import jaxglmm as jg
    >>> m = jg.glmm("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())
    >>> found = jg.power(m, "Days", key=1, effect=4.0, n_sims=200, progress=False)
    >>> bool(0.3 < found.to_frame()["power"][0] < 0.9)
    True
    """
    for name in ("effect", "n_levels", "rows"):
        if np.ndim(np.asarray(options.get(name))) > 0:
            raise ValueError(f"{name} must be one number; use power_curve for several")
    return power_curve(model, test, key=key, **options)


def power_curve(
    model: Any,
    test: Any,
    *,
    key: Any,
    n_sims: int = 1000,
    params: Params | None = None,
    family: str | Family | None = None,
    method: str | None = None,
    n_quad: int | None = None,
    along: str | int | None = None,
    n_levels: Any = None,
    rows: Any = None,
    effect: Any = None,
    kind: str = "wald",
    alpha: float = 0.05,
    level: float = 0.95,
    control: Control | None = None,
    tile: int | None = None,
    threads: int | None = None,
    devices: Sequence[Any] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> PowerCurve:
    """Power against effect size, number of groups, or rows per group.

    Parameters
    ----------
    model : GLMM or Design
        A pilot fit, or a Design, which then needs ``params`` (and ``family``).
    test : str, int, sequence of these, or callable
        Fixed effects that are tested to be zero, by name (of a GLMM) or position; or a
        JAX function (fit, design) -> p-value. That design may have its rows in another
        order and rows of weight zero among them.
    key : int or PRNG key
    n_sims : int
        Replicates per point.
    params : Params, optional
        The truth; of a GLMM its estimates.
    family, method, n_quad
        As for :func:`jaxglmm.fit`; of a GLMM its own.
    along : str or int, optional
        Grouping factor that ``n_levels`` and ``rows`` are about: its name, or the
        position of its term. Needed where there are several.
    n_levels : int or sequence of int, optional
        Numbers of levels. Fewer than the pilot's are those that keep the means of
        covariates of levels, such as the arm of a trial, where they are; beyond the
        pilot's, its levels are copied in turn.
    rows : int or sequence of int, optional
        Numbers of rows in each level: its first in the order of the data, so sort
        these; beyond the pilot's, rows are copied in turn, covariates and all.
    effect : float or sequence of float, optional
        True values of the tested effect, in place of that in ``params``.
    kind : {"wald", "lr"}
        Wald z or chi-squared test; or the likelihood-ratio test, by ML or Laplace where
        the method is REML. Both are asymptotic: with few groups they reject too often.
    alpha, level : float
        Size of the test; level of the intervals of power.
    control, tile, threads, devices, checkpoint, progress
        As for :func:`jaxglmm.recovery_study`.

    Returns
    -------
    PowerCurve
        With a point per value; several sequences are crossed.

    Warns
    -----
    ConvergenceWarning
        Where more than a tenth of the fits of a point did not converge.

    Examples
    --------
    >>> import jaxglmm as jg
    >>> m = jg.glmm("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())
    >>> curve = jg.power_curve(
    ...     m, "Days", key=1, n_levels=[6, 18], effect=4.0, n_sims=200, progress=False
    ... )
    >>> bool(curve.to_frame()["power"].is_monotonic_increasing)
    True
    """
    n_sims = check_count("n_sims", n_sims)
    for name, value in (("alpha", alpha), ("level", level)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie between 0 and 1; found {value}")
    if kind not in ("wald", "lr"):
        raise ValueError(f"kind must be 'wald' or 'lr'; found {kind!r}")
    pilot = _pilot(model, params, family, method, n_quad)
    tested = _tested(test, pilot)
    if kind == "lr":
        pilot = _by_likelihood(pilot, tested)
    points = _points(tested, effect, n_levels, rows)
    largest = _largest(pilot, along, points)
    what, design = check_batch(
        largest.design, pilot.family, pilot.method, pilot.n_quad, pilot.priors,
        pilot.control if control is None else control,
    )  # fmt: skip
    all_levels = int(largest.level.max()) + 1
    weights = np.stack(
        [largest.weights(p.n_levels or all_levels, p.rows) for p in points]
    ).astype(design.y.dtype)
    beta = np.stack([np.asarray(pilot.params.beta)] * len(points))
    if effect is not None:
        beta[:, tested[0]] = [p.effect for p in points]
    truth = jax.tree.map(np.asarray, pilot.params).replace(beta=beta)
    prng = as_key(key)
    static = (tested if callable(tested) else tuple(tested), kind, n_sims)
    facts = {
        **design_facts(design), "params": truth, "point weights": weights, "key": prng,
        "test": test if callable(test) else repr(test), "kind": kind,
    }  # fmt: skip
    shared = design, arrange(design), truth, weights, prng
    out = run_study(
        _replicate, what, static, shared, design,
        len(points) * n_sims, Running(tile, threads, devices, progress, checkpoint),
        label="power", facts=facts, own_code=not callable(tested),
    )  # fmt: skip
    p_values = np.where(out["converged"], out["p_value"], np.nan)
    wrong = p_values[(p_values < 0.0) | (p_values > 1.0)]
    if len(wrong):
        raise ValueError(
            f"test must return p-values, from 0 to 1; found {wrong[0]:.6g}, and "
            f"{len(wrong) - 1} more outside"
        )
    varied = pd.DataFrame(points).dropna(axis=1, how="all")
    p_values = p_values.reshape(len(points), n_sims)
    status = out["status"].reshape(len(points), n_sims)
    curve = PowerCurve(varied, p_values, status, _describe(test, kind), alpha, level)
    _warn_of_failures(curve)
    return curve


def _warn_of_failures(curve: PowerCurve) -> None:
    failed = np.isnan(curve.p_values)
    share = failed.mean(axis=1)
    worst = int(np.argmax(share))
    if share[worst] <= _MANY:
        return
    codes = curve.status[worst][failed[worst]]
    codes = codes[[not Status(int(c)).ok for c in codes]]
    why = "the p-values are not numbers"
    if len(codes):
        why = str(Status(int(np.bincount(codes).argmax())))
    at = ", ".join(f"{k} {v:g}" for k, v in curve.points.iloc[worst].items())
    n = int(np.sum(share > _MANY))
    warnings.warn(
        f"{100 * share[worst]:.3g} % of the fits {f'at {at} ' if at else ''}are not "
        f"counted as rejections, most of them because: {why}."
        + (f" {n} of {len(share)} points are like that." if len(share) > 1 else ""),
        ConvergenceWarning,
        stacklevel=3,
    )


# ---- what is asked -----------------------------------------------------------------


@dataclass(frozen=True)
class _Pilot:
    design: Design
    params: Params
    family: Family
    method: str | None
    n_quad: int | None
    effects: list[str]
    groups: list[str]
    priors: Any = None
    control: Control | None = None


def _by_likelihood(pilot: _Pilot, tested) -> _Pilot:
    """The pilot with a method whose likelihoods with other fixed effects compare."""
    if pilot.method == "PQL":
        raise ValueError("kind='lr': PQL has no likelihood; use method='Laplace'")
    if not callable(tested) and len(tested) == len(pilot.effects):
        raise ValueError(
            "kind='lr' cannot test all fixed effects at once, since the smaller model "
            "would have none; use kind='wald'"
        )
    if is_linear(pilot.family) and pilot.method in (None, "REML"):
        return dataclasses.replace(pilot, method="ML")
    if pilot.method == "REML":
        return dataclasses.replace(pilot, method="Laplace")
    return pilot


def _pilot(model, params, family, method, n_quad) -> _Pilot:
    if isinstance(model, Design):
        if params is None:
            raise ValueError("power from a Design needs params=, the truth")
        names = [f"beta[{i}]" for i in range(model.X.shape[1])]
        groups = [f"term {t}" for t in range(len(model.terms))]
        return _Pilot(
            jax.tree.map(np.asarray, model), params, family_by_name(family), method,
            n_quad, names, groups,
        )  # fmt: skip
    if not hasattr(model, "frame"):
        kind = type(model).__name__
        raise TypeError(f"model must be a fitted GLMM or a Design; found {kind}")
    if family is not None:
        raise ValueError("the family is the fitted model's; leave family= out")
    if params is None:
        warn_if_lost(model)
    return _Pilot(
        model.design, model.fit.params if params is None else params, model.family,
        model.method if method is None else method,
        model.n_quad if method is None else n_quad,
        list(model.frame.X_names), [t.group_name for t in model.frame.all_terms],
        model.priors, model.control,
    )  # fmt: skip


def _tested(test: Any, pilot: _Pilot) -> Any:
    """Positions of the tested effects, or the callable."""
    if callable(test):
        return test
    single = isinstance(test, (str, int, np.integer, Sequence, np.ndarray))
    if isinstance(test, bool) or not single:
        raise TypeError(
            "test must be the name or position of a fixed effect, several of these, or "
            f"a function (fit, design) -> p-value; found {test!r}"
        )
    asked = [test] if isinstance(test, (str, int, np.integer)) else list(test)
    at = []
    for one in asked:
        if isinstance(one, str) and one not in pilot.effects:
            raise ValueError(
                f"test names {one!r}, which is no fixed effect; there are "
                f"{', '.join(pilot.effects)}"
            )
        i = pilot.effects.index(one) if isinstance(one, str) else int(one)
        if not 0 <= i < len(pilot.effects):
            raise ValueError(
                f"test={one} is no position of the {len(pilot.effects)} fixed effects"
            )
        at.append(i)
    if not at or len(set(at)) < len(at):
        raise ValueError(f"test must name fixed effects, each once; found {test!r}")
    return at


class _Point(NamedTuple):
    """A point of a curve; None for what is as in the pilot."""

    effect: float | None
    n_levels: int | None
    rows: int | None


def _points(tested, effect, n_levels, rows) -> list[_Point]:
    """Every combination of what is varied."""
    if effect is not None and (callable(tested) or len(tested) > 1):
        raise ValueError(
            "effect= needs a test of one fixed effect; give params= instead"
        )
    effects: list[float | None] = [None]
    if effect is not None:
        values = np.atleast_1d(np.asarray(effect, float))
        if not len(values):
            raise ValueError("effect is empty; give values, or leave it out")
        if not np.isfinite(values).all():
            raise ValueError(f"effect must be finite; found {effect}")
        effects = [float(e) for e in values]
    levels, per_level = _counts("n_levels", n_levels), _counts("rows", rows)
    return [_Point(*p) for p in itertools.product(effects, levels, per_level)]


def _counts(name: str, given: Any) -> list[int | None]:
    if given is None:
        return [None]
    counts = [check_count(name, n) for n in np.atleast_1d(given)]
    if not counts:
        raise ValueError(f"{name} is empty; give numbers, or leave it out")
    if name == "n_levels" and min(counts) < 2:
        raise ValueError("n_levels must be at least 2")
    return list(counts)


def _largest(pilot: _Pilot, along, points: list[_Point]) -> Extended:
    levels = [p.n_levels for p in points if p.n_levels is not None]
    rows = [p.rows for p in points if p.rows is not None]
    term = _term(pilot, along, bool(levels or rows))
    return extend(
        pilot.design, term, max(levels, default=None), max(rows, default=None)
    )


def _term(pilot: _Pilot, along, needed: bool) -> int:
    """The first term of the factor that is extended."""
    if along is None:
        if needed and len(set(pilot.groups)) > 1:
            raise ValueError(
                "say along= which grouping factor n_levels and rows are about: "
                f"{', '.join(dict.fromkeys(pilot.groups))}"
            )
        return 0
    if isinstance(along, str):
        if along not in pilot.groups:
            raise ValueError(
                f"along={along!r} is no grouping factor; there are "
                f"{', '.join(dict.fromkeys(pilot.groups))}"
            )
        return pilot.groups.index(along)
    if not 0 <= along < len(pilot.groups):
        raise DesignError(f"along={along} is no position of a term")
    return int(along)


def _describe(test: Any, kind: str) -> str:
    if callable(test):
        return getattr(test, "__name__", "the test given")
    single = isinstance(test, (str, int, np.integer))
    names = test if single else ", ".join(map(str, test))
    return f"the {'Wald' if kind == 'wald' else 'likelihood-ratio'} test of {names}"


# ---- a lane ------------------------------------------------------------------------


def _replicate(what: What, tested, kind, n_sims, shared, i, max_iter) -> Outcome:
    design, arranged, truth, weights, key = shared
    point = i // n_sims
    params = truth.replace(beta=truth.beta[point])
    w = weights[point]
    drawn = design.replace(weights=w)
    y = simulate(key.replicate(i), params, drawn, what.family)
    design = arranged.with_response(y, w)
    fit = fit_checked(what, design, None, max_iter)
    n_iter, converged = fit.n_iter, fit.converged
    if callable(tested):
        p = _given_p(tested(fit, design), y.dtype)
    elif kind == "wald":
        p = wald_p(fit, tested)
    else:
        keep = np.setdiff1d(np.arange(design.X.shape[1]), tested)
        smaller = design.replace(X=design.X[:, keep])
        less = fit_checked(what, smaller, None, max_iter)
        p = chi2_p(2.0 * (fit.loglik - less.loglik), len(tested))
        n_iter = jnp.maximum(n_iter, less.n_iter)
        converged = converged & less.converged
    result = {"p_value": p, "converged": converged, "status": fit.status}
    return Outcome(result, n_iter, converged)


def _given_p(p: Any, dtype: Any) -> Array:
    """What a user's test returned, as a p-value ()."""
    if not isinstance(p, (int, float, np.ndarray, np.generic, jax.Array)):
        raise TypeError(f"test must return a p-value; found {type(p).__name__}")
    p = jnp.asarray(p)
    if p.dtype == bool or p.size != 1:
        raise TypeError(
            "test must return one p-value, a number from 0 to 1; found an array of "
            f"{p.dtype} and shape {p.shape}"
            + (". For a decision: jnp.where(rejects, 0.0, 1.0)" if p.size == 1 else "")
        )
    return jnp.reshape(p, ()).astype(dtype)


def wald_p(fit: Fit, tested: tuple[int, ...]) -> Array:
    """P-value of the hypothesis that these fixed effects are zero, ()."""
    at = np.array(tested)
    beta, V = fit.params.beta[at], fit.vcov_beta[at[:, None], at]
    return chi2_p(beta @ (spd_inverse(V)[0] @ beta), len(tested))


def chi2_p(x: Array, df: int) -> Array:
    """Upper tail of the chi-squared distribution, ()."""
    half = jnp.asarray(0.5 * df, x.dtype)
    return jax.scipy.special.gammaincc(half, jnp.maximum(0.5 * x, 0.0))
