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

REML integrates the first predictor's beta out as well, with a flat prior: h is then
maximal in u and beta together, and

    [ M          Lambda'Z'WX ]      log determinant log|M| + log|T|,
    [ X'WZ Lambda    X'WX    ],     T = X'WX - X'WZ Lambda M^-1 Lambda'Z'WX         (3)

Effects are tuples over blocks of (J, K), rows are in the order of the data.

References: Bates et al. (2015), J. Stat. Softw. 67(1), doi:10.18637/jss.v067.i01;
Breslow and Clayton (1993), JASA 88, doi:10.2307/2290687.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.crossproducts import CrossProducts
from jaxglmm.elimination import Effects, Eliminated, eliminate, solve_effects
from jaxglmm.families import Family
from jaxglmm.linalg import spd_inverse
from jaxglmm.plan import Layout, Pairs
from jaxglmm.rowsums import RowSums, Sums, level_of_rows, sum_by_level
from jaxglmm.typing import Array

__all__ = [
    "Curvature",
    "Inner",
    "RowData",
    "RowTerms",
    "curvature",
    "curved",
    "eliminated",
    "find_modes",
    "gradient",
    "gram",
    "inner_dot",
    "linear_predictors",
    "over_rows",
    "pulled",
    "random_part",
    "row_scores",
    "row_terms",
    "row_values",
    "solve_inner",
]

_MAX_ITER = 100
_SHORTEST = 1e-5  # of a Newton step, before the search for the mode is given up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowData:
    """Rows in inner units.

    ``X[r]`` (n, p_r), ``offset[r]`` (n,) for every predictor; ``z[f]`` (n, K) and
    ``codes[f]`` (n,) for every block. Rows of weight ``w`` zero do not count.
    ``base`` () is the sum of what the log densities have that depends on data alone.
    ``unused`` (p,) is one for columns of any X that hold nothing. ``units`` turns inner
    parameters into the user's, where a prior wants these.
    """

    y: Array
    w: Array
    X: tuple[Array, ...]
    offset: tuple[Array, ...]
    z: tuple[Array, ...]
    codes: tuple[Array, ...]
    parents: tuple[Array, ...]
    pairs: Pairs | None
    base: Array
    unused: Array
    units: Any = None


class RowTerms(NamedTuple):
    """Log kernel () summed, score (n, R) and information (n, R, R)."""

    value: Array
    score: Array
    W: Array


class Inner(NamedTuple):
    """What is integrated out: u, and with REML the first beta (p,), else (0,)."""

    u: Effects
    beta: Array


class Curvature(NamedTuple):
    """Minus the Hessian of h, eliminated.

    ``W`` (n, R, R), ``done`` for M, ``logdet``; with REML ``Y`` = M^-1 Lambda'Z'WX, a
    column of X in front, and the inverse of T in (3).
    """

    W: Array
    done: Eliminated
    logdet: Array
    Y: Effects | None = None
    T_inv: Array | None = None


def random_part(b: Effects, data: RowData, layout: Layout) -> list[Array]:
    """Z b of every predictor, (n,) each."""
    out = [jnp.zeros_like(data.y) for _ in data.X]
    for f, effects in enumerate(b):
        rows = data.z[f] * level_of_rows(effects, data.codes[f], f, layout)
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


def over_rows(fn: Callable, data: RowData, *rows: Array) -> Any:
    """``fn(y, w, *row)`` of every row (n, ...), zero where rows do not count."""
    # a row of weight zero stands for one of weight one that does not count; a weight
    # that is no number does, and makes everything not finite
    used = data.w != 0
    out = jax.vmap(fn)(data.y, jnp.where(used, data.w, 1.0), *rows)
    return jax.tree.map(
        lambda x: jnp.where(used.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0), out
    )


def row_values(eta: Array, psi: Array, data: RowData, family: Family) -> Array:
    """Log kernel of the density of every row, (n,)."""
    return over_rows(lambda y, w, e: family.log_kernel(y, e, psi, w), data, eta)


def row_scores(eta: Array, psi: Array, data: RowData, family: Family) -> Array:
    """Score of every row, (n, R)."""
    score = jax.grad(lambda e, y, w: family.log_kernel(y, e, psi, w))
    return over_rows(lambda y, w, e: score(e, y, w), data, eta)


