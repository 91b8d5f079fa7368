"""The formula parser: grammar, expansion and errors that point at the place."""

import pytest
from formulaic.parser import DefaultFormulaParser
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from jaxglmm.algebra import expand
from jaxglmm.errors import FormulaError
from jaxglmm.expressions import canonical, column_of, references, tree
from jaxglmm.formula import parse


def groups(formula):
    return [(t.effects, t.group, t.structure) for t in parse(formula).random]


def test_all_parts_in_any_order():
    parsed = parse("y ~ (1 + x | g) + x * f + offset(log(z)) + (1 | h) - w")
    assert parsed.response == "y"
    assert parsed.fixed == "x * f - w"
    assert parsed.offsets == ("log(z)",)
    assert [(t.effects, t.group) for t in parsed.random] == [("1 + x", "g"), ("1", "h")]
    assert parsed.random[0].text == "(1 + x | g)"
    assert parsed.text == "y ~ (1 + x | g) + x * f + offset(log(z)) + (1 | h) - w"


@pytest.mark.parametrize(
    ("formula", "fixed"),
    [
        ("y ~ (1 | g)", "1"),
        ("y ~ 0 + (1 | g)", "0"),
        ("y ~ (1 | g) - 1", "-1"),
        ("y ~ x + (1 | g) - 1", "x - 1"),
        ("y ~ -1 + x + (1 | g)", "-1 + x"),
        ("y ~ x + -1 + (1 | g)", "x - 1"),
        ("y ~ (x + (1 | g)) + z", "x + z"),
        ("y ~ I((a > 1) | (b > 2)) + (1 | g)", "I((a > 1) | (b > 2))"),
        ("y ~\n  x +\n  (1 | g)", "x"),
    ],
)
def test_fixed_part(formula, fixed):
    assert parse(formula).fixed == fixed


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("(1 | a/b)", [("1", "b:a", "full"), ("1", "a", "full")]),
        (
            "(x | a/b/c)",
            [("x", "c:b:a", "full"), ("x", "b:a", "full"), ("x", "a", "full")],
        ),
        ("(1 | a:b)", [("1", "a:b", "full")]),
        ("(1 | a + b)", [("1", "a", "full"), ("1", "b", "full")]),
        ("(1 | (a + b))", [("1", "a", "full"), ("1", "b", "full")]),
        ("(x || g)", [("1", "g", "full"), ("0 + x", "g", "full")]),
        ("(0 + x || g)", [("0 + x", "g", "full")]),
        (
            "(x * z || g)",
            [(e, "g", "full") for e in ("1", "0 + x", "0 + z", "0 + x:z")],
        ),
        (
            "(x || a/b)",
            [
                ("1", "b:a", "full"),
                ("0 + x", "b:a", "full"),
                ("1", "a", "full"),
                ("0 + x", "a", "full"),
            ],
        ),
        ("diag(x | g)", [("x", "g", "diag")]),
        ("ar1(0 + t | g)", [("0 + t", "g", "ar1")]),
        ("cs(x | g)", [("x", "g", "cs")]),
        ("(1 | C(g))", [("1", "C(g)", "full")]),
        ("(1 | `my g`:`k`)", [("1", "`my g`:k", "full")]),
        ("(poly(x,2) | g)", [("poly(x,2)", "g", "full")]),
        ("(log(`a|b`) | g)", [("log(`a|b`)", "g", "full")]),
    ],
)
def test_random_terms(term, expected):
    assert groups(f"y ~ x + {term}") == expected


@pytest.mark.parametrize(
    ("formula", "response"),
    [
        ("log(y) ~ (1 | g)", "log(y)"),
        ("cbind(a,n - a) ~ (1 | g)", "cbind(a, n - a)"),
        ("total.fruits ~ (1 | g)", "total.fruits"),
        ("`my y` ~ (1 | g)", "`my y`"),
        ("I(y**2) ~ (1 | g)", "I(y ** 2)"),
        ("a / b ~ (1 | g)", "a / b"),
    ],
)
def test_response(formula, response):
    assert parse(formula).response == response


