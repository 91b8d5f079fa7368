"""Half deviances, and the corrections that turn them into log densities.

With s(x) Binet's function,

    log Gamma(x) = (x - 1/2) log x - x + (1/2) log 2 pi + s(x),                      (1)

densities of gamma type separate into a deviance, which is a difference of large
numbers computed as a whole, and small corrections s (Loader 2000):

    log y! = y log y - y + c(y),           c(y) = (1/2) log 2 pi y + s(y),          (2)
    log Gamma(k + a) - log Gamma(a)
           = k log a - k + (k + a - 1/2) log(1 + k / a) + s(k + a) - s(a).          (3)

As in ``special``, the careful formulas serve for values only. s is a function of
log x, with derivatives of any order; the half deviance K of the negative binomial, as
a function of t = log theta and d = log(mu / theta), has with A, B of ``special``

    K_t = A(t, d) - A(t, log y - t),       K_d = B(t, d) - y sigmoid(-d),            (4)
    K_y = log(y / mu) - log((y + theta) / (mu + theta)).

These are differences of terms of the size of y and mu, so that scores are accurate to
rounding of y, as y - mu itself is. That of a proportion y with p = sigmoid(eta),
q = 1 - p and v = p q has

    K_1 = (1 - y) p - y q,    K_2 = v,    K_3 = v (q - p),    K_4 = v (1 - 6 v)      (5)

by eta, so that a fit of it, which needs four, takes one exponential of a row.

References: Loader (2000), Fast and accurate computation of binomial probabilities;
Abramowitz and Stegun (1964), 6.1.41 (the series of s).
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.families.special import (
    LOG_2PI,
    exp_limit,
    log_add_exp,
    safe_exp,
    scaled_sigmoid,
    scaled_softplus,
    sigmoid,
    softplus,
    tangent_of,
    tiny_of,
)
from jaxglmm.typing import Array

__all__ = [
    "binet",
    "exp_excess",
    "factorial_rest",
    "genpois_excess",
    "log_count",
    "log_rising",
    "logit_half_deviance",
    "nbinom_half_deviance",
    "poisson_half_deviance",
    "squared_excess",
]

_LOG_ZERO = -1e4  # stands for log 0: exp of it, times anything here, is zero
_SHIFT = 8
_BINET = (
    1 / 12,
    -1 / 360,
    1 / 1260,
    -1 / 1680,
    1 / 1188,
    -691 / 360360,
    1 / 156,
)  # error 8e-16 at x = 8


# ---- Binet's function ----------------------------------------------------------------


@lru_cache
def _binet_polynomials(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Polynomials of the derivatives of s(x) by log x, lowest power first.

    With D = x d/dx, z = x + 8, rho = x / z, r = x / (x + j) and lambda = log(z / x),

        D^m z^-n = q(rho) z^-n,    D^m log(x + j) = p(r),
        D^m ((z - 1/2) log z - (x + 1/2) log x) = x lambda + g(rho),

    as D r = r (1 - r), likewise rho, and D (x lambda) = x lambda - 8 rho.
    """
    powers = np.arange(1, 2 * len(_BINET), 2)
    q = np.zeros((order + 1, len(powers)))
    q[0] = 1.0
    p, g = np.zeros(order + 1), np.zeros(order + 1)
    for m in range(order):
        q = _times_r1r(q) - np.roll(q, 1, 0) * powers
        p, g = _times_r1r(p), _times_r1r(g)
        p[1] += m == 0
        g[1] -= 0.5 if m == 0 else _SHIFT
        g[0] -= 0.5 * (m == 0)
    return q * np.array(_BINET), p, g


def _times_r1r(c: np.ndarray) -> np.ndarray:
    """R (1 - r) times the derivative of a polynomial that leaves room for it."""
    k = np.arange(len(c)).reshape(-1, *[1] * (c.ndim - 1))
    return k * c - np.roll(k * c, 1, 0)


def _horner(coefficients: np.ndarray, x: Array) -> Array:
    out = jnp.asarray(coefficients[-1], x.dtype)
    for c in coefficients[-2::-1]:
        out = jnp.asarray(c, x.dtype) + x * out
    return out


