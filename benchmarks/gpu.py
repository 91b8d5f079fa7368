"""The GPU beside the processor of the same machine: the same answers, and how fast.

    python benchmarks/gpu.py [--quick] [--rows NAME,...] [--csv FILE.csv]
                             [--budget SECONDS]

One process runs every row on the CPU and then on the first GPU, a line as soon as it is
known, the most important rows first. A GPU's line says how far its fits are from the
CPU's: the largest |a - b| / max(|b|, 1) over the lanes that converged on both, the
number of status codes that differ, and whether a second call gave the same bits. A row
that fails is a line too. Rows that would start after ``--budget`` seconds are left out.

Responses are drawn here, with fixed seeds, at beta, theta and sigma:

    y = eta + sigma e,  y ~ Poisson(exp(eta)),  w y ~ Binomial(w, 1 / (1 + exp(-eta))),
    eta = X beta + sum_t sigma z_t Lambda_t u_t[group_t]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["JAXGLMM_CACHE"] = "off"  # a first call compiles
if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
    os.environ["JAX_PLATFORMS"] += ",cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from run import Record, describe_machine  # noqa: E402

import jaxglmm as jg  # noqa: E402
from jaxglmm.studies.batch import check_batch, engine_for  # noqa: E402

_REPEAT = 3
_MIN_TIME = 0.05  # seconds of calls in a round
_COMPARED = 100  # lanes whose mean objective is reported, as in run.py


@dataclass(frozen=True, kw_only=True)
class Model:
    """A design of NumPy arrays, and the parameters that responses are drawn at."""

    design: jg.Design
    family: str | None = None
    beta: tuple[float, ...]
    theta: tuple[float, ...]
    sigma: float = 1.0

    def draw(self, n: int, seed: int) -> np.ndarray:
        """Responses (n, rows)."""
        rng = np.random.default_rng(seed)
        design, at = self.design, 0
        eta = np.broadcast_to(design.X @ np.array(self.beta), (n, design.n_obs)).copy()
        for term in design.terms:
            k = term.k
            Lambda = np.zeros((k, k))
            for j in range(k):  # theta goes by columns
                Lambda[j:, j] = self.theta[at : at + k - j]
                at += k - j
            u = rng.standard_normal((n, term.n_levels, k))
            b = self.sigma * (u @ Lambda.T)[:, term.group]
            eta += np.einsum("ij,lij->li", term.z, b)
        if self.family is None:
            return eta + self.sigma * rng.standard_normal(eta.shape)
        if self.family == "poisson":
            return rng.poisson(np.exp(eta)).astype(float)
        w = np.ones(design.n_obs) if design.weights is None else design.weights
        return rng.binomial(w.astype(int), 1.0 / (1.0 + np.exp(-eta))) / w

    def drawn(self, seed: int) -> Model:
        """The same with a drawn response in its design."""
        design = self.design.replace(y=self.draw(1, seed)[0])
        return Model(**{**vars(self), "design": design})


# ---- models ------------------------------------------------------------------------


def _bundled(formula: str, name: str) -> jg.Design:
    return jax.tree.map(np.asarray, jg.design(formula, jg.datasets.load(name)))


def sleepstudy() -> Model:
    return Model(
        design=_bundled("Reaction ~ Days + (Days | Subject)", "sleepstudy"),
        beta=(251.405, 10.467), theta=(0.9667, 0.0152, 0.2309), sigma=25.592,
    )  # fmt: skip


def cbpp() -> Model:
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    return Model(
        design=_bundled(formula, "cbpp"), family="binomial",
        beta=(-1.3985, -0.9923, -1.1287, -1.5803), theta=(0.6423,),
    )  # fmt: skip


def counts() -> Model:
    return Model(
        design=sleepstudy().design, family="poisson",
        beta=(0.1, 0.1), theta=(0.3162, 0.0791, 0.3062),
    )  # fmt: skip


def penicillin() -> Model:
    formula = "diameter ~ 1 + (1 | plate) + (1 | sample)"
    return Model(
        design=_bundled(formula, "penicillin"),
        beta=(22.97,), theta=(1.54, 3.51), sigma=0.55,
    )  # fmt: skip


def _simulated(levels: tuple[int, ...], n: int, **model) -> Model:
    """A covariate and random intercepts of crossed factors; rows of one go in order."""
    rng = np.random.default_rng(20240601)
    X = np.stack([np.ones(n), rng.standard_normal(n)], axis=1)
    groups = [np.arange(n) * levels[0] // n]
    groups += [rng.permutation(np.arange(n) % J) for J in levels[1:]]
    terms = tuple(
        jg.Term(np.ones((n, 1)), g.astype(np.int32), J) for g, J in zip(groups, levels)
    )
    design = jg.Design(np.zeros(n), X, terms)
    return Model(design=design, beta=(0.0, 0.5), **model).drawn(20240602)


def crossed_bernoulli() -> Model:
    return _simulated((60, 20), 1200, family="binomial", theta=(1.0, 0.7))


def groups(n: int) -> Model:
    return _simulated((n // 3,), n, theta=(1.0,))


def groups_poisson(n: int) -> Model:
    return _simulated((n // 3,), n, family="poisson", theta=(0.5,))


def crossed(n: int) -> Model:
    """A level of the first factor has 25 rows, one of the second 100."""
    return _simulated((n // 25, n // 100), n, theta=(0.7, 0.4))


# ---- rows --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row: one fit, or with ``lanes`` refits of so many drawn responses.

    ``cpu_lanes`` is how many of them the CPU is given; ``tiles`` are the GPU's, None
    for the package's own choice, and ``threads`` those of the first of them.
    """

    name: str
    model: Callable[[], Model]
    lanes: int = 0
    cpu_lanes: int = 0
    tiles: tuple[int | None, ...] = (None,)
    threads: tuple[int, ...] = (1,)


