"""Elimination of random effects: leaf to root by segment sums, then the crossed tail.

For a block f with cross-products H_ff, H_fr (r: its ancestors, the tail, X and y) the
effects are integrated out level by level:

    M_f = Lambda' H_ff Lambda + I,       N_f = Lambda M_f^-1 Lambda'
    H_rr <- H_rr - H_rf N_f H_fr         summed over the levels of f                (1)

which is the Schur complement of the penalized normal equations (Henderson's). N_f
depends on Lambda through Q = Lambda Lambda' alone and stays regular at Q = 0. After the
chain the tail's own system S = Lambda_R' H_RR Lambda_R + I is solved at once, and what
is left is T, the (p + 1, p + 1) Gram matrix of [X y] in the metric V^-1, with
V = I + Z Q Z'; the log-determinants add up to log|V|.

Shapes: chain blocks (K, K, J), (K, D, J), levels last; D = q_R + p + 1.

References: Bates et al. (2015), J. Stat. Softw. 67(1), doi:10.18637/jss.v067.i01;
Henderson (1975), Biometrics 31(2), doi:10.2307/2529430.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxglmm.crossproducts import CrossProducts
from jaxglmm.linalg import block_matmul, spd_inverse, spd_solve
from jaxglmm.plan import Layout, Pairs
from jaxglmm.rowsums import SparseTail
from jaxglmm.typing import Array

__all__ = [
    "Eliminated",
    "ancestor",
    "conditional_covariances",
    "conditional_modes",
    "effects_from_noise",
    "eliminate",
    "entries_by_column",
    "outer_pairs",
    "outer_xy",
    "reduce_levels",
    "solve_effects",
    "split_terms",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eliminated:
    """What elimination leaves behind.

    T (p + 1, p + 1): [X y]' V^-1 [X y]. logdet: log|V|. ``M_inv[f]``, ``N[f]``
    (K, K, J), and ``own[f]``, ``up[f]``, ``tail[f]``: the cross-products of block f
    when its turn came. ``S_inv`` (q_R, q_R): inverse of the tail's system in spherical
    effects; ``H_tail`` (q_R, p + 1) its right-hand sides.
    """

    T: Array
    logdet: Array
    M_inv: tuple[Array, ...]
    N: tuple[Array, ...]
    own: tuple[Array, ...]
    up: tuple[tuple[Array, ...], ...]
    tail: tuple[Array | SparseTail, ...]
    S_inv: Array
    H_tail: Array


def eliminate(
    factors: tuple[Array, ...], cp: CrossProducts, layout: Layout
) -> Eliminated:
    """Integrate all random effects out of the cross-products, equation (1).

    ``factors`` holds Lambda (K, K) of every block, any root of its Q.
    """
    own, up = list(cp.own), [list(u) for u in cp.up]
    tail, gram = list(cp.tail), cp.gram
    logdet = jnp.zeros((), gram.dtype)
    M_inv, N = [], []
    for f in range(layout.n_chain):
        M_inv_f, N_f, logdet_f = reduce_levels(factors[f], own[f])
        M_inv.append(M_inv_f)
        N.append(N_f)
        if f == 0 and cp.counts is not None:
            logdet_f = cp.counts * logdet_f
        logdet = logdet + jnp.sum(logdet_f)
        gram = gram - _outer_tail(tail[f], N_f, gram.shape[0])
        for g in range(f + 1, layout.n_chain):
            up_g = jnp.swapaxes(up[f][g - f - 1], 0, 1)
            H_N = block_matmul(up_g, N_f)
            level = ancestor(cp.parents, f, g)
            n_levels = layout.blocks[g].n_levels
            own[g] = own[g] - _to_levels(
                block_matmul(H_N, up[f][g - f - 1]), level, n_levels
            )
            for h in range(g + 1, layout.n_chain):
                step = block_matmul(H_N, up[f][h - f - 1])
                up[g][h - g - 1] = up[g][h - g - 1] - _to_levels(step, level, n_levels)
            step = block_matmul(H_N, tail[f])
            tail[g] = tail[g] - _to_levels(step, level, n_levels)
    T, logdet_tail, S_inv, H_tail = _eliminate_tail(gram, factors, layout)
    return Eliminated(
        T,
        logdet + logdet_tail,
        tuple(M_inv),
        tuple(N),
        tuple(own),
        tuple(map(tuple, up)),
        tuple(tail),
        S_inv,
        H_tail,
    )


def reduce_levels(Lam: Array, H: Array) -> tuple[Array, Array, Array]:
    """M^-1, N = Lambda M^-1 Lambda' and log|M| of every level."""
    k = Lam.shape[0]
    L = Lam[:, :, None]
    LT = Lam.T[:, :, None]
    eye = jnp.eye(k, dtype=H.dtype)[:, :, None]
    M_inv, logdet = spd_inverse(block_matmul(block_matmul(LT, H), L) + eye)
    return M_inv, block_matmul(block_matmul(L, M_inv), LT), logdet


