"""The small symmetric algebra against NumPy, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxglmm.linalg import spd_inverse, spd_solve, symmetric_eigen


def spd(rng, k):
    B = rng.normal(size=(k, k))
    return B @ B.T + np.eye(k)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 9, 100, 203])
def test_inverse_and_logdet(rng, k):
    A = spd(rng, k)
    inverse, logdet = spd_inverse(jnp.asarray(A))
    np.testing.assert_allclose(inverse @ A, np.eye(k), atol=1e-10)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(A)[1], rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_blocks_equal_single_matrices(rng, k):
    blocks = np.stack([spd(rng, k) for _ in range(4)], axis=-1)
    inverse, logdet = spd_inverse(jnp.asarray(blocks))
    for j in range(4):
        np.testing.assert_allclose(
            inverse[..., j] @ blocks[..., j], np.eye(k), atol=1e-10
        )
        np.testing.assert_allclose(logdet[j], np.linalg.slogdet(blocks[..., j])[1])


def test_not_positive_definite_is_not_finite():
    _, logdet = spd_inverse(jnp.diag(jnp.array([1.0, -1.0, 2.0])))
    assert not np.isfinite(logdet)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_second_derivatives(rng, k):
    A = jnp.asarray(spd(rng, k))
    D = jnp.asarray(spd(rng, k))

    def f(t):
        inverse, logdet = spd_inverse(A + t * D)
        return logdet + jnp.sum(inverse * D)

    h = 1e-4
    slope = (f(h) - f(-h)) / (2 * h)
    bend = (f(h) - 2 * f(0.0) + f(-h)) / h**2
    np.testing.assert_allclose(jax.grad(f)(0.0), slope, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.grad(f))(0.0), bend, rtol=1e-4)


def test_solve_derivatives(rng):
    S, D = jnp.asarray(spd(rng, 7)), jnp.asarray(spd(rng, 7))
    H = jnp.asarray(rng.normal(size=(7, 2)))

    def f(t):
        solution, logdet, _ = spd_solve(S + t * D, H * (1 + t))
        return logdet + jnp.sum(H * solution)

    h = 1e-5
    slope = jax.jit(jax.grad(f))
    np.testing.assert_allclose(slope(0.0), (f(h) - f(-h)) / (2 * h), rtol=1e-6)
    bend = (slope(h) - slope(-h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(slope)(0.0), bend, rtol=1e-6)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 12])
def test_eigen(rng, m):
    B = rng.normal(size=(m, m))
    H = B + B.T
    d, U = symmetric_eigen(jnp.asarray(H))
    np.testing.assert_allclose(np.sort(d), np.linalg.eigvalsh(H), atol=1e-12 * m)
    np.testing.assert_allclose(U @ np.diag(d) @ U.T, H, atol=1e-12 * m)


def test_eigen_of_repeated_and_zero_eigenvalues():
    H = np.diag([0.0, 0.0, 3.0])
    d, U = symmetric_eigen(jnp.asarray(H))
    np.testing.assert_allclose(np.sort(d), [0.0, 0.0, 3.0], atol=1e-15)
    np.testing.assert_allclose(U @ U.T, np.eye(3), atol=1e-15)
