"""What a value or a function is, as a text that another process says too.

Values count by their numbers. Functions count by code, defaults, what they close over
and what they find among the names of their module; objects by class and contents;
classes by their functions and values. What comes from a library counts by name alone.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import sys
import types
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxglmm.errors import CheckpointError

__all__ = ["described", "digest", "fingerprint"]

_LIBRARIES = {
    *sys.stdlib_module_names, "jax", "jaxglmm", "jaxlib", "numpy", "optax", "pandas",
    "scipy",
} - {"__main__"}  # fmt: skip
_PLAIN = (str, bytes, bool, int, float, complex, type(None), type(Ellipsis))
_DATA = (*_PLAIN, list, tuple, dict, set, np.ndarray, jax.Array)

_Seen = dict[int, tuple[int, Any]]  # id -> number and object, held so that ids last


def fingerprint(value: Any) -> str:
    """A short text that tells values apart: themselves, or a hash of what they hold."""
    if callable(value):
        return described(value)
    if all(isinstance(x, (str, int, float, bool)) for x in jax.tree.leaves(value)):
        return repr(value)
    return digest(value)


def digest(value: Any) -> str:
    """Hash of a pytree of arrays, numbers and texts."""
    leaves, treedef = jax.tree.flatten(value)
    out = hashlib.sha256(str(treedef).encode())
    for x in leaves:
        if hasattr(x, "dtype"):
            x = np.asarray(x)
            out.update(f"{x.dtype.str}{x.shape}".encode())
            out.update(np.ascontiguousarray(x).tobytes())
        else:
            out.update(repr(x).encode())
    return f"#{out.hexdigest()[:12]}"


def described(x: Any) -> str:
    """A value in words, with hashes for what functions, classes and arrays hold.

    Raises
    ------
    CheckpointError
        Where functions call each other more deeply than can be followed.
    """
    try:
        return _described(x)
    except RecursionError:
        name = getattr(x, "__qualname__", type(x).__name__)
        raise CheckpointError(
            f"{name} calls functions in too long a chain to tell it from others; leave "
            "checkpoint= out, or shorten the chain"
        ) from None


def _described(x: Any) -> str:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        kind = type(x)
        own = "" if _is_library(kind) else digest(_insides(kind, {}))
        fields = [f for f in dataclasses.fields(x) if f.repr]
        parts = [f"{f.name}={_described(getattr(x, f.name))}" for f in fields]
        return f"{kind.__name__}{own}({', '.join(parts)})"
    if isinstance(x, tuple):
        return f"{type(x).__name__}({', '.join(map(_described, x))})"
    if isinstance(x, _PLAIN):
        return repr(x)
    if callable(x):
        name = getattr(x, "__qualname__", type(x).__name__)
        return f"{name}{digest(_insides(x, {}))}"
    return digest(_insides(x, {}))


def _is_library(x: Any) -> bool:
    module = getattr(x, "__module__", None) or ""
    return module.split(".")[0] in _LIBRARIES


def _name(x: Any) -> str:
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', x)}"


def _insides(x: Any, seen: _Seen) -> Any:
    """What makes a value what it is: a pytree of arrays, numbers and texts."""
    if isinstance(x, _PLAIN):
        return x
    if isinstance(x, types.ModuleType):
        return x.__name__
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return _of_array(x, seen)
    if isinstance(x, (tuple, set, frozenset)):
        values = _each(x, seen)
        return values if isinstance(x, tuple) else sorted(map(digest, values))
    if isinstance(x, types.CodeType):
        return [x.co_code.hex(), list(x.co_names), _each(x.co_consts, seen)]
    if id(x) in seen:
        return f"number {seen[id(x)][0]}"
    seen[id(x)] = len(seen), x
    if isinstance(x, list):
        return _each(x, seen)
    if isinstance(x, dict):
        return _each(x.items(), seen)
    if isinstance(x, (pd.DataFrame, pd.Series)):
        return x.to_csv()
    if isinstance(x, (pd.Index, pd.Categorical)):
        return _each(list(x), seen)
    if isinstance(x, functools.partial):
        return _each((x.func, x.args, sorted(x.keywords.items())), seen)
    if isinstance(x, types.MethodType):
        return _each((x.__func__, x.__self__), seen)
    if isinstance(x, types.FunctionType):
        return _of_function(x, seen)
    if callable(getattr(x, "__wrapped__", None)):  # as jit leaves it
        return _insides(x.__wrapped__, seen)
    if isinstance(x, type):
        return _of_class(x, seen)
    return [_insides(type(x), seen), _each(_state(x), seen)]


def _each(values: Iterable, seen: _Seen) -> list:
    return [_insides(v, seen) for v in values]


def _of_array(x: Any, seen: _Seen) -> Any:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return [str(jax.random.key_impl(x)), np.asarray(jax.random.key_data(x))]
    x = np.asarray(x)
    return x if x.dtype != object else [list(x.shape), _each(x.ravel().tolist(), seen)]


def _of_function(fn: types.FunctionType, seen: _Seen) -> list:
    cells = [c.cell_contents for c in fn.__closure__ or () if _is_filled(c)]
    usual = fn.__defaults__, tuple(sorted((fn.__kwdefaults__ or {}).items()))
    return _each((fn.__code__, tuple(cells), *usual, tuple(_globals_of(fn))), seen)


def _globals_of(fn: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function finds among its module's names, with these."""
    if _is_library(fn):
        return []
    out: dict[str, Any] = {}
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for step in dis.get_instructions(code):
            name = step.argval
            if step.opname == "LOAD_GLOBAL" and name in fn.__globals__:
                value = fn.__globals__[name]
                by_name = callable(value) and _is_library(value)
                out[name] = _name(value) if by_name else value
    return sorted(out.items(), key=lambda item: item[0])


def _of_class(kind: type, seen: _Seen) -> Any:
    if _is_library(kind):
        return _name(kind)
    own = []
    for name, value in sorted(vars(kind).items()):
        inside = value.fget if isinstance(value, property) else value
        inside = getattr(inside, "__func__", inside)
        if isinstance(inside, types.FunctionType) or (
            isinstance(inside, _DATA) and not name.startswith("__")
        ):
            own.append((name, inside))
    return [_name(kind), _each(kind.__bases__, seen), _each(own, seen)]


def _state(x: Any) -> list[tuple[str, Any]]:
    """What an object holds, by name."""
    if dataclasses.is_dataclass(x):  # what is cached in it does not count
        return [(f.name, getattr(x, f.name)) for f in dataclasses.fields(x)]
    names = [
        s
        for kind in type(x).__mro__
        for s in np.atleast_1d(getattr(kind, "__slots__", ())).tolist()
        if hasattr(x, s)
    ]
    return [*((n, getattr(x, n)) for n in names), *getattr(x, "__dict__", {}).items()]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # of a name that is bound later
        return False
    return True
