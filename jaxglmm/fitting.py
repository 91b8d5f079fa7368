"""The functional door: ``fit(design)`` for ``jit``, ``vmap`` and ``grad``.

    cross-products -> theta by Newton on the profiled criterion -> everything else

theta, in the coordinates x of coordinates.py, solves grad f(x, data) = 0. Its
derivative comes from that equation, not from the iterations: with H the Hessian of f,

    d x = -H^+ d_data(grad f),                                                     (1)

where H^+ leaves directions without curvature alone: a flat direction is held fixed. At
a boundary (a zero variance) the gradient's dependence on the data vanishes, because f
is even in the columns of Lambda, so (1) holds those parameters at the boundary too.
Equation (1) is itself differentiable, which makes second derivatives exact where the
optimum is regular.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.coordinates import (
    block_factors,
    canonical,
    derivatives_in_theta,
    first_order,
    repivot,
)
from jaxglmm.crossed import applies, crossed_value_grad_hess
from jaxglmm.crossproducts import CrossProducts, Units, cross_products
from jaxglmm.designs import Design, check_design
from jaxglmm.elimination import conditional_modes, split_terms
from jaxglmm.errors import NoticeWarning, Status
from jaxglmm.families import Family, family_by_name
from jaxglmm.linalg import spd_inverse
from jaxglmm.lmm import log_likelihood, profile, profiled_objective
from jaxglmm.optimize import Minimum, minimize
from jaxglmm.plan import Layout
from jaxglmm.results import Fit, Params, check_params
from jaxglmm.starts import default_start
from jaxglmm.typing import Array

__all__ = ["Control", "fit", "loglik"]

_LARGE_TOL = 1e-8  # Newton decrement for large crossed designs: 1e-4 standard errors
_FARTHEST = 1e3  # starts beyond this relative standard deviation are moved to it
_SINGULAR = 1e-4  # a diagonal of Lambda below this counts as zero, as in lme4


@dataclass(frozen=True)
class Control:
    """How to optimize.

    Parameters
    ----------
    optimizer : str or optax.GradientTransformation
        ``"newton"`` (default; trust radius, exact Hessian), ``"lbfgs"``, the name of
        another optax optimizer such as ``"adam"``, or an optax transformation.
    max_iter : int, optional
        Largest number of evaluations; 50 for Newton, 500 for L-BFGS, 5,000 otherwise.
    tol : float, optional
        Newton: decrement grad' hess^-1 grad at which to stop, eps^0.8 by default (1e-8
        for large crossed designs). optax: largest gradient element over the objective
        at which to stop, eps^0.6 by default; the verdict asks for a decrement of 1e-8
        (or of tol, where that is larger).
    learning_rate : float, optional
        For an optax optimizer given by name; L-BFGS finds its own when left out.

    Raises
    ------
    ValueError
        For a limit that is not positive, or a learning rate that nothing would use.
    """

    optimizer: Any = "newton"
    max_iter: int | None = None
    tol: float | None = None
    learning_rate: float | None = None

    def __post_init__(self):
        for name, kind in (("max_iter", int), ("tol", float), ("learning_rate", float)):
            value = getattr(self, name)
            if value is None:
                continue
            number = kind(value) if np.ndim(value) == 0 else -1
            if not number > 0 or number != value:
                what = "a positive integer" if kind is int else "a positive number"
                raise ValueError(f"Control: {name} must be {what}; found {value!r}")
            object.__setattr__(self, name, number)
        named = isinstance(self.optimizer, str) and self.optimizer != "newton"
        if self.learning_rate is not None and not named:
            raise ValueError(
                "Control: learning_rate is for an optax optimizer given by name; "
                f"{self.optimizer!r} does not use it"
            )


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


def fit(
    design: Design,
    family: str | Family | None = None,
    method: str | None = None,
    *,
    start: Array | None = None,
    control: Control | None = None,
) -> Fit:
    """Fit a mixed model; pure, so it can be jitted, mapped and differentiated.

    Parameters
    ----------
    design : Design
        See :func:`jaxglmm.design` and :class:`jaxglmm.Design`. Results have its dtype.
    family : str or Family, optional
        Gaussian by default.
    method : {"REML", "ML"}, optional
        REML by default for Gaussian models.
    start : Array, (m,), optional
        Starting theta; by default every standard deviation equals sigma in effect.
    control : Control, optional
        Optimizer and its limits.

    Returns
    -------
    Fit
        With a status per lane; nothing is raised for a fit that does not converge.

    Raises
    ------
    ValueError
        For an unknown family, method or optimizer.

    Notes
    -----
    Derivatives through ``fit`` use the implicit function theorem. Parameters on the
    boundary and directions that the data do not identify are held fixed.

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> with jax.enable_x64(True):
    ...     design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    ...     round(float(jax.jit(jg.fit)(design).objective), 4)
    319.6543
    """
    family_by_name(family)
    return _fit(as_float(design), reml_flag(method), start, control or Control())


@functools.partial(jax.jit, static_argnums=3)
def _fit(design: Design, reml, start, control: Control) -> Fit:
    cp, units = cross_products(design)
    theta0 = start_theta(design.layout, units, start, design.y.dtype)
    raw = estimate(cp, design.layout, reml, theta0, control)
    return to_user_units(raw, units)


def reml_flag(method: str | None) -> float:
    """1.0 for REML (the default), 0.0 for ML."""
    name = "REML" if method is None else method
    if name not in ("REML", "ML"):
        raise ValueError(
            f"unknown method {method!r} for a Gaussian model; use 'REML' or 'ML'"
        )
    return float(name == "REML")


def as_float(design: Design) -> Design:
    """Design with floating arrays of one dtype; speaks up once about float32."""
    check_design(design)
    given = [design.y, design.X, *(t.z for t in design.terms)]
    given += [a for a in (design.weights, design.offset) if a is not None]
    dtype = common_dtype(given)
    if dtype == np.float32:
        _warn_float32()

    def cast(a):
        return None if a is None else jnp.asarray(a, dtype)

    terms = tuple(
        type(t)(cast(t.z), jnp.asarray(t.group, jnp.int32), t.n_levels, t.structure)
        for t in design.terms
    )
    return Design(
        cast(design.y), cast(design.X), terms, cast(design.weights),
        cast(design.offset), design.plan,
    )  # fmt: skip


def common_dtype(arrays: list[Array]) -> np.dtype:
    """The widest floating dtype among arrays, as JAX is configured."""
    floats = [a.dtype for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    widest = functools.reduce(np.promote_types, floats, np.dtype(np.float32))
    if not floats:
        widest = np.dtype(np.float64)
    return jax.dtypes.canonicalize_dtype(widest)


@functools.cache
def _warn_float32() -> None:
    warnings.warn(
        "fitting in float32: expect about 3 correct digits. For float64 put the call "
        "inside `with jax.enable_x64(True):` and give float64 arrays.",
        NoticeWarning,
        stacklevel=4,
    )


def start_theta(layout: Layout, units: Units, start, dtype) -> Array:
    """Starting theta in inner units."""
    if start is not None:
        given = jnp.asarray(start, dtype)
        m = units.theta_scale.shape[0]
        if given.shape != (m,):
            raise ValueError(f"start must have shape ({m},); found {given.shape}")
        return jnp.clip(given * units.theta_scale, -_FARTHEST, _FARTHEST)
    return jnp.asarray(default_start(layout), dtype)


def estimate(
    cp: CrossProducts, layout: Layout, reml, theta0: Array, control: Control
) -> Raw:
    """Fit from cross-products alone; the one program behind both doors."""
    reml = jnp.asarray(reml, cp.gram.dtype)
    minimum = _solve(layout, control, cp, reml, theta0)
    theta = canonical(minimum.x, minimum.frame, layout)
    factors = block_factors(theta, layout)
    at, done = profile(factors, cp, layout, reml)
    b, u = conditional_modes(factors, done, at.beta, cp, layout)
    minimum = lax.stop_gradient(minimum)
    grad, hess = derivatives_in_theta(
        lax.stop_gradient(theta), minimum.x, minimum.frame, layout, minimum.grad,
        minimum.hess,
    )  # fmt: skip
    status, is_singular = _verdict(minimum, factors, at.sigma2)
    return Raw(
        minimum, grad, hess, theta, at.beta, at.gls, at.sigma2, at.objective,
        split_terms(u, layout), split_terms(b, layout), status, is_singular,
    )  # fmt: skip


# ---- the optimum, and its derivative by equation (1) -------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solve(layout: Layout, control: Control, cp, reml, theta0) -> Minimum:
    def objective(x, order):
        return profiled_objective(x, cp, layout, reml, order)

    options: dict[str, Any] = {
        "frame": first_order(layout, theta0.dtype),
        "reframe": lambda x, order: repivot(x, order, layout),
    }
    if applies(cp, layout):
        fn = crossed_value_grad_hess(cp, layout, reml)
        return minimize(objective, theta0, control, fn, tol=_LARGE_TOL, **options)
    return minimize(objective, theta0, control, **options)


@_solve.defjvp
def _solve_jvp(layout, control, primals, tangents):
    cp, reml, theta0 = primals
    d_cp, d_reml, _ = tangents
    out = _solve(layout, control, cp, reml, theta0)
    x, order = out.x, out.frame

    def gradient(cp, reml):
        return jax.grad(profiled_objective)(x, cp, layout, reml, order)

    _, d_gradient = jax.jvp(gradient, (cp, reml), (d_cp, d_reml))
    H = jax.hessian(profiled_objective)(x, cp, layout, reml, order)
    P = jnp.eye(H.shape[0], dtype=H.dtype) - lax.stop_gradient(out.flat)
    regular = P @ H @ P + (jnp.eye(P.shape[0], dtype=P.dtype) - P)
    d_x = -P @ (spd_inverse(regular)[0] @ (P @ d_gradient))
    # only x is differentiated: whatever else a fit returns is made from it anew
    return out, jax.tree.map(_zero_tangent, out)._replace(x=d_x)


def _zero_tangent(x):
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


# ---- boundary and units ------------------------------------------------------------


def _verdict(
    minimum: Minimum, factors: tuple[Array, ...], sigma2: Array
) -> tuple[Array, Array]:
    """Status with the boundary told from an inner optimum, and singularity.

    Random effects that reproduce the response make the likelihood unbounded; where
    sigma^2, relative to the response, is the rounding of cross-products, the largest
    value found is no optimum.
    """
    singular = jnp.zeros((), bool)
    for Lam in factors:
        singular = singular | jnp.any(jnp.abs(jnp.diagonal(Lam)) < _SINGULAR)
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
    scale = units.theta_scale
    vcov = raw.sigma2 * units.s**2 * (units.T @ raw.gls @ units.T.T)
    b = tuple(units.s * v / z[None] for v, z in zip(raw.b, units.z_scale))
    ok = (raw.status == int(Status.CONVERGED)) | (raw.status == int(Status.BOUNDARY))
    aliased = (units.aliased.sum() > 0) & ok & ~units.exact
    dtype = raw.status.dtype
    gap = (int(Status.NOT_IDENTIFIED) - raw.status) * aliased.astype(dtype)
    gap = gap + (int(Status.NONFINITE) - raw.status) * units.exact.astype(dtype)
    return Fit(
        params=Params(beta=beta, theta=raw.theta / units.theta_scale, sigma=sigma),
        u=tuple(units.s * units.w_scale**0.5 * v for v in raw.u),
        b=b,
        loglik=-0.5 * raw.objective,
        objective=raw.objective,
        grad=raw.grad * scale,
        hess=raw.hess * scale[:, None] * scale[None, :],
        vcov_beta=vcov,
        status=raw.status + gap,
        converged=ok & ~aliased & ~units.exact,
        is_singular=raw.is_singular,
        decrement=raw.minimum.decrement,
        min_eigenvalue=raw.minimum.min_eigenvalue,
        n_iter=raw.minimum.n_iter,
    )


# ---- the likelihood at given parameters --------------------------------------------


def loglik(
    params: Params,
    design: Design,
    family: str | Family | None = None,
    method: str | None = None,
) -> Array:
    """Log L with every constant at any parameters; pure.

    Parameters
    ----------
    params : Params
        In the user's units. With ``method="REML"`` beta is integrated out.
    design : Design
    family : str or Family, optional
    method : {"REML", "ML"}, optional

    Returns
    -------
    Array, ()

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> with jax.enable_x64(True):
    ...     design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    ...     res = jg.fit(design)
    ...     bool(abs(jg.loglik(res.params, design) - res.loglik) < 1e-9)
    True
    """
    family_by_name(family)
    design = as_float(design)
    check_params(params, design)
    return _loglik(params, design, reml_flag(method))


@jax.jit
def _loglik(params: Params, design: Design, reml) -> Array:
    # at beta the mean is zero for y - X beta, whatever the rank of X
    dtype = design.y.dtype
    mean = design.X @ jnp.asarray(params.beta, dtype)
    cp, units = cross_products(design.replace(y=design.y - mean))
    theta = jnp.asarray(params.theta, dtype) * units.theta_scale
    sigma = params.sigma / units.s / units.w_scale**0.5
    reml = jnp.asarray(reml, dtype)
    return log_likelihood(theta, -units.b / units.s, sigma, cp, design.layout, reml)
