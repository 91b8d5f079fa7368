"""Directions of a flat likelihood: who has a standard error, and what the verdict says.

The groups hold the same responses, so that their variance is zero and the standard
errors are those of the GLM, made here by IRLS on the columns that are identified.
"""

import numpy as np
import pandas as pd
import pytest

import jaxglmm as jg
from jaxglmm import ConvergenceWarning, Status

CELLS = [(0, 0), (1, 0), (0, 1), (1, 1)]
FORMULA = "y ~ arm * t + (1 | g)"
SEPARATED = pytest.warns(ConvergenceWarning, match="rises for ever along")


def table(by_cell, n_groups=8):
    """The responses of every cell (arm, t), again in every group."""
    rows = [(a, t, y) for (a, t), ys in by_cell.items() for y in ys]
    d = pd.DataFrame(rows * n_groups, columns=["arm", "t", "y"]).astype(float)
    return d.assign(g=np.repeat(np.arange(n_groups), len(rows)))


def full_rows(arm, t):
    arm, t = np.asarray(arm, float), np.asarray(t, float)
    return np.column_stack([np.ones(len(arm)), arm, t, arm * t])


def irls(X, y, variance, mean):
    """Coefficients and covariance of a GLM with canonical link."""
    beta = np.zeros(X.shape[1])
    for _ in range(50):
        mu = mean(X @ beta)
        W = variance(mu)
        beta = beta + np.linalg.solve(X.T @ (W[:, None] * X), X.T @ (y - mu))
    return beta, np.linalg.inv(X.T @ (variance(mean(X @ beta))[:, None] * X))


def means_of_cells(d, empty, variance, mean):
    """Linear predictor and its standard error, in the cells that are not at an edge."""
    kept = [c for c in CELLS if c != empty]
    used = d[[(a, t) in kept for a, t in zip(d.arm, d.t)]]
    X = np.column_stack([(used.arm == a) & (used.t == t) for a, t in kept]) * 1.0
    beta, cov = irls(X, used.y.to_numpy(), variance, mean)
    return kept, beta, np.sqrt(np.diagonal(cov))


