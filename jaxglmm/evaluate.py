"""Expressions of a formula on the rows of a table: columns, functions, raw values.

A name is a column of the table, a function from a fixed list or a Python builtin. The
caller's own variables are never seen, so a formula means the same everywhere. Rows in
which a column of the expression is missing are left out before it is evaluated, hence
``scale(x)`` or ``bs(x)`` learn from complete rows only.

Functions that learn from data (poly, scale, center, bs, cr, cc) and contrast objects
are formulaic's, as is the evaluation that keeps what they learned. It is imported where
an expression names one of them, because that takes a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import reduce
from typing import Any, TypeGuard, cast

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError, FormulaError
from jaxglmm.expressions import column_of, rewrite, variables
from jaxglmm.tokens import tokenize
from jaxglmm.values import Evaluated, Marked, Pair, unwrap

__all__ = ["Table", "used_columns"]


# -- functions -------------------------------------------------------------------------


def _identity(values: Any) -> Any:
    return values


def _factor(values: Any, contrasts: Any = None, *, levels: Any = None) -> Marked:
    return Marked(unwrap(values), contrasts, levels)


def _ordered(values: Any, *, levels: Any = None) -> Marked:
    return Marked(unwrap(values), None, levels, True)


def _cbind(successes: Any, failures: Any) -> Pair:
    return Pair(unwrap(successes), unwrap(failures))


_NUMPY = (
    "log log10 log2 log1p exp exp2 expm1 sqrt abs sin cos tan tanh floor ceil sign "
    "where maximum minimum"
).split()
_OWN: dict[str, Any] = {
    "np": np,
    **{name: getattr(np, name) for name in _NUMPY},
    "I": _identity,
    "C": _factor,
    "factor": _factor,
    "ordered": _ordered,
    "cbind": _cbind,
}
_FORMULAIC = (
    "poly scale center standardize bs cr cc cs contr Treatment Sum Helmert Poly Diff"
).split()
_FUNCTIONS = (*_FORMULAIC, *_OWN)
_CONSTANTS = frozenset({"True", "False", "None"})


# -- columns and expressions -----------------------------------------------------------


def _names_column(column: str | None, names: Collection[Any]) -> TypeGuard[str]:
    return column is not None and column in names


def used_columns(expression: str, names: Collection[Any], what: str) -> list[str]:
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
    for name in sorted(variables(expression)):
        root = name.split(".")[0]
        known = root in _FUNCTIONS or root in _CONSTANTS
        if name in names or root in names:
            found.append(name if name in names else root)
        elif column is not None or not known:
            choices = tables.suggest(name, names)
            raise DataError(f"no column {name!r} in {what}. {choices}")
    return list(dict.fromkeys(found))


class Table:
    """The rows in use of the caller's table, as plain columns made when asked for."""

    def __init__(
        self,
        frame: pd.DataFrame,
        names: Collection[Any],
        what: str = "the data",
    ):
        self.frame, self.names, self.what = frame, names, what
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

    def evaluate(
        self, expression: str, state: dict[str, Any] | None = None
    ) -> Evaluated:
        """Evaluate an expression.

        Parameters
        ----------
        expression : str
        state : dict, optional
            What its functions learned; filled where it is empty.

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
        used = used_columns(expression, self.names, self.what)
        masks = [self.masks[name] for name in used if name in self.masks]
        gaps = reduce(np.logical_or, masks) if masks else None
        columns = {name: self._column(name) for name in used}
        if gaps is not None:
            columns = {k: tables.take(v, ~gaps) for k, v in columns.items()}
        values = _evaluate(expression, columns, {} if state is None else state)
        n = self.n if gaps is None else int((~gaps).sum())
        return Evaluated(values, expression, n, gaps)

    def _series(self, name: str) -> pd.Series:
        return cast(pd.Series, self.frame[name])

    def _column(self, name: str) -> Any:
        if name not in self._columns:
            self._columns[name] = tables.plain(self._series(name), self.rows)
        return self._columns[name]


def _evaluate(expression: str, columns: dict[str, Any], state: dict[str, Any]) -> Any:
    """Run an expression; columns get aliases, since their names may be anything."""
    aliases = {name: f"_column_{i}_" for i, name in enumerate(columns)}
    env = {a: pd.Series(columns[name], copy=False) for name, a in aliases.items()}

    def alias(name: str) -> str:
        root, dot, rest = name.partition(".")
        if name in aliases:
            return aliases[name]
        return aliases.get(root, root) + dot + rest

    try:
        with np.errstate(all="ignore"):
            raw = _run(rewrite(expression, alias), env, state)
    except (DataError, FormulaError):
        raise
    except NameError as error:
        name = getattr(error, "name", None) or str(error)
        choices = tables.suggest(name, _FUNCTIONS, "Functions")
        raise FormulaError(
            f"cannot evaluate {expression}: unknown function {name!r}. {choices}"
        ) from None
    except Exception as error:
        kind = type(error).__name__
        raise DataError(f"cannot evaluate {expression}: {kind}: {error}") from error
    return unwrap(raw) if isinstance(raw, pd.Series | pd.Index) else raw


def _run(code: str, env: dict[str, Any], state: dict[str, Any]) -> Any:
    names = {t.text.split(".")[0] for t in tokenize(code) if t.kind == "name"}
    if names.isdisjoint(_FORMULAIC):
        return eval(code, {}, _OWN | env)
    from formulaic.transforms import TRANSFORMS
    from formulaic.utils.stateful_transforms import stateful_eval

    theirs = {name: TRANSFORMS[name] for name in _FORMULAIC}
    return stateful_eval(code, _OWN | theirs | env, None, state, None)
