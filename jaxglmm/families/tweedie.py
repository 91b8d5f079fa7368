"""Tweedie responses: sums of a Poisson number of gamma variables, 1 < p < 2.

Mean mu, Var y = phi mu^p / w. With psi = (log phi, logit(p - 1)) and
alpha = (2 - p) / (p - 1), y is the sum of N gammas of shape alpha,

    N ~ Poisson(lambda),       lambda = w mu^(2 - p) / (phi (2 - p)),
    f(y) = sum_j P(N = j) Gamma(y | shape alpha j, scale tau),                       (1)
    tau = phi (p - 1) mu^(p - 1) / w,

f(0) = exp(-lambda). The mean enters through the unit deviance only,

    log f(y | mu) = log f(y | y) - w d(y, mu) / (2 phi),
    d / 2 = y^(2 - p) (h(-(p - 1) t) / (p - 1) + h((2 - p) t) / (2 - p)),            (2)

t = log(mu / y), h(x) = exp(x) - 1 - x, so the sum is taken at mu = y. Its terms peak at
j = lambda with standard deviation s = sqrt(j / (1 + alpha)). 128 of them around the
peak are summed: consecutive ones where s <= 8, so that the rest is below 1e-14 of the
sum; above, equally spaced ones, s / 4 apart, which for a smooth peak of this width is
exact to rounding, too.

References: Dunn and Smyth (2005), Stat. Comput. 15(4), doi:10.1007/s11222-005-4070-y.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxglmm.families.base import PositiveMean, check_link, moments
from jaxglmm.families.counts import poisson_draw
from jaxglmm.families.deviances import (
    binet,
    exp_excess,
    factorial_rest,
    poisson_half_deviance,
)
from jaxglmm.families.special import LOG_2PI, safe_exp, sigmoid, softplus
from jaxglmm.typing import Array

__all__ = ["Tweedie"]

_TERMS = 128


@dataclass(frozen=True)
class Tweedie(PositiveMean):
    """Tweedie response, zero or positive, Var(y) = phi mu^p / w with 1 < p < 2.

    psi = (log phi, logit(p - 1)). ``weights`` are precision weights: they divide phi.
    """

    link: str = "log"

    name = "tweedie"
    links = ("log", "identity", "sqrt", "inverse")
    weights_role = "precision"
    support = "nonnegative"
    n_own = 2
    own_names = ("phi", "p")

    def __post_init__(self):
        check_link(self)

    @property
    def has_zero(self) -> bool:
        """True: zero has the probability exp(-lambda)."""
        return True

    def _compound(self, log_mu: Array, psi: Array, w: Array) -> tuple[Array, ...]:
        """Log lambda, log alpha and log tau."""
        log_phi = psi[0] - jnp.log(w)
        log_2p, log_p1 = -softplus(psi[1]), -softplus(-psi[1])
        log_lambda = sigmoid(-psi[1]) * log_mu - log_phi - log_2p
        return log_lambda, -psi[1], log_phi + log_p1 + sigmoid(psi[1]) * log_mu

    def _half_deviance(self, y, eta, psi, log_w):
        """Half of w d of (2), with log w given."""
        log_2p, log_p1 = -softplus(psi[1]), -softplus(-psi[1])
        p2, log_mu = sigmoid(-psi[1]), self._log_mu(eta)
        log_y = jnp.log(jnp.where(y > 0, y, 1.0))
        t = log_mu - log_y
        log_c = log_w + p2 * log_y
        some = exp_excess(-sigmoid(psi[1]) * t, log_c - log_p1)
        some = some + exp_excess(p2 * t, log_c - log_2p)
        return jnp.where(y > 0, some, safe_exp(log_w + p2 * log_mu - log_2p))

    def _log_kernel(self, y, eta, psi, w):
        own = _log_saturated(self, y, psi, w)
        return own - self._half_deviance(y, eta, psi, jnp.log(w) - psi[0])

    def variance(self, eta, psi, w):
        """Variance phi mu^p / w, ()."""
        return jnp.exp(psi[0] + (1.0 + sigmoid(psi[1])) * self._log_mu(eta)) / w

    def expected_information(self, eta, psi, w):
        """Information about eta at given phi and p, ()."""
        log_precision = sigmoid(-psi[1]) * self._log_mu(eta) - psi[0]
        return w * self._slope(eta) ** 2 * safe_exp(log_precision)

    def unit_deviance(self, y, eta, psi, w):
        """Unit deviance w d of (2), ()."""
        return 2.0 * self._half_deviance(y, eta, psi, jnp.log(w))

    def natural(self, psi):
        """Return phi and p, (2,)."""
        return jnp.stack([jnp.exp(psi[0]), 1.0 + sigmoid(psi[1])])

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        key_n, key_y = jax.random.split(key)
        log_lambda, log_alpha, log_tau = self._compound(self._log_mu(eta), psi, w)
        n = poisson_draw(key_n, jnp.exp(log_lambda))
        shape = jnp.where(n > 0, n, 1.0) * jnp.exp(log_alpha)
        size = jax.random.loggamma(key_y, shape, (), eta.dtype) + log_tau
        return jnp.where(n > 0, jnp.exp(size), 0.0)

    def psi_start(self, y, w):
        """Dispersion by moments at p = 1.5."""
        mean, variance = moments(y, w)
        log_phi = jnp.log(variance / jnp.maximum(mean, 1e-3) ** 1.5)
        return jnp.stack([log_phi, jnp.zeros_like(log_phi)])


def _log_saturated(family: Tweedie, y: Array, psi: Array, w: Array) -> Array:
    """Sum (1) at mu = y, its log; zero at y = 0."""
    log_y = jnp.log(jnp.where(y > 0, y, 1.0))
    log_lambda, log_alpha, log_tau = family._compound(log_y, psi, w)
    count, spacing = _nodes(log_lambda, psi)
    used = count >= 0.5
    count = jnp.where(used, count, 1.0)
    log_shape = jnp.log(count) + log_alpha
    terms = (
        0.5 * (log_shape - LOG_2PI)
        - poisson_half_deviance(count, log_lambda)
        - jax.vmap(factorial_rest)(count)
        - exp_excess(log_y - log_shape - log_tau, log_shape)
        - jax.vmap(binet)(log_shape)
    )
    top = jax.lax.stop_gradient(jnp.max(jnp.where(used, terms, -jnp.inf)))
    mass = jnp.exp(jnp.where(used, terms, top) - top)
    total = jnp.log(jnp.sum(jnp.where(used, mass, 0.0)))
    return jnp.where(y > 0, top + total + jnp.log(spacing) - log_y, 0.0)


def _nodes(log_lambda: Array, psi: Array) -> tuple[Array, Array]:
    """Numbers of gammas at which (1) is summed, (128,), and their distance, ()."""
    peak = safe_exp(log_lambda)
    spread = jnp.sqrt(peak * sigmoid(psi[1]))  # 1 / (1 + alpha) = p - 1
    wide = spread > 8.0
    spacing = jnp.where(wide, 0.25 * spread, 1.0)
    first = jnp.where(wide, peak, jnp.floor(peak)) - 0.5 * _TERMS * spacing
    first = jnp.where(wide | (first > 1.0), first, 1.0)
    count = first + jnp.arange(_TERMS).astype(peak.dtype) * spacing
    return jax.lax.stop_gradient(count), jax.lax.stop_gradient(spacing)
