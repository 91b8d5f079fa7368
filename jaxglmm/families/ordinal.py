"""Ordered categories, y coded 0, 1, ..., C - 1: the cumulative model.

    P(y <= k) = F(tau_k - eta),  k = 0, ..., C - 2,  tau_0 < tau_1 < ...             (1)

psi = (tau_0, log(tau_1 - tau_0), log(tau_2 - tau_1), ...), C - 1 in all. The mass of a
middle category between a = tau_{y-1} - eta and b = tau_y - eta, d = b - a, is taken
as one, not as a difference:

    logit    F(b) (1 - F(a)) (1 - exp(-d))
    cloglog  exp(-exp(a)) (1 - exp(-exp(a) (exp(d) - 1)))
    cauchit  atan2(d, 1 + a b) / pi
    probit   exp(l) (1 - exp(-(l - l'))), l, l' the log tails on the side of zero
             where they are small

eta has no intercept of its own: the thresholds hold it. ``glmm`` names categories and
thresholds by the levels of the response.

References: McCullagh (1980), J. R. Stat. Soc. B 42(2),
doi:10.1111/j.2517-6161.1980.tb01109.x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.errors import DataError
from jaxglmm.families.base import Family, check_link
from jaxglmm.families.checks import check_support
from jaxglmm.families.links import LINKS
from jaxglmm.families.special import (
    exp_limit,
    log1mexp,
    log1mexp_exp,
    log_ndtr,
    safe_exp,
    softplus,
)
from jaxglmm.typing import Array

__all__ = ["Cumulative"]


@dataclass(frozen=True)
class Cumulative(Family):
    """Ordered categories 0, 1, ..., n_categories - 1 by the cumulative model.

    Own parameters are the n_categories - 1 thresholds. A positive coefficient moves
    responses to higher categories. X should have no intercept. ``weights`` replicate:
    a row of weight w counts as w rows.
    """

    n_categories: int = 3
    link: str = "logit"

    takes_codes = "ordered"
    name = "cumulative"
    links = ("logit", "probit", "cloglog", "cauchit")
    inside = 0.0

    def __post_init__(self):
        if self.n_categories < 2:
            raise ValueError(
                f"n_categories must be at least 2; found {self.n_categories}"
            )
        check_link(self)

    @property
    def n_own(self) -> int:
        """One threshold fewer than categories."""
        return self.n_categories - 1

    @property
    def own_names(self) -> tuple[str, ...]:
        """``0|1``, ``1|2``, ..."""
        return tuple(f"{k}|{k + 1}" for k in range(self.n_own))

    def natural(self, psi):
        """Thresholds, (n_own,)."""
        steps = safe_exp(psi[1:])
        return jnp.cumsum(jnp.concatenate([psi[:1], steps]))

    def _log_f(self, y, eta, psi):
        k = jnp.arange(self.n_own).astype(psi.dtype)
        tau = self.natural(psi)
        last, first = y >= self.n_own, y <= 0
        upper = jnp.sum(jnp.where(k == jnp.where(last, 0.0, y), tau, 0.0))
        lower = jnp.sum(jnp.where(k == jnp.where(first, 0.0, y - 1.0), tau, 0.0))
        middle = ~(first | last)
        log_d = jnp.sum(jnp.where((k == y) & middle, psi, 0.0))
        log_pair = LINKS[self.link].log_pair
        assert log_pair is not None
        b, a = upper - eta[0], lower - eta[0]
        log_low, log_high = log_pair(b)[0], log_pair(a)[1]
        inner = _log_between(self.link, a, a + safe_exp(log_d), log_d)
        return jnp.where(first, log_low, jnp.where(last, log_high, inner))

    def probabilities(self, eta: Array, psi: Array) -> Array:
        """Probability of each category, (n_categories,)."""
        codes = jnp.arange(self.n_categories).astype(psi.dtype)
        return jnp.exp(jax.vmap(lambda y: self._log_f(y, eta, psi))(codes))

    def mu(self, eta, psi):
        """Mean of the category codes, ()."""
        p = self.probabilities(eta, psi)
        return jnp.sum(p * jnp.arange(self.n_categories).astype(p.dtype))

    def variance(self, eta, psi, w):
        """Variance of the category codes, ()."""
        p = self.probabilities(eta, psi)
        codes = jnp.arange(self.n_categories).astype(p.dtype)
        return jnp.sum(p * (codes - jnp.sum(p * codes)) ** 2)

    def sample(self, key, eta, psi, w):
        """Draw a category, ()."""
        log_pair = LINKS[self.link].log_pair
        assert log_pair is not None
        below = jnp.exp(jax.vmap(log_pair)(self.natural(psi) - eta[0])[0])
        u = jax.random.uniform(key, (), psi.dtype)
        return jnp.sum(u > below).astype(psi.dtype)

    def psi_start(self, y, w):
        """Thresholds of the observed shares."""
        category = jnp.arange(self.n_categories).astype(y.dtype)
        belongs = (y[:, None] == category[None]) & (w > 0)[:, None]
        counts = jnp.sum(belongs.astype(y.dtype), axis=0)
        share = jnp.cumsum(counts + 0.5)[:-1]
        share = share / (jnp.sum(counts) + 0.5 * self.n_categories)
        quantile = {
            "logit": lambda p: jnp.log(p / (1 - p)),
            "probit": lambda p: jnp.log(p / (1 - p)) / 1.7,
            "cloglog": lambda p: jnp.log(-jnp.log1p(-p)),
            "cauchit": lambda p: -1.0 / jnp.tan(math.pi * p),
        }[self.link]
        tau = quantile(share)
        return jnp.concatenate([tau[:1], jnp.log(jnp.diff(tau))])

    def check(self, y, weights):
        """Raise DataError where y is no code of a category."""
        super().check(y, weights)
        y = np.asarray(y, float)
        weights = None if weights is None else np.asarray(weights, float)
        inside = np.isin(y, np.arange(self.n_categories))
        takes = f"codes 0, 1, ..., {self.n_own} of {self.n_categories} categories"
        check_support(self.name, y, weights, inside, takes)
        used = y if weights is None else y[weights > 0]
        missing = np.setdiff1d(np.arange(self.n_categories), used)
        if len(missing):
            raise DataError(
                f"family 'cumulative' finds no row in category {missing[0]} of "
                f"{self.n_categories}, so its threshold cannot be estimated. Leave the "
                "category out and code the others 0, 1, ..."
            )


def _log_between(link: str, a: Array, b: Array, log_d: Array) -> Array:
    """log(F(b) - F(a)), b = a + d > a."""
    if link == "logit":
        return -softplus(-b) - softplus(a) + log1mexp_exp(log_d)
    if link == "cloglog":
        grown = safe_exp(log_d) + log1mexp_exp(log_d)  # log(exp(d) - 1)
        return log1mexp_exp(a + grown) - safe_exp(a, exp_limit(a) - 25.0)
    if link == "cauchit":
        return jnp.log(jnp.atan2(safe_exp(log_d), 1.0 + a * b)) - math.log(math.pi)
    flip = a + b > 0  # by symmetry, on the side where both tails are small
    high = jnp.where(flip, -a, b)
    low = jnp.where(flip, -b, a)
    return log_ndtr(high) + log1mexp(log_ndtr(high) - log_ndtr(low))
