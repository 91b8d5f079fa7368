"""From parameters to relative factors, and the coordinates that an optimizer moves in.

A block's factor Lambda (K, K) has those of its terms on the diagonal. An unstructured
term has Q = Lambda Lambda' with any root, so the optimizer may order its k effects

    Lambda = P' L(x),      P (k, k) a permutation, L lower triangular,             (1)

as in a Cholesky factorization with pivoting: effects of large variance first. Then a
vanishing variance or a correlation of +-1 empties the last columns of L and nothing
else, and the criterion, even in those, has a regular optimum there. With a small pivot
in front, columns could turn into each other at next to no change of Q: a curved valley,
and at zero a flat circle whose second derivatives do not show whether it is a minimum.

``order`` holds P for every term, None where there is nothing to order. Rows are ordered
by :func:`repivot`; :func:`canonical` goes back to the user's order, L lower triangular
with a diagonal >= 0, by Householder reflections of the columns.

References: Golub and Van Loan (2013), Matrix Computations, 4th ed., sections 4.2, 5.2.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.covariance import structure
from jaxglmm.plan import Layout
from jaxglmm.typing import Array

__all__ = [
    "Order",
    "block_factors",
    "canonical",
    "first_order",
    "jacobian_in_theta",
    "jacobian_of_theta",
    "repivot",
    "split_factors",
]

Order = tuple[Array | None, ...]

_SWAP = 4.0  # exchange effects whose variances differ by more than this factor
_EMPTY = 1e-4  # rows of Lambda shorter than this stand in the user's order


def block_factors(
    theta: Array, layout: Layout, order: Order | None = None
) -> tuple[Array, ...]:
    """Lambda (K, K) of every block, from theta (m,) or from coordinates (1)."""
    order = (None,) * len(layout.term_k) if order is None else order
    per_term = [
        L if P is None else P.T @ L for L, P in zip(_term_factors(theta, layout), order)
    ]
    return tuple(
        jax.scipy.linalg.block_diag(*[per_term[t] for t in b.terms])
        if b.terms[1:]
        else per_term[b.terms[0]]
        for b in layout.blocks
    )


def split_factors(factors: tuple[Array, ...], layout: Layout) -> tuple[Array, ...]:
    """Lambda (k, k) of every term, cut from those of the blocks."""
    out: dict[int, Array] = {}
    for block, Lam in zip(layout.blocks, factors):
        start = 0
        for t in block.terms:
            k = layout.term_k[t]
            out[t] = Lam[start : start + k, start : start + k]
            start += k
    return tuple(out[t] for t in range(len(layout.term_k)))


def first_order(layout: Layout, dtype) -> Order:
    """The user's own order of effects."""
    return tuple(
        jnp.eye(k, dtype=dtype) if _is_ordered(k, name) else None
        for k, name in zip(layout.term_k, layout.structures)
    )


def repivot(
    x: Array, order: Order, layout: Layout
) -> tuple[Array, Order, tuple[Array | None, ...]]:
    """The same Q in coordinates whose larger pivots come first.

    For every term that has an order, Lambda was multiplied by the orthogonal matrix
    (k, k) that comes third, so spherical effects become u times this.
    """
    parts: list[Array] = []
    orders: list[Array | None] = []
    turns: list[Array | None] = []
    for t, (L, P) in enumerate(zip(_term_factors(x, layout), order)):
        turn = None
        if P is not None:
            k = L.shape[0]
            none, turn = jnp.zeros(k, bool), jnp.eye(k, dtype=L.dtype)
            for j in range(k - 1):
                swap = _exchange(L, j, P)
                both, _ = _reflect(jnp.concatenate([swap @ L, turn]), j, none)
                L, turn, P = both[:k], both[k:], swap @ P
        parts.append(_parameters(t, L, x, layout, P))
        orders.append(P)
        turns.append(turn)
    return jnp.concatenate(parts), tuple(orders), tuple(turns)


def canonical(x: Array, order: Order, layout: Layout) -> Array:
    """Theta (m,): the user's order of effects, diagonals of Lambda >= 0."""
    parts = []
    for t, (L, P) in enumerate(zip(_term_factors(x, layout), order)):
        if P is not None:
            L = _lower(P.T @ L)
        sign = jnp.where(jnp.diagonal(L) < 0, -1.0, 1.0).astype(L.dtype)
        parts.append(_parameters(t, L * sign[None], x, layout, P, sign))
    return jnp.concatenate(parts)


def jacobian_of_theta(x: Array, order: Order, layout: Layout) -> Array:
    """Dtheta / dx (m, m): canonical parameters by the coordinates, finite anywhere."""
    return jax.jacfwd(lambda x: canonical(x, order, layout))(x)


