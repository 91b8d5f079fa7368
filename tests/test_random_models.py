"""Random models on random data: no crash, and no verdict that is not so.

The data are unbalanced, nested, crossed, singular, tiny and badly scaled.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import jaxglmm as jg
from jaxglmm.errors import ConvergenceWarning, Status

LEVELS = 8


def few_or_many(few, many):
    """Numbers of random data sets: the same few in every run, many others if asked."""
    return pytest.mark.parametrize(
        "n_examples", [few, pytest.param(many, marks=pytest.mark.slow)]
    )


def for_seeds(n_examples, derandomize):
    """Decorator: call a function with that many random seeds."""
    options = settings(
        max_examples=n_examples, derandomize=derandomize, deadline=None, database=None
    )
    return lambda f: options(given(seed=st.integers(0, 2**32 - 1))(f))


def fitted(formula, data, **options):
    """The model, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return jg.glmm(formula, data, **options)


# ---- linear models against dense matrices ------------------------------------------

FORMULAS = {
    "intercept": "y ~ x + (1 | a)",
    "slope": "y ~ x + (x | a)",
    "uncorrelated": "y ~ x + (x || a)",
    "nested": "y ~ x + (1 | a/b)",
    "crossed": "y ~ x + (x | a) + (1 | c)",
}


def draw_groups(rng, n):
    """Factors a, b within a, and c; some levels hold one row, some none."""
    share = rng.dirichlet(np.full(LEVELS, rng.choice([0.3, 5.0])))
    a = rng.choice(LEVELS, n, p=share)
    return {"a": a, "b": 2 * a + rng.integers(0, 2, n), "c": rng.integers(0, 5, n)}


def effects(rng, k):
    """Effects of every level (LEVELS, k), of a covariance that may be singular."""
    rank = rng.integers(0, k + 1)
    L = rng.normal(size=(k, rank)) @ rng.normal(size=(rank, k))
    return rng.normal(size=(LEVELS, k)) @ L


def linear_data(seed, name):
    """A data frame with units of any size; everything follows from seed and name."""
    rng = np.random.default_rng([seed, *name.encode()])
    n = int(rng.choice([9, 20, 48]))
    groups, x = draw_groups(rng, n), rng.normal(size=n)
    z = np.column_stack([np.ones(n), x])
    y = z @ rng.normal(size=2) + np.sum(z * effects(rng, 2)[groups["a"]], axis=1)
    y = y + effects(rng, 1)[groups["c"], 0] + effects(rng, 1)[groups["b"] % LEVELS, 0]
    y = y + rng.normal(size=n) * rng.choice([0.1, 1.0, 3.0])
    y = np.round(y) if rng.uniform() < 0.2 else y  # groups may reproduce it
    units = 10.0 ** rng.uniform(-6, 6, 2)
    weights = rng.uniform(0.3, 3.0, n)
    return pd.DataFrame({"y": y * units[0], "x": x * units[1], "w": weights, **groups})


def dense_criterion(model, reml):
    """-2 log L profiled over beta and sigma, from n x n matrices, of theta."""
    design = model.design
    y, w, X = design.y, design.weights, design.X
    # columns of unit size, and y, so that NumPy's own rounding does not matter
    size_y, size_X = np.std(y), np.sqrt(np.mean(X**2, axis=0))
    y, X = y / size_y, X / size_X
    n, p = X.shape
    Zs = []
    for term in design.terms:
        hot = np.eye(term.n_levels)[term.group]
        scaled = term.z / np.sqrt(np.mean(term.z**2, axis=0))
        Zs.append(hot[:, :, None] * scaled[:, None, :])

    def criterion(theta):
        V, start = np.diag(1.0 / w), 0
        for Z in Zs:
            k = Z.shape[2]
            cols, rows = np.triu_indices(k)
            Lam = np.zeros((k, k))
            Lam[rows, cols] = theta[start : start + len(rows)]
            start += len(rows)
            ZL = (Z @ Lam).reshape(n, -1)
            V = V + ZL @ ZL.T
        L = np.linalg.cholesky(V)
        A, r = np.linalg.solve(L, X), np.linalg.solve(L, y)
        Q, R = np.linalg.qr(A)
        rss = np.sum((r - Q @ (Q.T @ r)) ** 2)
        df = n - p if reml else n
        value = 2 * np.sum(np.log(np.diag(L)))
        value += df * (1 + np.log(2 * np.pi * rss / df))
        if reml:
            value += 2 * np.sum(np.log(np.abs(np.diag(R)) * size_X))
        return value + 2 * df * np.log(size_y)

    return criterion


