"""The language of formulas: float64, every name that a column can have, no code."""

import ast
import json
import pickle
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy.interpolate import CubicSpline
from scipy.stats import rankdata

import jaxglmm as jg
from jaxglmm.encoding import model_frame
from jaxglmm.errors import DataError, FormulaError
from jaxglmm.splines import natural_spline

N = 24
DAYS = np.arange(N) % 11 + 2  # times 20 beyond int8 and uint8, squares too


@pytest.fixture
def data():
    i = np.arange(N)
    return pd.DataFrame(
        {
            "y": np.sin(i),
            "x": i / 4 + 0.5,
            "D": DAYS,
            "g": i % 4,
            "f": list("abc") * 8,
            "flag": i % 3 == 0,
            "other": i % 2 == 0,
            "o": pd.Categorical(["lo", "mid", "hi"] * 8, ["lo", "mid", "hi"], True),
            "day": pd.date_range("2020-01-28", periods=N),
            "id": ["p_q", "r_s", "t_q"] * 8,
        }
    )


def columns(expression, data, **options):
    """Columns of one expression, and that new data give the same ones."""
    frame = model_frame(f"y ~ 0 + {expression} + (1 | g)", data, **options)
    new = frame.encoder.transform(data.iloc[5:9])
    np.testing.assert_allclose(new.X, frame.X[5:9], rtol=1e-13, atol=1e-14)
    return frame.X


# -- float64, whatever the column ------------------------------------------------------

KINDS = {
    **{
        kind: kind
        for kind in (
            *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
            *("float16", "float32", "Int8", "UInt16", "Float32"),
            *("int8[pyarrow]", "uint8[pyarrow]", "float[pyarrow]"),
        )
    },
    "decimal": None,
}
EXPRESSIONS = {
    "I(D * 20)": lambda D: D * 20,
    "I(D^2)": lambda D: D**2,
    "I(D ** 5)": lambda D: D**5,
    "np.square(D)": lambda D: D**2,
    "np.power(D, 5)": lambda D: D**5,
    "I(-D)": lambda D: -D,
    "I(3 - D)": lambda D: 3 - D,
    "I(D + 250)": lambda D: D + 250,
    "I(D + D + D)": lambda D: 3 * D,
    "I(D // 2 * 100)": lambda D: D // 2 * 100,
    "I(D % 7 * 100)": lambda D: D % 7 * 100,
    "exp(D)": np.exp,
    "I(D * 1.1)": lambda D: D * 1.1,
    "np.where(D > 5, D, 1000)": lambda D: np.where(D > 5, D, 1000),
    "D.clip(5, 300)": lambda D: np.clip(D, 5, 300),
    "np.maximum(D, 300.5 - D)": lambda D: np.maximum(D, 300.5 - D),
    "I(D if D > 5 else 700 * D)": lambda D: np.where(D > 5, D, 700 * D),
    "poly(D, 2, raw=True)": lambda D: np.column_stack([D, D**2]),
    "scale(D * D)": lambda D: (D**2 - np.mean(D**2)) / np.std(D**2, ddof=1),
    "I(D - sum(D))": lambda D: D - D.sum(),
}


def of_kind(data, kind):
    if KINDS[kind] is None:
        return data.assign(D=[Decimal(int(v)) for v in DAYS])
    return data.astype({"D": KINDS[kind]})


@pytest.mark.parametrize("kind", KINDS)
def test_expressions_are_evaluated_in_float64(data, kind):
    data, D = of_kind(data, kind), DAYS.astype(float)
    for expression, expected in EXPRESSIONS.items():
        X = columns(expression, data)
        want = expected(D).reshape(N, -1)
        np.testing.assert_allclose(X, want, rtol=1e-14, err_msg=expression)


