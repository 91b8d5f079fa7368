"""Response vectors drawn from a fitted model, one compiled map over keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxglmm.compiled import run
from jaxglmm.families import known_family
from jaxglmm.hostfit import built_in
from jaxglmm.simulation import simulate

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["responses"]


def responses(m: GLMM, n: int, key: Any, *, conditional: bool) -> np.ndarray:
    """Responses (n, n_obs); ``conditional`` holds the random effects at their modes."""
    import jax

    if isinstance(key, (int, np.integer)):
        key = jax.random.key(int(key))
    data = np.asarray(jax.random.key_data(jax.random.split(key, n)))
    b = m.fit.b if conditional else None
    keep = built_in(m.design.layout) and known_family(m.family)
    impl = str(jax.random.key_impl(key))
    return run(_draws, (impl, m.family), data, m.fit.params, m.design, b, keep=keep)


def _draws(impl, family, data, params, design, b):
    import jax

    def draw(d):
        key = jax.random.wrap_key_data(d, impl=impl)
        return simulate(key, params, design, family, b=b)

    return jax.vmap(draw)(data)
