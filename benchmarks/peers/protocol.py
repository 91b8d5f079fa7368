"""A worker's side of the conversation with the runner: JSON, one record a line.

    the case       ->  status, version, n, first_s, objective, ...   (one call)
    {}             ->  seconds                                       (one timed round)
    end of input   ->  stop

The runner asks the engines of a row in turn, so drift of the machine meets them all.
Needs nothing beyond the standard library.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Engine", "Job", "peak_mb", "serve"]


@dataclass(frozen=True)
class Job:
    """A fit that can be called again and again.

    Parameters
    ----------
    call : callable
        Fits and returns the result, finished.
    objective : callable
        -2 log L or the REML criterion of a result.
    n : int
        Rows.
    fits : int
        Fits in one call, by which times are divided.
    note : callable
        Remark on a result, such as what differs from the model that was asked for.
    device : str
        Kind of processor.
    """

    call: Callable[[], Any]
    objective: Callable[[Any], float]
    n: int
    fits: int = 1
    note: Callable[[Any], str] = lambda result: ""
    device: str = "cpu"


@dataclass(frozen=True)
class Engine:
    """Modules to import and a function from request to :class:`Job`."""

    modules: tuple[str, ...]
    prepare: Callable[[dict], Job]


def peak_mb() -> float:
    """Peak memory of this process so far, in MB."""
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (1e6 if sys.platform == "darwin" else 1e3)


def serve(engines: dict[str, Engine]) -> None:
    """Answer requests until the input ends."""
    # compiled code prints to file descriptor 1: keep the line to the runner apart
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    job, reply = _start(engines[request["engine"]], request)
    print(json.dumps(reply), file=out, flush=True)
    for _ in sys.stdin:
        assert job is not None
        seconds = _round(job, request["min_time"])
        print(json.dumps({"seconds": seconds}), file=out, flush=True)


def _start(engine: Engine, request: dict) -> tuple[Job | None, dict]:
    try:
        modules = [importlib.import_module(m) for m in engine.modules]
    except ImportError as error:
        return None, {"status": "not installed", "note": str(error)}
    base = peak_mb()
    job = engine.prepare(request)
    start = time.perf_counter()
    result = job.call()
    first = time.perf_counter() - start
    return job, {
        "status": "ok",
        "version": ", ".join(f"{m.__name__} {_version(m)}" for m in modules),
        "n": job.n,
        "first_s": first / job.fits,
        "objective": float(job.objective(result)),
        "base_mb": base,
        "note": job.note(result),
        "device": job.device,
    }


def _version(module) -> str:
    found = getattr(module, "__version__", None)
    if found is not None:
        return str(found)
    from importlib.metadata import version

    return version(module.__name__.partition(".")[0])


def _round(job: Job, min_time: float) -> float:
    """Seconds per fit: the median of as many calls as fill ``min_time``."""
    gc.collect()
    seconds: list[float] = []
    while sum(seconds) < min_time:
        start = time.perf_counter()
        job.call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / job.fits
