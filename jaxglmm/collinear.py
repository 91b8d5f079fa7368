"""Columns of X that are combinations of earlier ones.

Column j is left out where, with all columns scaled to length 1 and P the projection on
the columns kept before it, |x_j - P x_j| <= 1e-7 |x_j|: R's rule and tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxglmm.errors import DataError

__all__ = [
    "Estimable",
    "check_sizes",
    "describe_dropped",
    "estimable",
    "independent",
    "null_space",
]

LARGEST = 1e150  # squares and their sums stay among floating-point numbers
_SEEN = 1e-5  # above what TOLERANCE leaves in single rows
TOLERANCE = 1e-7  # R's: what is left of a column over the column


def independent(X: np.ndarray, names: list[str]) -> np.ndarray:
    """Mask (p,) of the columns that are not combinations of earlier ones.

    A Cholesky factor of the Gram matrix clears the usual case in one pass; squaring
    costs half the digits, so anything doubtful (a pivot below 1e-8) is decided on the
    triangle of a QR factorization.

    Raises
    ------
    DataError
        If a column has no square, see :func:`check_sizes`.
    """
    if X.shape[1] == 0 or _clearly_independent(X):
        return np.ones(X.shape[1], bool)
    check_sizes(X, names, "the fixed effects")
    return _independent_triangle(_triangle(X))


def check_sizes(X: np.ndarray, names: list[str], what: str) -> None:
    """Refuse columns whose squares have no place among floating-point numbers.

    Raises
    ------
    DataError
        Naming the column and its size.
    """
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->j", X, X)
    if np.all((squares > 1e-280) & (squares < 1e300)):
        return
    for name, top in zip(names, np.abs(X).max(axis=0, initial=0.0)):
        if not np.isfinite(top):
            raise DataError(
                f"column {name} of {what} overflows: a product has no place among "
                "floating-point numbers. Give its variables in another unit."
            )
        if top and not 1 / LARGEST <= top <= LARGEST:
            raise DataError(
                f"the largest value of column {name} of {what} is {top:.3g}, whose "
                "square has no place among floating-point numbers. Give it in another "
                "unit."
            )


def _clearly_independent(X: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        gram = X.T @ X
        length = np.sqrt(np.diagonal(gram))
        if not (length.min() > 1e-140 and length.max() < LARGEST):
            return False
        try:
            L = np.linalg.cholesky(gram / np.outer(length, length))
        except np.linalg.LinAlgError:
            return False
        return bool(np.diagonal(L).min() > 1e-4)


def _triangle(X: np.ndarray) -> np.ndarray:
    """R of a QR factorization, the columns scaled to a largest value of 1."""
    top = np.abs(X).max(axis=0)
    return np.asarray(np.linalg.qr(X / np.where(top > 0, top, 1.0), mode="r"))


def _independent_triangle(R: np.ndarray) -> np.ndarray:
    """Gram-Schmidt over the columns of R in order, each projected twice."""
    p = R.shape[1]
    basis = np.empty((R.shape[0], 0))
    keep = np.zeros(p, bool)
    for j in range(p):
        length = np.linalg.norm(R[:, j])
        rest = R[:, j] / length if length > 0 else R[:, j]
        for _ in range(2):
            rest = rest - basis @ (basis.T @ rest)
        left = np.linalg.norm(rest)
        if length > 0 and left > TOLERANCE:
            keep[j] = True
            basis = np.column_stack([basis, rest / left])
    return keep


def describe_dropped(X: np.ndarray, keep: np.ndarray, names: list[str]) -> str:
    """Say which columns were left out, and which ones they are combinations of."""
    kept, dropped = np.flatnonzero(keep), np.flatnonzero(~keep)
    R = _triangle(X[:, [*kept, *dropped[:5]]])
    k = len(kept)
    reasons = []
    for j, beta in zip(dropped, np.linalg.solve(R[:k, :k], R[:k, k:]).T):
        large = np.abs(beta) > 1e-6 * np.abs(beta).max(initial=0.0)
        parts = [names[i] for i in kept[large][:6]]
        what = f"a combination of {', '.join(parts)}" if parts else "zero everywhere"
        reasons.append(f"{names[j]} is {what}")
    more = "; ..." if len(dropped) > 5 else ""
    count = f"{len(dropped)} collinear column{'s' * (len(dropped) != 1)}"
    return f"dropped {count} of the fixed effects: {'; '.join(reasons)}{more}."


@dataclass(frozen=True, eq=False)
class Estimable:
    """Which rows x have an x'beta that the data determine: x in the row space of X.

    Attributes
    ----------
    size : (p,) array
        Units of all columns, collinear ones included.
    null : (p, k) array
        X null = 0, in these units: a column of length 1 per column left out.
    """

    size: np.ndarray
    null: np.ndarray

    def rows(self, X: np.ndarray) -> np.ndarray:
        """Mask (n,) of the rows with all columns that are; a row of NaN is."""
        unknown = np.isnan(X).any(axis=1, keepdims=True)
        scaled = np.where(unknown, 0.0, X / self.size)
        part = np.abs(scaled @ self.null).max(axis=1, initial=0.0)
        return part <= _SEEN * np.linalg.norm(scaled, axis=1)


def estimable(X: np.ndarray, keep: np.ndarray) -> Estimable:
    """What new rows need, where columns (n, p) outside of the mask were left out."""
    size = np.abs(X).max(axis=0)
    size = np.where(size > 0, size, 1.0)
    kept, dropped = np.flatnonzero(keep), np.flatnonzero(~keep)
    R, k = _triangle(X[:, [*kept, *dropped]]), int(keep.sum())  # in the same units
    null = np.zeros((len(keep), len(dropped)))
    null[kept] = -np.linalg.solve(R[:k, :k], R[:k, k:])
    null[dropped] = np.eye(len(dropped))
    return Estimable(size, null / np.linalg.norm(null, axis=0))


def null_space(rows: np.ndarray) -> np.ndarray:
    """Orthonormal directions (p, k) that all rows (n, p) are orthogonal to.

    The columns should be in units of their size.
    """
    p = rows.shape[1]
    R = np.linalg.qr(rows, mode="r") if len(rows) > p else rows
    _, size, V = np.linalg.svd(R, full_matrices=True)
    rank = int(np.sum(size > TOLERANCE * size.max(initial=0.0)))
    return V[rank:].T
