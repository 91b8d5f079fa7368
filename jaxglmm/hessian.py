"""Gradient and Hessian of the Laplace approximation, written out.

For x = (beta, theta, psi) and what is integrated out v = (u, with REML beta), equation
(3) of laplace.py needs the second derivatives of P(x, v) = F - lambda'g along the P
directions D_a = (e_a, dv/dx_a). With r_i = (eta_i, psi) (Q,) of row i, its score
s (R,) and information W (R, R) = -ds/deta, zeta = Z Lambda lambda and
h = d log|M| / dW by way of C = Z'WZ, P is made of

    omega_i(r_i) = -2 l_i + s_i' zeta_i + <h_i, W_i>        zeta and h held fixed    (1)
    eta = offset + X beta + Z Lambda u,       zeta,        log|M|(C, Lambda),

and with the derivatives of r, u, Lambda, ... along D_a and D_b so named, its Hessian
is, with G = Z' domega/deta,

    sum_i r_a' (omega'' r_b + 2 s_r' zeta_b) + 2 u_a' u_b + 2 <G, Lambda_a u_b>
      + <C_a, N_b> + <Lambda_a, L_b> + <Psi, Lambda_ab>,                             (2)
    N = d log|M| / dC,     L = d log|M| / dLambda,     Psi = G'u + (Z's)'lambda + L,

made symmetric, since two terms stand for themselves and their transposes.
(N_b, L_b) is the one linearization of the elimination, and stays with the levels; what
is done by row is arithmetic on the derivatives of l_i. With REML log|M| depends on W in
other ways too: W stands beside C then.
The gradient is (X' domega/deta, dLambda/dtheta' Psi, sum_i domega_i/dpsi).

Rows are (n, ...), directions (P, ...), effects of a block (J, K).

References: as in laplace.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxglmm.coordinates import block_factors
from jaxglmm.crossproducts import CrossProducts
from jaxglmm.elimination import Effects
from jaxglmm.families import Family
from jaxglmm.modes import (
    Inner,
    RowData,
    curvature,
    effects,
    eliminated,
    gather,
    gram,
    over_rows,
    pulled,
    random_part,
    row_terms,
    solve_inner,
)
from jaxglmm.typing import Array

if TYPE_CHECKING:
    from jaxglmm.laplace import Frame, GeneralizedModel

__all__ = ["value_grad_hess"]


def value_grad_hess(
    model: GeneralizedModel, x: Array, frame: Frame, data: RowData
) -> tuple[Array, Array, Array, Inner]:
    """Value (), gradient (P,), Hessian (P, P) at the frame's mode; dv/dx (P, ...)."""
    layout, family, v = model.layout, model.family, frame.inner
    point, factors, eta = model._parts(x, v, frame, data)
    terms = row_terms(eta, point.psi, data, family)
    slopes = _slopes(eta, point.psi, data, family)

    def sums(W):
        C = _numbers(curvature(W, data, layout))
        return (*C, W) if model.reml else C

    def determinant(C, factors):
        def logdet(C, factors):
            W = C[-1] if model.reml else terms.W
            cp = _with_numbers(curvature(terms.W, data, layout), C)
            at = eliminated(cp, W, factors, data, layout, model.reml)
            return at.logdet, at

        return jax.grad(logdet, (0, 1), has_aux=True)(C, factors)

    C, back = jax.vjp(sums, terms.W)
    (N, L), linear, at = jax.linearize(determinant, C, factors, has_aux=True)
    (h,) = back(N)

    def solve(right: Inner) -> Inner:
        return solve_inner(right, at, factors, data, layout)

    # lambda, and with it the function of every row
    n_eta = eta.shape[1]
    by_eta = -2.0 * terms.score + jnp.einsum("nrs,nrsq->nq", h, slopes.W)[:, :n_eta]
    slope = pulled(by_eta, factors, data, layout, model.reml)
    multiplier = solve(slope._replace(u=_add(slope.u, v.u, 2.0)))
    b_multiplier = effects(multiplier.u, factors)
    zeta = _predictors(b_multiplier, multiplier.beta, data, model)
    omega = _omega(eta, point.psi, zeta, h, data, family)
    scores = gather(terms.score, data, layout)
    G = gather(omega.grad[:, :n_eta], data, layout)

    # directions
    where = _Directions(model, x, frame, data)
    moved = where.factors
    r = where.rows(v.u)
    s = jnp.sum(slopes.score[None] * r[:, :, None, :], axis=3)
    right = jax.vmap(lambda s: pulled(s, factors, data, layout, model.reml))(s)
    turned = tuple(jnp.einsum("jk,pkl->pjl", z, Lam) for z, Lam in zip(scores, moved))
    follow = jax.vmap(solve)(right._replace(u=_add(right.u, turned, 1.0)))
    b = tuple(jnp.einsum("pjk,lk->pjl", u, Lam) for u, Lam in zip(follow.u, factors))
    change = jax.vmap(lambda b, beta: _predictors(b, beta, data, model))(b, follow.beta)
    r = r.at[:, :, :n_eta].add(change)
    W = jnp.sum(slopes.W[None] * r[:, :, None, None, :], axis=4)
    C_moved = jax.vmap(sums)(W)
    N_moved, L_moved = jax.vmap(linear)(C_moved, moved)
    zeta_moved = where.predictors(multiplier.u)
    turn = jnp.sum(omega.hess[None] * r[:, :, None, :], axis=3)
    turn = turn + 2.0 * jnp.sum(slopes.score[None] * zeta_moved[..., None], axis=2)

    hess = gram(r, turn)
    for C_a, N_b in zip(C_moved, N_moved):
        hess = hess + gram(C_a, N_b)
    for u, Lam, L_b, g in zip(follow.u, moved, L_moved, G):
        hess = hess + 2.0 * gram(u, u) + gram(Lam, L_b)
        hess = hess + 2.0 * gram(Lam, jnp.einsum("jk,pjl->pkl", g, u))
    Psi = tuple(
        g.T @ u + z.T @ m + dL
        for g, u, z, m, dL in zip(G, v.u, scores, multiplier.u, L)
    )
    value, grad_rest, hess_rest = where.rest(Psi)
    grad = grad_rest + where.pull(omega.grad)
    square = sum(jnp.sum(u**2) for u in v.u)
    value = value - 2.0 * (terms.value + data.base) + square + at.logdet
    return value, grad, 0.5 * (hess + hess.T) + hess_rest, follow


