"""Small symmetric positive definite algebra that is safe under ``vmap`` and ``grad``.

Everything the likelihood asks of a symmetric positive definite A is its inverse and
log-determinant, and their derivatives need no decomposition at all:

    d log|A| = tr(A^-1 dA),        d(A^-1) = -A^-1 dA A^-1.                        (1)

So the forward computation is never differentiated, and second derivatives follow by
differentiating (1) again. Matrices keep their two axes in front and any batch behind,
(k, k, J): for the small blocks of a grouping factor the long axis J is then contiguous
and every operation is elementwise over it.

The forward computation is Gauss-Jordan elimination (the sweep operator), pivot by
pivot, which for a positive definite matrix needs no exchange of rows; a large matrix is
halved until blocks are small. It is plain arithmetic and products: batched LAPACK
kernels can wait for each other for ever in jaxlib 0.10, and threaded ones crawl on a
busy machine, so there is no LAPACK call here at all.

References: Goodnight (1979), Amer. Statist. 33(3), doi:10.1080/00031305.1979.10482685.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.typing import Array

__all__ = [
    "block_matmul",
    "root_of_psd",
    "small_cholesky",
    "spd_inverse",
    "spd_solve",
    "symmetric_eigen",
]

_UNROLL = 4  # up to this order the pivots are unrolled
_LEAF = 160  # larger matrices are halved


def block_matmul(A: Array, B: Array) -> Array:
    """Product of blocks, (a, b, *batch) times (b, c, *batch) -> (a, c, *batch).

    Elementwise over the batch, with the contracted axis unrolled when it is short.
    """
    if A.ndim == 2:
        return A @ B
    return jnp.sum(A[:, :, None] * B[None], axis=1)


@jax.custom_jvp
def spd_inverse(A: Array) -> tuple[Array, Array]:
    """Inverse and log-determinant of symmetric positive definite matrices.

    Parameters
    ----------
    A : Array, (k, k, *batch)
        Symmetric positive definite in its first two axes.

    Returns
    -------
    inverse : Array, (k, k, *batch)
    logdet : Array, (*batch)
        Not finite where A is not positive definite.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> inverse, logdet = spd_inverse(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
    >>> bool(jnp.allclose(jnp.exp(logdet), 3.0))
    True
    """
    k = A.shape[0]
    if k == 1:
        return 1.0 / A, jnp.log(A[0, 0])
    if k == 2:
        return _inverse_2(A)
    if A.ndim == 2:
        return _inverse_halves(A)
    return _inverse_sweep(A)


@spd_inverse.defjvp
def _spd_inverse_jvp(primals, tangents):
    (A,), (dA,) = primals, tangents
    inverse, logdet = spd_inverse(A)
    d_inverse = -block_matmul(block_matmul(inverse, dA), inverse)
    return (inverse, logdet), (d_inverse, jnp.sum(inverse * dA, axis=(0, 1)))


@jax.custom_jvp
def spd_solve(S: Array, H: Array) -> tuple[Array, Array, Array]:
    """S^-1 H, log|S| and S^-1 for one large positive definite matrix.

    Solutions are differentiated through solves, d(S^-1 H) = S^-1 (dH - dS S^-1 H),
    which costs next to nothing once S^-1 is there.

    Parameters
    ----------
    S : Array, (q, q)
    H : Array, (q, c)

    Returns
    -------
    solution : Array, (q, c)
    logdet : Array, ()
    inverse : Array, (q, q)
    """
    inverse, logdet = spd_inverse(S)
    return inverse @ H, logdet, inverse


@spd_solve.defjvp
def _spd_solve_jvp(primals, tangents):
    (S, H), (dS, dH) = primals, tangents
    solution, logdet, inverse = spd_solve(S, H)
    d_solution = inverse @ (dH - dS @ solution)
    d_inverse = -inverse @ dS @ inverse
    d_logdet = jnp.sum(inverse * dS)
    return (solution, logdet, inverse), (d_solution, d_logdet, d_inverse)


def small_cholesky(A: Array) -> Array:
    """Lower triangular L with L L' = A for small matrices, (k, k, *batch).

    Row by row in plain arithmetic, k unrolled; differentiable as it stands.
    """
    k = A.shape[0]
    zero = jnp.zeros_like(A[0, 0])
    rows: list[list[Array]] = []
    for i in range(k):
        row: list[Array] = []
        for j in range(i):
            inner = sum((row[c] * rows[j][c] for c in range(j)), zero)
            row.append((A[i, j] - inner) / rows[j][j])
        square = sum((x**2 for x in row), zero)
        row.append(jnp.sqrt(A[i, i] - square))
        rows.append(row)
    return jnp.stack([jnp.stack([*row, *[zero] * (k - len(row))]) for row in rows])


def root_of_psd(A: Array) -> Array:
    """Lower triangular L with L L' = A, A (k, k, *batch) positive semidefinite.

    A pivot within rounding of zero empties its column, so A may be singular.
    """
    k = A.shape[0]
    zero = jnp.zeros_like(A[0, 0])
    eps = float(jnp.finfo(A.dtype).eps)
    columns: list[Array] = []
    for j in range(k):
        done = sum((c * c[j][None] for c in columns), jnp.zeros_like(A[j]))
        column = A[j] - done
        fine = column[j] > k * eps * A[j, j]
        root = jnp.sqrt(jnp.where(fine, column[j], 1.0))
        column = jnp.where(fine[None], column / root[None], 0.0)
        columns.append(jnp.stack([zero if i < j else column[i] for i in range(k)]))
    return jnp.stack(columns, axis=1)


def _inverse_2(A: Array) -> tuple[Array, Array]:
    """Closed form for k = 2, through the Cholesky pivots so that it stays accurate."""
    a, b, d = A[0, 0], A[0, 1], A[1, 1]
    r = b / a
    s = 1.0 / (d - r * b)
    rs = -r * s
    inverse = jnp.stack([jnp.stack([1.0 / a - r * rs, rs]), jnp.stack([rs, s])])
    return inverse, jnp.log(a) - jnp.log(s)


def _sweep(A: Array, j) -> tuple[Array, Array]:
    """One Gauss-Jordan step on pivot j; after all k of them A holds its inverse."""
    k = A.shape[0]
    row = lax.dynamic_index_in_dim(A, j, 0, keepdims=False)
    pivot = lax.dynamic_index_in_dim(row, j, 0, keepdims=False)
    here = (jnp.arange(k) == j).reshape((k,) + (1,) * (A.ndim - 2))
    # A_ab - A_aj A_jb / A_jj, with the pivot's row and column replaced
    col = lax.dynamic_index_in_dim(A, j, 1, keepdims=False)
    row = jnp.where(here, 1.0, row) / pivot[None]
    col = jnp.where(here, -1.0, col)
    rest = jnp.where(here[:, None] | here[None, :], 0.0, A)
    return rest - col[:, None] * row[None, :], pivot


def _inverse_sweep(A: Array) -> tuple[Array, Array]:
    k = A.shape[0]

    def step(j, carry):
        A, logdet = carry
        A, pivot = _sweep(A, j)
        return A, logdet + jnp.log(pivot)

    carry = (A, jnp.zeros(A.shape[2:], A.dtype))
    if k <= _UNROLL:
        for j in range(k):
            carry = step(j, carry)
    else:
        carry = lax.fori_loop(0, k, step, carry)
    A, logdet = carry
    return A, logdet


def _inverse_halves(A: Array) -> tuple[Array, Array]:
    """A large matrix by recursive halves, so that nearly all work is matrix products.

    With W = A21 A11^-1 and the Schur complement S = A22 - W A12,
    A^-1 = [[A11^-1 + W' S^-1 W, -W' S^-1], [-S^-1 W, S^-1]].
    """
    n = A.shape[0]
    if n <= _LEAF:
        return _inverse_sweep(A)
    h = n // 2
    A_inv, logdet = _inverse_halves(A[:h, :h])
    W = A[h:, :h] @ A_inv
    S_inv, logdet_S = _inverse_halves(A[h:, h:] - W @ A[:h, h:])
    low = S_inv @ W
    top = jnp.concatenate([A_inv + W.T @ low, -low.T], axis=1)
    inverse = jnp.concatenate([top, jnp.concatenate([-low, S_inv], axis=1)])
    return inverse, logdet + logdet_S


# ---- symmetric eigenvalues of the small Hessian ------------------------------------


@functools.cache
def _rounds(m: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Round-robin schedule: every pair of 0..m-1 once, in rounds of disjoint pairs."""
    size = m + m % 2
    ring = list(range(size))
    rounds = []
    for _ in range(size - 1):
        pairs = [(ring[i], ring[size - 1 - i]) for i in range(size // 2)]
        rounds.append(tuple((min(p), max(p)) for p in pairs if max(p) < m))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return tuple(rounds)


def symmetric_eigen(H: Array, basis: Array) -> tuple[Array, Array]:
    """Eigenvalues (m,) and eigenvectors (m, m) in columns, by cyclic Jacobi rotations.

    Each round rotates m // 2 disjoint pairs at once by one orthogonal matrix, so the
    loop holds no LAPACK call and maps over lanes. Sweeps go on until what is off the
    diagonal is rounding: three to five from the identity (m = 3 to 8), two or three
    from the eigenvectors of a matrix nearby (1e-3 of it away).

    Parameters
    ----------
    H : Array, (m, m)
        Symmetric.
    basis : Array, (m, m)
        Orthogonal matrix to start from, the identity or known eigenvectors.

    Returns
    -------
    values : Array, (m,)
        Not sorted.
    vectors : Array, (m, m)
    """
    m = H.shape[0]
    if m == 1:
        return H[0], jnp.ones_like(H)
    rounds = [_partners(m, r) for r in _rounds(m)]
    partner = jnp.array(rounds)
    lower = jnp.array([[a > b for a, b in enumerate(p)] for p in rounds])
    index = jnp.arange(m)
    n_sweeps = 8 + m // 2
    rounding = 16.0 * float(jnp.finfo(H.dtype).eps)

    def rotate(i, carry):
        A, U = carry
        p, is_lower = partner[i], lower[i]
        diag = jnp.diagonal(A)
        # one number for both of a pair, or its two angles differ where delta is zero
        off = jnp.where(p == index, 0.0, 0.5 * (A[index, p] + A[p, index]))
        delta = jnp.where(is_lower, diag - diag[p], diag[p] - diag)
        # the smaller angle with tan(2 angle) = 2 off / delta
        off_safe = jnp.where(off == 0.0, 1.0, off)
        tau = delta / (2.0 * off_safe)
        t = jnp.where(tau >= 0, 1.0, -1.0) / (jnp.abs(tau) + jnp.hypot(1.0, tau))
        t = jnp.where(off == 0.0, 0.0, t)
        c = 1.0 / jnp.hypot(1.0, t)
        s = jnp.where(is_lower, -1.0, 1.0) * c * t
        # columns: A <- A R with R_ii = c_i and R_(p_i) i = -s_i
        A = A * c[None, :] - A[:, p] * s[None, :]
        A = A * c[:, None] - A[p, :] * s[:, None]
        U = U * c[None, :] - U[:, p] * s[None, :]
        return A, U

    def sweep(carry):
        count, A, U = carry
        A, U = lax.fori_loop(0, len(rounds), rotate, (A, U), unroll=m <= _UNROLL)
        return count + 1, A, U

    def is_unfinished(carry):
        count, A, _ = carry
        size = jnp.abs(A)
        off = jnp.where(index[:, None] == index[None, :], 0.0, size)
        return (count < n_sweeps) & (jnp.max(off) > rounding * jnp.max(size))

    start = (jnp.zeros((), jnp.int32), basis.T @ H @ basis, basis)
    _, A, U = lax.while_loop(is_unfinished, sweep, start)
    return jnp.diagonal(A), U


def _partners(m: int, pairs: tuple[tuple[int, int], ...]) -> list[int]:
    partner = list(range(m))
    for a, b in pairs:
        partner[a], partner[b] = b, a
    return partner
