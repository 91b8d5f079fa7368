"""Rows of new data that the data of the fit do not determine.

The independent check is the definition: x is estimable if it lies in the row space of
the full X, whose rank does not rise when x is put below it.
"""

import warnings

import numpy as np
import pandas as pd
import pytest

import jaxglmm as jg
from jaxglmm.encoding import model_frame

rng = np.random.default_rng(5)
FULL = pd.DataFrame(
    [(a, b, 0.5) for a in "pqr" for b in "stu"], columns=["a", "b", "x"]
)
WAYS = ["a * b", "a:b", "0 + a:b", "a + a:b", "b + a:b", "a / b"]


def table(empty, n_each=6):
    d = FULL[[(a, b) not in empty for a, b in zip(FULL.a, FULL.b)]]
    d = pd.concat([d] * n_each, ignore_index=True)
    d["x"] = rng.normal(size=len(d))
    d["g"] = rng.integers(0, 5, len(d))
    d["y"] = rng.normal(size=len(d)) + 1.0 * (d.a == "q")
    d["n"] = rng.poisson(2.0, len(d))
    return d


def dropping(formula, d, **more):
    with pytest.warns(jg.NoticeWarning, match="dropped"):
        return jg.glmm(formula, d, **more)


@pytest.mark.parametrize("empty", [[("r", "u")], [("p", "s"), ("r", "t")]])
def test_a_cell_without_data_is_predicted_alike_however_it_is_written(empty):
    d = table(empty)
    means = d.groupby(["a", "b"])["y"].mean()
    without = np.array([(a, b) in empty for a, b in zip(FULL.a, FULL.b)])
    for way in WAYS:
        m = dropping(f"y ~ {way} + (1 | g)", d)
        with pytest.warns(jg.NoticeWarning, match=f"{len(empty)} of 9 rows of newd"):
            out = m.predict(FULL, re="population", se=True)
        np.testing.assert_array_equal(np.isnan(out["fit"]), without)
        np.testing.assert_array_equal(np.isnan(out["se"]), without)
        # the group variance moves the means a little
        known = [means[a, b] for a, b in zip(FULL.a[~without], FULL.b[~without])]
        assert np.corrcoef(out["fit"][~without], known)[0, 1] > 0.9
        if way == WAYS[0]:
            first = out
        np.testing.assert_allclose(out, first, atol=1e-6)
        old = m.predict(FULL, re="population", not_estimable="zero")
        assert np.isfinite(old).all()
        rows = m.frame.encoder.transform(FULL, random=False).X
        np.testing.assert_allclose(old, rows @ m.fixef.to_numpy())


