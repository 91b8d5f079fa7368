"""Generalized models: rows in inner units -> Newton on x -> everything else.

x = (beta, theta, psi): the fixed effects of every linear predictor, the covariance
parameters, the family's own parameters, all estimated jointly. Inside, columns of X are
whitened (X T has unit Gram matrix) and so are those of z (crossproducts.py), so that
a step of one is a step of one in the linear predictor; what comes back is in the user's
units:

    beta = T beta~,     theta = S^-1 theta~,     H = J' H~ J,   J = dx~/dx.

The covariance of all parameters is 2 H^-1, H being the Hessian of -2 log L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.control import Control
from jaxglmm.coordinates import (
    block_factors,
    canonical,
    jacobian_in_theta,
    jacobian_of_theta,
)
from jaxglmm.crossproducts import (
    Maps,
    block_diagonal,
    codes_fit,
    effect_maps,
    whitening,
)
from jaxglmm.designs import Design
from jaxglmm.elimination import conditional_covariances, eliminate, split_terms
from jaxglmm.errors import Status
from jaxglmm.families import Family
from jaxglmm.families.checks import in_range
from jaxglmm.glmstarts import Start, first_point, link_of_response, near_response
from jaxglmm.implicit import projected_inverse, solve
from jaxglmm.laplace import GeneralizedModel, Point, constant, n_theta
from jaxglmm.linear import is_singular
from jaxglmm.modes import (
    Inner,
    RowData,
    curvature,
    effects,
    gather,
    linear_predictors,
    row_scores,
    row_terms,
)
from jaxglmm.optimize import Minimum
from jaxglmm.results import Fit, Params
from jaxglmm.rowsums import block_columns
from jaxglmm.typing import Array

__all__ = [
    "GeneralizedRaw",
    "Scales",
    "estimate_rows",
    "fit_rows",
    "log_lik_rows",
    "mode_covariances",
]


_FAR = 4.0  # on the scale of psi and of linear predictors: e^4 is far from anything


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scales:
    """How inner parameters turn into the user's.

    ``T[r]`` (p_r, p_r) and its inverse for every predictor, ``maps`` for the random
    effects; ``aliased`` (p,) marks columns of any X that depend linearly on earlier
    ones.
    """

    T: tuple[Array, ...]
    T_inv: tuple[Array, ...]
    maps: Maps
    aliased: Array


class How(NamedTuple):
    """What to maximize: log L by Laplace, or something else.

    ``n_quad``: nodes per effect, 1 for Laplace; ``reml``: whether the first beta is
    integrated out; ``prior``: a function of Params that is added to log L.
    """

    n_quad: int = 1
    reml: bool = False
    prior: Callable[[Params], Array] | None = None


class GeneralizedRaw(NamedTuple):
    """A fit in inner units, everything in canonical theta."""

    point: Point
    objective: Array
    grad: Array
    hess: Array
    cov: Array
    u: tuple[Array, ...]
    b: tuple[Array, ...]
    status: Array
    is_singular: Array
    decrement: Array
    min_eigenvalue: Array
    n_iter: Array


# ---- rows --------------------------------------------------------------------------


def _used_rows(design: Design) -> tuple[Array, Array, list[Array], list[Array]]:
    """Y and w, X of every predictor and z of every term; rows of weight zero emptied.

    A negative weight or a code out of range makes the likelihood not finite.
    """
    y, Xs, z = design.y, [design.X, *(p.X for p in design.others)], design.terms
    w = jnp.ones_like(y) if design.weights is None else design.weights
    w = jnp.where((w < 0) | ~codes_fit(design.terms), jnp.nan, w)
    unused = w == 0
    y = jnp.where(unused, y[jnp.argmax(~unused)], y)

    def emptied(v):
        return jnp.where(unused[:, None], 0.0, v)

    return y, w, [emptied(X) for X in Xs], [emptied(t.z) for t in z]


def _offsets(design: Design) -> tuple[Array, ...]:
    given = [design.offset, *(p.offset for p in design.others)]
    zero = jnp.zeros_like(design.y)
    unused = zero > 0 if design.weights is None else design.weights == 0
    return tuple(zero if o is None else jnp.where(unused, 0.0, o) for o in given)


def _row_data(design: Design, family: Family, y, w, Xs, z, unused: Array) -> RowData:
    layout, plan = design.layout, design.plan
    assert plan is not None
    codes = tuple(design.terms[b.terms[0]].group for b in layout.blocks)
    columns = tuple(block_columns(layout, z, jnp))
    # a response that the family does not have makes the likelihood not finite
    base = jnp.sum(jax.vmap(family.log_base)(y, w))
    base = jnp.where(jnp.all(in_range(y, family.support)), base, jnp.nan)
    return RowData(
        y, w, tuple(Xs), _offsets(design), columns, codes, plan.parents, plan.pairs,
        base, unused,
    )  # fmt: skip


def user_rows(design: Design, family: Family) -> RowData:
    """Rows in the user's own units."""
    y, w, Xs, z = _used_rows(design)
    width = sum(X.shape[1] for X in Xs)
    return _row_data(design, family, y, w, Xs, z, jnp.zeros(width, y.dtype))


