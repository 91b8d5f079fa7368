"""Where the fit of a generalized model starts: rounds of penalized quasi-likelihood.

At given theta the mode of the effects u and of beta together is quickly found, as in
REML (modes.py). Of each grouping factor, with M the curvature at the mode and all its
levels j,

    S = sum_j u_j u_j',      A = sum_j (I - (M^-1)_jj),      A = C C',
    Q <- Lambda C^-1 S C^-1' Lambda'                                               (1)

whose fixed point, S = A, solves the quasi-likelihood's equation for Q = Lambda Lambda'.
From unit variances it comes near in a few rounds, with much information on a level and
with little, where an EM step would hardly move. The optimizer does the rest, so modes
are sought to a decrement of one, and (1) need not have converged.

Families with parameters beside the mean, or several linear predictors, start at least
squares on a first guess and at unit variances.

References: Breslow and Clayton (1993), JASA 88, doi:10.2307/2290687; Harville (1977),
JASA 72, doi:10.2307/2286796.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.coordinates import block_factors, split_factors
from jaxglmm.elimination import (
    Effects,
    conditional_covariances,
    eliminate,
    split_terms,
)
from jaxglmm.families import Family
from jaxglmm.laplace import GeneralizedModel, Point
from jaxglmm.linalg import small_cholesky, spd_inverse
from jaxglmm.modes import (
    Inner,
    RowData,
    curvature,
    curved,
    effects,
    find_modes,
    linear_predictors,
    pulled,
    row_terms,
    row_values,
    solve_inner,
)
from jaxglmm.plan import Layout
from jaxglmm.starts import default_start, theta_near
from jaxglmm.typing import Array

__all__ = ["Start", "first_point", "link_of_response", "near_response"]

_ROUNDS = 3
_NEAR = 0.05  # relative change of every standard deviation at which they end
_MODE_TOL = 1.0  # Newton decrement of a mode
_MODE_ITER = 10
_MOST_EFFECTS = 8  # of a term; one with more starts at unit variances


class Start(NamedTuple):
    """Parameters in inner units, and effects (J, K) of every block near the mode.

    ``usual`` is where a fit would start without the user's.
    """

    point: Point
    u: Effects
    usual: Point


class _Round(NamedTuple):
    theta: Array
    inner: Inner
    going: Array
    n: Array


def first_point(
    model: GeneralizedModel,
    data: RowData,
    given: Point | None = None,
    gaps: bool = False,
) -> Start:
    """Where to start.

    ``given`` is the user's start in inner units, NaN where it leaves beta or psi open;
    and theta too if there may be such ``gaps``.
    """
    data, family = jax.tree.map(lax.stop_gradient, data), model.family
    psi, extra = family.psi_start(data.y, data.w), family.extra_start(data.y, data.w)
    used, layout = data.w > 0, model.layout
    eta = link_of_response(family, data)
    # whitened columns: least squares
    n = jnp.sum(used.astype(data.y.dtype))
    rest = jnp.where(used, eta - data.offset[0], 0.0)
    beta = data.X[0].T @ rest / n
    others = [e * jnp.sum(X, axis=0) / n for e, X in zip(extra, data.X[1:])]
    u = tuple(jnp.zeros((b.n_levels, b.k), beta.dtype) for b in layout.blocks)
    theta = jnp.asarray(default_start(layout), beta.dtype)
    fixed = jnp.zeros((), bool)
    if given is not None:
        given = lax.stop_gradient(given)
        fixed = ~jnp.any(jnp.isnan(given.theta))
        theta = jnp.where(fixed, given.theta, theta) if gaps else given.theta
    if model.starts_near:
        first = near_response(model, data, (), theta, eta, Inner(u, beta))
        free = given is None or gaps
        theta, (u, beta) = _quasi(model, data, theta, first, fixed, free)
    usual = Point((beta, *others), theta, psi)
    if given is None:
        return Start(usual, u, usual)
    pairs = zip(given.beta, usual.beta)
    betas = tuple(jnp.where(jnp.isnan(a), b, a) for a, b in pairs)
    psi = jnp.where(jnp.isnan(given.psi), psi, given.psi)
    return Start(Point(betas, theta, psi), u, usual)


def link_of_response(family: Family, data: RowData) -> Array:
    """A first guess at the linear predictor of every row, (n,)."""
    used = data.w > 0
    eta = jax.vmap(family.eta_start)(data.y, jnp.where(used, data.w, 1.0))
    return jnp.where(used, eta, data.offset[0])


def near_response(
    model: GeneralizedModel,
    data: RowData,
    beta: tuple[Array, ...],
    theta: Array,
    eta: Array,
    plain: Inner,
) -> Inner:
    """Mode where rows are as normal as they are at ``eta`` (n,); one predictor.

    eta lies near the response, so this is a Newton step from there and not from zero
    effects. ``beta`` is not looked at where ``plain`` has one, which is integrated out;
    ``plain`` is kept where it is the better place to search from.
    """
    layout, reml = model.layout, plain.beta.shape[0] > 0
    factors, psi = block_factors(theta, layout), jnp.zeros(0, theta.dtype)
    terms = row_terms(eta[:, None], psi, data, model.family)
    at = curved(terms.W, factors, data, layout, reml)
    fixed = data.offset[0] if reml else data.offset[0] + data.X[0] @ beta[0]
    rows = terms.score + terms.W[:, 0] * (eta - fixed)[:, None]
    right = pulled(rows, factors, data, layout, reml)
    found = solve_inner(right, at, factors, data, layout)

    def height(inner: Inner) -> Array:
        betas = (inner.beta,) if reml else beta
        eta = linear_predictors(betas, effects(inner.u, factors), data, layout)
        square = sum(jnp.sum(u**2) for u in inner.u)
        return jnp.sum(row_values(eta, psi, data, model.family)) - 0.5 * square

    high = height(found)
    fine = jnp.isfinite(high) & jnp.isfinite(at.logdet) & ~(height(plain) > high)
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), found, plain)


def _quasi(
    model: GeneralizedModel,
    data: RowData,
    theta: Array,
    first: Inner,
    fixed: Array,
    free: bool,
) -> tuple[Array, Inner]:
    """Theta and the mode by rounds of (1); the mode alone where theta is ``fixed``.

    As it is always unless it may be ``free``.
    """
    layout, family = model.layout, model.family
    psi = jnp.zeros(0, theta.dtype)

    def body(s: _Round) -> _Round:
        factors = block_factors(s.theta, layout)
        inner, _ = find_modes(
            (s.inner.beta,), factors, psi, s.inner, data, layout, family,
            _MODE_TOL, _MODE_ITER,
        )  # fmt: skip
        fine = _is_finite(inner)
        inner = jax.tree.map(lambda a, b: jnp.where(fine, a, b), inner, s.inner)
        if not free:
            return _Round(s.theta, inner, jnp.zeros((), bool), s.n + 1)
        b = effects(inner.u, factors)
        eta = linear_predictors((inner.beta,), b, data, layout)
        W = row_terms(eta, psi, data, family).W
        cp = curvature(W, data, layout)
        done = eliminate(factors, cp, layout)
        V = conditional_covariances(factors, done, cp, layout)
        theta = _updated(factors, inner.u, V, layout)
        moves = fine & ~fixed & jnp.all(jnp.isfinite(theta))
        theta = jnp.where(moves, theta, s.theta)
        new = block_factors(theta, layout)
        change = [
            jnp.max(jnp.abs(_sizes(a) / _sizes(c) - 1.0)) for a, c in zip(new, factors)
        ]
        u = tuple(v @ _inverse(L).T for v, L in zip(b, new))
        going = fine & ~fixed & (jnp.max(jnp.stack(change)) > _NEAR)
        return _Round(theta, Inner(u, inner.beta), going, s.n + 1)

    start = _Round(theta, first, jnp.ones((), bool), jnp.zeros((), jnp.int32))
    last = lax.while_loop(lambda s: s.going & (s.n < _ROUNDS), body, start)
    fine = _is_finite(last.inner)
    inner = jax.tree.map(lambda a, b: jnp.where(fine, a, b), last.inner, first)
    return last.theta, inner


def _updated(factors, u: Effects, V: Effects, layout: Layout) -> Array:
    """Theta (m,) of the Q that (1) gives for every term.

    ``V`` (J, K, K) is Lambda M^-1 Lambda' by level.
    """
    Q = []
    shares = {}
    for block, L, v in zip(layout.blocks, factors, V):
        L_inv, start = _inverse(L), 0
        M_inv = L_inv @ v @ L_inv.T
        for t in block.terms:
            at = slice(start, start + layout.term_k[t])
            shares[t] = M_inv[:, at, at]
            start += layout.term_k[t]
    parts = zip(split_factors(factors, layout), split_terms(u, layout))
    for t, (L, v) in enumerate(parts):
        k = layout.term_k[t]
        if k > _MOST_EFFECTS:
            Q.append(L @ L.T)
            continue
        A = jnp.sum(jnp.eye(k, dtype=v.dtype)[None] - shares[t], axis=0)
        to = L @ small_cholesky(A).T @ spd_inverse(A)[0]
        found = to @ (v.T @ v) @ to.T
        Q.append(jnp.where(jnp.all(jnp.isfinite(found)), found, L @ L.T))
    return theta_near(Q, layout)


def _is_finite(inner: Inner) -> Array:
    leaves = jax.tree.leaves(inner)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _sizes(L: Array) -> Array:
    """Standard deviations (K,) for a factor."""
    return jnp.sqrt(jnp.sum(L**2, axis=1))


def _inverse(L: Array) -> Array:
    """Inverse of a triangular factor."""
    return L.T @ spd_inverse(L @ L.T)[0]
