"""Expressions inside a formula, as text and as trees.

An expression is a column, in backticks where its name is no Python name, or an
expression in Python's grammar such as ``bs(x, df=4)``. Equal expressions are spelt
alike, so that ``poly( x,2 )`` and ``poly(x, 2)`` are one variable.

An expression is data: its tree holds names, numbers, text, lists, dicts, operators,
attributes, subscripts and calls, and whatever else Python has is refused here. What the
names stand for is the business of :mod:`jaxglmm.evaluate`.
"""

from __future__ import annotations

import ast
import keyword
import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import NamedTuple, NoReturn

from jaxglmm.tokens import Reader, Token

__all__ = [
    "Tree",
    "canonical",
    "column_of",
    "dotted",
    "find_column",
    "quote",
    "read_variable",
    "references",
    "shown",
    "spelling",
    "tree",
]

MAX_DEPTH = 100  # of a tree, which is walked by recursion
_PLAIN = re.compile(r"\.?[^\W\d][\w.]*")
# keywords that no expression holds: they can only be columns
_STATEMENTS = frozenset(keyword.kwlist) - {
    *("and", "or", "not", "in", "is", "if", "else", "for", "True", "False", "None")
}
_NODES = (
    *(ast.Name, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Load),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
    *(ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.Invert),
    *(ast.BitAnd, ast.BitOr, ast.BoolOp, ast.And, ast.Or, ast.IfExp),
    *(ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq),
    *(ast.In, ast.NotIn),
    *(ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Slice),
)
_REFUSED = {
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.JoinedStr: "an f-string",
    ast.NamedExpr: "an assignment",
    ast.Starred: "a starred argument",
    ast.Set: "a set",
}
_CONSTANTS = (bool, int, float, str, type(None))


class Tree(NamedTuple):
    """An expression taken apart."""

    node: ast.expr
    names: dict[str, str]  # what the names in it that Python cannot spell stand for


# -- reading ---------------------------------------------------------------------------


def read_variable(r: Reader) -> str:
    """Take a variable, a name or an expression, in canonical spelling."""
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
    return r.token.kind == "attribute" and adjacent


def canonical(expression: str) -> str:
    """Canonical spelling of an expression on its own.

    Raises
    ------
    FormulaError
        If it is none, or holds what no formula may.
    """
    r = Reader(expression)
    return spelling(r, 0, len(r.tokens) - 1)


def spelling(r: Reader, start: int, stop: int) -> str:
    """Canonical spelling of the expression in the tokens start..stop."""
    tokens = r.tokens[start:stop]
    if not tokens:
        r.fail("found empty brackets. Put an expression inside.")
    if len(tokens) == 1 and tokens[0].kind in ("name", "quoted"):
        return quote(_bare(tokens[0]))
    aliases = _aliases(tokens)
    out = ast.unparse(_parse(r, tokens, aliases)).replace("\n", " ")
    for text, alias in aliases.items():
        out = out.replace(alias, f"`{text}`" if text in _STATEMENTS else text)
    return out


def quote(name: str) -> str:
    """A column's name as a formula has it, in backticks where it needs them."""
    plain = _PLAIN.fullmatch(name) and not keyword.iskeyword(name)
    return name if plain else f"`{name}`"


@lru_cache(maxsize=1024)
def tree(expression: str) -> Tree:
    """Take an expression in canonical spelling apart."""
    r = Reader(expression)
    tokens = r.tokens[:-1]
    aliases = _aliases(tokens)
    names = {alias: text.strip("`") for text, alias in aliases.items()}
    return Tree(_parse(r, tokens, aliases), names)


def _aliases(tokens: tuple[Token, ...]) -> dict[str, str]:
    """Python names for those tokens that name a column and are none."""
    prefix = "_alias"
    while any(prefix in t.text for t in tokens):
        prefix += "_"
    named = (t.text for t in tokens if t.kind == "quoted" or _unspeakable(t))
    return {text: f"{prefix}{i}_" for i, text in enumerate(dict.fromkeys(named))}


def _unspeakable(token: Token) -> bool:
    """Whether a name is none to Python, which also folds some letters into others."""
    if token.kind != "name" or token.text in _STATEMENTS:
        return token.text in _STATEMENTS
    parts = token.text.split(".")
    dotted = len(parts) > 1 and any(keyword.iskeyword(p) for p in parts)
    folded = unicodedata.normalize("NFKC", token.text) != token.text
    return dotted or folded or not all(p.isidentifier() for p in parts)


