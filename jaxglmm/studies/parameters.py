"""The parameters of a model on the scale on which people report them, one vector.

    beta, the fixed effects of further predictors, then for every term standard
    deviations and correlations, then sigma or the family's own parameters

with Q = sigma^2 Lambda Lambda'. Names are those of lme4's ``confint``:
``sd_Days|Subject``, ``cor_Days.(Intercept)|Subject``, ``sigma``; those of further
predictors begin with theirs: ``zi_(Intercept)``, ``zi_sd_(Intercept)|Subject``.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxglmm.coordinates import block_factors, split_factors
from jaxglmm.designs import Design
from jaxglmm.families import Family
from jaxglmm.results import Fit, Params
from jaxglmm.typing import Array

__all__ = ["fixed_se", "n_fixed", "natural", "parameter_names"]


def natural(params: Params, design: Design, family: Family) -> Array:
    """All parameters, (q,); a pure JAX function."""
    layout, parts = design.layout, [params.beta, *params.others]
    factors = split_factors(block_factors(params.theta, layout), layout)
    for term, Lam in zip(design.terms, factors):
        parts.append(_spread(params.sigma * Lam, term.structure))
    if params.psi is None:
        parts.append(jnp.reshape(params.sigma, (1,)))
    elif family.n_own:
        parts.append(family.natural(params.psi))
    return jnp.concatenate(parts)


def _spread(Lam: Array, structure: str) -> Array:
    """Standard deviations, then correlations column by column."""
    Q = Lam @ Lam.T
    sd = jnp.sqrt(jnp.diagonal(Q))
    if structure in ("diag", "scalar"):
        return sd
    safe = jnp.where(sd > 0, sd, 1.0)
    R = jnp.where(
        (sd[:, None] > 0) & (sd[None, :] > 0), Q / (safe[:, None] * safe[None]), jnp.nan
    )
    k = Lam.shape[0]
    at = [(i, j) for j in range(k) for i in range(j + 1, k)]
    return jnp.concatenate([sd, jnp.stack([R[i, j] for i, j in at])]) if at else sd


def fixed_se(fit: Fit, design: Design) -> Array:
    """Wald standard errors of all fixed effects, (p,)."""
    own = jnp.diagonal(fit.vcov_beta)
    p = n_fixed(design)
    if fit.vcov is not None and p > own.shape[0]:
        own = jnp.diagonal(fit.vcov)[:p]
    return jnp.sqrt(own)


def n_fixed(design: Design) -> int:
    """Fixed effects of all linear predictors."""
    return design.X.shape[1] + sum(p.X.shape[1] for p in design.others)


def parameter_names(
    design: Design, family: Family, generalized: bool, frame: Any = None
) -> list[str]:
    """Names of :func:`natural`'s values, by the formula where ``frame`` has one."""
    if frame is not None:
        names = list(frame.X_names)
        names += [f"{o.name}_{x}" for o in frame.others for x in o.X_names]
        groups = [t.group_name for t in frame.all_terms]
        effects = [list(t.z_names) for t in frame.all_terms]
        others = [o.name for o in frame.others]
    else:
        names = [f"beta[{i}]" for i in range(design.X.shape[1])]
        names += [
            f"others[{r}][{i}]"
            for r, o in enumerate(design.others)
            for i in range(o.X.shape[1])
        ]
        groups = [f"term {t}" for t in range(len(design.terms))]
        effects = [[f"z{i}" for i in range(t.k)] for t in design.terms]
        others = [f"others[{r}]" for r in range(len(design.others))]
    for term, group, z in zip(design.terms, groups, effects):
        of = f"{others[term.predictor - 1]}_" if term.predictor else ""
        names += [f"{of}sd_{x}|{group}" for x in z]
        if term.structure not in ("diag", "scalar"):
            pairs = [(i, j) for j in range(len(z)) for i in range(j + 1, len(z))]
            names += [f"{of}cor_{z[i]}.{z[j]}|{group}" for i, j in pairs]
    if not generalized:
        return [*names, "sigma"]
    return names + list(family.own_names if frame is None else frame.own_names(family))


def truth_of(params: Params, design: Design, family: Family) -> np.ndarray:
    """The values of :func:`natural`, as NumPy in float64."""
    import jax

    with jax.enable_x64(True):
        return np.asarray(natural(jax.tree.map(jnp.asarray, params), design, family))
