"""Predictions of models with several linear predictors, on old and new data."""

import jax
import numpy as np
import pandas as pd
import pytest
from test_generalized import arguments
from test_reference import read

import jaxglmm as jg
from jaxglmm.errors import DataError

CASES = [
    "salamanders_hurdle_poisson",
    "salamanders_nb2_disp",
    "salamanders_zip",
    "salamanders_zire",
]
N_FITTED = 60  # rows compared with glmmTMB one by one


def logistic(x):
    return 1.0 / (1.0 + np.exp(-x))


@pytest.fixture(scope="module")
def models():
    """Fits by case, each made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            case, data, options = read(name, "generalized")
            model = jg.glmm(case["formula"], data, **options, **arguments(case))
            made[name] = case, data, model
        return made[name]

    return get


@pytest.fixture(scope="module")
def zire(models):
    return models("salamanders_zire")[1:]


@pytest.mark.parametrize("name", CASES)
def test_predictions_on_the_fitted_rows_are_the_fitted_values(models, name):
    case, data, m = models(name)
    np.testing.assert_allclose(m.predict(data), m.fitted, rtol=1e-10)
    np.testing.assert_allclose(m.predict(), m.fitted, rtol=1e-10)
    np.testing.assert_allclose(m.predict(data, type="link"), m._eta[:, 0], rtol=1e-10)
    theirs = np.array(case["fitted"][:N_FITTED])
    np.testing.assert_allclose(m.fitted.iloc[:N_FITTED], theirs, rtol=1e-4)
    some = data.iloc[[300, 7, 41]]
    again = m.predict(some)
    np.testing.assert_allclose(again, m.fitted.loc[some.index], rtol=1e-10)
    assert list(again.index) == list(some.index)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("type", ["response", "link"])
def test_standard_errors_follow_the_delta_method(models, name, type):
    """Against differences of the prediction in every estimate."""
    _, data, m = models(name)
    new = data.iloc[[0, 99, 343, 501]]
    out = m.predict(new, re="population", type=type, se=True)
    p = m.fit.params
    x = np.concatenate([p.beta, *p.others, p.theta, p.psi])
    cuts = np.cumsum([len(p.beta), *(len(c) for c in p.others), len(p.theta)])

    def at(x):
        beta, *others, theta, psi = np.split(x, cuts)
        params = p.replace(beta=beta, others=tuple(others), theta=theta, psi=psi)
        fit = m.fit.__class__(**{**vars(m.fit), "params": params})
        moved = type_of(m)(**{**fields(m), "fit": fit})
        return moved.predict(new, re="population", type=kind).to_numpy()

    type_of, kind = m.__class__.__class__.__call__, type  # the class makes the copy
    type_of = lambda m: m.__class__  # noqa: E731
    h, eye = 1e-5, np.eye(len(x))
    J = np.stack([(at(x + h * e) - at(x - h * e)) / (2 * h) for e in eye], axis=1)
    se = np.sqrt(np.einsum("ij,jk,ik->i", J, m.fit.vcov, J))
    np.testing.assert_allclose(out["se"], se, rtol=1e-5)
    np.testing.assert_allclose(out["fit"], at(x), rtol=1e-12)


def fields(m):
    return {f: getattr(m, f) for f in m.__dataclass_fields__}
