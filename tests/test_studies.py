"""Recovery and power: their formulas and their data."""

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import jaxglmm as jg
from jaxglmm.errors import ConvergenceWarning, Status
from jaxglmm.studies.extend import extend
from jaxglmm.studies.lanes import check_count
from jaxglmm.studies.parameters import natural, parameter_names
from jaxglmm.studies.power import PowerCurve, _warn_of_failures
from jaxglmm.studies.progress import Progress

SLOPE = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(scope="module")
def dyestuff():
    return jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())


@pytest.fixture(scope="module")
def slope():
    return jg.glmm(SLOPE, jg.datasets.sleepstudy())


@pytest.fixture(scope="module")
def study(dyestuff):
    return jg.recovery_study(
        3, dyestuff.design, dyestuff.fit.params, n_sims=400, methods=("REML", "ML"),
        progress=False, names=["mean", "sd_batch", "sigma"],
    )  # fmt: skip


# ---- parameters --------------------------------------------------------------------


def test_parameters_are_those_of_the_summary(slope):
    values = natural(slope.fit.params, slope.design, slope.family)
    names = parameter_names(slope.design, slope.family, False, slope.frame)
    assert names == [
        "(Intercept)", "Days", "sd_(Intercept)|Subject", "sd_Days|Subject",
        "cor_Days.(Intercept)|Subject", "sigma",
    ]  # fmt: skip
    expected = [*slope.fixef, *slope.varcorr["sdcor"]]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.slow
def test_parameters_of_a_generalized_model():
    data = jg.datasets.load("owls")
    m = jg.glmm(
        "SiblingNegotiation ~ ArrivalTime + (1 | Nest)", data, family="nbinom2",
        zi="~ 1",
    )  # fmt: skip
    values = natural(m.fit.params, m.design, m.family)
    names = parameter_names(m.design, m.family, True, m.frame)
    assert names[2:] == ["zi_(Intercept)", "sd_(Intercept)|Nest", "theta"]
    expected = [*m.fixef, *m.fixef_zi, m.varcorr["sdcor"].iloc[0], m.dispersion.iloc[0]]
    np.testing.assert_allclose(values, expected, rtol=1e-10)


# ---- recovery ----------------------------------------------------------------------


def test_summary_is_what_its_formulas_say(study):
    frame, table = study.to_frame(), study.summary()
    assert len(frame) == 800
    for method in ("REML", "ML"):
        rows = frame[(frame["method"] == method) & frame["converged"]]
        for name, truth in zip(study.names, study.truth):
            at = (table["method"] == method) & (table["parameter"] == name)
            row, error = table[at].iloc[0], rows[name] - truth
            assert row["n"] == len(rows)
            n = len(rows)
            np.testing.assert_allclose(row["mean"], rows[name].mean())
            np.testing.assert_allclose(row["bias"], error.mean())
            np.testing.assert_allclose(row["bias_mcse"], error.std() / np.sqrt(n))
            rmse = np.sqrt((error**2).mean())
            np.testing.assert_allclose(row["rmse"], rmse)
            np.testing.assert_allclose(
                row["rmse_mcse"], (error**2).std() / (2 * rmse * np.sqrt(n))
            )
        inside = (rows["mean"] - study.truth[0]).abs() <= 1.959964 * rows["se_mean"]
        row = table[(table["method"] == method) & (table["parameter"] == "mean")].iloc[
            0
        ]
        np.testing.assert_allclose(row["coverage"], inside.mean())
    assert table["coverage"].notna().sum() == 2
    rates = study.rates()
    assert (rates["converged"] == 1.0).all()
    singular = frame.groupby("method")["is_singular"].mean()
    np.testing.assert_allclose(rates["singular"], singular[rates["method"]])


def test_replicates_are_simulated_by_key(study, dyestuff):
    """Replicate i is the fit to the response that fold_in(key, i) draws."""
    key, params = jax.random.key(3), dyestuff.fit.params
    design = jax.tree.map(jax.numpy.asarray, dyestuff.design)
    for i in (0, 7, 399):
        y = jg.simulate(jax.random.fold_in(key, i), params, design)
        single = jg.fit(design.replace(y=y))
        np.testing.assert_allclose(
            study.records["REML"]["estimate"][i],
            natural(single.params, design, dyestuff.family),
            rtol=1e-6, atol=1e-5,
        )  # fmt: skip


