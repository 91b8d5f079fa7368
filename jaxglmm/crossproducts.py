"""One pass over the rows: the weighted cross-products that a Gaussian model needs.

With a = sqrt(w) (y, X, z) all later work is done on

    own[f]    Z_f' W Z_f          (K, K, J)      blocks of the chain, by level
    up[f][g]  Z_f' W Z_g          (K, K_g, J)    with the ancestors of each level
    tail[f]   Z_f' W [Z_R X y]    (K, D, J)      D = q_R + p + 1; or entries, see below
    gram      [Z_R X y]' W [...]  (D, D)

so that an evaluation of the likelihood costs nothing in n. Blocks keep the long axis,
levels, last.

Units. Columns of X are scaled and whitened (X T has unit Gram matrix), columns of z are
scaled to unit root mean square, y is replaced by (y - offset - X T b) / s, least
squares residuals of unit size, and weights have mean one. The likelihood knows how to
undo each of these exactly
whatever T, b and s are, so they carry no derivative; they make covariates of any scale
behave and keep the residual sum of squares from cancelling.

The same code runs on NumPy arrays (one fast pass on the host) and on JAX arrays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.covariance import structure
from jaxglmm.plan import Pairs
from jaxglmm.typing import Array

__all__ = ["CrossProducts", "SparseTail", "Units", "cross_products"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseTail:
    """Cross-products of the leaf with few of many tail effects.

    ``value`` (K, E) holds the entries, ``xy`` (K, p + 1, J) the columns of X and y.
    """

    value: Array
    xy: Array
    pairs: Pairs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Units:
    """How the inner parameters turn into the user's.

    beta = T (b + s beta~), sigma = s sqrt(w_scale) sigma~, theta = theta~ /
    theta_scale. ``w_scale`` is the mean weight. ``aliased`` (p,) marks columns of X
    that depend linearly on earlier ones: their beta stays zero. ``exact``: X
    reproduces y.
    """

    b: Array
    T: Array
    s: Array
    w_scale: Array
    theta_scale: Array
    z_scale: tuple[Array, ...]
    aliased: Array
    exact: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossProducts:
    """Sufficient statistics of a Gaussian mixed model, in inner units.

    ``unused`` (p,) is one for columns of X that hold nothing (aliased, or padding).
    ``n`` counts rows with positive weight, ``p`` columns in use. ``constant`` and
    ``constant_reml`` are what the change of units and the prior weights add to -2 log L
    and, on top of that, to the REML criterion.
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
    z_scale, theta_scale = _term_scales(design, z, w, w_scale, xp)
    X, y, units = _standardize(X, y, w, w_scale, z_scale, theta_scale, xp)
    rows = _Rows(design, w, X, y, [v / s[None] for v, s in zip(z, z_scale)], xp)
    layout = design.layout
    own, up, tail = [], [], []
    for f in range(layout.n_chain):
        own.append(rows.blocks(f, f))
        up.append(tuple(rows.blocks(f, g) for g in range(f + 1, layout.n_chain)))
        tail.append(_leaf_tail(rows, f, design.plan.pairs))
    used = w > 0
    n_used = xp.sum(xp.where(used, 1.0, 0.0)).astype(y.dtype)
    p_used = xp.sum(1.0 - units.aliased).astype(y.dtype)
    log_w = xp.sum(xp.log(xp.where(used, w, 1.0)))
    logdet_T = xp.sum(
        xp.log(xp.where(units.aliased > 0, 1.0, xp.abs(xp.diagonal(units.T))))
    )
    log_s = 2.0 * xp.log(units.s)
    cp = CrossProducts(
        own=tuple(own),
        up=tuple(up),
        tail=tuple(tail),
        gram=rows.gram(),
        parents=design.plan.parents,
        unused=units.aliased,
        n=n_used,
        p=p_used,
        constant=n_used * log_s - log_w,
        constant_reml=-p_used * log_s - 2.0 * logdet_T,
    )
    return cp, units


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
        y = jnp.where(_codes_fit(design.terms), y, jnp.nan)
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


