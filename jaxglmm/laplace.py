"""The Laplace approximation of a generalized model's likelihood, and its derivatives.

With the mode v of modes.py, which solves g(v) = 0 and has curvature M,

    -2 log L = -2 sum l_i(eta_i) + u'u + log|M|  =: F(x, v(x))                     (1)

(with quadrature F has another term, see quadrature.py) for x = (beta, theta, psi) and
any data. v is u, or with REML u and the first beta together; that beta is then no part
of x, M is (3) of modes.py, and F has the constant -p log 2 pi.

v(x) moves with x, and F is not stationary in v. Its derivatives of first and second
order are those of

    F(x, v2(x)) - lambda' g(x, v2(x)),     v_i+1 = v_i - M0^-1 g(x, v_i),
    lambda = M0^-1 dF/dv at v0                                                     (2)

with v0, M0 and lambda constants: v_i follows the mode to order i, since a step takes
the error of order dx^(i+1) times I - M0^-1 M(x), of order dx. F - lambda' g has no
slope in v at v0, so that (2) is right to order dx^3: it may be differentiated three
times, in anything, and two derivatives of the optimum need three. Its value has the
square of the error that is left in v0. The search for the mode is never differentiated.

For the optimizer, which wants derivatives in x at the mode, (2) is written out (without
quadrature and expected information further, see hessian.py): with
P(x, v) = F - lambda' g, whose derivative in v is zero, and D = (I, dv/dx),

    dv/dx = -M^-1 g_x,       gradient P_x,       Hessian D' P'' D                  (3)

need one linearization of the gradient of F and one of that of lambda' g.

References: Tierney and Kadane (1986), JASA 81, doi:10.2307/2287970; Kristensen et al.
(2016), J. Stat. Softw. 70(5), doi:10.18637/jss.v070.i05.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.coordinates import Order, block_factors, canonical, first_order, repivot
from jaxglmm.covariance import structure
from jaxglmm.elimination import Effects
from jaxglmm.families import Family
from jaxglmm.hessian import value_grad_hess
from jaxglmm.modes import (
    Curvature,
    Inner,
    RowData,
    curvature,
    curved,
    effects,
    find_modes,
    gradient,
    gram,
    inner_dot,
    linear_predictors,
    row_scores,
    row_terms,
    solve_inner,
)
from jaxglmm.optimize import exact, ones
from jaxglmm.plan import Layout
from jaxglmm.quadrature import quadrature_correction
from jaxglmm.results import Params
from jaxglmm.typing import Array

__all__ = [
    "Frame",
    "GeneralizedModel",
    "Point",
    "constant",
    "in_user_units",
    "n_theta",
]


class Point(NamedTuple):
    """x taken apart: beta (p_r,) of every predictor, theta (m,), psi (n_own,).

    With REML the first beta is empty in x, and :meth:`GeneralizedModel.at` fills it in.
    """

    beta: tuple[Array, ...]
    theta: Array
    psi: Array


class Frame(NamedTuple):
    """What x means, the mode that belongs to it, and how much the mode lacks.

    ``follow`` (P, ...) is dv/dx where the derivatives were taken last, at x = ``at``.
    """

    order: Order
    inner: Inner
    left: Array
    at: Array
    follow: Inner


@dataclass(frozen=True)
class GeneralizedModel:
    """Static part of a generalized model; see :class:`RowData` for its arrays.

    ``expected``: expected information in the determinant; ``n_quad``: quadrature nodes
    per effect, 1 for Laplace; ``reml``: whether the first beta is integrated out;
    ``prior``: a function of the user's :class:`Params` that is added to log L.
    """

    layout: Layout
    family: Family
    expected: bool = False
    n_quad: int = 1
    reml: bool = False
    prior: Callable[[Params], Array] | None = None

    @property
    def starts_near(self) -> bool:
        """Whether glmstarts.py has a start near the optimum."""
        family = self.family
        return family.n_eta == 1 and family.n_own == 0 and family.has_information

    def scale(self, x: Array) -> Array:
        """Every parameter in its own unit."""
        return ones(x)

    def noise(self, x: Array, data: RowData) -> Array:
        """Nothing beside the last digits of the objective."""
        return exact(x)

    @property
    def radius(self) -> float:
        """How far from the start the optimizer may go at first."""
        return 0.5 if self.starts_near else 2.0

    def split(self, x: Array, data: RowData) -> Point:
        """Take x (beta, theta, psi) apart."""
        sizes = [X.shape[1] for X in data.X]
        if self.reml:
            sizes[0] = 0
        beta, start = [], 0
        for size in sizes:
            beta.append(x[start : start + size])
            start += size
        m = n_theta(self.layout)
        return Point(tuple(beta), x[start : start + m], x[start + m :])

    def join(self, point: Point) -> Array:
        """X (beta, theta, psi)."""
        return jnp.concatenate([*point.beta, point.theta, point.psi])

    def at(self, x: Array, inner: Inner, data: RowData) -> Point:
        """All parameters, the first beta from wherever it is."""
        point = self.split(x, data)
        if not self.reml:
            return point
        return point._replace(beta=(inner.beta, *point.beta[1:]))

    def first_frame(self, x: Array, u: Effects, beta: Array) -> Frame:
        """Effects in the user's order; ``beta`` where REML has it."""
        dtype = beta.dtype
        inner = Inner(u, beta if self.reml else jnp.zeros(0, dtype))
        follow = jax.tree.map(lambda v: jnp.zeros((x.shape[0], *v.shape), dtype), inner)
        order = first_order(self.layout, dtype)
        return Frame(order, inner, jnp.zeros((), dtype), x, follow)

    def reframe(self, x: Array, frame: Frame, data: RowData) -> tuple[Array, Frame]:
        """Larger pivots first, and the mode found."""
        frame = frame._replace(inner=_predicted(x, frame))
        point = self.split(x, data)
        if self.n_quad > 1:  # the grid belongs to the user's order of effects
            return x, self.settle(x, frame, data)
        theta, order, turns = repivot(point.theta, frame.order, self.layout)
        inner = frame.inner._replace(u=_turned(frame.inner.u, turns, self.layout))
        x = self.join(point._replace(theta=theta))
        none = jax.tree.map(jnp.zeros_like, frame.follow)  # until derivatives are taken
        frame = frame._replace(order=order, inner=inner, at=x, follow=none)
        return x, self.settle(x, frame, data)

    def settle(self, x: Array, frame: Frame, data: RowData) -> Frame:
        """The frame with the mode that belongs to x, searched from its own."""
        point = self.split(x, data)
        factors = block_factors(point.theta, self.layout, frame.order)
        inner, left = find_modes(
            point.beta, factors, point.psi, frame.inner, data, self.layout, self.family
        )
        return frame._replace(inner=inner, left=left)

    # ---- the pieces of (1) and (2) ---------------------------------------------------

    def _parts(self, x: Array, inner: Inner, frame: Frame, data: RowData):
        """Point, Lambda of every block, linear predictors (n, R)."""
        point = self.at(x, inner, data)
        factors = block_factors(point.theta, self.layout, frame.order)
        b = effects(inner.u, factors)
        return point, factors, linear_predictors(point.beta, b, data, self.layout)

    def _gradient(self, x: Array, inner: Inner, frame: Frame, data: RowData) -> Inner:
        """The gradient g of what the mode minimizes."""
        point, factors, eta = self._parts(x, inner, frame, data)
        score = row_scores(eta, point.psi, data, self.family)
        return gradient(inner, score, factors, data, self.layout)

    def _curvature(self, x, inner, frame, data) -> tuple[Curvature, tuple[Array, ...]]:
        """M from the observed information, and the factors."""
        point, factors, eta = self._parts(x, inner, frame, data)
        W = row_terms(eta, point.psi, data, self.family).W
        return curved(W, factors, data, self.layout, self.reml), factors

    def _value(
        self, x: Array, inner: Inner, frame: Frame, data: RowData
    ) -> tuple[Array, Curvature]:
        """F of (1), (), and the curvature in its determinant."""
        point, factors, eta = self._parts(x, inner, frame, data)
        terms = row_terms(eta, point.psi, data, self.family)
        W = terms.W
        if self.expected:
            W = row_terms(eta, point.psi, data, self.family, expected=True).W
        at = curved(W, factors, data, self.layout, self.reml)
        square = sum(jnp.sum(v**2) for v in inner.u)
        value = -2.0 * (terms.value + data.base) + square + at.logdet
        if self.n_quad > 1:
            own = curvature(W, data, self.layout).own[0]
            value = value + quadrature_correction(
                inner.u[0], factors[0], eta, point.psi, own, data, self.layout,
                self.family, self.n_quad,
            )  # fmt: skip
        return value + self.value_of_x(x, frame, data), at

    def value_of_x(self, x: Array, frame: Frame, data: RowData) -> Array:
        """What F has of x alone, (): a prior, and columns that hold nothing."""
        point = self.split(x, data)
        # these have coefficients of zero
        beta = jnp.concatenate(point.beta)
        first = data.X[0].shape[1] if self.reml else 0
        value = jnp.sum(data.unused[first:] * beta**2)
        used = first - jnp.sum(data.unused[:first])
        value = value - used * jnp.log(2.0 * jnp.pi)
        if self.prior is not None:
            point = self.at(x, frame.inner, data)
            theta = canonical(point.theta, frame.order, self.layout)
            users = in_user_units(point._replace(theta=theta), data.units)
            value = value - 2.0 * jnp.reshape(self.prior(users), ())
        return value

    # ---- derivatives -----------------------------------------------------------------

    def derivatives(self, data: RowData):
        """Value, gradient and Hessian in x by (3)."""
        if self.n_quad == 1 and not self.expected:

            def written_out(x, frame):
                *out, follow = value_grad_hess(self, x, frame, data)
                return *out, frame._replace(at=x, follow=follow)

            return written_out, None
        layout = self.layout

        def fn(x, frame):
            v0 = frame.inner

            def first(x, v):
                fn = jax.value_and_grad(self._value, (0, 1), has_aux=True)
                value, slopes = fn(x, v, frame, data)
                return slopes, value

            linearized = jax.linearize(first, x, v0, has_aux=True)
            (F_x, F_v), second, (value, at) = linearized
            factors = block_factors(self.split(x, data).theta, layout, frame.order)
            if self.expected:
                at, _ = self._curvature(x, v0, frame, data)

            def solve(v):
                return solve_inner(v, at, factors, data, layout)

            multiplier = solve(F_v)

            def along(x, v):
                return inner_dot(multiplier, self._gradient(x, v, frame, data))

            (g_x, _), second_g = jax.linearize(jax.grad(along, (0, 1)), x, v0)
            _, moved = jax.linearize(lambda x: self._gradient(x, v0, frame, data), x)

            def column(e):
                follow = jax.tree.map(jnp.negative, solve(moved(e)))
                change = jax.tree.map(
                    jnp.subtract, second(e, follow), second_g(e, follow)
                )
                return follow, *change

            follow, by_x, by_v = jax.vmap(column)(jnp.eye(x.shape[0], dtype=x.dtype))
            hess = by_x + gram(follow, by_v)
            frame = frame._replace(at=x, follow=follow)
            return value, F_x - g_x, 0.5 * (hess + hess.T), frame

        return fn, None

    def objective(self, x: Array, frame: Frame, data: RowData) -> Array:
        """-2 log L by (2); differentiable three times in x and data."""
        x0, data0, v0 = lax.stop_gradient(x), constant(data), constant(frame.inner)
        at, factors = self._curvature(x0, v0, frame, data0)
        slope, _ = jax.grad(self._value, 1, has_aux=True)(x0, v0, frame, data0)
        multiplier = constant(solve_inner(slope, at, factors, data0, self.layout))
        v1 = self.mode(x, frame, data)
        left = inner_dot(multiplier, self._gradient(x, v1, frame, data))
        return self._value(x, v1, frame, data)[0] - left

    def mode(self, x: Array, frame: Frame, data: RowData) -> Inner:
        """The mode v2 of (2), which may be differentiated twice."""
        x0, data0, v = lax.stop_gradient(x), constant(data), constant(frame.inner)
        at, factors = self._curvature(x0, v, frame, data0)
        for _ in range(2):
            g = self._gradient(x, v, frame, data)
            step = solve_inner(g, at, factors, data0, self.layout)
            v = jax.tree.map(jnp.subtract, v, step)
        return v


