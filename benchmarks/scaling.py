"""How lanes scale: in their number, in groups and in rows; and a picture of refits.

    python benchmarks/scaling.py [--most N] [--out FILE.csv]
    python benchmarks/scaling.py --picture benchmarks/results/refit.csv FILE.png

Every line is a process of its own that simulates and fits lanes by ``recovery_study``:
a first time, which compiles, and then ``--repeat`` times.

    lanes    sleepstudy, 10^2 to 10^6 lanes; memory must not grow with them
    groups   1,000 lanes of ``y ~ x + (x | g)``, 10 rows a group, x drawn
    rows     1,000 lanes of 20 groups, x drawn

With x drawn no two groups are alike, so nothing can be pooled.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from run import OURS, Record, describe_machine, exponent, table, write  # noqa: E402

_SIZES = {
    "lanes": (100, 1_000, 10_000, 100_000, 1_000_000),
    "groups": (10, 100, 1_000),
    "rows": (10, 100, 1_000),
}
_LANES = 1_000


def measure(kind: str, size: int, repeat: int) -> dict:
    """Times of one size in this process: seconds per lane, and the peak of memory."""
    import resource
    import time

    import jax
    import numpy as np

    import jaxglmm as jg

    with jax.enable_x64(True):
        if kind == "lanes":
            formula, data = (
                "Reaction ~ Days + (Days | Subject)",
                jg.datasets.sleepstudy(),
            )
            design, n_sims = jg.design(formula, data), size
        else:
            n_sims = _LANES
            n_groups, a_group = (size, 10) if kind == "groups" else (20, size)
            rng = np.random.default_rng(size)
            X = np.stack(
                [np.ones(n_groups * a_group), rng.standard_normal(n_groups * a_group)],
                1,
            )
            group = np.repeat(np.arange(n_groups), a_group)
            design = jg.Design(X[:, 0], X, (jg.Term(X, group),))
        params = jg.Params(
            beta=np.array([1.0, 0.5]),
            theta=np.array([0.8, 0.1, 0.4]),
            sigma=np.array(1.0),
        )
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        study = jg.recovery_study(1, design, params, n_sims=n_sims, progress=False)
        seconds.append((time.perf_counter() - start) / n_sims)
    left = 1.0 - float(study.rates()["converged"].iloc[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    return {
        "seconds": seconds, "n": design.n_obs, "peak_mb": peak,
        "note": f"{n_sims:,} lanes, {round(left * n_sims)} not converged",
        "version": f"jaxglmm {jg.__version__}, jax {jax.__version__}",
    }  # fmt: skip


def run(most: int, repeat: int) -> list[Record]:
    """All sizes up to ``most``, each in a process of its own."""
    records = []
    machine, date = describe_machine(), datetime.date.today().isoformat()
    for kind, sizes in _SIZES.items():
        lines = []
        for size in sizes:
            if size > most:
                continue
            print(f"{kind} {size:,}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--one", kind, str(size)]
            command += ["--repeat", str(repeat)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            answer = json.loads(done.stdout.splitlines()[-1])
            first, *seconds = answer.pop("seconds")
            record = Record(
                row=f"{kind}-{size}", engine=OURS, criterion="REML", machine=machine,
                date=date, first_s=first, **answer,
            )  # fmt: skip
            record.set_times(seconds)
            lines.append(record)
        if len(lines) > 1:
            sizes = [float(r.row.split("-")[1]) for r in lines]
            slope = exponent(sizes, [r.median_s or 0.0 for r in lines])
            lines[-1].note += f"; time per lane ~ {kind}^{slope:.2f}"
        records += lines
    return records


def picture(results: Path, out: Path) -> None:
    """Lanes per second of every engine, from a CSV of the ``refit`` rows."""
    from matplotlib.figure import Figure

    with results.open(newline="") as file:
        lines = [r for r in csv.DictReader(file) if r["median_s"]]
    rows = list(dict.fromkeys(r["row"] for r in lines))
    figure = Figure(figsize=(8.0, 2.6), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, row in zip(panels, rows):
        own = sorted(
            (1.0 / float(r["median_s"]), r["engine"]) for r in lines if r["row"] == row
        )
        names = [name.replace("jaxglmm-fit", "jit(fit), a loop") for _, name in own]
        bars = panel.barh(names, [speed for speed, _ in own], color="#9db4c0")
        for bar, (_, name) in zip(bars, own):
            bar.set_color("#d1495b" if name == OURS else "#9db4c0")
        panel.bar_label(bars, [f"{speed:,.0f}" for speed, _ in own], padding=2, size=7)
        panel.set(xscale="log", title=row.removeprefix("refit-"))
        panel.set_xlim(1.0, 20.0 * own[-1][0])
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    where = f"{lines[0]['machine']}, {lines[0]['date']}"
    figure.supxlabel(f"fits per second ({where})", size=8)
    figure.savefig(out, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How lanes scale.")
    parser.add_argument("--most", type=int, default=1_000_000, help="largest size")
    parser.add_argument("--repeat", type=int, default=3, help="timed rounds [3]")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--picture", nargs=2, type=Path, metavar=("CSV", "FILE"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        kind, size = given.one
        print(json.dumps(measure(kind, int(size), given.repeat)))
        return
    if given.picture:
        picture(*given.picture)
        return
    records = run(given.most, given.repeat)
    print(table(records))
    if given.out:
        write(records, given.out)


if __name__ == "__main__":
    main()
