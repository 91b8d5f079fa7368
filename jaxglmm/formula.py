"""The formula language: ``y ~ x * f + (1 + x | g)`` to a fixed part and random terms.

One tokenizer and one small grammar serve the fixed part, the left of a bar and the
grouping factors. Operators, loosest first, mean what they mean in R::

    +  -          union and removal; + 0 and - 1 take the intercept away
    *  /  %in%    a * b = a + b + a:b;   a / b = a + a:b;   b %in% a = a / b
    :             interaction
    ^  **         (a + b)^2 = a + b + a:b

Anything else (``log(x)``, ``poly(x, 2)``, ``np.sqrt(x)``) is a Python expression, kept
as text and evaluated by :mod:`jaxglmm.encoding`. A random term is
``(effects | group)``, ``(effects || group)`` for uncorrelated effects or
``name(effects | group)`` for a named covariance structure.

References: Wilkinson & Rogers (1973), Appl. Stat. 22, doi:10.2307/2346786; Bates et al.
(2015), J. Stat. Softw. 67(1), doi:10.18637/jss.v067.i01.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, NoReturn

from jaxglmm.errors import FormulaError

__all__ = ["ParsedFormula", "RandomTerm", "Side", "expand", "parse", "variables"]

MAX_DEPTH = 40  # nested brackets
MAX_TERMS = 4096  # terms of one side after expansion

FULL, DIAG = "full", "diag"


@dataclass(frozen=True)
class RandomTerm:
    """One random-effects term, ``(effects | group)``.

    Attributes
    ----------
    effects : str
        What stands left of the bar, such as ``"1 + x"``; see :func:`expand`.
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
        Left of the tilde.
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


class _Token(NamedTuple):
    kind: str  # name, quoted (backticks), string, number, op or end
    text: str
    start: int
    end: int


_LEXER = re.compile(
    r"""(?P<space>\s+)
      | (?P<quoted>`[^`]+`)
      | (?P<string>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")
      | (?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
      | (?P<name>\.?[^\W\d][\w.]*)
      | (?P<op>\|\||\*\*|//|%in%|[=!<>]=|[-+*/:^~|()\[\]{},=<>%&@.;!?$])
    """,
    re.VERBOSE,
)
_CLOSES = {")": "(", "]": "[", "}": "{"}


def _fail(text: str, position: int, message: str) -> NoReturn:
    line = re.sub(r"\s", " ", text)
    raise FormulaError(f"{message}\n    {line}\n    {' ' * position}^")


@lru_cache(maxsize=512)
def _tokenize(text: str) -> tuple[_Token, ...]:
    tokens, position = [], 0
    while position < len(text):
        match = _LEXER.match(text, position)
        if match is None:
            what = text[position]
            hint = "Close the quote." if what in "`'\"" else "Leave it out."
            _fail(
                text, position, f"unexpected character {what!r} in the formula. {hint}"
            )
        if match.lastgroup != "space":
            tokens.append(
                _Token(str(match.lastgroup), match.group(), position, match.end())
            )
        position = match.end()
    tokens.append(_Token("end", "", len(text), len(text)))
    return tuple(tokens)


def _check_brackets(text: str, tokens: tuple[_Token, ...]) -> None:
    stack: list[_Token] = []
    for token in tokens:
        if token.kind != "op":
            continue
        if token.text in "([{":
            stack.append(token)
            if len(stack) > MAX_DEPTH:
                _fail(text, token.start, f"more than {MAX_DEPTH} nested brackets.")
        elif token.text in _CLOSES:
            if not stack or stack[-1].text != _CLOSES[token.text]:
                _fail(
                    text,
                    token.start,
                    f"unbalanced {token.text!r}: no {_CLOSES[token.text]!r} opens it. "
                    "Remove it or add the opening one.",
                )
            stack.pop()
    if stack:
        _fail(
            text,
            stack[-1].start,
            f"unbalanced {stack[-1].text!r}: it is never closed. Add the closing one.",
        )


# Terms of a side are kept as {variables as a set: variables as written}; the empty set
# is the intercept. `zero` marks a literal 0, which only a sum understands.
_Terms = dict[frozenset[str], tuple[str, ...]]


