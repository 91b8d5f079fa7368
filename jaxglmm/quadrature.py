"""Adaptive Gauss-Hermite quadrature for one grouping factor with K effects per level.

Nodes t_q (K,) and weights w_q of the standard normal, a tensor grid, are moved to the
mode u_j of a level and scaled by A_j A_j' = M_j^-1, A_j lower triangular:

    L_j = |A_j| sum_q w_q exp(h_j(u_j + A_j t_q) + t_q't_q / 2)                    (1)

With one node, t = 0, this is the Laplace approximation, so that -2 log L is that of
laplace.py plus

    -2 sum_j log sum_q w_q exp(d_jq),  d_jq = h_j(u_j + A_j t_q) - h_j(u_j) + t't/2  (2)

Levels without rows contribute nothing. Shapes: (K, K, J), rows (n,), nodes (Q, K).

References: Pinheiro and Bates (1995), J. Comput. Graph. Stat. 4(1),
doi:10.2307/1390625.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.families import Family
from jaxglmm.linalg import block_matmul, small_cholesky, spd_inverse
from jaxglmm.modes import RowData, random_part, row_values
from jaxglmm.plan import Layout
from jaxglmm.rowsums import sum_by_level
from jaxglmm.typing import Array

__all__ = ["check_quadrature", "quadrature_correction"]

_MAX_EFFECTS = 4
_CHUNK = 400_000  # rows times nodes that are evaluated at once


def check_quadrature(layout: Layout, n_quad: int) -> None:
    """Refuse models that quadrature does not serve.

    Raises
    ------
    ValueError
        Saying what to use instead.
    """
    if not isinstance(n_quad, int) or n_quad < 1:
        raise ValueError(f"n_quad must be a positive integer; found {n_quad!r}")
    blocks = layout.blocks
    if len(blocks) > 1:
        raise ValueError(
            f"method='AGQ' takes one grouping factor; the model has "
            f"{len(blocks)}. Use method='Laplace'."
        )
    k = max(b.k for b in blocks)
    if k > _MAX_EFFECTS:
        raise ValueError(
            f"method='AGQ' takes at most {_MAX_EFFECTS} random effects per level, as "
            f"its grid has n_quad**k nodes; the model has {k}. Use method='Laplace'."
        )


def quadrature_correction(
    u: Array,
    Lam: Array,
    eta: Array,
    psi: Array,
    own: Array,
    data: RowData,
    layout: Layout,
    family: Family,
    n_quad: int,
) -> Array:
    """What (2) adds to the -2 log L of Laplace, ().

    Parameters
    ----------
    u : Array, (J, K)
    Lam : Array, (K, K)
    eta : Array, (n, R)
        Linear predictors at u.
    psi : Array, (n_own,)
    own : Array, (K, K, J)
        Z'WZ by level.
    """
    k, n_levels = Lam.shape[0], u.shape[0]
    L, LT = Lam[:, :, None], Lam.T[:, :, None]
    M = block_matmul(block_matmul(LT, own), L) + jnp.eye(k, dtype=u.dtype)[:, :, None]
    A = small_cholesky(spd_inverse(M)[0])
    at_mode = row_values(eta, psi, data, family)

    def at_node(node):
        step = jnp.sum(A * node[None, :, None], axis=1).T  # (J, K)
        moved = jnp.stack(random_part((step @ Lam.T,), data, layout), axis=1)
        change = row_values(eta + moved, psi, data, family) - at_mode
        by_level = sum_by_level(change, data.codes[0], 0, layout)
        prior = jnp.sum(u * step + 0.5 * step**2, axis=1)
        return by_level - prior + 0.5 * jnp.sum(node**2)

    nodes, weights = _grid(n_quad, k)
    per_chunk = max(1, min(len(weights), _CHUNK // max(1, data.y.shape[0])))
    n_chunks = -(-len(weights) // per_chunk)
    size = n_chunks * per_chunk
    nodes = np.resize(nodes, (size, k))  # what repeats has no weight
    weights = np.pad(weights, (0, size - len(weights)))
    grid = (
        jnp.asarray(nodes.reshape(n_chunks, per_chunk, k), u.dtype),
        jnp.asarray(weights.reshape(n_chunks, per_chunk), u.dtype),
    )

    @jax.checkpoint
    def add(total, chunk):
        t, w = chunk
        return total + jnp.sum(w[:, None] * jnp.exp(jax.vmap(at_node)(t)), axis=0), None

    total = jnp.zeros(n_levels, u.dtype)
    if n_chunks == 1:
        total, _ = add(total, jax.tree.map(lambda x: x[0], grid))
    else:
        total, _ = lax.scan(add, total, grid)
    return -2.0 * jnp.sum(jnp.log(total))


def _grid(n_quad: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (Q, k) and weights (Q,) of the standard normal in k dimensions."""
    t, w = np.polynomial.hermite_e.hermegauss(n_quad)
    w = w / np.sum(w)
    nodes = np.array(list(itertools.product(t, repeat=k)))
    weights = np.array([np.prod(p) for p in itertools.product(w, repeat=k)])
    return nodes, weights