def inner_rows(design: Design, family: Family) -> tuple[RowData, Scales]:
    """Rows in inner units, and the way back."""
    y, w, Xs, z = _used_rows(design)
    used = lax.stop_gradient(jnp.where(w > 0, 1.0, 0.0).astype(y.dtype))
    one = jnp.ones((), y.dtype)
    maps = effect_maps(design.terms, z, used, one, jnp)
    T, T_inv, aliased, whitened = [], [], [], []
    for X in Xs:
        to, missing, back = whitening(X, used, jnp)
        T.append(to)
        T_inv.append(back)
        aliased.append(missing)
        whitened.append(X @ to)
    scales = Scales(tuple(T), tuple(T_inv), maps, jnp.concatenate(aliased))
    z = [v @ to for v, to in zip(z, maps.z)]
    data = _row_data(design, family, y, w, whitened, z, scales.aliased)
    return dataclasses.replace(data, units=lax.stop_gradient(scales)), scales


def _model(design: Design, family, control: Control, how: How) -> GeneralizedModel:
    expected = control.information == "expected"
    return GeneralizedModel(design.layout, family, expected, *how)


# ---- the fit -----------------------------------------------------------------------


def fit_rows(
    design: Design,
    family: Family,
    start: Array | Params | None,
    control: Control,
    how: How,
    spare: Array | int = 0,
    max_iter: Array | None = None,
    gaps: bool = False,
) -> Fit:
    """Fit a design by Laplace or quadrature; every array may be traced.

    ``start`` is theta (m,), or Params whose parts are NaN where they are left open, if
    there may be such ``gaps``. ``spare`` counts columns of any X that are there for
    padding alone; ``max_iter`` () goes before the control's.
    """
    model = _model(design, family, control, how)
    data, scales = inner_rows(design, family)
    first = first_point(model, data, _given_point(start, scales, data), gaps)
    raw = estimate_rows(model, control, data, first, max_iter)
    fit = to_user_units(raw, scales, spare, how.reml)
    if how.prior is None:
        return fit
    return dataclasses.replace(
        fit, loglik=fit.loglik - jnp.reshape(how.prior(fit.params), ())
    )


def _given_point(
    start: Array | Params | None, scales: Scales, data: RowData
) -> Point | None:
    """The user's start in inner units; NaN for all but theta where that is all."""
    if start is None:
        return None
    dtype = data.y.dtype
    if not isinstance(start, Params):
        beta = tuple(jnp.full(len(T), jnp.nan, dtype) for T in scales.T)
        theta, psi = start, None
    else:
        parts = (start.beta, *start.others)
        beta = tuple(T @ jnp.asarray(c, dtype) for T, c in zip(scales.T_inv, parts))
        theta, psi = start.theta * start.sigma, start.psi
    psi = jnp.nan if psi is None else jnp.asarray(psi, dtype)
    return Point(beta, scales.maps.theta @ jnp.asarray(theta, dtype), psi)


