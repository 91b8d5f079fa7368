"""The plan: which block is eliminated when, from concrete group codes, on the host.

A block is a grouping factor with the K effects of all its terms. The block with most
effects is the leaf. Blocks in which it is nested form the chain, each nested in the
next; the others are the tail. Nesting is a fact about the codes: block f lies in g if
the level of f determines that of g, and the map of levels, ``parents``, is kept.

The leaf's cross-products with the tail are either dense, (K, q_R, J), or, when a level
meets few of many tail effects, a list of *entries* (level, column) and of *pairs* of
entries of one level, sorted by where in the (q_R, q_R) Schur complement they add.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np
from jax.core import Tracer

from jaxglmm.errors import DesignError
from jaxglmm.typing import Array

__all__ = ["Alike", "Block", "Layout", "Pairs", "Plan", "make_plan", "same_codes"]

_DENSE_WORK = 3e7  # multiply-adds of a dense Schur product that need no pair list
_PAIR_COST = 30.0  # one scattered pair costs as much as so many of them
_MAX_TAIL = 20_000  # the tail's Schur complement is a dense matrix of this order


@dataclass(frozen=True)
class Block:
    """A grouping factor: its number of levels, effects per level, and terms."""

    n_levels: int
    k: int
    terms: tuple[int, ...]

    @property
    def size(self) -> int:
        """Effects in all, q = J K."""
        return self.n_levels * self.k


@dataclass(frozen=True)
class Layout:
    """Static sizes of a model: blocks in order of elimination, and its terms.

    Of every term, in the order of theta: effects k, structure, and the number of the
    linear predictor to which it adds.

    ``rows_per_level``: where it is not zero, the rows stand level by level of the first
    block, so many for each, and sums over them need no codes; see arrange.py.
    """

    blocks: tuple[Block, ...]
    n_chain: int
    term_k: tuple[int, ...]
    structures: tuple[str, ...]
    predictors: tuple[int, ...]
    rows_per_level: int = 0

    def block_predictors(self, f: int) -> tuple[int, ...]:
        """The linear predictor to which each effect of block f adds, (K,)."""
        return tuple(
            self.predictors[t]
            for t in self.blocks[f].terms
            for _ in range(self.term_k[t])
        )

    @property
    def chain(self) -> tuple[Block, ...]:
        """Blocks eliminated one after the other, leaf to root."""
        return self.blocks[: self.n_chain]

    @property
    def tail(self) -> tuple[Block, ...]:
        """Crossed blocks, eliminated last and together."""
        return self.blocks[self.n_chain :]

    @property
    def tail_size(self) -> int:
        """Order q_R of the tail's Schur complement."""
        return sum(b.size for b in self.tail)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """Index lists for a sparse tail; see the module's head.

    ``row_entry[r]`` (n,) maps a row to its entry with tail block r (its first column's
    entry; the K_r columns follow). ``level``, ``column`` (E,) describe the entries;
    ``left``, ``right`` (N,) are pairs of entries of one level with column[left] <=
    column[right], sorted by target; ``target`` (N,) numbers the distinct targets and
    ``row``, ``col`` (U,) say where these stand. ``counts`` has
    the number of entries of each tail block.
    """

    counts: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    row_entry: tuple[Array, ...]
    level: Array
    column: Array
    left: Array
    right: Array
    target: Array
    row: Array
    col: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Alike:
    """Classes of levels of the only block whose rows have the same z, X and weights.

    ``first`` (C,): a level of each class; ``member`` (J, C): to which a level belongs.
    """

    first: Array
    member: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Static layout and index arrays of a design.

    ``alike`` is there where levels may be pooled, see pooling.py and arrange.py.
    """

    layout: Layout = dataclasses.field(metadata={"static": True})
    parents: tuple[Array, ...]
    pairs: Pairs | None
    alike: Alike | None = None


def make_plan(terms) -> Plan:
    """Plan the elimination for these terms (each with ``z, group, n_levels``).

    Raises
    ------
    DesignError
        If several grouping factors are given and their codes are traced, or if the
        crossed part is too large for a dense Schur complement.
    """
    groups, members = _factors(terms)
    blocks = [
        Block(terms[t[0]].n_levels, sum(terms[i].k for i in t), tuple(t))
        for t in members
    ]
    order, parents = _chain(groups, blocks)
    n_chain = len(parents) + 1
    order += [
        i
        for i in np.argsort([-b.size for b in blocks], kind="stable")
        if i not in order
    ]
    layout = Layout(
        tuple(blocks[i] for i in order),
        n_chain,
        tuple(t.k for t in terms),
        tuple(t.structure for t in terms),
        tuple(t.predictor for t in terms),
    )
    pairs = None
    if layout.tail:
        layout, pairs = _plan_tail(layout, [groups[i] for i in order])
        parents = parents[: layout.n_chain - 1]
    return Plan(layout, tuple(parents), pairs)


def _factors(terms) -> tuple[list, list[list[int]]]:
    """Distinct grouping factors, and the terms of each."""
    groups, members = [], []
    for i, term in enumerate(terms):
        for group, found in zip(groups, members):
            if (
                same_codes(group, term.group)
                and terms[found[0]].n_levels == term.n_levels
            ):
                found.append(i)
                break
        else:
            groups.append(term.group)
            members.append([i])
    if len(groups) > 1:
        if any(isinstance(g, Tracer) for g in groups):
            raise DesignError(
                "a Design with several grouping factors cannot be built from traced "
                "codes; build it outside jit and pass it in"
            )
        groups = [np.asarray(g) for g in groups]
    return groups, members


def same_codes(a, b) -> bool:
    """Whether two arrays of codes are known to be equal; traced ones if identical."""
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    return np.array_equal(a, b)


def _chain(groups, blocks: list[Block]) -> tuple[list[int], list[np.ndarray]]:
    """Leaf-to-root order of nested blocks, and the parent of every level."""
    leaf = max(range(len(blocks)), key=lambda i: blocks[i].size)
    order, parents = [leaf], []
    others = sorted(
        (i for i in range(len(blocks)) if i != leaf), key=lambda i: -blocks[i].n_levels
    )
    for i in others:
        parent = _parent_levels(
            groups[order[-1]], groups[i], blocks[order[-1]].n_levels
        )
        if parent is not None:
            order.append(i)
            parents.append(parent)
    return order, parents


def _parent_levels(child, parent, n_levels: int) -> np.ndarray | None:
    """Level of ``parent`` that each level of ``child`` lies in; None if not nested."""
    levels = np.zeros(n_levels, np.int32)
    levels[child] = parent
    return levels if np.array_equal(levels[child], parent) else None


# ---- the tail ----------------------------------------------------------------------


def _plan_tail(layout: Layout, groups) -> tuple[Layout, Pairs | None]:
    """Choose dense or paired cross-products of the chain with the tail."""
    work = sum(b.size for b in layout.chain) * float(layout.tail_size) ** 2
    if work > _DENSE_WORK:
        single = dataclasses.replace(layout, n_chain=1)
        per_level = np.zeros(single.blocks[0].n_levels)
        entries = _entries(single, groups)
        np.add.at(per_level, entries[1], 1.0)
        n_pairs = float(np.sum(per_level * (per_level + 1) / 2))
        if n_pairs * _PAIR_COST < work:
            _check_tail(single)
            return single, _pairs(single, entries)
    _check_tail(layout)
    return layout, None


def _check_tail(layout: Layout) -> None:
    if layout.tail_size > _MAX_TAIL:
        raise DesignError(
            f"the crossed grouping factors leave {layout.tail_size} effects after the "
            f"largest is eliminated; at most {_MAX_TAIL} fit a dense Cholesky"
        )


def _entries(layout: Layout, groups):
    """Distinct meetings of leaf level and tail effect, and the rows that make them."""
    leaf = layout.blocks[0]
    row_entry, level, column = [], [], []
    start, first_column = 0, 0
    for block, group in zip(layout.tail, groups[1:]):
        key = np.asarray(groups[0], np.int64) * block.n_levels + group
        seen, entry = _unique(key, leaf.n_levels * block.n_levels)
        row_entry.append((start + entry * block.k).astype(np.int32))
        effects = np.arange(block.k)
        level.append(np.repeat(seen // block.n_levels, block.k))
        columns = (seen % block.n_levels)[:, None] * block.k + effects
        column.append(first_column + columns.ravel())
        start += len(seen) * block.k
        first_column += block.size
    sizes = tuple(len(c) for c in column)
    return row_entry, np.concatenate(level), np.concatenate(column), sizes


def _unique(key: np.ndarray, n_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted distinct keys and the position of each; by marking where that is cheap."""
    if n_keys > 50_000_000:
        return np.unique(key, return_inverse=True)
    marks = np.zeros(n_keys, bool)
    marks[key] = True
    seen = np.flatnonzero(marks)
    position = np.empty(n_keys, np.int32)
    position[seen] = np.arange(len(seen), dtype=np.int32)
    return seen, position[key]