KINDS = {
    "poisson": (lambda mu: mu, np.exp, 0, [1, 2, 3, 4], [0, 2, 2, 5]),
    "binomial": (
        lambda p: p * (1 - p), lambda e: 1 / (1 + np.exp(-e)), 1, [0, 1, 1], [0, 0, 1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("empty", CELLS)
def test_determined_combinations_keep_their_standard_errors(family, empty):
    variance, mean, edge, some, others = KINDS[family]
    ys = {c: some if sum(c) == 1 else others for c in CELLS}
    d = table({**ys, empty: [edge] * 3})
    with SEPARATED:
        m = jg.glmm(FORMULA, d, family=family)
    assert m.status == Status.SEPARATED
    # a coefficient is determined if no part of it lies along the row of the empty cell
    kept, eta, se = means_of_cells(d, empty, variance, mean)
    rows = full_rows(*np.transpose(kept))
    away = np.linalg.svd(rows)[2][-1]
    flat = np.abs(away) > 1e-8
    np.testing.assert_array_equal(np.isnan(m.se), flat)
    np.testing.assert_array_equal(np.isnan(m.confint()).any(axis=1), flat)
    np.testing.assert_array_equal(np.isnan(np.diagonal(m.vcov)), flat)
    fixed = m.tidy().query("effect == 'fixed'")
    np.testing.assert_array_equal(np.isnan(fixed["statistic"]), flat)
    assert str(m).count(" NA ") >= flat.sum()
    # the others, from the GLM of the cells
    back = np.linalg.pinv(rows)
    by_cell = np.sqrt(np.diagonal(back @ np.diag(se**2) @ back.T))
    np.testing.assert_allclose(m.se[~flat], by_cell[~flat], rtol=1e-4)
    # and the predictions of cells
    new = pd.DataFrame(CELLS, columns=["arm", "t"])
    out = m.predict(new, re="population", type="link", se=True)
    at = [CELLS.index(c) for c in kept]
    np.testing.assert_allclose(out["fit"].iloc[at], eta, atol=1e-5)
    np.testing.assert_allclose(out["se"].iloc[at], se, rtol=1e-4)
    assert np.isnan(out["se"].iloc[CELLS.index(empty)])
    out = m.predict(new, re="population", se=True)
    slope = variance(mean(eta))
    np.testing.assert_allclose(out["se"].iloc[at], slope * se, rtol=1e-3)
    assert np.isnan(out["se"].iloc[CELLS.index(empty)])


def test_two_empty_cells_are_found_though_one_would_do():
    d = table({(0, 0): [0, 0, 0], (1, 0): [0] * 30, (0, 1): [1, 2], (1, 1): [1, 3]})
    with SEPARATED:
        m = jg.glmm(FORMULA, d, family="poisson")
    # what is left is t = 1: intercept + t, and arm + arm:t
    assert np.isnan(m.se).all()
    new = pd.DataFrame(CELLS, columns=["arm", "t"])
    se = m.predict(new, re="population", type="link", se=True)["se"]
    np.testing.assert_array_equal(np.isnan(se), [True, True, False, False])
    np.testing.assert_allclose(se[2], np.sqrt(1 / (8 * 3)), rtol=1e-4)
    np.testing.assert_allclose(se[3], np.sqrt(1 / (8 * 4)), rtol=1e-4)


@pytest.mark.parametrize("family", ["poisson", "truncated_poisson"])
def test_parts_for_zeros_keep_their_standard_errors(family):
    """Of the logit of a cell's zeros: sqrt(1 / zeros + 1 / others), as in a hurdle."""
    hurdle = family == "truncated_poisson"
    some = [0, 0, 0, 1, 2, 3, 4] if hurdle else [0, 0, 0, 7, 8, 9, 12]
    flat = [0, 0, 1, 1, 1] if hurdle else [0, 0, 0, 0]
    d = table({(0, 0): flat, (1, 0): some, (0, 1): some, (1, 1): some})
    zi = "~ arm" if hurdle else "~ 1"
    with SEPARATED:
        m = jg.glmm(FORMULA, d, family=family, zi=zi)
    assert np.isnan(m.se).all()
    se = m.se_other("zi")
    if hurdle:
        zeros, rest = 8 * (2 + 3), 8 * (3 + 4)
        expected = np.sqrt(1 / zeros + 1 / rest)
        np.testing.assert_allclose(se["(Intercept)"], expected, rtol=1e-4)
    assert np.isfinite(se).all()


def test_thresholds_that_run_away_have_no_standard_error():
    """In the reference cell all are in the lowest category."""
    some = [0, 1, 1, 2, 2]
    d = table({(0, 0): [0] * 4, (1, 0): some, (0, 1): [0, 0, 1, 2], (1, 1): some})
    d["y"] = pd.Categorical(d["y"].astype(int), ordered=True)
    with SEPARATED:
        m = jg.glmm(FORMULA, d, family="cumulative")
    assert np.isnan(m.se).all()  # arm, t and arm:t, all against the reference cell
    assert np.isnan(m.dispersion_se).all()
    new = pd.DataFrame(CELLS, columns=["arm", "t"])
    se = m.predict(new, re="population", se=True)["se"]
    np.testing.assert_array_equal(np.isnan(se), [True, False, False, False])
    # without the reference cell the others are as certain
    rest = d[(d.arm == 1) | (d.t == 1)].assign(g=lambda r: r.g)
    other = jg.glmm("y ~ t + arm:t + (1 | g)", rest, family="cumulative")
    again = other.predict(new.iloc[1:], re="population", se=True)["se"]
    np.testing.assert_allclose(se[1:], again, rtol=1e-3)
