"""How a fit ended, in words, and what to do about it.

A status becomes one sentence with its evidence: which variance or correlation is at its
bound and the one-sided derivative that proves it, which own parameter ran to its limit,
which terms the data do not tell apart, along which coefficients the data separate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxglmm.causes import pure_groups, reproduces, vanishing
from jaxglmm.covariance import structure
from jaxglmm.errors import Status
from jaxglmm.refine import is_saturated
from jaxglmm.separation import separating_direction

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["at_limit", "verdict"]

_SIMPLER = {
    ("nbinom1", "phi"): "the counts are Poisson",
    ("nbinom2", "theta"): "the counts are Poisson",
    ("betabinomial", "phi"): "the proportions are binomial",
    ("student", "nu"): "the response is Gaussian",
}


def verdict(m: GLMM) -> str:
    """One sentence on how the fit ended, with its evidence."""
    evidence = (
        f"Newton decrement {float(m.fit.decrement):.1e}, smallest Hessian eigenvalue "
        f"{float(m.fit.min_eigenvalue):.1e} of the largest, "
        f"{int(m.fit.n_iter)} evaluations, "
        + ("one start" if m.n_starts == 1 else f"the best of {m.n_starts} starts")
    )
    if m.status == Status.CONVERGED:
        note = ""
        if m.is_singular:
            note = " The fit is singular: " + "; ".join(boundary_facts(m)) + "."
        return f"Converged ({evidence}).{note}{_no_optimum(m)}"
    if m.status == Status.LIMIT:
        facts = "; ".join(limit_facts(m))
        return f"Converged at a limit: {facts} ({evidence}).{_no_optimum(m)}"
    if m.status == Status.BOUNDARY:
        facts = "; ".join(boundary_facts(m))
        return f"Converged on the boundary: {facts} ({evidence}).{_no_optimum(m)}"
    return f"{str(m.status).capitalize()} ({evidence}). {_advice(m)}"


def _no_optimum(m: GLMM) -> str:
    """Warn of an optimum that the approximation has and the likelihood has not."""
    names = pure_groups(m)
    if not names:
        return ""
    categories = m.family.takes_codes == "ordered"
    kind = "one category" if categories else "all 0 or all 1"
    how = (
        "The optimum is one of the Laplace approximation: method='AGQ' with more and "
        "more points follows the likelihood"
        if m.method != "AGQ"
        else "The optimum is one of the quadrature: more points move it further"
    )
    return (
        f" But every level of {', '.join(names)} has responses of one kind only "
        f"({kind}), so the likelihood itself has no maximum: it rises for ever with "
        f"the standard deviation of the random effects. {how}. Analyse one response "
        "per level, or give priors=."
    )


def boundary_facts(m: GLMM) -> list[str]:
    """Which variance or correlation is at its bound, and the proof for each.

    Where a diagonal element of Lambda is zero, half the second derivative of the
    objective in it is the one-sided derivative in its square, a (conditional) variance
    over sigma^2: if positive, any larger variance fits worse.
    """
    facts = []
    curvature = 0.5 * np.diagonal(theta_hessian(m))
    start = 0
    labels = m.frame.group_labels(every=True)
    for t, group, Lam in zip(m.frame.all_terms, labels, m.factors):
        # in units of the covariates, so that theirs do not matter
        Lam = np.sqrt(np.mean(t.z**2, axis=0))[:, None] * Lam
        kind = structure(t.structure)
        n_theta = kind.n_theta(len(t.z_names))
        for j, name in enumerate(t.z_names):
            if abs(Lam[j, j]) >= 1e-4 * max(1.0, float(np.linalg.norm(Lam[j]))):
                continue
            rest = float(np.linalg.norm(Lam[j, :j]))
            what = (
                f"the variance of {name} | {group} is zero"
                if rest < 1e-4
                else f"{name} | {group} is a linear function of the effects before it "
                + ("(a correlation of +-1)" if j == 1 else "(a singular covariance)")
            )
            where = _diagonal_position(kind, len(t.z_names), j)
            if where is not None:
                slope = curvature[start + where]
                what += f", and the one-sided derivative there is {slope:.3g} >= 0"
            facts.append(what)
        start += n_theta
    return facts


def at_limit(m: GLMM) -> list[str]:
    """Own parameters, and coefficients of further predictors, that ran to a limit.

    Those in whose direction the likelihood is flat.
    """
    if m.status != Status.LIMIT:
        return []
    names = [f"{p.name}: {n}" for p in m.frame.others for n in p.X_names]
    names += [""] * len(m.theta) + m.frame.own_names(m.family)
    flat = m.flat_parameters[len(m.fixef) :]
    return [n for n, is_flat in zip(names, flat) if n and is_flat]


def limit_facts(m: GLMM) -> list[str]:
    """What a parameter at its limit makes of the model."""
    facts = []
    family = m.family.name.removeprefix("zero-inflated ")
    for name in at_limit(m):
        simpler = _SIMPLER.get((family, name), "the likelihood is flat there")
        if name == "zi: (Intercept)" and m.fixef_zi.iloc[0] < 0:
            simpler = "no zero is beyond what the rest of the model expects"
        if not (vanishing(m) and name in m.family.own_names):
            facts.append(f"{name} runs to its end; {simpler}")
    gone = vanishing(m)
    if gone:
        many = "s" * (len(gone) == 1)
        facts.append(
            f"{', '.join(gone)} run{many} to infinity: the mean before truncation runs "
            "to zero, where the counts have a logarithmic series distribution"
        )
    if m.is_singular:
        facts += boundary_facts(m)
    return facts or [str(m.status)]


def theta_hessian(m: GLMM) -> np.ndarray:
    """The block of the Hessian that belongs to theta."""
    at = _place_of_theta(m)
    return np.asarray(m.fit.hess)[at, at]


def theta_gradient(m: GLMM) -> np.ndarray:
    """The part of the gradient that belongs to theta."""
    return np.asarray(m.fit.grad)[_place_of_theta(m)]


def _place_of_theta(m: GLMM) -> slice:
    n, first = len(m.theta), 0
    if m.is_generalized and m.method != "PQL":
        first = len(m.fit.grad) - n - len(m.dispersion)
    return slice(first, first + n)


def _diagonal_position(kind, k: int, j: int) -> int | None:
    if kind.row is None or kind.column is None:
        return None
    pairs = list(zip(kind.row(k), kind.column(k)))
    return pairs.index((j, j)) if (j, j) in pairs else None


def _advice(m: GLMM) -> str:
    if m.status == Status.NOT_IDENTIFIED and not reproduces(m):
        return _identification(flat_terms(m))
    if m.status == Status.SEPARATED:
        return separation_advice(m)
    if m.status == Status.OUTSIDE:
        return "With the log link (for proportions: logit) there is a mean everywhere."
    if reproduces(m):
        return (
            "The fixed and random effects reproduce the response, so the dispersion "
            "runs to zero and the likelihood without end; neither more evaluations nor "
            "another start helps. Check how the response was made, or leave effects "
            "out."
        )
    if m.is_generalized:
        return "Try another start=, or leave terms out."
    if is_saturated(m.design):
        return (
            "The fixed and random effects together reproduce any response of "
            f"{m.n_obs} rows, so the residual variance can run to zero and the "
            "likelihood without end; neither more evaluations nor another start "
            "helps. Leave effects out."
        )
    if m.sigma < 1e-5 * np.std(np.asarray(m.design.y)):
        return (
            "The residual variance is almost zero: within groups the response hardly "
            "varies, so the random effects reproduce it. Check how it was recorded."
        )
    if m.status == Status.MAX_ITER:
        return "Give Control(max_iter=...) more evaluations, or another start=."
    if m.status == Status.NONFINITE:
        return "Check the response for values that the fixed effects fit exactly."
    return "Try another start=, and look at the size of the variances."


def separation_advice(m: GLMM) -> str:
    """Which coefficients run away, and what helps."""
    direction = separating_direction(m.design, m.family)
    assert direction is not None
    names = [n for n, d in zip(m.frame.X_names, direction) if d != 0.0]
    return (
        f"The likelihood rises for ever along {', '.join(names[:6])}"
        + (" and others" if len(names) > 6 else "")
        + ": there these covariates foretell every response at the edge of its range. "
        "Merge categories, drop the covariate, or give priors=, for instance "
        "lambda p: -0.5 * jnp.sum((p.beta / 2.5) ** 2)."
    )


def flat_terms(m: GLMM) -> list[str]:
    """Terms whose theta the criterion does not depend on, alone or together.

    They have a part in the null space of the Hessian, scaled to a unit diagonal.
    """
    H = theta_hessian(m)
    size = np.sqrt(np.maximum(np.diagonal(H), 0.0))
    size[size <= 1e-6 * np.max(size, initial=0.0)] = np.max(size, initial=1.0)
    values, vectors = np.linalg.eigh(H / np.outer(size, size))
    # a gradient that is left bends the null space by about its size
    rest = np.linalg.norm(theta_gradient(m) / size)
    flat = np.abs(values) < np.clip(10.0 * rest, 1e-7, 1e-3)
    part = np.sum(vectors[:, flat] ** 2, axis=1)
    out, start = [], 0
    for t in m.frame.all_terms:
        stop = start + structure(t.structure).n_theta(len(t.z_names))
        if np.any(part[start:stop] > 0.05):
            out.append(t.text)
        start = stop
    return out


def _identification(terms: list[str]) -> str:
    if len(terms) == 1:
        return (
            f"The data do not determine {terms[0]}: drop it or simplify it. The fixed "
            "effects may hold its levels already, or a slope hardly vary within groups."
        )
    if terms:
        return f"The data do not tell these terms apart: {', '.join(terms)}. Drop one."
    return "Look for terms that say the same, or a slope that hardly varies in groups."
