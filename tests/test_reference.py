"""Every fit under tests/reference: at its parameters, and at our optimum."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import jaxglmm as jg

HERE = Path(__file__).parent / "reference"
CASES = sorted(p.stem for p in (HERE / "cases").glob("*.json"))


def read(name, folder="cases"):
    """A case, its data as R saw them, and the arguments of the fit."""
    case = json.loads((HERE / folder / f"{name}.json").read_text())
    factors = {
        k: v for k, v in case["columns"].items() if v["kind"] in ("factor", "ordered")
    }
    data = pd.read_csv(
        HERE / case["data_file"],
        na_values=["NA"],
        keep_default_na=False,
        dtype=dict.fromkeys(factors, str),
    )
    contrasts = {}
    for column, spec in factors.items():
        if spec.get("levels"):
            data[column] = pd.Categorical(
                data[column], spec["levels"], ordered=spec["kind"] == "ordered"
            )
        if spec.get("contrasts"):
            contrasts[column] = spec["contrasts"].removeprefix("contr.")
    options = {k: case[k] for k in ("weights", "offset") if case.get(k)}
    return case, data, {"contrasts": contrasts, **options}


@pytest.fixture(scope="module", params=CASES)
def fitted(request):
    case, data, options = read(request.param)
    model = jg.glmm(case["formula"], data, method=case["method"], **options)
    return case, model, data, options


def spread(values):
    """Standard deviation, or one where there is none."""
    size = float(np.std(values))
    return size if size > 1e-10 else 1.0


def test_loglik_at_the_reference_parameters(fitted):
    case, _, data, options = fitted
    design = jg.design(case["formula"], data, **options)
    params = jg.Params(
        beta=np.array(list(case["fixef"].values())),
        theta=np.array(case["theta"], float),
        sigma=np.float64(case["sigma"]),
    )
    ours = float(jg.loglik(params, design, method=case["method"]))
    np.testing.assert_allclose(ours, case["loglik"], rtol=1e-8)


def test_optimum_is_never_worse(fitted):
    case, model, _, _ = fitted
    assert model.converged
    assert model.is_singular == case["singular"]
    assert model.loglik >= case["loglik"] - 1e-6
    np.testing.assert_allclose(model.aic, case["AIC"], rtol=1e-8)
    np.testing.assert_allclose(model.bic, case["BIC"], rtol=1e-8)
    assert model.df == case["df"]
    assert model.n_obs == case["n_obs"]
    assert model.n_groups == case["groups"]


def test_estimates(fitted):
    case, model, _, _ = fitted
    se = np.array(list(case["fixef_se"].values()))
    assert list(model.fixef.index) == list(case["fixef"])
    np.testing.assert_allclose(
        model.fixef.to_numpy() / se,
        np.array(list(case["fixef"].values())) / se,
        atol=1e-2,
        rtol=0,
    )
    np.testing.assert_allclose(model.se.to_numpy(), se, rtol=1e-5)
    np.testing.assert_allclose(
        model.vcov.to_numpy(), case["vcov_beta"], rtol=1e-4, atol=1e-10
    )
    # the Hessian of -2 log L gives theta's standard errors
    theta = np.array(case["theta"], float)
    theta_se = np.sqrt(2.0 / np.maximum(np.diagonal(model.fit.hess), 1e-30))
    gap = np.abs(model.theta.to_numpy() - theta) / theta_se
    assert np.max(gap) < 1e-2
    np.testing.assert_allclose(model.sigma, case["sigma"], rtol=1e-6)


def test_varcorr(fitted):
    case, model, _, _ = fitted
    for reference, term, Lam in zip(case["varcorr"], model.frame.terms, model.factors):
        assert reference["group"] == term.group_name
        cov = np.array(reference["cov"])
        np.testing.assert_allclose(
            model.sigma**2 * Lam @ Lam.T, cov, rtol=1e-5, atol=1e-6 * cov.max() + 1e-12
        )


def test_random_effects_and_fitted_values(fitted):
    case, model, _, _ = fitted
    for group, levels in case["ranef"].items():
        theirs = pd.DataFrame(levels).T.astype(float)
        ours = model.ranef[group].copy()
        ours.index = ours.index.astype(str)
        ours = ours.loc[theirs.index, theirs.columns].to_numpy()
        scale = spread(theirs.to_numpy())
        np.testing.assert_allclose(ours, theirs.to_numpy(), atol=1e-5 * scale, rtol=0)
    head = np.array(case["fitted"])
    ours = model.fitted.to_numpy()[: len(head)]
    np.testing.assert_allclose(ours, head, atol=1e-5 * spread(head), rtol=0)


def test_conditional_variances(fitted):
    case, model, _, _ = fitted
    if not case.get("cond_var"):
        pytest.skip("the reference has no conditional variances")
    for group, levels in case["cond_var"].items():
        names = list(model.ranef[group].columns)
        index = [str(x) for x in model.ranef[group].index]
        for level, theirs in levels.items():
            ours = model.ranef_cov[group][index.index(level)]
            blocks = theirs if isinstance(theirs, dict) else {None: theirs}
            for effect, block in blocks.items():
                # one block per term where a factor has several
                at = slice(None) if effect is None else [names.index(effect)]
                part = ours[at][:, at]
                np.testing.assert_allclose(
                    part, block, rtol=1e-5, atol=1e-5 * np.max(np.abs(block)) + 1e-12
                )