@pytest.mark.parametrize("kind", KINDS)
def test_responses_offsets_weights_and_slopes_are_too(data, kind):
    data, D = of_kind(data, kind), DAYS.astype(float)
    formula = "I(D * 20) ~ x + offset(D * 30) + (0 + I(D^2) | g)"
    frame = model_frame(formula, data, weights="D * 100", offset="200 + D")
    np.testing.assert_allclose(frame.y, 20 * D, rtol=1e-15)
    np.testing.assert_allclose(frame.offset, 31 * D + 200, rtol=1e-15)
    np.testing.assert_allclose(frame.weights, 100 * D, rtol=1e-15)
    np.testing.assert_allclose(frame.terms[0].z[:, 0], D**2, rtol=1e-15)
    binomial = model_frame("cbind(D, 250 - D) ~ x + (1 | g)", data)
    np.testing.assert_allclose(binomial.weights, np.full(N, 250.0), rtol=1e-15)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("I(flag * 20)", lambda a, b: a * 20.0),
        ("I(flag + other)", lambda a, b: 1.0 * a + b),
        ("I(flag - other)", lambda a, b: 1.0 * a - b),
        ("I(-flag)", lambda a, b: -1.0 * a),
        ("exp(flag)", lambda a, b: np.exp(1.0 * a)),
        ("I((x > 2) * 3 + flag)", lambda a, b: 3.0 * (np.arange(N) / 4 > 1.5) + a),
    ],
)
def test_truth_values_count_as_numbers_in_arithmetic(data, expression, expected):
    want = expected(data.flag.to_numpy(), data.other.to_numpy())
    np.testing.assert_allclose(columns(expression, data)[:, 0], want, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_keep_their_levels(data, kind):
    data = of_kind(data, kind)
    levels = [str(v) for v in sorted(set(DAYS))]
    for expression in ("factor(D)", "C(D)", "factor(I(D))"):
        frame = model_frame(f"y ~ 0 + {expression} + (1 | D)", data)
        assert frame.X_names == [expression + level for level in levels]
        assert list(frame.terms[0].levels) == levels


def test_truth_values_on_their_own_are_factors(data):
    names = ["flagTrue", "I(other)True", "I(x > 2)True", "I(flag & other)True"]
    sides = " + ".join(name.removesuffix("True") for name in names)
    assert model_frame(f"y ~ {sides} + (1 | g)", data).X_names[1:] == names


LARGE = 2**53 + np.arange(N) // 3  # neighbours that float64 cannot tell apart


@pytest.mark.parametrize("group", ["id", "factor(id)", "I(id)", "id:f"])
@pytest.mark.parametrize("kind", ["int64", "uint64", "Int64", "int64[pyarrow]"])
def test_large_ids_do_not_collapse(data, group, kind):
    data["id"] = pd.Series(LARGE).astype(kind)
    frame = model_frame(f"y ~ x + (1 | {group})", data)
    expected = N if ":" in group else 8
    assert frame.terms[0].n_levels == expected
    new = frame.encoder.transform(data[::-1])
    np.testing.assert_array_equal(new.terms[0].group, frame.terms[0].group[::-1])
    if kind in ("Int64", "int64[pyarrow]"):
        data.loc[4, "id"] = pd.NA
        new = frame.encoder.transform(data)
        known = np.arange(N) != 4
        np.testing.assert_array_equal(new.terms[0].group >= 0, known)
        np.testing.assert_array_equal(
            new.terms[0].group[known], frame.terms[0].group[known]
        )
    row = data.x[data.id == LARGE[9]].to_numpy()
    assert len(row) == 3
    picked = model_frame(f"y ~ I(id == {LARGE[9]}) + (1 | g)", data.dropna())
    assert picked.X[:, 1].sum() == 3


def test_large_ids_with_gaps_from_polars(data):
    ids = [None, *LARGE.tolist()[1:]]
    table = pl.DataFrame({"y": data.y.tolist(), "x": data.x.tolist(), "id": ids})
    frame = model_frame("y ~ x + (1 | id)", table)
    assert frame.n_dropped == 1
    assert frame.terms[0].n_levels == 8


# -- names -----------------------------------------------------------------------------

NAMES = {
    ".x": ".x",
    "._y": "`._y`",
    "x.": "x.",
    "is.na": "is.na",
    "a..b": "a..b",
    "if": "`if`",
    "lambda": "lambda",
    "µ": "µ",
    "x²": "x²",
    "Days  on trial": "`Days  on trial`",
    "two\nlines": "`two\nlines`",
    "\ttab": "`\ttab`",
    "x + 1": "`x + 1`",
    "a|b": "`a|b`",
    "_alias0_": "_alias0_",
    "np": "np",
    0: "`0`",
    7.5: "`7.5`",
    ("a", 1): "`('a', 1)`",
}


@pytest.mark.parametrize("name", NAMES, ids=map(repr, NAMES))
def test_every_name_of_a_column_can_be_written(data, name):
    plain = data.rename(columns={"D": "z"}).assign(z=DAYS, w=DAYS % 3 + 1)
    text = "`z`"
    expected = model_frame(FORMULA.format("z"), plain, weights="w", offset="z / 2")
    table = {k: plain[k] for k in plain if k != "z"} | {name: plain["z"]}
    text = NAMES[name]
    for given in (
        table,
        pd.concat(table, axis=1) if not isinstance(name, tuple) else table,
    ):
        frame = model_frame(
            FORMULA.format(text), given, weights="w", offset=f"{text} / 2"
        )
        np.testing.assert_array_equal(frame.X, expected.X)
        np.testing.assert_array_equal(frame.offset, expected.offset)
        for mine, theirs in zip(frame.terms, expected.terms):
            np.testing.assert_array_equal(mine.z, theirs.z)
            np.testing.assert_array_equal(mine.group, theirs.group)
        assert frame.terms[0].group_name == str(name)
        new = frame.encoder.transform(given, response=True)
        np.testing.assert_array_equal(new.X, frame.X)
        np.testing.assert_array_equal(new.terms[1].z, frame.terms[1].z)
        np.testing.assert_array_equal(new.terms[0].group, frame.terms[0].group)
        np.testing.assert_array_equal(new.offset, frame.offset)


FORMULA = "y ~ {0} + log({0}) + x:{0} + (1 | {0}) + ({0} | g)"


def test_integer_columns():
    i = np.arange(N)
    data = pd.DataFrame({0: np.sin(i), 1: np.cos(i), 2: i % 4, 3: 1.0 + i, "4": i % 2})
    m = model_frame("`0` ~ `1` + C(`4`) + (1 | `2`)", data, weights="3", offset="`3`/2",
                    contrasts=None)  # fmt: skip
    np.testing.assert_array_equal(m.y, data[0])
    np.testing.assert_array_equal(m.X[:, 1], data[1])
    np.testing.assert_array_equal(m.weights, data[3])
    np.testing.assert_array_equal(m.offset, data[3] / 2)
    assert m.terms[0].group_name == "2"
    text = data.rename(columns=str)
    np.testing.assert_array_equal(m.encoder.transform(text).X, m.X)
    both = data.assign(**{"1": 5.0 * i})  # text goes before a number
    frame = model_frame("`0` ~ `1` + (1 | `2`)", both)
    np.testing.assert_array_equal(frame.X[:, 1], 5.0 * i)
    with pytest.raises(DataError, match="no column '9' in the data"):
        model_frame("`0` ~ `9` + (1 | `2`)", data)


@pytest.mark.parametrize("key", [0, "0"])
def test_contrasts_by_an_integer_name(key):
    i = np.arange(N)
    data = pd.DataFrame({"y": np.sin(i), "g": i % 4, 0: list("abc") * 8})
    frame = model_frame("y ~ `0` + (1 | g)", data, contrasts={key: "sum"})
    assert frame.X_names == ["(Intercept)", "`0`1", "`0`2"]
    assert set(frame.X[:, 1]) == {-1.0, 0.0, 1.0}


def test_dotted_columns_go_before_attributes(data):
    data["day.dt"] = np.arange(N)
    data["x.y"] = -data.x
    np.testing.assert_array_equal(columns("x.y", data)[:, 0], -data.x)
    np.testing.assert_array_equal(
        columns("x.y.clip(-3)", data)[:, 0], -data.x.clip(0, 3)
    )


def test_series_are_aligned_by_position(data):
    data = data.set_axis(np.arange(N)[::-1] * 7, axis=0)
    X = columns("I(x.where(f == 'a', -x))", data)
    np.testing.assert_array_equal(X[:, 0], np.where(data.f == "a", data.x, -data.x))


# -- what the language holds -----------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("I(x * pi)", lambda d: d.x * np.pi),
        ("I(x * np.e + np.pi)", lambda d: d.x * np.e + np.pi),
        ("I((1 < x < 3) * 1)", lambda d: (d.x > 1) & (d.x < 3)),
        ("I((x > 1 and not flag) * 1)", lambda d: (d.x > 1) & ~d.flag),
        ("I(((x > 5) | flag) * 1)", lambda d: (d.x > 5) | d.flag),
        ("I((~flag & other) * 1)", lambda d: ~d.flag & d.other),
        ("I((f in ['a', 'b']) * 1)", lambda d: d.f.isin(["a", "b"])),
        ("I((f not in ['a']) * 1)", lambda d: d.f != "a"),
        ("I((o > 'lo') * 1)", lambda d: d.o > "lo"),
        ("I((day > '2020-02-01') * 1)", lambda d: d.day > "2020-02-01"),
        ("I((f + '_' + id == 'a_p_q') * 1)", lambda d: d.f + "_" + d.id == "a_p_q"),
        ("day.dt.day", lambda d: d.day.dt.day),
        ("day.dt.isocalendar().week", lambda d: d.day.dt.isocalendar().week),
        ("I((day - day.min()).dt.days)", lambda d: np.arange(N)),
        ("o.cat.codes", lambda d: d.o.cat.codes),
        ("I(o.cat.codes * 100)", lambda d: d.o.cat.codes.astype(float) * 100),
        ("f.map({'a': 1, 'b': 2, 'c': 5})", lambda d: d.f.map(dict(a=1, b=2, c=5))),
        ("I((id.str.split('_').str[1] == 'q') * 1)", lambda d: d.id.str.endswith("q")),
        ("I((id.str.contains('q')) * 1)", lambda d: d.id.str.endswith("q")),
        ("I((id.str[0] == 'p') * 1)", lambda d: d.id.str.startswith("p")),
        ("f.str.len()", lambda d: np.ones(N)),
        ("x.astype(int)", lambda d: d.x.astype(int)),
        ("np.clip(x, 1, 3)", lambda d: d.x.clip(1, 3)),
        ("round(x, 1)", lambda d: d.x.round(1)),
        ("np.interp(x, [0, 7], [0, 70])", lambda d: 10 * d.x),
        ("poly(x, 3, raw=True)[:, 2]", lambda d: d.x**3),
        ("np.where(flag, x, 0).clip(0)", lambda d: np.where(d.flag, d.x, 0)),
    ],
)  # fmt: skip
def test_values(data, expression, expected):
    want = np.asarray(expected(data), float)
    np.testing.assert_allclose(columns(expression, data)[:, 0], want, rtol=1e-14)


