"""Starting values by the method of moments.

V = R + sum_i q_i V_i is linear in the entries q of the covariances Q: V_i is
Z_a Z_b' (+ its transpose) for two effects a, b of one term, Z_a (n, J) the column a by
level. With P the residual projection of X in the metric W, quadratic forms of y have

    E y'P V_i P y = sum_k A_ik psi_k + t_i phi,      A_ik = tr(P V_i P V_k)
    E y'P y       = sum_k t_k psi_k + phi dof,       t_i = tr(P V_i),              (1)

a linear system for psi = phi q and the residual variance phi: the norm quadratic
estimator at q = 0 (MINQUE). On balanced data with unstructured covariances it is the
REML estimate wherever that is inside, and elsewhere near enough for Newton to need a
few steps. X is whitened, so with S = Z'WZ and C = Z'WX / sqrt(n)

    Z'PZ = S - C C',     tr(P V_i P V_k) = sum of products of its entries,         (2)

all from cross-products at hand: nothing is as large as a dense q x q matrix unless the
plan has it so. theta starts at the Cholesky factor of Q. The criterion is stationary at
a variance of zero, and has a lesser optimum there at times, so variances start no
nearer to it than their standard errors (2 A^-1 is their covariance, relative to phi),
and correlations stay away from +-1.

The same code runs on NumPy and on JAX arrays.

References: Rao (1971), J. Multivariate Anal. 1(3), doi:10.1016/0047-259X(71)90001-7.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.covariance import structure
from jaxglmm.crossproducts import CrossProducts
from jaxglmm.elimination import ancestor
from jaxglmm.linalg import spd_inverse
from jaxglmm.plan import Layout
from jaxglmm.rowsums import SparseTail
from jaxglmm.typing import Array

__all__ = ["default_start", "moment_start", "relative_covariances", "theta_near"]

_RANGE = (0.1, 100.0)  # of a starting relative standard deviation, in inner units
_RANGE_LINK = (0.1, 10.0)  # on the scale of a linear predictor
_CORRELATION = 0.9  # the largest at a start
_RIDGE = 1e-9  # relative; keeps confounded variances apart
_MOST_EFFECTS = 8  # of one grouping factor; with more the default start is good enough


def default_start(layout: Layout) -> np.ndarray:
    """Starting theta in inner units: unit standard deviations, no correlation."""
    per_term = [structure(s).start(k) for k, s in zip(layout.term_k, layout.structures)]
    return np.concatenate([np.asarray(t, float) for t in per_term])


def moment_start(
    cp: CrossProducts,
    layout: Layout,
    xp: ModuleType,
) -> Array:
    """Starting theta (m,) in inner units.

    Terms of other structures than full, diag and scalar start at their default.
    """
    usual = default_start(layout)
    if max(b.k for b in layout.blocks) > _MOST_EFFECTS:
        return xp.asarray(usual, cp.gram.dtype)
    if xp is jnp:
        cp = jax.tree.map(lax.stop_gradient, cp)
    Q, error = relative_covariances(cp, layout, xp)
    Q = [
        q + xp.diag(xp.maximum(xp.diagonal(e) - xp.diagonal(q), 0.0))
        for q, e in zip(Q, error)
    ]
    theta = _theta(Q, layout, xp, _RANGE)
    return xp.where(xp.all(xp.isfinite(theta)), theta, xp.asarray(usual, theta.dtype))


def theta_near(Q: list[Array], layout: Layout) -> Array:
    """Theta (m,) near covariances Q (k, k) of every term on a linear predictor's scale.

    Away from the boundary and from where numbers end; other structures than full, diag
    and scalar at their default.
    """
    common = [structure(name).common for name in layout.structures]
    Q = [
        jnp.mean(jnp.diagonal(q)) * jnp.eye(q.shape[0], dtype=q.dtype) if one else q
        for q, one in zip(Q, common)
    ]
    return _theta(Q, layout, jnp, _RANGE_LINK)


# ---- the linear system -------------------------------------------------------------


class _Index(NamedTuple):
    """The V_i of every block, and where psi stands in the covariances.

    ``pairs[f]``: effects a, b (m,) of block f. ``gather`` (r, m) adds those that share
    a parameter, twice where a and b differ. ``place[t]`` (k, k): the parameter of each
    entry of Q, r for none.
    """

    pairs: tuple[tuple[np.ndarray, np.ndarray], ...]
    gather: np.ndarray
    place: tuple[np.ndarray, ...]


def _index(layout: Layout) -> _Index:
    pairs, owner, place = [], [], {}
    n_parameters = 0
    for block in layout.blocks:
        a, b, first = [], [], 0
        for t in block.terms:
            k, kind = layout.term_k[t], structure(layout.structures[t])
            at = [(i, j) for i in range(k) for j in range(i + 1)]
            if not kind.triangular:
                at = [(i, i) for i in range(k)]
            place[t] = np.full((k, k), -1)
            for i, j in at:
                new = not (kind.common and i > 0)
                n_parameters += new
                place[t][i, j] = place[t][j, i] = n_parameters - 1
                owner.append(n_parameters - 1)
                a.append(first + i)
                b.append(first + j)
            first += k
        pairs.append((np.array(a), np.array(b)))
    weight = np.concatenate([np.where(a == b, 1.0, 2.0) for a, b in pairs])
    where = [place[t] for t in range(len(layout.term_k))]
    where = [np.where(at < 0, n_parameters, at) for at in where]
    return _Index(tuple(pairs), np.eye(n_parameters)[:, owner] * weight, tuple(where))


def relative_covariances(cp, layout: Layout, xp) -> tuple[list[Array], list[Array]]:
    """Moment estimates of Q (k, k) of every term, relative to the residual variance.

    And their standard errors where Q is zero.
    """
    blocks = range(len(layout.blocks))
    index = _index(layout)
    xy = [_with_columns(cp, layout, f) for f in blocks]
    C = [v[:, :-1] / xp.sqrt(cp.n) for v in xy]
    G = [xp.transpose(xp.tensordot(c, c, (2, 2)), (0, 2, 1, 3)) for c in C]
    rows: list[list[Array]] = [[] for _ in blocks]
    t, s = [], []
    for f in blocks:
        own, right = _own(cp, layout, f), xy[f][:, -1]
        a, b = index.pairs[f]
        trace = xp.sum(own, axis=2) - xp.einsum("abpp->ab", G[f])
        t.append(trace[a, b])
        s.append(xp.sum(right[a] * right[b], axis=1))
        for g in blocks:
            if g < f:
                rows[f].append(rows[g][f].T)
                continue
            S = _Entries(own) if g == f else _between(cp, layout, f, g)
            full = _products(S, C[f], C[g], xp)
            full = full + xp.einsum("bapq,cdpq->bcad", G[f], G[g])
            c, d = index.pairs[g]
            i, j = a[:, None], b[:, None]
            rows[f].append(0.5 * (full[j, c, i, d] + full[j, d, i, c]))
    dtype = cp.gram.dtype
    gather = xp.asarray(index.gather, dtype)
    A = xp.concatenate([xp.concatenate(r, axis=1) for r in rows])
    A = gather @ A @ gather.T
    t, s = gather @ xp.concatenate(t), gather @ xp.concatenate(s)
    q, error = _solve(A, t, s, cp, xp)
    none = xp.zeros(1, dtype)
    q, error = xp.concatenate([q, none]), xp.concatenate([error, none])
    return [q[at] for at in index.place], [error[at] for at in index.place]


def _solve(A: Array, t: Array, s: Array, cp, xp) -> tuple[Array, Array]:
    """Solve system (1) for q = psi / phi, (r,); standard errors at q = 0."""
    dof = cp.n - cp.p
    total = cp.gram[-1, -1]
    A = A - t[:, None] * t[None, :] / dof
    s = s - t * (total / dof)
    scale = xp.sqrt(xp.diagonal(A))
    scale = xp.where(scale > 0, scale, 1.0)
    A = A / (scale[:, None] * scale[None, :])
    A = A + _RIDGE * xp.eye(A.shape[0], dtype=A.dtype)
    # the inverse itself is wanted: its diagonal holds the estimates' variances
    inverse = np.linalg.inv(A) if xp is np else spd_inverse(A)[0]
    psi = inverse @ (s / scale) / scale
    error = xp.sqrt(2.0 * xp.diagonal(inverse)) / scale
    # a share of the whole, however much the effects seem to explain
    return psi / xp.maximum((total - t @ psi) / dof, 1e-4 * total / dof), error


# ---- products of the entries of Z'PZ -----------------------------------------------


class _Entries(NamedTuple):
    """Entries of S = Z_f'WZ_g: values (K_f, K_g, E) and the levels that they join.

    ``levels`` (E,) of f and of g; None where they are all the same, in order.
    """

    value: Array
    levels: tuple[Array | None, Array] | None = None


def _products(S: _Entries | Array, C_f: Array, C_g: Array, xp) -> Array:
    """S S - S (C C') - (C C') S, summed over all levels: (K_f, K_g, K_f, K_g).

    At [b, c, a, d]: entries of effects b, c times those of a, d. A dense S is
    (K_f, K_g, J_f, J_g).
    """
    if isinstance(S, _Entries):
        value = S.value
        if S.levels is not None:
            of_f, of_g = S.levels
            C_f = C_f if of_f is None else C_f[:, :, of_f]
            C_g = C_g[:, :, of_g]
        CC = xp.sum(C_f[:, None] * C_g[None], axis=2)  # (K_f, K_g, E)
        cross = xp.einsum("bce,ade->bcad", value, CC)
        square = xp.einsum("bce,ade->bcad", value, value)
    else:
        moved = xp.einsum("bcjl,dpl->bcdjp", S, C_g)
        cross = xp.einsum("bcdjp,apj->bcad", moved, C_f)
        square = xp.einsum("bcjl,adjl->bcad", S, S)
    return square - cross - xp.transpose(cross, (2, 3, 0, 1))


def _tail_slice(layout: Layout, f: int) -> slice:
    start = sum(b.size for b in layout.blocks[layout.n_chain : f])
    return slice(start, start + layout.blocks[f].size)


def _with_columns(cp: CrossProducts, layout: Layout, f: int) -> Array:
    """Z_f' W [X y] by level, (K, p + 1, J)."""
    if f < layout.n_chain:
        H = cp.tail[f]
        return H.xy if isinstance(H, SparseTail) else H[:, layout.tail_size :]
    block = layout.blocks[f]
    columns = cp.gram[_tail_slice(layout, f), layout.tail_size :]
    return columns.reshape(block.n_levels, block.k, -1).transpose(1, 2, 0)