def _is_number(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _numbers(cp: CrossProducts) -> tuple[Array, ...]:
    """Arrays of a pytree that are no indices."""
    return tuple(x for x in jax.tree.leaves(cp) if _is_number(x))


def _with_numbers(cp: CrossProducts, numbers: tuple[Array, ...]) -> CrossProducts:
    """The same with other numbers; more than it holds are left over."""
    leaves, treedef = jax.tree.flatten(cp)
    new = iter(numbers)
    return jax.tree.unflatten(
        treedef, [next(new) if _is_number(x) else x for x in leaves]
    )


# ---- rows --------------------------------------------------------------------------


class _Slopes(NamedTuple):
    """Derivatives by r of the score, (n, R, Q), and the information, (n, R, R, Q)."""

    score: Array
    W: Array


class _Omega(NamedTuple):
    """Gradient (n, Q) and Hessian (n, Q, Q) of (1)."""

    grad: Array
    hess: Array


def _kernel(y: Array, w: Array, family: Family, n_eta: int):
    """Log kernel of a row in r (Q,), and its score (R,) and information (R, R)."""

    def kernel(eta, psi):
        return family.log_kernel(y, eta, psi, w)

    def value(r):
        return kernel(r[:n_eta], r[n_eta:])

    def score(r):
        return jax.grad(kernel)(r[:n_eta], r[n_eta:])

    def W(r):
        return -jax.jacfwd(jax.grad(kernel))(r[:n_eta], r[n_eta:])

    return value, score, W


def _rows(eta: Array, psi: Array) -> Array:
    """The r (n, Q) of all rows."""
    if not psi.shape[0]:
        return eta
    own = jnp.broadcast_to(psi[None], (eta.shape[0], psi.shape[0]))
    return jnp.concatenate([eta, own], axis=1)


def _slopes(eta: Array, psi: Array, data: RowData, family: Family) -> _Slopes:
    def row(y, w, r):
        _, score, W = _kernel(y, w, family, eta.shape[1])
        return _Slopes(jax.jacfwd(score)(r), jax.jacfwd(W)(r))

    return over_rows(row, data, _rows(eta, psi))


def _omega(
    eta: Array, psi: Array, zeta: Array, h: Array, data: RowData, family: Family
) -> _Omega:
    def row(y, w, r, zeta, h):
        value, score, W = _kernel(y, w, family, eta.shape[1])

        def omega(r):
            return -2.0 * value(r) + score(r) @ zeta + jnp.sum(h * W(r))

        return _Omega(jax.grad(omega)(r), jax.jacfwd(jax.grad(omega))(r))

    return over_rows(row, data, _rows(eta, psi), zeta, h)


# ---- from effects to rows and back -------------------------------------------------


def _predictors(b: Effects, beta: Array, data: RowData, model) -> Array:
    """Z b, with REML X beta too, in the linear predictors (n, R)."""
    parts = random_part(b, data, model.layout)
    if model.reml:
        parts[0] = parts[0] + data.X[0] @ beta
    return jnp.stack(parts, axis=1)


def _add(a: Effects, b: Effects, times: float) -> Effects:
    return tuple(x + times * y for x, y in zip(a, b))


class _Directions:
    """The P directions of x: what moves in eta, psi and Lambda."""

    def __init__(self, model: GeneralizedModel, x: Array, frame: Frame, data: RowData):
        self.model, self.x, self.frame, self.data = model, x, frame, data
        theta = model.split(x, data).theta

        def factors(theta):
            return block_factors(theta, model.layout, frame.order)

        self.moved = [jnp.moveaxis(v, 2, 0) for v in jax.jacfwd(factors)(theta)]
        sizes = [X.shape[1] for X in data.X]
        if model.reml:
            sizes[0] = 0
        self.sizes = sizes
        self.first, self.n_theta = sum(sizes), theta.shape[0]
        self.n_own = x.shape[0] - self.first - self.n_theta

    @property
    def factors(self) -> tuple[Array, ...]:
        """Derivatives of Lambda of every block, (P, K, K)."""
        ends = (self.first, self.n_own)
        return tuple(jnp.pad(v, (ends, (0, 0), (0, 0))) for v in self.moved)

    def _theta_predictors(self, u: Effects) -> Array:
        """Z Lambda_a u, (m, n, R)."""

        def one(moved):
            b = effects(u, moved)
            return jnp.stack(random_part(b, self.data, self.model.layout), axis=1)

        return jax.vmap(one)(tuple(self.moved))

    def predictors(self, u: Effects) -> Array:
        """Z Lambda_a u, (P, n, R)."""
        ends = (self.first, self.n_own)
        return jnp.pad(self._theta_predictors(u), (ends, (0, 0), (0, 0)))

    def rows(self, u: Effects) -> Array:
        """Derivatives of r (P, n, Q) at constant u."""
        data, n_eta = self.data, len(self.data.X)
        n, n_r = data.y.shape[0], n_eta + self.n_own
        parts = []
        for r, size in enumerate(self.sizes):
            if size:
                X = data.X[r].T[:, :, None]
                parts.append(jnp.pad(X, ((0, 0), (0, 0), (r, n_r - r - 1))))
        by_theta = self._theta_predictors(u)
        parts.append(jnp.pad(by_theta, ((0, 0), (0, 0), (0, self.n_own))))
        own = jnp.eye(self.n_own, n_r, n_eta, dtype=data.y.dtype)
        parts.append(jnp.broadcast_to(own[:, None], (self.n_own, n, n_r)))
        return jnp.concatenate(parts)

    def pull(self, rows: Array) -> Array:
        """X' rows and sums over rows (P,), for rows (n, Q); zero for theta."""
        n_eta = len(self.data.X)
        beta = [
            rows[:, r] @ self.data.X[r] for r, size in enumerate(self.sizes) if size
        ]
        zero = jnp.zeros(self.n_theta, rows.dtype)
        return jnp.concatenate([*beta, zero, jnp.sum(rows[:, n_eta:], axis=0)])

    def rest(self, Psi: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        """What F has of x alone, and its derivatives with those of <Psi, Lambda>."""
        model, frame, data = self.model, self.frame, self.data

        def fn(x):
            own = model.value_of_x(x, frame, data)
            theta = model.split(x, data).theta
            factors = block_factors(theta, model.layout, frame.order)
            pairs = zip(Psi, factors)
            return own + sum(jnp.sum(p * Lam) for p, Lam in pairs), own

        grad, own = jax.grad(fn, has_aux=True)(self.x)
        hess = jax.jacfwd(lambda x: jax.grad(fn, has_aux=True)(x)[0])(self.x)
        return own, grad, hess