def test_a_column_times_a_matrix(data):
    x = data.x.to_numpy()
    X = columns("I(D * poly(x, 2, raw=True))", data)
    np.testing.assert_allclose(X, np.column_stack([DAYS * x, DAYS * x**2]), rtol=1e-14)
    X = columns("I(poly(x, 1, raw=True) * D)", data)
    np.testing.assert_allclose(X[:, 0], DAYS * x, rtol=1e-14)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("I(x - x.mean())", lambda x: x - x.mean()),
        ("I(x - np.median(x))", lambda x: x - np.median(x)),
        ("I(x / max(x))", lambda x: x / x.max()),
        ("I(x - x.quantile(0.25))", lambda x: x - np.quantile(x, 0.25)),
        ("I((x - mean(x)) / np.std(x))", lambda x: (x - x.mean()) / x.std()),
        ("I(scale(x) + 2 * scale(x))", lambda x: 3 * (x - x.mean()) / x.std(ddof=1)),
    ],
)  # fmt: skip
def test_summaries_are_those_of_the_training_rows(data, expression, expected):
    """`columns` compares a part of the rows, encoded on its own."""
    want = expected(data.x.to_numpy())
    np.testing.assert_allclose(columns(expression, data)[:, 0], want, atol=1e-14)


def test_offsets_and_responses_remember_too(data):
    frame = model_frame("I(y - y.mean()) ~ x + offset(scale(x)) + (1 | g)", data)
    new = frame.encoder.transform(data[3:5], response=True)
    np.testing.assert_allclose(new.offset, frame.offset[3:5], rtol=1e-14)
    np.testing.assert_allclose(new.y, frame.y[3:5], rtol=1e-14)


