"""Directions of a flat likelihood: who has a standard error, and what the verdict says.

The groups hold the same responses, so that their variance is zero and the standard
errors are those of the GLM, made here by IRLS on the columns that are identified.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

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
    none = np.isnan(se).to_numpy()
    np.testing.assert_array_equal(none.any(axis=1), [True, False, False, False])
    assert none[0].all()  # of no level
    # without the reference cell the others are as certain
    rest = d[(d.arm == 1) | (d.t == 1)].assign(g=lambda r: r.g)
    other = jg.glmm("y ~ t + arm:t + (1 | g)", rest, family="cumulative")
    again = other.predict(new.iloc[1:], re="population", se=True)["se"]
    np.testing.assert_allclose(se[1:], again, rtol=1e-3)


def test_levels_keep_the_standard_errors_that_their_own_thresholds_have():
    """Shares p of two levels, sqrt(p (1 - p) / n), in halves that share none."""
    a, b = [0, 1, 1, 1], [2, 2, 3]
    d = table({(0, 0): a, (0, 1): a, (1, 0): b, (1, 1): b})
    names = ["low", "medium", "high", "very high"]
    codes = d["y"].astype(int)
    d["y"] = pd.Categorical(np.array(names)[codes], names, ordered=True)
    with SEPARATED:
        m = jg.glmm("y ~ arm + (1 | g)", d, family="cumulative")
    new = pd.DataFrame({"arm": [0, 1]})
    out = m.predict(new, re="population", se=True)
    n_a, n_b = (codes < 2).sum(), (codes > 1).sum()
    share = [0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 2 / 3, 1 / 3]
    np.testing.assert_allclose(out["fit"], share, atol=1e-4)
    none = [[False, False, True, True], [True, True, False, False]]
    np.testing.assert_array_equal(np.isnan(out["se"]), none)
    expected = np.sqrt([0.25 * 0.75 / n_a, 2 / 9 / n_b])
    np.testing.assert_allclose(out["se"].iloc[0, :2], expected[0], rtol=1e-3)
    np.testing.assert_allclose(out["se"].iloc[1, 2:], expected[1], rtol=1e-3)
    known = m.dispersion_se["low|medium"], np.sqrt(1 / (n_a * 0.25 * 0.75))
    np.testing.assert_allclose(*known, rtol=1e-3)
    assert np.isnan(m.dispersion_se[["medium|high", "high|very high"]]).all()


def test_a_truncated_mean_that_runs_to_zero_is_a_logarithmic_series():
    """log L of p^y / (-y log(1 - p)), with p = phi / (1 + phi), and of the zeros."""
    from scipy.optimize import minimize_scalar
    from scipy.special import xlogy

    # more ones and a longer tail than any logarithmic series has
    counts = np.repeat([1, 2, 3, 4, 6, 10], [160, 30, 15, 12, 12, 11])
    d = pd.DataFrame({"y": np.r_[counts, 0 * counts[:80]], "g": np.arange(320) % 8})
    m = jg.glmm("y ~ 1 + (1 | g)", d, family="truncated_nbinom1", zi="~ 1")

    def loss(p):
        return -np.sum(xlogy(counts, p) - np.log(counts) - np.log(-np.log1p(-p)))

    best = minimize_scalar(loss, bounds=(0.01, 0.99), method="bounded")
    zeros = 80 * np.log(80 / 320) + 240 * np.log(240 / 320)
    # eta is below 8 where the fit stops, and log L that far from its limit
    np.testing.assert_allclose(m.loglik, -best.fun + zeros, atol=1e-2)
    phi = best.x / (1 - best.x)
    np.testing.assert_allclose(m.dispersion["phi"], phi, rtol=1e-2)
    assert m.status == Status.LIMIT
    assert "(Intercept) runs to infinity" in m.verdict
    assert "logarithmic series" in m.verdict
    assert np.isnan(m.se).all()
    assert np.isfinite(m.dispersion_se).all()


X = np.linspace(-1.0, 1.0, 60)
REPRODUCED = {
    "gamma": np.exp(0.5 + 0.3 * X),
    "inverse_gaussian": np.exp(0.5 + 0.3 * X),
    "lognormal": np.exp(0.5 + 0.3 * X),
    "student": 0.5 + 0.3 * X,
    "beta": 1.0 / (1.0 + np.exp(-0.5 - 0.3 * X)),
    "tweedie": np.exp(0.5 + 0.3 * X),
    "gaussian": np.exp(0.5 + 0.3 * X),
}


@pytest.mark.parametrize("family", REPRODUCED)
def test_a_response_that_the_model_reproduces_is_named(family):
    link = "log" if family in ("gamma", "inverse_gaussian", "gaussian") else None
    d = pd.DataFrame({"y": REPRODUCED[family], "x": X, "g": np.arange(60) % 6})
    with pytest.warns(ConvergenceWarning, match="reproduce the response, so the disp"):
        m = jg.glmm("y ~ x + (1 | g)", d, family=family, link=link)
    assert not m.converged


def pure(case):
    """Responses 0.3 of whose levels are all 1, the others all 0."""
    g = np.repeat(np.arange(30), 4)
    y = 1.0 * (g % 10 < 3)
    d = pd.DataFrame({"g": g, "h": np.arange(120) % 5, "y": y, "no": 1 - y})
    if case == "mixed":
        d.loc[0, ["y", "no"]] = 1 - d.loc[0, ["y", "no"]]
    if case == "counts":
        d[["y", "no"]] *= 7
    return d


@pytest.mark.parametrize("case", ["rows", "counts", "two factors", "mixed"])
def test_groups_of_one_kind_have_no_maximum(case):
    """The likelihood, by a fine grid over one effect, rises with its sd throughout."""
    d = pure(case)
    more = " + (1 | h)" if case == "two factors" else ""
    m = jg.glmm(f"cbind(y, no) ~ 1 + (1 | g){more}", d, family="binomial")
    assert ("(all 0 or all 1)" in m.verdict) == (case != "mixed")
    assert ("'AGQ'" in m.verdict) == (case != "mixed")
    grid, k = np.linspace(-9, 9, 40_001), 28 if case == "counts" else 4

    def log_lik(sd):
        # at the intercept that gives 0.3 where sd is large
        p = expit(sd * (grid - 0.524401))
        f = np.exp(-0.5 * grid**2) / np.sum(np.exp(-0.5 * grid**2))
        return 9 * np.log(f @ p**k) + 21 * np.log(f @ (1.0 - p) ** k)

    if case != "mixed":
        values = [log_lik(sd) for sd in (10.0, 50.0, 200.0, 1000.0)]
        assert np.all(np.diff(values) > 0)


@pytest.mark.parametrize("mixed", [False, True])
def test_groups_of_one_category_have_no_maximum(mixed):
    """The likelihood as above, thresholds at the quantiles of the shares."""
    d = pure("rows")
    d["y"] = np.where(d.g % 10 < 3, 0, np.where(d.g % 10 < 6, 1, 2))
    d.loc[0, "y"] = 1 if mixed else d.loc[0, "y"]
    d["y"] = pd.Categorical(d.y, ordered=True)
    m = jg.glmm("y ~ 1 + (1 | g)", d, family="cumulative")
    assert ("(one category)" in m.verdict) != mixed
    grid = np.linspace(-9, 9, 40_001)
    f = np.exp(-0.5 * grid**2) / np.sum(np.exp(-0.5 * grid**2))

    def log_lik(sd):
        low, high = (expit(sd * (t - grid)) for t in (-0.524401, 0.253347))
        parts = (low, 9), (high - low, 9), (1.0 - high, 12)
        return sum(count * np.log(f @ p**4) for p, count in parts)

    assert np.all(np.diff([log_lik(sd) for sd in (10.0, 50.0, 200.0, 1000.0)]) > 0)


@pytest.mark.slow
def test_groups_of_overdispersed_counts_of_one_kind_have_no_maximum():
    d = pure("counts")
    m = jg.glmm("cbind(y, no) ~ 1 + (1 | g)", d, family="betabinomial")
    assert "(all 0 or all 1)" in m.verdict
    d.loc[0, ["y", "no"]] = [3, 4]
    m = jg.glmm("cbind(y, no) ~ 1 + (1 | g)", d, family="betabinomial")
    assert "(all 0 or all 1)" not in m.verdict
