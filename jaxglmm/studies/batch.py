"""``fit_batch``: one compiled program over thousands of responses or designs.

    design (n, ...), ys (L, n)  ->  lanes in tiles  ->  Fit with arrays (L, ...)

What does not depend on the lane (the cross-products of X and Z, the plan) is computed
once for a tile. Lanes are those of ``jax.vmap`` of :func:`jaxglmm.fit`; how they are
run, see lanes.py, does not change a number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxglmm.control import Control
from jaxglmm.designs import Design
from jaxglmm.errors import DesignError
from jaxglmm.families import Family, is_linear, known_family
from jaxglmm.fitting import What, check_fit, fit_checked
from jaxglmm.hostfit import built_in
from jaxglmm.optimize import iteration_limit
from jaxglmm.plan import Layout
from jaxglmm.results import Fit, Params
from jaxglmm.studies.arrange import arrange, can_arrange
from jaxglmm.studies.checkpoint import (
    Checkpoint,
    design_facts,
    open_checkpoint,
    saving,
)
from jaxglmm.studies.lanes import Engine, Outcome, check_count, collect, default_threads
from jaxglmm.studies.progress import Progress
from jaxglmm.studies.stacking import stack_designs
from jaxglmm.typing import Array

__all__ = ["check_batch", "engine_for", "fit_batch", "limit_of"]


def fit_batch(
    design: Design | Sequence[Design],
    ys: Any = None,
    family: str | Family | None = None,
    method: str | None = None,
    *,
    n_quad: int | None = None,
    priors: Callable[[Params], Array] | None = None,
    start: Any = None,
    control: Control | None = None,
    effects: bool = True,
    tile: int | None = None,
    threads: int | None = None,
    devices: Sequence[Any] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Fit:
    """Fit one design to many responses, or many designs, in compiled lanes.

    Parameters
    ----------
    design : Design, or sequence of Design
        One design, whose y is not used, or as many as there are lanes, with the same
        terms: shorter ones are padded with rows of weight zero and empty levels.
    ys : array (L, n), optional
        The responses for one design, a row per lane.
    family, method, n_quad, priors, control
        As for :func:`jaxglmm.fit`.
    start : array (m,) or (L, m), optional
        Starting theta of all lanes or of each.
    effects : bool
        Whether to return ``u`` and ``b``, most of the memory of many lanes; without,
        they are empty tuples.
    tile : int, optional
        Lanes mapped together. By default as many as stay in a processor's cache, 1 for
        large designs, which are then fitted one after another; on other devices as many
        as keep them busy.
    threads : int, optional
        Tiles that run at once where there is one device; by default one per processor
        on a CPU, two on a GPU. Several devices take one part of a tile each.
    devices : sequence of jax.Device, optional
        Devices of this process and of one platform to run on, every one with its part
        of a call; by default ``jax.local_devices()``.
    checkpoint : str or Path, optional
        Folder for finished chunks, so that the same call goes on where it was stopped.
        Every number of a lane is a column there, so leave ``effects`` out of large
        models.
    progress : bool
        Show a bar, after two seconds and on a terminal.

    Returns
    -------
    Fit
        NumPy arrays with a leading lane axis, in the dtype of the design. Every lane
        is what :func:`jaxglmm.fit` gives, with its own status: nothing is raised for
        lanes that do not converge. With several designs ``u`` and ``b`` have the
        largest number of levels, zero behind those of a lane.

    Raises
    ------
    CheckpointError
        If the folder holds lanes of another call, or cannot be written.
    DesignError
        For responses or designs that do not fit together.
    ValueError
        For an unknown family, method or optimizer, or a tile, thread count or device
        that cannot be used.

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> with jax.enable_x64(True):
    ...     design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    ...     params = jg.fit(design).params
    ...     keys = jax.random.split(jax.random.key(1), 200)
    ...     ys = jax.vmap(lambda k: jg.simulate(k, params, design))(keys)
    >>> fits = jg.fit_batch(design, ys)
    >>> fits.params.beta.shape, int(fits.converged.sum())
    ((200, 1), 200)
    """
    if hasattr(design, "frame"):
        raise TypeError("design must be a Design; that of a fitted model is m.design")
    many = not isinstance(design, Design)
    if not many and np.ndim(design.y) > 1:
        raise DesignError(
            f"design.y must have shape (n,); found {np.shape(design.y)}. Give several "
            "designs as a list"
        )
    if many and ys is not None:
        raise DesignError("give ys with one Design only; several have their own y")
    given = stack_designs(design) if many else design
    first = jax.tree.map(lambda x: x[0], given) if many else given
    what, checked = check_batch(first, family, method, n_quad, priors, control)
    if many:
        dtype = checked.y.dtype
        lanes = jax.tree.map(
            lambda x: np.asarray(x, dtype) if x.dtype.kind == "f" else x, given
        )
        one, shared, n = _fit_design, None, len(lanes.y)
    else:
        one, shared, lanes = _fit_response, arrange(checked), _responses(ys, checked)
        n = len(lanes)
    starts = _starts(start, n, checked)
    engine = engine_for(what, checked, n, tile, threads, devices)
    limit = limit_of(what)

    def lanes_at(at):
        return jax.tree.map(lambda x: x[at], (lanes, starts))

    saved: Checkpoint | None = None
    if checkpoint is not None:
        facts = design_facts(given if many else checked)
        facts |= {"start": starts, "effects": effects}
        if not many:
            facts["y"] = lanes
        with jax.enable_x64(True):
            fit = functools.partial(one, what, effects)
            like = jax.eval_shape(fit, shared, lanes_at(0), np.int32(limit)).result
        saved = open_checkpoint(checkpoint, what, n, engine, facts, like)
    with Progress(n, "fits", progress) as bar:
        chunks = engine.chunks(
            one,
            (what, effects),
            shared,
            lanes_at,
            n,
            limit,
            bar,
            None if saved is None else saved.load,
        )
        with contextlib.closing(chunks):  # no thread goes on where saving failed
            return collect(saving(chunks, saved), n)


def check_batch(
    design: Design, family, method, n_quad, priors, control: Control | None
) -> tuple[What, Design]:
    """Check what is to be fitted; the design with NumPy arrays of one dtype."""
    with jax.enable_x64(True):
        what, design = check_fit(design, family, method, n_quad, priors, None, control)
        return what, jax.tree.map(np.asarray, design)


def _fit_response(what: What, effects: bool, arranged, lane, max_iter) -> Outcome:
    y, start = lane
    design = arranged.with_response(y)
    return _outcome(fit_checked(what, design, start, max_iter), effects)


def _fit_design(what: What, effects: bool, shared, lane, max_iter) -> Outcome:
    design, start = lane
    return _outcome(fit_checked(what, design, start, max_iter), effects)


def _outcome(fit: Fit, effects: bool) -> Outcome:
    if not effects:
        fit = dataclasses.replace(fit, u=(), b=())
    return Outcome(fit, fit.n_iter, fit.converged)


def _responses(ys: Any, design: Design) -> np.ndarray:
    if ys is None:
        raise DesignError("fit_batch needs ys (L, n): a response per lane")
    ys = np.asarray(ys)
    if ys.ndim != 2 or ys.shape[1] != design.n_obs or not len(ys):
        raise DesignError(
            f"ys must have shape (L, {design.n_obs}), a response per lane; found "
            f"{ys.shape}"
        )
    return np.asarray(ys, design.y.dtype)


def _starts(start: Any, n: int, design: Design) -> np.ndarray | None:
    if start is None:
        return None
    start, m = np.asarray(start, design.y.dtype), design.n_theta
    if start.shape not in ((m,), (n, m)):
        raise DesignError(
            f"start must have shape ({m},) or ({n}, {m}); found {start.shape}"
        )
    return np.broadcast_to(start, (n, m))


# ---- how to run --------------------------------------------------------------------


def limit_of(what: What) -> int:
    """Evaluations of a lane that the engine may cap; 0 where it may not."""
    return 0 if what.method == "PQL" else iteration_limit(what.control)


def engine_for(
    what: What, design: Design, n: int, tile=None, threads=None, devices=None
) -> Engine:
    """Check how n lanes are to be run, and choose what was left open."""
    local = jax.local_devices()
    devices = tuple(local if devices is None else devices)
    if devices and isinstance(devices[0], jax.Device):  # the CPU beside a GPU
        local = jax.local_devices(backend=devices[0].platform)
    if not devices or any(d not in local for d in devices):
        raise ValueError(
            "devices must be some of jax.local_devices(), the devices of this process, "
            f"all of one platform; found {devices} beside {local}"
        )
    for name, value in (("tile", tile), ("threads", threads)):
        if value is not None:
            check_count(name, value)
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices must be different ones; found {devices}")
    if tile is None:
        tile = default_tile(what, design, devices[0].platform)
    if threads is None:
        threads = 1
        if len(devices) == 1:  # a GPU works on a tile while another's results travel
            threads = default_threads() if devices[0].platform == "cpu" else 2
    most = -(-n // len(devices))
    tile = min(int(tile), 1 << (most - 1).bit_length())
    keep = isinstance(what.control.optimizer, str) and built_in(design.layout)
    keep = keep and known_family(what.family) and what.how.prior is None
    once = is_linear(what.family) and what.method in ("REML", "ML")
    plain = once or (can_arrange(design) and not design.layout.tail)
    kind = "elementwise" if plain else "scattered"
    newton = what.control.optimizer == "newton"
    return Engine(tile, int(threads), devices, keep, kind, newton)


_CACHE = 3e5  # numbers that a tile may hold
_LARGE = 6e3  # numbers of a lane that is best fitted alone
_LANES = (16, 1024)
_MEMORY = 3e7  # numbers that a tile may hold on other devices: a few GB with copies
_MOST = 32_768  # from here on a GPU is busy, and more lanes wait for the slowest


def default_tile(what: What, design: Design, platform: str) -> int:
    """Lanes whose working arrays stay in a processor's cache; 1 for large designs.

    Elsewhere an operation costs the same for few lanes as for many, so a tile is
    bounded by memory alone.
    """
    size = lane_size(what, design)
    if platform != "cpu":
        return int(np.clip(1 << int(np.log2(max(_MEMORY / size, 1.0))), 1, _MOST))
    if size > _LARGE:
        return 1
    least, most = _LANES
    return int(np.clip(1 << int(np.log2(_CACHE / size)), least, most))


def lane_size(what: What, design: Design) -> float:
    """Numbers that a lane works with at a time, about."""
    layout: Layout = design.layout
    p = design.X.shape[1] + 1
    q = layout.tail_size
    chain = sum(
        b.n_levels * b.k * (b.k + q + p) for b in layout.blocks[: layout.n_chain]
    )
    size = chain + (q + p) ** 2
    if not (is_linear(what.family) and what.method in ("REML", "ML")):
        size += design.n_obs * (p + 4) * what.how.n_quad
    return float(size)