def row_terms(
    eta: Array, psi: Array, data: RowData, family: Family, expected: bool = False
) -> RowTerms:
    """Log kernel, score and information of the rows, all sums over replicates."""

    def row(y, w, eta):
        def kernel(eta):
            return family.log_kernel(y, eta, psi, w)

        value, score = jax.value_and_grad(kernel)(eta)
        if expected:
            W = jnp.reshape(family.expected_information(eta, psi, w), (1, 1))
        else:
            W = -jax.jacfwd(jax.grad(kernel))(eta)
        return RowTerms(value, score, W)

    terms = over_rows(row, data, eta)
    return terms._replace(value=jnp.sum(terms.value))


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
    for f in range(len(layout.blocks)):
        columns = rows[:, jnp.array(layout.block_predictors(f))] * data.z[f]
        out.append(sum_by_level(columns, data.codes[f], f, layout))
    return tuple(out)


def pulled(
    rows: Array, factors: tuple[Array, ...], data: RowData, layout: Layout, reml: bool
) -> Inner:
    """Lambda' Z' rows, with REML X' rows too, for rows (n, R)."""
    sums = gather(rows, data, layout)
    beta = rows[:, 0] @ data.X[0] if reml else jnp.zeros(0, rows.dtype)
    return Inner(tuple(m @ Lam for m, Lam in zip(sums, factors)), beta)


def gradient(
    inner: Inner,
    score: Array,
    factors: tuple[Array, ...],
    data: RowData,
    layout: Layout,
) -> Inner:
    """Gradient g of -h in what is integrated out, equation (2)."""
    moved = pulled(score, factors, data, layout, inner.beta.shape[0] > 0)
    return Inner(tuple(v - m for v, m in zip(inner.u, moved.u)), -moved.beta)


def effects(u: Effects, factors: tuple[Array, ...]) -> Effects:
    """Effects b = u Lambda' of every block."""
    return tuple(v @ Lam.T for v, Lam in zip(u, factors))


def curved(
    W: Array,
    factors: tuple[Array, ...],
    data: RowData,
    layout: Layout,
    reml: bool,
) -> Curvature:
    """M, or with REML (3), eliminated, for information W (n, R, R)."""
    return eliminated(curvature(W, data, layout), W, factors, data, layout, reml)


def eliminated(
    cp: CrossProducts,
    W: Array,
    factors: tuple[Array, ...],
    data: RowData,
    layout: Layout,
    reml: bool,
) -> Curvature:
    """The same from Z'WZ, which is ``cp``; W itself is of use with REML alone."""
    done = eliminate(factors, cp, layout)
    if not reml:
        return Curvature(W, done, done.logdet)
    X = data.X[0]

    def column(x):
        right = gather(W[:, :, 0] * x[:, None], data, layout)
        half = tuple(r @ Lam for r, Lam in zip(right, factors))
        b, u = solve_effects(factors, done, half, data.parents, layout)
        return right, b, u

    right, b, Y = jax.vmap(column)(X.T)
    inside = sum(
        jnp.einsum("ajk,bjk->ab", r, c) for r, c in zip(right, b) if r.shape[1]
    )
    p = X.shape[1]
    T = (X * W[:, 0, 0][:, None]).T @ X - inside + jnp.diag(data.unused[:p])
    T_inv, logdet = spd_inverse(T)
    return Curvature(W, done, done.logdet + logdet, Y, T_inv)


def solve_inner(
    v: Inner, at: Curvature, factors: tuple[Array, ...], data: RowData, layout: Layout
) -> Inner:
    """M^-1 v; with REML the inverse of (3)."""
    b, u = solve_effects(factors, at.done, v.u, data.parents, layout)
    if at.T_inv is None:
        return Inner(u, v.beta)
    assert at.Y is not None
    eta = jnp.stack(random_part(b, data, layout), axis=1)
    follow = jnp.sum(at.W[:, 0] * eta, axis=1) @ data.X[0]
    beta = at.T_inv @ (v.beta - follow)
    return Inner(
        tuple(a - jnp.tensordot(beta, y, axes=1) for a, y in zip(u, at.Y)), beta
    )


