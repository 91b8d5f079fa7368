"""Blocked elimination against dense NumPy, on every engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxglmm as jg
from jaxglmm import plan
from jaxglmm.coordinates import block_factors, first_order, repivot
from jaxglmm.crossed import applies, crossed_value_grad_hess
from jaxglmm.crossproducts import block_diagonal, cross_products
from jaxglmm.elimination import (
    conditional_covariances,
    conditional_modes,
    eliminate,
    solve_effects,
    split_terms,
)
from jaxglmm.lmm import profile, profiled_objective
from jaxglmm.optimize import value_grad_hess
from jaxglmm.starts import relative_covariances

N = 240


def columns(rng, k):
    """An intercept and k - 1 covariates of very different scale."""
    scales = 10.0 ** rng.uniform(-2, 2, k - 1)
    return np.column_stack([np.ones(N), rng.normal(size=(N, k - 1)) * scales])


def groups(rng):
    a = rng.integers(0, 5, N)
    b = a * 4 + rng.integers(0, 4, N)
    c = b * 3 + rng.integers(0, 3, N)
    return {
        "a": a,
        "b": b,
        "c": c,
        "x": rng.integers(0, 7, N),
        "v": rng.integers(0, 6, N),
    }


MODELS = {
    "one factor, slope": [(2, "a")],
    "two terms, one factor": [(1, "a"), (2, "a")],
    "nested twice": [(2, "c"), (1, "b"), (2, "a")],
    "crossed slopes": [(1, "b"), (2, "x")],
    "nested and crossed": [(2, "c"), (1, "b"), (1, "a"), (2, "x"), (1, "v")],
    "five effects": [(5, "b")],
}


def make(rng, spec):
    codes = groups(rng)
    terms = tuple(
        jg.Term(jnp.asarray(columns(rng, k)), jnp.asarray(codes[g])) for k, g in spec
    )
    return jg.Design(
        y=jnp.asarray(rng.normal(size=N)),
        X=jnp.asarray(columns(rng, 3)),
        terms=terms,
        weights=jnp.asarray(rng.uniform(0.5, 2.0, N)),
        offset=jnp.asarray(rng.normal(size=N)),
    )


def dense(design, theta, beta, sigma):
    """Log-likelihoods, GLS beta, modes and their covariance from n x n matrices."""
    V = np.diag(1.0 / np.asarray(design.weights))
    Zs, Qs, start = [], [], 0
    for t in design.terms:
        cols, rows = np.triu_indices(t.k)
        Lam = np.zeros((t.k, t.k))
        Lam[rows, cols] = theta[start : start + len(rows)]
        start += len(rows)
        Z = np.zeros((N, t.n_levels * t.k))
        for j in range(t.k):
            Z[np.arange(N), np.asarray(t.group) * t.k + j] = t.z[:, j]
        Q = np.kron(np.eye(t.n_levels), Lam @ Lam.T)
        V = V + Z @ Q @ Z.T
        Zs.append(Z)
        Qs.append(Q)
    Z = np.hstack(Zs)
    Q = np.zeros((Z.shape[1],) * 2)
    at = 0
    for block in Qs:
        Q[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    X, y = np.asarray(design.X), np.asarray(design.y - design.offset)
    Vi = np.linalg.inv(V)
    XVX = X.T @ Vi @ X
    gls = np.linalg.solve(XVX, X.T @ Vi @ y)
    log_w = np.linalg.slogdet(V)[1]
    r, r_hat, p = y - X @ beta, y - X @ gls, X.shape[1]
    ml = -0.5 * (N * np.log(2 * np.pi * sigma**2) + log_w + r @ Vi @ r / sigma**2)
    reml = -0.5 * (
        (N - p) * np.log(2 * np.pi * sigma**2)
        + log_w
        + np.linalg.slogdet(XVX)[1]
        + r_hat @ Vi @ r_hat / sigma**2
    )
    return ml, reml, gls, Q @ Z.T @ Vi @ r_hat, Q - Q @ Z.T @ Vi @ Z @ Q


def force_pairs(monkeypatch):
    """The pair lists that only large designs use."""
    monkeypatch.setattr(plan, "_DENSE_WORK", 0.0)
    monkeypatch.setattr(plan, "_PAIR_COST", 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_pairs_are_for_crossed_factors_alone(rng, monkeypatch, name):
    dense_design = make(rng, MODELS[name])
    assert dense_design.plan.pairs is None
    force_pairs(monkeypatch)
    sparse_design = make(rng, MODELS[name])
    assert (sparse_design.plan.pairs is not None) == ("crossed" in name)
    same = jax.tree.structure(dense_design) == jax.tree.structure(sparse_design)
    assert same == ("crossed" not in name)


# where no factors are crossed, pairs would make no difference
CASES = [(name, False) for name in MODELS]
CASES += [(name, True) for name in MODELS if "crossed" in name]


@jax.jit
def everything(params, design):
    layout = design.layout
    cp, units = cross_products(design)
    factors = block_factors(units.maps.theta @ params.theta, layout)
    at, done = profile(factors, cp, layout, jnp.asarray(1.0))
    modes, _ = conditional_modes(factors, done, at.beta, cp, layout)
    b = split_terms(modes, layout)
    return units, at, b, conditional_covariances(factors, done, cp, layout)


@pytest.mark.parametrize(("name", "sparse"), CASES)
def test_against_dense_matrices(rng, monkeypatch, name, sparse):
    if sparse:
        force_pairs(monkeypatch)
    design = make(rng, MODELS[name])
    assert (design.plan.pairs is not None) == sparse
    theta, beta, sigma = rng.normal(size=design.n_theta), rng.normal(size=3), 0.7
    ml, reml, gls, modes, cov = dense(design, theta, beta, sigma)
    params = jg.Params(jnp.asarray(beta), jnp.asarray(theta), jnp.asarray(sigma))
    logliks = [jg.loglik(params, design, method=m) for m in ("ML", "REML")]
    np.testing.assert_allclose(logliks, [ml, reml], rtol=1e-9)
    units, at, b, covariances = everything(params, design)
    np.testing.assert_allclose(units.T @ (units.b + units.s * at.beta), gls, rtol=1e-8)
    ours = np.concatenate(
        [np.ravel(units.s * v @ T.T) for v, T in zip(b, units.maps.z)]
    )
    np.testing.assert_allclose(ours, modes, atol=1e-8 * np.abs(modes).max())
    check_covariances(design, covariances, units, cov)


@jax.jit
def solved(theta, design, right):
    layout = design.layout
    cp, units = cross_products(design)
    factors = block_factors(units.maps.theta @ theta, layout)
    done = eliminate(factors, cp, layout)
    return units, factors, solve_effects(factors, done, right, cp.parents, layout)


# explicit inverses of the leaf's blocks lose theta^4 eps where a dense factor loses
# theta^2 eps: seven digits are left at standard deviations of 30 sigma
@pytest.mark.parametrize(("size", "digits"), [(1.0, 11), (30.0, 7)])
@pytest.mark.parametrize(
    ("name", "sparse"), [("nested and crossed", False), ("nested and crossed", True)]
)
def test_solutions_are_those_of_dense_matrices(
    rng, monkeypatch, name, sparse, size, digits
):
    if sparse:
        force_pairs(monkeypatch)
    design = make(rng, MODELS[name])
    layout, theta = design.layout, size * rng.uniform(0.5, 1.5, design.n_theta)
    right = tuple(
        jnp.asarray(rng.normal(size=(b.n_levels, b.k))) for b in layout.blocks
    )
    units, factors, (b, u) = solved(jnp.asarray(theta), design, right)
    ZL = []
    for block, Lam in zip(layout.blocks, factors):
        terms = [(design.terms[t], units.maps.z[t]) for t in block.terms]
        columns = np.hstack([np.asarray(term.z @ T) for term, T in terms]) @ Lam
        Z = np.zeros((N, block.n_levels, block.k))
        Z[np.arange(N), np.asarray(terms[0][0].group)] = columns
        ZL.append(Z.reshape(N, -1))
    ZL = np.hstack(ZL)
    root = np.sqrt(np.asarray(design.weights / units.w_scale))
    # singular values, as squaring the matrix would lose half of the digits
    _, values, V = np.linalg.svd(root[:, None] * ZL)
    values = 1.0 + np.pad(values, (0, len(V) - len(values))) ** 2
    flat = np.concatenate([np.ravel(r) for r in right])
    expected = V.T @ ((V @ flat) / values)
    found = np.concatenate([np.ravel(v) for v in u])
    limit = 10.0**-digits * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=limit)
    for v, back, Lam in zip(u, b, factors):
        np.testing.assert_allclose(back, v @ Lam.T, rtol=1e-10, atol=1e-12 * size)


def check_covariances(design, ours, units, cov):
    sizes = [t.k * t.n_levels for t in design.terms]
    first = np.concatenate([[0], np.cumsum(sizes)])
    for block, values in zip(design.layout.blocks, ours):
        T = block_diagonal([np.asarray(units.maps.z[t]) for t in block.terms], np)
        for j in range(block.n_levels):
            at = np.concatenate(
                [
                    first[t] + j * design.terms[t].k + np.arange(design.terms[t].k)
                    for t in block.terms
                ]
            )
            expected = cov[np.ix_(at, at)]
            found = T @ np.asarray(values[j]) @ T.T / float(units.w_scale)
            np.testing.assert_allclose(
                found, expected, atol=1e-7 * np.abs(expected).max()
            )


@jax.jit
def both_hessians(theta, reml, design):
    """Value, gradient and Hessian in closed form, and by differentiating."""
    layout = design.layout
    cp, _ = cross_products(design)
    assert applies(cp, layout)

    def objective(theta, order):
        return profiled_objective(theta, cp, layout, reml, order)

    at = repivot(theta, first_order(layout, theta.dtype), layout)[:2]
    closed = crossed_value_grad_hess(cp, layout, reml)(*at)
    return closed[:3], value_grad_hess(objective)(*at)[:3]


@pytest.mark.parametrize("leaf", [1, 2])
def test_closed_form_hessian_of_crossed_designs(rng, monkeypatch, leaf):
    force_pairs(monkeypatch)
    design = make(rng, [(leaf, "c"), (1, "x"), (1, "v")])
    theta = jnp.asarray(rng.uniform(0.3, 1.5, design.n_theta))
    for reml in (0.0, 1.0):
        for a, b in zip(*both_hessians(theta, jnp.asarray(reml), design)):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_nesting_is_seen_in_the_codes(rng):
    design = make(rng, MODELS["nested and crossed"])
    layout = design.layout
    assert layout.n_chain == 3
    assert [b.n_levels for b in layout.chain] == [60, 20, 5]
    assert sorted(b.n_levels for b in layout.tail) == [6, 7]


def test_row_order_and_level_labels_do_not_matter(rng):
    design = jax.tree.map(np.asarray, make(rng, MODELS["crossed slopes"]))
    order = rng.permutation(N)
    terms = []
    for t in design.terms:
        relabel = rng.permutation(t.n_levels)
        terms.append(jg.Term(t.z[order], relabel[t.group][order]))
    other = jg.Design(
        design.y[order],
        design.X[order],
        tuple(terms),
        design.weights[order],
        design.offset[order],
    )
    theta = jnp.asarray(rng.normal(size=design.n_theta))
    params = jg.Params(jnp.ones(3), theta, jnp.asarray(0.5))
    np.testing.assert_allclose(
        jg.loglik(params, design), jg.loglik(params, other), rtol=1e-11
    )


def test_rows_of_weight_zero_do_not_count(rng):
    design = make(rng, MODELS["nested twice"])
    keep = np.arange(N) < 180
    masked = design.replace(
        weights=jnp.where(keep, design.weights, 0.0), y=jnp.where(keep, design.y, 1e3)
    )
    terms = tuple(jg.Term(t.z[keep], t.group[keep], t.n_levels) for t in design.terms)
    short = jg.Design(
        design.y[keep], design.X[keep], terms, design.weights[keep], design.offset[keep]
    )
    theta = jnp.asarray(rng.normal(size=design.n_theta))
    params = jg.Params(jnp.ones(3), theta, jnp.asarray(0.5))
    for method in ("ML", "REML"):
        a, b = (jg.loglik(params, d, method=method) for d in (masked, short))
        np.testing.assert_allclose(a, b, rtol=1e-11)


# ---- starting values ---------------------------------------------------------------


def dense_covariances(design, maps):
    """Relative Q of every term from the n x n matrices of the moment equations."""
    w = np.asarray(design.weights)
    W = np.diag(w / w.mean())
    X, y = np.asarray(design.X), np.asarray(design.y - design.offset)
    P = W - W @ X @ np.linalg.solve(X.T @ W @ X, X.T @ W)
    V, where = [], []
    for t, (term, T) in enumerate(zip(design.terms, maps.z)):
        z = np.asarray(term.z) @ np.asarray(T)
        same = np.equal.outer(np.asarray(term.group), np.asarray(term.group))
        for a in range(term.k):
            for b in range(a + 1):
                outer = np.outer(z[:, a], z[:, b]) * same
                V.append(outer if a == b else outer + outer.T)
                where.append((t, a, b))
    A = np.array([[np.trace(P @ v @ P @ u) for v in V] for u in V])
    t = np.array([np.trace(P @ v) for v in V])
    s = np.array([y @ P @ v @ P @ y for v in V])
    dof = np.trace(P @ np.linalg.inv(W))
    A = np.block([[A, t[:, None]], [t[None], np.array([[dof]])]])
    *psi, phi = np.linalg.solve(A, np.append(s, y @ P @ y))
    assert phi > 1e-4 * (y @ P @ y) / dof
    Q = [np.zeros((term.k, term.k)) for term in design.terms]
    for value, (t, a, b) in zip(psi, where):
        Q[t][a, b] = Q[t][b, a] = value / phi
    return Q


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
# two intercepts of one factor cannot be told from each other
@pytest.mark.parametrize(
    ("name", "sparse"), [c for c in CASES if c[0] != "two terms, one factor"]
)
def test_moments_are_those_of_dense_matrices(rng, monkeypatch, name, sparse, xp):
    if sparse:
        force_pairs(monkeypatch)
    design = make(rng, MODELS[name])
    cp, units = jax.tree.map(np.asarray, compiled_products(design))
    found, _ = relative_covariances(cp, design.layout, xp)
    expected = dense_covariances(design, units.maps)
    for Q, dense in zip(found, expected):
        np.testing.assert_allclose(Q, dense, rtol=1e-5, atol=1e-6)


compiled_products = jax.jit(cross_products)
