"""Predictions, and their standard errors, for old and new data.

    eta = offset + x beta (+ z b of the levels known),        one row at a time

The standard error of a conditional prediction is that of x (beta^ - beta) +
z (b^ - b) at the estimated covariance parameters: sigma^2 r' A^-1 r with
r = (Lambda' z, x) and A the penalized normal equations

    A = [ Lambda' Z' W Z Lambda + I   Lambda' Z' W X ]
        [ X' W Z Lambda               X' W X         ]

(Henderson 1975, doi:10.2307/2529430). An unseen level adds its own z Q z'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.linalg import solve_triangular
from scipy.sparse.linalg import splu

from jaxglmm.errors import DataError
from jaxglmm.inference.effects import linear_predictors, random_part
from jaxglmm.inference.matrices import random_design, relative_factor
from jaxglmm.inference.rows import response_mean

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["conditional_se", "predict", "unseen_variance"]

_CHUNK = 2_000  # rows solved for at once


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows to predict: X (n, p), and per term z (n, k), codes, position in unseen."""

    X: np.ndarray
    offset: np.ndarray | None
    z: list[np.ndarray]
    group: list[np.ndarray]
    which: list[np.ndarray]
    unseen: dict[str, tuple[str, ...]]
    index: pd.Index


def predict(
    m: GLMM,
    newdata: Any,
    *,
    conditional: bool,
    new_levels: str,
    se: bool,
    offset: Any,
    key: Any,
    response: bool,
) -> pd.Series | pd.DataFrame:
    """What :meth:`jaxglmm.GLMM.predict` returns."""
    _check_generalized(m, newdata, conditional, se)
    if m.is_generalized and response and m.frame.others:
        eta = linear_predictors(m.design, m.fit, conditional=conditional)
        mu = response_mean(m.family, eta, m.fit.params.psi)[0]
        return pd.Series(mu, m.frame.row_index, name="fit")
    rows = _rows(m, newdata, conditional, offset)
    eta = rows.X @ np.asarray(m.fit.params.beta)
    if rows.offset is not None:
        eta = eta + rows.offset
    if conditional:
        if new_levels == "error":
            _refuse_unknown(rows)
        drawn = _draws(m, rows, key) if new_levels == "draw" else None
        eta = eta + random_part(rows.z, rows.group, m.fit.b, unseen=drawn)
    slope = 1.0
    if m.is_generalized and response:
        eta, slope = response_mean(m.family, eta[:, None], m.fit.params.psi)
    out = pd.Series(eta, rows.index, name="fit")
    if not se:
        return out
    size = np.abs(slope) * _se(m, rows, conditional)
    return pd.DataFrame({"fit": out, "se": size}, index=rows.index)


def _check_generalized(m: GLMM, newdata: Any, conditional: bool, se: bool) -> None:
    """Refuse what generalized models do not predict."""
    if not m.is_generalized:
        return
    if se and conditional:
        raise ValueError(
            "standard errors of conditional predictions are for linear models; use "
            "re='population'"
        )
    if m.frame.others and (newdata is not None or se):
        raise ValueError(
            "models with zi= or dispersion= predict for the rows they were fitted to, "
            "without standard errors; leave newdata= and se= out"
        )


def _rows(m: GLMM, newdata: Any, conditional: bool, offset: Any) -> _Rows:
    if newdata is None:
        if offset is not None:
            raise ValueError("offset= belongs to newdata=; give both or neither")
        d = m.design
        terms = [t for t in d.terms if t.predictor == 0]
        z, group = [t.z for t in terms], [np.asarray(t.group) for t in terms]
        none = [np.full(len(g), -1) for g in group]
        return _Rows(d.X, d.offset, z, group, none, {}, m.frame.row_index)
    new = m.frame.encoder.transform(newdata, random=conditional, offset=offset)
    return _Rows(
        X=new.X,
        offset=new.offset,
        z=[t.z for t in new.terms],
        group=[t.group for t in new.terms],
        which=[t.which for t in new.terms],
        unseen={t.group_name: t.unseen for t in new.terms},
        index=new.row_index,
    )


