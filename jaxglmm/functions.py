"""Functions of the formula language, by name: all that a formula can call.

Three kinds, told apart by what new rows need:

    plain      row by row: log, np.where, x.clip
    learning   keep what they learned of the training rows: poly, scale, bs, ns
    summary    one number of the training rows, which new rows use again: np.mean, x.max

`takes` says in what form a function gets its arguments: ``floats``, all in float64;
``numbers``, columns in float64, truth values included, and scalars as they are;
``values``, columns of numbers in float64 and all else as it is; ``copies``, the same,
for functions that might write into them; ``raw``, columns in their own type. Nothing
here reads or writes a file, changes an argument, or gives a result much larger than its
arguments.

Functions that learn are formulaic's, but for ``ns``. They are imported where a formula
names one of them, because that takes a quarter of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm.errors import FormulaError
from jaxglmm.values import Marked, Pair

__all__ = [
    "ACCESSORS",
    "CONSTANTS",
    "CONTRASTS",
    "FUNCTIONS",
    "METHODS",
    "NUMPY",
    "PROPERTIES",
    "Function",
    "check_functions",
    "contrast_object",
]

MAX_DEGREE, MAX_DF = 50, 1000  # of polynomials and splines


@dataclass(frozen=True)
class Function:
    """A function or a method, and what it may be given."""

    call: Callable[..., Any]
    takes: str = "numbers"  # or floats, values, copies, raw
    kind: str = "plain"  # or learning, summary
    least: int = 1  # positional arguments, the object of a method included
    most: int = 1
    keywords: Collection[str] | None = ()  # None: any

    def check(self, name: str, n_args: int, keywords: Collection[str]) -> None:
        """Refuse arguments that it does not take.

        Raises
        ------
        FormulaError
            Naming them.
        """
        unknown = [] if self.keywords is None else set(keywords) - set(self.keywords)
        if unknown:
            known = ", ".join(self.keywords or ()) or "none"
            raise FormulaError(
                f"{name} takes no argument {min(unknown)!r} in a formula; by name it "
                f"takes {known}."
            )
        given = n_args + (0 if self.kind == "learning" else len(keywords))
        if given < self.least or n_args > self.most:
            few, many = self.least, self.most
            count = f"{few}" if few == many else f"{few} to {many}"
            plural = "s" * (many != 1)
            found = n_args + len(keywords)
            raise FormulaError(f"{name} takes {count} argument{plural}; found {found}.")


def check_functions(functions: Any) -> dict[str, Function]:
    """Functions of the caller's own, by the name that the formula calls them.

    Raises
    ------
    FormulaError
        If a name is none, or what stands under it cannot be called.
    """
    functions = {} if functions is None else functions
    if not isinstance(functions, Mapping):
        kind = type(functions).__name__
        raise FormulaError(f"functions must be a dict, {{'f': f}}; found {kind}.")
    for name, call in functions.items():
        if not (isinstance(name, str) and name.isidentifier()) or name == "offset":
            raise FormulaError(
                f"functions: {name!r} cannot be the name of a function in a formula."
            )
        if not callable(call):
            kind = type(call).__name__
            raise FormulaError(f"functions: {name!r} is a {kind}, not a function.")
    any_number = 1_000_000
    return {
        name: Function(call, "copies", least=0, most=any_number, keywords=None)
        for name, call in functions.items()
    }


# -- factors and pairs -----------------------------------------------------------------


def _identity(values: Any) -> Any:
    return values


def _factor(values: Any, contrasts: Any = None, *, levels: Any = None) -> Marked:
    return Marked(values, contrasts, levels)


def _ordered(values: Any, *, levels: Any = None) -> Marked:
    return Marked(values, None, levels, True)


# -- functions that learn --------------------------------------------------------------


def _theirs(name: str) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        from formulaic.transforms import TRANSFORMS

        with np.errstate(all="ignore"):
            return TRANSFORMS[name](*args, **keywords)

    return call


def _spline(*args: Any, **keywords: Any) -> Any:
    from jaxglmm.splines import natural_spline

    return natural_spline(*args, **keywords)


def _learning(call: Callable[..., Any], **places: int) -> Function:
    """A function whose ``df`` and ``degree`` stand at these places, and are bounded."""

    def bounded(*args: Any, **keywords: Any) -> Any:
        for name, most in (("df", MAX_DF), ("degree", MAX_DEGREE)):
            place = places.get(name, len(args))
            value = args[place] if place < len(args) else keywords.get(name)
            if isinstance(value, int | float) and value > most:
                raise FormulaError(f"{name} is {most} at most; found {value:.6g}.")
        return call(*args, **keywords)

    return Function(bounded, kind="learning", most=8, keywords=None)


# -- numpy -----------------------------------------------------------------------------

_UFUNCS = (
    "abs absolute fabs add subtract multiply divide true_divide floor_divide mod "
    "remainder fmod power float_power square sqrt cbrt reciprocal negative positive "
    "exp exp2 expm1 log log2 log10 log1p logaddexp logaddexp2 sin cos tan arcsin "
    "arccos arctan arctan2 hypot sinh cosh tanh arcsinh arccosh arctanh degrees "
    "radians deg2rad rad2deg sign floor ceil trunc rint maximum minimum fmax fmin "
    "copysign heaviside isnan isinf isfinite"
).split()
_LOGICAL = ("logical_and", "logical_or", "logical_not", "logical_xor")
_SUMMARIES = (
    "mean median std var min max sum amin amax ptp nanmean nanmedian nanstd nanvar "
    "nanmin nanmax nansum"
).split()


def _ufunc(name: str, takes: str = "floats") -> Function:
    call = getattr(np, name)
    return Function(call, takes, least=call.nin, most=call.nin)


def _summary(name: str, most: int = 1) -> Function:
    keywords = ("ddof",) if name[-3:] in ("std", "var") else ()
    keywords = ("q",) if most == 2 else keywords
    call = getattr(np, name)
    return Function(call, kind="summary", least=most, most=most, keywords=keywords)


NUMPY: dict[str, Function] = {
    **{name: _ufunc(name) for name in _UFUNCS},
    **{name: _ufunc(name, "values") for name in _LOGICAL},
    **{name: _summary(name) for name in _SUMMARIES},
    **{name: _summary(name, 2) for name in ("quantile", "percentile")},
    "where": Function(np.where, "values", least=3, most=3),
    "clip": Function(
        np.clip, least=2, most=3, keywords=("a_min", "a_max", "min", "max")
    ),
    "round": Function(np.round, most=2, keywords=("decimals",)),
    "around": Function(np.round, most=2, keywords=("decimals",)),
    "nan_to_num": Function(np.nan_to_num, keywords=("nan", "posinf", "neginf")),
    "sinc": Function(np.sinc),
    "i0": Function(np.i0),
    "interp": Function(np.interp, least=3, most=3, keywords=("left", "right")),
    "digitize": Function(np.digitize, least=2, most=2, keywords=("right",)),
    "isin": Function(np.isin, "raw", least=2, most=2, keywords=("invert",)),
    "array": Function(np.array, "raw"),
    "column_stack": Function(np.column_stack, "raw"),
    "float64": Function(np.float64),
    "datetime64": Function(np.datetime64, "raw", most=2),
    "timedelta64": Function(np.timedelta64, "raw", most=2),
}
CONSTANTS: dict[str, Any] = {
    "pi": np.pi,
    **{f"np.{name}": getattr(np, name) for name in ("pi", "e", "inf", "nan")},
    **{name: name for name in ("float", "int", "str", "bool")},  # x.astype(float)
}

_BARE = (
    "log log10 log2 log1p exp exp2 expm1 sqrt abs sin cos tan tanh floor ceil sign "
    "where maximum minimum round min max sum mean median"
).split()
FUNCTIONS: dict[str, Function] = {
    **{name: NUMPY[name] for name in _BARE},
    "I": Function(_identity, "raw"),
    "C": Function(_factor, "raw", most=2, keywords=("contrasts", "levels")),
    "factor": Function(_factor, "raw", most=2, keywords=("contrasts", "levels")),
    "ordered": Function(_ordered, "raw", keywords=("levels",)),
    "cbind": Function(Pair, "raw", least=2, most=2),
    "poly": _learning(_theirs("poly"), degree=1),
    "scale": _learning(_theirs("scale")),
    "center": _learning(_theirs("center")),
    "standardize": _learning(_theirs("standardize")),
    "bs": _learning(_theirs("bs"), df=1, degree=3),
    "cr": _learning(_theirs("cr"), df=1),
    "cs": _learning(_theirs("cs"), df=1),
    "cc": _learning(_theirs("cc"), df=1),
    "ns": _learning(_spline, df=1),
}

# -- contrasts -------------------------------------------------------------------------

CONTRASTS = frozenset(
    "contr.helmert contr.diff contr.poly contr.sum contr.treatment contr.SAS "
    "Treatment Sum Helmert Poly Diff".split()
)


def contrast_object(name: str) -> Any:
    """One of formulaic's kinds of contrasts, by a name of :data:`CONTRASTS`."""
    from formulaic.transforms import TRANSFORMS

    head, _, kind = name.partition(".")
    return getattr(TRANSFORMS[head], kind) if kind else TRANSFORMS[head]


