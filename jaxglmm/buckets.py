"""Bucketed shapes, so that another data set of similar size does not compile again.

After one pass over the rows of a linear model only cross-products are left, so n never
enters its compiled program; a generalized model's rows are padded with rows of weight
zero. Levels and columns of X are padded up to a bucket. A padded level has zero
cross-products, hence M = I: it adds nothing to the log-determinant or to any product,
and its effects are zero. A padded column of X is marked unused.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxglmm.crossproducts import CrossProducts
from jaxglmm.designs import Design
from jaxglmm.plan import Block, Layout, Plan
from jaxglmm.rowsums import SparseTail
from jaxglmm.typing import Array

__all__ = ["pad", "pad_design", "unpad_effects"]


def _chain_bucket(n: int) -> int:
    for size in (64, 512):
        if n <= size:
            return size
    step = 2 ** (int(n - 1).bit_length() - 3)  # 4 to 8 buckets an octave
    return -(-n // step) * step


def _tail_bucket(n: int) -> int:
    if n <= 512:
        return max(8, 1 << int(n - 1).bit_length())
    return -(-n // 64) * 64


def _column_bucket(p: int, n_levels: int) -> int:
    if p == 0:
        return 0
    least = 8 if n_levels <= 4096 else 2  # with many levels padding costs time
    return max(least, 1 << int(p - 1).bit_length())


def pad(cp: CrossProducts, layout: Layout) -> tuple[CrossProducts, Layout]:
    """Pad levels and columns to their buckets (NumPy arrays in and out).

    A sparse tail keeps its exact shapes: such models are large and rarely repeated.
    """
    p = cp.unused.shape[0]
    dense = [t for t in cp.tail if not isinstance(t, SparseTail)]
    if len(dense) < len(cp.tail):
        return cp, layout
    padded = _padded_layout(layout)
    p_padded = _column_bucket(p, padded.blocks[0].n_levels)
    columns, size = _positions(layout, padded, p, p_padded)
    own, up, tail = [], [], []
    for f in range(layout.n_chain):
        J = padded.blocks[f].n_levels
        own.append(_widen(cp.own[f], J))
        up.append(tuple(_widen(u, J) for u in cp.up[f]))
        wide = np.zeros((dense[f].shape[0], size, dense[f].shape[2]))
        wide[:, columns] = dense[f]
        tail.append(_widen(wide, J))
    gram = np.zeros((size, size))
    gram[np.ix_(columns, columns)] = cp.gram
    unused = np.ones(p_padded)
    unused[:p] = cp.unused
    parents = tuple(
        _widen(parent, padded.blocks[f].n_levels) for f, parent in enumerate(cp.parents)
    )
    padded_cp = dataclasses.replace(
        cp, own=tuple(own), up=tuple(up), tail=tuple(tail), gram=gram, unused=unused,
        parents=parents,
    )  # fmt: skip
    return padded_cp, padded


def pad_design(design: Design) -> Design:
    """Pad rows, levels and columns of X to their buckets (NumPy arrays in and out).

    Added rows have weight zero. A sparse tail keeps its exact levels.
    """
    plan = design.plan
    assert plan is not None
    n = design.n_obs
    more = _row_bucket(n) - n

    def rows(x, value=0.0):
        if x is None or more == 0:
            return x
        added = np.full((more, *x.shape[1:]), value, x.dtype)
        return np.concatenate([x, added])

    def wide(X):
        p = _padded_columns(X.shape[1])
        out = np.zeros((n + more, p))
        out[:n, : X.shape[1]] = X
        return out

    layout, parents = plan.layout, plan.parents
    if plan.pairs is None:
        layout = _padded_layout(layout)
        parents = tuple(
            _widen(p, layout.blocks[f].n_levels) for f, p in enumerate(parents)
        )
    n_levels = {t: b.n_levels for b in layout.blocks for t in b.terms}
    terms = tuple(
        dataclasses.replace(
            t, z=rows(t.z), group=rows(t.group, 0), n_levels=n_levels[i]
        )
        for i, t in enumerate(design.terms)
    )
    pairs = plan.pairs
    if pairs is not None:
        entry = tuple(rows(e, 0) for e in pairs.row_entry)
        pairs = dataclasses.replace(pairs, row_entry=entry)
    weights = np.ones(n) if design.weights is None else design.weights
    others = tuple(
        dataclasses.replace(p, X=wide(p.X), offset=rows(p.offset))
        for p in design.others
    )
    return dataclasses.replace(
        design, y=rows(design.y), X=wide(design.X), terms=terms, weights=rows(weights),
        offset=rows(design.offset), others=others, plan=Plan(layout, parents, pairs),
    )  # fmt: skip


def _row_bucket(n: int) -> int:
    step = max(32, 2 ** (int(n - 1).bit_length() - 3))
    return -(-n // step) * step


def _padded_columns(p: int) -> int:
    """Few enough: each costs a direction of the Hessian."""
    return p if p <= 2 else -(-p // 2) * 2 if p <= 8 else -(-p // 4) * 4


def _padded_layout(layout: Layout) -> Layout:
    blocks = tuple(
        dataclasses.replace(
            b,
            n_levels=(_chain_bucket if f < layout.n_chain else _tail_bucket)(
                b.n_levels
            ),
        )
        for f, b in enumerate(layout.blocks)
    )
    return dataclasses.replace(layout, blocks=blocks)


def _widen(x: Array, n_levels: int) -> Array:
    """Zeros behind the last axis up to n_levels."""
    if x.shape[-1] == n_levels:
        return x
    out = np.zeros((*x.shape[:-1], n_levels), x.dtype)
    out[..., : x.shape[-1]] = x
    return out


def _positions(
    layout: Layout, padded: Layout, p: int, p_padded: int
) -> tuple[np.ndarray, int]:
    """Where the columns [Z_R X y] stand after padding, and how many there are."""
    parts, start = [], 0
    for old, new in zip(layout.tail, padded.tail):
        parts.append(start + np.arange(old.size))
        start += new.size
    parts.append(start + np.arange(p))
    parts.append([start + p_padded])
    return np.concatenate(parts).astype(int), start + p_padded + 1


def block_sizes(layout: Layout) -> list[Block]:
    """Block of every term."""
    by_term = {t: b for b in layout.blocks for t in b.terms}
    return [by_term[t] for t in range(len(layout.term_k))]


def unpad_effects(values: tuple[Array, ...], layout: Layout) -> tuple[Array, ...]:
    """First J levels of every term's effects (J_padded, ...)."""
    return tuple(v[: b.n_levels] for v, b in zip(values, block_sizes(layout)))