def _refuse_unknown(rows: _Rows) -> None:
    named = [
        f"{g}: {', '.join(u[:5])}{', ...' if len(u) > 5 else ''}"
        for g, u in rows.unseen.items()
        if u
    ]
    gaps = sum(int(np.sum((g < 0) & (w < 0))) for g, w in zip(rows.group, rows.which))
    if gaps:
        named.append(f"{gaps} missing")
    if named:
        raise DataError(
            f"levels that the model was not fitted to ({'; '.join(named)}). Use "
            "new_levels='zero' or 'draw', or re='population'."
        )


def _draws(m: GLMM, rows: _Rows, key: Any) -> list[np.ndarray]:
    """Effects of unseen levels by row, (n, k) per term.

    Rows of one unseen level share a draw; a row whose level is missing has its own.
    """
    rng = np.random.default_rng(_seed(key))
    out = []
    for Lam, group, which in zip(m.factors, rows.group, rows.which):
        number = which.astype(np.int64)
        gaps = np.flatnonzero((group < 0) & (which < 0))
        number[gaps] = number.max(initial=-1) + 1 + np.arange(len(gaps))
        count = int(number.max(initial=-1)) + 1
        draws = m.sigma * rng.standard_normal((count, len(Lam))) @ Lam.T
        out.append(np.vstack([draws, np.zeros((1, len(Lam)))])[number])
    return out


def _seed(key: Any) -> Any:
    if key is None:
        raise ValueError("new_levels='draw' needs key=, an integer or a PRNG key")
    if isinstance(key, (int, np.integer)):
        return int(key)
    import jax

    return np.asarray(jax.random.key_data(key)).ravel().tolist()


def _se(m: GLMM, rows: _Rows, conditional: bool) -> np.ndarray:
    """Standard errors by row, NaN where a covariate is missing."""
    if not conditional:
        return np.sqrt(np.einsum("ij,jk,ik->i", rows.X, m.fit.vcov_beta, rows.X))
    good = ~np.isnan(np.hstack([rows.X, *rows.z]).sum(axis=1))
    out = np.full(len(rows.X), np.nan)
    z, group = [v[good] for v in rows.z], [v[good] for v in rows.group]
    out[good] = conditional_se(m.design, m.factors, m.sigma, rows.X[good], z, group)
    return out


def unseen_variance(z, group, factors, sigma: float) -> np.ndarray:
    """Variance that unseen levels (code -1) add, (n,)."""
    total = np.zeros(len(z[0]))
    for zt, gt, Lam in zip(z, group, factors):
        total += np.where(gt < 0, np.sum((zt @ Lam) ** 2, axis=1), 0.0)
    return sigma**2 * total


def conditional_se(design, factors, sigma: float, X, z, group) -> np.ndarray:
    """Standard error of x beta + z b for rows of new arrays, (n_new,)."""
    n_levels = [t.n_levels for t in design.terms]
    Lambda = relative_factor(factors, n_levels)
    w = np.ones(len(design.y)) if design.weights is None else design.weights
    root = np.sqrt(w)[:, None]
    Z = random_design(
        [t.z for t in design.terms], [t.group for t in design.terms], n_levels
    )
    # orthonormal columns for X, so that neither units nor origin cost digits
    basis, R = np.linalg.qr(root * design.X)
    weighted = sp.diags_array(root[:, 0]) @ Z @ Lambda
    half = sp.csc_array(sp.hstack([weighted, sp.csc_array(basis)]))
    q = sum(t.n_levels * t.k for t in design.terms)
    ones = np.r_[np.ones(q), np.zeros(len(R))]
    solve = splu(sp.csc_matrix(half.T @ half + sp.diags_array(ones))).solve
    fixed = solve_triangular(R, X.T, trans=1).T if len(R) else X
    rows = sp.csr_array(
        sp.hstack([random_design(z, group, n_levels) @ Lambda, sp.csc_array(fixed)])
    )
    var = np.empty(len(X))
    for start in range(0, len(var), _CHUNK):
        r = rows[start : start + _CHUNK].toarray()
        var[start : start + _CHUNK] = np.sum(r * solve(r.T).T, axis=1)
    return np.sqrt(sigma**2 * var + unseen_variance(z, group, factors, sigma))