def binet(log_x: Array) -> Array:
    """Binet's s(x) of (1), a scalar function of log x.

    Below 8 by the recurrence log Gamma(x) = log Gamma(x + 8) - sum log(x + j).
    """
    return _binet(log_x, 0)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _binet(log_x: Array, order: int) -> Array:
    x = jnp.exp(jnp.minimum(log_x, exp_limit(log_x)))
    small = x < _SHIFT
    log_z = jnp.where(small, jnp.log(x + _SHIFT), log_x)
    rho = jnp.where(small, x / (x + _SHIFT), 1.0)
    q, p, g = _binet_polynomials(order)
    z_inv, coefficients = jnp.exp(-log_z), _horner(q, rho)
    series = jnp.zeros_like(x)
    for k in range(len(_BINET) - 1, -1, -1):
        series = coefficients[k] + z_inv**2 * series
    series = z_inv * series
    steps = x + jnp.arange(1, _SHIFT).astype(x.dtype)
    if order == 0:
        shift = (x + (_SHIFT - 0.5)) * log_z - (x + 0.5) * log_x - _SHIFT
        shift = shift - jnp.log(jnp.prod(jnp.where(small, steps, 1.0)))
    else:
        shift = x * (log_z - log_x) + _horner(g, rho) - jnp.sum(_horner(p, x / steps))
    return series + jnp.where(small, shift, 0.0)


@_binet.defjvp
def _binet_jvp(order, primals, tangents):
    (log_x,), (d,) = primals, tangents
    return _binet(log_x, order), _binet(log_x, order + 1) * d


def log_count(k: Array) -> Array:
    """Log of k, with a finite stand-in for log 0."""
    return jnp.where(k > 0, jnp.log(jnp.where(k > 0, k, 1.0)), _LOG_ZERO)


def factorial_rest(k: Array) -> Array:
    """c(k) of (2): log k! - (k log k - k), zero at k = 0."""
    log_k = jnp.log(jnp.where(k > 0, k, 1.0))
    return jnp.where(k > 0, 0.5 * (LOG_2PI + log_k) + binet(log_k), 0.0)


def log_rising(k: Array, log_a: Array) -> Array:
    """Rise log Gamma(k + a) - log Gamma(a) - k log a + k, by (3); 0 at k = 0."""
    log_k = log_count(k)
    d = log_k - log_a
    rise = scaled_softplus(log_a, d) + (k - 0.5) * softplus(d)
    return rise + binet(log_add_exp(log_k, log_a)) - binet(log_a)


# ---- half deviances ------------------------------------------------------------------


def _exp_rest(t: Array) -> Array:
    """exp(t) - 1 - t for t within 1/2, by its series."""
    terms = np.array([1.0 / math.factorial(k) for k in range(2, 17)])
    return t * t * _horner(terms, t)


def exp_excess(t: Array, log_c: Array) -> Array:
    """Excess c (exp(t) - 1 - t), c = exp(log_c), without overflow of c exp(t)."""
    return _exp_excess(t, log_c, 0, 0)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _exp_excess(t: Array, log_c: Array, order: int, far_order: int) -> Array:
    """Its derivatives by t: c (exp(t) - 1), c exp(t), ...

    ``far_order`` counts those by log c, too: beyond its limit c exp(t) is a parabola.
    """
    far = safe_exp(t + log_c, order=far_order)
    if order > 1:
        return far
    near = jnp.abs(t) < 1.0
    c, t_near = safe_exp(log_c), jnp.where(near, t, 0.0)
    e = jnp.expm1(t_near)
    close, less = (e - t_near, 1.0 + t) if order == 0 else (e, 1.0)
    return jnp.where(near, c * close, far - c * less)


@partial(_exp_excess.defjvp, symbolic_zeros=True)
def _exp_excess_jvp(order, far_order, primals, tangents):
    (t, log_c), (dt, dc) = primals, tangents
    by_t = lambda: _exp_excess(t, log_c, min(order + 1, 2), min(far_order + 1, 2))
    by_c = lambda: _exp_excess(t, log_c, order, min(far_order + 1, 2))
    out = _exp_excess(t, log_c, order, far_order)
    return out, tangent_of(out, (by_t, dt), (by_c, dc))


def squared_excess(t: Array, log_c: Array) -> Array:
    """Half of c (exp(t) - 1)^2, c = exp(log_c), without overflow."""
    return _squared_excess(t, log_c, 0, 0)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _squared_excess(t: Array, log_c: Array, order: int, far_order: int) -> Array:
    """Its derivatives by t: c e^t (e^t - 1), then c (2^(k-1) e^(2t) - e^t)."""
    limit = exp_limit(t) - 10.0
    twice = 2.0 ** (order - 1) * safe_exp(2.0 * t + log_c, limit, far_order)
    far = twice - safe_exp(t + log_c, limit, far_order)
    if order > 1:
        return far
    near = t < 1.0
    t, c = jnp.where(near, t, 0.0), safe_exp(log_c)
    e = jnp.expm1(t)
    if order == 1:
        return jnp.where(near, c * e * jnp.exp(t), far)
    return jnp.where(near, 0.5 * c * e**2, far + 0.5 * c)