def test_the_same_data_for_every_method_and_number(study, dyestuff):
    fewer = jg.recovery_study(
        3, dyestuff.design, dyestuff.fit.params, n_sims=400, tile=16, progress=False
    )
    np.testing.assert_allclose(
        fewer.records["REML"]["estimate"], study.records["REML"]["estimate"], rtol=1e-9
    )
    bias = study.summary().set_index(["method", "parameter"])["bias"]
    # ML has too small a variance between batches, REML has not
    assert bias["ML", "sd_batch"] < bias["REML", "sd_batch"] < 0.0


def test_effects_may_be_held_and_covariates_redrawn(dyestuff):
    design, params = dyestuff.design, dyestuff.fit.params
    held = jg.recovery_study(
        3, design, params, n_sims=64, b=dyestuff.fit.b, progress=False
    )
    spread = held.to_frame()["beta[0]"].std()
    assert spread < 0.6 * float(dyestuff.se.iloc[0])  # no draws of batches in it

    def redrawn(key, design):
        x = jax.random.normal(key, design.X.shape)
        return design.replace(X=1.0 + 0.5 * x)

    moved = jg.recovery_study(
        3, design, params, n_sims=64, covariates=redrawn, progress=False
    )
    key_x, key_y = jax.random.split(jax.random.fold_in(jax.random.key(3), 5))
    design = redrawn(key_x, design)
    single = jg.fit(design.replace(y=jg.simulate(key_y, params, design)))
    row = moved.to_frame().iloc[5]
    np.testing.assert_allclose(row["beta[0]"], single.params.beta[0], rtol=1e-7)
    np.testing.assert_allclose(row["se_beta[0]"] ** 2, single.vcov_beta[0, 0])


