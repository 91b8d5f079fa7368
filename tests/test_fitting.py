"""The functional door: jit, vmap, derivatives through the fit, starts, verdicts."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxglmm as jg
from jaxglmm.errors import Status

FORMULAS = {
    "slope": ("sleepstudy", "Reaction ~ Days + (Days | Subject)"),
    "uncorrelated": ("sleepstudy", "Reaction ~ Days + (Days || Subject)"),
    "nested": ("pastes", "strength ~ 1 + (1 | batch/cask)"),
    "crossed": ("penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)"),
}


fit = jax.jit(jg.fit, static_argnames=("control", "method"))


def make(name):
    data, formula = FORMULAS[name]
    design = jg.design(formula, jg.datasets.load(data))
    n = design.n_obs
    rng = np.random.default_rng(5)
    return design.replace(
        weights=jnp.asarray(rng.uniform(0.5, 2.0, n)),
        offset=jnp.asarray(rng.normal(size=n)),
    )


def test_jit_equals_eager_and_door_one(sleep_design, sleepstudy):
    jitted = fit(sleep_design)
    eager = jg.fit(sleep_design)
    model = jg.glmm("Reaction ~ Days + (Days | Subject)", sleepstudy)
    for other in (eager, model.fit):
        np.testing.assert_allclose(jitted.objective, other.objective, rtol=1e-13)
        np.testing.assert_allclose(jitted.params.theta, other.params.theta, rtol=1e-8)
        np.testing.assert_allclose(jitted.u[0], other.u[0], atol=1e-8)
    np.testing.assert_allclose(jitted.objective, 1743.628271959, atol=1e-8)


def test_fit_traces_once(sleep_design):
    traces = []

    @jax.jit
    def f(y):
        traces.append(1)
        return jg.fit(sleep_design.replace(y=y)).objective

    for shift in range(3):
        f(sleep_design.y + shift)
    assert len(traces) == 1


def test_conditional_modes_solve_hendersons_equations(sleep_design):
    res = fit(sleep_design)
    X, t = np.asarray(sleep_design.X), sleep_design.terms[0]
    Z = np.zeros((180, 36))
    for j in range(2):
        Z[np.arange(180), np.asarray(t.group) * 2 + j] = t.z[:, j]
    theta = np.asarray(res.params.theta)
    Lam = np.kron(np.eye(18), [[theta[0], 0.0], [theta[1], theta[2]]])
    A = np.block(
        [
            [X.T @ X, X.T @ Z @ Lam],
            [Lam.T @ Z.T @ X, Lam.T @ Z.T @ Z @ Lam + np.eye(36)],
        ]
    )
    right = np.concatenate([X.T, Lam.T @ Z.T]) @ np.asarray(sleep_design.y)
    solution = np.linalg.solve(A, right)
    np.testing.assert_allclose(res.params.beta, solution[:2], rtol=1e-10)
    np.testing.assert_allclose(np.ravel(res.u[0]), solution[2:], atol=1e-8)
    np.testing.assert_allclose(np.ravel(res.b[0]), Lam @ solution[2:], atol=1e-8)


# ---- derivatives -------------------------------------------------------------------


def outputs(res):
    """A number of every kind that a fit returns."""
    return jnp.concatenate(
        [
            res.params.beta,
            res.params.theta,
            res.params.sigma[None],
            res.loglik[None],
            res.b[0][:1].ravel(),
            res.vcov_beta[:1, 0],
        ]
    )


WHAT = ("y", "weights", "offset", "X")


@pytest.mark.parametrize("name", FORMULAS)
def test_derivatives_through_the_fit(name):
    """Forward and reverse mode in random directions of all inputs at once."""
    design = make(name)
    rng = np.random.default_rng(3)
    directions = {
        w: jnp.asarray(rng.normal(size=getattr(design, w).shape)) for w in WHAT
    }
    steps = jnp.array([float(jnp.std(design.y)) * 1e-5, 1e-5, 1e-4, 1e-5])

    def moved(t):
        """The fit with the inputs moved along their directions by t (4,)."""
        changed = {
            w: getattr(design, w) + t[i] * directions[w] for i, w in enumerate(WHAT)
        }
        return outputs(jg.fit(design.replace(**changed)))

    @jax.jit
    def everything(t):
        """Outputs, and their derivatives in forward and in reverse mode."""
        value, linear = jax.linearize(moved, t)
        back = jax.linear_transpose(linear, t)
        forward = jax.vmap(linear, out_axes=1)(jnp.eye(4))
        return value, forward, jax.vmap(back)(jnp.eye(len(value)))[0]

    def difference(i, size):
        e = jnp.zeros(4).at[i].set(size)
        return (everything(e)[0] - everything(-e)[0]) / (2 * size)

    # central differences of refits, extrapolated once
    columns = [
        (4 * difference(i, h) - difference(i, 2 * h)) / 3 for i, h in enumerate(steps)
    ]
    expected = jnp.stack(columns, axis=1)
    size = jnp.abs(expected)
    scale = jnp.maximum(size, 1e-3 * jnp.max(size, axis=0, keepdims=True))
    _, forward, reverse = everything(jnp.zeros(4))
    np.testing.assert_allclose((forward - expected) / scale, 0.0, atol=1e-5)
    np.testing.assert_allclose((reverse - forward) / scale, 0.0, atol=1e-8)


def test_second_derivative_through_the_fit():
    design = make("slope")
    direction = jnp.asarray(np.random.default_rng(3).normal(size=design.n_obs))

    def f(t):
        return outputs(jg.fit(design.replace(y=design.y + t * direction)))

    @jax.jit
    def bends(t):
        """First and second derivative."""
        return jax.jvp(jax.jacfwd(f), (t,), (1.0,))

    h = 1e-3
    expected = (bends(h)[0] - bends(-h)[0]) / (2 * h)
    np.testing.assert_allclose(bends(0.0)[1], expected, rtol=1e-4, atol=1e-6)


def test_boundary_parameters_are_held_fixed():
    design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff2())

    def estimates(y):
        params = jg.fit(design.replace(y=y)).params
        return jnp.append(params.theta, params.beta)

    jacobian = jax.jit(jax.jacrev(estimates))(design.y)
    np.testing.assert_allclose(jacobian[0], 0.0, atol=1e-10)
    # what remains is ordinary least squares: the mean
    np.testing.assert_allclose(jacobian[1], 1.0 / 30.0, rtol=1e-10)


@pytest.mark.parametrize("name", FORMULAS)
def test_loglik_hessian(name):
    design = make(name)
    rng = np.random.default_rng(8)
    params = jg.Params(
        beta=jnp.mean(design.y) * jnp.ones(design.X.shape[1]),
        theta=jnp.asarray(rng.uniform(0.2, 1.2, design.n_theta)),
        sigma=jnp.std(design.y),
    )
    flat, unravel = ravel_pytree(params)

    def with_gradient(x, method):
        f = lambda x: jg.loglik(unravel(x), design, method=method)
        return jax.value_and_grad(f)(x)

    @jax.jit
    def everything(x):
        """Value, gradient and Hessian of both likelihoods."""
        out = []
        for method in ("ML", "REML"):
            bends = jax.jacfwd(lambda x, m=method: with_gradient(x, m)[1])(x)
            out.append((*with_gradient(x, method), bends))
        return [jnp.stack(parts) for parts in zip(*out)]

    _, gradient, hessian = everything(flat)
    size = float(jnp.max(jnp.abs(hessian)))

    def difference(i, h):
        """Central differences of values and gradients, extrapolated once."""
        e = jnp.zeros_like(flat).at[i].set(h)
        values = [everything(flat + s * e) for s in (1, -1, 2, -2)]
        return [
            (4 * (a - b) / (2 * h) - (c - d) / (4 * h)) / 3
            for a, b, c, d in list(zip(*values))[:2]
        ]

    for i in range(len(flat)):
        h = 1e-4 * max(1.0, abs(float(flat[i])))
        slope, bend = difference(i, h)
        np.testing.assert_allclose(hessian[:, i], bend, rtol=1e-5, atol=1e-6 * size)
        np.testing.assert_allclose(gradient[:, i], slope, rtol=1e-5, atol=1e-4)


# ---- starts and verdicts -----------------------------------------------------------


def perfect_correlation():
    """Slopes that are a multiple of the intercepts: a correlation of one."""
    rng = np.random.default_rng(11)
    g = np.repeat(np.arange(15), 8)
    x = np.tile(np.arange(8.0), 15)
    u = rng.normal(size=15)
    y = 1.0 + 0.5 * x + u[g] * (1.0 + 0.4 * x) + rng.normal(size=120)
    X = np.column_stack([np.ones(120), x])
    X, y, g = (jnp.asarray(v) for v in (X, y, g))
    return jg.Design(y=y, X=X, terms=(jg.Term(X, g),))


STARTS = {
    "sleepstudy": lambda: jg.design(FORMULAS["slope"][1], jg.datasets.sleepstudy()),
    "pastes": lambda: jg.design(FORMULAS["nested"][1], jg.datasets.pastes()),
    "penicillin": lambda: jg.design(FORMULAS["crossed"][1], jg.datasets.penicillin()),
    "dyestuff2": lambda: jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff2()),
    "correlation of one": perfect_correlation,
}


@pytest.mark.parametrize("name", STARTS)
def test_500_random_starts_reach_one_optimum(name):
    design = STARTS[name]()
    singular = name in ("dyestuff2", "correlation of one")
    rng = np.random.default_rng(1)
    m = design.n_theta
    sizes = 10.0 ** rng.uniform(-2, 1, (500, m))
    starts = jnp.asarray(sizes * rng.choice([-1.0, 1.0], (500, m)))
    control = jg.Control(max_iter=100)
    fits = jax.jit(jax.vmap(lambda s: jg.fit(design, start=s, control=control)))(starts)
    assert bool(jnp.all(fits.converged)), np.unique(fits.status, return_counts=True)
    best = float(jnp.min(fits.objective))
    np.testing.assert_allclose(fits.objective, best, atol=1e-7)
    expected = Status.BOUNDARY if singular else Status.CONVERGED
    assert set(np.asarray(fits.status).tolist()) == {int(expected)}
    np.testing.assert_allclose(
        fits.params.beta,
        np.broadcast_to(fits.params.beta[0], fits.params.beta.shape),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["slope", "nested", "crossed"])
def test_balanced_data_start_at_the_optimum(name):
    # the moment equations are the REML equations there
    data, formula = FORMULAS[name]
    assert int(fit(jg.design(formula, jg.datasets.load(data))).n_iter) <= 2


def test_a_fit_started_at_the_saddle_leaves_it(sleep_design):
    res = fit(sleep_design, start=jnp.zeros(3))
    assert int(res.status) == Status.CONVERGED
    np.testing.assert_allclose(res.objective, 1743.628271959, atol=1e-7)


def test_duplicated_term_is_not_identified(sleepstudy):
    design = jg.design("Reaction ~ Days + (1 | Subject) + (1 | Subject)", sleepstudy)
    res = fit(design)
    assert int(res.status) == Status.NOT_IDENTIFIED
    assert not bool(res.converged)


def test_two_terms_that_say_the_same_are_not_identified_from_any_start():
    rng = np.random.default_rng(40)
    a, x = np.arange(40) % 8, rng.normal(size=40)
    y = x + rng.normal(size=8)[a] + rng.normal(size=40)
    data = {"y": y, "x": x, "a": a, "a2": 7 - a}
    design = jg.design("y ~ x + (1 | a) + (1 | a2)", data)
    starts = rng.choice([-1, 1], (500, 2)) * 10.0 ** rng.uniform(-1.5, 1.5, (500, 2))
    fits = jax.jit(jax.vmap(lambda start: fit(design, start=start)))(starts)
    assert set(np.asarray(fits.status).tolist()) == {int(Status.NOT_IDENTIFIED)}
    np.testing.assert_allclose(fits.objective, fits.objective[0], atol=1e-7)


def test_flat_criterion_is_not_identified(sleepstudy):
    """Fixed effects for every subject leave nothing for a random intercept."""
    design = jg.design("Reaction ~ Subject + (1 | Subject)", sleepstudy)
    assert int(fit(design).status) == Status.NOT_IDENTIFIED


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_unbounded_likelihood_does_not_converge(sleepstudy, seed):
    """Subjects reproduce the response, so the residual variance runs to zero."""
    levels = np.random.default_rng(seed).normal(size=18)
    data = sleepstudy.assign(Reaction=np.repeat(levels, 10))
    res = fit(jg.design("Reaction ~ 1 + (1 | Subject)", data))
    assert not bool(res.converged)


def test_collinear_columns_get_a_status(sleep_design):
    X = jnp.column_stack([sleep_design.X, 2.0 * sleep_design.X[:, 1]])
    res = fit(sleep_design.replace(X=X))
    assert int(res.status) == Status.NOT_IDENTIFIED
    np.testing.assert_allclose(res.objective, fit(sleep_design).objective, rtol=1e-10)


def test_response_reproduced_by_X_does_not_converge(sleep_design):
    res = fit(sleep_design.replace(y=sleep_design.X @ jnp.array([250.0, 10.0])))
    assert int(res.status) == Status.NONFINITE


@pytest.mark.parametrize("size", [1e-10, 1e8])
def test_size_of_the_weights_does_not_matter(sleep_design, size):
    one = jnp.ones(sleep_design.n_obs)
    a = fit(sleep_design.replace(weights=one))
    b = fit(sleep_design.replace(weights=size * one))
    assert int(b.status) == int(a.status)
    root = np.sqrt(size)
    np.testing.assert_allclose(b.params.sigma / root, a.params.sigma, rtol=1e-10)
    np.testing.assert_allclose(b.params.theta * root, a.params.theta, rtol=1e-9)
    np.testing.assert_allclose(b.objective, a.objective, rtol=1e-12)
    np.testing.assert_allclose(b.vcov_beta, a.vcov_beta, rtol=1e-9)
    np.testing.assert_allclose(b.b[0], a.b[0], atol=1e-8)
    np.testing.assert_allclose(b.u[0] / root, a.u[0], atol=1e-8)
    loglik = jg.loglik(b.params, sleep_design.replace(weights=size * one))
    np.testing.assert_allclose(loglik, b.loglik, rtol=1e-12)


def test_rows_of_weight_zero_may_hold_anything(sleep_design):
    keep = jnp.arange(180) < 170
    weights = jnp.where(keep, 1.0, 0.0)

    @jax.jit
    def slope(y, weights):
        loglik = lambda w: jg.fit(sleep_design.replace(y=y, weights=w)).loglik
        return jax.value_and_grad(loglik)(weights)

    a, by_a = slope(sleep_design.y, weights)
    b, by_b = slope(jnp.where(keep, sleep_design.y, jnp.nan), weights)
    np.testing.assert_allclose(a, b, rtol=1e-13)
    assert bool(jnp.all(jnp.isfinite(by_a) & jnp.isfinite(by_b)))


def test_negative_weights_do_not_converge(sleep_design):
    weights = jnp.ones(180).at[3].set(-1.0)
    res = fit(sleep_design.replace(weights=weights))
    assert int(res.status) == Status.NONFINITE


def test_loglik_of_collinear_columns_uses_all_of_beta(sleep_design):
    x = sleep_design.X[:, 1]
    theta, sigma = jnp.array([0.9, 0.0, 0.2]), jnp.asarray(25.0)
    two = jg.Params(jnp.array([250.0, 9.0]), theta, sigma)
    three = jg.Params(jnp.array([250.0, 3.0, 3.0]), theta, sigma)
    wide = sleep_design.replace(X=jnp.column_stack([sleep_design.X, 2.0 * x]))
    a = jg.loglik(two, sleep_design, method="ML")
    np.testing.assert_allclose(jg.loglik(three, wide, method="ML"), a, rtol=1e-12)


def test_shapes_that_do_not_fit_are_refused(sleep_design):
    params = jg.Params(jnp.ones(1), jnp.ones(3), jnp.asarray(1.0))
    with pytest.raises(
        jg.DesignError, match=r"beta must have shape \(2,\); found \(1,\)"
    ):
        jg.loglik(params, sleep_design)
    with pytest.raises(jg.DesignError, match="offset must have shape"):
        jg.fit(sleep_design.replace(offset=jnp.ones(1)))
    with pytest.raises(jg.DesignError, match="y must be an array; found list"):
        jg.Design(y=[1.0, 2.0], X=jnp.ones((2, 1)), terms=())


def test_short_integer_codes_do_not_overflow():
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 100, 400), rng.integers(0, 90, 400)]
    y, one = rng.normal(size=400) + codes[0] % 7, np.ones((400, 1))

    def objective(dtype):
        terms = tuple(jg.Term(one, c.astype(dtype), 100) for c in codes)
        return fit(jg.Design(y=y, X=one, terms=terms)).objective

    np.testing.assert_allclose(objective(np.uint8), objective(np.int64), rtol=1e-12)


def test_custom_structure():
    """Equal variances and one correlation, as a plain function."""

    def factor(theta, k):
        rho = jnp.tanh(theta[1])
        rest = jnp.sqrt(1.0 - rho**2)
        return theta[0] * jnp.array([[1.0, 0.0], [rho, rest]])

    jg.register_structure(
        jg.Structure("exchange2", lambda k: 2, factor, lambda k: (1.0, 0.1))
    )
    formula = "Reaction ~ Days + exchange2(Days | Subject)"
    design = jg.design(formula, jg.datasets.sleepstudy())
    res, other = fit(design), fit(design, start=jnp.array([-1.0, 0.1]))
    assert int(res.status) == int(other.status) == Status.CONVERGED
    np.testing.assert_allclose(other.objective, res.objective, rtol=1e-10)
    # no better than two variances and a correlation
    full = fit(jg.design(FORMULAS["slope"][1], jg.datasets.sleepstudy()))
    assert float(full.objective) < float(res.objective)


@pytest.mark.parametrize("factor", [1e-9, 1e5])
def test_scalar_structure_takes_any_unit(factor):
    data = jg.datasets.sleepstudy()
    data["x"] = data["Days"] * factor
    base = fit(jg.design("Reaction ~ Days + scalar(0 + Days | Subject)", data))
    res = fit(jg.design("Reaction ~ Days + scalar(0 + x | Subject)", data))
    np.testing.assert_allclose(res.objective, base.objective, rtol=1e-10)
    np.testing.assert_allclose(res.params.theta * factor, base.params.theta, rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e4, 1e9])
def test_scale_of_covariates_does_not_matter(sleep_design, scale):
    factor = jnp.array([1.0, scale])
    term = sleep_design.terms[0]
    scaled = sleep_design.replace(
        X=sleep_design.X * factor[None],
        terms=(jg.Term(term.z * factor[None], term.group, term.n_levels),),
    )
    a, b = fit(sleep_design), fit(scaled)
    np.testing.assert_allclose(b.params.beta * factor, a.params.beta, rtol=1e-8)
    power = jnp.array([1.0, scale, scale])
    np.testing.assert_allclose(b.params.theta * power, a.params.theta, rtol=1e-6)
    np.testing.assert_allclose(
        b.objective + 2 * np.log(1 / scale), a.objective, rtol=1e-9
    )


def test_float32_is_announced_and_agrees_loosely():
    from jaxglmm.fitting import _warn_float32

    _warn_float32.cache_clear()
    design = jg.design(FORMULAS["slope"][1], jg.datasets.sleepstudy())

    def single(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    small = jax.tree.map(single, design)
    with pytest.warns(jg.NoticeWarning, match="float32"):
        res = fit(small)
    assert res.params.beta.dtype == jnp.float32
    np.testing.assert_allclose(res.params.beta, [251.405, 10.467], rtol=1e-3)
    assert bool(res.converged)


# ---- batches -----------------------------------------------------------------------


def test_vmap_equals_the_loop(sleep_design):
    truth = fit(sleep_design)
    keys = jax.random.split(jax.random.key(4), 1000)
    ys = jax.jit(jax.vmap(lambda k: jg.simulate(k, truth.params, sleep_design)))(keys)
    lanes = jax.jit(jax.vmap(lambda y: jg.fit(sleep_design.replace(y=y))))(ys)
    singles = [fit(sleep_design.replace(y=y)) for y in ys]
    loop = jax.tree.map(lambda *v: np.stack(v), *singles)
    np.testing.assert_array_equal(lanes.status, loop.status)
    np.testing.assert_allclose(lanes.objective, loop.objective, rtol=1e-8)
    np.testing.assert_allclose(lanes.params.beta, loop.params.beta, rtol=1e-8)
    np.testing.assert_allclose(lanes.params.sigma, loop.params.sigma, rtol=1e-8)
    np.testing.assert_allclose(
        lanes.params.theta, loop.params.theta, rtol=1e-8, atol=1e-8
    )
    assert bool(jnp.all(lanes.converged))
    assert int(jnp.sum(lanes.status == Status.BOUNDARY)) > 0


BATCH = """
    import os
    from pathlib import Path
    if {pinned}:
        os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
    import jax, jax.numpy as jnp, jaxglmm as jg
    with jax.enable_x64(True):
        d = jg.design("{formula}", jg.datasets.load("{data}"))
        noise = jax.random.normal(jax.random.key(0), ({lanes}, d.n_obs), d.y.dtype)
        ys = d.y[None] + noise
        out = jax.jit(jax.vmap(lambda y: jg.fit(d.replace(y=y))))(ys)
        print(bool(jnp.all(out.converged)))
    names = [p.read_text() for p in Path("/proc/self/task").glob("*/comm")]
    print(sum(name.startswith("tf_XLAEigen") for name in names))
