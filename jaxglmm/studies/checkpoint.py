"""Finished chunks of a study in a folder, so that a run that was stopped goes on.

    DIR/study.json             what the study is, as fingerprints by name
    DIR/chunk-000012.parquet   one finished chunk: a row per lane, exact in every bit

A chunk is written beside its place and moved there, so that a file which is there is
whole; it says which study it is of, and has a hash of its numbers. The same call reads
the chunks that are there and computes the others; a call that differs is refused with
what differs, by name.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import json
import os
import tempfile
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxglmm
from jaxglmm.designs import Design
from jaxglmm.errors import CheckpointError
from jaxglmm.fitting import What
from jaxglmm.studies.lanes import Chunk, Engine, Outcome

__all__ = [
    "Checkpoint",
    "described",
    "design_facts",
    "fingerprint",
    "open_checkpoint",
    "saving",
]

_MANIFEST = "study.json"
_NO_CHUNK = (AttributeError, KeyError, TypeError, ValueError)  # as foreign files raise


class Checkpoint:
    """The folder of one study.

    Parameters
    ----------
    folder : Path
        Made where it does not exist.
    facts : dict
        Name -> value of everything that decides the results.
    like : pytree, optional
        With the structure of a chunk's results, where that is no dict of arrays.

    Raises
    ------
    CheckpointError
        If the folder holds another study, or cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], like: Any = None):
        _parquet()
        self.like = like
        self.folder = folder
        versions = {"jaxglmm": jaxglmm.__version__, "jax": jax.__version__}
        mine = {k: fingerprint(v) for k, v in {**facts, **versions}.items()}
        self.study = _digest(sorted(mine.items()))
        manifest = self.folder / _MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                self._compare(json.loads(manifest.read_bytes()), mine)
            else:
                _write(manifest, (json.dumps(mine, indent=1) + "\n").encode())
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint folder {self.folder} cannot be used: "
                f"{error.strerror or error}. Give one that can be written."
            ) from error
        except (TypeError, ValueError) as error:  # no JSON, or another kind of it
            raise CheckpointError(
                f"{manifest} is damaged ({error}); delete the folder to start again"
            ) from error

    def _compare(self, found: dict[str, str], mine: dict[str, str]) -> None:
        names = [k for k in {**found, **mine} if found.get(k) != mine.get(k)]
        if names:
            changes = "; ".join(
                f"{k} was {found.get(k, 'absent')}, now {mine.get(k, 'absent')}"
                for k in names
            )
            raise CheckpointError(
                f"{self.folder} holds a study that differs from this one in {changes}. "
                "Repeat the call as it was, or give another folder."
            )

    def _path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.parquet"

    def has(self, index: int) -> bool:
        """Whether a chunk is there."""
        return self._path(index).exists()

    def load(self, index: int, n: int) -> Outcome | None:
        """A chunk of n lanes that was finished earlier, or None."""
        path = self._path(index)
        if not path.exists():
            return None
        pa, pq = _parquet()
        columns: dict[str, np.ndarray] = {}
        try:
            table = pq.read_table(path)
            about = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
            for name, (dtype, shape) in json.loads(about["arrays"]).items():
                flat = [table[c].to_numpy() for c in _columns(name, shape)]
                both = np.stack(flat, 1) if flat else np.zeros((table.num_rows, 0))
                columns[name] = both.astype(dtype).reshape(table.num_rows, *shape)
            if _digest(columns) != about["digest"]:
                raise ValueError("its numbers are not those that were written")
        except (OSError, pa.ArrowException, *_NO_CHUNK) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and run the same call again"
            ) from error
        if (about.get("study"), table.num_rows) != (self.study, n):
            raise CheckpointError(
                f"{path} belongs to another study; delete it, or give another folder"
            )
        n_iter, converged = columns.pop(".n_iter"), columns.pop(".converged")
        if self.like is None:
            return Outcome(columns, n_iter, converged)
        leaves = [columns[name] for name in _named(self.like)]
        result = jax.tree.unflatten(jax.tree.structure(self.like), leaves)
        return Outcome(result, n_iter, converged)

    def save(self, index: int, chunk: Chunk) -> None:
        """Write a finished chunk."""
        pa, pq = _parquet()
        out = chunk.outcome
        arrays = {
            **_named(out.result),
            ".n_iter": out.n_iter,
            ".converged": out.converged,
        }
        columns, about = {}, {}
        for name, x in arrays.items():
            about[name] = (x.dtype.str, x.shape[1:])
            flat = x.reshape(len(x), -1)
            for c, label in enumerate(_columns(name, x.shape[1:])):
                columns[label] = np.ascontiguousarray(flat[:, c])
        says = {
            "study": self.study, "arrays": json.dumps(about), "digest": _digest(arrays)
        }  # fmt: skip
        table = pa.table(columns).replace_schema_metadata(says)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        try:
            _write(self._path(index), sink.getvalue().to_pybytes())
        except OSError as error:
            n = len(list(self.folder.glob("chunk-*.parquet")))
            raise CheckpointError(
                f"lanes {chunk.start} to {chunk.stop - 1} could not be written to "
                f"{self.folder}: {error.strerror or error}. The {n} chunks finished "
                "before are kept; make room and repeat the call to go on."
            ) from error


def _named(result: Any) -> dict[str, Any]:
    """The arrays of a pytree by name: "estimate" of a dict, "params.beta" of a Fit."""
    at, _ = jax.tree_util.tree_flatten_with_path(result)
    return {jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in at}


def _columns(name: str, shape) -> list[str]:
    if not shape:
        return [name]
    return [f"{name}{list(i)}" for i in np.ndindex(*shape)]


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
    os.replace(file.name, path)


