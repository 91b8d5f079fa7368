"""Time jaxglmm beside its peers: one table on the screen, one CSV file.

    python benchmarks/run.py [--rows NAME,...] [--peers NAME,...|none]
                             [--peer-python PATH] [--repeat N] [--out FILE.csv]

Each engine of a row runs in a process of its own, which reads the data and fits once;
then the engines are asked in turn for one timed round, N times over. This process
itself imports nothing but the standard library, see :func:`rows.make_data`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from rows import ROWS, SLEEPSTUDY, NoDataError, Row, make_data, select  # noqa: E402
from workers import OURS, EngineError, Worker, scratch_environment, wait  # noqa: E402

PEERS = ("lme4", "glmmTMB", "glmm", "gpboost", "mixedlm", "statsmodels")


@dataclass
class Record:
    """One line of the result: an engine on a row. Times in seconds per fit."""

    row: str
    engine: str
    status: str = "ok"
    n: int | None = None
    repeats: int = 0
    first_s: float | None = None
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    ratio: float | None = None
    objective: float | None = None
    criterion: str = ""
    peak_mb: float | None = None
    base_mb: float | None = None
    version: str = ""
    dtype: str = "float64"
    device: str = "cpu"
    machine: str = ""
    date: str = ""
    note: str = ""

    def set_times(self, seconds: list[float]) -> None:
        """Summarize the rounds."""
        if seconds:
            self.repeats = len(seconds)
            self.median_s = statistics.median(seconds)
            self.min_s, self.max_s = min(seconds), max(seconds)


@dataclass(frozen=True)
class Options:
    """What the command line decides for all rows."""

    peers: tuple[str, ...] = ()
    peer_python: str = sys.executable
    repeat: int = 5
    min_time: float = 0.1
    budget: float = 60.0
    timeout: float = 600.0
    data: Path = HERE / "data"
    insteval: Path | None = None

    def engines(self, row: Row) -> list[str]:
        """Engines of a row that were asked for."""
        return [e for e in row.engines if e.startswith(OURS) or e in self.peers]


# ---- rows that fit -----------------------------------------------------------------


def run_fits(row: Row, options: Options) -> list[Record]:
    """All engines of a row, one timed round each in turn."""
    records = [_record(row, engine) for engine in options.engines(row)]
    try:
        files = make_data(row, options.data, options.insteval)
    except NoDataError as error:
        for record in records:
            record.status, record.note = "no data", str(error)
        return records
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {r.engine: [] for r in records}
    with scratch_environment() as environment:
        for record in records:
            _say(f"{row.name}: {record.engine}, first call")
            _start(record, row, files, options, environment, workers)
        for i in range(options.repeat):
            _say(f"{row.name}: round {i + 1} of {options.repeat}")
            for record in records:
                _round(record, options, workers, seconds[record.engine])
        for record in records:
            if record.engine in workers:
                record.peak_mb = workers[record.engine].stop()
            record.set_times(seconds[record.engine])
    return records


def _record(row: Row, engine: str) -> Record:
    criterion = "ML" if engine == "gpboost" or not row.reml else "REML"
    criterion = criterion if row.distribution == "gaussian" else "Laplace"
    return Record(row=row.name, engine=engine, criterion=criterion)


def _start(record, row, files, options, environment, workers) -> None:
    """Start an engine and let it fit once; nothing is kept of one that cannot."""
    request = {
        **asdict(row), "formula": row.formula, "engine": record.engine,
        "min_time": options.min_time, "responses": None, **files,
    }  # fmt: skip
    worker = None
    try:
        worker = Worker(
            record.engine, options.peer_python, options.timeout, environment
        )
        answer = worker.ask(request)
    except EngineError as error:
        record.status = str(error)
        if worker is not None:
            worker.stop()
        return
    record.status = answer["status"]
    if record.status != "ok":
        record.note = answer["note"]
        worker.stop()
        return
    for name in set(answer) - {"status"}:
        setattr(record, name, answer[name])
    workers[record.engine] = worker


def _round(record: Record, options: Options, workers: dict, seconds: list) -> None:
    """One timed round, unless the engine has had its time; the first is for all."""
    worker = workers.get(record.engine)
    if worker is None or (seconds and worker.spent > options.budget):
        return
    try:
        seconds.append(worker.ask({})["seconds"])
    except EngineError as error:
        record.status = str(error)
        workers.pop(record.engine).stop()


# ---- rows that start a process and print a table -----------------------------------


def run_processes(row: Row, options: Options) -> list[Record]:
    """From nothing to a printed table; ``jaxglmm-first`` never finds compiled code."""
    records = [_record(row, engine) for engine in options.engines(row)]
    seconds: dict[str, list[float]] = {r.engine: [] for r in records}
    with scratch_environment() as warm:
        for i in range(options.repeat + 1):
            _say(f"{row.name}: round {i} of {options.repeat}")
            for record in records:
                if record.status != "ok":
                    continue
                took = _run_once(record, row, options, warm)
                if i == 0:
                    record.first_s = took
                elif took is not None:
                    seconds[record.engine].append(took)
    for record in records:
        record.set_times(seconds[record.engine])
    return records


def _run_once(record: Record, row: Row, options: Options, warm: dict) -> float | None:
    command = _table_command(record.engine, row, options)
    if not record.engine.startswith(OURS):
        return _timed(record, command, options, None)
    if not record.engine.endswith("-first"):
        return _timed(record, command, options, warm)
    with scratch_environment() as empty:
        return _timed(record, command, options, empty)


def _table_command(engine: str, row: Row, options: Options) -> list[str]:
    formula = row.formula
    file = SLEEPSTUDY.as_posix()
    read = f"import pandas as pd; d = pd.read_csv({file!r}); "
    python = {
        "glmm": read + f"import glmm; print(glmm.fit(d, {formula!r}).summary())",
        "mixedlm": "import mixedlm as m; "
        f"r = m.lmer({formula!r}, m.load_sleepstudy()); print(r.summary()); "
        "print('REML criterion:', r.REMLcrit())",
        "statsmodels": read + "import statsmodels.formula.api as smf; "
        "m = smf.mixedlm('Reaction ~ Days', d, groups=d['Subject'], "
        "re_formula='~ Days'); print(m.fit().summary())",
    }
    r = {
        "lme4": f"suppressMessages(library(lme4)); print(summary(lmer({formula}, "
        "sleepstudy)))",
        "glmmTMB": "suppressMessages(library(glmmTMB)); "
        f"m <- glmmTMB({formula}, read.csv('{file}'), REML = TRUE); "
        "print(summary(m)); cat('REML criterion:', -2 * logLik(m))",
    }
    if engine in python:
        return [options.peer_python, "-c", python[engine]]
    if engine in r:
        return ["Rscript", "--vanilla", "-e", r[engine]]
    return [sys.executable, "-m", "jaxglmm", "fit", "sleepstudy", formula]


def _timed(record: Record, command: list[str], options, environment) -> float | None:
    """Run a command; its time, with peak memory and objective put on the record."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=errors, env=environment, text=True
            )
        except OSError:
            record.status = "not installed"
            return None
        code, memory = wait(process, options.timeout)
        took = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        printed, complaint = out.read(), errors.read()
    if code != 0:
        missing = re.search("ModuleNotFoundError|no package called", complaint)
        last = (complaint.strip().splitlines() or ["no message"])[-1]
        record.status = "not installed" if missing else f"failed: {last[:200]}"
        return None
    record.peak_mb = max(memory or 0.0, record.peak_mb or 0.0) or None
    record.objective, record.n = _printed_objective(printed), 180
    return took


