"""Ordered responses: whose order counts, names of levels, predictions in levels."""

import jax
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit

import jaxglmm as jg
from jaxglmm.encoding import model_frame
from jaxglmm.errors import DataError, FormulaError, NoticeWarning

LEVELS = ["low", "medium", "high", "very high"]
LIST = str(LEVELS)
THRESHOLDS = ["low|medium", "medium|high", "high|very high"]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    g, x = np.repeat(np.arange(20), 10), rng.normal(size=200)
    c = np.digitize(x + rng.logistic(size=200), [-1.0, 0.5, 2.0])
    s = np.array(LEVELS)[c]
    return pd.DataFrame(
        {
            "s": s,
            "x": x,
            "g": g,
            "c": c,
            "plain": pd.Categorical(s, LEVELS),
            "told": pd.Categorical(s, LEVELS, ordered=True),
            "more": pd.Categorical(s, ["none", *LEVELS, "top"], ordered=True),
            "numbers": pd.Categorical(c),
            "string": pd.Series(s, dtype="string"),
            "two": np.where(c > 1, "yes", "no"),
            "f": np.array(list("abc"))[rng.integers(0, 3, 200)],
            "k": np.array(list("uv"))[rng.integers(0, 2, 200)],
        }
    )


@pytest.fixture(scope="module")
def proportional_odds(data):
    """Slope and thresholds where the variance is zero, by scipy."""
    x, c = data["x"].to_numpy(), data["c"].to_numpy()

    def minus_loglik(p):
        tau = np.concatenate([[-np.inf], np.cumsum([p[1], *np.exp(p[2:])]), [np.inf]])
        eta = p[0] * x
        return -np.sum(np.log(expit(tau[c + 1] - eta) - expit(tau[c] - eta)))

    best = minimize(minus_loglik, [0.0, -1.0, 0.0, 0.0], options={"gtol": 1e-8})
    return best.x[0], np.cumsum([best.x[1], *np.exp(best.x[2:])]), -best.fun


@pytest.fixture(scope="module")
def fitted(data):
    return jg.glmm("told ~ x + (1 | g)", data, family="cumulative")


ORDERED = [
    "told", f"ordered(s, levels={LIST})", f"factor(s, levels={LIST})",
    "ordered(plain)", f"ordered(told, levels={LIST})", "ordered(c)", "factor(c)",
    "numbers", f"ordered(string, levels={LIST})",
]  # fmt: skip