def estimate_rows(
    model: GeneralizedModel,
    control: Control,
    data: RowData,
    start: Start,
    max_iter: Array | None = None,
) -> GeneralizedRaw:
    """Fit from rows in inner units; the one program behind both doors."""
    layout = model.layout
    beta0 = start.point.beta[0]

    def joined(point: Point) -> Array:
        first = point.beta[0][:0] if model.reml else point.beta[0]
        return model.join(point._replace(beta=(first, *point.beta[1:])))

    x0 = joined(start.point)
    frame0 = model.first_frame(x0, start.u, beta0)
    minimum = solve(model, control, data, x0, frame0, max_iter)
    mode = model.mode(minimum.x, minimum.frame, data)
    at = model.at(minimum.x, mode, data)
    b = effects(mode.u, block_factors(at.theta, layout, minimum.frame.order))
    theta = canonical(at.theta, minimum.frame.order, layout)
    factors = block_factors(theta, layout)
    # in the user's order of effects the mode is u = Lambda' Z's
    eta = linear_predictors(at.beta, b, data, layout)
    moved = gather(row_scores(eta, at.psi, data, model.family), data, layout)
    u = tuple(m @ Lam for m, Lam in zip(moved, factors))
    objective, minimum = minimum.value, lax.stop_gradient(minimum)
    J, J_inv = _jacobians(model, minimum, theta, data)
    out = data.X[0].shape[1] if model.reml else 0  # columns that are no part of x
    aliased = jnp.zeros(J.shape[0], J.dtype)
    aliased = aliased.at[: data.unused.shape[0] - out].set(data.unused[out:])
    flat = jnp.maximum(minimum.flat, jnp.diag(aliased))
    cov = 2.0 * projected_inverse(minimum.hess, flat)
    cov_user = J_inv @ cov @ J_inv.T
    if model.reml:
        cov_user = _with_integrated(model, minimum, cov, J_inv, cov_user, data)
    singular = is_singular(factors)
    inside = jax.vmap(model.family.is_inside)(eta) | (data.w == 0)
    status = _status(model, minimum, joined(start.usual), singular, data)
    outside = (status != int(Status.NONFINITE)) & ~jnp.all(inside)
    status = jnp.where(outside, jnp.int32(Status.OUTSIDE), status)
    return GeneralizedRaw(
        Point(at.beta, theta, at.psi), objective, minimum.grad @ J,
        J.T @ minimum.hess @ J, cov_user, split_terms(u, layout),
        split_terms(b, layout), status, singular, minimum.decrement,
        minimum.min_eigenvalue, minimum.n_iter,
    )  # fmt: skip


def _with_integrated(
    model: GeneralizedModel, minimum: Minimum, cov, J_inv, cov_user, data: RowData
) -> Array:
    """Covariance of (beta, x) where beta was integrated out with the effects.

    beta given x has variance T^-1 and follows x with slope D:
    Var beta = T^-1 + D Var(x) D', as random effects are treated elsewhere.
    """
    x, frame = minimum.x, minimum.frame
    at, _ = model._curvature(x, frame.inner, frame, data)
    D = jax.jacfwd(lambda x: model.mode(x, frame, data).beta)(x)
    used = 1.0 - data.unused[: D.shape[0]]
    own = at.T_inv * used[:, None] * used[None] + D @ cov @ D.T
    cross = D @ cov @ J_inv.T
    top = jnp.concatenate([own, cross], axis=1)
    return jnp.concatenate([top, jnp.concatenate([cross.T, cov_user], axis=1)])


