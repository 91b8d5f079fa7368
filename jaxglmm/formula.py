"""The formula language: ``y ~ x * f + (1 + x | g)`` to a fixed part and random terms.

The fixed part and the left of a bar are sums of terms, which :mod:`jaxglmm.algebra`
expands with R's operators; a variable is a column or an expression, kept as text. A
random term is

    (effects | group)        correlated effects
    (effects || group)       uncorrelated: one term per effect
    name(effects | group)    with a named covariance structure

and ``offset(expression)`` adds a known part of the linear predictor.

References: Bates et al. (2015), J. Stat. Softw. 67(1), doi:10.18637/jss.v067.i01.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from jaxglmm.algebra import read_groups, read_side
from jaxglmm.errors import FormulaError
from jaxglmm.expressions import spelling
from jaxglmm.tokens import Reader

__all__ = ["DIAG", "FULL", "ParsedFormula", "RandomTerm", "parse", "parse_predictor"]

FULL, DIAG = "full", "diag"


@dataclass(frozen=True)
class RandomTerm:
    """One random-effects term, ``(effects | group)``.

    Attributes
    ----------
    effects : str
        What stands left of the bar, such as ``"1 + x"``; see
        :func:`jaxglmm.algebra.expand`.
    group : str
        The grouping factor, ``"g"``, or an interaction, ``"a:b"``.
    structure : str
        ``"full"`` for a plain bar, otherwise the name in ``name(effects | group)``.
    text : str
        The term as written; shared by all terms that one ``||`` or ``a/b`` became.
    factors : tuple of str
        The components of `group`: ``("a", "b")``.
    """

    effects: str
    group: str
    structure: str
    text: str
    factors: tuple[str, ...]


@dataclass(frozen=True)
class ParsedFormula:
    """A formula taken apart; all expressions are still text.

    Attributes
    ----------
    response : str
        Left of the tilde; empty for a further predictor.
    fixed : str
        Right of it, without random terms and offsets; ``"1"`` where nothing is left.
    offsets : tuple of str
        The expressions inside ``offset(...)``.
    random : tuple of RandomTerm
        Random terms in the order written, with ``||`` and ``a/b`` expanded.
    text : str
        The formula on one line.
    """

    response: str
    fixed: str
    offsets: tuple[str, ...]
    random: tuple[RandomTerm, ...]
    text: str


def parse(formula: str) -> ParsedFormula:
    """Take a mixed-model formula apart.

    Parameters
    ----------
    formula : str
        ``"y ~ fixed + (effects | group) + offset(z)"``, terms in any order.

    Returns
    -------
    ParsedFormula

    Raises
    ------
    FormulaError
        With the formula and a caret under the place.

    Examples
    --------
    >>> parsed = parse("y ~ x + (1 | batch/cask)")
    >>> parsed.fixed, [term.group for term in parsed.random]
    ('x', ['cask:batch', 'batch'])
    """
    if not isinstance(formula, str):
        kind = type(formula).__name__
        raise FormulaError(f"the formula must be a string, found {kind}.")
    if not formula.strip():
        raise FormulaError(
            "the formula is empty. Write: response ~ terms + (1 | group)"
        )
    return _parse(formula)


@lru_cache(maxsize=512)
def _parse(formula: str) -> ParsedFormula:
    return _read_formula(Reader(formula))


def parse_predictor(formula: str, name: str) -> ParsedFormula:
    """Take the formula of a further linear predictor apart, ``"~ x + (1 | g)"``.

    Like :func:`parse`, but nothing stands left of the tilde and random terms may be
    missing; ``name`` is the argument that it came in, for messages.

    Examples
    --------
    >>> parse_predictor("~ x", "zi").fixed
    'x'
    """
    if not isinstance(formula, str):
        kind = type(formula).__name__
        raise FormulaError(f"{name} must be a formula such as '~ x'; found {kind}.")
    r = Reader(formula)
    if not r.tokens[0].is_op("~"):
        r.fail(f"{name} must begin with '~', as in '~ x + (1 | g)'.", r.tokens[0])
    return _read_formula(r, one_sided=True)


def _read_formula(r: Reader, *, one_sided: bool = False) -> ParsedFormula:
    stop = len(r.tokens) - 1
    tilde = 0 if one_sided else _find_tilde(r)
    response = "" if one_sided else spelling(r, 0, tilde)
    if tilde + 1 == stop:
        r.fail("nothing right of '~'. Add terms.", r.tokens[tilde])
    parts = _Parts()
    _sort_pieces(r, tilde + 1, stop, parts)
    if not parts.random and not one_sided:
        r.fail(
            "no random effects. Add a term such as (1 | g), or fit a model without "
            "them by statsmodels' OLS or GLM.",
            r.tokens[tilde + 1],
        )
    return ParsedFormula(
        response=response,
        fixed=_join(r, parts.fixed),
        offsets=tuple(parts.offsets),
        random=tuple(parts.random),
        text=r.source(0, stop),
    )


def _find_tilde(r: Reader) -> int:
    last = len(r.tokens) - 1
    tildes = r.find(0, last, "~")
    if not tildes:
        message = "no '~' in the formula. Write: response ~ terms + (effects | group)"
        r.fail(message, r.tokens[last])
    if len(tildes) > 1:
        message = "a second '~' in the formula; one separates response and terms."
        r.fail(message, r.tokens[tildes[1]])
    if tildes[0] == 0:
        r.fail("nothing left of '~'. Name the response.", r.tokens[0])
    for token in r.tokens[: tildes[0]]:
        if token.is_op("|", "||"):
            message = "a bar in the response. Random terms stand right of '~'."
            r.fail(message, token)
    return tildes[0]


# -- the pieces of the right-hand side -------------------------------------------------

_Piece = tuple[bool, int, int]  # removed?, first token, the one behind the last


@dataclass
class _Parts:
    fixed: list[_Piece] = field(default_factory=list)
    offsets: list[str] = field(default_factory=list)
    random: list[RandomTerm] = field(default_factory=list)


def _join(r: Reader, pieces: list[_Piece]) -> str:
    """Write the pieces of the fixed part as one sum."""
    text = " ".join(
        ("- " if minus else "+ ") + r.source(a, b) for minus, a, b in pieces
    )
    text = text.removeprefix("+ ")
    text = "-" + text[2:] if text.startswith("- ") else text
    return text or "1"


def _pieces(r: Reader, start: int, stop: int) -> Iterable[_Piece]:
    """Split start..stop at its own + and -."""
    minus, i = False, start
    for mark in [*r.find(start, stop, "+", "-"), stop]:
        if mark > i:
            yield minus, i, mark
            minus = False
        elif mark == stop:
            what = "the formula ends with an operator" if i > start else "no terms"
            r.fail(f"{what}. Add a term after it.", r.tokens[max(i - 1, start)])
        if mark < stop:
            minus ^= r.tokens[mark].text == "-"
        i = mark + 1


def _sort_pieces(r: Reader, start: int, stop: int, parts: _Parts) -> None:
    """Deal the pieces of start..stop out to the three lists."""
    for minus, a, b in _pieces(r, start, stop):
        terms = _read_random(r, a, b)
        if terms is not None:
            if minus:
                message = "a random term cannot be removed with '-'. Leave it out."
                r.fail(message, r.tokens[a])
            parts.random += terms
        elif _is_offset(r, a, b):
            if minus:
                message = "an offset cannot be removed with '-'. Leave it out."
                r.fail(message, r.tokens[a])
            parts.offsets.append(spelling(r, a + 2, b - 1))
        elif _encloses_bar(r, a, b) and not minus:
            _sort_pieces(r, a + 1, b - 1, parts)
        else:
            _check_fixed(r, a, b)
            parts.fixed.append((minus, a, b))


def _is_offset(r: Reader, a: int, b: int) -> bool:
    call = r.tokens[a].text == "offset" and r.tokens[a + 1].text == "("
    return call and r.closing(a + 1) == b - 1


def _encloses_bar(r: Reader, a: int, b: int) -> bool:
    """Whether a..b is one pair of parentheses around a sum with a random term."""
    if r.tokens[a].text != "(" or r.closing(a) != b - 1:
        return False
    return any(token.is_op("(") for token in r.tokens[a + 1 : b - 1]) and any(
        _read_random(r, c, d) is not None or _encloses_bar(r, c, d)
        for _, c, d in _pieces(r, a + 1, b - 1)
    )


def _check_fixed(r: Reader, a: int, b: int) -> None:
    side = read_side(r, a, b)
    if any(variable.startswith("offset(") for variable in side.variables):
        r.fail("offset(...) must be added with '+'.", r.tokens[a])


# -- random terms ----------------------------------------------------------------------


def _read_random(r: Reader, start: int, stop: int) -> list[RandomTerm] | None:
    """Read the random terms of start..stop; None where it holds no bar."""
    named = r.tokens[start].kind == "name"
    opening = start + named
    if opening >= stop or r.tokens[opening].text != "(":
        return None
    if r.closing(opening) != stop - 1 or r.tokens[start].text == "I":
        return None
    bars = r.find(opening + 1, stop - 1, "|", "||")
    if not bars:
        return None
    structure = r.tokens[start].text if named else FULL
    _check_bar(r, opening + 1, bars, stop - 1, structure)
    text = r.source(start, stop)
    effects = _effects(r, opening + 1, bars[0])
    return [
        RandomTerm(effect, ":".join(factors), structure, text, factors)
        for factors in read_groups(r, bars[0] + 1, stop - 1)
        for effect in effects
    ]


def _check_bar(
    r: Reader, start: int, bars: list[int], stop: int, structure: str
) -> None:
    bar = bars[0]
    if len(bars) > 1:
        message = "a random term has one bar. Write one term per grouping factor."
        r.fail(message, r.tokens[bars[1]])
    if bar == start:
        message = "the left of the bar is empty. For an intercept write (1 | g)."
        r.fail(message, r.tokens[bar])
    if bar + 1 == stop:
        message = "no grouping factor right of the bar. Write (effects | group)."
        r.fail(message, r.tokens[bar])
    if r.tokens[bar].text == "||" and structure != FULL:
        message = f"{structure}(...) takes a single bar; || has its own structure."
        r.fail(message, r.tokens[bar])


def _effects(r: Reader, start: int, bar: int) -> list[str]:
    """Effects left of a bar, as one sum or, for a double bar, one by one."""
    side = read_side(r, start, bar)
    if not (side.intercept or side.terms):
        message = "no effect left of the bar. Write (1 | g) or leave the term out."
        r.fail(message, r.tokens[start])
    if r.tokens[bar].text == "||":
        return ["1"] * side.intercept + [f"0 + {':'.join(t)}" for t in side.terms]
    return [r.source(start, bar)]
