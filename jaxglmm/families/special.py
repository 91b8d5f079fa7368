"""Special functions that stay finite and accurate, with their derivatives.

All act on scalars (or elementwise) and are differentiable to any order; where a
formula changes with its argument, both branches see an argument at which they are
harmless, so that the branch not taken contributes no NaN to a gradient.

With s(x) Binet's function,

    log Gamma(x) = (x - 1/2) log x - x + (1/2) log 2 pi + s(x),                      (1)

densities of gamma type separate into a deviance, which is a difference of large
numbers computed as a whole, and small corrections s (Loader 2000):

    log y! = y log y - y + c(y),           c(y) = (1/2) log 2 pi y + s(y),          (2)
    log Gamma(k + a) - log Gamma(a)
           = k log a - k + (k + a - 1/2) log(1 + k / a) + s(k + a) - s(a).          (3)

References: Loader (2000), Fast and accurate computation of binomial probabilities;
Abramowitz and Stegun (1964), 6.1.41 (the series of s) and 26.2.12 (the normal tail).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxglmm.typing import Array

__all__ = [
    "LOG_2PI",
    "binet",
    "exp_excess",
    "factorial_rest",
    "log1mexp",
    "log1mexp_exp",
    "log_add_exp",
    "log_count",
    "log_ndtr",
    "log_positive",
    "log_rising",
    "log_softplus",
    "nbinom_half_deviance",
    "poisson_half_deviance",
    "safe_exp",
    "sigmoid",
    "softplus",
]

LOG_2PI = math.log(2.0 * math.pi)
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


def _is_double(x: Array) -> bool:
    return jnp.finfo(jnp.result_type(x, 0.0)).bits == 64


def exp_limit(x: Array) -> float:
    """Argument from which ``safe_exp`` leaves the exponential: 700, float32: 75."""
    return 700.0 if _is_double(x) else 75.0


def safe_exp(x: Array, limit: float | None = None) -> Array:
    """exp(x), continued beyond a limit by its parabola there, so that it is finite."""
    limit = exp_limit(x) if limit is None else limit
    beyond = x > limit
    q = jnp.where(beyond, limit, x)
    d = jnp.where(beyond, x - limit, 0.0)
    return jnp.exp(q) * (1.0 + d + 0.5 * d**2)


@jax.custom_jvp
def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), with derivatives exact in both tails."""
    return jax.lax.logistic(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    out = sigmoid(x)
    return out, out * sigmoid(-x) * dx


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """log(1 + exp(x)); its derivative is ``sigmoid``."""
    return jnp.where(x > 0, x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), sigmoid(x) * dx


def log_softplus(x: Array) -> Array:
    """Log of softplus(x), which tends to x for x -> -inf."""
    small = x < -9.0
    u = jnp.exp(jnp.where(small, x, -9.0))
    series = u * (-1 / 2 + u * (5 / 24 + u * (-1 / 8 + u * (251 / 2880))))
    return jnp.where(small, x + series, jnp.log(softplus(jnp.where(small, 0.0, x))))


def log_add_exp(a: Array, b: Array) -> Array:
    """log(exp(a) + exp(b)) for finite a and b."""
    return jnp.where(a > b, a + softplus(b - a), b + softplus(a - b))


def log_positive(x: Array) -> Array:
    """log(x), continued below a tiny x by its parabola there.

    A mean that has to be positive may come from a linear predictor that is not: then
    this is a steep wall, finite with its derivatives, which a line search turns from.
    """
    tiny = 1e-100 if _is_double(x) else 1e-12
    below = x < tiny
    d = jnp.where(below, x / tiny - 1.0, 0.0)
    return jnp.log(jnp.where(below, tiny, x)) + d - 0.5 * d**2


def log1mexp(x: Array) -> Array:
    """log(1 - exp(-x)) for x > 0, with the wall of ``log_positive`` below."""
    tiny = 1e-100 if _is_double(x) else 1e-12
    small = x < 0.7
    low = jnp.where(small, x, 0.5)
    below = low < tiny
    d = jnp.where(below, low / tiny - 1.0, 0.0)
    near = jnp.log(-jnp.expm1(-jnp.where(below, tiny, low))) + d - 0.5 * d**2
    far = jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, x)))
    return jnp.where(small, near, far)


def log1mexp_exp(x: Array) -> Array:
    """log(1 - exp(-exp(x))), which tends to x for x -> -inf."""
    tail = x < -5.0
    far = x > 0.0
    u = jnp.exp(jnp.where(tail, x, -6.0))  # log((1 - exp(-u)) / u), A&S 4.5.65
    u2 = u**2
    series = -u / 2 + u2 * (1 / 24 + u2 * (-1 / 2880 + u2 / 181440))
    middle = jnp.log(-jnp.expm1(-jnp.exp(jnp.where(tail | far, 0.0, x))))
    above = jnp.log1p(-jnp.exp(-safe_exp(jnp.where(far, x, 1.0))))
    return jnp.where(tail, x + series, jnp.where(far, above, middle))


def log_ndtr(x: Array) -> Array:
    """Log of the standard normal distribution function.

    Beyond -10 the asymptotic series of the tail, 26.2.12 of Abramowitz and Stegun,
    whose derivatives are Mills' ratio and so on without cancellation.
    """
    low, high = x < -10.0, x > 0.0
    tail = jnp.where(low, x, -10.0)
    v = 1.0 / tail**2
    series = jnp.ones_like(v)
    for k in range(16, 0, -1):
        series = 1.0 - (2 * k - 1) * v * series
    asymptotic = -0.5 * tail**2 - 0.5 * LOG_2PI - jnp.log(-tail) + jnp.log(series)
    root = math.sqrt(0.5)
    middle = jnp.log(0.5 * jax.lax.erfc(-root * jnp.where(low | high, -1.0, x)))
    above = jnp.log1p(-0.5 * jax.lax.erfc(root * jnp.where(high, x, 1.0)))
    return jnp.where(low, asymptotic, jnp.where(high, above, middle))


