"""The small symmetric algebra against NumPy, and its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxglmm.linalg import spd_inverse, spd_solve, symmetric_eigen

compiled_inverse, compiled_eigen = jax.jit(spd_inverse), jax.jit(symmetric_eigen)


def inverse_and_logdet(A):
    return jax.tree.map(np.asarray, compiled_inverse(A))


def eigen(H):
    return jax.tree.map(np.asarray, compiled_eigen(H, np.eye(len(H))))


@functools.partial(jax.jit, static_argnums=0)
def derivatives(f, t, *args):
    """A function of t, its slope and its bend."""
    slope = lambda t: (jax.grad(f)(t, *args),) * 2
    bend, first = jax.grad(slope, has_aux=True)(t)
    return f(t, *args), first, bend


def spd(rng, k):
    B = rng.normal(size=(k, k))
    return B @ B.T + np.eye(k)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9, 100, 203])
def test_inverse_and_logdet(rng, k):
    A = spd(rng, k)
    inverse, logdet = inverse_and_logdet(A)
    np.testing.assert_allclose(inverse @ A, np.eye(k), atol=1e-10)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(A)[1], rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_blocks_equal_single_matrices(rng, k):
    blocks = np.stack([spd(rng, k) for _ in range(4)], axis=-1)
    inverse, logdet = inverse_and_logdet(blocks)
    for j in range(4):
        np.testing.assert_allclose(
            inverse[..., j] @ blocks[..., j], np.eye(k), atol=1e-10
        )
        np.testing.assert_allclose(logdet[j], np.linalg.slogdet(blocks[..., j])[1])


def test_not_positive_definite_is_not_finite():
    _, logdet = inverse_and_logdet(np.diag([1.0, -1.0, 2.0]))
    assert not np.isfinite(logdet)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_second_derivatives(rng, k):
    A, D = spd(rng, k), spd(rng, k)

    def f(t, A, D):
        inverse, logdet = spd_inverse(A + t * D)
        return logdet + jnp.sum(inverse * D)

    h = 1e-4
    at = lambda t: derivatives(f, t, A, D)
    (low, *_), (middle, slope, bend), (high, *_) = at(-h), at(0.0), at(h)
    np.testing.assert_allclose(slope, (high - low) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(bend, (high - 2 * middle + low) / h**2, rtol=1e-4)


def test_solve_derivatives(rng):
    S, D, H = spd(rng, 7), spd(rng, 7), rng.normal(size=(7, 2))

    def f(t, S, D, H):
        solution, logdet, _ = spd_solve(S + t * D, H * (1 + t))
        return logdet + jnp.sum(H * solution)

    h = 1e-5
    at = lambda t: derivatives(f, t, S, D, H)
    low, (_, slope, bend), high = at(-h), at(0.0), at(h)
    np.testing.assert_allclose(slope, (high[0] - low[0]) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(bend, (high[1] - low[1]) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 12])
def test_eigen(rng, m):
    B = rng.normal(size=(m, m))
    H = B + B.T
    d, U = eigen(H)
    np.testing.assert_allclose(np.sort(d), np.linalg.eigvalsh(H), atol=1e-12 * m)
    np.testing.assert_allclose(U @ np.diag(d) @ U.T, H, atol=1e-12 * m)


def test_eigen_from_the_vectors_of_a_matrix_nearby(rng):
    B = rng.normal(size=(5, 5))
    H, change = B + B.T, 1e-3 * np.diag(np.arange(5.0))
    U = eigen(H)[1]
    d, U = jax.tree.map(np.asarray, compiled_eigen(H + change, U))
    np.testing.assert_allclose(U @ np.diag(d) @ U.T, H + change, atol=1e-12)
    np.testing.assert_allclose(U @ U.T, np.eye(5), atol=1e-13)


@pytest.mark.parametrize("m", [3, 4, 7])
def test_eigenvectors_stay_orthogonal_where_values_repeat(rng, m):
    B = rng.normal(size=(m, m))
    U = eigen(np.ones((m, m)))[1]
    np.testing.assert_allclose(U @ U.T, np.eye(m), atol=1e-13)
    for H in (2.0 * np.eye(m) + np.ones((m, m)), B + B.T):
        d, U = jax.tree.map(np.asarray, compiled_eigen(H, U))
        np.testing.assert_allclose(U @ U.T, np.eye(m), atol=1e-13)
        np.testing.assert_allclose(U @ np.diag(d) @ U.T, H, atol=1e-12 * m)


def test_eigen_of_repeated_and_zero_eigenvalues():
    H = np.diag([0.0, 0.0, 3.0])
    d, U = eigen(H)
    np.testing.assert_allclose(np.sort(d), [0.0, 0.0, 3.0], atol=1e-15)
    np.testing.assert_allclose(U @ U.T, np.eye(3), atol=1e-15)
