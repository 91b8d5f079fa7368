"""Predictions, and their standard errors, for old and new data.

    eta_r = offset + x_r beta_r (+ z_r b of the levels known),    mu = mu(eta, psi)

one row at a time, r running over the linear predictors: zero inflation makes the mean
(1 - pi) mu, a hurdle too, and a dispersion model counts where the mean depends on it.
On the link scale eta_0 is predicted. Ordered responses: :mod:`categories`.

The standard error of a conditional prediction of a linear model is that of
x (beta^ - beta) + z (b^ - b) at the estimated covariance parameters:
sigma^2 r' A^-1 r with r = (Lambda' z, x) and A the penalized normal equations

    A = [ Lambda' Z' W Z Lambda + I   Lambda' Z' W X ]
        [ X' W Z Lambda               X' W X         ]

(Henderson 1975, doi:10.2307/2529430). An unseen level adds its own z Q z'. The standard
error of a population mean is the delta method's, over all beta_r and psi; where eta_0
runs away along a flat direction of the likelihood (:mod:`jaxglmm.flatness`) there is
none.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.linalg import solve_triangular
from scipy.sparse.linalg import splu

from jaxglmm.errors import DataError, NoticeWarning
from jaxglmm.families import Cumulative
from jaxglmm.flatness import moves, sizes
from jaxglmm.inference.categories import has_levels, most_probable, probabilities
from jaxglmm.inference.effects import random_part
from jaxglmm.inference.matrices import random_design, relative_factor
from jaxglmm.inference.rows import Means, own_values, response_mean

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["conditional_se", "predict", "unseen_variance"]

_CHUNK = 2_000  # rows solved for at once


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one linear predictor: X (n, p), and per term z (n, k) and codes.

    ``terms`` numbers its terms among those of the design; ``which`` is the position in
    ``unseen``, the labels of unseen levels by group.
    """

    X: np.ndarray
    offset: np.ndarray | None
    terms: list[int]
    z: list[np.ndarray]
    group: list[np.ndarray]
    which: list[np.ndarray]
    unseen: dict[str, tuple[str, ...]]
    index: pd.Index
    estimable: np.ndarray | None = None


def predict(
    m: GLMM,
    newdata: Any,
    *,
    conditional: bool,
    new_levels: str,
    se: bool,
    offset: Any,
    key: Any,
    type: str,
    not_estimable: str,
) -> pd.Series | pd.DataFrame:
    """What :meth:`jaxglmm.GLMM.predict` returns."""
    if m.is_generalized and se and conditional:
        raise ValueError(
            "standard errors of conditional predictions are for linear models; use "
            "re='population'"
        )
    if newdata is None and offset is not None:
        raise ValueError("offset= belongs to newdata=; give both or neither")
    if type == "class" and (se or not has_levels(m)):
        raise ValueError(
            "type='class' is the most probable level of an ordered response, and has "
            "no standard error"
        )
    response = type != "link" and m.is_generalized
    needed = _needed(m) if response else [0]
    parts = {r: _rows(m, r, newdata, conditional, offset) for r in needed}
    if conditional and new_levels == "error":
        _refuse_unknown(parts)
    if not_estimable == "nan":
        parts = _without_inestimable(parts)
    drawn = {}
    if conditional and new_levels == "draw":
        drawn = _draws(m, parts, key)
    etas = {r: _eta(m, r, parts[r], conditional, drawn) for r in needed}
    value, index = etas[0], parts[0].index
    if response and has_levels(m):
        size_of = partial(_delta_se, m, parts) if se else None
        table = probabilities(m, value, index, size_of)
        return most_probable(m, table) if type == "class" else table
    if not response:
        size = _se(m, parts[0], conditional) if se else None
    else:
        # what the mean does not depend on may be anything
        eta = [etas.get(r, np.zeros(len(value))) for r in range(m.family.n_eta)]
        mean = response_mean(m.family, np.stack(eta, axis=1), m.fit.params.psi)
        value = mean.mu
        size = _delta_se(m, parts, mean) if se else None
    out = pd.Series(value, index, name="fit")
    if size is None:
        return out
    return pd.DataFrame({"fit": out, "se": size}, index=index)