def _codes_fit(terms) -> Array:
    """Whether every code lies in 0 ... n_levels - 1: traced ones cannot be refused."""
    fits = [jnp.all((t.group >= 0) & (t.group < t.n_levels)) for t in terms]
    return functools.reduce(jnp.logical_and, fits)


def _term_scales(design, z, w: Array, w_scale: Array, xp):
    """Root mean square of every z column, and what units do to theta."""
    n = xp.maximum(xp.sum(w), xp.finfo(w.dtype).tiny)
    root = xp.sqrt(w_scale)
    z_scale, theta_scale = [], []
    for term, columns in zip(design.terms, z):
        kind = structure(term.structure)
        if kind.row is None:  # theta has no unit: z takes up the weights' alone
            z_scale.append(xp.ones(term.k, w.dtype) / root)
            theta_scale.append(xp.ones(kind.n_theta(term.k), w.dtype))
            continue
        square = xp.sum(w[:, None] * columns**2, axis=0) / n
        if kind.common:
            square = xp.mean(square) * xp.ones(term.k, w.dtype)
        scale = xp.sqrt(square)
        scale = _stop(xp.where(scale > 0, scale, 1.0), xp)
        z_scale.append(scale)
        theta_scale.append(root * scale[np.array(kind.row(term.k))])
    return tuple(z_scale), xp.concatenate(theta_scale)


def _standardize(X, y, w, w_scale, z_scale, theta_scale, xp):
    """Whitened X, least-squares residuals of y, and the way back."""
    n = xp.maximum(xp.sum(w), xp.finfo(w.dtype).tiny)
    G = (X * w[:, None]).T @ X / n
    size = xp.sqrt(xp.diagonal(G))
    size = xp.where(size > 0, size, 1.0)
    T, aliased = _whitener(G / (size[:, None] * size[None, :]), xp)
    T = _stop(T / size[:, None], xp)
    Xw = X @ T
    largest = xp.max(xp.abs(y))
    b = _stop((Xw * w[:, None]).T @ y / n, xp)
    y = y - Xw @ b
    s = xp.sqrt(xp.sum(w * y**2) / n)
    exact = s <= 100.0 * float(xp.finfo(w.dtype).eps) * largest
    s = _stop(xp.where(s > 0, s, 1.0), xp)
    units = Units(b, T, s, w_scale, theta_scale, z_scale, _stop(aliased, xp), exact)
    return Xw, y / s, units


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


# ---- sums over rows ----------------------------------------------------------------


def _segment_sum(values: Array, codes: Array, n_levels: int, xp) -> Array:
    """Sum rows (n, c) by code -> (n_levels, c)."""
    if xp is jnp:
        return jax.ops.segment_sum(values, codes, num_segments=n_levels)
    if values.shape[1] == 0:
        return np.zeros((n_levels, 0))
    columns = [
        np.bincount(codes, np.ascontiguousarray(v), minlength=n_levels)
        for v in values.T
    ]
    return np.stack(columns, axis=1)


