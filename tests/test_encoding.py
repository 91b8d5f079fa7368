"""Tables and formulas to arrays: values and names as R, checks, and new data."""

import pickle
import subprocess
import sys
import time
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxglmm.data import as_frame, compress, factorize
from jaxglmm.encoding import model_frame
from jaxglmm.errors import DataError, FormulaError, NoticeWarning

N = 24
Y = np.array(
    [1.3, 2.1, 0.4, 3.3, 2.2, 1.9, 4.1, 0.2, 1.1, 2.7, 3.1, 0.9] * 2
) + 0.01 * np.arange(N)


@pytest.fixture
def data():
    i = np.arange(N)
    return pd.DataFrame(
        {
            "y": Y,
            "x": np.tile([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 4) + 0.1 * (i // 6),
            "z": np.sqrt(1.0 + i),
            "k": i % 5,
            "f": np.tile(["a", "b", "c"], 8),
            "h": np.repeat(["u", "v"], 12),
            "o": pd.Categorical(
                np.tile(["lo", "mid", "hi", "top"], 6), ["lo", "mid", "hi", "top"], True
            ),
            "flag": i % 4 < 2,
            "g": np.repeat([30, 10, 20, 40], 6),
            "total.fruits": i % 7,
            "my x": np.cos(i),
        }
    )


def design(formula, data, **options):
    frame = model_frame(formula, data, **options)
    return frame.X_names, frame.X


def message(error, formula, data, **options):
    with pytest.raises(error) as caught:
        model_frame(formula, data, **options)
    return str(caught.value)


# -- names and order of columns, as R's model.matrix prints them -----------------------


@pytest.mark.parametrize(
    ("fixed", "names"),
    [
        ("1", ["(Intercept)"]),
        ("0", []),
        ("x", ["(Intercept)", "x"]),
        ("0 + x", ["x"]),
        ("f", ["(Intercept)", "fb", "fc"]),
        ("0 + f", ["fa", "fb", "fc"]),
        ("f + h - 1", ["fa", "fb", "fc", "hv"]),
        ("h + f - 1", ["hu", "hv", "fb", "fc"]),
        ("flag", ["(Intercept)", "flagTrue"]),
        ("I(x > 2)", ["(Intercept)", "I(x > 2)True"]),
        ("o", ["(Intercept)", "o.L", "o.Q", "o.C"]),
        ("0 + o", ["olo", "omid", "ohi", "otop"]),
        ("f:x + h", ["(Intercept)", "hv", "fa:x", "fb:x", "fc:x"]),
        ("f * h", ["(Intercept)", "fb", "fc", "hv", "fb:hv", "fc:hv"]),
        ("h:f + f", ["(Intercept)", "fb", "fc", "hv:fa", "hv:fb", "hv:fc"]),
        ("f / x", ["(Intercept)", "fb", "fc", "fa:x", "fb:x", "fc:x"]),
        ("0 + x:f", ["x:fa", "x:fb", "x:fc"]),
        ("poly(x,2)", ["(Intercept)", "poly(x, 2)1", "poly(x, 2)2"]),
        ("poly(x, 1)", ["(Intercept)", "poly(x, 1)"]),
        ("bs(x, df=4)", ["(Intercept)", *[f"bs(x, df=4){j}" for j in (1, 2, 3, 4)]]),
        ("scale(x) + center(z)", ["(Intercept)", "scale(x)", "center(z)"]),
        ("C(k)", ["(Intercept)", "C(k)1", "C(k)2", "C(k)3", "C(k)4"]),
        ("C(f, contr.sum)", ["(Intercept)", "C(f, contr.sum)1", "C(f, contr.sum)2"]),
        (
            "C(f, contr.treatment('c'))",
            ["(Intercept)", *[f"C(f, contr.treatment('c')){v}" for v in "ab"]],
        ),
        ("ordered(f)", ["(Intercept)", "ordered(f).L", "ordered(f).Q"]),
        ("total.fruits", ["(Intercept)", "total.fruits"]),
        ("log1p(total.fruits)", ["(Intercept)", "log1p(total.fruits)"]),
        ("`my x`", ["(Intercept)", "`my x`"]),
        ("np.abs(`my x`)", ["(Intercept)", "np.abs(`my x`)"]),
        ("x.clip(1)", ["(Intercept)", "x.clip(1)"]),
        (
            "poly(x, 2):h",
            ["(Intercept)", *[f"poly(x, 2){j}:h{v}" for v in "uv" for j in (1, 2)]],
        ),
    ],
)
def test_names(data, fixed, names):
    assert design(f"y ~ {fixed} + (1 | g)", data)[0] == names


def test_interaction_is_the_product_with_the_first_factor_fastest(data):
    names, X = design("y ~ f * x + (1 | g)", data)
    assert names == ["(Intercept)", "fb", "fc", "x", "fb:x", "fc:x"]
    x, b, c = data.x.to_numpy(), (data.f == "b").to_numpy(), (data.f == "c").to_numpy()
    expected = np.column_stack([np.ones(N), b, c, x, b * x, c * x])
    np.testing.assert_array_equal(X, expected)
    assert X.flags.c_contiguous
    assert X.dtype == np.float64


def test_margin_rule_of_r_keeps_redundant_dummies_for_the_rank_check(data):
    with pytest.warns(NoticeWarning, match="fc:hv is a combination of"):
        frame = model_frame("y ~ f:h + (1 | g)", data)
    assert frame.X_names == ["(Intercept)", "fa:hu", "fb:hu", "fc:hu", "fa:hv", "fb:hv"]


def test_polynomial_contrasts_are_those_of_r(data):
    _, X = design("y ~ o + (1 | g)", data)
    # contr.poly(4)
    expected = [
        [-0.6708203932499369, 0.5, -0.2236067977499790],
        [-0.2236067977499790, -0.5, 0.6708203932499369],
        [0.2236067977499790, -0.5, -0.6708203932499369],
        [0.6708203932499369, 0.5, 0.2236067977499790],
    ]
    np.testing.assert_allclose(X[:4, 1:], expected, rtol=0, atol=1e-14)


def test_polynomial_contrasts_of_many_levels_stay_orthonormal():
    levels = [f"l{i:02d}" for i in range(60)]
    values = pd.Categorical(np.tile(levels, 2), levels, ordered=True)
    frame = {"y": np.sin(np.arange(120.0)), "o": values, "g": np.arange(120) % 6}
    _, X = design("y ~ o + (1 | g)", frame)
    np.testing.assert_allclose(X.T @ X / 2, np.diag([60.0] + [1.0] * 59), atol=1e-12)


@pytest.mark.parametrize(
    ("contrast", "suffixes", "matrix"),
    [
        ("treatment", "bc", [[0, 0], [1, 0], [0, 1]]),
        ("SAS", "ab", [[1, 0], [0, 1], [0, 0]]),
        ("sum", "12", [[1, 0], [0, 1], [-1, -1]]),
        ("contr.sum", "12", [[1, 0], [0, 1], [-1, -1]]),
        ("helmert", "12", [[-1, -1], [1, -1], [0, 2]]),
        (
            "poly",
            [".L", ".Q"],
            [[-(0.5**0.5), 6**-0.5], [0, -2 * 6**-0.5], [0.5**0.5, 6**-0.5]],
        ),
    ],
)
def test_contrasts(data, contrast, suffixes, matrix):
    names, X = design("y ~ f + (1 | g)", data, contrasts={"f": contrast})
    assert names == ["(Intercept)", *[f"f{s}" for s in suffixes]]
    np.testing.assert_allclose(X[:3, 1:], matrix, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["sum", "helmert", "poly", "treatment", "SAS"])
def test_contrasts_inside_a_formula_match_the_argument(data, name):
    ours = design("y ~ f + (1 | g)", data, contrasts={"f": name})
    theirs = design(f"y ~ C(f, contr.{name}) + (1 | g)", data)
    np.testing.assert_allclose(theirs[1], ours[1], rtol=0, atol=1e-14)
    assert [n.replace(f"C(f, contr.{name})", "f") for n in theirs[0]] == ours[0]


def test_custom_contrast_matrix(data):
    names, X = design("y ~ C(f, {'ab': [1, -1, 0], 'c': [1, 1, -2]}) + (1 | g)", data)
    assert [n[-3:] for n in names[1:]] == [")ab", "})c"]
    np.testing.assert_array_equal(X[:3, 1:], [[1, 1], [-1, 1], [0, -2]])
    assert "3 levels" in message(DataError, "y ~ C(f, {'q': [1, 0]}) + (1 | g)", data)
    names, same = design(
        "y ~ C(f, np.array([[1, 1], [-1, 1], [0, -2]])) + (1 | g)", data
    )
    assert [n[-1] for n in names[1:]] == ["1", "2"]
    np.testing.assert_array_equal(same, X)


def test_unknown_contrasts(data):
    found = message(DataError, "y ~ f + (1 | g)", data, contrasts={"f": "sums"})
    assert "'sums'" in found
    assert "treatment, sum, helmert, poly, SAS" in found
    found = message(DataError, "y ~ f + x + (1 | g)", data, contrasts={"x": "sum"})
    assert "'x' is no factor" in found
    assert "Factors: f." in found


def test_orthogonal_polynomial_is_that_of_r():
    frame = {"y": [3.0, 1, 2, 5, 4], "x": [1, 2, 3, 4, 6], "g": [1, 1, 2, 2, 2]}
    _, X = design("y ~ poly(x, 2) + (1 | g)", frame)
    # poly(c(1, 2, 3, 4, 6), 2)
    x = np.array([1.0, 2, 3, 4, 6])
    first = (x - 3.2) / np.linalg.norm(x - 3.2)
    basis = np.linalg.qr(np.vander(x, 3, increasing=True))[0][:, 2]
    np.testing.assert_allclose(X[:, 1], first, atol=1e-14)
    np.testing.assert_allclose(X[:, 2], basis * np.sign(basis[-1]), atol=1e-13)


def test_b_spline_partitions_unity_with_knots_at_quantiles(data):
    _, X = design("y ~ bs(x, df=4) + (1 | g)", data)
    # splines::bs: what the four columns lack of 1 is the dropped first basis function
    rest = 1 - X[:, 1:].sum(axis=1)
    assert np.all(rest > -1e-12)
    assert rest[np.argmin(data.x)] == pytest.approx(1.0, abs=1e-12)
    inner = np.median(data.x)
    expected = np.clip((inner - data.x) / (inner - data.x.min()), 0, None) ** 3
    np.testing.assert_allclose(rest, expected, atol=1e-12)


# -- factors and levels ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [object, "str", "string", "category"])
def test_text_is_a_factor_whatever_its_dtype(data, dtype):
    names, X = design("y ~ f + (1 | h)", data.astype({"f": dtype, "h": dtype}))
    assert names == ["(Intercept)", "fb", "fc"]
    np.testing.assert_array_equal(X, design("y ~ f + (1 | h)", data)[1])


def test_category_order_is_kept_and_unused_levels_left_out(data):
    data["f"] = pd.Categorical(data.f, categories=["c", "zz", "a", "b"])
    frame = model_frame("y ~ f + (1 | f)", data)
    assert frame.X_names == ["(Intercept)", "fa", "fb"]
    assert list(frame.terms[0].levels) == ["c", "a", "b"]
    assert list(frame.terms[0].group[:3]) == [1, 2, 0]


def test_integers_are_numbers_left_of_the_bar_and_groups_right_of_it(data):
    frame = model_frame("y ~ k + (k | g)", data)
    assert frame.X_names == ["(Intercept)", "k"]
    term = frame.terms[0]
    assert term.z_names == ["(Intercept)", "k"]
    assert list(term.levels) == ["10", "20", "30", "40"]
    assert term.group.dtype == np.int32
    assert list(term.group[::6]) == [2, 0, 1, 3]


@pytest.mark.parametrize(
    "convert",
    [
        lambda g: g.astype(float),
        lambda g: g.astype("Int64"),
        lambda g: g.astype(np.int8),
        lambda g: g.astype(np.uint64) + np.uint64(2**63),
        lambda g: g.astype(object),
        lambda g: g.astype("category"),
        lambda g: g * 10**9,
        lambda g: -g[::-1].reset_index(drop=True),
        lambda g: g + 0.25,
        lambda g: pd.to_datetime(g, unit="D"),
    ],
)
def test_groups_of_any_type_give_the_same_codes(data, convert):
    expected = np.repeat([2, 0, 1, 3], 6)
    data["g"] = convert(data.g)
    term = model_frame("y ~ x + (1 | g)", data).terms[0]
    if data.g.dtype == np.int64 and data.g[0] < 0:
        expected = np.repeat(
            [0, 2, 3, 1], 6
        )  # order of -40, -30, -20, -10, reversed rows
    np.testing.assert_array_equal(term.group, expected)
    assert term.n_levels == len(term.levels) == 4


def test_float_and_boolean_labels(data):
    data["g"] = data.g.astype(float)
    frame = model_frame("y ~ x + (1 | g) + (1 | flag)", data)
    assert list(frame.terms[0].levels) == ["10", "20", "30", "40"]
    assert list(frame.terms[1].levels) == ["False", "True"]


def test_interaction_of_groups_has_observed_levels_with_the_first_slowest(data):
    data = data[~((data.h == "u") & (data.f == "b"))]
    term = model_frame("y ~ x + (1 | h:f)", data).terms[0]
    assert list(term.levels) == ["u:a", "u:c", "v:a", "v:b", "v:c"]
    assert term.group_name == "h:f"
    shown = (data.h + ":" + data.f).to_numpy()
    np.testing.assert_array_equal(np.asarray(term.levels)[term.group], shown)


def test_triple_interaction(data):
    term = model_frame("y ~ x + (1 | f:h:flag)", data).terms[0]
    shown = data.f + ":" + data.h + ":" + data.flag.astype(str)
    np.testing.assert_array_equal(np.asarray(term.levels)[term.group], shown)
    assert list(term.levels) == sorted(set(shown))


@given(
    keys=st.lists(st.integers(-(2**40), 2**40) | st.integers(-9, 9), min_size=1),
)
@settings(max_examples=200, deadline=None)
def test_compress_is_unique_with_inverse(keys):
    codes, present = compress(np.array(keys))
    expected, inverse = np.unique(keys, return_inverse=True)
    np.testing.assert_array_equal(present, expected)
    np.testing.assert_array_equal(codes, inverse)


def test_factorize_sorts_text_and_counts_from_zero():
    codes, levels = factorize(pd.Series(["b", "a", "c", "a"]))
    assert list(levels) == ["a", "b", "c"]
    np.testing.assert_array_equal(codes, [1, 0, 2, 0])


# -- random terms ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "names"),
    [
        ("(x | g)", ["(Intercept)", "x"]),
        ("(0 + x | g)", ["x"]),
        ("(0 + f | g)", ["fa", "fb", "fc"]),
        ("(f | g)", ["(Intercept)", "fb", "fc"]),
        ("(poly(x, 2) | g)", ["(Intercept)", "poly(x, 2)1", "poly(x, 2)2"]),
        ("(x * z | g)", ["(Intercept)", "x", "z", "x:z"]),
        ("(0 + f:x | g)", ["fa:x", "fb:x", "fc:x"]),
    ],
)
def test_effects(data, term, names):
    arrays = model_frame(f"y ~ 1 + {term}", data).terms[0]
    assert arrays.z_names == names
    assert arrays.z.shape == (N, len(names))


def test_same_variable_gives_the_same_numbers_in_both_parts(data):
    frame = model_frame("y ~ poly(x, 2) + f + (poly(x, 2) + f | g)", data)
    np.testing.assert_array_equal(frame.X, frame.terms[0].z)


def test_double_bar_and_repeated_groups_share_codes_and_labels(data):
    frame = model_frame("y ~ x + (x || g) + (0 + z | g)", data)
    assert [t.z_names for t in frame.terms] == [["(Intercept)"], ["x"], ["z"]]
    assert all(t.group is frame.terms[0].group for t in frame.terms)
    assert all(t.grouping is frame.terms[0].grouping for t in frame.terms)


@pytest.mark.parametrize(
    ("terms", "order"),
    [
        ("(1 | h) + (1 | f) + (1 | g)", ["g", "f", "h"]),
        ("(1 | g) + (1 | f) + (1 | h)", ["g", "f", "h"]),
        ("(1 | h/f)", ["f:h", "h"]),
        ("(1 | h) + (1 | flag)", ["h", "flag"]),
        ("(1 | h) + (1 | flag) + (1 | f)", ["f", "flag", "h"]),  # ties come reversed
    ],
)
def test_order_of_terms_is_that_of_lme4(data, terms, order):
    assert [t.group_name for t in model_frame(f"y ~ x + {terms}", data).terms] == order


def test_structure_and_text_are_kept(data):
    frame = model_frame("y ~ x + cs(0 + f | g) + (1 | h)", data)
    assert [(t.structure, t.text) for t in frame.terms] == [
        ("cs", "cs(0 + f | g)"),
        ("full", "(1 | h)"),
    ]


def test_one_level_and_too_many_effects(data):
    data["herd"] = 1
    assert message(FormulaError, "y ~ x + (1 | herd)", data) == (
        "grouping factor 'herd' has 1 level; a random effect needs at least 2. "
        "Drop (1 | herd)."
    )
    data["row"] = np.arange(N)
    found = message(FormulaError, "y ~ x + (x | row)", data)
    assert "term (x | row) has 48 random effects" in found
    assert "24 rows" in found


def test_one_row_per_level_is_flagged(data):
    data["row"] = np.arange(N)
    frame = model_frame("y ~ x + (1 | row) + (1 | g)", data)
    assert frame.one_row_per_level == ("row",)
    assert model_frame("y ~ x + (1 | g)", data).one_row_per_level == ()


# -- response, weights, offsets --------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("y", Y),
        ("log(y)", np.log(Y)),
        ("I(y**2)", Y**2),
        ("y / 2", Y / 2),
        ("k", np.arange(N) % 5),
        ("flag", np.arange(N) % 4 < 2),
        ("`my x`", np.cos(np.arange(N))),
        ("total.fruits", np.arange(N) % 7),
    ],
)
def test_response(data, response, expected):
    frame = model_frame(f"{response} ~ x + (1 | g)", data)
    np.testing.assert_allclose(frame.y, expected, rtol=1e-15)
    assert frame.y.dtype == np.float64


