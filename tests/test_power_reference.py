"""Power of a crossed design, beside lme4's fits of the same data sets one by one."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import jaxglmm as jg

HERE = Path(__file__).parent / "reference"


@pytest.fixture(scope="module")
def maker():
    """The script that made the reference: its design, truth and responses."""
    path = HERE / "power_crossed.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case():
    return json.loads((HERE / "power_crossed.json").read_text())


@pytest.fixture(scope="module")
def design(maker, case):
    assert (case["key"], tuple(case["effects"])) == (maker.KEY, maker.EFFECTS)
    return jg.design(case["formula"], maker.crossed_data())


@pytest.fixture(scope="module")
def ys(maker, case, design):
    """The responses, which must be those that lme4 fitted."""
    ys = maker.responses(design, case["n_sims"])
    draws = "the draws differ from those that lme4 fitted: run power_crossed.py again"
    np.testing.assert_allclose(ys.mean(1), case["mean"], rtol=1e-10, err_msg=draws)
    np.testing.assert_allclose(
        ys.var(1, ddof=1), case["variance"], rtol=1e-10, err_msg=draws
    )
    return ys


@pytest.mark.usefixtures("ys")
def test_power_is_that_of_fits_by_lme4(maker, case, design):
    n = case["n_sims"]
    curve = jg.power_curve(
        design, 1, key=case["key"], n_sims=n, params=maker.crossed_truth(),
        effect=case["effects"], progress=False,
    )  # fmt: skip
    z = np.array(case["estimate"]) / np.array(case["se"])
    theirs = 2.0 * stats.norm.sf(np.abs(z)).reshape(2, n)
    np.testing.assert_allclose(curve.p_values, theirs, rtol=1e-4, atol=1e-12)
    rejected = theirs <= 0.05
    np.testing.assert_array_equal(curve.p_values <= 0.05, rejected)
    for row, hits in zip(curve.to_frame().itertuples(), rejected.sum(axis=1)):
        interval = stats.binomtest(int(hits), n).proportion_ci(0.95, "exact")
        np.testing.assert_allclose(row.power, hits / n)
        np.testing.assert_allclose([row.lower, row.upper], interval, rtol=1e-12)


@pytest.mark.slow
def test_the_fits_behind_it_are_those_by_lme4(case, design, ys):
    fits = jg.fit_batch(design, ys, effects=False, progress=False)
    estimate, se = np.array(case["estimate"]), np.array(case["se"])
    assert fits.converged.all()
    np.testing.assert_allclose(-2.0 * fits.loglik, case["objective"], atol=1e-6)
    assert np.all(np.abs(fits.params.beta[:, 1] - estimate) <= 1e-5 * se)
    np.testing.assert_allclose(np.sqrt(fits.vcov_beta[:, 1, 1]), se, rtol=1e-5)
