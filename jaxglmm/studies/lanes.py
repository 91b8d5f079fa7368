"""Thousands of independent fits: lanes, in tiles, in threads, over devices.

A *lane* is one fit. A pure function ``one(*static, shared, lane, max_iter)`` is mapped
over the lanes of a *tile*, whose arrays fit into a processor's cache or keep a GPU
busy; tiles run in host threads or, where there are several devices, one part of a tile
on each. A *chunk* is a few tiles, and what a caller is handed.

A mapped loop goes on until its slowest lane is done. So the limit on evaluations is an
argument of the compiled program: a tile stops at a cap, and the lanes of a chunk that
have not ended well by then are gathered and fitted again, from their start, without it.
With n_i the evaluations that lane i needs and f what the rest of a fit costs, in
evaluations, a lane costs about

    f + c + (f + max_i n_i) share(n_i > c)                                         (1)

at cap c. The first chunk is one tile without a cap; c minimizes
(1) on it. A lane's numbers do not depend on the cap.

Chunks overlap: the unfinished lanes of one are run again behind the tiles of the next,
so that no thread waits for a chunk's end.

Shapes: arrays of a tile and of a chunk have their lanes in front, (L, ...).
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxglmm.compiled import run
from jaxglmm.studies.progress import Progress

__all__ = ["Chunk", "Engine", "Outcome", "check_count", "collect", "spans"]

_CHUNK_TILES = 16
_REST = 2.0  # f in (1)
_WORTH = 0.9  # share of the cost to which a cap must bring it


class Outcome(NamedTuple):
    """What a lane function returns: its result, and what the engine asks of it."""

    result: Any
    n_iter: Any  # () int: evaluations that the limit counts
    converged: Any  # () bool: it has ended well, and need not be run again


class Chunk(NamedTuple):
    """Outcomes of lanes start ... stop - 1, as NumPy arrays (stop - start, ...)."""

    start: int
    stop: int
    outcome: Outcome


@dataclass(frozen=True)
class _Mapped:
    """A module-level lane function, with a repr that says all about it."""

    one: Callable
    tile: int
    n_devices: int

    def __repr__(self):
        one = self.one
        return f"{one.__module__}.{one.__qualname__}/{self.tile}/{self.n_devices}"


@dataclass(frozen=True)
class Engine:
    """How lanes are run; the numbers do not depend on it.

    Parameters
    ----------
    tile : int
        Lanes that are mapped together on one device; 1 for one after another.
    threads : int
        Tiles that are in work at the same time.
    devices : tuple of jax.Device
        Of this process.
    keep : bool
        Whether the compiled program may be kept on disk.
    kind : {"elementwise", "scattered"}
        The work, for the compiler's options: with scattered sums over rows or without.
    settled : bool
        Whether a lane that has converged at a cap would have ended there without it,
        as Newton's do.
    """

    tile: int
    threads: int
    devices: tuple[Any, ...]
    keep: bool
    kind: str
    settled: bool = True

    @property
    def width(self) -> int:
        """Lanes of a call."""
        return self.tile * len(self.devices)

    def call(self, one, static: tuple, shared, lanes, max_iter: int) -> Outcome:
        """Run as many lanes as there are, at most ``width``; NumPy in and out."""
        n = len(jax.tree.leaves(lanes)[0])
        missing = self.width - n
        if missing:  # run the last one again
            lanes = jax.tree.map(
                lambda x: np.concatenate([x, np.repeat(x[-1:], missing, 0)]), lanes
            )
        mapped = _Mapped(one, self.tile, len(self.devices))
        devices = self.devices if len(self.devices) > 1 else ()
        limit = np.int32(max_iter)
        out = run(
            _tile, (mapped, devices, *static), shared, lanes, limit,
            keep=self.keep, lanes=self.kind if self.tile > 1 else None,
            devices=self.devices,
        )  # fmt: skip
        return jax.tree.map(lambda x: x[:n], out) if missing else out

    def chunks(
        self,
        one: Callable,
        static: tuple,
        shared: Any,
        lanes: Callable[[np.ndarray], Any],
        n: int,
        limit: int,
        progress: Progress,
        done: Callable[[int, int], Outcome | None] | None = None,
    ) -> Generator[tuple[int, Chunk], None, None]:
        """Numbered chunks of all lanes, in order; of several processes' its own.

        Parameters
        ----------
        one, static, shared
            ``one(*static, shared, lane, max_iter) -> Outcome``.
        lanes : callable
            Lane numbers (L,) -> pytree of NumPy arrays (L, ...).
        n : int
            Number of lanes.
        limit : int
            Largest number of evaluations of a lane; 0 where there is none.
        progress : Progress
        done : callable, optional
            Chunk number, lanes -> Outcome of a chunk finished earlier, or None.
        """
        cap, parts = limit, spans(n, self.width)
        process, n_processes = jax.process_index(), jax.process_count()
        if len(parts) < n_processes:
            raise ValueError(
                f"{n} lanes make {len(parts)} chunks, too few for {n_processes} "
                "processes: give a smaller tile, or fewer processes"
            )
        pool = ThreadPoolExecutor(self.threads)

        def submit(at: np.ndarray, max_iter: int) -> list[Future]:
            """Tiles of the lanes ``at``, in the order in which they will be run."""
            tiles = [at[i : i + self.width] for i in range(0, len(at), self.width)]
            return [pool.submit(tile, at, max_iter) for at in tiles]

        def tile(at: np.ndarray, max_iter: int) -> Outcome:
            return self.call(one, static, shared, lanes(at), max_iter)

        def finished(chunk: _Running) -> tuple[int, Chunk]:
            at, out = chunk.at, chunk.end()
            lost = int(np.sum(~out.converged))
            progress.update(len(at), lost, chunk.earlier)
            return chunk.index, Chunk(int(at[0]), int(at[-1]) + 1, out)

        running: collections.deque[_Running] = collections.deque()
        try:
            for index in range(process, len(parts), n_processes):
                at = np.arange(*parts[index])
                earlier = None if done is None else done(index, len(at))
                chunk = _Running(index, at, cap, limit, self.settled, submit, earlier)
                running.append(chunk)
                if index == process:
                    cap = best_cap(chunk.end().n_iter, limit)
                while running and running[0].is_done():
                    yield finished(running.popleft())
                if len(running) > 1:  # behind the tiles of the one just begun
                    running[-2].run_again()
                if len(running) > 2:
                    yield finished(running.popleft())
            while running:
                yield finished(running.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


class _Running:
    """A chunk that is being worked on: its tiles, then its unfinished lanes."""

    def __init__(self, index, at, cap, limit, settled, submit, earlier):
        self.index, self.at, self.submit = index, at, submit
        self.cap, self.limit, self.settled = cap, limit, settled
        self.outcome, self.earlier = earlier, earlier is not None
        self.tiles = [] if self.earlier else submit(at, cap)
        self.rest: list[Future] = []

    def run_again(self) -> None:
        """Wait for the tiles, and submit the lanes that the cap left unfinished."""
        if self.outcome is not None:
            return
        self.outcome = out = _together(self.tiles)
        self.tiles = []
        stopped = (out.n_iter >= self.cap) & ~(out.converged & self.settled)
        self.unfinished = np.flatnonzero(stopped & (self.cap < self.limit))
        self.rest = self.submit(self.at[self.unfinished], self.limit)

    def is_done(self) -> bool:
        """Whether :meth:`end` would not have to wait."""
        return self.outcome is not None and all(f.done() for f in self.rest)

    def end(self) -> Outcome:
        """Wait for everything."""
        self.run_again()
        if self.rest:
            rest, self.rest = _together(self.rest), []
            jax.tree.map(functools.partial(_put, self.unfinished), self.outcome, rest)
        return self.outcome


def _together(tiles: list[Future]) -> Any:
    parts = [f.result() for f in tiles]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _put(at: np.ndarray | slice, x: np.ndarray, new: np.ndarray) -> None:
    x[at] = new


def check_count(name: str, n: Any) -> int:
    """A positive whole number."""
    try:
        whole = np.ndim(n) == 0 and not isinstance(n, bool) and n == int(n) and n >= 1
    except (TypeError, ValueError, OverflowError):  # None, nan, inf, text
        whole = False
    if not whole:
        raise ValueError(f"{name} must be a positive whole number; found {n!r}")
    return int(n)


def spans(n: int, width: int) -> list[tuple[int, int]]:
    """First and last + 1 lane of every chunk: one tile, then many at a time."""
    edges = [0, *range(width, n, _CHUNK_TILES * width), n]
    return list(itertools.pairwise(edges))


def best_cap(n_iter: np.ndarray, limit: int) -> int:
    """The cap that minimizes (1), or the limit where none is worth it."""
    most = int(n_iter.max(initial=0))
    if most >= limit:
        most = limit
    again = _REST + most
    cost = [(_REST + c + again * np.mean(n_iter > c), c) for c in range(1, most)]
    least, cap = min(cost, default=(np.inf, limit))
    return cap if least < _WORTH * again else limit


def _tile(mapped: _Mapped, devices: tuple, *args):
    """The compiled program: one tile on each of the devices."""
    *static, shared, lanes, max_iter = args

    def on_device(shared, lanes, max_iter):
        if mapped.tile == 1:  # mapping over one lane costs more than none
            lane = jax.tree.map(lambda x: x[0], lanes)
            out = mapped.one(*static, shared, lane, max_iter)
            return jax.tree.map(lambda x: jnp.asarray(x)[None], out)
        one = functools.partial(mapped.one, *static)
        return jax.vmap(one, (None, 0, None))(shared, lanes, max_iter)

    if not devices:
        return on_device(shared, lanes, max_iter)
    mesh = jax.sharding.Mesh(np.array(devices), ("lanes",))
    everywhere, split = PartitionSpec(), PartitionSpec("lanes")
    on_all = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, split, everywhere),
        out_specs=split,
        check_vma=False,
    )
    return on_all(shared, lanes, max_iter)


def collect(chunks: Iterator[tuple[int, Chunk]], n: int) -> Any:
    """Results of all lanes in one pytree of NumPy arrays (n, ...).

    Every one of several processes gets those of all.
    """
    out: Any = None
    mine = np.zeros(n, bool)
    for _, chunk in chunks:
        result = chunk.outcome.result
        if out is None:
            out = jax.tree.map(lambda x: np.zeros((n, *x.shape[1:]), x.dtype), result)
        at = slice(chunk.start, chunk.stop)
        mine[at] = True
        jax.tree.map(functools.partial(_put, at), out, result)
    if jax.process_count() == 1:
        return out
    return _from_all(out, mine)


def _from_all(out: Any, mine: np.ndarray) -> Any:
    """Lanes of all processes, each of which has its own ones in place."""
    from jax.experimental.multihost_utils import process_allgather

    with jax.enable_x64(True):
        owner = np.argmax(np.asarray(process_allgather(mine)), axis=0)
        lanes = np.arange(len(mine))
        return jax.tree.map(
            lambda x: np.asarray(process_allgather(x))[owner, lanes], out
        )


def default_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
