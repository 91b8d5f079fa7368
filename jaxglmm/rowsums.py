"""Sums over rows by level: the blocks of Z' W Z and of Z' W A for columns A.

    own[f]    Z_f' W Z_f       (K, K, J)      blocks of the chain, by level
    up[f][g]  Z_f' W Z_g       (K, K_g, J)    with the ancestors of each level
    tail[f]   Z_f' W [Z_R A]   (K, D, J)      D = q_R + c; or entries, see plan.py
    gram      [Z_R A]' W [.]   (D, D)

W is one weight per row, (n,), or with R linear predictors a matrix per row, (n, R, R):
effects a and b then meet with weight W_{r(a) r(b)}, and there are no columns A. Blocks
keep the long axis, levels, last. The same code runs on NumPy and on JAX arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.plan import Layout, Pairs
from jaxglmm.typing import Array

__all__ = [
    "RowSums",
    "SparseTail",
    "Sums",
    "block_columns",
    "level_of_rows",
    "sum_by_level",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseTail:
    """Cross-products of the leaf with few of many tail effects.

    ``value`` (K, E) holds the entries, ``xy`` (K, c, J) the columns A.
    """

    value: Array
    xy: Array
    pairs: Pairs


class Sums(NamedTuple):
    """All blocks; see the module's head."""

    own: tuple[Array, ...]
    up: tuple[tuple[Array, ...], ...]
    tail: tuple[Array | SparseTail, ...]
    gram: Array


class RowSums:
    """The weighted rows, and the sums over them that blocks need.

    Parameters
    ----------
    layout : Layout
    z : sequence of Array, (n, K)
        Columns of every block, see :func:`block_columns`.
    codes : sequence of Array, (n,)
        Level of every row, for every block.
    W : Array, (n,) or (n, R, R)
    A : Array, (n, c)
    """

    def __init__(
        self,
        layout: Layout,
        z: Sequence[Array],
        codes: Sequence[Array],
        W: Array,
        A: Array,
        xp: ModuleType,
    ):
        self.xp, self.layout, self.W, self.A = xp, layout, W, A
        self.z, self.codes = z, codes
        if W.ndim == 1:
            self.zw = [columns * W[:, None] for columns in z]

    def all(self, pairs: Pairs | None) -> Sums:
        """Every block that elimination needs."""
        n_chain = self.layout.n_chain
        ups = [range(f + 1, n_chain) for f in range(n_chain)]
        return Sums(
            tuple(self.blocks(f, f) for f in range(n_chain)),
            tuple(tuple(self.blocks(f, g) for g in up) for f, up in enumerate(ups)),
            tuple(self.with_tail(f, pairs) for f in range(n_chain)),
            self.gram(),
        )

    def outer(self, f: int, g: int) -> Array:
        """Weighted products of the columns of two blocks, (n, K_f, K_g)."""
        if self.W.ndim == 1:
            return self.zw[f][:, :, None] * self.z[g][:, None, :]
        left = np.array(self.layout.block_predictors(f))
        right = np.array(self.layout.block_predictors(g))
        return (
            self.W[:, left[:, None], right[None, :]]
            * self.z[f][:, :, None]
            * self.z[g][:, None, :]
        )

    def by_level(self, outer: Array, f: int) -> Array:
        """Sum rows (n, a, b) by level of block f, (J, a, b)."""
        if _is_regular(self.layout, f):
            return sum_by_level(outer, self.codes[f], f, self.layout)
        return self.by_code(outer, self.codes[f], self.layout.blocks[f].n_levels)

    def by_code(self, outer: Array, codes: Array, n_codes: int) -> Array:
        """Sum rows (n, a, b) by code, (n_codes, a, b)."""
        shape = outer.shape[1:]
        flat = outer.reshape(outer.shape[0], shape[0] * shape[1])
        return _segment_sum(flat, codes, n_codes, self.xp).reshape(n_codes, *shape)

    def blocks(self, f: int, g: int) -> Array:
        """Z_f' W Z_g by level of f, (K_f, K_g, J_f)."""
        return self.xp.moveaxis(self.by_level(self.outer(f, g), f), 0, -1)

    def with_columns(self, f: int) -> Array:
        """Z_f' W A by level of f, (J_f, K_f, c)."""
        block = self.layout.blocks[f]
        c = self.A.shape[1]
        if c == 0:
            return self.xp.zeros((block.n_levels, block.k, 0), self.A.dtype)
        # the last column apart: in front of it the others may be wide
        parts = [
            self.by_level(self.zw[f][:, :, None] * part[:, None, :], f)
            for part in (self.A[:, : c - 1], self.A[:, c - 1 :])
        ]
        return self.xp.concatenate(parts, axis=2)

    def crossed(self, f: int, g: int) -> Array:
        """Z_f' W Z_g for every pair of levels, (J_f, K_f, J_g, K_g)."""
        a, b = self.layout.blocks[f], self.layout.blocks[g]
        if f == g:
            sums = self.by_code(self.outer(f, f), self.codes[f], a.n_levels)
            eye = self.xp.eye(a.n_levels, dtype=sums.dtype)
            return sums[:, :, None, :] * eye[:, None, :, None]
        codes = self.codes[f] * b.n_levels + self.codes[g]
        sums = self.by_code(self.outer(f, g), codes, a.n_levels * b.n_levels)
        sums = sums.reshape(a.n_levels, b.n_levels, a.k, b.k)
        return self.xp.moveaxis(sums, 1, 2)

    def with_tail(self, f: int, pairs: Pairs | None) -> Array | SparseTail:
        """Z_f' W [Z_R A] by level of f, (K_f, D, J_f), or its entries."""
        xp, a = self.xp, self.layout.blocks[f]
        right = self.with_columns(f)
        if pairs is not None:
            return SparseTail(self.entries(pairs), xp.moveaxis(right, 0, -1), pairs)
        parts = [
            self.crossed(f, g).reshape(a.n_levels, a.k, self.layout.blocks[g].size)
            for g in range(self.layout.n_chain, len(self.layout.blocks))
        ]
        return xp.moveaxis(xp.concatenate([*parts, right], axis=2), 0, -1)

    def entries(self, pairs: Pairs) -> Array:
        """Values of the entries of a sparse tail, (K, E)."""
        parts = []
        start = 0
        blocks = self.layout.tail
        for r, (block, size) in enumerate(zip(blocks, pairs.counts)):
            count = size // block.k
            codes = (pairs.row_entry[r] - start) // block.k
            sums = self.by_code(self.outer(0, self.layout.n_chain + r), codes, count)
            parts.append(self.xp.moveaxis(sums, 1, 0).reshape(sums.shape[1], -1))
            start += size
        return self.xp.concatenate(parts, axis=1)

    def gram(self) -> Array:
        """[Z_R A]' W [Z_R A], (D, D)."""
        xp, A = self.xp, self.A
        corner = A.T @ A if self.W.ndim > 1 else (A * self.W[:, None]).T @ A
        first = self.layout.n_chain
        tail = range(first, len(self.layout.blocks))
        if not tail:
            return corner
        sizes = [self.layout.blocks[g].size for g in tail]
        rows = []
        for i, f in enumerate(tail):
            upper = [
                self.crossed(f, g).reshape(sizes[i], sizes[j])
                if g >= f
                else rows[j][i].T
                for j, g in enumerate(tail)
            ]
            rows.append([*upper, self.with_columns(f).reshape(sizes[i], -1)])
        RR = xp.concatenate([xp.concatenate(r[:-1], axis=1) for r in rows])
        RA = xp.concatenate([r[-1] for r in rows])
        return xp.concatenate(
            [xp.concatenate([RR, RA], axis=1), xp.concatenate([RA.T, corner], axis=1)]
        )