def _jacobians(
    model: GeneralizedModel, minimum: Minimum, theta: Array, data: RowData
) -> tuple[Array, Array]:
    """D x~ / d (beta~, canonical theta~, psi), and the other way round.

    At Lambda = 0 they are no inverses of each other, and beta needs neither.
    """
    at, order = model.split(minimum.x, data), minimum.frame.order
    first = sum(c.shape[0] for c in at.beta)
    rows = slice(first, first + n_theta(model.layout))
    eye = jnp.eye(minimum.x.shape[0], dtype=minimum.x.dtype)
    inner = jacobian_in_theta(lax.stop_gradient(theta), at.theta, order, model.layout)
    outer = jacobian_of_theta(at.theta, order, model.layout)
    return eye.at[rows, rows].set(inner), eye.at[rows, rows].set(outer)


def _status(
    model: GeneralizedModel, minimum: Minimum, x0: Array, singular: Array, data: RowData
) -> Array:
    """How the fit ended.

    Where the likelihood is flat only in what the family has beside its mean, and the
    it lies far from the usual start x0, a simpler family is the answer; what stayed
    near that is not identified.
    """
    ended = minimum.status == int(Status.CONVERGED)
    status = jnp.where(ended & singular, int(Status.BOUNDARY), minimum.status)
    sizes = [c.shape[0] for c in model.split(minimum.x, data).beta]
    first = sizes[0] + sum(sizes[1:]) + n_theta(model.layout)
    beside = np.zeros(minimum.x.shape[0], bool)
    beside[first:] = True
    beside[sizes[0] : sum(sizes)] = True
    out = data.X[0].shape[1] - sizes[0]
    unused = jnp.zeros(minimum.x.shape[0], bool)
    unused = unused.at[: sum(sizes)].set(data.unused[out:] > 0)
    share = jnp.where(jnp.asarray(beside) | unused, 0.0, jnp.diagonal(minimum.flat))
    gone = jnp.where(jnp.asarray(beside), minimum.x - x0, 0.0)
    far = jnp.sum((minimum.flat @ gone) ** 2) > _FAR**2
    at_limit = (minimum.status == int(Status.NOT_IDENTIFIED)) & far
    at_limit = at_limit & jnp.all(share < 1e-6)
    if beside.any():
        status = jnp.where(at_limit, int(Status.LIMIT), status)
    lost = (ended | at_limit) & (minimum.frame.left > 1.0)
    return jnp.where(lost, int(Status.NO_MODE), status).astype(jnp.int32)


def to_user_units(
    raw: GeneralizedRaw, scales: Scales, spare: Array | int, reml: bool
) -> Fit:
    """Undo the inner units."""
    at = raw.point
    beta = tuple(T @ c for T, c in zip(scales.T, at.beta))
    in_x = slice(1, None) if reml else slice(None)
    J = _in_blocks(scales.T_inv[in_x], scales.maps.theta, raw.grad.shape[0])
    J_inv = _in_blocks(scales.T, scales.maps.theta_back, raw.cov.shape[0])
    cov = J_inv @ raw.cov @ J_inv.T
    p = beta[0].shape[0]
    objective = raw.objective
    if reml:
        objective = objective - 2.0 * _log_volume(scales)
    ok = _is_ok(raw.status)
    aliased = (
        scales.aliased.sum() > jnp.asarray(spare, dtype=scales.aliased.dtype)
    ) & ok
    status = jnp.where(aliased, int(Status.NOT_IDENTIFIED), raw.status)
    return Fit(
        params=Params(
            beta=beta[0], theta=scales.maps.theta_back @ at.theta,
            sigma=jnp.ones_like(raw.objective), psi=at.psi, others=beta[1:],
        ),
        u=raw.u,
        b=tuple(v @ T.T for v, T in zip(raw.b, scales.maps.z)),
        loglik=-0.5 * objective,
        objective=objective,
        grad=raw.grad @ J,
        hess=J.T @ raw.hess @ J,
        vcov_beta=cov[:p, :p],
        vcov=cov,
        status=status.astype(jnp.int32),
        converged=ok & ~aliased,
        is_singular=raw.is_singular,
        decrement=raw.decrement,
        min_eigenvalue=raw.min_eigenvalue,
        n_iter=raw.n_iter,
    )  # fmt: skip