def _own(cp: CrossProducts, layout: Layout, f: int) -> Array:
    """Z_f' W Z_f by level, (K, K, J)."""
    if f < layout.n_chain:
        return cp.own[f]
    block, at = layout.blocks[f], _tail_slice(layout, f)
    J, K = block.n_levels, block.k
    levels = np.arange(J)
    square = cp.gram[at, at].reshape(J, K, J, K)
    return square[levels, :, levels, :].transpose(1, 2, 0)


def _between(cp: CrossProducts, layout: Layout, f: int, g: int) -> _Entries | Array:
    """Z_f' W Z_g of two blocks f < g, as entries or dense (K_f, K_g, J_f, J_g)."""
    kf, kg = layout.blocks[f].k, layout.blocks[g].k
    Jf, Jg = layout.blocks[f].n_levels, layout.blocks[g].n_levels
    if g < layout.n_chain:
        return _Entries(cp.up[f][g - f - 1], (None, ancestor(cp.parents, f, g)))
    at = _tail_slice(layout, g)
    if f >= layout.n_chain:
        block = cp.gram[_tail_slice(layout, f), at].reshape(Jf, kf, Jg, kg)
        return block.transpose(1, 3, 0, 2)
    H = cp.tail[f]
    if not isinstance(H, SparseTail):
        return H[:, at].reshape(kf, Jg, kg, Jf).transpose(0, 2, 3, 1)
    first = sum(H.pairs.counts[: g - layout.n_chain])
    here = slice(first, first + H.pairs.counts[g - layout.n_chain])
    # the effects of one level stand one after the other
    value = H.value[:, here].reshape(kf, -1, kg).transpose(0, 2, 1)
    level_g = (H.pairs.column[here][::kg] - at.start) // kg
    return _Entries(value, (H.pairs.level[here][::kg], level_g))