def test_cbind_gives_proportions_and_trials(data):
    data["n"] = 10
    frame = model_frame("cbind(k, n - k) ~ x + (1 | g)", data)
    np.testing.assert_allclose(frame.y, data.k / 10)
    np.testing.assert_array_equal(frame.weights, np.full(N, 10.0))
    assert frame.is_cbind
    assert not model_frame("y ~ x + (1 | g)", data).is_cbind
    doubled = model_frame("cbind(k, n - k) ~ x + (1 | g)", data, weights=np.full(N, 2))
    np.testing.assert_array_equal(doubled.weights, np.full(N, 20.0))
    data.loc[3, "n"] = data.loc[3, "k"] = 0
    assert "no trials in 1 row (3" in message(
        DataError, "cbind(k, n - k) ~ x + (1 | g)", data
    )


@pytest.mark.parametrize("response", ["f", "o", "h"])
def test_factor_response_is_refused_with_a_way_out(data, response):
    found = message(DataError, f"{response} ~ x + (1 | g)", data)
    assert "levels" in found
    assert f"data['{response}'] ==" in found


def test_constant_response(data):
    assert "constant: all 24 values are 2" in message(
        DataError, "y ~ x + (1 | g)", data.assign(y=2.0)
    )


def test_offsets_add_up(data):
    frame = model_frame("y ~ x + offset(log(z)) + (1 | g)", data, offset="2 * x")
    np.testing.assert_allclose(frame.offset, np.log(data.z) + 2 * data.x, rtol=1e-14)
    assert frame.X_names == ["(Intercept)", "x"]
    frame = model_frame("y ~ x + (1 | g)", data, offset=np.arange(N))
    np.testing.assert_array_equal(frame.offset, np.arange(N))
    assert model_frame("y ~ x + (1 | g)", data).offset is None


