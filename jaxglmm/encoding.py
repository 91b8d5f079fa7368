"""Formula and data to arrays: y, X, one (z, group) per random term, and their names.

    eta = offset + X beta + sum_t z_t . b_t[group_t]

Rows with a missing value in any column used are left out first. Then each part is made
by a module of its own: the response, weights and offset (:mod:`jaxglmm.response`), the
variables and their columns (:mod:`jaxglmm.columns`), the random terms
(:mod:`jaxglmm.terms`). What new data need is kept (:mod:`jaxglmm.newdata`).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.algebra import Side, expand
from jaxglmm.collinear import Estimable, describe_dropped, estimable, independent
from jaxglmm.columns import ModelColumns, Variable, learn, model_columns
from jaxglmm.contrasts import check_contrasts
from jaxglmm.errors import DataError, NoticeWarning
from jaxglmm.evaluate import Table, used_columns
from jaxglmm.expressions import canonical, quote
from jaxglmm.formula import ParsedFormula, parse, parse_predictor
from jaxglmm.functions import Function, check_functions
from jaxglmm.newdata import Encoder
from jaxglmm.response import (
    check_response,
    given_numbers,
    in_order_of,
    prior_weights,
    response_and_trials,
    response_codes,
    total_offset,
)
from jaxglmm.terms import TermArrays, random_terms

__all__ = ["ModelFrame", "PredictorFrame", "model_frame"]


@dataclass(frozen=True, eq=False)
class PredictorFrame:
    """Arrays and names of a further linear predictor; see :class:`ModelFrame`.

    ``name`` is the argument that its formula came in.
    """

    name: str
    X: np.ndarray
    X_names: list[str]
    terms: tuple[TermArrays, ...]
    offset: np.ndarray | None
    encoder: Encoder


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
    response_levels : pandas.Index or None
        Levels of a factor as response that occur, where asked for as codes.
    others : tuple of PredictorFrame
        Further linear predictors, as of zero inflation or dispersion.
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
    response_levels: pd.Index | None = None
    others: tuple[PredictorFrame, ...] = ()

    @property
    def all_terms(self) -> tuple[TermArrays, ...]:
        """Random terms of every linear predictor, in the order of theta."""
        return (*self.terms, *(t for p in self.others for t in p.terms))

    def own_names(self, family: Any) -> list[str]:
        """Names of the family's own parameters; a threshold by the levels it parts."""
        if family.takes_codes == "ordered" and self.response_levels is not None:
            pairs = pairwise(tables.labels(self.response_levels))
            return [f"{low}|{high}" for low, high in pairs]
        return list(family.own_names)

    def group_labels(self, *, every: bool = False) -> list[str]:
        """Name of every term's group; a repeated one gets .1, .2, as in lme4.

        ``every``: also those of further linear predictors, marked with their name.
        """
        seen: dict[str, int] = {}
        out = []
        for t in self.terms:
            count = seen.get(t.group_name, 0)
            out.append(f"{t.group_name}.{count}" if count else t.group_name)
            seen[t.group_name] = count + 1
        if every:
            out += [f"{p.name}: {t.group_name}" for p in self.others for t in p.terms]
        return out


