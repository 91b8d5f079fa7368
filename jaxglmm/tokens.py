"""A formula cut into tokens, and a reader that walks them and points at mistakes.

A token is a name (dots included: ``total.fruits``, ``.x``), a name in backticks, an
attribute (a name with a leading dot behind an operand: ``f(x).real``), a string, a
number, an operator or the end. Every error repeats the formula on one line with a caret
under the token it is about::

    found '.' where a term was expected. Add a term.
        y ~ x + . + (1 | g)
                ^
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, NoReturn

from jaxglmm.errors import FormulaError

__all__ = ["CLOSES", "OPENS", "Reader", "Token", "tokenize"]

MAX_DEPTH = 40  # nested brackets
OPENS = "([{"
CLOSES = {")": "(", "]": "[", "}": "{"}

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


class Token(NamedTuple):
    """A piece of the formula and where it stands."""

    kind: str  # name, quoted (backticks), attribute, string, number, op or end
    text: str
    start: int
    end: int

    def is_op(self, *ops: str) -> bool:
        """Whether this is one of the operators."""
        return self.kind == "op" and self.text in ops

    @property
    def ends_operand(self) -> bool:
        """Whether what follows can be an attribute."""
        if self.kind == "name":
            return not keyword.iskeyword(self.text)
        return self.kind not in ("op", "end") or self.is_op(*CLOSES)


@lru_cache(maxsize=512)
def tokenize(text: str) -> tuple[Token, ...]:
    """Cut a formula into tokens, the last one of kind ``"end"``.

    Raises
    ------
    FormulaError
        At a character that starts no token.
    """
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        match = _LEXER.match(text, position)
        if match is None:
            what = text[position]
            hint = "Close the quote." if what in "`'\"" else "Leave it out."
            message = f"unexpected character {what!r} in the formula. {hint}"
            _fail(text, position, message)
        if match.lastgroup != "space":
            kind = str(match.lastgroup)
            dotted = kind == "name" and match.group().startswith(".")
            if dotted and tokens and tokens[-1].ends_operand:
                kind = "attribute"
            tokens.append(Token(kind, match.group(), position, match.end()))
        position = match.end()
    tokens.append(Token("end", "", len(text), len(text)))
    return tuple(tokens)


def _fail(text: str, position: int, message: str) -> NoReturn:
    line = re.sub(r"\s", " ", text)
    raise FormulaError(f"{message}\n    {line}\n    {' ' * position}^")


class Reader:
    """A place `i` among the tokens of one formula, whose brackets are balanced.

    Functions that read a part of the formula take the reader, start at its place and
    leave it behind what they have read; `stop` is the token they must not pass.
    """

    def __init__(self, text: str):
        self.text = text
        self.tokens = tokenize(text)
        self.i = 0
        self._check_brackets()

    def _check_brackets(self) -> None:
        stack: list[Token] = []
        for token in self.tokens:
            if token.is_op(*OPENS):
                stack.append(token)
                if len(stack) > MAX_DEPTH:
                    self.fail(f"more than {MAX_DEPTH} nested brackets.", token)
            elif token.is_op(*CLOSES):
                opening = CLOSES[token.text]
                if not stack or stack[-1].text != opening:
                    self.fail(
                        f"unbalanced {token.text!r}: no {opening!r} opens it. "
                        "Remove it or add the opening one.",
                        token,
                    )
                stack.pop()
        if stack:
            what = f"unbalanced {stack[-1].text!r}: it is never closed."
            self.fail(f"{what} Add the closing one.", stack[-1])

    @property
    def token(self) -> Token:
        """The token at the place."""
        return self.tokens[self.i]

    def at(self, *ops: str) -> bool:
        """Whether the reader is at one of the operators."""
        return self.token.is_op(*ops)

    def take(self) -> Token:
        """Step over the token at the place and return it."""
        token = self.token
        self.i += 1
        return token

    def fail(self, message: str, token: Token | None = None) -> NoReturn:
        """Raise a FormulaError that points at a token, by default the one here."""
        _fail(self.text, (token or self.token).start, message)

    def source(self, start: int, stop: int) -> str:
        """Text of the tokens start..stop, blanks between them as one."""
        tokens = self.tokens[start:stop]
        gaps = (" " * (b.start > a.end) for a, b in pairwise(tokens))
        return "".join(t.text + gap for t, gap in zip(tokens, [*gaps, ""]))

    def closing(self, i: int) -> int:
        """Index of the bracket that closes the one at i."""
        depth = 0
        for j in range(i, len(self.tokens)):
            depth += self.tokens[j].is_op(*OPENS)
            depth -= self.tokens[j].is_op(*CLOSES)
            if depth == 0:
                return j
        raise AssertionError("brackets were checked")

    def enclosing(self, i: int, start: int, stop: int) -> tuple[int, int]:
        """Tokens inside the innermost brackets around i within start..stop."""
        pairs = ((a, self.closing(a)) for a in range(i - 1, start - 1, -1)
                 if self.tokens[a].is_op(*OPENS))  # fmt: skip
        return next(((a + 1, b) for a, b in pairs if b > i), (start, stop))

    def find(self, start: int, stop: int, *ops: str) -> list[int]:
        """Find the operators among the tokens of start..stop outside brackets."""
        return [i for i in self._shallow(start, stop) if self.tokens[i].is_op(*ops)]

    def _shallow(self, start: int, stop: int) -> Iterable[int]:
        """Give the indices of start..stop that no bracket inside encloses."""
        i = start
        while i < stop:
            yield i
            i = self.closing(i) + 1 if self.tokens[i].is_op(*OPENS) else i + 1
