"""Arithmetic, comparison and logic of the columns of a formula, in float64.

A value is a NumPy array of numbers or truth values, (n,) or (n, m), a Series of text,
dates or categories, or a scalar. Arithmetic takes numbers, and truth values as 0 and 1,
to float64 first, whatever the width of the column: int8 days times 20 are no int8.
Comparisons of integers stay exact, since float64 holds them to 2^53 only.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError
from jaxglmm.values import Marked, Pair, is_text

__all__ = ["arithmetic", "as_float", "compare", "is_number", "logic", "truth", "widen"]

MAX_INT = 2**53  # integers up to here are float64 numbers

_ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.true_divide,
    ast.FloorDiv: np.floor_divide,
    ast.Mod: np.remainder,
    ast.Pow: np.power,
    ast.USub: np.negative,
    ast.UAdd: np.positive,
}
_TEMPORAL: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_COMPARE: dict[type, Callable[..., Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_LOGIC: dict[type, Callable[..., Any]] = {
    ast.And: np.logical_and,
    ast.BitAnd: np.logical_and,
    ast.Or: np.logical_or,
    ast.BitOr: np.logical_or,
    ast.Not: np.logical_not,
    ast.Invert: np.logical_not,
}


# -- kinds of values -------------------------------------------------------------------


def _kind(value: Any) -> str:
    """NumPy's letter for numbers (b, i, u, f), the type's name for the rest."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind
    scalar = {bool: "b", int: "i", float: "f"}
    return scalar.get(type(value), type(value).__name__)


def is_number(value: Any) -> bool:
    """Whether a value is numbers or truth values, one or many."""
    return _kind(value) in ("b", "i", "u", "f")


def _is_words(value: Any) -> bool:
    if isinstance(value, pd.Series | np.ndarray):
        return is_text(value)
    return isinstance(value, str)


def _is_temporal(value: Any) -> bool:
    if isinstance(value, pd.Timestamp | pd.Timedelta | np.datetime64 | np.timedelta64):
        return True
    return getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m")


def _describe(value: Any) -> str:
    if isinstance(value, pd.Series | np.ndarray):
        return "text" if is_text(value) else f"of type {value.dtype}"
    if isinstance(value, str):
        return f"the text {value!r}"
    named = {Marked: "a factor", Pair: "cbind(...)", type(None): "None"}
    return named.get(type(value), f"a {type(value).__name__}")


def as_float(value: Any, what: str) -> Any:
    """Numbers and truth values in float64.

    Raises
    ------
    DataError
        Where the value is neither; ``what`` names what asked for them.
    """
    if not is_number(value):
        raise DataError(
            f"{what} needs numbers and found {_describe(value)}. Convert it first."
        )
    if isinstance(value, np.ndarray):
        return value.astype(np.float64, copy=False)
    try:
        return np.float64(value)
    except OverflowError:
        return np.float64(np.inf if value > 0 else -np.inf)


def widen(value: Any) -> Any:
    """Columns of numbers in float64; truth values, scalars and others as they are."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return value.astype(np.float64, copy=False)
    return value


# -- operators -------------------------------------------------------------------------


def arithmetic(kind: type, *operands: Any) -> Any:
    """Sums, products and powers of numbers; sums of text; differences of dates.

    Two whole numbers that are no columns give a whole number, where float64 holds it:
    ``df=2 + 2``.
    """
    if kind is ast.Add and all(map(_is_words, operands)):
        left, right = operands
        return (
            tables.plain(pd.Series(left + right)) if _many(operands) else left + right
        )
    if kind in _TEMPORAL and any(map(_is_temporal, operands)):
        return _TEMPORAL[kind](*operands)
    name = _ARITHMETIC[kind].__name__
    out = _ARITHMETIC[kind](*_align([as_float(v, name) for v in operands]))
    whole = all(type(v) is int for v in operands) and float(out).is_integer()
    return int(out) if whole and abs(out) < MAX_INT else out


def _align(operands: list[Any]) -> list[Any]:
    """A column beside a matrix goes with each of its columns."""
    if {np.ndim(v) for v in operands} != {1, 2}:
        return operands
    if len({len(v) for v in operands}) > 1:
        raise DataError("a column and a matrix differ in their number of rows.")
    return [v[:, None] if v.ndim == 1 else v for v in operands]


def _many(operands: tuple[Any, ...]) -> bool:
    return any(isinstance(v, pd.Series | np.ndarray) for v in operands)


def compare(kind: type, left: Any, right: Any) -> Any:
    """Compare two values row by row, text and dates too."""
    if kind in (ast.In, ast.NotIn):
        if not isinstance(right, list | tuple):
            raise DataError("'in' needs a list of values, as in f in ['a', 'b'].")
        inside = pd.Series(left).isin(list(right)).to_numpy()
        return inside if kind is ast.In else ~inside
    if is_number(left) and is_number(right) and "f" in _kind(left) + _kind(right):
        left, right = as_float(left, "compare"), as_float(right, "compare")
    out = _COMPARE[kind](left, right)
    return tables.plain(out) if isinstance(out, pd.Series) else out


def logic(kind: type, *operands: Any) -> Any:
    """Combine truth values row by row."""
    first, *rest = (truth(v) for v in operands)
    if not rest:
        return _LOGIC[kind](first)
    for value in rest:
        first = _LOGIC[kind](first, value)
    return first


def truth(value: Any) -> Any:
    """Truth values as they are; anything else is refused."""
    if _kind(value) != "b":
        raise DataError(
            f"& | ~, and, or and not combine truth values such as x > 1; found "
            f"{'numbers' if is_number(value) else _describe(value)}."
        )
    return value
