"""Designs of other sizes made from a pilot's: more groups, more rows in each.

The levels of the pilot are put in an order o whose beginnings are like the whole in the
p columns c of X that are constant within levels, such as an arm of a trial or an age:

    o_n = argmin_j sum_c (sum_{i<n} x_{o_i c} + x_jc - n mean_c)^2 / var_c

over the levels j that are left, the first of the pilot's where several are as good, and
the pilot's order where there is no such column. Level L of the extended factor copies
the rows of level o_(L mod J); row r of a level copies its row r mod n_L, in the order
of the data. Factors nested in the extended one get new levels with
it, others keep theirs. All sizes of a curve are rows of the largest design, with weight
zero where a smaller one has none, so that one compiled program serves them all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxglmm.designs import Design
from jaxglmm.errors import DesignError

__all__ = ["Extended", "extend"]


class Extended(NamedTuple):
    """The design, and for each row its level and its place in it, (N,)."""

    design: Design
    level: np.ndarray
    place: np.ndarray

    def weights(self, n_levels: int, rows: int | None) -> np.ndarray:
        """Prior weights (N,) with zeros outside the first levels and rows."""
        inside = self.level < n_levels
        if rows is not None:
            inside = inside & (self.place < rows)
        w = self.design.weights
        return np.where(inside, 1.0 if w is None else w, 0.0)


def extend(
    design: Design, term: int, n_levels: int | None = None, rows: int | None = None
) -> Extended:
    """Design (NumPy) with ``n_levels`` levels of a term's factor and ``rows`` in each.

    Parameters
    ----------
    design : Design
    term : int
        The term whose grouping factor is extended.
    n_levels, rows : int, optional
        As in the pilot when left out.
    """
    codes = np.asarray(design.terms[term].group)
    J = design.terms[term].n_levels
    n_levels = J if n_levels is None else n_levels
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=J)
    if (counts == 0).any():
        raise DesignError(
            f"level {int(np.argmin(counts))} of the factor of term {term} has no rows "
            "to copy"
        )
    first = np.cumsum(counts) - counts
    pilot = _in_proportion(np.asarray(design.X), codes, J)[np.arange(n_levels) % J]
    levels = np.arange(n_levels)
    sizes = counts[pilot] if rows is None else np.full(n_levels, rows)
    level = np.repeat(levels, sizes)
    place = np.arange(len(level)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = pilot[level]
    take = order[first[source] + place % counts[source]]

    def at(x):
        return None if x is None else np.asarray(x)[take]

    terms = tuple(_extended_term(t, codes, J, take, level) for t in design.terms)
    others = tuple(
        dataclasses.replace(p, X=at(p.X), offset=at(p.offset)) for p in design.others
    )
    made = Design(
        at(design.y), at(design.X), terms, at(design.weights), at(design.offset), others
    )
    return Extended(made, level, place)


_MOST = 5000  # levels that are put in order


def _in_proportion(X: np.ndarray, codes: np.ndarray, J: int) -> np.ndarray:
    """Levels (J,) in an order whose beginnings are like the whole; see the top."""
    low, high = np.full((J, X.shape[1]), np.inf), np.full((J, X.shape[1]), -np.inf)
    np.minimum.at(low, codes, X)
    np.maximum.at(high, codes, X)
    constant = (low == high).all(axis=0) & (np.ptp(low, axis=0) > 0)
    if J > _MOST or not constant.any():
        return np.arange(J)
    x = low[:, constant]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    order, ahead, left = [], np.zeros(x.shape[1]), np.ones(J, bool)
    for _ in range(J):
        off = np.where(left, np.sum((ahead + x) ** 2, axis=1), np.inf)
        j = int(np.argmax(off <= off.min() * (1.0 + 1e-9) + 1e-9))
        order.append(j)
        ahead, left[j] = ahead + x[j], False
    return np.array(order)


def _extended_term(t, codes: np.ndarray, J: int, take: np.ndarray, level: np.ndarray):
    group = np.asarray(t.group)
    copy = level // J
    if np.array_equal(group, codes) and t.n_levels == J:
        new, n_new = level, int(level.max()) + 1
    else:
        owner = np.full(t.n_levels, -1)
        owner[group] = codes
        nested = np.array_equal(owner[group], codes)
        n_copies = int(copy.max()) + 1
        new = group[take] + (copy * t.n_levels if nested else 0)
        n_new = t.n_levels * (n_copies if nested else 1)
    return dataclasses.replace(
        t, z=np.asarray(t.z)[take], group=new.astype(np.int32), n_levels=n_new
    )