# -- methods of columns ----------------------------------------------------------------


def _method(name: str) -> Callable[..., Any]:
    def call(column: pd.Series, *args: Any, **keywords: Any) -> Any:
        return getattr(column, name)(*args, **keywords)

    return call


def _own(
    name: str, takes: str = "values", least: int = 0, most: int = 0, names: str = "",
    kind: str = "plain",
) -> Function:  # fmt: skip
    return Function(
        _method(name), takes, kind, least + 1, most + 1, tuple(names.split())
    )


_TYPES = "float float64 int int64 str string bool category object".split()


def _astype(column: pd.Series, dtype: Any) -> Any:
    if dtype not in _TYPES:
        raise FormulaError(
            f"astype({dtype!r}) is not for a formula; it knows {', '.join(_TYPES)}."
        )
    return column.astype(dtype)


def _map(column: pd.Series, arg: Any) -> Any:
    if not isinstance(arg, dict):
        raise FormulaError("map takes a dict, as in f.map({'a': 1, 'b': 2}).")
    return column.map(arg)


METHODS: dict[str, Function] = {
    "abs": _own("abs", "numbers"),
    "clip": _own("clip", most=2, names="lower upper"),
    "round": _own("round", "numbers", most=1, names="decimals"),
    "between": _own("between", least=2, most=3, names="left right inclusive"),
    "where": _own("where", least=1, most=2, names="cond other"),
    "mask": _own("mask", least=1, most=2, names="cond other"),
    "fillna": _own("fillna", least=1, most=1, names="value"),
    "isin": _own("isin", "raw", 1, 1, "values"),
    "isna": _own("isna", "raw"),
    "notna": _own("notna", "raw"),
    "replace": _own("replace", least=1, most=2, names="to_replace value"),
    "map": Function(_map, "raw", least=2, most=2, keywords=("arg",)),
    "astype": Function(_astype, "raw", least=2, most=2, keywords=("dtype",)),
    "quantile": _own("quantile", "numbers", 0, 1, "q", "summary"),
    **{
        name: _own(name, names="ddof" * (name in ("std", "var")), kind="summary")
        for name in ("mean", "median", "std", "var", "min", "max", "sum")
    },
}


