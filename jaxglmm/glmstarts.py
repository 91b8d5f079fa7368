"""Where the fit of a generalized model starts.

Without random effects the model is a generalized linear one, fitted by a few rounds of
iteratively reweighted least squares on the working response and weights

    z = eta + s / W,        s = d log f / d eta,   W = -E d^2 log f / d eta^2.     (1)

At its end z = X beta + Z b + e with e ~ N(0, W^-1), nearly, and the moment equations of
starts.py give theta. With a log link means and variances over b ~ N(0, Q) are those of
the lognormal distribution, so with tau^2 = diag(Z Q Z')

    eta = eta_glm - tau^2 / 2,       Q = log(1 + Q_moments)  by variance.         (2)

Families with parameters beside the mean, or several linear predictors, start at least
squares on a first guess and at unit variances.

References: McCullagh and Nelder (1989), Generalized Linear Models, 2nd ed., ch. 2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.coordinates import block_factors
from jaxglmm.crossproducts import CrossProducts, whitening
from jaxglmm.families import Family
from jaxglmm.laplace import GeneralizedModel, Point
from jaxglmm.linalg import spd_inverse
from jaxglmm.modes import RowData, row_terms
from jaxglmm.plan import Layout
from jaxglmm.rowsums import RowSums
from jaxglmm.starts import default_start, moment_start
from jaxglmm.typing import Array

__all__ = ["first_point"]

_MAX_ROUNDS = 6  # of reweighted least squares; the optimizer does the rest
_NEAR = 0.05  # change of a linear predictor, root mean square, at which they end


class _Search(NamedTuple):
    """Reweighted least squares: the next beta; the best so far, and its rows."""

    beta: Array
    best: Array
    z: Array
    W: Array
    value: Array
    going: Array
    n: Array


def first_point(
    model: GeneralizedModel, data: RowData, theta: Array | None = None
) -> Point:
    """Starting parameters in inner units; ``theta`` (m,) where the user gave it."""
    data, family = jax.tree.map(lax.stop_gradient, data), model.family
    psi, extra = family.psi_start(data.y, data.w), family.extra_start(data.y, data.w)
    used = data.w > 0
    eta = jax.vmap(family.eta_start)(data.y, jnp.where(used, data.w, 1.0))
    eta = jnp.where(used, eta, data.offset[0])
    # whitened columns: least squares
    n = jnp.sum(used.astype(data.y.dtype))
    rest = jnp.where(used, eta - data.offset[0], 0.0)
    beta = data.X[0].T @ rest / n
    usual = jnp.asarray(default_start(model.layout), data.y.dtype)
    if family.n_eta == 1 and family.n_own == 0 and family.has_information:
        beta, moments = _from_working_model(family, data, model.layout, beta)
        usual = moments if theta is None else usual
    others = [e * jnp.sum(X, axis=0) / n for e, X in zip(extra, data.X[1:])]
    return Point((beta, *others), usual if theta is None else theta, psi)


def _from_working_model(
    family: Family, data: RowData, layout: Layout, beta: Array
) -> tuple[Array, Array]:
    """Beta (p,) by reweighted least squares, and theta (m,) by moments of the rest."""
    X, offset, used = data.X[0], data.offset[0], data.w > 0
    n = jnp.sum(used.astype(data.y.dtype))
    psi = jnp.zeros(0, beta.dtype)
    unused = data.unused[: X.shape[1]]

    def working(beta):
        eta = offset + X @ beta
        terms = row_terms(eta[:, None], psi, data, family, expected=True)
        W = terms.W[:, 0, 0]
        fine = used & (W > 0) & jnp.isfinite(W)
        score = jnp.where(fine, terms.score[:, 0], 0.0)
        z = X @ beta + score / jnp.where(fine, W, 1.0)
        return z, jnp.where(fine, W, 0.0), terms.value

    def least_squares(s: _Search) -> _Search:
        z, W, value = working(s.beta)
        better = value > s.value  # not so where it is not a number
        XW = X * W[:, None]
        beta = spd_inverse(XW.T @ X + jnp.diag(unused))[0] @ (z @ XW)
        near = jnp.sum((beta - s.beta) ** 2) <= _NEAR**2
        return _Search(
            beta,
            jnp.where(better, s.beta, s.best),
            jnp.where(better, z, s.z),
            jnp.where(better, W, s.W),
            jnp.where(better, value, s.value),
            ~(better & near),
            s.n + 1,
        )

    zero = jnp.zeros((), beta.dtype)
    ones = jnp.ones_like(data.y)
    first = _Search(
        beta, beta, 0.0 * ones, jnp.where(used, ones, 0.0), zero - jnp.inf,
        zero == 0.0, jnp.zeros((), jnp.int32),
    )  # fmt: skip
    last = lax.while_loop(lambda s: s.going & (s.n < _MAX_ROUNDS), least_squares, first)
    z, W = last.z, last.W
    mean = jnp.sum(W) / n
    T, aliased, _ = whitening(X, W / mean, jnp)
    T = T / jnp.sqrt(mean)
    Xw = X @ T
    rest = z - Xw @ (Xw.T @ (W * z) / n)
    found = jnp.where(last.going, last.best, last.beta)  # the next one may be far
    A = jnp.concatenate([Xw, rest[:, None]], axis=1)
    sums = RowSums(layout, data.z, data.codes, W, A, jnp).all(data.pairs)
    p = jnp.sum(1.0 - aliased).astype(beta.dtype)
    cp = CrossProducts(*sums, data.parents, aliased, n, p, zero, zero)
    log_link = family.link == "log"
    one = jnp.ones((), beta.dtype)
    theta = moment_start(cp, layout, jnp, one, lognormal=log_link)
    if log_link:
        factors = block_factors(theta, layout)
        tau2 = sum(jnp.sum((v @ L) ** 2, axis=1) for v, L in zip(data.z, factors))
        found = found - 0.5 * T @ (Xw.T @ (W * tau2) / n)
    return found, theta
