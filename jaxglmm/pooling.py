"""Levels with the same design pooled into a few, without a change of the likelihood.

Let m levels of a single grouping factor have the same H = Z'WZ (K, K) and Z'WX, and
Z'Wy = c_j, as in a balanced experiment. Any rotation of their effects and residuals
leaves the model as it is. One that starts with the mean leaves a level with

    sqrt(m) Z'WX,    sqrt(m) mean(c)                                               (1)

and m - 1 levels with no X, which count through log|M| and through the sums of squares

    sum_j d_j' N d_j = sum_k r_k' N r_k,     d_j = c_j - mean(c),
    sum_j d_j d_j' = R R',  R = (r_1 ... r_K)                                      (2)

So C classes of levels become C (1 + K) levels, of which the first of each class counts
m times in the log-determinant and the others, with r_k for c, not at all. Nothing that
an evaluation of the criterion touches is as long as the number of levels then.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxglmm.crossproducts import CrossProducts
from jaxglmm.linalg import root_of_psd
from jaxglmm.plan import Layout
from jaxglmm.rowsums import SparseTail

__all__ = ["pool_levels"]


def pool_levels(cp: CrossProducts, layout: Layout) -> tuple[CrossProducts, Layout]:
    """Cross-products of the pooled levels; those given where there are no classes."""
    if cp.alike is None:
        return cp, layout
    (own,), (tail,), alike = cp.own, cp.tail, cp.alike
    assert not isinstance(tail, SparseTail)
    (block,), p = layout.blocks, tail.shape[1] - 1
    member = alike.member.astype(own.dtype)  # (J, C)
    m = jnp.sum(member, axis=0)
    mean = tail[:, p] @ member / m[None]  # (K, C)
    rest = tail[:, p] - mean @ member.T
    squares = (rest[:, None] * rest[None, :]) @ member  # (K, K, C)
    R = root_of_psd(squares)
    first = jnp.concatenate([tail[:, :p, alike.first], mean[:, None]], axis=1)
    none = jnp.zeros_like(first[:, :p])
    others = [jnp.concatenate([none, R[:, k, None]], axis=1) for k in range(block.k)]
    tails = [jnp.sqrt(m)[None, None] * first, *others]
    copies = 1 + block.k
    pooled = dataclasses.replace(
        cp,
        own=(jnp.tile(own[:, :, alike.first], (1, 1, copies)),),
        tail=(jnp.concatenate(tails, axis=2),),
        alike=None,
        counts=jnp.concatenate([m, jnp.zeros((copies - 1) * m.shape[0], m.dtype)]),
    )
    small = dataclasses.replace(block, n_levels=copies * m.shape[0])
    return pooled, dataclasses.replace(layout, blocks=(small,))
