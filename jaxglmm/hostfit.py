"""Fit concrete arrays on the host, through the bucketed and cached programs.

    ModelFrame -> Design (NumPy) -> cross-products -> padded -> one compiled program
    -> Fit (NumPy), in the user's units

Everything is float64, and no JAX array leaves the compiled call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxglmm.buckets import block_sizes, pad, pad_design, unpad_effects
from jaxglmm.collinear import independent
from jaxglmm.compiled import run
from jaxglmm.control import Control
from jaxglmm.coordinates import block_factors
from jaxglmm.covariance import structure
from jaxglmm.crossproducts import block_diagonal, cross_products
from jaxglmm.designs import Design, Predictor, Term
from jaxglmm.elimination import conditional_covariances, eliminate
from jaxglmm.encoding import ModelFrame
from jaxglmm.errors import DataError, FormulaError
from jaxglmm.families import (
    Cumulative,
    Family,
    WithDispersion,
    ZeroInflated,
    known_family,
)
from jaxglmm.generalized import How, fit_rows, mode_covariances
from jaxglmm.linear import Raw, estimate, to_user_units
from jaxglmm.manystarts import best, count_linear, inner_starts, points
from jaxglmm.plan import Layout
from jaxglmm.pql import fit_pql
from jaxglmm.refine import refine, wants_refining
from jaxglmm.results import Fit, Params, check_params
from jaxglmm.starts import moment_start

__all__ = [
    "built_in",
    "check_gaussian",
    "compose",
    "effect_covariances",
    "fit_host",
    "fit_host_generalized",
    "fit_host_pql",
    "for_response",
    "generalized_covariances",
    "term_factors",
    "to_design",
]

_EXACT = 1e-14  # residuals over response: rounding
_ZERO = 1e-8  # theta in inner units; changes the criterion by its square


def to_design(frame: ModelFrame) -> Design:
    """Design of NumPy arrays, without the names."""
    for t in frame.all_terms:
        structure(t.structure)  # raises, naming the structures there are
    parts = [frame.terms, *(p.terms for p in frame.others)]
    terms = tuple(
        Term(t.z, t.group, t.n_levels, t.structure, r)
        for r, its_terms in enumerate(parts)
        for t in its_terms
    )
    others = tuple(Predictor(p.X, p.offset) for p in frame.others)
    return Design(frame.y, frame.X, terms, frame.weights, frame.offset, others)


def compose(
    family: Family, zi: str | None, dispersion: str | None
) -> tuple[Family, dict[str, str]]:
    """The family with zero inflation and a dispersion model, and their formulas.

    In the order of the linear predictors: mean, dispersion, zero inflation.
    """
    others = {}
    if dispersion is not None:
        family, others["dispersion"] = WithDispersion(family), dispersion
    if zi is not None:
        family, others["zi"] = ZeroInflated(family), zi
    return family, others


def for_response(frame: ModelFrame, family: Family) -> tuple[ModelFrame, Family]:
    """A family that depends on the response, and the X that goes with it."""
    if not isinstance(family, Cumulative):
        return frame, family
    if frame.response_levels is None:
        name = frame.response_name
        raise DataError(
            f"the response {name} must be a factor with ordered levels for "
            f"family='cumulative'; it holds numbers. Write ordered({name}) in the "
            "formula if every number is a category."
        )
    family = dataclasses.replace(family, n_categories=len(frame.response_levels))
    if "(Intercept)" not in frame.X_names:
        _check_no_constant(frame)
        return frame, family
    # the thresholds are its intercepts
    keep = [i for i, name in enumerate(frame.X_names) if name != "(Intercept)"]
    encoder = dataclasses.replace(frame.encoder, keep=frame.encoder.keep[keep])
    names = [frame.X_names[i] for i in keep]
    frame = dataclasses.replace(
        frame, X=np.ascontiguousarray(frame.X[:, keep]), X_names=names, encoder=encoder
    )
    return frame, family


def _check_no_constant(frame: ModelFrame) -> None:
    """Refuse columns that hold the intercept which the thresholds are."""
    ones = np.ones((len(frame.y), 1))
    names = ["(Intercept)", *frame.X_names]
    if independent(np.hstack([ones, frame.X]), names).all():
        return
    weights = np.linalg.lstsq(frame.X, ones[:, 0])[0]
    large = np.abs(weights) > 1e-6 * np.max(np.abs(weights))
    held = [name for name, part in zip(frame.X_names, large) if part]
    raise FormulaError(
        "the thresholds of family='cumulative' are its intercept, and the columns "
        f"{', '.join(held[:8])}{', ...' * (len(held) > 8)} of the fixed effects hold "
        "another: they add up to a constant. Write the formula without `0 +` or `- 1`, "
        "so that one level of the factor is the reference, or leave a column out."
    )


def check_gaussian(frame: ModelFrame) -> None:
    """Refuse what a Gaussian model cannot be fitted to."""
    if frame.is_cbind:
        raise DataError(
            f"the response {frame.response_name} counts successes and failures, which "
            "family='gaussian' cannot take"
        )
    for term in frame.terms:
        if term.one_row_per_effect and _is_residual(term, frame.weights):
            raise FormulaError(
                f"the term {term.text} has as many random effects as there are rows "
                f"({len(frame.y)}), with the same design in every level, so they "
                "cannot be told from the residuals of a Gaussian model. Drop the term, "
                "or group by something with several rows per level."
            )
    n, p = frame.X.shape
    if p == n:
        raise DataError(
            f"the fixed effects have {p} columns and the data {n} rows, so nothing is "
            "left to estimate variances from. Leave terms out."
        )


def _is_residual(term, weights: np.ndarray | None) -> bool:
    """Whether Z Q Z' can be W^-1: the levels' Z'WZ are the same, and Q may be its own.

    Covariates or known weights that differ between the levels tell them apart.
    """
    w = np.ones(len(term.z)) if weights is None else weights
    squares = w[:, None, None] * term.z[:, :, None] * term.z[:, None, :]
    H = np.zeros((term.n_levels, *squares.shape[1:]))
    np.add.at(H, term.group, squares)
    size = np.max(np.abs(H))
    off = H[0] - np.diag(np.diagonal(H[0]))
    free = term.structure == "full" or np.max(np.abs(off)) <= 1e-10 * size
    return free and bool(np.max(np.abs(H - H[0])) <= 1e-10 * size)


def fit_host(
    arrays: Design, reml: float, start: Any, control: Control
) -> tuple[Fit, int]:
    """Fit NumPy arrays, and from how many starts; ``start`` is the user's, or None.

    Where the likelihood may have several optima, and the user has given no start, the
    fit is repeated from others by the same program.
    """
    with np.errstate(all="ignore"):
        cp, units = cross_products(arrays, np)
        theta0 = moment_start(cp, arrays.layout, np)
    _check_residuals(arrays, float(units.s) if cp.gram[-1, -1] > 0 else 0.0)
    if start is not None:
        theta0 = units.maps.theta @ _given_theta(start, arrays, 0)
    padded, layout = pad(cp, arrays.layout)
    keep = isinstance(control.optimizer, str) and built_in(layout)

    def estimates(theta0) -> Raw:
        args = padded, np.float64(reml), theta0
        return run(_estimate, (layout, control), *args, keep=keep)

    raw, more = estimates(theta0), 0
    if control.optimizer == "newton" and start is None and built_in(layout):
        more = count_linear(arrays, bool(raw.is_singular), int(raw.status))
        raw = best(raw, inner_starts(len(theta0), more), estimates)
    raw = _unpad(raw, arrays)
    if built_in(layout) and wants_refining(raw, cp, arrays):
        raw, others = refine(raw, arrays, cp, units, reml)
        more += others
    return to_user_units(raw, units), 1 + more


def _check_residuals(arrays: Design, size: float) -> None:
    """Refuse a response that X reproduces; ``size`` is its residuals' RMS."""
    y = arrays.y if arrays.offset is None else arrays.y - arrays.offset
    largest = float(np.max(np.abs(y)))
    if not size > _EXACT * largest:
        raise DataError(
            "the fixed effects (with the offset) reproduce the response exactly: its "
            f"residuals are {size:.1g} where its largest value is {largest:.3g}, so no "
            "variance is left to explain. Is a covariate made from the response?"
        )