class _Value(NamedTuple):
    terms: _Terms
    zero: bool = False


def _merge(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(left + right))


def _collect(terms: Iterable[tuple[str, ...]]) -> _Terms:
    out: _Terms = {}
    for term in terms:
        out.setdefault(frozenset(term), term)
    return out


def _cross(left: _Terms, right: _Terms) -> _Terms:
    return _collect(_merge(a, b) for a in left.values() for b in right.values())


def _nest(parents: _Terms, nested: _Terms) -> _Terms:
    everything = tuple(dict.fromkeys(v for t in parents.values() for v in t))
    return {**parents, **_cross(_collect([everything]), nested)}


class _Parser:
    """Recursive descent over the tokens of one formula; errors point into its text."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = _tokenize(text)
        self.i = 0
        _check_brackets(text, self.tokens)

    # -- tokens ------------------------------------------------------------------------

    @property
    def token(self) -> _Token:
        return self.tokens[self.i]

    def at(self, *ops: str) -> bool:
        return self.token.kind == "op" and self.token.text in ops

    def take(self) -> _Token:
        token = self.token
        self.i += 1
        return token

    def fail(self, message: str, token: _Token | None = None) -> NoReturn:
        _fail(self.text, (token or self.token).start, message)

    def source(self, start: int, stop: int) -> str:
        """Text of the tokens start..stop, on one line."""
        if start >= stop:
            return ""
        text = self.text[self.tokens[start].start : self.tokens[stop - 1].end]
        return re.sub(r"\s+", " ", text)

    def closing(self, i: int) -> int:
        """Index of the bracket that closes the one at i."""
        depth = 0
        for j in range(i, len(self.tokens)):
            if self.tokens[j].kind == "op":
                depth += self.tokens[j].text in "([{"
                depth -= self.tokens[j].text in _CLOSES
            if depth == 0:
                return j
        raise AssertionError("brackets were checked")

    def shallow(self, start: int, stop: int) -> Iterable[int]:
        """Give the indices of start..stop that no bracket inside encloses."""
        i = start
        while i < stop:
            yield i
            token = self.tokens[i]
            opens = token.kind == "op" and token.text in "([{"
            i = self.closing(i) + 1 if opens else i + 1

    def find(self, start: int, stop: int, *ops: str) -> list[int]:
        """Find the operators among the shallow tokens of start..stop."""
        return [
            i
            for i in self.shallow(start, stop)
            if self.tokens[i].kind == "op" and self.tokens[i].text in ops
        ]

    # -- Wilkinson-Rogers algebra ------------------------------------------------------

    def side(self, start: int, stop: int) -> Side:
        """Terms of the tokens start..stop."""
        self.i = start
        value = self.sum(stop, _Value({frozenset(): ()}))
        if self.i < stop:
            self.unexpected()
        order = self.appearance(start, stop)
        terms = [
            tuple(sorted(term, key=lambda v: order.get(v, len(order))))
            for term in value.terms.values()
            if term
        ]
        return Side(frozenset() in value.terms, tuple(sorted(terms, key=len)))

    def appearance(self, start: int, stop: int) -> dict[str, int]:
        order: dict[str, int] = {}
        i = start
        while i < stop:
            if self.tokens[i].kind in ("name", "quoted") or self.tokens[i].text == "{":
                self.i = i
                order.setdefault(self.atom(), i)
                i = self.i
            else:
                i += 1
        return order

    def unexpected(self) -> NoReturn:
        token = self.token
        if token.text == "|" or token.text == "||":
            self.fail("a random term needs parentheses: write (effects | group).")
        if token.kind == "end":
            self.fail("the formula ends where a term was expected. Add a term.")
        if token.text in _CLOSES:
            self.fail(f"found {token.text!r} where a term was expected. Add a term.")
        self.fail(
            f"found {token.text!r} where an operator (+, -, *, /, :, ^) was expected."
        )

    def sum(self, stop: int, value: _Value | None = None) -> _Value:
        terms = dict(value.terms) if value else {}
        zero, first = False, True
        while self.i < stop and (first or self.at("+", "-")):
            minus, first = False, False
            while self.at("+", "-"):
                minus ^= self.take().text == "-"
            right = self.product(stop)
            if minus:
                terms = {k: v for k, v in terms.items() if k not in right.terms}
            else:
                terms = terms | right.terms
            if right.zero and minus:
                terms.setdefault(frozenset(), ())
                zero = False
            elif right.zero or (minus and frozenset() in right.terms):
                terms.pop(frozenset(), None)
                zero = True
            elif frozenset() in right.terms:
                zero = False
            if len(terms) > MAX_TERMS:
                self.fail(f"the formula expands to more than {MAX_TERMS} terms.")
        return _Value(terms, zero)

    def product(self, stop: int) -> _Value:
        left = self.interaction(stop)
        while self.i < stop and self.at("*", "/", "%in%"):
            operator = self.take()
            right = self.interaction(stop)
            a, b = self.factors(left, operator), self.factors(right, operator)
            if operator.text == "*":
                left = _Value({**a, **b, **_cross(a, b)})
            elif operator.text == "/":
                left = _Value(_nest(a, b))
            else:
                left = _Value(_nest(b, a))
            self.limit(left, operator)
        return left

    def interaction(self, stop: int) -> _Value:
        left = self.power(stop)
        while self.i < stop and self.at(":"):
            operator = self.take()
            right = self.power(stop)
            a, b = self.factors(left, operator), self.factors(right, operator)
            left = _Value(_cross(a, b))
            self.limit(left, operator)
        return left

    def power(self, stop: int) -> _Value:
        base = self.primary(stop)
        while self.i < stop and self.at("^", "**"):
            operator = self.take()
            token = self.token
            if self.i >= stop or not re.fullmatch("[1-9][0-9]{0,2}", token.text):
                self.fail(
                    f"the exponent after {operator.text!r} must be a whole number of "
                    "at least 1; for a power of a covariate write I(x ** 2).",
                )
            self.take()
            terms = self.factors(base, operator)
            for _ in range(int(token.text) - 1):
                grown = {**terms, **_cross(terms, base.terms)}
                if len(grown) == len(terms):
                    break
                terms = grown
                self.limit(_Value(terms), operator)
            base = _Value(terms)
        return base

    def factors(self, value: _Value, operator: _Token) -> _Terms:
        if value.zero:
            self.fail(f"0 cannot stand next to {operator.text!r}.", operator)
        return value.terms

    def limit(self, value: _Value, operator: _Token) -> None:
        if len(value.terms) > MAX_TERMS:
            message = f"the formula expands to more than {MAX_TERMS} terms."
            self.fail(message, operator)

    def primary(self, stop: int) -> _Value:
        token = self.token
        if self.i >= stop:
            self.fail("nothing stands where a term was expected. Add a term.")
        if token.kind == "number":
            if token.text not in ("0", "1"):
                self.fail(
                    f"found the number {token.text} as a term; only 0 and 1 (the "
                    f"intercept) are. For arithmetic write I({token.text} * x)."
                )
            self.take()
            return _Value({}, True) if token.text == "0" else _Value({frozenset(): ()})
        if self.at("("):
            close = self.closing(self.i)
            self.take()
            if self.i == close:
                self.fail("found empty parentheses. Put a term inside.")
            value = self.sum(close)
            if self.i < close:
                self.unexpected()
            self.take()
            return value
        name = self.atom()
        return _Value({frozenset([name]): (name,)})

    def atom(self) -> str:
        """Take a variable: a name or a Python expression, in canonical spelling."""
        first, start = self.token, self.i
        if self.at("{"):
            close = self.closing(self.i)
            self.i = close + 1
            return self.python(start + 1, close)
        if first.kind not in ("name", "quoted"):
            if self.at("."):
                self.fail("'.' is not supported as a term. Name the columns.")
            if first.kind == "end" or first.text in _CLOSES or first.kind == "op":
                found = repr(first.text) if first.text else "the end of the formula"
                self.fail(f"found {found} where a term was expected. Add a term.")
            self.fail(
                f"found the text {first.text} as a term. A column whose name needs "
                "quotes goes in backticks: `my column`."
            )
        self.take()
        while self.at("(", "[") or self.attribute():
            self.i = self.closing(self.i) + 1 if self.at("(", "[") else self.i + 1
        return self.python(start, self.i)

    def attribute(self) -> bool:
        token = self.token
        adjacent = token.start == self.tokens[self.i - 1].end
        return token.kind == "name" and token.text.startswith(".") and adjacent

    def python(self, start: int, stop: int) -> str:
        """Canonical spelling of the Python expression in tokens start..stop."""
        tokens = self.tokens[start:stop]
        if not tokens:
            self.fail("found empty brackets. Put an expression inside.")
        if len(tokens) == 1 and tokens[0].kind == "quoted":
            inner = tokens[0].text[1:-1]
            plain = re.fullmatch(r"[^\W\d][\w.]*", inner) and not keyword.iskeyword(
                inner
            )
            return inner if plain else tokens[0].text
        if len(tokens) == 1 and tokens[0].kind == "name":
            return tokens[0].text
        for token in tokens:
            if token.text == "^" and token.kind == "op":
                self.fail("inside an expression a power is written **, not ^.", token)
        return self.unparse(tokens)

    def unparse(self, tokens: tuple[_Token, ...]) -> str:
        aliases = {
            t.text: f"_quoted_{i}_" for i, t in enumerate(tokens) if t.kind == "quoted"
        }
        code = " ".join(aliases.get(t.text, t.text) for t in tokens)
        code = re.sub(r"\s+(?=\.[^\W\d])", "", code)
        try:
            out = ast.unparse(ast.parse(code, mode="eval")).replace("\n", " ")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            shown = self.text[tokens[0].start : tokens[-1].end]
            reason = getattr(error, "msg", None) or str(error)
            message = f"{shown!r} is not a valid Python expression ({reason})."
            self.fail(message, tokens[0])
        for quoted, alias in aliases.items():
            out = out.replace(alias, quoted)
        return out

    # -- grouping factors --------------------------------------------------------------

    def group(self, start: int, stop: int) -> list[tuple[str, ...]]:
        """Expand the grouping factors of start..stop as lme4 does, innermost first."""
        self.i = start
        factors = self.group_sum(stop)
        if self.i < stop:
            self.group_unexpected()
        return factors

    def group_sum(self, stop: int) -> list[tuple[str, ...]]:
        out = self.group_nest(stop)
        while self.i < stop and self.at("+"):
            self.take()
            out = out + self.group_nest(stop)
        return out

    def group_nest(self, stop: int) -> list[tuple[str, ...]]:
        out = self.group_interaction(stop)
        while self.i < stop and self.at("/"):
            operator = self.take()
            inner = self.group_interaction(stop)
            if any(set(a) - set(out[0]) for a in out):
                message = "nesting in a sum is ambiguous. Write one term per factor."
                self.fail(message, operator)
            out = [_merge(b, out[0]) for b in inner] + out
        return out

    def group_interaction(self, stop: int) -> list[tuple[str, ...]]:
        out = self.group_primary(stop)
        while self.i < stop and self.at(":"):
            self.take()
            right = self.group_primary(stop)
            out = [_merge(a, b) for a in out for b in right]
        return out

    def group_primary(self, stop: int) -> list[tuple[str, ...]]:
        if self.i >= stop:
            self.fail("found no grouping factor here. Name a column.")
        if self.token.kind in ("number", "string"):
            self.fail(
                f"found the constant {self.token.text} as grouping factor. Name a "
                "column whose values define the groups."
            )
        if self.at("("):
            close = self.closing(self.i)
            self.take()
            out = self.group_sum(close)
            if self.i < close:
                self.group_unexpected()
            self.take()
            return out
        return [(self.atom(),)]

    def group_unexpected(self) -> NoReturn:
        token = self.token
        if token.text == "*":
            self.fail(
                "'*' between grouping factors is not supported. Write "
                "(1 | a) + (1 | b) + (1 | a:b)."
            )
        if token.text in ("|", "||"):
            self.fail("a random term has one bar. Write one term per grouping factor.")
        self.fail(
            f"found {token.text!r} in a grouping factor; a:b, a/b and a + b are "
            "understood."
        )

    # -- random terms ------------------------------------------------------------------

    def random_term(self, start: int, stop: int) -> list[RandomTerm] | None:
        """Read the random terms of start..stop; None where it holds no bar."""
        named = self.tokens[start].kind == "name"
        opening = start + named
        if opening >= stop or self.tokens[opening].text != "(":
            return None
        if self.closing(opening) != stop - 1 or self.tokens[start].text == "I":
            return None
        bars = self.find(opening + 1, stop - 1, "|", "||")
        if not bars:
            return None
        structure = self.tokens[start].text if named else FULL
        return self.bar(
            opening + 1, bars, stop - 1, structure, self.source(start, stop)
        )

    def bar(
        self, start: int, bars: list[int], stop: int, structure: str, text: str
    ) -> list[RandomTerm]:
        bar = bars[0]
        split = self.tokens[bar].text == "||"
        if len(bars) > 1:
            message = "a random term has one bar. Write one term per grouping factor."
            self.fail(message, self.tokens[bars[1]])
        if bar == start:
            message = "the left of the bar is empty. For an intercept write (1 | g)."
            self.fail(message, self.tokens[bar])
        if bar + 1 == stop:
            message = "no grouping factor right of the bar. Write (effects | group)."
            self.fail(message, self.tokens[bar])
        if split and structure != FULL:
            message = f"{structure}(...) takes a single bar; || has its own structure."
            self.fail(message, self.tokens[bar])
        side = self.side(start, bar)
        if not (side.intercept or side.terms):
            message = "no effect left of the bar. Write (1 | g) or leave the term out."
            self.fail(message, self.tokens[start])
        effects = [self.source(start, bar)]
        if split:
            effects = ["1"] * side.intercept + [
                f"0 + {':'.join(t)}" for t in side.terms
            ]
        return [
            RandomTerm(effect, ":".join(factors), structure, text, factors)
            for factors in self.group(bar + 1, stop)
            for effect in effects
        ]

    # -- the whole ---------------------------------------------------------------------

    def pieces(self, start: int, stop: int) -> Iterable[tuple[bool, int, int]]:
        """Split start..stop at its own + and -: (removed?, start, stop)."""
        minus, i = False, start
        marks = [*self.find(start, stop, "+", "-"), stop]
        for mark in marks:
            if mark > i:
                yield minus, i, mark
                minus = False
            elif mark == stop:
                what = "the formula ends with an operator" if i > start else "no terms"
                token = self.tokens[i - 1] if i > start else self.tokens[i]
                self.fail(f"{what}. Add a term after it.", token)
            if mark < stop:
                minus ^= self.tokens[mark].text == "-"
            i = mark + 1

    def formula(self) -> ParsedFormula:
        response, start = self.response()
        stop = len(self.tokens) - 1
        if start == stop:
            self.fail("nothing right of '~'. Add terms.", self.tokens[start - 1])
        fixed: list[tuple[bool, int, int]] = []
        offsets: list[str] = []
        random: list[RandomTerm] = []
        self.sort_pieces(start, stop, fixed, offsets, random)
        if not random:
            self.fail(
                "no random effects. Add a term such as (1 | g), or fit a model without "
                "them by statsmodels' OLS or GLM.",
                self.tokens[start],
            )
        text = " ".join(
            ("- " if minus else "+ ") + self.source(a, b) for minus, a, b in fixed
        )
        text = text.removeprefix("+ ")
        text = "-" + text[2:] if text.startswith("- ") else text
        line = re.sub(r"\s+", " ", self.text).strip()
        return ParsedFormula(response, text or "1", tuple(offsets), tuple(random), line)

    def response(self) -> tuple[str, int]:
        last = len(self.tokens) - 1
        tildes = self.find(0, last, "~")
        if not tildes:
            message = (
                "no '~' in the formula. Write: response ~ terms + (effects | group)"
            )
            self.fail(message, self.tokens[last])
        if len(tildes) > 1:
            message = "a second '~' in the formula; one separates response and terms."
            self.fail(message, self.tokens[tildes[1]])
        if tildes[0] == 0:
            self.fail("nothing left of '~'. Name the response.", self.tokens[0])
        for i in range(tildes[0]):
            if self.tokens[i].text in ("|", "||") and self.tokens[i].kind == "op":
                message = "a bar in the response. Random terms stand right of '~'."
                self.fail(message, self.tokens[i])
        return self.python(0, tildes[0]), tildes[0] + 1

    def sort_pieces(
        self,
        start: int,
        stop: int,
        fixed: list[tuple[bool, int, int]],
        offsets: list[str],
        random: list[RandomTerm],
    ) -> None:
        """Deal the pieces of start..stop out to the three lists."""
        for minus, a, b in self.pieces(start, stop):
            terms = self.random_term(a, b)
            if terms is not None:
                if minus:
                    message = "a random term cannot be removed with '-'. Leave it out."
                    self.fail(message, self.tokens[a])
                random += terms
            elif self.is_offset(a, b):
                if minus:
                    message = "an offset cannot be removed with '-'. Leave it out."
                    self.fail(message, self.tokens[a])
                offsets.append(self.python(a + 2, b - 1))
            elif self.encloses_bar(a, b) and not minus:
                self.sort_pieces(a + 1, b - 1, fixed, offsets, random)
            else:
                self.check_fixed(a, b)
                fixed.append((minus, a, b))

    def is_offset(self, a: int, b: int) -> bool:
        return (
            self.tokens[a].text == "offset"
            and self.tokens[a + 1].text == "("
            and self.closing(a + 1) == b - 1
        )

    def encloses_bar(self, a: int, b: int) -> bool:
        """Whether a..b is one pair of parentheses around a sum with a random term."""
        if self.tokens[a].text != "(" or self.closing(a) != b - 1:
            return False
        return any(
            self.tokens[i].kind == "op" and self.tokens[i].text == "("
            for i in range(a + 1, b - 1)
        ) and any(
            self.random_term(c, d) is not None or self.encloses_bar(c, d)
            for _, c, d in self.pieces(a + 1, b - 1)
        )

    def check_fixed(self, a: int, b: int) -> None:
        side = self.side(a, b)
        for variable in side.variables:
            if variable.startswith("offset("):
                message = "offset(...) must be added with '+'."
                self.fail(message, self.tokens[a])


@lru_cache(maxsize=512)
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
    return _Parser(formula).formula()


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

    Examples
    --------
    >>> expand("x * f - 1").terms
    (('x',), ('f',), ('x', 'f'))
    """
    parser = _Parser(side)
    return parser.side(0, len(parser.tokens) - 1)


