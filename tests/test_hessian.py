"""The Laplace approximation's Hessian as written out, against differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxglmm as jg
from jaxglmm import covariance
from jaxglmm.generalized import first_point, inner_rows
from jaxglmm.laplace import GeneralizedModel
from jaxglmm.studies.batch import check_batch

# a structure whose factor is no linear function of its parameters
BENT = jg.Structure(
    "bent",
    lambda k: 2,
    lambda theta, k: (
        jnp.exp(theta[0])
        * (
            jnp.eye(k, dtype=theta.dtype)
            + jnp.tanh(theta[1]) * jnp.tri(k, k=-1, dtype=theta.dtype)
        )
    ),
    lambda k: (0.1, 0.2),
)


@pytest.fixture(autouse=True)
def bent(monkeypatch):
    monkeypatch.setitem(covariance._REGISTRY, BENT.name, BENT)


def _prior(params):
    return -jnp.sum(params.beta**4) - params.theta[0] ** 3


MODELS = {
    "logit": ("y ~ x + (1 | a)", "binomial", False, None, {}),
    "probit, reml": ("y ~ x + (1 | a)", jg.Binomial("probit"), True, None, {}),
    "slopes, prior": ("n ~ x + (x | a)", "poisson", False, _prior, {}),
    "crossed, psi, reml": ("n ~ x + (x | a) + (1 | b)", "nbinom2", True, None, {}),
    "two predictors": ("n ~ x + (1 | a)", "poisson", False, None, {"zi": "~ x"}),
    "bent, nested": ("n ~ x + bent(x | a) + (1 | a:c)", "poisson", False, None, {}),
}


@pytest.fixture(scope="module")
def data():
    import pandas as pd

    rng = np.random.default_rng(5)
    a = np.repeat(np.arange(12), 8)
    x = rng.normal(size=96)
    eta = 0.4 + 0.3 * x + rng.normal(size=12)[a]
    return pd.DataFrame(
        {
            "x": x,
            "a": a,
            "b": np.arange(96) % 7,
            "c": np.arange(96) % 2,
            "n": rng.poisson(np.exp(eta)),
            "y": (rng.uniform(size=96) < 1 / (1 + np.exp(-eta))).astype(float),
        }
    )


@pytest.mark.parametrize("name", MODELS)
def test_hessian_is_that_of_the_objective(data, name):
    formula, family, reml, prior, more = MODELS[name]
    if more:
        fitted = jg.glmm(formula, data, family=family, **more)
        design, family = fitted.design, fitted.family
    else:
        design = jg.design(formula, data)
    what, design = check_batch(design, family, None, None, None, None)
    family = what.family

    @jax.jit
    def both(design):
        rows, _ = inner_rows(design, family)
        model = GeneralizedModel(design.layout, family, False, 1, reml, prior)
        start = first_point(model, rows)
        point, beta = start.point, start.point.beta[0]
        if reml:
            point = point._replace(beta=(beta[:0], *point.beta[1:]))
        x = model.join(point)
        x = x + 0.1 * jnp.cos(jnp.arange(x.shape[0], dtype=x.dtype))
        x, frame = model.reframe(x, model.first_frame(x, start.u, beta), rows)
        fn, _ = model.derivatives(rows)
        value, grad, hess, found = fn(x, frame)

        def objective(x):
            return model.objective(x, frame, rows)

        plain = objective(x), jax.grad(objective)(x), jax.hessian(objective)(x)
        mode = jax.jacfwd(lambda x: model.mode(x, frame, rows))(x)
        turned = jax.tree.map(lambda v: jnp.moveaxis(v, -1, 0), mode)
        return (value, grad, hess), plain, found.follow, turned

    with jax.enable_x64(True):
        ours, plain, follow, mode = jax.tree.map(np.asarray, both(design))
    for got, wanted in zip(ours, plain):
        scale = np.max(np.abs(wanted))
        np.testing.assert_allclose(got, wanted, atol=1e-9 * scale)
    for got, wanted in zip(jax.tree.leaves(follow), jax.tree.leaves(mode)):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
