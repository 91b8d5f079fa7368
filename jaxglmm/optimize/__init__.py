"""Optimizers: ``minimize(objective, x0, control) -> Minimum``, and nothing else.

An objective is a function of coordinates x (m,) and of a *frame*, a pytree that says
what the coordinates mean. ``reframe(x, frame)`` names the same point in coordinates
that suit it better; the optimizer moves in those. With no frame there is ().
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxglmm.optimize.newton import (
    Minimum,
    exact,
    minimize_newton,
    ones,
    stay,
)

__all__ = ["Minimum", "iteration_limit", "minimize", "value_grad_hess"]


def value_grad_hess(objective):
    """Value, gradient and Hessian in x of a function, forward over reverse; frame."""

    def fn(x, frame=()):
        value_and_grad = jax.value_and_grad(lambda x: objective(x, frame))
        (value, grad), along = jax.linearize(value_and_grad, x)
        _, hess = jax.vmap(along)(jnp.eye(x.shape[0], dtype=x.dtype))
        return value, grad, hess, frame

    return fn


def iteration_limit(control) -> int:
    """The largest number of evaluations."""
    if control.max_iter is not None:
        return control.max_iter
    return {"newton": 50, "lbfgs": 500}.get(str(control.optimizer), 5_000)


def minimize(
    objective,
    x0,
    control,
    fn=None,
    *,
    tol=None,
    radius=2.0,
    frame=(),
    reframe=stay,
    scale=ones,
    noise=exact,
    max_iter=None,
) -> Minimum:
    """Minimize with the optimizer that ``control.optimizer`` names or is.

    ``fn`` gives value, gradient, Hessian and frame where a better way than
    differentiating the objective is known; ``tol`` is a default for ``control.tol``,
    ``radius``, ``scale`` and ``noise`` are Newton's, see newton.py; ``max_iter`` (),
    which may be traced, goes before ``control.max_iter``.
    """
    fn = value_grad_hess(objective) if fn is None else fn
    tol = control.tol if control.tol is not None else tol
    if max_iter is None:
        max_iter = iteration_limit(control)
    if control.optimizer == "newton":
        return minimize_newton(
            fn, x0, max_iter=max_iter, tol=tol, radius=radius, frame=frame,
            reframe=reframe, scale=scale, noise=noise,
        )  # fmt: skip
    from jaxglmm.optimize.optax_loop import minimize_optax

    return minimize_optax(
        objective, fn, x0, control.optimizer, max_iter, control.tol,
        control.learning_rate, frame=frame, reframe=reframe, scale=scale,
    )  # fmt: skip
