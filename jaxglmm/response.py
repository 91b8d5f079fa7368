"""Response, prior weights and offset as numbers, (n,).

For ``cbind(s, f)`` the response is the proportion y = s / m of m = s + f trials, and
the prior weights are m (times the weights given, if any). Offsets add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import DataError
from jaxglmm.evaluate import Table
from jaxglmm.values import Evaluated, Pair, check_finite, classify

__all__ = [
    "as_numbers",
    "check_response",
    "given_numbers",
    "in_order_of",
    "prior_weights",
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


def response_codes(found: Evaluated) -> tuple[Evaluated, pd.Index | None]:
    """A factor as response: codes 0, 1, ... and its levels; numbers pass through."""
    if isinstance(found.values, Pair):
        return found, None
    values, _, factor = classify(found)
    if factor is None or (isinstance(values, np.ndarray) and values.dtype == bool):
        return found, None
    codes, levels = tables.factorize(pd.Series(values))
    return found._replace(values=np.asarray(codes, np.float64)), levels


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
