"""Recovery, power and the bootstrap: their formulas, their data, their checkpoints."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import jaxglmm as jg
from jaxglmm.errors import CheckpointError
from jaxglmm.studies import checkpoint as checkpoint_module
from jaxglmm.studies.bootstrap import _interval, _residual_source
from jaxglmm.studies.cases import case_plan, draw_cases, top_factor
from jaxglmm.studies.extend import extend
from jaxglmm.studies.parameters import natural, parameter_names
from jaxglmm.studies.power import PowerCurve
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


def test_pictures(study, slope):
    ax = study.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == study.names
    points = pd.DataFrame({"effect": [1.0, 1.0, 2.0, 2.0], "n_levels": [5, 9, 5, 9]})
    p = np.array([[0.5, 0.01], [0.02, 0.01], [0.5, 0.6], [0.01, 0.01]])
    curve = PowerCurve(points, p, "x", 0.05, 0.95)
    ax = curve.plot()
    assert ax.get_xlabel() == "number of groups"
    assert len(ax.get_legend().get_texts()) == 2


# ---- power -------------------------------------------------------------------------


def test_power_is_the_share_of_small_p_values():
    p = np.array([[0.01, 0.04, 0.2, np.nan], [0.9, 0.8, 0.7, 0.6]])
    points = pd.DataFrame({"effect": [1.0, 0.0]})
    curve = PowerCurve(points, p, "x", 0.05, 0.95)
    table = curve.to_frame()
    assert table["power"].tolist() == [0.5, 0.0]
    assert table["failed"].tolist() == [0.25, 0.0]
    for i, hits in enumerate((2, 0)):
        interval = stats.binomtest(hits, 4).proportion_ci(0.95, "exact")
        np.testing.assert_allclose(
            table[["lower", "upper"]].iloc[i], [interval.low, interval.high]
        )


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


def test_what_power_refuses(slope):
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


# ---- the bootstrap -----------------------------------------------------------------


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


def test_cases_of_a_generalized_model_and_of_crossed_factors():
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    g = jg.glmm(formula, jg.datasets.load("cbpp"), family="binomial")
    found = g.bootstrap(48, key=1, kind="cases", progress=False)
    assert found.replicates.notna().all(axis=1).mean() > 0.9
    crossed = jg.glmm(
        "diameter ~ 1 + (1|plate) + (1|sample)", jg.datasets.load("penicillin")
    )
    with pytest.raises(ValueError, match="say by= which to draw: plate, sample"):
        crossed.bootstrap(10, key=1, kind="cases")
    found = crossed.bootstrap(48, key=1, kind="cases", by="plate", progress=False)
    assert found.replicates["sd_(Intercept)|plate"].std() > 0.0


def test_what_the_bootstrap_refuses(dyestuff):
    with pytest.raises(ValueError, match="kind='residual' is not one of"):
        dyestuff.bootstrap(10, key=1, kind="residual")
    with pytest.raises(ValueError, match="by='Item' is no grouping factor"):
        dyestuff.bootstrap(10, key=1, kind="cases", by="Item")
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
    without = jg.glmm("Reaction ~ 1 + (Days | Subject)", data)
    test = jg.bootstrap_lrt(without, slope, 49, key=1, progress=False)
    np.testing.assert_allclose(test.statistic, 23.537, atol=2e-3)  # by ML, as lme4
    with pytest.raises(ValueError, match="give the smaller model first"):
        jg.bootstrap_lrt(slope, plain, 10, key=1)
    other = jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    with pytest.raises(ValueError, match="not fitted to the same responses"):
        jg.bootstrap_lrt(other, slope, 10, key=1)


# ---- checkpoints -------------------------------------------------------------------


def _checkpointed(m, folder, **changes):
    options = {"n_sims": 600, "tile": 16, "threads": 1, **changes}
    key = options.pop("key", 9)
    return jg.recovery_study(
        key, m.design, m.fit.params, checkpoint=folder, progress=False, **options
    )


def _bits(study):
    return {k: v.tobytes() for k, v in study.records["REML"].items()}


def test_a_stopped_study_goes_on_and_ends_the_same(dyestuff, tmp_path, monkeypatch):
    whole = _checkpointed(dyestuff, tmp_path / "whole")
    write, written = checkpoint_module._write, []

    def stop(path, content):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            _checkpointed(dyestuff, tmp_path / "cut")
    files = sorted((tmp_path / "cut" / "REML").iterdir())
    assert [f.name for f in files] == [
        "chunk-000000.parquet", "chunk-000001.parquet", "study.json",
    ]  # fmt: skip
    before = [f.stat().st_mtime_ns for f in files]
    again = _checkpointed(dyestuff, tmp_path / "cut")
    assert [f.stat().st_mtime_ns for f in files] == before  # read, not made again
    assert _bits(again) == _bits(whole)


def test_a_changed_study_is_refused_by_name(dyestuff, tmp_path):
    _checkpointed(dyestuff, tmp_path, n_sims=32)
    with pytest.raises(CheckpointError, match="replicates was 32, now 48"):
        _checkpointed(dyestuff, tmp_path, n_sims=48)
    with pytest.raises(CheckpointError, match="differs from this one in key was #"):
        _checkpointed(dyestuff, tmp_path, n_sims=32, key=10)
    changed = dyestuff.design.replace(X=2.0 * dyestuff.design.X)
    with pytest.raises(CheckpointError, match="differs from this one in X was #"):
        jg.recovery_study(
            9, changed, dyestuff.fit.params, n_sims=32, tile=16, threads=1,
            checkpoint=tmp_path, progress=False,
        )  # fmt: skip


def test_a_folder_that_cannot_be_used(dyestuff, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used: Not a directory"):
        _checkpointed(dyestuff, tmp_path / "file")
    write, written = checkpoint_module._write, []

    def full(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            _checkpointed(dyestuff, tmp_path / "full")
    folder = tmp_path / "full" / "REML"
    assert (folder / "chunk-000000.parquet").exists()
    _checkpointed(dyestuff, tmp_path / "full")
    (folder / "chunk-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="is damaged"):
        _checkpointed(dyestuff, tmp_path / "full")


KILLED = """
import sys, jaxglmm as jg
m = jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
print("ready", flush=True)
s = jg.recovery_study(
    9, m.design, m.fit.params, n_sims=20000, tile=64, threads=2,
    checkpoint=sys.argv[1], progress=False,
)
print("done", flush=True)
"""


def _killed_study(folder, seconds):
    """Start a study and kill it some seconds after it began; whether it was done."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    if seconds:
        process.send_signal(signal.SIGKILL)
    done = process.stdout.read() == "done\n"
    process.wait(timeout=120)
    return done


def _table(folder):
    files = sorted((folder / "REML").glob("chunk-*.parquet"))
    return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    start = time.monotonic()
    assert _killed_study(tmp_path / "whole", 0)
    took = time.monotonic() - start
    for seconds in np.random.default_rng(1).uniform(0.1, took / 4, 10):
        _killed_study(tmp_path / "cut", seconds)
    assert _killed_study(tmp_path / "cut", 0)
    whole, cut = _table(tmp_path / "whole"), _table(tmp_path / "cut")
    assert len(whole) == 20000
    pd.testing.assert_frame_equal(whole, cut, check_exact=True)
    assert not list((tmp_path / "cut" / "REML").glob("*.tmp"))


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
