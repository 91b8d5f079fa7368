"""Families of continuous responses.

With mean mu, dispersion phi and precision weight w:

    Gaussian          y ~ N(mu, sigma^2 / w)
    Gamma             shape w / phi,  Var y = phi mu^2 / w
    InverseGaussian   Var y = phi mu^3 / w
    LogNormal         log y ~ N(eta, sigma^2 / w)
    Student           y = mu + sigma T_nu / sqrt(w)

and with replication weights:

    Beta              Var y = mu (1 - mu) / (1 + phi)

psi holds logarithms: log sigma, log phi, (log sigma, log nu). With a = w / phi and
t = log(y / mu) the gamma log density separates, s being Binet's function, into

    -a (exp(t) - 1 - t) + (1/2) log(a / 2 pi) - s(a) - log y,                        (1)

and the beta one, with the Kullback-Leibler divergence of mu from y, alpha = mu phi and
beta = (1 - mu) phi, into

    -phi KL(mu | y) + (1/2) log(alpha beta / (2 pi phi))
        + s(phi) - s(alpha) - s(beta) - log y (1 - y),                               (2)

so that neither loses its digits to log Gamma where the dispersion is small.

References: McCullagh and Nelder (1989), Generalized Linear Models, 2nd ed., ch. 8;
Ferrari and Cribari-Neto (2004), J. Appl. Stat. 31(7), doi:10.1080/0266476042000214501.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxglmm.families.base import Family, PositiveMean, check_link, moments
from jaxglmm.families.deviances import binet, exp_excess, squared_excess
from jaxglmm.families.links import LINKS
from jaxglmm.families.special import (
    LOG_2PI,
    expm1,
    safe_exp,
    scaled_softplus,
    softplus,
)
from jaxglmm.typing import Array

__all__ = ["Beta", "Gamma", "Gaussian", "InverseGaussian", "LogNormal", "Student"]


class _RealMean(Family):
    weights_role = "precision"
    support = "real"

    def _mean(self, eta: Array) -> Array:
        real_mean = LINKS[self.link].real_mean
        assert real_mean is not None
        return real_mean(eta[0])

    def mu(self, eta, psi):
        """Mean response, ()."""
        return self._mean(eta)

    def eta_start(self, y, w):
        """Link of the response, ()."""
        if self.link == "log":
            return jnp.log(jnp.where(y > 0, y, 0.0) + 0.1)
        return LINKS[self.link].g(y)


@dataclass(frozen=True)
class Gaussian(_RealMean):
    """Normal response, Var(y_i) = sigma^2 / w_i; psi = log sigma.

    ``weights`` are precision weights: they divide the variance, as in lme4. With the
    log link the mean grows only as a square beyond a linear predictor of 175 (float32:
    18), so that its own square is finite.
    As a linear predictor of a dispersion model, psi is the log standard deviation.
    """

    link: str = "identity"

    name = "gaussian"
    links = ("identity", "log", "inverse")
    n_own = 1
    own_names = ("sigma",)

    def __post_init__(self):
        check_link(self)

    def _log_kernel(self, y, eta, psi, w):
        z2 = w * ((y - self._mean(eta)) * safe_exp(-psi[0], 150.0)) ** 2
        return 0.5 * (jnp.log(w) - LOG_2PI - z2) - psi[0]

    def variance(self, eta, psi, w):
        """sigma^2 / w, ()."""
        return jnp.exp(2.0 * psi[0]) / w

    def expected_information(self, eta, psi, w):
        """Information about eta, ()."""
        slope = jax.grad(lambda x: self._mean(x[None]))(eta[0])
        return slope**2 * w * jnp.exp(-2.0 * psi[0])

    def unit_deviance(self, y, eta, psi, w):
        """Squared residual, w (y - mu)^2, ()."""
        return w * (y - self._mean(eta)) ** 2

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        noise = jax.random.normal(key, (), eta.dtype)
        return self._mean(eta) + jnp.exp(psi[0]) / jnp.sqrt(w) * noise

    def psi_start(self, y, w):
        """Log standard deviation of y."""
        return 0.5 * jnp.log(moments(y, w)[1])[None]


@dataclass(frozen=True)
class Student(_RealMean):
    """Student t response, y = mu + sigma T_nu / sqrt(w); psi = (log sigma, log nu).

    ``weights`` are precision weights: they divide the squared scale. The mean exists
    for nu > 1 and the variance for nu > 2, and is infinite otherwise. For nu -> inf it
    becomes Gaussian.
    """

    link: str = "identity"

    name = "student"
    links = ("identity", "log", "inverse")
    n_own = 2
    own_names = ("sigma", "nu")

    def __post_init__(self):
        check_link(self)

    def _log_kernel(self, y, eta, psi, w):
        log_sigma, log_nu = psi[0], psi[1]
        log_a = log_nu - jnp.log(2.0)  # a = nu / 2
        a = safe_exp(log_a)
        z2 = w * ((y - self._mean(eta)) * safe_exp(-log_sigma, 150.0)) ** 2
        # Gamma(a + 1/2) / Gamma(a), with a log(1 + 1 / nu) = A / 2
        constant = 0.5 * (scaled_softplus(log_nu, -log_nu) - 1.0)
        constant = constant + binet(log_a + softplus(-log_nu)) - binet(log_a)
        kernel = (a + 0.5) * jnp.log1p(z2 * safe_exp(-log_nu))
        return constant + 0.5 * (jnp.log(w) - LOG_2PI) - log_sigma - kernel

    def variance(self, eta, psi, w):
        """sigma^2 nu / (nu - 2) / w, infinite for nu <= 2, ()."""
        nu = jnp.exp(psi[1])
        ratio = jnp.where(nu > 2, nu / jnp.where(nu > 2, nu - 2.0, 1.0), jnp.inf)
        return jnp.exp(2.0 * psi[0]) * ratio / w

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        noise = jax.random.t(key, jnp.exp(psi[1]), (), eta.dtype)
        return self._mean(eta) + jnp.exp(psi[0]) / jnp.sqrt(w) * noise

    def psi_start(self, y, w):
        """Half the spread of y, and 5 degrees of freedom."""
        log_sigma = 0.5 * jnp.log(0.6 * moments(y, w)[1])
        return jnp.stack([log_sigma, jnp.full_like(log_sigma, math.log(5.0))])


@dataclass(frozen=True)
class LogNormal(Family):
    """Lognormal response, log y ~ N(eta, sigma^2 / w); psi = log sigma.

    ``weights`` are precision weights on the log scale: they divide sigma^2. The linear
    predictor is the mean of log y, and ``mu`` the mean of y at weight 1,
    exp(eta + sigma^2 / 2).
    """

    link: str = "identity"

    name = "lognormal"
    links = ("identity",)
    weights_role = "precision"
    support = "positive"
    n_own = 1
    own_names = ("sigma",)

    def __post_init__(self):
        check_link(self)

    def _log_kernel(self, y, eta, psi, w):
        log_y = jnp.log(y)
        z2 = w * ((log_y - eta[0]) * safe_exp(-psi[0], 150.0)) ** 2
        return 0.5 * (jnp.log(w) - LOG_2PI - z2) - psi[0] - log_y

    def mu(self, eta, psi):
        """exp(eta + sigma^2 / 2), ()."""
        return jnp.exp(eta[0] + 0.5 * jnp.exp(2.0 * psi[0]))

    def variance(self, eta, psi, w):
        """Variance of y, ()."""
        s2 = jnp.exp(2.0 * psi[0]) / w
        return expm1(s2) * jnp.exp(2.0 * eta[0] + s2)

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        noise = jax.random.normal(key, (), eta.dtype)
        return jnp.exp(eta[0] + jnp.exp(psi[0]) / jnp.sqrt(w) * noise)

    def eta_start(self, y, w):
        """Log of the response, ()."""
        return jnp.log(y)

    def psi_start(self, y, w):
        """Log standard deviation of log y."""
        log_y = jnp.log(jnp.where(y > 0, y, 1.0))
        return 0.5 * jnp.log(moments(log_y, w)[1])[None]


class _Dispersed(PositiveMean):
    """Positive responses with a dispersion phi, precision weights, a = w / phi."""

    weights_role = "precision"
    support = "positive"
    n_own = 1
    own_names = ("phi",)
    _away = 0.0

    def mu(self, eta, psi):
        """Mean response, ()."""
        return jnp.exp(self._log_mu(eta))


@dataclass(frozen=True)
class Gamma(_Dispersed):
    """Gamma response with shape w / phi, Var(y) = phi mu^2 / w; psi = log phi.

    ``weights`` are precision weights: they divide phi. The coefficient of variation
    that glmmTMB reports is sqrt(phi), and the coefficients of its dispersion models
    are those of log(1 / phi), of opposite sign.
    """

    link: str = "log"

    name = "gamma"
    links = ("log", "inverse", "identity")

    def __post_init__(self):
        check_link(self)

    def _log_kernel(self, y, eta, psi, w):
        log_a = jnp.log(w) - psi[0]
        log_y = jnp.log(y)
        kernel = exp_excess(log_y - self._log_mu(eta), log_a)
        rest = 0.5 * (log_a - LOG_2PI) - binet(log_a)
        return rest - kernel - log_y

    def variance(self, eta, psi, w):
        """Variance phi mu^2 / w, ()."""
        return jnp.exp(psi[0] + 2.0 * self._log_mu(eta)) / w

    def expected_information(self, eta, psi, w):
        """Information about eta, ()."""
        return self._slope(eta) ** 2 * w * jnp.exp(-psi[0])

    def unit_deviance(self, y, eta, psi, w):
        """2 w (y / mu - 1 - log(y / mu)), ()."""
        return 2.0 * exp_excess(jnp.log(y) - self._log_mu(eta), jnp.log(w))

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        log_a = jnp.log(w) - psi[0]
        log_draw = jax.random.loggamma(key, jnp.exp(log_a), (), eta.dtype)
        y = jnp.exp(log_draw - log_a + self._log_mu(eta))
        return jnp.maximum(y, jnp.finfo(eta.dtype).tiny)

    def psi_start(self, y, w):
        """Squared coefficient of variation."""
        mean, variance = moments(y, w)
        return jnp.log(variance / mean**2)[None]


@dataclass(frozen=True)
class InverseGaussian(_Dispersed):
    """Inverse Gaussian response, Var(y) = phi mu^3 / w; psi = log phi.

    ``weights`` are precision weights: they divide phi. The usual lambda is 1 / phi.
    """

    link: str = "log"

    name = "inverse_gaussian"
    links = ("log", "1/mu^2", "inverse", "identity")

    def __post_init__(self):
        check_link(self)

    def _half_deviance(self, y, eta, log_a):
        """Half of a (y - mu)^2 / (mu^2 y) = a (exp(t) - 1)^2 / y, t = log(y / mu)."""
        log_y = jnp.log(y)
        return squared_excess(log_y - self._log_mu(eta), log_a - log_y)

    def _log_kernel(self, y, eta, psi, w):
        log_a = jnp.log(w) - psi[0]
        rest = 0.5 * (log_a - LOG_2PI - 3.0 * jnp.log(y))
        return rest - self._half_deviance(y, eta, log_a)

    def variance(self, eta, psi, w):
        """Variance phi mu^3 / w, ()."""
        return jnp.exp(psi[0] + 3.0 * self._log_mu(eta)) / w

    def expected_information(self, eta, psi, w):
        """Information about eta, ()."""
        return self._slope(eta) ** 2 * w * jnp.exp(-psi[0] - self._log_mu(eta))

    def unit_deviance(self, y, eta, psi, w):
        """Twice the half deviance, w (y - mu)^2 / (mu^2 y), ()."""
        return 2.0 * self._half_deviance(y, eta, jnp.log(w))

    def sample(self, key, eta, psi, w):
        """Draw a response as Michael, Schucany and Haas (1976) do, ()."""
        key_z, key_u = jax.random.split(key)
        mu = jnp.exp(self._log_mu(eta))
        h = 0.5 * mu * jnp.exp(psi[0]) / w  # mu / (2 lambda)
        v = jax.random.normal(key_z, (), eta.dtype) ** 2
        # smaller root mu (1 + hv - sqrt(2 hv + (hv)^2)), without cancellation
        x = mu / (1.0 + h * v + jnp.sqrt(2.0 * h * v + (h * v) ** 2))
        u = jax.random.uniform(key_u, (), eta.dtype)
        return jnp.where(u * (mu + x) <= mu, x, mu**2 / x)

    def psi_start(self, y, w):
        """Variance over cubed mean."""
        mean, variance = moments(y, w)
        return jnp.log(variance / mean**3)[None]


@dataclass(frozen=True)
class Beta(Family):
    """Beta response with precision phi, Var(y) = mu (1 - mu) / (1 + phi).

    psi = log phi. ``weights`` replicate: a row of weight w counts as w rows.
    """

    link: str = "logit"

    name = "beta"
    links = ("logit", "probit", "cloglog", "cauchit", "log")
    support = "unit"
    inside = 0.5
    n_own = 1
    own_names = ("phi",)

    def __post_init__(self):
        check_link(self)

    def _pair(self, eta: Array) -> tuple[Array, Array]:
        log_pair = LINKS[self.link].log_pair
        assert log_pair is not None
        return log_pair(eta[0])

    def is_inside(self, eta):
        """Whether the mean is below 1, ()."""
        return eta[0] <= 0 if self.link == "log" else super().is_inside(eta)

    def _log_f(self, y, eta, psi):
        log_p, log_q = self._pair(eta)
        log_phi = psi[0]
        log_y, log_1y = jnp.log(y), jnp.log1p(-y)
        log_alpha, log_beta = log_phi + log_p, log_phi + log_q
        alpha, beta = safe_exp(log_alpha), safe_exp(log_beta)
        divergence = alpha * (log_p - log_y) + beta * (log_q - log_1y)
        rest = (
            binet(log_phi)
            - binet(log_alpha)
            - binet(log_beta)
            + 0.5 * (log_alpha + log_beta - log_phi - LOG_2PI)
        )
        return rest - divergence - log_y - log_1y

    def mu(self, eta, psi):
        """Mean response, ()."""
        return jnp.exp(self._pair(eta)[0])

    def variance(self, eta, psi, w):
        """Variance of y; replication weights leave it alone, ()."""
        log_p, log_q = self._pair(eta)
        return jnp.exp(log_p + log_q - softplus(psi[0]))

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        log_p, log_q = self._pair(eta)
        keys = jax.random.split(key)
        a = jax.random.loggamma(keys[0], jnp.exp(psi[0] + log_p), (), eta.dtype)
        b = jax.random.loggamma(keys[1], jnp.exp(psi[0] + log_q), (), eta.dtype)
        info = jnp.finfo(eta.dtype)
        return jnp.clip(jax.lax.logistic(a - b), info.tiny, 1.0 - info.epsneg)

    def eta_start(self, y, w):
        """Link of the response, ()."""
        return LINKS[self.link].g(jnp.clip(y, 1e-3, 1.0 - 1e-3))

    def psi_start(self, y, w):
        """By moments."""
        mean, variance = moments(y, w)
        precision = mean * (1.0 - mean) / variance - 1.0
        return jnp.log(jnp.clip(precision, 0.1, 1e6))[None]
