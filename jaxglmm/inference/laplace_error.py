"""How far the Laplace approximation is off, by importance sampling at the modes.

With h and its mode u_0, curvature M and q effects of modes.py,

    L = integral exp h(u) du / (2 pi)^(q/2) = L_0 E exp delta(d),  d ~ N(0, M^-1)    (1)
    log L_0 = h(u_0) - log|M| / 2                                       (Laplace)
    delta(d) = h(u_0 + d) - h(u_0) + d'Md / 2

exactly, for any u_0. Where effects fall into groups that share no rows (the levels of
the one grouping factor, or of the outermost of nested ones), (1) is a product over
groups, and each factor has its own average: the variances add up instead of
multiplying. Crossed effects are one group.

d is drawn from a multivariate t with nu degrees of freedom, d = A e s, A A' = M^-1,
e ~ N(0, I), s^2 = nu / chi^2_nu, because the normal prior of u and a bounded density
of y make every weight bounded then; with normal draws, narrower than the prior, the
weights of binary data have no variance. nu = max(5, q/2): the radius of t has about
the spread of a normal's as long as nu grows with q. With the density ratio omega
(normal over t, of mean one),

    E exp delta = 1 + E_t x,      x = omega (exp delta - 1),                        (2)

which is one to rounding where h is quadratic; omega - 1 serves as control variate, and
draws come in pairs +-d, whose cubic terms cancel.

Draws with covariance M^-1 come out of the elimination (elimination.py), root to leaf,
without M: for block f, given those behind it,

    u_f = A_f e_f - M_f^-1 Lambda' sum_r H_fr b_r,      A_f A_f' = M_f^-1.          (3)

Shapes: blocks (K, K, J), draws (J, K) per block, groups (G,), rows (n,).

References: Geweke (1989), Econometrica 57(6), doi:10.2307/1913710; Skaug (2002),
J. Comput. Graph. Stat. 11(2), doi:10.1198/106186002760180617.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from jax.scipy.special import gammaln

from jaxglmm.buckets import pad_design
from jaxglmm.compiled import run
from jaxglmm.coordinates import block_factors
from jaxglmm.designs import Design
from jaxglmm.elimination import Eliminated, effects_from_noise, eliminate
from jaxglmm.families import Family, known_family
from jaxglmm.generalized import user_rows
from jaxglmm.hostfit import built_in
from jaxglmm.modes import (
    curvature,
    effects,
    linear_predictors,
    random_part,
    row_terms,
    row_values,
)
from jaxglmm.plan import Layout
from jaxglmm.typing import Array

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["LaplaceError", "laplace_error"]

_CHUNK = 400_000  # rows times draws that are evaluated at once
_MAX_CROSSED = 4_000  # crossed effects whose (q_R, q_R) factor multiplies every draw
_FEWEST = 100.0  # effective draws below which no standard error is to be trusted


@dataclass(frozen=True, repr=False)
class LaplaceError:
    """What :meth:`jaxglmm.GLMM.laplace_error` returns; printed, it is the verdict.

    Parameters
    ----------
    error, se : float
        log L minus the log-likelihood of the fit, at its parameters, and its Monte
        Carlo standard error.
    loglik : float
        log L as corrected.
    ess : float
        Effective number of draws, in the group where it is smallest.
    n : int
        Number of draws.
    n_groups : int
        Independent groups of effects, with draws of their own.
    method : str
        The approximation: Laplace or AGQ.
    tol : float
        Error that does not matter.
    advice : str
        What to do if it is larger.
    """

    error: float
    se: float
    loglik: float
    ess: float
    n: int
    n_groups: int
    method: str
    tol: float
    advice: str

    @property
    def known(self) -> bool:
        """Whether draws tell the error from ``tol``, by two standard errors."""
        return self._trusted and abs(abs(self.error) - self.tol) >= 2.0 * self.se

    @property
    def matters(self) -> bool:
        """Whether the error is known and larger than ``tol``."""
        return self.known and abs(self.error) > self.tol

    @property
    def _trusted(self) -> bool:
        return math.isfinite(self.error + self.se) and self.ess >= _FEWEST

    @property
    def verdict(self) -> str:
        """A sentence with the numbers, and what follows from them."""
        if not math.isfinite(self.error + self.se):
            return (
                f"The error of {self.method} cannot be estimated: there is no mode "
                "with positive definite curvature to draw around, or no draw near it."
            )
        digits = _digits(self.se)
        numbers = (
            f"{self.method} is off by {self.error:.{digits}f} "
            f"(+- {self.se:.{digits}f}) in the log-likelihood"
        )
        if not self._trusted:
            return (
                f"{numbers}, but a group's draws are worth only {self.ess:.0f} of "
                f"{self.n}: too few to tell. Use a larger n, such as {10 * self.n}."
            )
        if self.matters:
            return f"{numbers}, more than {self.tol:g}: {self.advice}."
        if self.known:
            return f"{numbers}, less than {self.tol:g}: no need for anything better."
        if self.se > 0.25 * self.tol:
            factor = math.ceil((4.0 * self.se / self.tol) ** 2)
            return (
                f"{numbers}, which is too noisy to compare with {self.tol:g}. Use "
                f"n={factor * self.n}."
            )
        return (
            f"{numbers}, which is {self.tol:g}, as near as can be told: if in doubt, "
            f"{self.advice}."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row with the numbers and the verdict."""
        names = ("method", "error", "se", "loglik", "ess", "n", "n_groups")
        row = {name: getattr(self, name) for name in names}
        return pd.DataFrame([row | {"matters": self.matters, "verdict": self.verdict}])

    def __repr__(self) -> str:
        return (
            f"{self.verdict} (log-likelihood {self.loglik:.4f}; {self.n} draws, "
            f"effective in the worst of {self.n_groups} groups {self.ess:.0f})"
        )


