"""Terms of a formula to columns of a model matrix, named as R names them.

A variable x is evaluated once and shared by the fixed part and the random terms. If it
is numeric it is one or more columns, (n, m). If it is a factor it is codes g, (n,), and
a coding matrix C, (J, m), and its columns are C[g]. A term is the row-wise product of
its variables, the first one varying fastest:

    (a : b)_i = b_i (x) a_i        (Kronecker product of rows)

In a term, a factor is coded by contrasts if what remains of the term without it is part
of an earlier term, and by one dummy per level otherwise. Without an intercept the first
factor gets dummies. These are R's rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.algebra import Side
from jaxglmm.contrasts import contrast
from jaxglmm.errors import DataError
from jaxglmm.evaluate import Table
from jaxglmm.expressions import column_of
from jaxglmm.values import Values, check_finite, classify, is_text

__all__ = ["ModelColumns", "Variable", "learn", "model_columns", "recall"]

INTERCEPT = "(Intercept)"
MAX_TEXT_LEVELS = 1000


# -- variables -------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """What new data need to know of a variable of the formula."""

    name: str
    suffixes: tuple[str, ...]  # of numeric columns, or of the contrasts
    levels: pd.Index | None = None
    contrasts: np.ndarray | None = None  # C, (J, m)

    @property
    def is_factor(self) -> bool:
        """Whether the values are level codes."""
        return self.levels is not None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Levels as text."""
        return () if self.levels is None else tuple(tables.labels(self.levels))

    def names(self, dummies: bool) -> list[str]:
        """Column names, with one dummy per level or by contrasts."""
        suffixes = self.labels if self.is_factor and dummies else self.suffixes
        return [self.name + suffix for suffix in suffixes]

    def columns(self, values: np.ndarray, dummies: bool) -> np.ndarray:
        """Columns (n, m) from numbers or codes; code -1 gives NaN."""
        if not self.is_factor:
            return values.reshape(len(values), len(self.suffixes))
        matrix = np.eye(len(self.labels)) if dummies else self.contrasts
        assert matrix is not None
        gap = np.full((1, matrix.shape[1]), np.nan)
        return np.vstack([matrix, gap])[values]


def learn(
    expression: str, table: Table, contrasts: Mapping[str, str]
) -> tuple[Variable, np.ndarray]:
    """Evaluate a variable on the training rows.

    Parameters
    ----------
    expression : str
    table : Table
    contrasts : mapping
        Names of contrasts by column, where the expression gives none.

    Returns
    -------
    variable : Variable
    values : (n,) or (n, m) array
        Numbers, or int32 level codes.
    """
    found = classify(table.evaluate(expression))
    factor = found.factor
    if factor is None:
        check_finite(found.values, expression, table.rows)
        return Variable(expression, found.suffixes), found.values
    values = factor.with_levels(expression)
    table.check_complete(values, expression)
    codes, levels = tables.factorize(values)
    _check_levels(expression, levels, values, table.n)
    spec = factor.contrasts
    if spec is None:
        spec = contrasts.get(column_of(expression) or expression)
    if spec is None:
        ordered = factor.ordered or getattr(
            getattr(values, "dtype", None), "ordered", False
        )
        spec = "poly" if ordered else "treatment"
    matrix, suffixes = contrast(spec, tables.labels(levels), expression)
    return Variable(expression, suffixes, levels, matrix), codes


def _check_levels(name: str, levels: pd.Index, values: Any, n: int) -> None:
    if len(levels) < 2:
        only = ", ".join(tables.labels(levels))
        raise DataError(
            f"factor {name!r} has 1 level ({only}) in the rows used; a fixed or random "
            "slope needs at least 2. Leave it out."
        )
    many = len(levels) > MAX_TEXT_LEVELS or (n > 50 and len(levels) > n / 2)
    if many and is_text(values):
        raise DataError(
            f"text column {name!r} has {len(levels)} levels in {n} rows, which would "
            f"be as many columns. Use it as a grouping factor, (1 | {name}), or "
            "convert it to numbers."
        )


def recall(variable: Variable, table: Table) -> np.ndarray:
    """Values of a variable in new data; NaN or code -1 where it is missing.

    Raises
    ------
    DataError
        If a factor has a level that was not fitted, or numbers are no numbers.
    """
    evaluated = table.evaluate(variable.name)
    found = classify(evaluated)
    if variable.levels is not None:
        return evaluated.spread(_recall_codes(variable, found), -1)
    if found.factor is not None:
        raise DataError(
            f"{variable.name} was numeric in the data fitted and is not in "
            f"{table.what}. Convert it to numbers."
        )
    return evaluated.spread(found.values)


def _recall_codes(variable: Variable, found: Values) -> np.ndarray:
    assert variable.levels is not None
    codes, unseen = tables.match(found.values, variable.levels)
    if unseen:
        raise DataError(
            f"factor {variable.name!r} has unseen level(s) {', '.join(unseen[:5])}; "
            f"the data fitted had {', '.join(variable.labels[:20])}. There is no "
            "coefficient for a new level: remove these rows or recode them."
        )
    return codes


# -- model columns ---------------------------------------------------------------------

_Term = tuple[tuple[str, bool], ...]  # (variable, one dummy per level?)


@dataclass(frozen=True)
class ModelColumns:
    """One side of a formula as columns: which they are, and what they are called."""

    intercept: bool
    terms: tuple[_Term, ...]
    names: list[str]

    def matrix(
        self,
        variables: Mapping[str, Variable],
        values: Mapping[str, np.ndarray],
        n: int,
    ) -> np.ndarray:
        """Fill the columns, (n, p), by rows in memory."""
        X = np.empty((n, len(self.names)))
        if self.intercept:
            X[:, 0] = 1.0
        j = int(self.intercept)
        for term in self.terms:
            blocks = [variables[v].columns(values[v], dummies) for v, dummies in term]
            block = blocks[0]
            for right in blocks[1:]:
                with np.errstate(over="ignore"):
                    both = right[:, :, None] * block[:, None, :]
                block = both.reshape(n, right.shape[1] * block.shape[1])
            X[:, j : j + block.shape[1]] = block
            j += block.shape[1]
        return X


def model_columns(side: Side, variables: Mapping[str, Variable]) -> ModelColumns:
    """Code and name the terms of one side of a formula."""
    terms = _code(side, variables)
    names = [INTERCEPT] * side.intercept
    for term in terms:
        columns = [variables[v].names(dummies) for v, dummies in reversed(term)]
        names += [":".join(reversed(c)) for c in product(*columns)]
    return ModelColumns(side.intercept, terms, names)


def _code(side: Side, variables: Mapping[str, Variable]) -> tuple[_Term, ...]:
    """Decide between contrasts and dummies by R's rules."""
    out: list[list[tuple[str, bool]]] = []
    for i, term in enumerate(side.terms):
        coded = []
        for name in term:
            rest = set(term) - {name}
            margin = not rest or any(rest <= set(t) for t in side.terms[:i])
            coded.append((name, variables[name].is_factor and not margin))
        out.append(coded)
    if not side.intercept:
        for coded in out:
            found = [j for j, (v, _) in enumerate(coded) if variables[v].is_factor]
            if found:
                coded[found[0]] = (coded[found[0]][0], True)
                break
    return tuple(map(tuple, out))
