"""Tables of any make to pandas columns, and columns to numbers or level codes.

Accepted: pandas, polars and pyarrow tables (and whatever else narwhals reads eagerly),
a dict of equally long one-dimensional arrays or lists, and NumPy structured arrays.
Only the columns asked for are converted, without a copy where the memory layout allows
it, and the caller's table is never changed.

A column is numeric (integers included), or a factor: text, categoricals and booleans.
Grouping factors may be of any type. Levels keep the order of a categorical and are
sorted otherwise; levels that do not occur are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxglmm.errors import DataError

if TYPE_CHECKING:
    import narwhals.stable.v1 as nw

__all__ = [
    "as_frame",
    "by_text",
    "column_names",
    "compress",
    "factorize",
    "labels",
    "match",
    "missing",
    "plain",
    "show_rows",
    "suggest",
    "take",
]

_EXACT = 2**53  # integers up to here are float64 numbers
_ACCEPTED = (
    "a pandas, polars or pyarrow table, a dict of arrays or lists, or a NumPy "
    "structured array"
)


def column_names(data: Any) -> list[Any]:
    """Column names of a table, without converting it.

    Raises
    ------
    DataError
        If `data` is no table, or a name occurs twice.
    """
    return _names(_open(data))


def by_text(names: Iterable[Any]) -> dict[str, Any]:
    """Column names by how a formula spells them; the column 0 is ``"0"``.

    A column whose name is that text goes before one whose name is no text.
    """
    names = list(names)
    out = {str(name): name for name in names}
    return out | {name: name for name in names if isinstance(name, str)}


def as_frame(data: Any, columns: Collection[Any] | None = None) -> pd.DataFrame:
    """Convert a table to pandas.

    Parameters
    ----------
    data : table
        pandas, polars or pyarrow table, dict of arrays or lists, structured array.
    columns : collection, optional
        Names of the columns needed. Others may be missing from the result; names that
        the table lacks are ignored.

    Returns
    -------
    pandas.DataFrame
        A pandas frame comes back as it is. Polars categoricals and enums and pyarrow
        dictionaries become unordered categoricals with the order of levels kept.

    Raises
    ------
    DataError
        If `data` is no table, its columns differ in length or a name occurs twice.

    Examples
    --------
    >>> as_frame({"y": [1.0, 2.0], "g": ["a", "b"]}).shape
    (2, 2)
    """
    table = _open(data)
    names = _names(table)
    if isinstance(table, pd.DataFrame):
        return table
    wanted = [n for n in names if columns is None or n in columns]
    if isinstance(table, Mapping):
        return _from_mapping(table, wanted)
    if isinstance(table, np.ndarray):
        return pd.DataFrame({n: _native(table[n]) for n in wanted}, copy=False)
    series = {n: _from_narwhals(table[n]) for n in wanted}
    return pd.DataFrame(series, index=pd.RangeIndex(len(table)), copy=False)


def _open(data: Any) -> Any:
    """Pass pandas, dicts and structured arrays on; wrap the rest by narwhals."""
    if isinstance(data, pd.DataFrame | Mapping):
        return data
    if isinstance(data, np.ndarray):
        if data.dtype.names is None or data.ndim != 1:
            kind = f"a NumPy array of dtype {data.dtype} and shape {data.shape}"
            raise DataError(f"data: found {kind}, which names no columns. {_give()}")
        return data
    import narwhals.stable.v1 as nw

    try:
        return nw.from_native(data, eager_only=True)
    except TypeError:
        kind = f"{type(data).__module__}.{type(data).__name__}"
        lazy = " Call .collect() first." if "Lazy" in kind else f" {_give()}"
        raise DataError(f"data: found {kind}, which is no table.{lazy}") from None


def _give() -> str:
    return f"Give {_ACCEPTED}."


def _names(table: Any) -> list[Any]:
    if isinstance(table, np.ndarray):
        return list(table.dtype.names or ())
    names = list(table) if isinstance(table, Mapping) else list(table.columns)
    if isinstance(table, pd.DataFrame):
        if table.columns.nlevels > 1:
            raise DataError(
                "data: the columns have several levels. Flatten them first."
            )
        if table.columns.is_unique:
            return names
    return _unique(names)


def _unique(names: Iterable[Any]) -> list[Any]:
    counts = Counter(names)
    twice = [str(name) for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"data: duplicated column names: {', '.join(twice)}. Rename or drop them."
        )
    return list(counts)


def _from_mapping(table: Mapping[str, Any], wanted: list[str]) -> pd.DataFrame:
    columns = {name: _column(name, table[name]) for name in wanted}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name}: {size}" for name, size in lengths.items())
        raise DataError(f"data: the columns differ in length ({shown}).")
    plain = {
        name: column.reset_index(drop=True) if isinstance(column, pd.Series) else column
        for name, column in columns.items()
    }
    return pd.DataFrame(plain, copy=False)


def _column(name: str, values: Any) -> Any:
    if isinstance(values, pd.Series | pd.Index | pd.api.extensions.ExtensionArray):
        return values
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        kind = type(values).__name__
        raise DataError(
            f"data: column {name!r} is a single {kind}. Give an array or list."
        )
    array = values if isinstance(values, list | tuple) else np.asarray(values)
    if isinstance(array, np.ndarray) and array.ndim != 1:
        raise DataError(
            f"data: column {name!r} has shape {array.shape}. Give a one-dimensional "
            "array."
        )
    if isinstance(array, np.ndarray):
        return _native(array)
    return pd.Series(array, dtype=None if len(array) else object)


def _native(array: np.ndarray) -> np.ndarray:
    """Bytes as text and machine byte order, which is all that pandas takes."""
    if array.dtype.kind == "S":
        return np.char.decode(array)
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def _from_narwhals(series: nw.Series) -> Any:
    """Columns by NumPy, so that polars does not need pyarrow."""
    import narwhals.stable.v1 as nw

    dtype = series.dtype
    if dtype in (nw.Categorical, nw.Enum):
        levels = series.cat.get_categories().to_list()
        codes = pd.Index(levels).get_indexer(pd.Index(series.to_list(), dtype=object))
        return pd.Categorical.from_codes(codes.tolist(), categories=levels)
    if dtype.is_numeric() and not dtype.is_decimal():
        if series.null_count() and dtype.is_integer():
            gaps = series.is_null().to_numpy()
            return pd.arrays.IntegerArray(series.fill_null(0).to_numpy(), gaps)
        return series.to_numpy()
    convert: Callable[[], Any] = series.to_list
    if dtype.is_temporal() or (dtype == nw.Boolean and not series.null_count()):
        convert = series.to_numpy
    return pd.Series(convert(), dtype=None if len(series) else object)


def suggest(name: str, choices: Iterable[Any], what: str = "Columns") -> str:
    """Close matches of a misspelt name, then all the choices."""
    known = [str(c) for c in choices]
    if not known:
        return f"{what}: none."
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    more = f", ... ({len(known)} in all)" if len(known) > 20 else ""
    return f"{hint}{what}: {', '.join(known[:20])}{more}."


def show_rows(bad: np.ndarray, rows: np.ndarray | None = None) -> str:
    """How many rows are marked, and the first of them counted from 0."""
    where = np.flatnonzero(bad)
    first = where[:5] if rows is None else rows[where[:5]]
    count = f"{len(where)} row{'s' * (len(where) != 1)}"
    dots = ", ..." if len(where) > 5 else ""
    return f"{count} ({', '.join(map(str, first))}{dots}, counted from 0)"


def missing(column: pd.Series) -> np.ndarray | None:
    """Mask of the missing values (NaN, None, NA, null), or None where there is none."""
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "iub":
        return None
    if isinstance(dtype, np.dtype) and dtype.kind == "f":
        mask = np.isnan(column.to_numpy())
    elif isinstance(dtype, pd.CategoricalDtype):
        mask = column.cat.codes.to_numpy() < 0
    else:
        mask = column.isna().to_numpy()
    return mask if mask.any() else None


def plain(column: pd.Series, rows: np.ndarray | None = None) -> np.ndarray | pd.Series:
    """Values of a column: NumPy numbers or booleans, else a Series.

    Nullable and object columns of numbers become NumPy numbers, missing ones NaN.

    Raises
    ------
    DataError
        If an object column mixes types or holds things that are no values.
    """
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "iubf":
        values = column.to_numpy()
        return values if rows is None else values[rows]
    if rows is not None:
        column = column.iloc[rows]
    if pd.api.types.is_object_dtype(dtype):
        return _from_objects(column)
    if pd.api.types.is_complex_dtype(dtype):
        return column  # no number here: refused by name where it is used
    if pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype):
        return _from_nullable(column)
    return column


def _from_nullable(column: pd.Series) -> np.ndarray | pd.Series:
    gaps = bool(column.isna().any())
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype(object) if gaps else column.to_numpy(dtype=bool)
    if pd.api.types.is_integer_dtype(column.dtype):
        if not gaps:
            is_signed = pd.api.types.is_signed_integer_dtype(column.dtype)
            return column.to_numpy(dtype=np.int64 if is_signed else np.uint64)
        if column.abs().max() > _EXACT:
            return column  # ids that float64 would take for one another
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def _from_objects(column: pd.Series) -> np.ndarray | pd.Series:
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("string", "date", "datetime", "timedelta"):
        return column
    if kind == "empty":
        return np.full(len(column), np.nan)
    gaps = bool(column.isna().any())
    if kind == "boolean":
        return column if gaps else column.to_numpy(dtype=bool)
    if kind == "integer" and not gaps:
        return column.to_numpy(dtype=np.int64)
    if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
        return column.where(column.notna(), np.nan).to_numpy(dtype=np.float64)
    types = sorted({type(v).__name__ for v in column.dropna()})
    raise DataError(
        f"column {column.name!r} holds values of type {', '.join(types)}. "
        "Convert it to numbers or to text."
    )


def labels(levels: pd.Index) -> list[str]:
    """Level labels as text; whole floats without the decimal point."""
    if levels.dtype.kind == "f":
        return [str(int(v)) if float(v).is_integer() else f"{v:.15g}" for v in levels]
    return [str(v) for v in levels.tolist()]


def compress(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0..J-1 of integer keys, in the order of the keys, and the keys that occur.

    Parameters
    ----------
    keys : (n,) array of int

    Returns
    -------
    codes : (n,) array of int32
    present : (J,) array
        Sorted.
    """
    low, high = int(keys.min()), int(keys.max())
    span = high - low + 1
    if span <= 4 * len(keys) + 1024 and high < 2**63:
        shifted = keys.astype(np.int64, copy=False) - low
        seen = np.zeros(span, bool)
        seen[shifted] = True
        present = np.flatnonzero(seen)
        if len(present) == span:
            return shifted.astype(np.int32), present + low
        rank = np.cumsum(seen, dtype=np.int32) - np.int32(1)
        return rank[shifted], present + low
    codes, present = pd.factorize(keys)
    order = np.argsort(present)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[codes], present[order]


