"""Bad input through the people's door: what the message says, nothing coerced."""

import numpy as np
import pandas as pd
import pytest

import jaxglmm as jg

FORMULA = "Reaction ~ Days + (1 | Subject)"


def check_refused(data, match, formula=FORMULA, error=jg.DataError, **options):
    with pytest.raises(error, match=match):
        jg.glmm(formula, data, **options)


@pytest.mark.parametrize(
    ("formula", "match"),
    [
        ("Reaction ~ Dayz + (1 | Subject)", "no column 'Dayz'.*Did you mean 'Days'"),
        ("Reactoin ~ Days + (1 | Subject)", "no column 'Reactoin'.*'Reaction'"),
        ("Reaction ~ Days + (1 | Subj)", "no column 'Subj'.*'Subject'"),
    ],
)
def test_unknown_column(sleepstudy, formula, match):
    check_refused(sleepstudy, match, formula)


@pytest.mark.parametrize(
    ("formula", "match", "place"),
    [
        ("Reaction ~ Days + * (1 | Subject)", "found '\\*'", "*"),
        ("Reaction ~ Days + (1 | Subject", "never closed", "("),
        ("Reaction ~ Days + (1 |)", "no grouping factor", "|"),
        ("~ Days + (1 | Subject)", "Name the response", "~"),
    ],
)
def test_formula_error_points_at_the_place(sleepstudy, formula, match, place):
    with pytest.raises(jg.FormulaError, match=match) as caught:
        jg.glmm(formula, sleepstudy)
    _, shown, arrow = str(caught.value).rsplit("\n", 2)
    assert shown[arrow.index("^")] == place


def test_no_random_effects(sleepstudy):
    check_refused(sleepstudy, "no random effects", "Reaction ~ Days", jg.FormulaError)


def test_grouping_factor_with_one_level(sleepstudy):
    data = sleepstudy.assign(g="a")
    check_refused(
        data, r"'g' has 1 level.*Drop", "Reaction ~ Days + (1 | g)", jg.FormulaError
    )


def test_one_row_per_level(sleepstudy):
    data = sleepstudy.assign(row=np.arange(180))
    match = r"\(1 \| row\) has as many random effects as there are rows \(180\)"
    check_refused(data, match, "Reaction ~ Days + (1 | row)", jg.FormulaError)


def test_more_random_effects_than_rows(sleepstudy):
    data = sleepstudy.assign(g=np.arange(180) % 120)
    match = "240 random effects .*180 rows"
    check_refused(data, match, "Reaction ~ Days + (1 + Days | g)", jg.FormulaError)


def test_constant_response(sleepstudy):
    check_refused(sleepstudy.assign(Reaction=3.0), "constant: all 180 values are 3")


def test_empty_response(sleepstudy):
    check_refused(sleepstudy.iloc[:0], "no rows")
    check_refused(sleepstudy.assign(Reaction=np.nan), "no row is left.*Reaction: 180")


def test_response_that_the_covariates_reproduce(sleepstudy):
    for scale in (1e-9, 1.0, 1e9):
        data = sleepstudy.assign(Reaction=scale * (2.0 * sleepstudy["Days"] + 1.0))
        check_refused(data, "reproduce the response exactly")


def test_as_many_fixed_effects_as_rows(sleepstudy):
    formula = "Reaction ~ C(Subject) * C(Days) + (1 | Subject)"
    check_refused(sleepstudy, "180 columns and the data 180 rows", formula)


