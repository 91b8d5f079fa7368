"""The bootstrap: refits of data drawn from a fitted model, or from its data.

    parametric      y* from the model at its estimates, effects drawn anew
    semiparametric  y* = X beta + Z b* + e*; b* and e* drawn from the conditional modes
                    and residuals, centred and scaled to the estimated covariances
    cases           levels of a grouping factor drawn with replacement, with their rows

With replicates t*_r of a quantity t, and alpha = 1 - level:

    percentile   quantiles of t* at alpha/2 and 1 - alpha/2
    basic        2 t minus these, in reverse
    BCa          quantiles at Phi(z0 + (z0 + z) / (1 - a (z0 + z))), z0 = Phi^-1 of the
                 share of t* below t, ties by half; a = sum d^3 / (6 (sum d^2)^(3/2)),
                 d the mean less the values of t without one level of the top factor

References: Davison and Hinkley (1997), Bootstrap Methods and their Application;
Efron (1987), J. Am. Stat. Assoc. 82(397), doi:10.1080/01621459.1987.10478410;
Carpenter, Goldstein, Rasbash (2003), Appl. Statist. 52(4), doi:10.1111/1467-9876.00415.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxglmm.control import Control
from jaxglmm.designs import Design
from jaxglmm.families import Family, is_linear
from jaxglmm.fitting import What, fit_checked
from jaxglmm.results import Fit
from jaxglmm.simulation import linear_predictor, simulate
from jaxglmm.studies.arrange import arrange
from jaxglmm.studies.batch import check_batch
from jaxglmm.studies.cases import case_plan, draw_cases, top_factor
from jaxglmm.studies.checkpoint import design_facts
from jaxglmm.studies.lanes import Outcome, check_count
from jaxglmm.studies.parameters import natural, parameter_names
from jaxglmm.studies.study import (
    Running,
    as_key,
    run_study,
    warn_if_lost,
)
from jaxglmm.typing import Array

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["Bootstrap", "bootstrap"]

_KINDS = ("parametric", "semiparametric", "cases")
_ROUNDING = 1e-6  # of a standard deviation: values nearer than that are the same


@dataclass(frozen=True, repr=False)
class Bootstrap:
    """Bootstrap replicates of a model's parameters; made by ``m.bootstrap``.

    Attributes
    ----------
    estimate : Series
        Of the fit: every parameter, then the user's statistic.
    replicates : DataFrame
        One row per replicate; not a number where the refit did not converge.
    status : array (n,)
        A :class:`jaxglmm.Status` code each.
    kind : str
    """

    estimate: pd.Series
    replicates: pd.DataFrame
    status: np.ndarray
    kind: str
    _without: Callable[[str | None], np.ndarray]

    def confint(
        self, level: float = 0.95, method: str = "percentile", by: str | None = None
    ) -> pd.DataFrame:
        """Confidence intervals, a row per quantity.

        Parameters
        ----------
        level : float
        method : {"percentile", "basic", "bca"}
            BCa refits the model without each level of the top grouping factor.
        by : str, optional
            That factor, where factors are crossed and the bootstrap was not given one.

        Returns
        -------
        DataFrame
            Columns ``lower`` and ``upper``.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1; found {level}")
        methods = ("percentile", "basic", "bca")
        if method not in methods:
            raise ValueError(f"method={method!r} is not one of {', '.join(methods)}")
        if by is not None and method != "bca":
            raise ValueError(f"by={by!r} is for method='bca'; leave it out")
        without = self._without(by) if method == "bca" else None
        out = []
        for j, t in enumerate(self.estimate):
            draws = self.replicates.iloc[:, j].to_numpy()
            draws = draws[np.isfinite(draws)]
            out.append(
                _interval(
                    draws, float(t), level, method,
                    None if without is None else without[:, j],
                )
            )  # fmt: skip
        return pd.DataFrame(out, self.estimate.index, ["lower", "upper"])

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """Estimate, bootstrap bias and standard error, percentile interval, count."""
        table = pd.DataFrame({"estimate": self.estimate})
        table["bias"] = self.replicates.mean() - self.estimate
        table["std_error"] = self.replicates.std()
        table[["lower", "upper"]] = self.confint(level)
        table["n"] = self.replicates.notna().sum()
        return table

    def plot(self, axes: Any = None, interval: pd.DataFrame | None = None) -> Any:
        """A histogram per quantity, with its estimate and its interval.

        Parameters
        ----------
        axes : sequence of matplotlib Axes, optional
            One for each quantity.
        interval : DataFrame, optional
            What :meth:`confint` returns; its default where left out.

        Returns
        -------
        array of matplotlib Axes
        """
        from jaxglmm.studies.plots import plot_bootstrap

        return plot_bootstrap(
            self, self.confint() if interval is None else interval, axes
        )

    def __repr__(self) -> str:
        n, failed = len(self.status), int(self.replicates.isna().all(axis=1).sum())
        head = f"{self.kind} bootstrap, {n} replicates, {failed} not converged"
        return f"{head}\n\n{self.summary().round(4).to_string()}"


