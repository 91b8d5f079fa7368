"""The interface of a response family, and families made from a log density.

For one row, with response y, prior weight w, linear predictors eta (n_eta,) and own
parameters psi (n_own,), a family is its

    log_lik(y, eta, psi, w) = log f(y | eta, psi, w),                                (1)
                            = log_kernel(y, eta, psi, w) + log_base(y, w),

every constant included. The base measure depends on data alone: a fit, which evaluates
the kernel and its derivatives again and again, needs it once. psi is unconstrained;
``natural(psi)`` is what people read. Methods act on scalars and are mapped over rows;
derivatives come from JAX.

What w means is the family's: precision, trials, or replication,

    log_lik(y, eta, psi, w) = w log f(y | eta, psi).                                 (2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxglmm.families.checks import SUPPORTS, check_support, check_weights
from jaxglmm.families.links import LINKS, Link
from jaxglmm.typing import Array

__all__ = ["CustomFamily", "Family", "PositiveMean", "check_link", "moments"]


class Family:
    """A response family; called itself, makes one from a log density.

    Parameters
    ----------
    log_density : callable, (y, eta, psi) -> ()
        Log density of one response, every constant included; a pure JAX function.
        ``eta`` is a scalar if ``n_eta`` is 1 and of shape (n_eta,) otherwise, ``psi``
        is (n_own,). A row of weight w counts as w rows.
    n_own : int
        Number of own parameters, unconstrained: take the exponential of one inside
        the density where it has to be positive.
    n_eta : int
        Number of linear predictors.
    name : str
    link : str
        Only a label here: the density takes eta itself.
    own_names : tuple of str, optional
        Labels of ``natural(psi)``; ``psi1``, ``psi2``, ... otherwise.
    own_start : tuple of float, optional
        Starting psi; zeros otherwise.
    transform : callable, psi -> (n_own,), optional
        Own parameters on the scale to report; psi itself otherwise.
    mean : callable, (eta, psi) -> (), optional
        Mean response, for fitted values and predictions on the response scale.
    variance_fn : callable, (eta, psi) -> (), optional
        Variance of the response, for Pearson residuals.
    sampler : callable, (key, eta, psi) -> (), optional
        A draw of the response, for simulation.
    support : str
        Which responses are accepted: real, positive, nonnegative, unit, proportion,
        count, or positive count.

    Examples
    --------
    The Laplace distribution with median eta and log scale psi:

    >>> import jax.numpy as jnp
    >>> def log_density(y, eta, psi):
    ...     return -jnp.abs(y - eta) / jnp.exp(psi[0]) - psi[0] - jnp.log(2.0)
    >>> family = Family(log_density=log_density, n_own=1, name="double exponential")
    >>> float(family.log_lik(1.0, jnp.zeros(1), jnp.zeros(1), 1.0))
    -1.6931471805599454
    """

    name: Any = "custom"
    link: Any = "identity"
    links: Any = ()
    n_own: Any = 0
    n_eta: Any = 1
    own_names: Any = ()
    weights_role: Any = "replication"
    support: Any = "real"
    inside: Any = 1.0
    takes_codes: Any = None  # of a factor as response: "levels", or "ordered" ones

    def __new__(cls, *args: Any, **options: Any) -> Family:
        """Make a custom family where the base class itself is called."""
        return object.__new__(CustomFamily if cls is Family else cls)

    # ---- the likelihood --------------------------------------------------------------

    def log_lik(self, y: Array, eta: Array, psi: Array, w: Array) -> Array:
        """Log-likelihood (1) of one row; zero, whatever y, where w is zero."""
        return self.log_kernel(y, eta, psi, w) + self.log_base(y, w)

    def log_kernel(self, y: Array, eta: Array, psi: Array, w: Array) -> Array:
        """Part of the log-likelihood that depends on eta or psi, (); 0 where w is 0."""
        used = jnp.asarray(w) != 0
        y, at = jnp.where(used, y, self.inside), jnp.where(used, w, 1.0)
        return jnp.where(used, self._log_kernel(y, eta, psi, at), 0.0)

    def log_base(self, y: Array, w: Array) -> Array:
        """Part of the log-likelihood that depends on data alone, (); 0 where w is 0.

        It is zero at y = 0 where zero has a probability (``has_zero``).
        """
        used = jnp.asarray(w) != 0
        y, at = jnp.where(used, y, self.inside), jnp.where(used, w, 1.0)
        return jnp.where(used, self._log_base(y, at), 0.0)

    def _log_kernel(self, y: Array, eta: Array, psi: Array, w: Array) -> Array:
        return w * self._log_f(y, eta, psi)

    def _log_base(self, y: Array, w: Array) -> Array:
        return w * self._log_h(y)

    def _log_f(self, y: Array, eta: Array, psi: Array) -> Array:
        raise self._lacks("a log density", "log_density=")

    def _log_h(self, y: Array) -> Array:
        return jnp.zeros_like(y)

    def is_inside(self, eta: Array) -> Array:
        """Whether the linear predictors (n_eta,) belong to a mean, ()."""
        return jnp.ones((), bool)

    # ---- moments and the like --------------------------------------------------------

    def mu(self, eta: Array, psi: Array) -> Array:
        """Mean response, ()."""
        raise self._lacks("a mean", "mean=")

    def variance(self, eta: Array, psi: Array, w: Array) -> Array:
        """Variance of y, ()."""
        raise self._lacks("a variance", "variance_fn=")

    def expected_information(self, eta: Array, psi: Array, w: Array) -> Array:
        """Expected information about eta, (dmu/deta)^2 / Var(y); one predictor, ()."""
        raise ValueError(
            f"family {self.name!r} has no expected information in closed form; use "
            "information='observed'"
        )

    @property
    def has_information(self) -> bool:
        """Whether :meth:`expected_information` is known."""
        return type(self).expected_information is not Family.expected_information

    def unit_deviance(self, y: Array, eta: Array, psi: Array, w: Array) -> Array:
        """Contribution of the row to the deviance, weighted, ()."""
        raise ValueError(
            f"family {self.name!r} has no deviance residuals; use 'pearson' or "
            "'response'"
        )

    def sample(self, key: Array, eta: Array, psi: Array, w: Array) -> Array:
        """Draw a response, ()."""
        raise self._lacks("a sampler", "sampler=")

    def natural(self, psi: Array) -> Array:
        """Own parameters on the scale that ``own_names`` label, (n_own,)."""
        return safe_natural(psi)

    # ---- where to start --------------------------------------------------------------

    def eta_start(self, y: Array, w: Array) -> Array:
        """Starting value of the first linear predictor of one row, ()."""
        return jnp.zeros_like(y)

    def extra_start(self, y: Array, w: Array) -> Array:
        """Starting intercepts of the other linear predictors, (n_eta - 1,)."""
        return jnp.zeros(self.n_eta - 1, y.dtype)

    def psi_start(self, y: Array, w: Array) -> Array:
        """Rough starting psi from the whole response, (n_own,)."""
        return jnp.zeros(self.n_own, y.dtype)

    # ---- bad input -------------------------------------------------------------------

    def check(self, y: np.ndarray, weights: np.ndarray | None) -> None:
        """Raise DataError where y or the weights are not what the family takes."""
        y = np.asarray(y, float)
        weights = None if weights is None else np.asarray(weights, float)
        check_weights(self.name, self.weights_role, weights)
        test, takes = SUPPORTS[self.support]
        check_support(self.name, y, weights, test(y), takes)

    @property
    def has_zero(self) -> bool:
        """Whether zero has a probability of its own."""
        return self.support in ("count", "proportion")

    @property
    def eta_names(self) -> tuple[str, ...]:
        """Names of the linear predictors."""
        extra = tuple(f"predictor{i + 1}" for i in range(1, self.n_eta))
        return ("conditional", *extra)

    def _lacks(self, what: str, option: str) -> ValueError:
        return ValueError(
            f"family {self.name!r} has no {what.split()[-1]}; a custom family gets "
            f"{what} by Family(..., {option})"
        )


def safe_natural(psi: Array) -> Array:
    """exp(psi), the natural scale of positive parameters."""
    return jnp.exp(psi)


@dataclass(frozen=True)
class CustomFamily(Family):
    """What ``Family(log_density=...)`` makes; see :class:`Family`."""

    log_density: Callable[[Any, Any, Any], Array]
    n_own: int = 0
    n_eta: int = 1
    link: str = "identity"
    name: str = "custom"
    own_names: tuple[str, ...] = ()
    own_start: tuple[float, ...] = ()
    transform: Callable[[Array], Array] | None = None
    mean: Callable[[Any, Any], Array] | None = None
    variance_fn: Callable[[Any, Any], Array] | None = None
    sampler: Callable[[Any, Any, Any], Array] | None = None
    support: str = "real"

    def __post_init__(self):
        if not callable(self.log_density):
            raise TypeError("log_density must be a function of (y, eta, psi)")
        if self.n_own < 0 or self.n_eta < 1:
            raise ValueError("n_own must be at least 0 and n_eta at least 1")
        if self.support not in SUPPORTS:
            raise ValueError(
                f"unknown support {self.support!r}; choose among {', '.join(SUPPORTS)}"
            )
        names = self.own_names or tuple(f"psi{i + 1}" for i in range(self.n_own))
        start = self.own_start or (0.0,) * self.n_own
        for label, given in (("own_names", names), ("own_start", start)):
            if len(given) != self.n_own:
                raise ValueError(
                    f"{label} has {len(given)} entries for n_own={self.n_own} own "
                    "parameters"
                )
        object.__setattr__(self, "own_names", tuple(names))
        object.__setattr__(self, "own_start", tuple(float(x) for x in start))

    def _eta(self, eta: Array) -> Array:
        return eta[0] if self.n_eta == 1 else eta

    def _log_f(self, y, eta, psi):
        return self.log_density(y, self._eta(eta), psi)

    def mu(self, eta, psi):
        """Mean response, ()."""
        if self.mean is None:
            raise self._lacks("a mean", "mean=")
        return self.mean(self._eta(eta), psi)

    def variance(self, eta, psi, w):
        """Variance of y, ()."""
        if self.variance_fn is None:
            raise self._lacks("a variance", "variance_fn=")
        return self.variance_fn(self._eta(eta), psi)

    def sample(self, key, eta, psi, w):
        """Draw a response, ()."""
        if self.sampler is None:
            raise self._lacks("a sampler", "sampler=")
        return self.sampler(key, self._eta(eta), psi)

    def natural(self, psi):
        """Own parameters as reported, (n_own,)."""
        return psi if self.transform is None else self.transform(psi)

    def psi_start(self, y, w):
        """``own_start``."""
        return jnp.asarray(self.own_start, y.dtype)


class PositiveMean(Family):
    """A family whose mean is positive and follows a link."""

    inside = 1.0

    def _log_mu(self, eta: Array) -> Array:
        log_mean = LINKS[self.link].log_mean
        assert log_mean is not None
        return log_mean(eta[0])

    def _slope(self, eta: Array) -> Array:
        """Derivative of log mu by eta."""
        log_mean = LINKS[self.link].log_mean
        assert log_mean is not None
        return jax.grad(log_mean)(eta[0])

    def is_inside(self, eta):
        """Whether the mean is positive, ()."""
        return eta[0] > 0 if LINKS[self.link].positive else super().is_inside(eta)

    def mu(self, eta, psi):
        """Mean response, ()."""
        return jnp.exp(self._log_mu(eta))

    def eta_start(self, y, w):
        """Link of the response, a little away from zero, ()."""
        return LINKS[self.link].g(jnp.where(y > 0, y, 0.0) + self._away)

    _away: ClassVar[float] = 0.1


def check_link(family: Family) -> Link:
    """Look the family's link up.

    Raises
    ------
    ValueError
        If the family does not have it; the message lists those it has.
    """
    if family.link not in family.links:
        raise ValueError(
            f"family {family.name!r} has no link {family.link!r}; it has "
            f"{', '.join(family.links)}"
        )
    return LINKS[family.link]


def moments(y: Array, w: Array) -> tuple[Array, Array]:
    """Mean and variance of the rows of positive weight, the latter not quite zero."""
    used = w > 0
    n = jnp.maximum(jnp.sum(used.astype(y.dtype)), 1.0)
    mean = jnp.sum(jnp.where(used, y, 0.0)) / n
    spread = jnp.sum(jnp.where(used, (y - mean) ** 2, 0.0)) / n
    return mean, jnp.maximum(spread, 1e-8 * jnp.maximum(mean**2, 1e-8))
