"""Special functions that stay finite and accurate, with their derivatives.

All act on scalars and are differentiable to any order. Fits differentiate densities
four times, so each function with a careful, branched formula has a rule: the formula
is used for its value only, and its derivative is a short expression in functions that
have rules themselves. The families of such functions are closed:

    softplus' = sigmoid(x),                 sigmoid' = sigmoid(x) sigmoid(-x)
    A = e^t softplus(d),                    A_t = A,      A_d = B
    B = e^t sigmoid(d),                     B_t = B,      B_d = B sigmoid(-d)
    L = log(1 - exp(-u)), u = e^z,          L' = R = u / (e^u - 1)
                                            R' = R G,     G = 1 - u - R
                                            G' = -u - R G
    log Phi' = h = phi / Phi,               h' = -h w,    w = x + h
                                            w' = v,       v = 1 - h w
                                            v' = h (w^2 - v)

Functions with an ``order`` are their own derivatives of that order.

References: Abramowitz and Stegun (1964), 4.5.64 (R) and 26.2.12 (the normal tail).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxglmm.typing import Array

__all__ = [
    "LOG_2PI",
    "exp_limit",
    "expm1",
    "log1mexp",
    "log1mexp_exp",
    "log_add_exp",
    "log_atan",
    "log_derivative",
    "log_ndtr",
    "log_positive",
    "log_softplus",
    "safe_exp",
    "scaled_sigmoid",
    "scaled_softplus",
    "sigmoid",
    "softplus",
    "tangent_of",
    "tiny_of",
]

LOG_2PI = math.log(2.0 * math.pi)


def tangent_of(value: Array, *terms: tuple[Callable[[], Array], Any]) -> Array:
    """Sum of partial derivative times tangent; without those known to be zero.

    A partial derivative is given as a function, called only where it is needed: data
    have no tangent, and cost nothing then.
    """
    live = [by() * d for by, d in terms if not isinstance(d, SymbolicZero)]
    return sum(live[1:], live[0]) if live else jnp.zeros_like(value)


def _is_double(x: Array) -> bool:
    return jnp.finfo(jnp.result_type(x, 0.0)).bits == 64


# ---- exponentials --------------------------------------------------------------------


def exp_limit(x: Array) -> float:
    """Argument from which ``safe_exp`` leaves the exponential: 700, float32: 75."""
    return 700.0 if _is_double(x) else 75.0


def safe_exp(x: Array, limit: float | None = None, order: int = 0) -> Array:
    """exp(x), continued beyond a limit by its parabola there, so that it is finite.

    Derivatives are those of this function up to the second; the following ones repeat
    exp(limit) beyond the limit.
    """
    return _safe_exp(x, exp_limit(x) if limit is None else limit, min(order, 2))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _safe_exp(x: Array, limit: float, order: int) -> Array:
    low = jnp.minimum(x, limit)
    d = x - low
    return jnp.exp(low) * (1.0 + d * (1.0 + 0.5 * d), 1.0 + d, 1.0)[order]


@_safe_exp.defjvp
def _safe_exp_jvp(limit, order, primals, tangents):
    (x,), (dx,) = primals, tangents
    slope = _safe_exp(x, limit, min(order + 1, 2))
    return slope if order == 2 else _safe_exp(x, limit, order), slope * dx


@jax.custom_jvp
def expm1(x: Array) -> Array:
    """exp(x) - 1, with the derivative exp(x), not this plus 1, which is lossy."""
    return jnp.expm1(x)


@expm1.defjvp
def _expm1_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


# ---- softplus and its relatives ------------------------------------------------------


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
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return softplus(x), sigmoid(x) * dx


@jax.custom_jvp
def log_softplus(x: Array) -> Array:
    """Log of softplus(x), which tends to x for x -> -inf."""
    small = x < -9.0
    u = jnp.exp(jnp.minimum(x, -9.0))
    series = u * (-1 / 2 + u * (5 / 24 + u * (-1 / 8 + u * (251 / 2880))))
    return jnp.where(small, x + series, jnp.log(softplus(jnp.maximum(x, -9.0))))


@log_softplus.defjvp
def _log_softplus_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_softplus(x), _softplus_slope(x) * dx


@jax.custom_jvp
def _softplus_slope(x: Array) -> Array:
    """sigmoid(x) / softplus(x), 1 for x -> -inf."""
    x = jnp.maximum(x, -exp_limit(x))
    return sigmoid(x) / softplus(x)


@_softplus_slope.defjvp
def _softplus_slope_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    out = _softplus_slope(x)
    return out, out * (sigmoid(-x) - out) * dx


@jax.custom_jvp
def log_add_exp(a: Array, b: Array) -> Array:
    """log(exp(a) + exp(b)) for finite a and b."""
    return jnp.maximum(a, b) + jnp.log1p(jnp.exp(-jnp.abs(a - b)))


@partial(log_add_exp.defjvp, symbolic_zeros=True)
def _log_add_exp_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    out = log_add_exp(a, b)
    by_a, by_b = lambda: sigmoid(a - b), lambda: sigmoid(b - a)
    return out, tangent_of(out, (by_a, da), (by_b, db))


def _bounded_exp(t: Array, d: Array) -> Array:
    # a few times this has to be finite, too
    return safe_exp(jnp.minimum(t, t + d), exp_limit(t) - 5.0)


@jax.custom_jvp
def scaled_sigmoid(t: Array, d: Array) -> Array:
    """B = exp(t) sigmoid(d), never above exp(t) and exp(t + d)."""
    return _bounded_exp(t, d) / (1.0 + jnp.exp(-jnp.abs(d)))


@partial(scaled_sigmoid.defjvp, symbolic_zeros=True)
def _scaled_sigmoid_jvp(primals, tangents):
    (t, d), (dt, dd) = primals, tangents
    out = scaled_sigmoid(t, d)
    return out, tangent_of(out, (lambda: out, dt), (lambda: out * sigmoid(-d), dd))


@jax.custom_jvp
def scaled_softplus(t: Array, d: Array) -> Array:
    """A = exp(t) log(1 + exp(d)), never above exp(t + d)."""
    u = jnp.maximum(jnp.exp(-jnp.abs(d)), 4.0 * jnp.finfo(d.dtype).tiny)
    log_1u = jnp.log1p(u)
    return _bounded_exp(t, d) * jnp.where(d < 0, log_1u / u, d + log_1u)


@partial(scaled_softplus.defjvp, symbolic_zeros=True)
def _scaled_softplus_jvp(primals, tangents):
    (t, d), (dt, dd) = primals, tangents
    out = scaled_softplus(t, d)
    return out, tangent_of(out, (lambda: out, dt), (lambda: scaled_sigmoid(t, d), dd))


# ---- logarithms ----------------------------------------------------------------------


def log_positive(x: Array) -> Array:
    """log(x), continued below a tiny x by log(tiny) - log(2 - x / tiny).

    A mean that has to be positive may come from a linear predictor that is not: then
    this is a steep step, finite with its derivatives, from which a line search turns.
    """
    return log_derivative(x, 0)


def tiny_of(x: Array) -> float:
    """Where ``log_positive`` leaves the logarithm."""
    return 1e-70 if _is_double(x) else 1e-8


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_derivative(x: Array, order: int) -> Array:
    """Derivative of ``log_positive``."""
    tiny = tiny_of(x)
    below = x < tiny
    r = jnp.where(below, 2.0 * tiny - x, x)
    if order == 0:
        return jnp.where(below, 2.0 * math.log(tiny) - jnp.log(r), jnp.log(r))
    out = math.factorial(order - 1) / r**order
    return out if order % 2 else jnp.where(below, out, -out)


@log_derivative.defjvp
def _log_derivative_jvp(order, primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_derivative(x, order), log_derivative(x, order + 1) * dx


def log1mexp(x: Array) -> Array:
    """log(1 - exp(-x)) for x > 0, with the step of ``log_positive`` below."""
    return log1mexp_exp(log_positive(x))


def _capped_exp(z: Array) -> Array:
    return jnp.clip(jnp.exp(z), 4.0 * jnp.finfo(z.dtype).tiny, exp_limit(z))


@jax.custom_jvp
def log1mexp_exp(z: Array) -> Array:
    """L = log(1 - exp(-exp(z))), which tends to z for z -> -inf."""
    u = _capped_exp(z)
    return jnp.where(z < 0, z + jnp.log(-jnp.expm1(-u) / u), jnp.log1p(-jnp.exp(-u)))


@log1mexp_exp.defjvp
def _log1mexp_exp_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return log1mexp_exp(z), _bernoulli(z) * dz


@jax.custom_jvp
def _bernoulli(z: Array) -> Array:
    """R = u / (exp(u) - 1), u = exp(z)."""
    u = _capped_exp(z)
    return u / jnp.expm1(u)


@_bernoulli.defjvp
def _bernoulli_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    out = _bernoulli(z)
    return out, out * _bernoulli_rest(z) * dz


@jax.custom_jvp
def _bernoulli_rest(z: Array) -> Array:
    """G = 1 - u - R, without cancellation for small u."""
    u = _capped_exp(z)
    u2 = u**2
    near = -u / 2 - u2 * (1 / 12 - u2 * (1 / 720 - u2 * (1 / 30240 - u2 / 1209600)))
    return jnp.where(u < 0.1, near, 1.0 - u - u / jnp.expm1(u))


@_bernoulli_rest.defjvp
def _bernoulli_rest_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    out = _bernoulli_rest(z)
    return out, -(_capped_exp(z) + _bernoulli(z) * out) * dz


@jax.custom_jvp
def log_atan(x: Array) -> Array:
    """Log of the angle atan2(1, -x), between 0 and pi."""
    return jnp.log(jnp.atan2(jnp.ones_like(x), -x))


@log_atan.defjvp
def _log_atan_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    out = log_atan(x)
    return out, jnp.exp(-out) / (1.0 + x**2) * dx


# ---- the normal distribution ---------------------------------------------------------


def _tail_coefficients(terms: int) -> tuple[tuple[float, ...], ...]:
    """Of log(-x phi(x)^-1 Phi(x)) = sum a_k x^(-2 k), and of its derivatives.

    a_k, 2 k a_k and 2 k (2 k + 1) a_k, from the series 1 - v + 3 v^2 - 15 v^3 ...
    """
    c = [Fraction(1)]
    for k in range(1, terms + 1):
        c.append(-(2 * k - 1) * c[-1])
    a = [Fraction(0)]
    for k in range(1, terms + 1):
        a.append(c[k] - sum(Fraction(j, k) * a[j] * c[k - j] for j in range(1, k)))
    return (
        tuple(float(a[k]) for k in range(1, terms + 1)),
        tuple(float(2 * k * a[k]) for k in range(1, terms + 1)),
        tuple(float(2 * k * (2 * k + 1) * a[k]) for k in range(1, terms + 1)),
    )


_TAIL = _tail_coefficients(14)


def _tail(x: Array, order: int) -> tuple[Array, Array, Array]:
    """Whether x is in the tail, beyond -14 (float32: -10); -x there, and the series."""
    start = -14.0 if _is_double(x) else -10.0
    minus_x = -jnp.minimum(x, start)
    coefficients = jnp.asarray(_TAIL[order], x.dtype)
    k = 2.0 * jnp.arange(1, len(_TAIL[order]) + 1).astype(x.dtype)
    return x < start, minus_x, jnp.sum(coefficients * jnp.exp(-k * jnp.log(minus_x)))


@jax.custom_jvp
def log_ndtr(x: Array) -> Array:
    """Log of the standard normal distribution function.

    The asymptotic series of the tail, 26.2.12 of Abramowitz and Stegun, is used for
    its derivatives, too, so that these do not cancel.
    """
    tail, minus_x, series = _tail(x, 0)
    end = series - 0.5 * minus_x**2 - 0.5 * LOG_2PI - jnp.log(minus_x)
    rare = 0.5 * jax.lax.erfc(math.sqrt(0.5) * jnp.abs(x))
    middle = jnp.where(x > 0, jnp.log1p(-rare), jnp.log(jnp.where(tail, 0.5, rare)))
    return jnp.where(tail, end, middle)


@log_ndtr.defjvp
def _log_ndtr_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log_ndtr(x), _mills(x) * dx


def _mills_middle(x: Array, tail: Array) -> Array:
    x = jnp.where(tail, 0.0, x)
    density = jnp.exp(-0.5 * x**2 - 0.5 * LOG_2PI)
    return density / (0.5 * jax.lax.erfc(-math.sqrt(0.5) * x))


@jax.custom_jvp
def _mills(x: Array) -> Array:
    """H = phi(x) / Phi(x)."""
    tail, minus_x, series = _tail(x, 1)
    return jnp.where(tail, minus_x + (1.0 + series) / minus_x, _mills_middle(x, tail))


@_mills.defjvp
def _mills_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    h = _mills(x)
    return h, -h * _mills_rise(x) * dx


@jax.custom_jvp
def _mills_rise(x: Array) -> Array:
    """W = x + h."""
    tail, minus_x, series = _tail(x, 1)
    return jnp.where(tail, (1.0 + series) / minus_x, x + _mills_middle(x, tail))


@_mills_rise.defjvp
def _mills_rise_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _mills_rise(x), _mills_variance(x) * dx


@jax.custom_jvp
def _mills_variance(x: Array) -> Array:
    """V = 1 - h w, the variance of a normal variable cut off at x."""
    tail, minus_x, series = _tail(x, 2)
    h = _mills_middle(x, tail)
    return jnp.where(tail, (1.0 + series) / minus_x**2, 1.0 - h * (x + h))


@_mills_variance.defjvp
def _mills_variance_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    v = _mills_variance(x)
    return v, _mills(x) * (_mills_rise(x) ** 2 - v) * dx
