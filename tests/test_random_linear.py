"""Random linear models of any ratio of random effects to residuals, 0 to 1e6.

The criterion is computed apart, from a QR factorization of [Z Lambda; I] of all rows,
which loses theta digits and not theta squared.
"""

import warnings

import numpy as np
import pytest
from scipy.optimize import minimize

import jaxglmm as jg
from jaxglmm.errors import ConvergenceWarning, NoticeWarning, Status

FORMULAS = (
    "y ~ x + (1 | a)",
    "y ~ x + (x | a)",
    "y ~ x + (x || a)",
    "y ~ x + (1 | a/b)",
    "y ~ x + (1 | a) + (1 | c)",
    "y ~ 0 + x + (1 | a) + (1 | c)",
    "y ~ x + (x | a) + (1 | c)",
)


def random_model(seed):
    """A formula, its data and arguments; everything follows from the seed."""
    rng = np.random.default_rng(seed)
    n, J = int(rng.choice([40, 90, 300])), int(rng.choice([6, 12, 30]))
    share = rng.dirichlet(np.full(J, rng.choice([0.7, 20.0])))
    a, c = rng.choice(J, n, p=share), rng.integers(0, rng.choice([4, 9]), n)
    a[:2] = 0, 1
    b = 2 * a + rng.integers(0, 2, n)
    x = rng.normal(size=J)[a] if rng.uniform() < 0.2 else rng.normal(size=n)
    x = x + rng.choice([0.0, 0.0, 30.0])
    ratio = np.where(rng.uniform(size=4) < 0.2, 0.0, 10.0 ** rng.uniform(-1, 6, 4))
    y = 2.0 + x + rng.normal(size=n) + ratio[0] * rng.normal(size=J)[a]
    formula = str(rng.choice(FORMULAS))
    if "(x |" in formula:
        y = y + ratio[1] * rng.normal(size=J)[a] * x
    if "a/b" in formula:
        y = y + ratio[2] * rng.normal(size=2 * J)[b]
    if "c)" in formula:
        y = y + ratio[3] * rng.normal(size=9)[c]
    unit = 10.0 ** rng.uniform(-4, 4, 2)
    data = {"y": y * unit[0], "x": x * unit[1], "a": a, "b": b, "c": c}
    arguments = {"method": str(rng.choice(["ML", "REML"]))}
    if rng.uniform() < 0.3:
        arguments["weights"] = 10.0 ** rng.uniform(-0.5, 0.5, n)
    return formula, data, arguments


def criterion_of(design, reml):
    """-2 log L, or the REML criterion, of theta; beta and sigma profiled out."""
    w = np.ones(design.n_obs) if design.weights is None else design.weights
    root = np.sqrt(w)[:, None]
    y = design.y if design.offset is None else design.y - design.offset
    X, y = design.X * root, y * root[:, 0]
    n, p = X.shape
    scale = np.linalg.norm(X, axis=0) if p else np.ones(0)
    X = X / scale
    y = y - X @ np.linalg.lstsq(X, y, rcond=None)[0] if p else y
    Z = [
        (np.eye(t.n_levels)[t.group][:, :, None] * t.z[:, None, :]) * root[:, :, None]
        for t in design.terms
    ]

    def criterion(theta):
        parts, start = [], 0
        for term, z in zip(design.terms, Z):
            cols, rows = np.triu_indices(term.k)
            if term.structure == "diag":
                rows = cols = np.arange(term.k)
            Lam = np.zeros((term.k, term.k))
            Lam[rows, cols] = theta[start : start + len(rows)]
            start += len(rows)
            parts.append((z @ Lam).reshape(n, -1))
        U = np.concatenate(parts, axis=1)
        q = U.shape[1]
        O, T = np.linalg.qr(np.concatenate([U, np.eye(q)]), mode="complete")
        white = O[:n, q:].T
        A, r = white @ X, white @ y
        Q, R = np.linalg.qr(A)
        rss = np.sum((r - Q @ (Q.T @ r)) ** 2)
        dof = n - p if reml else n
        value = 2 * np.sum(np.log(np.abs(np.diagonal(T)))) - np.sum(np.log(w))
        value += dof * (1 + np.log(2 * np.pi * rss / dof))
        if reml:
            value += 2 * np.sum(np.log(np.abs(np.diagonal(R)) * scale))
        return value

    return criterion


def fitted(formula, data, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", NoticeWarning)
        return jg.glmm(formula, data, **arguments)


def has_regular_optimum(criterion, m):
    """Whether a quasi-Newton method finds one inside, in signed logarithms of theta."""
    theta = np.where(np.abs(m.theta) > 1e-3, m.theta, 1e-3)
    for shift in (0.0, 0.7, -0.7):

        def at(v):
            return criterion(np.sign(theta) * np.exp(np.clip(v, -20.0, 20.0)))

        x0 = np.log(np.abs(theta)) + shift
        found = minimize(at, x0, method="BFGS", options={"gtol": 1e-4})
        inside = np.all(np.abs(found.x) < 16.0) and np.all(found.x > -4.0)
        if inside and np.max(np.abs(found.jac)) < 1e-2:
            H = np.linalg.inv(found.hess_inv)
            if np.min(np.linalg.eigvalsh(H)) > 1e-3:
                return True
    return False


def check_model(seed):
    """What is wrong with the fit of a random model, as a set of words."""
    formula, data, arguments = random_model(seed)
    try:
        m = fitted(formula, data, **arguments)
    except (jg.DataError, jg.FormulaError):
        return {"refused"}
    criterion = criterion_of(m.design, arguments["method"] == "REML")
    if not m.converged:
        lost = m.status != Status.NOT_IDENTIFIED or "x" not in formula
        return {"lost"} if lost and has_regular_optimum(criterion, m) else {"no"}
    words = set()
    at = criterion(m.theta.to_numpy())
    if not abs(at - m.fit.objective) < 1e-6 * max(1.0, np.max(np.abs(m.theta)) * 1e-6):
        words.add("wrong value")
    assert "start" in m.verdict
    rng = np.random.default_rng(seed)
    size = np.maximum(np.abs(m.theta.to_numpy()), 0.1)
    others = [
        fitted(
            formula,
            data,
            start=size * 10.0 ** rng.uniform(-2, 1, len(size)),
            **arguments,
        )
        for _ in range(10)
    ]
    lowest = min(float(f.fit.objective) for f in others)
    if lowest < float(m.fit.objective) - 1e-5:
        words.add("a better start")
    return words


@pytest.mark.parametrize(
    ("first", "count"), [(0, 40), pytest.param(0, 2000, marks=pytest.mark.slow)]
)
def test_random_linear_models(first, count):
    found = {}
    for seed in range(first, first + count):
        for word in check_model(seed):
            found.setdefault(word, []).append(seed)
    assert "wrong value" not in found, found
    assert len(found.get("lost", [])) <= count // 500, found
    assert len(found.get("a better start", [])) <= count // 200, found
