"""Gaussian mixed models: the profiled ML and REML criteria, and log L.

y = X beta + Z b + e with b ~ N(0, sigma^2 Q), e ~ N(0, sigma^2 W^-1). Elimination of
the random effects gives log|V| and T = [X y]' V^-1 [X y] (see elimination.py), so that

    beta(theta) = T_XX^-1 T_Xy,      r^2(theta) = T_yy - T_yX beta
    ML      -2 log L = log|V| + n (1 + log(2 pi r^2 / n))                          (1)
    REML    -2 log L = log|V| + log|T_XX| + (n - p) (1 + log(2 pi r^2 / (n - p)))  (2)

plus -sum log w. beta and sigma are profiled out: sigma^2 = r^2 / n or r^2 / (n - p).
(1) and (2) are one expression in ``reml``, 0 or 1, which may be traced. Where sigma is
known (a working model of unit dispersion), r^2 / sigma^2 and sigma^2 take their places.

References: Bates et al. (2015), J. Stat. Softw. 67(1), doi:10.18637/jss.v067.i01.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxglmm.coordinates import Order, block_factors
from jaxglmm.crossproducts import CrossProducts
from jaxglmm.elimination import Eliminated, eliminate
from jaxglmm.linalg import spd_inverse
from jaxglmm.plan import Layout
from jaxglmm.typing import Array

__all__ = [
    "Criterion",
    "criterion",
    "log_likelihood",
    "profile",
    "profiled_objective",
]


class Criterion(NamedTuple):
    """The criterion and what it was made of, in inner units.

    ``objective`` is (1) or (2); ``gls`` (p, p) the inverse of T_XX, so that the
    covariance of beta is sigma^2 gls.
    """

    objective: Array
    beta: Array
    gls: Array
    sigma2: Array


def criterion(
    T: Array,
    logdet: Array,
    cp: CrossProducts,
    reml: Array,
    sigma2: Array | None = None,
) -> Criterion:
    """Criterion from T (p + 1, p + 1) and log|V|; sigma^2 profiled unless given."""
    beta, gls, logdet_X, rss = _least_squares(T, cp.unused)
    dof = cp.n - reml * cp.p
    phi = rss / dof if sigma2 is None else sigma2
    square = dof if sigma2 is None else rss / sigma2
    objective = (
        logdet
        + reml * (logdet_X + cp.constant_reml)
        + square
        + dof * jnp.log(2.0 * jnp.pi * phi)
        + cp.constant
    )
    return Criterion(objective, beta, gls, phi)


def profile(
    factors: tuple[Array, ...],
    cp: CrossProducts,
    layout: Layout,
    reml: Array,
    sigma2: Array | None = None,
) -> tuple[Criterion, Eliminated]:
    """Generalized least squares and the profiled criterion at Lambda (K, K)."""
    done = eliminate(factors, cp, layout)
    return criterion(done.T, done.logdet, cp, reml, sigma2), done


def profiled_objective(
    theta: Array,
    cp: CrossProducts,
    layout: Layout,
    reml: Array,
    order: Order | None = None,
    sigma2: Array | None = None,
) -> Array:
    """-2 log L (or the REML criterion) with beta and sigma profiled out, ()."""
    factors = block_factors(theta, layout, order)
    return profile(factors, cp, layout, reml, sigma2)[0].objective


def _least_squares(T: Array, unused: Array):
    """Solve T_XX beta = T_Xy; columns without content get a unit pivot."""
    p = unused.shape[0]
    if p == 0:
        zero = jnp.zeros((), T.dtype)
        return T[0, :0], T[:0, :0], zero, T[0, 0]
    XX = T[:p, :p] + jnp.diag(unused)
    gls, logdet = spd_inverse(XX)
    beta = gls @ T[:p, p]
    return beta, gls, logdet, T[p, p] - T[:p, p] @ beta


def log_likelihood(
    theta: Array,
    beta: Array,
    sigma: Array,
    cp: CrossProducts,
    layout: Layout,
    reml: Array,
) -> Array:
    """Log L with every constant at any (theta, beta, sigma), in inner units.

    REML integrates beta out with a flat prior, so beta is then without influence.
    """
    done = eliminate(block_factors(theta, layout), cp, layout)
    beta_hat, _, logdet_X, rss = _least_squares(done.T, cp.unused)
    c = jnp.append(-jnp.where(reml > 0, beta_hat, beta), 1.0)
    rss = jnp.where(reml > 0, rss, c @ done.T @ c)
    dof = cp.n - reml * cp.p
    minus_2 = (
        done.logdet
        + reml * (logdet_X + cp.constant_reml)
        + dof * jnp.log(2.0 * jnp.pi * sigma**2)
        + rss / sigma**2
        + cp.constant
    )
    return -0.5 * minus_2
