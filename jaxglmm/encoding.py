"""Formula and data to arrays: y, X, one (z, group) per random term, and their names.

    eta = offset + X beta + sum_t z_t . b_t[group_t]

Rows with a missing value in any column used are left out first. Then each part is made
by a module of its own: the response, weights and offset (:mod:`jaxglmm.response`), the
variables and their columns (:mod:`jaxglmm.columns`), the random terms
(:mod:`jaxglmm.terms`). What new data need is kept (:mod:`jaxglmm.newdata`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.algebra import Side, expand
from jaxglmm.collinear import describe_dropped, independent
from jaxglmm.columns import ModelColumns, Variable, learn, model_columns
from jaxglmm.contrasts import check_contrasts
from jaxglmm.errors import DataError, NoticeWarning
from jaxglmm.evaluate import Table, used_columns
from jaxglmm.formula import ParsedFormula, parse
from jaxglmm.newdata import Encoder
from jaxglmm.response import (
    check_response,
    given_numbers,
    prior_weights,
    response_and_trials,
    total_offset,
)
from jaxglmm.terms import TermArrays, random_terms

__all__ = ["ModelFrame", "model_frame"]


@dataclass(frozen=True, eq=False)
class ModelFrame:
    """Everything a mixed model needs of a formula and its data.

    Attributes
    ----------
    y : (n,) array
        The response; for ``cbind(successes, failures)`` the proportion of successes.
    X : (n, p) array
        Fixed-effects design, without collinear columns.
    X_names : list of str
        Names as R prints them.
    terms : tuple of TermArrays
        In lme4's order: as written where the numbers of levels do not increase, else by
        decreasing number of levels.
    weights : (n,) array or None
        Prior weights; for ``cbind`` the numbers of trials (times `weights`, if given).
    offset : (n,) array or None
        Sum of all offsets, on the link scale.
    n_rows, n_dropped : int
        Rows of the table, and those left out for missing values.
    dropped_by : dict
        Number of missing values per column, where there are any.
    kept : (n,) array of int or None
        Positions of the rows used; None for all.
    row_index : pandas.Index
        Index labels of the rows used.
    response_name : str
    encoder : Encoder
        Makes the same arrays from new data.
    notices : list of str
        What was changed on the user's behalf, other than the rows counted above; each
        was also issued as NoticeWarning.
    dropped_columns : list of str
        Columns of X left out because they are collinear with earlier ones.
    one_row_per_level : tuple of str
        Terms with as many effects as rows (observation-level effects).
    is_cbind : bool
        Whether the response was ``cbind(successes, failures)``.
    """

    y: np.ndarray
    X: np.ndarray
    X_names: list[str]
    terms: tuple[TermArrays, ...]
    weights: np.ndarray | None
    offset: np.ndarray | None
    n_rows: int
    n_dropped: int
    dropped_by: dict[str, int]
    kept: np.ndarray | None
    row_index: pd.Index
    response_name: str
    encoder: Encoder
    notices: list[str] = field(default_factory=list)
    dropped_columns: list[str] = field(default_factory=list)
    one_row_per_level: tuple[str, ...] = ()
    is_cbind: bool = False


def model_frame(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    missing: str = "drop",
) -> ModelFrame:
    """Turn a mixed-model formula and a table into arrays and names.

    Parameters
    ----------
    formula : str
        Such as ``"y ~ x * f + (1 + x | g)"``; see :mod:`jaxglmm.formula`.
    data : table
        pandas, polars or pyarrow table, dict of arrays or structured array.
    weights, offset : str or (n_rows,) array, optional
        A column, an expression of columns, or values for every row of `data`.
    contrasts : dict of str to str, optional
        Contrasts of factors by column: treatment, sum, helmert, poly or SAS. Default:
        poly for ordered categoricals, treatment otherwise.
    missing : {"drop", "raise"}
        What to do with rows that have a missing value in a column used. Those dropped
        are counted in the result.

    Returns
    -------
    ModelFrame

    Raises
    ------
    FormulaError
        If the formula does not parse, a grouping factor has one level, or a term has
        more effects than there are rows.
    DataError
        If the data cannot be used as the formula asks.

    Warns
    -----
    NoticeWarning
        If collinear columns were dropped.

    Examples
    --------
    >>> frame = model_frame(
    ...     "y ~ x + (1 | g)",
    ...     {"y": [1.0, 3.0, 2.0, 5.0], "x": [0, 1, 0, 1], "g": ["a", "a", "b", "b"]},
    ... )
    >>> frame.X_names, list(frame.terms[0].levels)
    (['(Intercept)', 'x'], ['a', 'b'])
    """
    contrasts = contrasts or {}
    if missing not in ("drop", "raise"):
        raise DataError(f"missing={missing!r} is unknown. Choose 'drop' or 'raise'.")
    check_contrasts(contrasts)
    plan = _plan(formula, offset)
    table, arrays = _open(data, plan.expressions, weights, offset)
    dropped_by = _drop_missing(table, arrays, missing)
    numbers = _evaluate_numbers(plan, table, arrays, weights)
    variables, values = _learn(plan.variables, table, contrasts)
    fixed = _fixed_part(plan.fixed, table, variables, values)
    terms = random_terms(plan.formula.random, table, variables, values)
    encoder = Encoder(
        formula=plan.formula,
        variables=variables,
        fixed=fixed.columns,
        keep=fixed.keep,
        random=tuple(coding for coding, _ in terms),
        offsets=plan.offsets,
        needs_offset="offset" in arrays,
    )
    for notice in fixed.notices:
        warnings.warn(notice, NoticeWarning, stacklevel=2)
    return ModelFrame(
        y=numbers.y,
        X=fixed.X,
        X_names=fixed.names,
        terms=tuple(t for _, t in terms),
        weights=numbers.weights,
        offset=numbers.offset,
        n_rows=len(table.frame),
        n_dropped=len(table.frame) - table.n,
        dropped_by=dropped_by,
        kept=table.rows,
        row_index=table.row_index,
        response_name=plan.formula.response,
        encoder=encoder,
        notices=fixed.notices,
        dropped_columns=fixed.dropped,
        one_row_per_level=tuple(t.group_name for _, t in terms if t.one_row_per_effect),
        is_cbind=numbers.trials is not None,
    )


# -- what to read ----------------------------------------------------------------------


class _Plan(NamedTuple):
    formula: ParsedFormula
    fixed: Side
    variables: list[str]  # of the fixed part and the random terms, each once
    offsets: tuple[str, ...]

    @property
    def expressions(self) -> list[str]:
        """Everything to evaluate on complete rows."""
        factors = [f for term in self.formula.random for f in term.factors]
        return [self.formula.response, *self.variables, *factors, *self.offsets]


def _plan(formula: str, offset: Any) -> _Plan:
    parsed = parse(formula)
    sides = [expand(parsed.fixed), *(expand(t.effects) for t in parsed.random)]
    variables = list(dict.fromkeys(v for side in sides for v in side.variables))
    offsets = list(dict.fromkeys(parsed.offsets))  # R counts repeated ones once ...
    if isinstance(offset, str):
        offsets.append(offset)  # ... but adds the argument
    return _Plan(parsed, sides[0], variables, tuple(offsets))


def _open(
    data: Any, expressions: list[str], weights: Any, offset: Any
) -> tuple[Table, dict[str, np.ndarray]]:
    """Open the table, find its missing values, and check arrays given beside it."""
    names = dict.fromkeys(tables.column_names(data))
    what = "the data"
    columns = (c for e in expressions for c in used_columns(e, names, what))
    used = list(dict.fromkeys(columns))
    extra = used_columns(weights, names, what) if isinstance(weights, str) else []
    table = Table(tables.as_frame(data, {*used, *extra}), names, what)
    if table.n == 0:
        raise DataError("the data have no rows.")
    table.find_missing(used)
    arrays = {}
    for name, given in (("weights", weights), ("offset", offset)):
        if given is not None and not isinstance(given, str):
            arrays[name] = given_numbers(given, name, table.n)
    if "offset" in arrays and np.isnan(arrays["offset"]).any():
        table.masks["offset"] = np.isnan(arrays["offset"])
    return table, arrays


def _drop_missing(
    table: Table, arrays: dict[str, np.ndarray], missing: str
) -> dict[str, int]:
    """Keep the complete rows; count the missing values by column."""
    counts = {name: int(mask.sum()) for name, mask in table.masks.items()}
    if not counts:
        return counts
    shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
    if missing == "raise":
        raise DataError(f"missing values ({shown}) and missing='raise'.")
    rows = np.flatnonzero(~reduce(np.logical_or, table.masks.values()))
    if not len(rows):
        raise DataError(
            f"no row is left: each of the {table.n} has a missing value ({shown})."
        )
    table.keep(rows)
    for name in arrays:
        arrays[name] = arrays[name][rows]
    return counts


# -- the parts -------------------------------------------------------------------------


class _Numbers(NamedTuple):
    y: np.ndarray
    trials: np.ndarray | None
    weights: np.ndarray | None
    offset: np.ndarray | None


def _evaluate_numbers(
    plan: _Plan, table: Table, arrays: Mapping[str, np.ndarray], weights: Any
) -> _Numbers:
    name = plan.formula.response
    y, trials = response_and_trials(table.evaluate(name))
    check_response(y, trials, name, table.rows)
    prior = prior_weights(table, arrays, weights, trials)
    return _Numbers(y, trials, prior, total_offset(table, arrays, plan.offsets))


def _learn(
    names: list[str], table: Table, contrasts: Mapping[str, str]
) -> tuple[dict[str, Variable], dict[str, np.ndarray]]:
    """Variables and their values, by expression."""
    learned = {e: learn(e, table, contrasts) for e in names}
    factors = [e for e, (variable, _) in learned.items() if variable.is_factor]
    for name in contrasts:
        if name not in factors and f"`{name}`" not in factors:
            choices = tables.suggest(str(name), factors, "Factors")
            raise DataError(
                f"contrasts: {name!r} is no factor of the formula. {choices}"
            )
    variables = {e: variable for e, (variable, _) in learned.items()}
    return variables, {e: values for e, (_, values) in learned.items()}


class _Fixed(NamedTuple):
    columns: ModelColumns  # collinear ones included
    keep: np.ndarray  # positions of the columns of X among them
    X: np.ndarray
    names: list[str]
    dropped: list[str]
    notices: list[str]


def _fixed_part(
    side: Side,
    table: Table,
    variables: Mapping[str, Variable],
    values: Mapping[str, np.ndarray],
) -> _Fixed:
    """X without collinear columns."""
    columns = model_columns(side, variables)
    p = len(columns.names)
    if p > table.n:
        raise DataError(
            f"the fixed effects have {p} columns and the data {table.n} rows. Leave "
            "terms out, or make a factor with many levels a grouping factor."
        )
    X = columns.matrix(variables, values, table.n)
    mask = independent(X, columns.names)
    names = [name for name, k in zip(columns.names, mask) if k]
    dropped = [name for name, k in zip(columns.names, mask) if not k]
    notices = []
    if dropped:
        notices.append(describe_dropped(X, mask, columns.names))
        X = np.ascontiguousarray(X[:, mask])
    return _Fixed(columns, np.flatnonzero(mask), X, names, dropped, notices)