def _digits(se: float) -> int:
    """Decimals that show two figures of a standard error, two to six."""
    return 6 if se <= 0.0 else min(6, max(2, 1 - math.floor(math.log10(se))))


def laplace_error(m: GLMM, n: int, key: Any, tol: float) -> LaplaceError:
    """What :meth:`jaxglmm.GLMM.laplace_error` returns."""
    _check(m, n, tol)
    center, groups, padded = _at_modes(m)
    n_pairs, sums = _draw(m, padded, center, groups, n, key)
    log_ratio, var = _log_means(sums, n_pairs)
    ess = sums.w**2 / sums.ww
    error = float(center.loglik) + float(np.sum(log_ratio)) - m.loglik
    return LaplaceError(
        error=error,
        se=float(np.sqrt(np.sum(var))),
        loglik=m.loglik + error,
        ess=float(np.min(np.where(np.isfinite(ess), ess, 0.0))),
        n=2 * n_pairs,
        n_groups=groups.n_real,
        method=m.method,
        tol=tol,
        advice=_advice(m),
    )


def _check(m: GLMM, n: int, tol: float) -> None:
    if not m.is_generalized:
        raise ValueError(
            f"nothing is approximated: the likelihood of a linear model fitted by "
            f"{m.method} is exact"
        )
    if m.method not in ("Laplace", "AGQ"):
        why = "has no likelihood" if m.method == "PQL" else "integrates beta out too"
        raise ValueError(
            f"method={m.method!r} {why}, so it is not compared; fit with "
            "method='Laplace'"
        )
    if not isinstance(n, (int, np.integer)) or n < 10:
        raise ValueError(f"n must be an integer of at least 10; found {n!r}")
    if not tol > 0.0:
        raise ValueError(f"tol must be positive; found {tol!r}")
    q = m.design.layout.tail_size
    if q > _MAX_CROSSED:
        raise ValueError(
            f"{q} crossed effects are left after the largest grouping factor is "
            f"eliminated; at most {_MAX_CROSSED} can be drawn together. Judge the fit "
            "by simulating from it (m.simulate) and fitting again."
        )


def _advice(m: GLMM) -> str:
    blocks = m.design.layout.blocks
    if m.method == "AGQ":
        return "more nodes (n_quad=) are advisable"
    if len(blocks) == 1 and blocks[0].k <= 4:
        return "quadrature (method='AGQ') is advisable"
    return (
        "quadrature does not serve this model, so compare models by the corrected "
        "log-likelihood, and see by simulating from the fit (m.simulate) and fitting "
        "again how far the estimates are off"
    )


# ---- at the modes ------------------------------------------------------------------


class _Center(NamedTuple):
    """log L_0, the modes, and the elimination of their curvature."""

    loglik: Any
    eta: Any
    u: tuple[Any, ...]
    factors: tuple[Any, ...]
    done: Eliminated


class _Groups(NamedTuple):
    """Group of every level and of every row, effects per group, levels that exist."""

    level: tuple[Any, ...]
    row: Any
    size: Any
    real: tuple[Any, ...]
    n_real: int