# -- functions of one's own ------------------------------------------------------------


def half(x):
    return x / 2


def both(x, flag, scale=1.0):
    return np.column_stack([x * scale, np.where(flag, x, 0.0)])


def test_own_functions_are_used_everywhere(data):
    functions = {"half": half, "both": both, "ranks": rankdata}
    frame = model_frame(
        "half(y) ~ both(x, flag, scale=3) + ranks(D) + offset(half(x)) + (half(D) | g)"
        " + (1 | half(D))",
        data.astype({"D": "int8"}),
        weights="half(D)",
        others={"zi": "~ half(x)"},
        functions=functions,
    )
    x, D = data.x.to_numpy(), DAYS
    np.testing.assert_array_equal(frame.y, data.y / 2)
    np.testing.assert_array_equal(frame.X[:, 1:3], both(x, data.flag, 3.0))
    np.testing.assert_array_equal(frame.X[:, 3], rankdata(D))
    np.testing.assert_array_equal(frame.offset, x / 2)
    np.testing.assert_array_equal(frame.weights, D / 2)
    np.testing.assert_array_equal(frame.others[0].X[:, 1], x / 2)
    assert "both(x, flag, scale=3)1" in frame.X_names
    encoder = pickle.loads(pickle.dumps(frame.encoder))
    np.testing.assert_array_equal(encoder.transform(data).X, frame.X)