def _log_volume(scales: Scales) -> Array:
    """Log of the volume that a unit of the first inner beta has in the user's units."""
    size = jnp.abs(jnp.diagonal(scales.T[0]))
    return jnp.sum(jnp.log(jnp.where(scales.aliased[: len(size)] > 0, 1.0, size)))


def _is_ok(status: Array) -> Array:
    good = [int(s) for s in Status if s.ok]
    return jnp.any(status == jnp.array(good, status.dtype))


def _in_blocks(parts: tuple[Array, ...], theta: Array, size: int) -> Array:
    """Block-diagonal matrix (size, size): per predictor, theta, ones for psi."""
    rest = size - sum(p.shape[0] for p in parts) - theta.shape[0]
    return block_diagonal([*parts, theta, jnp.eye(rest, dtype=theta.dtype)], jnp)


# ---- the likelihood at given parameters --------------------------------------------


def log_lik_rows(
    params: Params, design: Design, family: Family, control: Control, how: How
) -> Array:
    """Log L at any parameters in the user's units; NaN where no mode was found."""
    data, volume = user_rows(design, family), 0.0
    model = _model(design, family, control, how)
    dtype = data.y.dtype
    beta = tuple(jnp.asarray(c, dtype) for c in (params.beta, *params.others))
    theta = jnp.asarray(params.theta, dtype) * params.sigma
    psi = jnp.zeros(0, dtype) if params.psi is None else jnp.asarray(params.psi, dtype)
    if how.reml:  # collinear columns of X would make its determinant zero
        data, scales = inner_rows(design, family)
        volume = _log_volume(scales)
        beta = tuple(T_inv @ c for T_inv, c in zip(scales.T_inv, beta))
        theta = scales.maps.theta @ theta
        # the user's beta has no influence, so its mode is sought from a better one
        none = tuple(jnp.full_like(c, jnp.nan) for c in beta)
        start = first_point(model, data, Point(none, theta, psi))
        u, first = start.u, start.point.beta[0]
        beta = (beta[0][:0], *beta[1:])
    else:
        u, first = _first_effects(model, data, beta, theta), beta[0]
    x = model.join(Point(beta, theta, psi))
    fixed, at = constant(data), lax.stop_gradient(x)
    frame = model.first_frame(at, u, lax.stop_gradient(first))
    frame = model.settle(at, frame, fixed)
    value = volume - 0.5 * model.objective(x, frame, data)
    return jnp.where(frame.left > 1.0, jnp.nan, value)


def _first_effects(
    model: GeneralizedModel, data: RowData, beta: tuple[Array, ...], theta: Array
) -> tuple[Array, ...]:
    """Effects (J, K) of every block from which their mode is sought."""
    u = tuple(jnp.zeros((b.n_levels, b.k), theta.dtype) for b in model.layout.blocks)
    if not model.starts_near:
        return u
    data, beta, theta = (constant(t) for t in (data, beta, theta))
    eta = link_of_response(model.family, data)
    plain = Inner(u, beta[0][:0])
    return near_response(model, data, beta, theta, eta, plain).u


def mode_covariances(family: Family, design: Design, beta, theta, psi, b):
    """Var(b | y) at given parameters and modes b per term, (J, K, K) per block."""
    data, layout = user_rows(design, family), design.layout
    blocks = tuple(
        jnp.concatenate([b[t] for t in block.terms], axis=1) for block in layout.blocks
    )
    eta = linear_predictors(beta, blocks, data, layout)
    W = row_terms(eta, psi, data, family).W
    factors = block_factors(theta, layout)
    cp = curvature(W, data, layout)
    return conditional_covariances(factors, eliminate(factors, cp, layout), cp, layout)
