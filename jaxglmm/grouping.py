"""Grouping factors: level codes 0..J-1 per row, and what new data need to match them.

A factor of one component has the levels that occur. For an interaction a:b:c the codes
are made in stages, key = (code so far) * (number of levels of the next component) +
(its code), the keys that occur being numbered in order; so only combinations that occur
are levels, the first component varying slowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError
from jaxglmm.evaluate import Table
from jaxglmm.expressions import column_of
from jaxglmm.formula import RandomTerm
from jaxglmm.values import Evaluated, Marked

__all__ = ["Grouping", "Groups", "group_values"]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Levels of a grouping factor, or of an interaction of several.

    Attributes
    ----------
    name : str
        ``"g"`` or ``"a:b"``.
    components : tuple of pandas.Index
        Levels of each component.
    stages : tuple of array
        For each component after the first, its sorted keys.
    n_levels : int
    labels : pandas.Index
        Labels of the levels, ``"a1:b2"`` for interactions; made when first asked for.
    """

    name: str
    components: tuple[pd.Index, ...]
    stages: tuple[np.ndarray, ...]
    n_levels: int

    @cached_property
    def labels(self) -> pd.Index:
        """Labels of the levels."""
        out = tables.labels(self.components[0])
        for levels, keys in zip(self.components[1:], self.stages):
            right = tables.labels(levels)
            left, codes = np.divmod(keys, len(levels))
            out = [f"{out[i]}:{right[j]}" for i, j in zip(left, codes)]
        return pd.Index(out, name=self.name)

    def match(
        self, values: list[Any]
    ) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        """Codes of new values, -1 where missing or unseen; the unseen levels.

        Returns
        -------
        codes : (n,) array of int32
        unseen : tuple of str
            Labels of the unseen levels.
        which : (n,) array of int32
            Position in `unseen`, -1 where the level is known or missing.
        """
        parts = [tables.match(v, levels) for v, levels in zip(values, self.components)]
        codes = parts[0][0]
        for (right, _), keys, levels in zip(
            parts[1:], self.stages, self.components[1:]
        ):
            key = codes.astype(np.int64) * len(levels) + right
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            known = (codes >= 0) & (right >= 0) & (keys[place] == key)
            codes = np.where(known, place, -1).astype(np.int32)
        return codes, *_unseen(values, codes)


def _unseen(values: list[Any], codes: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Labels without a code, each once, and which of them each row has (-1: none)."""
    which = np.full(len(codes), -1, np.int32)
    rows = np.flatnonzero(codes < 0)
    if not len(rows):
        return (), which
    columns = [pd.Series(tables.take(v, rows)).reset_index(drop=True) for v in values]
    frame = pd.concat(columns, axis=1, keys=range(len(columns)))
    frame = frame[frame.notna().all(axis=1)]
    kinds = frame.drop_duplicates()
    parts = [tables.labels(pd.Index(kinds.iloc[:, j])) for j in range(len(values))]
    labels = tuple(":".join(p) for p in zip(*parts))
    if len(frame):
        by_kind = frame.groupby(list(frame.columns), sort=False, observed=True)
        numbers, _ = pd.factorize(by_kind.ngroup())
        which[rows[frame.index]] = numbers
    return labels, which


class Groups:
    """Codes of the grouping factors, each component and interaction made once."""

    def __init__(self, table: Table):
        self.table = table
        self._parts: dict[str, tuple[np.ndarray, pd.Index]] = {}
        self._done: dict[str, tuple[np.ndarray, Grouping]] = {}

    def group(self, term: RandomTerm) -> tuple[np.ndarray, Grouping]:
        """Codes (n,) of a term's levels, int32, and the levels."""
        if term.group not in self._done:
            self._done[term.group] = self._make(term)
        return self._done[term.group]

    def _make(self, term: RandomTerm) -> tuple[np.ndarray, Grouping]:
        parts = [self._part(f) for f in term.factors]
        codes, n_levels = parts[0][0], len(parts[0][1])
        stages = []
        for right, levels in parts[1:]:
            keys = codes.astype(np.int64) * len(levels) + right
            codes, present = tables.compress(keys)
            stages.append(present)
            n_levels = len(present)
        components = tuple(levels for _, levels in parts)
        name = ":".join(column_of(f) or f for f in term.factors)
        return codes, Grouping(name, components, tuple(stages), n_levels)

    def _part(self, expression: str) -> tuple[np.ndarray, pd.Index]:
        if expression not in self._parts:
            values = group_values(self.table.evaluate(expression))
            self.table.check_complete(values, expression)
            self._parts[expression] = tables.factorize(values)
        return self._parts[expression]


def group_values(found: Evaluated) -> Any:
    """One-dimensional values of any type from what a grouping expression gave.

    Raises
    ------
    DataError
        If they are not one per row, or infinite.
    """
    name, values = found.name, found.values
    if isinstance(values, Marked):
        values = values.with_levels(name)
    if not hasattr(values, "dtype"):
        values = np.asarray(values)
    if values.ndim != 1 or len(values) != found.n:
        raise DataError(
            f"grouping factor {name!r} has shape {values.shape}, not ({found.n},)."
        )
    is_float = isinstance(values, np.ndarray) and values.dtype.kind == "f"
    if is_float and np.isinf(values).any():
        raise DataError(
            f"grouping factor {name!r} holds infinite values. Correct them."
        )
    return values
