"""What a family says about every row of a fitted model, by one compiled map.

mu, Var(y), d mu / d eta, the unit deviance: (n,) arrays in NumPy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxglmm.compiled import run
from jaxglmm.families import Family, known_family

__all__ = [
    "Means",
    "RowStatistics",
    "category_means",
    "generalized_residuals",
    "own_values",
    "response_mean",
    "row_statistics",
]


class RowStatistics(NamedTuple):
    """Per row: mean, variance, d mean / d eta and unit deviance, (n,) each."""

    mu: np.ndarray
    variance: np.ndarray
    slope: np.ndarray
    unit_deviance: np.ndarray


def row_statistics(family: Family, eta, psi, design) -> RowStatistics:
    """Evaluate a family at linear predictors eta (n, R)."""
    n = len(eta)
    weights = np.ones(n) if design.weights is None else np.asarray(design.weights)
    size = -(-n // 256) * 256  # shapes in steps, for the compiled program's sake
    args = [_repeat(a, size) for a in (np.asarray(design.y), eta, weights)]
    keep = known_family(family)
    out = run(_rows, (family,), *args, psi, keep=keep)
    return RowStatistics(*(np.asarray(v)[:n] for v in out))


def _repeat(a: np.ndarray, size: int) -> np.ndarray:
    """Rows up to size, the first one again."""
    more = np.repeat(a[:1], size - len(a), axis=0)
    return np.concatenate([a, more])


def _rows(family, y, eta, w, psi):
    import jax
    import jax.numpy as jnp

    def row(y, eta, w):
        nothing = jnp.full((), jnp.nan, eta.dtype)

        def where_known(fn):
            try:
                return fn()
            except ValueError:  # a family that has none
                return nothing

        slope = where_known(lambda: jax.grad(family.mu)(eta, psi)[0])
        return (
            where_known(lambda: family.mu(eta, psi)),
            where_known(lambda: family.variance(eta, psi, w)),
            slope,
            where_known(lambda: family.unit_deviance(y, eta, psi, w)),
        )

    return jax.vmap(row)(y, eta, w)


class Means(NamedTuple):
    """Means (n,), their slopes in eta (n, R) and in psi (n, n_own)."""

    mu: np.ndarray
    slope: np.ndarray
    psi_slope: np.ndarray


def response_mean(family: Family, eta: np.ndarray, psi) -> Means:
    """Means at linear predictors eta (n, R)."""
    n = len(eta)
    wide = _repeat(np.asarray(eta), -(-n // 256) * 256)
    out = run(_means, (family,), wide, np.asarray(psi), keep=known_family(family))
    return Means(*(np.asarray(v)[:n] for v in out))


def _means(family, eta, psi):
    import jax

    def row(e):
        mu, slopes = jax.value_and_grad(family.mu, (0, 1))(e, psi)
        return mu, *slopes

    return jax.vmap(row)(eta)


def category_means(family: Any, eta: np.ndarray, psi) -> list[Means]:
    """Probability of each category at linear predictors eta (n, 1), as its mean."""
    n = len(eta)
    wide = _repeat(np.asarray(eta), -(-n // 256) * 256)
    out = run(_categories, (family,), wide, np.asarray(psi), keep=known_family(family))
    p, slope, psi_slope = (np.asarray(v)[:n] for v in out)
    return [Means(p[:, k], slope[:, k], psi_slope[:, k]) for k in range(p.shape[1])]


def _categories(family, eta, psi):
    import jax

    def row(e):
        slopes = jax.jacrev(family.probabilities, (0, 1))(e, psi)
        return family.probabilities(e, psi), *slopes

    return jax.vmap(row)(eta)


def own_values(family: Family, psi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The family's own parameters on their natural scale, and their Jacobian."""
    if not len(psi):
        return np.zeros(0), np.zeros((0, 0))
    keep = known_family(family)
    values, slope = run(_own, (family,), psi, keep=keep)
    return np.asarray(values), np.asarray(slope)


def _own(family, psi):
    import jax

    return family.natural(psi), jax.jacfwd(family.natural)(psi)


def generalized_residuals(rows: RowStatistics, y: np.ndarray, type: str) -> np.ndarray:
    """Residuals of a generalized model, (n,)."""
    raw = y - rows.mu
    kinds = {
        "response": lambda: raw,
        "pearson": lambda: raw / np.sqrt(rows.variance),
        "scaled": lambda: raw / np.sqrt(rows.variance),
        "working": lambda: raw / rows.slope,
        "deviance": lambda: np.sign(raw) * np.sqrt(np.maximum(rows.unit_deviance, 0.0)),
    }
    if type not in kinds:
        raise ValueError(f"unknown residuals {type!r}; use one of {list(kinds)}")
    values = kinds[type]()
    if np.isnan(values).all():
        raise ValueError(f"this family gives no {type} residuals")
    return values


def linear_residuals(
    raw: np.ndarray, weights: np.ndarray, sigma: float, type: str
) -> np.ndarray:
    """Residuals of a linear model, (n,), from y less its conditional mean."""
    scale = {
        "response": 1.0,
        "working": 1.0,
        "pearson": np.sqrt(weights),
        "deviance": np.sqrt(weights),
        "scaled": np.sqrt(weights) / sigma,
    }
    if type not in scale:
        raise ValueError(f"unknown residuals {type!r}; use one of {list(scale)}")
    return raw * scale[type]
