"""REML, PQL, priors; parameters at a limit and separation."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

import jaxglmm as jg
from jaxglmm.errors import ConvergenceWarning, Status
from jaxglmm.families import (
    Binomial,
    Cumulative,
    Gaussian,
    NegativeBinomial,
    Poisson,
    TruncatedNegativeBinomial,
    WithDispersion,
    ZeroInflated,
)
from jaxglmm.fitting import _warn_float32, as_float
from jaxglmm.generalized import How, fit_rows
from jaxglmm.separation import separating_direction

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


@pytest.fixture(scope="module")
def cbpp():
    return jg.datasets.load("cbpp")


@pytest.mark.slow
def test_reml_by_laplace_is_reml_for_a_gaussian_model(sleep_design):
    design, control = as_float(sleep_design), jg.Control()
    fit = jax.jit(lambda d: fit_rows(d, Gaussian(), None, control, How(1, True)))
    ours, linear = fit(design), jg.fit(design)
    np.testing.assert_allclose(ours.loglik, linear.loglik, rtol=1e-11)
    np.testing.assert_allclose(ours.params.beta, linear.params.beta, rtol=1e-8)
    np.testing.assert_allclose(ours.vcov_beta, linear.vcov_beta, rtol=1e-6)
    sigma = np.exp(ours.params.psi[0])
    np.testing.assert_allclose(sigma, linear.params.sigma, rtol=1e-6)
    np.testing.assert_allclose(
        ours.params.theta, sigma * linear.params.theta, rtol=1e-5, atol=1e-5
    )


def pql_by_hand(data, reml):
    """Working responses, then V = W^-1 + s^2 Z Z' dense, s by a scalar search."""
    n = data["size"].to_numpy(float)
    y = data["incidence"].to_numpy() / n
    period = data["period"].to_numpy()
    X = np.column_stack([np.ones(56), *(period == p for p in np.unique(period)[1:])])
    Z = (data["herd"].to_numpy()[:, None] == np.unique(data["herd"])[None]) * 1.0

    def gls(s, z, W):
        V = np.diag(1.0 / W) + s**2 * Z @ Z.T
        V_inv = np.linalg.inv(V)
        A = X.T @ V_inv @ X
        beta = np.linalg.solve(A, X.T @ V_inv @ z)
        r = z - X @ beta
        value = np.linalg.slogdet(V)[1] + r @ V_inv @ r
        value += np.linalg.slogdet(A)[1] if reml else 0.0
        return value, beta, s**2 * Z.T @ V_inv @ r

    eta = np.log((y * n + 0.5) / (n - y * n + 0.5))
    for _ in range(60):
        mu = 1.0 / (1.0 + np.exp(-eta))
        W = n * mu * (1.0 - mu)
        z = eta + (y - mu) / (mu * (1.0 - mu))
        s = minimize_scalar(
            lambda s, z=z, W=W: gls(s, z, W)[0], bounds=(0.05, 3.0), method="bounded",
            options={"xatol": 1e-10},
        ).x  # fmt: skip
        _, beta, b = gls(s, z, W)
        eta = X @ beta + Z @ b
    return beta, s, b


@pytest.mark.parametrize(
    "working", ["REML", pytest.param("ML", marks=pytest.mark.slow)]
)
def test_pql_is_a_linear_model_again_and_again(cbpp, working):
    control = jg.Control(working_model=working)
    m = jg.glmm(CBPP, cbpp, family="binomial", method="PQL", control=control)
    beta, s, b = pql_by_hand(cbpp, working == "REML")
    assert m.converged
    assert np.isnan(m.loglik)
    np.testing.assert_allclose(m.fixef, beta, rtol=1e-5)
    np.testing.assert_allclose(m.theta, [s], rtol=1e-5)
    ours = m.ranef["herd"].loc[np.unique(cbpp["herd"])]
    np.testing.assert_allclose(ours.iloc[:, 0], b, atol=1e-5)
    assert "penalized quasi-likelihood" in repr(m)


