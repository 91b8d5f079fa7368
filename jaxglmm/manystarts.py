"""Where a likelihood may have several optima, and where else to look for them.

With few levels, few rows, weights of very different size, a variance of zero found or
two parameters for one overdispersion, the likelihood of a mixed model may have a local
optimum beside the best one; its derivatives do not tell. Such data are fitted again
from other starts by the program that is there, which costs a fraction of the first fit,
and the best is kept. How many starts an optimum rests on is part of the verdict.

Starts are the same ones always. Shapes: theta (m,) in inner units for linear models,
in the user's units for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jaxglmm.designs import Design
from jaxglmm.errors import Status
from jaxglmm.results import Fit, Params
from jaxglmm.starts import default_start

__all__ = ["best", "count_linear", "inner_starts", "points"]

_FEW_ROWS = 40  # of random models with 20 rows 1 in 50 has several optima
_FEW_LEVELS = 8  # of a grouping factor: 1 in 60 with covariates constant within
_UNEVEN = 100.0  # ratio of the largest weight to the smallest
_MANY_ROWS = 10_000  # from which a fit is no trifle and its optimum no accident
_STARTS, _STARTS_FEW = 10, 24
_SAME = 1e-7  # difference in the objective between optima that are one


def count_linear(design: Design, singular: bool, status: int) -> int:
    """How many further starts a linear model deserves."""
    if design.n_obs <= _FEW_ROWS:
        return _STARTS_FEW
    w = design.weights
    uneven = w is not None and np.max(w) > _UNEVEN * np.min(w)
    ended = Status(int(status))
    lost = not (ended.ok or ended == Status.NOT_IDENTIFIED)  # flat from anywhere
    doubtful = singular or uneven or lost or _few_levels(design)
    return _STARTS if doubtful and design.n_obs <= _MANY_ROWS else 0


def _few_levels(design: Design) -> bool:
    return min(t.n_levels for t in design.terms) <= _FEW_LEVELS


def inner_starts(m: int, count: int) -> np.ndarray:
    """Further starting theta (count, m) of any size and sign."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-1.0, 1.7, (count, m))
    return sizes * rng.choice([-1.0, 1.0], sizes.shape)


def points(design: Design, fit: Fit) -> list[Params]:
    """Further starts of a generalized model around what a first fit has found.

    Small and large random effects, with little and much of what the family has beside
    its mean; fixed effects are left open (NaN), which is for the program to fill in.
    """
    psi, status = np.asarray(fit.params.psi), Status(int(fit.status))
    one_row = any(t.n_levels == design.n_obs for t in design.terms)
    beside = len(psi) > 0 and (design.n_obs <= 2 * _FEW_ROWS or one_row)
    doubtful = beside or _few_levels(design) or bool(fit.is_singular)
    doubtful = doubtful or status in (Status.LIMIT, Status.STALLED, Status.MAX_ITER)
    if not doubtful or design.n_obs > _MANY_ROWS or not len(fit.params.theta):
        return []
    usual = default_start(design.layout) / _units(design)
    moves = (-3.0, 3.0) if len(psi) else (0.0,)
    psi = np.clip(np.where(np.isfinite(psi), psi, 0.0), -5.0, 5.0)
    open_ = [np.full(len(c), np.nan) for c in (fit.params.beta, *fit.params.others)]
    return [
        Params(open_[0], size * usual, np.ones(()), psi + move, tuple(open_[1:]))
        for size in (0.2, 2.0)
        for move in moves
    ]


def _units(design: Design) -> np.ndarray:
    """Root mean squares (m,) of the columns that theta multiplies."""
    from jaxglmm.covariance import structure

    parts = []
    for term in design.terms:
        kind, size = structure(term.structure), np.sqrt(np.mean(term.z**2, axis=0))
        size = np.where(size > 0, size, 1.0)
        if kind.row is None:
            parts.append(np.ones(kind.n_theta(term.k)))
        else:
            parts.append(size[np.array(kind.row(term.k))])
    return np.concatenate(parts)


def best(first: Any, starts: Iterable[Any], fit_from: Callable[[Any], Any]) -> Any:
    """The fit with the lowest objective, however it ended, of the first and others.

    Of equal ones the first, unless some run saw that the objective is flat there.
    """
    fits = [first, *map(fit_from, starts)]
    found = [f for f in fits if np.isfinite(f.objective)]
    lowest = min((float(f.objective) for f in found), default=np.inf)
    equal = [f for f in found if float(f.objective) <= lowest + _SAME]
    flat = [f for f in equal if int(f.status) == Status.NOT_IDENTIFIED]
    return (flat or equal or fits)[0]