def _interval(draws, t: float, level: float, method: str, without) -> tuple:
    from scipy.stats import norm

    if len(draws) < 2 or not np.isfinite(t):
        return (np.nan, np.nan)
    tails = np.array([0.5 - level / 2.0, 0.5 + level / 2.0])
    if method == "basic":
        low, high = np.quantile(draws, tails)
        return (2.0 * t - high, 2.0 * t - low)
    if method == "bca":
        rounding = _ROUNDING * np.std(draws)  # zero but for it is zero
        below, same = draws < t - rounding, np.abs(draws - t) <= rounding
        share = (np.sum(below) + 0.5 * np.sum(same)) / len(draws)
        share = np.clip(share, 0.5 / len(draws), 1.0 - 0.5 / len(draws))
        z0 = norm.ppf(share)
        d = np.nanmean(without) - without[np.isfinite(without)]
        d = np.where(np.abs(d) <= rounding, 0.0, d)
        size = np.sum(d**2)
        a = np.sum(d**3) / (6.0 * size**1.5) if size > 0 else 0.0
        z = z0 + norm.ppf(tails)
        tails = norm.cdf(z0 + z / (1.0 - a * z))
    return tuple(np.quantile(draws, tails))


def bootstrap(
    m: GLMM,
    n: int,
    key: Any,
    kind: str,
    by: str | None,
    statistic: Callable[[Fit], Any] | None,
    control: Control | None,
    running: Running,
) -> Bootstrap:
    """Refit n samples; see :meth:`jaxglmm.GLMM.bootstrap`."""
    n = check_count("n", n)
    if statistic is not None and not callable(statistic):
        raise TypeError(
            f"statistic must be a JAX function of a Fit; found {statistic!r}"
        )
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, _KINDS))}")
    what, design = check_batch(
        m.design, m.family, m.method, m.n_quad, m.priors,
        m.control if control is None else control,
    )  # fmt: skip
    warn_if_lost(m)
    source, facts = _source(m, design, kind, by)
    prng = as_key(key)
    facts = {
        **design_facts(design), "kind": kind, "source": source, "key": prng, **facts,
        "statistic": statistic,
    }  # fmt: skip
    arranged = None if kind == "cases" else arrange(design)
    shared = design, arranged, source, prng
    out = run_study(
        _replicate, what, (kind, statistic), shared, design, n, running,
        label="bootstrap", facts=facts, own_code=statistic is None,
    )  # fmt: skip
    names = parameter_names(m.design, m.family, m.is_generalized, m.frame)
    start, more = _at_fit(m, what, design, statistic)
    more = [f"{name} (statistic)" if name in names else name for name in more]
    values = np.where(out["converged"][:, None], out["value"], np.nan)

    def without(factor: str | None) -> np.ndarray:
        factor = by if factor is None else factor
        return _jackknife(m, what, design, factor, statistic, running)

    return Bootstrap(
        pd.Series(start, names + more, name="estimate"),
        pd.DataFrame(values, columns=names + more), out["status"], kind, without,
    )  # fmt: skip


def _source(m: GLMM, design: Design, kind: str, by) -> tuple[Any, dict[str, Any]]:
    """What samples are drawn from, and what that adds to the facts."""
    if kind == "cases":
        return case_plan(design, top_factor(m, by)), {"by": str(by)}
    if by is not None:  # for BCa intervals later; refused now where it names nothing
        top_factor(m, by)
    if kind == "parametric":
        return m.fit.params, {}
    if not (is_linear(m.family) and not m.is_generalized):
        raise ValueError(
            "kind='semiparametric' draws from residuals, which only linear models "
            "have; use 'parametric' or 'cases'"
        )
    return _residual_source(m), {}


