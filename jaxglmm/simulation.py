"""Draw responses from a model at given parameters.

    b_t = sigma Lambda_t v,   y = offset + X beta + sum_t Z_t b_t + sigma W^-1/2 e,
    v, e ~ N(0, I)

Shapes: b_t (J, k), y (n,).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxglmm.coordinates import block_factors, split_factors
from jaxglmm.designs import Design
from jaxglmm.errors import DesignError
from jaxglmm.families import Family, family_by_name, is_linear
from jaxglmm.results import Params, check_params
from jaxglmm.typing import Array

__all__ = ["linear_predictor", "simulate"]


def simulate(
    key: Array,
    params: Params,
    design: Design,
    family: str | Family | None = None,
    *,
    b: tuple[Array, ...] | None = None,
) -> Array:
    """Simulate one response vector; map over keys for many.

    Parameters
    ----------
    key : PRNG key
    params : Params
    design : Design
        Its y is not used. A row of weight zero gets its linear predictor.
    family : str or Family, optional
    b : tuple of Array, (J, k), optional
        Random effects to hold fixed; drawn anew when left out.

    Returns
    -------
    Array, (n,)

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> with jax.enable_x64(True):
    ...     design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    ...     res = jg.fit(design)
    ...     keys = jax.random.split(jax.random.key(1), 100)
    ...     ys = jax.vmap(lambda k: jg.simulate(k, res.params, design))(keys)
    >>> ys.shape
    (100, 30)
    """
    family = family_by_name(family)
    key_b, key_e = jax.random.split(key)
    generalized = params.psi is not None
    check_params(params, design, family.n_own if generalized else 0)
    if not generalized and not is_linear(family):
        raise DesignError(
            f"params.psi is missing: the family {family.name!r} has {family.n_own} own "
            "parameters; give params.replace(psi=...), (0,) values if it has none"
        )
    dtype = jnp.result_type(params.beta)
    if b is None:
        b = _draw_effects(key_b, params, design, dtype)
    _check_effects(b, design)
    if generalized:
        return _draw_rows(key_e, params, design, family, b)
    eta = linear_predictor(params, design, b)
    noise = params.sigma * jax.random.normal(key_e, eta.shape, dtype)
    if design.weights is not None:
        positive = design.weights > 0
        noise = jnp.where(
            positive, noise / jnp.sqrt(jnp.where(positive, design.weights, 1.0)), 0.0
        )
    return eta + noise


def _draw_rows(key, params, design, family, b) -> Array:
    """A response for every row of a generalized model."""
    n = design.n_obs
    parts = [(params.beta, design.X, design.offset)]
    for beta, p in zip(params.others, design.others):
        parts.append((beta, p.X, p.offset))
    eta = [X @ beta + (0.0 if o is None else o) for beta, X, o in parts]
    for term, effects in zip(design.terms, b):
        r = term.predictor
        eta[r] = eta[r] + (term.z * effects[term.group]).sum(axis=1)
    eta = jnp.stack(eta, axis=1)
    w = jnp.ones(n, eta.dtype) if design.weights is None else design.weights
    keys = jax.random.split(key, n)
    return jax.vmap(lambda k, e, w: family.sample(k, e, params.psi, w))(keys, eta, w)


def _check_effects(b: tuple[Array, ...], design: Design) -> None:
    expected = [(t.n_levels, t.k) for t in design.terms]
    found = [jnp.shape(effects) for effects in b]
    if found != expected:
        raise DesignError(
            f"b must hold an array per term, of shapes {expected}; found {found}"
        )


def _draw_effects(key, params, design, dtype) -> tuple[Array, ...]:
    layout = design.layout
    factors = split_factors(block_factors(params.theta, layout), layout)
    keys = jax.random.split(key, len(design.terms))
    return tuple(
        params.sigma * jax.random.normal(k, (t.n_levels, t.k), dtype) @ Lam.T
        for k, t, Lam in zip(keys, design.terms, factors)
    )


def linear_predictor(
    params: Params, design: Design, b: tuple[Array, ...] | None
) -> Array:
    """Linear predictor offset + X beta + sum Z b, (n,); without b the population's."""
    eta = design.X @ params.beta
    if design.offset is not None:
        eta = eta + design.offset
    for term, effects in zip(design.terms, b or ()):
        eta = eta + (term.z * effects[term.group]).sum(axis=1)
    return eta
