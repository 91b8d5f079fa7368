"""Conditional modes of the random effects of a generalized model, by Newton's method.

With b = u Lambda', R linear predictors eta_i (R,) per row and the family's log density,

    eta = offset + X beta + Z b
    h(u) = sum_i l_i(eta_i) - u'u / 2                         maximal at the mode   (1)
    s = dl/deta (n, R),    W = -d2l/deta deta' (n, R, R)
    g(u) = u - Lambda' Z's,                M = Lambda' Z'WZ Lambda + I              (2)

Newton's step for u is -M^-1 g: penalized iteratively reweighted least squares. It is
halved until h does not decrease. Where W is not positive definite and M is not either,
the step uses a diagonal W that is at least as large, and goes on with the exact one as
soon as that works.

Effects are tuples over blocks of (J, K), rows are in the order of the data.

References: Bates et al. (2015), J. Stat. Softw. 67(1), doi:10.18637/jss.v067.i01;
Breslow and Clayton (1993), JASA 88, doi:10.2307/2290687.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.crossproducts import CrossProducts
from jaxglmm.elimination import Effects, Eliminated, eliminate, solve_effects
from jaxglmm.families import Family
from jaxglmm.plan import Layout, Pairs
from jaxglmm.rowsums import RowSums, Sums
from jaxglmm.typing import Array

__all__ = [
    "RowData",
    "RowTerms",
    "curvature",
    "find_modes",
    "gradient",
    "linear_predictors",
    "random_part",
    "row_terms",
    "row_values",
    "solve_spherical",
]

_MAX_ITER = 100
_SHORTEST = 1e-5  # of a Newton step, before the search for the mode is given up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowData:
    """Rows in inner units.

    ``X[r]`` (n, p_r), ``offset[r]`` (n,) for every predictor; ``z[f]`` (n, K) and
    ``codes[f]`` (n,) for every block. Rows of weight ``w`` zero do not count.
    ``unused`` (p,) is one for columns of any X that hold nothing.
    """

    y: Array
    w: Array
    X: tuple[Array, ...]
    offset: tuple[Array, ...]
    z: tuple[Array, ...]
    codes: tuple[Array, ...]
    parents: tuple[Array, ...]
    pairs: Pairs | None
    unused: Array


class RowTerms(NamedTuple):
    """Log density () summed, score (n, R) and information (n, R, R)."""

    value: Array
    score: Array
    W: Array


def random_part(b: Effects, data: RowData, layout: Layout) -> list[Array]:
    """Z b of every predictor, (n,) each."""
    out = [jnp.zeros_like(data.y) for _ in data.X]
    for f, effects in enumerate(b):
        rows = data.z[f] * effects[data.codes[f]]
        for k, r in enumerate(layout.block_predictors(f)):
            out[r] = out[r] + rows[:, k]
    return out


def linear_predictors(
    beta: tuple[Array, ...], b: Effects, data: RowData, layout: Layout
) -> Array:
    """Linear predictors, (n, R)."""
    fixed = [o + X @ c for o, X, c in zip(data.offset, data.X, beta)]
    parts = zip(fixed, random_part(b, data, layout))
    return jnp.stack([a + c for a, c in parts], axis=1)


def row_values(eta: Array, psi: Array, data: RowData, family: Family) -> Array:
    """Log density of every row, (n,)."""
    used = data.w > 0
    w = jnp.where(used, data.w, 1.0)
    value = jax.vmap(lambda e, y, w: family.log_lik(y, e, psi, w))(eta, data.y, w)
    return jnp.where(used, value, 0.0)


def row_terms(
    eta: Array, psi: Array, data: RowData, family: Family, expected: bool = False
) -> RowTerms:
    """Log density, score and information of the rows, all sums over replicates."""

    def log_lik(eta, y, w):
        return family.log_lik(y, eta, psi, w)

    def row(eta, y, w):
        value, score = jax.value_and_grad(log_lik)(eta, y, w)
        if expected:
            W = jnp.reshape(family.expected_information(eta, psi, w), (1, 1))
        else:
            W = -jax.jacfwd(jax.grad(log_lik))(eta, y, w)
        return value, score, W

    # a row of weight zero stands for one of weight one that is not counted
    used = data.w > 0
    w = jnp.where(used, data.w, 1.0)
    value, score, W = jax.vmap(row)(eta, data.y, w)
    return RowTerms(
        jnp.sum(jnp.where(used, value, 0.0)),
        jnp.where(used[:, None], score, 0.0),
        jnp.where(used[:, None, None], W, 0.0),
    )


def curvature(W: Array, data: RowData, layout: Layout) -> CrossProducts:
    """The blocks of Z'WZ, ready for elimination."""
    weights = W[:, 0, 0] if W.shape[1] == 1 else W
    nothing = jnp.zeros((data.y.shape[0], 0), data.y.dtype)
    sums: Sums = RowSums(layout, data.z, data.codes, weights, nothing, jnp).all(
        data.pairs
    )
    zero = jnp.zeros((), data.y.dtype)
    return CrossProducts(
        *sums, data.parents, jnp.zeros(0, data.y.dtype), zero, zero, zero, zero
    )


