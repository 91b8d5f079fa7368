"""Finished chunks of a study in a folder, so that a run that was stopped goes on.

    DIR/study.json             what the study is, as fingerprints by name
    DIR/chunk-000012.parquet   one finished chunk: a row per lane, exact in every bit

A chunk is written beside its place and moved there, so that a file which is there is
whole. The same call reads the chunks that are there and computes the others; a call
that differs is refused with what differs, by name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import types
from collections.abc import Callable
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
    "design_facts",
    "fingerprint",
    "function_name",
    "open_checkpoint",
    "saving",
]

_MANIFEST = "study.json"


class Checkpoint:
    """The folder of one study.

    Parameters
    ----------
    folder : str or Path
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

    def __init__(self, folder: str | Path, facts: dict[str, Any], like: Any = None):
        _parquet()
        self.like = like
        self.folder = Path(folder)
        versions = {"jaxglmm": jaxglmm.__version__, "jax": jax.__version__}
        mine = {k: fingerprint(v) for k, v in {**facts, **versions}.items()}
        manifest = self.folder / _MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                self._compare(json.loads(manifest.read_text()), mine)
            else:
                _write(manifest, (json.dumps(mine, indent=1) + "\n").encode())
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint folder {self.folder} cannot be used: "
                f"{error.strerror or error}. Give one that can be written."
            ) from error
        except json.JSONDecodeError as error:
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

    def load(self, index: int) -> Outcome | None:
        """A chunk that was finished earlier, or None."""
        path = self._path(index)
        if not path.exists():
            return None
        pa, pq = _parquet()
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and run the same call again"
            ) from error
        columns: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in json.loads(
            table.schema.metadata[b"arrays"]
        ).items():
            flat = [table[c].to_numpy() for c in _columns(name, shape)]
            both = np.stack(flat, 1) if flat else np.zeros((table.num_rows, 0))
            columns[name] = both.astype(dtype).reshape(table.num_rows, *shape)
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
        table = pa.table(columns).replace_schema_metadata({"arrays": json.dumps(about)})
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
    folder: str | Path | None,
    what: What,
    n: int,
    engine: Engine,
    facts: dict[str, Any],
    like: Any = None,
) -> Checkpoint | None:
    """The folder of n lanes; None where none was asked for.

    Parameters
    ----------
    facts : dict
        What decides the results beside ``what``, n and the lanes of a call.
    """
    if folder is None:
        return None
    family, method, how, control = what
    facts = {
        **facts, "family": repr(family), "method": method, "nodes": how.n_quad,
        "priors": function_name(how.prior), "control": repr(control),
        "replicates": n, "lanes per call": engine.width,
    }  # fmt: skip
    return Checkpoint(folder, facts, like)


def saving(chunks, saved: Checkpoint | None):
    """The same chunks, written where they are not there yet."""
    for index, chunk in chunks:
        if saved is not None and not saved.has(index):
            saved.save(index, chunk)
        yield index, chunk


def function_name(fn: Callable | None) -> str:
    """A user's function by name, code and what it closes over, for a study's facts."""
    if fn is None:
        return "none"
    name = getattr(fn, "__qualname__", type(fn).__name__)
    return f"{name}{fingerprint(_insides(fn))}"


def _insides(x: Any) -> Any:
    """What makes a function do what it does, without addresses."""
    if isinstance(x, types.CodeType):
        return [x.co_code.hex(), list(x.co_names), [_insides(c) for c in x.co_consts]]
    if isinstance(x, functools.partial):
        return [_insides(v) for v in (x.func, x.args, sorted(x.keywords.items()))]
    if isinstance(x, types.FunctionType):
        cells = [c.cell_contents for c in x.__closure__ or ()]
        defaults = x.__defaults__ or (), sorted((x.__kwdefaults__ or {}).items())
        return [_insides(v) for v in (x.__code__, cells, *defaults)]
    if isinstance(x, (list, tuple)):
        return [_insides(v) for v in x]
    return x


def design_facts(design: Design) -> dict[str, Any]:
    """A design by its parts, so that a difference has a name."""
    return {
        "y": design.y, "X": design.X, "terms": design.terms, "weights": design.weights,
        "offset": design.offset, "other predictors": design.others,
    }  # fmt: skip


def fingerprint(value: Any) -> str:
    """A short text that tells values apart: themselves, or a hash of their arrays."""
    leaves, treedef = jax.tree.flatten(value)
    if all(isinstance(x, (str, int, float, bool)) for x in leaves):
        return repr(value)
    digest = hashlib.sha256(str(treedef).encode())
    for x in leaves:
        if hasattr(x, "dtype"):
            x = np.asarray(x)
            digest.update(f"{x.dtype.str}{x.shape}".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
        else:
            digest.update(repr(x).encode())
    return f"#{digest.hexdigest()[:12]}"
