"""Importance sampling at the modes against quadrature and dense matrices."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_elimination import MODELS, make

import jaxglmm as jg
from jaxglmm import plan
from jaxglmm.coordinates import block_factors
from jaxglmm.elimination import effects_from_noise, eliminate
from jaxglmm.families import Gaussian
from jaxglmm.generalized import user_rows
from jaxglmm.inference.laplace_error import (
    LaplaceError,
    _cholesky,
    _colour,
)
from jaxglmm.modes import curvature

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


@pytest.fixture(scope="module")
def cbpp():
    return jg.glmm(CBPP, jg.datasets.load("cbpp"), family="binomial")


@pytest.fixture(scope="module")
def exact_cbpp(cbpp):
    """The log-likelihood at the Laplace estimates, by 25 nodes."""
    return float(jg.loglik(cbpp.fit.params, cbpp.design, "binomial", "AGQ", n_quad=25))


def test_agrees_with_quadrature(cbpp, exact_cbpp):
    found = cbpp.laplace_error(key=1)
    assert abs(found.loglik - exact_cbpp) < 3.0 * found.se
    assert found.loglik == pytest.approx(cbpp.loglik + found.error, abs=1e-12)
    assert 0.0 < found.se < 0.002
    assert found.n == 1000
    assert found.n_groups == 15
    assert found.ess > 800
    assert not found.matters
    assert "no need" in repr(found)
    frame = found.to_frame()
    assert frame["error"].item() == found.error
    assert frame["verdict"].item() in repr(found)


def test_standard_error_is_that_of_repeated_draws(cbpp, exact_cbpp):
    found = [cbpp.laplace_error(key=k) for k in range(40)]
    z = [(f.loglik - exact_cbpp) / f.se for f in found]
    # 40 draws of a standard normal: 4 standard errors of mean and variance
    assert abs(np.mean(z)) < 4.0 / np.sqrt(40)
    assert abs(np.var(z) - 1.0) < 4.0 * np.sqrt(2.0 / 40)


def test_same_key_same_answer(cbpp):
    one, two = cbpp.laplace_error(key=3), cbpp.laplace_error(key=jax.random.key(3))
    assert one == two
    assert one != cbpp.laplace_error(key=4)


@pytest.mark.slow
def test_quadrature_itself_is_not_off():
    m = jg.glmm(CBPP, jg.datasets.load("cbpp"), family="binomial", method="AGQ")
    found = m.laplace_error(key=1)
    assert abs(found.error) < 3.0 * found.se + 1e-6
    assert found.method == "AGQ"


def test_a_gaussian_model_has_no_error(sleepstudy):
    m = jg.glmm("Reaction ~ Days + (Days | Subject)", sleepstudy, method="Laplace")
    found = m.laplace_error(key=1)
    assert abs(found.error) < 1e-9
    assert found.se < 1e-12
    assert not found.matters


@pytest.fixture(scope="module")
def pairs():
    """Two binary responses per group, with a large variance between groups."""
    rng = np.random.default_rng(8)
    g = np.repeat(np.arange(300), 2)
    p = 1.0 / (1.0 + np.exp(-0.5 - 3.0 * rng.normal(size=300)[g]))
    return {"y": (rng.random(600) < p).astype(float), "g": g}


def test_pairs_of_binary_responses_ask_for_quadrature(pairs):
    found = jg.glmm("y ~ 1 + (1 | g)", pairs, family="binomial").laplace_error(key=2)
    assert abs(found.error) > 1.0
    assert found.matters
    assert "quadrature (method='AGQ') is advisable" in found.verdict


SMALL = {
    "crossed": ("y ~ 1 + (1 | a) + (1 | b)", 17),
    "nested": ("y ~ 1 + (1 | a/b)", 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_brute_force(name):
    """Two levels of a, two of b (in each): a tensor grid over all effects."""
    formula, n_nodes = SMALL[name]
    cells = [[1, 2, 0, 1], [3, 2, 4, 3], [8, 10, 7, 9], [14, 12, 15, 13]]
    data = {
        "y": np.ravel(cells).astype(float),
        "a": np.repeat(["r", "s"], 8),
        "b": np.tile(np.repeat(["t", "v"], 4), 2),
    }
    m = jg.glmm(formula, data, family="poisson")
    assert not m.is_singular
    found = m.laplace_error(4000, key=5)
    exact = brute_force(m, n_nodes)
    assert abs(exact - m.loglik) > 5.0 * found.se
    assert abs(found.loglik - exact) < 3.0 * found.se
    assert found.n_groups == (1 if name == "crossed" else 2)


def brute_force(m, n_nodes):
    """Log L of a Poisson model by Gauss-Hermite quadrature in all its effects."""
    parts = m.matrices()
    ZL, y = (parts.Z @ parts.Lambda).toarray(), np.asarray(m.design.y)
    fixed = m.design.X @ m.fit.params.beta
    u = np.concatenate([np.ravel(v) for v in m.fit.u])
    mu = np.exp(fixed + ZL @ u)
    M = ZL.T @ (mu[:, None] * ZL) + np.eye(len(u))
    A = np.linalg.cholesky(np.linalg.inv(M))
    t, w = np.polynomial.hermite_e.hermegauss(n_nodes)
    t = np.array(list(itertools.product(t, repeat=len(u))))
    log_w = np.array(list(itertools.product(np.log(w / w.sum()), repeat=len(u))))
    at = u + t @ A.T
    eta = fixed + at @ ZL.T
    h = eta @ y - np.exp(eta).sum(axis=1) - 0.5 * (at**2).sum(axis=1)
    constant = -sum(np.sum(np.log(np.arange(1, k + 1))) for k in y)
    terms = h + log_w.sum(axis=1) + 0.5 * (t**2).sum(axis=1)
    return np.logaddexp.reduce(terms) + np.log(np.diag(A)).sum() + constant


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "pairs"])
def test_covariance_of_the_draws(rng, monkeypatch, sparse):
    """What noise of unit variance becomes has covariance M^-1."""
    if sparse:  # force the pair lists that only large designs use
        monkeypatch.setattr(plan, "_DENSE_WORK", 0.0)
        monkeypatch.setattr(plan, "_PAIR_COST", 1e-9)
    design = make(rng, MODELS["nested and crossed"])
    data, layout = user_rows(design, Gaussian()), design.layout
    theta = jnp.asarray(rng.normal(size=design.n_theta))

    @jax.jit
    def eliminated(design, theta):
        data, factors = user_rows(design, Gaussian()), block_factors(theta, layout)
        cp = curvature(data.w[:, None, None], data, layout)
        done = eliminate(factors, cp, layout)
        return factors, done

    factors, done = eliminated(design, theta)
    A, A_tail = _cholesky(tuple(map(np.asarray, done.M_inv)), np.asarray(done.S_inv))
    A, A_tail = tuple(map(jnp.asarray, A)), jnp.asarray(A_tail)
    shapes = [(b.n_levels, b.k) for b in layout.blocks]
    cuts = np.cumsum([J * k for J, k in shapes])

    def draw(e):
        parts = jnp.split(e, cuts[:-1])
        e = tuple(p.reshape(shape) for p, shape in zip(parts, shapes))
        noise = _colour(e, A, A_tail, layout)
        d = effects_from_noise(factors, done, noise, data.parents, layout)
        return jnp.concatenate([jnp.ravel(v) for v in d])

    B = np.asarray(jax.jit(jax.vmap(draw))(jnp.eye(cuts[-1]))).T
    ZL = np.hstack([dense_block(z, g, b, Lam) for z, g, b, Lam in
                    zip(data.z, data.codes, layout.blocks, factors)])  # fmt: skip
    M = ZL.T @ (np.asarray(data.w)[:, None] * ZL) + np.eye(cuts[-1])
    np.testing.assert_allclose(B.T @ M @ B, np.eye(cuts[-1]), atol=1e-7)


def dense_block(z, codes, block, Lam):
    """Z Lambda of one block."""
    n, k = z.shape
    Z = np.zeros((n, block.n_levels * k))
    for j in range(k):
        Z[np.arange(n), np.asarray(codes) * k + j] = np.asarray(z)[:, j]
    return Z @ np.kron(np.eye(block.n_levels), np.asarray(Lam))


def test_what_has_no_error_is_refused(sleepstudy, cbpp):
    linear = jg.glmm("Reaction ~ Days + (Days | Subject)", sleepstudy)
    with pytest.raises(ValueError, match="is exact"):
        linear.laplace_error(key=1)
    with pytest.raises(ValueError, match="n must be an integer of at least 10"):
        cbpp.laplace_error(3, key=1)
    with pytest.raises(ValueError, match="tol must be positive"):
        cbpp.laplace_error(key=1, tol=0.0)


def record(**changes):
    numbers = {"error": 0.3, "se": 0.01, "loglik": -5.0, "ess": 900.0, "n": 1000}
    more = {"n_groups": 9, "method": "Laplace", "tol": 0.1, "advice": "do better"}
    return LaplaceError(**(numbers | more | changes))


@pytest.mark.parametrize(
    ("changes", "matters", "words"),
    [
        (
            {},
            True,
            r"off by 0.300 \(\+- 0.010\) in the log-likelihood, more than 0.1: do",
        ),
        ({"error": -0.3}, True, "off by -0.300"),
        ({"error": 0.02}, False, "less than 0.1: no need"),
        ({"se": 0.2}, False, "too noisy to compare with 0.1. Use n=64000"),
        ({"error": 0.11}, False, "as near as can be told"),
        ({"ess": 3.0}, False, "worth only 3 of 1000: too few to tell. Use a larger n"),
        ({"error": np.nan}, False, "cannot be estimated"),
    ],
)
def test_verdicts(changes, matters, words):
    found = record(**changes)
    assert re.search(words, found.verdict)
    assert found.matters is matters