"""


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Settings with which processes share what JAX compiles."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.mark.parametrize("threads", [1, 2, 4, "pinned"])
@pytest.mark.parametrize(("name", "lanes"), [("slope", 1000), ("crossed", 200)])
def test_batches_return_whatever_the_threads(threads, name, lanes, compile_cache):
    """With pools of 1, 2 and 4 threads, and on one core."""
    pinned = threads == "pinned"
    if pinned and not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not pin processes to cores")
    threads = 1 if pinned else threads
    data, formula = FORMULAS[name]
    code = BATCH.format(formula=formula, data=data, lanes=lanes, pinned=pinned)
    code = textwrap.dedent(code)
    flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    if threads != 4:  # once as users compile
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    env = {**os.environ, "XLA_FLAGS": flags, "OMP_NUM_THREADS": str(threads)}
    env |= {"OPENBLAS_NUM_THREADS": str(threads)} | compile_cache
    env.pop("NPROC", None)  # sizes the pool, unless the process is pinned
    if not pinned:
        env["NPROC"] = str(threads)
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    converged, pool = out.stdout.split() or ("", "")
    assert converged == "True", out.stderr[-2000:]
    if sys.platform == "linux":
        assert int(pool) == threads


def test_codes_beyond_n_levels_are_not_dropped(sleep_design):
    """Traced codes cannot be refused; the fit says that nothing came of it."""
    term = sleep_design.terms[0]

    @jax.jit
    def status(group):
        few = jg.Term(term.z, group, term.n_levels)
        d = jg.Design(sleep_design.y, sleep_design.X, (few,))
        return jg.fit(d).status

    assert int(status(term.group)) == Status.CONVERGED
    for shift in (-1, 1):
        assert int(status(term.group + shift)) == Status.NONFINITE


def test_new_covariates_keep_the_plan(sleepstudy):
    """Inside jit too, for nested factors, where codes are traced."""
    design = jg.design("strength ~ 1 + (1 | batch/cask)", jg.datasets.pastes())

    @jax.jit
    def objective(design, factor):
        terms = tuple(
            jg.Term(t.z * factor, t.group, t.n_levels, t.structure)
            for t in design.terms
        )
        return jg.fit(design.replace(terms=terms)).objective

    one, two = objective(design, 1.0), objective(design, 2.0)
    np.testing.assert_allclose(one, two, rtol=1e-12)
    params = jg.Params(jnp.ones(1), jnp.ones(2), jnp.asarray(1.0))
    with pytest.raises(jg.DesignError, match="shapes"):
        jg.simulate(jax.random.key(0), params, design, b=())


def test_lists_and_empty_arrays_are_named():
    one, codes = np.ones((2, 1)), np.array([0, 1])
    for changes, message in (
        ({"weights": [1.0, 2.0]}, "weights must be an array; found list"),
        ({"terms": (jg.Term([[1.0], [1.0]], codes),)}, r"terms\[0\].z must be an"),
        ({"terms": (jg.Term(one, [0, 1]),)}, r"terms\[0\].group must be an array"),
        ({"y": np.ones(0), "X": np.ones((0, 1))}, "y has no rows"),
    ):
        given = {"y": np.ones(2), "X": one, "terms": (jg.Term(one, codes),)} | changes
        with pytest.raises(jg.DesignError, match=message):
            jg.Design(**given)