def test_own_functions_through_the_door(sleepstudy):
    formula = "Reaction ~ half(Days) + (half(Days) | Subject)"
    m = jg.glmm(formula, sleepstudy, functions={"half": half})
    plain = jg.glmm("Reaction ~ Days + (Days | Subject)", sleepstudy)
    np.testing.assert_allclose(m.fixef.iloc[1], 2 * plain.fixef.iloc[1], rtol=1e-8)
    np.testing.assert_allclose(
        m.predict(sleepstudy[::-1]), plain.predict(sleepstudy[::-1]), rtol=1e-7
    )
    design = jg.design(formula, sleepstudy, functions={"half": half})
    np.testing.assert_array_equal(design.X[:, 1], sleepstudy.Days / 2)


def test_own_functions_cannot_change_the_table(data):
    def vandal(x):
        x[:] = 0.0
        return np.ones(len(x))

    before = data.copy()
    columns("vandal(x)", data.assign(x=data.x), functions={"vandal": vandal})
    pd.testing.assert_frame_equal(data, before)


@pytest.mark.parametrize(
    ("functions", "found"),
    [
        ({"a b": half}, "'a b' cannot be the name"),
        ({"offset": half}, "'offset' cannot be the name"),
        ({"f": 3}, "'f' is a int, not a function"),
        ([half], "must be a dict"),
    ],
)
def test_bad_functions(data, functions, found):
    with pytest.raises(FormulaError, match=found):
        model_frame("y ~ x + (1 | g)", data, functions=functions)


def test_failing_function_is_named(data):
    def fails(x):
        raise RuntimeError("no luck")

    with pytest.raises(DataError, match=r"fails\(x\): RuntimeError: no luck"):
        model_frame("y ~ fails(x) + (1 | g)", data, functions={"fails": fails})
    with pytest.raises(FormulaError, match=r"functions=\{'half': half\}"):
        model_frame("y ~ half(x) + (1 | g)", data)


# -- no code ---------------------------------------------------------------------------

