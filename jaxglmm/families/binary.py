"""Families of proportions of n trials: binomial and beta-binomial.

w = n trials, y = k / n the proportion of successes, m = n - k, mean p, q = 1 - p:

    Binomial       f = C(n, k) p^k q^m
    BetaBinomial   f = C(n, k) B(k + alpha, m + beta) / B(alpha, beta),
                   alpha = p phi, beta = q phi

With log k! = k log k - k + c(k) the powers of n cancel,

    log C(n, k) = -k log y - m log(1 - y) + c(n) - c(k) - c(m),                      (1)

and each ratio of gamma functions of the beta-binomial is taken as one (``log_rising``),
so that it becomes the binomial smoothly for phi -> inf.

References: Loader (2000), Fast and accurate computation of binomial probabilities;
Skellam (1948), J. R. Stat. Soc. B 10(2).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.families.base import Family, check_link, moments
from jaxglmm.families.checks import check_trials
from jaxglmm.families.deviances import factorial_rest, log_rising, logit_half_deviance
from jaxglmm.families.links import LINKS
from jaxglmm.families.special import softplus
from jaxglmm.typing import Array

__all__ = ["BetaBinomial", "Binomial"]


class _Proportion(Family):
    links = ("logit", "probit", "cloglog", "cauchit", "log")
    weights_role = "trials"
    support = "proportion"
    inside = 0.5

    def _pair(self, eta: Array) -> tuple[Array, Array]:
        log_pair = LINKS[self.link].log_pair
        assert log_pair is not None
        return log_pair(eta[0])

    def is_inside(self, eta):
        """Whether the mean is a proportion, ()."""
        return eta[0] <= 0 if self.link == "log" else super().is_inside(eta)

    def mu(self, eta, psi):
        """Mean proportion, ()."""
        return jnp.exp(self._pair(eta)[0])

    def _half_deviance(self, y, eta, w):
        """Divergence w KL(y | p) = k log(y / p) + m log((1 - y) / q), with (1)."""
        if self.link == "logit":
            return w * logit_half_deviance(y, eta[0])
        log_p, log_q = self._pair(eta)
        log_y = jnp.log(jnp.where(y > 0, y, 1.0))
        log_1y = jnp.log1p(-jnp.where(y < 1, y, 0.0))
        k = y * w
        return k * (log_y - log_p) + (w - k) * (log_1y - log_q)

    def _log_base(self, y, w):
        return factorial_rest(w) - factorial_rest(y * w) - factorial_rest(w * (1.0 - y))

    def eta_start(self, y, w):
        """Link of (k + 1/2) / (n + 1), ()."""
        return LINKS[self.link].g((y * w + 0.5) / (w + 1.0))

    def check(self, y, weights):
        """Raise DataError where y is no proportion of the trials."""
        super().check(y, weights)
        y = np.asarray(y, float)
        weights = None if weights is None else np.asarray(weights, float)
        check_trials(self.name, y, weights)


@dataclass(frozen=True)
class Binomial(_Proportion):
    """Binomial response: y the proportion of successes, ``weights`` the trials.

    Without weights y is 0 or 1 (Bernoulli). A response ``cbind(successes, failures)``
    becomes proportion and trials.
    """

    link: str = "logit"

    takes_codes = "levels"
    name = "binomial"

    def __post_init__(self):
        check_link(self)

    def _log_kernel(self, y, eta, psi, w):
        return -self._half_deviance(y, eta, w)

    def variance(self, eta, psi, w):
        """Variance of the proportion, ()."""
        log_p, log_q = self._pair(eta)
        return jnp.exp(log_p + log_q) / w

    def expected_information(self, eta, psi, w):
        """Information w p'^2 / (p q) = -w (log p)' (log q)', ()."""
        by_eta = jax.jacfwd(lambda x: jnp.stack(self._pair(x[None])))(eta[0])
        return -w * by_eta[0] * by_eta[1]

    def unit_deviance(self, y, eta, psi, w):
        """Twice n times the Kullback-Leibler divergence of p from y, ()."""
        return 2.0 * self._half_deviance(y, eta, w)

    def sample(self, key, eta, psi, w):
        """Draw a proportion, ()."""
        return _binomial(key, w, *self._pair(eta)) / w


@dataclass(frozen=True)
class BetaBinomial(_Proportion):
    """Beta-binomial response with precision phi; psi = log phi.

    y is the proportion of successes and ``weights`` are the trials;
    Var(y) = mu (1 - mu) / n (1 + (n - 1) / (1 + phi)).
    """

    link: str = "logit"

    takes_codes = "levels"
    name = "betabinomial"
    n_own = 1
    own_names = ("phi",)

    def __post_init__(self):
        check_link(self)

    def _log_kernel(self, y, eta, psi, w):
        log_p, log_q = self._pair(eta)
        log_phi = psi[0]
        k = y * w
        m = w * (1.0 - y)
        return (
            log_rising(k, log_phi + log_p)
            - self._half_deviance(y, eta, w)
            + log_rising(m, log_phi + log_q)
            - log_rising(w, log_phi)
        )

    def variance(self, eta, psi, w):
        """Variance of the proportion, ()."""
        log_p, log_q = self._pair(eta)
        excess = (w - 1.0) * jnp.exp(-softplus(psi[0]))
        return jnp.exp(log_p + log_q) * (1.0 + excess) / w

    def sample(self, key, eta, psi, w):
        """Draw a proportion, ()."""
        log_p, log_q = self._pair(eta)
        key_a, key_b, key_k = jax.random.split(key, 3)
        a = jax.random.loggamma(key_a, jnp.exp(psi[0] + log_p), (), eta.dtype)
        b = jax.random.loggamma(key_b, jnp.exp(psi[0] + log_q), (), eta.dtype)
        return _binomial(key_k, w, -softplus(b - a), -softplus(a - b)) / w

    def psi_start(self, y, w):
        """By moments of the proportions."""
        mean, variance = moments(y, w)
        trials = jnp.sum(w) / jnp.maximum(jnp.sum((w > 0).astype(w.dtype)), 1.0)
        ratio = variance * trials / jnp.maximum(mean * (1.0 - mean), 1e-8)
        excess = (ratio - 1.0) / jnp.maximum(trials - 1.0, 1e-8)
        return jnp.log(1.0 / jnp.clip(excess, 1e-3, 0.9) - 1.0)[None]


def _binomial(key: Array, n: Array, log_p: Array, log_q: Array) -> Array:
    """Successes in n trials; counted from the rarer side."""
    few = log_p < log_q
    draw = jax.random.binomial(
        key, n, jnp.exp(jnp.where(few, log_p, log_q)), (), dtype=log_p.dtype
    )
    return jnp.where(few, draw, n - draw)
