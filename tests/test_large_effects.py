"""Random effects that dwarf the residuals, and optima beside the best one.

Data in tests/reference/faults were drawn at random; INDEX.json has the lowest -2 log L
that was found for each, by another engine from many starts.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from test_random_linear import criterion_of, fitted

import jaxglmm as jg
from jaxglmm.errors import Status

FAULTS = Path(__file__).parent / "reference" / "faults"
CASES = json.loads((FAULTS / "INDEX.json").read_text())


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-5, 1e-6, 1e-8])
def test_balanced_one_way_data_agree_with_the_closed_form(noise):
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(10), 6)
    y = rng.normal(size=10)[g] + rng.normal(size=60) * noise
    m = jg.glmm("y ~ 1 + (1 | g)", {"y": y, "g": g})
    rows = y.reshape(10, 6)
    within = np.sum((rows - rows.mean(axis=1, keepdims=True)) ** 2) / 50
    between = 6 * np.sum((rows.mean(axis=1) - y.mean()) ** 2) / 9
    assert m.status == Status.CONVERGED
    # y itself has no more digits
    rtol = max(1e-9, 1e-15 / noise)
    sd = np.sqrt([(between - within) / 6, within])
    np.testing.assert_allclose(m.varcorr.sdcor, sd, rtol=rtol)
    error = np.sqrt(between / 60)
    np.testing.assert_allclose(m.fixef, y.mean(), atol=1e-6 * error)
    np.testing.assert_allclose(m.se, error, rtol=rtol)
    again = jg.glmm("y ~ 1 + (1 | g)", {"y": y, "g": g}, start=m.theta)
    assert again.status == Status.CONVERGED
    np.testing.assert_allclose(again.varcorr.sdcor, sd, rtol=rtol)


@pytest.mark.parametrize(
    ("seed", "ratio"), [(8, 30), (6, 100), (3, 300), (1, 1e3), (2, 1e5), (5, 1e6)]
)
def test_crossed_effects_of_any_size(seed, ratio):
    rng = np.random.default_rng(seed)
    n = 400
    g, h, x = rng.integers(0, 30, n), rng.integers(0, 7, n), rng.normal(size=n)
    y = x + ratio * (rng.normal(size=30)[g] + rng.normal(size=7)[h])
    y = y + rng.normal(size=n)
    m = jg.glmm("y ~ x + (1 | g) + (1 | h)", {"y": y, "x": x, "g": g, "h": h})
    assert m.status == Status.CONVERGED
    assert_at_minimum(m, True)


def assert_at_minimum(m, reml):
    """The value is right, and no other point nearby is lower."""
    criterion, theta = criterion_of(m.design, reml), m.theta.to_numpy()
    at = criterion(theta)
    np.testing.assert_allclose(m.fit.objective, at, atol=1e-6, rtol=1e-12)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(10):
            moved = theta * np.exp(size * rng.normal(size=len(theta)))
            assert criterion(moved) > at - 1e-6


def test_slopes_constant_within_groups_and_a_mean_far_from_zero():
    rng = np.random.default_rng(1)
    g = np.arange(1320) % 30
    x = rng.normal(size=30)[g]
    y = x + 20 * rng.normal(size=30)[g] + rng.normal(size=1320)
    m = jg.glmm("y ~ x + (1 + x | g)", {"y": y, "x": x, "g": g})
    assert m.converged
    assert_at_minimum(m, True)
    rng = np.random.default_rng(7)
    g, h = rng.integers(0, 30, 200), rng.integers(0, 7, 200)
    y = 1000 + rng.normal(size=30)[g] + rng.normal(size=7)[h] + rng.normal(size=200)
    m = jg.glmm("y ~ 0 + (1 | g) + (1 | h)", {"y": y, "g": g, "h": h})
    assert m.status == Status.CONVERGED
    assert_at_minimum(m, True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_no_fit_ends_above_what_is_known_to_be_lower(case):
    data = pd.read_csv(FAULTS / case["file"])
    m = fitted(case["formula"], data, **case["arguments"])
    assert m.converged
    # the two optima of this one differ by 4; its lowest is at the end of theta
    atol = 1e-3 if case["file"] == "glmm_47.csv" else 1e-4
    assert float(m.fit.objective) < case["minus_two_loglik_best_found"] + atol
    assert f"the best of {m.n_starts} starts" in m.verdict or m.n_starts == 1
    if case["file"].startswith("lmm"):
        at = criterion_of(m.design, case["arguments"]["method"] == "REML")
        np.testing.assert_allclose(m.fit.objective, at(m.theta), atol=1e-5)


def test_a_zero_found_at_the_first_try_is_not_the_last_word():
    rng = np.random.default_rng(29)
    g = rng.integers(0, 7, 100)
    x = rng.normal(size=7)[g]
    y = rng.normal(size=100) + rng.normal(size=7)[g]
    m = jg.glmm("y ~ x + (x || g)", {"x": x, "g": g, "y": y}, method="ML")
    criterion = criterion_of(m.design, False)
    grid = np.linspace(0.0, 3.0, 31)
    lowest = min(criterion(np.array([a, b])) for a in grid for b in grid)
    assert float(m.fit.objective) <= lowest + 1e-6
    assert m.n_starts == 11


def test_a_start_may_give_all_parameters():
    rng = np.random.default_rng(3)
    g, x = np.arange(60) % 12, rng.normal(size=60)
    rate = np.exp(1 + 0.5 * x + 0.4 * rng.normal(size=12)[g])
    y = rng.poisson(rate * rng.gamma(2.0, 0.5, 60))
    data = {"y": y, "x": x, "g": g}
    formula = "y ~ x + (1 | g)"
    m = jg.glmm(formula, data, family="nbinom2")
    again = jg.glmm(formula, data, family="nbinom2", start=m.fit.params)
    assert int(again.fit.n_iter) < int(m.fit.n_iter)
    np.testing.assert_allclose(again.fit.objective, m.fit.objective, atol=1e-6)
    inside = jg.fit(again.design, "nbinom2", start=m.fit.params)
    np.testing.assert_allclose(inside.objective, m.fit.objective, atol=1e-6)
    poisson = {**data, "y": rng.poisson(rate)}  # theta runs to its end
    m = jg.glmm(formula, poisson, family="nbinom2")
    again = jg.glmm(formula, poisson, family="nbinom2", start=m.fit.params)
    assert m.status == again.status == Status.LIMIT
    wrong = m.fit.params.replace(beta=np.zeros(3))
    with pytest.raises(jg.DesignError, match=r"params.beta must have shape \(2,\)"):
        jg.glmm(formula, data, family="nbinom2", start=wrong)


# ---- the boundary ------------------------------------------------------------------


def glm_errors(X, k, trials):
    """Standard errors of a logistic regression, by Newton's method."""
    beta = np.zeros(X.shape[1])
    for _ in range(30):
        mu = 1 / (1 + np.exp(-X @ beta))
        H = (X * (trials * mu * (1 - mu))[:, None]).T @ X
        beta = beta + np.linalg.solve(H, X.T @ (k - trials * mu))
    return np.sqrt(np.diagonal(np.linalg.inv(H)))