@pytest.mark.parametrize(
    ("side", "intercept", "terms"),
    [
        ("1", True, []),
        ("0", False, []),
        ("x", True, ["x"]),
        ("x - 1", False, ["x"]),
        ("0 + x", False, ["x"]),
        ("-1 + x + 1", True, ["x"]),
        ("a * b", True, ["a", "b", "a:b"]),
        ("b:a + a + b", True, ["a", "b", "b:a"]),
        ("a / b", True, ["a", "a:b"]),
        ("a / (b + c)", True, ["a", "a:b", "a:c"]),
        ("b %in% a + a", True, ["a", "b:a"]),
        ("(a + b + c)^2", True, ["a", "b", "c", "a:b", "a:c", "b:c"]),
        ("(a + b + c)**3 - a:b:c", True, ["a", "b", "c", "a:b", "a:c", "b:c"]),
        ("a * b - b", True, ["a", "a:b"]),
        ("x:x + x", True, ["x"]),
        ("(0 + x)", False, ["x"]),
        ("poly( x ,2 ) + bs(x,df=4)", True, ["poly(x, 2)", "bs(x, df=4)"]),
        ("{x + 1}", True, ["x + 1"]),
        ("x.clip(0) + d.dt.year", True, ["x.clip(0)", "d.dt.year"]),
    ],
)
def test_expand(side, intercept, terms):
    out = expand(side)
    assert out.intercept is intercept
    assert [":".join(t) for t in out.terms] == terms


SIDES = st.recursive(
    st.sampled_from(["a", "b", "c", "d", "log(a)"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", ":", "/", "%in%"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(inner, st.sampled_from(["^2", "**3"])).map(
            lambda t: f"({t[0]}){t[1]}"
        ),
    ),
    max_leaves=6,
)


@given(side=SIDES, tail=st.sampled_from(["", " - 1", " + 0", " + d"]))
@settings(max_examples=300, deadline=None)
def test_algebra_agrees_with_formulaic(side, tail):
    try:
        theirs = DefaultFormulaParser(include_intercept=True).get_terms(side + tail)
    except TypeError:  # formulaic cannot nest in a difference that is empty
        reject()
    expected = {frozenset(f.expr for f in term.factors) for term in theirs}
    out = expand(side + tail)
    mine = {frozenset(t) for t in out.terms}
    assert mine == expected - {frozenset(["1"])}
    assert out.intercept == (frozenset(["1"]) in expected)


ERRORS = [
    ("y + x", "no '~'", 5),
    ("y ~ x ~ z + (1 | g)", "second '~'", 6),
    ("y ~ (x | g", "never closed", 4),
    ("y ~ x)", "no '(' opens", 5),
    ("y ~ [x)", "unbalanced", 6),
    ("y ~ x | g", "needs parentheses", 6),
    ("y ~ (| g)", "left of the bar is empty", 5),
    ("y ~ (x | )", "no grouping factor", 7),
    ("y ~ (1 | 1)", "constant 1", 9),
    ("y ~ (1 | 'g')", "constant 'g'", 9),
    ("y ~ (1 | g | h)", "one bar", 11),
    ("y ~ (1 | a * b)", "not supported", 11),
    ("y ~ (0 | g)", "no effect", 5),
    ("~ x + (1 | g)", "Name the response", 0),
    ("y | z ~ (1 | g)", "bar in the response", 2),
    ("y ~ x - (1 | g)", "Leave it out", 8),
    ("y ~ x - offset(z) + (1 | g)", "Leave it out", 8),
    ("y ~ x + offset(z):x + (1 | g)", "offset", 8),
    ("y ~ . + (1 | g)", "Name the columns", 4),
    ("y ~ x", "no random effects", 4),
    ("y ~", "Add terms", 2),
    ("y ~ (1 | g) +", "ends with an operator", 12),
    ("y ~ x * + (1 | g)", "where a term was expected", 8),
    ("y ~ 2 * x + (1 | g)", "number 2", 4),
    ("y ~ x z + (1 | g)", "operator", 6),
    ("y ~ 'x' + (1 | g)", "backticks", 4),
    ("y ~ `x + (1 | g)", "Close the quote", 4),
    ("y ~ f(x z) + (1 | g)", "not a valid expression", 4),
    ("y ~ x:(1 | g)", "needs parentheses", 9),
    ("y ~ x^z + (1 | g)", "whole number", 6),
    ("y ~ () + (1 | g)", "empty parentheses", 5),
    ("y ~ diag(x || g)", "single bar", 11),
    ("y ~ x:0 + (1 | g)", "0 cannot", 5),
    ("y ~ x § z + (1 | g)", "unexpected character", 6),
]


@pytest.mark.parametrize(("formula", "message", "position"), ERRORS)
def test_errors_point_at_the_place(formula, message, position):
    with pytest.raises(FormulaError, match="\n") as caught:
        parse(formula)
    first, line, caret = str(caught.value).split("\n")
    assert message in first
    assert line == "    " + formula
    assert caret == "    " + " " * position + "^"