def model_frame(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    missing: str = "drop",
    codes: str | None = None,
    others: Mapping[str, str] | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
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
    codes : {"levels", "ordered"} or None
        Whether a factor may be the response, as codes 0, 1, ... of its levels, and
        whether their order must be known.
    others : dict of str to str, optional
        Formulas of further linear predictors by name, ``{"zi": "~ x + (1 | g)"}``.
    functions : dict of callables, optional
        The caller's own functions, by the name that formulas call them. They get
        columns of numbers as float64 arrays, others as arrays of truth values or as
        Series, and give a value or several for every row.

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
    contrasts = {str(name): kind for name, kind in (contrasts or {}).items()}
    own = check_functions(functions)
    if missing not in ("drop", "raise"):
        raise DataError(f"missing={missing!r} is unknown. Choose 'drop' or 'raise'.")
    check_contrasts(contrasts)
    names = tables.by_text(tables.column_names(data))
    weights, offset = (_expression(v, names) for v in (weights, offset))
    weights = in_order_of(weights, data, "weights")
    offset = in_order_of(offset, data, "offset")
    plan = _plan(formula, offset, others or {})
    table, arrays = _open(data, names, own, plan.expressions, weights, offset)
    dropped_by = _drop_missing(table, arrays, missing)
    numbers = _evaluate_numbers(plan, table, arrays, weights, codes)
    variables, values = _learn(plan.variables, table, contrasts)
    learned = _Learned(table, variables, values)
    fixed, terms, encoder = _encode(plan.main, learned, "offset" in arrays)
    encoder = dataclasses.replace(encoder, response_levels=numbers.levels)
    frames, notices = [], [*numbers.notices, *fixed.notices]
    for name, part in plan.others.items():
        more, its_terms, its_encoder = _encode(part, learned, False)
        notices += [f"{name}: {notice}" for notice in more.notices]
        its_offset = total_offset(table, {}, part.offsets)
        frames.append(
            PredictorFrame(name, more.X, more.names, its_terms, its_offset, its_encoder)
        )
    return ModelFrame(
        y=numbers.y,
        X=fixed.X,
        X_names=fixed.names,
        terms=terms,
        weights=numbers.weights,
        offset=numbers.offset,
        n_rows=len(table.frame),
        n_dropped=len(table.frame) - table.n,
        dropped_by=dropped_by,
        kept=table.rows,
        row_index=table.row_index,
        response_name=plan.main.formula.response,
        encoder=encoder,
        notices=notices,
        dropped_columns=fixed.dropped,
        one_row_per_level=tuple(t.group_name for t in terms if t.one_row_per_effect),
        is_cbind=numbers.trials is not None,
        response_levels=numbers.levels,
        others=tuple(frames),
    )


# -- what to read ----------------------------------------------------------------------


def _expression(given: Any, names: Mapping[str, Any]) -> Any:
    """Spell a string given; one that is a column's name means that column."""
    if not isinstance(given, str):
        return given
    return quote(given) if given in names else canonical(given)


class _Part(NamedTuple):
    """One linear predictor."""

    formula: ParsedFormula
    fixed: Side
    offsets: tuple[str, ...]

    @property
    def variables(self) -> list[str]:
        """Variables of the fixed part and the random terms."""
        sides = [self.fixed, *(expand(t.effects) for t in self.formula.random)]
        return [v for side in sides for v in side.variables]


class _Plan(NamedTuple):
    main: _Part
    others: dict[str, _Part]

    @property
    def parts(self) -> list[_Part]:
        """Every linear predictor."""
        return [self.main, *self.others.values()]

    @property
    def variables(self) -> list[str]:
        """Variables of every part, each once."""
        return list(dict.fromkeys(v for part in self.parts for v in part.variables))

    @property
    def expressions(self) -> list[str]:
        """Everything to evaluate on complete rows."""
        terms = [term for part in self.parts for term in part.formula.random]
        factors = [f for term in terms for f in term.factors]
        offsets = [e for part in self.parts for e in part.offsets]
        return [self.main.formula.response, *self.variables, *factors, *offsets]


def _plan(formula: str, offset: Any, others: Mapping[str, str]) -> _Plan:
    main = _part(parse(formula))
    if isinstance(offset, str):  # adds to those in the formula
        main = main._replace(offsets=(*main.offsets, offset))
    parts = {name: _part(parse_predictor(f, name)) for name, f in others.items()}
    return _Plan(main, parts)


def _part(parsed: ParsedFormula) -> _Part:
    # R counts repeated offsets once
    return _Part(parsed, expand(parsed.fixed), tuple(dict.fromkeys(parsed.offsets)))


def _open(
    data: Any,
    names: Mapping[str, Any],
    functions: Mapping[str, Function],
    expressions: list[str],
    weights: Any,
    offset: Any,
) -> tuple[Table, dict[str, np.ndarray]]:
    """Open the table, find its missing values, and check arrays given beside it."""
    what = "the data"
    expressions = [*expressions, weights] if isinstance(weights, str) else expressions
    columns = (c for e in expressions for c in used_columns(e, names, what, functions))
    used = list(dict.fromkeys(columns))
    frame = tables.as_frame(data, {names[c] for c in used})
    table = Table(frame, names, what, functions)
    if table.n == 0:
        raise DataError("the data have no rows.")
    table.find_missing(used)
    arrays = {}
    for name, given in (("weights", weights), ("offset", offset)):
        if given is not None and not isinstance(given, str):
            arrays[name] = given_numbers(given, name, table.n)
            if np.isnan(arrays[name]).any():
                table.masks[name] = np.isnan(arrays[name])
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
    levels: pd.Index | None
    weights: np.ndarray | None
    offset: np.ndarray | None
    notices: list[str]


def _evaluate_numbers(
    plan: _Plan,
    table: Table,
    arrays: Mapping[str, np.ndarray],
    weights: Any,
    codes: str | None,
) -> _Numbers:
    name = plan.main.formula.response
    found = table.evaluate(name)
    found, levels, notices = response_codes(found, codes, table.rows)
    for notice in notices:
        warnings.warn(notice, NoticeWarning, stacklevel=3)
    y, trials = response_and_trials(found)
    check_response(y, trials, name, table.rows)
    prior = prior_weights(table, arrays, weights, trials)
    offset = total_offset(table, arrays, plan.main.offsets)
    return _Numbers(y, trials, levels, prior, offset, notices)


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


class _Learned(NamedTuple):
    """The complete rows, and the variables with their values, by expression."""

    table: Table
    variables: dict[str, Variable]
    values: dict[str, np.ndarray]


def _encode(
    part: _Part, learned: _Learned, needs_offset: bool
) -> tuple[_Fixed, tuple[TermArrays, ...], Encoder]:
    """X, the random terms and the encoder of one linear predictor."""
    table, variables, values = learned
    fixed = _fixed_part(part.fixed, table, variables, values)
    terms = random_terms(part.formula.random, table, variables, values)
    encoder = Encoder(
        formula=part.formula,
        variables=variables,
        fixed=fixed.columns,
        keep=fixed.keep,
        random=tuple(coding for coding, _ in terms),
        offsets=part.offsets,
        needs_offset=needs_offset,
        functions=table.functions,
        states=table.states,
        estimable=fixed.estimable,
    )
    for notice in fixed.notices:
        warnings.warn(notice, NoticeWarning, stacklevel=3)
    return fixed, tuple(t for _, t in terms), encoder


class _Fixed(NamedTuple):
    columns: ModelColumns  # collinear ones included
    keep: np.ndarray  # positions of the columns of X among them
    X: np.ndarray
    names: list[str]
    dropped: list[str]
    notices: list[str]
    estimable: Estimable | None


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
    notices, known = [], None
    if dropped:
        notices.append(describe_dropped(X, mask, columns.names))
        known = estimable(X, mask)
        X = np.ascontiguousarray(X[:, mask])
    return _Fixed(columns, np.flatnonzero(mask), X, names, dropped, notices, known)
