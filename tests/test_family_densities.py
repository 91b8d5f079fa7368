"""Response families: densities, derivatives and moments."""

import functools
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
        return Cumulative(n_categories=4, link=link or "logit")
    return family_by_name(name, link=link or None)


KNOWN = {by_label(label) for label in REFERENCE}
ROWS = 96  # of every call, so that tests of a family share its program


@functools.partial(jax.jit, static_argnums=(0, 1))
def program(family, order, y, w, x):
    """Log-likelihood by itself, and with its derivatives in x up to an order."""
    k = family.n_eta

    def parts(y, w, x):
        log_lik = lambda x: family.log_lik(y, x[:k], x[k:], w)
        if order == 0:
            return (log_lik(x),)
        if order == 1:
            return log_lik(x), *jax.value_and_grad(log_lik)(x)
        (value, gradient), along = jax.linearize(jax.value_and_grad(log_lik), x)
        _, H = jax.vmap(along)(jnp.eye(len(x), dtype=x.dtype))
        return log_lik(x), value, gradient, H

    return jax.vmap(parts)(y, w, x)


def by_rows(family, order, y, w, x):
    order = 2 if family in KNOWN else order
    y, x = np.asarray(y), np.asarray(x)
    w = np.broadcast_to(np.asarray(w, y.dtype), y.shape)
    pieces = []
    for start in range(0, len(y), ROWS):
        rows = np.arange(start, start + ROWS) % len(y)
        pieces.append(program(family, order, y[rows], w[rows], x[rows]))
    return [np.concatenate(part)[: len(y)] for part in zip(*pieces)]


def derivatives(family, y, w, x, hessian=True):
    """Log-likelihood, gradient and Hessian in x = (eta, psi), mapped over rows."""
    return by_rows(family, 1 + hessian, y, w, x)[1 : 3 + hessian]


def log_lik(family, y, eta, psi, w=1.0):
    """Log-likelihood of rows; eta and psi by row, or the same for all."""
    y = np.asarray(y, float)
    rows = [np.broadcast_to(v, (len(y), np.shape(v)[-1])) for v in (eta, psi)]
    return by_rows(family, 0, y, w, np.hstack(rows))[0]


@functools.partial(jax.jit, static_argnums=0)
def moments(family, eta, psi, w):
    return family.mu(eta, psi), family.variance(eta, psi, w)


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
    v, g, H = derivatives(family, y, w, x)
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
    found = log_lik(family, y, eta[:, None], psi[:, None][:, : family.n_own])
    np.testing.assert_allclose(found, SCIPY[name](y, eta, psi), rtol=1e-9, atol=1e-11)


def test_proportions_against_scipy():
    k, n = np.array([0.0, 3, 10, 1, 0]), np.array([10.0, 10, 10, 1, 1])
    eta, phi = np.linspace(-2, 2, 5), 3.0
    p = special.expit(eta)
    np.testing.assert_allclose(
        log_lik(Binomial(), k / n, eta[:, None], np.zeros(0), n),
        stats.binom.logpmf(k, n, p),
        rtol=1e-12,
    )
    np.testing.assert_allclose(
        log_lik(BetaBinomial(), k / n, eta[:, None], np.log([phi]), n),
        stats.betabinom.logpmf(k, n, p * phi, (1 - p) * phi),
        rtol=1e-12,
    )
    y = np.array([0.1, 0.5, 0.9])
    p, phi = special.expit(0.4), np.e
    expected = stats.beta.logpdf(y, p * phi, (1 - p) * phi)
    np.testing.assert_allclose(log_lik(Beta(), y, [0.4], [1.0]), expected, rtol=1e-12)


@pytest.mark.parametrize("theta", [1e8, 1e200])
@pytest.mark.parametrize("kind", [1, 2])
def test_negative_binomial_becomes_poisson(kind, theta):
    y, eta = grid([0.0, 1.0, 3.0, 20.0], [-2.0, 0.0, 2.0])
    psi = np.log(theta) if kind == 2 else -np.log(theta)
    x = np.column_stack([eta, np.full_like(eta, psi)])
    nb = derivatives(NegativeBinomial(kind=kind), y, 1.0, x)
    poisson = derivatives(Poisson(), y, 1.0, x[:, :1])
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


# in float32, and with three categories, no other test compiles the programs
FAR_OUT = [
    pytest.param(
        name,
        dtype,
        marks=[pytest.mark.slow] if name == "cumulative" or dtype == "float32" else [],
    )
    for name in EXTREMES
    for dtype in ("float64", "float32")
]


