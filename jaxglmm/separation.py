"""Separation: fixed effects without a finite maximum likelihood estimate.

A response at the edge of its range (0 of n, n of n, a count of 0) becomes ever more
likely as its linear predictor goes to the end on its side, s_i = -1 or +1. If there is
a direction d (p,) with

    s_i x_i'd >= 0 for responses at an edge,   > 0 for one of them at least,
    x_i'd = 0 for all others,                                                       (1)

the likelihood rises along it for ever (Albert and Anderson 1984), random effects or
not. In a cumulative model d has the thresholds behind it, and the mass of a category
rises as its own move away from x_i'd (McCullagh 1980). Whether there is such a d is a
linear program; it is asked only of fits that ended flat or far out. Repeated over the
responses that do not gain yet, it gives all that can; the others are an ordinary data
set, which determines the combinations of its own rows x_i and no others.

References: Albert and Anderson (1984), Biometrika 71(1), doi:10.1093/biomet/71.1.1;
Konis (2007), Linear programming algorithms for detecting separated data, Oxford.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxglmm.collinear import null_space
from jaxglmm.designs import Design
from jaxglmm.errors import Status
from jaxglmm.families import Cumulative, Family, WithDispersion, ZeroInflated
from jaxglmm.results import Fit

__all__ = ["mark_separation", "separated_span", "separating_direction"]

_FAR = 12.0  # linear predictors beyond this raise the question: a chance of 6e-6


def separating_direction(design: Design, family: Family) -> np.ndarray | None:
    """A direction (1) in the units of beta, and of thresholds behind it, or None."""
    rows = _edge_rows(design, family)
    if not len(rows[0]):
        return None
    direction, _, size = _climb(*rows)
    return None if direction is None else direction / size


def separated_span(design: Design, family: Family) -> np.ndarray:
    """The space (p, k) that all directions (1) together span.

    Responses that gain along none of them determine x'beta of their own rows, and the
    combinations of those; the span is the null space of these rows. ``p`` counts beta
    and the thresholds behind it.
    """
    rows = _edge_rows(design, family)
    p = rows[0].shape[1]
    if not len(rows[0]):
        return np.zeros((p, 0))
    direction, left, size = _climb(*rows)
    if direction is None:
        return np.zeros((p, 0))
    return null_space(left) / size[:, None]


def _edge_rows(design: Design, family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Rows of responses at an edge, with the sign of their side, and of all others."""
    w = design.weights
    used = np.ones(design.n_obs, bool) if w is None else np.asarray(w) > 0
    X, y = np.asarray(design.X, float)[used], np.asarray(design.y)[used]
    if isinstance(family, Cumulative):
        at_edge, inside = _between_thresholds(X, y, family.n_own)
    else:
        at_edge, inside = _at_edges(X, y, family)
    return (at_edge, inside) if X.shape[1] else (at_edge[:0], inside)


def _at_edges(X: np.ndarray, y: np.ndarray, family: Family):
    """Rows s_i x_i of responses at an edge, and x_i of those inside."""
    hurdle = False
    while isinstance(family, ZeroInflated | WithDispersion):
        hurdle = hurdle or (
            isinstance(family, ZeroInflated) and not family.base.has_zero
        )
        family = family.base
    if hurdle:  # its zeros say nothing of the mean
        X, y = X[y != 0], y[y != 0]
    side = np.zeros(len(y))
    kinds = ("count", "positive count", "nonnegative", "proportion")
    if family.support == "proportion" and family.link != "log":
        side[y == 1] = 1.0
    elif family.support not in kinds or family.link != "log":
        return X[:0], X
    side[y == (1 if family.support == "positive count" else 0)] = -1.0
    return side[side != 0][:, None] * X[side != 0], X[side == 0]


def _between_thresholds(X: np.ndarray, y: np.ndarray, n_own: int):
    """Category k lies between thresholds: above the one before, below its own.

    Along (d, t) its mass rises if t_k >= x_i'd and t_{k-1} <= x_i'd.
    """
    tau = np.eye(n_own)
    k = y.astype(int)
    below, above = k < n_own, k > 0
    parts = [
        np.hstack([-X[below], tau[k[below]]]),
        np.hstack([X[above], -tau[k[above] - 1]]),
    ]
    return np.concatenate(parts), np.zeros((0, X.shape[1] + n_own))


def _climb(at_edge: np.ndarray, inside: np.ndarray):
    """Solve (1), columns in units of their size, until no further row gains.

    Returns the sum of the directions found, or None, the rows that gain along none of
    them, and the sizes.
    """
    size = np.sqrt(np.mean(np.concatenate([at_edge, inside]) ** 2, axis=0))
    size = np.where(size > 0, size, 1.0)
    at_edge = np.unique(at_edge / size, axis=0)
    inside = np.unique(inside / size, axis=0)
    total, still = np.zeros(len(size)), np.ones(len(at_edge), bool)
    while still.any():
        d = _direction(at_edge, inside, still)
        if d is None:
            break
        total += d
        still &= at_edge @ d < 1e-5
    found = total if total.any() else None
    return found, np.concatenate([at_edge[still], inside]), size


def _direction(at_edge: np.ndarray, inside: np.ndarray, still: np.ndarray):
    """The direction in a box along which the rows ``still`` gain most, or None."""
    from scipy.optimize import linprog

    found = linprog(
        -at_edge[still].sum(axis=0),
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
    if np.max(gains[still]) < 1e-4 or np.min(gains) < -1e-6 or off > 1e-6:
        return None
    return np.where(np.abs(d) > 1e-6, d, 0.0)


def mark_separation(fit: Fit, design: Design, family: Family) -> Fit:
    """The fit, called separated where it ended flat or far out because of that."""
    if Status(int(fit.status)).ok:
        far = np.max(np.abs(design.X @ np.asarray(fit.params.beta)), initial=0.0)
        if far < _FAR:
            return fit
    if np.isnan(fit.loglik) and Status(int(fit.status)).ok:
        return fit
    if separating_direction(design, family) is None:
        return fit
    return dataclasses.replace(
        fit, status=np.int32(Status.SEPARATED), converged=np.bool_(False)
    )