def best_of_ten(criterion, m, rng):
    """Lowest value that a quasi-Newton method finds from ten starts."""
    best = np.inf
    for start in (np.ones(m), *rng.normal(size=(9, m))):
        found = minimize(criterion, start, method="L-BFGS-B", options={"gtol": 1e-9})
        best = min(best, found.fun)
    return best


@few_or_many(8, 60)
@pytest.mark.parametrize("name", FORMULAS)
def test_linear_models_reach_what_dense_matrices_find(name, n_examples):
    reml = name in ("slope", "nested", "crossed")
    method = "REML" if reml else "ML"
    ended = []

    @for_seeds(n_examples, n_examples < 10)
    def check(seed):
        data = linear_data(seed, name)
        try:
            m = fitted(FORMULAS[name], data, method=method, weights="w")
        except (jg.FormulaError, jg.DataError) as error:
            ended.append(str(error))
            return
        ended.append(m.status)
        if not m.converged:
            return
        rng = np.random.default_rng(seed)
        best = best_of_ten(dense_criterion(m, reml), m.design.n_theta, rng)
        assert float(m.fit.objective) <= best + 1e-6

    check()
    assert np.mean([isinstance(s, Status) and s.ok for s in ended]) > 0.6, ended


# 48 rows each; from next to zero Newton ends at a lesser optimum with no variance
@pytest.mark.parametrize(
    ("name", "method", "seed", "objective"),
    [
        ("uncorrelated", "ML", 31341285, -233.20555082294294),
        ("crossed", "REML", 683, 1435.9804834864112),
    ],
)
def test_a_lesser_optimum_at_zero_is_passed_by(name, method, seed, objective):
    m = fitted(FORMULAS[name], linear_data(seed, name), method=method, weights="w")
    assert m.status == Status.CONVERGED
    np.testing.assert_allclose(m.fit.objective, objective, atol=1e-5)


@pytest.mark.parametrize("n", [24, 40])
def test_few_rows_do_not_hide_that_terms_say_the_same(n):
    rng = np.random.default_rng(0)
    a, x = np.arange(n) % 8, rng.normal(size=n)
    y = x + rng.normal(size=8)[a] + rng.normal(size=n)
    with pytest.warns(ConvergenceWarning, match="not identified"):
        m = jg.glmm("y ~ x + (1 | a) + (1 | a2)", {"y": y, "x": x, "a": a, "a2": 7 - a})
    assert m.status == Status.NOT_IDENTIFIED


# ---- generalized models against the likelihood around their estimates --------------

N = 48
# every family and link with a formula; the first are in the default run
GENERALIZED = [
    ("binomial", "logit", "y ~ x + (1 | a)"),
    ("poisson", "log", "y ~ x + (x | a)"),
    ("nbinom2", "log", "y ~ x + (1 | a)"),
    ("binomial", "probit", "cbind(k, m) ~ x + (1 | a) + (1 | c)"),
    ("binomial", "cloglog", "y ~ x + (x | a)"),
    ("poisson", "sqrt", "y ~ x + (1 | a) + (1 | c)"),
    ("nbinom1", "log", "y ~ x + (1 | a/b)"),
    ("gamma", "log", "y ~ x + (x || a)"),
    ("beta", "logit", "y ~ x + (1 | a)"),
    ("betabinomial", "logit", "cbind(k, m) ~ x + (1 | a)"),
]


def response_of(rng, family, eta):
    """Responses, with groups of zeros, separation or huge counts now and then."""
    p = 1.0 / (1.0 + np.exp(-eta))
    if family in ("binomial", "betabinomial"):
        trials = rng.integers(1, 40, N)
        k = rng.binomial(trials, p)
        y = (rng.uniform(size=N) < p).astype(float)
        return {"y": y, "k": k, "m": trials - k}
    if family == "beta":
        return {"y": np.clip(rng.beta(4.0 * p, 4.0 * (1.0 - p)), 1e-6, 1.0 - 1e-6)}
    if family == "gamma":
        return {"y": rng.gamma(2.0, np.exp(eta) / 2.0) + 1e-8}
    rate = np.exp(eta + rng.choice([0.0, 0.0, 12.0]))  # counts of 1e5 and more
    rate = rate * (rng.gamma(2.0, 0.5, N) if family != "poisson" else 1.0)
    return {"y": rng.poisson(rate).astype(float)}


