"""The functional door: ``fit(design)`` for ``jit``, ``vmap`` and ``grad``.

A Gaussian model with identity link is fitted by REML or ML on its profiled criterion,
see linear.py; any other, or a Gaussian one with ``method="Laplace"``, on all its
parameters together, see generalized.py. Derivatives through the fit come from the
equation that the optimum solves, see implicit.py.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.control import Control
from jaxglmm.crossproducts import cross_products
from jaxglmm.designs import Design, check_design
from jaxglmm.errors import DesignError, NoticeWarning
from jaxglmm.families import Family, family_by_name, is_linear
from jaxglmm.generalized import How, fit_rows, log_lik_rows
from jaxglmm.linear import estimate, start_theta, to_user_units
from jaxglmm.lmm import log_likelihood
from jaxglmm.pql import check_pql, fit_pql
from jaxglmm.quadrature import check_quadrature
from jaxglmm.results import Fit, Params, check_params
from jaxglmm.typing import Array

__all__ = [
    "What",
    "as_float",
    "check_fit",
    "check_method",
    "fit",
    "fit_checked",
    "loglik",
    "reml_flag",
]


def fit(
    design: Design,
    family: str | Family | None = None,
    method: str | None = None,
    *,
    n_quad: int | None = None,
    priors: Callable[[Params], Array] | None = None,
    start: Array | Params | None = None,
    control: Control | None = None,
) -> Fit:
    """Fit a mixed model; pure, so it can be jitted, mapped and differentiated.

    Parameters
    ----------
    design : Design
        See :func:`jaxglmm.design` and :class:`jaxglmm.Design`. Results have its dtype.
    family : str or Family, optional
        Gaussian by default.
    method : {"REML", "ML", "Laplace", "AGQ", "PQL"}, optional
        REML by default for Gaussian models with identity link, Laplace for all others.
        With other families or links ML means Laplace, and REML integrates beta out by
        the same Laplace step. PQL,
        penalized quasi-likelihood, has no likelihood and no derivatives. AGQ is
        adaptive Gauss-Hermite quadrature, for one grouping factor with up to four
        effects.
    n_quad : int, optional
        Quadrature nodes per effect for ``method="AGQ"``, 9 by default; one is Laplace.
    priors : callable, optional
        A JAX function of :class:`Params`, in the user's units, that is added to log L:
        the fit is then the posterior mode, and ``objective`` has the prior in it while
        ``loglik`` has not. For ``method="Laplace"`` and ``"AGQ"``, Laplace by default;
        ``params.sigma`` is 1, theta is on the link scale, and the residual standard
        deviation of a Gaussian model is exp(psi[0]). It is static, as ``family`` is: a
        new function compiles anew, and it cannot close over traced values.
    start : Array, (m,), or Params, optional
        Starting theta; by default by the method of moments, for binomial and Poisson
        models by penalized quasi-likelihood, for other families unit variances. Or a
        start of all parameters, such as ``m.fit.params``: of a linear model, and by
        PQL, all others follow from theta.
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
    Derivatives through ``fit``, first and second, use the implicit function theorem.
    Parameters on the boundary and directions that the data do not identify are held
    fixed. ``grad``, ``hess`` and what tells how the fit ended are constants, and so are
    ``vcov`` and ``vcov_beta`` of a generalized model.

    The likelihood of very few rows may have several optima, and this is the one that
    the start leads to; ``jax.vmap`` over ``start`` finds the others.

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> with jax.enable_x64(True):
    ...     design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    ...     round(float(jax.jit(jg.fit)(design).objective), 4)
    319.6543
    """
    what, design = check_fit(design, family, method, n_quad, priors, start, control)
    return fit_checked(what, design, start)


class What(NamedTuple):
    """The static part of a fit: checked, complete and hashable."""

    family: Family
    method: str
    how: How
    control: Control


def check_fit(
    design: Design, family, method, n_quad, priors, start, control: Control | None
) -> tuple[What, Design]:
    """Check the arguments of :func:`fit`; the design with arrays of one dtype."""
    family = family_by_name(family)
    method = check_method(family, method, priors)
    design = as_float(design)
    check_predictors(family, design)
    how = check_how(method, n_quad, design, priors)
    if method == "PQL":
        check_pql(family)
    if isinstance(start, Params):
        check_params(start, design, _n_own(family, method))
    elif start is not None and jnp.shape(start) != (design.n_theta,):
        raise ValueError(
            f"start must have shape ({design.n_theta},); found {jnp.shape(start)}"
        )
    control = Control() if control is None else control
    if not isinstance(control, Control):
        kind = type(control).__name__
        raise TypeError(f"control must be a jaxglmm.Control; found {kind}")
    return What(family, method, how, control), design


def fit_checked(
    what: What,
    design: Design,
    start: Array | Params | None,
    max_iter: Array | None = None,
) -> Fit:
    """Fit; ``max_iter`` (), which may be traced, goes before the control's.

    PQL, whose rounds are not evaluations, does not heed it.
    """
    family, method, how, control = what
    if is_linear(family) and method in ("REML", "ML"):
        return _fit_linear(design, reml_flag(method), start, control, max_iter)
    if method == "PQL":
        start = start.theta if isinstance(start, Params) else start
        return _fit_pql(design, family, start, control)
    return _fit_generalized(design, family, start, control, how, max_iter)


@functools.partial(jax.jit, static_argnums=3)
def _fit_linear(design: Design, reml, start, control: Control, max_iter) -> Fit:
    cp, units = cross_products(design)
    theta0 = start_theta(cp, design.layout, units, start)
    raw = estimate(cp, design.layout, reml, theta0, control, max_iter=max_iter)
    return to_user_units(raw, units)


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _fit_generalized(design: Design, family, start, control, how, max_iter) -> Fit:
    return fit_rows(design, family, start, control, how, max_iter=max_iter)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _fit_pql(design: Design, family, start, control) -> Fit:
    return fit_pql(design, family, start, control)


def check_method(family: Family, method: str | None, priors=None) -> str:
    """The method to use: ML is exact for linear models, and Laplace for others."""
    linear = is_linear(family)
    if method == "ML" and not linear and priors is None:
        return "Laplace"
    known = ("Laplace", "REML", "AGQ", "PQL")
    known = ("REML", "ML", "Laplace", "AGQ") if linear else known
    if priors is not None:
        if not callable(priors):
            raise TypeError(
                f"priors must be a function of Params; found {type(priors).__name__}"
            )
        known = ("Laplace", "AGQ")
    name = known[0] if method is None else method
    if name not in known:
        kind = "a Gaussian model" if linear else f"the family {family.name!r}"
        kind += " with priors" if priors is not None else ""
        raise ValueError(
            f"unknown method {method!r} for {kind}; use "
            + " or ".join(repr(k) for k in known)
        )
    return name


def check_how(method: str, n_quad: int | None, design: Design, priors=None) -> How:
    """Nodes to use, 1 unless the method is AGQ; whether beta is integrated out."""
    if method != "AGQ":
        if n_quad not in (None, 1):
            raise ValueError(f"n_quad={n_quad} needs method='AGQ'; found {method!r}")
        return How(1, method == "REML" and design.X.shape[1] > 0, priors)
    n_quad = 9 if n_quad is None else n_quad
    check_quadrature(design.layout, n_quad)
    return How(n_quad, False, priors)


def check_predictors(family: Family, design: Design) -> None:
    """Refuse a design with more or fewer linear predictors than the family has."""
    found = 1 + len(design.others)
    if found != family.n_eta:
        raise DesignError(
            f"the family {family.name!r} has {family.n_eta} linear predictors and the "
            f"design {found}; give the others as Design(others=(Predictor(X=...), ...))"
        )


def _n_own(family: Family, method: str) -> int:
    """Own parameters that Params hold; sigma of a linear model has a place apart."""
    return 0 if is_linear(family) and method in ("REML", "ML") else family.n_own


def reml_flag(method: str) -> float:
    """1.0 for REML, 0.0 for ML."""
    return float(method == "REML")


def as_float(design: Design) -> Design:
    """Design with floating arrays of one dtype; speaks up once about float32."""
    check_design(design)
    given = [design.y, design.X, *(t.z for t in design.terms)]
    given += [a for a in (design.weights, design.offset) if a is not None]
    given += [p.X for p in design.others]
    dtype = common_dtype(given)
    if dtype == np.float32:
        _warn_float32()

    def cast(a):
        return None if a is None else jnp.asarray(a, dtype)

    terms = tuple(
        dataclasses.replace(t, z=cast(t.z), group=jnp.asarray(t.group, jnp.int32))
        for t in design.terms
    )
    others = tuple(type(p)(cast(p.X), cast(p.offset)) for p in design.others)
    return Design(
        cast(design.y), cast(design.X), terms, cast(design.weights),
        cast(design.offset), others, design.plan,
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


# ---- the likelihood at given parameters --------------------------------------------


def loglik(
    params: Params,
    design: Design,
    family: str | Family | None = None,
    method: str | None = None,
    *,
    n_quad: int | None = None,
    control: Control | None = None,
) -> Array:
    """Log L with every constant at any parameters; pure.

    Parameters
    ----------
    params : Params
        In the user's units. With ``method="REML"`` beta is integrated out.
    design : Design
    family : str or Family, optional
    method, n_quad : optional
        As for :func:`fit`.
    control : Control, optional
        Its ``information`` counts.

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
    family = family_by_name(family)
    method = check_method(family, method)
    if method == "PQL":
        raise ValueError(
            "method='PQL' has no likelihood; use method='Laplace' to evaluate one"
        )
    design = as_float(design)
    check_predictors(family, design)
    check_params(params, design, _n_own(family, method))
    if is_linear(family) and method in ("REML", "ML"):
        return _loglik_linear(params, design, reml_flag(method))
    how = check_how(method, n_quad, design)
    control = control or Control()
    return _loglik_generalized(params, design, family, control, how)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _loglik_generalized(params, design, family, control, how) -> Array:
    return log_lik_rows(params, design, family, control, how)


@jax.jit
def _loglik_linear(params: Params, design: Design, reml) -> Array:
    # at beta the mean is zero for y - X beta, whatever the rank of X
    dtype = design.y.dtype
    mean = design.X @ jnp.asarray(params.beta, dtype)
    cp, units = cross_products(design.replace(y=design.y - mean))
    theta = units.maps.theta @ jnp.asarray(params.theta, dtype)
    sigma = params.sigma / units.s / units.w_scale**0.5
    reml = jnp.asarray(reml, dtype)
    return log_likelihood(theta, -units.b / units.s, sigma, cp, design.layout, reml)