def _printed_objective(text: str) -> float | None:
    """-2 log L out of a printed table, in the words of whichever package."""
    found = re.search(r"REML criterion[^:]*:\s*([\d.]+)", text)
    if found:
        return float(found.group(1))
    found = re.search(r"Log-Likelihood:\s*(-[\d.]+)", text)
    return -2.0 * float(found.group(1)) if found else None


# ---- what the rows say together ----------------------------------------------------


def add_ratios(records: list[Record]) -> None:
    """Median time over that of jaxglmm's people's door on the same row."""
    ours = {r.row: r.median_s for r in records if r.engine == OURS}
    for record in records:
        base = ours.get(record.row)
        if base and record.median_s:
            record.ratio = record.median_s / base


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log(values) on log(sizes) by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    cross = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return cross / sum((a - mean_x) ** 2 for a in x)


def add_growth(records: list[Record]) -> None:
    """Exponents of time and memory, noted on the largest growth row."""
    done = [
        r for r in records
        if r.row.startswith("growth") and r.engine == OURS and r.median_s
    ]  # fmt: skip
    if len(done) < 2:
        return
    sizes = [float(r.n or 0) for r in done]
    note = f"time ~ n^{exponent(sizes, [r.median_s or 0.0 for r in done]):.2f}"
    peaks = [r.peak_mb or 0.0 for r in done]
    # the interpreter's and the compiler's share, a constant, drops out of differences
    steps = [b - a for a, b in pairwise(peaks)]
    if len(steps) > 1 and min(steps) > 0:
        note += f", memory ~ constant + n^{exponent(sizes[1:], steps):.2f}"
    last = done[-1]
    last.note = "; ".join(filter(None, [last.note, note]))


