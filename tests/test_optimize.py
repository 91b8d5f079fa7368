"""Newton and optax loops on functions with known minima."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxglmm as jg
from jaxglmm.errors import Status
from jaxglmm.optimize import value_grad_hess
from jaxglmm.optimize.newton import minimize_newton


def rosenbrock(x, frame):
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def test_rosenbrock():
    out = jax.jit(lambda x: minimize_newton(value_grad_hess(rosenbrock), x))(
        jnp.array([-1.2, 1.0])
    )
    assert int(out.status) == Status.CONVERGED
    np.testing.assert_allclose(out.x, [1.0, 1.0], atol=1e-8)


def test_leaves_a_saddle_where_the_gradient_is_zero():
    def double_well(x, frame):
        return (x[0] ** 2 - 1.0) ** 2 + x[1] ** 2

    out = minimize_newton(value_grad_hess(double_well), jnp.zeros(2))
    assert int(out.status) == Status.CONVERGED
    np.testing.assert_allclose(np.abs(out.x), [1.0, 0.0], atol=1e-8)


def test_flat_direction_is_not_identified():
    out = minimize_newton(
        value_grad_hess(lambda x, frame: (x[0] + x[1] - 1.0) ** 2), jnp.ones(2)
    )
    assert int(out.status) == Status.NOT_IDENTIFIED


def test_iteration_limit_and_nan():
    fn = value_grad_hess(rosenbrock)
    out = minimize_newton(fn, jnp.array([-1.2, 1.0]), max_iter=3)
    assert int(out.status) == Status.MAX_ITER
    assert int(out.n_iter) == 3
    undefined = value_grad_hess(lambda x, frame: jnp.log(-1.0 - x @ x))
    bad = minimize_newton(undefined, jnp.ones(2))
    assert int(bad.status) == Status.NONFINITE


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam", optax.adam(0.03)])
def test_optax_reaches_newtons_optimum(sleep_design, optimizer):
    newton = jax.jit(jg.fit)(sleep_design)
    rate = 0.03 if optimizer == "adam" else None
    control = jg.Control(optimizer=optimizer, learning_rate=rate)
    other = jax.jit(lambda d: jg.fit(d, control=control))(sleep_design)
    assert bool(other.converged)
    np.testing.assert_allclose(other.objective, newton.objective, atol=1e-6)
    np.testing.assert_allclose(other.params.theta, newton.params.theta, rtol=1e-3)


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