# ---- from covariances to theta -----------------------------------------------------


def _theta(Q: list[Array], layout: Layout, xp, limits) -> Array:
    """Theta (m,) of relative covariances, moved into the range of a start."""
    parts = []
    for t, (k, name) in enumerate(zip(layout.term_k, layout.structures)):
        kind, dtype = structure(name), Q[t].dtype
        v = xp.clip(xp.diagonal(Q[t]), limits[0] ** 2, limits[1] ** 2)
        if kind.triangular:
            assert kind.row is not None
            assert kind.column is not None
            L = _cholesky(Q[t], v, xp)
            parts.extend(L[i][j] for i, j in zip(kind.row(k), kind.column(k)))
        elif name in ("diag", "scalar"):
            parts.extend(xp.sqrt(v[i]) for i in range(kind.n_theta(k)))
        else:
            parts.extend(xp.asarray(x, dtype) for x in kind.start(k))
    return xp.stack(parts)


def _cholesky(Q: Array, v: Array, xp) -> list[list[Array]]:
    """Rows of a lower triangular L with about L L' = Q, whatever Q is.

    v (k,) holds the variances; correlations, and what is left of a variance beside
    earlier effects, are kept away from the boundary.
    """
    limit = _CORRELATION * xp.sqrt(v[:, None] * v[None, :])
    Q = xp.clip(Q, -limit, limit)
    rows: list[list[Array]] = []
    for i in range(len(v)):
        row: list[Array] = []
        for j in range(i):
            inner = sum(row[c] * rows[j][c] for c in range(j))
            row.append((Q[i, j] - inner) / rows[j][j])
        rest = v[i] - sum(x**2 for x in row)
        row.append(xp.sqrt(xp.maximum(rest, (1.0 - _CORRELATION) * v[i])))
        rows.append(row)
    return rows