def cases(quick: bool) -> tuple[list[Case], list[Case]]:
    """Rows in order of importance, and those rows again with further tiles."""
    many, some, few = (1024, 1024, 256) if quick else (131_072, 65_536, 16_384)
    n, crossed_n = (3000, 2500) if quick else (375_000, 100_000)
    tiles = (256,) if quick else (8192, 1024)
    lanes = [
        Case(name="refit-sleepstudy", model=sleepstudy, lanes=many, cpu_lanes=many),
        Case(name="refit-cbpp", model=cbpp, lanes=many, cpu_lanes=many),
        Case(name="refit-poisson", model=counts, lanes=some, cpu_lanes=few),
    ]
    lanes = [Case(**{**vars(c), "threads": (1, 2)}) for c in lanes]
    first = [
        Case(name="sleepstudy", model=sleepstudy),
        Case(name="cbpp", model=cbpp),
        *lanes,
        Case(name="groups", model=functools.partial(groups, n)),
        Case(name="groups-poisson", model=functools.partial(groups_poisson, n)),
        Case(name="crossed", model=functools.partial(crossed, crossed_n)),
        Case(name="crossed-bernoulli", model=crossed_bernoulli),
        Case(name="penicillin", model=penicillin),
    ]
    return first, [
        Case(**{**vars(c), "tiles": (t,), "threads": (1,)})
        for t in tiles
        for c in lanes
    ]


@dataclass(frozen=True)
class Timed:
    """The fits of a row on one device, and the seconds of a call."""

    fits: Any
    first: float
    warm: list[float]
    same_bits: bool
    note: str = ""


def time_call(call: Callable[[], Any]) -> Timed:
    """First call, then rounds of calls; ``call`` returns a Fit of NumPy arrays."""
    start = time.perf_counter()
    first = call()
    took = time.perf_counter() - start
    start = time.perf_counter()
    again = call()
    once = time.perf_counter() - start
    n = int(np.clip(_MIN_TIME / once, 1, 1000))
    warm = []
    for _ in range(_REPEAT):
        start = time.perf_counter()
        for _ in range(n):
            call()
        warm.append((time.perf_counter() - start) / n)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again))
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
    return Timed(first, took, warm, same)


def time_fit(model: Model, device) -> Timed:
    """``jit(fit)`` with the design on the device, which computes and returns."""
    design = jax.device_put(model.design, device)
    compiled = jax.jit(lambda d: jg.fit(d, model.family))

    def call():
        return jax.block_until_ready(compiled(design))

    timed = time_call(call)
    fits = jax.tree.map(lambda x: np.asarray(x)[None], timed.fits)
    return Timed(fits, timed.first, timed.warm, timed.same_bits)


def time_lanes(model: Model, ys, device, tile: int | None, threads: int | None):
    """``fit_batch`` with everything in the memory of the host."""
    what, design = check_batch(model.design, model.family, None, None, None, None)
    engine = engine_for(what, design, len(ys), tile, threads, [device])

    def call():
        return jg.fit_batch(
            model.design, ys, model.family, effects=False, tile=tile, threads=threads,
            devices=[device], progress=False,
        )  # fmt: skip

    timed = time_call(call)
    rate = len(ys) / float(np.median(timed.warm))
    note = (
        f"{len(ys):,} lanes, tile {engine.tile:,}, {engine.threads} threads: "
        f"{rate:,.0f} lanes/s, first call {timed.first:.1f} s, "
        f"{int((~timed.fits.converged).sum())} not converged"
    )
    return Timed(timed.fits, timed.first, timed.warm, timed.same_bits, note)


def differences(fits, reference) -> str:
    """How far fits (L, ...) are from those of the CPU, for the lanes that both have."""
    n = min(len(fits.status), len(reference.status))
    fits, reference = (jax.tree.map(lambda x: x[:n], f) for f in (fits, reference))
    both = fits.converged & reference.converged

    def largest(a, b) -> str:
        a, b = a[both], b[both]
        return f"{np.max(np.abs(a - b) / np.maximum(np.abs(b), 1.0), initial=0):.1e}"

    return (
        "off the CPU by "
        f"{largest(fits.objective, reference.objective)} in the objective, "
        f"{largest(fits.params.theta, reference.params.theta)} in theta, "
        f"{largest(fits.params.beta, reference.params.beta)} in beta, "
        f"{int(np.sum(fits.status != reference.status))} of {n} status codes"
    )