def test_equal_offsets_count_once_in_the_formula_and_again_as_argument(data):
    frame = model_frame("y ~ x + offset(z) + offset(z) + (1 | g)", data, offset="z")
    np.testing.assert_allclose(frame.offset, 2 * data.z, rtol=1e-15)
    new = frame.encoder.transform(data)
    np.testing.assert_array_equal(new.offset, frame.offset)


def test_weights_by_name_expression_and_array(data):
    for weights in ("z", data.z, data.z.to_numpy(), list(data.z)):
        frame = model_frame("y ~ x + (1 | g)", data, weights=weights)
        np.testing.assert_array_equal(frame.weights, data.z)
    frame = model_frame("y ~ x + (1 | g)", data, weights="1 / z")
    np.testing.assert_allclose(frame.weights, 1 / data.z)


@pytest.mark.parametrize(
    ("bad", "what"),
    [(-1.0, "negative"), (0.0, "zero"), (np.inf, "infinite")],
)
def test_bad_weights(data, bad, what):
    weights = np.ones(N)
    weights[[2, 5]] = bad
    found = message(DataError, "y ~ x + (1 | g)", data, weights=weights)
    assert f"{what} in 2 rows (2, 5" in found
    data["w"] = weights
    found = message(DataError, "y ~ x + (1 | g)", data, weights="w")
    assert f"weights 'w': {what} in 2 rows (2, 5" in found