REFUSED = [
    ("I(x + 0 * len(__import__('os').listdir('/')))", "'__import__'"),
    ("I(__builtins__.open('x'))", "__builtins__"),
    ("open('x')", "unknown function 'open'"),
    ("eval('1')", "unknown function 'eval'"),
    ("exec('1')", "unknown function 'exec'"),
    ("getattr(x, 'dtype')", "unknown function 'getattr'"),
    ("x.__class__", "'.__class__'"),
    ("I(x.__class__.__mro__[1])", "'.__"),
    ("I('{0.__class__}'.format(x))", "unknown function '.format'"),
    ("x._values", "'._values'"),
    ("x.values.tofile('a')", "'.tofile'"),
    ("x.to_csv('a')", "'.to_csv'"),
    ("x.apply(log)", "'.apply'"),
    ("x.pipe(log)", "'.pipe'"),
    ("x.map(log)", "log is a function"),
    ("f.map('{}'.format)", ".format"),
    ("I(lambda: x)", "not a valid expression"),
    ("I([v for v in x])", "a comprehension"),
    ("I(sum(v for v in x))", "a comprehension"),
    ("I((v := x))", "not a valid expression"),
    ("I(f'{x}')", "not a valid expression"),
    ("I(f 'x')", "not a valid expression"),
    ("f(*x)", "a starred argument"),
    ("f(**x)", r"'\*\*'"),
    ("I({1, 2})", "a set"),
    ("I(x is None)", "'is'"),
    ("I(x << 3)", "not a valid expression"),
    ("I(x @ x)", "'matmult'"),
    ("np.load('a')", "unknown function 'np.load'"),
    ("np.save('a', x)", "unknown function 'np.save'"),
    ("np.fromfile('a')", "unknown function 'np.fromfile'"),
    ("np.lib.format.open_memmap('a')", "'np.lib.format.open_memmap'"),
    ("np.random.normal(x)", "'np.random.normal'"),
    ("np.ones(10 ** 12)", "unknown function 'np.ones'"),
    ("I(np.ctypeslib)", "'.ctypeslib'|'np.ctypeslib'"),
    ("np.log(x, x)", "takes 1 argument; found 2"),
    ("np.log(x, out=x)", "no argument 'out'"),
    ("x.clip(0, inplace=True)", "no argument 'inplace'"),
    ("x.clip(0, 1, 0, True)", "takes 1 to 3 arguments"),
    ("poly(x, 2, _state=x)", "'_state'"),
    ("bs(x, df=10 ** 9)", "df is 1000 at most"),
    ("poly(x, 10 ** 9)", "degree is 50 at most"),
    ("bs(x, None, None, 10 ** 9)", "degree is 50 at most"),
    ("np.array([[[1.0]]])", "3 dimensions"),
    ("I(x * np.array([[1, 2], [3, 4]]))", "differ in their number of rows"),
    ("I('a' * 10 ** 10)", "needs numbers and found the text 'a'"),
    ("I([0] * 10 ** 10)", "needs numbers and found a list"),
    ("I(9 ** 9 ** 9 ** 9 * x)", "infinite"),
    ("f.str.repeat(10 ** 10)", "'.repeat'"),
    ("f.str.pad(10 ** 10)", "'.pad'"),
    ("f.str.contains('(a+)+$')", "plain text"),
    ("f.str.replace('a', 'b')", "'.replace'"),
    ("x.astype('S1000000000')", "astype"),
    ("day.dt.strftime('%1000000000d')", "strftime"),
    ("I(x[0])", "brackets take"),
    ("I(f.str['a'])", "whole numbers"),
    ("x.T", "attribute .T"),
    ("I(f * 2)", "found text"),
    ("I(x & D)", "truth values"),
    ("I(not x)", "truth values"),
    ("id.str.split('_')", "gives lists"),
    ("x.dt.yaer", "attribute .yaer"),
    ("log(x, 2)", "takes 1 argument"),
    ("log(factor(D))", "needs numbers and found a factor"),
    ("I(cbind(D, D) + 1)", r"needs numbers and found cbind\(...\)"),
    ("poly(x=x, degree=2)", "takes 1 to 8 arguments"),
    ("scale('a')", "scale|cannot evaluate"),
]


@pytest.mark.parametrize(("expression", "found"), REFUSED)
def test_everything_else_is_refused_by_name(data, expression, found):
    for formula in (f"y ~ {expression} + (1 | g)", f"y ~ x + (0 + {expression} | g)"):
        with pytest.raises((FormulaError, DataError), match=found):
            model_frame(formula, data)
    with pytest.raises((FormulaError, DataError), match=found):
        model_frame("y ~ x + (1 | g)", data, offset=expression)


