"""What all studies share: replicates from a key, records of fits, and their running.

Replicate i draws from ``fold_in(key, i)``, so that its data depend on neither the tile,
nor the devices, nor the order. A lane function returns a record, a dict of arrays:

    estimate (q,), se (p,), loglik (), status (), is_singular (), n_iter ()
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxglmm.designs import Design
from jaxglmm.errors import ConvergenceWarning
from jaxglmm.families import Family
from jaxglmm.fitting import What
from jaxglmm.results import Fit
from jaxglmm.studies.batch import engine_for, limit_of
from jaxglmm.studies.checkpoint import open_checkpoint, saving
from jaxglmm.studies.lanes import collect
from jaxglmm.studies.parameters import fixed_se, natural
from jaxglmm.studies.progress import Progress
from jaxglmm.typing import Array

__all__ = [
    "Key",
    "Running",
    "as_key",
    "record",
    "run_study",
    "warn_if_lost",
]


@dataclass(frozen=True)
class Running:
    """How a study is run; its numbers do not depend on it."""

    tile: int | None = None
    threads: int | None = None
    devices: Any = None
    progress: bool = True
    checkpoint: str | Path | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Key:
    """A PRNG key that NumPy can hold."""

    data: Array
    impl: str = dataclasses.field(metadata={"static": True})

    def replicate(self, i) -> Array:
        """The key of replicate i."""
        return jax.random.fold_in(
            jax.random.wrap_key_data(self.data, impl=self.impl), i
        )


def as_key(key: Any) -> Key:
    """From an integer or a PRNG key."""
    if isinstance(key, (int, np.integer)):
        key = jax.random.key(int(key))
    if not hasattr(key, "dtype"):
        raise TypeError(f"key must be an integer or a PRNG key; found {key!r}")
    if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return Key(np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key)))


def warn_if_lost(m: Any) -> None:
    """Warn of a model that did not converge, whose estimates are no truth."""
    if not m.converged:
        warnings.warn(
            "the fitted model did not converge, so data drawn at its estimates tell "
            f"little: {m.status}",
            ConvergenceWarning,
            stacklevel=4,
        )


def record(fit: Fit, design: Design, family: Family) -> dict[str, Array]:
    """What a study keeps of a fit."""
    return {
        "estimate": natural(fit.params, design, family),
        "se": fixed_se(fit, design),
        "loglik": fit.loglik,
        "status": fit.status,
        "converged": fit.converged,
        "is_singular": fit.is_singular,
        "n_iter": fit.n_iter,
    }


def run_study(
    one: Callable,
    what: What,
    static: tuple,
    shared: Any,
    design: Design,
    n: int,
    running: Running,
    *,
    label: str,
    facts: dict[str, Any],
    folder: str = "",
    own_code: bool = True,
) -> dict[str, np.ndarray]:
    """Records of n replicates, arrays (n, ...).

    Parameters
    ----------
    one : callable
        ``one(what, *static, shared, i, max_iter) -> Outcome`` with a dict as result.
    design : Design
        Whose size decides the tile.
    facts : dict
        What decides the results beside ``what``, for the checkpoint; ``folder`` is its
        place there.
    own_code : bool
        Whether ``static`` holds nothing but this package's code.
    """
    engine = engine_for(what, design, n, running.tile, running.threads, running.devices)
    engine = dataclasses.replace(engine, keep=engine.keep and own_code)
    saved = open_checkpoint(running.checkpoint, what, n, engine, facts, folder=folder)
    with Progress(n, label, running.progress) as bar:
        chunks = engine.chunks(
            one,
            (what, *static),
            shared,
            lambda at: at.astype(np.uint32),
            n,
            limit_of(what),
            bar,
            None if saved is None else saved.load,
        )
        with contextlib.closing(chunks):  # no thread goes on where saving failed
            return collect(saving(chunks, saved), n)
