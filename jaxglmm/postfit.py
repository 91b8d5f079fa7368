"""Compiled work after the fit, on the same cross-products and bucketed shapes."""

from __future__ import annotations

import numpy as np

from jaxglmm.buckets import pad
from jaxglmm.compiled import run
from jaxglmm.covariance import structure
from jaxglmm.crossproducts import cross_products
from jaxglmm.designs import Design
from jaxglmm.elimination import conditional_covariances, eliminate
from jaxglmm.results import Fit

__all__ = ["effect_covariances"]


def _covariances(layout, cp, theta):
    done = eliminate(theta, cp, layout)
    return conditional_covariances(theta, done, cp, layout)


def effect_covariances(design: Design, fit: Fit) -> list[np.ndarray]:
    """Var(b | y) at the estimates: (J, K, K) for every block of the layout."""
    cp, units = cross_products(design, np)
    padded, layout = pad(cp, design.layout)
    theta = np.asarray(fit.params.theta) * units.theta_scale
    keep = all(
        structure(s).Lambda.__module__ == "jaxglmm.covariance" for s in layout.structures
    )
    values = run(_covariances, (layout,), padded, theta, keep=keep)
    out = []
    for block, value in zip(design.layout.blocks, values):
        scale = np.concatenate([units.z_scale[t] for t in block.terms])
        unit = float(fit.params.sigma) ** 2 / (scale[:, None] * scale[None, :])
        out.append(value[: block.n_levels] * unit)
    return out