# -- accessors -------------------------------------------------------------------------


def _accessor(kind: str, name: str) -> Callable[..., Any]:
    def call(column: pd.Series, *args: Any, **keywords: Any) -> Any:
        return getattr(getattr(column, kind), name)(*args, **keywords)

    return call


def _of(kind: str, name: str, most: int = 0, names: str = "") -> Function:
    keywords = tuple(names.split())
    return Function(_accessor(kind, name), "raw", most=most + 1, keywords=keywords)


def _contains(column: pd.Series, pat: Any, case: bool = True, regex: Any = None) -> Any:
    if regex or (regex is None and re.escape(str(pat)) != str(pat).replace(" ", r"\ ")):
        raise FormulaError(
            "patterns are plain text in a formula: say str.contains(..., regex=False)."
        )
    return column.str.contains(pat, case=case, regex=False)


def _split(column: pd.Series, pat: Any = None, n: int = -1) -> Any:
    return column.str.split(pat, n=n, regex=False)


def _strftime(column: pd.Series, date_format: str) -> Any:
    if not re.fullmatch(r"(%[A-Za-z%]|[^%])*", date_format):
        raise FormulaError("strftime takes directives such as %Y-%m.")
    return column.dt.strftime(date_format)


_PLAIN_STR = (
    "upper lower title capitalize casefold swapcase len isdigit isalpha isalnum "
    "isnumeric isdecimal isspace isupper islower istitle"
).split()
ACCESSORS: dict[str, dict[str, Function]] = {
    "str": {
        **{name: _of("str", name) for name in _PLAIN_STR},
        **{n: _of("str", n, 1, "to_strip") for n in ("strip", "lstrip", "rstrip")},
        **{n: _of("str", n, 1, "pat") for n in ("startswith", "endswith")},
        "removeprefix": _of("str", "removeprefix", 1, "prefix"),
        "removesuffix": _of("str", "removesuffix", 1, "suffix"),
        "slice": _of("str", "slice", 3, "start stop step"),
        "get": _of("str", "get", 1, "i"),
        "find": _of("str", "find", 3, "sub start end"),
        "cat": Function(_accessor("str", "cat"), "raw", "plain", 2, 2, ("sep",)),
        "contains": Function(_contains, "raw", most=2, keywords=("case", "regex")),
        "split": Function(_split, "raw", most=2, keywords=("pat", "n")),
    },
    "dt": {
        **{name: _of("dt", name) for name in ("day_name", "month_name", "normalize")},
        **{name: _of("dt", name, 1, "freq") for name in ("floor", "ceil", "round")},
        "to_period": _of("dt", "to_period", 1, "freq"),
        "total_seconds": _of("dt", "total_seconds"),
        "isocalendar": _of("dt", "isocalendar"),
        "strftime": Function(_strftime, "raw", least=2, most=2),
    },
    "cat": {},
}
_DATES = (
    "year month day hour minute second microsecond nanosecond quarter date time "
    "dayofweek day_of_week weekday dayofyear day_of_year days_in_month daysinmonth "
    "is_month_start is_month_end is_quarter_start is_quarter_end is_year_start "
    "is_year_end is_leap_year days seconds microseconds nanoseconds"
).split()
PROPERTIES: dict[str, frozenset[str]] = {
    "dt": frozenset(_DATES),
    "cat": frozenset({"codes"}),
    "str": frozenset(),
    "isocalendar": frozenset({"year", "week", "day"}),
}