@pytest.mark.parametrize("what", ["weights", "offset"])
def test_wrong_length_type_and_name(data, what):
    found = message(DataError, "y ~ x + (1 | g)", data, **{what: np.ones(5)})
    assert f"{what} has 5 values, the data have 24 rows" in found
    found = message(DataError, "y ~ x + (1 | g)", data, **{what: "zz"})
    assert "no column 'zz'" in found
    assert "Did you mean 'z'?" in found
    found = message(DataError, "y ~ x + (1 | g)", data, **{what: ["a"] * N})
    assert "Give numbers" in found


# -- missing and infinite values -------------------------------------------------------


def with_gaps(data):
    data = data.assign(unused=np.nan)
    data.loc[[1, 4], "x"] = np.nan
    data.loc[4, "f"] = None
    data["g"] = data.g.astype("Int64")
    data.loc[7, "g"] = pd.NA
    return data


def test_rows_with_missing_values_are_dropped_and_counted(data):
    gaps = with_gaps(data)
    before = gaps.copy(deep=True)
    frame = model_frame("y ~ scale(x) + f + (1 | g)", gaps, weights=data.z)
    rows = np.delete(np.arange(N), [1, 4, 7])
    np.testing.assert_array_equal(frame.kept, rows)
    assert list(frame.row_index) == list(rows)
    assert (frame.n_rows, frame.n_dropped) == (24, 3)
    assert frame.dropped_by == {"x": 2, "f": 1, "g": 1}
    assert frame.notices == []
    np.testing.assert_array_equal(frame.weights, data.z[rows])
    clean = model_frame("y ~ scale(x) + f + (1 | g)", data.iloc[rows])
    np.testing.assert_array_equal(frame.X, clean.X)
    np.testing.assert_array_equal(frame.terms[0].group, clean.terms[0].group)
    assert clean.kept is None
    assert clean.n_dropped == 0
    pd.testing.assert_frame_equal(gaps, before)