class Runner:
    """Runs rows on the devices; remembers the CPU's fits and times."""

    def __init__(self, cpu, gpu, budget: float):
        self.devices = [cpu] if gpu is None else [cpu, gpu]
        self.deadline = time.perf_counter() + budget
        self.fits: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.data: dict[str, tuple[Model, np.ndarray | None]] = {}
        self.facts = {
            "version": f"jaxglmm {jg.__version__}, jax {jax.__version__}",
            "machine": describe_machine(),
            "date": datetime.date.today().isoformat(),
        }

    def lines(self, case: Case) -> Iterator[Record]:
        """One Record per device, tile and number of threads."""
        for device in self.devices:
            on_cpu = device is self.devices[0]
            if on_cpu and case.name in self.fits:
                continue
            ways = [(None, None)]
            if case.lanes and not on_cpu:
                ways = [(t, k) for t in case.tiles for k in case.threads]
            for tile, threads in ways:
                yield self.line(case, device, on_cpu, tile, threads)

    def line(self, case: Case, device, on_cpu: bool, tile, threads) -> Record:
        """Time a row on a device."""
        name = "cpu" if on_cpu else device.device_kind
        engine = "jaxglmm" if case.lanes else "jaxglmm-fit"
        record = Record(case.name, engine, device=name, **self.facts)
        if time.perf_counter() > self.deadline:
            record.status = "no time left"
            return record
        try:
            model, ys = self._data(case)
            record.n = model.design.n_obs
            record.criterion = "Laplace" if model.family else "REML"
            if ys is None:
                timed = time_fit(model, device)
            else:
                n = case.cpu_lanes if on_cpu else case.lanes
                timed = time_lanes(model, ys[:n], device, tile, threads)
            self._fill(record, timed, device, on_cpu)
        except Exception as error:  # the other rows are worth having
            record.status = "failed"
            record.note = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        return record

    def _data(self, case: Case) -> tuple[Model, np.ndarray | None]:
        if case.name not in self.data:
            model = case.model()
            ys = model.draw(case.lanes, 20240603) if case.lanes else None
            self.data[case.name] = model, ys
        return self.data[case.name]

    def _fill(self, record: Record, timed: Timed, device, on_cpu: bool) -> None:
        n = len(timed.fits.status)
        record.first_s = timed.first / n
        record.set_times([s / n for s in timed.warm])
        record.objective = float(timed.fits.objective[:_COMPARED].mean())
        notes = [timed.note, f"status {timed.fits.status[0]}" if n == 1 else ""]
        if on_cpu:
            self.fits[record.row] = timed.fits
            self.seconds[record.row] = record.median_s or 0.0
        elif record.row in self.fits:
            notes.append(differences(timed.fits, self.fits[record.row]))
            record.ratio = (record.median_s or 0.0) / self.seconds[record.row]
        notes.append("same bits twice" if timed.same_bits else "other bits twice")
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        notes.append(f"{peak / 1e9:.2f} GB at most so far" if peak else "")
        record.note = "; ".join(filter(None, notes))


# ---- command line ------------------------------------------------------------------


def _printed(r: Record) -> str:
    times = f"{'':>24}"
    if r.median_s is not None:
        times = f"{r.first_s:>12.3g}{r.median_s:>12.3g}"
    ratio = f"{r.ratio:.3g}" if r.ratio else ""
    status = "" if r.status == "ok" else f"{r.status} "
    return f"{r.row:<18}{r.device[:12]:<13}{times}{ratio:>8}  {status}{r.note}"


def _devices() -> tuple[Any, Any]:
    """The processor, and the first GPU or None."""
    gpus = [d for d in jax.local_devices() if d.platform == "gpu"]
    return jax.local_devices(backend="cpu")[0], gpus[0] if gpus else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare a GPU with the processor.")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rows", help="names, all by default")
    parser.add_argument("--csv", type=Path, help="file to write as well")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds [300]")
    given = parser.parse_args(arguments)
    cpu, gpu = _devices()
    runner = Runner(cpu, gpu, given.budget)
    print(f"{runner.facts['version']}; {runner.facts['machine']}")
    print(f"GPU: {gpu.device_kind}" if gpu else "no GPU found: only the CPU is run")
    print(f"{'row':<18}{'device':<13}{'first s/fit':>12}{'s/fit':>12}{'ratio':>8}")
    names = [f.name for f in fields(Record)]
    with open(given.csv or os.devnull, "w", newline="") as file, jax.enable_x64(True):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        first, further = cases(given.quick)
        for case in first + (further if gpu else []):
            if given.rows and case.name not in given.rows.split(","):
                continue
            for record in runner.lines(case):
                print(_printed(record), flush=True)
                writer.writerow(asdict(record))
                file.flush()


if __name__ == "__main__":
    main()
