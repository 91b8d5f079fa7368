"""Designs of different sizes side by side, as lanes of one program.

Rows of weight zero and empty levels count for nothing, so that designs with the same
terms and the same order of elimination can be padded to the largest of them:

    y (L, n), X (L, n, p), z (L, n, k), group (L, n), parents (L, J)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxglmm.designs import Design, check_design
from jaxglmm.errors import DesignError
from jaxglmm.plan import Layout, Plan

__all__ = ["stack_designs", "widen"]


def stack_designs(designs: Sequence[Design]) -> Design:
    """One Design whose arrays have a leading lane axis.

    Raises
    ------
    DesignError
        Naming the first design that differs from the one in front in its columns,
        terms or order of elimination.
    """
    designs = list(designs)
    if not designs:
        raise DesignError("fit_batch got an empty sequence of designs")
    for i, design in enumerate(designs):
        if not isinstance(design, Design):
            raise DesignError(f"lane {i} is no Design; found {type(design).__name__}")
        check_design(design)
        difference = _difference(designs[0], design)
        if difference:
            raise DesignError(
                f"the design of lane {i} differs from that of lane 0 in {difference}; "
                "fit such designs apart"
            )
    n = max(d.n_obs for d in designs)
    blocks = zip(*(d.layout.blocks for d in designs))
    levels = [max(b.n_levels for b in same) for same in blocks]
    wide = [widen(d, n, levels) for d in designs]
    return jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *wide)


def _shape(layout: Layout) -> Layout:
    blocks = tuple(dataclasses.replace(b, n_levels=0) for b in layout.blocks)
    return dataclasses.replace(layout, blocks=blocks)


def _difference(a: Design, b: Design) -> str:
    """In what two designs differ that no padding removes; empty where in nothing."""
    if a.X.shape[1] != b.X.shape[1]:
        return f"the columns of X ({b.X.shape[1]}, not {a.X.shape[1]})"
    if [p.X.shape[1] for p in a.others] != [p.X.shape[1] for p in b.others]:
        return "the further linear predictors"
    if a.layout.structures != b.layout.structures or a.layout.term_k != b.layout.term_k:
        return "its terms"
    if _shape(a.layout) != _shape(b.layout):
        return "how its grouping factors are nested and crossed, or which is larger"
    return ""


def widen(design: Design, n: int, levels: Sequence[int]) -> Design:
    """Design (NumPy) with n rows and, block by block, so many levels."""
    plan = design.plan
    assert plan is not None
    if plan.pairs is not None:
        raise DesignError(
            "designs with as many crossed levels as these cannot be padded; fit them "
            "one by one"
        )
    more = n - design.n_obs
    blocks = tuple(
        dataclasses.replace(b, n_levels=J) for b, J in zip(plan.layout.blocks, levels)
    )
    per_term = {t: b.n_levels for b in blocks for t in b.terms}

    def rows(x, value=0.0):
        x = np.asarray(x)
        return np.concatenate([x, np.full((more, *x.shape[1:]), value, x.dtype)])

    y = np.asarray(design.y)
    weights = np.ones_like(y) if design.weights is None else design.weights
    offset = np.zeros_like(y) if design.offset is None else design.offset
    terms = tuple(
        dataclasses.replace(
            t, z=rows(t.z), group=rows(t.group, 0), n_levels=per_term[i]
        )
        for i, t in enumerate(design.terms)
    )
    others = tuple(
        dataclasses.replace(
            p,
            X=rows(p.X),
            offset=rows(np.zeros_like(y) if p.offset is None else p.offset),
        )
        for p in design.others
    )
    parents = tuple(
        np.concatenate([p, np.zeros(blocks[f].n_levels - len(p), p.dtype)])
        for f, p in enumerate(np.asarray(p) for p in plan.parents)
    )
    layout = dataclasses.replace(plan.layout, blocks=blocks)
    return Design(
        rows(y), rows(design.X), terms, rows(weights), rows(offset), others,
        Plan(layout, parents, None),
    )  # fmt: skip
