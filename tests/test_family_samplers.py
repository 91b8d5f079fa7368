"""Response families: starting values, samplers, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxglmm.errors import DataError
from jaxglmm.families import (
    Beta,
    BetaBinomial,
    Binomial,
    Cumulative,
    Gamma,
    Gaussian,
    GeneralizedPoisson,
    InverseGaussian,
    LogNormal,
    NegativeBinomial,
    Poisson,
    Student,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
    Tweedie,
    WithDispersion,
    ZeroInflated,
    family_by_name,
    family_names,
)


def evaluate(fn, *args):
    mapped = jax.jit(jax.vmap(fn))
    return np.asarray(mapped(*(jnp.asarray(a) for a in args)))


# ---- starting values -----------------------------------------------------------------


def wrapped(family):
    if family.name == "cumulative":
        return []
    found = [ZeroInflated(family)] if family.support != "real" else []
    return found + ([WithDispersion(family)] if "phi" in family.own_names else [])


@functools.partial(jax.jit, static_argnums=0)
def starts(families, y, w):
    """Of every family: psi in three ways, eta by row, and for its wrapped kinds."""
    one, constant = jnp.ones_like(w), jnp.full_like(y, y[0])
    return [
        (
            [f.psi_start(y, one), f.psi_start(y, w)],
            [f.psi_start(constant, one), f.psi_start(constant, w)],
            jax.vmap(f.eta_start)(y, w),
            [other.extra_start(y, w) for other in wrapped(f)],
        )
        for f in families
    ]


@pytest.mark.parametrize("name", family_names())
def test_starting_values_are_finite(name):
    default = family_by_name(name)
    families = tuple(family_by_name(name, link=link) for link in default.links)
    y = {"unit": [0.2, 0.9], "proportion": [0.0, 1.0], "real": [0.0, 2.0]}.get(
        default.support, [1.0, 2.0]
    )
    found = starts(families, np.array(y * 3), np.full(6, 2.0))
    for family, (psis, constants, eta, extras) in zip(families, found):
        assert all(np.shape(psi) == (family.n_own,) for psi in psis)
        assert np.shape(eta) == (6,)
        expected = [(other.n_eta - 1,) for other in wrapped(family)]
        assert [np.shape(extra) for extra in extras] == expected
        for part in (*psis, *constants, eta, *extras):
            assert np.isfinite(part).all(), family.link


# ---- samplers ------------------------------------------------------------------------

# the slow run has three times as many draws
N_DRAWS = [30_000, pytest.param(100_000, marks=pytest.mark.slow)]


@functools.partial(jax.jit, static_argnums=0)
def sample(family, keys, eta, psi, w):
    return jax.vmap(family.sample, (0, None, None, None))(keys, eta, psi, w)


@functools.partial(jax.jit, static_argnums=0)
def moments(family, eta, psi, w):
    return family.mu(eta, psi), family.variance(eta, psi, w)


def draw(family, n, eta, psi, w=1.0, seed=11):
    keys = jax.random.split(jax.random.key(seed), n)
    eta, psi, w = (np.asarray(v, float) for v in (eta, psi, w))
    return np.asarray(sample(family, keys, eta, psi, w))


def check_masses(y, support, family, eta, psi, w=1.0):
    """Chi-square of draws against the density; rare values pooled."""
    eta, psi, w = (jnp.asarray(v, float) for v in (eta, psi, w))
    mass = np.exp(evaluate(lambda v: family.log_lik(v, eta, psi, w), support))
    expected = len(y) * mass
    found = np.array([np.sum(np.abs(y - v) < 1e-9) for v in support])
    common = expected >= 10
    rest = len(y) - expected[common].sum(), len(y) - found[common].sum()
    e = np.append(expected[common], max(rest[0], 1e-9))
    o = np.append(found[common], rest[1])
    keep = e >= 1
    chi2 = np.sum((o - e)[keep] ** 2 / e[keep])
    assert stats.chi2.sf(chi2, max(keep.sum() - 1, 1)) > 1e-4
    assert o[~keep].sum() <= 8


def slowly(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


COUNT_CASES = [
    (Poisson(), [0.7], []),
    (NegativeBinomial(), [0.7], [0.2]),
    slowly(NegativeBinomial(kind=1), [0.7], [0.8]),
    (TruncatedPoisson(), [-0.5], []),
    slowly(TruncatedNegativeBinomial(), [0.2], [-0.3]),
    slowly(TruncatedNegativeBinomial(kind=1), [0.7], [0.8]),
    slowly(GeneralizedPoisson(), [0.7], [0.6]),
    slowly(ZeroInflated(WithDispersion(NegativeBinomial())), [0.9, 0.4, -0.7], []),
    (ZeroInflated(TruncatedPoisson()), [0.9, -0.7], []),
    (Cumulative(n_categories=4, link="probit"), [0.3], [-0.6, -0.2, 0.1]),
]


@pytest.mark.parametrize("n", N_DRAWS)
@pytest.mark.parametrize(("family", "eta", "psi"), COUNT_CASES, ids=str)
def test_draws_of_counts(family, eta, psi, n):
    top = 4 if isinstance(family, Cumulative) else 300
    support = np.arange(0.0 if family.has_zero or top == 4 else 1.0, top)
    check_masses(draw(family, n, eta, psi), support, family, eta, psi)


@pytest.mark.parametrize("n", N_DRAWS)
@pytest.mark.parametrize("family", [Binomial(link="cloglog"), BetaBinomial()], ids=str)
def test_draws_of_proportions(family, n):
    psi = [0.9] * family.n_own
    y = draw(family, n, [0.2], psi, 12.0)
    check_masses(y, np.arange(13.0) / 12.0, family, [0.2], psi, 12.0)


P, PHI = special.expit(0.4), np.exp(0.7)
CONTINUOUS = [
    (Gaussian(), [0.5], stats.norm(0.4, np.exp(0.5) / 2)),
    (Student(), [0.5, 1.0], stats.t(np.e, 0.4, np.exp(0.5) / 2)),
    (LogNormal(), [0.5], stats.lognorm(np.exp(0.5) / 2, scale=np.exp(0.4))),
    (Gamma(), [0.7], stats.gamma(4 / PHI, scale=np.exp(0.4) * PHI / 4)),
    (InverseGaussian(), [0.7], stats.invgauss(np.exp(0.4) * PHI / 4, scale=4 / PHI)),
    (Beta(), [0.7], stats.beta(P * PHI, (1 - P) * PHI)),
]


@pytest.mark.parametrize("n", N_DRAWS)
@pytest.mark.parametrize(
    ("family", "psi", "law"), CONTINUOUS, ids=lambda v: str(v)[:12]
)
def test_draws_of_continuous_responses(family, psi, law, n):
    y = draw(family, n, [0.4], psi, 4.0)
    assert stats.kstest(y, law.cdf).pvalue > 1e-4
    at = jnp.array([0.4]), jnp.asarray(psi)
    found = evaluate(lambda y: family.log_lik(y, *at, 4.0), y[:50])
    mean, variance = moments(family, *at, 4.0)
    power = 4.0 if family.weights_role == "replication" else 1.0
    np.testing.assert_allclose(found, power * law.logpdf(y[:50]), rtol=1e-9, atol=1e-9)
    if law.var() < np.inf and power == 1.0 and not isinstance(family, LogNormal):
        np.testing.assert_allclose(mean, law.mean(), rtol=1e-10)
    if law.var() < np.inf:
        np.testing.assert_allclose(variance, law.var(), rtol=1e-10)


@pytest.mark.parametrize("n", N_DRAWS)
def test_draws_of_tweedie_responses(n):
    family, eta, psi = Tweedie(), jnp.array([0.4]), jnp.array([0.3, -0.4])
    y = draw(family, n, eta, psi, 2.0)
    x = 60.0 * np.linspace(0.0, 1.0, 6001) ** 2  # closer where the density is large
    density = np.exp(evaluate(lambda v: family.log_lik(v, eta, psi, 2.0), x))
    zero, density[0] = density[0], density[1]
    assert stats.binomtest(int(np.sum(y == 0)), n, zero).pvalue > 1e-4
    steps = 0.5 * (density[1:] + density[:-1]) * np.diff(x)
    cdf = np.concatenate([[0.0], np.cumsum(steps)])
    np.testing.assert_allclose(cdf[-1], 1.0 - zero, atol=1e-4)
    law = lambda v: np.interp(v, x, cdf / cdf[-1])
    assert stats.kstest(y[y > 0], law).pvalue > 1e-4
    mean, variance = moments(family, eta, psi, 2.0)
    np.testing.assert_allclose(np.mean(y), mean, atol=4 * np.sqrt(variance / n))
    np.testing.assert_allclose(np.var(y), variance, rtol=0.05)
    np.testing.assert_allclose(family.natural(psi)[1], 1 + special.expit(-0.4))


@pytest.mark.slow
def test_draws_stay_in_the_support():
    dtype = "float32"
    keys = jax.random.split(jax.random.key(3), 600)
    eta, psi = np.repeat(np.array([[-9.0, -5.0], [6.0, 5.0]], dtype), 300, axis=0).T
    for name in family_names():
        family = family_by_name(name)
        sample = lambda k, e, p, f=family: f.sample(
            k, e[None], jnp.full(f.n_own, p), jnp.ones((), dtype)
        )
        # underdispersed; hardly a degree of freedom
        first = 300 if name in ("genpois", "student") else 0
        y = evaluate(sample, keys[first:], eta[first:], psi[first:])
        assert y.dtype == dtype
        if name == "lognormal":
            y = y[:300]  # sigma = exp(5) leaves the range of floating point
        if name != "cumulative":
            family.check(y, np.ones(len(y)) if name != "gaussian" else None)


# ---- bad input -----------------------------------------------------------------------

BAD = [
    ("poisson", [0, 1.5, 2, -1], None, "2 of 4 rows.*row 1 has 1.5, row 3 has -1"),
    ("poisson", [0, 1], [1, -2], "counts as w rows.*row 1 has -2"),
    ("gamma", [1.0, 0.0, 2.0], None, "above 0.*row 1 has 0"),
    ("gamma", [1.0, 2.0], [1.0, np.inf], "divide the variance"),
    ("beta", [0.2, 1.0], None, "strictly between 0 and 1.*row 1 has 1"),
    ("binomial", [0.2, 1.2], [5, 5], "from 0 to 1.*row 1 has 1.2"),
    ("binomial", [0.0, 0.2], None, "proportions without trials.*row 1 has 0.2"),
    ("binomial", [0.2, 0.5], [5, 2.5], "whole numbers.*row 1 has 2.5"),
    ("betabinomial", [0.2, 0.3], [5, 5], "successes.*row 1 has 1.5"),
    ("truncated_poisson", [1, 0], None, "counts 1, 2, 3.*row 1 has 0"),
    ("cumulative", [0, 1, 3], None, "codes 0, 1, ..., 2 of 3"),
    ("cumulative", [0, 0, 2], None, "no row in category 1"),
    ("student", [0.0, np.nan], None, "finite numbers.*row 1 has nan"),
    ("lognormal", list(range(-20, 3)), None, "21 of 23 rows.* and 16 more"),
]


@pytest.mark.parametrize(("name", "y", "weights", "message"), BAD)
def test_refused_responses_and_weights(name, y, weights, message):
    weights = None if weights is None else np.array(weights, float)
    with pytest.raises(DataError, match=message):
        family_by_name(name).check(np.array(y, float), weights)


def test_rows_of_weight_zero_are_not_looked_at():
    Gamma().check(np.array([1.0, -3.0]), np.array([1.0, 0.0]))
    Binomial().check(np.array([0.5, 0.25, 1.0]), np.array([2.0, 4.0, 7.0]))
    ZeroInflated(Gamma()).check(np.array([0.0, 3.0]), None)
    with pytest.raises(DataError, match=r"0 and numbers above 0.*row 0 has -1"):
        ZeroInflated(Gamma()).check(np.array([-1.0, 3.0]), None)
