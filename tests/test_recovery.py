"""Simulation studies: who recovers the parameters that the data were drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from test_reference import HERE

import jaxglmm as jg

TRUTH = jg.Params(
    beta=np.array([0.1, 0.1]),
    theta=np.sqrt(0.1) * np.array([1.0, 0.25, np.sqrt(1 - 0.25**2)]),
    sigma=np.float64(1.0),
    psi=np.zeros(0),
)


def study(n_sims):
    """Bias of the variances and of beta, with Monte Carlo errors, by method."""
    data = pd.read_csv(HERE / "data" / "seed_sleepstudy_design.csv")
    design = jg.design("count ~ Days + (Days | Subject)", data)
    keys = jax.random.split(jax.random.key(20240101), n_sims)
    draw = lambda key: jg.simulate(key, TRUTH, design, jg.Poisson())
    ys = jax.jit(jax.vmap(draw))(keys)
    out = {}
    for method in ("PQL", "Laplace"):

        def one(y, method=method):
            fit = jg.fit(design.replace(y=y), jg.Poisson(), method)
            t = fit.params.theta
            variances = jnp.stack([t[0] ** 2, t[1] ** 2 + t[2] ** 2])
            return jnp.concatenate([variances, fit.params.beta]), fit.converged

        values, ok = jax.jit(jax.vmap(one))(ys)
        values, ok = np.asarray(values), np.asarray(ok)
        assert ok.mean() > 0.97, method
        errors = values[ok] - np.array([0.1, 0.1, 0.1, 0.1])
        out[method] = errors.mean(axis=0), errors.std(axis=0) / np.sqrt(ok.sum())
    return out


@pytest.mark.recovery
@pytest.mark.slow
@pytest.mark.parametrize("n_sims", [1000])
def test_laplace_is_less_biased_than_pql(n_sims):
    found = study(n_sims)
    bias = {method: np.abs(mean[[1, 3]]) for method, (mean, _) in found.items()}
    assert np.all(bias["Laplace"] < bias["PQL"]), found
