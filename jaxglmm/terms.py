"""Random terms as arrays: z (n, k) and level codes (n,), in lme4's order.

Term t adds sum_j z_ij b[group_i, j] to the linear predictor. Terms with equal effects
share z, terms with the same grouping factor share the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxglmm.algebra import Side, expand
from jaxglmm.collinear import check_sizes
from jaxglmm.columns import ModelColumns, Variable, model_columns
from jaxglmm.errors import FormulaError
from jaxglmm.evaluate import Table
from jaxglmm.formula import DIAG, FULL, RandomTerm
from jaxglmm.grouping import Grouping, Groups

__all__ = ["TermArrays", "TermCoding", "random_terms"]


@dataclass(frozen=True, eq=False)
class TermArrays:
    """One random-effects term as arrays.

    Attributes
    ----------
    z : (n, k) array
        Columns of the effects.
    z_names : list of str
    group : (n,) array of int32
        Level codes 0..n_levels-1; terms with the same grouping share the array.
    grouping : Grouping
    structure : str
        ``"full"`` or the name in ``name(effects | group)``.
    text : str
        The term as written.
    """

    z: np.ndarray
    z_names: list[str]
    group: np.ndarray
    grouping: Grouping
    structure: str
    text: str

    @property
    def group_name(self) -> str:
        """Name of the grouping factor, ``"a:b"`` for an interaction."""
        return self.grouping.name

    @property
    def n_levels(self) -> int:
        """Number of levels that occur."""
        return self.grouping.n_levels

    @property
    def levels(self) -> pd.Index:
        """Labels of the levels."""
        return self.grouping.labels

    @property
    def one_row_per_effect(self) -> bool:
        """Whether it has as many effects, each with its variance, as there are rows."""
        n, k = self.z.shape
        return k * self.n_levels == n and self.structure in (FULL, DIAG)


class TermCoding(NamedTuple):
    """What new data need to know of a random term."""

    term: RandomTerm
    columns: ModelColumns
    grouping: Grouping


def random_terms(
    random: tuple[RandomTerm, ...],
    table: Table,
    variables: Mapping[str, Variable],
    values: Mapping[str, np.ndarray],
) -> list[tuple[TermCoding, TermArrays]]:
    """Make the random terms.

    Parameters
    ----------
    random : tuple of RandomTerm
        As written.
    table : Table
    variables, values : mapping
        By expression, as :func:`jaxglmm.columns.learn` gives them.

    Returns
    -------
    list of (TermCoding, TermArrays)
        As written where the numbers of levels do not increase, else by decreasing
        number of levels, ties reversed.

    Raises
    ------
    FormulaError
        If a grouping factor has one level or a term more effects than there are rows.
    """
    groups = Groups(table)
    filled: dict[Side, tuple[ModelColumns, np.ndarray]] = {}
    made = []
    for term in random:
        codes, grouping = groups.group(term)
        _check_group(term, grouping)
        side = expand(term.effects)
        columns = filled[side][0] if side in filled else model_columns(side, variables)
        _check_effects(term, len(columns.names), grouping, table.n)
        if side not in filled:
            filled[side] = columns, columns.matrix(variables, values, table.n)
            check_sizes(filled[side][1], columns.names, f"the term {term.text}")
        z = filled[side][1]
        arrays = TermArrays(
            z, columns.names, codes, grouping, term.structure, term.text
        )
        made.append((TermCoding(term, columns, grouping), arrays))
    sizes = [arrays.n_levels for _, arrays in made]
    if any(b > a for a, b in pairwise(sizes)):
        order = sorted(range(len(made)), key=lambda i: sizes[i])[::-1]
        made = [made[i] for i in order]
    return made


def _check_group(term: RandomTerm, grouping: Grouping) -> None:
    if grouping.n_levels < 2:
        raise FormulaError(
            f"grouping factor {term.group!r} has 1 level; a random effect needs at "
            f"least 2. Drop {term.text}."
        )


def _check_effects(term: RandomTerm, k: int, grouping: Grouping, n: int) -> None:
    n_effects = k * grouping.n_levels
    if term.structure in (FULL, DIAG) and n_effects > n:
        raise FormulaError(
            f"term {term.text} has {n_effects} random effects ({k} for each of "
            f"{grouping.n_levels} levels of {term.group!r}) and the data {n} rows, so "
            "its variances are not identified. Use fewer effects or a coarser grouping."
        )
