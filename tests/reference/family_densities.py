"""Make family_densities.json: log densities, scores and curvatures to 60 digits.

Needs mpmath (1.4.1 was used): python family_densities.py. Each density is the textbook
formula, w the weight; score and curvature are central differences of step 1e-15 in
arithmetic of 120 digits and more, with respect to eta and each own parameter.
"""

import itertools
import json
from pathlib import Path

import mpmath as mp
import numpy as np

lg, exp, log = mp.loggamma, mp.exp, mp.log


def poisson(y, eta, psi, w):
    return y * eta - exp(eta) - lg(y + 1)


def nbinom(kind):
    def f(y, eta, psi, w):
        mu = exp(eta)
        t = exp(psi[0]) if kind == 2 else mu / exp(psi[0])
        odds = y * log(mu / (mu + t)) - t * mp.log1p(mu / t)
        return lg(y + t) - lg(t) - lg(y + 1) + odds

    return f


def truncated(f):
    def g(y, eta, psi, w):
        return f(y, eta, psi, w) - log(-mp.expm1(f(mp.mpf(0), eta, psi, w)))

    return g


def log_pair(link, x):
    if link == "logit":
        return -mp.log1p(exp(-x)), -mp.log1p(exp(x))
    if link == "cloglog":
        return log(-mp.expm1(-exp(x))), -exp(x)
    if link == "probit":
        root = mp.sqrt(2)
        return log(mp.erfc(-x / root) / 2), log(mp.erfc(x / root) / 2)
    half = mp.mpf(1) / 2
    return log(half + mp.atan(x) / mp.pi), log(half - mp.atan(x) / mp.pi)


def choose(n, k):
    return lg(n + 1) - lg(k + 1) - lg(n - k + 1)


def binomial(link):
    def f(y, eta, psi, w):
        log_p, log_q = log_pair(link, eta)
        return choose(w, y * w) + y * w * log_p + (w - y * w) * log_q

    return f


def shapes(eta, psi):
    phi = exp(psi[0])
    return phi / (1 + exp(-eta)), phi / (1 + exp(eta)), phi


def betabinomial(y, eta, psi, w):
    a, b, phi = shapes(eta, psi)
    k = y * w
    rise = lg(k + a) - lg(a) + lg(w - k + b) - lg(b) - lg(w + phi) + lg(phi)
    return choose(w, k) + rise


def beta(y, eta, psi, w):
    a, b, phi = shapes(eta, psi)
    return lg(phi) - lg(a) - lg(b) + (a - 1) * log(y) + (b - 1) * log(1 - y)


def gamma(y, eta, psi, w):
    a, mu = w * exp(-psi[0]), exp(eta)
    return a * log(a / mu) - lg(a) + (a - 1) * log(y) - a * y / mu


def inverse_gaussian(y, eta, psi, w):
    a, mu = w * exp(-psi[0]), exp(eta)
    kernel = a * (y - mu) ** 2 / (2 * mu**2 * y)
    return (log(a / (2 * mp.pi)) - 3 * log(y)) / 2 - kernel


def gaussian(y, eta, psi, w):
    z2 = w * (y - eta) ** 2 * exp(-2 * psi[0])
    return (log(w / (2 * mp.pi)) - z2) / 2 - psi[0]


def lognormal(y, eta, psi, w):
    return gaussian(log(y), eta, psi, w) - log(y)


def student(y, eta, psi, w):
    nu = exp(psi[1])
    z2 = w * (y - eta) ** 2 * exp(-2 * psi[0])
    constant = lg((nu + 1) / 2) - lg(nu / 2) - log(nu * mp.pi / w) / 2 - psi[0]
    return constant - (nu + 1) / 2 * mp.log1p(z2 / nu)


def genpois(y, eta, psi, w):
    c, mu = exp(-psi[0] / 2), exp(eta)
    z = y + c * (mu - y)
    return log(mu * c) + (y - 1) * log(z) - z - lg(y + 1)


def tweedie(y, eta, psi, w):
    phi, p, mu = exp(psi[0]) / w, 1 + 1 / (1 + exp(-psi[1])), exp(eta)
    alpha = (2 - p) / (p - 1)
    rest = y * mu ** (1 - p) / (1 - p) - mu ** (2 - p) / (2 - p)
    if y == 0:
        return rest / phi
    z = y**alpha / ((p - 1) ** alpha * phi ** (1 + alpha) * (2 - p))
    peak = float(y ** (2 - p) / (phi * (2 - p)))
    reach = 30 * (peak * float(p - 1)) ** 0.5 + 60
    js = range(max(1, int(peak - reach)), int(peak + reach) + 1)
    terms = [j * log(z) - lg(1 + j) - lg(alpha * j) for j in js]
    return (
        rest / phi
        - log(y)
        + max(terms)
        + log(mp.fsum(exp(t - max(terms)) for t in terms))
    )


def cumulative(link):
    def f(y, eta, psi, w):
        tau = [psi[0]]
        for step in psi[1:]:
            tau.append(tau[-1] + exp(step))
        y = int(y)
        if y == 0:
            return log_pair(link, tau[0] - eta)[0]
        if y == len(tau):
            return log_pair(link, tau[-1] - eta)[1]
        a, b = tau[y - 1] - eta, tau[y] - eta
        if link == "cloglog":
            return log(-mp.expm1(exp(a) - exp(b))) - exp(a)
        return log(exp(log_pair(link, b)[0]) - exp(log_pair(link, a)[0]))

    return f


