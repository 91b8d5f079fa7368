"""Why a fit has no optimum, or one that means nothing, as the data show it.

- A truncated negative binomial whose mean (before truncation) runs to zero tends to the
  logarithmic series distribution, p^y / (-y log(1 - p)) (Fisher et al. 1943).
- Groups of responses of one kind: for a pure level E prod p_i <= E min p_i, and both
  are equal as the standard deviation of its effect runs to infinity, so there lies the
  supremum of the likelihood. Laplace's approximation has its optimum earlier.
- A response that the model reproduces: the dispersion runs to zero, and the density at
  the data without end.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from jaxglmm.errors import Status
from jaxglmm.families import (
    Beta,
    BetaBinomial,
    Binomial,
    Cumulative,
    Family,
    Gamma,
    Gaussian,
    InverseGaussian,
    LogNormal,
    Student,
    TruncatedNegativeBinomial,
    Tweedie,
    WithDispersion,
    ZeroInflated,
)
from jaxglmm.flatness import sizes
from jaxglmm.inference.rows import row_statistics

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["mark_limit", "pure_groups", "reproduces", "vanishing"]

_GONE = -8.0  # linear predictors below this are of a mean that runs to zero
_DENSITIES = (Beta, Gamma, Gaussian, InverseGaussian, LogNormal, Student, Tweedie)


def _base(family: Family) -> Family:
    while isinstance(family, ZeroInflated | WithDispersion):
        family = family.base
    return family


def vanishing(m: GLMM) -> list[str]:
    """Coefficients along which a truncated mean runs to zero, and nothing else does."""
    F = m.flat_directions
    if not isinstance(_base(m.family), TruncatedNegativeBinomial) or not F.shape[1]:
        return []
    p = len(m.fixef)
    # where every mean vanishes the effects' theta does not matter either
    rest = F[p : p + sum(part.X.shape[1] for part in m.design.others)]
    moved = np.abs((np.asarray(m.design.X) / sizes(m)[:p]) @ F[:p]).max(axis=1) > 1e-4
    moved &= np.asarray(m.design.y) > 0
    if (
        np.any(np.abs(rest) > 1e-2)
        or not moved.any()
        or np.any(m._eta[moved, 0] > _GONE)
    ):
        return []
    return [n for n, flat in zip(m.frame.X_names, m.flat_parameters) if flat]


def mark_limit(m: GLMM) -> GLMM:
    """The model, at a limit where a truncated mean runs to zero."""
    if m.status != Status.NOT_IDENTIFIED or not vanishing(m):
        return m
    at = {"status": np.int32(Status.LIMIT), "converged": np.bool_(True)}
    return dataclasses.replace(m, fit=dataclasses.replace(m.fit, **at))


def pure_groups(m: GLMM) -> list[str]:
    """Grouping factors with an intercept and responses of one kind in every level.

    All events or none, or one category. A level of a single trial says nothing.
    """
    kinds = (Binomial, BetaBinomial, Cumulative)
    if not isinstance(m.family, kinds) or m.priors is not None:
        return []
    y, w = np.asarray(m.design.y), m._weights
    if not isinstance(m.family, Cumulative) and np.any((y > 0) & (y < 1)):
        return []
    out = []
    for t in m.frame.terms:
        code, n = np.asarray(t.group), t.n_levels
        lowest, highest = np.full(n, np.inf), np.full(n, -np.inf)
        np.minimum.at(lowest, code, y)
        np.maximum.at(highest, code, y)
        repeated = np.any(np.bincount(code, w, n) > 1)
        pure = np.array_equal(lowest, highest) and np.ptp(lowest) > 0
        if pure and repeated and "(Intercept)" in t.z_names:
            out.append(t.group_name)
    return list(dict.fromkeys(out))


def reproduces(m: GLMM) -> bool:
    """Whether the means are the response itself, so that its density has no bound."""
    base = _base(m.family)
    if not m.is_generalized or not isinstance(base, _DENSITIES):
        return False
    eta = m._eta[:, : base.n_eta]
    mu = row_statistics(base, eta, m._psi, m.design).mu
    used = m._weights > 0
    if isinstance(m.family, ZeroInflated) or isinstance(base, Tweedie):
        used &= np.asarray(m.design.y) != 0
    y = np.asarray(m.design.y)[used]
    size = np.std(y) if len(y) else 0.0
    if size < 1e-12 * np.max(np.abs(y), initial=0.0):
        size = np.max(np.abs(y))
    return bool(len(y)) and bool(np.max(np.abs(y - mu[used])) < 1e-4 * size)
