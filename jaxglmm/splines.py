"""Natural cubic splines, ``ns(x, df)``, as R's package splines has them.

Let B(x) be the cubic B-splines on the knots with the boundary knots repeated four
times, less the first one unless the intercept is kept, and C = B''(boundary knots),
(2, m). A natural spline is linear beyond the boundary, so its second derivatives there
are zero: with C' = Q R and N the columns of Q after the second,

    ns(x) = B(x) N,

B(x) being extended beyond the boundary by its tangents. Inner knots are quantiles of x
inside the boundary, df - 1 of them (df - 2 with the intercept).

References: Hastie (1992), ch. 7 of Statistical Models in S; de Boor (1978), A Practical
Guide to Splines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxglmm.errors import DataError

__all__ = ["natural_spline"]


def natural_spline(
    x: np.ndarray,
    df: int | None = None,
    knots: float | Sequence[float] | None = None,
    intercept: bool = False,
    boundary_knots: Sequence[float] | None = None,
    *,
    _state: dict[str, Any],
) -> np.ndarray:
    """Basis of natural cubic splines.

    Parameters
    ----------
    x : (n,) array
    df : int, optional
        Number of columns; 1 (2 with the intercept) without knots, a straight line.
    knots : number or sequence, optional
        Inner knots, instead of ``df``.
    intercept : bool
        Whether constants are among the splines.
    boundary_knots : two numbers, optional
        Where the straight lines begin; the range of x by default.
    _state : dict
        Knots and boundary, learned where it is empty.

    Returns
    -------
    (n, df) array

    Raises
    ------
    DataError
        If the knots do not increase, or ``df`` is too small.
    """
    if not _state:
        boundary = _boundary(x, boundary_knots)
        inner = _inner(x, df, knots, bool(intercept), boundary)
        _state.update(boundary=boundary, inner=inner)
    return _basis(x, _state["inner"], _state["boundary"], bool(intercept))


def _boundary(x: np.ndarray, given: Sequence[float] | None) -> tuple[float, float]:
    ends = [x.min(), x.max()] if given is None else np.sort(np.ravel(given))
    if len(ends) != 2 or not ends[0] < ends[1]:
        shown = ", ".join(f"{v:.6g}" for v in ends)
        raise DataError(
            f"ns: the boundary knots are two different numbers; got {shown}"
        )
    return float(ends[0]), float(ends[1])


def _inner(
    x: np.ndarray,
    df: int | None,
    knots: float | Sequence[float] | None,
    intercept: bool,
    boundary: tuple[float, float],
) -> np.ndarray:
    """Inner knots as given, or at quantiles of x."""
    if knots is not None and df is not None:
        raise DataError("ns: give df or knots, not both.")
    if knots is not None:
        inner = np.sort(np.ravel(np.asarray(knots, np.float64)))
    else:
        least = 1 + intercept
        df = least if df is None else df
        if int(df) != df or df < least:
            raise DataError(f"ns: df is a whole number of at least {least}; got {df}")
        inside = x[(x >= boundary[0]) & (x <= boundary[1])]
        places = np.linspace(0.0, 1.0, int(df) - least + 2)[1:-1]
        inner = np.quantile(inside, places) if len(inside) else np.zeros(0)
    if len(inner) and not (boundary[0] < inner[0] and inner[-1] < boundary[1]):
        raise DataError(
            f"ns: knots from {inner[0]:.6g} to {inner[-1]:.6g} do not lie inside "
            f"{boundary[0]:.6g} to {boundary[1]:.6g}. Use a smaller df, or give knots."
        )
    return inner


def _basis(
    x: np.ndarray, inner: np.ndarray, boundary: tuple[float, float], intercept: bool
) -> np.ndarray:
    from scipy.interpolate import BSpline

    ends = np.asarray(boundary)
    t = np.concatenate([np.repeat(ends[0], 4), inner, np.repeat(ends[1], 4)])
    splines = BSpline(t, np.eye(len(t) - 4), 3)
    kept = np.clip(x, *ends)
    B = splines(kept) + (x - kept)[:, None] * splines(kept, nu=1)
    first = 0 if intercept else 1
    C = splines(ends, nu=2)[:, first:]
    N = np.linalg.qr(C.T, mode="complete").Q[:, 2:]
    return B[:, first:] @ N