def ancestor(parents: tuple[Array, ...], f: int, g: int) -> Array:
    """Level of block g in which each level of block f lies."""
    level = parents[f]
    for h in range(f + 1, g):
        level = parents[h][level]
    return level


def _to_levels(x: Array, level: Array, n_levels: int) -> Array:
    """Sum the last axis by level, (..., J_f) -> (..., J_g)."""
    return jnp.zeros((*x.shape[:-1], n_levels), x.dtype).at[..., level].add(x)


def _flat(x: Array) -> Array:
    """(K, D, J) -> (D, K J)."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2])


def _outer_tail(H: Array | SparseTail, N: Array, size: int) -> Array:
    """Sum over levels of H' N H, (D, D)."""
    if not isinstance(H, SparseTail):
        return _flat(H) @ _flat(block_matmul(N, H)).T
    side, corner = outer_xy(H, N, size - H.xy.shape[1])
    top = jnp.concatenate([outer_pairs(H, N, side.shape[0]), side], axis=1)
    return jnp.concatenate([top, jnp.concatenate([side.T, corner], axis=1)])


def outer_xy(H: SparseTail, N: Array, n_columns: int) -> tuple[Array, Array]:
    """Sums over levels of H_R' N H_xy (q_R, p + 1) and H_xy' N H_xy."""
    NH_xy = block_matmul(N, H.xy)
    side = entries_by_column(H, NH_xy, n_columns)
    return side, _flat(H.xy) @ _flat(NH_xy).T


def entries_by_column(H: SparseTail, x: Array, n_columns: int) -> Array:
    """Sum of v_e' x by tail column, (K, c, J) -> (q_R, c)."""
    by_level = jnp.moveaxis(x, 2, 0)[H.pairs.level]
    terms = jnp.sum(H.value.T[:, :, None] * by_level, axis=1)
    return jax.ops.segment_sum(terms, H.pairs.column, num_segments=n_columns)


def outer_pairs(H: SparseTail, N: Array, size: int) -> Array:
    """Sum over pairs of entries of v_left' N v_right, scattered and mirrored."""
    pairs = H.pairs
    NV = jnp.sum(N[:, :, pairs.level] * H.value[None], axis=1)  # (K, E)
    products = jnp.sum(H.value[:, pairs.left] * NV[:, pairs.right], axis=0)
    sums = jax.ops.segment_sum(
        products, pairs.target, num_segments=pairs.row.shape[0], indices_are_sorted=True
    )
    upper = jnp.zeros((size, size), sums.dtype)
    upper = upper.at[pairs.row, pairs.col].set(
        sums, indices_are_sorted=True, unique_indices=True
    )
    return upper + jnp.triu(upper, 1).T


# ---- the tail ----------------------------------------------------------------------