class _Rows:
    """The weighted rows, and the sums over them that blocks need."""

    def __init__(self, design, w, X, y, z, xp):
        self.xp, self.layout, self.w = xp, design.layout, w
        self.X, self.y = X, y
        self.z = [_columns([z[t] for t in b.terms], xp) for b in self.layout.blocks]
        self.zw = [z * w[:, None] for z in self.z]
        self.codes = [design.terms[b.terms[0]].group for b in self.layout.blocks]

    def sum_outer(self, a: Array, b: Array, codes: Array, n_levels: int) -> Array:
        """Sum of a_i b_i' by code, (n_levels, ka, kb)."""
        ka, kb = a.shape[1], b.shape[1]
        outer = (a[:, :, None] * b[:, None, :]).reshape(a.shape[0], ka * kb)
        return _segment_sum(outer, codes, n_levels, self.xp).reshape(n_levels, ka, kb)

    def blocks(self, f: int, g: int) -> Array:
        """Z_f' W Z_g by level of f, (K_f, K_g, J_f)."""
        n_levels = self.layout.blocks[f].n_levels
        sums = self.sum_outer(self.zw[f], self.z[g], self.codes[f], n_levels)
        return self.xp.moveaxis(sums, 0, -1)

    def with_xy(self, f: int) -> Array:
        """Z_f' W [X y] by level of f, (J_f, K_f, p + 1)."""
        n_levels = self.layout.blocks[f].n_levels
        x = self.sum_outer(self.zw[f], self.X, self.codes[f], n_levels)
        y = self.sum_outer(self.zw[f], self.y[:, None], self.codes[f], n_levels)
        return self.xp.concatenate([x, y], axis=2)

    def crossed(self, f: int, g: int) -> Array:
        """Z_f' W Z_g for every pair of levels, (J_f, K_f, J_g, K_g)."""
        a, b = self.layout.blocks[f], self.layout.blocks[g]
        if f == g:
            sums = self.sum_outer(self.zw[f], self.z[f], self.codes[f], a.n_levels)
            eye = self.xp.eye(a.n_levels, dtype=sums.dtype)
            return sums[:, :, None, :] * eye[:, None, :, None]
        codes = self.codes[f] * b.n_levels + self.codes[g]
        sums = self.sum_outer(self.zw[f], self.z[g], codes, a.n_levels * b.n_levels)
        sums = sums.reshape(a.n_levels, b.n_levels, a.k, b.k)
        return self.xp.moveaxis(sums, 1, 2)

    def with_tail(self, f: int) -> Array:
        """Z_f' W [Z_R X y] by level of f, (J_f, K_f, D)."""
        a = self.layout.blocks[f]
        parts = [
            self.crossed(f, g).reshape(a.n_levels, a.k, self.layout.blocks[g].size)
            for g in range(self.layout.n_chain, len(self.layout.blocks))
        ]
        return self.xp.concatenate([*parts, self.with_xy(f)], axis=2)

    def entries(self, pairs: Pairs) -> Array:
        """Values of the entries of a sparse tail, (K, E)."""
        parts = []
        start = 0
        blocks = self.layout.tail
        for r, (block, size) in enumerate(zip(blocks, pairs.counts)):
            count = size // block.k
            codes = (pairs.row_entry[r] - start) // block.k
            z = self.z[self.layout.n_chain + r]
            sums = self.sum_outer(self.zw[0], z, codes, count)
            parts.append(self.xp.moveaxis(sums, 1, 0).reshape(sums.shape[1], -1))
            start += size
        return self.xp.concatenate(parts, axis=1)

    def gram(self) -> Array:
        """[Z_R X y]' W [Z_R X y], (D, D)."""
        xp = self.xp
        xy = xp.concatenate([self.X, self.y[:, None]], axis=1)
        corner = (xy * self.w[:, None]).T @ xy
        first = self.layout.n_chain
        tail = range(first, len(self.layout.blocks))
        if not tail:
            return corner
        sizes = [self.layout.blocks[g].size for g in tail]
        rows = []
        for i, f in enumerate(tail):
            upper = [
                self.crossed(f, g).reshape(sizes[i], sizes[j])
                if g >= f
                else rows[j][i].T
                for j, g in enumerate(tail)
            ]
            rows.append([*upper, self.with_xy(f).reshape(sizes[i], -1)])
        RR = xp.concatenate([xp.concatenate(r[:-1], axis=1) for r in rows])
        Rx = xp.concatenate([r[-1] for r in rows])
        return xp.concatenate(
            [xp.concatenate([RR, Rx], axis=1), xp.concatenate([Rx.T, corner], axis=1)]
        )


def _columns(parts: list[Array], xp) -> Array:
    return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=1)


def _leaf_tail(rows: _Rows, f: int, pairs: Pairs | None) -> Array | SparseTail:
    xp = rows.xp
    if pairs is None:
        return xp.moveaxis(rows.with_tail(f), 0, -1)
    xy = xp.moveaxis(rows.with_xy(f), 0, -1)
    return SparseTail(rows.entries(pairs), xy, pairs)