def _pairs(layout: Layout, entries) -> Pairs:
    row_entry, level, column, sizes = entries
    q = layout.tail_size
    level, column = level.astype(np.int32), column.astype(np.int32)
    # where every entry stands when sorted by level, then column
    by_level = np.lexsort((column, level)).astype(np.int32)
    counts = np.bincount(level, minlength=layout.blocks[0].n_levels)
    first = np.repeat(np.cumsum(counts) - counts, counts).astype(np.int32)
    position = np.arange(len(by_level), dtype=np.int32)
    # right entries in order of their column, each with all to its left in the level
    by_column = np.argsort(column[by_level], kind="stable").astype(np.int32)
    n_left = (position - first + 1)[by_column]
    start = np.cumsum(n_left) - n_left
    right = np.repeat(by_column, n_left)
    left = np.arange(len(right), dtype=np.int32)
    left -= np.repeat((start - first[by_column]).astype(np.int32), n_left)
    left, right = by_level[left], by_level[right]
    order = _sort_by(column[left], q)  # stable, so columns stay sorted within a row
    left, right = left[order], right[order]
    row, col = column[left], column[right]
    new = np.ones(len(row), bool)
    new[1:] = (row[1:] != row[:-1]) | (col[1:] != col[:-1])
    return Pairs(
        counts=sizes,
        row_entry=tuple(row_entry),
        level=level,
        column=column,
        left=left,
        right=right,
        target=np.cumsum(new, dtype=np.int32) - np.int32(1),
        row=row[new],
        col=col[new],
    )


def _sort_by(key: np.ndarray, n_keys: int) -> np.ndarray:
    """Stable permutation that sorts by key: a counting sort, by a sparse transpose."""
    import scipy.sparse as sp  # only here, and only for large crossed models

    index = np.arange(len(key) + 1, dtype=np.int32)
    one = sp.csr_array((index[:-1], key, index), shape=(len(key), n_keys))
    return one.tocsc().data