def describe_machine() -> str:
    """Processor, cores this process may use, system, Python."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            models = (x.partition(":")[2].strip() for x in lines if "model name" in x)
            name = next(models, name)
    except OSError:
        pass
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count()
    python = platform.python_version()
    return f"{name}, {cores} cores, {platform.system()}, Python {python}"


# ---- output ------------------------------------------------------------------------


def table(records: list[Record]) -> str:
    """Aligned text, a line per engine."""
    head = (
        "row", "engine", "n", "first", "median", "min - max", "ratio", "objective",
        "peak MB", "note",
    )  # fmt: skip
    lines = [head, *map(_cells, records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        left = [line[i].ljust(widths[i]) for i in (0, 1)]
        right = [line[i].rjust(widths[i]) for i in range(2, len(head) - 1)]
        text.append("  ".join([*left, *right, line[-1]]).rstrip())
    return "\n".join(text)


def _cells(r: Record) -> tuple[str, ...]:
    spread = f"{_time(r.min_s)} - {_time(r.max_s)}" if r.repeats > 1 else ""
    note = r.note if r.status == "ok" else f"{r.status} {r.note}".strip()
    return (
        r.row,
        r.engine,
        f"{r.n:,}" if r.n else "",
        _time(r.first_s),
        _time(r.median_s),
        spread,
        f"{r.ratio:.3g}" if r.ratio else "",
        f"{r.objective:.4f}" if r.objective is not None else "",
        f"{r.peak_mb:.0f}" if r.peak_mb else "",
        note,
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write(records: list[Record], path: Path) -> None:
    """One CSV line per engine and row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Record)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for record in records:
            writer.writerow(asdict(record))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- command line ------------------------------------------------------------------


def run(rows: list[Row], options: Options) -> list[Record]:
    """Run rows in turn."""
    machine, date = describe_machine(), datetime.date.today().isoformat()
    records = []
    for row in rows:
        work = run_processes if row.work == "process" else run_fits
        records += work(row, options)
    add_ratios(records)
    add_growth(records)
    for record in records:
        record.machine, record.date = machine, date
    return records


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    families = ",".join(dict.fromkeys(r.family for r in ROWS))
    parser = argparse.ArgumentParser(description="Time jaxglmm beside its peers.")
    add = parser.add_argument
    add("--rows", default=families, help="names or families [%(default)s]")
    add("--peers", default=",".join(PEERS), help="names, or none [%(default)s]")
    add("--peer-python", default=sys.executable, help="interpreter with the peers")
    add("--repeat", type=int, default=5, help="timed rounds [%(default)s]")
    add("--min-time", type=float, default=0.1, help="seconds of calls in a round")
    add("--budget", type=float, default=60.0,
        help="seconds after which an engine gets no further round")  # fmt: skip
    add("--timeout", type=float, default=600.0, help="seconds to wait for an answer")
    add("--data", type=Path, default=HERE / "data", help="folder for data made here")
    add("--insteval", type=Path, help="the InstEval data as a CSV file")
    add("--out", type=Path, default=HERE / "results" / "latest.csv")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = _arguments(arguments)
    peers = () if given.peers == "none" else tuple(given.peers.split(","))
    unknown = [p for p in peers if p not in PEERS]
    if unknown:
        raise SystemExit(f"no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    if given.insteval is not None and not given.insteval.exists():
        raise SystemExit(f"no file {given.insteval}")
    try:
        rows = select(given.rows.split(","))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    options = Options(
        peers=peers, peer_python=shutil.which(given.peer_python) or given.peer_python,
        repeat=given.repeat, min_time=given.min_time, budget=given.budget,
        timeout=given.timeout, data=given.data.resolve(),
        insteval=given.insteval and given.insteval.resolve(),
    )  # fmt: skip
    records = run(rows, options)
    write(records, given.out)
    print(describe_machine())
    for version in sorted({r.version for r in records if r.version}):
        print(f"  {version}")
    print(table(records))


if __name__ == "__main__":
    main()
