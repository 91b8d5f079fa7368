"""Value, gradient and Hessian for large crossed designs, at the cost of few products.

Where the leaf meets a sparse tail of intercepts (``(1 | s) + (1 | d) + ...``), with
tail scales lambda and C = H_RR after the leaf's elimination,

    A = lambda C lambda,   S = A + I,   log|S| with  d2 log|S| = tr(S^-1 d2 S) - K,
    K_ab = tr(S^-1 dS_a S^-1 dS_b).                                                (1)

All else in the criterion needs S^-1 only once. With W = S^-1 and Y = S^-1 H frozen at
the point in hand,

    log|S(theta)| = const + <W, S(theta)> + second order (K)
    H' S^-1 H     = 2 H' Y1 - Y1' S(theta) Y1,     Y1 = Y + W (H - S(theta) Y)     (2)

and (2) is exact to third order. <W, S(theta)> collapses to sums by leaf level, S(theta)
times few columns needs only the entries, so (1) and (2) leave a cheap function whose
derivatives JAX takes. In K the tail's directions follow from S^-1 A = I - S^-1:

    K_tu = 2 (|(I - W)_tu|^2 + <W_tu, (A - I + W)_tu>) / (lambda_t lambda_u)
    K_st = 2 sum_{i in t} <M_s, I - W>_i / lambda_t,    M_s = S^-1 dS_s

elementwise sums over blocks; one matrix product for each parameter of the leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.coordinates import Order, block_factors
from jaxglmm.covariance import structure
from jaxglmm.crossproducts import CrossProducts
from jaxglmm.elimination import (
    entries_by_column,
    outer_pairs,
    outer_xy,
    reduce_levels,
)
from jaxglmm.linalg import block_matmul, spd_inverse
from jaxglmm.lmm import criterion
from jaxglmm.plan import Layout
from jaxglmm.rowsums import SparseTail
from jaxglmm.typing import Array

__all__ = ["applies", "crossed_value_grad_hess"]

_LEAST = 1e-5  # K_tu loses eps / lambda^2 digits: evaluated no closer to zero


def applies(cp: CrossProducts, layout: Layout) -> bool:
    """Whether the tail is sparse and made of single intercept-like terms."""
    linear = ("full", "diag", "scalar")
    return isinstance(cp.tail[0], SparseTail) and all(
        b.k == 1 and layout.structures[b.terms[0]] in linear for b in layout.tail
    )


def crossed_value_grad_hess(
    cp: CrossProducts, layout: Layout, reml: Array, sigma2: Array | None = None
) -> Callable[[Array, Order], tuple[Array, Array, Array, Order]]:
    """Function (theta (m,), order) -> value (), gradient (m,), Hessian (m, m)."""
    leaf_theta, tail_theta = _theta_positions(layout)
    sizes = [b.size for b in layout.tail]
    kind = np.repeat(np.arange(len(sizes)), sizes)  # tail block of every column
    tail: SparseTail = cp.tail[0]  # type: ignore[assignment]

    def fn(theta: Array, order: Order) -> tuple[Array, Array, Array, Order]:
        def leaf(theta):
            Lam = block_factors(theta, layout, order)[0]
            return reduce_levels(Lam, cp.own[0])[1:]

        lam = jnp.where(jnp.abs(theta[tail_theta]) < _LEAST, _LEAST, theta[tail_theta])[
            kind
        ]
        q = lam.shape[0]
        N, _ = leaf(theta)
        C = cp.gram[:q, :q] - outer_pairs(tail, N, q)
        A = lam[:, None] * C * lam[None, :]
        W, logdet = spd_inverse(A + jnp.eye(q, dtype=A.dtype))
        near = _local_model(theta, W, logdet, leaf, cp, layout, tail_theta, kind)

        def model(theta):
            return criterion(*near(theta), cp, reml, sigma2).objective

        value_and_grad = jax.value_and_grad(model)
        (value, grad), along = jax.linearize(value_and_grad, theta)
        _, hess = jax.vmap(along)(jnp.eye(theta.shape[0], dtype=theta.dtype))
        K = _trace_part(
            theta, A, W, lam, leaf, tail, layout, leaf_theta, tail_theta, sizes
        )
        return value, grad, hess - K, order

    return fn


def _theta_positions(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Positions in theta of the leaf's parameters and of the tail's scales."""
    counts = [structure(s).n_theta(k) for k, s in zip(layout.term_k, layout.structures)]
    starts = np.concatenate([[0], np.cumsum(counts)])
    leaf = [np.arange(starts[t], starts[t + 1]) for t in sorted(layout.blocks[0].terms)]
    tail = [starts[b.terms[0]] for b in layout.tail]
    return np.concatenate(leaf).astype(int), np.array(tail, int)


# ---- the cheap function: equation (2) ----------------------------------------------