def gather(rows: Array, data: RowData, layout: Layout) -> Effects:
    """Z' rows for rows (n, R): (J, K) per block."""
    out = []
    for f, block in enumerate(layout.blocks):
        columns = rows[:, jnp.array(layout.block_predictors(f))] * data.z[f]
        out.append(
            jax.ops.segment_sum(columns, data.codes[f], num_segments=block.n_levels)
        )
    return tuple(out)


def gradient(
    u: Effects, score: Array, factors: tuple[Array, ...], data: RowData, layout: Layout
) -> Effects:
    """Gradient g(u) of -h, equation (2)."""
    moved = gather(score, data, layout)
    return tuple(v - m @ Lam for v, m, Lam in zip(u, moved, factors))


def effects(u: Effects, factors: tuple[Array, ...]) -> Effects:
    """Effects b = u Lambda' of every block."""
    return tuple(v @ Lam.T for v, Lam in zip(u, factors))


def solve_spherical(
    v: Effects,
    W: Array,
    done: Eliminated,
    factors: tuple[Array, ...],
    data: RowData,
    layout: Layout,
) -> Effects:
    """M^-1 v, as v - M^-1 Lambda' Z'WZ Lambda v."""
    eta = jnp.stack(random_part(effects(v, factors), data, layout), axis=1)
    moved = jnp.sum(W * eta[:, None, :], axis=2)
    right = gather(moved, data, layout)
    _, back = solve_effects(factors, done, right, data.parents, layout)
    return tuple(a - c for a, c in zip(v, back))


# ---- the search for the mode -------------------------------------------------------


class _Search(NamedTuple):
    u: Effects
    step: Effects
    length: Array
    value: Array
    decrement: Array
    majorize: Array
    n_iter: Array
    going: Array


def find_modes(
    beta: tuple[Array, ...],
    factors: tuple[Array, ...],
    psi: Array,
    u0: Effects,
    data: RowData,
    layout: Layout,
    family: Family,
) -> tuple[Effects, Array]:
    """Maximize h(u) from u0; the mode, and what is left of its tolerance.

    More than one is left where no mode with positive definite curvature was found.
    This is never differentiated, see laplace.py.
    """
    eps = float(jnp.finfo(data.y.dtype).eps)
    tol = eps**0.6

    def body(s: _Search) -> _Search:
        trial = tuple(a + s.length * d for a, d in zip(s.u, s.step))
        eta = linear_predictors(beta, effects(trial, factors), data, layout)
        terms = row_terms(eta, psi, data, family)
        value = terms.value - 0.5 * _dot(trial, trial)
        start = s.n_iter == 0
        noise = 100.0 * eps * jnp.abs(s.value)
        accept = start | (value >= s.value - jnp.where(start, 0.0, noise))
        W = jnp.where(s.majorize, _majorant(terms.W), terms.W)
        g = gradient(trial, terms.score, factors, data, layout)
        done = eliminate(factors, curvature(W, data, layout), layout)
        step = solve_spherical(tuple(-v for v in g), W, done, factors, data, layout)
        decrement = -_dot(g, step)
        fine = jnp.isfinite(done.logdet) & jnp.isfinite(decrement) & (decrement >= 0)
        # a step that does not climb: the same point again, with a larger W
        again = accept & ~fine & ~s.majorize
        length = jnp.where(accept, jnp.where(again, 0.0, 1.0), 0.25 * s.length)
        lost = (accept & ~fine & s.majorize) | (length < _SHORTEST) & ~again
        converged = accept & fine & (decrement <= tol)
        going = ~converged & ~lost & (s.n_iter + 1 < _MAX_ITER)
        take = accept & fine
        return _Search(
            u=_choose(accept, trial, s.u),
            step=_choose(take, step, s.step),
            length=length,
            value=jnp.where(accept, value, s.value),
            decrement=jnp.where(take, decrement, s.decrement),
            majorize=again,
            n_iter=s.n_iter + 1,
            going=going,
        )

    infinite = jnp.asarray(jnp.inf, data.y.dtype)
    zero = tuple(jnp.zeros_like(v) for v in u0)
    first = _Search(
        u0, zero, jnp.zeros_like(infinite), -infinite, infinite,
        jnp.zeros((), bool), jnp.zeros((), jnp.int32), jnp.ones((), bool),
    )  # fmt: skip
    last = lax.while_loop(lambda s: s.going, body, first)
    # the last step is known already and squares the error that is left
    polish = last.decrement <= tol
    u = _choose(polish, tuple(a + d for a, d in zip(last.u, last.step)), last.u)
    return u, last.decrement / tol


def _dot(a: Effects, b: Effects) -> Array:
    return sum((jnp.sum(x * y) for x, y in zip(a, b)), jnp.zeros((), a[0].dtype))


def _choose(condition: Array, a: Effects, b: Effects) -> Effects:
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b))


def _majorant(W: Array) -> Array:
    """Diagonal matrices of the absolute row sums: W or more, and positive."""
    size = jnp.sum(jnp.abs(W), axis=2)
    return size[:, :, None] * jnp.eye(W.shape[1], dtype=W.dtype)[None]