def _needed(m: GLMM) -> list[int]:
    """The linear predictors on which the mean depends."""
    if not m.frame.others:
        return [0]
    mean = response_mean(m.family, m._eta[:256], m.fit.params.psi)
    return [r for r in range(m.family.n_eta) if r == 0 or mean.slope[:, r].any()]


def _rows(m: GLMM, r: int, newdata: Any, conditional: bool, offset: Any) -> _Rows:
    """Rows of linear predictor r: those fitted, or new ones in their coding."""
    d = m.design
    terms = [i for i, t in enumerate(d.terms) if t.predictor == r]
    if newdata is None:
        fixed = d if r == 0 else d.others[r - 1]
        z = [d.terms[i].z for i in terms]
        group = [np.asarray(d.terms[i].group) for i in terms]
        none = [np.full(len(g), -1) for g in group]
        return _Rows(
            fixed.X, fixed.offset, terms, z, group, none, {}, m.frame.row_index
        )
    if r == 0:
        new = m.frame.encoder.transform(newdata, random=conditional, offset=offset)
    else:
        new = m.frame.others[r - 1].encoder.transform(newdata, random=conditional)
    return _Rows(
        X=new.X,
        offset=new.offset,
        terms=terms,
        z=[t.z for t in new.terms],
        group=[t.group for t in new.terms],
        which=[t.which for t in new.terms],
        unseen={t.group_name: t.unseen for t in new.terms},
        index=new.row_index,
        estimable=new.estimable,
    )


def _eta(m: GLMM, r: int, rows: _Rows, conditional: bool, drawn) -> np.ndarray:
    """Linear predictor r, (n,)."""
    eta = rows.X @ np.asarray((m.fit.params.beta, *m.fit.params.others)[r])
    if rows.offset is not None:
        eta = eta + rows.offset
    if conditional and rows.terms:
        b = [m.fit.b[i] for i in rows.terms]
        eta = eta + random_part(rows.z, rows.group, b, unseen=drawn.get(r))
    return eta


def _without_inestimable(parts: dict[int, _Rows]) -> dict[int, _Rows]:
    """NaN in place of rows that the data of the fit do not determine."""
    masks = [rows.estimable for rows in parts.values() if rows.estimable is not None]
    if not masks or np.all(masks):
        return parts
    good = np.all(masks, axis=0)
    warnings.warn(
        f"{np.sum(~good)} of {len(good)} rows of newdata are not estimable: the data "
        "of the fit say nothing of such a combination of the fixed effects (a cell "
        "without data, for instance), so the prediction is NaN. With "
        "not_estimable='zero' the columns that were dropped count as zero.",
        NoticeWarning,
        stacklevel=4,
    )
    X = {r: np.where(good[:, None], rows.X, np.nan) for r, rows in parts.items()}
    return {r: replace(rows, X=X[r]) for r, rows in parts.items()}


def _refuse_unknown(parts: dict[int, _Rows]) -> None:
    unknown: dict[str, dict[str, None]] = {}
    gaps = 0
    for rows in parts.values():
        for group, labels in rows.unseen.items():
            unknown.setdefault(group, {}).update(dict.fromkeys(labels))
        pairs = zip(rows.group, rows.which)
        gaps += sum(int(np.sum((g < 0) & (w < 0))) for g, w in pairs)
    named = [
        f"{g}: {', '.join([*u][:5])}{', ...' if len(u) > 5 else ''}"
        for g, u in unknown.items()
        if u
    ]
    if gaps:
        named.append(f"{gaps} missing")
    if named:
        raise DataError(
            f"levels that the model was not fitted to ({'; '.join(named)}). Use "
            "new_levels='zero' or 'draw', or re='population'."
        )


def _draws(m: GLMM, parts: dict[int, _Rows], key: Any) -> dict[int, list[np.ndarray]]:
    """Effects of unseen levels by row, (n, k) per term of every predictor.

    Rows of one unseen level share a draw; a row whose level is missing has its own.
    """
    rng = np.random.default_rng(_seed(key))
    return {
        r: [_draw(m, rows, t, rng) for t in range(len(rows.z))]
        for r, rows in parts.items()
    }