def generalized_data(seed, family):
    """A data frame with the same levels always, so that a model compiles once."""
    rng = np.random.default_rng(seed)
    groups = draw_groups(rng, N)
    for name, size in (("a", LEVELS), ("b", 2 * LEVELS), ("c", 5)):
        groups[name][:size] = np.arange(size)
    groups["a"] = groups["b"] // 2
    x = rng.normal(size=N) * rng.choice([0.1, 1.0, 3.0])
    z = np.column_stack([np.ones(N), x])
    eta = 0.7 * np.sum(z * effects(rng, 2)[groups["a"]], axis=1)
    eta = np.clip(eta + z @ rng.normal(size=2), -8.0, 8.0)
    data = response_of(rng, family, eta)
    trials = data.get("k", 0) + data.get("m", 0)
    kind = rng.choice(["as drawn", "zeros in a group", "one event", "separated"])
    counts = [c for c in data if c != "m" and family not in ("gamma", "beta")]
    for name in counts:
        if kind == "zeros in a group":
            data[name] = np.where(groups["a"] < 2, 0, data[name])
        if kind == "one event":
            data[name] = np.where(np.arange(N) == 7, 1, 0)
        if kind == "separated":
            data[name] = np.where(x > 0, data[name], 0)
    if "m" in data:
        data["m"] = trials - data["k"]
    return pd.DataFrame({"x": x, **data, **groups})


def around(m, rng):
    """Parameters at random distances, 1e-2 to 1 standard errors, of the estimates.

    Not as far for a link from which some of them would leave the range of means.
    """
    params, size = m.fit.params, np.sqrt(np.maximum(np.diagonal(m.fit.vcov), 0.0))
    size = np.where(np.isfinite(size) & (size > 0), np.minimum(size, 1.0), 0.1)
    far = -1 if m.family.link == "sqrt" else 0
    steps = rng.normal(size=(40, len(size))) * size
    steps = steps * 10.0 ** rng.uniform(far - 2, far, (40, 1))
    p, k = len(params.beta), len(params.theta)
    for step in steps:
        yield params.replace(
            beta=params.beta + step[:p],
            theta=params.theta + step[p : p + k],
            psi=params.psi + step[p + k :],
        )


@pytest.mark.parametrize(
    ("family", "link", "formula", "n_examples"),
    [(*model, 6) for model in GENERALIZED[:2]]
    + [pytest.param(*model, 30, marks=pytest.mark.slow) for model in GENERALIZED],
)
def test_generalized_models_are_at_a_maximum(family, link, formula, n_examples):
    ended = []

    @for_seeds(n_examples, n_examples < 10)
    def check(seed):
        data = generalized_data(seed, family)
        if data.get("y", data.x).nunique() == 1:
            with pytest.raises(jg.DataError, match="is constant"):
                fitted(formula, data, family=family, link=link)
            return
        m = fitted(formula, data, family=family, link=link)
        ended.append(m.status)
        if not m.converged:
            return
        with jax.enable_x64(True):
            design = jax.tree.map(jnp.asarray, m.design)
            at = float(jg.loglik(m.fit.params, design, m.family))
            np.testing.assert_allclose(at, m.loglik, rtol=1e-9, atol=1e-7)
            others = around(m, np.random.default_rng(seed))
            found = [float(jg.loglik(p, design, m.family)) for p in others]
        assert np.mean(np.isfinite(found)) > 0.8
        if m.status != Status.LIMIT:  # which is reached at infinity only
            assert np.nanmax(found) <= at + 1e-6

    check()
    answers = [s.ok or s == Status.SEPARATED for s in ended]
    assert np.mean(answers) > (0.1 if link == "sqrt" else 0.8), ended


@pytest.mark.parametrize("seed", [322, 384])
def test_reweighted_least_squares_that_go_astray_are_no_start(seed):
    # one count of a thousand beside zeros far out in x
    data = generalized_data(seed, "poisson")
    m = fitted("y ~ x + (x | a)", data, family="poisson", link="log")
    assert m.status.ok
