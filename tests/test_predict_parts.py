"""Predictions of models with several linear predictors, on old and new data."""

import dataclasses

import jax
import numpy as np
import pytest
from test_generalized import arguments
from test_reference import read

import jaxglmm as jg
from jaxglmm.errors import DataError

CASES = [
    pytest.param("salamanders_hurdle_poisson", marks=pytest.mark.slow),
    pytest.param("salamanders_nb2_disp", marks=pytest.mark.slow),
    pytest.param("salamanders_zip", marks=pytest.mark.slow),
    "salamanders_zire",
]


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
    if case["family"] != "nbinom2":  # theirs, through zi and a truncated mean
        theirs = case["fitted"]
        np.testing.assert_allclose(m.fitted.iloc[: len(theirs)], theirs, rtol=1e-4)
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
        fit = dataclasses.replace(m.fit, params=params)
        moved = dataclasses.replace(m, fit=fit)
        return moved.predict(new, re="population", type=type).to_numpy()

    h, eye = 1e-5, np.eye(len(x))
    J = np.stack([(at(x + h * e) - at(x - h * e)) / (2 * h) for e in eye], axis=1)
    se = np.sqrt(np.einsum("ij,jk,ik->i", J, m.fit.vcov, J))
    np.testing.assert_allclose(out["fit"], at(x), rtol=1e-12)
    np.testing.assert_allclose(out["se"], se, rtol=1e-5)


@pytest.mark.slow
def test_a_mean_without_the_dispersion_needs_no_covariates_of_it(models):
    _, data, m = models("salamanders_nb2_disp")
    new = data.drop(columns="DOY").iloc[:9]
    np.testing.assert_allclose(m.predict(new), m.fitted.iloc[:9], rtol=1e-10)
    _, data, m = models("salamanders_zire")
    new = data.drop(columns="mined").iloc[:9]
    with pytest.raises(DataError, match="mined"):
        m.predict(new)


def test_population_and_unseen_levels(zire):
    data, m = zire
    new = data.iloc[[0, 100, 400]].assign(site="elsewhere")
    mean = np.exp(m.predict(new, type="link", re="population"))
    zeros = logistic(m.fixef_zi.iloc[0])
    population = m.predict(new.drop(columns="site"), re="population")
    np.testing.assert_allclose(population, (1.0 - zeros) * mean, rtol=1e-12)
    np.testing.assert_allclose(m.predict(new), population, rtol=1e-12)
    with pytest.raises(DataError, match=r"site: elsewhere\)"):
        m.predict(new, new_levels="error")
    np.testing.assert_allclose(
        m.predict(data, new_levels="error"), m.fitted, rtol=1e-10
    )


def test_draws_for_unseen_levels_reach_every_predictor(zire):
    data, m = zire
    names = [f"new {i}" for i in range(4000)]
    new = data.iloc[np.zeros(8000, int)].assign(site=np.repeat(names, 2))
    drawn = m.predict(new, new_levels="draw", key=1).to_numpy().reshape(-1, 2)
    np.testing.assert_array_equal(drawn[:, 0], drawn[:, 1])  # one draw per level
    link = m.predict(new, type="link", new_levels="draw", key=1).to_numpy()[::2]
    zi = np.log(np.exp(link) / drawn[:, 0] - 1.0)  # the zi predictor behind a mean
    sd = [float(Lam[0, 0]) for Lam in m.factors]
    eta = m.predict(new, type="link").to_numpy()[0]
    for values, centre, size in ((link, eta, sd[0]), (zi, m.fixef_zi.iloc[0], sd[1])):
        se = size / np.sqrt(4000)
        assert abs(values.mean() - centre) < 4.0 * se
        assert abs(values.std() / size - 1.0) < 4.0 / np.sqrt(2 * 4000)
    assert abs(np.corrcoef(link, zi)[0, 1]) < 4.0 / np.sqrt(4000)
    again = m.predict(new, new_levels="draw", key=jax.random.key(1))
    assert again.notna().all()
    with pytest.raises(ValueError, match="needs key="):
        m.predict(new, new_levels="draw")


def test_missing_covariates_of_any_predictor_give_nan(models):
    _, data, m = models("salamanders_zire")
    new = data.iloc[:4].astype({"mined": object})
    new.loc[new.index[1], "mined"] = np.nan
    out = m.predict(new, re="population", se=True)
    assert list(out["fit"].isna()) == [False, True, False, False]
    assert list(out["se"].isna()) == [False, True, False, False]


def test_conditional_standard_errors_are_refused(zire):
    data, m = zire
    with pytest.raises(ValueError, match="use re='population'"):
        m.predict(data, se=True)


@pytest.mark.slow
def test_offsets_of_every_predictor():
    """An offset in zi counts, and new data need its column."""
    rng = np.random.default_rng(3)
    n, g = 200, np.repeat(np.arange(20), 10)
    e, f = rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)
    eta = 1.0 + e + 0.6 * rng.normal(size=20)[g]
    y = np.where(rng.random(n) < logistic(f - 1.0), 0, rng.poisson(np.exp(eta)))
    data = {"y": y.astype(float), "g": g, "e": e, "f": f}
    m = jg.glmm(
        "y ~ 1 + offset(e) + (1 | g)", data, family="poisson", zi="~ 1 + offset(f)"
    )
    new = {"e": [0.5, 0.5], "f": [0.0, 2.0]}
    mean = np.exp(m.fixef.iloc[0] + 0.5)
    zeros = logistic(m.fixef_zi.iloc[0] + np.array([0.0, 2.0]))
    out = m.predict(new, re="population")
    np.testing.assert_allclose(out, (1.0 - zeros) * mean, rtol=1e-12)
    np.testing.assert_allclose(m.predict(data), m.fitted, rtol=1e-10)
    with pytest.raises(DataError, match="f"):
        m.predict({"e": [0.5]}, re="population")