def _parquet():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CheckpointError(
            "checkpoint= writes Parquet files, which needs pyarrow: "
            "pip install 'jaxglmm[studies]'"
        ) from error
    return pyarrow, pyarrow.parquet


# ---- what a study is ---------------------------------------------------------------


def open_checkpoint(
    root: str | Path | None,
    what: What,
    n: int,
    engine: Engine,
    facts: dict[str, Any],
    like: Any = None,
    folder: str = "",
) -> Checkpoint | None:
    """The folder of n lanes; None where none was asked for.

    Parameters
    ----------
    root : str or Path, optional
        As the user gave it; the lanes are in ``folder`` there.
    facts : dict
        What decides the results beside ``what``, n and the lanes of a call.
    """
    if root is None:
        return None
    if not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a folder's path; found {root!r}")
    family, method, how, control = what
    facts = {
        **facts, "family": described(family), "method": method, "nodes": how.n_quad,
        "priors": described(how.prior), "control": described(control),
        "replicates": n, "lanes per call": engine.width,
    }  # fmt: skip
    return Checkpoint(Path(root) / folder, facts, like)


def saving(chunks, saved: Checkpoint | None):
    """The same chunks, written where they are not there yet."""
    for index, chunk in chunks:
        if saved is not None and not saved.has(index):
            saved.save(index, chunk)
        yield index, chunk


def described(x: Any) -> str:
    """What a value is, without addresses, so that another process says the same.

    Functions count by name, code, defaults, what they close over, and what they find
    among the names of their own module; what is from other modules counts by name.
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        parts = [f"{f.name}={described(getattr(x, f.name))}" for f in _fields(x)]
        return f"{type(x).__name__}({', '.join(parts)})"
    if isinstance(x, tuple):
        return f"{type(x).__name__}({', '.join(map(described, x))})"
    if x is None:
        return "None"
    if callable(x):
        name = getattr(x, "__qualname__", type(x).__name__)
        return f"{name}{_digest(_insides(x, {}))}"
    return fingerprint(x)


def _fields(x: Any) -> list:
    return [f for f in dataclasses.fields(x) if f.repr]


def _insides(x: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """What makes a function do what it does; ``seen`` are objects met before."""
    if isinstance(x, types.ModuleType):
        return x.__name__
    if isinstance(x, type):
        return f"{x.__module__}.{x.__qualname__}"
    if isinstance(x, types.CodeType):
        return [x.co_code.hex(), list(x.co_names), _each(x.co_consts, seen)]
    if isinstance(x, tuple):
        return _each(x, seen)
    if isinstance(x, (set, frozenset)):
        return sorted(map(str, _each(x, seen)))
    by_address = " at 0x" in repr(x)
    if by_address or isinstance(x, (list, dict)):
        if id(x) in seen:
            return f"number {seen[id(x)][0]}"
        seen[id(x)] = len(seen), x  # held, so that no other gets its id
    if isinstance(x, list):
        return _each(x, seen)
    if isinstance(x, dict):
        return [[str(k), _insides(v, seen)] for k, v in x.items()]
    if isinstance(x, functools.partial):
        return _each((x.func, x.args, sorted(x.keywords.items())), seen)
    if isinstance(x, types.MethodType):
        return _each((x.__func__, x.__self__), seen)
    if isinstance(x, types.FunctionType):
        cells = tuple(c.cell_contents for c in x.__closure__ or () if _is_filled(c))
        usual = x.__defaults__, tuple(sorted((x.__kwdefaults__ or {}).items()))
        return [*_each((x.__code__, cells, *usual), seen), _globals_of(x, seen)]
    if callable(getattr(x, "__wrapped__", None)):  # as jit leaves it
        return _insides(x.__wrapped__, seen)
    if by_address:
        return [_insides(type(x), seen), _insides(getattr(x, "__dict__", {}), seen)]
    return x


def _each(values: Any, seen: dict[int, tuple[int, Any]]) -> list:
    return [_insides(v, seen) for v in values]


def _globals_of(fn: types.FunctionType, seen: dict[int, tuple[int, Any]]) -> list:
    """What a function finds among its module's names, with these."""
    out, codes = {}, [fn.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for step in dis.get_instructions(code):
            name = step.argval
            if step.opname != "LOAD_GLOBAL" or name not in fn.__globals__:
                continue
            value = fn.__globals__[name]
            home = getattr(value, "__module__", fn.__module__)
            foreign = callable(value) and home != fn.__module__
            out[name] = name if foreign else value
    return [[name, _insides(out[name], seen)] for name in sorted(out)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # of a name that is bound later
        return False
    return True


def design_facts(design: Design) -> dict[str, Any]:
    """A design by its parts, so that a difference has a name."""
    return {
        "y": design.y, "X": design.X, "terms": design.terms, "weights": design.weights,
        "offset": design.offset, "other predictors": design.others,
    }  # fmt: skip


def fingerprint(value: Any) -> str:
    """A short text that tells values apart: themselves, or a hash of their arrays."""
    if all(isinstance(x, (str, int, float, bool)) for x in jax.tree.leaves(value)):
        return repr(value)
    return _digest(value)


def _digest(value: Any) -> str:
    leaves, treedef = jax.tree.flatten(value)
    digest = hashlib.sha256(str(treedef).encode())
    for x in leaves:
        if hasattr(x, "dtype"):
            x = np.asarray(x)
            digest.update(f"{x.dtype.str}{x.shape}".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        else:
            digest.update(repr(x).encode())
    return f"#{digest.hexdigest()[:12]}"
