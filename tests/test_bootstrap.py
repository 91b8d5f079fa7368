"""The bootstrap: its samples, its intervals, its likelihood ratios."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import jaxglmm as jg
from jaxglmm.encoding import model_frame
from jaxglmm.errors import ConvergenceWarning
from jaxglmm.hostfit import to_design
from jaxglmm.studies import bootstrap as bootstrap_module
from jaxglmm.studies.bootstrap import _interval, _residual_source
from jaxglmm.studies.cases import case_plan, draw_cases, top_factor
from jaxglmm.studies.nested import _check_nested, _common_method
from jaxglmm.studies.parameters import natural, parameter_names


@pytest.fixture(scope="module")
def dyestuff():
    return jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())


@pytest.fixture(scope="module")
def slope():
    return jg.glmm("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())


def test_parametric_bootstrap(dyestuff):
    found = dyestuff.bootstrap(
        300, key=2, progress=False, statistic=lambda f: f.params.theta[0] ** 2
    )
    assert list(found.estimate.index[:3]) == [
        "(Intercept)", "sd_(Intercept)|Batch", "sigma",
    ]  # fmt: skip
    np.testing.assert_allclose(found.estimate.iloc[3], dyestuff.theta.iloc[0] ** 2)
    y = jg.simulate(
        jax.random.fold_in(jax.random.key(2), 11), dyestuff.fit.params, dyestuff.design
    )
    single = jg.fit(dyestuff.design.replace(y=y))
    np.testing.assert_allclose(
        found.replicates.iloc[11, :3],
        natural(single.params, dyestuff.design, dyestuff.family), rtol=1e-6,
    )  # fmt: skip
    draws = found.replicates["sigma"].to_numpy()
    low, high = np.quantile(draws, [0.05, 0.95])
    t = dyestuff.sigma
    np.testing.assert_allclose(found.confint(0.9).loc["sigma"], [low, high])
    np.testing.assert_allclose(
        found.confint(0.9, "basic").loc["sigma"], [2 * t - high, 2 * t - low]
    )
    bca = found.confint(method="bca")
    assert (bca["lower"] < bca["upper"]).all()
    np.testing.assert_allclose(
        found.summary()["std_error"].iloc[0], dyestuff.se.iloc[0], rtol=0.2
    )


def test_bca_is_that_of_scipy(rng):
    """For the mean of a sample, where scipy has the same interval."""
    x = rng.gamma(2.0, size=40)
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=4000, method="BCa", rng=np.random.default_rng(1)
    )
    without = (x.sum() - x) / (len(x) - 1)
    draws = theirs.bootstrap_distribution
    ours = _interval(draws, x.mean(), 0.95, "bca", without)
    np.testing.assert_allclose(ours, theirs.confidence_interval, rtol=1e-6)


def test_semiparametric_draws_have_the_estimated_covariances(slope):
    source = _residual_source(slope)
    _, (b,), e, _ = source
    Q = slope.sigma**2 * slope.factors[0] @ slope.factors[0].T
    np.testing.assert_allclose(b.T @ b / len(b), Q, rtol=1e-8)
    np.testing.assert_allclose(np.mean(e**2), slope.sigma**2)
    np.testing.assert_allclose(e.mean(), 0.0, atol=1e-9)
    found = slope.bootstrap(300, key=1, kind="semiparametric", progress=False)
    error = found.summary()["std_error"]
    np.testing.assert_allclose(error.iloc[:2], slope.se, rtol=0.2)


def test_semiparametric_draws_where_a_correlation_is_one():
    rng = np.random.default_rng(0)
    g, x = np.repeat(np.arange(40), 8), np.tile(np.linspace(-1.0, 1.0, 8), 40)
    y = 1.0 + 2.0 * x + rng.normal(size=40)[g] * (1.0 + 1.5 * x) + rng.normal(size=320)
    m = jg.glmm("y ~ x + (x | g)", {"y": y, "x": x, "g": g.astype(str)})
    assert m.is_singular
    _, (b,), _, _ = _residual_source(m)
    Q = m.sigma**2 * m.factors[0] @ m.factors[0].T
    np.testing.assert_allclose(b.T @ b / len(b), Q, rtol=1e-6)


def test_semiparametric_draws_do_not_depend_on_units():
    data = jg.datasets.sleepstudy().assign(x=lambda d: 1e6 * d["Days"])
    m = jg.glmm("Reaction ~ x + (x | Subject)", data)
    _, (b,), _, _ = _residual_source(m)
    Q = m.sigma**2 * m.factors[0] @ m.factors[0].T
    np.testing.assert_allclose(b.T @ b / len(b), Q, rtol=1e-6)


def test_quantities_of_one_name_are_two(dyestuff):
    def sigma(fit):
        return fit.params.sigma**2

    found = dyestuff.bootstrap(60, key=1, statistic=sigma, progress=False)
    assert list(found.estimate.index[-2:]) == ["sigma", "sigma (statistic)"]
    interval = found.confint()
    np.testing.assert_allclose(interval.iloc[-1], interval.iloc[-2] ** 2, rtol=0.05)
    with pytest.raises(TypeError, match="statistic must be a JAX function of a Fit"):
        dyestuff.bootstrap(10, key=1, statistic="sigma")
    with pytest.raises(TypeError, match="must return a number or an array; found dict"):
        dyestuff.bootstrap(10, key=1, statistic=lambda fit: {}, progress=False)


def test_parameters_of_two_predictors_have_names_of_their_own():
    data = jg.datasets.load("salamanders")
    frame = model_frame("count ~ mined + (1 | site)", data, others={"zi": "~ (1|site)"})
    names = parameter_names(to_design(frame), jg.Poisson(), True, frame)
    assert names[-2:] == ["sd_(Intercept)|site", "zi_sd_(Intercept)|site"]
    assert len(set(names)) == len(names)


def test_bca_takes_rounding_for_what_it_is(rng):
    draws = np.maximum(rng.normal(size=999), 0.0)
    without = np.zeros(6)
    exact = _interval(draws, 0.0, 0.95, "bca", without)
    noise = 1e-27 * rng.normal(size=999)
    noisy = _interval(draws + noise, 1e-29, 0.95, "bca", without + noise[:6])
    np.testing.assert_allclose(noisy, exact, atol=1e-20)
    assert exact[1] > 0.3


def test_replicates_are_fitted_as_the_model_was(dyestuff, monkeypatch):
    m = jg.glmm(
        "Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff(),
        control=jg.Control(max_iter=30),
    )  # fmt: skip
    asked = []

    def ask(*arguments):
        asked.append(arguments[-1])
        raise InterruptedError

    monkeypatch.setattr(bootstrap_module, "check_batch", ask)
    for control in (None, jg.Control(max_iter=5)):
        with pytest.raises(InterruptedError):
            m.bootstrap(10, key=1, control=control)
    assert [c.max_iter for c in asked] == [30, 5]


def test_a_fit_that_did_not_converge_is_warned_of(dyestuff):
    lost = dataclasses.replace(
        dyestuff.fit, status=np.int32(jg.Status.MAX_ITER), converged=np.bool_(False)
    )
    lost = dataclasses.replace(dyestuff, fit=lost)
    with pytest.warns(ConvergenceWarning, match="did not converge, so data drawn at"):
        lost.bootstrap(8, key=1, progress=False)
    with pytest.warns(ConvergenceWarning, match="did not converge, so data drawn at"):
        jg.recovery_study(1, lost, n_sims=8, progress=False)
    with pytest.warns(ConvergenceWarning, match="did not converge, so data drawn at"):
        jg.power(lost, 0, key=1, n_sims=8, progress=False)


def test_cases_are_levels_with_all_their_rows():
    m = jg.glmm("strength ~ 1 + (1 | batch/cask)", jg.datasets.load("pastes"))
    keep = np.arange(60) != 17  # one level is shorter
    design = jax.tree.map(np.asarray, m.design)
    terms = tuple(jg.Term(t.z[keep], t.group[keep], t.n_levels) for t in design.terms)
    design = jg.Design(design.y[keep], design.X[keep], terms)
    cases = case_plan(design, top_factor(m, None))
    key = jax.random.key(4)
    made = draw_cases(key, design, cases)
    drawn = np.asarray(jax.random.randint(key, (10,), 0, 10))
    assert len(set(drawn)) < 10
    parts, batches, casks = [], [], []
    batch, cask = design.terms[1].group, design.terms[0].group
    for slot, level in enumerate(drawn):
        rows = np.flatnonzero(batch == level)
        parts.append(rows)
        batches.append(np.full(len(rows), slot))
        casks.append(1000 * slot + cask[rows])
    rows = np.concatenate(parts)
    one = np.ones((len(rows), 1))
    code = np.unique(np.concatenate(casks), return_inverse=True)[1]
    by_hand = jg.Design(
        design.y[rows], design.X[rows],
        (jg.Term(one, code), jg.Term(one, np.concatenate(batches))),
    )  # fmt: skip
    a, b = jg.fit(made), jg.fit(by_hand)
    np.testing.assert_allclose(a.objective, b.objective, rtol=1e-10)
    np.testing.assert_allclose(a.params.theta, b.params.theta, rtol=1e-5)


@pytest.mark.slow
def test_cases_of_a_generalized_model():
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    g = jg.glmm(formula, jg.datasets.load("cbpp"), family="binomial")
    found = g.bootstrap(48, key=1, kind="cases", progress=False)
    assert found.replicates.notna().all(axis=1).mean() > 0.9


def test_cases_of_crossed_factors():
    crossed = jg.glmm(
        "diameter ~ 1 + (1|plate) + (1|sample)", jg.datasets.load("penicillin")
    )
    with pytest.raises(ValueError, match="say by= which to draw: plate, sample"):
        crossed.bootstrap(10, key=1, kind="cases")
    found = crossed.bootstrap(48, key=1, kind="cases", by="plate", progress=False)
    assert found.replicates["sd_(Intercept)|plate"].std() > 0.0
    # the factor of BCa intervals may be said later, and be another
    given, other = (found.confint(method="bca", by=by) for by in (None, "sample"))
    assert np.isfinite(other).all(axis=None)
    assert not np.allclose(given, other)
    with pytest.raises(ValueError, match="by='plate' is for method='bca'"):
        found.confint(by="plate")


def test_what_the_bootstrap_refuses(dyestuff):
    with pytest.raises(ValueError, match="kind='residual' is not one of"):
        dyestuff.bootstrap(10, key=1, kind="residual")
    with pytest.raises(ValueError, match="by='Item' is no grouping factor"):
        dyestuff.bootstrap(10, key=1, kind="cases", by="Item")
    with pytest.raises(ValueError, match="by='Item' is no grouping factor"):
        dyestuff.bootstrap(10, key=1, by="Item")
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    g = jg.glmm(formula, jg.datasets.load("cbpp"), family="binomial")
    with pytest.raises(ValueError, match="which only linear models have"):
        g.bootstrap(10, key=1, kind="semiparametric")
    found = dyestuff.bootstrap(20, key=1, progress=False)
    with pytest.raises(ValueError, match="method='wald' is not one of"):
        found.confint(method="wald")


def test_likelihood_ratio_by_simulation(slope):
    data = jg.datasets.sleepstudy()
    plain = jg.glmm("Reaction ~ Days + (1 | Subject)", data)
    test = jg.bootstrap_lrt(plain, slope, 99, key=1, progress=False)
    # both by REML, with the same fixed effects
    np.testing.assert_allclose(test.statistic, 2 * (slope.loglik - plain.loglik))
    assert test.p_value == 0.01
    with pytest.raises(ValueError, match="give the smaller model first"):
        jg.bootstrap_lrt(slope, plain, 10, key=1)
    other = jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    with pytest.raises(ValueError, match="not fitted to the same responses"):
        jg.bootstrap_lrt(other, slope, 10, key=1)


def test_likelihood_ratios_of_models_that_do_not_compare(slope):
    data = jg.datasets.sleepstudy().assign(w=2.0, z=np.arange(180) % 7)
    plain = "Reaction ~ Days + (1 | Subject)"
    pairs = {
        "different weights": jg.glmm(plain, data, weights="w"),
        "different offset": jg.glmm(plain, data, offset="2 * z"),
        "with control=": jg.glmm(plain, data, control=jg.Control(max_iter=40)),
        "fixed effect 'z', which": jg.glmm("Reaction ~ z + (1 | Subject)", data),
        "effects of .* by 'z', whose": jg.glmm("Reaction ~ Days + (1 | z)", data),
    }
    for message, m0 in pairs.items():
        with pytest.raises(ValueError, match=message):
            jg.bootstrap_lrt(m0, slope, 10, key=1)
    with pytest.raises(TypeError, match="m1 must be a fitted GLMM; found Design"):
        jg.bootstrap_lrt(slope, slope.design, 10, key=1)


PAIRS = [
    ("M + (1 | W) + (1 | W:M)", "M + (0 + M | W)", True),
    ("M + (1 | W)", "M + (0 + M | W)", True),
    ("M + (1 | W)", "M + diag(0 + M | W)", False),
    ("M + (1 | W:M)", "M + diag(0 + M | W)", True),
    ("x + diag(1 + x | W)", "x + diag(1 + x + M | W)", True),
    ("x + (x || W)", "x + (x | W)", True),
    ("x + (x | W)", "x + (x + M || W)", False),
    ("x + (1 | W)", "x + (1 | W/M)", True),
    ("x + (1 | W/M)", "x + (1 | W)", False),
    ("inc + (1 | W)", "inc + I(inc**2) + (1 | W)", True),
    ("M + (1 | W)", "0 + M + (1 | W)", True),
]


@pytest.mark.parametrize(("small", "large", "nested"), PAIRS)
def test_which_models_are_nested(small, large, nested):
    rng = np.random.default_rng(2)
    data = pd.DataFrame(
        {
            "y": rng.normal(size=90), "x": rng.normal(size=90),
            "inc": rng.uniform(1e6, 2e6, size=90),
            "W": np.repeat(list("abcdef"), 15), "M": list("uvw") * 30,
        }
    )  # fmt: skip
    frames = [model_frame(f"y ~ {f}", data) for f in (small, large)]
    m0, m1 = (SimpleNamespace(frame=f, design=to_design(f)) for f in frames)
    if nested:
        _check_nested(m0, m1)
        return
    with pytest.raises(ValueError, match="not nested in it; give the smaller model"):
        _check_nested(m0, m1)


def test_restricted_likelihoods_of_other_fixed_effects_are_not_compared():
    cbpp = jg.datasets.load("cbpp")
    options = {"data": cbpp, "family": "binomial", "method": "REML"}
    models = [
        jg.glmm(f"incidence/size ~ {x} + (1 | herd)", weights="size", **options)
        for x in ("1", "size", "1")
    ]
    assert _common_method(*models[:2]) == "Laplace"
    assert _common_method(models[0], models[2]) == "REML"


def test_a_ratio_of_zero_has_a_p_value_of_one():
    """Both variances are zero in the data, and in many replicates."""
    data = jg.datasets.load("dyestuff2")
    there_and_back = np.tile([0, 1, 2, 3, 4, 4, 3, 2, 1, 0], 3)
    data.loc[np.argsort(data["Yield"].to_numpy()), "day"] = there_and_back
    m0 = jg.glmm("Yield ~ 1 + (1 | Batch)", data)
    m1 = jg.glmm("Yield ~ 1 + (1 | Batch) + (1 | day)", data)
    test = jg.bootstrap_lrt(m0, m1, 49, key=1, progress=False)
    assert abs(test.statistic) < 1e-8
    assert test.p_value == 1.0


@pytest.mark.slow
def test_different_fixed_effects_are_compared_by_ml(slope):
    data = jg.datasets.sleepstudy()
    without = jg.glmm("Reaction ~ 1 + (Days | Subject)", data)
    test = jg.bootstrap_lrt(without, slope, 49, key=1, progress=False)
    np.testing.assert_allclose(test.statistic, 23.537, atol=2e-3)  # by ML, as lme4


@pytest.mark.slow
@pytest.mark.recovery
def test_intervals_of_fixed_effects_cover_as_often_as_theory_says():
    """Balanced groups, where it is known: 400 data sets, 400 refits of each.

    The estimates of refits are normal around that of the data with its own standard
    error, whose square has as many degrees of freedom as the groups, or the rows within
    them, leave. On average (1 + 0.025 (R - 1)) / (R + 1) of the distribution lie beyond
    a quantile at tail 0.025 of R draws.
    """
    groups, rows, sets, R = 60, 6, 400, 400
    g = np.repeat(np.arange(groups), rows)
    x = np.tile(np.linspace(-1.0, 1.0, rows), groups)
    truth = np.array([1.0, 0.5])
    rng = np.random.default_rng(3)
    methods = ("percentile", "basic", "bca")
    inside = {method: np.zeros(2) for method in methods}
    for i in range(sets):
        noise = 0.7 * rng.normal(size=groups)[g] + rng.normal(size=len(g))
        data = {"y": truth[0] + truth[1] * x + noise, "x": x, "g": g}
        m = jg.glmm("y ~ x + (1 | g)", pd.DataFrame(data))
        found = m.bootstrap(R, key=i, progress=False)
        assert found.replicates.notna().all(axis=None)
        for method in methods:
            low, high = found.confint(method=method).iloc[:2].to_numpy().T
            inside[method] += (low <= truth) & (truth <= high)
    beyond = (1.0 + 0.025 * (R - 1)) / (R + 1)
    df = np.array([groups - 1, groups * (rows - 1) - 1])
    expected = 1.0 - 2.0 * stats.t.sf(stats.norm.isf(beyond), df)
    lower, upper = stats.binom.interval(0.999, sets, expected)
    for method in methods:
        share = f"{method}: {inside[method] / sets}, expected {expected}"
        assert np.all((lower <= inside[method]) & (inside[method] <= upper)), share