def factorize(values: Any) -> tuple[np.ndarray, pd.Index]:
    """Level codes and levels of a column without missing values.

    Returns
    -------
    codes : (n,) array of int32
    levels : pandas.Index
        Only levels that occur: a categorical's in its order, others sorted.
    """
    if isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        column = pd.Series(values)
        codes, present = compress(column.cat.codes.to_numpy())
        return codes, column.cat.categories[present]
    if isinstance(values, np.ndarray) and values.dtype.kind in "iub":
        keys = values.view(np.uint8) if values.dtype == bool else values
        codes, present = compress(keys)
        return codes, pd.Index(present.astype(values.dtype, copy=False))
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = values.astype(np.float64, copy=False)
        if np.all(np.abs(values) < 2**53) and np.array_equal(values, np.rint(values)):
            return factorize(values.astype(np.int64))
    codes, levels = pd.factorize(values, sort=True)
    return codes.astype(np.int32), pd.Index(levels)


def match(values: Any, levels: pd.Index) -> tuple[np.ndarray, list[str]]:
    """Codes of new values among known levels, compared by label.

    Returns
    -------
    codes : (n,) array of int32
        -1 where the value is missing or no known level.
    unseen : list of str
        Labels of the values that are no known level.
    """
    if isinstance(getattr(values, "dtype", None), pd.CategoricalDtype):
        codes, found = factorize_codes(pd.Series(values))
    else:
        codes, found = pd.factorize(values)
        found = pd.Index(found)
    plain = all(isinstance(i.dtype, np.dtype) for i in (found, levels))
    if plain and found.dtype.kind in "iu" and levels.dtype.kind in "iu":
        place = levels.get_indexer(found)
    else:
        place = pd.Index(labels(levels), dtype=object).get_indexer(
            pd.Index(labels(found), dtype=object)
        )
    unseen = labels(found[place < 0])
    place = np.append(place, -1).astype(np.int32)
    return place[codes], unseen


def factorize_codes(column: pd.Series) -> tuple[np.ndarray, pd.Index]:
    """Codes of a categorical that may have gaps, and the categories that occur."""
    codes = column.cat.codes.to_numpy()
    present = np.unique(codes[codes >= 0])
    rank = np.full(len(column.cat.categories) + 1, -1, np.int32)
    rank[present] = np.arange(len(present), dtype=np.int32)
    return rank[codes], column.cat.categories[present]


def take(values: Any, rows: np.ndarray) -> Any:
    """Rows of a column, by position or mask."""
    return values.iloc[rows] if isinstance(values, pd.Series) else values[rows]