@pytest.mark.parametrize(("name", "dtype"), FAR_OUT)
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


def test_many_categories_are_finite_far_out():
    """Cloglog, whose masses are exponentials of exponentials."""
    family = Cumulative(n_categories=5, link="cloglog")
    y, eta, psi = grid(np.arange(5.0), FAR, [-5.0, 0.0, 5.0])
    x = np.column_stack([eta, psi, psi, psi, psi])
    for part in derivatives(family, y, np.ones_like(y), x):
        assert np.isfinite(part).all()


@pytest.mark.parametrize("name", family_names())
def test_weight_zero_drops_the_row_whatever_y(name):
    family = by_label(name)
    x = np.zeros((3, 1 + family.n_own))
    y = np.array([0.0, -1.0, np.nan])
    for part in derivatives(family, y, np.zeros(3), x, hessian=False):
        np.testing.assert_array_equal(part, 0.0)


def test_replication_and_precision():
    once, heavier = log_lik(NegativeBinomial(), [4.0, 4.0], [0.3], [0.2], [1.0, 2.5])
    assert heavier == pytest.approx(2.5 * once)
    for family in (Gaussian(), Student(), LogNormal(), Gamma(), InverseGaussian()):
        light = np.full(family.n_own, 0.2)
        heavy = light.copy()
        heavy[0] -= np.log(2.5) * (1.0 if "phi" in family.own_names else 0.5)
        left, right = log_lik(
            family, [4.0, 4.0], [0.3], np.stack([light, heavy]), [2.5, 1.0]
        )
        np.testing.assert_allclose(left, right, rtol=1e-13)


def test_cumulative_masses_sum_to_one():
    psi = jnp.array([-1.0, 0.3, -0.5])
    families = [Cumulative(n_categories=4, link=link) for link in Cumulative.links]
    for p in jax.jit(
        lambda psi: [f.probabilities(jnp.array([0.7]), psi) for f in families]
    )(psi):
        np.testing.assert_allclose(np.sum(p), 1.0, rtol=1e-13)
    tau = np.asarray(families[-1].natural(psi))
    np.testing.assert_allclose(
        tau, -1.0 + np.r_[0, np.exp(0.3), np.exp([0.3, -0.5]).sum()]
    )


# ---- several predictors --------------------------------------------------------------


def test_zero_inflation_and_hurdle():
    eta, psi = np.array([0.6, 0.2, -0.8]), np.zeros(0)
    pi, mu, theta = special.expit(-0.8), np.exp(0.6), np.exp(0.2)
    k = np.arange(400.0)
    f = stats.nbinom.pmf(k[:6], theta, theta / (theta + mu))
    zinb = ZeroInflated(WithDispersion(NegativeBinomial()))
    assert zinb.eta_names == ("conditional", "dispersion", "zi")
    assert (zinb.n_eta, zinb.n_own) == (3, 0)
    found = log_lik(zinb, k, eta, psi)
    expected = np.log((1 - pi) * f + pi * (k[:6] == 0))
    np.testing.assert_allclose(found[:6], expected, rtol=1e-12)
    hurdle = ZeroInflated(TruncatedNegativeBinomial())
    expected = np.log(np.r_[pi, (1 - pi) * f[1:] / (1 - f[0])])
    np.testing.assert_allclose(
        log_lik(hurdle, k[:6], eta[::2], [0.2]), expected, rtol=1e-12
    )
    mass = np.exp(found)
    mean = np.sum(k * mass)
    mu, variance = moments(zinb, eta, psi, 1.0)
    np.testing.assert_allclose(mu, mean, rtol=1e-9)
    np.testing.assert_allclose(variance, np.sum((k - mean) ** 2 * mass), rtol=1e-8)


@pytest.mark.slow
def test_zero_inflated_predictors_far_out():
    for base in (NegativeBinomial(), TruncatedPoisson(), Gamma()):
        family = ZeroInflated(WithDispersion(base) if base.n_own else base)
        axes = [FAR] * family.n_eta
        axes[1] = [-13.0, 0.0, 25.0] if family.n_eta == 3 else axes[1]
        y, *eta = grid([0.0, 1.0, 1e6], *axes)
        for part in derivatives(family, y, 1.0, np.column_stack(eta)):
            assert np.isfinite(part).all()


def test_dispersion_predictor_is_the_first_own_parameter():
    family, psi = WithDispersion(Student()), jnp.array([1.2])
    assert family.own_names == ("nu",)

    @jax.jit
    def both(eta, psi):
        found = family.log_lik(1.0, eta, psi, 2.0)
        own = jnp.concatenate([eta[1:], psi])
        return found, Student().log_lik(1.0, eta[:1], own, 2.0)

    found, full = both(jnp.array([0.3, -0.4]), psi)
    assert found == full
    np.testing.assert_allclose(family.natural(psi), np.exp([1.2]))
    with pytest.raises(ValueError, match="no dispersion"):
        WithDispersion(Poisson())


