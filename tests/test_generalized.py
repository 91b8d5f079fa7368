"""Generalized models: fits of lme4, glmmTMB and ordinal, derivatives, both doors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from test_reference import HERE, read, spread

import jaxglmm as jg
from jaxglmm.errors import Status
from jaxglmm.families import family_by_name
from jaxglmm.fitting import check_method

# one case of every kind in the default run, since each compiles a program of its own
DEFAULT = {
    "cbpp_AGQ9", "cbpp_Laplace", "cbpp_probit_Laplace", "salamanders_zire",
    "sim_gamma_tmb", "verbagg_Laplace", "wine_clmm_Laplace",
}  # fmt: skip
CASES = [
    pytest.param(p.stem, marks=[] if p.stem in DEFAULT else [pytest.mark.slow])
    for p in sorted((HERE / "generalized").glob("*.json"))
]
# clmm's standard errors come from a coarse difference quotient, 0.6 % off; these are
# from R's numDeriv on the same Laplace likelihood with modes solved to rounding
SE = {"wine_clmm_Laplace": {"tempwarm": 0.5953892, "contactyes": 0.5125582}}


def arguments(case):
    """How to ask for the model of a case."""
    out = {"family": case["family"].lower(), "link": case["link"]}
    for name, key in (("zi", "ziformula"), ("dispersion", "dispformula")):
        formula = case.get(key)
        if formula not in (None, "~0", "~1") or (name == "zi" and formula == "~1"):
            out[name] = formula
    words = case["method"].split()
    if words[0] == "AGQ":
        out |= {"method": "AGQ", "n_quad": int(words[1])}
    plain = out == {"family": "gaussian", "link": "identity"}
    out |= {"method": "ML"} if plain else {}
    expected = case["engine"] == "lme4" and case["link"] in ("probit", "cloglog")
    if expected and words[0] == "Laplace":
        out["control"] = jg.Control(information="expected")
    return out


@pytest.fixture(scope="module", params=CASES)
def fitted(request):
    case, data, options = read(request.param, "generalized")
    return case, jg.glmm(case["formula"], data, **options, **arguments(case))


def in_our_order(case, model):
    """The reference's random terms: glmmTMB keeps them as written, we sort as lme4."""
    ours = [t.group_name for t in model.frame.all_terms]

    def place(term):
        group = term["group"]
        at = ours.index(group) if group in ours else len(ours)
        return term.get("component") == "zi", at

    return sorted(case["varcorr"], key=place)


def reference_params(case, model):
    """The reference's parameters as ours."""
    sigma = case["sigma"] if model.method == "ML" else 1.0
    if "theta" in case:
        theta = np.array(case["theta"], float)
    else:
        parts = []
        for term in in_our_order(case, model):
            factor = np.linalg.cholesky(np.array(term["cov"], float)) / sigma
            if term.get("structure") == "diag":
                parts.append(np.diagonal(factor))
            else:
                parts += [factor[j:, j] for j in range(len(factor))]
        theta = np.concatenate(parts)
    others = []
    for part in model.frame.others:
        values = list(case["fixef_zi" if part.name == "zi" else "fixef_disp"].values())
        half = part.name == "dispersion" and case["family"] == "gaussian"
        others.append(np.array(values) / (2.0 if half else 1.0))  # log sigma^2 there
    psi = None
    if model.is_generalized:
        psi = np.zeros(len(model.dispersion))
        if case["family"] == "cumulative":
            tau = np.array(list(case["thresholds"].values()))
            psi = np.append(tau[0], np.log(np.diff(tau)))
        elif len(psi):
            power = 2.0 if case["family"] == "Gamma" else 1.0  # theirs is the CV
            psi = power * np.log([case["dispersion"]["value"]])
    beta = np.array(list(case["fixef"].values()))
    return jg.Params(beta, theta, np.float64(sigma), psi, tuple(others))


AT_REFERENCE = {"cbpp_AGQ9", "salamanders_zire", "wine_clmm_Laplace"}


def test_loglik_at_the_reference_parameters(fitted, request):
    case, model = fitted
    everything = "not slow" not in request.config.getoption("markexpr")
    if not everything and case["id"] not in AT_REFERENCE:
        pytest.skip("one program more: with the slow tests only")
    options = {k: v for k, v in arguments(case).items() if k in ("n_quad", "control")}
    ours = jg.loglik(
        reference_params(case, model), jax.tree.map(jnp.asarray, model.design),
        model.family, model.method, **options,
    )  # fmt: skip
    rtol = max(1e-7, case["trust"].get("loglik", 0.0))
    np.testing.assert_allclose(ours, case["loglik"], rtol=rtol)


