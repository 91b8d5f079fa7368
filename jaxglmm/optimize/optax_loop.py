"""Any optax gradient transformation as the optimizer, by name or as an object.

    updates, state = transform.update(g, state, x);  x <- x + updates

until the relative size of the gradient, |g| / max(1, |f|), falls below ``tol``. The
Hessian is evaluated at the end, for the same verdict that Newton's method gives; from
a saddle the transformation starts anew, one step along negative curvature. L-BFGS comes
with optax's zoom line search.

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
from jaxglmm.optimize.newton import Minimum, curvature_step, ones, stay
from jaxglmm.typing import Array

__all__ = ["minimize_optax", "optimizer_by_name"]

_FLAT = 1e-10
_ROUNDS = 4  # starts over from a saddle, at most


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
        if not _is_transformation(optimizer):
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
        made = maker(1e-2 if learning_rate is None else learning_rate)
    except Exception as error:
        raise ValueError(
            f"optax.{optimizer} cannot be made from a learning rate alone; build it "
            "and give Control(optimizer=...) the transformation"
        ) from error
    if not _is_transformation(made):
        raise ValueError(
            f"optax.{optimizer} is not an optimizer; use one such as 'adam' or 'lbfgs'"
        )
    return made


def _is_transformation(x: Any) -> bool:
    return hasattr(x, "init") and hasattr(x, "update")


def minimize_optax(
    objective: Callable[[Array, Any], Array],
    value_grad_hess: Callable[[Array, Any], tuple[Array, Array, Array, Any]],
    x0: Array,
    optimizer: Any,
    max_iter: int | Array,
    tol: float | None,
    learning_rate: float | None,
    *,
    frame: Any = (),
    reframe: Callable[[Array, Any], tuple[Array, Any]] = stay,
    scale: Callable[[Array], Array] = ones,
) -> Minimum:
    """Minimize with an optax transformation; see the module."""
    transform = optax.with_extra_args_support(
        optimizer_by_name(optimizer, learning_rate)
    )
    eps = float(jnp.finfo(x0.dtype).eps)
    stop = max(eps**0.6, 1e-10) if tol is None else tol
    # the decrement is in the objective's units: below this the fit is done
    enough = max(eps**0.6, 1e-8) if tol is None else max(eps**0.6, 1e-8, tol)

    def one_round(s: _Round) -> _Round:
        x, frame = reframe(s.x, s.frame)
        last = _run(objective, transform, x, frame, s.n_iter, max_iter, stop)
        x, frame = reframe(last.x, frame)
        value, grad, hess, frame = value_grad_hess(x, frame)
        eye = jnp.eye(x.shape[0], dtype=x.dtype)
        one = jnp.ones((), x.dtype)
        at = curvature_step(x, grad, hess, one, value, eye, scale(x))
        status = _judge(at, value, grad, last.n_iter >= max_iter, enough)
        saddle = (status == int(Status.STALLED)) & (at.min_eigenvalue < -1e-6)
        again = saddle & (s.rounds < _ROUNDS - 1)
        evidence = (value, grad, hess, at.decrement, at.min_eigenvalue, at.flat)
        x = jnp.where(again, x + at.p, x)
        return _Round(
            x, frame, *evidence, last.n_iter, status, again, s.rounds + 1
        )  # fmt: skip

    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        end = lax.while_loop(lambda s: s.again, one_round, _first_round(x0, frame))
    return Minimum(*end[: len(Minimum._fields)])


class _Round(NamedTuple):
    """A :class:`Minimum`, and whether to leave it, a saddle, and go on."""

    x: Array
    frame: Any
    value: Array
    grad: Array
    hess: Array
    decrement: Array
    min_eigenvalue: Array
    flat: Array
    n_iter: Array
    status: Array
    again: Array
    rounds: Array


def _first_round(x0: Array, frame: Any) -> _Round:
    zero, count = jnp.zeros((), x0.dtype), jnp.zeros((), jnp.int32)
    square = jnp.zeros((x0.shape[0], x0.shape[0]), x0.dtype)
    return _Round(
        x0, frame, zero, jnp.zeros_like(x0), square, zero, zero, square, count, count,
        jnp.ones((), bool), count,
    )  # fmt: skip


def _run(objective, transform, x0, frame, n_iter, max_iter, stop) -> _State:
    """Iterate from x0, in one frame, until the gradient is small."""

    def value_fn(x):
        return objective(x, frame)

    def is_small(value, grad):
        size = jnp.max(jnp.abs(grad)) / jnp.maximum(1.0, jnp.abs(value))
        return size <= stop

    def going(s: _State):
        fine = jnp.isfinite(s.value) & jnp.all(jnp.isfinite(s.grad))
        unfinished = (s.n_iter == n_iter) | (fine & ~is_small(s.value, s.grad))
        return unfinished & (s.n_iter < max_iter)

    def body(s: _State):
        value, grad = jax.value_and_grad(value_fn)(s.x)
        updates, inner = transform.update(
            grad, s.inner, s.x, value=value, grad=grad, value_fn=value_fn
        )
        # the step of an adaptive method has a size of its own: none from the optimum
        moved = jnp.asarray(optax.apply_updates(s.x, updates))
        x = jnp.where(is_small(value, grad), s.x, moved)
        return _State(x, value, grad, inner, s.n_iter + 1)

    infinite = jnp.asarray(jnp.inf, x0.dtype)
    first = _State(x0, infinite, jnp.zeros_like(x0), transform.init(x0), n_iter)
    return lax.while_loop(going, body, first)


def _judge(at, value, grad, out_of_time, enough: float) -> Array:
    fine = (at.decrement <= enough) & (at.min_eigenvalue >= -1e-6)
    status = jnp.where(out_of_time, int(Status.MAX_ITER), int(Status.STALLED))
    status = jnp.where(fine, int(Status.CONVERGED), status)
    flat = fine & (at.min_eigenvalue <= _FLAT)
    status = jnp.where(flat, int(Status.NOT_IDENTIFIED), status)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
    return jnp.where(finite, status, int(Status.NONFINITE)).astype(jnp.int32)
