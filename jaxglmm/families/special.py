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
    "exp_limit",
    "expm1",
    "factorial_rest",
    "log1mexp",
    "log1mexp_exp",
    "log_add_exp",
    "log_count",
    "log_harmonic",
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
def expm1(x: Array) -> Array:
    """exp(x) - 1, with the derivative exp(x), not this plus 1, which is lossy."""
    return jnp.expm1(x)


@expm1.defjvp
def _expm1_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


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
    """log(x), continued below a tiny x by log(tiny) - log(2 - x / tiny).

    A mean that has to be positive may come from a linear predictor that is not: then
    this is a steep step, finite with its derivatives, from which a line search turns.
    """
    tiny = _tiny(x)
    below = x < tiny
    step = jnp.log(jnp.where(below, 2.0 * tiny - x, tiny)) - math.log(tiny)
    return jnp.log(jnp.where(below, tiny, x)) - step


def _tiny(x: Array) -> float:
    return 1e-70 if _is_double(x) else 1e-8


def log1mexp(x: Array) -> Array:
    """log(1 - exp(-x)) for x > 0, with the step of ``log_positive`` below."""
    tiny = _tiny(x)
    small = x < 0.7
    low = jnp.where(small, x, 0.5)
    below = low < tiny
    step = jnp.log(jnp.where(below, 2.0 * tiny - low, tiny)) - math.log(tiny)
    near = jnp.log(-expm1(-jnp.where(below, tiny, low))) - step
    far = jnp.log1p(-jnp.exp(-jnp.where(small, 1.0, x)))
    return jnp.where(small, near, far)


def log1mexp_exp(x: Array) -> Array:
    """log(1 - exp(-exp(x))), which tends to x for x -> -inf."""
    tail = x < -5.0
    far = x > 0.0
    u = jnp.exp(jnp.where(tail, x, -6.0))  # log((1 - exp(-u)) / u), A&S 4.5.65
    u2 = u**2
    series = -u / 2 + u2 * (1 / 24 + u2 * (-1 / 2880 + u2 / 181440))
    middle = jnp.log(-expm1(-jnp.exp(jnp.where(tail | far, 0.0, x))))
    end = x > 7.0  # where exp(-exp(x)) is zero
    above = jnp.log1p(-jnp.exp(-jnp.exp(jnp.where(far & ~end, x, 1.0))))
    above = jnp.where(end, 0.0, above)
    return jnp.where(tail, x + series, jnp.where(far, above, middle))


def log_ndtr(x: Array) -> Array:
    """Log of the standard normal distribution function.

    Beyond -10 (float32: -5.5) the asymptotic series of the tail, 26.2.12 of Abramowitz
    and Stegun, whose derivatives are Mills' ratio and so on without cancellation.
    """
    start, terms = (-10.0, 16) if _is_double(x) else (-5.5, 15)
    low, high = x < start, x > 0.0
    tail = jnp.where(low, x, start)
    v = 1.0 / tail**2
    series = jnp.ones_like(v)
    for k in range(terms, 0, -1):
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
    close = c * (expm1(t_near) - t_near)
    return jnp.where(near, close, safe_exp(t_far + log_c) - c * (1.0 + t_far))


def poisson_half_deviance(y: Array, log_mu: Array) -> Array:
    """Half the Poisson deviance, y log(y / mu) - y + mu."""
    log_y = jnp.log(jnp.where(y > 0, y, 1.0))
    return jnp.where(y > 0, exp_excess(log_mu - log_y, log_y), safe_exp(log_mu))


@jax.custom_jvp
def log_harmonic(a: Array, b: Array) -> Array:
    """Log of exp(a) exp(b) / (exp(a) + exp(b)), with exact derivatives."""
    return jnp.where(a < b, a - softplus(a - b), b - softplus(b - a))


@log_harmonic.defjvp
def _log_harmonic_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    return log_harmonic(a, b), sigmoid(b - a) * da + sigmoid(a - b) * db


def _nbinom_parts(y, log_mu, log_theta):
    """Parts of K that are small where y is near mu, without cancellation.

    t = log(y / mu), r = (y - mu) / (mu + theta), a = log(1 + r), theta a, and
    t - a = log(1 + (y - mu) theta / (mu (y + theta))). For t beyond +-1 sums of logs
    do; r is then only right where it is small.
    """
    log_y = log_count(y)
    t = log_y - log_mu
    above = t > 0
    t_pos, t_neg = jnp.where(above, t, 0.0), jnp.where(above, 0.0, t)
    log_share = log_y - log_theta - softplus(log_mu - log_theta)
    share = jnp.exp(jnp.where(above & (log_share < 2.0), log_share, 2.0))
    below = sigmoid(log_mu - log_theta) * expm1(t_neg)
    r = jnp.where(above, -expm1(-t_pos) * share, below)
    near = jnp.abs(t) < 1.0
    t_near, theta = jnp.where(near, t, 0.0), safe_exp(log_theta)
    theta_a = jnp.where(
        near,
        theta * jnp.log1p(jnp.where(near, r, 0.0)),
        safe_exp(log_theta + log_softplus(log_y - log_theta))
        - safe_exp(log_theta + log_softplus(log_mu - log_theta)),
    )
    rest = jnp.where(
        near,
        jnp.log1p(expm1(t_near) * sigmoid(log_theta - log_y)),
        softplus(log_theta - log_mu) - softplus(log_theta - log_y),
    )
    return t, r, theta_a, rest


@jax.custom_jvp
def nbinom_half_deviance(y: Array, log_mu: Array, log_theta: Array) -> Array:
    """K = y log(y / mu) - (y + theta) log((y + theta) / (mu + theta)).

    Its derivatives are written out, free of cancellation for counts of any size:
    dK/dlog mu = (mu - y) theta / (mu + theta) and, with r = (y - mu) / (mu + theta),
    dK/dlog theta = theta (r - log(1 + r)).
    """
    _, _, theta_a, rest = _nbinom_parts(y, log_mu, log_theta)
    return y * rest - theta_a


@nbinom_half_deviance.defjvp
def _nbinom_half_deviance_jvp(primals, tangents):
    y, log_mu, log_theta = primals
    t, r, theta_a, rest = _nbinom_parts(y, log_mu, log_theta)
    above = t > 0
    t_pos, t_neg = jnp.where(above, t, 0.0), jnp.where(above, 0.0, t)
    by_mu = jnp.where(
        above,
        y * expm1(-t_pos) * sigmoid(log_theta - log_mu),
        -expm1(t_neg) * safe_exp(log_harmonic(log_mu, log_theta)),
    )
    small = jnp.abs(r) < 0.02
    r_small = jnp.where(small, r, 0.0)
    series = jnp.zeros_like(r)  # (r - log(1 + r)) / r^2
    for k in range(12, 1, -1):
        series = 1.0 / k - r_small * series
    theta = safe_exp(jnp.where(small, log_theta, 0.0))
    excess = theta * r_small * r_small * series
    by_theta = jnp.where(small, excess, -by_mu - theta_a)
    by_y = jnp.where(y > 0, rest, 0.0)
    dy, dmu, dtheta = tangents
    out = nbinom_half_deviance(y, log_mu, log_theta)
    return out, by_y * dy + by_mu * dmu + by_theta * dtheta