def _binet_series(x: Array) -> Array:
    v = 1.0 / x
    v2 = v**2
    out = jnp.full_like(v, _BINET[-1])
    for coefficient in _BINET[-2::-1]:
        out = coefficient + v2 * out
    return v * out


def binet(x: Array, log_x: Array) -> Array:
    """Binet's s(x) of (1), x > 0; x may underflow where ``log_x`` is given.

    Below 8 by the recurrence log Gamma(x) = log Gamma(x + 8) - sum log(x + j).
    """
    small = x < _SHIFT
    low, log_low = jnp.where(small, x, 1.0), jnp.where(small, log_x, 0.0)
    product = low + 1.0
    for j in range(2, _SHIFT):
        product = product * (low + j)
    X = low + _SHIFT
    log_X = jnp.log(X)
    shifted = _binet_series(X) + (X - 0.5) * log_X - _SHIFT
    shifted = shifted - jnp.log(product) - (low + 0.5) * log_low
    return jnp.where(small, shifted, _binet_series(jnp.where(small, 8.0, x)))


def log_count(k: Array) -> Array:
    """Log of k, with a finite stand-in for log 0."""
    return jnp.where(k > 0, jnp.log(jnp.where(k > 0, k, 1.0)), _LOG_ZERO)


def factorial_rest(k: Array) -> Array:
    """c(k) of (2): log k! - (k log k - k), zero at k = 0."""
    positive = jnp.where(k > 0, k, 1.0)
    log_k = jnp.log(positive)
    rest = 0.5 * (LOG_2PI + log_k) + binet(positive, log_k)
    return jnp.where(k > 0, rest, 0.0)


def log_rising(k: Array, log_a: Array) -> Array:
    """Rise log Gamma(k + a) - log Gamma(a) - k log a + k, by (3)."""
    positive = jnp.where(k > 0, k, 1.0)
    a = safe_exp(log_a)
    total = positive + a
    ratio = softplus(jnp.log(positive) - log_a)
    out = (total - 0.5) * ratio + binet(total, jnp.log(total)) - binet(a, log_a)
    return jnp.where(k > 0, out, 0.0)


def exp_excess(t: Array, log_c: Array) -> Array:
    """Excess c (exp(t) - 1 - t), c = exp(log_c), without overflow of c exp(t)."""
    near = jnp.abs(t) < 1.0
    t_near, t_far = jnp.where(near, t, 0.0), jnp.where(near, 2.0, t)
    c = safe_exp(log_c)
    close = c * (jnp.expm1(t_near) - t_near)
    return jnp.where(near, close, safe_exp(t_far + log_c) - c * (1.0 + t_far))


def poisson_half_deviance(y: Array, log_mu: Array) -> Array:
    """Half the Poisson deviance, y log(y / mu) - y + mu."""
    log_y = jnp.log(jnp.where(y > 0, y, 1.0))
    return jnp.where(y > 0, exp_excess(log_mu - log_y, log_y), safe_exp(log_mu))


def _nbinom_parts(y, log_mu, log_theta):
    """Parts t = log(y / mu), r = (y - mu) / (mu + theta), and an exact log(1 + r)."""
    log_y = log_count(y)
    t = log_y - log_mu
    soft = softplus(log_mu - log_theta)
    above = t > 0
    t_pos, t_neg = jnp.where(above, t, 0.0), jnp.where(above, 0.0, t)
    share = jnp.exp(jnp.where(above, log_y - log_theta - soft, 0.0))
    r_pos = -jnp.expm1(-t_pos) * share
    r = jnp.where(above, r_pos, sigmoid(log_mu - log_theta) * jnp.expm1(t_neg))
    near = jnp.abs(t) < 1.0
    log_far = softplus(log_y - log_theta) - soft
    log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, r, 0.0)), log_far)
    return t, r, log_ratio


@jax.custom_jvp
def nbinom_half_deviance(y: Array, log_mu: Array, log_theta: Array) -> Array:
    """K = y log(y / mu) - (y + theta) log((y + theta) / (mu + theta)).

    Its derivatives are written out, free of cancellation for counts of any size:
    dK/dlog mu = (mu - y) theta / (mu + theta) and, with r = (y - mu) / (mu + theta),
    dK/dlog theta = theta (r - log(1 + r)).
    """
    t, _, log_ratio = _nbinom_parts(y, log_mu, log_theta)
    return y * t - (y + safe_exp(log_theta)) * log_ratio


@nbinom_half_deviance.defjvp
def _nbinom_half_deviance_jvp(primals, tangents):
    y, log_mu, log_theta = primals
    t, r, log_ratio = _nbinom_parts(y, log_mu, log_theta)
    above = t > 0
    t_pos, t_neg = jnp.where(above, t, 0.0), jnp.where(above, 0.0, t)
    joint = safe_exp(log_mu - softplus(log_mu - log_theta))  # mu theta / (mu + theta)
    by_mu = jnp.where(
        above,
        y * jnp.expm1(-t_pos) * sigmoid(log_theta - log_mu),
        -jnp.expm1(t_neg) * joint,
    )
    by_theta = safe_exp(log_theta) * (r - log_ratio)
    by_y = jnp.where(y > 0, t - log_ratio, 0.0)
    dy, dmu, dtheta = tangents
    out = nbinom_half_deviance(y, log_mu, log_theta)
    return out, by_y * dy + by_mu * dmu + by_theta * dtheta
