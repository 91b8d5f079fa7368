"""The matrices of the textbook: y = X beta + Z b + e, b ~ N(0, G), e ~ N(0, R).

    G = sigma^2 Lambda Lambda',  R = sigma^2 W^-1,  V = Var(y) = Z G Z' + R

Sparse, with the columns of Z labelled; for looking and teaching, never used to fit.
Columns of Z run over terms, then levels, then effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

__all__ = ["Matrices", "model_matrices", "random_design", "relative_factor"]


@dataclass(frozen=True)
class Matrices:
    """X as a data frame, the others as SciPy sparse arrays; see the module.

    For families or links other than Gaussian and identity, R holds the variances of y
    at the conditional modes, and there is no V.

    ``Z_columns`` (q,) labels the columns of Z, the rows of Lambda and G: a MultiIndex
    of group, level, effect.
    """

    X: pd.DataFrame
    Z: sp.csc_array
    Z_columns: pd.MultiIndex
    Lambda: sp.csc_array
    G: sp.csc_array
    R: sp.dia_array
    V: sp.csc_array | None


def random_design(z: list[np.ndarray], group: list[np.ndarray], n_levels: list[int]):
    """Sparse Z (n, q) of all terms; code -1 leaves a row of its term empty."""
    parts = []
    for zt, gt, J in zip(z, group, n_levels):
        n, k = zt.shape
        rows = np.repeat(np.arange(n), k)
        cols = (gt[:, None].astype(np.int64) * k + np.arange(k)).ravel()
        known = np.repeat(gt >= 0, k)
        parts.append(
            sp.csc_array(
                (zt.ravel()[known], (rows[known], cols[known])), shape=(n, J * k)
            )
        )
    return sp.csc_array(sp.hstack(parts))


def relative_factor(factors: list[np.ndarray], n_levels: list[int]) -> sp.csc_array:
    """Lambda (q, q): every term's factor once per level."""
    blocks = [sp.kron(sp.eye_array(J), Lam) for Lam, J in zip(factors, n_levels)]
    return sp.csc_array(sp.block_diag(blocks))


def model_matrices(
    design, frame, factors, sigma: float, variance: np.ndarray, *, additive: bool
) -> Matrices:
    """Collect :class:`Matrices` for a fitted model.

    ``sigma`` scales the random effects, ``variance`` (n,) is that of y given these;
    ``additive``: whether the mean is the linear predictor, so that V makes sense.
    """
    n_levels = [t.n_levels for t in design.terms]
    Z = random_design(
        [t.z for t in design.terms], [t.group for t in design.terms], n_levels
    )
    Lambda = relative_factor(factors, n_levels)
    G = sp.csc_array(sigma**2 * (Lambda @ Lambda.T))
    n = len(variance)
    R = sp.dia_array((variance[None, :], [0]), shape=(n, n))
    labels = [
        (t.group_name, level, name)
        for t in frame.all_terms
        for level in t.levels
        for name in t.z_names
    ]
    columns = pd.MultiIndex.from_tuples(labels, names=["group", "level", "effect"])
    X = pd.DataFrame(design.X, columns=frame.X_names, index=frame.row_index)
    V = sp.csc_array(Z @ G @ Z.T + R) if additive else None
    return Matrices(X, Z, columns, Lambda, G, R, V)