ETA = [-700.0, -60.0, -8.0, -1.3, 0.0, 0.4, 2.0, 17.0, 60.0, 700.0]
MILD = [-3.0, -1.3, 0.0, 0.4, 2.0, 3.0]
PROBIT = [-60.0, -12.0, -8.0, -1.3, 0.0, 0.4, 2.0, 17.0]
LOGS = [float(x) for x in np.log([1e-6, 0.01, 1.0, 37.0, 1e6, 1e12])]
ONE = [[x] for x in LOGS]
SCALE = [[-8.0], [0.0], [4.0]]
COUNTS = [(y, 1.0) for y in (0.0, 1.0, 2.0, 7.0, 300.0, 1e6, 1e9)]
POSITIVE = list(itertools.product([1e-10, 1e-3, 0.5, 1.0, 3.0, 1e9], [0.3, 5.0]))
UNIT = [(y, 1.0) for y in (1e-12, 1e-3, 0.3, 0.5, 0.99)]
REAL = list(itertools.product([-3.0, 0.0, 1e3], [0.3, 5.0]))
TRIALS = [(0.0, 1.0), (1.0, 1.0), (0.0, 20.0), (0.35, 20.0), (1.0, 20.0), (0.25, 1e6)]
CODES = [(y, 1.0) for y in (0.0, 1.0, 2.0, 3.0)]
TAU = [[-1.0, -0.5, 1.0], [0.3, -9.0, -4.0], [-2.0, 2.0, 3.0]]
NU = [list(x) for x in itertools.product([-8.0, 0.0, 4.0], LOGS[1:])]

TWEEDIE = [(0.0, 1.0), (1e-6, 1.0), (0.3, 3.0), (2.0, 1.0), (300.0, 1.0)]
POWER = [list(x) for x in itertools.product([-4.0, 0.0, 3.0], [-3.0, 0.0, 2.0])]

CASES = {
    "gaussian": (gaussian, REAL, ETA, SCALE),
    "poisson": (poisson, COUNTS, ETA, [[]]),
    "nbinom1": (nbinom(1), COUNTS, ETA[1:-1], ONE),
    "nbinom2": (nbinom(2), COUNTS, ETA, ONE),
    "truncated_poisson": (truncated(poisson), COUNTS[1:], ETA, [[]]),
    "truncated_nbinom1": (truncated(nbinom(1)), COUNTS[1:], ETA[1:-1], ONE),
    "truncated_nbinom2": (truncated(nbinom(2)), COUNTS[1:], ETA, ONE),
    "gamma": (gamma, POSITIVE, ETA[1:], ONE),
    "inverse_gaussian": (inverse_gaussian, POSITIVE, ETA[1:], ONE),
    "lognormal": (lognormal, POSITIVE, ETA, SCALE),
    "student": (student, REAL, ETA, NU),
    "beta": (beta, UNIT, ETA, ONE),
    "betabinomial": (betabinomial, TRIALS, ETA, ONE),
    "genpois": (genpois, COUNTS, ETA[1:-1], [[0.1], [1.0], [5.0], [20.0]]),
    "binomial/logit": (binomial("logit"), TRIALS, ETA, [[]]),
    "binomial/probit": (binomial("probit"), TRIALS, PROBIT, [[]]),
    "binomial/cloglog": (binomial("cloglog"), TRIALS, ETA[:-2], [[]]),
    "binomial/cauchit": (binomial("cauchit"), TRIALS, ETA, [[]]),
    "tweedie": (tweedie, TWEEDIE, [-3.0, 0.4, 5.0], POWER),
    "cumulative/logit": (cumulative("logit"), CODES, ETA, TAU),
    "cumulative/probit": (cumulative("probit"), CODES, PROBIT, TAU),
    "cumulative/cloglog": (cumulative("cloglog"), CODES, MILD, TAU),
    "cumulative/cauchit": (cumulative("cauchit"), CODES, ETA, TAU),
}


def reference(f, y, w, x):
    """Value, and score and curvature in each coordinate of x = (eta, psi)."""
    h = mp.mpf(10) ** -15
    at = lambda z: f(mp.mpf(y), z[0], z[1:], mp.mpf(w))
    x = [mp.mpf(v) for v in x]
    value = at(x)
    score, curvature = [], []
    for i in range(len(x)):
        up = at([*x[:i], x[i] + h, *x[i + 1 :]])
        down = at([*x[:i], x[i] - h, *x[i + 1 :]])
        score.append((up - down) / (2 * h))
        curvature.append((up - 2 * value + down) / h**2)
    return [float(v) for v in (value, *score, *curvature)]


def main():
    rng = np.random.default_rng(7)
    out = {}
    for name, (f, responses, etas, psis) in CASES.items():
        grid = [
            (y, w, [eta, *psi])
            for (y, w), eta, psi in itertools.product(responses, etas, psis)
        ]
        if len(grid) > 90:
            grid = [grid[i] for i in sorted(rng.choice(len(grid), 90, replace=False))]
        rows = []
        for y, w, x in grid:
            slow = abs(x[0]) > 100
            digits = 120 + (700 if slow else 0)
            digits = 50 if name == "tweedie" else digits
            digits = 1800 if "probit" in name else digits  # the tail at 60 is 1e-784
            with mp.workdps(digits):
                rows.append([y, w, *x, *reference(f, y, w, x)])
        out[name] = rows
        print(name, len(rows), flush=True)
    path = Path(__file__).with_suffix(".json")
    lines = [
        f'"{k}": [\n' + ",\n".join(json.dumps(r) for r in v) + "]"
        for k, v in out.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
