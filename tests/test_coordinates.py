"""Pivoted coordinates: the same Q, and verdicts where a first pivot vanishes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxglmm as jg
from jaxglmm.coordinates import (
    block_factors,
    canonical,
    first_order,
    jacobian_in_theta,
    repivot,
)
from jaxglmm.errors import Status
from jaxglmm.plan import Block, Layout

fit = jax.jit(jg.fit, static_argnames="control")

LAYOUT = Layout(
    blocks=(Block(5, 5, (0, 2)), Block(4, 1, (1,))),
    n_chain=1,
    term_k=(3, 1, 2),
    structures=("full", "full", "diag"),
    predictors=(0, 0, 0),
)
# variances grow down the rows; the last effect of the first term is one of the others
THETAS = {
    "inside": [0.1, 0.3, -0.8, 0.4, 0.2, 2.0, 0.7, 0.5, 0.2],
    "first row empty": [0.0, 0.3, -0.8, 0.4, 0.2, 2.0, 0.7, 0.5, 0.2],
    "rank one": [0.1, 0.3, -4.0, 0.0, 0.0, 0.0, 0.7, 0.5, 0.2],
    "zero": [0.0] * 9,
}


def covariances(factors):
    return [L @ L.T for L in factors]


@jax.jit
def moved(theta):
    """Pivoted coordinates, those of theta again, Q in all three, and how L turned."""
    x, order, turns = repivot(theta, first_order(LAYOUT, theta.dtype), LAYOUT)
    back = canonical(x, order, LAYOUT)
    factors = [
        block_factors(theta, LAYOUT),
        block_factors(x, LAYOUT, order),
        block_factors(back, LAYOUT),
    ]
    turned = (factors[0][0][:3, :3] @ turns[0], factors[1][0][:3, :3])
    return x, order, back, factors[-1], [covariances(f) for f in factors], turned


@pytest.mark.parametrize("name", THETAS)
def test_coordinates_keep_q_and_put_large_pivots_first(name):
    theta = np.array(THETAS[name])
    x, _, back, factors, (expected, pivoted, again), turned = jax.tree.map(
        np.asarray, moved(theta)
    )
    np.testing.assert_allclose(*turned, atol=1e-14)
    for Q, other in zip(expected, pivoted):
        np.testing.assert_allclose(other, Q, atol=1e-14)
    pivots = np.abs([x[0], x[3], x[5]])
    assert np.all(pivots[1:] <= 2.0 * pivots[:-1])
    for Q, other, L in zip(expected, again, factors):
        np.testing.assert_allclose(other, Q, atol=1e-14)
        np.testing.assert_array_equal(np.triu(L, 1), 0.0)
        assert np.all(np.diagonal(L) >= 0)
    if name == "inside":
        np.testing.assert_allclose(back, theta, rtol=1e-12)
    if name == "first row empty":  # its column is empty too
        np.testing.assert_array_equal(back[:3], 0.0)


def test_repivoting_leaves_a_good_order_alone():
    theta = np.array([2.0, 0.3, -0.8, 1.5, 0.2, -1.0, 0.7, 0.5, 0.2])
    x, order, *_ = moved(theta)
    np.testing.assert_allclose(x, theta, rtol=1e-14)
    np.testing.assert_array_equal(order[0], np.eye(3))


def test_derivatives_in_theta_follow_the_chain_rule():
    """At a stationary point the Hessian in theta is that of f itself."""
    theta = np.array(THETAS["inside"])
    x, order, *_, (at, _, _), _ = moved(theta)
    assert not np.allclose(order[0], np.eye(3))

    def f(x, order):
        terms = [
            jnp.sum((Q - R) ** 2 * (1.0 + jnp.arange(float(Q.size)).reshape(Q.shape)))
            for Q, R in zip(covariances(block_factors(x, LAYOUT, order)), at)
        ]
        return terms[0] + terms[1]

    @jax.jit
    def derivatives(theta, x, order):
        in_x, in_theta = (
            (jax.grad(f)(*point), jax.hessian(f)(*point))
            for point in ((x, order), (theta, None))
        )
        return in_x, in_theta, jacobian_in_theta(theta, x, order, LAYOUT)

    (grad, hess), (grad_theta, hess_theta), J = derivatives(theta, x, order)
    np.testing.assert_allclose(grad @ J, grad_theta, atol=1e-10)
    np.testing.assert_allclose(J.T @ hess @ J, hess_theta, atol=1e-8)


def small_design(seed, n=40, n_levels=8, k=3):
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.arange(n) % n_levels)
    z = np.column_stack([np.ones(n), rng.normal(size=(n, k - 1))])
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    b = 0.5 * rng.normal(size=(n_levels, k))
    y = X.sum(1) + np.sum(z * b[group], axis=1) + rng.normal(size=n)
    term = jg.Term(jnp.asarray(z), jnp.asarray(group), n_levels)
    return jg.Design(jnp.asarray(y), jnp.asarray(X), (term,))


def test_small_designs_converge_with_a_first_pivot_of_zero():
    """Three effects for eight groups: most optima are singular, some in front."""
    designs = [small_design(seed) for seed in range(60, 100)]
    lanes = jax.tree.map(lambda *a: jnp.stack(a), *designs)
    out = jax.jit(jax.vmap(jg.fit))(lanes)
    assert bool(jnp.all(out.converged))
    assert int(out.n_iter.max()) < 25
    assert np.sum(np.asarray(out.status) == Status.BOUNDARY) > 20
    # a crawl along a curved valley ended 4e-3 above this
    np.testing.assert_allclose(out.objective[5], 129.97534938, atol=1e-6)


def symmetric_design():
    """Every group has a mirrored twin: the correlation is zero by symmetry."""
    rng = np.random.default_rng(0)
    x, y, group = np.linspace(-1.0, 1.0, 6), [], []
    for j in range(40):
        one = 0.25 * rng.normal() + 2.0 * rng.normal() * x + rng.normal(size=6)
        y += [one, one[::-1]]
        group += [np.full(6, 2 * j), np.full(6, 2 * j + 1)]
    z = np.column_stack([np.ones(480), np.tile(x, 80)])
    term = jg.Term(jnp.asarray(z), jnp.asarray(np.concatenate(group)))
    return jg.Design(jnp.asarray(np.concatenate(y)), jnp.ones((480, 1)), (term,))


@pytest.mark.parametrize("optimizer", ["newton", "lbfgs"])
def test_a_start_on_a_saddle_of_the_cone_is_left(optimizer):
    design, control = symmetric_design(), jg.Control(optimizer=optimizer)
    best = fit(design, start=np.array([1.0, 0.0, 1.0]), control=jg.Control())
    out = fit(design, start=np.array([0.0, 1.0, 0.0]), control=control)
    assert int(best.status) == int(out.status) == Status.CONVERGED
    assert float(best.params.theta[0]) > 0.1
    np.testing.assert_allclose(out.objective, best.objective, atol=1e-6)


def test_derivatives_where_effects_change_places():
    """Implicit derivatives in the user's order, against differences of refits."""
    rng = np.random.default_rng(3)
    group = np.arange(120) % 15
    x = rng.normal(size=120)
    z = np.column_stack([np.ones(120), x])
    b = rng.normal(size=(15, 2)) * [0.4, 3.0]
    y = 1.0 + x + np.sum(z * b[group], axis=1) + rng.normal(size=120)
    term = jg.Term(jnp.asarray(z), jnp.asarray(group))
    design = jg.Design(jnp.asarray(y), jnp.asarray(z), (term,))

    def estimates(t):
        direction = jnp.asarray(np.sin(np.arange(120.0)))
        out = jg.fit(design.replace(y=design.y + t * direction))
        at = jnp.concatenate([out.params.theta, out.params.beta])
        return at, (at, out.status)

    slope_at = jax.jit(jax.jacfwd(estimates, has_aux=True))
    slope, (at, status) = slope_at(0.0)
    assert int(status) == Status.CONVERGED
    assert abs(float(at[0])) < 0.3 * float(at[2])
    h = 1e-3
    two_up, up, down, two_down = (slope_at(t * h)[1][0] for t in (2, 1, -1, -2))
    coarse, fine = (two_up - two_down) / (4 * h), (up - down) / (2 * h)
    np.testing.assert_allclose(slope, (4 * fine - coarse) / 3, rtol=1e-6, atol=1e-8)


