"""Generalized models against brute force: grids, differences, plain GLMs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import stats
from scipy.optimize import minimize

import jaxglmm as jg
from jaxglmm.errors import Status

N, LEVELS = 48, 6


def make(rng, spec, response, weights=None, others=()):
    """Design of 48 rows; ``spec`` has the effects and the factor of every term."""
    codes = {"a": np.arange(N) % LEVELS, "c": rng.permutation(np.arange(N) % 5)}
    codes["b"] = 2 * codes["a"] + rng.integers(0, 2, N)
    x = rng.normal(size=N)
    columns = np.column_stack([np.ones(N), x, np.sin(3.0 * x)])
    terms = tuple(
        jg.Term(jnp.asarray(columns[:, :k]), jnp.asarray(codes[factor]))
        for k, factor in spec
    )
    eta = 0.3 + 0.4 * x + 0.5 * rng.normal(size=LEVELS)[codes["a"]]
    y = jnp.asarray(np.asarray(response(rng, eta), float))
    X = jnp.asarray(columns[:, :2])
    return jg.Design(y=y, X=X, terms=terms, weights=weights, others=others)


def coin(rng, eta):
    return rng.uniform(size=N) < 1.0 / (1.0 + np.exp(-eta))


def count(rng, eta):
    return rng.poisson(np.exp(eta))


def positive(rng, eta):
    return rng.gamma(3.0, np.exp(eta) / 3.0)


# ---- quadrature against integrals on a grid ----------------------------------------


def grid_loglik(log_density, design, params, half=9.0, n=401):
    """Log L with the trapezoidal rule in every level, one factor."""
    term = design.terms[0]
    k = term.z.shape[1]
    cols, rows = np.triu_indices(k)
    Lam = np.zeros((k, k))
    Lam[rows, cols] = params.theta
    t = np.linspace(-half, half, n)
    u = np.stack(np.meshgrid(*[t] * k, indexing="ij"), axis=-1).reshape(-1, k)
    log_prior = stats.norm.logpdf(u).sum(axis=1) + k * np.log(t[1] - t[0])
    fixed, total = np.asarray(design.X @ params.beta), 0.0
    for level in range(term.n_levels):
        here = np.asarray(term.group) == level
        eta = fixed[here][:, None] + np.asarray(term.z)[here] @ (u @ Lam.T).T
        inside = log_density(np.asarray(design.y)[here][:, None], eta).sum(axis=0)
        total += np.logaddexp.reduce(inside + log_prior)
    return total


@pytest.mark.parametrize(
    ("family", "k", "response", "log_density"),
    [
        ("binomial", 1, coin, lambda y, e: y * e - np.logaddexp(0.0, e)),
        pytest.param(
            "poisson", 2, count, lambda y, e: stats.poisson.logpmf(y, np.exp(e)),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_25_nodes_against_a_grid(rng, family, k, response, log_density):
    design = make(rng, [(k, "a")], response)
    theta = jnp.array([0.7, -0.2, 0.4][: k * (k + 1) // 2])
    params = jg.Params(jnp.array([0.2, 0.5]), theta, jnp.ones(()))
    ours = jg.loglik(params, design, family, "AGQ", n_quad=25)
    expected = grid_loglik(log_density, design, params)
    np.testing.assert_allclose(ours, expected, rtol=1e-8)
    # Laplace is not that good: the grid tells them apart
    laplace = jg.loglik(params, design, family, "Laplace")
    assert abs(float(laplace) - expected) > 1e-4


def test_a_family_that_no_package_has(rng):
    """Hyperbolic secant responses of scale exp(psi), against its own definition."""

    def log_density(y, eta, psi):
        t = jnp.abs(y - eta) / jnp.exp(psi[0]) * (0.5 * jnp.pi)
        return -t - jnp.log1p(jnp.exp(-2.0 * t)) - psi[0]

    def secant(rng, eta):
        return eta + 0.5 * stats.hypsecant.rvs(size=N, random_state=rng) * 2 / np.pi

    family = jg.Family(
        log_density=log_density, n_own=1, name="hyperbolic secant",
        mean=lambda eta, psi: eta, transform=jnp.exp, own_names=("scale",),
    )  # fmt: skip
    design = make(rng, [(1, "a")], secant)
    fit = jax.jit(lambda d: jg.fit(d, family, "AGQ", n_quad=25))(design)
    assert int(fit.status) == Status.CONVERGED

    def minus_loglik(x):
        params = jg.Params(x[:2], x[2:3], 1.0)
        scale = 2.0 / np.pi * np.exp(x[3])  # scipy's has density sech(x) / pi
        density = lambda y, e: stats.hypsecant.logpdf((y - e) / scale) - np.log(scale)
        return -grid_loglik(density, design, params)

    p = fit.params
    at = np.concatenate([p.beta, p.theta, p.psi])
    np.testing.assert_allclose(fit.loglik, -minus_loglik(at), rtol=1e-8)
    found = minimize(minus_loglik, at + 0.1, method="BFGS", options={"gtol": 1e-5})
    np.testing.assert_allclose(found.fun, -fit.loglik, atol=1e-7)
    np.testing.assert_allclose(found.x, at, atol=1e-3)


# ---- no random effects -------------------------------------------------------------


def plain_glm(X, y, w):
    """Logistic regression by iteratively reweighted least squares."""
    beta = np.zeros(X.shape[1])
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(-X @ beta))
        W = w * p * (1.0 - p)
        beta = beta + np.linalg.solve(X.T @ (W[:, None] * X), X.T @ (w * (y - p)))
    return beta, np.sum(stats.bernoulli.logpmf(y, p)), np.linalg.inv((X.T * W) @ X)


def test_bernoulli_without_variance_is_a_glm(rng):
    """Groups of one mean each, so that their variance is estimated as zero."""
    half = jg.Design(
        y=jnp.asarray(np.tile([0.0, 1.0, 1.0, 0.0], 12)),
        X=jnp.asarray(np.column_stack([np.ones(N), np.sin(np.arange(N))])),
        terms=(jg.Term(jnp.ones((N, 1)), jnp.asarray(np.arange(N) // 8)),),
    )
    fit = jax.jit(lambda d: jg.fit(d, "binomial"))(half)
    assert int(fit.status) == Status.BOUNDARY
    beta, loglik, cov = plain_glm(np.asarray(half.X), np.asarray(half.y), np.ones(N))
    np.testing.assert_allclose(fit.params.theta, 0.0, atol=1e-6)
    np.testing.assert_allclose(fit.params.beta, beta, atol=1e-8)
    np.testing.assert_allclose(fit.loglik, loglik, rtol=1e-10)
    np.testing.assert_allclose(fit.vcov_beta, cov, rtol=1e-6)
    params = jg.Params(jnp.asarray(beta), jnp.zeros(1), jnp.ones(()))
    np.testing.assert_allclose(jg.loglik(params, half, "binomial"), loglik, rtol=1e-12)


# ---- derivatives against central differences ---------------------------------------

SLOW = pytest.mark.slow
INTERCEPT, VECTOR = [(1, "a")], [(2, "a")]
NESTED, CROSSED = [(1, "b"), (1, "a")], [(1, "a"), (1, "c")]
# family, terms, response, method, nodes
DERIVATIVES = {
    "grouped": ("poisson", INTERCEPT, count, "Laplace", None),
    "vector": ("binomial", VECTOR, coin, "Laplace", None),
    "nested": ("poisson", NESTED, count, "Laplace", None),
    "crossed": ("binomial", CROSSED, coin, "Laplace", None),
    "crossed and vector": ("nbinom2", [(2, "a"), (1, "c")], count, "Laplace", None),
    "own parameter": ("gamma", INTERCEPT, positive, "Laplace", None),
    "zero inflation": ("poisson + zi", INTERCEPT, count, "Laplace", None),
    "dispersion": ("nbinom2 + dispersion", VECTOR, count, "Laplace", None),
    "AGQ": ("nbinom2", INTERCEPT, count, "AGQ", 7),
    "AGQ of vectors": ("binomial", VECTOR, coin, "AGQ", 5),
}
QUICK = {"crossed"}


def model(rng, name):
    """Family, design and parameters to differentiate at."""
    from jaxglmm.families import NegativeBinomial, Poisson, WithDispersion, ZeroInflated

    family, spec, response, method, n_quad = DERIVATIVES[name]
    others, beta = (), ()
    if "+" in family:
        X = np.column_stack([np.ones(N), np.linspace(-1.0, 1.0, N)])
        others = (jg.Predictor(X=jnp.asarray(X)),)
        beta = (jnp.array([-1.0, 0.4]),)
        one = {
            "poisson + zi": ZeroInflated(Poisson()),
            "nbinom2 + dispersion": WithDispersion(NegativeBinomial()),
        }
        family = one[family]
    design = make(rng, spec, response, others=others)
    n_own = family in ("gamma", "nbinom2")
    params = jg.Params(
        jnp.array([0.1, 0.3]),
        jnp.asarray(rng.uniform(0.3, 0.9, design.n_theta)),
        jnp.ones(()),
        jnp.full(int(n_own), 0.5),
        beta,
    )
    return family, design, params, method, n_quad


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [SLOW]) for n in DERIVATIVES]
)
def test_derivatives_of_the_likelihood(rng, name):
    """Gradient and Hessian in all parameters."""
    family, design, params, method, n_quad = model(rng, name)
    x, unravel = ravel_pytree(params.replace(sigma=None))

    def f(x):
        at = unravel(x).replace(sigma=jnp.ones(()))
        return jg.loglik(at, design, family, method, n_quad=n_quad)

    @jax.jit
    def everything(x):
        value_and_grad = jax.value_and_grad(f)
        return *value_and_grad(x), jax.jacfwd(lambda x: value_and_grad(x)[1])(x)

    _, grad, hess = everything(x)

    def difference(e, h):
        """Central differences of value and gradient, extrapolated once."""
        at = [everything(x + s * h * e)[:2] for s in (1, -1, 2, -2)]
        return [
            (4 * (a - b) / (2 * h) - (c - d) / (4 * h)) / 3 for a, b, c, d in zip(*at)
        ]

    found = [difference(e, 1e-3) for e in np.eye(len(x))]
    np.testing.assert_allclose(grad, [s for s, _ in found], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hess, [b for _, b in found], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "response", "what"),
    [
        pytest.param("gamma", positive, ("y", "weights"), marks=SLOW),
        ("poisson", count, ("weights", "offset", "X")),
    ],
)
def test_derivatives_through_the_fit(rng, family, response, what):
    """In a random direction of each of the inputs."""
    design = make(rng, VECTOR, response, weights=jnp.ones(N))
    design = design.replace(offset=jnp.zeros(N))
    directions = [
        jnp.asarray(rng.normal(size=getattr(design, w).shape) * 0.1) for w in what
    ]

    @jax.jit
    def everything(t):
        def estimates(t):
            moved = {
                w: getattr(design, w) + t[i] * directions[i] for i, w in enumerate(what)
            }
            out = jg.fit(design.replace(**moved), family)
            p = out.params
            return jnp.concatenate([p.beta, p.theta, p.psi, out.loglik[None]])

        return estimates(t), jax.jacfwd(estimates)(t)

    zero, h = jnp.zeros(len(what)), 1e-3
    _, exact = everything(zero)
    for i, e in enumerate(jnp.eye(len(what))):
        a, b, c, d = (everything(s * h * e)[0] for s in (1, -1, 2, -2))
        expected = (4 * (a - b) / (2 * h) - (c - d) / (4 * h)) / 3
        np.testing.assert_allclose(exact[:, i], expected, rtol=1e-4, atol=1e-6)
