"""Lanes of a batch: equal to single fits, whatever the tile, threads and devices."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxglmm as jg
from jaxglmm.errors import DesignError, Status
from jaxglmm.fitting import check_fit, fit_checked
from jaxglmm.studies import lanes as lanes_module
from jaxglmm.studies.batch import check_batch, default_tile, engine_for, limit_of
from jaxglmm.studies.lanes import Engine, Outcome, best_cap, spans
from jaxglmm.studies.progress import Progress


def _model(name):
    """Design, family, method and true parameters of a model."""
    if name == "slope":
        design = jg.design(
            "Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy()
        )
        return design, None, "REML", jg.fit(design).params
    if name == "boundary":  # half of the lanes have a variance of zero
        data = jg.datasets.load("dyestuff2")
        design = jg.design("Yield ~ 1 + (1 | Batch)", data)
        params = jg.Params(jnp.array([5.0]), jnp.array([0.0]), jnp.array(3.7))
        return design, None, "ML", params
    if name == "crossed":
        data = jg.datasets.load("penicillin")
        design = jg.design("diameter ~ 1 + (1 | plate) + (1 | sample)", data)
        return design, None, "REML", jg.fit(design).params
    if name == "binomial":
        data = jg.datasets.load("cbpp")
        formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
        design = jg.design(formula, data)
        beta = jnp.array([-1.4, -1.0, -1.1, -1.6])
        params = jg.Params(beta, jnp.array([0.64]), jnp.array(1.0), jnp.zeros(0))
        return design, jg.Binomial(), "Laplace", params
    design = jg.design("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())
    theta = jnp.array([0.3, 0.05, 0.1])
    params = jg.Params(jnp.array([0.1, 0.1]), theta, jnp.array(1.0), jnp.zeros(0))
    return design, jg.Poisson(), "Laplace", params


MODELS = ("slope", "boundary", "crossed", "binomial", "poisson")


def _responses(design, family, params, n, seed=1):
    draw = jax.jit(jax.vmap(lambda k: jg.simulate(k, params, design, family)))
    return np.array(draw(jax.random.split(jax.random.key(seed), n)))


def _compare(lane, single, u=True):
    """One lane of a stacked Fit beside a fit of its own."""
    assert int(lane.status) == int(single.status)
    assert bool(lane.converged) == bool(single.converged)
    np.testing.assert_allclose(lane.objective, single.objective, rtol=1e-9, atol=1e-7)
    if bool(single.converged):
        at, by = lane.params, single.params
        se = np.sqrt(np.diagonal(np.asarray(single.vcov_beta)))
        assert np.all(np.abs(at.beta - by.beta) <= 1e-5 * se)
        np.testing.assert_allclose(at.theta, by.theta, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(at.sigma, by.sigma, rtol=1e-5)
        np.testing.assert_allclose(lane.vcov_beta, single.vcov_beta, rtol=1e-4)
        for a, b in zip(lane.b if u else (), single.b):
            np.testing.assert_allclose(a, b, atol=1e-4 * float(single.params.sigma))


def _check_lanes(name, n):
    design, family, method, params = _model(name)
    ys = _responses(design, family, params, n)
    ys[n // 2] = np.nan  # a lane that fails, among others that do not
    fits = jg.fit_batch(design, ys, family, method, progress=False)
    one = jax.jit(lambda y: jg.fit(design.replace(y=y), family, method))
    for i in range(n):
        _compare(jax.tree.map(lambda x, i=i: x[i], fits), one(ys[i]))
    assert int(fits.status[n // 2]) == Status.NONFINITE
    assert np.delete(fits.converged, n // 2).mean() > 0.95
    if name == "boundary":
        assert (fits.status == Status.BOUNDARY).sum() > n // 4
    return fits


@pytest.mark.parametrize("name", MODELS)
def test_every_lane_is_the_single_fit(name):
    _check_lanes(name, 48)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_one_of_many_lanes_is_the_single_fit(name):
    _check_lanes(name, 4000)


def test_lanes_at_the_limit_are_those_of_single_fits():
    design, family, method, params = _model("boundary")
    ys = _responses(design, family, params, 48)
    control = jg.Control(max_iter=3)
    fits = jg.fit_batch(design, ys, family, method, control=control, progress=False)
    one = jax.jit(
        lambda y: jg.fit(design.replace(y=y), family, method, control=control)
    )
    assert (fits.status == Status.MAX_ITER).any()
    for i in range(len(ys)):
        _compare(jax.tree.map(lambda x, i=i: x[i], fits), one(ys[i]))


def _equal(a, b):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), a, b
    )


def test_tiles_threads_and_starts_do_not_matter():
    design, family, method, params = _model("boundary")
    ys = _responses(design, family, params, 48)
    fits = jg.fit_batch(design, ys, family, method, progress=False)
    for options in ({"tile": 16, "threads": 2}, {"tile": 1}, {"tile": 5, "threads": 1}):
        again = jg.fit_batch(design, ys, family, method, progress=False, **options)
        _equal(fits.params, again.params)
        np.testing.assert_array_equal(fits.status, again.status)
    thin = jg.fit_batch(design, ys, family, method, effects=False, progress=False)
    assert thin.u == thin.b == ()
    start = np.linspace(0.2, 2.0, 48)[:, None]
    warm = jg.fit_batch(design, ys, family, method, start=start, progress=False)
    np.testing.assert_allclose(warm.objective, fits.objective, atol=1e-7)


def test_unfinished_lanes_are_run_again_without_the_cap():
    design, family, method, params = _model("slope")  # one evaluation for most lanes
    ys = _responses(design, family, params, 320)
    what, checked = check_batch(design, family, method, None, None, None)
    engine = engine_for(what, checked, 320, tile=64, threads=2)
    seen = []

    class Watched(type(engine)):
        def call(self, one, static, shared, lanes, max_iter):
            seen.append((len(lanes), max_iter))
            return super().call(one, static, shared, lanes, max_iter)

    fields = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)}
    engine = Watched(**fields)
    with Progress(320, "", False) as bar:
        chunks = list(
            engine.chunks(_count, (what,), checked, lambda at: ys[at], 320, 50, bar)
        )
    n_iter = np.concatenate([c.outcome.n_iter for _, c in chunks])
    whole = jg.fit_batch(design, ys, family, method, progress=False)
    np.testing.assert_array_equal(n_iter, whole.n_iter)
    cap = best_cap(n_iter[:64], 50)
    assert cap < n_iter[64:].max()
    limits = [limit for _, limit in seen]
    assert limits[0] == 50  # the first tile tells where to cap
    assert limits.count(cap) == 4
    assert sum(n for n, limit in seen[1:] if limit == 50) == np.sum(n_iter[64:] > cap)


def _count(what, design, y, max_iter):
    fit = fit_checked(what, design.replace(y=y), None, max_iter)
    return Outcome(fit.loglik, fit.n_iter, fit.converged)


class _Sleepers(Engine):
    """An engine whose tiles take a moment; the one with lane ``bad`` fails."""

    def call(self, one, static, shared, lanes, max_iter):
        time.sleep(0.01)
        shared.append(lanes[0])
        if static[0] in lanes:
            raise ArithmeticError("no answer")
        return Outcome(lanes, np.ones(len(lanes), int), np.ones(len(lanes), bool))


def _slept(bad: int, begun: list):
    engine = _Sleepers(4, 2, (jax.devices()[0],), False, "elementwise")
    bar = Progress(1000, "", False)
    return engine.chunks(_count, (bad,), begun, lambda at: at, 1000, 50, bar)


def test_a_tile_that_fails_ends_the_run():
    begun, ended = [], []

    def run():
        for _, chunk in _slept(200, begun):
            ended.append((chunk.start, chunk.stop))

    with pytest.raises(ArithmeticError, match="no answer"):
        run()
    assert ended == [(0, 4), (4, 68), (68, 132), (132, 196)]  # all before it
    n = len(begun)
    assert n < 250
    time.sleep(0.1)
    assert len(begun) == n  # no thread goes on


def test_a_run_may_be_left_early():
    begun = []
    chunks = _slept(-1, begun)
    assert next(chunks)[0] == 0
    chunks.close()
    n = len(begun)
    assert n < 250
    time.sleep(0.1)
    assert len(begun) == n
    assert [c.stop for _, c in _slept(-1, [])][-1] == 1000


def test_where_to_cap():
    # 90 lanes of 2, 10 of 20: cap at 2 costs 2 + 2 + (2 + 20) / 10
    assert best_cap(np.repeat([2, 20], [90, 10]), 50) == 2
    assert best_cap(np.repeat([1, 11], [94, 6]), 50) == 1
    assert best_cap(np.full(64, 5), 50) == 50  # all alike: no cap
    assert best_cap(np.repeat([4, 50], [60, 4]), 50) == 4
    assert spans(100, 16) == [(0, 16), (16, 100)]
    assert spans(16, 16) == [(0, 16)]
    assert spans(600, 16) == [(0, 16), (16, 272), (272, 528), (528, 600)]


def test_tiles_suit_the_platform():
    tiles = {}
    for name in ("slope", "poisson"):
        design, family, method, _ = _model(name)
        what, design = check_batch(design, family, method, None, None, None)
        tiles[name] = [default_tile(what, design, p) for p in ("cpu", "gpu")]
    assert tiles == {"slope": [1024, 32768], "poisson": [128, 16384]}
    g = np.arange(30_000) // 3
    one = np.ones((30_000, 1))
    large = jg.Design(one[:, 0], one, (jg.Term(one, g),))
    what, large = check_batch(large, None, None, None, None, None)
    assert [default_tile(what, large, p) for p in ("cpu", "gpu")] == [1, 512]


def test_pql_has_no_cap():
    design, family, _, _ = _model("binomial")
    what, _ = check_fit(design, family, "PQL", None, None, None, None)
    assert limit_of(what) == 0


def test_designs_of_different_sizes():
    rng = np.random.default_rng(5)
    designs = []
    for J in (6, 9, 7):
        g = np.repeat(np.arange(J), rng.integers(3, 7, J))
        x = rng.normal(size=len(g))
        y = 1.0 + 0.5 * x + rng.normal(size=J)[g] + rng.normal(size=len(g))
        X = np.stack([np.ones_like(x), x], 1)
        designs.append(jg.Design(y, X, (jg.Term(np.ones((len(g), 1)), g),)))
    fits = jg.fit_batch(designs, method="ML", progress=False)
    for i, design in enumerate(designs):
        lane = jax.tree.map(lambda x, i=i: x[i], fits)
        single = jg.fit(design, method="ML")
        _compare(lane, single, u=False)
        J = design.terms[0].n_levels
        np.testing.assert_allclose(lane.b[0][:J], single.b[0], atol=1e-6)
        assert (lane.b[0][J:] == 0).all()


def test_the_dtype_is_that_of_the_design():
    design, family, method, params = _model("boundary")
    ys = _responses(design, family, params, 16)

    def single(x):
        return np.asarray(x, np.float32) if x.dtype.kind == "f" else x

    small = jax.tree.map(lambda x: single(np.asarray(x)), design)
    with jax.enable_x64(False):  # whatever the caller's flag says
        wide = jg.fit_batch(
            jax.tree.map(np.asarray, design), ys, family, method, progress=False
        )
    assert wide.loglik.dtype == np.float64
    jg.fitting._warn_float32.cache_clear()
    with pytest.warns(jg.NoticeWarning, match="float32"):
        fits = jg.fit_batch(small, ys, family, method, progress=False)
    assert fits.loglik.dtype == np.float32
    np.testing.assert_allclose(fits.loglik, wide.loglik, rtol=1e-4)


def test_what_cannot_be_fitted_is_said():
    design = _model("boundary")[0]
    ys = np.ones((3, 30))
    with pytest.raises(DesignError, match=r"shape \(L, 30\).*found \(3, 29\)"):
        jg.fit_batch(design, ys[:, 1:])
    with pytest.raises(DesignError, match="needs ys"):
        jg.fit_batch(design)
    with pytest.raises(DesignError, match="one Design only"):
        jg.fit_batch([design], ys)
    with pytest.raises(DesignError, match="empty"):
        jg.fit_batch([])
    with pytest.raises(DesignError, match="lane 1 is no Design; found int"):
        jg.fit_batch([design, 3])
    slope = _model("slope")[0]
    with pytest.raises(DesignError, match=r"lane 1 differs.*columns of X \(2, not 1\)"):
        jg.fit_batch([design, slope])
    with pytest.raises(DesignError, match=r"start must have shape \(1,\) or \(3, 1\)"):
        jg.fit_batch(design, ys, start=np.ones((2, 1)))
    with pytest.raises(ValueError, match="tile must be a positive whole"):
        jg.fit_batch(design, ys, tile=0)
    with pytest.raises(ValueError, match="threads must be"):
        jg.fit_batch(design, ys, threads=1.5)
    with pytest.raises(ValueError, match="devices must be some of"):
        jg.fit_batch(design, ys, devices=[])
    with pytest.raises(ValueError, match="devices must be some of"):
        jg.fit_batch(design, ys, devices=[*jax.devices(), "gpu"])
    with pytest.raises(ValueError, match="unknown method 'EM'"):
        jg.fit_batch(design, ys, method="EM")


# ---- in processes of their own -----------------------------------------------------

SCRIPT = """
import json, sys
import numpy as np
options = json.loads(sys.argv[1])
import jax
if "process" in options:
    jax.distributed.initialize(
        f"127.0.0.1:{options['port']}", 2, options["process"], local_device_ids=[0]
    )
