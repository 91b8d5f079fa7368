"""Response, prior weights and offset as numbers, (n,).

For ``cbind(s, f)`` the response is the proportion y = s / m of m = s + f trials, and
the prior weights are m (times the weights given, if any). Offsets add up. A factor as
response is the codes 0, 1, ... of its levels, whose order has to be known where the
model depends on it: the alphabet is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError
from jaxglmm.evaluate import Table
from jaxglmm.values import Evaluated, Marked, Pair, check_finite, classify, is_text

__all__ = [
    "as_numbers",
    "check_response",
    "given_numbers",
    "in_order_of",
    "prior_weights",
    "recall_codes",
    "response_and_trials",
    "response_codes",
    "total_offset",
]


def as_numbers(found: Evaluated) -> np.ndarray:
    """Numbers (n,) from an expression; booleans count as 0 and 1.

    Raises
    ------
    DataError
        If it gave a factor or several columns.
    """
    name, (values, _, factor) = found.name, classify(found)
    if factor is not None:
        if isinstance(values, np.ndarray) and values.dtype == bool:
            return values.astype(np.float64)
        _, levels = tables.factorize(pd.Series(values).dropna())
        shown = tables.labels(levels)
        first = ", ".join(shown[:5]) + ", ..." * (len(shown) > 5)
        raise DataError(
            f"{name} is not numeric: it has the {len(shown)} levels {first}. Convert "
            f"it, for instance data[{name!r}] == {shown[-1]!r} for a two-level "
            "response, or its codes."
        )
    if values.ndim != 1:
        raise DataError(f"{name} has {values.shape[1]} columns; one is needed.")
    return values


def given_numbers(values: Any, name: str, n: int) -> np.ndarray:
    """Numbers (n,) from an array or list given beside the table."""
    column = values if isinstance(values, pd.Series) else pd.Series(np.asarray(values))
    if len(column) != n:
        raise DataError(
            f"{name} has {len(column)} values, the data have {n} rows. Give one value "
            "per row."
        )
    array = tables.plain(column)
    if not (isinstance(array, np.ndarray) and array.dtype.kind in "biuf"):
        raise DataError(f"{name} is of type {column.dtype}. Give numbers.")
    return array.astype(np.float64)


def in_order_of(values: Any, data: Any, name: str) -> Any:
    """A Series given beside a DataFrame, by the labels of its rows."""
    if not (isinstance(values, pd.Series) and isinstance(data, pd.DataFrame)):
        return values
    if len(values) != len(data) or values.index.equals(data.index):
        return values
    both = values.index, data.index
    if all(i.is_unique for i in both) and both[0].isin(both[1]).all():
        return values.reindex(data.index)
    raise DataError(
        f"{name} is a Series whose index is not that of the data, so its values cannot "
        f"be matched to rows. Give {name}.to_numpy() if they are in the same order."
    )


# -- response --------------------------------------------------------------------------


def response_and_trials(found: Evaluated) -> tuple[np.ndarray, np.ndarray | None]:
    """Response y (n,) and, for ``cbind``, the numbers of trials (n,)."""
    pair = found.values
    if not isinstance(pair, Pair):
        return as_numbers(found), None
    successes = as_numbers(found._replace(values=pair.successes))
    trials = successes + as_numbers(found._replace(values=pair.failures))
    with np.errstate(invalid="ignore"):
        return successes / trials, trials


def response_codes(
    found: Evaluated, kind: str | None, rows: np.ndarray | None = None
) -> tuple[Evaluated, pd.Index | None, list[str]]:
    """A factor as response: codes 0, 1, ... and levels, and what to note.

    Parameters
    ----------
    found : Evaluated
        Numbers pass through, and so do truth values that nothing made a factor.
    kind : {"levels", "ordered"} or None
        What the family takes; ordered levels must be known to be.
    rows : array of int, optional
        Where the rows in use are in the caller's table.

    Raises
    ------
    DataError
        If there is one level, a row has none, or their order is not known.
    """
    if kind is None or isinstance(found.values, Pair):
        return found, None, []
    values, _, factor = classify(found)
    truth = isinstance(values, np.ndarray) and values.dtype == bool
    if factor is None or (truth and not isinstance(found.values, Marked)):
        return found, None, []
    column = pd.Series(factor.with_levels(found.name))
    gaps = tables.missing(column)
    if gaps is not None:
        where = tables.show_rows(gaps, rows)
        raise DataError(f"{found.name} is missing in {where}. Give every row a level.")
    codes, levels = tables.factorize(column)
    notes = []
    if kind == "ordered":
        _check_order(found.name, factor, column, levels)
        notes = _absent_levels(found.name, column, levels)
    if len(levels) == 1:
        raise DataError(
            f"response {found.name} is constant: all {found.n} values are "
            f"{tables.labels(levels)[0]}. There is nothing to explain."
        )
    return found._replace(values=np.asarray(codes, np.float64)), levels, notes


def _check_order(
    name: str, factor: Marked, column: pd.Series, levels: pd.Index
) -> None:
    """Refuse text whose order nobody gave; numbers and truth values have one."""
    dtype, shown = column.dtype, ", ".join(tables.labels(levels)[:20])
    inside = re.fullmatch(r"(?:ordered|factor|C)\((`[^`]+`|[\w.]+).*\)", name)
    inner = inside.group(1) if inside else name
    if isinstance(dtype, pd.CategoricalDtype):
        told = factor.levels is not None or dtype.ordered or bool(factor.ordered)
        numbers = not is_text(levels) and dtype.categories.is_monotonic_increasing
        if told or numbers:
            return
        found = f"a categorical without an order, with the categories {shown}"
        first = (
            f"If this is their order, lowest first, write ordered({inner}); if not, "
        )
    elif not is_text(levels):
        return  # numbers and truth values have one
    else:
        found = f"text, whose levels have no order but the alphabet's: {shown}"
        first = ""
    advice = (
        f"order them, lowest first: ordered({inner}, levels=['...', ...]) in the "
        "formula, or pd.Categorical(values, ['...', ...], ordered=True) in the data."
    )
    advice = first + advice if first else advice[0].upper() + advice[1:]
    raise DataError(f"the response {name} is {found}. {advice}")


def _absent_levels(name: str, column: pd.Series, levels: pd.Index) -> list[str]:
    """Say which declared levels no row has."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return []
    absent = tables.labels(column.dtype.categories.difference(levels, sort=False))
    if not absent:
        return []
    return [
        f"no row has the level{'s' * (len(absent) != 1)} {', '.join(absent)} of the "
        f"response {name}, so the model has none either; its levels are "
        f"{', '.join(tables.labels(levels))}."
    ]


