"""Response families: densities, derivatives and moments."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxglmm.families import (
    LINKS,
    Beta,
    BetaBinomial,
    Binomial,
    Cumulative,
    Family,
    Gamma,
    Gaussian,
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

PATH = Path(__file__).parent / "reference" / "family_densities.json"
REFERENCE = json.loads(PATH.read_text())
# Relative to 1 + |value|. Looser than 1e-12 where digits go into a difference: of tails
# (probit), of 1e12 degrees of freedom (student), of n log n for a million trials
# (betabinomial), of a billion counts and their mean (genpois).
LOOSER = {
    "betabinomial": (1e-8, 1e-9, 1e-9),
    "cumulative/probit": (1e-11, 1e-10, 1e-9),
    "genpois": (1e-12, 1e-10, 1e-10),
    "student": (1e-12, 1e-9, 1e-9),
}

# Scores and curvatures of a negative binomial are differences of terms of the size of
# y and mu, known to a few units in their last place: theta -> inf leaves y - mu for eta
# and nothing for psi. The values are not.
ROUNDING = {"nbinom1", "nbinom2", "truncated_nbinom1", "truncated_nbinom2"}


def by_label(label):
    name, _, link = label.partition("/")
    if name == "cumulative":
        return Cumulative(n_categories=4, link=link)
    return family_by_name(name, link=link or None)


def derivatives(family, y, w, x, hessian=True):
    """Log-likelihood, gradient and Hessian in x = (eta, psi), mapped over rows."""
    k = family.n_eta

    def parts(x, y, w):
        value_and_grad = jax.value_and_grad(
            lambda x: family.log_lik(y, x[:k], x[k:], w)
        )
        if not hessian:
            return value_and_grad(x)
        twice = lambda x: (value_and_grad(x)[1], value_and_grad(x))
        H, (value, gradient) = jax.jacfwd(twice, has_aux=True)(x)
        return value, gradient, H

    fast = {"xla_backend_optimization_level": 0}  # compile time is what costs here
    return map(np.asarray, jax.jit(jax.vmap(parts), compiler_options=fast)(x, y, w))


def evaluate(fn, *args):
    fast = {"xla_backend_optimization_level": 0}
    mapped = jax.jit(jax.vmap(fn), compiler_options=fast)
    return np.asarray(mapped(*(jnp.asarray(a) for a in args)))


# ---- densities and their derivatives -------------------------------------------------


def test_every_family_has_a_reference():
    assert {label.partition("/")[0] for label in REFERENCE} == set(family_names())


@pytest.mark.parametrize("label", REFERENCE)
def test_against_sixty_digits(label):
    family = by_label(label)
    rows = np.array(REFERENCE[label])
    d = 1 + family.n_own
    y, w, x = rows[:, 0], rows[:, 1], rows[:, 2 : 2 + d]
    value, score, curvature = np.split(rows[:, 2 + d :], [1, 1 + d], axis=1)
    found = derivatives(family, y, w, x)
    v, g, H = found
    H = np.diagonal(H, axis1=1, axis2=2)
    tolerances = LOOSER.get(label, (1e-12, 1e-12, 1e-11))
    size = (y + np.exp(x[:, 0]))[:, None] if label in ROUNDING else 0.0
    rounding = 4 * np.finfo(float).eps * size
    slacks = (0.0, rounding, rounding)
    for mine, ref, tol, slack in zip(
        (v[:, None], g, H), (value, score, curvature), tolerances, slacks
    ):
        error = np.maximum(np.abs(mine - ref) - slack, 0.0) / (1 + np.abs(ref))
        worst = np.unravel_index(np.argmax(error), error.shape)
        assert np.isfinite(mine).all()
        assert error.max() <= tol, (rows[worst[0], : 2 + d], mine[worst], ref[worst])


def grid(*axes):
    return (m.ravel() for m in np.meshgrid(*map(np.asarray, axes), indexing="ij"))


Y, ETA, PSI = [1.0, 2.0, 5.0, 40.0], [-1.0, 0.5, 2.0], [-1.0, 0.3, 2.0]


def nbinom_logpmf(y, mu, theta):
    return stats.nbinom.logpmf(y, theta, theta / (theta + mu))


SCIPY = {
    "gaussian": lambda y, eta, psi: stats.norm.logpdf(y, eta, np.exp(psi)),
    "poisson": lambda y, eta, psi: stats.poisson.logpmf(y, np.exp(eta)),
    "nbinom2": lambda y, eta, psi: nbinom_logpmf(y, np.exp(eta), np.exp(psi)),
    "nbinom1": lambda y, eta, psi: nbinom_logpmf(y, np.exp(eta), np.exp(eta - psi)),
    "gamma": lambda y, eta, psi: stats.gamma.logpdf(
        y, np.exp(-psi), scale=np.exp(eta + psi)
    ),
    "inverse_gaussian": lambda y, eta, psi: stats.invgauss.logpdf(
        y, np.exp(eta + psi), scale=np.exp(-psi)
    ),
    "lognormal": lambda y, eta, psi: stats.lognorm.logpdf(
        y, np.exp(psi), scale=np.exp(eta)
    ),
    "truncated_poisson": lambda y, eta, psi: (
        stats.poisson.logpmf(y, np.exp(eta)) - np.log(stats.poisson.sf(0, np.exp(eta)))
    ),
}


@pytest.mark.parametrize("name", SCIPY)
def test_against_scipy(name):
    family = family_by_name(name)
    y, eta, psi = grid(Y, ETA, PSI)
    x = np.column_stack([eta, *([psi] * family.n_own)])
    found = evaluate(
        lambda y, x: family.log_lik(y, x[:1], x[1:], jnp.ones_like(y)), y, x
    )
    np.testing.assert_allclose(found, SCIPY[name](y, eta, psi), rtol=1e-9, atol=1e-11)


def test_proportions_against_scipy():
    k, n = np.array([0.0, 3, 10, 1, 0]), np.array([10.0, 10, 10, 1, 1])
    eta, phi = np.linspace(-2, 2, 5), 3.0
    p = special.expit(eta)
    log_lik = lambda family, psi: evaluate(
        lambda y, e, w: family.log_lik(y, e[None], psi, w), k / n, eta, n
    )
    np.testing.assert_allclose(
        log_lik(Binomial(), jnp.zeros(0)), stats.binom.logpmf(k, n, p), rtol=1e-12
    )
    np.testing.assert_allclose(
        log_lik(BetaBinomial(), jnp.log(jnp.array([phi]))),
        stats.betabinom.logpmf(k, n, p * phi, (1 - p) * phi),
        rtol=1e-12,
    )
    y = np.array([0.1, 0.5, 0.9])
    found = evaluate(
        lambda y: Beta().log_lik(y, jnp.array([0.4]), jnp.array([1.0]), 1.0), y
    )
    p, phi = special.expit(0.4), np.e
    expected = stats.beta.logpdf(y, p * phi, (1 - p) * phi)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("theta", [1e8, 1e200])
@pytest.mark.parametrize("kind", [1, 2])
def test_negative_binomial_becomes_poisson(kind, theta):
    y, eta = grid([0.0, 1.0, 3.0, 20.0], [-2.0, 0.0, 2.0])
    psi = np.log(theta) if kind == 2 else -np.log(theta)
    x = np.column_stack([eta, np.full_like(eta, psi)])
    nb = list(derivatives(NegativeBinomial(kind=kind), y, np.ones_like(y), x))
    poisson = list(derivatives(Poisson(), y, np.ones_like(y), x[:, :1]))
    for a, b in zip(nb, poisson):
        a = a if a.ndim == 1 else a[(slice(None), *[slice(1)] * (a.ndim - 1))]
        np.testing.assert_allclose(a, b, atol=1e4 / theta + 1e-12, rtol=1e-13)


EXTREMES = {
    "poisson": ([0.0, 1.0, 1e9], []),
    "nbinom1": ([0.0, 1.0, 1e9], [-13.8, 0.0, 27.6]),
    "nbinom2": ([0.0, 1.0, 1e9], [-13.8, 0.0, 27.6]),
    "truncated_poisson": ([1.0, 1e9], []),
    "truncated_nbinom1": ([1.0, 1e9], [-13.8, 0.0, 27.6]),
    "truncated_nbinom2": ([1.0, 1e9], [-13.8, 0.0, 27.6]),
    "gamma": ([1e-8, 1.0, 1e9], [-13.8, 0.0, 27.6]),
    "inverse_gaussian": ([1e-3, 1.0, 1e3], [-5.0, 0.0, 5.0]),
    "lognormal": ([1e-8, 1.0, 1e9], [-10.0, 0.0, 10.0]),
    "gaussian": ([-1e3, 0.0, 1e3], [-10.0, 0.0, 10.0]),
    "student": ([-1e3, 0.0, 1e3], [-3.0, 0.0, 10.0]),
    "beta": ([1e-6, 0.5, 1 - 1e-6], [-13.8, 0.0, 27.6]),
    "betabinomial": ([0.0, 0.5, 1.0], [-13.8, 0.0, 27.6]),
    "binomial": ([0.0, 0.5, 1.0], []),
    "genpois": ([0.0, 1.0, 1e3], [0.0, 1.0, 10.0]),
    "tweedie": ([0.0, 1e-3, 1.0, 1e3], [-3.0, 0.0, 3.0]),
    "cumulative": ([0.0, 1.0, 2.0], [-5.0, 0.0, 5.0]),
}
# the others take their links from the same functions
ALL_LINKS = (
    "binomial",
    "poisson",
    "gamma",
    "inverse_gaussian",
    "gaussian",
    "cumulative",
)
FAR = [-700.0, -100.0, -37.0, -1.0, 0.0, 1.0, 37.0, 100.0, 700.0]


# every program compiles for seconds: the default run has a third of them
QUICK = {"poisson", "binomial", "gamma", "nbinom2", "gaussian", "beta"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            name,
            dtype,
            marks=[] if name in QUICK and dtype == "float64" else [pytest.mark.slow],
        )
        for name in EXTREMES
        for dtype in ("float64", "float32")
    ],
)
def test_finite_far_out(name, dtype):
    default = family_by_name(name)
    ys, psis = EXTREMES[name]
    for link in default.links if name in ALL_LINKS else default.links[:1]:
        family = family_by_name(name, link=link)
        far = FAR if dtype == "float64" or link == "log" else [*FAR[:4], 0.1, *FAR[5:]]
        y, eta, psi = grid(ys, far, psis or [0.0])
        x = np.column_stack([eta, *([psi] * family.n_own)])
        w = np.full_like(y, 4.0)
        arrays = (np.asarray(a, dtype) for a in (y, w, x))
        second = dtype == "float32" or link == "identity"  # +-700 is in the reference
        for part in derivatives(family, *arrays, hessian=second):
            assert part.dtype == dtype
            assert np.isfinite(part).all(), link


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("poisson", "gamma")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in family_names()
    ],
)
def test_weight_zero_drops_the_row_whatever_y(name):
    family = family_by_name(name)
    x = np.zeros((3, 1 + family.n_own))
    y = np.array([0.0, -1.0, np.nan])
    for part in derivatives(family, y, np.zeros(3), x, hessian=False):
        np.testing.assert_array_equal(part, 0.0)


def test_replication_and_precision():
    at = (jnp.array([0.3]), jnp.array([0.2]))
    nb = NegativeBinomial()
    assert nb.log_lik(4.0, *at, 2.5) == pytest.approx(2.5 * nb.log_lik(4.0, *at, 1.0))
    for family in (Gaussian(), Student(), LogNormal(), Gamma(), InverseGaussian()):
        psi = jnp.full(family.n_own, 0.2)
        heavy = psi.at[0].add(
            -np.log(2.5) * (1.0 if "phi" in family.own_names else 0.5)
        )
        left = family.log_lik(4.0, at[0], psi, 2.5)
        np.testing.assert_allclose(
            left, family.log_lik(4.0, at[0], heavy, 1.0), rtol=1e-13
        )


def test_cumulative_masses_sum_to_one():
    psi = jnp.array([-1.0, 0.3, -0.5])
    for link in Cumulative.links:
        family = Cumulative(n_categories=4, link=link)
        p = np.asarray(family.probabilities(jnp.array([0.7]), psi))
        np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-13)
    tau = np.asarray(family.natural(psi))
    np.testing.assert_allclose(
        tau, -1.0 + np.r_[0, np.exp(0.3), np.exp([0.3, -0.5]).sum()]
    )


# ---- several predictors --------------------------------------------------------------


def test_zero_inflation_and_hurdle():
    eta, psi = jnp.array([0.6, 0.2, -0.8]), jnp.zeros(0)
    pi, mu, theta = special.expit(-0.8), np.exp(0.6), np.exp(0.2)
    f = stats.nbinom.pmf(np.arange(6), theta, theta / (theta + mu))
    y = jnp.arange(6.0)
    zinb = ZeroInflated(WithDispersion(NegativeBinomial()))
    assert zinb.eta_names == ("conditional", "dispersion", "zi")
    assert (zinb.n_eta, zinb.n_own) == (3, 0)
    found = evaluate(lambda y: zinb.log_lik(y, eta, psi, 1.0), y)
    expected = np.log((1 - pi) * f + pi * (np.arange(6) == 0))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    hurdle = ZeroInflated(TruncatedNegativeBinomial())
    found = evaluate(lambda y: hurdle.log_lik(y, eta[::2], jnp.array([0.2]), 1.0), y)
    expected = np.log(np.r_[pi, (1 - pi) * f[1:] / (1 - f[0])])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    k = np.arange(400.0)
    mass = np.exp(evaluate(lambda y: zinb.log_lik(y, eta, psi, 1.0), k))
    mean = np.sum(k * mass)
    np.testing.assert_allclose(zinb.mu(eta, psi), mean, rtol=1e-9)
    np.testing.assert_allclose(
        zinb.variance(eta, psi, 1.0), np.sum((k - mean) ** 2 * mass), rtol=1e-8
    )


@pytest.mark.slow
def test_zero_inflated_predictors_far_out():
    for base in (NegativeBinomial(), TruncatedPoisson(), Gamma()):
        family = ZeroInflated(WithDispersion(base) if base.n_own else base)
        axes = [FAR] * family.n_eta
        axes[1] = [-13.0, 0.0, 25.0] if family.n_eta == 3 else axes[1]
        y, *eta = grid([0.0, 1.0, 1e6], *axes)
        for part in derivatives(family, y, np.ones_like(y), np.column_stack(eta)):
            assert np.isfinite(part).all()


def test_dispersion_predictor_is_the_first_own_parameter():
    family, psi = WithDispersion(Student()), jnp.array([1.2])
    assert family.own_names == ("nu",)
    found = family.log_lik(1.0, jnp.array([0.3, -0.4]), psi, 2.0)
    full = Student().log_lik(1.0, jnp.array([0.3]), jnp.array([-0.4, 1.2]), 2.0)
    assert found == full
    np.testing.assert_allclose(family.natural(psi), np.exp([1.2]))
    with pytest.raises(ValueError, match="no dispersion"):
        WithDispersion(Poisson())


# ---- moments, deviance, information --------------------------------------------------


def at_natural(family):
    return jnp.full(1, 0.4), jnp.linspace(0.2, 0.5, family.n_own)


COUNTS = ["poisson", "nbinom1", "nbinom2", "genpois", "truncated_poisson"]
COUNTS += ["truncated_nbinom1", "truncated_nbinom2"]


@pytest.mark.parametrize("name", COUNTS)
def test_moments_of_counts_against_their_masses(name):
    family = family_by_name(name)
    at = at_natural(family)
    y = np.arange(0.0 if family.has_zero else 1.0, 600.0)
    mass = np.exp(evaluate(lambda y: family.log_lik(y, *at, 1.0), y))
    np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-10)
    mean = np.sum(y * mass)
    np.testing.assert_allclose(family.mu(*at), mean, rtol=1e-9)
    variance = np.sum((y - mean) ** 2 * mass)
    np.testing.assert_allclose(family.variance(*at, 1.0), variance, rtol=1e-8)


@pytest.mark.parametrize(
    "family",
    [
        *(Binomial(link=link) for link in Binomial.links[:4]),
        *(Poisson(link=link) for link in Poisson.links),
        *(Gamma(link=link) for link in Gamma.links),
        *(InverseGaussian(link=link) for link in InverseGaussian.links),
        *(Gaussian(link=link) for link in Gaussian.links),
        *(NegativeBinomial(link=link) for link in NegativeBinomial.links),
        Tweedie(),
    ],
    ids=str,
)
def test_information_and_deviance_follow_their_definitions(family):
    psi, w, y = jnp.full(family.n_own, 0.3), 3.0, 2.0 / 3.0
    y = 2.0 if family.support == "count" else y
    mu = lambda e: family.mu(e[None], psi)
    for x in (0.3, 1.1):
        eta = jnp.array([x])
        by_eta = jax.grad(mu)(eta[0])
        weight = w if family.weights_role == "replication" else 1.0
        expected = weight * by_eta**2 / family.variance(eta, psi, w)
        found = family.expected_information(eta, psi, w)
        np.testing.assert_allclose(found, expected, rtol=1e-11)
        # the score is half minus the derivative of the scaled deviance
        deviance = jax.grad(lambda e: family.unit_deviance(y, e, psi, w))(eta)
        score = jax.grad(lambda e: family.log_lik(y, e, psi, w))(eta)
        phi = {"phi": jnp.exp(0.3), "sigma": jnp.exp(0.6)}.get(
            (*family.own_names, "")[0], 1.0
        )
        np.testing.assert_allclose(score, -0.5 * deviance / phi, rtol=1e-11)


def test_links_and_their_inverses():
    eta = jnp.linspace(0.1, 2.0, 9)
    for name, link in LINKS.items():
        if link.log_mean is not None:
            back = link.g(jnp.exp(jax.vmap(link.log_mean)(eta)))
            np.testing.assert_allclose(back, eta, rtol=1e-12, err_msg=name)
        if link.real_mean is not None:
            back = link.g(jax.vmap(link.real_mean)(eta))
            np.testing.assert_allclose(back, eta, rtol=1e-12, err_msg=name)
        if link.log_pair is not None:
            both = -eta if name == "log" else jnp.concatenate([-eta, eta])
            log_p, log_q = jax.vmap(link.log_pair)(both)
            np.testing.assert_allclose(link.g(jnp.exp(log_p)), both, rtol=1e-9)
            np.testing.assert_allclose(jnp.exp(log_p) + jnp.exp(log_q), 1.0, rtol=1e-14)


# ---- names, custom families ----------------------------------------------------------


def test_names_links_and_hashes():
    for name in family_names():
        family = family_by_name(name)
        assert family.name == name
        assert isinstance(family, Family)
        assert len(family.own_names) == family.n_own
        assert family == family_by_name(name.upper())
        assert hash(family) == hash(family_by_name(family))
    assert family_by_name(None) == Gaussian()
    assert NegativeBinomial(kind=1) != NegativeBinomial()
    inflated = family_by_name(ZeroInflated(Poisson()), link="sqrt")
    assert inflated == ZeroInflated(Poisson(link="sqrt"))
    with pytest.raises(ValueError, match=r"'foo'; this version knows gaussian, bin"):
        family_by_name("foo")
    with pytest.raises(ValueError, match=r"'poisson' has no link 'logit'; .* log, id"):
        family_by_name("poisson", link="logit")
    with pytest.raises(ValueError, match="kind must be 1"):
        NegativeBinomial(kind=3)


def log_density(y, eta, psi):
    theta = jnp.exp(psi[0])
    lgamma = jax.scipy.special.gammaln
    rest = lgamma(y + theta) - lgamma(theta) - lgamma(y + 1.0)
    total = jnp.logaddexp(psi[0], eta)
    return rest + y * (eta - total) + theta * (psi[0] - total)


def test_custom_family_reproduces_a_built_in_one():
    custom = Family(
        log_density=log_density,
        n_own=1,
        name="mine",
        own_names=("theta",),
        transform=jnp.exp,
        mean=lambda eta, psi: jnp.exp(eta),
        support="count",
    )
    assert isinstance(custom, Family)
    assert hash(custom) == hash(custom)
    y, eta, psi = grid([0.0, 1.0, 7.0], ETA, PSI)
    x = np.column_stack([eta, psi])
    pair = [
        derivatives(f, y, np.full_like(y, 2.0), x) for f in (custom, NegativeBinomial())
    ]
    for a, b in zip(*pair):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(custom.natural(jnp.zeros(1)), 1.0)
    inflated = ZeroInflated(custom)
    value = inflated.log_lik(0.0, jnp.array([0.1, 0.2]), jnp.array([0.3]), 1.0)
    other = ZeroInflated(NegativeBinomial())
    expected = other.log_lik(0.0, jnp.array([0.1, 0.2]), jnp.array([0.3]), 1.0)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"'mine' has no sampler.*sampler="):
        custom.sample(jax.random.key(0), jnp.zeros(1), jnp.zeros(1), 1.0)
    with pytest.raises(ValueError, match="'mine' has no expected information"):
        custom.expected_information(jnp.zeros(1), jnp.zeros(1), 1.0)
    with pytest.raises(ValueError, match="own_start has 1 entries for n_own=2"):
        Family(log_density=log_density, n_own=2, own_start=(0.0,))


def test_custom_family_of_two_predictors():
    density = lambda y, eta, psi: jax.scipy.stats.norm.logpdf(
        y, eta[0], jnp.exp(eta[1])
    )
    custom = Family(log_density=density, n_eta=2)
    eta = jnp.array([0.3, -0.2])
    found = custom.log_lik(1.0, eta, jnp.zeros(0), 1.0)
    expected = WithDispersion(Gaussian()).log_lik(1.0, eta, jnp.zeros(0), 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert custom.eta_names == ("conditional", "predictor2")
