"""The people's door on data whose answers are known: names, numbers and text."""

import copy
import html
import pickle

import numpy as np
import pandas as pd
import pytest

import jaxglmm as jg

SLOPE = "Reaction ~ Days + (Days | Subject)"


@pytest.fixture(scope="session")
def sleep(sleepstudy):
    return jg.glmm(SLOPE, sleepstudy)


@pytest.fixture(scope="session")
def weighted(sleepstudy):
    w = 0.5 + np.arange(180) % 7
    return jg.glmm(SLOPE, sleepstudy.assign(w=w), weights="w")


@pytest.fixture(scope="session")
def penicillin():
    data = jg.datasets.penicillin()
    return jg.glmm("diameter ~ 1 + (1 | plate) + (1 | sample)", data)


@pytest.fixture(scope="session")
def pastes():
    return jg.glmm("strength ~ 1 + (1 | batch/cask)", jg.datasets.pastes())


@pytest.fixture(scope="session")
def dyestuff2():
    return jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff2())


# ---- estimates against lme4 1.1-31 ---------------------------------------------------


def check_fit(m, *, fixef, se, vcov, sdcor, loglik, aic, bic, df, groups):
    np.testing.assert_allclose(m.fixef, fixef, rtol=1e-8)
    np.testing.assert_allclose(m.se, se, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diagonal(m.vcov)), se, rtol=1e-6)
    np.testing.assert_allclose(m.varcorr["vcov"], vcov, rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose(m.varcorr["sdcor"], sdcor, rtol=1e-5, atol=1e-10)
    np.testing.assert_allclose([m.loglik, m.aic, m.bic], [loglik, aic, bic], rtol=1e-9)
    assert m.df == df
    assert m.n_groups == groups
    assert m.converged


def test_sleepstudy(sleep):
    check_fit(
        sleep,
        fixef=[251.405104848484, 10.4672859595961],
        se=[6.82455653206407, 1.54578889629826],
        vcov=[612.089938661382, 35.0716604985167, 9.6043333166356, 654.941027],
        sdcor=[24.7404514643808, 5.92213310374874, 0.0655513196541, 25.5918156267],
        loglik=-871.814135979245,
        aic=1755.62827195849,
        bic=1774.78601306383,
        df=6,
        groups={"Subject": 18},
    )
    assert sleep.status is jg.Status.CONVERGED
    assert not sleep.is_singular
    assert list(sleep.theta.index) == [
        "Subject.(Intercept)",
        "Subject.Days.(Intercept)",
        "Subject.Days",
    ]


def test_pastes(pastes):
    check_fit(
        pastes,
        fixef=[60.0533333333318],
        se=[0.676870066128146],
        vcov=[8.43366666668, 1.65730864197667, 0.823407554008991**2],
        sdcor=[2.90407759308877, 1.28736499951516, 0.823407554008991],
        loglik=-123.495372926743,
        aic=254.990745853486,
        bic=263.368124102375,
        df=4,
        groups={"cask:batch": 30, "batch": 10},
    )


def test_penicillin(penicillin):
    check_fit(
        penicillin,
        fixef=[22.9722222222204],
        se=[0.80857339098366],
        vcov=[0.716908212558296, 3.73091787438037, 0.549923139118018**2],
        sdcor=[0.846704324164165, 1.9315584056353, 0.549923139118018],
        loglik=-165.430294495543,
        aic=338.860588991087,
        bic=350.739842189391,
        df=4,
        groups={"plate": 24, "sample": 6},
    )


def test_dyestuff2_lies_on_the_boundary(dyestuff2):
    check_fit(
        dyestuff2,
        fixef=[5.6656],
        se=[0.678388031232524],
        vcov=[0.0, 3.71568427447573**2],
        sdcor=[0.0, 3.71568427447573],
        loglik=-80.9141389061442,
        aic=167.828277812288,
        bic=172.031869957275,
        df=3,
        groups={"Batch": 6},
    )
    assert dyestuff2.status is jg.Status.BOUNDARY
    assert dyestuff2.is_singular
    assert "the variance of (Intercept) | Batch is zero" in dyestuff2.verdict
    # its proof: the slope of -2 log L in theta squared, by a difference
    h, at = 1e-6, dyestuff2.fit.params
    up = jg.loglik(at.replace(theta=np.array([h**0.5])), dyestuff2.design)
    slope = -2.0 * (float(up) - dyestuff2.loglik) / h
    shown = dyestuff2.verdict.split("derivative there is ")[1].split()[0]
    np.testing.assert_allclose(float(shown), slope, rtol=2e-3)
    np.testing.assert_allclose(dyestuff2.ranef["Batch"], 0.0, atol=1e-12)


def test_maximum_likelihood(sleepstudy):
    m = jg.glmm("Reaction ~ Days + (Days || Subject)", sleepstudy, method="ML")
    np.testing.assert_allclose(m.loglik, -876.00163, atol=1e-5)  # lme4
    assert m.method == "ML"
    assert m.df == 5
    assert list(m.varcorr["group"]) == ["Subject", "Subject.1", "Residual"]


def test_varcorr_has_lme4s_columns_and_none(sleep):
    v = sleep.varcorr
    assert list(v.columns) == ["group", "var1", "var2", "vcov", "sdcor"]
    assert v["group"].tolist() == ["Subject"] * 3 + ["Residual"]
    assert v["var1"].tolist() == ["(Intercept)", "Days", "(Intercept)", None]
    assert v["var2"].tolist() == [None, None, "Days", None]


def dense(m):
    """V, generalized least squares and conditional moments in plain NumPy."""
    mats = m.matrices()
    V, X = mats.V.toarray(), mats.X.to_numpy()
    y = np.asarray(m.design.y)
    if m.design.offset is not None:
        y = y - m.design.offset
    solve = np.linalg.solve
    cov_beta = np.linalg.inv(X.T @ solve(V, X))
    beta = cov_beta @ X.T @ solve(V, y)
    G, Z = mats.G.toarray(), mats.Z.toarray()
    b = G @ Z.T @ solve(V, y - X @ beta)
    cov_b = G - G @ Z.T @ solve(V, Z @ G)
    return V, X, y, beta, cov_beta, b, cov_b


@pytest.mark.parametrize("name", ["sleep", "weighted", "penicillin", "pastes"])
def test_effects_against_dense_formulas(name, request):
    m = request.getfixturevalue(name)
    _, _, _, beta, cov_beta, b, cov_b = dense(m)
    np.testing.assert_allclose(m.fixef, beta, rtol=1e-9)
    np.testing.assert_allclose(m.vcov, cov_beta, rtol=1e-8, atol=1e-12)
    ours = np.concatenate([m.ranef[g].to_numpy().ravel() for g in m.n_groups])
    np.testing.assert_allclose(ours, b, atol=1e-8 * np.std(b), rtol=0)
    start = 0
    for group in m.n_groups:
        J, k = m.ranef[group].shape
        assert m.ranef_cov[group].shape == (J, k, k)
        for j in range(J):
            at = slice(start + j * k, start + (j + 1) * k)
            np.testing.assert_allclose(
                m.ranef_cov[group][j], cov_b[at, at], rtol=1e-7, atol=1e-10
            )
        start += J * k


@pytest.mark.parametrize("name", ["sleep", "weighted", "penicillin", "pastes"])
def test_matrices_give_the_same_likelihood(name, request):
    m = request.getfixturevalue(name)
    V, X, y, beta, cov_beta, _, _ = dense(m)
    mats = m.matrices()
    Z, G, R = (a.toarray() for a in (mats.Z, mats.G, mats.R))
    np.testing.assert_allclose(V, Z @ G @ Z.T + R, rtol=1e-12, atol=1e-10)
    Lam = mats.Lambda.toarray()
    np.testing.assert_allclose(G, m.sigma**2 * Lam @ Lam.T, rtol=1e-12, atol=1e-12)
    assert len(mats.Z_columns) == Z.shape[1]
    n, p = X.shape
    r = y - X @ beta
    logdet = np.linalg.slogdet(V)[1] - np.linalg.slogdet(cov_beta)[1]
    quad = r @ np.linalg.solve(V, r)
    dense_loglik = -0.5 * ((n - p) * np.log(2 * np.pi) + logdet + quad)
    np.testing.assert_allclose(m.loglik, dense_loglik, rtol=1e-9)


def test_weights_are_those_of_the_residuals(weighted):
    w = 0.5 + np.arange(180) % 7
    R = weighted.matrices().R.diagonal()
    np.testing.assert_allclose(R, weighted.sigma**2 / w, rtol=1e-12)


# ---- fitted values and residuals -----------------------------------------------------


def test_fitted_and_residuals(weighted):
    y, w = weighted.design.y, weighted.design.weights
    mats = weighted.matrices()
    b = weighted.ranef["Subject"].to_numpy().ravel()
    mu = mats.X.to_numpy() @ weighted.fixef.to_numpy() + mats.Z @ b
    np.testing.assert_allclose(weighted.fitted, mu, rtol=1e-12)
    raw = y - mu
    expected = {
        "response": raw,
        "working": raw,
        "pearson": np.sqrt(w) * raw,
        "deviance": np.sqrt(w) * raw,
        "scaled": np.sqrt(w) * raw / weighted.sigma,
    }
    for kind, values in expected.items():
        ours = weighted.residuals(kind)
        np.testing.assert_allclose(ours, values, atol=1e-9)
    np.testing.assert_allclose(weighted.deviance, np.sum(w * raw**2), rtol=1e-12)
    with pytest.raises(ValueError, match="unknown residuals 'foo'"):
        weighted.residuals("foo")


# ---- prediction ----------------------------------------------------------------------


@pytest.mark.parametrize("re", ["conditional", "population"])
def test_predict_on_the_training_data(sleep, sleepstudy, re):
    again = sleep.predict(sleepstudy, re=re)
    np.testing.assert_allclose(again, sleep.predict(re=re), rtol=1e-12)
    if re == "conditional":
        np.testing.assert_allclose(again, sleep.fitted, rtol=1e-12)
    else:
        days = sleepstudy["Days"]
        line = sleep.fixef.iloc[0] + sleep.fixef.iloc[1] * days
        np.testing.assert_allclose(again, line, rtol=1e-12)
    assert again.index.equals(sleepstudy.index)


NEW = pd.DataFrame(
    {"Days": [0.0, 5, 5, 2, 12], "Subject": ["308", "new", "new", "other", None]},
    index=list("vwxyz"),
)


def test_new_levels_get_their_mean(sleep):
    ours = sleep.predict(NEW)
    a, slope = sleep.fixef
    b = sleep.ranef["Subject"].loc["308"].to_numpy()
    expected = [a + b[0], a + 5 * slope, a + 5 * slope, a + 2 * slope, a + 12 * slope]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert list(ours.index) == list("vwxyz")


def test_new_levels_are_drawn_once_per_level(sleep):
    drawn = sleep.predict(NEW, new_levels="draw", key=3)
    np.testing.assert_allclose(drawn["v"], sleep.predict(NEW)["v"], rtol=1e-12)
    assert drawn["w"] == drawn["x"]
    twice = sleep.predict(NEW, new_levels="draw", key=3)
    np.testing.assert_array_equal(drawn, twice)
    other = sleep.predict(NEW, new_levels="draw", key=4)
    assert np.all(drawn[["w", "y", "z"]] != other[["w", "y", "z"]])
    with pytest.raises(ValueError, match="needs key="):
        sleep.predict(NEW, new_levels="draw")


def test_draws_have_the_covariance_of_the_effects(sleep):
    J = 20_000
    new = pd.DataFrame(
        {"Days": np.tile([0.0, 1.0], J), "Subject": np.repeat(np.arange(J) + 9000, 2)}
    )
    drawn = sleep.predict(new, new_levels="draw", key=1).to_numpy().reshape(J, 2)
    effects = np.c_[drawn[:, 0], drawn[:, 1] - drawn[:, 0]] - sleep.fixef.to_numpy()
    v = sleep.varcorr["vcov"]
    cov = np.array([[v[0], v[2]], [v[2], v[1]]])
    se_mean = np.sqrt(np.diagonal(cov) / J)
    assert np.all(np.abs(effects.mean(axis=0)) < 4 * se_mean)
    scale = np.sqrt(np.outer(np.diagonal(cov), np.diagonal(cov)))
    gap = np.abs(np.cov(effects.T) - cov) / scale
    assert np.max(gap) < 4 * np.sqrt(2 / J)


def test_new_levels_refused(sleep, sleepstudy):
    with pytest.raises(jg.DataError, match="Subject: new, other; 1 missing"):
        sleep.predict(NEW, new_levels="error")
    known = sleep.predict(sleepstudy, new_levels="error")
    np.testing.assert_allclose(known, sleep.fitted, rtol=1e-12)


def test_population_prediction_needs_no_groups(sleep):
    out = sleep.predict({"Days": [1.0, np.nan, 3.0]}, re="population", se=True)
    X = np.array([[1.0, 1.0], [1.0, 3.0]])
    se = np.sqrt(np.diagonal(X @ sleep.vcov.to_numpy() @ X.T))
    np.testing.assert_allclose(out["se"].iloc[[0, 2]], se, rtol=1e-10)
    assert out.loc[1].isna().all()


@pytest.mark.parametrize("name", ["sleep", "weighted", "penicillin"])
def test_conditional_standard_errors_are_hendersons(name, request):
    m = request.getfixturevalue(name)
    mats = m.matrices()
    X, Z, G = mats.X.to_numpy(), mats.Z.toarray(), mats.G.toarray()
    R_inv = np.diag(1.0 / mats.R.diagonal())
    A = np.block(
        [[X.T @ R_inv @ X, X.T @ R_inv @ Z], [Z.T @ R_inv @ X, Z.T @ R_inv @ Z]]
    )
    A[X.shape[1] :, X.shape[1] :] += np.linalg.inv(G)
    rows = np.hstack([X, Z])
    theirs = np.sqrt(np.sum(rows * np.linalg.solve(A, rows.T).T, axis=1))
    np.testing.assert_allclose(m.predict(se=True)["se"], theirs, rtol=1e-8)


def test_standard_error_of_a_new_level(sleep):
    out = sleep.predict(NEW, se=True)
    x = np.array([1.0, 5.0])
    v = sleep.varcorr["vcov"]
    Q = np.array([[v[0], v[2]], [v[2], v[1]]])
    variance = x @ sleep.vcov.to_numpy() @ x + x @ Q @ x
    np.testing.assert_allclose(out.loc["w", "se"], np.sqrt(variance), rtol=1e-9)


def test_stateful_terms_in_new_data(sleepstudy):
    week = np.where(sleepstudy["Days"] < 5, "a", "b")
    data = sleepstudy.assign(week=week, x=np.sin(np.arange(180)))
    m = jg.glmm("Reaction ~ poly(Days, 2) + scale(x) * week + (1 | Subject)", data)
    part = data.iloc[30:37]
    np.testing.assert_allclose(m.predict(part), m.fitted.iloc[30:37], rtol=1e-10)
    with pytest.raises(jg.DataError, match=r"unseen level.*c"):
        m.predict(part.assign(week="c"))


def test_prediction_of_nested_groups(pastes):
    data = jg.datasets.pastes().iloc[[0, 7, 20]]
    fitted = pastes.fitted.iloc[[0, 7, 20]]
    np.testing.assert_allclose(pastes.predict(data), fitted, rtol=1e-12)
    # a new cask of an old batch keeps the batch's effect
    new = data.astype({"cask": str}).assign(cask="new")
    batch = pastes.ranef["batch"].loc[data["batch"].astype(str), "(Intercept)"]
    expected = pastes.fixef.iloc[0] + batch.to_numpy()
    np.testing.assert_allclose(pastes.predict(new), expected, rtol=1e-12)


def test_offset_column(sleepstudy):
    data = sleepstudy.assign(off=10.0 * sleepstudy["Days"])
    m = jg.glmm("Reaction ~ Days + (1 | Subject)", data, offset="off")
    plain = jg.glmm("Reaction ~ Days + (1 | Subject)", sleepstudy)
    np.testing.assert_allclose(m.fixef + np.array([0.0, 10.0]), plain.fixef, rtol=1e-10)
    np.testing.assert_allclose(m.fitted, plain.fitted, rtol=1e-10)
    np.testing.assert_allclose(m.predict(data), m.fitted, rtol=1e-12)
    with pytest.raises(jg.DataError, match="no column 'off' in newdata"):
        m.predict(sleepstudy)


def test_offset_array(sleepstudy):
    off = 10.0 * sleepstudy["Days"].to_numpy()
    m = jg.glmm("Reaction ~ Days + (1 | Subject)", sleepstudy, offset=off)
    with pytest.raises(jg.DataError, match="pass offset=, or fit with offset='column'"):
        m.predict(sleepstudy)
    again = m.predict(sleepstudy, offset=off)
    np.testing.assert_allclose(again, m.fitted, rtol=1e-12)
    with pytest.raises(ValueError, match="belongs to newdata="):
        m.predict(offset=off)


def test_unknown_choices(sleep):
    for option in ("re", "type", "new_levels"):
        with pytest.raises(ValueError, match=f"{option}='foo' is not one of"):
            sleep.predict(**{option: "foo"})
    with pytest.raises(ValueError, match="re='foo'"):
        sleep.simulate(1, key=1, re="foo")
    with pytest.raises(ValueError, match="method='profil'"):
        sleep.confint(method="profil")
    with pytest.raises(ValueError, match="between 0 and 1"):
        sleep.confint(level=95)


# ---- simulation and intervals --------------------------------------------------------


def test_simulated_moments(weighted):
    n = 4000
    ys = weighted.simulate(n, key=5)
    assert ys.shape == (180, n)
    V = weighted.matrices().V.toarray()
    mean = weighted.predict(re="population").to_numpy()
    z = (ys.mean(axis=1) - mean) / np.sqrt(np.diagonal(V) / n)
    assert np.max(np.abs(z)) < 5
    ratio = ys.var(axis=1, ddof=1) / np.diagonal(V)
    assert np.max(np.abs(ratio - 1)) < 5 * np.sqrt(2 / n)
    # two rows of one subject
    scale = np.sqrt(V[0, 0] * V[5, 5])
    assert abs(np.cov(ys.iloc[0], ys.iloc[5])[0, 1] - V[0, 5]) < 5 * scale / np.sqrt(n)
    np.testing.assert_array_equal(ys, weighted.simulate(n, key=5))


def test_conditional_simulation_keeps_the_modes(weighted):
    n = 4000
    ys = weighted.simulate(n, key=np.int64(6), re="conditional")
    sd = weighted.sigma / np.sqrt(weighted.design.weights)
    z = (ys.mean(axis=1) - weighted.fitted) / (sd / np.sqrt(n))
    assert np.max(np.abs(z)) < 5
    assert np.max(np.abs(ys.std(axis=1) / sd - 1)) < 5 / np.sqrt(2 * n)


def test_confint(sleep):
    ci = sleep.confint()
    np.testing.assert_allclose(
        ci.loc["Days"], [7.437594, 13.496978], atol=1e-6
    )  # lme4, method = "Wald"
    assert list(ci.columns) == ["lower", "upper"]
    wide = sleep.confint(level=0.99)
    ratio = (wide["upper"] - wide["lower"]) / (ci["upper"] - ci["lower"])
    np.testing.assert_allclose(ratio, 2.5758293 / 1.9599640, rtol=1e-6)


# ---- tables and text -----------------------------------------------------------------


def test_tidy(sleep):
    t = sleep.tidy()
    assert t.columns.tolist() == [
        "effect",
        "group",
        "term",
        "estimate",
        "std_error",
        "statistic",
        "conf_low",
        "conf_high",
    ]
    assert t["term"].tolist() == [
        "(Intercept)",
        "Days",
        "sd__(Intercept)",
        "sd__Days",
        "cor__(Intercept).Days",
        "sd__Observation",
    ]
    np.testing.assert_allclose(t["estimate"].iloc[2:], sleep.varcorr["sdcor"])
    np.testing.assert_allclose(t["statistic"].iloc[1], 6.771, atol=1e-3)


def test_glance(sleep):
    (row,) = sleep.glance().to_dict("records")
    assert row["n_obs"] == 180
    assert row["df_residual"] == 174
    assert row["status"] == "CONVERGED"
    assert row["method"] == "REML"
    assert row["family"] == "gaussian"
    np.testing.assert_allclose(row["aic"], 1755.62827195849, rtol=1e-9)


def test_augment(weighted, sleepstudy):
    a = weighted.augment()
    assert a.columns.tolist() == [
        "Reaction",
        "fitted",
        "resid",
        "fixed",
        "Subject",
        "weights",
    ]
    np.testing.assert_allclose(a["fitted"] + a["resid"], sleepstudy["Reaction"])
    assert a["Subject"].tolist() == sleepstudy["Subject"].tolist()


SUMMARY = """\
Linear mixed model fit by REML
Formula: Reaction ~ Days + (Days | Subject)

REML criterion at convergence: 1743.628

Scaled residuals:
    Min      1Q Median     3Q    Max
-3.9536 -0.4634 0.0231 0.4634 5.1793

Random effects:
 Groups   Name        Variance Std.Dev.  Corr
 Subject  (Intercept)   612.09   24.740
          Days           35.07    5.922 0.066
 Residual               654.94   25.592
Number of obs: 180, groups: Subject, 18

Fixed effects:
            Estimate Std. Error t value
(Intercept)  251.405      6.825  36.838
Days          10.467      1.546   6.771

Correlation of fixed effects:
     (Intercept)
Days      -0.138
"""


def test_summary(sleep):
    shown, verdict = repr(sleep.summary()).rsplit("\n", 1)
    assert shown == SUMMARY
    assert verdict == sleep.verdict
    assert verdict.startswith("Converged (Newton decrement ")
    short = repr(sleep)
    assert "Scaled residuals" not in short
    assert "REML criterion at convergence: 1743.628" in short


def test_html(sleep):
    text = sleep._repr_html_()
    assert "<td>251.405</td><td>6.825</td><td>36.838</td>" in text
    assert html.escape(sleep.verdict) in text
    assert text.count("<table>") == text.count("</table>") == 2


def test_maximum_likelihood_prints_criteria(sleepstudy):
    m = jg.glmm(SLOPE, sleepstudy, method="ML")
    assert "AIC" in repr(m)
    np.testing.assert_allclose(m.aic, 1763.9393, atol=1e-4)  # lme4
    assert "1763.9" in repr(m)


# ---- tables of other kinds, missing values -------------------------------------------


def test_other_tables_give_the_same_fit(sleep, sleepstudy):
    polars = pytest.importorskip("polars")
    pyarrow = pytest.importorskip("pyarrow")
    plain = sleepstudy.astype({"Subject": str})
    columns = {name: plain[name].to_numpy() for name in plain}
    lists = {name: list(values) for name, values in columns.items()}
    for data in (columns, polars.DataFrame(lists), pyarrow.table(lists)):
        m = jg.glmm(SLOPE, data)
        np.testing.assert_allclose(m.fixef, sleep.fixef, rtol=1e-12)
        np.testing.assert_allclose(m.loglik, sleep.loglik, rtol=1e-12)
        np.testing.assert_allclose(m.predict(data), sleep.fitted, rtol=1e-10)


def test_missing_rows_are_dropped_and_counted(sleepstudy):
    data = sleepstudy.copy()
    data.loc[[3, 8], "Reaction"] = np.nan
    data["Days"] = data["Days"].astype(float)
    data.loc[[8, 100, 101], "Days"] = np.nan
    m = jg.glmm(SLOPE, data)
    assert m.n_obs == 176
    note = "4 rows with missing values dropped (Reaction: 2, Days: 3)"
    assert note in repr(m)
    assert note in m._repr_html_()
    kept = data.dropna()
    np.testing.assert_allclose(m.fixef, jg.glmm(SLOPE, kept).fixef, rtol=1e-12)
    assert m.fitted.index.equals(kept.index)
    assert m.residuals().index.equals(kept.index)
    with pytest.raises(jg.DataError, match=r"missing values .*missing='raise'"):
        jg.glmm(SLOPE, data, missing="raise")


# ---- options -------------------------------------------------------------------------


def test_contrasts(sleepstudy):
    data = sleepstudy.assign(
        f=pd.Categorical(np.array(list("abc"))[np.arange(180) % 3])
    )
    formula = "Reaction ~ f + (1 | Subject)"
    treatment = jg.glmm(formula, data, method="ML")
    total = jg.glmm(formula, data, method="ML", contrasts={"f": "sum"})
    assert list(total.fixef.index) == ["(Intercept)", "f1", "f2"]
    np.testing.assert_allclose(total.loglik, treatment.loglik, rtol=1e-12)
    a, b, c = treatment.fixef
    mean = a + (b + c) / 3
    np.testing.assert_allclose(total.fixef, [mean, a - mean, a + b - mean], rtol=1e-8)


def test_start(sleep, sleepstudy):
    near = jg.glmm(SLOPE, sleepstudy, start=sleep.theta)
    np.testing.assert_allclose(near.theta, sleep.theta, atol=1e-7)
    assert int(near.fit.n_iter) <= 2
    far = jg.glmm(SLOPE, sleepstudy, start=[5.0, -2.0, 3.0])
    np.testing.assert_allclose(far.theta, sleep.theta, atol=1e-7)


def test_lbfgs(sleep, sleepstudy):
    m = jg.glmm(SLOPE, sleepstudy, control=jg.Control(optimizer="lbfgs"))
    assert m.converged
    np.testing.assert_allclose(m.loglik, sleep.loglik, atol=1e-8)
    np.testing.assert_allclose(m.theta, sleep.theta, atol=1e-4)


def test_what_did_not_converge(sleepstudy):
    control = jg.Control(max_iter=1)
    start = [9.0, 5.0, 9.0]
    with pytest.warns(jg.ConvergenceWarning, match="iteration limit.*max_iter") as got:
        m = jg.glmm(SLOPE, sleepstudy, start=start, control=control)
    assert got[0].filename == __file__
    assert not m.converged
    assert m.status is jg.Status.MAX_ITER
    assert str(got[0].message) == m.verdict
    with pytest.raises(jg.ConvergenceError, match="iteration limit"):
        jg.glmm(SLOPE, sleepstudy, start=start, control=control, strict=True)


def test_family_and_method_names(sleep, sleepstudy):
    m = jg.glmm(SLOPE, sleepstudy, family=jg.Gaussian(), method="REML")
    assert m.loglik == sleep.loglik


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_model_can_be_copied(sleep, sleepstudy, clone):
    other = clone(sleep)
    np.testing.assert_array_equal(other.fixef, sleep.fixef)
    assert repr(other.summary()) == repr(sleep.summary())
    np.testing.assert_array_equal(other.predict(sleepstudy), sleep.predict(sleepstudy))


def test_a_model_with_transformations_can_be_pickled(sleepstudy):
    m = jg.glmm("log(Reaction) ~ poly(Days, 2) + (1 | Subject)", sleepstudy)
    other = pickle.loads(pickle.dumps(m))
    np.testing.assert_allclose(other.predict(sleepstudy), m.fitted, rtol=1e-12)


def test_everything_is_numpy_and_double(sleep):
    import jax

    leaves = jax.tree.leaves((sleep.fit, sleep.design))
    assert not any(isinstance(x, jax.Array) for x in leaves)
    assert {x.dtype for x in leaves if x.dtype.kind == "f"} == {np.dtype(np.float64)}


# ---- unusual but legitimate models ---------------------------------------------------


def test_no_fixed_effects(sleepstudy):
    m = jg.glmm("Reaction ~ 0 + (1 | Subject)", sleepstudy)
    assert len(m.fixef) == 0
    assert m.vcov.shape == (0, 0)
    assert "(none)" in repr(m)
    V, y = m.matrices().V.toarray(), m.design.y
    quad = y @ np.linalg.solve(V, y)
    loglik = -0.5 * (180 * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + quad)
    np.testing.assert_allclose(m.loglik, loglik, rtol=1e-10)
    assert m.predict(sleepstudy.iloc[:3], se=True)["se"].notna().all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_the_response(sleep, sleepstudy, scale):
    data = sleepstudy.assign(Reaction=scale * sleepstudy["Reaction"])
    m = jg.glmm(SLOPE, data)
    np.testing.assert_allclose(m.fixef, scale * sleep.fixef, rtol=1e-9)
    np.testing.assert_allclose(m.sigma, scale * sleep.sigma, rtol=1e-9)
    np.testing.assert_allclose(m.theta, sleep.theta, rtol=1e-6)
    assert "e+" in repr(m) or "e-" in repr(m)


def test_boundary_is_told_from_a_small_unit(sleepstudy):
    half = np.arange(180) % 2
    data = sleepstudy.assign(Days=1e9 * sleepstudy["Days"], g=half)
    m = jg.glmm("Reaction ~ Days + (Days || Subject) + (1 | g)", data)
    assert m.status is jg.Status.BOUNDARY
    assert "the variance of (Intercept) | g is zero" in m.verdict
    assert m.verdict.count("is zero") == 1


def test_a_term_that_the_fixed_effects_hold_is_named(sleepstudy):
    data = sleepstudy.assign(f=np.array(list("abc"))[np.arange(180) % 3])
    with pytest.warns(jg.ConvergenceWarning, match=r"do not determine \(1 \| f\)"):
        m = jg.glmm("Reaction ~ f + (1 | Subject) + (1 | f)", data)
    assert m.status is jg.Status.NOT_IDENTIFIED


def test_terms_that_say_the_same_are_named(sleepstudy):
    with pytest.warns(jg.ConvergenceWarning, match=r"apart: \(1 \| Subject\), \(1 \|"):
        m = jg.glmm("Reaction ~ Days + (1 | Subject) + (1 | Subject)", sleepstudy)
    assert m.status is jg.Status.NOT_IDENTIFIED


def test_response_that_the_groups_reproduce(sleepstudy):
    """The likelihood is unbounded: never an optimum, whatever rounding makes of it."""
    for seed in range(6):
        values = np.random.default_rng(seed).normal(size=18)
        data = sleepstudy.assign(Reaction=np.repeat(values, 10))
        with pytest.warns(jg.ConvergenceWarning, match="within groups the response"):
            m = jg.glmm("Reaction ~ 1 + (1 | Subject)", data)
        assert not m.converged
        # the likelihood is unbounded: rounding or the limit ends the climb
        assert m.status in (jg.Status.NONFINITE, jg.Status.MAX_ITER)


def test_unused_levels_and_boolean_groups(sleepstudy):
    data = sleepstudy.assign(
        g=np.arange(180) // 10 % 2 == 0,
        Subject=sleepstudy["Subject"].cat.add_categories(["none"]),
    )
    m = jg.glmm("Reaction ~ Days + (1 | Subject) + (1 | g)", data)
    assert m.n_groups == {"Subject": 18, "g": 2}
    assert list(m.ranef["g"].index) == ["False", "True"]
    assert "none" not in m.ranef["Subject"].index