@pytest.mark.parametrize("column", ["Reaction", "Days"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_values(sleepstudy, column, value):
    data = sleepstudy.astype({"Days": float})
    data.loc[7, column] = value
    check_refused(data, rf"{column} is infinite in 1 row \(7")


@pytest.mark.parametrize(
    ("value", "word"),
    [(-1.0, "negative"), (0.0, "zero"), (np.inf, "infinite")],
)
def test_weights(sleepstudy, value, word):
    w = np.ones(180)
    w[7] = value
    check_refused(sleepstudy, rf"weights: {word} in 1 row \(7", weights=w)
    data = sleepstudy.assign(w=w)
    check_refused(data, rf"weights 'w': {word} in 1 row \(7", weights="w")


def test_weights_of_another_length(sleepstudy):
    check_refused(sleepstudy, "5 values, the data have 180 rows", weights=np.ones(5))


def test_collinear_columns_are_dropped_with_a_notice(sleepstudy):
    data = sleepstudy.assign(hours=24 * sleepstudy["Days"] + 1)
    with pytest.warns(jg.NoticeWarning, match="hours is a combination of"):
        m = jg.glmm("Reaction ~ Days + hours + (1 | Subject)", data)
    assert list(m.fixef.index) == ["(Intercept)", "Days"]
    assert "hours is a combination of" in repr(m)


@pytest.mark.parametrize("kind", [str, "category"])
def test_response_that_is_no_number(sleepstudy, kind):
    data = sleepstudy.assign(Reaction=sleepstudy["Reaction"].astype(kind))
    check_refused(data, "Reaction is not numeric")


def test_complex_response_is_not_coerced(sleepstudy):
    check_refused(sleepstudy.assign(Reaction=sleepstudy["Reaction"] * 1j), "complex128")


def test_dates_are_not_coerced(sleepstudy):
    data = sleepstudy.assign(Days=pd.Timestamp("2020-01-01"))
    check_refused(data, "Days is of type datetime.*Convert it")


def test_duplicated_column_names(sleepstudy):
    data = pd.concat([sleepstudy, sleepstudy[["Days"]]], axis=1)
    check_refused(data, "duplicated column names: Days")


def test_text_column_as_covariate_in_a_million_rows(rng):
    n = 1_000_000
    ids = np.array([f"id{i}" for i in range(50_000)])
    data = pd.DataFrame(
        {
            "y": rng.normal(size=n),
            "g": rng.integers(0, 100, n),
            "s": ids[rng.integers(0, len(ids), n)],
        }
    )
    check_refused(data, "'s' has 50000 levels in 1000000 rows", "y ~ s + (1 | g)")


def test_unknown_options(sleepstudy):
    check_refused(
        sleepstudy, "this version knows gaussian", error=ValueError, family="foo"
    )
    check_refused(sleepstudy, "use 'REML' or 'ML'", error=ValueError, method="foo")
    check_refused(sleepstudy, "Choose 'drop' or 'raise'", missing="foo")
    check_refused(sleepstudy, "must be a jaxglmm.Control", error=TypeError, control={})
    control = jg.Control(optimizer="foo")
    check_refused(
        sleepstudy, "unknown optimizer 'foo'", error=ValueError, control=control
    )
    check_refused(sleepstudy, "'Days' is no factor", contrasts={"Days": "sum"})
    check_refused(
        sleepstudy, "'cubic'", contrasts={"Subject": "cubic"}, error=ValueError
    )


def test_start_of_another_length(sleepstudy):
    check_refused(sleepstudy, "start must hold 1 finite values", start=[1.0, 2.0])
    check_refused(sleepstudy, "start must hold numbers", start="a")
    check_refused(sleepstudy, "start must hold 1 finite values", start=[np.nan])


def test_unknown_covariance_structure(sleepstudy):
    formula = "Reaction ~ Days + foo(1 | Subject)"
    check_refused(
        sleepstudy, "structure 'foo'; known: diag, ", formula, jg.FormulaError
    )


def test_counts_of_successes_belong_to_another_family():
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    check_refused(jg.datasets.cbpp(), "counts successes and failures", formula)


@pytest.mark.parametrize("data", [42, None, "sleepstudy"])
def test_something_that_is_no_table(data):
    check_refused(data, "no table")


def test_columns_of_different_length():
    data = {"y": [1.0, 2, 3], "x": [1, 2], "g": [1, 1, 2]}
    check_refused(data, "differ in length", "y ~ x + (1 | g)")


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e4, 1e9])
def test_badly_scaled_covariates(sleepstudy, scale):
    plain = jg.glmm("Reaction ~ Days + (Days | Subject)", sleepstudy)
    data = sleepstudy.assign(Days=sleepstudy["Days"] * scale)
    m = jg.glmm("Reaction ~ Days + (Days | Subject)", data)
    assert m.converged
    assert not m.is_singular
    units = np.array([1.0, scale])
    np.testing.assert_allclose(m.fixef * units, plain.fixef, rtol=1e-8)
    np.testing.assert_allclose(m.se * units, plain.se, rtol=1e-8)
    theta = plain.theta.to_numpy() / np.array([1.0, scale, scale])
    np.testing.assert_allclose(m.theta, theta, rtol=1e-6)
    # the REML criterion holds log |X'X|, hence the unit of Days
    gap = plain.loglik - np.log(scale)
    np.testing.assert_allclose(m.loglik, gap, rtol=1e-10)


def test_columns_named_like_keywords_are_columns(sleepstudy):
    data = sleepstudy.rename(columns={"Subject": "class", "Days": "lambda"})
    m = jg.glmm("Reaction ~ log(lambda + 1) + (lambda | class)", data)
    other = jg.glmm("Reaction ~ log(Days + 1) + (Days | Subject)", sleepstudy)
    np.testing.assert_allclose(m.loglik, other.loglik, rtol=1e-12)
    assert list(m.ranef) == ["class"]


def test_series_are_matched_by_the_labels_of_rows(sleepstudy):
    w = pd.Series(np.arange(1.0, 181.0), index=sleepstudy.index)
    formula = "Reaction ~ Days + (1 | Subject)"
    m = jg.glmm(formula, sleepstudy, weights=w)
    moved = jg.glmm(formula, sleepstudy.sort_values("Reaction"), weights=w)
    np.testing.assert_allclose(moved.loglik, m.loglik, rtol=1e-12)
    with pytest.raises(jg.DataError, match="index is not that of the data"):
        jg.glmm(formula, sleepstudy, weights=w.set_axis(w.index + 5))
    named = sleepstudy.assign(**{"my weights": w})
    again = jg.glmm(formula, named, weights="my weights")
    np.testing.assert_allclose(again.loglik, m.loglik, rtol=1e-12)


def test_sizes_without_a_square_are_named(sleepstudy):
    huge = sleepstudy.assign(Reaction=sleepstudy.Reaction * 1e160)
    with pytest.raises(jg.DataError, match="Give it in another unit"):
        jg.glmm("Reaction ~ Days + (1 | Subject)", huge)
    with pytest.raises(jg.FormulaError, match="must be a string, found DataFrame"):
        jg.glmm(sleepstudy, sleepstudy)