def test_rows_are_estimable_that_do_not_raise_the_rank():
    """Collinear covariates in units far apart, with and without the relation."""
    n = 60
    d = pd.DataFrame({"u": rng.normal(size=n), "v": 1e6 * rng.normal(size=n)})
    d["w"] = 2e-9 * (3 * d.u + 1e-6 * d.v)
    d["g"], d["y"] = np.arange(n) % 6, rng.normal(size=n)
    m = dropping("y ~ u + v + w + (1 | g)", d)
    new = d.iloc[:4].copy()
    new.loc[new.index[2], "w"] *= 1.01
    new.loc[new.index[3], "u"] = np.nan
    units = np.array([1.0, 1.0, 1e6, 1e-9])

    def rank(rows):
        full = np.column_stack([np.ones(len(rows)), rows[["u", "v", "w"]]]) / units
        return np.linalg.matrix_rank(full, tol=1e-6)

    raised = [rank(pd.concat([d, new.iloc[[i]]])) > rank(d) for i in range(3)]
    assert raised == [False, False, True]
    with pytest.warns(jg.NoticeWarning, match="1 of 4 rows of newdata"):
        out = m.predict(new, re="population")
    np.testing.assert_array_equal(np.isnan(out), [*raised, True])
    # and the rows of the fit are, all of them
    np.testing.assert_allclose(m.predict(d), m.fitted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("part", ["zi", "dispersion"])
def test_further_predictors_have_rows_that_are_not_estimable(part):
    d = table([("r", "u")], 20)
    d["n"] = d["n"] * rng.integers(0, 2, len(d))
    family = "poisson" if part == "zi" else "truncated_nbinom2"
    if part == "dispersion":
        d = d[d.n > 0].assign(n=lambda t: t.n + rng.poisson(3.0, len(t)))
    m = dropping("n ~ x + (1 | g)", d, family=family, **{part: "~ a * b"})
    without = np.array([(a, b) == ("r", "u") for a, b in zip(FULL.a, FULL.b)])
    with pytest.warns(jg.NoticeWarning, match="1 of 9 rows of newdata"):
        out = m.predict(FULL, re="population")
    np.testing.assert_array_equal(np.isnan(out), without)
    assert np.isfinite(m.predict(FULL, re="population", type="link")).all()
    assert np.isfinite(m.predict(FULL, re="population", not_estimable="zero")).all()


def test_nothing_is_kept_where_no_column_was_dropped():
    d = table([])
    m = jg.glmm("y ~ a * b + (1 | g)", d)
    assert m.frame.encoder.estimable is None
    with pytest.raises(ValueError, match="not_estimable"):
        m.predict(FULL, not_estimable="none")


# the same by other means: ranks of dummies, and least squares of the cells

GRID = pd.DataFrame([(a, b) for a in "pqr" for b in "stuv"], columns=["a", "b"])


def quietly(call, *args, **options):
    """Call where columns may be dropped, which is not what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jg.NoticeWarning)
        return call(*args, **options)


def cells(missing, seed, rows=6):
    """A table of the grid without some cells."""
    kept, own = GRID.drop(index=list(missing)), np.random.default_rng(seed)
    d = kept.loc[kept.index.repeat(rows)].reset_index(drop=True)
    n, x = len(d), own.normal(size=len(d))
    g = own.integers(0, 8, n)
    y = own.normal(size=8)[g] + own.normal(size=n)
    return d.assign(g=g, x=x, x2=2.0 * x + 1.0, x3=own.normal(size=n), y=y)


def dummies(formula, data):
    """All dummies that the terms are made of, and covariates."""
    a = [data["a"].to_numpy() == level for level in "pqr"]
    b = [data["b"].to_numpy() == level for level in "stuv"]
    columns = [np.ones(len(data))]
    columns += a if "a" in formula else []
    columns += b if "b" in formula else []
    columns += [u & v for u in a for v in b] if ":" in formula else []
    columns += [data[x].to_numpy() for x in ("x", "x2", "x3") if x in formula.split()]
    return np.column_stack(columns).astype(float)


@pytest.mark.parametrize("seed", range(6))
def test_estimable_rows_lie_in_the_row_space_of_the_dummies(seed):
    own = np.random.default_rng(seed)
    d = cells(own.choice(12, own.integers(0, 5), replace=False), seed)
    new = GRID.assign(x=2.0, x2=own.choice([5.0, 6.0], 12), x3=-1.0, g=1)
    for base in ("a:b", "a + b", "a:b + x + x2", "x + x2 + b", "x3 + a:b"):
        ways = WAYS if ":" in base else ["a:b"]
        train, rows = dummies(base, d), dummies(base, new)
        rank = np.linalg.matrix_rank(train)
        joined = [np.linalg.matrix_rank(np.vstack([train, row])) for row in rows]
        for way in ways:
            formula = f"y ~ {base.replace('a:b', way)} + (1 | g)"
            found = quietly(model_frame, formula, d).encoder.transform(new).estimable
            found = np.ones(12, bool) if found is None else found
            assert found.tolist() == [r == rank for r in joined], formula


def test_cells_with_data_have_the_generalized_least_squares_estimates():
    d = cells([5, 11], seed=1)
    X = np.stack([(d.a == a) & (d.b == b) for a, b in GRID.to_numpy()], 1).astype(float)
    X = np.delete(X, [5, 11], axis=1)
    same = np.equal.outer(d["g"].to_numpy(), d["g"].to_numpy())
    for way in WAYS:
        m = quietly(jg.glmm, f"y ~ {way} + (1 | g)", d)
        V = m.sigma**2 * (np.eye(len(d)) + m.theta.iloc[0] ** 2 * same)
        cov = np.linalg.inv(X.T @ np.linalg.solve(V, X))
        beta = cov @ X.T @ np.linalg.solve(V, d["y"])
        out = quietly(m.predict, GRID, re="population", se=True)
        known = out.drop(index=[5, 11])
        np.testing.assert_allclose(known["fit"], beta, rtol=1e-6)
        np.testing.assert_allclose(known["se"], np.sqrt(np.diagonal(cov)), rtol=1e-6)
        assert np.isnan(out.loc[[5, 11]]).all(axis=None)
        new = GRID.assign(g=[99, 3] * 6)
        out = quietly(m.predict, new, se=True)
        assert np.isnan(out).all(axis=1).tolist() == [i in (5, 11) for i in range(12)]


@pytest.mark.slow
def test_levels_of_cells_without_data_have_no_probability():
    d = cells([5], seed=5, rows=20)
    codes = np.random.default_rng(5).integers(0, 3, len(d))
    d["o"] = pd.Categorical(np.array(["low", "mid", "high"])[codes],
                            ["low", "mid", "high"], ordered=True)  # fmt: skip
    m = dropping("o ~ a:b + (1 | g)", d, family="cumulative")
    with pytest.warns(jg.NoticeWarning, match="1 of 12 rows of newdata"):
        out = m.predict(GRID, re="population", se=True)
    assert np.isnan(out).all(axis=1).tolist() == [i == 5 for i in range(12)]
    assert np.isfinite(out.drop(index=5)).all(axis=None)
    best = quietly(m.predict, GRID, re="population", type="class")
    assert best.isna().tolist() == [i == 5 for i in range(12)]