def test_missing_raise_and_nothing_left(data):
    found = message(DataError, "y ~ x + f + (1 | g)", with_gaps(data), missing="raise")
    assert "x: 2, f: 1, g: 1" in found
    found = message(DataError, "y ~ x + (1 | g)", data.assign(x=np.nan))
    assert "no row is left" in found
    assert "x: 24" in found
    assert "no rows" in message(DataError, "y ~ x + (1 | g)", data[:0])
    assert "missing='omit'" in message(
        DataError, "y ~ x + (1 | g)", data, missing="omit"
    )


@pytest.mark.parametrize("what", ["weights", "offset"])
@pytest.mark.parametrize("form", ["array", "column", "expression", "nullable"])
def test_missing_weights_and_offsets_drop_the_row(data, what, form):
    values = 1.0 + np.arange(N) / 2
    values[[3, 7]] = np.nan
    data["v"] = pd.Series(values).astype("Float64" if form == "nullable" else float)
    given = {"array": values, "expression": "2 * v"}.get(form, "v")
    frame = model_frame("y ~ x + (1 | g)", data, **{what: given})
    kept = np.delete(np.arange(N), [3, 7])
    np.testing.assert_array_equal(frame.kept, kept)
    assert frame.n_dropped == 2
    assert frame.dropped_by == {what if form == "array" else "v": 2}
    want = values[kept] * (2 if form == "expression" else 1)
    np.testing.assert_array_equal(getattr(frame, what), want)
    found = message(
        DataError, "y ~ x + (1 | g)", data, missing="raise", **{what: given}
    )
    assert "missing values" in found


def test_all_that_is_missing_is_counted(data):
    offset, weights = np.zeros(N), np.ones(N)
    offset[3], weights[[3, 5]] = np.nan, np.nan
    data.loc[1, "x"] = np.nan
    frame = model_frame("y ~ x + (1 | g)", data, offset=offset, weights=weights)
    assert frame.n_dropped == 3
    assert frame.dropped_by == {"x": 1, "weights": 2, "offset": 1}
    found = message(DataError, "y ~ x + (1 | g)", data, weights="log(z - 2)")
    assert "weights 'log(z - 2)': NaN in 2 rows (0, 2" in found


def test_levels_that_only_dropped_rows_have_are_not_counted(data):
    data.loc[data.g == 20, "x"] = np.nan
    frame = model_frame("y ~ x + (1 | g)", data)
    assert list(frame.terms[0].levels) == ["10", "30", "40"]


@pytest.mark.parametrize(
    ("formula", "name"),
    [
        ("bad ~ x + (1 | g)", "response bad"),
        ("y ~ bad + (1 | g)", "bad"),
        ("y ~ x + (bad | g)", "bad"),
        ("y ~ x + offset(bad) + (1 | g)", "offset bad"),
        ("y ~ x + (1 | bad)", "grouping factor 'bad'"),
    ],
)
def test_infinite_values_are_named(data, formula, name):
    data["bad"] = data.z
    data.loc[[3, 9], "bad"] = [np.inf, -np.inf]
    found = message(DataError, formula, data)
    assert name in found
    assert "infinite" in found
    if "1 | bad" not in formula:
        assert "2 rows (3, 9" in found


def test_row_numbers_count_in_the_table_given(data):
    data["bad"] = data.z
    data.loc[0, "x"] = np.nan
    data.loc[9, "bad"] = np.inf
    assert "1 row (9" in message(DataError, "y ~ x + bad + (1 | g)", data)


def test_expression_outside_its_domain(data):
    found = message(DataError, "y ~ log(x - 10) + (1 | g)", data)
    assert "log(x - 10) is NaN in 24 rows" in found


# -- collinear columns -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "kept", "dropped"),
    [
        ("x + I(2 * x)", ["(Intercept)", "x"], ["I(2 * x)"]),
        ("x + z + I(x - 3 * z)", ["(Intercept)", "x", "z"], ["I(x - 3 * z)"]),
        ("x + I(0 * x)", ["(Intercept)", "x"], ["I(0 * x)"]),
        ("I(0 * x + 7) + x", ["(Intercept)", "x"], ["I(0 * x + 7)"]),
        ("0 + f + x + C(f, 'sum')", ["fa", "fb", "fc", "x"], None),
        ("x + I(x * 1e-12) + z", ["(Intercept)", "x", "z"], ["I(x * 1e-12)"]),
    ],
)
def test_collinear_columns_are_dropped_later_ones_first(data, fixed, kept, dropped):
    with pytest.warns(NoticeWarning, match="collinear"):
        frame = model_frame(f"y ~ {fixed} + (1 | g)", data)
    assert frame.X_names == kept
    assert frame.X.shape == (N, len(kept))
    if dropped is not None:
        assert frame.dropped_columns == dropped
    assert len(frame.notices) == 1
    assert "collinear" in frame.notices[0]
    new = frame.encoder.transform(data)
    np.testing.assert_allclose(new.X, frame.X, rtol=1e-14)