def _tail_rows(x: Array, factors, layout: Layout, transpose: bool) -> Array:
    """Lambda_R' x (or Lambda_R x), block by block on the rows of (q_R, c)."""
    parts, start = [], 0
    for b, Lam in zip(layout.tail, factors[layout.n_chain :]):
        part = x[start : start + b.size]
        L = Lam.T if transpose else Lam
        if b.k == 1:
            parts.append(part * L[0, 0])
        else:
            cube = part.reshape(b.n_levels, b.k, -1)
            parts.append(jnp.einsum("ab,jbc->jac", L, cube).reshape(part.shape))
        start += b.size
    return jnp.concatenate(parts)


def _eliminate_tail(gram: Array, factors, layout: Layout):
    q = layout.tail_size
    zero = jnp.zeros((), gram.dtype)
    if q == 0:
        return gram, zero, gram[:0, :0], gram[:0]
    half = _tail_rows(gram[:q], factors, layout, transpose=True)
    S = _tail_rows(half[:, :q].T, factors, layout, transpose=True)
    H = half[:, q:]
    solution, logdet, S_inv = spd_solve(S + jnp.eye(q, dtype=S.dtype), H)
    return gram[q:, q:] - H.T @ solution, logdet, S_inv, H


# ---- back-substitution -------------------------------------------------------------

Effects = tuple[Array, ...]  # (J, K) of every block, in the order of elimination


def conditional_modes(
    factors: tuple[Array, ...],
    done: Eliminated,
    beta: Array,
    cp: CrossProducts,
    layout: Layout,
) -> tuple[Effects, Effects]:
    """Conditional modes b = u Lambda' and u of every block, (J, K) each.

    Henderson's equations from the root back to the leaf, given beta (p,), all in inner
    units, with the right-hand sides H_f,xy (-beta, 1)' that elimination left.
    """
    c = jnp.append(-beta, 1.0)
    half = []
    for H, Lam in zip(done.tail, factors):
        xy = H.xy if isinstance(H, SparseTail) else H[:, layout.tail_size :]
        half.append(Lam.T @ jnp.einsum("kdj,d->kj", xy, c))
    u_tail = done.S_inv @ (done.H_tail @ c)
    return _back_substitute(factors, done, half, u_tail, cp.parents, layout)


def solve_effects(
    factors: tuple[Array, ...],
    done: Eliminated,
    right: Effects,
    parents: tuple[Array, ...],
    layout: Layout,
) -> tuple[Effects, Effects]:
    """Solve (Lambda' Z'WZ Lambda + I) u = right for (J, K) arrays; u Lambda' and u."""
    n_chain = layout.n_chain
    half = [r.T for r in right[:n_chain]]
    none = jnp.zeros(0, right[0].dtype)
    tail = jnp.concatenate([none, *(jnp.ravel(r) for r in right[n_chain:])])
    pull = jnp.zeros_like(tail)
    for f in range(n_chain):
        b = factors[f] @ jnp.sum(done.M_inv[f] * half[f][None], axis=1)
        for g in range(f + 1, n_chain):
            moved = jnp.sum(done.up[f][g - f - 1] * b[:, None], axis=0)
            level, n_levels = ancestor(parents, f, g), layout.blocks[g].n_levels
            half[g] = half[g] - factors[g].T @ _to_levels(moved, level, n_levels)
        if layout.tail:
            pull = pull + _tail_transposed(done.tail[f], b, layout.tail_size)
    if layout.tail:
        tail = tail - _tail_rows(pull[:, None], factors, layout, transpose=True)[:, 0]
        tail = done.S_inv @ tail
    return _back_substitute(factors, done, half, tail, parents, layout)


def _tail_transposed(H: Array | SparseTail, x: Array, size: int) -> Array:
    """Sum over levels of H_R' x, (q_R,), for x (K, J)."""
    if not isinstance(H, SparseTail):
        return jnp.einsum("kdj,kj->d", H[:, :size], x)
    terms = jnp.sum(H.value * x[:, H.pairs.level], axis=0)
    return jax.ops.segment_sum(terms, H.pairs.column, num_segments=size)


