"""Newton and optax loops on functions with known minima."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxglmm as jg
from jaxglmm.errors import Status
from jaxglmm.optimize import value_grad_hess
from jaxglmm.optimize.newton import minimize_newton
from jaxglmm.optimize.optax_loop import optimizer_by_name

fit = jax.jit(jg.fit, static_argnames="control")


@functools.partial(jax.jit, static_argnames="f")
def newton(f, x, max_iter=50):
    return minimize_newton(value_grad_hess(f), x, max_iter=max_iter)


def rosenbrock(x, frame):
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def test_rosenbrock():
    out = newton(rosenbrock, jnp.array([-1.2, 1.0]))
    assert int(out.status) == Status.CONVERGED
    np.testing.assert_allclose(out.x, [1.0, 1.0], atol=1e-8)


def test_leaves_a_saddle_where_the_gradient_is_zero():
    def double_well(x, frame):
        return (x[0] ** 2 - 1.0) ** 2 + x[1] ** 2

    out = newton(double_well, jnp.zeros(2))
    assert int(out.status) == Status.CONVERGED
    np.testing.assert_allclose(np.abs(out.x), [1.0, 0.0], atol=1e-8)


def test_flat_direction_is_not_identified():
    out = newton(lambda x, frame: (x[0] + x[1] - 1.0) ** 2, jnp.ones(2))
    assert int(out.status) == Status.NOT_IDENTIFIED


@pytest.mark.parametrize("radius", [0.3, 1.0, 5.0])
def test_no_point_of_a_circle_of_minima_is_identified(radius):
    """Its curvature along the circle is |g| / radius, never quite zero."""

    def on_a_circle(x, frame):
        return (jnp.sum(x**2) / radius**2 - 1.0) ** 2

    angle = jnp.linspace(0.1, 6.2, 40)
    starts = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    starts = starts * radius * jnp.linspace(0.1, 3.0, 40)[:, None]
    out = jax.vmap(lambda x0: newton(on_a_circle, x0))(starts)
    assert set(np.asarray(out.status).tolist()) == {int(Status.NOT_IDENTIFIED)}


def test_iteration_limit_and_nan():
    out = newton(rosenbrock, jnp.array([-1.2, 1.0]), max_iter=3)
    assert int(out.status) == Status.MAX_ITER
    assert int(out.n_iter) == 3
    bad = newton(lambda x, frame: jnp.log(-1.0 - x @ x), jnp.ones(2))
    assert int(bad.status) == Status.NONFINITE


SLOW_TWIN = pytest.param(optax.adam(0.03), marks=pytest.mark.slow)  # as "adam"


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", SLOW_TWIN])
def test_optax_reaches_newtons_optimum(sleep_design, optimizer):
    best = fit(sleep_design, control=jg.Control())
    rate = 0.03 if optimizer == "adam" else None
    control = jg.Control(optimizer=optimizer, learning_rate=rate)
    other = fit(sleep_design, start=jnp.array([1.0, 0.0, 1.0]), control=control)
    assert bool(other.converged)
    assert int(other.n_iter) > 5
    np.testing.assert_allclose(other.objective, best.objective, atol=1e-6)
    np.testing.assert_allclose(other.params.theta, best.params.theta, rtol=1e-3)


def test_a_name_stands_for_the_transformation():
    given, named = optax.adam(0.03), optimizer_by_name("adam", 0.03)
    assert optimizer_by_name(given, None) is given
    g = jnp.array([0.5, -2.0])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        one, other = (t.update(g, t.init(g), g)[0] for t in (given, named))
    np.testing.assert_array_equal(one, other)


def test_unknown_optimizers_are_named(sleep_design):
    with pytest.raises(ValueError, match="unknown optimizer 'nelder'"):
        jg.fit(sleep_design, control=jg.Control(optimizer="nelder"))
    with pytest.raises(ValueError, match="optax transformation"):
        jg.fit(sleep_design, control=jg.Control(optimizer=3))
    for name in ("chain", "l2_loss"):
        with pytest.raises(ValueError, match=f"optax.{name}"):
            jg.fit(sleep_design, control=jg.Control(optimizer=name))


def test_controls_that_nothing_would_use_are_refused():
    with pytest.raises(ValueError, match="learning_rate is for an optax optimizer"):
        jg.Control(learning_rate=0.1)
    for bad in ({"max_iter": 0}, {"max_iter": 2.5}, {"tol": -1.0}, {"tol": np.ones(2)}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a positive"):
            jg.Control(**bad)
    assert hash(jg.Control(tol=np.float64(1e-9))) == hash(jg.Control(tol=1e-9))
