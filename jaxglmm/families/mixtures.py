"""Families with further linear predictors, made from a family.

``ZeroInflated(base)`` adds logit(pi) as the last predictor, pi being the probability
of an extra zero:

    f(0) = pi + (1 - pi) f_base(0),    f(y) = (1 - pi) f_base(y), y > 0.             (1)

Where the base has no zeros (truncated counts, positive responses) this is the hurdle
model. ``WithDispersion(base)`` makes the base's first own parameter the last linear
predictor, on the unconstrained scale of psi:

    psi_base = (eta_last, psi).                                                      (2)

Both may be combined: ``ZeroInflated(WithDispersion(NegativeBinomial()))`` has the
predictors of the mean, of log theta and of the extra zeros, in this order.

References: Lambert (1992), Technometrics 34(1), doi:10.2307/1269547; Mullahy (1986),
J. Econometrics 33(3), doi:10.1016/0304-4076(86)90002-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.families.base import Family
from jaxglmm.families.checks import SUPPORTS, check_support, check_weights
from jaxglmm.families.special import log_add_exp, sigmoid, softplus
from jaxglmm.typing import Array

__all__ = ["WithDispersion", "ZeroInflated"]


class _Wrapper(Family):
    """What passes through to the base."""

    base: Family

    @property
    def link(self) -> Any:
        """The base's link."""
        return self.base.link

    @property
    def weights_role(self) -> Any:
        """What weights mean to the base."""
        return self.base.weights_role

    @property
    def inside(self) -> Any:
        """A value inside the base's support."""
        return self.base.inside

    @property
    def n_eta(self) -> int:
        """One more than the base."""
        return self.base.n_eta + 1

    def is_inside(self, eta):
        """The base's, ()."""
        return self.base.is_inside(eta[:-1])

    def eta_start(self, y, w):
        """The base's, ()."""
        return self.base.eta_start(y, w)


@dataclass(frozen=True)
class ZeroInflated(_Wrapper):
    """The base family with extra zeros, whose logit is the last linear predictor.

    With a truncated or positive base: the hurdle model. ``weights`` mean what they
    mean to the base.
    """

    base: Family

    def __post_init__(self):
        if isinstance(self.base, ZeroInflated) or self.base.name == "cumulative":
            raise ValueError(f"family {self.base.name!r} cannot take extra zeros")
        if self.base.support in ("real",):
            raise ValueError(
                f"family {self.base.name!r} cannot take extra zeros: its responses may "
                "be negative"
            )

    @property
    def name(self) -> str:
        """The base's name, marked."""
        return f"zero-inflated {self.base.name}"

    @property
    def n_own(self) -> int:
        """As many as the base."""
        return self.base.n_own

    @property
    def own_names(self) -> tuple[str, ...]:
        """The base's."""
        return self.base.own_names

    @property
    def eta_names(self) -> tuple[str, ...]:
        """The base's, and ``zi``."""
        return (*self.base.eta_names, "zi")

    @property
    def support(self) -> Any:
        """The base's, with zero."""
        joined = {
            "positive": "nonnegative",
            "positive count": "count",
            "unit": "proportion",
        }
        return joined.get(self.base.support, self.base.support)

    def _log_kernel(self, y, eta, psi, w):
        zi, zero = eta[-1], y == 0
        replicate = self.weights_role == "replication"
        inner = jnp.ones_like(w) if replicate else w
        if self.base.has_zero:
            log_f = self.base._log_kernel(y, eta[:-1], psi, inner)
            out = jnp.where(zero, log_add_exp(zi, log_f), log_f) - softplus(zi)
        else:
            y = jnp.where(zero, self.inside, y)
            log_f = self.base._log_kernel(y, eta[:-1], psi, inner)
            out = jnp.where(zero, zi, log_f) - softplus(zi)
        return w * out if replicate else out

    def _log_base(self, y, w):
        # zero at y = 0 where the base has zeros, so that (1) holds for the kernels
        if self.base.has_zero:
            return self.base._log_base(y, w)
        zero = y == 0
        y = jnp.where(zero, self.inside, y)
        return jnp.where(zero, 0.0, self.base._log_base(y, w))

    def mu(self, eta, psi):
        """Mean with the zeros, (1 - pi) mu_base, ()."""
        return sigmoid(-eta[-1]) * self.base.mu(eta[:-1], psi)

    def variance(self, eta, psi, w):
        """(1 - pi) (V_base + pi mu_base^2), ()."""
        pi, rest = sigmoid(eta[-1]), sigmoid(-eta[-1])
        spread = self.base.variance(eta[:-1], psi, w)
        return rest * (spread + pi * self.base.mu(eta[:-1], psi) ** 2)

    def natural(self, psi):
        """The base's, (n_own,)."""
        return self.base.natural(psi)

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        key_zero, key_y = jax.random.split(key)
        y = self.base.sample(key_y, eta[:-1], psi, w)
        u = jax.random.uniform(key_zero, (), eta.dtype)
        return jnp.where(u < sigmoid(eta[-1]), 0.0, y)

    def eta_start(self, y, w):
        """The base's, zeros replaced where it has none, ()."""
        if not self.base.has_zero:
            y = jnp.where(y == 0, self.inside, y)
        return self.base.eta_start(y, w)

    def extra_start(self, y, w):
        """The base's, and the logit of the zeros (of half of them, if it has any)."""
        used = w > 0
        zeros = jnp.sum((used & (y == 0)).astype(y.dtype))
        share = (zeros + 0.5) / (jnp.sum(used.astype(y.dtype)) + 1.0)
        share = 0.5 * share if self.base.has_zero else share
        inner = self.base.extra_start(*_without_zeros(y, w, self.base))
        return jnp.append(inner, jnp.log(share / (1.0 - share)))

    def psi_start(self, y, w):
        """The base's, from the positive responses if it has no zeros."""
        return self.base.psi_start(*_without_zeros(y, w, self.base))

    def check(self, y, weights):
        """Raise DataError where y is neither zero nor what the base takes."""
        y = np.asarray(y, float)
        weights = None if weights is None else np.asarray(weights, float)
        if self.base.has_zero:
            self.base.check(y, weights)
            return
        check_weights(self.name, self.weights_role, weights)
        test, takes = SUPPORTS[self.base.support]
        check_support(self.name, y, weights, (y == 0) | test(y), f"0 and {takes}")