def test_agrees_with_the_reference(fitted):
    case, model = fitted
    assert model.converged
    assert model.loglik >= case["loglik"] - 1e-5
    np.testing.assert_allclose(model.loglik, case["loglik"], rtol=1e-7, atol=1e-5)
    names = [n.replace(" ** ", "^") for n in model.fixef.index]  # I(age ** 2)
    assert sorted(names) == sorted(case["fixef"])
    beta = np.array([case["fixef"][n] for n in names])
    se = SE.get(case["id"], case["fixef_se"])
    se = np.array([se[n] for n in names])
    assert np.all(np.abs(model.fixef.to_numpy() - beta) < 0.01 * se)
    np.testing.assert_allclose(model.se, se, rtol=1e-3)
    np.testing.assert_allclose(model.aic, case["AIC"], rtol=1e-7, atol=1e-4)
    sd = [s for term in in_our_order(case, model) for s in term["sd"]]
    ours = np.concatenate(
        [
            model.sigma * np.sqrt(np.diagonal(Lam @ Lam.T))
            if model.method == "ML"
            else np.sqrt(np.diagonal(Lam @ Lam.T))
            for Lam in model.factors
        ]
    )
    np.testing.assert_allclose(ours, sd, rtol=1e-3, atol=1e-3)


def test_further_predictors_agree(fitted):
    case, model = fitted
    for part in model.frame.others:
        key = "fixef_zi" if part.name == "zi" else "fixef_disp"
        ours = model.fixef_zi if part.name == "zi" else model.fixef_dispersion
        theirs = np.array(list(case[key].values()))
        se = np.array(list(case[f"{key}_se"].values()))
        if part.name == "dispersion" and case["family"] == "gaussian":
            theirs, se = theirs / 2.0, se / 2.0  # they model log sigma^2
        assert np.all(np.abs(ours.to_numpy() - theirs) < 0.01 * se)
        np.testing.assert_allclose(model.se_other(part.name), se, rtol=1e-3)
    found = case.get("dispersion")
    if found and found.get("value") is not None and len(model.dispersion):
        value = found["value"] ** (2.0 if case["family"] == "Gamma" else 1.0)
        np.testing.assert_allclose(model.dispersion.iloc[0], value, rtol=1e-3)


def test_random_effects_and_fitted_values_agree(fitted):
    case, model = fitted
    for group, levels in case["ranef"].items():
        ours = model.ranef[group].copy()
        ours.index = ours.index.astype(str)
        theirs = np.array([list(levels[j].values()) for j in levels], float)
        ours = ours.loc[list(levels)].to_numpy()
        scale = spread(theirs)
        np.testing.assert_allclose(ours, theirs, atol=1e-3 * scale, rtol=0)
    if "probability of the observed" in case.get("fitted_kind", ""):
        return
    head = np.array(case["fitted"], float)
    ours = model.fitted.to_numpy()[: len(head)]
    np.testing.assert_allclose(ours, head, atol=1e-3 * spread(head), rtol=0)


@pytest.fixture(scope="module")
def cbpp():
    design = jg.design(
        "cbind(incidence, size - incidence) ~ period + (1 | herd)",
        jg.datasets.load("cbpp"),
    )
    return design, jax.jit(lambda d: jg.fit(d, family="binomial"))(design)


def test_one_node_is_laplace(cbpp):
    design, fit = cbpp
    agq = jg.loglik(fit.params, design, "binomial", "AGQ", n_quad=1)
    np.testing.assert_allclose(agq, fit.loglik, rtol=1e-10)


def test_gaussian_by_laplace_is_maximum_likelihood(sleepstudy):
    formula = "Reaction ~ Days + (Days | Subject)"
    ml = jg.glmm(formula, sleepstudy, method="ML")
    laplace = jg.glmm(formula, sleepstudy, method="Laplace")
    np.testing.assert_allclose(laplace.loglik, ml.loglik, rtol=1e-9)
    np.testing.assert_allclose(laplace.fixef, ml.fixef, rtol=1e-7)
    np.testing.assert_allclose(laplace.sigma, ml.sigma, rtol=1e-6)


def test_ml_with_a_dispersion_model_maximizes_the_normal_density(sleepstudy):
    """y ~ N(X beta, s^2 Z Z' + diag(exp(2 D gamma))), by dense algebra and scipy."""
    formula, y = "Reaction ~ Days + (1 | Subject)", sleepstudy["Reaction"].to_numpy()
    m = jg.glmm(formula, sleepstudy, dispersion="~ Days", method="ML")
    X = np.column_stack([np.ones(180), sleepstudy["Days"]])
    same = np.equal.outer(*2 * [sleepstudy["Subject"].to_numpy()])

    def loglik(p):
        V = p[2] ** 2 * same + np.diag(np.exp(2.0 * X @ p[3:]))
        return multivariate_normal.logpdf(y, X @ p[:2], V)

    at = np.concatenate([m.fixef, m.theta, m.fixef_dispersion])
    np.testing.assert_allclose(m.loglik, loglik(at), rtol=1e-10)
    scale = np.array([10.0, 1.0, 5.0, 0.1, 0.02])
    best = minimize(lambda z: -loglik(at + scale * z), np.full(5, 0.1))
    assert -best.fun < m.loglik + 1e-6
    np.testing.assert_allclose(at + scale * best.x, at, rtol=1e-3, atol=1e-3)