def jacobian_in_theta(theta: Array, x: Array, order: Order, layout: Layout) -> Array:
    """Dx / dtheta (m, m) at a point whose canonical parameters are theta.

    An effect without variance of its own takes along the column of Lambda that it has
    in the user's order, so that its diagonal stays one.
    """

    def coordinates(theta):
        parts = []
        factors = zip(_term_factors(theta, layout), _term_factors(x, layout), order)
        for t, (L, like, P) in enumerate(factors):
            if P is not None:
                L = _lower(P @ L, P)
            turned = jnp.diagonal(L) * jnp.diagonal(like) < 0
            sign = jnp.where(turned, -1.0, 1.0).astype(L.dtype)
            parts.append(_parameters(t, L * sign[None], theta, layout, P, sign))
        return jnp.concatenate(parts)

    return jax.jacfwd(coordinates)(theta)


# ---- one term ----------------------------------------------------------------------


def _is_ordered(k: int, name: str) -> bool:
    return k > 1 and structure(name).triangular


def _slices(layout: Layout) -> list[slice]:
    counts = [structure(s).n_theta(k) for k, s in zip(layout.term_k, layout.structures)]
    edges = np.cumsum([0, *counts])
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _term_factors(theta: Array, layout: Layout) -> list[Array]:
    terms = zip(layout.term_k, layout.structures, _slices(layout))
    return [structure(name).Lambda(theta[at], k) for k, name, at in terms]


def _parameters(t: int, L: Array, x: Array, layout: Layout, P, sign=None) -> Array:
    """Parameters of term t: entries of L where its order may change, else x's own."""
    kind, k = structure(layout.structures[t]), layout.term_k[t]
    if P is not None:
        assert kind.row is not None
        assert kind.column is not None
        return L[np.array(kind.row(k)), np.array(kind.column(k))]
    own = x[_slices(layout)[t]]
    if sign is None or kind.column is None:
        return own
    return own * sign[np.array(kind.column(k))]


def _exchange(L: Array, j: int, P: Array) -> Array:
    """Permutation (k, k) that brings the largest remaining row to position j.

    Rows that are all as good as empty come in the user's order.
    """
    k = L.shape[0]
    index = np.arange(k)
    size = jnp.where(index < j, -1.0, jnp.sum(L[:, j:] ** 2, axis=1))
    best = jnp.where(jnp.max(size) > _SWAP * size[j], jnp.argmax(size), j)
    first = jnp.argmin(jnp.where(index < j, k, jnp.argmax(P, axis=1)))
    best = jnp.where(jnp.max(size) < _EMPTY**2, first, best)
    source = jnp.where(index == j, best, jnp.where(index == best, j, index))
    return (source[:, None] == index[None, :]).astype(L.dtype)


def _lower(Lam: Array, P: Array | None = None) -> Array:
    """Lower triangular root of Lam Lam'; an effect without variance has no column.

    With P (k, k) the column j of such a row is the one that P names, wherever earlier
    rows have turned it.
    """
    k = Lam.shape[0]
    tiny = float(jnp.finfo(Lam.dtype).eps) ** 0.5
    spare = jnp.zeros(k, bool)
    both = Lam if P is None else jnp.concatenate([Lam, P])
    for j in range(k):
        both, spare = _reflect(both, j, spare, tiny, None if P is None else k + j)
    return both[:k]


def _reflect(
    L: Array, j: int, spare: Array, tiny: float = 0.0, instead: int | None = None
) -> tuple[Array, Array]:
    """Turn the columns j, j + 1, ... and the spare ones so that row j ends in column j.

    L (k or more, k) may have rows that only turn with the others.

    A reflection times -1 on column j, so that a row which ends there already stays as
    it is, to first order too. A row no longer than ``tiny`` is zero: its column is then
    spare for the rows below, or the row ``instead`` is turned in its place.
    """
    k = L.shape[1]
    free = (jnp.arange(k) >= j) | spare
    here = jnp.arange(k) == j
    r = jnp.where(free, L[j], 0.0)
    empty = jnp.sum(r**2) <= tiny**2
    other = here.astype(L.dtype)
    if instead is not None:
        named = jnp.where(free, L[instead], 0.0)
        other = jnp.where(jnp.sum(named**2) > 0.25, lax.stop_gradient(named), other)
    safe = jnp.where(empty, other, r)
    size = jnp.sqrt(jnp.sum(safe**2))
    v = safe + jnp.where(here, jnp.where(safe[j] < 0, -size, size), 0.0)
    turned = L - (L @ v)[:, None] * v[None] * (2.0 / jnp.sum(v**2))
    turned = jnp.where(here[None], -turned, turned)
    if instead is None:
        turned = jnp.where(empty, L, turned)
        row = jnp.where(free & ~here, 0.0, turned[j])
        return turned.at[j].set(row), spare | (here & empty)
    return turned, spare
