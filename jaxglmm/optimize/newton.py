"""Newton's method with a trust radius, on exact gradients and Hessians.

At each point H = U diag(d) U'; in that basis the step is

    p_i = -g_i / max(|d_i|, floor),      shortened to the trust radius              (1)

which is Newton's where H is positive definite and goes downhill along directions of
negative curvature. At a saddle, where g_i = 0 with d_i < 0, (1) would stand still, so
the step then follows that eigenvector. The half Newton decrement sum g_i^2 / |d_i| / 2
estimates the distance to the optimum in the objective's own units, whatever the scale
of the parameters; it decides when to stop.

Where the function is constant along a curve of radius r, as on a circle of parameters
that mean the same, its curvature along the curve is

    d = |g| / r,                                                                   (2)

zero only where the gradient is. An eigenvalue of that size is no evidence of a minimum.

All this is done in x / scale(x), so that of a parameter that may reach any size the
relative change counts where it is large. Values are known up to ``noise(x)``: smaller
changes say nothing about a step, and a decrement below it cannot be told from zero.

The function is evaluated at one place in the loop: what it costs to compile is paid
once. Every trial point is evaluated in the coordinates that ``reframe`` chooses for it,
so a step, its radius and what follows belong to one set of coordinates. Nothing here
knows of likelihoods or data.

References: Nocedal and Wright (2006), Numerical Optimization, ch. 4,
doi:10.1007/978-0-387-40065-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxglmm.errors import Status
from jaxglmm.linalg import symmetric_eigen
from jaxglmm.typing import Array

__all__ = ["Minimum", "curvature_step", "exact", "minimize_newton", "ones", "stay"]

_FLAT = 1e-10  # eigenvalues below this fraction of the largest count as zero
_TANGENT = 1e-4  # and up to this one what the gradient that is left explains
_COARSE = 1e-4  # the largest decrement that rounding excuses: 0.01 standard errors


class Minimum(NamedTuple):
    """Where a minimization ended, and how it went.

    ``value``, ``grad`` and ``hess`` belong to the last evaluation; where it converged,
    x is one last step further. x, ``grad`` and ``hess`` are in the coordinates of
    ``frame``.

    ``decrement`` is g' H^-1 g, ``min_eigenvalue`` the smallest eigenvalue of hess over
    the largest in size, ``flat`` (m, m) the projector on directions without curvature;
    ``status`` a :class:`jaxglmm.Status` code.
    """

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


def stay(x: Array, frame: Any) -> tuple[Array, Any]:
    """A ``reframe`` that keeps the coordinates."""
    return x, frame


def ones(x: Array) -> Array:
    """A ``scale`` that leaves every parameter in its own unit."""
    return jnp.ones_like(x)


def exact(x: Array) -> Array:
    """A ``noise`` of values that are known to working precision."""
    return jnp.zeros((), x.dtype)


class _Step(NamedTuple):
    p: Array  # the step
    length: Array  # of the scaled step
    decrement: Array
    predicted: Array  # decrease that the quadratic model promises
    min_eigenvalue: Array
    flat: Array
    basis: Array  # eigenvectors of H


def curvature_step(
    x: Array,
    g: Array,
    H: Array,
    radius: Array,
    value: Array,
    basis: Array,
    unit: Array,
) -> _Step:
    """Step (1) and what it promises; curvature within rounding counts as none.

    For the verdict so does curvature (2), which vanishes with the gradient. ``basis``
    is any orthogonal matrix (m, m), best the eigenvectors of an earlier H; ``unit``
    (m,) scales the parameters.
    """
    x, g, H = x / unit, g * unit, H * unit[:, None] * unit[None]
    d, U = symmetric_eigen(H, basis)
    eps = float(jnp.finfo(g.dtype).eps)
    noise = jnp.maximum(eps**0.45, 100.0 * eps * jnp.abs(value))
    noise = jnp.where(jnp.isfinite(noise), noise, 1.0)
    size = jnp.maximum(jnp.max(jnp.abs(d)), noise)
    floor = jnp.maximum(_FLAT * size, noise)
    d = jnp.where(jnp.abs(d) <= floor, 0.0, d)
    scale = jnp.maximum(jnp.abs(d), floor)
    gt = U.T @ g
    p = -gt / scale
    # gradient too small to leave a saddle within the trust radius: follow d_i < 0
    negative = d < -1e-6 * size
    stuck = negative & (jnp.abs(p) < 1e-2 * radius)
    p = jnp.where(stuck, jnp.where(gt > 0, -0.1, 0.1) * radius, p)
    norm = jnp.sqrt(jnp.sum(p**2))
    bend = 10.0 * jnp.sqrt(jnp.sum(g**2) / jnp.clip(jnp.sum(x**2), 1e-2, 1.0))
    is_flat = jnp.abs(d) <= jnp.maximum(floor, jnp.minimum(bend, _TANGENT * size))
    p = p * jnp.minimum(1.0, radius / jnp.maximum(norm, jnp.finfo(g.dtype).tiny))
    along = unit[:, None] * U
    along = along / jnp.sqrt(jnp.sum(along**2, axis=0))[None]
    return _Step(
        p=unit * (U @ p),
        length=jnp.minimum(norm, radius),
        decrement=jnp.sum(gt**2 / scale),
        predicted=-(gt @ p + 0.5 * jnp.sum(d * p**2)),
        min_eigenvalue=jnp.min(jnp.where(is_flat, 0.0, d)) / size,
        flat=(along * is_flat[None].astype(U.dtype)) @ along.T,
        basis=U,
    )


class _State(NamedTuple):
    x: Array
    frame: Any
    value: Array
    grad: Array
    hess: Array
    trial: Array
    length: Array
    predicted: Array
    decrement: Array
    min_eigenvalue: Array
    flat: Array
    basis: Array
    radius: Array
    n_iter: Array
    status: Array  # -1 while running


def minimize_newton(
    fn: Callable[[Array, Any], tuple[Array, Array, Array, Any]],
    x0: Array,
    *,
    max_iter: int | Array = 50,
    tol: float | None = None,
    radius: float = 2.0,
    frame: Any = (),
    reframe: Callable[[Array, Any], tuple[Array, Any]] = stay,
    scale: Callable[[Array], Array] = ones,
    noise: Callable[[Array], Array] = exact,
) -> Minimum:
    """Minimize a smooth function of few parameters.

    Parameters
    ----------
    fn : callable, ((m,), frame) -> value (), gradient (m,), Hessian (m, m), frame
        Parameters should be of comparable, unit-like scale. The frame that it returns
        belongs to the same coordinates, and may hold what was learnt on the way.
    x0 : Array, (m,)
        Start.
    max_iter : int or Array, ()
        Largest number of evaluations.
    tol : float, optional
        Decrement g' H^-1 g at which to stop; by default eps^0.8, 1e-6 standard errors
        of a parameter. The step in hand is then still taken, and squares that error.
    radius : float
        First trust radius.
    frame : pytree
        What the coordinates of x0 mean; passed on to fn.
    reframe : callable, (x, frame) -> (x, frame)
        The same point in coordinates that suit it better.
    scale : callable, (m,) -> (m,)
        Units of the parameters near a point, in which steps are measured.
    noise : callable, (m,) -> ()
        Rounding of the value near a point, beside that of its last digits.

    Returns
    -------
    Minimum
        ``status`` CONVERGED, NOT_IDENTIFIED (stationary but flat somewhere), MAX_ITER,
        NONFINITE or STALLED.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> f = lambda x: jnp.sum((x - 1.0) ** 4 + x**2)
    >>> fn = lambda x, frame: (f(x), jax.grad(f)(x), jax.hessian(f)(x), frame)
    >>> bool(minimize_newton(fn, jnp.zeros(2)).status == 0)
    True
    """
    eps = float(jnp.finfo(x0.dtype).eps)
    tight = eps**0.8 if tol is None else tol
    loose = max(eps**0.5, tight)

    def body(s: _State) -> _State:
        start = s.n_iter == 0
        trial, frame = reframe(s.trial, s.frame)
        now, accept, finite = _take(s, trial, fn(trial, frame), eps, noise(s.x))
        step = curvature_step(
            now.x, now.grad, now.hess, now.radius, now.value, now.basis, scale(now.x)
        )
        coarse = jnp.clip(noise(now.x), loose, max(loose, _COARSE))
        status = _judge(s, step, accept, finite, start, now.radius, tight, coarse)
        n_iter = s.n_iter + 1
        out_of_time = (status < 0) & (n_iter >= max_iter)
        return now._replace(
            trial=now.x + step.p,
            length=step.length,
            predicted=step.predicted,
            decrement=step.decrement,
            min_eigenvalue=step.min_eigenvalue,
            flat=step.flat,
            basis=step.basis,
            n_iter=n_iter,
            status=jnp.where(out_of_time, jnp.int32(Status.MAX_ITER), status),
        )

    s = lax.while_loop(lambda s: s.status < 0, body, _first(x0, frame, radius))
    # the last step is known already and squares the error that is left
    near = jnp.clip(noise(s.x), loose, max(loose, _COARSE))
    done = (s.status == int(Status.CONVERGED)) & (s.decrement <= near)
    return Minimum(
        x=jnp.where(done, s.trial, s.x),
        frame=s.frame,
        value=s.value,
        grad=s.grad,
        hess=s.hess,
        decrement=s.decrement,
        min_eigenvalue=s.min_eigenvalue,
        flat=s.flat,
        n_iter=s.n_iter,
        status=s.status,
    )


def _first(x0: Array, frame: Any, radius: float) -> _State:
    """State before the first evaluation, which will be at x0 and accepted."""
    inf = jnp.asarray(jnp.inf, x0.dtype)
    zero = jnp.zeros_like(x0)
    square = jnp.zeros((x0.shape[0], x0.shape[0]), x0.dtype)
    return _State(
        x=x0,
        frame=frame,
        value=inf,
        grad=zero,
        hess=square,
        trial=x0,
        length=inf,
        predicted=inf,
        decrement=inf,
        min_eigenvalue=inf,
        flat=square,
        basis=jnp.eye(x0.shape[0], dtype=x0.dtype),
        radius=jnp.asarray(radius, x0.dtype),
        n_iter=jnp.zeros((), jnp.int32),
        status=jnp.full((), -1, jnp.int32),
    )


def _take(
    s: _State, trial: Array, evaluated, eps: float, noise: Array
) -> tuple[_State, Array, Array]:
    """Take the trial point or leave it, and set the trust radius by how it went."""
    value, grad, hess, frame = evaluated
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
    finite = finite & jnp.all(jnp.isfinite(hess))
    start = s.n_iter == 0
    # rounding in the value hides any smaller change; trust the model below it
    noise = noise + 100.0 * eps * jnp.abs(jnp.where(start, 0.0, s.value))
    gained = jnp.where(start, jnp.inf, s.value - value)
    ratio = jnp.where(s.predicted <= noise, 1.0, gained / s.predicted)
    ratio = jnp.where(gained < -noise, -1.0, ratio)
    accept = finite & (start | (ratio > 1e-4))
    wider = jnp.maximum(s.radius, 2.0 * s.length)
    radius = jnp.where(ratio > 0.75, wider, s.radius)
    radius = jnp.where(~finite | (ratio < 0.25), 0.25 * s.length, radius)
    now = s._replace(
        x=jnp.where(accept, trial, s.x),
        frame=jax.tree.map(lambda a, b: jnp.where(accept, a, b), frame, s.frame),
        value=jnp.where(accept, value, s.value),
        grad=jnp.where(accept, grad, s.grad),
        hess=jnp.where(accept, hess, s.hess),
        radius=jnp.where(start, s.radius, radius),
    )
    return now, accept, finite


def _judge(s, step, accept, finite, start, radius, tight, loose) -> Array:
    """Status after an evaluation; -1 to go on."""
    # steps that stay long lead towards an optimum at infinity
    short = jnp.sum(step.p**2) <= 1e-4 * (1.0 + jnp.sum(s.x**2))
    stopped = (step.decrement <= tight) | (
        (step.decrement <= loose)
        & short
        & (~accept | (step.decrement > 0.25 * s.decrement))
    )
    minimum = stopped & (step.min_eigenvalue >= -1e-6)
    flat = step.min_eigenvalue <= _FLAT
    stalled = ~accept & (radius < 1e-12)
    status = jnp.where(stalled, int(Status.STALLED), -1)
    status = jnp.where(minimum, int(Status.CONVERGED), status)
    status = jnp.where(minimum & flat, int(Status.NOT_IDENTIFIED), status)
    status = jnp.where(start & ~finite, int(Status.NONFINITE), status)
    return status.astype(jnp.int32)
