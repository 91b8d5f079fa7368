"""The optimum of a model, and its derivative by the implicit function theorem.

x solves grad f(x, data) = 0. Its derivative comes from that equation, not from the
iterations: with H the Hessian of f,

    d x = -H^+ d_data(grad f),                                                     (1)

where H^+ leaves directions without curvature alone: a flat direction is held fixed. At
a boundary (a zero variance) the gradient's dependence on the data vanishes, because f
is even in the columns of Lambda, so (1) holds those parameters at the boundary too.
A derivative of (1) asks for one of f more: where f holds for three, as that of
laplace.py, (1) holds for two.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxglmm.control import Control
from jaxglmm.linalg import spd_inverse
from jaxglmm.optimize import Minimum, minimize
from jaxglmm.typing import Array

__all__ = ["Model", "projected_inverse", "solve"]


class Model(Protocol):
    """Static part of a model, hashable: functions of x (m,), a frame and the data.

    ``objective`` may be differentiated in x and data, the frame held fixed;
    ``reframe`` gives the same point in better coordinates, with whatever else belongs
    to it; ``derivatives`` is value, gradient and Hessian where a better way than
    differentiating is known, and ``tol`` then the optimizer's default. ``scale`` and
    ``noise`` are the units of x near a point and the rounding of the objective there.
    """

    def objective(self, x: Array, frame: Any, data: Any) -> Array:
        """What to minimize, ()."""
        ...

    def settle(self, x: Array, frame: Any, data: Any) -> Any:
        """The frame with what belongs to another x, in the same coordinates."""
        ...

    def reframe(self, x: Array, frame: Any, data: Any) -> tuple[Array, Any]:
        """The same point in coordinates that suit it better."""
        ...

    def derivatives(self, data: Any) -> tuple[Any, float | None]:
        """A function (x, frame) -> value, gradient, Hessian, frame; a tolerance."""
        ...

    def scale(self, x: Array) -> Array:
        """Units of the parameters, (m,)."""
        ...

    def noise(self, x: Array, data: Any) -> Array:
        """Rounding of the objective beside that of its last digits, ()."""
        ...

    @property
    def radius(self) -> float:
        """How far from the start the optimizer may go at first."""
        ...


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def solve(
    model: Model,
    control: Control,
    data: Any,
    x0: Array,
    frame0: Any,
    max_iter: Array | None,
) -> Minimum:
    """Minimize the model's objective from x0, whose meaning is ``frame0``.

    ``max_iter`` () goes before the control's. Only ``x`` and ``value`` have
    derivatives.
    """

    def objective(x, frame):
        settled = model.settle(lax.stop_gradient(x), frame, data)
        return model.objective(x, settled, data)

    def reframe(x, frame):
        return model.reframe(x, frame, data)

    fn, tol = model.derivatives(data)
    return minimize(
        objective, x0, control, fn, tol=tol, radius=model.radius, frame=frame0,
        reframe=reframe, scale=model.scale, noise=lambda x: model.noise(x, data),
        max_iter=max_iter,
    )  # fmt: skip


@solve.defjvp
def _solve_jvp(model, control, primals, tangents):
    data, x0, frame0, max_iter = primals
    d_data, _, _, _ = tangents
    out = solve(model, control, data, x0, frame0, max_iter)
    x, frame = out.x, out.frame

    def gradient(data):
        value, grad = jax.value_and_grad(model.objective)(x, frame, data)
        return grad, value

    # at the optimum the value depends on x to second order only
    _, (d_gradient, d_value) = jax.jvp(gradient, (data,), (d_data,))
    H = jax.hessian(model.objective)(x, frame, data)
    flat = lax.stop_gradient(out.flat)
    d_x = -(projected_inverse(H, flat) @ d_gradient)
    # whatever else a fit returns is made from x anew
    changes = jax.tree.map(_zero_tangent, out)._replace(x=d_x, value=d_value)
    return out, changes


def projected_inverse(H: Array, flat: Array) -> Array:
    """Inverse of H on the complement of the projector ``flat``, zero on it."""
    eye = jnp.eye(H.shape[0], dtype=H.dtype)
    P = eye - flat
    return P @ spd_inverse(P @ H @ P + flat)[0] @ P


def _zero_tangent(x):
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
