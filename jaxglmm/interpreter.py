"""Evaluates the tree of an expression on columns: a small language, no Python.

Every kind of node has its function here, every function and method that a formula can
call stands in :mod:`jaxglmm.functions`, and all else is refused by name. Numbers are
float64, see :mod:`jaxglmm.operators`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from jaxglmm import data as tables
from jaxglmm.errors import FormulaError
from jaxglmm.expressions import Tree, dotted, find_column, shown
from jaxglmm.functions import (
    ACCESSORS,
    CONSTANTS,
    CONTRASTS,
    FUNCTIONS,
    METHODS,
    NUMPY,
    PROPERTIES,
    Function,
    contrast_object,
)
from jaxglmm.operators import arithmetic, as_float, compare, logic, truth, widen
from jaxglmm.values import unwrap

__all__ = ["Interpreter", "is_known"]


def is_known(parts: tuple[str, ...]) -> bool:
    """Whether a dotted name is no column's but one of the language."""
    name = ".".join(parts)
    return name in CONSTANTS or name in CONTRASTS or parts[0] in ("np", "contr")


class Interpreter:
    """Gives the value of one expression.

    Parameters
    ----------
    found : Tree
    columns : mapping
        By name, as :func:`jaxglmm.data.plain` makes them.
    functions : mapping of Function
        The caller's own, which go before those of the language.
    state : dict
        What functions learned, by their call; filled where it is empty.
    """

    def __init__(
        self,
        found: Tree,
        columns: Mapping[str, Any],
        functions: Mapping[str, Function],
        state: dict[str, Any],
    ):
        self.tree, self.columns, self.state = found, columns, state
        self.functions = {**FUNCTIONS, **functions}

    def run(self) -> Any:
        """Value of the whole expression."""
        out = self.value(self.tree.node)
        if _holds_lists(out):
            raise FormulaError("str.split gives lists; take a part of them by .str[0].")
        return out

    def value(self, node: ast.AST) -> Any:
        """Value of a part of it."""
        return _NODES[type(node)](self, node)

    # -- literals and names

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _list(self, node: ast.List | ast.Tuple) -> list[Any]:
        return [self.value(item) for item in node.elts]

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        keys = [self.value(k) for k in node.keys if k is not None]
        return dict(zip(keys, map(self.value, node.values)))

    def _name(self, node: ast.Name | ast.Attribute) -> Any:
        parts = dotted(self.tree, node)
        if parts is None:
            assert isinstance(node, ast.Attribute)
            return self._property(node)
        name, k = find_column(parts, self.columns)
        if k == len(parts):
            return self.columns[name]
        whole = ".".join(parts)
        if k == 0 and whole in CONSTANTS:
            return CONSTANTS[whole]
        if k == 0 and whole in CONTRASTS:
            return contrast_object(whole)
        if k or len(parts) > 1:
            assert isinstance(node, ast.Attribute)
            return self._property(node)
        raise FormulaError(f"{whole} is a function; call it, as in {whole}(x).")

    def _property(self, node: ast.Attribute) -> Any:
        """``x.dt.year``: a property of an accessor, or what isocalendar() gives."""
        owner = node.value
        if isinstance(owner, ast.Attribute) and node.attr in PROPERTIES.get(
            owner.attr, ()
        ):
            column = pd.Series(self.value(owner.value))
            return unwrap(getattr(getattr(column, owner.attr), node.attr))
        inside = owner.func if isinstance(owner, ast.Call) else None
        called = inside.attr if isinstance(inside, ast.Attribute) else ""
        if called == "isocalendar" and node.attr in PROPERTIES[called]:
            return unwrap(self.value(owner)[node.attr])
        known = owner.attr if isinstance(owner, ast.Attribute) else ""
        choices = sorted(PROPERTIES.get(known, ())) or ["dt.year", "cat.codes"]
        raise FormulaError(
            f"'{shown(self.tree, node)}': the attribute .{node.attr} is not for a "
            f"formula. {tables.suggest(node.attr, choices, 'Attributes')}"
        )

    # -- operators

    def _binary(self, node: ast.BinOp) -> Any:
        combine = logic if isinstance(node.op, ast.BitAnd | ast.BitOr) else arithmetic
        return combine(type(node.op), self.value(node.left), self.value(node.right))

    def _unary(self, node: ast.UnaryOp) -> Any:
        combine = logic if isinstance(node.op, ast.Not | ast.Invert) else arithmetic
        return combine(type(node.op), self.value(node.operand))

    def _boolean(self, node: ast.BoolOp) -> Any:
        return logic(type(node.op), *map(self.value, node.values))

    def _compare(self, node: ast.Compare) -> Any:
        values = [self.value(v) for v in (node.left, *node.comparators)]
        parts = [compare(type(o), *values[i : i + 2]) for i, o in enumerate(node.ops)]
        return parts[0] if len(parts) == 1 else logic(ast.And, *parts)

    def _choice(self, node: ast.IfExp) -> Any:
        branches = map(self.value, (node.body, node.orelse))
        return np.where(truth(self.value(node.test)), *map(widen, branches))

    def _subscript(self, node: ast.Subscript) -> Any:
        """``f.str[0]``, and columns of a matrix: ``poly(x, 3)[:, 1]``."""
        place, owner = node.slice, node.value
        if isinstance(owner, ast.Attribute) and owner.attr == "str":
            return unwrap(pd.Series(self.value(owner.value)).str[self._place(place)])
        both = place.elts if isinstance(place, ast.Tuple) else []
        rows, column = both if len(both) == 2 else (None, None)
        if isinstance(rows, ast.Slice) and not any(ast.iter_child_nodes(rows)):
            matrix = self.value(owner)
            if isinstance(matrix, np.ndarray) and matrix.ndim == 2:
                return matrix[:, self._place(column)]
        raise FormulaError(
            f"'{shown(self.tree, node)}': brackets take parts of text, f.str[0], and "
            "columns of a matrix, poly(x, 3)[:, 1]."
        )

    def _place(self, node: ast.AST | None) -> Any:
        if isinstance(node, ast.Slice):
            ends = (node.lower, node.upper, node.step)
            return slice(*(None if e is None else self._place(e) for e in ends))
        place = self.value(node) if node is not None else None
        if type(place) is not int:
            raise FormulaError(f"brackets hold whole numbers; found {place!r}.")
        return place

    # -- calls

    def _call(self, node: ast.Call) -> Any:
        name, function, owner = self._function(node.func)
        args = ([] if owner is None else [owner]) + node.args
        keywords = {str(k.arg): k.value for k in node.keywords}
        function.check(name, len(args), keywords)
        key = shown(self.tree, node)
        if function.kind == "summary" and key in self.state:
            return self.state[key]
        form = _FORMS[function.takes]
        values = [form(self.value(a), name) for a in args]
        named = {k: form(self.value(v), name) for k, v in keywords.items()}
        if owner is not None:
            values[0] = pd.Series(values[0], copy=False)
        if function.kind == "learning":
            named["_state"] = self.state.setdefault(key, {})
        out = _normal(function.call(*values, **named))
        if function.kind == "summary":
            self.state[key] = out
        return out

    def _function(self, func: ast.expr) -> tuple[str, Function, ast.expr | None]:
        """A function by its name, and the object if it is a method."""
        parts = dotted(self.tree, func)
        if parts is not None and not find_column(parts[:-1], self.columns)[1]:
            name = ".".join(parts)
            if name in self.functions:
                return name, self.functions[name], None
            if parts[0] == "np" and parts[-1] in NUMPY and len(parts) == 2:
                return name, NUMPY[parts[-1]], None
            if name in CONTRASTS:
                return name, _contrast(name), None
            choices = NUMPY if parts[0] == "np" else self.functions
            raise _unknown(name, choices, parts[-1])
        if not isinstance(func, ast.Attribute):
            raise FormulaError(f"'{shown(self.tree, func)}' is no name of a function.")
        return self._method(func)

    def _method(self, func: ast.Attribute) -> tuple[str, Function, ast.expr]:
        owner = func.value
        if isinstance(owner, ast.Attribute) and owner.attr in ACCESSORS:
            choices, column = ACCESSORS[owner.attr], owner.value
        else:
            choices, column = METHODS, owner
        if func.attr not in choices:
            raise _unknown(f".{func.attr}", choices, func.attr)
        return f".{func.attr}", choices[func.attr], column


