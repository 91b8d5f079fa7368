"""Separation: fixed effects without a finite maximum likelihood estimate.

A response at the edge of its range (0 of n, n of n, a count of 0) becomes ever more
likely as its linear predictor goes to the end on its side, s_i = -1 or +1. If there is
a direction d (p,) with

    s_i x_i'd >= 0 for responses at an edge,   > 0 for one of them at least,
    x_i'd = 0 for all others,                                                       (1)

the likelihood rises along it for ever (Albert and Anderson 1984), random effects or
not. Whether there is one is a linear program; it is asked only of fits that ended flat
or far out.

References: Albert and Anderson (1984), Biometrika 71(1), doi:10.1093/biomet/71.1.1;
Konis (2007), Linear programming algorithms for detecting separated data, Oxford.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxglmm.designs import Design
from jaxglmm.errors import Status
from jaxglmm.families import Family
from jaxglmm.results import Fit

__all__ = ["mark_separation", "separating_direction"]

_FAR = 12.0  # linear predictors beyond this raise the question: a chance of 6e-6


def edges(family: Family, y: np.ndarray) -> np.ndarray:
    """Side of every response: -1 at the lower edge, 1 at the upper, 0 inside."""
    lower = y == 0
    if family.support == "proportion" and family.link != "log":
        return np.where(lower, -1.0, np.where(y == 1, 1.0, 0.0))
    if (
        family.support in ("count", "nonnegative", "proportion")
        and family.link == "log"
    ):
        return np.where(lower, -1.0, 0.0)
    return np.zeros(len(y))


def separating_direction(design: Design, family: Family) -> np.ndarray | None:
    """A direction (1) in the units of beta, (p,), or None."""
    if family.n_eta > 1 or design.X.shape[1] == 0:
        return None
    from scipy.optimize import linprog

    w = design.weights
    used = np.ones(design.n_obs, bool) if w is None else np.asarray(w) > 0
    X = np.asarray(design.X, float)[used]
    side = edges(family, np.asarray(design.y)[used])
    if not side.any():
        return None
    size = np.sqrt(np.mean(X**2, axis=0))
    X = np.unique(np.column_stack([X / np.where(size > 0, size, 1.0), side]), axis=0)
    X, side = X[:, :-1], X[:, -1]
    at_edge, inside = side[:, None] * X, X[side == 0]
    at_edge = at_edge[side != 0]
    found = linprog(
        -at_edge.sum(axis=0),
        A_ub=-at_edge,
        b_ub=np.zeros(len(at_edge)),
        A_eq=inside if len(inside) else None,
        b_eq=np.zeros(len(inside)) if len(inside) else None,
        bounds=(-1.0, 1.0),
        method="highs",
    )
    if found.status != 0:
        return None
    d = found.x / max(np.max(np.abs(found.x)), 1e-300)
    gains = at_edge @ d
    off = np.max(np.abs(inside @ d), initial=0.0)
    if np.max(gains) < 1e-4 or np.min(gains) < -1e-6 or off > 1e-6:
        return None
    return np.where(np.abs(d) > 1e-6, d, 0.0)


def mark_separation(fit: Fit, design: Design, family: Family) -> Fit:
    """The fit, called separated where it ended flat or far out because of that."""
    if Status(int(fit.status)).ok:
        far = np.max(np.abs(design.X @ np.asarray(fit.params.beta)), initial=0.0)
        side = edges(family, np.asarray(design.y))
        if not side.any() or far < _FAR:
            return fit
    if np.isnan(fit.loglik) and Status(int(fit.status)).ok:
        return fit
    if separating_direction(design, family) is None:
        return fit
    return dataclasses.replace(
        fit, status=np.int32(Status.SEPARATED), converged=np.bool_(False)
    )
