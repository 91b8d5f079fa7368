"""Link functions g, and their inverses in the forms that likelihoods need.

A linear predictor eta = g(mu), all scalars. Families of counts and of positive
responses ask for log mu, those of proportions for the pair (log mu, log(1 - mu)), so
that neither overflows nor loses its digits where mu is near an end:

    logit    -softplus(-eta), -softplus(eta)
    probit   log Phi(eta), log Phi(-eta)
    cloglog  log(1 - exp(-exp(eta))), -exp(eta)
    cauchit  log atan2(1, -eta) / pi, log atan2(1, eta) / pi

Where eta leaves the domain of a link (a negative eta with a mean of 1 / eta), these
continue as a steep, finite step: see ``special.log_positive``.

References: McCullagh and Nelder (1989), Generalized Linear Models, 2nd ed., 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxglmm.families.special import (
    exp_limit,
    log1mexp,
    log1mexp_exp,
    log_atan,
    log_ndtr,
    log_positive,
    safe_exp,
    softplus,
    tiny_of,
)
from jaxglmm.typing import Array

__all__ = ["LINKS", "Link"]


@dataclass(frozen=True)
class Link:
    """A link by its name, with the inverses that make sense for it.

    Parameters
    ----------
    name : str
    g : callable, mu -> eta
    log_mean : callable, eta -> log mu, optional
        For means that are positive.
    log_pair : callable, eta -> (log mu, log(1 - mu)), optional
        For means between 0 and 1.
    real_mean : callable, eta -> mu, optional
        For means of any sign.
    positive : bool
        Whether positive means have positive linear predictors alone.
    """

    name: str
    g: Callable[[Array], Array]
    log_mean: Callable[[Array], Array] | None = None
    log_pair: Callable[[Array], tuple[Array, Array]] | None = None
    real_mean: Callable[[Array], Array] | None = None
    positive: bool = False


def _logit_pair(eta: Array) -> tuple[Array, Array]:
    return -softplus(-eta), -softplus(eta)


def _probit_pair(eta: Array) -> tuple[Array, Array]:
    return log_ndtr(eta), log_ndtr(-eta)


def _cloglog_pair(eta: Array) -> tuple[Array, Array]:
    limit = exp_limit(eta) - 25.0  # trials times exp(eta) has to be finite too
    return log1mexp_exp(eta), -safe_exp(eta, limit)


def _cauchit_pair(eta: Array) -> tuple[Array, Array]:
    log_pi = math.log(math.pi)
    return log_atan(eta) - log_pi, log_atan(-eta) - log_pi


def _log_pair(eta: Array) -> tuple[Array, Array]:
    above = jnp.where(eta > 0, eta, 0.0)  # a probability above 1 is no probability
    return eta - 0.5 * (1e4 * above) ** 2, log1mexp(-eta)


def _moderate_exp(eta: Array) -> Array:
    return safe_exp(eta, 0.25 * exp_limit(eta))  # its square has to be finite too


def _reciprocal(eta: Array) -> Array:
    tiny = tiny_of(eta)
    small = jnp.abs(eta) < tiny
    return jnp.where(small, 1.0 / tiny, 1.0 / jnp.where(small, 1.0, eta))


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(
            "identity",
            g=lambda mu: mu,
            log_mean=log_positive,
            real_mean=lambda eta: eta,
            positive=True,
        ),
        Link(
            "log",
            g=log_positive,
            log_mean=lambda eta: eta,
            log_pair=_log_pair,
            real_mean=_moderate_exp,
        ),
        Link("logit", g=lambda mu: jnp.log(mu) - jnp.log1p(-mu), log_pair=_logit_pair),
        Link("probit", g=jax.scipy.special.ndtri, log_pair=_probit_pair),
        Link("cloglog", g=lambda mu: jnp.log(-jnp.log1p(-mu)), log_pair=_cloglog_pair),
        Link(
            "cauchit",
            g=lambda mu: -1.0 / jnp.tan(math.pi * mu),
            log_pair=_cauchit_pair,
        ),
        Link(
            "inverse",
            g=_reciprocal,
            log_mean=lambda eta: -log_positive(eta),
            real_mean=_reciprocal,
            positive=True,
        ),
        Link(
            "sqrt",
            g=lambda mu: jnp.sqrt(mu),
            log_mean=lambda eta: 2.0 * log_positive(eta),
            positive=True,
        ),
        Link(
            "1/mu^2",
            g=lambda mu: 1.0 / mu**2,
            log_mean=lambda eta: -0.5 * log_positive(eta),
            positive=True,
        ),
    )
}
