"""The people's door: ``glmm(formula, data)``, names in and names out.

    frame, formula -> encoding -> Design (NumPy) -> one compiled program
    -> Fit (NumPy) -> GLMM, which puts the names back

Nothing here leaves float64, and no JAX array leaves the compiled call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jaxglmm.causes import mark_limit
from jaxglmm.control import Control
from jaxglmm.designs import Design
from jaxglmm.encoding import model_frame
from jaxglmm.errors import ConvergenceError, ConvergenceWarning
from jaxglmm.families import Family, family_by_name, is_linear
from jaxglmm.fitting import check_how, check_method, reml_flag
from jaxglmm.hostfit import (
    check_gaussian,
    compose,
    fit_host,
    fit_host_generalized,
    fit_host_pql,
    for_response,
    to_design,
)
from jaxglmm.model import GLMM
from jaxglmm.pql import check_pql
from jaxglmm.results import Params
from jaxglmm.separation import mark_separation
from jaxglmm.sizes import check_numbers

__all__ = ["design", "glmm"]


def design(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, str] | None = None,
    missing: str = "drop",
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Design:
    """Make the Design that :func:`jaxglmm.fit` takes, from a formula and a frame.

    Parameters
    ----------
    formula, data, weights, offset, contrasts, missing, functions
        As for :func:`glmm`.

    Returns
    -------
    Design
        JAX arrays, in float64 where the caller has enabled it.

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> data = jg.datasets.sleepstudy()
    >>> with jax.enable_x64(True):
    ...     d = jg.design("Reaction ~ Days + (Days | Subject)", data)
    >>> d.X.shape, d.terms[0].n_levels
    ((180, 2), 18)
    """
    import jax

    frame = model_frame(
        formula, data, weights=weights, offset=offset, contrasts=contrasts,
        missing=missing, functions=functions,
    )  # fmt: skip
    return jax.tree.map(jax.numpy.asarray, to_design(frame))


def glmm(
    formula: str,
    data: Any,
    *,
    family: str | Family = "gaussian",
    link: str | None = None,
    method: str | None = None,
    n_quad: int | None = None,
    weights: Any = None,
    offset: Any = None,
    zi: str | None = None,
    dispersion: str | None = None,
    contrasts: dict[str, str] | None = None,
    priors: Callable[[Params], Any] | None = None,
    start: Any = None,
    control: Control | None = None,
    missing: str = "drop",
    functions: Mapping[str, Callable[..., Any]] | None = None,
    strict: bool = False,
) -> GLMM:
    """Fit a mixed model from a formula and a data frame.

    Parameters
    ----------
    formula : str
        As in lme4: ``y ~ x * f + (1 + x | g) + (x || g) + (1 | a/b) + offset(z)``.
    data : pandas, polars or pyarrow table, or dict of arrays
    family : str or Family
        The response's distribution: ``"binomial"``, ``"poisson"``, ``"nbinom2"``, ...,
        or an instance such as ``jg.NegativeBinomial(kind=1)``.
        ``"cumulative"`` takes an ordered categorical, or ``ordered(s, levels=[...])``
        as response, lowest level first.
    link : str, optional
        Another link than the family's own.
    method : {"REML", "ML", "Laplace", "AGQ", "PQL"}, optional
        REML by default for Gaussian models with identity link, else Laplace. With
        other families or links, and with ``dispersion=``, ML means maximum likelihood
        by Laplace, and REML integrates the fixed effects out by the same Laplace step.
        PQL, penalized quasi-likelihood, is there for comparison: it has no likelihood.
        AGQ, adaptive Gauss-Hermite quadrature, is for one grouping factor with up to
        four effects.
    n_quad : int, optional
        Quadrature nodes per effect, 9 by default.
    weights : str or array (n,), optional
        Positive. Gaussian and other families with a dispersion: precision weights,
        Var(y_i) = sigma^2 / w_i. Binomial and beta-binomial: numbers of trials of
        proportions. Others: replication. The family's docstring says which.
    offset : str or array (n,), optional
        Column, expression such as ``"log(exposure)"``, or values; adds to the linear
        predictor, like ``offset()`` in the formula.
    zi : str, optional
        Formula of the logit of zero inflation, ``"~ x + (1 | g)"``; with a truncated
        family it makes a hurdle model.
    dispersion : str, optional
        Formula of the log of the family's dispersion, ``"~ x"``.
    contrasts : dict, optional
        Contrasts by factor, ``{"f": "sum"}``; treatment for unordered and polynomial
        for ordered factors otherwise.
    priors : callable, optional
        A JAX function of :class:`Params` that is added to the log-likelihood; the fit
        is the posterior mode. See :func:`jaxglmm.fit`.
    start : array (m,) or Params, optional
        Starting theta, or a start of all parameters such as ``m.fit.params``. Without
        one, Newton's method is started from several where the likelihood may have
        several optima (few rows or levels, a variance of zero, uneven weights); the
        verdict says from how many.
    control : Control, optional
        Optimizer and its limits.
    missing : {"drop", "raise"}
        Rows with missing values (weights and offset included) are left out and
        counted, or refused.
    functions : dict of callables, optional
        Functions of your own for the formulas, ``{"f": f}``; predictions use them too.
        They get columns as float64 arrays (truth values as they are, text and dates as
        Series) and give one or several values per row. A formula is data: it can name
        columns, compute with them in float64, and call these functions and those of
        the formula language (README, *Formulas*), nothing else.
    strict : bool
        Raise instead of warn when the fit did not converge.

    Returns
    -------
    GLMM

    Raises
    ------
    FormulaError, DataError
        Saying what was found and what to do.
    ConvergenceError
        With ``strict=True``.

    Warns
    -----
    ConvergenceWarning
        If no optimum was reached; the message says why and what to do.

    Examples
    --------
    >>> import jaxglmm as jg
    >>> m = jg.glmm("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())
    >>> m.fixef.round(3).to_dict()
    {'(Intercept)': 251.405, 'Days': 10.467}
    """
    fam, others = compose(family_by_name(family, link), zi, dispersion)
    control = Control() if control is None else control
    if not isinstance(control, Control):
        kind = type(control).__name__
        raise TypeError(f"control must be a jaxglmm.Control; found {kind}")
    frame = model_frame(
        formula, data, weights=weights, offset=offset, contrasts=contrasts,
        missing=missing, codes=fam.takes_codes, others=others, functions=functions,
    )  # fmt: skip
    frame, fam = for_response(frame, fam)
    check_numbers(frame, fam)
    used = check_method(fam, method, priors)
    arrays = to_design(frame)
    if is_linear(fam) and used in ("REML", "ML"):
        check_gaussian(frame)
        fitted, n_starts = fit_host(arrays, reml_flag(used), start, control)
    else:
        fam.check(arrays.y, arrays.weights)
        if used == "PQL":
            check_pql(fam)
        how = check_how(used, n_quad, arrays, priors)
        if used == "PQL":
            fitted, n_starts = fit_host_pql(arrays, fam, start, control), 1
        else:
            fitted, n_starts = fit_host_generalized(arrays, fam, start, control, how)
    if priors is None and not (is_linear(fam) and used in ("REML", "ML")):
        fitted = mark_separation(fitted, arrays, fam)
    model = GLMM(
        fit=fitted, design=arrays, frame=frame, family=fam, method=used,
        formula=formula, n_quad=n_quad, priors=priors, control=control,
        n_starts=n_starts,
    )  # fmt: skip
    if priors is None and model.is_generalized:
        model = mark_limit(model)
    if not model.converged:
        if strict:
            raise ConvergenceError(model.verdict)
        warnings.warn(model.verdict, ConvergenceWarning, stacklevel=2)
    return model
