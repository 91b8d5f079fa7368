"""What a fit returns: frozen records that are pytrees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxglmm.errors import DesignError
from jaxglmm.typing import Array

__all__ = ["Fit", "Params", "check_params"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Params:
    """Parameters of a model, in the user's units.

    Parameters
    ----------
    beta : Array, (p,)
        Fixed effects on the link scale.
    theta : Array, (m,)
        Relative covariance parameters, term by term, each by column of Lambda.
    sigma : Array, ()
        Residual standard deviation of a Gaussian model with identity link, 1 in any
        other; the random effects have covariance sigma^2 Q.
    psi : Array, (n_own,), optional
        The family's own parameters on its unconstrained scale.
    others : tuple of Array, (p_r,)
        Fixed effects of the further linear predictors.
    """

    beta: Array
    theta: Array
    sigma: Array
    psi: Array | None = None
    others: tuple[Array, ...] = ()

    def replace(self, **changes) -> Params:
        """Copy with some parameters changed."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fit:
    """A fitted model; under ``vmap`` every field has a leading lane axis.

    Parameters
    ----------
    params : Params
        Estimates, with the diagonal of Lambda made positive.
    u, b : tuple of Array, (J, k)
        Spherical and ordinary conditional modes of every term; b = u Lambda'.
    loglik : Array, ()
        Log L with every constant; for REML fits the restricted one.
    objective : Array, ()
        What was minimized: -2 loglik, minus twice the log prior where there is one. For
        PQL, which has no loglik, that of the working model.
    grad, hess : Array, (m,), (m, m)
        Derivatives of the objective in theta, beta and sigma profiled out, at the last
        evaluation: the estimate is one Newton step further. For a generalized model
        in (beta, others, theta, psi), without beta where REML integrates it out; for
        PQL those of the working model. These and the evidence below are constants to
        differentiation, as is the ``vcov_beta`` of a generalized model.
    vcov_beta : Array, (p, p)
        Covariance of beta: at the estimated theta for a linear model, from the joint
        Hessian of all parameters for a generalized one. Along directions in which the
        likelihood is flat it means nothing; ``determined_vcov`` of a model leaves
        them out.
    status : Array, () int
        A :class:`jaxglmm.Status` code.
    converged, is_singular : Array, () bool
        Whether an optimum was reached; whether it lies on the boundary.
    decrement, min_eigenvalue : Array, ()
        The evidence: grad' hess^-1 grad, and the smallest eigenvalue of the Hessian
        over the largest, both in inner units.
    n_iter : Array, () int
        Evaluations of the criterion.
    vcov : Array, (m, m), optional
        Of a generalized model: the covariance of (beta, others, theta, psi), twice the
        inverse of ``hess`` with flat directions left out; with REML with beta, which
        follows the others; for PQL of beta alone, the rest not a number.
    """

    params: Params
    u: tuple[Array, ...]
    b: tuple[Array, ...]
    loglik: Array
    objective: Array
    grad: Array
    hess: Array
    vcov_beta: Array
    status: Array
    converged: Array
    is_singular: Array
    decrement: Array
    min_eigenvalue: Array
    n_iter: Array
    vcov: Array | None = None


def check_params(params: Params, design, n_own: int = 0) -> None:
    """Refuse parameters whose shapes do not fit the design."""
    expected = {"beta": (design.X.shape[1],), "theta": (design.n_theta,), "sigma": ()}
    found = {name: jnp.shape(getattr(params, name)) for name in expected}
    expected["psi"] = (n_own,)
    found["psi"] = (0,) if params.psi is None else jnp.shape(params.psi)
    for i, predictor in enumerate(design.others):
        expected[f"others[{i}]"] = (predictor.X.shape[1],)
        given = params.others[i] if i < len(params.others) else jnp.zeros(0)
        found[f"others[{i}]"] = jnp.shape(given)
    for name, shape in expected.items():
        if found[name] != shape:
            raise DesignError(
                f"params.{name} must have shape {shape}; found {found[name]}"
            )
