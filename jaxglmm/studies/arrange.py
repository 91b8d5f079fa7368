"""Rows of a design put level by level, so that sums over them are plain reductions.

Scattered sums and gathers of rows are the larger part of the work of small lanes. In an
arranged design the rows of level j of the first block are j R ... j R + R - 1, R being
the most that any level has, with rows of weight zero behind those of a shorter one.
Levels, and so the random effects, stay as they are.

    rows (J R,) the row of the design that stands there, inside (J R,) whether it counts

Levels of a single grouping factor whose rows are the same are named in the plan, for
pooling.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.designs import Design
from jaxglmm.plan import Alike, Layout, Plan
from jaxglmm.typing import Array

__all__ = ["Arranged", "arrange", "can_arrange"]

_PADDING = 1.5  # rows after over rows before, at most
_CLASSES = 16  # the most that are pooled: sums over a class read every level


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arranged:
    """A design, and where its rows come from; None where they are as they were."""

    design: Design
    rows: Array | None = None
    inside: Array | None = None

    def with_response(self, y: Array, weights: Array | None = None) -> Design:
        """The design with a response (n,), and weights (n,), in the original order."""
        if self.rows is None or self.inside is None:
            changes = {} if weights is None else {"weights": weights}
            return self.design.replace(y=y, **changes)
        if weights is None:
            return self.design.replace(y=y[self.rows])
        w = jnp.where(self.inside, weights[self.rows], 0.0)
        return self.design.replace(y=y[self.rows], weights=w)


def can_arrange(design: Design) -> bool:
    """Whether the rows can stand level by level without too much padding."""
    plan = design.plan
    assert plan is not None
    block = plan.layout.blocks[0]
    codes = np.asarray(design.terms[block.terms[0]].group)
    most = int(np.bincount(codes).max())
    return plan.pairs is None and most * block.n_levels <= _PADDING * len(codes)


def arrange(design: Design) -> Arranged:
    """Arrange a design of NumPy arrays, unless that would pad it too much."""
    plan = design.plan
    assert plan is not None
    block = plan.layout.blocks[0]
    codes = np.asarray(design.terms[block.terms[0]].group)
    counts = np.bincount(codes, minlength=block.n_levels)
    R = int(counts.max())
    if not can_arrange(design):
        return Arranged(design)
    order = np.argsort(codes, kind="stable")
    first = np.cumsum(counts) - counts
    place = np.arange(R)
    inside = (place < counts[:, None]).ravel()
    rows = first[:, None] + np.minimum(place, np.maximum(counts - 1, 0)[:, None])
    rows = order[np.minimum(rows, len(order) - 1)].ravel().astype(np.int32)

    def at(x):
        return None if x is None else np.asarray(x)[rows]

    X = np.asarray(design.X)[rows]

    w = np.ones_like(design.y) if design.weights is None else design.weights
    w = np.where(inside, np.asarray(w)[rows], 0.0)
    terms = tuple(
        dataclasses.replace(t, z=at(t.z), group=at(t.group)) for t in design.terms
    )
    own = np.repeat(np.arange(block.n_levels, dtype=np.int32), R)
    terms = tuple(
        dataclasses.replace(t, group=own) if i in block.terms else t
        for i, t in enumerate(terms)
    )
    others = tuple(
        dataclasses.replace(p, X=at(p.X), offset=at(p.offset)) for p in design.others
    )
    layout = dataclasses.replace(plan.layout, rows_per_level=R)
    made = Design(
        at(design.y), X, terms, w, at(design.offset), others,
        Plan(layout, plan.parents, None, _alike(w, X, terms, layout)),
    )  # fmt: skip
    return Arranged(made, rows, inside)


def _alike(w: np.ndarray, X: np.ndarray, terms, layout: Layout) -> Alike | None:
    """Classes of levels that have the same rows (w, X, z), in any order.

    None where there are other blocks, or so many classes that little would be saved.
    """
    block, R = layout.blocks[0], layout.rows_per_level
    if layout.blocks[1:] or block.n_levels < 2 * (1 + block.k):
        return None
    rows = np.concatenate([w[:, None], X, *(t.z for t in terms)], axis=1)
    rows = np.where(w[:, None] > 0, rows, 0.0)
    level = np.arange(len(rows)) // R
    rows = rows[np.lexsort((*rows.T, level))].reshape(block.n_levels, -1) + 0.0
    classes: dict[bytes, int] = {}
    member = np.array([classes.setdefault(r.tobytes(), len(classes)) for r in rows])
    n_classes = len(classes)
    if 2 * n_classes * (1 + block.k) > block.n_levels or n_classes > _CLASSES:
        return None
    member = member[:, None] == np.arange(n_classes)
    return Alike(np.argmax(member, axis=0).astype(np.int32), member)
