"""Starting values by the method of moments, on the host.

Every effect c (a column of z with its grouping factor) has the quadratic form
B_c = sum_j (z_cj' W y)^2 / z_cj' W z_cj over its levels. With y the least-squares
residuals, and covariances between effects left aside,

    E B_c = sum_d M_cd v_d + J_c v_e,    M_cd = sum_jl (z_cj' W z_dl)^2 / z_cj' W z_cj
    E y'Wy = sum_d tr(Z_d' W Z_d) v_d + n v_e

a linear system for the variances v (Henderson's method 1). All its sums are squares of
cross-products at hand. theta starts at sqrt(v_d / v_e), kept away from zero, where the
criterion is stationary.

References: Henderson (1953), Biometrics 9(2), doi:10.2307/3001853.
"""

from __future__ import annotations

import numpy as np

from jaxglmm.covariance import structure
from jaxglmm.crossproducts import CrossProducts
from jaxglmm.plan import Layout
from jaxglmm.rowsums import SparseTail

__all__ = ["default_start", "moment_start"]

_RANGE = (0.1, 10.0)  # of a starting relative standard deviation, in inner units


def default_start(layout: Layout) -> np.ndarray:
    """Starting theta in inner units: unit standard deviations, no correlation."""
    per_term = [structure(s).start(k) for k, s in zip(layout.term_k, layout.structures)]
    return np.concatenate([np.asarray(t, float) for t in per_term])


def moment_start(cp: CrossProducts, layout: Layout) -> np.ndarray:
    """Starting theta (m,) in inner units; other structures start at their default."""
    sd = _relative_sd(cp, layout)
    parts = []
    for t, (k, name) in enumerate(zip(layout.term_k, layout.structures)):
        kind = structure(name)
        start = np.asarray(kind.start(k), float)
        if name in ("full", "diag"):
            start = start * sd[t][np.array(kind.row(k))]  # type: ignore[misc]
        elif name == "scalar":
            start = start * np.mean(sd[t])
        parts.append(start)
    return np.concatenate(parts)


def _relative_sd(cp: CrossProducts, layout: Layout) -> list[np.ndarray]:
    """Moment estimates of sd / sigma for the effects of every term."""
    size = sum(b.k for b in layout.blocks)
    first = np.cumsum([0, *(b.k for b in layout.blocks)])
    diag = [_diagonals(cp, layout, f) for f in range(len(layout.blocks))]  # (K, J)
    M = np.zeros((size + 1, size + 1))
    B = np.zeros(size + 1)
    for f in range(len(layout.blocks)):
        rows = slice(first[f], first[f + 1])
        inverse = np.divide(1.0, diag[f], where=diag[f] > 0, out=np.zeros_like(diag[f]))
        B[rows] = np.sum(_with_y(cp, layout, f) ** 2 * inverse, axis=1)
        M[rows, size] = np.sum(diag[f] > 0, axis=1)
        M[size, rows] = np.sum(diag[f], axis=1)
        for g in range(f, len(layout.blocks)):
            columns = slice(first[g], first[g + 1])
            by_f, by_g = _squares(cp, layout, f, g)  # (Kf, Kg, Jf), (Kf, Kg, Jg)
            M[rows, columns] = np.einsum("abj,aj->ab", by_f, inverse)
            other = np.divide(
                1.0, diag[g], where=diag[g] > 0, out=np.zeros_like(diag[g])
            )
            M[columns, rows] = np.einsum("abj,bj->ba", by_g, other)
    B[size], M[size, size] = cp.gram[-1, -1], float(cp.n)
    v = np.linalg.lstsq(M, B, rcond=1e-10)[0]
    floor = 1e-3 * max(float(v[size]), 1e-3 * B[size] / max(float(cp.n), 1.0))
    sd = np.sqrt(np.maximum(v[:size], 0.0) / max(float(v[size]), floor, 1e-300))
    sd = np.clip(np.nan_to_num(sd, nan=1.0), *_RANGE)
    out: dict[int, np.ndarray] = {}
    for f, block in enumerate(layout.blocks):
        at = first[f]
        for t in block.terms:
            out[t] = sd[at : at + layout.term_k[t]]
            at += layout.term_k[t]
    return [out[t] for t in range(len(layout.term_k))]


def _tail_slice(layout: Layout, f: int) -> slice:
    start = sum(b.size for b in layout.blocks[layout.n_chain : f])
    return slice(start, start + layout.blocks[f].size)


def _diagonals(cp: CrossProducts, layout: Layout, f: int) -> np.ndarray:
    """z_j' W z_j for every effect and level, (K, J)."""
    if f < layout.n_chain:
        return np.einsum("kkj->kj", cp.own[f])
    at = _tail_slice(layout, f)
    return np.diagonal(cp.gram)[at].reshape(-1, layout.blocks[f].k).T


def _with_y(cp: CrossProducts, layout: Layout, f: int) -> np.ndarray:
    """z_j' W y for every effect and level, (K, J)."""
    if f < layout.n_chain:
        H = cp.tail[f]
        return (H.xy if isinstance(H, SparseTail) else H)[:, -1]
    at = _tail_slice(layout, f)
    return cp.gram[at, -1].reshape(-1, layout.blocks[f].k).T


def _squares(cp, layout: Layout, f: int, g: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared cross-products of blocks f <= g, summed by level of f and of g."""
    kf, kg = layout.blocks[f].k, layout.blocks[g].k
    Jf, Jg = layout.blocks[f].n_levels, layout.blocks[g].n_levels
    if g < layout.n_chain:
        if f == g:
            return cp.own[f] ** 2, cp.own[f] ** 2
        level = cp.parents[f]
        for h in range(f + 1, g):
            level = cp.parents[h][level]
        squares = cp.up[f][g - f - 1] ** 2
        by_g = np.zeros((kf, kg, Jg))
        index: tuple = (slice(None), slice(None), level)
        np.add.at(by_g, index, squares)
        return squares, by_g
    at = _tail_slice(layout, g)
    if f >= layout.n_chain:
        block = cp.gram[_tail_slice(layout, f), at].reshape(Jf, kf, Jg, kg) ** 2
        return block.sum(2).transpose(1, 2, 0), block.sum(0).transpose(0, 2, 1)
    H = cp.tail[f]
    if isinstance(H, SparseTail):
        return _sparse_squares(H, at, (kf, kg, Jf, Jg))
    block = H[:, at].reshape(kf, Jg, kg, Jf) ** 2
    return block.sum(1), block.sum(3).transpose(0, 2, 1)


def _sparse_squares(H: SparseTail, at: slice, shape) -> tuple[np.ndarray, np.ndarray]:
    kf, kg, Jf, Jg = shape
    here = (H.pairs.column >= at.start) & (H.pairs.column < at.stop)
    column, level = H.pairs.column[here] - at.start, H.pairs.level[here]
    squares = H.value[:, here] ** 2
    by_f, by_g = np.zeros((kf, kg, Jf)), np.zeros((kf, kg, Jg))
    effect = column % kg
    for a in range(kf):
        key = effect * Jf + level
        by_f[a] = np.bincount(key, squares[a], minlength=kg * Jf).reshape(kg, Jf)
        key = effect * Jg + column // kg
        by_g[a] = np.bincount(key, squares[a], minlength=kg * Jg).reshape(kg, Jg)
    return by_f, by_g