@pytest.mark.parametrize(
    "inside",
    [
        "+" * 20_000 + "x",
        "not " * 5_000 + "x",
        "x" + " ** x" * 5_000,
        "x if x else " * 3_000 + "x",
        "log(" * 39 + "x y" + ")" * 39,
        "[" * 39 + "x y" + "]" * 39,
        "x" + ".a" * 5_000,
        "9" * 100_000,
        "x" + " + x" * 300,
    ],
    ids=["plus", "not", "power", "if", "calls", "lists", "dots", "digits", "sum"],
)
def test_depth_is_bounded(data, inside):
    with pytest.raises(FormulaError, match=r"not a valid expression|nested more than"):
        model_frame(f"y ~ I({inside}) + (1 | g)", data)


def test_the_package_evaluates_no_code():
    """No call of eval, exec or compile, and none of formulaic's own evaluation."""
    for path in Path(jg.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__")
            if isinstance(node, ast.ImportFrom):
                assert "stateful" not in str(node.module)


# -- natural splines -------------------------------------------------------------------

IN_R = json.loads(
    (Path(__file__).parent / "reference/natural_splines.json").read_text()
)


@pytest.mark.parametrize("case", IN_R["cases"], ids=lambda case: str(case["options"]))
def test_natural_splines_are_those_of_r(case):
    state, options = {}, case["options"]
    basis = natural_spline(np.array(IN_R["x"]), **options, _state=state)
    np.testing.assert_allclose(basis, case["train"], rtol=1e-12, atol=1e-14)
    again = natural_spline(np.array(IN_R["new"]), **options, _state=state)
    np.testing.assert_allclose(again, case["new"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("df", [2, 3, 5, 8])
def test_natural_splines_span_those_of_scipy(df):
    """With the constant, the space of natural cubic splines through the knots."""
    x = np.random.default_rng(1).gamma(2.0, size=200)
    knots = np.quantile(x, np.linspace(0, 1, df + 1))
    theirs = CubicSpline(knots, np.eye(df + 1), bc_type="natural")(x)
    mine = np.column_stack([np.ones(200), natural_spline(x, df, _state={})])
    beta, *_ = np.linalg.lstsq(mine, theirs, rcond=None)
    np.testing.assert_allclose(mine @ beta, theirs, atol=1e-11)
    assert np.linalg.matrix_rank(mine) == df + 1


def test_natural_splines_in_a_formula(data):
    X = columns("ns(x, df=4)", data)
    want = natural_spline(data.x.to_numpy(), 4, _state={})
    np.testing.assert_allclose(X, want, rtol=1e-13, atol=1e-15)
    frame = model_frame("y ~ ns(x, df=4) + (1 | g)", data)
    assert frame.X_names[1:] == [f"ns(x, df=4){j}" for j in (1, 2, 3, 4)]
    outside = frame.encoder.transform(data.assign(x=[-3.0, 20.0, 40.0] * 8)).X
    slope = (outside[2] - outside[1]) / 20  # straight beyond the range
    step = frame.encoder.transform(data.assign(x=30.0)).X[0] - outside[1]
    np.testing.assert_allclose(step, 10 * slope, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("ns(x, df=0)", "at least 1; got 0"),
        ("ns(x, df=2.5)", "whole number"),
        ("ns(x, df=3, knots=[2, 3])", "df or knots, not both"),
        ("ns(x, knots=[2, 30])", "do not lie inside"),
        ("ns(flag, df=4)", "do not lie inside"),
        ("ns(x, boundary_knots=[3, 3])", "two different numbers"),
        ("ns(I(0 * x))", "two different numbers"),
        ("ns(f, df=3)", "needs numbers and found text"),
        ("ns(x, dff=3)", "unexpected keyword argument 'dff'"),
    ],
)
def test_bad_natural_splines(data, call, found):
    with pytest.raises(DataError, match=found):
        model_frame(f"y ~ {call} + (1 | g)", data)