@pytest.mark.parametrize(
    "columns",
    [
        {"x": 1e-9, "z": 1e9},
        {"x": 1e-140, "z": 1e140},
        {"x": 1e148, "z": 1e148},
    ],
)
def test_badly_scaled_columns_are_not_collinear(data, columns):
    for name, scale in columns.items():
        data[name] = data[name] * scale
    frame = model_frame("y ~ x + z + (1 | g)", data)
    assert frame.dropped_columns == []
    data["same"] = 3.0 * data.x
    with pytest.warns(NoticeWarning, match="same is a combination of x"):
        model_frame("y ~ x + z + same + (1 | g)", data)


def test_large_mean_is_not_collinear_with_the_intercept(data):
    data["year"] = 2000.0 + 1e-2 * data.x
    data["stamp"] = 1.7e9 + 1e4 * data.z
    assert model_frame("y ~ year + stamp + (1 | g)", data).dropped_columns == []


def test_overflowing_product_is_named(data):
    data["x"] = data.x * 1e200
    data["z"] = data.z * 1e200
    assert "x:z" in message(DataError, "y ~ x:z + (1 | g)", data)


def test_more_columns_than_rows(data):
    found = message(DataError, "y ~ f * o + (1 | g)", data.iloc[:10])
    assert "12 columns and the data 10 rows" in found


def test_text_with_many_levels_is_no_fixed_effect():
    n = 60
    frame = {
        "y": np.sin(np.arange(n)),
        "t": [f"t{i}" for i in range(n)],
        "g": [1, 2] * 30,
    }
    found = message(DataError, "y ~ t + (1 | g)", frame)
    assert "60 levels in 60 rows" in found
    assert "(1 | t)" in found


def test_factor_with_one_level(data):
    assert "1 level (a)" in message(DataError, "y ~ f + (1 | g)", data.assign(f="a"))


# -- columns that are not there, or cannot be used -------------------------------------


@pytest.mark.parametrize(
    ("formula", "name"),
    [
        ("y ~ xx + (1 | g)", "xx"),
        ("yy ~ x + (1 | g)", "yy"),
        ("y ~ x + (xx | g)", "xx"),
        ("y ~ x + (1 | gg)", "gg"),
        ("y ~ log(xx) + (1 | g)", "xx"),
        ("y ~ x + offset(zz) + (1 | g)", "zz"),
        ("y ~ log + (1 | g)", "log"),
    ],
)
def test_unknown_column(data, formula, name):
    found = message(DataError, formula, data)
    assert f"no column '{name}'" in found
    assert "Columns: y, x, z, k" in found
    if name != "log":
        assert f"Did you mean '{name[0]}'" in found


@pytest.mark.parametrize(
    ("formula", "name"),
    [
        ("y ~ x + (1 | log(x - 1))", "log(x - 1)"),
        ("y ~ f.map({'a': 'p', 'b': 'q'}) + (1 | g)", "f.map({'a': 'p', 'b': 'q'})"),
        ("y ~ C(o.where(x > 1)) + (1 | g)", "C(o.where(x > 1))"),
    ],
)
def test_expression_that_leaves_rows_without_a_level(data, formula, name):
    found = message(DataError, formula, data)
    assert f"{name} is missing in" in found or f"{name}' holds infinite" in found


def test_unknown_function(data):
    found = message(FormulaError, "y ~ lgo(x) + (1 | g)", data)
    assert "unknown function 'lgo'" in found
    assert "'log'" in found


def test_failing_expression(data):
    found = message(DataError, "y ~ poly(x, degree='a') + (1 | g)", data)
    assert "cannot evaluate poly(x, degree='a'): TypeError" in found
    assert "2 values for 24 rows" in message(
        DataError, "y ~ np.array([1, 2]) + (1 | g)", data
    )


def test_dates_and_mixed_columns_are_refused(data):
    data["day"] = pd.date_range("2020-01-01", periods=N)
    data["mix"] = [1, "a"] * 12
    assert "datetime64" in message(DataError, "y ~ day + (1 | g)", data)
    assert "int, str" in message(DataError, "y ~ mix + (1 | g)", data)
    frame = model_frame("y ~ day.dt.day_of_year + (1 | g)", data)
    np.testing.assert_array_equal(frame.X[:, 1], np.arange(1, N + 1))


def test_object_numbers_are_numbers(data):
    expected = design("y ~ x + (1 | g)", data)[1]
    np.testing.assert_array_equal(
        design("y ~ x + (1 | g)", data.astype({"x": object}))[1], expected
    )


# -- tables ----------------------------------------------------------------------------


def tables_of(data):
    plain = data.drop(columns="o")
    lists = {name: plain[name].tolist() for name in plain}
    return {
        "pandas": plain,
        "polars": pl.DataFrame(lists),
        "pyarrow": pa.table(lists),
        "dict": lists,
        "arrays": {name: plain[name].to_numpy() for name in plain},
        "series": {name: plain[name].set_axis(range(5, 5 + N)) for name in plain},
        "structured": plain.drop(columns="my x").to_records(index=False),
    }


@pytest.mark.parametrize(
    "kind", "pandas polars pyarrow dict arrays series structured".split()
)
def test_every_kind_of_table_gives_the_same_arrays(data, kind):
    formula = "y ~ x * f + flag + (x | g) + (1 | h:f)"
    expected = model_frame(formula, data)
    frame = model_frame(formula, tables_of(data)[kind], weights="z")
    assert frame.X_names == expected.X_names
    np.testing.assert_array_equal(frame.X, expected.X)
    np.testing.assert_array_equal(frame.y, expected.y)
    for mine, theirs in zip(frame.terms, expected.terms):
        np.testing.assert_array_equal(mine.group, theirs.group)
        assert list(mine.levels) == list(theirs.levels)


def test_pandas_frame_is_passed_on_and_others_give_needed_columns_only(data):
    assert as_frame(data) is data
    assert list(as_frame(pl.DataFrame({"a": [1], "b": [2]}), {"b", "c"})) == ["b"]
    y = np.arange(3.0)
    assert np.shares_memory(as_frame({"y": y})["y"].to_numpy(), y)