def _draw(m: GLMM, rows: _Rows, t: int, rng: np.random.Generator) -> np.ndarray:
    Lam = m.factors[rows.terms[t]]
    number = rows.which[t].astype(np.int64)
    gaps = np.flatnonzero((rows.group[t] < 0) & (number < 0))
    number[gaps] = number.max(initial=-1) + 1 + np.arange(len(gaps))
    count = int(number.max(initial=-1)) + 1
    draws = float(m.fit.params.sigma) * rng.standard_normal((count, len(Lam))) @ Lam.T
    return np.vstack([draws, np.zeros((1, len(Lam)))])[number]


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
        p = rows.X.shape[1]
        V = m.determined_vcov[:p, :p]
        var = np.einsum("ij,jk,ik->i", rows.X, V, rows.X)
        return np.sqrt(np.where(_runs_away(m, rows.X), np.nan, var))
    good = ~np.isnan(np.hstack([rows.X, *rows.z]).sum(axis=1))
    out = np.full(len(rows.X), np.nan)
    z, group = [v[good] for v in rows.z], [v[good] for v in rows.group]
    out[good] = conditional_se(m.design, m.factors, m.sigma, rows.X[good], z, group)
    return out


def _delta_se(m: GLMM, parts: dict[int, _Rows], mean: Means) -> np.ndarray:
    """Standard errors of population means, over all fixed effects and psi.

    Var = d' C d,    d = (dmu/deta_r x_r, ..., dmu/dpsi)
    """
    sizes = [len(m.fit.params.beta), *(len(c) for c in m.fit.params.others)]
    first = np.cumsum([0, *sizes])
    vcov, n_own = m.determined_vcov, mean.psi_slope.shape[1]
    d = [mean.slope[:, [r]] * rows.X for r, rows in parts.items()]
    d = np.hstack([*d, mean.psi_slope])
    at = [np.arange(first[r], first[r] + sizes[r]) for r in parts]
    at = np.concatenate([*at, np.arange(len(vcov) - n_own, len(vcov))])
    unknown = np.isnan(d).any(axis=1)
    if isinstance(m.family, Cumulative):
        unknown |= _level_runs_away(m, d)
    else:
        unknown |= _runs_away(m, parts[0].X)
    d = np.nan_to_num(d)
    used = np.any(d != 0.0, axis=0)
    d, at = d[:, used], at[used]
    var = np.einsum("ij,jk,ik->i", d, vcov[np.ix_(at, at)], d)
    return np.sqrt(np.where(unknown, np.nan, var))


def _runs_away(m: GLMM, X: np.ndarray) -> np.ndarray:
    """Whether x'beta is not determined, (n,)."""
    size = sizes(m) if m.flat_directions.shape[1] else np.ones(0)
    if not len(size):
        return np.zeros(len(X), bool)
    rows = np.zeros((len(X), len(size)))
    rows[:, : X.shape[1]] = np.nan_to_num(X)
    return moves(rows, m.flat_directions, size)


def _level_runs_away(m: GLMM, d: np.ndarray) -> np.ndarray:
    """Whether a probability is not, (n,), with derivatives d (n, p + n_own).

    It may depend on some thresholds alone, those beside its level.
    """
    if not m.flat_directions.shape[1]:
        return np.zeros(len(d), bool)
    size, n_own = sizes(m), m.family.n_own
    p = d.shape[1] - n_own
    by_threshold = np.linalg.solve(own_values(m.family, m._psi)[1].T, d[:, p:].T).T
    rows = np.zeros((len(d), len(size)))
    rows[:, :p], rows[:, -n_own:] = d[:, :p], by_threshold
    top = np.max(np.abs(np.nan_to_num(rows)), axis=1, keepdims=True)
    rows = np.nan_to_num(rows) / np.where(
        top > 0, top, 1.0
    )  # far out squares underflow
    return moves(rows, m.flat_directions, size) | (top[:, 0] == 0)


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
