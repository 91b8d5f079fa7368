"""Expressions of a formula on the rows of a table.

A name is a column of the table, or a function or constant of the formula language. The
caller's own variables are never seen, so a formula means the same everywhere, and no
Python is run: see :mod:`jaxglmm.interpreter`. Rows in which a column of the expression
is missing are left out before it is evaluated, hence ``scale(x)`` or ``bs(x)`` learn
from complete rows only. What they learned is kept, by expression, for new data.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from typing import Any, TypeGuard, cast

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError, FormulaError
from jaxglmm.expressions import column_of, find_column, references, tree
from jaxglmm.functions import FUNCTIONS, Function
from jaxglmm.interpreter import Interpreter, is_known
from jaxglmm.values import Evaluated, unwrap

__all__ = ["Table", "used_columns"]


def _names_column(column: str | None, names: Collection[Any]) -> TypeGuard[str]:
    return column is not None and column in names


def used_columns(
    expression: str,
    names: Collection[str],
    what: str,
    functions: Collection[str] = (),
) -> list[str]:
    """Columns that an expression needs.

    Raises
    ------
    DataError
        If one of its names is neither a column nor a function.
    """
    column = column_of(expression)
    if _names_column(column, names):
        return [column]
    found = []
    for parts, called in references(tree(expression)):
        if called and len(parts) == 1:
            continue  # a function
        parts = parts[:-1] if called else parts
        name, _ = find_column(parts, names)
        known = is_known(parts) or parts[0] in FUNCTIONS or parts[0] in functions
        if name:
            found.append(name)
        elif column is not None or not known:
            name = ".".join(parts)
            raise DataError(
                f"no column {name!r} in {what}. {tables.suggest(name, names)}"
            )
    return sorted(set(found))


class Table:
    """The rows in use of the caller's table, as plain columns made when asked for.

    Parameters
    ----------
    frame : DataFrame
    names : mapping
        The table's own name of every column, by that name as text.
    what : str
        What messages call the table.
    functions : mapping of Function, optional
        The caller's own.
    states : dict, optional
        What the functions of an expression learned from the training rows.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        names: Mapping[str, Any],
        what: str = "the data",
        functions: Mapping[str, Function] | None = None,
        states: Mapping[str, dict[str, Any]] | None = None,
    ):
        self.frame, self.names, self.what = frame, names, what
        self.functions = functions or {}
        self.states = copy.deepcopy(dict(states or {}))
        self.rows: np.ndarray | None = None
        self.n = len(frame)
        self.masks: dict[str, np.ndarray] = {}
        self._columns: dict[str, Any] = {}

    def find_missing(self, columns: Iterable[str]) -> None:
        """Look for missing values, marked in `masks` where there are any."""
        for name in columns:
            mask = tables.missing(self._series(name))
            if mask is not None:
                self.masks[name] = mask

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows only, none of which has a missing value."""
        self.rows, self.n, self.masks = rows, len(rows), {}

    @property
    def row_index(self) -> pd.Index:
        """Index labels of the rows in use."""
        index = self.frame.index
        return index if self.rows is None else index[self.rows]

    def is_column(self, expression: str) -> bool:
        """Whether an expression is a column as it stands."""
        return _names_column(column_of(expression), self.names)

    def check_complete(self, values: Any, expression: str) -> None:
        """Refuse gaps that an expression made; those of columns were dropped before."""
        if self.is_column(expression):
            return
        mask = tables.missing(pd.Series(values, copy=False))
        if mask is not None:
            where = tables.show_rows(mask, self.rows)
            raise DataError(
                f"{expression} is missing in {where}. Give every row a level."
            )

    def evaluate(self, expression: str) -> Evaluated:
        """Evaluate an expression.

        Returns
        -------
        Evaluated
            All rows of a plain column, gaps included, else the complete ones.

        Raises
        ------
        DataError, FormulaError
            If a name is unknown or the evaluation fails.
        """
        column = column_of(expression)
        if _names_column(column, self.names):
            return Evaluated(self._column(column), expression, self.n, None)
        used = used_columns(expression, self.names, self.what, self.functions)
        masks = [self.masks[name] for name in used if name in self.masks]
        gaps = reduce(np.logical_or, masks) if masks else None
        columns = {name: self._complete(name, gaps) for name in used}
        values = self._run(expression, columns)
        n = self.n if gaps is None else int((~gaps).sum())
        return Evaluated(values, expression, n, gaps)

    def _run(self, expression: str, columns: Mapping[str, Any]) -> Any:
        state = self.states.setdefault(expression, {})
        try:
            with np.errstate(all="ignore"):
                found = tree(expression)
                return unwrap(Interpreter(found, columns, self.functions, state).run())
        except (DataError, FormulaError) as error:
            raise type(error)(f"cannot evaluate {expression}: {error}") from error
        except Exception as error:
            kind = type(error).__name__
            raise DataError(f"cannot evaluate {expression}: {kind}: {error}") from error

    def _series(self, name: str) -> pd.Series:
        return cast(pd.Series, self.frame[self.names[name]])

    def _column(self, name: str) -> Any:
        if name not in self._columns:
            self._columns[name] = tables.plain(self._series(name), self.rows)
        return self._columns[name]

    def _complete(self, name: str, gaps: np.ndarray | None) -> Any:
        """A column in the rows without gaps, counted from 0 where it is a Series."""
        column = self._column(name)
        if gaps is not None:
            column = tables.take(column, ~gaps)
        if isinstance(column, pd.Series):
            return tables.plain(column.reset_index(drop=True))
        return column