def _predicted(x: Array, frame: Frame) -> Inner:
    """The mode at x to first order in a short step, and else where it was."""
    step = x - frame.at
    step = jnp.where(jnp.sum(step**2) <= 1.0, step, 0.0)
    return jax.tree.map(
        lambda v, slope: v + jnp.tensordot(step, slope, axes=1),
        frame.inner,
        frame.follow,
    )


def _turned(u: Effects, turns, layout: Layout) -> Effects:
    """Spherical effects (J, K) of every block in the new coordinates of its terms."""
    out = []
    for block, v in zip(layout.blocks, u):
        parts, start = [], 0
        for t in block.terms:
            part = v[:, start : start + layout.term_k[t]]
            parts.append(part if turns[t] is None else part @ turns[t])
            start += layout.term_k[t]
        out.append(jnp.concatenate(parts, axis=1) if parts[1:] else parts[0])
    return tuple(out)


def in_user_units(point: Point, units) -> Params:
    """Inner parameters (theta canonical) as the user's; the identity where no units."""
    beta, theta = point.beta, point.theta
    if units is not None:
        beta = tuple(T @ c for T, c in zip(units.T, beta))
        theta = units.maps.theta_back @ theta
    one = jnp.ones((), theta.dtype)
    return Params(beta[0], theta, one, point.psi, beta[1:])


def n_theta(layout: Layout) -> int:
    """Number of covariance parameters m."""
    terms = zip(layout.term_k, layout.structures)
    return sum(structure(name).n_theta(k) for k, name in terms)


def constant(tree):
    """Arrays without derivatives."""

    def stop(x):
        return lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(stop, tree)