def test_ml_of_other_links_and_families_is_by_laplace():
    for name, link in (("gaussian", "log"), ("poisson", None), ("gamma", "log")):
        for method in ("ML", "Laplace", None):
            assert check_method(family_by_name(name, link), method) == "Laplace"
    assert check_method(family_by_name("gaussian", None), "ML") == "ML"
    with pytest.raises(ValueError, match="use 'Laplace' or 'AGQ'"):
        check_method(family_by_name("poisson", None), "ML", lambda params: 0.0)


def test_derivatives_through_the_fit(cbpp):
    """The first against refits, the second against the first."""
    design, _ = cbpp
    direction = jnp.asarray(np.sin(np.arange(design.n_obs)))

    def outputs(t):
        X = design.X.at[:, 1].add(0.3 * t * direction)
        out = jg.fit(design.replace(X=X, offset=t * direction), family="binomial")
        p, b = out.params, out.b[0]
        return jnp.concatenate([p.beta, p.theta, out.loglik[None], b[:3, 0]])

    @jax.jit
    def bends(t):
        """Value, first and second derivative."""

        def first(t):
            value, moved = jax.jvp(outputs, (t,), (1.0,))
            return moved, value

        moved, bent, value = jax.jvp(first, (t,), (1.0,), has_aux=True)
        return value, moved, bent

    h = 1e-3
    near = [bends(s * h) for s in (1, -1, 2, -2)]

    def slope_of(i):
        a, b, c, d = (out[i] for out in near)
        return (4 * (a - b) / (2 * h) - (c - d) / (4 * h)) / 3

    _, moved, bent = bends(0.0)
    np.testing.assert_allclose(moved, slope_of(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(bent, slope_of(1), rtol=1e-6)


def test_a_family_from_a_log_density(cbpp):
    design, fit = cbpp

    def log_density(y, eta, psi):
        return y * eta - jax.nn.softplus(eta)

    family = jg.Family(log_density=log_density, support="proportion")
    ours = jax.jit(lambda d: jg.fit(d, family=family))(design)
    assert int(ours.status) == Status.CONVERGED
    np.testing.assert_allclose(ours.params.beta, fit.params.beta, rtol=1e-6)
    np.testing.assert_allclose(ours.params.theta, fit.params.theta, rtol=1e-6)


def test_after_the_fit():
    data = jg.datasets.load("cbpp")
    m = jg.glmm(
        "cbind(incidence, size - incidence) ~ period + (1 | herd)",
        data,
        family="binomial",
    )
    eta = m.predict(type="link")
    np.testing.assert_allclose(m.fitted, 1.0 / (1.0 + np.exp(-eta)), rtol=1e-12)
    np.testing.assert_allclose(m.predict(data), m.fitted, rtol=1e-10)
    pearson = m.residuals("pearson").to_numpy()
    variance = m.fitted * (1 - m.fitted) / data["size"].to_numpy()
    np.testing.assert_allclose(
        pearson, m.residuals().to_numpy() / np.sqrt(variance), rtol=1e-9
    )
    np.testing.assert_allclose(
        np.sum(m.residuals("deviance") ** 2), m.deviance, rtol=1e-10
    )
    ys = m.simulate(200, key=1)
    assert ys.shape == (56, 200)
    counts = ys.to_numpy() * data["size"].to_numpy()[:, None]
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-9)
    assert abs(float(ys.to_numpy().mean()) - float(m.fitted.mean())) < 0.05
    assert list(m.confint().columns) == ["lower", "upper"]
    assert len(m.varcorr) == 1
    assert json.dumps(m.tidy().astype(str).to_dict())


BAD = [
    ("Reaction ~ Days + (1 | Subject)", {"family": "poisson"}, "whole|integer|count"),
    ("Reaction ~ Days + (1 | Subject)", {"family": "binomial"}, "proportion|between"),
    ("Reaction ~ Days + (1 | Subject)", {"family": "nope"}, "unknown family 'nope'"),
    (
        "Reaction ~ Days + (1 | Subject)",
        {"family": "poisson", "link": "logit"},
        "no link 'logit'",
    ),
    (
        "Days ~ 1 + (1 | Subject) + (1 | Reaction)",
        {"family": "poisson", "method": "AGQ"},
        "one grouping factor",
    ),
    (
        "Days ~ 1 + (1 | Subject)",
        {"family": "nbinom2", "method": "PQL"},
        "needs a mean, a variance and at most a dispersion",
    ),
    (
        "Days ~ 1 + (1 | Subject)",
        {"family": "poisson", "n_quad": 5},
        "needs method='AGQ'",
    ),
]


@pytest.mark.parametrize(("formula", "options", "match"), BAD)
def test_what_does_not_fit_is_refused(sleepstudy, formula, options, match):
    with pytest.raises(ValueError, match=match):
        jg.glmm(formula, sleepstudy, **options)
