"""Families of counts, mean mu; ``weights`` replicate: a row of weight w is w rows.

    Poisson             Var y = mu
    NegativeBinomial    kind 2: Var y = mu + mu^2 / theta;  kind 1: Var y = mu (1 + phi)
    Truncated...        the same given y > 0; with ``zi=`` the count part of a hurdle
    GeneralizedPoisson  Var y = phi mu  (Consul)

psi is log theta or log phi. A negative binomial of kind 1 has theta = mu / phi. With
half deviances K and Binet's function s,

    Poisson   log f = -K - c(y),       K = y log(y / mu) - y + mu,                   (1)
    NB        log f = -K - c(y) - (1/2) log(1 + y / theta) + s(y + theta) - s(theta),
              K = y log(y / mu) - (y + theta) log((y + theta) / (mu + theta)),       (2)

log y! = y log y - y + c(y), where the second passes into the first for theta -> inf.
With m = -log f(0) the truncated density is f / (1 - exp(-m)), m = mu for Poisson and
theta log(1 + mu / theta) for NB.

References: Loader (2000), Fast and accurate computation of binomial probabilities;
Hilbe (2011), Negative Binomial Regression, 2nd ed.; Consul and Famoye (1992), Comm.
Stat. Theory Methods 21(1), doi:10.1080/03610929208830766.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxglmm.families.base import PositiveMean, check_link, moments
from jaxglmm.families.deviances import (
    binet,
    factorial_rest,
    genpois_excess,
    log_count,
    nbinom_half_deviance,
    poisson_half_deviance,
)
from jaxglmm.families.special import (
    expm1,
    log1mexp_exp,
    log_add_exp,
    log_softplus,
    safe_exp,
    scaled_sigmoid,
    softplus,
)
from jaxglmm.typing import Array

__all__ = [
    "GeneralizedPoisson",
    "NegativeBinomial",
    "Poisson",
    "TruncatedNegativeBinomial",
    "TruncatedPoisson",
    "poisson_draw",
]


class _Count(PositiveMean):
    links = ("log", "identity", "sqrt")
    support = "count"

    def _log_h(self, y):
        return -factorial_rest(y)


@dataclass(frozen=True)
class Poisson(_Count):
    """Poisson counts. ``weights`` replicate: a row of weight w counts as w rows."""

    link: str = "log"

    name = "poisson"

    def __post_init__(self):
        check_link(self)

    def _log_f(self, y, eta, psi):
        return -poisson_half_deviance(y, self._log_mu(eta))

    def variance(self, eta, psi, w):
        """Variance mu, ()."""
        return jnp.exp(self._log_mu(eta))

    def expected_information(self, eta, psi, w):
        """Information about eta, ()."""
        return w * self._slope(eta) ** 2 * safe_exp(self._log_mu(eta))

    def unit_deviance(self, y, eta, psi, w):
        """2 w (y log(y / mu) - y + mu), ()."""
        return 2.0 * w * poisson_half_deviance(y, self._log_mu(eta))

    def sample(self, key, eta, psi, w):
        """Draw a count, ()."""
        return poisson_draw(key, jnp.exp(self._log_mu(eta)))


class _NegativeBinomial(_Count):
    """What truncated and untruncated negative binomials share."""

    kind: int
    n_own = 1

    @property
    def own_names(self) -> tuple[str, ...]:
        """``theta`` for kind 2, ``phi`` for kind 1."""
        return ("theta",) if self.kind == 2 else ("phi",)

    def __post_init__(self):
        if self.kind not in (1, 2):
            raise ValueError(
                f"kind must be 1 (Var = mu (1 + phi)) or 2 (Var = mu + mu^2 / theta); "
                f"found {self.kind!r}"
            )
        check_link(self)

    def _logs(self, eta: Array, psi: Array) -> tuple[Array, Array]:
        """Log theta, and d = log(mu / theta), which is psi for kind 1."""
        log_mu = self._log_mu(eta)
        if self.kind == 1:
            return log_mu - psi[0], psi[0]
        return psi[0], log_mu - psi[0]

    def _log_mass(self, y: Array, log_theta: Array, d: Array) -> Array:
        """Log f but for the base measure."""
        log_y = log_count(y)
        rest = binet(log_add_exp(log_y, log_theta)) - binet(log_theta)
        rest = rest - 0.5 * softplus(log_y - log_theta)
        return rest - nbinom_half_deviance(y, log_theta, d)

    def psi_start(self, y, w):
        """By moments, as if the mean were constant."""
        mean, variance = moments(y, w)
        mean = jnp.maximum(mean, 1e-3)
        excess = jnp.clip(0.5 * (variance / mean - 1.0), 0.1, 1e4)  # half for the model
        return jnp.log(mean / excess if self.kind == 2 else excess)[None]


@dataclass(frozen=True)
class NegativeBinomial(_NegativeBinomial):
    """Negative binomial counts.

    ``kind=2``: Var(y) = mu + mu^2 / theta, psi = log theta; ``kind=1``:
    Var(y) = mu (1 + phi), psi = log phi. ``weights`` replicate: a row of weight w
    counts as w rows.
    """

    kind: int = 2
    link: str = "log"

    @property
    def name(self) -> str:
        """``nbinom2`` or ``nbinom1``."""
        return f"nbinom{self.kind}"

    def _log_f(self, y, eta, psi):
        return self._log_mass(y, *self._logs(eta, psi))

    def variance(self, eta, psi, w):
        """Variance of y, ()."""
        log_theta, d = self._logs(eta, psi)
        return jnp.exp(log_theta + d + softplus(d))

    def expected_information(self, eta, psi, w):
        """Information about eta at a given theta; kind 2 only, ()."""
        if self.kind == 1:
            return super().expected_information(eta, psi, w)
        log_theta, d = self._logs(eta, psi)
        precision = scaled_sigmoid(log_theta, d)
        return w * self._slope(eta) ** 2 * precision

    def unit_deviance(self, y, eta, psi, w):
        """Twice w K of (2), theta held; for kind 1 theta = mu / phi, ()."""
        return 2.0 * w * nbinom_half_deviance(y, *self._logs(eta, psi))

    def sample(self, key, eta, psi, w):
        """Draw a count, ()."""
        return _nbinom_draw(key, *self._logs(eta, psi))


class _Truncated(_Count, ABC):
    """Counts given that they are above zero."""

    support = "positive count"

    @abstractmethod
    def _log_positive_mass(self, eta: Array, psi: Array) -> Array:
        """Return log P(y > 0) before truncation."""

    @abstractmethod
    def _log_excess_of(self, eta: Array, psi: Array) -> Array:
        """log(Var / mu) before truncation."""

    def mu(self, eta, psi):
        """Mean of the positive counts, mu / P(y > 0), ()."""
        return jnp.exp(self._log_mu(eta) - self._log_positive_mass(eta, psi))

    def variance(self, eta, psi, w):
        """Variance of the positive counts, ()."""
        mean = self.mu(eta, psi)
        raw = jnp.exp(self._log_excess_of(eta, psi)) + jnp.exp(self._log_mu(eta))
        return mean * (raw - mean)


@dataclass(frozen=True)
class TruncatedPoisson(_Truncated):
    """Poisson counts given that they are above zero; mu is that before truncation.

    ``weights`` replicate: a row of weight w counts as w rows.
    """

    link: str = "log"

    name = "truncated_poisson"

    def __post_init__(self):
        check_link(self)

    def _log_f(self, y, eta, psi):
        log_mu = self._log_mu(eta)
        return -poisson_half_deviance(y, log_mu) - log1mexp_exp(log_mu)

    def _log_positive_mass(self, eta, psi):
        return log1mexp_exp(self._log_mu(eta))

    def _log_excess_of(self, eta, psi):
        return jnp.zeros_like(eta[0])

    def sample(self, key, eta, psi, w):
        """Draw a count: the first event in (0, 1], then those after it, ()."""
        key_t, key_y = jax.random.split(key)
        mu = jnp.exp(self._log_mu(eta))
        return 1.0 + poisson_draw(key_y, mu * (1.0 - _first_event(key_t, mu)))


@dataclass(frozen=True)
class TruncatedNegativeBinomial(_Truncated, _NegativeBinomial):
    """Negative binomial counts given that they are above zero.

    mu and theta (``kind=2``) or phi (``kind=1``) are those before truncation.
    ``weights`` replicate: a row of weight w counts as w rows.
    """

    kind: int = 2
    link: str = "log"

    @property
    def name(self) -> str:
        """``truncated_nbinom2`` or ``truncated_nbinom1``."""
        return f"truncated_nbinom{self.kind}"

    def _log_f(self, y, eta, psi):
        log_mass = self._log_mass(y, *self._logs(eta, psi))
        return log_mass - self._log_positive_mass(eta, psi)

    def _log_positive_mass(self, eta, psi):
        log_theta, d = self._logs(eta, psi)
        return log1mexp_exp(log_theta + log_softplus(d))

    def _log_excess_of(self, eta, psi):
        return softplus(self._logs(eta, psi)[1])

    def sample(self, key, eta, psi, w):
        """Draw a count from the jumps of a negative binomial process, ().

        Jumps come at rate m in (0, 1], with logarithmic sizes; the first is at T, and
        what follows is negative binomial with theta (1 - T).
        """
        key_t, key_u, key_v, key_y = jax.random.split(key, 4)
        log_theta, d = self._logs(eta, psi)
        rate = jnp.exp(log_theta + log_softplus(d))
        rest = jnp.log1p(-_first_event(key_t, rate))
        # logarithmic size: geometric with success probability (1 - v)^U
        u = jax.random.uniform(key_u, (), eta.dtype)
        e = jax.random.exponential(key_v, (), eta.dtype)
        log_fail = jnp.log(-expm1(-u * softplus(d)))
        size = 1.0 + jnp.floor(jnp.where(jnp.isfinite(log_fail), e / -log_fail, 0.0))
        return size + _nbinom_draw(key_y, log_theta + rest, d)


@dataclass(frozen=True)
class GeneralizedPoisson(_Count):
    """Consul's generalized Poisson counts, Var(y) = phi mu; psi = log phi.

    ``weights`` replicate: a row of weight w counts as w rows. With c = phi^(-1/2),

        f(y) = mu c (y + c (mu - y))^(y - 1) exp(-y - c (mu - y)) / y!.

    For phi < 1 the formula is used where y + c (mu - y) > 0, as in glmmTMB; its sum
    over those y is then not exactly 1.
    """

    link: str = "log"

    name = "genpois"
    n_own = 1
    own_names = ("phi",)

    def __post_init__(self):
        check_link(self)

    def _log_f(self, y, eta, psi):
        log_mu, log_c = self._log_mu(eta), -0.5 * psi[0]
        positive = jnp.where(y > 0, y, 1.0)
        some = log_mu - jnp.log(positive) + log_c
        some = some - genpois_excess(positive, log_mu, log_c)
        return jnp.where(y > 0, some, -safe_exp(log_mu + log_c))

    def variance(self, eta, psi, w):
        """Variance phi mu, ()."""
        return jnp.exp(psi[0] + self._log_mu(eta))

    def sample(self, key, eta, psi, w):
        """Draw a count: all descendants in a branching process, ().

        Ancestors are Poisson with mean mu c, children with mean 1 - c. For phi < 1
        there is no such process and none of this formula's draws: the result is NaN.
        """
        c = jnp.exp(-0.5 * psi[0])
        key, first = jax.random.split(key)
        ancestors = poisson_draw(first, c * jnp.exp(self._log_mu(eta)))

        def step(state):
            key, alive, total = state
            key, now = jax.random.split(key)
            born = poisson_draw(now, jnp.maximum(1.0 - c, 0.0) * alive)
            return key, born, total + born

        _, _, total = jax.lax.while_loop(
            lambda state: state[1] > 0, step, (key, ancestors, ancestors)
        )
        return jnp.where(c <= 1.0, total, jnp.nan)

    def psi_start(self, y, w):
        """Variance over mean."""
        mean, variance = moments(y, w)
        excess = variance / jnp.maximum(mean, 1e-3)
        return jnp.log(jnp.clip(excess, 0.5, 1e4))[None]


def poisson_draw(key: Array, rate: Array) -> Array:
    """Poisson draw in the dtype of the rate; beyond 1e8 a rounded normal one."""
    huge = ~(rate < 1e8)
    small = jax.random.poisson(key, jnp.where(huge, 1.0, rate), ())
    normal = jax.random.normal(key, (), rate.dtype)
    large = jnp.round(rate + jnp.sqrt(jnp.where(huge, rate, 1.0)) * normal)
    return jnp.where(huge, large, small.astype(rate.dtype))


def _nbinom_draw(key: Array, log_theta: Array, d: Array) -> Array:
    """Poisson with a gamma rate; theta -> 0 and -> inf stay finite."""
    key_rate, key_y = jax.random.split(key)
    theta = jnp.exp(log_theta)
    log_rate = jax.random.loggamma(key_rate, theta, (), d.dtype)
    return poisson_draw(key_y, jnp.exp(log_rate + d))


def _first_event(key: Array, rate: Array) -> Array:
    """Time of the first event of a Poisson process, given that it is in (0, 1]."""
    u = jax.random.uniform(key, (), rate.dtype)
    tiny = rate < 1e-6
    safe = jnp.where(tiny, 1.0, rate)
    return jnp.where(tiny, u, -jnp.log1p(u * expm1(-safe)) / safe)