# ---- the search for the mode -------------------------------------------------------


class _Search(NamedTuple):
    inner: Inner
    step: Inner
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
    inner0: Inner,
    data: RowData,
    layout: Layout,
    family: Family,
    tol: float | None = None,
    max_iter: int = _MAX_ITER,
) -> tuple[Inner, Array]:
    """Maximize h from inner0; the mode, and what is left of its tolerance.

    More than one is left where no mode with positive definite curvature was found.
    ``tol`` is the Newton decrement at which to stop, before the last step.
    With REML the first of ``beta`` is not looked at. This is never differentiated, see
    laplace.py.
    """
    eps = float(jnp.finfo(data.y.dtype).eps)
    tol = eps**0.6 if tol is None else tol
    reml = inner0.beta.shape[0] > 0

    def body(s: _Search) -> _Search:
        trial = jax.tree.map(lambda a, d: a + s.length * d, s.inner, s.step)
        betas = (trial.beta, *beta[1:]) if reml else beta
        eta = linear_predictors(betas, effects(trial.u, factors), data, layout)
        terms = row_terms(eta, psi, data, family)
        value = terms.value - 0.5 * _dot(trial.u, trial.u)
        start = s.n_iter == 0
        noise = 100.0 * eps * jnp.abs(s.value)
        accept = start | (value >= s.value - jnp.where(start, 0.0, noise))
        W = jnp.where(s.majorize, _majorant(terms.W), terms.W)
        g = gradient(trial, terms.score, factors, data, layout)
        at = curved(W, factors, data, layout, reml)
        step = solve_inner(jax.tree.map(jnp.negative, g), at, factors, data, layout)
        decrement = -inner_dot(g, step)
        fine = jnp.isfinite(at.logdet) & jnp.isfinite(decrement) & (decrement >= 0)
        # a step that does not climb: the same point again, with a larger W
        again = accept & ~fine & ~s.majorize
        length = jnp.where(accept, jnp.where(again, 0.0, 1.0), 0.25 * s.length)
        lost = (accept & ~fine & s.majorize) | (length < _SHORTEST) & ~again
        converged = accept & fine & (decrement <= tol)
        going = ~converged & ~lost & (s.n_iter + 1 < max_iter)
        take = accept & fine
        return _Search(
            inner=_choose(accept, trial, s.inner),
            step=_choose(take, step, s.step),
            length=length,
            value=jnp.where(accept, value, s.value),
            decrement=jnp.where(take, decrement, s.decrement),
            majorize=again,
            n_iter=s.n_iter + 1,
            going=going,
        )

    infinite = jnp.asarray(jnp.inf, data.y.dtype)
    first = _Search(
        inner0, jax.tree.map(jnp.zeros_like, inner0), jnp.zeros_like(infinite),
        -infinite, infinite, jnp.zeros((), bool), jnp.zeros((), jnp.int32),
        jnp.ones((), bool),
    )  # fmt: skip
    last = lax.while_loop(lambda s: s.going, body, first)
    # the last step is known already and squares the error that is left
    polished = jax.tree.map(jnp.add, last.inner, last.step)
    inner = _choose(last.decrement <= tol, polished, last.inner)
    return inner, last.decrement / tol


def _dot(a: Effects, b: Effects) -> Array:
    return sum((jnp.sum(x * y) for x, y in zip(a, b)), jnp.zeros((), a[0].dtype))


def inner_dot(a: Inner, b: Inner) -> Array:
    """Inner product, ()."""
    return _dot(a.u, b.u) + jnp.sum(a.beta * b.beta)


def gram(a: Any, b: Any) -> Array:
    """Inner products of every direction (P, ...) of a with every one of b, (P, P)."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return sum(
        x.reshape(x.shape[0], -1) @ y.reshape(y.shape[0], -1).T for x, y in pairs
    )


def _choose(condition: Array, a: Inner, b: Inner) -> Inner:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _majorant(W: Array) -> Array:
    """Diagonal matrices of the absolute row sums: W or more, and positive."""
    size = jnp.sum(jnp.abs(W), axis=2)
    return size[:, :, None] * jnp.eye(W.shape[1], dtype=W.dtype)[None]
