"""The Laplace approximation of a generalized model's likelihood, and its derivatives.

With the mode u of modes.py, which solves g(u) = 0 and has curvature M,

    -2 log L = -2 sum l_i(eta_i) + u'u + log|M|  =: F(x, u(x))                     (1)

(with quadrature F has another term, see quadrature.py) for x = (beta, theta, psi) and
any data. u(x) moves with x, and F is not stationary in u. Its derivatives of first and
second order are those of

    F(x, u1(x)) - lambda' g(x, u1(x)),     u1 = u0 - M0^-1 g(x, u0),
    lambda = M0^-1 dF/du at u0                                                     (2)

with u0, M0 and lambda constants: u1 follows the mode to first order, and what its
second derivative would add, lambda' (g_xx + 2 g_xu u' + g_uu u'u'), the second term
takes out. The value of (2) has the square of the error that is left in u0. So the
search for the mode is never differentiated, and (2) may be, twice, in anything.

References: Tierney and Kadane (1986), JASA 81, doi:10.2307/2287970; Kristensen et al.
(2016), J. Stat. Softw. 70(5), doi:10.18637/jss.v070.i05.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.coordinates import Order, block_factors, first_order, repivot
from jaxglmm.covariance import structure
from jaxglmm.elimination import Effects, eliminate
from jaxglmm.families import Family
from jaxglmm.modes import (
    RowData,
    curvature,
    effects,
    find_modes,
    gradient,
    linear_predictors,
    row_terms,
    solve_spherical,
)
from jaxglmm.plan import Layout
from jaxglmm.quadrature import quadrature_correction
from jaxglmm.typing import Array

__all__ = ["Frame", "GeneralizedModel", "Point", "constant", "n_theta"]


class Point(NamedTuple):
    """x taken apart: beta (p_r,) of every predictor, theta (m,), psi (n_own,)."""

    beta: tuple[Array, ...]
    theta: Array
    psi: Array


class Frame(NamedTuple):
    """What x means, the mode that belongs to it, and how much the mode lacks."""

    order: Order
    u: Effects
    left: Array


@dataclass(frozen=True)
class GeneralizedModel:
    """Static part of a generalized model; see :class:`RowData` for its arrays.

    ``expected``: expected information in the determinant; ``n_quad``: quadrature nodes
    per effect, 1 for Laplace.
    """

    layout: Layout
    family: Family
    expected: bool = False
    n_quad: int = 1

    def split(self, x: Array, data: RowData) -> Point:
        """Take x (beta, theta, psi) apart."""
        sizes = [X.shape[1] for X in data.X]
        beta, start = [], 0
        for size in sizes:
            beta.append(x[start : start + size])
            start += size
        m = n_theta(self.layout)
        return Point(tuple(beta), x[start : start + m], x[start + m :])

    def join(self, point: Point) -> Array:
        """X (beta, theta, psi)."""
        return jnp.concatenate([*point.beta, point.theta, point.psi])

    def first_frame(self, data: RowData) -> Frame:
        """Effects in the user's order, all at zero."""
        dtype = data.y.dtype
        u = tuple(jnp.zeros((b.n_levels, b.k), dtype) for b in self.layout.blocks)
        return Frame(first_order(self.layout, dtype), u, jnp.zeros((), dtype))

    def reframe(self, x: Array, frame: Frame, data: RowData) -> tuple[Array, Frame]:
        """Larger pivots first, and the mode found."""
        point = self.split(x, data)
        if self.n_quad > 1:  # the grid belongs to the user's order of effects
            return x, self.with_modes(x, frame, data)
        theta, order = repivot(point.theta, frame.order, self.layout)
        moved = jnp.zeros((), bool)
        for new, old in zip(order, frame.order):
            if new is not None and old is not None:
                moved = moved | jnp.any(new != old)
        u = tuple(jnp.where(moved, 0.0, v) for v in frame.u)
        x = self.join(point._replace(theta=theta))
        return x, self.with_modes(x, Frame(order, u, frame.left), data)

    def with_modes(self, x: Array, frame: Frame, data: RowData) -> Frame:
        """The frame with the mode that belongs to x, searched from its own."""
        at = self.split(x, data)
        factors = block_factors(at.theta, self.layout, frame.order)
        u, left = find_modes(
            at.beta, factors, at.psi, frame.u, data, self.layout, self.family
        )
        return Frame(frame.order, u, left)

    def derivatives(self, data: RowData):
        """None: the objective is differentiated."""
        return None, None

    def objective(self, x: Array, frame: Frame, data: RowData) -> Array:
        """-2 log L by (2); differentiable twice in x and data."""
        return self.evaluate(x, frame, data)[0]

    def evaluate(self, x: Array, frame: Frame, data: RowData) -> tuple[Array, Effects]:
        """-2 log L by (2), and the mode u1, which may be differentiated once."""
        layout = self.layout
        u0, x0, data0 = constant(frame.u), lax.stop_gradient(x), constant(data)

        def parts(x, data):
            point = self.split(x, data)
            return point, block_factors(point.theta, layout, frame.order)

        def value_and_gradient(x, u, data):
            point, factors = parts(x, data)
            eta = linear_predictors(point.beta, effects(u, factors), data, layout)
            terms = row_terms(eta, point.psi, data, self.family)
            W = terms.W
            if self.expected:
                W = row_terms(eta, point.psi, data, self.family, expected=True).W
            cp = curvature(W, data, layout)
            done = eliminate(factors, cp, layout)
            square = sum(jnp.sum(v**2) for v in u)
            value = -2.0 * terms.value + square + done.logdet
            if self.n_quad > 1:
                value = value + quadrature_correction(
                    u[0], factors[0], eta, point.psi, cp.own[0], data, layout,
                    self.family, self.n_quad,
                )  # fmt: skip
            return value, gradient(u, terms.score, factors, data, layout), terms.W

        # M0: from the observed information, also where the determinant has another
        point0, factors0 = parts(x0, data0)
        eta0 = linear_predictors(point0.beta, effects(u0, factors0), data0, layout)
        W0 = row_terms(eta0, point0.psi, data0, self.family).W
        done0 = eliminate(factors0, curvature(W0, data0, layout), layout)

        def solve(v):
            return solve_spherical(v, W0, done0, factors0, data0, layout)

        slope = jax.grad(lambda u: value_and_gradient(x0, u, data0)[0])(u0)
        multiplier = constant(solve(slope))
        # g(x, u0), with the derivative that moves the mode
        point, factors = parts(x, data)
        eta = linear_predictors(point.beta, effects(u0, factors), data, layout)
        score = row_terms(eta, point.psi, data, self.family).score
        g0 = gradient(u0, score, factors, data, layout)
        u1 = tuple(a - d for a, d in zip(u0, solve(g0)))
        value, g1, _ = value_and_gradient(x, u1, data)
        left = sum(jnp.sum(a * b) for a, b in zip(multiplier, g1))
        point = self.split(x, data)
        # columns that hold nothing have coefficients of zero
        unused = data.unused * jnp.concatenate(point.beta) ** 2
        return value - left + jnp.sum(unused), u1


def n_theta(layout: Layout) -> int:
    """Number of covariance parameters m."""
    terms = zip(layout.term_k, layout.structures)
    return sum(structure(name).n_theta(k) for k, name in terms)


def constant(tree):
    """Arrays without derivatives."""

    def stop(x):
        return lax.stop_gradient(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(stop, tree)
