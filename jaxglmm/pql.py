"""Penalized quasi-likelihood: a linear mixed model fitted again and again.

At linear predictors eta with mean mu and variance phi V(mu) / w of the response, let

    z = eta + (y - mu) / mu',         W = w mu'^2 / V(mu)                           (1)
    z = offset + X beta + Z b + e,    e ~ N(0, phi W^-1),   b ~ N(0, Lambda Lambda')

This working model is linear: theta by ML or REML, then beta and b by Henderson's
equations, give the next eta, until eta stays where it is. phi is 1 where the family
has no dispersion and estimated as the working model's residual variance where it has.

There is no likelihood behind it: ``loglik`` is not a number, and ``objective`` is the
working model's -2 log L at the fixed point. Variances of few or rare events are
underestimated (Breslow and Lin 1995); the Laplace approximation is the remedy.

References: Breslow and Clayton (1993), JASA 88, doi:10.2307/2290687; Schall (1991),
Biometrika 78(4), doi:10.1093/biomet/78.4.719.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.control import Control
from jaxglmm.crossproducts import codes_fit, cross_products
from jaxglmm.designs import Design
from jaxglmm.errors import Status
from jaxglmm.families import Family
from jaxglmm.families.checks import in_range
from jaxglmm.linear import estimate, to_user_units
from jaxglmm.results import Fit
from jaxglmm.simulation import linear_predictor
from jaxglmm.starts import default_start
from jaxglmm.typing import Array

__all__ = ["check_pql", "fit_pql"]

_MAX_ROUNDS = 200
_SCALES = {("phi",): 1.0, ("sigma",): 2.0}  # phi = exp(psi times this)


def check_pql(family: Family) -> None:
    """Refuse families that are no generalized linear model.

    Raises
    ------
    ValueError
        Saying what to use instead.
    """
    own = tuple(family.own_names)
    glm = own == () or (own in _SCALES and family.weights_role == "precision")
    if family.n_eta > 1 or not glm or not family.has_information:
        raise ValueError(
            f"method='PQL' needs a mean, a variance and at most a dispersion, as "
            f"binomial, poisson, gaussian, gamma and inverse_gaussian have; family "
            f"{family.name!r} is of another kind. Use method='Laplace'."
        )


class _Round(NamedTuple):
    fit: Fit
    eta: Array
    change: Array
    n: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 3))
def fit_pql(
    design: Design, family: Family, start: Array | None, control: Control
) -> Fit:
    """Fit a design by PQL; every array may be traced.

    Raises
    ------
    TypeError
        Where it is differentiated: it is no optimum of anything.
    """
    dtype = design.y.dtype
    w = jnp.ones_like(design.y) if design.weights is None else design.weights
    wrong = (w < 0) | ~codes_fit(design.terms) | ~in_range(design.y, family.support)
    w = jnp.where(wrong & (w != 0), jnp.nan, w)
    used = w != 0
    y = jnp.where(used, design.y, design.y[jnp.argmax(used)])
    psi = jnp.zeros(family.n_own, dtype)
    reml = jnp.asarray(control.working_model == "REML", dtype)
    sigma2 = None if family.n_own else jnp.ones((), dtype)
    if start is None:
        start = jnp.asarray(default_start(design.layout), dtype)
    offset = jnp.zeros_like(y) if design.offset is None else design.offset
    tol = float(jnp.finfo(dtype).eps) ** 0.6

    def working(eta):
        def row(e, y, w):
            mu, slope = jax.value_and_grad(lambda e: family.mu(e[None], psi))(e)
            return (y - mu) / slope, family.expected_information(e[None], psi, w)

        rest, W = jax.vmap(row)(eta, y, jnp.where(used, w, 1.0))
        return eta + rest, jnp.where(used, jnp.maximum(W, 0.0), 0.0)

    def fit_at(eta: Array, theta: Array) -> tuple[Fit, Array]:
        z, W = working(eta)
        cp, units = cross_products(design.replace(y=z, weights=W))
        theta0 = units.maps.theta @ theta
        scale = None if sigma2 is None else sigma2 / (units.s**2 * units.w_scale)
        raw = estimate(cp, design.layout, reml, theta0, control, scale)
        return to_user_units(raw, units), W

    eta = jax.vmap(family.eta_start)(y, jnp.where(used, w, 1.0))
    eta = jnp.where(used, eta, offset)
    shapes, _ = jax.eval_shape(fit_at, eta, start)
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    far = jnp.asarray(jnp.inf, dtype)
    first = _Round(blank, eta, far, jnp.zeros((), jnp.int32))

    def going(s: _Round) -> Array:
        fine = jnp.isfinite(s.change) | (s.n == 0)
        return (s.change > tol) & fine & (s.n < _MAX_ROUNDS)

    def body(s: _Round) -> _Round:
        theta = jnp.where(s.n == 0, start, s.fit.params.theta)
        fit, W = fit_at(s.eta, theta)
        eta = linear_predictor(fit.params, design, fit.b)
        change = jnp.sqrt(jnp.sum(W * (eta - s.eta) ** 2) / jnp.sum(used.astype(dtype)))
        return _Round(fit, eta, change, s.n + 1)

    last = lax.while_loop(going, body, first)
    return _finish(last, family, tol)


@fit_pql.defjvp
def _fit_pql_jvp(family, control, primals, tangents):
    raise TypeError(
        "derivatives through a PQL fit are not available, as it is no optimum; use "
        "method='Laplace'"
    )


def _finish(last: _Round, family: Family, tol: float) -> Fit:
    """The working model's fit in the words of a generalized model."""
    fit, params = last.fit, last.fit.params
    status = fit.status
    status = jnp.where(last.change > tol, int(Status.MAX_ITER), status)
    lost = ~jnp.isfinite(last.change)
    status = jnp.where(lost, int(Status.NONFINITE), status).astype(jnp.int32)
    psi, theta = jnp.zeros(0, params.beta.dtype), params.theta
    u = fit.u
    if family.n_own:  # theta relative to sigma becomes one on the link scale
        psi = 2.0 * jnp.log(params.sigma)[None] / _SCALES[tuple(family.own_names)]
        theta = theta * params.sigma
        u = tuple(v / params.sigma for v in u)
    one = jnp.ones_like(params.sigma)
    ok = (status == int(Status.CONVERGED)) | (status == int(Status.BOUNDARY))
    n_all = params.beta.shape[0] + theta.shape[0] + psi.shape[0]
    p = params.beta.shape[0]
    vcov = jnp.full((n_all, n_all), jnp.nan, one.dtype)
    return Fit(
        params=params.replace(theta=theta, sigma=one, psi=psi),
        u=u,
        b=fit.b,
        loglik=jnp.full_like(one, jnp.nan),
        objective=fit.objective,
        grad=fit.grad,
        hess=fit.hess,
        vcov_beta=fit.vcov_beta,
        vcov=vcov.at[:p, :p].set(fit.vcov_beta),
        status=status,
        converged=ok,
        is_singular=fit.is_singular,
        decrement=fit.decrement,
        min_eigenvalue=fit.min_eigenvalue,
        n_iter=last.n,
    )