@pytest.mark.parametrize(
    ("term", "advice"),
    [
        ("(x > 4)", "I(x > 4)"),
        ("x > 4", "I(x > 4)"),
        ("z + x <= 4 + w", "I(x <= 4)"),
        ("x + (x != 4) * z", "I(x != 4)"),
        ("z:(f == 'a  b')", "I(f == 'a  b')"),
        ("(1 < x < 4)", "I(1 < x < 4)"),
        ("((x > 1) & (z > 2))", "I((x > 1) & (z > 2))"),
        ("(x > 1) & (z > 2)", "I((x > 1) & (z > 2))"),
        ("(x > 4 and not flag) * z", "I(x > 4 and not flag)"),
        ("(~flag)", "I(~flag)"),
        ("!flag", "I(~flag)"),
        ("not flag", "I(not flag)"),
        ("(f in ['a', 'b'])", "I(f in ['a', 'b'])"),
        ("(x // 2)", "I(x // 2)"),
        ("x % 2", "I(x % 2)"),
        ("(f if x else z)", "I(f if x else z)"),
        ("(log(x) > 3)", "I(log(x) > 3)"),
        ("(x > 4 | g)", "I(x > 4)"),
        ("(0 + (x > 4) | g)", "I(x > 4)"),
        ("(1 | x > 2)", "I(x > 2)"),
    ],
)
def test_comparisons_and_logic_as_terms_belong_in_I(term, advice):
    for formula in (f"y ~ {term} + (1 | g)", f"y ~ z + {term} + (1 | g)"):
        with pytest.raises(FormulaError) as caught:
            parse(formula)
        message, line, caret = str(caught.value).split("\n")
        assert f"write {advice}." in message
        assert line[caret.index("^")] == message[1]
    parse(f"y ~ {advice} + ({advice} | {advice})")


@pytest.mark.parametrize("formula", ["", "  ", None, 3])
def test_no_formula(formula):
    with pytest.raises(FormulaError, match="formula"):
        parse(formula)


def test_caret_survives_line_breaks():
    with pytest.raises(FormulaError) as caught:
        parse("y ~ x +\n\t. + (1 | g)")
    _, line, caret = str(caught.value).split("\n")
    assert line[caret.index("^")] == "."


def test_too_many_terms_and_brackets():
    many = "*".join(f"v{i}" for i in range(20))
    with pytest.raises(FormulaError, match="more than"):
        parse(f"y ~ {many} + (1 | g)")
    with pytest.raises(FormulaError, match="nested brackets"):
        parse("y ~ " + "(" * 60 + "x" + ")" * 60)


PIECES = st.lists(
    st.sampled_from(
        "y x g f ~ ~ + - * / : ^ ** | || ( ) ( ) [ ] { } 0 1 2 1e5 . , = 'a' `b` %in% "
        "log( offset( I( diag( poly(x,2) < > \n # \\ é 9x x. .x lambda if".split(" ")
    ),
    max_size=14,
).map(" ".join)


@given(
    text=st.one_of(st.text(max_size=40), PIECES, PIECES.map("y ~ (1 | g) + ".__add__))
)
@settings(max_examples=600, deadline=None)
def test_arbitrary_text_parses_or_raises_formula_error(text):
    try:
        parsed = parse(text)
    except FormulaError:
        return
    assert parsed.random
    expand(parsed.fixed)
    for term in parsed.random:
        expand(term.effects)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("x + x", {"x"}),
        ("log(`my x`)", {"log", "my x"}),
        ("bs(x, df=4) + np.log(z)", {"bs", "x", "np.log", "z"}),
        ("a.b == 'c d'", {"a.b"}),
        ("x.clip(lower=0)", {"x.clip"}),
        ("f(x)[0].real if z else None", {"f", "x", "z"}),
        ("log(.x) + `.y`.dt.year", {"log", ".x", ".y.dt.year"}),
        ("log(lambda + 1)", {"log", "lambda"}),
        ("x. + is.na + \u00b5", {"x.", "is.na", "\u00b5"}),
    ],
)
def test_references(expression, names):
    assert {".".join(parts) for parts, _ in references(tree(expression))} == names


@pytest.mark.parametrize(
    ("expression", "column"),
    [("x", "x"), (".x", ".x"), ("`a  b`", "a  b"), ("x + 1", None), ("f(x)", None)],
)
def test_column_of(expression, column):
    assert column_of(expression) == column


@pytest.mark.parametrize("name", ["a  b", "a\nb", "a\t b", " a", "'a  b'"])
def test_blanks_inside_quotes_are_kept(name):
    text = f"`{name}`" if "'" not in name else f"I(f == {name})"
    parsed = parse(f"y ~  x +   {text} + ({text}  |  g:{text})")
    assert parsed.fixed == f"x + {text}"
    assert parsed.random[0].effects == text
    assert parsed.random[0].factors == ("g", text)
    assert expand(parsed.fixed).variables == ("x", text)


def test_spelling_is_that_of_the_tokens():
    assert canonical("log( .x+`a  b` )^2") == "log(.x + `a  b`) ** 2"
    assert canonical("`plain`") == "plain"
    assert canonical("_alias0_ + `a b`") == "_alias0_ + `a b`"