def _at_modes(m: GLMM) -> tuple[_Center, _Groups, Design]:
    padded = pad_design(m.design)
    widths = [padded.X.shape[1], *(p.X.shape[1] for p in padded.others)]
    betas = (m.fit.params.beta, *m.fit.params.others)
    beta = tuple(np.pad(c, (0, p - len(c))) for c, p in zip(betas, widths))
    u = []
    for block, wide in zip(m.design.layout.blocks, padded.layout.blocks):
        own = np.concatenate([m.fit.u[t] for t in block.terms], axis=1)
        u.append(np.pad(own, ((0, wide.n_levels - len(own)), (0, 0))))
    args = padded, beta, np.asarray(m.fit.params.theta), m._psi, tuple(u)
    center = run(_center, (m.family,), *args, keep=_keep(m, padded))
    return center, _groups(m.design, padded), padded


def _keep(m: GLMM, padded: Design) -> bool:
    return built_in(padded.layout) and known_family(m.family)


def _center(family: Family, design: Design, beta, theta, psi, u) -> _Center:
    data, layout = user_rows(design, family), design.layout
    factors = block_factors(theta, layout)
    eta = linear_predictors(beta, effects(u, factors), data, layout)
    terms = row_terms(eta, psi, data, family)
    done = eliminate(factors, curvature(terms.W, data, layout), layout)
    square = sum(jnp.sum(v**2) for v in u)
    loglik = terms.value + data.base - 0.5 * square - 0.5 * done.logdet
    return _Center(loglik, eta, u, factors, done)


def _groups(design: Design, padded: Design) -> _Groups:
    """Independent groups: levels of the root of a chain, or all in one."""
    layout, plan = padded.layout, padded.plan
    assert plan is not None
    real = tuple(
        np.arange(wide.n_levels) < b.n_levels
        for b, wide in zip(design.layout.blocks, layout.blocks)
    )
    level = [np.zeros(b.n_levels, np.int32) for b in layout.blocks]
    n_groups = n_real = 1
    if not layout.tail:
        root = len(layout.blocks) - 1
        n_groups = layout.blocks[root].n_levels
        n_real = design.layout.blocks[root].n_levels
        level[root] = np.arange(n_groups, dtype=np.int32)
        for f in reversed(range(root)):
            level[f] = level[f + 1][np.asarray(plan.parents[f])]
    size = np.zeros(n_groups)
    for block, at, ok in zip(layout.blocks, level, real):
        size += block.k * np.bincount(at[ok], minlength=n_groups)
    codes = np.asarray(padded.terms[layout.blocks[0].terms[0]].group)
    return _Groups(tuple(level), level[0][codes], size, real, n_real)


def _cholesky(M_inv: tuple[np.ndarray, ...], S_inv: np.ndarray):
    """A of every block of the chain (K, K, J), and of the tail (q_R, q_R)."""
    try:
        by_block = [np.linalg.cholesky(np.moveaxis(M, 2, 0)) for M in M_inv]
        tail = np.linalg.cholesky(S_inv) if len(S_inv) else S_inv
    except np.linalg.LinAlgError:
        return tuple(np.full_like(M, np.nan) for M in M_inv), np.full_like(
            S_inv, np.nan
        )
    return tuple(np.moveaxis(A, 0, 2) for A in by_block), tail


# ---- the draws ---------------------------------------------------------------------


class _Sums(NamedTuple):
    """Sums over draws, (G,): over pairs of x and c = omega - 1, and of weights."""

    x: Any
    xx: Any
    c: Any
    cc: Any
    xc: Any
    w: Any
    ww: Any