def test_pql_is_not_differentiated(cbpp):
    design = jg.design(CBPP, cbpp)

    def slope(o):
        return jg.fit(design.replace(offset=o), "binomial", "PQL").params.beta[1]

    with pytest.raises(TypeError, match="derivatives through a PQL fit"):
        jax.grad(slope)(jnp.zeros(56))
    with pytest.raises(ValueError, match="PQL' has no likelihood"):
        jg.loglik(None, design, "binomial", "PQL")


@pytest.mark.slow
def test_reml_agrees_with_glmmtmb_and_takes_collinear_columns(cbpp):
    design = jax.tree.map(jnp.asarray, jg.design(CBPP, cbpp))
    fit = jax.jit(lambda d: jg.fit(d, "binomial", "REML"))(design)
    # glmmTMB 1.1.5, REML = TRUE
    np.testing.assert_allclose(fit.loglik, -93.1990671011, rtol=1e-10)
    beta = [-1.367015193903, -0.969348289063, -1.104454124221, -1.551886271604]
    np.testing.assert_allclose(fit.params.beta, beta, rtol=1e-7)
    se = [0.237639734584, 0.305501768459, 0.325478728625, 0.426486818740]
    np.testing.assert_allclose(np.sqrt(np.diagonal(fit.vcov_beta)), se, rtol=1e-5)
    np.testing.assert_allclose(fit.params.theta, 0.681867278634, rtol=1e-6)
    wide = design.replace(X=jnp.column_stack([design.X, 2.0 * design.X[:, 1]]))
    for d in (design, wide):  # beta is integrated out: any will do
        params = fit.params.replace(beta=jnp.ones(d.X.shape[1]))
        loglik = jg.loglik(params, d, "binomial", "REML")
        np.testing.assert_allclose(loglik, fit.loglik, rtol=1e-10)


@pytest.mark.slow
def test_a_prior_moves_the_mode_to_where_both_slopes_meet(cbpp):
    def prior(p):
        return -0.5 * jnp.sum(p.beta**2) - 0.5 * jnp.sum((p.theta - 1.0) ** 2) / 0.01

    m = jg.glmm(CBPP, cbpp, family="binomial", priors=prior)
    assert m.converged
    design = jax.tree.map(jnp.asarray, m.design)

    def objective(beta, theta):
        p = jg.Params(beta, theta, jnp.ones(()), jnp.zeros(0))
        return jg.loglik(p, design, "binomial") + prior(p)

    p = m.fit.params
    slopes = jax.jit(jax.grad(objective, (0, 1)))(p.beta, p.theta)
    for slope in slopes:
        np.testing.assert_allclose(slope, 0.0, atol=1e-5)
    np.testing.assert_allclose(m.loglik, objective(p.beta, p.theta) - prior(p))
    assert abs(float(m.theta.iloc[0]) - 1.0) < 0.1
    with pytest.raises(ValueError, match=r"'REML' for .* with priors; use 'Laplace'"):
        jg.glmm(CBPP, cbpp, family="binomial", priors=prior, method="REML")


@pytest.mark.parametrize(
    "optimizer", ["lbfgs", pytest.param("adam", marks=pytest.mark.slow)]
)
def test_optax_reaches_newtons_optimum(cbpp, optimizer):
    rate = 0.03 if optimizer == "adam" else None
    control = jg.Control(optimizer=optimizer, learning_rate=rate)
    best = jg.glmm(CBPP, cbpp, family="binomial")
    other = jg.glmm(CBPP, cbpp, family="binomial", control=control, start=[2.0])
    assert other.converged
    assert other.fit.n_iter > 5
    np.testing.assert_allclose(other.loglik, best.loglik, atol=1e-8)
    np.testing.assert_allclose(other.fixef, best.fixef, rtol=1e-4)
    np.testing.assert_allclose(other.theta, best.theta, rtol=1e-4)


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(1)
    n, g = 300, rng.integers(0, 20, 300)
    eta = rng.normal(size=n) + rng.normal(size=20)[g]
    return {"x": eta - np.mean(eta), "f": np.array(list("abc"))[g % 3], "g": g}, eta


