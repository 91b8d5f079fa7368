"""Optimizers: ``minimize(objective, x0, control) -> Minimum``, and nothing else.

An objective is a function of coordinates x (m,) and of a *frame*, a pytree that says
what the coordinates mean. ``reframe(x, frame)`` names the same point in coordinates
that suit it better; the optimizer moves in those. With no frame there is ().
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxglmm.optimize.newton import Minimum, minimize_newton, stay

__all__ = ["Minimum", "minimize", "value_grad_hess"]


def value_grad_hess(objective):
    """Value, gradient and Hessian in x of a function, forward over reverse."""

    def fn(x, frame=()):
        value_and_grad = jax.value_and_grad(lambda x: objective(x, frame))
        (value, grad), along = jax.linearize(value_and_grad, x)
        _, hess = jax.vmap(along)(jnp.eye(x.shape[0], dtype=x.dtype))
        return value, grad, hess

    return fn


def minimize(
    objective, x0, control, fn=None, *, tol=None, frame=(), reframe=stay
) -> Minimum:
    """Minimize with the optimizer that ``control.optimizer`` names or is.

    ``fn`` gives value, gradient and Hessian where a better way than differentiating
    the objective is known; ``tol`` is a default for ``control.tol``.
    """
    fn = value_grad_hess(objective) if fn is None else fn
    tol = control.tol if control.tol is not None else tol
    if control.optimizer == "newton":
        max_iter = 50 if control.max_iter is None else control.max_iter
        return minimize_newton(
            fn, x0, max_iter=max_iter, tol=tol, frame=frame, reframe=reframe
        )
    from jaxglmm.optimize.optax_loop import minimize_optax

    return minimize_optax(
        objective, fn, x0, control.optimizer, control.max_iter, control.tol,
        control.learning_rate, frame=frame, reframe=reframe,
    )  # fmt: skip
