"""New data in the coding of a fitted model: same columns, same level codes.

What the training data taught (factor levels, contrasts, knots, means and scales, which
columns to leave out, levels of the grouping factors) is applied as it stands. Rows are
never dropped: a missing covariate gives NaN, a missing or unseen group the code -1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.collinear import Estimable
from jaxglmm.columns import ModelColumns, Variable, recall
from jaxglmm.errors import DataError
from jaxglmm.evaluate import Table, used_columns
from jaxglmm.formula import ParsedFormula
from jaxglmm.functions import Function
from jaxglmm.grouping import group_values
from jaxglmm.response import (
    as_numbers,
    given_numbers,
    recall_codes,
    response_and_trials,
)
from jaxglmm.terms import TermCoding
from jaxglmm.values import Evaluated

__all__ = ["Encoder", "NewFrame", "NewTerm"]


@dataclass(frozen=True, eq=False)
class NewTerm:
    """A random-effects term in new data.

    Attributes
    ----------
    z : (n, k) array
        NaN where a covariate is missing.
    group : (n,) array of int32
        Codes of the levels fitted; -1 where the level is missing or unseen.
    unseen : tuple of str
        Labels of the unseen levels.
    group_name : str
    which : (n,) array of int32
        Position in ``unseen``; -1 where the level is known or missing.
    """

    z: np.ndarray
    group: np.ndarray
    unseen: tuple[str, ...]
    group_name: str
    which: np.ndarray


@dataclass(frozen=True, eq=False)
class NewFrame:
    """Arrays made from new data; rows are never dropped.

    Attributes
    ----------
    X : (n, p) array
        The columns of the model; NaN rows where a covariate is missing.
    estimable : (n,) array of bool, or None for all
        Rows whose linear predictor the data of the fit determine.
    offset : (n,) array or None
    terms : tuple of NewTerm
        In the order of the model's terms.
    y : (n,) array or None
        The response, where it was asked for.
    trials : (n,) array or None
        Numbers of trials of a ``cbind`` response.
    row_index : pandas.Index
    """

    X: np.ndarray
    estimable: np.ndarray | None
    offset: np.ndarray | None
    terms: tuple[NewTerm, ...]
    y: np.ndarray | None
    trials: np.ndarray | None
    row_index: pd.Index


@dataclass(frozen=True, eq=False)
class Encoder:
    """Makes the arrays of a fitted model from new data.

    Attributes
    ----------
    formula : ParsedFormula
    variables : dict of Variable
        By expression.
    fixed : ModelColumns
        All columns of the fixed part, collinear ones included.
    keep : (p,) array of int
        Positions of the columns of X that are not collinear.
    random : tuple of TermCoding
    offsets : tuple of str
        Expressions of offsets.
    needs_offset : bool
        Whether the model was also given an offset as an array.
    functions : dict of Function
        The caller's own, by name.
    states : dict
        What functions learned from the training rows, by expression.
    estimable : Estimable, optional
        Which rows the data of the fit determine, where columns were left out.
    response_levels : pandas.Index or None
        Of a factor as response, whose codes are y.
    """

    formula: ParsedFormula
    variables: dict[str, Variable]
    fixed: ModelColumns
    keep: np.ndarray
    random: tuple[TermCoding, ...]
    offsets: tuple[str, ...]
    needs_offset: bool = False
    functions: Mapping[str, Function] = field(default_factory=dict)
    states: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    estimable: Estimable | None = None
    response_levels: pd.Index | None = None

    def transform(
        self,
        newdata: Any,
        *,
        response: bool = False,
        random: bool = True,
        offset: Any = None,
    ) -> NewFrame:
        """Encode new data with what the training data taught.

        Parameters
        ----------
        newdata : table
            Any table that :func:`jaxglmm.encoding.model_frame` takes.
        response : bool
            Also evaluate the response.
        random : bool
            Also encode the random terms; without them their columns may be absent.
        offset : (n,) array, optional
            Needed where the model was given an offset as an array.

        Returns
        -------
        NewFrame

        Raises
        ------
        DataError
            If a column is missing or a fixed factor has a level that was not fitted.
        """
        terms = self.random if random else ()
        needed = self._names(terms)
        table = self._open(newdata, needed, terms, response)
        values = {e: recall(self.variables[e], table) for e in needed}
        X = self.fixed.matrix(self.variables, values, table.n)
        known = None if self.estimable is None else self.estimable.rows(X)
        new_terms = tuple(self._term(t, table, values) for t in terms)
        y, trials = self._response(table) if response else (None, None)
        return NewFrame(
            X=X[:, self.keep],
            estimable=known,
            offset=self._offset(table, offset),
            terms=new_terms,
            y=y,
            trials=trials,
            row_index=table.row_index,
        )

    def _names(self, terms: tuple[TermCoding, ...]) -> list[str]:
        """Variables of the fixed part and of these random terms."""
        sides = [self.fixed, *(t.columns for t in terms)]
        return list(dict.fromkeys(v for s in sides for t in s.terms for v, _ in t))

    def _open(
        self,
        newdata: Any,
        variables: list[str],
        terms: tuple[TermCoding, ...],
        response: bool,
    ) -> Table:
        factors = [f for t in terms for f in t.term.factors]
        own = [self.formula.response] if response else []
        names, what = tables.by_text(tables.column_names(newdata)), "newdata"
        expressions = [*variables, *factors, *self.offsets, *own]
        used = {
            c for e in expressions for c in used_columns(e, names, what, self.functions)
        }
        frame = tables.as_frame(newdata, {names[c] for c in used})
        table = Table(frame, names, what, self.functions, self.states)
        table.find_missing(used)
        return table

    def _term(
        self, coding: TermCoding, table: Table, values: Mapping[str, np.ndarray]
    ) -> NewTerm:
        term, columns, grouping = coding
        groups = [_spread_groups(table.evaluate(f), table.n) for f in term.factors]
        codes, unseen, which = grouping.match(groups)
        z = columns.matrix(self.variables, values, table.n)
        return NewTerm(z, codes, unseen, grouping.name, which)

    def _response(self, table: Table) -> tuple[np.ndarray, np.ndarray | None]:
        found = table.evaluate(self.formula.response)
        if self.response_levels is not None:
            return found.spread(recall_codes(found, self.response_levels)), None
        y, trials = response_and_trials(found)
        return found.spread(y), None if trials is None else found.spread(trials)

    def _offset(self, table: Table, given: Any) -> np.ndarray | None:
        if self.needs_offset and given is None:
            raise DataError(
                "the model was fitted with an offset given as an array, so new data "
                "need one too: pass offset=, or fit with offset='column'."
            )
        found = [table.evaluate(e) for e in self.offsets]
        parts = [f.spread(as_numbers(f)) for f in found]
        if given is not None:
            parts.append(given_numbers(given, "offset", table.n))
        return reduce(np.add, parts) if parts else None


def _spread_groups(found: Evaluated, n: int) -> Any:
    """Values of a grouping factor for all n rows, missing in the gaps."""
    values = group_values(found)
    if found.gaps is None:
        return values
    column = pd.Series(values)
    if column.dtype.kind in "iu":
        column = column.convert_dtypes()  # whose gaps leave the others as they are
    column.index = pd.Index(np.flatnonzero(~found.gaps))
    return column.reindex(range(n))
