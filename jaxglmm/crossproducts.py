"""One pass over the rows: the weighted cross-products that a Gaussian model needs.

All later work is done on the sums of rowsums.py with A = [X y], so that an evaluation
of the likelihood costs nothing in n.

Units. Columns of X are scaled and whitened (X T has unit Gram matrix), columns of z are
scaled to unit root mean square (orthogonal too, in unstructured terms), y is replaced
by (y - offset - X T b) / s, least-squares residuals of unit size, and weights have mean
one. The likelihood knows how to undo each of these exactly whatever T, b and s are, so
they carry no derivative; they make covariates of any scale behave and keep the residual
sum of squares from cancelling.

The same code runs on NumPy arrays (one fast pass on the host) and on JAX arrays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.covariance import structure
from jaxglmm.plan import Alike
from jaxglmm.rowsums import RowSums, SparseTail, block_columns
from jaxglmm.typing import Array

__all__ = [
    "CrossProducts",
    "Maps",
    "Units",
    "block_diagonal",
    "codes_fit",
    "cross_products",
    "effect_maps",
    "inner_columns",
    "whitening",
]


class Maps(NamedTuple):
    """Inner units of the random effects; see :func:`effect_maps`.

    ``z[t]`` (k, k): z~ = z T. ``theta`` (m, m): theta~ = S theta; ``theta_back`` its
    inverse.
    """

    z: tuple[Array, ...]
    theta: Array
    theta_back: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """How the inner parameters turn into the user's.

    beta = T (b + s beta~), sigma = s sqrt(w_scale) sigma~; ``maps`` has the random
    effects'. ``w_scale`` is the mean weight. ``aliased`` (p,) marks columns of X
    that depend linearly on earlier ones: their beta stays zero. ``exact``: X
    reproduces y.
    """

    b: Array
    T: Array
    s: Array
    w_scale: Array
    maps: Maps
    aliased: Array
    exact: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossProducts:
    """Sufficient statistics of a Gaussian mixed model, in inner units.

    ``unused`` (p,) is one for columns of X that hold nothing (aliased, or padding).
    ``n`` counts rows with positive weight, ``p`` columns in use. ``constant`` and
    ``constant_reml`` are what the change of units and the prior weights add to -2 log L
    and, on top of that, to the REML criterion. ``alike`` names levels that pooling.py
    may pool, ``counts`` (J,) for how many each then counts in the log-determinant.
    """

    own: tuple[Array, ...]
    up: tuple[tuple[Array, ...], ...]
    tail: tuple[Array | SparseTail, ...]
    gram: Array
    parents: tuple[Array, ...]
    unused: Array
    n: Array
    p: Array
    constant: Array
    constant_reml: Array
    alike: Alike | None = None
    counts: Array | None = None


def cross_products(design, np_like: ModuleType = jnp) -> tuple[CrossProducts, Units]:
    """Cross-products of a Design, with ``jax.numpy`` or with ``numpy``.

    Parameters
    ----------
    design : Design
        Rows in any order.
    np_like : module
        ``jax.numpy`` inside compiled code; ``numpy`` for concrete data on the host.

    Returns
    -------
    CrossProducts, Units
    """
    xp = np_like
    y, X, z, w, w_scale = _weighted(design, xp)
    maps = effect_maps(design.terms, z, w, w_scale, xp)
    X, y, units = _standardize(X, y, w, w_scale, maps, xp)
    z = [v @ T for v, T in zip(z, maps.z)]
    xy = xp.concatenate([X, y[:, None]], axis=1)
    layout = design.layout
    codes = [design.terms[b.terms[0]].group for b in layout.blocks]
    rows = RowSums(layout, block_columns(layout, z, xp), codes, w, xy, xp)
    sums = rows.all(design.plan.pairs)
    used = w > 0
    n_used = xp.sum(xp.where(used, 1.0, 0.0)).astype(y.dtype)
    p_used = xp.sum(1.0 - units.aliased).astype(y.dtype)
    log_w = xp.sum(xp.log(xp.where(used, w, 1.0)))
    logdet_T = xp.sum(
        xp.log(xp.where(units.aliased > 0, 1.0, xp.abs(xp.diagonal(units.T))))
    )
    log_s = 2.0 * xp.log(units.s)
    cp = CrossProducts(
        own=sums.own,
        up=sums.up,
        tail=sums.tail,
        gram=sums.gram,
        parents=design.plan.parents,
        unused=units.aliased,
        n=n_used,
        p=p_used,
        constant=n_used * log_s - log_w,
        constant_reml=-p_used * log_s - 2.0 * logdet_T,
        alike=design.plan.alike,
    )
    return cp, units


def inner_columns(design, units: Units):
    """X (n, p), y (n,), z (n, k) of every term and weights (n,) in inner units (NumPy).

    Aliased columns of X are zero.
    """
    y, X, z, w, _ = _weighted(design, np)
    X = X @ units.T
    return X, (y - X @ units.b) / units.s, [v @ T for v, T in zip(z, units.maps.z)], w


# ---- units -------------------------------------------------------------------------


def _stop(x, xp):
    return lax.stop_gradient(x) if xp is jnp else x


def _weighted(design, xp):
    """Rows (y - offset, X, z) and weights of mean one, and the mean they had.

    Rows of weight zero are emptied, whatever they held; a negative weight or a group
    code out of range makes the likelihood not finite.
    """
    y = design.y if design.offset is None else design.y - design.offset
    if xp is jnp:  # on the host they are known to be right
        y = jnp.where(codes_fit(design.terms), y, jnp.nan)
    X, z = design.X, [t.z for t in design.terms]
    if design.weights is None:
        one = xp.ones((), y.dtype)
        return y, X, z, xp.ones(y.shape[0], y.dtype), one
    w = xp.where(design.weights < 0, xp.nan, design.weights)
    used = w > 0
    if xp is jnp:  # on the host they are known to be positive
        y = xp.where(used, y, 0.0)
        X, *z = (xp.where(used[:, None], v, 0.0) for v in (X, *z))
    count = xp.maximum(xp.sum(xp.where(used, 1.0, 0.0)), 1.0).astype(w.dtype)
    mean = xp.sum(w) / count
    mean = _stop(xp.where(mean == 0, 1.0, mean), xp)
    return y, X, z, w / mean, mean


def codes_fit(terms) -> Array:
    """Whether every code lies in 0 ... n_levels - 1: traced ones cannot be refused."""
    fits = [jnp.all((t.group >= 0) & (t.group < t.n_levels)) for t in terms]
    return functools.reduce(jnp.logical_and, fits)


def effect_maps(terms, z, w: Array, w_scale: Array, xp) -> Maps:
    """Inner units of every term's effects, b = T b~ with Lambda = T Lambda~ / sqrt(w).

    T scales columns of z to unit root mean square. Of an unstructured term T is lower
    triangular and makes its columns orthogonal too, so that a covariate may lie far
    from zero; Lambda then stays lower triangular. Without derivatives: any T will do.
    """
    n = xp.maximum(xp.sum(w), xp.finfo(w.dtype).tiny)
    root = xp.sqrt(w_scale)
    maps, forth, back = [], [], []
    for term, columns in zip(terms, z):
        kind, k = structure(term.structure), term.k
        if kind.row is None:  # theta has no unit: z takes up the weights' alone
            eye = xp.eye(k, dtype=w.dtype)
            one = xp.eye(kind.n_theta(k), dtype=w.dtype)
            maps.append(eye * root)
            forth.append(one)
            back.append(one)
            continue
        G = _stop((columns * w[:, None]).T @ columns / n, xp)
        T, T_inv = _effect_map(G, kind, k, xp)
        rows = np.array(kind.row(k))
        cols = rows if kind.column is None else np.array(kind.column(k))
        same = (cols[:, None] == cols[None, :]).astype(w.dtype)
        maps.append(T)
        forth.append(root * same * T_inv[rows[:, None], rows[None, :]])
        back.append(same * T[rows[:, None], rows[None, :]] / root)
    return Maps(tuple(maps), block_diagonal(forth, xp), block_diagonal(back, xp))


def _effect_map(G: Array, kind, k: int, xp) -> tuple[Array, Array]:
    """T and its inverse for one term with Gram matrix G (k, k)."""
    square = xp.diagonal(G)
    if kind.common:
        square = xp.mean(square) * xp.ones(k, G.dtype)
    scale = xp.sqrt(square)
    scale = xp.where(scale > 0, scale, 1.0)
    T, T_inv = xp.diag(1.0 / scale), xp.diag(scale)
    if not kind.triangular or k == 1:
        return T, T_inv
    unit = G / (scale[:, None] * scale[None, :])
    # Gram-Schmidt from the last column to the first is lower triangular
    flipped, aliased = _whitener(unit[::-1, ::-1], xp)
    lower = flipped[::-1, ::-1]
    regular = xp.sum(aliased) == 0
    return (
        xp.where(regular, T @ lower, T),
        xp.where(regular, lower.T @ unit @ T_inv, T_inv),
    )


def block_diagonal(parts, xp) -> Array:
    """Square matrices along the diagonal of one."""
    size = sum(p.shape[0] for p in parts)
    rows, start = [], 0
    for p in parts:
        k = p.shape[0]
        left = xp.zeros((k, start), p.dtype)
        right = xp.zeros((k, size - start - k), p.dtype)
        rows.append(xp.concatenate([left, p, right], axis=1))
        start += k
    return xp.concatenate(rows, axis=0)


def _standardize(X, y, w, w_scale, maps, xp):
    """Whitened X, least-squares residuals of y, and the way back."""
    n = xp.maximum(xp.sum(w), xp.finfo(w.dtype).tiny)
    T, aliased, _ = whitening(X, w, xp)
    Xw = X @ T
    largest = xp.max(xp.abs(y))
    b = _stop((Xw * w[:, None]).T @ y / n, xp)
    y = y - Xw @ b
    s = xp.sqrt(xp.sum(w * y**2) / n)
    exact = s <= 100.0 * float(xp.finfo(w.dtype).eps) * largest
    s = _stop(xp.where(s > 0, s, 1.0), xp)
    units = Units(b, T, s, w_scale, maps, _stop(aliased, xp), exact)
    return Xw, y / s, units


def whitening(X: Array, w: Array, xp) -> tuple[Array, Array, Array]:
    """T (p, p) that gives X T a unit Gram matrix, aliased columns, and T's inverse.

    Without derivatives: any T will do.
    """
    n = xp.maximum(xp.sum(w), xp.finfo(w.dtype).tiny)
    G = _stop((X * w[:, None]).T @ X / n, xp)
    size = xp.sqrt(xp.diagonal(G))
    size = xp.where(size > 0, size, 1.0)
    T, aliased = _whitener(G / (size[:, None] * size[None, :]), xp)
    T = _stop(T / size[:, None], xp)
    return T, aliased, T.T @ G


def _whitener(G: Array, xp) -> tuple[Array, Array]:
    """Upper triangular T with T' G T = I, by Gram-Schmidt on the columns of I.

    A column whose remainder vanishes is marked aliased and set to zero. Plain
    arithmetic: p columns, one after another, and no LAPACK.
    """
    p = G.shape[0]
    tol = 10 * p * xp.finfo(G.dtype).eps

    def column(j, T):
        t = _unit(p, j, G, xp)
        for _ in range(2):  # twice is enough
            t = t - T @ (T.T @ (G @ t))
        size2 = t @ (G @ t)
        fine = size2 > tol
        t = xp.where(fine, t / xp.sqrt(xp.where(fine, size2, 1.0)), 0.0)
        return T + t[:, None] * _unit(p, j, G, xp)[None, :]

    T = xp.zeros_like(G)
    if xp is jnp and p > 8:
        T = lax.fori_loop(0, p, column, T)
    else:
        for j in range(p):
            T = column(j, T)
    aliased = xp.where(xp.diagonal(T) == 0, 1.0, 0.0).astype(G.dtype)
    return T, aliased


def _unit(p: int, j, like: Array, xp) -> Array:
    return (xp.arange(p) == j).astype(like.dtype)
