"""Finished chunks of a study in a folder, so that a run that was stopped goes on.

    DIR/study.json             what the study is, as fingerprints by name
    DIR/chunk-000012.parquet   one finished chunk: a row per lane, exact in every bit

A chunk is written beside its place and moved there, so that a file which is there is
whole; it says which study it is of, and has a hash of its numbers. The same call reads
the chunks that are there and computes the others; a call that differs is refused with
what differs, by name.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxglmm
from jaxglmm.designs import Design
from jaxglmm.errors import CheckpointError
from jaxglmm.fitting import What
from jaxglmm.studies.identity import described, digest, fingerprint
from jaxglmm.studies.lanes import Chunk, Engine, Outcome

__all__ = [
    "Checkpoint",
    "design_facts",
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
        self.study = digest(sorted(mine.items()))
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
            if digest(columns) != about["digest"]:
                raise ValueError("its numbers are not those that were written")
        except (OSError, pa.ArrowException, *_NO_CHUNK) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it and run the same call again"
            ) from error
        place = about.get("study"), about.get("chunk"), table.num_rows
        if place != (self.study, str(index), n):
            raise CheckpointError(
                f"{path} belongs to another study, or elsewhere in this one; delete "
                "it, or give another folder"
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
            "study": self.study, "chunk": str(index), "arrays": json.dumps(about),
            "digest": digest(arrays),
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


def design_facts(design: Design) -> dict[str, Any]:
    """A design by its parts, so that a difference has a name."""
    return {
        "y": design.y, "X": design.X, "terms": design.terms, "weights": design.weights,
        "offset": design.offset, "other predictors": design.others,
    }  # fmt: skip