@partial(_squared_excess.defjvp, symbolic_zeros=True)
def _squared_excess_jvp(order, far_order, primals, tangents):
    (t, log_c), (dt, dc) = primals, tangents
    by_t = lambda: _squared_excess(t, log_c, order + 1, min(far_order + 1, 2))
    by_c = lambda: _squared_excess(t, log_c, order, min(far_order + 1, 2))
    out = _squared_excess(t, log_c, order, far_order)
    return out, tangent_of(out, (by_t, dt), (by_c, dc))


def logit_half_deviance(y: Array, eta: Array) -> Array:
    """K = y log(y / p) + (1 - y) log((1 - y) / q), p = sigmoid(eta), by (5)."""
    return _logit_half_deviance(y, eta, 0)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _logit_half_deviance(y: Array, eta: Array, order: int) -> Array:
    """Its derivatives by eta, up to the fourth."""
    if order == 0:
        return _divergence(y, eta)
    e = jnp.exp(-jnp.abs(eta))
    large = 1.0 / (1.0 + e)
    small = e * large
    p, q = jnp.where(eta > 0, large, small), jnp.where(eta > 0, small, large)
    if order == 1:
        return (1.0 - y) * p - y * q
    v = large * small
    return v * (1.0, q - p, 1.0 - 6.0 * v)[order - 2]


@partial(_logit_half_deviance.defjvp, symbolic_zeros=True)
def _logit_half_deviance_jvp(order, primals, tangents):
    (y, eta), (dy, de) = primals, tangents
    out = _logit_half_deviance(y, eta, order)

    def by_eta():
        if order < 4:
            return _logit_half_deviance(y, eta, order + 1)
        return jax.jvp(_fourth_slope, (eta,), (jnp.ones_like(eta),))[1]

    def by_y():
        if order == 0:
            return jax.jvp(lambda y: _divergence(y, eta), (y,), (jnp.ones_like(y),))[1]
        return jnp.full_like(eta, -1.0 if order == 1 else 0.0)

    return out, tangent_of(out, (by_eta, de), (by_y, dy))


def _divergence(y: Array, eta: Array) -> Array:
    log_y = jnp.log(jnp.where(y > 0, y, 1.0))
    log_1y = jnp.log1p(-jnp.where(y < 1, y, 0.0))
    rest = jnp.log1p(jnp.exp(-jnp.abs(eta)))
    log_p, log_q = jnp.minimum(eta, 0.0) - rest, jnp.minimum(-eta, 0.0) - rest
    return y * (log_y - log_p) + (1.0 - y) * (log_1y - log_q)


def _fourth_slope(eta: Array) -> Array:
    v = sigmoid(eta) * sigmoid(-eta)
    return v * (1.0 - 6.0 * v)


@jax.custom_jvp
def poisson_half_deviance(y: Array, log_mu: Array) -> Array:
    """Half the Poisson deviance, y log(y / mu) - y + mu."""
    t = log_mu - jnp.log(jnp.where(y > 0, y, 1.0))
    near = (y > 0) & (jnp.abs(t) < 0.5)
    mu = safe_exp(log_mu)
    far = jnp.where(y > 0, mu - y * (1.0 + t), mu)
    return jnp.where(near, y * _exp_rest(jnp.where(near, t, 0.0)), far)


@partial(poisson_half_deviance.defjvp, symbolic_zeros=True)
def _poisson_half_deviance_jvp(primals, tangents):
    (y, log_mu), (dy, dm) = primals, tangents
    out = poisson_half_deviance(y, log_mu)
    by_y = lambda: log_count(y) - log_mu
    by_m = lambda: safe_exp(log_mu, order=1) - y
    return out, tangent_of(out, (by_y, dy), (by_m, dm))


@jax.custom_jvp
def nbinom_half_deviance(y: Array, log_theta: Array, d: Array) -> Array:
    """K = y log(y / mu) - (y + theta) log((y + theta) / (mu + theta)).

    With r = (y - mu) / (mu + theta) it is y log(1 + (y - mu) theta / (mu (y + theta)))
    - theta log(1 + r), free of cancellation where y is near mu. For log(y / mu) beyond
    +-1 differences of A and of softplus do.
    """
    log_ratio = log_count(y) - log_theta
    t = log_ratio - d
    near = jnp.abs(t) < 1.0
    e = jnp.expm1(jnp.where(near, t, 0.0))
    far = scaled_softplus(log_theta, log_ratio) - scaled_softplus(log_theta, d)
    theta_a = jnp.where(near, safe_exp(log_theta) * jnp.log1p(e * sigmoid(d)), far)
    far = softplus(-d) - softplus(-log_ratio)
    return y * jnp.where(near, jnp.log1p(e * sigmoid(-log_ratio)), far) - theta_a


