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

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from jaxglmm.inference.matrices import random_design, relative_factor

__all__ = ["conditional_se", "unseen_variance"]

_CHUNK = 2_000  # rows solved for at once


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
    Z = random_design(
        [t.z for t in design.terms], [t.group for t in design.terms], n_levels
    )
    scale = np.sqrt(np.maximum(np.sum(w[:, None] * design.X**2, axis=0), 1e-300))
    half = sp.hstack([Z @ Lambda, sp.csc_array(design.X / scale)]).tocsc()
    half = sp.dia_array((np.sqrt(w)[None], [0]), shape=(len(w), len(w))) @ half
    q, p = Lambda.shape[0], design.X.shape[1]
    identity = sp.dia_array((np.r_[np.ones(q), np.zeros(p)][None], [0]), shape=(q + p,) * 2)
    solve = splu(sp.csc_matrix(half.T @ half + identity)).solve
    rows = sp.hstack(
        [random_design(z, group, n_levels) @ Lambda, sp.csc_array(X / scale)]
    ).tocsr()
    var = np.empty(X.shape[0])
    for start in range(0, len(var), _CHUNK):
        r = rows[start : start + _CHUNK].toarray()
        var[start : start + _CHUNK] = np.sum(r * solve(r.T).T, axis=1)
    return np.sqrt(sigma**2 * var + unseen_variance(z, group, factors, sigma))