# -- helpers ---------------------------------------------------------------------------


def _unknown(name: str, choices: Mapping[str, Any], last: str) -> FormulaError:
    shown = tables.suggest(last, choices, "Functions")
    own = last if last.isidentifier() else "f"
    return FormulaError(
        f"unknown function {name!r}. {shown} Functions of your own come in by "
        f"functions={{{own!r}: {own}}}."
    )


def _contrast(name: str) -> Function:
    def call(*args: Any, **keywords: Any) -> Any:
        return contrast_object(name)(*args, **keywords)

    return Function(call, "raw", least=0, most=1, keywords=("base", "reference"))


def _holds_lists(value: Any) -> bool:
    """Whether a Series is what ``str.split`` gives."""
    is_objects = isinstance(value, pd.Series) and value.dtype == object
    return is_objects and any(isinstance(v, list) for v in value[:1])


def _numbers(value: Any, name: str) -> Any:
    return as_float(value, name) if isinstance(value, np.ndarray | pd.Series) else value


def _normal(value: Any) -> Any:
    """Results in the form of columns: arrays of numbers, Series of the rest."""
    value = getattr(value, "__wrapped__", value)  # formulaic's
    if _holds_lists(value):
        return value
    if isinstance(value, dict):
        value = np.column_stack([np.asarray(v, np.float64) for v in value.values()])
    if isinstance(value, np.ndarray) and value.ndim > 2:
        raise FormulaError(f"an array of {value.ndim} dimensions is not for a formula.")
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] == 1:
        return value[:, 0]  # which NumPy would not take for a column
    return unwrap(value)


_FORMS: dict[str, Callable[[Any, str], Any]] = {
    "floats": as_float,
    "numbers": _numbers,
    "values": lambda value, name: widen(value),
    "copies": lambda value, name: copy.copy(widen(value)),
    "raw": lambda value, name: value,
}
_NODES: dict[type, Callable[[Interpreter, Any], Any]] = {
    ast.Constant: Interpreter._constant,
    ast.List: Interpreter._list,
    ast.Tuple: Interpreter._list,
    ast.Dict: Interpreter._dict,
    ast.Name: Interpreter._name,
    ast.Attribute: Interpreter._name,
    ast.BinOp: Interpreter._binary,
    ast.UnaryOp: Interpreter._unary,
    ast.BoolOp: Interpreter._boolean,
    ast.Compare: Interpreter._compare,
    ast.IfExp: Interpreter._choice,
    ast.Subscript: Interpreter._subscript,
    ast.Call: Interpreter._call,
}
