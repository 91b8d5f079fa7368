"""Formula and data to arrays: y, X, one (z, group) per random term, and their names.

Every variable of the formula is evaluated once and shared by the fixed part and the
random terms. A numeric variable is one or more columns; a factor is codes and a coding
matrix C, so that its columns are C[codes]. A term is the row-wise product of its
variables, the first one varying fastest. A factor in a term is coded by contrasts where
what remains of the term without it is part of an earlier term, and by one dummy per
level otherwise; without an intercept the first factor gets dummies. These are R's
rules, and so are the names.

Rows with a missing value in any column used are left out before anything is evaluated.
Stateful expressions (poly, scale, center, bs, cr, cc) keep what they learned for new
data; they come from formulaic, as does their evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import pairwise, product
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from formulaic.transforms import TRANSFORMS
from formulaic.transforms.contrasts import Contrasts, SASContrasts, TreatmentContrasts
from formulaic.transforms.contrasts import PolyContrasts as _PolyContrasts
from formulaic.utils.stateful_transforms import stateful_eval

from jaxglmm import data as tables
from jaxglmm.errors import DataError, FormulaError, NoticeWarning
from jaxglmm.formula import (
    DIAG,
    FULL,
    ParsedFormula,
    RandomTerm,
    Side,
    expand,
    parse,
    rewrite,
    variables,
)

__all__ = [
    "Encoder",
    "Grouping",
    "ModelFrame",
    "NewFrame",
    "NewTerm",
    "TermArrays",
    "model_frame",
]

INTERCEPT = "(Intercept)"
COLLINEAR = 1e-7  # R's tolerance: what is left of a column over the column
MAX_TEXT_LEVELS = 1000


# -- contrasts -------------------------------------------------------------------------


def _treatment(levels: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.eye(len(levels))[:, 1:], tuple(levels[1:])


def _sas(levels: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    return np.eye(len(levels))[:, :-1], tuple(levels[:-1])


def _numbered(matrix: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    return matrix, tuple(str(j + 1) for j in range(matrix.shape[1]))


def _sum(levels: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    n = len(levels)
    return _numbered(np.vstack([np.eye(n - 1), -np.ones((1, n - 1))]))


def _helmert(levels: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    n = len(levels)
    matrix = -np.triu(np.ones((n, n - 1)))
    matrix[np.arange(1, n), np.arange(n - 1)] = np.arange(1, n)
    return _numbered(matrix)


def _poly_names(n: int) -> tuple[str, ...]:
    return (".L", ".Q", ".C", *(f"^{j}" for j in range(4, n)))[: n - 1]


def _poly(levels: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Orthonormal polynomials in 1..n: Lanczos recurrence, orthogonalized twice."""
    n = len(levels)
    scores = np.arange(1.0, n + 1) - (n + 1) / 2
    basis = np.full((n, 1), 1 / np.sqrt(n))
    for _ in range(n - 1):
        column = scores * basis[:, -1]
        for _ in range(2):
            column = column - basis @ (basis.T @ column)
        basis = np.column_stack([basis, column / np.linalg.norm(column)])
    return basis[:, 1:], _poly_names(n)


_CONTRASTS: dict[str, Callable[[list[str]], tuple[np.ndarray, tuple[str, ...]]]] = {
    "treatment": _treatment,
    "sum": _sum,
    "helmert": _helmert,
    "poly": _poly,
    "SAS": _sas,
}


