"""Raw values of an expression, and whether they are numbers or a factor.

Numbers are one column or several, (n,) or (n, m). A factor is text, a categorical,
booleans, or what ``C(...)``, ``factor(...)`` and ``ordered(...)`` declare to be one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError

__all__ = [
    "Evaluated",
    "Marked",
    "Pair",
    "Values",
    "check_finite",
    "classify",
    "is_text",
    "unwrap",
]


class Evaluated(NamedTuple):
    """What an expression gave, on the rows where its columns are complete."""

    values: Any
    name: str
    n: int  # number of these rows
    gaps: np.ndarray | None  # mask of the others, None where there are none

    def spread(self, values: np.ndarray, fill: Any = np.nan) -> np.ndarray:
        """Values for all rows: those given, and `fill` in the gaps."""
        if self.gaps is None:
            return values
        full = np.full((len(self.gaps), *values.shape[1:]), fill, values.dtype)
        full[~self.gaps] = values
        return full


@dataclass(frozen=True)
class Marked:
    """Values that an expression declared a factor."""

    values: Any
    contrasts: Any = None
    levels: Any = None
    ordered: bool | None = None

    def with_levels(self, name: str) -> Any:
        """Values as a categorical with the levels declared, if any were.

        Raises
        ------
        DataError
            If a value is none of them.
        """
        if self.levels is None:
            return self.values
        column, levels = pd.Series(self.values), pd.Index(list(self.levels))
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(column.cat.categories.dtype)
        if not levels.is_unique:
            twice = ", ".join(map(str, levels[levels.duplicated()].unique()))
            raise DataError(f"{name}: levels= has {twice} more than once.")
        known = column.isin(levels).to_numpy(dtype=bool)
        lost = sorted({str(v) for v in column[~known]})
        if lost:
            first = ", ".join(lost[:5])
            raise DataError(f"{name}: levels= lacks the value(s) {first}.")
        return pd.Series(pd.Categorical(column, categories=levels))


@dataclass(frozen=True)
class Pair:
    """Successes and failures of ``cbind(successes, failures)``."""

    successes: Any
    failures: Any


def unwrap(values: Any) -> Any:
    """Make a Series plain as `tables.plain` does."""
    if isinstance(values, pd.Series | pd.Index | pd.Categorical):
        return tables.plain(pd.Series(values))
    return values


class Values(NamedTuple):
    """Numbers (n,) or (n, m) with m column suffixes, or the values of a factor."""

    values: Any
    suffixes: tuple[str, ...] = ("",)
    factor: Marked | None = None


def classify(found: Evaluated) -> Values:
    """Tell numbers from factors: text, categoricals, booleans and what is declared one.

    Raises
    ------
    DataError
        If the values are neither, or not one per row.
    """
    raw, names = found.values, None
    if isinstance(raw, Marked):
        return Values(raw.values, factor=raw)
    if isinstance(raw, pd.DataFrame):
        names, raw = tuple(map(str, raw.columns)), raw.to_numpy()
    values = raw if hasattr(raw, "dtype") else np.asarray(raw)
    if values.ndim == 0:
        values = np.full(found.n, values)
    if len(values) != found.n:
        counts = f"{len(values)} values for {found.n} rows"
        raise DataError(
            f"{found.name} gives {counts}. Use expressions that keep the rows."
        )
    if isinstance(values, pd.Series) and pd.api.types.is_integer_dtype(values.dtype):
        values = values.to_numpy(dtype=np.float64, na_value=np.nan)  # with gaps
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return _numbers(values, names)
    is_bool = isinstance(values, np.ndarray) and values.dtype.kind == "b"
    if is_bool or isinstance(values.dtype, pd.CategoricalDtype) or is_text(values):
        return Values(values, factor=Marked(values))
    raise DataError(
        f"{found.name} is of type {values.dtype}, which is neither a number nor a "
        "factor. Convert it first, for instance a date to days since the first one."
    )


def _numbers(values: np.ndarray, names: tuple[str, ...] | None) -> Values:
    values = values.astype(np.float64, copy=False)
    if values.ndim == 1:
        return Values(values)
    if values.shape[1] == 1:
        return Values(values[:, 0])
    suffixes = names or tuple(str(j + 1) for j in range(values.shape[1]))
    return Values(values, tuple(map(str, suffixes)))


def is_text(values: Any) -> bool:
    """Whether an array or Series holds text."""
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "US"
    return bool(pd.api.types.is_string_dtype(values.dtype) or values.dtype == object)


def check_finite(values: np.ndarray, name: str, rows: np.ndarray | None) -> None:
    """Refuse infinite and NaN values, naming the rows of the caller's table."""
    with np.errstate(all="ignore"):
        if np.isfinite(values.sum()):
            return
    rowwise = values.reshape(len(values), -1)
    for test, what, advice in (
        (np.isinf, "infinite", "Correct or remove them."),
        (np.isnan, "NaN", "Check its domain."),
    ):
        marked = np.asarray(test(rowwise).any(axis=1))
        if marked.any():
            where = tables.show_rows(marked, rows)
            raise DataError(f"{name} is {what} in {where}. {advice}")