def recall_codes(found: Evaluated, levels: pd.Index) -> np.ndarray:
    """Codes (n,) of a factor as response in new data; NaN where it is missing.

    Raises
    ------
    DataError
        If it has a level that was not fitted.
    """
    values, _, factor = classify(found)
    values = values if factor is None else factor.with_levels(found.name)
    codes, unseen = tables.match(values, levels)
    if unseen:
        raise DataError(
            f"response {found.name} has unseen level(s) {', '.join(unseen[:5])}; the "
            f"data fitted had {', '.join(tables.labels(levels))}."
        )
    return np.where(codes < 0, np.nan, codes)


def check_response(
    y: np.ndarray, trials: np.ndarray | None, name: str, rows: np.ndarray | None
) -> None:
    """Refuse a response that is constant, not finite or no proportion of trials."""
    if trials is not None:
        bad = ~(trials > 0)
        if bad.any():
            where = tables.show_rows(bad, rows)
            raise DataError(f"{name} has no trials in {where}. Remove these rows.")
        bad = (y < 0) | (y > 1)
        if bad.any():
            where = tables.show_rows(bad, rows)
            raise DataError(f"{name} has a negative count in {where}. Correct it.")
    check_finite(y, f"response {name}", rows)
    if y.min() == y.max():
        raise DataError(
            f"response {name} is constant: all {len(y)} values are {y[0]:.6g}. There "
            "is nothing to explain."
        )


# -- weights and offset ----------------------------------------------------------------


def prior_weights(
    table: Table,
    arrays: Mapping[str, np.ndarray],
    weights: Any,
    trials: np.ndarray | None,
) -> np.ndarray | None:
    """Prior weights (n,), from an expression or ``arrays["weights"]``, times trials."""
    if weights is None:
        return trials
    if isinstance(weights, str):
        name, out = f"weights {weights!r}", as_numbers(table.evaluate(weights))
    else:
        name, out = "weights", arrays["weights"]
    _check_weights(out, name, table.rows)
    return out if trials is None else out * trials


def _check_weights(weights: np.ndarray, name: str, rows: np.ndarray | None) -> None:
    if len(weights) and weights.min() > 0 and weights.max() < np.inf:
        return  # a NaN is neither
    for bad, what in (
        (np.isnan(weights), "NaN"),
        (np.isinf(weights), "infinite"),
        (weights < 0, "negative"),
        (weights == 0, "zero"),
    ):
        if bad.any():
            raise DataError(
                f"{name}: {what} in {tables.show_rows(bad, rows)}. Weights must be "
                "positive numbers; remove these rows from the data."
            )


def total_offset(
    table: Table, arrays: Mapping[str, np.ndarray], offsets: tuple[str, ...]
) -> np.ndarray | None:
    """Sum (n,) of all offsets: expressions, and ``arrays["offset"]``."""
    named = [(f"offset {e}", as_numbers(table.evaluate(e))) for e in offsets]
    if "offset" in arrays:
        named.append(("offset", arrays["offset"]))
    for name, values in named:
        check_finite(values, name, table.rows)
    return reduce(np.add, [values for _, values in named]) if named else None