import jaxglmm as jg
with jax.enable_x64(True):
    design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    params = jax.tree.map(np.asarray, jg.fit(design).params)
    design = jax.tree.map(np.asarray, design)
study = jg.recovery_study(
    7, design, params, n_sims=options["n"], tile=options["tile"],
    threads=options["threads"], progress=False,
)
r = study.records["REML"]
out = {k: r[k].tolist() for k in ("estimate", "status", "loglik")}
print(json.dumps({"devices": jax.local_device_count(), **out}))
"""


def _start(options, flags="", prefix=()):
    env = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", SCRIPT, json.dumps(options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def _finish(process, limit=240):
    out, err = process.communicate(timeout=limit)
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


def _same(a, b):
    np.testing.assert_array_equal(a["status"], b["status"])
    np.testing.assert_allclose(a["estimate"], b["estimate"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(a["loglik"], b["loglik"], rtol=1e-9)


def test_devices_and_processes_do_not_matter():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = {"n": 200, "tile": 16, "threads": 2}
    alone = _finish(_start(options))
    flag = "--xla_force_host_platform_device_count=4"
    four = _finish(_start({**options, "tile": 8}, flag))
    assert four["devices"] == 4
    _same(alone, four)
    both = [_start({**options, "port": port, "process": i}) for i in range(2)]
    for process in both:
        _same(alone, _finish(process))


EVERY_PATH = """
import json, sys
import numpy as np
import jax, jaxglmm as jg
how = {"threads": int(sys.argv[1]), "tile": 64, "progress": False}
load, rng, ended = jg.datasets.load, np.random.default_rng(1), {}
with jax.enable_x64(True):
    slope = jg.design("Reaction ~ Days + (Days | Subject)", load("sleepstudy"))
    one = jg.design("Yield ~ 1 + (1 | Batch)", load("dyestuff"))
    two = jg.design("diameter ~ 1 + (1 | plate) + (1 | sample)", load("penicillin"))
    herds = jg.design("incidence/size ~ period + (1 | herd)", load("cbpp"),
                      weights="size")
    params = jax.tree.map(np.asarray, jg.fit(one).params)