def fit_host_generalized(
    arrays: Design, family: Family, start: Any, control: Control, how: How
) -> tuple[Fit, int]:
    """Fit NumPy arrays by Laplace or quadrature, and from how many starts."""
    # a prior is written for the parameters that there are
    padded = pad_design(arrays) if how.prior is None else arrays
    keep = isinstance(control.optimizer, str) and built_in(padded.layout)
    keep = keep and known_family(family) and how.prior is None
    widths, wide = _widths(arrays), _widths(padded)
    spare = np.int64(sum(wide) - sum(widths))

    def fit_from(params: Params) -> Fit:
        betas = [
            np.pad(
                c,
                (0, p - len(c)),
                constant_values=0.0 if np.isfinite(c).all() else np.nan,
            )
            for c, p in zip((params.beta, *params.others), wide)
        ]
        params = params.replace(beta=betas[0], others=tuple(betas[1:]))
        args = padded, params, spare
        fit = run(_fit_rows, (family, control, how), *args, keep=keep)
        return _unpad_fit(fit, arrays, padded)

    first = fit_from(_given_params(start, arrays, family.n_own))
    if control.optimizer != "newton" or start is not None or not keep:
        return first, 1
    more = points(arrays, first)
    return best(first, more, fit_from), 1 + len(more)