# ---- moments, deviance, information --------------------------------------------------


COUNTS = ["poisson", "nbinom1", "nbinom2", "genpois", "truncated_poisson"]
COUNTS += ["truncated_nbinom1", "truncated_nbinom2"]


@pytest.mark.parametrize("name", COUNTS)
def test_moments_of_counts_against_their_masses(name):
    family = family_by_name(name)
    at = np.full(1, 0.4), np.linspace(0.2, 0.5, family.n_own)
    y = np.arange(0.0 if family.has_zero else 1.0, 600.0)
    mass = np.exp(log_lik(family, y, *at))
    np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-10)
    mean = np.sum(y * mass)
    mu, variance = moments(family, *at, 1.0)
    np.testing.assert_allclose(mu, mean, rtol=1e-9)
    np.testing.assert_allclose(variance, np.sum((y - mean) ** 2 * mass), rtol=1e-8)


@functools.partial(jax.jit, static_argnums=0)
def by_definition(family, y, eta, psi, w):
    """Slope of mu, variance, information, and slope of the deviance, at one eta."""
    mu = lambda e: family.mu(e, psi)
    deviance = lambda e: family.unit_deviance(y, e, psi, w)
    return (
        jax.grad(mu)(eta)[0],
        family.variance(eta, psi, w),
        family.expected_information(eta, psi, w),
        jax.grad(deviance)(eta)[0],
    )


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
    psi, w, y = np.full(family.n_own, 0.3), 3.0, 2.0 / 3.0
    y = 2.0 if family.support == "count" else y
    x = np.column_stack([[0.3, 1.1], *np.full((family.n_own, 2), 0.3)])
    _, scores = derivatives(family, np.full(2, y), w, x, hessian=False)
    for eta, score in zip(x[:, :1], scores[:, 0]):
        by_eta, variance, found, deviance = by_definition(family, y, eta, psi, w)
        weight = w if family.weights_role == "replication" else 1.0
        expected = weight * by_eta**2 / variance
        np.testing.assert_allclose(found, expected, rtol=1e-11)
        # the score is half minus the derivative of the scaled deviance
        phi = {"phi": np.exp(0.3), "sigma": np.exp(0.6)}.get(
            (*family.own_names, "")[0], 1.0
        )
        np.testing.assert_allclose(score, -0.5 * deviance / phi, rtol=1e-11)


@jax.jit
def there_and_back(eta):
    """Of every link, the means that its inverses make, and their link again."""
    both = jnp.concatenate([-eta, eta])
    out = {}
    for name, link in LINKS.items():
        if link.log_mean is not None:
            out[name, "log_mean"] = link.g(jnp.exp(jax.vmap(link.log_mean)(eta)))
        if link.real_mean is not None:
            out[name, "real_mean"] = link.g(jax.vmap(link.real_mean)(eta))
        if link.log_pair is not None:
            log_p, log_q = jax.vmap(link.log_pair)(-eta if name == "log" else both)
            out[name, "log_pair"] = link.g(jnp.exp(log_p))
            out[name, "sum"] = jnp.exp(log_p) + jnp.exp(log_q)
    return out


def test_links_and_their_inverses():
    eta = np.linspace(0.1, 2.0, 9)
    found = there_and_back(eta)
    assert {name for name, _ in found} == set(LINKS)
    for (name, what), back in found.items():
        both = -eta if name == "log" else np.concatenate([-eta, eta])
        expected = {"log_pair": both, "sum": 1.0}.get(what, eta)
        rtol = {"log_pair": 1e-9, "sum": 1e-14}.get(what, 1e-12)
        np.testing.assert_allclose(back, expected, rtol=rtol, err_msg=name)


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
    pair = [derivatives(f, y, 2.0, x) for f in (custom, NegativeBinomial())]
    for a, b in zip(*pair):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(custom.natural(jnp.zeros(1)), 1.0)
    value, expected = (
        log_lik(ZeroInflated(base), [0.0], [0.1, 0.2], [0.3])
        for base in (custom, NegativeBinomial())
    )
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
    found, expected = (
        log_lik(family, [1.0], [0.3, -0.2], np.zeros(0))
        for family in (custom, WithDispersion(Gaussian()))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert custom.eta_names == ("conditional", "predictor2")
