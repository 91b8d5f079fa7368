"""Likelihood-ratio tests of nested models by the parametric bootstrap.

    T = 2 (log L1 - log L0),     p = (1 + #{T*_r >= T}) / (1 + n),

where T*_r is that of responses drawn from the smaller model at its estimates. Nested
means that the fixed effects of the smaller model are combinations of those of the
larger, and that a term of the larger has the covariances of each of its terms.

References: Davison and Hinkley (1997), Bootstrap Methods and their Application, ch. 4;
Self and Liang (1987), J. Am. Stat. Assoc. 82(398), doi:10.1080/01621459.1987.10478472.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.control import Control
from jaxglmm.designs import Design, Term
from jaxglmm.errors import ConvergenceError, Status
from jaxglmm.families import is_linear
from jaxglmm.fitting import What, fit_checked
from jaxglmm.simulation import simulate
from jaxglmm.studies.arrange import arrange
from jaxglmm.studies.batch import check_batch
from jaxglmm.studies.checkpoint import design_facts
from jaxglmm.studies.lanes import Outcome, check_count
from jaxglmm.studies.study import Running, as_key, run_study

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["BootstrapTest", "bootstrap_lrt"]

_SAME_RATIO = 1e-6  # likelihood ratios nearer than that are the same


@dataclass(frozen=True, repr=False)
class BootstrapTest:
    """A likelihood-ratio test by simulation; made by :func:`bootstrap_lrt`.

    Attributes
    ----------
    statistic, p_value, p_value_se : float
        2 (log L1 - log L0) of the data; its p-value; the Monte Carlo error of that.
    replicates : array (n,)
        The statistic under the smaller model; NaN where a fit did not converge.
    """

    statistic: float
    p_value: float
    p_value_se: float
    replicates: np.ndarray

    def __repr__(self) -> str:
        n, failed = len(self.replicates), int(np.isnan(self.replicates).sum())
        return (
            f"likelihood ratio {self.statistic:.4f}, p = {self.p_value:.4f} "
            f"(Monte Carlo error {self.p_value_se:.4f}; {n} replicates under the "
            f"smaller model, {failed} not converged)"
        )


def bootstrap_lrt(
    m0: GLMM,
    m1: GLMM,
    n: int = 1000,
    *,
    key: Any,
    control: Control | None = None,
    tile: int | None = None,
    threads: int | None = None,
    devices: Sequence[Any] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> BootstrapTest:
    """Likelihood-ratio test of nested models by the parametric bootstrap.

    The chi-squared distribution is wrong where the smaller model has a variance of
    zero; responses drawn from it give the right one.

    Parameters
    ----------
    m0, m1 : GLMM
        The smaller and the larger model, of the same rows and family. Gaussian models
        are compared by ML, others by their method; by REML only where both were fitted
        so with the same fixed effects.
    n : int
        Replicates.
    key : int or PRNG key
    control, tile, threads, devices, checkpoint, progress
        As for :func:`jaxglmm.recovery_study`; ``control`` is that of the fits when
        left out.

    Returns
    -------
    BootstrapTest
        With p = (1 + #{T* >= T}) / (1 + n) over the replicates that converged; NaN
        where none did.

    Raises
    ------
    ValueError
        Where m0 is not nested in m1: other rows or another family, fixed effects that
        those of m1 do not span, or random effects whose covariances no term of m1 has;
        other weights, offsets, nodes, priors or control.
    ConvergenceError
        Where one of the two does not converge.

    Examples
    --------
    >>> import jaxglmm as jg
    >>> data = jg.datasets.sleepstudy()
    >>> m1 = jg.glmm("Reaction ~ Days + (Days | Subject)", data)
    >>> m0 = jg.glmm("Reaction ~ Days + (1 | Subject)", data)
    >>> test = jg.bootstrap_lrt(m0, m1, 200, key=1, progress=False)
    >>> test.p_value < 0.02
    True
    """
    n = check_count("n", n)
    for name, m in (("m0", m0), ("m1", m1)):
        if not hasattr(m, "frame"):
            raise TypeError(f"{name} must be a fitted GLMM; found {type(m).__name__}")
    method = _common_method(m0, m1)
    _check_nested(m0, m1)
    control = m0.control if control is None else control
    parts = [
        check_batch(m.design, m.family, method, m.n_quad, m.priors, control)
        for m in (m0, m1)
    ]
    (what, small), (_, large) = parts
    with jax.enable_x64(True):
        fits = [
            fit_checked(what, jax.tree.map(jnp.asarray, d), None)
            for d in (small, large)
        ]
        observed = float(2.0 * (fits[1].loglik - fits[0].loglik))
        for name, fit in zip(("m0", "m1"), fits):
            if not fit.converged:
                raise ConvergenceError(
                    f"{name} does not converge by {method}, so there is no likelihood "
                    f"to compare: {Status(int(fit.status))}"
                )
        truth = jax.tree.map(np.asarray, fits[0].params)
    if observed < -1e-6:
        raise ValueError(
            f"m1 has a lower likelihood than m0 (by {-observed / 2:.4g}), which a "
            "model that contains m0 cannot have; give the smaller model first"
        )
    prng = as_key(key)
    facts = {
        **design_facts(small), "larger model": large, "params": truth, "key": prng,
    }  # fmt: skip
    shared = small, arrange(small), arrange(large), truth, prng
    out = run_study(
        _ratio, what, (), shared, large, n,
        Running(tile, threads, devices, progress, checkpoint), label="bootstrap LRT",
        facts=facts,
    )  # fmt: skip
    ratios = np.where(out["converged"], out["ratio"], np.nan)
    used = ratios[np.isfinite(ratios)]
    if not len(used):
        return BootstrapTest(observed, np.nan, np.nan, ratios)
    # ratios of zero, as of a variance of zero, are zero but for rounding
    p = (1.0 + np.sum(used >= observed - _SAME_RATIO)) / (1.0 + len(used))
    return BootstrapTest(
        observed, float(p), float(np.sqrt(p * (1 - p) / len(used))), ratios
    )


def _check_nested(m0: GLMM, m1: GLMM) -> None:
    """Raise where a column of m0 is no combination of those of m1."""
    small, large = m0.design, m1.design
    frames = (m0.frame, *m0.frame.others)
    fixed = [small.X, *(p.X for p in small.others)]
    wide = [large.X, *(p.X for p in large.others)]
    if len(fixed) > len(wide):
        raise ValueError(
            f"m0 has {len(fixed)} linear predictors, m1 has {len(wide)}, so m0 is not "
            "nested in it; give the smaller model first"
        )
    for X, W, frame in zip(fixed, wide, frames):
        alien = _outside(np.asarray(X), np.asarray(W))
        if alien.any():
            raise ValueError(
                f"m0 has the fixed effect {frame.X_names[int(np.argmax(alien))]!r}, "
                "which those of m1 do not contain, so m0 is not nested in it; give the "
                "smaller model first"
            )
    for t, named in zip(small.terms, m0.frame.all_terms):
        if not any(_holds(s, t) for s in large.terms):
            names = ", ".join(map(repr, named.z_names))
            raise ValueError(
                f"m0 has random effects of {names} by {named.group_name!r}, whose "
                "covariances no term of m1 contains, so m0 is not nested in it; give "
                "the smaller model first"
            )


def _holds(s: Term, t: Term) -> bool:
    """Whether some covariance matrix of s gives the rows that of t, whatever it is."""
    if s.predictor != t.predictor:
        return False
    z, wide = np.asarray(t.z), np.asarray(s.z)
    if not _same_groups(t.group, s.group):
        return t.k == 1 and _is_split(s, t)
    if s.structure == "full":
        return not _outside(z, wide).any()
    if s.structure == "diag" and (t.k == 1 or t.structure == "diag"):
        columns = [_outside(z, wide[:, [j]]) for j in range(s.k)]
        return not np.all(columns, axis=0).any()  # further variances being zero
    return s.structure == t.structure and s.k == t.k and np.allclose(z, wide)


def _is_split(s: Term, t: Term) -> bool:
    """Whether t has one effect for each different row of z in every group of s.

    As (1 | a:f) in (0 + f | a): a multiple of the unit matrix is its covariance.
    """
    rows, kind = np.unique(np.asarray(s.z), axis=0, return_inverse=True)
    kind, G = kind.reshape(-1), rows @ rows.T
    same = G[0, 0] * np.eye(len(rows))
    if s.structure not in ("full", "diag") or not np.allclose(G, same):
        return False
    cells = np.asarray(s.group).astype(np.int64) * len(rows) + kind
    return _same_groups(cells, t.group) and bool(np.ptp(np.asarray(t.z)) == 0)


def _outside(X: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Which columns of X (n, p) are no combination of those of W (n, q), (p,)."""
    size = np.linalg.norm(W, axis=0)
    W = W / np.where(size > 0, size, 1.0)
    left = X - W @ np.linalg.lstsq(W, X, rcond=1e-12)[0]
    whole = np.linalg.norm(X, axis=0)
    varies = np.linalg.norm(X - X.mean(axis=0), axis=0)
    size = np.where(varies > 1e-9 * whole, varies, whole)
    return np.linalg.norm(left, axis=0) > 1e-6 * size


def _same_groups(a: Any, b: Any) -> bool:
    """Whether two codes (n,) sort the rows alike."""
    pairs = np.unique(np.stack([np.asarray(a), np.asarray(b)]), axis=1)
    return len(pairs[0]) == len(np.unique(a)) == len(np.unique(b))


def _given(design: Design, name: str) -> np.ndarray:
    """Weights or offset (n,), also where none were given."""
    value, usual = getattr(design, name), 1.0 if name == "weights" else 0.0
    return np.full(len(design.y), usual) if value is None else np.asarray(value)


def _common_method(m0: GLMM, m1: GLMM) -> str:
    y0, y1 = np.asarray(m0.design.y), np.asarray(m1.design.y)
    if len(y0) != len(y1) or not np.array_equal(y0, y1):
        raise ValueError("m0 and m1 were not fitted to the same responses")
    if m0.family != m1.family:
        raise ValueError(f"m0 has the family {m0.family}, m1 {m1.family}")
    for name in ("weights", "offset"):
        a, b = (_given(m.design, name) for m in (m0, m1))
        if not np.array_equal(a, b):
            raise ValueError(f"m0 and m1 have different {name}; fit both with the same")
    for p0, p1 in zip(m0.design.others, m1.design.others):
        a, b = (0.0 if p.offset is None else np.asarray(p.offset) for p in (p0, p1))
        if np.any(a != b):
            raise ValueError("m0 and m1 have different offsets; fit both with the same")
    for name in ("n_quad", "priors", "control"):
        a, b = getattr(m0, name), getattr(m1, name)
        if a != b:
            raise ValueError(
                f"m0 was fitted with {name}={a!r}, m1 with {name}={b!r}; fit both alike"
            )
    same_X = np.array_equal(np.asarray(m0.design.X), np.asarray(m1.design.X))
    if is_linear(m0.family) and not m0.is_generalized and not m1.is_generalized:
        both = m0.method == m1.method == "REML"
        return "REML" if both and same_X else "ML"
    if m0.method != m1.method:
        raise ValueError(f"m0 was fitted by {m0.method}, m1 by {m1.method}")
    if m0.method == "PQL":
        raise ValueError("PQL has no likelihood; fit by Laplace")
    return "Laplace" if m0.method == "REML" and not same_X else m0.method


def _ratio(what: What, shared, i, max_iter) -> Outcome:
    design, small, large, truth, key = shared
    y = simulate(key.replicate(i), truth, design, what.family)
    less = fit_checked(what, small.with_response(y), None, max_iter)
    more = fit_checked(what, large.with_response(y), None, max_iter)
    ok = less.converged & more.converged
    ratio = 2.0 * (more.loglik - less.loglik)
    result = {"ratio": ratio, "converged": ok, "status": more.status}
    return Outcome(result, jnp.maximum(less.n_iter, more.n_iter), ok)
