"""Python expressions inside a formula, as text: their spelling and their names.

An expression is a column, in backticks where its name is no Python name, or any Python
such as ``bs(x, df=4)``. Equal expressions are spelt alike, so that ``poly( x,2 )`` and
``poly(x, 2)`` are one variable. What the names stand for is the business of
:mod:`jaxglmm.evaluate`.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

from jaxglmm.tokens import Reader, Token, tokenize

__all__ = ["column_of", "read_variable", "rewrite", "spelling", "variables"]


# keywords that no expression holds: they can only be columns
_STATEMENTS = frozenset(keyword.kwlist) - {
    *("and", "or", "not", "in", "is", "if", "else", "for", "True", "False", "None")
}


def read_variable(r: Reader) -> str:
    """Take a variable, a name or a Python expression, in canonical spelling."""
    start = r.i
    if r.at("{"):
        r.i = r.closing(start) + 1
        return spelling(r, start + 1, r.i - 1)
    if r.token.kind not in ("name", "quoted"):
        _fail_no_variable(r)
    r.take()
    while r.at("(", "[") or _at_attribute(r):
        r.i = r.closing(r.i) + 1 if r.at("(", "[") else r.i + 1
    return spelling(r, start, r.i)


def _fail_no_variable(r: Reader) -> NoReturn:
    text = r.token.text
    if r.at("."):
        r.fail("'.' is not supported as a term. Name the columns.")
    if r.token.kind in ("end", "op"):
        found = repr(text) if text else "the end of the formula"
        r.fail(f"found {found} where a term was expected. Add a term.")
    r.fail(
        f"found the text {text} as a term. A column whose name needs quotes goes in "
        "backticks: `my column`."
    )


def _at_attribute(r: Reader) -> bool:
    adjacent = r.token.start == r.tokens[r.i - 1].end
    return r.token.kind == "name" and r.token.text.startswith(".") and adjacent


def spelling(r: Reader, start: int, stop: int) -> str:
    """Canonical spelling of the Python expression in the tokens start..stop."""
    tokens = r.tokens[start:stop]
    if not tokens:
        r.fail("found empty brackets. Put an expression inside.")
    first = tokens[0]
    if len(tokens) == 1 and first.kind == "quoted":
        inner = first.text[1:-1]
        plain = re.fullmatch(r"[^\W\d][\w.]*", inner) and not keyword.iskeyword(inner)
        return inner if plain else first.text
    if len(tokens) == 1 and first.kind == "name":
        return f"`{first.text}`" if keyword.iskeyword(first.text) else first.text
    return _unparse(r, tokens)


def _unparse(r: Reader, tokens: tuple[Token, ...]) -> str:
    aliases = {
        t.text: f"_quoted_{i}_"
        for i, t in enumerate(tokens)
        if t.kind == "quoted" or (t.kind == "name" and t.text in _STATEMENTS)
    }
    # ^ is a power, as everywhere in a formula
    texts = ["**" if t.is_op("^") else t.text for t in tokens]
    code = " ".join(aliases.get(text, text) for text in texts)
    code = re.sub(r"\s+(?=\.[^\W\d])", "", code)
    try:
        out = ast.unparse(ast.parse(code, mode="eval")).replace("\n", " ")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = r.text[tokens[0].start : tokens[-1].end]
        reason = getattr(error, "msg", None) or str(error)
        message = f"{shown!r} is not a valid Python expression ({reason})."
        r.fail(message, tokens[0])
    for quoted, alias in aliases.items():
        plain = quoted in _STATEMENTS
        out = out.replace(alias, f"`{quoted}`" if plain else quoted)
    return out


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
    return frozenset(name for _, name in _named_tokens(expression) if name)


def column_of(expression: str) -> str | None:
    """Name the column that an expression is; None where it has to be evaluated."""
    if expression.startswith("`") and expression.find("`", 1) == len(expression) - 1:
        return expression[1:-1]
    return expression if variables(expression) == {expression} else None


def rewrite(expression: str, replace: Callable[[str], str]) -> str:
    """Replace what :func:`variables` finds in an expression.

    `replace` gets a name without backticks, with its attributes if it has any.
    """
    parts, position = [], 0
    for token, name in _named_tokens(expression):
        parts.append(expression[position : token.start])
        parts.append(replace(_bare(token)) if name else token.text)
        position = token.end
    return "".join(parts)


def _named_tokens(expression: str) -> Iterable[tuple[Token, str]]:
    """Give each token with the column name it may stand for, or an empty string."""
    for token, following in pairwise(tokenize(expression)):
        name = ""
        if token.kind == "quoted":
            name = _bare(token)
        elif token.kind == "name" and not keyword.iskeyword(token.text):
            if following.text == "(":
                name = token.text.rpartition(".")[0]  # the object of a method
            elif following.text != "=" and not token.text.startswith("."):
                name = token.text
        yield token, name


def _bare(token: Token) -> str:
    """Text of a name without its backticks."""
    return token.text[1:-1] if token.kind == "quoted" else token.text