def _without_zeros(y: Array, w: Array, base: Family) -> tuple[Array, Array]:
    """Rows for the base: zeros without weight where it has none."""
    if base.has_zero:
        return y, w
    some = jnp.any((y != 0) & (w > 0))
    w = jnp.where((y == 0) & some, 0.0, w)
    return jnp.where(y == 0, base.inside, y), w


@dataclass(frozen=True)
class WithDispersion(_Wrapper):
    """The base family, its first own parameter being the last linear predictor.

    The predictor is on the unconstrained scale of psi: log sigma for ``gaussian`` and
    ``student``, log phi, log theta. ``weights`` mean what they mean to the base.
    """

    base: Family

    def __post_init__(self):
        if self.base.n_own == 0 or self.base.name == "cumulative":
            raise ValueError(
                f"family {self.base.name!r} has no dispersion to be modelled"
            )
        if isinstance(self.base, WithDispersion):
            raise ValueError("the dispersion is a linear predictor already")

    @property
    def name(self) -> str:
        """The base's name: the family is the same."""
        return self.base.name

    @property
    def n_own(self) -> int:
        """One fewer than the base."""
        return self.base.n_own - 1

    @property
    def own_names(self) -> tuple[str, ...]:
        """The base's but the first."""
        return self.base.own_names[1:]

    @property
    def eta_names(self) -> tuple[str, ...]:
        """The base's, and ``dispersion``."""
        return (*self.base.eta_names, "dispersion")

    @property
    def support(self) -> Any:
        """The base's."""
        return self.base.support

    def _split(self, eta: Array, psi: Array) -> tuple[Array, Array]:
        return eta[:-1], jnp.concatenate([eta[-1:], psi])

    def _log_kernel(self, y, eta, psi, w):
        return self.base._log_kernel(y, *self._split(eta, psi), w)

    def _log_base(self, y, w):
        return self.base._log_base(y, w)

    def mu(self, eta, psi):
        """Mean response, ()."""
        return self.base.mu(*self._split(eta, psi))

    def variance(self, eta, psi, w):
        """Variance of y, ()."""
        return self.base.variance(*self._split(eta, psi), w)

    def unit_deviance(self, y, eta, psi, w):
        """The base's, ()."""
        return self.base.unit_deviance(y, *self._split(eta, psi), w)

    def natural(self, psi):
        """The base's but the first, (n_own,)."""
        return self.base.natural(jnp.concatenate([jnp.zeros_like(psi, shape=1), psi]))[
            1:
        ]

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        return self.base.sample(key, *self._split(eta, psi), w)

    def extra_start(self, y, w):
        """The base's, and its first own parameter."""
        return jnp.append(self.base.extra_start(y, w), self.base.psi_start(y, w)[0])

    def psi_start(self, y, w):
        """The base's but the first."""
        return self.base.psi_start(y, w)[1:]

    def check(self, y, weights):
        """Raise DataError where the base does."""
        self.base.check(y, weights)