def block_columns(layout: Layout, z: Sequence[Array], xp: ModuleType) -> list[Array]:
    """Columns of every block, (n, K), from those of the terms."""
    return [
        xp.concatenate([z[t] for t in b.terms], axis=1)
        if b.terms[1:]
        else z[b.terms[0]]
        for b in layout.blocks
    ]


def _is_regular(layout: Layout, f: int) -> bool:
    return f == 0 and layout.rows_per_level > 0


def sum_by_level(values: Array, codes: Array, f: int, layout: Layout) -> Array:
    """Sum rows (n, ...) by level of block f, (J, ...)."""
    n_levels = layout.blocks[f].n_levels
    if _is_regular(layout, f):
        shape = (n_levels, layout.rows_per_level, *values.shape[1:])
        return values.reshape(shape).sum(axis=1)
    return jax.ops.segment_sum(values, codes, num_segments=n_levels)


def level_of_rows(values: Array, codes: Array, f: int, layout: Layout) -> Array:
    """The values (J, ...) of every row's level of block f, (n, ...)."""
    if _is_regular(layout, f):
        return jnp.repeat(values, layout.rows_per_level, axis=0)
    return values[codes]


def _segment_sum(values: Array, codes: Array, n_levels: int, xp) -> Array:
    """Sum rows (n, c) by code -> (n_levels, c)."""
    if xp is jnp:
        return jax.ops.segment_sum(values, codes, num_segments=n_levels)
    if values.shape[1] == 0:
        return np.zeros((n_levels, 0))
    sums = [
        np.bincount(codes, np.ascontiguousarray(v), minlength=n_levels)
        for v in values.T
    ]
    return np.stack(sums, axis=1)
