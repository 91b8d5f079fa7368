"""Wilkinson-Rogers algebra: one side of a formula to its terms.

A term is a set of variables, a side a set of terms, the empty term the intercept. With
A, B sides and AB = {a | b : a in A, b in B}, loosest first,

    A + B = A | B        A - B = A without B      (+ 0 and - 1 drop the intercept)
    A * B = A | B | AB   A / B = A | {all variables of A}B   B %in% A = A / B
    A : B = AB
    A ^ n = A ** n = A | AA | ... | A...A

which is what these operators mean in R. The grouping factor right of a bar has an
algebra of its own, in which order matters:

    a + b = (a, b)       a / b = (b:a, a)       a : b = (a:b)

References: Wilkinson & Rogers (1973), Appl. Stat. 22, doi:10.2307/2346786.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, NoReturn

from jaxglmm.errors import FormulaError
from jaxglmm.expressions import read_variable
from jaxglmm.tokens import CLOSES, Reader, Token

__all__ = ["Side", "expand", "read_groups", "read_side"]

MAX_TERMS = 4096  # terms of one side after expansion


@dataclass(frozen=True)
class Side:
    """A right-hand side as terms, in R's order: by size, then as written.

    Attributes
    ----------
    intercept : bool
        Whether there is one.
    terms : tuple of tuple of str
        Each term as its variables, in the order of their first appearance.
    """

    intercept: bool
    terms: tuple[tuple[str, ...], ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """Every variable once, in the order of the terms."""
        return tuple(dict.fromkeys(v for term in self.terms for v in term))


@lru_cache(maxsize=512)
def expand(side: str) -> Side:
    """Expand one side of a formula, such as ``"x * f"`` or ``"0 + x"``.

    Parameters
    ----------
    side : str
        `ParsedFormula.fixed` or `RandomTerm.effects`.

    Returns
    -------
    Side

    Raises
    ------
    FormulaError
        With the side and a caret under the place.

    Examples
    --------
    >>> expand("x * f - 1").terms
    (('x',), ('f',), ('x', 'f'))
    """
    r = Reader(side)
    return read_side(r, 0, len(r.tokens) - 1)


def read_side(r: Reader, start: int, stop: int) -> Side:
    """Terms of the tokens start..stop, with an intercept unless they take it away."""
    r.i = start
    try:
        value = _sum(r, stop, {_ONE: ()})
        if r.i < stop:
            _fail_unexpected(r)
    except FormulaError:
        _refuse_truth(r, start, stop)
        raise
    order = _appearance(r, start, stop)
    terms = [
        tuple(sorted(term, key=lambda v: order.get(v, len(order))))
        for term in value.terms.values()
        if term
    ]
    return Side(_ONE in value.terms, tuple(sorted(terms, key=len)))


def _appearance(r: Reader, start: int, stop: int) -> dict[str, int]:
    """Place where each variable of start..stop appears first."""
    order: dict[str, int] = {}
    r.i = start
    while r.i < stop:
        place = r.i
        if r.token.kind in ("name", "quoted") or r.at("{"):
            order.setdefault(read_variable(r), place)
        else:
            r.take()
    return order


# -- terms of a side -------------------------------------------------------------------

_Terms = dict[frozenset[str], tuple[str, ...]]  # variables as a set: as written
_ONE: frozenset[str] = frozenset()  # the intercept


class _Value(NamedTuple):
    terms: _Terms
    zero: bool = False  # a literal 0, which only a sum understands


def _merge(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(left + right))


def _cross(
    left: Collection[tuple[str, ...]], right: Collection[tuple[str, ...]]
) -> _Terms:
    out: _Terms = {}
    for a in left:
        for b in right:
            term = _merge(a, b)
            out.setdefault(frozenset(term), term)
    return out


def _nest(parents: _Terms, nested: _Terms) -> _Terms:
    everything = tuple(dict.fromkeys(v for t in parents.values() for v in t))
    return {**parents, **_cross([everything], nested.values())}


def _sum(r: Reader, stop: int, terms: _Terms) -> _Value:
    """Read ``a + b - c``, added to the terms given."""
    zero, first = False, True
    while r.i < stop and (first or r.at("+", "-")):
        minus, first = False, False
        while r.at("+", "-"):
            minus ^= r.take().text == "-"
        right = _product(r, stop)
        if minus:
            terms = {k: v for k, v in terms.items() if k not in right.terms}
        else:
            terms = terms | right.terms
        if right.zero and minus:
            terms.setdefault(_ONE, ())
            zero = False
        elif right.zero or (minus and _ONE in right.terms):
            terms.pop(_ONE, None)
            zero = True
        elif _ONE in right.terms:
            zero = False
        _check_size(r, terms)
    return _Value(terms, zero)


def _product(r: Reader, stop: int) -> _Value:
    left = _interaction(r, stop)
    while r.i < stop and r.at("*", "/", "%in%"):
        operator = r.take()
        right = _interaction(r, stop)
        a, b = _factors(r, left, operator), _factors(r, right, operator)
        if operator.text == "*":
            left = _Value({**a, **b, **_cross(a.values(), b.values())})
        else:
            left = _Value(_nest(a, b) if operator.text == "/" else _nest(b, a))
        _check_size(r, left.terms, operator)
    return left


def _interaction(r: Reader, stop: int) -> _Value:
    left = _power(r, stop)
    while r.i < stop and r.at(":"):
        operator = r.take()
        right = _power(r, stop)
        a, b = _factors(r, left, operator), _factors(r, right, operator)
        left = _Value(_cross(a.values(), b.values()))
        _check_size(r, left.terms, operator)
    return left


def _power(r: Reader, stop: int) -> _Value:
    base = _primary(r, stop)
    while r.i < stop and r.at("^", "**"):
        operator = r.take()
        if r.i >= stop or not re.fullmatch("[1-9][0-9]{0,2}", r.token.text):
            r.fail(
                f"the exponent after {operator.text!r} must be a whole number of at "
                "least 1; for a power of a covariate write I(x ** 2).",
            )
        terms = _factors(r, base, operator)
        for _ in range(int(r.take().text) - 1):
            grown = {**terms, **_cross(terms.values(), base.terms.values())}
            if len(grown) == len(terms):
                break
            terms = grown
            _check_size(r, terms, operator)
        base = _Value(terms)
    return base


def _factors(r: Reader, value: _Value, operator: Token) -> _Terms:
    if value.zero:
        r.fail(f"0 cannot stand next to {operator.text!r}.", operator)
    return value.terms


def _check_size(r: Reader, terms: _Terms, operator: Token | None = None) -> None:
    if len(terms) > MAX_TERMS:
        r.fail(f"the formula expands to more than {MAX_TERMS} terms.", operator)


def _primary(r: Reader, stop: int) -> _Value:
    if r.i >= stop:
        r.fail("nothing stands where a term was expected. Add a term.")
    if r.token.kind == "number":
        text = r.token.text
        if text not in ("0", "1"):
            r.fail(
                f"found the number {text} as a term; only 0 and 1 (the intercept) are. "
                f"For arithmetic write I({text} * x)."
            )
        r.take()
        return _Value({}, True) if text == "0" else _Value({_ONE: ()})
    if r.at("("):
        close = r.closing(r.i)
        r.take()
        if r.i == close:
            r.fail("found empty parentheses. Put a term inside.")
        value = _sum(r, close, {})
        if r.i < close:
            _fail_unexpected(r)
        r.take()
        return value
    name = read_variable(r)
    return _Value({frozenset([name]): (name,)})


_OPERATORS = ("<", ">", "<=", ">=", "==", "!=", "&", "~", "!", "//", "%")
_WORDS = ("and", "or", "not", "in", "is", "if", "else")


def _is_truth(token: Token) -> bool:
    """Whether a token belongs to an expression and makes no term."""
    return token.is_op(*_OPERATORS) or (token.kind == "name" and token.text in _WORDS)


def _refuse_truth(r: Reader, start: int, stop: int) -> None:
    """Refuse comparisons and logic as terms: ``(x > 4)`` must be ``I(x > 4)``."""

    def found(*places: int) -> list[int]:
        return [i for i in places if start <= i < stop and _is_truth(r.tokens[i])]

    at = found(r.i, r.i - 1)
    if not at:
        return
    a, b = r.enclosing(at[0], start, stop)
    while a > start and found(a - 2, b + 1):  # one of several comparisons
        a, b = r.enclosing(a - 1, start, stop)
    if (a, b) == (start, stop):
        marks = [start - 1, *r.find(start, stop, "+", "-"), stop]
        a, b = next((m + 1, n) for m, n in pairwise(marks) if n > at[0])
    text = re.sub("!(?!=)", "~", r.source(a, b))
    r.fail(
        f"{r.tokens[at[0]].text!r} makes no term; for a column of the values that it "
        f"gives write I({text}).",
        r.tokens[at[0]],
    )


def _fail_unexpected(r: Reader) -> NoReturn:
    if r.at("|", "||"):
        r.fail("a random term needs parentheses: write (effects | group).")
    if r.token.kind == "end":
        r.fail("the formula ends where a term was expected. Add a term.")
    if r.at(*CLOSES):
        r.fail(f"found {r.token.text!r} where a term was expected. Add a term.")
    r.fail(f"found {r.token.text!r} where an operator (+, -, *, /, :, ^) was expected.")


# -- grouping factors ------------------------------------------------------------------

_Factors = list[tuple[str, ...]]  # each factor as its components


def read_groups(r: Reader, start: int, stop: int) -> list[tuple[str, ...]]:
    """Expand the grouping factors of start..stop as lme4 does, innermost first.

    Each is the tuple of its components: ``a/b`` gives ``("b", "a")`` and ``("a",)``.
    """
    r.i = start
    try:
        factors = _group_sum(r, stop)
        if r.i < stop:
            _fail_unexpected_group(r)
    except FormulaError:
        _refuse_truth(r, start, stop)
        raise
    return factors


def _group_sum(r: Reader, stop: int) -> _Factors:
    out = _group_nest(r, stop)
    while r.i < stop and r.at("+"):
        r.take()
        out = out + _group_nest(r, stop)
    return out


def _group_nest(r: Reader, stop: int) -> _Factors:
    out = _group_interaction(r, stop)
    while r.i < stop and r.at("/"):
        operator = r.take()
        inner = _group_interaction(r, stop)
        if any(set(a) - set(out[0]) for a in out):
            message = "nesting in a sum is ambiguous. Write one term per factor."
            r.fail(message, operator)
        out = [_merge(b, out[0]) for b in inner] + out
    return out


def _group_interaction(r: Reader, stop: int) -> _Factors:
    out = _group_primary(r, stop)
    while r.i < stop and r.at(":"):
        r.take()
        right = _group_primary(r, stop)
        out = [_merge(a, b) for a in out for b in right]
    return out


def _group_primary(r: Reader, stop: int) -> _Factors:
    if r.i >= stop:
        r.fail("found no grouping factor here. Name a column.")
    if r.token.kind in ("number", "string"):
        r.fail(
            f"found the constant {r.token.text} as grouping factor. Name a column "
            "whose values define the groups."
        )
    if r.at("("):
        close = r.closing(r.i)
        r.take()
        out = _group_sum(r, close)
        if r.i < close:
            _fail_unexpected_group(r)
        r.take()
        return out
    return [(read_variable(r),)]


def _fail_unexpected_group(r: Reader) -> NoReturn:
    if r.token.text == "*":
        r.fail(
            "'*' between grouping factors is not supported. Write "
            "(1 | a) + (1 | b) + (1 | a:b)."
        )
    if r.token.text in ("|", "||"):
        r.fail("a random term has one bar. Write one term per grouping factor.")
    r.fail(
        f"found {r.token.text!r} in a grouping factor; a:b, a/b and a + b are "
        "understood."
    )
