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


def test_a_frame_for_a_formula(sleepstudy):
    with pytest.raises(jg.FormulaError, match="must be a string, found DataFrame"):
        jg.glmm(sleepstudy, sleepstudy)


# -- sizes -----------------------------------------------------------------------------

EXTREME = [1e155, 1e200, 1e308, 1e-155, 1e-200, 1e-308]


def number(value):
    """A number as messages show it."""
    return f"{value:.3g}".replace("+", r"\+")


@pytest.mark.parametrize("size", EXTREME)
@pytest.mark.parametrize(
    ("formula", "what"),
    [
        ("Reaction ~ Days + big + (1 | Subject)", "column big of the fixed effects"),
        (
            "Reaction ~ big + I(3 * Days) + Days + (1 | Subject)",
            "column big of the fix",
        ),
        ("Reaction ~ 0 + Days:big + (1 | Subject)", "column Days:big of the fixed"),
        ("Reaction ~ Days + (big | Subject)", r"column big of the term \(big \| Subj"),
        ("Reaction ~ Days + (0 + big || Subject)", "column big of the term"),
    ],
)
def test_extreme_covariates_are_named(sleepstudy, formula, what, size):
    data = sleepstudy.assign(big=np.linspace(0.5, 1.0, 180) * size)
    if "Days:big" in formula:
        data["Days"] = (data.Days == 3) + 0.0
        size = data.big[data.Days == 1].max()
    match = rf"{what}.* is {number(size)}.*in another unit"
    check_refused(data, match, formula)
    with pytest.raises(jg.DataError, match=match):
        jg.design(formula, data)


@pytest.mark.parametrize(
    "formula",
    ["Reaction ~ x:z + (1 | Subject)", "Reaction ~ Days + (0 + x:z | Subject)"],
)
def test_products_that_overflow_are_named(sleepstudy, formula):
    data = sleepstudy.assign(x=1e200, z=np.linspace(1e150, 1e200, 180))
    check_refused(data, "column x:z of .* overflows.*another unit", formula)
    check_refused(
        data, r"I\(x \* z\) is infinite", "Reaction ~ I(x * z) + (1 | Subject)"
    )


@pytest.mark.parametrize("size", EXTREME)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gaussian", {}),
        ("gaussian", {"link": "log"}),
        ("gaussian", {"dispersion": "~ Days"}),
        ("gamma", {}),
        ("inverse_gaussian", {"link": "log"}),
        ("student", {}),
        ("tweedie", {}),
    ],
)
def test_extreme_responses_are_named(sleepstudy, family, options, size):
    data = sleepstudy.assign(big=np.linspace(0.5, 1.0, 180) * size)
    match = rf"response big is {number(size)}, in 1 row \(179.*in another unit"
    check_refused(data, match, "big ~ Days + (1 | Subject)", family=family, **options)


@pytest.mark.parametrize("family", ["poisson", "nbinom2", "genpois"])
def test_counts_that_have_neighbours_no_more_are_named(sleepstudy, family):
    data = sleepstudy.assign(big=np.arange(180.0) * 1e20)
    match = r"response big is 1.79e\+22, in 1 row \(179.*in another unit"
    check_refused(data, match, "big ~ Days + (1 | Subject)", family=family)


@pytest.mark.parametrize("size", [1e50, 1e200, 1e308, 1e-50, 1e-200, 1e-308])
@pytest.mark.parametrize("family", ["poisson", "gamma", "binomial", "nbinom2"])
def test_extreme_weights_are_named(sleepstudy, family, size):
    data = sleepstudy.assign(c=sleepstudy.Days % 2 + 0.0, w=size)
    data["c"] += family == "gamma"
    match = rf"weights is {number(size)}, in 180 rows.*in another unit"
    formula = "c ~ Days + (1 | Subject)"
    if family == "binomial":
        with pytest.raises(jg.DataError, match=f"weights.*{number(size)}|whole"):
            jg.glmm(formula, data, family=family, weights="w")
    else:
        check_refused(data, match, formula, family=family, weights="w")


@pytest.mark.parametrize("size", [1e14, 1e30, 1e200])
def test_one_weight_beside_which_no_row_counts(sleepstudy, size):
    w = np.ones(180)
    w[7] = size
    match = rf"weights is {number(size)}, in 1 row \(7.*but 1 of 180 rows count"
    check_refused(sleepstudy, match, weights=w)


@pytest.mark.parametrize("size", [1e20, 1e200, 1e308])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gaussian", {}),
        ("gaussian", {"dispersion": "~ Days"}),
        ("gaussian", {"link": "log"}),
        ("poisson", {}),
        ("gamma", {"link": "log"}),
        ("binomial", {}),
    ],
)
def test_extreme_offsets_are_named(sleepstudy, family, options, size):
    data = sleepstudy.assign(y=sleepstudy.Days % 2 + 0.0, big=1.0)
    data["y"] += family == "gamma"
    data.loc[7, "big"] = size
    match = rf"offset is {number(size)}, in 1 row \(7"
    formula = "y ~ Days + (1 | Subject)"
    check_refused(data, match, formula, family=family, offset="big", **options)
    data["big"] = size  # in every row
    match = rf"offset is {number(size)}, in 180 rows"
    check_refused(data, match, formula, family=family, offset="big", **options)


@pytest.mark.parametrize("size", [1e-140, 1e-9, 1e9, 1e140])
def test_sizes_between_are_another_unit(sleepstudy, size):
    """The same fit in another unit of everything."""
    d = sleepstudy.assign(o=0.1 * sleepstudy.Reaction % 7)
    formula = "Reaction ~ Days + (Days | Subject)"
    m = jg.glmm(formula, d, offset="o")
    scaled = d.assign(Reaction=d.Reaction * size, o=d.o * size, Days=d.Days * size)
    again = jg.glmm(formula, scaled, offset="o", weights=np.full(180, 1 / size))
    assert again.converged
    np.testing.assert_allclose(again.fixef, m.fixef * [size, 1.0], rtol=1e-6)
    np.testing.assert_allclose(again.sigma / size**0.5, m.sigma, rtol=1e-6)


@pytest.mark.parametrize("offset", ["Reaction", "1 * Reaction", "Reaction + 0"])
@pytest.mark.parametrize("options", [{}, {"method": "ML"}, {"dispersion": "~ Days"}])
def test_the_response_as_its_own_offset(sleepstudy, offset, options):
    match = "the offset equals Reaction, the response itself"
    check_refused(sleepstudy, match, offset=offset, **options)
    formula = f"Reaction ~ Days + offset({offset}) + (1 | Subject)"
    check_refused(sleepstudy, match, formula, **options)


def test_the_logarithm_of_the_response_as_its_own_offset(sleepstudy):
    match = r"the offset equals log\(c\), the response itself"
    data = sleepstudy.assign(c=sleepstudy.Days + 1)
    for family, link in (("poisson", None), ("gamma", "log"), ("gaussian", "log")):
        check_refused(
            data, match, "c ~ Days + offset(log(c)) + (1 | Subject)", family=family,
            link=link,
        )  # fmt: skip
