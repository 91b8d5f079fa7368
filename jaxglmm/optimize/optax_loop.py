"""Any optax gradient transformation as the optimizer, by name or as an object.

    updates, state = transform.update(g, state, x);  x <- x + updates

until the relative size of the gradient, |g| / max(1, |f|), falls below ``tol``. The
Hessian is evaluated once, at the end, for the same verdict that Newton's method gives.
L-BFGS comes with optax's zoom line search.

References: Liu and Nocedal (1989), Math. Program. 45, doi:10.1007/BF01589116.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxglmm.errors import Status
from jaxglmm.optimize.newton import Minimum, curvature_step
from jaxglmm.typing import Array

__all__ = ["minimize_optax", "optimizer_by_name"]

_FLAT = 1e-10


class _State(NamedTuple):
    x: Array
    value: Array
    grad: Array
    inner: Any
    n_iter: Array


def optimizer_by_name(optimizer: Any, learning_rate: float | None) -> Any:
    """An optax transformation from its name; a transformation passes through.

    Raises
    ------
    ValueError
        If optax has no optimizer of that name.
    """
    if not isinstance(optimizer, str):
        if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
            raise ValueError(
                "optimizer must be 'newton', 'lbfgs', the name of an optax optimizer "
                f"or an optax transformation; found {optimizer!r}"
            )
        return optimizer
    if optimizer == "lbfgs":
        return optax.lbfgs(learning_rate)
    maker = getattr(optax, optimizer, None)
    if not callable(maker) or optimizer.startswith("_"):
        raise ValueError(
            f"unknown optimizer {optimizer!r}: neither 'newton' nor 'lbfgs' nor an "
            "optimizer of optax, such as 'adam'"
        )
    try:
        return maker(1e-2 if learning_rate is None else learning_rate)
    except TypeError as error:
        raise ValueError(
            f"optax.{optimizer} cannot be made from a learning rate alone; build it "
            "and give Control(optimizer=...) the transformation"
        ) from error


def minimize_optax(
    objective: Callable[[Array], Array],
    value_grad_hess: Callable[[Array], tuple[Array, Array, Array]],
    x0: Array,
    optimizer: Any,
    max_iter: int | None,
    tol: float | None,
    learning_rate: float | None,
) -> Minimum:
    """Minimize with an optax transformation; see the module."""
    transform = optax.with_extra_args_support(
        optimizer_by_name(optimizer, learning_rate)
    )
    if max_iter is None:
        max_iter = 500 if optimizer == "lbfgs" else 5_000
    eps = jnp.finfo(x0.dtype).eps
    stop = max(float(eps) ** 0.6, 1e-10) if tol is None else tol
    value_and_grad = jax.value_and_grad(objective)

    def going(s: _State):
        size = jnp.max(jnp.abs(s.grad)) / jnp.maximum(1.0, jnp.abs(s.value))
        fine = jnp.isfinite(s.value) & jnp.all(jnp.isfinite(s.grad))
        unfinished = (s.n_iter == 0) | (fine & (size > stop))
        return unfinished & (s.n_iter < max_iter)

    def body(s: _State):
        value, grad = value_and_grad(s.x)
        updates, inner = transform.update(
            grad, s.inner, s.x, value=value, grad=grad, value_fn=objective
        )
        return _State(
            optax.apply_updates(s.x, updates), value, grad, inner, s.n_iter + 1
        )

    first = _State(
        x0, jnp.asarray(jnp.inf, x0.dtype), jnp.zeros_like(x0), transform.init(x0),
        jnp.zeros((), jnp.int32),
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        last = lax.while_loop(going, body, first)
    value, grad, hess = value_grad_hess(last.x)
    at = curvature_step(grad, hess, jnp.asarray(1.0, x0.dtype), value)
    # the decrement is in the objective's units: below this the fit is done
    done = at.decrement <= max(float(eps) ** 0.6, 1e-8)
    status = jnp.where(
        last.n_iter >= max_iter, int(Status.MAX_ITER), int(Status.STALLED)
    )
    fine = done & (at.min_eigenvalue >= -1e-6)
    status = jnp.where(fine, int(Status.CONVERGED), status)
    flat = fine & (at.min_eigenvalue <= _FLAT)
    status = jnp.where(flat, int(Status.NOT_IDENTIFIED), status)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
    status = jnp.where(finite, status, int(Status.NONFINITE)).astype(jnp.int32)
    return Minimum(
        last.x,
        value,
        grad,
        hess,
        at.decrement,
        at.min_eigenvalue,
        at.flat,
        last.n_iter,
        status,
    )