def _contrast_matrix(
    spec: Any, levels: list[str], name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Matrix (levels x columns) and column suffixes of a contrast specification."""
    if isinstance(spec, str):
        if spec.removeprefix("contr.") not in _CONTRASTS:
            choices = ", ".join(_CONTRASTS)
            raise DataError(
                f"{name}: unknown contrasts {spec!r}. Choose from: {choices}."
            )
        return _CONTRASTS[spec.removeprefix("contr.")](levels)
    if isinstance(spec, type) and issubclass(spec, Contrasts):
        spec = spec()
    if isinstance(spec, Contrasts):
        frame = pd.DataFrame(spec.get_coding_matrix(levels, reduced_rank=True))
        matrix = frame.to_numpy(dtype=np.float64)
        if isinstance(spec, _PolyContrasts):
            return matrix, _poly_names(len(levels))
        if isinstance(spec, TreatmentContrasts | SASContrasts):
            return matrix, tuple(map(str, frame.columns))
        return _numbered(matrix)
    if isinstance(spec, Mapping):
        matrix = np.column_stack([np.asarray(v, np.float64) for v in spec.values()])
        suffixes = tuple(map(str, spec))
    else:
        matrix, suffixes = _numbered(np.asarray(spec, np.float64))
    if matrix.shape[0] != len(levels):
        raise DataError(
            f"{name}: the contrasts have {matrix.shape[0]} rows, the factor "
            f"{len(levels)} levels ({', '.join(levels)}). Give one row per level."
        )
    return matrix, suffixes


# -- evaluation ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Marked:
    """Values that an expression declared a factor."""

    values: Any
    contrasts: Any = None
    levels: Any = None
    ordered: bool | None = None


@dataclass(frozen=True)
class _Pair:
    """Successes and failures of ``cbind(successes, failures)``."""

    successes: Any
    failures: Any


def _plain(values: Any) -> Any:
    """Unwrap formulaic's values, and make a Series plain as `tables.plain` does."""
    values = getattr(values, "__wrapped__", values)
    if isinstance(values, pd.Series | pd.Index | pd.Categorical):
        return tables.plain(pd.Series(values))
    return values


def _as_factor(values: Any, contrasts: Any = None, *, levels: Any = None) -> _Marked:
    return _Marked(_plain(values), contrasts, levels)


def _cbind(successes: Any, failures: Any) -> _Pair:
    return _Pair(_plain(successes), _plain(failures))


def _as_ordered(values: Any, *, levels: Any = None) -> _Marked:
    return _Marked(_plain(values), None, levels, True)


_KEPT = (
    "np log log10 log2 exp exp2 poly scale center standardize bs cr cc cs contr I "
    "Treatment Sum Helmert Poly Diff"
).split()
FUNCTIONS: dict[str, Any] = {
    **{name: TRANSFORMS[name] for name in _KEPT},
    **{
        name: getattr(np, name)
        for name in (
            "sqrt log1p expm1 abs sin cos tan tanh floor ceil sign where "
            "maximum minimum"
        ).split()
    },
    "C": _as_factor,
    "factor": _as_factor,
    "ordered": _as_ordered,
    "cbind": _cbind,
}
_BUILTIN_NAMES = frozenset({"True", "False", "None"})


def _column_of(expression: str) -> str | None:
    """Name the column an expression is; None where it has to be evaluated."""
    if expression.startswith("`") and expression.find("`", 1) == len(expression) - 1:
        return expression[1:-1]
    return expression if variables(expression) == {expression} else None


def _used(expression: str, names: Collection[Any], what: str) -> list[str]:
    """Columns that an expression needs.

    Raises
    ------
    DataError
        If one of its names is neither a column nor a function.
    """
    column = _column_of(expression)
    if column is not None and column in names:
        return [column]
    found = []
    for name in sorted(variables(expression)):
        root = name.split(".")[0]
        known = root in FUNCTIONS or root in _BUILTIN_NAMES
        if name in names or root in names:
            found.append(name if name in names else root)
        elif column is not None or not known:
            choices = tables.suggest(name, names)
            raise DataError(f"no column {name!r} in {what}. {choices}")
    return list(dict.fromkeys(found))


class _Table:
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

    def used(self, expression: str) -> list[str]:
        """Columns that an expression needs."""
        return _used(expression, self.names, self.what)

    def find_missing(self, columns: Iterable[str]) -> None:
        for name in columns:
            mask = tables.missing(self.series(name))
            if mask is not None:
                self.masks[name] = mask

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows only, none of which has a missing value."""
        self.rows, self.n, self.masks = rows, len(rows), {}

    def series(self, name: str) -> pd.Series:
        return cast(pd.Series, self.frame[name])

    def column(self, name: str) -> Any:
        if name not in self._columns:
            self._columns[name] = tables.plain(self.series(name), self.rows)
        return self._columns[name]

    def incomplete(self, expression: str) -> np.ndarray | None:
        """Mask of the rows where a column of the expression is missing."""
        masks = [self.masks[c] for c in self.used(expression) if c in self.masks]
        return reduce(np.logical_or, masks) if masks else None

    def evaluate(self, expression: str, state: dict[str, Any]) -> Any:
        """Raw values of an expression, on the rows where its columns are complete."""
        column = _column_of(expression)
        if column is not None and column in self.names:
            return self.column(column)
        used = self.used(expression)
        mask = self.incomplete(expression)
        env: dict[str, Any] = dict(FUNCTIONS)
        aliases = {name: f"_column_{i}_" for i, name in enumerate(used)}
        for name in used:
            values = self.column(name)
            values = values if mask is None else tables.take(values, ~mask)
            env[aliases[name]] = pd.Series(values, copy=False)

        def alias(name: str) -> str:
            root, dot, rest = name.partition(".")
            if name in aliases:
                return aliases[name]
            return aliases.get(root, root) + dot + rest

        code = rewrite(expression, alias)
        try:
            with np.errstate(all="ignore"):
                raw = stateful_eval(code, env, None, state, None)
        except (DataError, FormulaError):
            raise
        except NameError as error:
            name = getattr(error, "name", None) or str(error)
            choices = tables.suggest(name, FUNCTIONS, "Functions")
            raise FormulaError(
                f"cannot evaluate {expression}: unknown function {name!r}. {choices}"
            ) from None
        except Exception as error:
            kind = type(error).__name__
            raise DataError(f"cannot evaluate {expression}: {kind}: {error}") from error
        return _plain(raw) if isinstance(raw, pd.Series | pd.Index) else raw


class _Raw(NamedTuple):
    """What an expression gave: numbers with column suffixes, or values of a factor."""

    values: Any
    suffixes: tuple[str, ...] = ("",)
    factor: _Marked | None = None


def _classify(raw: Any, expression: str, n: int) -> _Raw:
    names: tuple[str, ...] | None = None
    if hasattr(raw, "__formulaic_metadata__"):
        names = raw.__formulaic_metadata__.column_names
        raw = _plain(raw)
    if isinstance(raw, _Marked):
        return _Raw(raw.values, factor=raw)
    if isinstance(raw, dict):
        raw = np.column_stack([np.asarray(v, np.float64) for v in raw.values()])
    if isinstance(raw, pd.DataFrame):
        names, raw = tuple(map(str, raw.columns)), raw.to_numpy()
    values = raw if hasattr(raw, "dtype") else np.asarray(raw)
    if values.ndim == 0:
        values = np.full(n, values)
    if len(values) != n:
        found = f"{len(values)} values for {n} rows"
        raise DataError(
            f"{expression} gives {found}. Use expressions that keep the rows."
        )
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return _numbers(values, names)
    if isinstance(values, np.ndarray) and values.dtype.kind == "b":
        return _Raw(values, factor=_Marked(values))
    if isinstance(values.dtype, pd.CategoricalDtype) or _is_text(values):
        return _Raw(values, factor=_Marked(values))
    raise DataError(
        f"{expression} is of type {values.dtype}, which is neither a number nor a "
        "factor. Convert it first, for instance a date to days since the first one."
    )


def _numbers(values: np.ndarray, names: tuple[str, ...] | None) -> _Raw:
    values = values.astype(np.float64, copy=False)
    if values.ndim == 1:
        return _Raw(values)
    if values.shape[1] == 1:
        return _Raw(values[:, 0])
    suffixes = names or tuple(str(j + 1) for j in range(values.shape[1]))
    return _Raw(values, tuple(map(str, suffixes)))


def _is_text(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "US"
    return bool(pd.api.types.is_string_dtype(values.dtype) or values.dtype == object)


def _check_finite(values: np.ndarray, name: str, rows: np.ndarray | None) -> None:
    with np.errstate(all="ignore"):
        if np.isfinite(values.sum()):
            return
    rowwise = values.reshape(len(values), -1)
    for test, what in ((np.isinf, "infinite"), (np.isnan, "NaN")):
        marked = np.asarray(test(rowwise).any(axis=1))
        if marked.any():
            advice = (
                "Correct or remove them." if what == "infinite" else "Check its domain."
            )
            where = tables.show_rows(marked, rows)
            raise DataError(f"{name} is {what} in {where}. {advice}")


# -- variables and designs -------------------------------------------------------------


@dataclass(frozen=True)
class _Variable:
    """What new data need to know of a variable of the formula."""

    name: str
    state: dict[str, Any]
    suffixes: tuple[str, ...]  # of numeric columns, or of the contrasts
    levels: pd.Index | None = None
    contrasts: np.ndarray | None = None

    @property
    def is_factor(self) -> bool:
        return self.levels is not None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return () if self.levels is None else tuple(tables.labels(self.levels))

    def names(self, dummies: bool) -> list[str]:
        """Column names, with one dummy per level or by contrasts."""
        suffixes = self.labels if self.is_factor and dummies else self.suffixes
        return [self.name + suffix for suffix in suffixes]

    def columns(self, values: np.ndarray, dummies: bool) -> np.ndarray:
        """Columns (n, m) from numbers or codes; code -1 gives NaN."""
        if not self.is_factor:
            return values.reshape(len(values), -1)
        matrix = np.eye(len(self.labels)) if dummies else self.contrasts
        assert matrix is not None
        gap = np.full((1, matrix.shape[1]), np.nan)
        return np.vstack([matrix, gap])[values]


def _learn(
    expression: str, table: _Table, contrasts: Mapping[str, str]
) -> tuple[_Variable, np.ndarray]:
    """Evaluate a variable on the training rows: what to remember, and its values."""
    state: dict[str, Any] = {}
    raw = _classify(table.evaluate(expression, state), expression, table.n)
    if raw.factor is None:
        _check_finite(raw.values, expression, table.rows)
        return _Variable(expression, state, raw.suffixes), raw.values
    values, spec = raw.values, raw.factor.contrasts
    if raw.factor.levels is not None:
        values = _set_levels(values, raw.factor.levels, expression)
    codes, levels = tables.factorize(values)
    ordered = raw.factor.ordered
    if ordered is None:
        ordered = bool(getattr(getattr(values, "dtype", None), "ordered", False))
    if spec is None:
        spec = contrasts.get(_column_of(expression) or expression)
    _check_levels(expression, levels, values, table.n)
    matrix, suffixes = _contrast_matrix(
        spec or ("poly" if ordered else "treatment"), tables.labels(levels), expression
    )
    return _Variable(expression, state, suffixes, levels, matrix), codes


def _set_levels(values: Any, levels: Iterable[Any], name: str) -> pd.Series:
    column = pd.Series(values)
    out = pd.Series(pd.Categorical(column, categories=list(levels)))
    lost = sorted({str(v) for v in column[out.isna().to_numpy()]})
    if lost:
        raise DataError(f"{name}: levels= lacks the value(s) {', '.join(lost[:5])}.")
    return out


def _check_levels(name: str, levels: pd.Index, values: Any, n: int) -> None:
    if len(levels) < 2:
        only = ", ".join(tables.labels(levels))
        raise DataError(
            f"factor {name!r} has 1 level ({only}) in the rows used; a fixed or random "
            "slope needs at least 2. Leave it out."
        )
    many = len(levels) > MAX_TEXT_LEVELS or (n > 50 and len(levels) > n / 2)
    if many and _is_text(values):
        raise DataError(
            f"text column {name!r} has {len(levels)} levels in {n} rows, which would "
            f"be as many columns. Use it as a grouping factor, (1 | {name}), or "
            "convert it to numbers."
        )


def _recall(variable: _Variable, table: _Table) -> np.ndarray:
    """Values of a variable in new data; NaN or code -1 where it is missing."""
    name = variable.name
    mask = table.incomplete(name)
    n = table.n
    raw = table.evaluate(name, variable.state)
    whole = mask is None or _column_of(name) is not None
    found = _classify(raw, name, n if whole or mask is None else int((~mask).sum()))
    if variable.levels is not None:
        out = _recall_codes(variable, found, mask if whole else None)
        fill: Any = -1
    else:
        if found.factor is not None:
            raise DataError(
                f"{name} was numeric in the data fitted and is not in {table.what}. "
                "Convert it to numbers."
            )
        out, fill = found.values, np.nan
    if whole or mask is None:
        return out
    full = np.full((n, *out.shape[1:]), fill, out.dtype)
    full[~mask] = out
    return full


def _recall_codes(
    variable: _Variable, found: _Raw, mask: np.ndarray | None
) -> np.ndarray:
    assert variable.levels is not None
    codes, unseen = tables.match(found.values, variable.levels)
    if unseen:
        raise DataError(
            f"factor {variable.name!r} has unseen level(s) {', '.join(unseen[:5])}; "
            f"the data fitted had {', '.join(variable.labels[:20])}. There is no "
            "coefficient for a new level: remove these rows or recode them."
        )
    return codes


Layout = tuple[tuple[tuple[str, bool], ...], ...]


def _layout(side: Side, variables_: Mapping[str, _Variable]) -> Layout:
    """Terms as (variable, one dummy per level?), by R's rule for contrasts."""
    out: list[list[tuple[str, bool]]] = []
    for i, term in enumerate(side.terms):
        coded = []
        for name in term:
            rest = set(term) - {name}
            margin = not rest or any(rest <= set(t) for t in side.terms[:i])
            coded.append((name, variables_[name].is_factor and not margin))
        out.append(coded)
    if not side.intercept:
        for coded in out:
            found = [j for j, (v, _) in enumerate(coded) if variables_[v].is_factor]
            if found:
                coded[found[0]] = (coded[found[0]][0], True)
                break
    return tuple(map(tuple, out))


@dataclass(frozen=True)
class _Design:
    """One side of the formula as columns: which, and what they are called."""

    intercept: bool
    layout: Layout
    names: list[str]

    def matrix(
        self,
        variables_: Mapping[str, _Variable],
        values: Mapping[str, np.ndarray],
        n: int,
    ) -> np.ndarray:
        """Fill the columns, (n, p), by rows in memory."""
        X = np.empty((n, len(self.names)))
        if self.intercept:
            X[:, 0] = 1.0
        j = int(self.intercept)
        for term in self.layout:
            blocks = [variables_[v].columns(values[v], dummies) for v, dummies in term]
            block = blocks[0]
            for right in blocks[1:]:
                block = (right[:, :, None] * block[:, None, :]).reshape(n, -1)
            X[:, j : j + block.shape[1]] = block
            j += block.shape[1]
        return X


def _design(side: Side, variables_: Mapping[str, _Variable]) -> _Design:
    layout = _layout(side, variables_)
    names = [INTERCEPT] * side.intercept
    for term in layout:
        columns = [variables_[v].names(dummies) for v, dummies in reversed(term)]
        names += [":".join(reversed(c)) for c in product(*columns)]
    return _Design(side.intercept, layout, names)


# -- grouping factors ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Grouping:
    """Levels of a grouping factor, or of an interaction of several.

    An interaction has only the combinations that occur, the first component varying
    slowest. `stages` holds for each further component the sorted keys
    (code so far) * (its number of levels) + (its code).

    Attributes
    ----------
    name : str
        ``"g"`` or ``"a:b"``.
    components : tuple of pandas.Index
        Levels of each component.
    n_levels : int
    labels : pandas.Index
        Labels of the levels, ``"a1:b2"`` for interactions; made when first asked for.
    """

    name: str
    components: tuple[pd.Index, ...]
    stages: tuple[np.ndarray, ...]
    n_levels: int

    @cached_property
    def labels(self) -> pd.Index:
        """Labels of the levels."""
        out = tables.labels(self.components[0])
        for levels, keys in zip(self.components[1:], self.stages):
            right = tables.labels(levels)
            left, codes = np.divmod(keys, len(levels))
            out = [f"{out[i]}:{right[j]}" for i, j in zip(left, codes)]
        return pd.Index(out, name=self.name)

    def match(self, values: list[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Codes of new values, -1 where missing or unseen, and the unseen labels."""
        pairs = [tables.match(v, levels) for v, levels in zip(values, self.components)]
        codes = pairs[0][0]
        for (right, _), keys, levels in zip(
            pairs[1:], self.stages, self.components[1:]
        ):
            key = codes.astype(np.int64) * len(levels) + right
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            known = (codes >= 0) & (right >= 0) & (keys[place] == key)
            codes = np.where(known, place, -1).astype(np.int32)
        return codes, self._unseen(values, codes)

    def _unseen(self, values: list[Any], codes: np.ndarray) -> tuple[str, ...]:
        rows = np.flatnonzero(codes < 0)
        if not len(rows):
            return ()
        columns = [
            pd.Series(tables.take(v, rows)).reset_index(drop=True) for v in values
        ]
        frame = pd.concat(columns, axis=1).dropna().drop_duplicates()
        parts = [
            tables.labels(pd.Index(frame.iloc[:, j])) for j in range(frame.shape[1])
        ]
        return tuple(dict.fromkeys(":".join(p) for p in zip(*parts)))


class _Groups:
    """Codes of the grouping factors, each component and interaction made once."""

    def __init__(self, table: _Table):
        self.table = table
        self.parts: dict[str, tuple[np.ndarray, pd.Index]] = {}
        self.done: dict[str, tuple[np.ndarray, Grouping]] = {}

    def part(self, expression: str) -> tuple[np.ndarray, pd.Index]:
        if expression not in self.parts:
            raw = self.table.evaluate(expression, {})
            values = _group_values(raw, expression, self.table.n)
            try:
                self.parts[expression] = tables.factorize(values)
            except DataError as error:
                raise DataError(f"grouping factor {expression!r}: {error}") from None
        return self.parts[expression]

    def group(self, term: RandomTerm) -> tuple[np.ndarray, Grouping]:
        if term.group not in self.done:
            parts = [self.part(f) for f in term.factors]
            codes, n_levels = parts[0][0], len(parts[0][1])
            stages = []
            for right, levels in parts[1:]:
                keys = codes.astype(np.int64) * len(levels) + right
                codes, present = tables.compress(keys)
                stages.append(present)
                n_levels = len(present)
            components = tuple(levels for _, levels in parts)
            grouping = Grouping(term.group, components, tuple(stages), n_levels)
            self.done[term.group] = codes, grouping
        return self.done[term.group]


def _group_values(raw: Any, name: str, n: int) -> Any:
    """One-dimensional values of any type from what a grouping expression gave."""
    values = getattr(raw, "__wrapped__", raw)
    if isinstance(raw, _Marked):
        values = raw.values
        if raw.levels is not None:
            values = _set_levels(values, raw.levels, name)
    if not hasattr(values, "dtype"):
        values = np.asarray(values)
    if values.ndim != 1 or len(values) != n:
        raise DataError(
            f"grouping factor {name!r} has shape {values.shape}, not ({n},)."
        )
    if (
        isinstance(values, np.ndarray)
        and values.dtype.kind == "f"
        and np.isinf(values).any()
    ):
        raise DataError(
            f"grouping factor {name!r} holds infinite values. Correct them."
        )
    return values


# -- results ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TermArrays:
    """One random-effects term as arrays.

    Attributes
    ----------
    z : (n, k) array
        Columns of the effects.
    z_names : list of str
    group : (n,) array of int32
        Level codes 0..n_levels-1; terms with the same grouping share the array.
    grouping : Grouping
    structure : str
        ``"full"`` or the name in ``name(effects | group)``.
    text : str
        The term as written.
    """

    z: np.ndarray
    z_names: list[str]
    group: np.ndarray
    grouping: Grouping
    structure: str
    text: str

    @property
    def group_name(self) -> str:
        """Name of the grouping factor, ``"a:b"`` for an interaction."""
        return self.grouping.name

    @property
    def n_levels(self) -> int:
        """Number of levels that occur."""
        return self.grouping.n_levels

    @property
    def levels(self) -> pd.Index:
        """Labels of the levels."""
        return self.grouping.labels


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
        What was changed on the user's behalf; each was also issued as NoticeWarning.
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
    """

    z: np.ndarray
    group: np.ndarray
    unseen: tuple[str, ...]
    group_name: str


@dataclass(frozen=True, eq=False)
class NewFrame:
    """Arrays made from new data; rows are never dropped.

    Attributes
    ----------
    X : (n, p) array
        The columns of the model; NaN rows where a covariate is missing.
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
    keep : (p,) array of int
        Positions of the columns of X that are not collinear.
    """

    formula: ParsedFormula
    variables: dict[str, _Variable]
    fixed: _Design
    keep: np.ndarray
    random: tuple[tuple[RandomTerm, _Design, Grouping], ...]
    offsets: tuple[str, ...]
    needs_offset: bool = False

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
            Any table that :func:`model_frame` takes.
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
        names = tables.column_names(newdata)
        needed = self._expressions(response, random)
        used = {c for e in needed for c in _used(e, names, "newdata")}
        table = _Table(tables.as_frame(newdata, used), names, "newdata")
        table.find_missing(used)
        values = {e: _recall(self.variables[e], table) for e in self._names(random)}
        X = self.fixed.matrix(self.variables, values, table.n)[:, self.keep]
        terms = [self._term(t, table, values) for t in self.random] if random else []
        y, trials = (
            _new_response(self.formula.response, table) if response else (None,) * 2
        )
        return NewFrame(
            X=X,
            offset=self._offset(table, offset),
            terms=tuple(terms),
            y=y,
            trials=trials,
            row_index=table.frame.index,
        )

    def _names(self, random: bool) -> list[str]:
        designs = [self.fixed, *(d for _, d, _ in self.random if random)]
        return list(dict.fromkeys(v for d in designs for t in d.layout for v, _ in t))

    def _expressions(self, response: bool, random: bool) -> list[str]:
        factors = [f for term, _, _ in self.random if random for f in term.factors]
        own = [self.formula.response] if response else []
        return [*self._names(random), *factors, *self.offsets, *own]

    def _term(
        self,
        part: tuple[RandomTerm, _Design, Grouping],
        table: _Table,
        values: Mapping[str, np.ndarray],
    ) -> NewTerm:
        term, design, grouping = part
        columns = [_new_group(f, table) for f in term.factors]
        codes, unseen = grouping.match(columns)
        z = design.matrix(self.variables, values, table.n)
        return NewTerm(z, codes, unseen, grouping.name)

    def _offset(self, table: _Table, given: Any) -> np.ndarray | None:
        if self.needs_offset and given is None:
            raise DataError(
                "the model was fitted with an offset given as an array, so new data "
                "need one too: pass offset=, or fit with offset='column'."
            )
        parts = [_new_numbers(e, table) for e in self.offsets]
        if given is not None:
            parts.append(_as_array(given, "offset", table.n))
        return reduce(np.add, parts) if parts else None


def _scatter(values: np.ndarray, mask: np.ndarray | None, n: int) -> np.ndarray:
    if mask is None or len(values) == n:
        return values
    full = np.full(n, np.nan)
    full[~mask] = values
    return full


def _new_numbers(expression: str, table: _Table) -> np.ndarray:
    mask = table.incomplete(expression)
    raw = table.evaluate(expression, {})
    whole = mask is None or _column_of(expression) is not None
    n = table.n if whole or mask is None else int((~mask).sum())
    return _scatter(_vector(raw, expression, n), mask, table.n)


def _new_group(expression: str, table: _Table) -> Any:
    mask = table.incomplete(expression)
    raw = table.evaluate(expression, {})
    if mask is None or _column_of(expression) is not None:
        return _group_values(raw, expression, table.n)
    values = pd.Series(_group_values(raw, expression, int((~mask).sum())))
    values.index = pd.Index(np.flatnonzero(~mask))
    return values.reindex(range(table.n))


def _new_response(
    expression: str, table: _Table
) -> tuple[np.ndarray, np.ndarray | None]:
    mask = table.incomplete(expression)
    raw = table.evaluate(expression, {})
    whole = mask is None or _column_of(expression) is not None
    n = table.n if whole or mask is None else int((~mask).sum())
    y, trials = _response(raw, expression, n)
    y = _scatter(y, mask, table.n)
    return y, None if trials is None else _scatter(trials, mask, table.n)


# -- response, weights, offset ---------------------------------------------------------


def _vector(raw: Any, name: str, n: int) -> np.ndarray:
    """Numbers (n,) from an expression; booleans count as 0 and 1."""
    found = _classify(raw, name, n)
    if found.factor is not None:
        values = found.values
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
    if found.values.ndim != 1:
        raise DataError(f"{name} has {found.values.shape[1]} columns; one is needed.")
    return found.values


def _response(raw: Any, name: str, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    if not isinstance(raw, _Pair):
        return _vector(raw, name, n), None
    successes = _vector(raw.successes, name, n)
    trials = successes + _vector(raw.failures, name, n)
    with np.errstate(invalid="ignore"):
        return successes / trials, trials


def _check_response(
    y: np.ndarray, trials: np.ndarray | None, name: str, rows: np.ndarray | None
) -> None:
    if trials is not None:
        bad = ~(trials > 0)
        if bad.any():
            where = tables.show_rows(bad, rows)
            raise DataError(f"{name} has no trials in {where}. Remove these rows.")
        bad = (y < 0) | (y > 1)
        if bad.any():
            where = tables.show_rows(bad, rows)
            raise DataError(f"{name} has a negative count in {where}. Correct it.")
    _check_finite(y, f"response {name}", rows)
    if y.min() == y.max():
        raise DataError(
            f"response {name} is constant: all {len(y)} values are {y[0]:.6g}. There "
            "is nothing to explain."
        )


def _as_array(values: Any, name: str, n: int) -> np.ndarray:
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


def _check_weights(weights: np.ndarray, name: str, rows: np.ndarray | None) -> None:
    if len(weights) and weights.min() > 0 and np.isfinite(weights.sum()):
        return
    for bad, what in (
        (np.isnan(weights), "missing"),
        (np.isinf(weights), "infinite"),
        (weights < 0, "negative"),
        (weights == 0, "zero"),
    ):
        if bad.any():
            raise DataError(
                f"{name}: {what} in {tables.show_rows(bad, rows)}. Weights must be "
                "positive numbers; remove these rows from the data."
            )


# -- collinear columns -----------------------------------------------------------------


def _independent(X: np.ndarray, names: list[str]) -> np.ndarray:
    """Mask of the columns that are not combinations of earlier ones.

    Columns are scaled to length 1. A Cholesky factor of the Gram matrix clears the
    usual case in one pass; squaring costs half the digits, so anything doubtful (a
    pivot below 1e-8) is decided on the triangle of a QR factorization.
    """
    p = X.shape[1]
    if p == 0:
        return np.ones(0, bool)
    with np.errstate(all="ignore"):
        gram = X.T @ X
        length = np.sqrt(np.diagonal(gram))
        if length.min() > 1e-140 and np.isfinite(length).all():
            try:
                L = np.linalg.cholesky(gram / np.outer(length, length))
            except np.linalg.LinAlgError:
                pass
            else:
                if np.diagonal(L).min() > 1e-4:
                    return np.ones(p, bool)
    top = np.abs(X).max(axis=0)
    if not np.isfinite(top).all():
        j = int(np.argmax(~np.isfinite(top)))
        raise DataError(
            f"column {names[j]} of the fixed effects overflows. Rescale it."
        )
    scaled = X / np.where(top > 0, top, 1.0)
    return _independent_triangle(np.asarray(np.linalg.qr(scaled, mode="r")))


def _independent_triangle(R: np.ndarray) -> np.ndarray:
    """Gram-Schmidt over the columns of R in order, each projected twice."""
    p = R.shape[1]
    basis = np.empty((R.shape[0], 0))
    keep = np.zeros(p, bool)
    for j in range(p):
        length = np.linalg.norm(R[:, j])
        rest = R[:, j] / length if length > 0 else R[:, j]
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        left = np.linalg.norm(rest)
        if length > 0 and left > COLLINEAR:
            keep[j] = True
            basis = np.column_stack([basis, rest / left])
    return keep


def _describe_dropped(X: np.ndarray, keep: np.ndarray, names: list[str]) -> str:
    dropped = [names[j] for j in np.flatnonzero(~keep)]
    kept = np.flatnonzero(keep)
    reasons = []
    for j in np.flatnonzero(~keep)[:5]:
        if not X[:, j].any():
            reasons.append(f"{names[j]} is zero everywhere")
            continue
        beta = np.linalg.lstsq(X[:, kept] / np.abs(X[:, kept]).max(axis=0), X[:, j])[0]
        parts = [
            names[k] for k, b in zip(kept, beta) if abs(b) > 1e-6 * abs(beta).max()
        ]
        reasons.append(f"{names[j]} is a combination of {', '.join(parts[:6])}")
    more = "; ..." if len(dropped) > 5 else ""
    count = f"{len(dropped)} collinear column{'s' * (len(dropped) != 1)}"
    return f"dropped {count} of the fixed effects: {'; '.join(reasons)}{more}."


# -- the door --------------------------------------------------------------------------


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
        What to do with rows that have a missing value in a column used.

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
        If rows with missing values or collinear columns were dropped.

    Examples
    --------
    >>> frame = model_frame(
    ...     "y ~ x + (1 | g)",
    ...     {"y": [1.0, 3.0, 2.0, 5.0], "x": [0, 1, 0, 1], "g": ["a", "a", "b", "b"]},
    ... )
    >>> frame.X_names, list(frame.terms[0].levels)
    (['(Intercept)', 'x'], ['a', 'b'])
    """
    if missing not in ("drop", "raise"):
        raise DataError(f"missing={missing!r} is unknown. Choose 'drop' or 'raise'.")
    _check_contrasts(contrasts or {})
    parsed = parse(formula)
    fixed = expand(parsed.fixed)
    sides = [expand(term.effects) for term in parsed.random]
    names = list(dict.fromkeys(v for s in (fixed, *sides) for v in s.variables))
    offsets = (*parsed.offsets, *((offset,) if isinstance(offset, str) else ()))
    factors = [f for term in parsed.random for f in term.factors]
    table, arrays = _open(
        data, [parsed.response, *names, *factors, *offsets], weights, offset
    )
    notices: list[str] = []
    n_rows, index = table.n, table.frame.index
    dropped_by = _drop_missing(table, arrays, missing, notices)

    y, trials = _response(table.evaluate(parsed.response, {}), parsed.response, table.n)
    _check_response(y, trials, parsed.response, table.rows)
    prior = _prior_weights(table, arrays, weights, trials)
    total_offset = _total_offset(table, arrays, offsets)

    learned = {e: _learn(e, table, contrasts or {}) for e in names}
    variables_ = {e: variable for e, (variable, _) in learned.items()}
    values = {e: value for e, (_, value) in learned.items()}
    _check_factors(contrasts or {}, variables_)

    design = _design(fixed, variables_)
    _check_width(len(design.names), table.n)
    X = design.matrix(variables_, values, table.n)
    keep = _independent(X, design.names)
    dropped = [n for n, k in zip(design.names, keep) if not k]
    if dropped:
        notices.append(_describe_dropped(X, keep, design.names))
        X = np.ascontiguousarray(X[:, keep])

    terms = _random_terms(parsed.random, sides, table, variables_, values)
    encoder = Encoder(
        formula=parsed,
        variables=variables_,
        fixed=design,
        keep=np.flatnonzero(keep),
        random=tuple((t.term, t.design, t.arrays.grouping) for t in terms),
        offsets=offsets,
        needs_offset="offset" in arrays,
    )
    for notice in notices:
        warnings.warn(notice, NoticeWarning, stacklevel=2)
    return ModelFrame(
        y=y,
        X=X,
        X_names=[n for n, k in zip(design.names, keep) if k],
        terms=tuple(t.arrays for t in terms),
        weights=prior,
        offset=total_offset,
        n_rows=n_rows,
        n_dropped=n_rows - table.n,
        dropped_by=dropped_by,
        kept=table.rows,
        row_index=index if table.rows is None else index[table.rows],
        response_name=parsed.response,
        encoder=encoder,
        notices=notices,
        dropped_columns=dropped,
        one_row_per_level=tuple(
            t.arrays.group_name
            for t in terms
            if t.arrays.z.shape[1] * t.arrays.n_levels == table.n
            and t.term.structure in (FULL, DIAG)
        ),
        is_cbind=trials is not None,
    )


def _open(
    data: Any, expressions: list[str], weights: Any, offset: Any
) -> tuple[_Table, dict[str, np.ndarray]]:
    """Open the table, find its missing values, and check arrays given beside it."""
    names = tables.column_names(data)
    what = "the data"
    used = list(dict.fromkeys(c for e in expressions for c in _used(e, names, what)))
    extra = _used(weights, names, what) if isinstance(weights, str) else []
    frame = tables.as_frame(data, {*used, *extra})
    table = _Table(frame, names)
    if table.n == 0:
        raise DataError("the data have no rows.")
    table.find_missing(used)
    arrays = {}
    for name, given in (("weights", weights), ("offset", offset)):
        if given is not None and not isinstance(given, str):
            arrays[name] = _as_array(given, name, table.n)
    if "offset" in arrays and np.isnan(arrays["offset"]).any():
        table.masks["offset"] = np.isnan(arrays["offset"])
    return table, arrays


def _drop_missing(
    table: _Table, arrays: dict[str, np.ndarray], missing: str, notices: list[str]
) -> dict[str, int]:
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
    lost = table.n - len(rows)
    notices.append(
        f"dropped {lost} of {table.n} rows with missing values ({shown}); "
        "missing='raise' makes this an error."
    )
    table.keep(rows)
    for name in arrays:
        arrays[name] = arrays[name][rows]
    return counts


def _prior_weights(
    table: _Table,
    arrays: Mapping[str, np.ndarray],
    given: Any,
    trials: np.ndarray | None,
) -> np.ndarray | None:
    if given is None:
        return trials
    name = "weights"
    if isinstance(given, str):
        name = f"weights {given!r}"
        out = _vector(table.evaluate(given, {}), given, table.n)
    else:
        out = arrays["weights"]
    _check_weights(out, name, table.rows)
    return out if trials is None else out * trials


def _total_offset(
    table: _Table, arrays: Mapping[str, np.ndarray], offsets: tuple[str, ...]
) -> np.ndarray | None:
    parts = {e: _vector(table.evaluate(e, {}), e, table.n) for e in offsets}
    named = [(f"offset {e}", v) for e, v in parts.items()]
    if "offset" in arrays:
        named.append(("offset", arrays["offset"]))
    for name, values in named:
        _check_finite(values, name, table.rows)
    return reduce(np.add, [v for _, v in named]) if named else None


def _check_contrasts(contrasts: Mapping[str, str]) -> None:
    for name, spec in contrasts.items():
        if not isinstance(spec, str) or spec.removeprefix("contr.") not in _CONTRASTS:
            raise DataError(
                f"contrasts: {spec!r} for {name!r} is unknown. Choose from: "
                f"{', '.join(_CONTRASTS)}."
            )


def _check_factors(
    contrasts: Mapping[str, str], variables_: Mapping[str, _Variable]
) -> None:
    factors = [v.name for v in variables_.values() if v.is_factor]
    for name in contrasts:
        if name not in factors and f"`{name}`" not in factors:
            choices = tables.suggest(str(name), factors, "Factors")
            raise DataError(
                f"contrasts: {name!r} is no factor of the formula. {choices}"
            )


def _check_width(p: int, n: int) -> None:
    if p > n:
        raise DataError(
            f"the fixed effects have {p} columns and the data {n} rows. Leave terms "
            "out, or make a factor with many levels a grouping factor."
        )


class _Made(NamedTuple):
    term: RandomTerm
    design: _Design
    arrays: TermArrays


def _random_terms(
    random: tuple[RandomTerm, ...],
    sides: list[Side],
    table: _Table,
    variables_: Mapping[str, _Variable],
    values: Mapping[str, np.ndarray],
) -> list[_Made]:
    """Make the random terms, in lme4's order; equal parts share their arrays."""
    groups = _Groups(table)
    designs: dict[Side, tuple[_Design, np.ndarray]] = {}
    made = []
    for term, side in zip(random, sides):
        codes, grouping = groups.group(term)
        _check_group(term, grouping)
        if side not in designs:
            design = _design(side, variables_)
            _check_effects(term, len(design.names), grouping, table.n)
            designs[side] = design, design.matrix(variables_, values, table.n)
        design, z = designs[side]
        _check_effects(term, len(design.names), grouping, table.n)
        arrays = TermArrays(z, design.names, codes, grouping, term.structure, term.text)
        made.append(_Made(term, design, arrays))
    sizes = [m.arrays.n_levels for m in made]
    if any(b > a for a, b in pairwise(sizes)):
        order = sorted(range(len(made)), key=lambda i: sizes[i])[::-1]
        made = [made[i] for i in order]
    return made


def _check_group(term: RandomTerm, grouping: Grouping) -> None:
    if grouping.n_levels < 2:
        raise FormulaError(
            f"grouping factor {term.group!r} has 1 level; a random effect needs at "
            f"least 2. Drop {term.text}."
        )


def _check_effects(term: RandomTerm, k: int, grouping: Grouping, n: int) -> None:
    n_effects = k * grouping.n_levels
    if term.structure in (FULL, DIAG) and n_effects > n:
        raise FormulaError(
            f"term {term.text} has {n_effects} random effects ({k} for each of "
            f"{grouping.n_levels} levels of {term.group!r}) and the data {n} rows, so "
            "its variances are not identified. Use fewer effects or a coarser grouping."
        )