def test_nulls_of_every_kind(data):
    x = [None, *data.x[1:].tolist()]
    k = [None, *data.k[1:].tolist()]
    f = [None, *data.f[1:].tolist()]
    columns = {"y": data.y.tolist(), "x": x, "k": k, "f": f, "g": data.g.tolist()}
    for table in (pl.DataFrame(columns), pa.table(columns), columns):
        frame = model_frame("y ~ x + k + f + (1 | g)", table)
        assert frame.dropped_by == {"x": 1, "k": 1, "f": 1}
        assert frame.X_names == ["(Intercept)", "x", "k", "fb", "fc"]


def test_level_order_of_polars_and_pyarrow_categories(data):
    levels = ["c", "a", "b"]
    codes = pa.array([levels.index(v) for v in data.f])
    base = {"y": data.y.tolist(), "g": data.g.tolist()}
    for column in (
        pl.Series(data.f.tolist(), dtype=pl.Enum(levels)),
        pa.DictionaryArray.from_arrays(codes, pa.array(levels)),
    ):
        make = pl.DataFrame if isinstance(column, pl.Series) else pa.table
        names, _ = design("y ~ f + (1 | g)", make({**base, "f": column}))
        assert names == ["(Intercept)", "fa", "fb"]


@pytest.mark.parametrize(
    ("table", "found"),
    [
        (None, "NoneType"),
        (3, "int"),
        ([1, 2], "list"),
        (np.eye(3), "NumPy array of dtype float64"),
        (pl.LazyFrame({"y": [1]}), "collect"),
        ({"y": [1, 2], "g": [1]}, "y: 2, g: 1"),
        ({"y": 1.0, "g": [1]}, "single float"),
        ({"y": np.eye(2), "g": [1, 2]}, "shape"),
        (
            pd.DataFrame([[1, 2, 3]], columns=["y", "g", "y"]),
            "duplicated column names: y",
        ),
    ],
)
def test_what_is_no_table(table, found):
    assert found in message(DataError, "y ~ 1 + (1 | g)", table)


def test_dates_decimals_and_categories_of_polars_and_pyarrow(data):
    day = pd.date_range("2020-01-01", periods=N)
    expected = model_frame("y ~ x + h + (1 | day:f)", data.assign(day=day))
    base = {name: data[name].tolist() for name in ("y", "h")}
    price = [Decimal(f"{v:.1f}") for v in data.x]
    dates = [d.date() for d in day]
    frames = (
        pl.DataFrame({**base, "x": price, "day": dates}).with_columns(
            f=pl.Series(data.f.tolist(), dtype=pl.Categorical)
        ),
        pa.table({**base, "x": price, "day": dates, "f": pa.array(data.f.tolist())}),
    )
    for table in frames:
        frame = model_frame("y ~ x + h + (1 | day:f)", table)
        np.testing.assert_allclose(frame.X, expected.X, rtol=1e-14)
        assert frame.X_names == expected.X_names
        np.testing.assert_array_equal(frame.terms[0].group, expected.terms[0].group)


# -- new data --------------------------------------------------------------------------

STATEFUL = "y ~ poly(x, 2) * f + scale(z) + bs(`my x`, df=4) + o + offset(z) + (x | g)"