def fit_host_pql(arrays: Design, family: Family, start: Any, control: Control) -> Fit:
    """Fit NumPy arrays by PQL; ``start`` is theta or None."""
    theta0 = None if start is None else _given_theta(start, arrays, family.n_own)
    padded = pad_design(arrays)
    # a working model would take padding columns for collinear ones
    padded = dataclasses.replace(padded, X=padded.X[:, : arrays.X.shape[1]])
    keep = isinstance(control.optimizer, str) and built_in(padded.layout)
    keep = keep and known_family(family)
    fit = run(_fit_pql, (family, control), padded, theta0, keep=keep)
    return _unpad_fit(fit, arrays, padded)


def _fit_pql(family, control, design, start):
    return fit_pql(design, family, start, control)


def _fit_rows(family, control, how, design, start, spare):
    return fit_rows(design, family, start, control, how, spare, gaps=True)


def _widths(design: Design) -> list[int]:
    return [design.X.shape[1], *(p.X.shape[1] for p in design.others)]


def _unpad_fit(fit: Fit, arrays: Design, padded: Design) -> Fit:
    """The columns and levels that the data have."""
    real, wide = _widths(arrays), _widths(padded)
    vcov = np.asarray(fit.vcov)
    at = _kept(real, wide, len(vcov))
    # with REML the first beta is no parameter of the objective, with PQL none is
    at_x = np.arange(len(fit.grad))
    for skip in (0, 1):
        if len(fit.grad) == len(vcov) - sum(wide[:skip]):
            at_x = _kept(real[skip:], wide[skip:], len(fit.grad))
    params = fit.params
    theta = np.where(np.abs(params.theta) < _ZERO, 0.0, params.theta)
    others = tuple(c[:p] for c, p in zip(params.others, real[1:]))
    return dataclasses.replace(
        fit,
        params=params.replace(beta=params.beta[: real[0]], theta=theta, others=others),
        u=unpad_effects(fit.u, arrays.layout),
        b=unpad_effects(fit.b, arrays.layout),
        grad=fit.grad[at_x],
        hess=fit.hess[np.ix_(at_x, at_x)],
        vcov=vcov[np.ix_(at, at)],
        vcov_beta=fit.vcov_beta[: real[0], : real[0]],
    )


def _kept(real: list[int], wide: list[int], size: int) -> np.ndarray:
    """Positions of the columns that the data have, and of all that follows."""
    keep, start = [], 0
    for a, b in zip(real, wide):
        keep.append(start + np.arange(a))
        start += b
    return np.concatenate([*keep, np.arange(start, size)]).astype(int)


def _estimate(layout, control, cp, reml, theta0):
    return estimate(cp, layout, reml, theta0, control)


def _given_theta(start: Any, arrays: Design, n_own: int) -> np.ndarray:
    """The user's start of theta (m,); all else that it may hold follows from that."""
    if isinstance(start, Params):
        return _given_params(start, arrays, n_own).theta
    m = arrays.n_theta
    try:
        theta = np.asarray(start, float)
    except (TypeError, ValueError):
        raise DataError(f"start must hold numbers; found {start!r}") from None
    if theta.shape != (m,) or not np.isfinite(theta).all():
        raise DataError(
            f"start must hold {m} finite values, theta in the order of m.theta, or be "
            f"a jaxglmm.Params; found {theta.tolist()}"
        )
    return theta


