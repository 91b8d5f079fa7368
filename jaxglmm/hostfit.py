"""Fit concrete arrays on the host, through the bucketed and cached programs.

    ModelFrame -> Design (NumPy) -> cross-products -> padded -> one compiled program
    -> Fit (NumPy), in the user's units

Everything is float64, and no JAX array leaves the compiled call.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxglmm.buckets import pad, unpad_effects
from jaxglmm.compiled import run
from jaxglmm.coordinates import block_factors
from jaxglmm.covariance import structure
from jaxglmm.crossproducts import cross_products
from jaxglmm.designs import Design, Term
from jaxglmm.elimination import conditional_covariances, eliminate
from jaxglmm.encoding import ModelFrame
from jaxglmm.errors import DataError, FormulaError
from jaxglmm.fitting import Control, Raw, estimate, to_user_units
from jaxglmm.plan import Layout
from jaxglmm.results import Fit
from jaxglmm.starts import moment_start

__all__ = [
    "built_in",
    "check_gaussian",
    "effect_covariances",
    "fit_host",
    "term_factors",
    "to_design",
]

_EXACT = 1e-14  # residuals over response: rounding
_ZERO = 1e-8  # theta in inner units; changes the criterion by its square


def to_design(frame: ModelFrame) -> Design:
    """Design of NumPy arrays, without the names."""
    for t in frame.terms:
        structure(t.structure)  # raises, naming the structures there are
    terms = tuple(Term(t.z, t.group, t.n_levels, t.structure) for t in frame.terms)
    return Design(frame.y, frame.X, terms, frame.weights, frame.offset)


def check_gaussian(frame: ModelFrame) -> None:
    """Refuse what a Gaussian model cannot be fitted to."""
    if frame.is_cbind:
        raise DataError(
            f"the response {frame.response_name} counts successes and failures, which "
            "family='gaussian' cannot take"
        )
    if frame.one_row_per_level:
        group = frame.one_row_per_level[0]
        term = next(t for t in frame.terms if t.group_name == group)
        raise FormulaError(
            f"the term {term.text} has as many random effects as there are rows "
            f"({len(frame.y)}), so they cannot be told from the residuals of a "
            "Gaussian model. Drop the term, or group by something with several rows "
            "per level."
        )
    n, p = frame.X.shape
    if p == n:
        raise DataError(
            f"the fixed effects have {p} columns and the data {n} rows, so nothing is "
            "left to estimate variances from. Leave terms out."
        )


def fit_host(arrays: Design, reml: float, start: Any, control: Control) -> Fit:
    """Fit NumPy arrays; ``start`` is theta in the user's units, or None."""
    with np.errstate(all="ignore"):
        cp, units = cross_products(arrays, np)
        theta0 = moment_start(cp, arrays.layout)
    _check_residuals(arrays, float(units.s) if cp.gram[-1, -1] > 0 else 0.0)
    if start is not None:
        theta0 = _given_start(start, len(units.theta_scale)) * units.theta_scale
    padded, layout = pad(cp, arrays.layout)
    keep = isinstance(control.optimizer, str) and built_in(layout)
    args = padded, np.float64(reml), theta0
    raw = run(_estimate, (layout, control), *args, keep=keep)
    return to_user_units(_unpad(raw, arrays), units)


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


def _estimate(layout, control, cp, reml, theta0):
    return estimate(cp, layout, reml, theta0, control)


def _given_start(start: Any, m: int) -> np.ndarray:
    try:
        theta = np.asarray(start, float)
    except (TypeError, ValueError):
        raise DataError(f"start must hold numbers; found {start!r}") from None
    if theta.shape != (m,) or not np.isfinite(theta).all():
        raise DataError(
            f"start must hold {m} finite values, theta in the order of m.theta; found "
            f"{theta.tolist()}"
        )
    return theta


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
    theta = np.asarray(fit.params.theta) * units.theta_scale
    values = run(_covariances, (layout,), padded, theta, keep=built_in(layout))
    out = []
    for block, value in zip(design.layout.blocks, values):
        scale = np.concatenate([units.z_scale[t] for t in block.terms])
        unit = (
            float(fit.params.sigma) ** 2
            / float(units.w_scale)
            / (scale[:, None] * scale[None, :])
        )
        out.append(value[: block.n_levels] * unit)
    return out


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