def _back_substitute(
    factors, done: Eliminated, half, u_tail: Array, parents, layout: Layout
) -> tuple[Effects, Effects]:
    """From the root back to the leaf, given the tail's u; b = u Lambda' and u.

    u_f = M_f^-1 (half_f - Lambda_f' sum_r H_fr b_r)     over the blocks r behind f
    """
    b_tail = u_tail
    if layout.tail:
        b_tail = _tail_rows(u_tail[:, None], factors, layout, transpose=False)[:, 0]
    modes: list[Array] = [None] * layout.n_chain
    spherical: list[Array] = [None] * layout.n_chain
    for f in reversed(range(layout.n_chain)):
        rest, Lam = half[f], factors[f]
        if layout.tail:
            rest = rest - Lam.T @ _apply_tail(done.tail[f], b_tail)
        for g in range(f + 1, layout.n_chain):
            b_g = modes[g][:, ancestor(parents, f, g)]
            rest = rest - Lam.T @ jnp.sum(done.up[f][g - f - 1] * b_g[None], axis=1)
        spherical[f] = jnp.sum(done.M_inv[f] * rest[None], axis=1)  # (K, J)
        modes[f] = Lam @ spherical[f]
    b, u = [m.T for m in modes], [m.T for m in spherical]
    start = 0
    for block in layout.tail:
        shape, at = (block.n_levels, block.k), slice(start, start + block.size)
        b.append(b_tail[at].reshape(shape))
        u.append(u_tail[at].reshape(shape))
        start += block.size
    return tuple(b), tuple(u)


def effects_from_noise(
    factors,
    done: Eliminated,
    noise: Effects,
    parents: tuple[Array, ...],
    layout: Layout,
) -> Effects:
    """Spherical effects (J, K) of every block from their noise, root to leaf.

        u_f = noise_f - M_f^-1 Lambda' sum_r H_fr b_r

    over the blocks r behind f. With independent noise of covariance M_f^-1 (K, K, J) by
    level, and S^-1 in the tail, that of u is M^-1.
    """
    n_chain = layout.n_chain
    b_tail = jnp.zeros(0, noise[0].dtype)
    if layout.tail:
        flat = jnp.concatenate([jnp.ravel(v) for v in noise[n_chain:]])
        b_tail = _tail_rows(flat[:, None], factors, layout, transpose=False)[:, 0]
    modes: list[Array] = [None] * n_chain
    u: list[Array] = [None] * n_chain
    for f in reversed(range(n_chain)):
        pull = jnp.zeros_like(noise[f].T)
        if layout.tail:
            pull = pull + _apply_tail(done.tail[f], b_tail)
        for g in range(f + 1, n_chain):
            b_g = modes[g][:, ancestor(parents, f, g)]
            pull = pull + jnp.sum(done.up[f][g - f - 1] * b_g[None], axis=1)
        pull = factors[f].T @ pull
        u[f] = noise[f].T - jnp.sum(done.M_inv[f] * pull[None], axis=1)
        modes[f] = factors[f] @ u[f]
    return (*(v.T for v in u), *noise[n_chain:])


def _apply_tail(H: Array | SparseTail, x: Array) -> Array:
    """H_fR x for x (q_R,), (K, J)."""
    if not isinstance(H, SparseTail):
        return jnp.einsum("kdj,d->kj", H[:, : x.shape[0]], x)
    terms = H.value * x[H.pairs.column][None]
    zero = jnp.zeros((H.value.shape[0], H.xy.shape[2]), terms.dtype)
    return zero.at[:, H.pairs.level].add(terms)