def _draw(m: GLMM, padded: Design, center: _Center, groups: _Groups, n: int, key):
    """Number of pairs drawn, and their sums in the groups that exist."""
    if isinstance(key, (int, np.integer)):
        key = jax.random.key(int(key))
    n_pairs = -(-n // 2)
    chunk = max(1, min(n_pairs, _CHUNK // (2 * padded.n_obs)))
    n_chunks = -(-n_pairs // chunk)
    chunk = -(-n_pairs // n_chunks)
    keys = np.asarray(jax.random.key_data(jax.random.split(key, n_chunks)))
    A, A_tail = _cholesky(center.done.M_inv, center.done.S_inv)
    static = str(jax.random.key_impl(key)), m.family, chunk
    arrays = groups.level, groups.row, groups.size, groups.real
    args = keys, padded, m._psi, center, A, A_tail, arrays
    sums = run(_sample, static, *args, keep=_keep(m, padded))
    return chunk * n_chunks, _Sums(*(v[: groups.n_real] for v in sums))


def _sample(impl, family, chunk, keys, design, psi, center, A, A_tail, groups):
    """Sums over pairs of draws, a chunk of them at once."""
    data, layout = user_rows(design, family), design.layout
    level, row, size, real = groups
    dtype, n_groups = data.y.dtype, size.shape[0]
    nu = jnp.maximum(5.0, 0.5 * size)
    at_mode = row_values(center.eta, psi, data, family)

    def by_group(values):
        """Sum over the effects of every group of (J, K) arrays, (G,)."""
        parts = (
            jax.ops.segment_sum(jnp.sum(v, axis=1), g, num_segments=n_groups)
            for v, g in zip(values, level)
        )
        return sum(parts, jnp.zeros(n_groups, dtype))

    def change(d, square):
        """Change delta of (1), (G,)."""
        b = effects(d, center.factors)
        moved = jnp.stack(random_part(b, data, layout), axis=1)
        rows = row_values(center.eta + moved, psi, data, family) - at_mode
        rows = jax.ops.segment_sum(rows, row, num_segments=n_groups)
        prior = by_group(tuple(u * v + 0.5 * v**2 for u, v in zip(center.u, d)))
        return rows - prior + 0.5 * square

    def pair(key):
        key_e, key_s = jax.random.split(key)
        keys = jax.random.split(key_e, len(layout.blocks))
        e = tuple(
            jnp.where(ok[:, None], jax.random.normal(k, u.shape, dtype), 0.0)
            for k, u, ok in zip(keys, center.u, real)
        )
        s = jnp.sqrt(0.5 * nu / jax.random.gamma(key_s, 0.5 * nu, dtype=dtype))
        e = tuple(v * s[g][:, None] for v, g in zip(e, level))
        square = by_group(tuple(v**2 for v in e))
        noise = _colour(e, A, A_tail, layout)
        d = effects_from_noise(center.factors, center.done, noise, data.parents, layout)
        log_t = (
            gammaln(0.5 * (nu + size)) - gammaln(0.5 * nu)
            - 0.5 * size * jnp.log(0.5 * nu)
            - 0.5 * (nu + size) * jnp.log1p(square / nu)
        )  # fmt: skip
        log_omega = -0.5 * square - log_t
        delta = change(d, square), change(tuple(-v for v in d), square)
        return log_omega, jnp.stack(delta)

    def add(sums, key):
        keys = jax.random.split(jax.random.wrap_key_data(key, impl=impl), chunk)
        log_omega, delta = jax.vmap(pair)(keys)  # (chunk, G), (chunk, 2, G)
        log_w = log_omega[:, None] + delta
        c, w = jnp.expm1(log_omega), jnp.exp(log_w)
        small = jnp.abs(delta) < 1.0
        near = (c[:, None] + 1.0) * jnp.expm1(jnp.where(small, delta, 0.0))
        x = jnp.mean(jnp.where(small, near, w - c[:, None] - 1.0), axis=1)
        new = _Sums(
            *(jnp.sum(v, axis=0) for v in (x, x**2, c, c**2, x * c)),
            *(jnp.sum(v, axis=(0, 1)) for v in (w, w**2)),
        )
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.zeros(n_groups, dtype)
    return lax.scan(add, _Sums(*(zero,) * 7), keys)[0]


def _colour(e, A, A_tail: Array, layout: Layout):
    """A e of every block: of a level for the chain, of all at once for the tail."""
    n_chain = layout.n_chain
    noise = [jnp.sum(a * v.T[None], axis=1).T for a, v in zip(A, e[:n_chain])]
    if layout.tail:
        flat = A_tail @ jnp.concatenate([jnp.ravel(v) for v in e[n_chain:]])
        start = 0
        for v in e[n_chain:]:
            noise.append(flat[start : start + v.size].reshape(v.shape))
            start += v.size
    return tuple(noise)


def _log_means(sums: _Sums, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Log of (2) and its variance by group, c as control variate."""
    x, c = sums.x / n, sums.c / n
    var_x, var_c = sums.xx / n - x**2, sums.cc / n - c**2
    cov = sums.xc / n - x * c
    known = var_c > 0.0
    slope = np.where(known, cov / np.where(known, var_c, 1.0), 0.0)
    with np.errstate(all="ignore"):
        shift = x - slope * c
        var = np.maximum(var_x - slope * cov, 0.0) / (n * (1.0 + shift) ** 2)
        # the mean of a logarithm lies half its variance too low
        return np.log1p(shift) + 0.5 * var, var