def test_what_a_study_refuses(dyestuff):
    design, params = dyestuff.design, dyestuff.fit.params
    with pytest.raises(ValueError, match="n_sims must be a positive whole number"):
        jg.recovery_study(1, design, params, n_sims=0)
    with pytest.raises(ValueError, match="level must lie between 0 and 1; found 95"):
        jg.recovery_study(1, design, params, level=95)
    with pytest.raises(ValueError, match="methods is empty"):
        jg.recovery_study(1, design, params, methods=())
    with pytest.raises(ValueError, match="unknown method 'EM'"):
        jg.recovery_study(1, design, params, methods=("EM",))
    with pytest.raises(TypeError, match="key must be an integer or a PRNG key"):
        jg.recovery_study("now", design, params)
    with pytest.raises(ValueError, match="names must hold 3 names, each once; found"):
        jg.recovery_study(1, design, params, names=["a", "a", "b"])
    with pytest.raises(ValueError, match=r"n_quad=7 is for methods=\('AGQ',\)"):
        jg.recovery_study(1, design, params, n_quad=7)
    with pytest.raises(ValueError, match="of a Design needs params="):
        jg.recovery_study(1, design)
    with pytest.raises(ValueError, match="the family is the fitted model's"):
        jg.recovery_study(1, dyestuff, family="poisson")
    with pytest.raises(TypeError, match="a Design or a fitted GLMM; found Params"):
        jg.recovery_study(1, params, params)
    with pytest.raises(ValueError, match="truth of a generalized model: say family="):
        jg.recovery_study(1, design, params.replace(psi=np.zeros(0)))
    for wrong, message in (
        (lambda key, d: d.X, "must return a Design; found"),
        (lambda key, d: d.replace(X=d.X[:, :0]), "must keep the shapes"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            jg.recovery_study(1, design, params, n_sims=4, covariates=wrong)


def test_a_study_of_a_fitted_model(dyestuff, study):
    found = jg.recovery_study(
        1, dyestuff, n_sims=len(study.records["REML"]["status"]), methods="REML",
        progress=False,
    )  # fmt: skip
    assert found.names == ["(Intercept)", "sd_(Intercept)|Batch", "sigma"]
    table = jg.recovery_study(1, dyestuff, n_sims=1, progress=False).summary()
    assert table["bias"].isna().all()
    assert table["n"].tolist() == [1, 1, 1]


def test_pictures(study, slope):
    ax = study.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == study.names
    points = pd.DataFrame({"effect": [1.0, 1.0, 2.0, 2.0], "n_levels": [5, 9, 5, 9]})
    p = np.array([[0.5, 0.01], [0.02, 0.01], [0.5, 0.6], [0.01, 0.01]])
    curve = PowerCurve(points, p, np.zeros(p.shape, int), "x", 0.05, 0.95)
    ax = curve.plot()
    assert ax.get_xlabel() == "number of groups"
    assert len(ax.get_legend().get_texts()) == 2


# ---- power -------------------------------------------------------------------------


def test_power_is_the_share_of_small_p_values():
    p = np.array([[0.01, 0.04, 0.2, np.nan], [0.9, 0.8, 0.7, 0.6]])
    points = pd.DataFrame({"effect": [1.0, 0.0]})
    curve = PowerCurve(points, p, np.zeros(p.shape, int), "x", 0.05, 0.95)
    table = curve.to_frame()
    assert table["power"].tolist() == [0.5, 0.0]
    assert table["failed"].tolist() == [0.25, 0.0]
    for i, hits in enumerate((2, 0)):
        interval = stats.binomtest(hits, 4).proportion_ci(0.95, "exact")
        np.testing.assert_allclose(
            table[["lower", "upper"]].iloc[i], [interval.low, interval.high]
        )


def test_points_without_fits_have_no_power():
    p = np.array([[0.01, 0.2, 0.3, 0.4], [np.nan] * 4])
    status = np.array([[0] * 4, [int(Status.NOT_IDENTIFIED)] * 4])
    curve = PowerCurve(pd.DataFrame({"rows": [5, 2]}), p, status, "x", 0.05, 0.95)
    table = curve.to_frame()
    assert table[["power", "lower", "upper"]].iloc[1].isna().all()
    assert table["power"].iloc[0] == 0.25
    with pytest.warns(ConvergenceWarning, match=r"100 % .* at rows 2 .* flat in some"):
        _warn_of_failures(curve)


@pytest.mark.parametrize("kind", ["wald", "lr"])
def test_p_values_are_those_of_single_fits(slope, kind):
    curve = jg.power_curve(
        slope, "Days", key=5, n_levels=[6, 24], rows=[10], effect=3.0, kind=kind,
        n_sims=8, progress=False,
    )  # fmt: skip
    made = extend(slope.design, 0, 24, 10)
    truth = slope.fit.params.replace(beta=np.array([slope.fixef.iloc[0], 3.0]))
    for point, n_levels in enumerate((6, 24)):
        design = made.design.replace(weights=made.weights(n_levels, 10))
        for r in (0, 5):
            i = 8 * point + r
            y = jg.simulate(jax.random.fold_in(jax.random.key(5), i), truth, design)
            # the rows in use alone
            used = made.level < n_levels
            term = design.terms[0]
            alone = jg.Design(
                y[used], design.X[used], (jg.Term(term.z[used], term.group[used]),)
            )
            if kind == "wald":
                fit = jg.fit(alone)
                z = fit.params.beta[1] / np.sqrt(fit.vcov_beta[1, 1])
                expected = 2.0 * stats.norm.sf(abs(z))
            else:
                less = jg.fit(alone.replace(X=alone.X[:, :1]), method="ML")
                more = jg.fit(alone, method="ML")
                ratio = 2.0 * (more.loglik - less.loglik)
                expected = stats.chi2.sf(ratio, 1)
            np.testing.assert_allclose(curve.p_values[point, r], expected, rtol=1e-5)


def test_a_test_of_ones_own(slope):
    def larger_than_five(fit, design):
        z = (fit.params.beta[1] - 5.0) / jax.numpy.sqrt(fit.vcov_beta[1, 1])
        return 1.0 - jax.scipy.stats.norm.cdf(z)

    found = jg.power(slope, larger_than_five, key=1, n_sims=48, progress=False)
    wald = jg.power(slope, "Days", key=1, n_sims=48, progress=False)
    assert 0.7 < found.to_frame()["power"][0] <= wald.to_frame()["power"][0]
    assert "larger_than_five" in repr(found)


def test_extended_designs():
    data = jg.datasets.load("pastes")
    m = jg.glmm("strength ~ 1 + (1 | batch/cask)", data)
    made = extend(m.design, 1, 23, None)
    batch, cask = made.design.terms[1].group, made.design.terms[0].group
    assert m.frame.all_terms[1].group_name == "batch"
    assert (np.bincount(batch) == 6).all()
    assert len(np.unique(batch)) == 23
    assert len(np.unique(cask)) == 69  # three casks of their own in every batch
    owners = pd.DataFrame({"cask": cask, "batch": batch}).groupby("cask")["batch"]
    assert (owners.nunique() == 1).all()
    # crossed factors keep their levels
    p = jg.glmm("diameter ~ 1 + (1|plate) + (1|sample)", jg.datasets.load("penicillin"))
    made = extend(p.design, 0, 50, None)
    assert made.design.terms[0].n_levels == 50
    assert made.design.terms[1].n_levels == 6
    assert made.weights(10, None).sum() == 60
    # more rows in each level are the old ones again
    made = extend(m.design, 1, 4, 9)
    first = made.level == 0
    assert first.sum() == 9
    y = np.asarray(m.design.y)[np.asarray(m.design.terms[1].group) == 0]
    np.testing.assert_array_equal(made.design.y[first], np.resize(y, 9))


def test_arms_of_a_trial_keep_their_shares():
    arm = np.repeat(np.arange(20) >= 10, 3)  # controls first
    X = np.stack([np.ones(60), arm, np.arange(60) % 3], axis=1)
    group = np.repeat(np.arange(20), 3)
    design = jg.Design(X[:, 0], X, (jg.Term(X[:, :1], group),))
    for n in (2, 8, 10, 30):
        made = extend(design, 0, n).design
        assert made.X[:, 1].mean() == 0.5
        assert made.terms[0].n_levels == n
    # a dose of the treated alone, beside arms that alternate
    arm = np.tile([0.0, 1.0], 20)
    dose = np.where(arm == 1, np.tile(np.repeat(np.arange(1.0, 11.0), 2), 2), 0.0)
    trial = np.stack([np.ones(40), arm, dose], axis=1)
    made = extend(jg.Design(arm, trial, (jg.Term(trial[:, :1], np.arange(40)),)), 0)
    share = np.cumsum(made.design.X[:, 1]) / np.arange(1, 41)
    assert np.all(np.abs(share[5:] - 0.5) < 0.2)
    few = np.array([0.0, 0.0, 1.0, 1.0, 2.0])[:, None] == np.arange(3.0)
    made = extend(
        jg.Design(few[:, 0], few * 1.0, (jg.Term(few[:, :1], np.arange(5)),)), 0
    )
    assert np.all(made.design.X[:3].sum(axis=0) == 1)
    # where levels do not differ, the first ones
    made = extend(design.replace(X=X[:, [0, 2]], y=np.arange(60.0)), 0, 7).design
    np.testing.assert_array_equal(made.y, np.arange(21.0))


def test_what_power_refuses(slope):
    for test in (1.5, None, True):
        with pytest.raises(TypeError, match="test must be the name or position of"):
            jg.power(slope, test, key=1)
    with pytest.raises(ValueError, match="effect is empty"):
        jg.power_curve(slope, "Days", key=1, effect=[])
    with pytest.raises(ValueError, match="n_levels is empty"):
        jg.power_curve(slope, "Days", key=1, n_levels=[])
    for n in (None, np.inf, np.nan, 2.5, "5", True, [3]):
        with pytest.raises(ValueError, match="n_sims must be a positive whole number"):
            jg.power(slope, "Days", key=1, n_sims=n)
    assert check_count("n", np.array(5)) == check_count("n", 5.0) == 5
    with pytest.raises(ValueError, match="cannot test all fixed effects at once"):
        jg.power(slope, [0, 1], key=1, kind="lr")
    with pytest.raises(ValueError, match="PQL has no likelihood"):
        jg.power(
            slope.design, 1, key=1, params=slope.fit.params.replace(psi=np.zeros(0)),
            family="poisson", method="PQL", kind="lr",
        )  # fmt: skip
    for wrong, message in (
        (lambda fit, design: fit.params.beta[1] > 0, "For a decision: jnp.where"),
        (lambda fit, design: fit.params.beta, r"found an array of float64 and shape"),
        (lambda fit, design: None, "must return a p-value; found NoneType"),
        (lambda fit, design: 3.0, "from 0 to 1; found 3, and 3 more outside"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            jg.power(slope, wrong, key=1, n_sims=4, progress=False)
    with pytest.raises(ValueError, match="'Day', which is no fixed effect; there are"):
        jg.power(slope, "Day", key=1)
    with pytest.raises(ValueError, match="use power_curve for several"):
        jg.power(slope, "Days", key=1, effect=[1.0, 2.0])
    with pytest.raises(ValueError, match="effect= needs a test of one fixed effect"):
        jg.power(slope, ["(Intercept)", "Days"], key=1, effect=1.0)
    with pytest.raises(ValueError, match="along='Item' is no grouping factor"):
        jg.power(slope, "Days", key=1, along="Item", n_levels=5)
    with pytest.raises(ValueError, match="n_levels must be at least 2"):
        jg.power(slope, "Days", key=1, n_levels=1)
    with pytest.raises(ValueError, match="needs params="):
        jg.power(slope.design, 1, key=1)
    with pytest.raises(TypeError, match="model must be a fitted GLMM or a Design"):
        jg.power(3, 1, key=1)
    crossed = jg.glmm(
        "diameter ~ 1 + (1|plate) + (1|sample)", jg.datasets.load("penicillin")
    )
    with pytest.raises(ValueError, match="say along= which grouping factor"):
        jg.power(crossed, 0, key=1, n_levels=5)


# ---- long studies ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.recovery
def test_intervals_cover_as_often_as_theory_says():
    """Wald intervals of the mean and the slope of many groups, 10,000 lanes."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(200), 5)
    x = rng.normal(size=len(g))
    X = np.stack([np.ones_like(x), x], 1)
    design = jg.Design(x, X, (jg.Term(X, g),))
    params = jg.Params(np.array([1.0, 0.5]), np.array([0.8, 0.2, 0.5]), np.array(1.0))
    study = jg.recovery_study(1, design, params, n_sims=10_000, progress=False)
    coverage = study.summary()["coverage"].iloc[:2]
    low, high = stats.binom.ppf([1e-3, 1 - 1e-3], 10_000, 0.95) / 10_000
    # 200 groups: the normal quantile stands for t with some 199 degrees of freedom
    expected = stats.t.cdf(1.959964, 199) * 2 - 1
    shift = 0.95 - expected
    assert np.all((coverage >= low - shift) & (coverage <= high))
    assert study.rates()["converged"][0] > 0.9999
    bias = study.summary().set_index("parameter")
    assert (
        bias["bias"].abs() < 4 * bias["bias_mcse"] + 0.003 * bias["truth"].abs()
    ).all()


@pytest.mark.slow
@pytest.mark.recovery
def test_a_test_of_no_effect_rejects_as_often_as_it_should(slope):
    found = jg.power(
        slope, "Days", key=4, effect=0.0, n_levels=200, n_sims=4000, progress=False
    )
    table = found.to_frame()
    assert table["lower"][0] < 0.053
    assert table["upper"][0] > 0.05


def test_the_bar_counts_lanes_and_failures(monkeypatch):
    import tqdm.auto

    class Bar:
        def __init__(self, **options):
            self.options, self.n, self.initial, self.text = options, 0, 0, ""
            self.disable = False

        def set_postfix_str(self, text, refresh):
            self.text = text

        def update(self, n):
            self.n += n

        def close(self):
            pass

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    bar = Progress(10, "fits", True)
    assert bar._bar.options["delay"] == 2.0
    assert bar._bar.options["disable"] is None  # silent where there is no terminal
    bar.update(4, 1)
    bar.update(6, 0, earlier=True)
    assert (bar._bar.n, bar._bar.initial) == (10, 6)  # the rate leaves the six out
    assert bar._bar.text == "10.0% not converged"
    assert Progress(10, "fits", False)._bar is None
    monkeypatch.undo()
    with Progress(10, "fits", True) as silent:  # no terminal here
        silent.update(10, 0, earlier=True)