def conditional_covariances(
    factors: tuple[Array, ...], done: Eliminated, cp: CrossProducts, layout: Layout
) -> tuple[Array, ...]:
    """Var(b | y) / sigma^2 at fixed beta and theta, (J, K, K) for every block.

    Root to leaf: b_f = -N_f sum_r H_fr b_r + noise of covariance N_f. ``joint`` is the
    covariance of a level's own and its ancestors' noise, ``P`` (K, q_R, J) what of
    b_f follows the tail.
    """
    q = layout.tail_size
    V_tail = done.S_inv
    if q:
        half = _tail_rows(V_tail, factors, layout, transpose=False)
        V_tail = _tail_rows(half.T, factors, layout, transpose=False)
    out: list[Array] = [None] * layout.n_chain
    joint: Array | None = None  # of the blocks above, (K+, K+, J)
    P: list[Array] = [None] * layout.n_chain
    for f in reversed(range(layout.n_chain)):
        N = done.N[f]
        above = done.up[f]
        cov = N
        if above:
            assert joint is not None
            A = -block_matmul(N, jnp.concatenate(above, axis=1))  # (K, K+, J)
            up = joint[:, :, cp.parents[f]]
            cross = block_matmul(A, up)
            cov = N + block_matmul(cross, jnp.swapaxes(A, 0, 1))
            top = jnp.concatenate([cov, cross], axis=1)
            joint = jnp.concatenate(
                [top, jnp.concatenate([jnp.swapaxes(cross, 0, 1), up], axis=1)]
            )
        else:
            joint = N
        if q:
            cov = cov + _tail_share(f, done, P, V_tail, cp, layout)
        out[f] = jnp.moveaxis(cov, 2, 0)
    start = 0
    for b in layout.tail:
        square = V_tail[start : start + b.size, start : start + b.size]
        cube = square.reshape(b.n_levels, b.k, b.n_levels, b.k)
        levels = jnp.arange(b.n_levels)
        out.append(cube[levels, :, levels, :])
        start += b.size
    return tuple(out)


def _tail_share(
    f: int, done: Eliminated, P, V_tail: Array, cp, layout: Layout
) -> Array:
    """What the tail's uncertainty adds to the covariance of block f, (K, K, J)."""
    H, N = done.tail[f], done.N[f]
    q = layout.tail_size
    if isinstance(H, SparseTail):
        return _tail_share_pairs(H, N, V_tail)
    follow = H[:, :q]
    for g in range(f + 1, layout.n_chain):
        above = P[g][:, :, ancestor(cp.parents, f, g)]
        follow = follow + block_matmul(done.up[f][g - f - 1], above)
    P[f] = -block_matmul(N, follow)
    return jnp.einsum("kaj,ab,lbj->klj", P[f], V_tail, P[f])


def _tail_share_pairs(H: SparseTail, N: Array, V_tail: Array) -> Array:
    pairs: Pairs = H.pairs
    V = V_tail[pairs.row, pairs.col][pairs.target]
    V = jnp.where(pairs.left == pairs.right, 0.5, 1.0) * V
    left, right = H.value[:, pairs.left], H.value[:, pairs.right]
    outer = left[:, None] * right[None, :] * V[None, None]
    k, n_levels = N.shape[0], N.shape[2]
    sums = jnp.zeros((k, k, n_levels), outer.dtype)
    sums = sums.at[:, :, pairs.level[pairs.left]].add(outer)
    sums = sums + jnp.swapaxes(sums, 0, 1)
    return block_matmul(block_matmul(N, sums), N)


def split_terms(values: tuple[Array, ...], layout: Layout) -> tuple[Array, ...]:
    """Columns of every block's (J, K) effects, handed to its terms: (J, k) per term."""
    out: dict[int, Array] = {}
    for block, value in zip(layout.blocks, values):
        start = 0
        for t in block.terms:
            k = layout.term_k[t]
            out[t] = value[:, start : start + k]
            start += k
    return tuple(out[t] for t in range(len(layout.term_k)))