def _parse(r: Reader, tokens: tuple[Token, ...], aliases: dict[str, str]) -> ast.expr:
    # ^ is a power, as everywhere in a formula
    code = ""
    for t in tokens:
        text = aliases.get(t.text, t.text) if t.kind in ("name", "quoted") else t.text
        gap = " " * (t.kind != "attribute")
        code += gap + ("**" if t.is_op("^") else text)
    try:
        node = ast.parse(code.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = r.text[tokens[0].start : tokens[-1].end]
        reason = getattr(error, "msg", None) or str(error) or "nested too deep"
        message = f"{shown!r} is not a valid expression ({reason})."
        r.fail(message, tokens[0])
    _check_nodes(r, node, tokens[0])
    return node


def _check_nodes(r: Reader, node: ast.expr, place: Token) -> None:
    stack: list[tuple[ast.AST, int]] = [(node, 1)]
    while stack:
        found, depth = stack.pop()
        if depth > MAX_DEPTH:
            r.fail(f"the expression is nested more than {MAX_DEPTH} deep.", place)
        what = _refusal(found)
        if what:
            r.fail(
                f"the expression holds {what}, which a formula cannot have. Functions "
                "of your own come in by functions={'f': f}.",
                place,
            )
        stack += [(child, depth + 1) for child in ast.iter_child_nodes(found)]


def _refusal(node: ast.AST) -> str | None:
    """Name what no formula may hold; None where all is well."""
    if not isinstance(node, _NODES):
        kind = type(node).__name__.lower()
        return _REFUSED.get(type(node), f"Python's {kind!r}")
    if isinstance(node, ast.Constant) and not isinstance(node.value, _CONSTANTS):
        return f"the constant {node.value!r}"
    if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
        return f"the private name '.{node.attr}'"
    if isinstance(node, ast.keyword) and (node.arg is None or node.arg[0] == "_"):
        return "'**'" if node.arg is None else f"the private argument {node.arg!r}"
    func = node.func if isinstance(node, ast.Call) else None
    if isinstance(func, ast.Name) and func.id.startswith("__"):
        return f"the private function {func.id!r}"
    if isinstance(node, ast.Dict) and None in node.keys:
        return "'**'"
    return None


# -- names -----------------------------------------------------------------------------


def column_of(expression: str) -> str | None:
    """Name the column that an expression is; None where it has to be evaluated."""
    if expression.startswith("`") and expression.find("`", 1) == len(expression) - 1:
        return expression[1:-1]
    return expression if _PLAIN.fullmatch(expression) else None


def shown(found: Tree, node: ast.AST) -> str:
    """Text of a part of an expression."""
    out = ast.unparse(node)
    for alias, name in found.names.items():
        out = out.replace(alias, quote(name))
    return out


def dotted(found: Tree, node: ast.AST) -> tuple[str, ...] | None:
    """Parts of a name with its attributes, ``("x", "dt", "year")``; None for others."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return (found.names.get(node.id, node.id), *reversed(attributes))


def find_column(parts: tuple[str, ...], names: Collection[str]) -> tuple[str, int]:
    """Longest beginning of a dotted name that is a column, and how many parts it has.

    ``("total", "fruits", "real")`` is an attribute of ``total.fruits`` where there is
    such a column. An empty name and 0 where there is none.
    """
    for k in range(len(parts), 0, -1):
        name = ".".join(parts[:k])
        if name in names:
            return name, k
    return "", 0


def references(found: Tree) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Give every name of an expression with its attributes, and whether it is called.

    Examples
    --------
    >>> sorted(references(tree("log(`my z`) + x.dt.year")))
    [(('log',), True), (('my z',), False), (('x', 'dt', 'year'), False)]
    """
    stack: list[tuple[ast.AST, bool]] = [(found.node, False)]
    while stack:
        node, called = stack.pop()
        parts = dotted(found, node)
        if parts is not None:
            yield parts, called
            continue
        func = node.func if isinstance(node, ast.Call) else None
        stack += [(child, child is func) for child in ast.iter_child_nodes(node)]


def _bare(token: Token) -> str:
    """Text of a name without its backticks."""
    return token.text[1:-1] if token.kind == "quoted" else token.text