def _given_params(start: Any, arrays: Design, n_own: int) -> Params:
    """The user's start; NaN for what is left open."""
    nothing = Params(
        beta=np.full(arrays.X.shape[1], np.nan), theta=np.full(arrays.n_theta, np.nan),
        sigma=np.ones(()), psi=np.full(n_own, np.nan),
        others=tuple(np.full(p.X.shape[1], np.nan) for p in arrays.others),
    )  # fmt: skip
    if start is None:
        return nothing
    if not isinstance(start, Params):
        return nothing.replace(theta=_given_theta(start, arrays, n_own))
    check_params(start, arrays, n_own)
    given = jax_free(start)
    for name in ("beta", "theta", "psi"):
        value = getattr(given, name)
        if not np.isfinite(value).all():
            raise DataError(f"start.{name} is not finite: {value.tolist()}")
    return given


def jax_free(params: Params) -> Params:
    """The same parameters as NumPy arrays in float64; theta on its absolute scale."""
    psi = np.zeros(0) if params.psi is None else np.asarray(params.psi, float)
    return Params(
        beta=np.asarray(params.beta, float), theta=np.asarray(params.theta, float),
        sigma=np.asarray(params.sigma, float), psi=psi,
        others=tuple(np.asarray(c, float) for c in params.others),
    )  # fmt: skip


def _unpad(raw: Raw, arrays: Design) -> Raw:
    p = arrays.X.shape[1]
    return raw._replace(
        # what is zero to rounding is zero, as where lme4's bounds hold it
        theta=np.where(np.abs(raw.theta) < _ZERO, 0.0, raw.theta),
        beta=raw.beta[:p],
        gls=raw.gls[:p, :p],
        u=unpad_effects(raw.u, arrays.layout),
        b=unpad_effects(raw.b, arrays.layout),
    )


def built_in(layout: Layout) -> bool:
    """Whether the structures are this package's own, whose code the cache key knows."""
    kinds = [structure(s) for s in layout.structures]
    return all(kind.Lambda.__module__ == "jaxglmm.covariance" for kind in kinds)


# ---- after the fit -----------------------------------------------------------------


def effect_covariances(design: Design, fit: Fit) -> list[np.ndarray]:
    """Var(b | y) at the estimates: (J, K, K) for every block of the layout."""
    with np.errstate(all="ignore"):
        cp, units = cross_products(design, np)
    padded, layout = pad(cp, design.layout)
    theta = units.maps.theta @ np.asarray(fit.params.theta)
    values = run(_covariances, (layout,), padded, theta, keep=built_in(layout))
    out = []
    for block, value in zip(design.layout.blocks, values):
        T = block_diagonal([units.maps.z[t] for t in block.terms], np)
        unit = float(fit.params.sigma) ** 2 / float(units.w_scale)
        out.append(unit * (T @ value[: block.n_levels] @ T.T))
    return out


def generalized_covariances(
    design: Design, fit: Fit, family: Family
) -> list[np.ndarray]:
    """Var(b | y) at the estimates, for a generalized model: as above."""
    padded = pad_design(design)
    keep = built_in(padded.layout) and known_family(family)
    b = []
    for effects, block in zip(fit.b, block_sizes(padded.layout)):
        wide = np.zeros((block.n_levels, effects.shape[1]))
        wide[: len(effects)] = effects
        b.append(wide)
    widths = _widths(padded)
    beta = [
        np.pad(c, (0, p - len(c)))
        for c, p in zip((fit.params.beta, *fit.params.others), widths)
    ]
    args = padded, tuple(beta), fit.params.theta, fit.params.psi, tuple(b)
    values = run(mode_covariances, (family,), *args, keep=keep)
    blocks = design.layout.blocks
    return [v[: block.n_levels] for v, block in zip(values, blocks)]


def _covariances(layout, cp, theta):
    factors = block_factors(theta, layout)
    done = eliminate(factors, cp, layout)
    return conditional_covariances(factors, done, cp, layout)


def term_factors(theta: np.ndarray, design: Design) -> list[np.ndarray]:
    """Relative factor Lambda (k, k) of every term."""
    out, start = [], 0
    for term in design.terms:
        kind = structure(term.structure)
        m = kind.n_theta(term.k)
        out.append(_factor(kind, np.asarray(theta[start : start + m]), term.k))
        start += m
    return out


def _factor(kind, theta: np.ndarray, k: int) -> np.ndarray:
    if kind.name in ("full", "diag"):
        Lam = np.zeros((k, k))
        Lam[np.array(kind.row(k), int), np.array(kind.column(k), int)] = theta
        return Lam
    import jax

    with jax.enable_x64(True):
        return np.asarray(kind.Lambda(jax.numpy.asarray(theta), k))