def _residual_source(m: GLMM) -> tuple:
    """Parameters, and modes and residuals scaled to the estimated covariances."""
    sigma = m.sigma
    b = []
    for modes, Lam in zip(m.fit.b, m.factors):
        centred = modes - modes.mean(axis=0)
        S = centred.T @ centred / len(centred)
        Q = Lam @ Lam.T
        d = np.sqrt(np.diagonal(Q))
        d = np.where(d > 0, d, 1.0)  # in units of their own effects are alike
        # symmetric roots: where Q is singular, so is S, with the same range
        S, Q = S / np.outer(d, d), Q / np.outer(d, d)
        b.append(sigma * (centred / d) @ _root(S, -0.5) @ _root(Q, 0.5) * d)
    w = np.asarray(m._weights)
    e = np.sqrt(w) * (np.asarray(m.design.y) - m._mu)
    e = e - e.mean()
    return m.fit.params, tuple(b), e * (sigma / np.sqrt(np.mean(e**2))), np.sqrt(w)


def _root(S: np.ndarray, power: float) -> np.ndarray:
    """Power of a symmetric matrix on its range."""
    d, U = np.linalg.eigh(S)
    inside = d > 1e-10 * max(d.max(), 1e-300)
    return (U * np.where(inside, np.where(inside, d, 1.0) ** power, 0.0)) @ U.T


def _response(kind: str, key: Array, design: Design, source, family: Family) -> Array:
    """The response of a replicate, (n,)."""
    if kind == "parametric":
        return simulate(key, source, design, family)
    params, b, e, root_w = source
    keys = jax.random.split(key, len(b) + 1)
    drawn = tuple(
        modes[jax.random.randint(k, (modes.shape[0],), 0, modes.shape[0])]
        for k, modes in zip(keys[1:], b)
    )
    eta = linear_predictor(params, design, drawn)
    pick = jax.random.randint(keys[0], e.shape, 0, e.shape[0])
    return eta + e[pick] / root_w


def _replicate(what: What, kind, statistic, shared, i, max_iter) -> Outcome:
    design, arranged, source, key = shared
    own = key.replicate(i)
    if kind == "cases":
        design = draw_cases(own, design, source)
    else:
        y = _response(kind, own, design, source, what.family)
        design = arranged.with_response(y)
    return _value(what, design, statistic, max_iter)


def _value(what: What, design: Design, statistic, max_iter) -> Outcome:
    fit = fit_checked(what, design, None, max_iter)
    value = _quantities(fit, design, what.family, statistic)
    result = {"value": value, "status": fit.status, "converged": fit.converged}
    return Outcome(result, fit.n_iter, fit.converged)


def _quantities(fit: Fit, design: Design, family: Family, statistic) -> Array:
    value = natural(fit.params, design, family)
    if statistic is None:
        return value
    more = statistic(fit)
    if not isinstance(more, (int, float, np.ndarray, np.generic, jax.Array)):
        raise TypeError(
            f"statistic must return a number or an array; found {type(more).__name__}"
        )
    return jnp.concatenate([value, jnp.ravel(jnp.asarray(more, value.dtype))])


def _at_fit(m, what: What, design: Design, statistic) -> tuple[np.ndarray, list[str]]:
    """Values of the fit itself, and the names of the user's."""
    with jax.enable_x64(True):
        fit = jax.tree.map(jnp.asarray, m.fit)
        values = np.asarray(_quantities(fit, design, what.family, statistic))
        q = len(np.asarray(natural(fit.params, design, what.family)))
    more = len(values) - q
    if more == 1:
        return values, [getattr(statistic, "__name__", "statistic")]
    return values, [f"statistic[{i}]" for i in range(more)]


# ---- without one level -------------------------------------------------------------


def _jackknife(m, what: What, design, by, statistic, running: Running) -> np.ndarray:
    """Values without each level of the top factor, (J, q)."""
    term = design.terms[top_factor(m, by)]
    running = dataclasses.replace(running, checkpoint=None)
    out = run_study(
        _leave_out, what, (statistic,), (design, np.asarray(term.group)), design,
        term.n_levels, running, label="jackknife", facts={},
        own_code=statistic is None,
    )  # fmt: skip
    return np.where(out["converged"][:, None], out["value"], np.nan)


def _leave_out(what: What, statistic, shared, i, max_iter) -> Outcome:
    design, group = shared
    w = jnp.ones_like(design.y) if design.weights is None else design.weights
    w = jnp.where(group == i.astype(group.dtype), 0.0, w)
    return _value(what, design.replace(weights=w), statistic, max_iter)