def test_training_data_come_back(data):
    frame = model_frame(STATEFUL + " + (1 | h:f)", data, offset="log(z)")
    encoder = pickle.loads(pickle.dumps(frame.encoder))
    new = encoder.transform(data, response=True)
    np.testing.assert_allclose(new.X, frame.X, rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(new.offset, frame.offset)
    np.testing.assert_array_equal(new.y, frame.y)
    for mine, theirs in zip(new.terms, frame.terms):
        np.testing.assert_allclose(mine.z, theirs.z, rtol=1e-13)
        np.testing.assert_array_equal(mine.group, theirs.group)
        assert mine.unseen == ()
        assert mine.group_name == theirs.group_name


def test_rows_are_encoded_alike_alone_and_together(data):
    frame = model_frame(STATEFUL, data)
    alone = np.vstack([frame.encoder.transform(data[i : i + 1]).X for i in range(N)])
    np.testing.assert_allclose(alone, frame.X, rtol=1e-12, atol=1e-13)


def test_missing_values_stay_as_nan_rows(data):
    frame = model_frame("y ~ poly(x, 2) + f + z + flag + (x | g)", data)
    new = data[:6].drop(columns="y").astype({"flag": object, "g": "Int64"})
    new.loc[1, "x"] = np.nan
    new.loc[2, "f"] = None
    new.loc[3, "flag"] = None
    new.loc[4, "g"] = pd.NA
    out = frame.encoder.transform(new)
    assert out.X.shape == (6, 7)
    np.testing.assert_array_equal(np.isnan(out.X).sum(axis=1), [0, 2, 2, 1, 0, 0])
    np.testing.assert_allclose(out.X[[0, 4, 5]], frame.X[[0, 4, 5]], rtol=1e-14)
    np.testing.assert_array_equal(np.isnan(out.terms[0].z[:, 1]), np.arange(6) == 1)
    np.testing.assert_array_equal(out.terms[0].group, [2, 2, 2, 2, -1, 2])
    assert out.terms[0].unseen == ()
    assert out.y is None


def test_missing_values_in_expressions_stay_missing(data):
    data["day"] = pd.date_range("2020-01-01", periods=N)
    formula = "log(y) ~ day.dt.day_of_year + offset(2 * z) + C(k) + (1 | f.str.upper())"
    frame = model_frame(formula, data)
    new = data[:6].copy()
    new.loc[0, "y"] = new.loc[3, "z"] = new.loc[5, "k"] = np.nan
    new.loc[1, "day"] = pd.NaT
    new.loc[2, "f"] = None
    out = frame.encoder.transform(new, response=True)
    np.testing.assert_array_equal(np.isnan(out.y), np.arange(6) == 0)
    np.testing.assert_array_equal(np.isnan(out.X).sum(axis=1), [0, 1, 0, 0, 0, 4])
    np.testing.assert_array_equal(out.terms[0].group, [0, 1, -1, 0, 1, 2])
    np.testing.assert_array_equal(np.isnan(out.offset), np.arange(6) == 3)
    np.testing.assert_array_equal(out.X[[0, 2, 3, 4]], frame.X[[0, 2, 3, 4]])


def test_unseen_groups_get_minus_one_and_are_named(data):
    frame = model_frame("y ~ x + (1 | h:f) + (1 | g)", data)
    new = data[:4].assign(g=[10, 99, 40, 77], h=["u", "w", "v", "u"])
    new["f"] = ["a", "a", "q", "c"]
    crossed, simple = frame.encoder.transform(new).terms
    np.testing.assert_array_equal(simple.group, [0, -1, 3, -1])
    assert simple.unseen == ("99", "77")
    np.testing.assert_array_equal(crossed.group, [0, -1, -1, 2])
    assert crossed.unseen == ("w:a", "v:q")


def test_combination_of_known_levels_that_did_not_occur(data):
    some = data[~((data.h == "u") & (data.f == "b"))]
    frame = model_frame("y ~ x + (1 | h:f)", some)
    term = frame.encoder.transform(data).terms[0]
    lacking = ((data.h == "u") & (data.f == "b")).to_numpy()
    np.testing.assert_array_equal(term.group < 0, lacking)
    assert term.unseen == ("u:b",)


@pytest.mark.parametrize("convert", [str, float, object, "category", "string"])
def test_groups_are_matched_by_label(data, convert):
    frame = model_frame("y ~ x + (1 | g)", data)
    term = frame.encoder.transform(data.astype({"g": convert})).terms[0]
    np.testing.assert_array_equal(term.group, frame.terms[0].group)


def test_unseen_level_of_a_fixed_factor(data):
    frame = model_frame("y ~ f + (1 | g)", data)
    with pytest.raises(DataError, match=r"'f' has unseen level.*new.*a, b, c"):
        frame.encoder.transform(data.assign(f="new"))


def test_no_rows_and_only_missing_rows(data):
    frame = model_frame(STATEFUL, data)
    out = frame.encoder.transform(data[:0])
    assert out.X.shape == (0, frame.X.shape[1])
    assert len(out.terms[0].group) == 0
    out = frame.encoder.transform(data[:2].assign(x=np.nan, f=None))
    assert np.isnan(out.X[:, 1]).all()
    assert (out.X[:, 0] == 1).all()


def test_new_data_without_columns(data):
    frame = model_frame("y ~ x + (z | g)", data)
    with pytest.raises(DataError, match="no column 'x' in newdata"):
        frame.encoder.transform(data.drop(columns="x"))
    with pytest.raises(DataError, match="no column 'g' in newdata"):
        frame.encoder.transform(data[["x", "z"]])
    out = frame.encoder.transform(data[["x"]], random=False)
    np.testing.assert_array_equal(out.X, frame.X)
    assert out.terms == ()


def test_numeric_variable_as_text_in_new_data(data):
    frame = model_frame("y ~ x + (1 | g)", data)
    with pytest.raises(DataError, match="x was numeric"):
        frame.encoder.transform(data.assign(x="a"))


def test_offset_given_as_an_array_is_asked_for_again(data):
    frame = model_frame("y ~ x + offset(z) + (1 | g)", data, offset=np.ones(N))
    with pytest.raises(DataError, match="offset"):
        frame.encoder.transform(data)
    out = frame.encoder.transform(data, offset=np.full(N, 2.0))
    np.testing.assert_allclose(out.offset, data.z + 2)


def test_contrasts_and_levels_hold_for_new_data(data):
    frame = model_frame("y ~ f + o + (1 | g)", data, contrasts={"f": "sum"})
    new = data.iloc[[2, 5]].astype({"f": "category", "o": str})
    np.testing.assert_array_equal(frame.encoder.transform(new).X, frame.X[[2, 5]])


# -- speed -----------------------------------------------------------------------------


def best_of(repeats, run):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def test_cost_is_small():
    """Loose bounds, at least ten times what an idle core takes."""
    n = 60_000
    i = np.arange(n)
    large = pd.DataFrame({"y": np.sin(i), "x": np.cos(i), "g": (i * 7919) % (n // 3)})
    assert best_of(5, lambda: model_frame("y ~ x + (1 | g)", large)) < 0.05
    small = large[:180].assign(g=i[:180] % 18)
    assert best_of(30, lambda: model_frame("y ~ x + (x | g)", small)) < 0.01


PLAIN = "log(y) ~ I(x ** 2) + sqrt(z) * C(f, 'sum') + (x | g) + (1 | f)"


@pytest.mark.parametrize("formula", ["y ~ x + (x | g)", PLAIN])
@pytest.mark.parametrize("kind", ["dict", "pandas.DataFrame"])
def test_plain_formulas_import_neither_formulaic_nor_narwhals(formula, kind):
    code = f"""
import sys, numpy as np, pandas
from jaxglmm.encoding import model_frame
i, f = np.arange(24), list("abc") * 8
table = {kind}({{"y": 2 + np.sin(i), "x": np.cos(i), "z": i, "g": i % 4, "f": f}})
model_frame({formula!r}, table).encoder.transform(table)
assert 'formulaic' not in sys.modules
assert 'narwhals' not in sys.modules
assert 'scipy' not in sys.modules
assert 'jax' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_warning_of_others_escapes(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = model_frame(STATEFUL, data)
        again = frame.encoder.transform(data)
    np.testing.assert_allclose(again.X, frame.X, rtol=1e-12)