@pytest.mark.parametrize("response", ORDERED)
def test_an_order_that_was_given_is_honoured(data, proportional_odds, response):
    m = jg.glmm(f"{response} ~ x + (1 | g)", data, family="cumulative")
    slope, tau, loglik = proportional_odds
    assert m.is_singular  # so that the random effects are none
    np.testing.assert_allclose(m.fixef["x"], slope, rtol=1e-4)
    np.testing.assert_allclose(m.dispersion, tau, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(m.loglik, loglik, rtol=1e-9)
    by_code = any(name in response for name in ("(c)", "numbers"))
    assert list(m.dispersion.index) == (
        ["0|1", "1|2", "2|3"] if by_code else THRESHOLDS
    )


def test_another_order_is_another_model(data, fitted):
    """Turned round the slope changes its sign, and -tau come in reverse."""
    turned = f"factor(s, levels={LEVELS[::-1]}) ~ x + (1 | g)"
    m = jg.glmm(turned, data, family="cumulative")
    np.testing.assert_allclose(m.fixef, -fitted.fixef, rtol=1e-5)
    np.testing.assert_allclose(m.dispersion[::-1], -fitted.dispersion.to_numpy(), 1e-5)
    assert m.dispersion.index[0] == "very high|high"


@pytest.mark.parametrize(
    "response",
    ["s", "string", "ordered(s)", "factor(s)", "plain", "factor(plain)", "two",
     "s.str.upper()"],
)  # fmt: skip
def test_the_alphabet_is_no_order(data, response):
    with pytest.raises(DataError, match="order") as error:
        jg.glmm(f"{response} ~ x + (1 | g)", data, family="cumulative")
    text = str(error.value)
    levels = ["no", "yes"] if response == "two" else LEVELS
    assert all(level.lower() in text.lower() for level in levels)
    assert "levels=['...', ...]" in text
    assert "pd.Categorical" in text
    inner = response.removeprefix("ordered(").removeprefix("factor(").removesuffix(")")
    assert f"ordered({'s.str.upper()' if 'upper' in inner else inner}" in text
    assert ("write ordered(plain)" in text) == ("plain" in response)


def test_numbers_that_may_be_no_categories_are_refused(data):
    with pytest.raises(DataError, match=r"holds numbers. Write ordered\(c\)"):
        jg.glmm("c ~ x + (1 | g)", data, family="cumulative")


def test_levels_without_a_row_are_told(data, fitted):
    with pytest.warns(NoticeWarning, match="no row has the levels none, top"):
        m = jg.glmm("more ~ x + (1 | g)", data, family="cumulative")
    assert "Note: no row has the levels none, top of the response more" in repr(m)
    assert list(m.dispersion.index) == THRESHOLDS
    np.testing.assert_allclose(m.fixef, fitted.fixef, rtol=1e-10)
    levels = ["low", "medium", "never", "high", "very high"]
    with pytest.warns(NoticeWarning, match="no row has the level never"):
        model_frame(f"ordered(s, levels={levels}) ~ x + (1 | g)", data, codes="ordered")
    with pytest.raises(DataError, match="lacks the value"):
        model_frame("factor(s, levels=['low']) ~ x + (1 | g)", data, codes="ordered")


def test_one_level_is_nothing_to_explain(data):
    with pytest.raises(DataError, match="constant: all 200 values are low"):
        jg.glmm("told ~ x + (1 | g)", data.assign(
            told=pd.Categorical(["low"] * 200, LEVELS, ordered=True)
        ), family="cumulative")  # fmt: skip


def test_thresholds_are_named_by_the_levels_they_part(fitted):
    assert list(fitted.dispersion.index) == THRESHOLDS
    assert list(fitted.dispersion_se.index) == THRESHOLDS
    assert all(name in repr(fitted) for name in THRESHOLDS)
    tidy = fitted.tidy().set_index("term").loc[THRESHOLDS]
    np.testing.assert_array_equal(tidy["estimate"], fitted.dispersion)
    np.testing.assert_array_equal(tidy["std_error"], fitted.dispersion_se)
    half = 1.959963984540054 * fitted.dispersion_se.to_numpy()
    np.testing.assert_allclose(tidy["conf_high"] - tidy["estimate"], half)
    boot = fitted.bootstrap(4, key=1, progress=False)
    assert list(boot.estimate.index) == ["x", "sd_(Intercept)|g", *THRESHOLDS]


def masses(x, beta, psi):
    """Probabilities of the levels, (n, 4)."""
    tau = np.cumsum([psi[0], *np.exp(psi[1:])])
    below = expit(tau - np.asarray(x)[:, None] * beta)
    n = len(below)
    return np.diff(np.hstack([np.zeros((n, 1)), below, np.ones((n, 1))]), axis=1)


def test_predictions_are_in_levels(data, fitted):
    new = pd.DataFrame({"x": [-2.0, 0.1, np.nan, 3.0], "g": [1, 2, 3, 99]})
    beta, psi = fitted.fixef["x"], np.asarray(fitted.fit.params.psi)
    p = masses(new["x"], beta, psi)
    found = fitted.predict(new)
    assert list(found.columns) == LEVELS
    np.testing.assert_allclose(found, p, rtol=1e-9)  # the variance is zero
    np.testing.assert_allclose(fitted.predict(), masses(data["x"], beta, psi), 1e-9)
    best = fitted.predict(new, type="class")
    assert best.cat.ordered
    assert list(best.cat.categories) == LEVELS
    expected = np.array(LEVELS)[p[[0, 1, 3]].argmax(axis=1)]
    assert best.dropna().tolist() == expected.tolist()
    assert best.isna().tolist() == [False, False, True, False]
    np.testing.assert_allclose(fitted.predict(new, type="link"), new["x"] * beta)
    codes = p[[0, 1, 3]] @ np.arange(4)
    np.testing.assert_allclose(
        fitted.fitted, masses(data["x"], beta, psi) @ np.arange(4), rtol=1e-9
    )
    assert np.all(np.diff(codes) > 0)
    out = fitted.augment()
    assert out["told"].tolist() == data["told"].tolist()
    np.testing.assert_allclose(out["fixed"], fitted.fitted, rtol=1e-9)


def test_standard_errors_of_probabilities(fitted):
    """The delta method, with derivatives by differences."""
    x = np.array([-2.0, 0.1, 3.0])
    found = fitted.predict(pd.DataFrame({"x": x}), re="population", se=True)
    at = np.array([fitted.fixef["x"], *fitted.fit.params.psi])
    where = [0, 2, 3, 4]  # theta lies between
    cov, h = np.asarray(fitted.fit.vcov)[np.ix_(where, where)], 1e-6
    steps = [
        (masses(x, v[0], v[1:]) - masses(x, w[0], w[1:])) / (2 * h)
        for v, w in ((at + h * e, at - h * e) for e in np.eye(4))
    ]
    D = np.stack(steps, axis=-1)
    se = np.sqrt(np.einsum("nki,ij,nkj->nk", D, cov, D))
    np.testing.assert_allclose(found["se"], se, rtol=1e-6)
    np.testing.assert_allclose(found["fit"].sum(axis=1), 1.0)


def test_class_is_for_levels_alone(data, fitted, sleepstudy):
    with pytest.raises(ValueError, match="most probable level"):
        fitted.predict(type="class", se=True, re="population")
    m = jg.glmm("Reaction ~ Days + (1 | Subject)", sleepstudy)
    with pytest.raises(ValueError, match="most probable level"):
        m.predict(type="class")


def test_simulated_levels_can_be_fitted(data, fitted):
    draws = fitted.simulate(300, key=1)
    assert list(draws["sim_1"].cat.categories) == LEVELS
    assert draws["sim_1"].cat.ordered
    codes = np.stack([draws[c].cat.codes for c in draws], axis=1)
    p = fitted.predict().to_numpy()
    for k in range(4):
        share, mean = np.mean(codes == k), p[:, k].mean()
        assert abs(share - mean) < 4 * np.sqrt(mean * (1 - mean) / codes.size)
    again = data.assign(told=draws["sim_1"])
    m = jg.glmm("told ~ x + (1 | g)", again, family="cumulative")
    assert m.converged
    assert list(m.dispersion.index) == THRESHOLDS
    assert abs(m.fixef["x"] - fitted.fixef["x"]) < 4 * fitted.se["x"]


def test_levels_of_a_binary_response_are_honoured(data):
    m = jg.glmm("two ~ x + (1 | g)", data, family="binomial")
    yes = data.assign(two=(data["two"] == "yes").astype(float))
    np.testing.assert_allclose(
        m.loglik, jg.glmm("two ~ x + (1 | g)", yes, family="binomial").loglik, 1e-12
    )
    for call in ("factor", "ordered"):
        turned = f"{call}(two, levels=['yes', 'no']) ~ x + (1 | g)"
        other = jg.glmm(turned, data, family="binomial")
        np.testing.assert_allclose(other.fixef, -m.fixef, rtol=1e-5)
    draws = m.simulate(2, key=3)
    assert set(draws["sim_1"]) == {"no", "yes"}
    again = jg.glmm("two ~ x + (1 | g)", data.assign(two=draws["sim_1"]),
                    family="binomial")  # fmt: skip
    assert again.converged


def test_levels_of_the_response_in_new_data(data):
    formula = f"ordered(s, levels={LIST}) ~ x + (1 | g)"
    frame = model_frame(formula, data, codes="ordered")
    new = data[:4].assign(s=["very high", "low", None, "high"])
    y = frame.encoder.transform(new, response=True).y
    np.testing.assert_array_equal(y, [3.0, 0.0, np.nan, 2.0])
    frame = model_frame("told ~ x + (1 | g)", data, codes="ordered")
    with pytest.raises(DataError, match="unseen level"):
        frame.encoder.transform(data[:2].assign(told=["low", "odd"]), response=True)


# -- the thresholds are the intercept --------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "columns"),
    [
        ("0 + f", "fa, fb, fc"),
        ("x + f - 1", "fa, fb, fc"),
        ("0 + f:k", "fa:ku, fb:ku, fc:ku, fa:kv, fb:kv, fc:kv"),
        ("0 + I(1.0 * (x > 0)) + I(1.0 * (x <= 0))", "x > 0"),
    ],
)
def test_a_second_intercept_is_refused(data, formula, columns):
    with pytest.raises(FormulaError, match=r"thresholds .* are its intercept") as error:
        jg.glmm(f"told ~ {formula} + (1 | g)", data, family="cumulative")
    assert columns in str(error.value)
    assert "without `0 +` or `- 1`" in str(error.value)


def test_a_slope_without_an_intercept_is_the_same_model(data, fitted):
    m = jg.glmm("told ~ 0 + x + (1 | g)", data, family="cumulative")
    np.testing.assert_allclose(m.fixef, fitted.fixef, rtol=1e-12)
    assert jax.tree.map(np.shape, m.fit) == jax.tree.map(np.shape, fitted.fit)


def test_levels_given_twice_are_refused(data):
    for call in ("ordered", "factor"):
        formula = f"{call}(s, levels=['low', 'low', 'high']) ~ x + (1 | g)"
        with pytest.raises(DataError, match="has low more than once"):
            model_frame(formula, data, codes="ordered")