def test_an_effect_without_variance_has_no_column(sleepstudy):
    """Subjects' means taken out: no intercepts left, the slopes are as they were."""
    data = sleepstudy.copy()
    means = data.groupby("Subject", observed=True).Reaction.transform("mean")
    data["y"], data["D"] = data.Reaction - means, data.Days - 4.5
    m = jg.glmm("y ~ D + (D | Subject)", data)
    assert m.status == Status.BOUNDARY
    assert m.theta.iloc[0] == m.theta.iloc[1] == 0.0
    assert m.theta.iloc[2] > 0.1
    assert "variance of (Intercept) | Subject is zero" in m.verdict
    assert "correlation" not in m.verdict
    assert float(m.fit.hess[0, 0]) > 1.0  # the proof that the verdict quotes


@pytest.mark.parametrize("origin", [1e5, 1.6e9])
def test_a_slope_far_from_zero_is_fitted_as_near(sleepstudy, origin):
    near = jg.glmm("Reaction ~ Days + (Days | Subject)", sleepstudy, method="ML")
    data = sleepstudy.assign(t=origin + 3600.0 * sleepstudy.Days)
    far = jg.glmm("Reaction ~ t + (t | Subject)", data, method="ML")
    assert far.status == Status.CONVERGED
    np.testing.assert_allclose(far.loglik, near.loglik, rtol=1e-10)
    ratio = far.varcorr["sdcor"].iloc[1] / near.varcorr["sdcor"].iloc[1]
    np.testing.assert_allclose(3600.0 * ratio, 1.0, rtol=1e-4)