def test_separation_is_named(groups):
    data, eta = groups
    y = np.random.default_rng(2).random(300) < 1.0 / (1.0 + np.exp(-eta))
    y = np.where(data["f"] == "c", 1.0, y.astype(float))
    with pytest.warns(ConvergenceWarning, match="rises for ever along fc"):
        m = jg.glmm("y ~ x + f + (1 | g)", {**data, "y": y}, family="binomial")
    assert m.status == Status.SEPARATED
    assert not m.converged


def test_a_float32_design_stays_so_where_x64_is_on(cbpp):
    design = jg.design(CBPP, cbpp)

    def single(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    _warn_float32.cache_clear()
    with pytest.warns(jg.NoticeWarning, match="float32"):
        fit = jg.fit(jax.tree.map(single, design), family="binomial")
    assert fit.loglik.dtype == jnp.float32
    assert bool(fit.converged)
    np.testing.assert_allclose(fit.loglik, -92.026282, rtol=1e-5)


ONES = np.arange(40) % 2  # the covariate, 20 rows each
COUNTS = np.tile([1.0, 2.0, 3.0, 5.0], 10)
HURDLE = ZeroInflated(TruncatedNegativeBinomial())


@pytest.mark.parametrize(
    ("family", "where_one", "where_zero"),
    [
        (Poisson(), COUNTS, 0.0 * COUNTS),
        (ZeroInflated(Poisson()), COUNTS, 0.0 * COUNTS),
        (WithDispersion(NegativeBinomial()), COUNTS, 0.0 * COUNTS),
        (TruncatedNegativeBinomial(), COUNTS, 1.0 + 0.0 * COUNTS),
        (HURDLE, COUNTS * (np.arange(40) % 3 > 0), 1.0 * (np.arange(40) % 3 > 0)),
        (Binomial(), 0.0 * COUNTS + 1.0, COUNTS > 2.0),
        (Binomial(link="log"), COUNTS > 2.0, 0.0 * COUNTS),
        (Cumulative(n_categories=3), 0.0 * COUNTS + 2.0, 1.0 * (COUNTS > 2.0)),
        (Cumulative(n_categories=3), 1.0 * (COUNTS > 2.0), 0.0 * COUNTS + 2.0),
    ],
)
def test_separating_directions(family, where_one, where_zero):
    """Of responses that one value of x foretells; none where both have both."""
    y = np.where(ONES == 1, where_one, where_zero).astype(float)
    X = np.column_stack([np.ones(40), ONES])
    X = X[:, 1:] if isinstance(family, Cumulative) else X

    def design(y):
        return jg.Design(y, X, (jg.Term(np.ones((40, 1)), np.arange(40) // 4),))

    found = separating_direction(design(y), family)
    assert found is not None
    assert abs(found[X.shape[1] - 1]) > 1e-3  # the coefficient of x
    mixed = np.random.default_rng(0).permutation(y)
    assert separating_direction(design(mixed), family) is None


@pytest.mark.slow
def test_separation_with_two_predictors_and_of_categories(groups):
    data, eta = groups
    c = data["f"] == "c"
    y = np.where(c, 0, poisson_counts(groups)["y"])
    with pytest.warns(ConvergenceWarning, match="rises for ever along fc"):
        m = jg.glmm("y ~ f + (1 | g)", {**data, "y": y}, family="poisson", zi="~ 1")
    assert m.status == Status.SEPARATED
    y = pd.Categorical(np.where(c, 2, (eta > 0).astype(int)), ordered=True)
    table = pd.DataFrame({**data, "y": y})
    with pytest.warns(ConvergenceWarning, match="rises for ever along fc"):
        m = jg.glmm("y ~ f + (1 | g)", table, family="cumulative")
    assert m.status == Status.SEPARATED


@pytest.mark.slow
def test_zeros_that_are_not_inflated_are_a_limit(groups):
    data = poisson_counts(groups)
    m = jg.glmm("y ~ x + (1 | g)", data, family="poisson", zi="~ 1")
    assert m.status == Status.LIMIT
    assert "no zero is beyond what the rest of the model expects" in m.verdict
    plain = jg.glmm("y ~ x + (1 | g)", data, family="poisson")
    np.testing.assert_allclose(m.loglik, plain.loglik, atol=1e-6)
    np.testing.assert_allclose(m.fixef, plain.fixef, atol=1e-6)


def poisson_counts(groups):
    data, eta = groups
    y = np.random.default_rng(3).poisson(np.exp(0.3 * eta)).astype(float)
    return {**data, "y": y}


def test_pql_with_a_number_of_columns_that_is_padded(groups):
    m = jg.glmm(
        "y ~ x + I(x ** 2) + (1 | g)", poisson_counts(groups), family="poisson",
        method="PQL",
    )  # fmt: skip
    assert m.converged
    assert len(m.fixef) == 3


def test_a_negative_binomial_that_is_poisson_is_an_answer(groups):
    m = jg.glmm("y ~ x + (1 | g)", poisson_counts(groups), family="nbinom2")
    assert m.status == Status.LIMIT
    assert m.converged
    assert "theta runs to its end; the counts are Poisson" in m.verdict
    assert "*" in repr(m)
    assert np.isnan(m.dispersion_se["theta"])
    assert np.isfinite(m.se).all()


@pytest.mark.slow
def test_at_its_limit_it_is_the_poisson_fit(groups):
    m = jg.glmm("y ~ x + (1 | g)", poisson_counts(groups), family="nbinom2")
    poisson = jg.glmm("y ~ x + (1 | g)", poisson_counts(groups), family="poisson")
    np.testing.assert_allclose(m.loglik, poisson.loglik, atol=1e-5)
    np.testing.assert_allclose(m.fixef, poisson.fixef, atol=1e-5)
    np.testing.assert_allclose(m.se, poisson.se, rtol=1e-4)


@pytest.mark.parametrize("method", ["Laplace", "PQL"])
def test_what_is_no_data_of_the_family_has_no_fit(method):
    """Inside jit nothing can be refused; the status says it."""
    rng = np.random.default_rng(4)
    g, x = np.arange(60) // 10, rng.normal(size=60)
    y = jnp.asarray(rng.poisson(np.exp(1.0 + 0.3 * x + rng.normal(size=6)[g])), float)
    X = jnp.asarray(np.stack([np.ones(60), x], axis=1))

    @jax.jit
    def status(y, w, group):
        design = jg.Design(y, X, (jg.Term(X[:, :1], group, 6),), w)
        return jg.fit(design, "poisson", method).status

    w, group = jnp.ones(60), jnp.asarray(g)
    assert int(status(y, w, group)) == Status.CONVERGED
    assert int(status(y.at[7].set(-1.0), w.at[7].set(0.0), group)) == Status.CONVERGED
    wrong = [
        (y.at[7].set(-1.0), w, group),
        (y.at[7].set(jnp.nan), w, group),
        (y, w.at[7].set(-1.0), group),
        (y, w, group + 1),
        (y, w, group - 1),
    ]
    for arguments in wrong:
        assert int(status(*arguments)) == Status.NONFINITE


@pytest.mark.parametrize(
    "link", ["sqrt", pytest.param("identity", marks=pytest.mark.slow)]
)
def test_means_that_are_not_positive_are_no_answer(link):
    """Zeros below x = 0 and a steep line above, which goes on below zero."""
    rng = np.random.default_rng(2)
    x, a = np.linspace(-1.0, 1.0, 48), np.arange(48) % 6
    data = {"y": rng.poisson(np.maximum(40.0 * x, 0.0)), "x": x, "a": a}
    with pytest.warns(ConvergenceWarning, match="belong to no mean"):
        m = jg.glmm("y ~ x + (1 | a)", data, family="poisson", link=link)
    assert m.status == Status.OUTSIDE
    assert float(m.predict(type="link").min()) <= 0.0