@lru_cache(maxsize=1024)
def variables(expression: str) -> frozenset[str]:
    """Names in a Python expression that may be columns.

    Function names, keyword arguments and attributes are left out, the object of a
    method is not; backticks are taken off. A dotted name, ``total.fruits``, is returned
    whole.

    Examples
    --------
    >>> sorted(variables("bs(x, df=4) + log(`my z`)"))
    ['my z', 'x']
    """
    names = (name for _, name in _named_tokens(expression))
    return frozenset(name for name in names if name)


def _named_tokens(expression: str) -> Iterable[tuple[_Token, str]]:
    """Give each token with the column name it may stand for, or an empty string."""
    for token, following in pairwise(_tokenize(expression)):
        name = ""
        if token.kind == "quoted":
            name = token.text[1:-1]
        elif token.kind == "name" and not keyword.iskeyword(token.text):
            if following.text == "(":
                name = token.text.rpartition(".")[0]  # the object of a method
            elif following.text != "=" and not token.text.startswith("."):
                name = token.text
        yield token, name


def rewrite(expression: str, replace: Callable[[str], str]) -> str:
    """Replace what :func:`variables` finds in an expression.

    `replace` gets a name without backticks, with its attributes if it has any.
    """
    parts, position = [], 0
    for token, name in _named_tokens(expression):
        parts.append(expression[position : token.start])
        text = token.text[1:-1] if token.kind == "quoted" else token.text
        parts.append(replace(text) if name else token.text)
        position = token.end
    return "".join(parts)