def _local_model(theta0, W, logdet, leaf, cp, layout, tail_theta, kind):
    """T and log|V| near theta0, without K: exact but for that part."""
    tail = cp.tail[0]
    q = W.shape[0]
    C0, Cx0, G0 = cp.gram[:q, :q], cp.gram[:q, q:], cp.gram[q:, q:]
    base = _block_sums(W * C0, layout)
    by_level = _pair_sums(W, tail, cp.own[0].shape, layout, kind)

    def parts(theta):
        lam = theta[tail_theta]
        N, logdet_leaf = leaf(theta)
        inner = base - jnp.sum(N[..., None, None] * by_level, axis=(0, 1, 2))
        trace = jnp.sum(lam[:, None] * lam[None, :] * inner)
        return lam[kind], N, jnp.sum(logdet_leaf), trace

    def system(lam, N, X):
        """S(theta) X for few columns, by the entries."""
        scaled = lam[:, None] * X
        met = jnp.zeros((tail.value.shape[0], X.shape[1], N.shape[2]), X.dtype)
        columns = scaled[tail.pairs.column].T  # (c, E)
        met = met.at[:, :, tail.pairs.level].add(tail.value[:, None] * columns[None])
        back = entries_by_column(tail, block_matmul(N, met), q)
        return lam[:, None] * (C0 @ scaled - back) + X

    lam0, N0, _, trace0 = parts(theta0)
    H0 = lam0[:, None] * (Cx0 - entries_by_column(tail, block_matmul(N0, tail.xy), q))
    Y = jax.lax.stop_gradient(W @ H0)

    def model(theta):
        lam, N, logdet_leaf, trace = parts(theta)
        side, corner = outer_xy(tail, N, q)
        H = lam[:, None] * (Cx0 - side)
        Y1 = Y + W @ (H - system(lam, N, Y))
        HY = H.T @ Y1
        T = G0 - corner - (HY + HY.T - Y1.T @ system(lam, N, Y1))
        change = trace - jax.lax.stop_gradient(trace0)
        return T, logdet_leaf + logdet + change

    return model


def _block_sums(X: Array, layout: Layout) -> Array:
    """Sums over the blocks of the tail, (T, T)."""
    edges = np.concatenate([[0], np.cumsum([b.size for b in layout.tail])])
    rows = jnp.stack([jnp.sum(X[a:b], axis=0) for a, b in pairwise(edges)])
    return jnp.stack(
        [jnp.sum(rows[:, a:b], axis=1) for a, b in pairwise(edges)], axis=1
    )


def _pair_sums(W: Array, tail: SparseTail, shape, layout: Layout, kind) -> Array:
    """Sums of W_lr v_l v_r' by leaf level and blocks (t, u), (K, K, J, T, T)."""
    pairs = tail.pairs
    K, _, J = shape
    n = len(layout.tail)
    weight = jnp.where(pairs.left == pairs.right, 0.5, 1.0)
    weight = weight * W[pairs.row, pairs.col][pairs.target]
    kinds = jnp.asarray(kind, jnp.int32)
    at = kinds[pairs.column[pairs.left]] * n + kinds[pairs.column[pairs.right]]
    at = pairs.level[pairs.left] * (n * n) + at
    left, right = tail.value[:, pairs.left], tail.value[:, pairs.right]
    sums = [
        jax.ops.segment_sum(left[a] * right[b] * weight, at, num_segments=J * n * n)
        for a in range(K)
        for b in range(K)
    ]
    cube = jnp.stack(sums).reshape(K, K, J, n, n)
    return cube + jnp.transpose(cube, (1, 0, 2, 4, 3))


# ---- the trace part K --------------------------------------------------------------


def _trace_part(theta, A, W, lam, leaf, tail, layout, leaf_theta, tail_theta, sizes):
    q = lam.shape[0]
    scale = jnp.stack([lam[i] for i in np.cumsum([0, *sizes[:-1]])])
    eye = jnp.eye(q, dtype=A.dtype)
    rest = eye - W
    tail_tail = 2.0 * (
        _block_sums(rest * rest, layout) + _block_sums(W * (A - rest), layout)
    )
    tail_tail = tail_tail / (scale[:, None] * scale[None, :])

    M, leaf_tail = [], []
    for i in leaf_theta:
        e = jnp.zeros_like(theta).at[i].set(1.0)
        _, (dN, _) = jax.jvp(leaf, (theta,), (e,))
        dS = -lam[:, None] * outer_pairs(tail, dN, q) * lam[None, :]
        M.append(W @ dS)
        by_row = jnp.sum(M[-1] * rest, axis=1)
        edges = np.cumsum([0, *sizes])
        sums = [jnp.sum(by_row[a:b]) for a, b in pairwise(edges)]
        leaf_tail.append(2.0 * jnp.stack(sums) / scale)
    leaf_leaf = jnp.stack([jnp.stack([jnp.sum(a * b.T) for b in M]) for a in M])
    side = jnp.stack(leaf_tail)
    K = jnp.zeros((theta.shape[0],) * 2, A.dtype)
    K = K.at[np.ix_(leaf_theta, leaf_theta)].set(leaf_leaf)
    K = K.at[np.ix_(leaf_theta, tail_theta)].set(side)
    K = K.at[np.ix_(tail_theta, leaf_theta)].set(side.T)
    return K.at[np.ix_(tail_theta, tail_theta)].set(tail_tail)
