"""Levels of a grouping factor drawn with replacement, each draw a level of its own.

Slot s = 0 ... J - 1 of a sample holds the rows of a drawn level, padded with rows of
weight zero to those of the largest; factors nested in the drawn one get a level per
slot and place within it, crossed ones keep theirs. Shapes and the order of elimination
are the same for every sample; codes and parents are not.

    pick (J, R) rows of every level, inside (J, R) which of them count
    local[t] (n,) place of a row's level of term t within its level of the drawn factor
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.designs import Design
from jaxglmm.errors import DesignError
from jaxglmm.plan import Layout, Plan
from jaxglmm.typing import Array

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["Cases", "case_plan", "draw_cases", "top_factor"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cases:
    """What a sample is drawn from; see the module's head.

    ``width[t]``: levels of term t in a slot; 0 where the term keeps its own.
    """

    pick: Array
    inside: Array
    local: tuple[Array, ...]
    width: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})


def top_factor(m: GLMM, by: str | None) -> int:
    """The term whose factor's levels are independent, or that ``by`` names."""
    groups = [t.group_name for t in m.frame.all_terms]
    if by is not None:
        if by not in groups:
            raise ValueError(
                f"by={by!r} is no grouping factor; there are "
                f"{', '.join(dict.fromkeys(groups))}"
            )
        return groups.index(by)
    layout = m.design.layout
    if layout.tail:
        raise ValueError(
            "the grouping factors are crossed, so no level is independent of the "
            f"others; say by= which to draw: {', '.join(dict.fromkeys(groups))}"
        )
    return layout.blocks[-1].terms[0]


def case_plan(design: Design, term: int) -> Cases:
    """Prepare draws of the levels of a term's factor."""
    drawn = np.asarray(design.terms[term].group)
    J = design.terms[term].n_levels
    counts = np.bincount(drawn, minlength=J)
    R = int(counts.max())
    order = np.argsort(drawn, kind="stable")
    first = np.cumsum(counts) - counts
    place = np.arange(R)
    inside = place < counts[:, None]
    pick = order[(first[:, None] + np.where(inside, place, 0)) % len(drawn)]
    local, width = [], []
    for t in design.terms:
        group = np.asarray(t.group)
        owner = np.full(t.n_levels, -1)
        owner[group] = drawn
        if not np.array_equal(owner[group], drawn):
            local.append(group.astype(np.int32))
            width.append(0)
            continue
        by_owner = np.argsort(owner, kind="stable")
        n_own = np.bincount(owner[owner >= 0], minlength=J)
        start = (owner < 0).sum() + np.cumsum(n_own) - n_own
        rank = np.empty(t.n_levels, np.int64)
        rank[by_owner] = np.arange(t.n_levels)
        local.append((rank[group] - start[drawn]).astype(np.int32))
        width.append(int(n_own.max()))
    cases = Cases(
        pick.astype(np.int32), inside, tuple(local), tuple(width), design.layout
    )
    terms = _terms(design, cases, np.arange(J), np)
    y, X = np.asarray(design.y)[pick.ravel()], np.asarray(design.X)[pick.ravel()]
    plan = Design(y, X, terms).plan
    assert plan is not None
    if plan.pairs is not None:
        raise DesignError(
            "kind='cases' is not available for designs with so many crossed levels; "
            "use kind='parametric'"
        )
    return dataclasses.replace(cases, layout=plan.layout)


def _terms(design: Design, cases: Cases, drawn, xp) -> tuple:
    """Terms of the sample in which slot s holds level ``drawn[s]``."""
    J, R = cases.pick.shape
    rows = cases.pick[drawn].reshape(-1)
    slot = xp.repeat(xp.arange(J, dtype=xp.int32), R)
    out = []
    for t, local, width in zip(design.terms, cases.local, cases.width):
        code = local[rows]
        if width:
            code = slot * xp.int32(width) + code
        out.append(
            dataclasses.replace(
                t, z=xp.asarray(t.z)[rows], group=code,
                n_levels=J * width if width else t.n_levels,
            )
        )  # fmt: skip
    return tuple(out)


def draw_cases(key: Array, design: Design, cases: Cases) -> Design:
    """A sample of as many levels as there are; pure."""
    J = cases.pick.shape[0]
    drawn = jax.random.randint(key, (J,), 0, J)
    rows = cases.pick[drawn].reshape(-1)
    w = jnp.ones_like(design.y) if design.weights is None else design.weights
    w = jnp.where(cases.inside[drawn].reshape(-1), w[rows], 0.0)
    terms = _terms(design, cases, drawn, jnp)
    blocks = cases.layout.blocks
    codes = [terms[b.terms[0]].group for b in blocks]
    parents = tuple(
        jnp.zeros(blocks[f].n_levels, jnp.int32).at[codes[f]].set(codes[f + 1])
        for f in range(cases.layout.n_chain - 1)
    )
    others = tuple(
        dataclasses.replace(
            p, X=p.X[rows], offset=None if p.offset is None else p.offset[rows]
        )
        for p in design.others
    )
    return Design(
        design.y[rows], design.X[rows], terms, w,
        None if design.offset is None else design.offset[rows], others,
        Plan(cases.layout, parents, None),
    )  # fmt: skip
