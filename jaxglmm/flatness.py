"""What the data do not determine: directions along which the likelihood is flat.

With H the Hessian of the objective and V what the fit keeps of 2 H^-1,

    I - V H / 2                                                                    (1)

projects on the directions in which the fit met no curvature; its rank tells how many
there are. Fixed effects that the
covariates separate run to infinity along the whole span of the separating directions
(:mod:`jaxglmm.separation`), whatever curvature is left where the fit stopped.

A parameter, or a combination c of them, has a standard error where no flat direction d
moves it, c'd = 0. With Q a basis of these combinations its variance is that of

    2 Q (Q'HQ)^-1 Q'.                                                              (2)

Parameters stand as in ``fit.vcov``: beta, others, theta, and the family's own; in
directions the thresholds themselves stand for those of ordered categories.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxglmm.collinear import null_space
from jaxglmm.errors import Status
from jaxglmm.families import Cumulative
from jaxglmm.inference.rows import own_values
from jaxglmm.separation import separated_span

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["determined_covariance", "flat_directions", "moves", "sizes"]

_PART = 1e-4  # a part below this of a direction of length 1 is rounding


def sizes(m: GLMM) -> np.ndarray:
    """Units (P,) in which parameters compare: coefficients by the size of columns."""
    parts = [m.design.X, *(p.X for p in m.design.others)]
    roots = [np.sqrt(np.mean(np.asarray(X, float) ** 2, axis=0)) for X in parts]
    size = np.concatenate(roots)
    more = len(np.asarray(m.fit.vcov)) - len(size)
    return np.concatenate([np.where(size > 0, size, 1.0), np.ones(more)])


def flat_directions(m: GLMM) -> np.ndarray:
    """Orthonormal directions (P, k) in units of :func:`sizes`; k = 0 if there are none.

    Linear models, and models that converged inside or on the boundary, have none.
    """
    if not m.is_generalized or m.fit.vcov is None:
        return np.zeros((len(m.fixef), 0))
    if m.status in (Status.CONVERGED, Status.BOUNDARY):
        return np.zeros((len(m.fit.vcov), 0))
    size = sizes(m)
    separated = size[:, None] * _separated(m)
    # what separation leaves of the directions without curvature
    known = np.linalg.qr(separated)[0]
    rest = _without_curvature(m, size)
    rest = rest - known @ (known.T @ rest)
    U, length, _ = np.linalg.svd(rest, full_matrices=False)
    rest = U[:, length > 0.5]
    return np.hstack([known, np.where(np.abs(rest) < _PART, 0.0, rest)])


def _without_curvature(m: GLMM, size: np.ndarray) -> np.ndarray:
    """The null space (P, k) of H in units of ``size``; its dimension is that of (1).

    Thresholds stand in place of psi for ordered categories.
    """
    V, H = np.asarray(m.fit.vcov), np.asarray(m.fit.hess)
    if m.method == "PQL" or not np.isfinite(V).all() or not np.isfinite(H).all():
        return np.zeros((len(V), 0))
    first = len(V) - len(H)  # with REML beta is no part of the Hessian
    s = size[first:]
    P = np.eye(len(H)) - V[first:, first:] @ H / 2.0
    k = int(np.sum(np.linalg.svd(s[:, None] * P / s, compute_uv=False) > 0.5))
    values, vectors = np.linalg.eigh(H / np.outer(s, s))
    out = np.zeros((len(V), k))
    out[first:] = vectors[:, np.argsort(np.abs(values))[:k]]
    if isinstance(m.family, Cumulative):
        own = slice(len(V) - m.family.n_own, len(V))
        out[own] = own_values(m.family, m._psi)[1] @ out[own]
        out = np.linalg.qr(out)[0]
    return out


def _separated(m: GLMM) -> np.ndarray:
    """Span of the separating directions, (P, k)."""
    n_all = len(np.asarray(m.fit.vcov))
    if m.status != Status.SEPARATED:
        return np.zeros((n_all, 0))
    span, p = separated_span(m.design, m.family), len(m.fixef)
    out = np.zeros((n_all, span.shape[1]))
    out[:p] = span[:p]
    if len(span) > p:
        out[n_all - (len(span) - p) :] = span[p:]
    return out


def determined_covariance(m: GLMM) -> np.ndarray:
    """Covariance (P, P) of all parameters, (2) where some directions are flat."""
    if not m.is_generalized or m.fit.vcov is None:
        return np.asarray(m.fit.vcov_beta)
    V, H, F = np.asarray(m.fit.vcov), np.asarray(m.fit.hess), m.flat_directions
    if not F.shape[1] or len(H) < len(V):
        return V
    size = sizes(m)
    if isinstance(m.family, Cumulative):
        own = slice(len(V) - m.family.n_own, len(V))
        F = F.copy()
        F[own] = np.linalg.solve(own_values(m.family, m._psi)[1], F[own])
    Q = null_space(F.T)
    inner = Q.T @ (H / np.outer(size, size)) @ Q
    return (
        2.0 * (Q @ np.linalg.pinv(inner, hermitian=True) @ Q.T) / np.outer(size, size)
    )


def moves(rows: np.ndarray, directions: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether some direction moves a combination of parameters, for rows (n, P)."""
    scaled = rows / size
    part = np.linalg.norm(scaled @ directions, axis=1)
    return part > _PART * np.linalg.norm(scaled, axis=1)