@pytest.mark.parametrize("seed", range(4))
def test_standard_errors_without_random_effects_are_those_of_the_glm(seed):
    rng = np.random.default_rng(seed)
    n = 96
    x1, x2, a = rng.normal(size=n), rng.normal(size=n), np.arange(n) % 12
    k = rng.binomial(10, 0.4, n)
    data = {"x1": x1, "x2": x2, "a": a, "k": k, "m": 10 - k}
    m = jg.glmm("cbind(k, m) ~ x1 + x2 + (x1 | a)", data, family="binomial")
    assert np.isfinite(m.se).all()
    if np.max(np.abs(m.theta)) < 1e-6:
        X = np.column_stack([np.ones(n), x1, x2])
        np.testing.assert_allclose(m.se, glm_errors(X, k, 10), rtol=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_one_sided_derivatives_at_zero_are_those_of_the_criterion(k):
    rng = np.random.default_rng(k)
    n = 96
    x, z, a = 3 * rng.normal(size=n), rng.normal(size=n), np.arange(n) % 12
    # groups more alike than chance has them: no variance at all
    y = rng.normal(size=n)
    basis = np.column_stack([np.ones(n), x, z])[:, :k]
    for level in range(12):
        Z = basis[a == level]
        y[a == level] -= Z @ np.linalg.lstsq(Z, y[a == level], rcond=None)[0]
    effects = "x" if k == 2 else "x + z"
    m = jg.glmm(f"y ~ x + ({effects} | a)", {"y": y, "x": x, "z": z, "a": a})
    assert m.status == Status.BOUNDARY
    np.testing.assert_allclose(m.theta, 0.0, atol=1e-6)
    criterion, step = criterion_of(m.design, True), 1e-3
    zero = criterion(np.zeros(len(m.theta)))
    for i, e in enumerate(np.eye(len(m.theta)) * step):
        slope = (criterion(e) - zero) / step**2
        np.testing.assert_allclose(0.5 * m.fit.hess[i, i], slope, rtol=1e-3)


# ---- what a design tells apart -----------------------------------------------------


def test_saturated_models_are_called_that():
    rng = np.random.default_rng(23)
    g, x = np.array([0, 0, 0, 1, 1, 1]), rng.normal(size=6)
    found = set()
    for seed in range(60):
        y = np.random.default_rng(100 + seed).normal(size=6)
        m = fitted("y ~ x + (1 + x + I(x^2) | g)", {"y": y, "x": x, "g": g})
        if m.status in (Status.MAX_ITER, Status.STALLED, Status.NONFINITE):
            found.add(m.status)
            assert "reproduce any response of 6 rows" in m.verdict
            assert "another start=" not in m.verdict
    assert found


def test_one_effect_a_row_is_told_from_residuals_where_designs_differ():
    rng = np.random.default_rng(0)
    n = 200
    x, w, g = rng.uniform(0.2, 3, n), rng.uniform(0.1, 5, n), np.arange(n)
    y = rng.normal(size=n) * x * 2 + rng.normal(size=n)
    m = jg.glmm("y ~ 1 + (0 + x | g)", {"y": y, "x": x, "g": g}, method="ML")
    assert_normal(m, x**2, np.ones(n))
    y = rng.normal(size=n) / np.sqrt(w) + rng.normal(size=n)
    m = jg.glmm("y ~ 1 + (1 | g)", {"y": y, "g": g}, weights=w, method="ML")
    assert_normal(m, np.ones(n), w)
    for weights in (None, np.full(n, 2.0)):
        with pytest.raises(jg.FormulaError, match="told from the residuals"):
            jg.glmm("y ~ 1 + (1 | g)", {"y": y, "g": g}, weights=weights)
    sign = np.where(x > 1, 1.0, -1.0)
    with pytest.raises(jg.FormulaError, match="told from the residuals"):
        jg.glmm("y ~ 1 + (0 + x | g)", {"y": y, "x": sign, "g": g})


def assert_normal(m, square, w):
    """Independent rows: a normal density of variance sigma^2 (1 / w + theta^2 x^2)."""
    assert m.status == Status.CONVERGED
    y = m.design.y

    def minus_2(theta):
        v = 1 / w + theta**2 * square
        mean = np.sum(y / v) / np.sum(1 / v)
        sigma2 = np.mean((y - mean) ** 2 / v)
        return np.sum(np.log(v)) + len(y) * (1 + np.log(2 * np.pi * sigma2))

    at = minus_2(float(m.theta.iloc[0]))
    np.testing.assert_allclose(m.fit.objective, at, rtol=1e-10)
    lowest = min(minus_2(t) for t in np.geomspace(0.01, 100, 2000))
    assert at <= lowest + 1e-6


def test_derivatives_through_fits_with_large_effects():
    rng = np.random.default_rng(4)
    g = np.arange(60) % 10
    y = 300 * rng.normal(size=10)[g] + rng.normal(size=60)
    design = jax.tree.map(
        jax.numpy.asarray, jg.glmm("y ~ 1 + (1 | g)", {"y": y, "g": g}).design
    )

    def theta(y):
        return jg.fit(design.replace(y=y)).params.theta[0]

    grad = jax.grad(theta)(design.y)
    step = np.zeros(60)
    step[7] = 1e-3
    slope = (theta(design.y + step) - theta(design.y - step)) / 2e-3
    np.testing.assert_allclose(grad[7], slope, rtol=1e-4)