ready = lambda design: jax.tree.map(np.asarray, design)
slope, one, two, herds = map(ready, (slope, one, two, herds))
def normal(design, n):
    return rng.standard_normal((n, design.n_obs))
for name, design, n in (("slope", slope, 2000), ("crossed", two, 200)):
    ended[name] = jg.fit_batch(design, normal(design, n), **how).status
size = herds.weights.astype(int)
cases = rng.binomial(size, 0.2, (500, len(size))) / size
ended["binomial"] = jg.fit_batch(herds, cases, "binomial", **how).status
counts = rng.poisson(1.0, (200, slope.n_obs)).astype(float)
ended["poisson"] = jg.fit_batch(slope, counts, "poisson", **how).status
lanes = [one.replace(y=y) for y in normal(one, 300)]
ended["designs"] = jg.fit_batch(lanes, **how).status
study = jg.recovery_study(7, one, params, n_sims=2000, **how)
ended["recovery"] = study.records["REML"]["status"]
m = jg.glmm("Yield ~ 1 + (1 | Batch)", load("dyestuff"))
ended["bootstrap"] = m.bootstrap(500, key=1, **how).status
slopes = jg.glmm("Reaction ~ Days + (Days | Subject)", load("sleepstudy"))
curve = jg.power_curve(slopes, "Days", key=1, effect=[2.0, 4.0], n_sims=200, **how)
ended["power"] = curve.p_values.ravel()
print(json.dumps({name: len(s) for name, s in ended.items()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("prefix", [(), ("taskset", "-c", "0")])
def test_no_run_hangs(threads, prefix):
    command = [*prefix, sys.executable, "-c", EVERY_PATH, str(threads)]
    for i in range(20):
        limit = 120 if i else 300  # the first one may have to compile
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1]) == {
            "slope": 2000, "crossed": 200, "binomial": 500, "poisson": 200,
            "designs": 300, "recovery": 2000, "bootstrap": 500, "power": 400,
        }  # fmt: skip


MILLION = """
import pathlib, numpy as np, jax, jaxglmm as jg
with jax.enable_x64(True):
    d = jg.design("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())
    params = jax.tree.map(np.asarray, jg.fit(d).params)
    d = jax.tree.map(np.asarray, d)
study = jg.recovery_study(1, d, params, n_sims=1_000_000, progress=False)
print(study.rates()["converged"][0])
# the peak of getrusage would begin with that of the process that started this one
status = pathlib.Path("/proc/self/status").read_text().splitlines()
print(*(int(s.split()[1]) / 1e6 for s in status if s.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_lanes_fit_into_two_gigabytes():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, env=env,
        timeout=900, check=True,
    )  # fmt: skip
    converged, gigabytes = map(float, done.stdout.split())
    assert converged > 0.9999
    assert gigabytes < 2.0


# ---- other platforms ---------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["boundary", "crossed", "binomial"])
def test_programs_lower_for_other_platforms(name, platform):
    design, family, method, params = _model(name)
    ys = np.zeros((4, design.n_obs))

    def batch(ys):
        return jax.vmap(lambda y: jg.fit(design.replace(y=y), family, method))(ys)

    def value(params):
        return jg.loglik(params, design, family, method)

    one = jax.jit(lambda y: jg.fit(design.replace(y=y), family, method))
    for fn, arg in ((one, ys[0]), (jax.jit(batch), ys), (jax.jit(value), params)):
        text = jax.export.export(fn, platforms=[platform])(arg).mlir_module()
        assert "lapack" not in text


class _Asked(Exception):
    """The program that a batch asks for, in place of its run."""


@pytest.mark.parametrize("name", ["boundary", "crossed", "binomial"])
def test_tiles_of_a_batch_lower_for_other_platforms(name, monkeypatch):
    design, family, method, _ = _model(name)
    ys = np.ones((8, design.n_obs))

    def ask(fn, static, *args, **options):
        raise _Asked(fn, static, args)

    monkeypatch.setattr(lanes_module, "run", ask)
    with pytest.raises(_Asked) as asked:
        jg.fit_batch(design, ys, family, method, tile=4, progress=False)
    fn, static, args = asked.value.args
    assert (fn, static[0].tile) == (lanes_module._tile, 4)
    program = jax.jit(functools.partial(fn, *static))
    for platform in ("cuda", "tpu"):
        exported = jax.export.export(program, platforms=[platform])(*args)
        assert exported.out_avals[0].shape[0] == 4
        assert "lapack" not in exported.mlir_module()


# ---- rows level by level -----------------------------------------------------------


def test_arranged_rows_are_the_same_design():
    from jaxglmm.studies.arrange import arrange

    for name in ("binomial", "poisson", "crossed"):
        design, family, method, params = _model(name)
        design = jax.tree.map(np.asarray, design)
        n = design.n_obs
        shuffled = np.random.default_rng(3).permutation(n)
        terms = tuple(jg.Term(t.z[shuffled], t.group[shuffled]) for t in design.terms)
        w = np.ones(n) if design.weights is None else design.weights
        mixed = jg.Design(design.y[shuffled], design.X[shuffled], terms, w[shuffled])
        made = arrange(mixed)
        assert made.design.layout.rows_per_level > 0
        y = _responses(mixed, family, params, 1)[0]
        by_codes = jg.fit(mixed.replace(y=y), family, method)
        by_level = jg.fit(made.with_response(y), family, method)
        np.testing.assert_allclose(by_level.objective, by_codes.objective, rtol=1e-10)
        np.testing.assert_allclose(by_level.b[0], by_codes.b[0], atol=1e-6)
        at = made.design.replace(y=y[made.rows])
        np.testing.assert_allclose(
            jg.loglik(params, at, family, method),
            jg.loglik(params, mixed.replace(y=y), family, method),
            rtol=1e-11,
        )


@pytest.mark.parametrize("k", [1, 2])
def test_pooled_levels_have_the_likelihood_of_all(k):
    from jaxglmm.crossproducts import cross_products
    from jaxglmm.lmm import profiled_objective
    from jaxglmm.pooling import pool_levels
    from jaxglmm.studies.arrange import arrange

    rng = np.random.default_rng(k)
    J, R = 24, 5
    group = np.repeat(np.arange(J), R)
    x = np.tile(np.arange(R) - 1.0, J)
    x[group % 4 == 3] *= 2.0  # another design for every fourth level
    w = np.where((group % 4 == 1) & (x > 2), 0.0, 1.0)  # a row less in some
    z = np.stack([np.ones(J * R), x], 1)
    mixed = rng.permutation(J * R)
    group, z, w = group[mixed], z[mixed], w[mixed]
    y = rng.normal(size=J * R) + rng.normal(size=J)[group]
    design = jg.Design(y, z, (jg.Term(z[:, :k], group),), w)
    arranged = arrange(check_batch(design, None, None, None, None, None)[1])
    made = arranged.with_response(y)
    assert sorted(made.plan.alike.member.sum(axis=0)) == [6, 6, 12]
    cp, _ = cross_products(made)
    pooled, small = pool_levels(cp, made.layout)
    assert small.blocks[0].n_levels == 3 * (1 + k)
    one = jnp.ones(())
    for theta in rng.uniform(0.0, 2.0, (5, k * (k + 1) // 2)):
        np.testing.assert_allclose(
            profiled_objective(theta, pooled, small, one),
            profiled_objective(theta, cp, made.layout, one),
            rtol=1e-12,
        )
    by_codes, by_class = jg.fit(design), jg.fit(made)
    assert by_class.status == by_codes.status
    np.testing.assert_allclose(by_class.objective, by_codes.objective, rtol=1e-10)
    np.testing.assert_allclose(by_class.b[0], by_codes.b[0], atol=1e-6)
    # weights that are given for a lane may differ between the levels of a class
    other = rng.uniform(0.5, 2.0, J * R)
    by_codes = jg.fit(design.replace(weights=other))
    by_level = jg.fit(arranged.with_response(y, other))
    np.testing.assert_allclose(by_level.objective, by_codes.objective, rtol=1e-10)


def test_the_working_weights_of_pql_are_no_classes():
    """The levels of sleepstudy are alike until rows get weights of their own."""
    design, family, _, params = _model("poisson")
    ys = _responses(design, family, params, 4)
    fits = jg.fit_batch(design, ys, family, "PQL", progress=False)
    one = jax.jit(lambda y: jg.fit(design.replace(y=y), family, "PQL"))
    for i in range(len(ys)):
        single = one(ys[i])
        np.testing.assert_allclose(
            fits.params.theta[i], single.params.theta, rtol=1e-6, atol=1e-9
        )
        np.testing.assert_allclose(fits.params.beta[i], single.params.beta, rtol=1e-6)


def test_responses_without_residuals_are_told_from_pooled_levels_too():
    from jaxglmm.studies.arrange import arrange

    design, _, _, _ = _model("boundary")
    y = np.asarray(design.X @ np.arange(1.0, 1 + design.X.shape[1]))
    checked = check_batch(design, None, None, None, None, None)[1]
    for noise in (0.0, 1e-9):
        at = y + noise * np.sin(np.arange(len(y)) % 7)
        a = jg.fit(arrange(checked).with_response(at))
        b = jg.fit(design.replace(y=at))
        assert int(a.status) == int(b.status)


def test_rows_of_very_different_levels_stay_where_they_are():
    from jaxglmm.studies.arrange import arrange

    g = np.repeat([0, 1, 2, 3], [20, 1, 2, 1])
    one = np.ones((24, 1))
    design = jg.Design(np.arange(24.0), one, (jg.Term(one, g),))
    assert arrange(design).rows is None