@partial(nbinom_half_deviance.defjvp, symbolic_zeros=True)
def _nbinom_half_deviance_jvp(primals, tangents):
    y, log_theta, d = primals
    dy, dt, dd = tangents
    log_ratio = log_count(y) - log_theta
    by_y = lambda: jnp.where(y > 0, softplus(-d) - softplus(-log_ratio), 0.0)
    by_t = lambda: scaled_softplus(log_theta, d) - scaled_softplus(log_theta, log_ratio)
    by_d = lambda: scaled_sigmoid(log_theta, d) - y * sigmoid(-d)
    out = nbinom_half_deviance(y, log_theta, d)
    return out, tangent_of(out, (by_y, dy), (by_t, dt), (by_d, dd))


# ---- generalized Poisson -------------------------------------------------------------


def _genpois_logs(y: Array, m: Array, log_c: Array) -> tuple[Array, Array, Array]:
    """Part r = c (mu / y - 1), sign, and log |1 + r| continued as ``log_positive`` is.

    The sign is -1 below the tiny 1 + r where that leaves the logarithm.
    """
    d = m - jnp.log(y)
    r = safe_exp(log_c) * jnp.expm1(jnp.minimum(d, 0.95 * exp_limit(d) - 20.0))
    big, near = log_c + d > 30.0, jnp.abs(r) < 0.5
    ratio = jnp.exp(jnp.where(big, 0.0, log_c + d))
    grown = ratio - jnp.expm1(jnp.where(big, 0.0, log_c))
    below = ~big & (grown < tiny_of(d))
    log_1r = jnp.log(jnp.where(below, 2.0 * tiny_of(d) - grown, grown))
    log_1r = jnp.where(near, jnp.log1p(jnp.where(near, r, 0.0)), log_1r)
    return r, jnp.where(below, -1.0, 1.0), jnp.where(big, log_c + d, log_1r)


@jax.custom_jvp
def genpois_excess(y: Array, log_mu: Array, log_c: Array) -> Array:
    """Q = y r - (y - 1) log(1 + r), r = c (mu / y - 1), y > 0.

    With P = c mu, S = P / (y (1 + r)) and T = c / (1 + r), by log mu, log c and y

        Q_m = P - (y - 1) S,     Q_c = P - c y - (y - 1) (S - T),
        Q_y = (y - 1) S / y - c - log(1 + r),

    and the logarithm has the derivatives S, S - T, -S / y.
    """
    r, sign, log_1r = _genpois_logs(y, log_mu, log_c)
    return y * r - (y - 1.0) * _continued(sign, log_1r)


def _continued(sign: Array, log_1r: Array) -> Array:
    return jnp.where(sign > 0, log_1r, 2.0 * math.log(tiny_of(log_1r)) - log_1r)


@partial(genpois_excess.defjvp, symbolic_zeros=True)
def _genpois_excess_jvp(primals, tangents):
    y, m, log_c = primals
    dy, dm, dc = tangents
    P, c = safe_exp(m + log_c, order=1), safe_exp(log_c)
    S, T = _genpois_share(*primals, True), _genpois_share(*primals, False)
    by_y = lambda: (y - 1.0) * S / y - c - _genpois_log(*primals)
    by_m = lambda: P - (y - 1.0) * S
    by_c = lambda: P - c * y - (y - 1.0) * (S - T)
    out = genpois_excess(*primals)
    return out, tangent_of(out, (by_y, dy), (by_m, dm), (by_c, dc))


@jax.custom_jvp
def _genpois_log(y: Array, m: Array, log_c: Array) -> Array:
    return _continued(*_genpois_logs(y, m, log_c)[1:])


@partial(_genpois_log.defjvp, symbolic_zeros=True)
def _genpois_log_jvp(primals, tangents):
    dy, dm, dc = tangents
    S, T = _genpois_share(*primals, True), _genpois_share(*primals, False)
    by_y, by_c = lambda: -S / primals[0], lambda: S - T
    out = _genpois_log(*primals)
    return out, tangent_of(out, (by_y, dy), (lambda: S, dm), (by_c, dc))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _genpois_share(y: Array, m: Array, log_c: Array, of_mean: bool) -> Array:
    """S if ``of_mean``, T otherwise."""
    log_1r = _genpois_logs(y, m, log_c)[2]
    return jnp.exp(log_c + (m - jnp.log(y) if of_mean else 0.0) - log_1r)


@partial(_genpois_share.defjvp, symbolic_zeros=True)
def _genpois_share_jvp(of_mean, primals, tangents):
    dy, dm, dc = tangents
    sign = _genpois_logs(*primals)[1]
    S, T = _genpois_share(*primals, True), _genpois_share(*primals, False)
    out = S if of_mean else T
    by_m = out * ((1.0 if of_mean else 0.0) - sign * S)
    by_y, by_c = lambda: -by_m / primals[0], lambda: out * (1.0 - sign * (S - T))
    return out, tangent_of(out, (by_y, dy), (lambda: by_m, dm), (by_c, dc))
