import csv
import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COLUMNS = (
    "row engine status n repeats first_s median_s min_s max_s ratio objective "
    "criterion peak_mb base_mb version dtype device machine date note"
).split()
SLEEPSTUDY_REML = 1743.6283  # lme4 1.1.31

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the repository")


@pytest.fixture(scope="module")
def runner():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["run"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = [p for p in sys.path if p != str(FOLDER)]
        for name in ("run", "rows", "workers"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def sleepstudy_lines(tmp_path_factory):
    """The runner's CSV for the smallest row, jaxglmm alone."""
    out = tmp_path_factory.mktemp("benchmarks") / "deeper" / "out.csv"
    command = [sys.executable, str(FOLDER / "run.py"), "--rows", "sleepstudy"]
    command += ["--peers", "none", "--repeat", "2", "--min-time", "0.01"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "jaxglmm-fit" in done.stdout
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sleepstudy_row_has_its_columns_and_reaches_the_optimum(sleepstudy_lines):
    assert [line["engine"] for line in sleepstudy_lines] == ["jaxglmm", "jaxglmm-fit"]
    for line in sleepstudy_lines:
        assert list(line) == COLUMNS
        assert line["status"] == "ok"
        assert (line["n"], line["repeats"]) == ("180", "2")
        objective = float(line["objective"])
        np.testing.assert_allclose(objective, SLEEPSTUDY_REML, rtol=0, atol=1e-3)


def test_sleepstudy_row_times_and_memory_are_sensible(sleepstudy_lines):
    for line in sleepstudy_lines:
        low, middle, high, first = (
            float(line[c]) for c in ("min_s", "median_s", "max_s", "first_s")
        )
        assert 0.0 < low <= middle <= high < first
        assert 0.0 < float(line["base_mb"]) <= float(line["peak_mb"])
        assert "jaxglmm" in line["version"]
        assert "jax " in line["version"]
    assert float(sleepstudy_lines[0]["ratio"]) == 1.0


def test_a_peer_that_is_not_there_is_reported_and_not_an_error(runner, tmp_path):
    (row,) = runner.select(["sleepstudy"])
    row = dataclasses.replace(row, engines=("glmm",))
    options = runner.Options(
        peers=("glmm",), peer_python=str(tmp_path / "python"), repeat=1, data=tmp_path
    )
    (fitted,) = runner.run_fits(row, options)
    (printed,) = runner.run_processes(row, options)
    assert fitted.status == printed.status == "not installed"
    assert "not installed" in runner.table([fitted])


def test_growth_exponents(runner):
    np.testing.assert_allclose(
        runner.exponent([1e4, 1e5, 1e6], [2.0, 20.0, 200.0]), 1.0
    )
    records = [
        runner.Record(
            f"growth-{n}", "jaxglmm", n=n, median_s=n**1.5, peak_mb=300 + n / 1e4
        )
        for n in (10_000, 100_000, 1_000_000)
    ]
    runner.add_growth(records)
    assert records[-1].note == "time ~ n^1.50, memory ~ constant + n^1.00"


def test_unknown_rows_and_peers_are_named(runner):
    with pytest.raises(SystemExit, match="no row 'sleep'; there are sleepstudy"):
        runner.main(["--rows", "sleep"])
    with pytest.raises(SystemExit, match="no peer 'lme5'"):
        runner.main(["--peers", "lme5"])


def test_formulas_and_made_data(runner, tmp_path):
    (row,) = runner.select(["insteval"])
    assert row.formula == "y ~ service + (1 | s) + (1 | d) + (1 | dept:service)"
    tiny = dataclasses.replace(runner.select(["groups"])[0], data="one-factor-10")
    file = Path(runner.make_data(tiny, tmp_path)["data"])
    lines = file.read_text().splitlines()
    assert lines[0] == "y,x,g"
    assert [line.rpartition(",")[2] for line in lines[1:]] == list("0001112223")
    assert all(math.isfinite(float(line.partition(",")[0])) for line in lines[1:])


def test_gpu_rows_without_time_are_lines_too(tmp_path):
    """Without a GPU and without time nothing is fitted, and every row says so."""
    out = tmp_path / "gpu.csv"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--quick", "--budget", "0"]
    done = subprocess.run(
        [*command, "--csv", str(out)], timeout=120, capture_output=True, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no GPU found" in done.stdout
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    assert {line["device"] for line in lines} == {"cpu"}
    assert {line["status"] for line in lines} == {"no time left"}
    assert "refit-sleepstudy" in {line["row"] for line in lines}


def test_the_picture_of_refits_is_made(tmp_path):
    out = tmp_path / "refit.png"
    command = [sys.executable, str(FOLDER / "scaling.py"), "--picture"]
    results = FOLDER / "results" / "refit.csv"
    done = subprocess.run(
        [*command, str(results), str(out)], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_scaling_has_a_line_per_size(tmp_path):
    out = tmp_path / "scaling.csv"
    command = [sys.executable, str(FOLDER / "scaling.py"), "--most", "100"]
    done = subprocess.run(
        [*command, "--repeat", "1", "--out", str(out)],
        timeout=600, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    names = ["lanes-100", "groups-10", "groups-100", "rows-10", "rows-100"]
    assert [line["row"] for line in lines] == names
    assert "groups^" in lines[2]["note"]
