"""Gaussian models: cross-products -> theta by Newton -> everything else.

The profiled criterion of lmm.py is minimized over theta alone; beta, sigma and the
random effects follow from it in closed form. One program serves both doors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxglmm.control import Control
from jaxglmm.coordinates import (
    Order,
    block_factors,
    canonical,
    first_order,
    jacobian_in_theta,
    repivot,
)
from jaxglmm.crossed import applies, crossed_value_grad_hess
from jaxglmm.crossproducts import CrossProducts, Units
from jaxglmm.elimination import conditional_modes, split_terms
from jaxglmm.errors import Status
from jaxglmm.implicit import solve
from jaxglmm.lmm import profile, profiled_objective
from jaxglmm.optimize import Minimum
from jaxglmm.plan import Layout
from jaxglmm.pooling import pool_levels
from jaxglmm.results import Fit, Params
from jaxglmm.starts import moment_start
from jaxglmm.typing import Array

__all__ = [
    "LinearModel",
    "Raw",
    "estimate",
    "is_singular",
    "rounding",
    "start_theta",
    "to_user_units",
]

_LARGE_TOL = 1e-8  # Newton decrement for large crossed designs: 1e-4 standard errors
_NESTED, _CROSSED = 2.0, 100.0  # rounding of the criterion by theta^2, as measured
_LARGE = 8.0  # relative standard deviations beyond this count by their logarithm
_SINGULAR = 1e-4  # a diagonal of Lambda below this counts as zero, as in lme4

Data = tuple[CrossProducts, Array, Array | None]


@dataclass(frozen=True)
class LinearModel:
    """The profiled criterion of (cross-products, reml, sigma^2 if it is known).

    x is theta, see coordinates.py.
    """

    layout: Layout

    def objective(self, x: Array, frame: Order, data: Data) -> Array:
        """-2 log L or the REML criterion, ()."""
        cp, reml, sigma2 = data
        return profiled_objective(x, cp, self.layout, reml, frame, sigma2)

    def settle(self, x: Array, frame: Order, data: Data) -> Order:
        """Nothing belongs to x but its order."""
        return frame

    def reframe(self, x: Array, frame: Order, data: Data) -> tuple[Array, Order]:
        """Larger pivots first."""
        return repivot(x, frame, self.layout)[:2]

    def scale(self, x: Array) -> Array:
        """Standard deviations of any size: relative changes of the large ones."""
        return jnp.maximum(1.0, jnp.abs(x) / _LARGE)

    def noise(self, x: Array, data: Data) -> Array:
        """Rounding of the criterion; see :func:`rounding`."""
        return rounding(x, data[0].n, self.layout)

    @property
    def radius(self) -> float:
        """How far from the start the optimizer may go at first."""
        return 2.0

    def derivatives(self, data: Data):
        """The closed form for large crossed designs."""
        cp, reml, sigma2 = data
        if not applies(cp, self.layout):
            return None, None
        return crossed_value_grad_hess(cp, self.layout, reml, sigma2), _LARGE_TOL


def rounding(theta: Array, n: Array, layout: Layout) -> Array:
    """How far cross-products let the criterion be off, ().

    The residual sum of squares is what is left of y'y, which in inner units is the
    residual variance times 1 + |theta|^2 or so. The system of crossed factors has a
    condition beyond that, of about the rows of a level.
    """
    worst = _CROSSED if layout.tail else _NESTED
    return n * float(jnp.finfo(theta.dtype).eps) * (1.0 + worst * (theta**2).sum())


class Raw(NamedTuple):
    """A fit in inner units, before :func:`to_user_units`.

    ``grad`` and ``hess`` are in theta; those of ``minimum`` in its own coordinates.
    """

    minimum: Minimum
    grad: Array
    hess: Array
    theta: Array
    beta: Array
    gls: Array
    sigma2: Array
    objective: Array
    u: tuple[Array, ...]
    b: tuple[Array, ...]
    status: Array
    is_singular: Array


def start_theta(cp: CrossProducts, layout: Layout, units: Units, start) -> Array:
    """Starting theta in inner units."""
    if start is not None:
        theta = start.theta if isinstance(start, Params) else start
        return units.maps.theta @ jnp.asarray(theta, cp.gram.dtype)
    return moment_start(cp, layout, jnp)


def estimate(
    cp: CrossProducts,
    layout: Layout,
    reml,
    theta0: Array,
    control: Control,
    sigma2: Array | None = None,
    max_iter: Array | None = None,
) -> Raw:
    """Fit from cross-products alone; the one program behind both doors.

    ``sigma2`` () in inner units where it is known; ``max_iter`` () goes before the
    control's.
    """
    reml = jnp.asarray(reml, cp.gram.dtype)
    order = first_order(layout, cp.gram.dtype)
    pooled, small = pool_levels(cp, layout)
    data = pooled, reml, sigma2
    minimum = solve(LinearModel(small), control, data, theta0, order, max_iter)
    theta = canonical(minimum.x, minimum.frame, layout)
    factors = block_factors(theta, layout)
    at, done = profile(factors, cp, layout, reml, sigma2)
    b, u = conditional_modes(factors, done, at.beta, cp, layout)
    minimum = lax.stop_gradient(minimum)
    J = jacobian_in_theta(lax.stop_gradient(theta), minimum.x, minimum.frame, layout)
    grad, hess = minimum.grad @ J, J.T @ minimum.hess @ J
    status, singular = _verdict(minimum, factors, at.sigma2)
    return Raw(
        minimum, grad, hess, theta, at.beta, at.gls, at.sigma2, at.objective,
        split_terms(u, layout), split_terms(b, layout), status, singular,
    )  # fmt: skip


def is_singular(factors: tuple[Array, ...]) -> Array:
    """Whether a diagonal of any Lambda is zero, to four digits of its unit."""
    singular = jnp.zeros((), bool)
    for Lam in factors:
        singular = singular | jnp.any(jnp.abs(jnp.diagonal(Lam)) < _SINGULAR)
    return singular


def _verdict(
    minimum: Minimum, factors: tuple[Array, ...], sigma2: Array
) -> tuple[Array, Array]:
    """Status with the boundary told from an inner optimum, and singularity.

    Random effects that reproduce the response make the likelihood unbounded; where
    sigma^2, relative to the response, is the rounding of cross-products, the largest
    value found is no optimum.
    """
    singular = is_singular(factors)
    status = minimum.status
    ended = status == int(Status.CONVERGED)
    status = jnp.where(ended & singular, int(Status.BOUNDARY), status)
    unbounded = ~(sigma2 > 100.0 * float(jnp.finfo(sigma2.dtype).eps))
    status = jnp.where(unbounded, int(Status.NONFINITE), status)
    return status.astype(jnp.int32), singular


def to_user_units(raw: Raw, units: Units) -> Fit:
    """Undo the inner units; works on JAX and on NumPy arrays alike."""
    sigma = units.s * (units.w_scale * raw.sigma2) ** 0.5
    beta = units.T @ (units.b + units.s * raw.beta)
    S = units.maps.theta
    vcov = raw.sigma2 * units.s**2 * (units.T @ raw.gls @ units.T.T)
    b = tuple(units.s * (v @ T.T) for v, T in zip(raw.b, units.maps.z))
    ok = (raw.status == int(Status.CONVERGED)) | (raw.status == int(Status.BOUNDARY))
    aliased = (units.aliased.sum() > 0) & ok & ~units.exact
    dtype = raw.status.dtype
    gap = (int(Status.NOT_IDENTIFIED) - raw.status) * aliased.astype(dtype)
    gap = gap + (int(Status.NONFINITE) - raw.status) * units.exact.astype(dtype)
    return Fit(
        params=Params(beta=beta, theta=units.maps.theta_back @ raw.theta, sigma=sigma),
        u=tuple(units.s * units.w_scale**0.5 * v for v in raw.u),
        b=b,
        loglik=-0.5 * raw.objective,
        objective=raw.objective,
        grad=raw.grad @ S,
        hess=S.T @ raw.hess @ S,
        vcov_beta=vcov,
        status=raw.status + gap,
        converged=ok & ~aliased & ~units.exact,
        is_singular=raw.is_singular,
        decrement=raw.minimum.decrement,
        min_eigenvalue=raw.minimum.min_eigenvalue,
        n_iter=raw.minimum.n_iter,
    )
