"""Tables and text: the only place that formats.

The layout is that of lme4's ``summary``, so that its readers need to learn nothing.
"""

from __future__ import annotations

import html as _html
import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jaxglmm.inference.categories import has_levels
from jaxglmm.verdict import at_limit, verdict

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["Summary", "augment", "glance", "html", "text", "tidy", "varcorr"]

_NORMAL = ["z value", "Pr(>|z|)"]
_HOW = {
    "Laplace": "maximum likelihood (Laplace)",
    "AGQ": "maximum likelihood (adaptive Gauss-Hermite quadrature)",
    "REML": "REML (Laplace)",
    "PQL": "penalized quasi-likelihood",
}

# ---- frames ------------------------------------------------------------------------


def has_residual(m: GLMM) -> bool:
    """Whether the model has one residual variance."""
    return not m.is_generalized or tuple(m.family.own_names) == ("sigma",)


def varcorr(m: GLMM) -> pd.DataFrame:
    """Variances and covariances, as lme4's ``as.data.frame(VarCorr(m))``."""
    rows = []
    scale2 = float(m.fit.params.sigma) ** 2
    for t, group, Lam in zip(m.frame.terms, m.frame.group_labels(), m.factors):
        cov = scale2 * (Lam @ Lam.T)
        sd = np.sqrt(np.diagonal(cov))
        names = t.z_names
        for i, name in enumerate(names):
            rows.append((group, name, None, cov[i, i], sd[i]))
        if t.structure == "diag":
            continue
        for j in range(len(names)):
            for i in range(j + 1, len(names)):
                scale = sd[i] * sd[j]
                corr = cov[i, j] / scale if scale > 0 else np.nan
                rows.append((group, names[j], names[i], cov[i, j], corr))
    if has_residual(m):
        rows.append(("Residual", None, None, m.sigma**2, m.sigma))
    table = pd.DataFrame(rows, columns=["group", "var1", "var2", "vcov", "sdcor"])
    for i, name in enumerate(["group", "var1", "var2"]):
        # object columns: a missing name stays None, whatever pandas infers
        table[name] = pd.Series([row[i] for row in rows], dtype=object)
    return table


def tidy(m: GLMM, conf_level: float) -> pd.DataFrame:
    """Fixed effects, thresholds, then standard deviations and correlations."""
    ci = m.confint(level=conf_level)
    fixed = pd.DataFrame(
        {
            "effect": "fixed",
            "group": None,
            "term": m.fixef.index,
            "estimate": m.fixef.to_numpy(),
            "std_error": m.se.to_numpy(),
            "statistic": (m.fixef / m.se).to_numpy(),
            "conf_low": ci["lower"].to_numpy(),
            "conf_high": ci["upper"].to_numpy(),
        }
    )
    v = m.varcorr
    names = [
        f"sd__{a}" if pd.isna(b) and not pd.isna(a)
        else "sd__Observation" if pd.isna(a)
        else f"cor__{a}.{b}"
        for a, b in zip(v["var1"], v["var2"])
    ]  # fmt: skip
    random = pd.DataFrame(
        {
            "effect": "ran_pars",
            "group": v["group"],
            "term": names,
            "estimate": v["sdcor"].astype(float),
        }
    ).reindex(columns=fixed.columns)
    for column in ("std_error", "statistic", "conf_low", "conf_high"):
        random[column] = random[column].astype(float)
    parts = [fixed.astype({"group": object}), random]
    if has_levels(m):
        parts.insert(1, _thresholds(m, conf_level))
    return pd.concat(parts, ignore_index=True)


def _thresholds(m: GLMM, conf_level: float) -> pd.DataFrame:
    """Thresholds of an ordered response in the columns of ``tidy``."""
    tau, se = m.dispersion.to_numpy(), m.dispersion_se.to_numpy()
    half = NormalDist().inv_cdf(0.5 + conf_level / 2.0) * se
    table = pd.DataFrame(
        {
            "effect": "threshold",
            "group": None,
            "term": m.dispersion.index,
            "estimate": tau,
            "std_error": se,
            "statistic": tau / se,
            "conf_low": tau - half,
            "conf_high": tau + half,
        }
    )
    return table.astype({"group": object})


def glance(m: GLMM) -> pd.DataFrame:
    """One row: sizes, criteria, status."""
    row = {
        "n_obs": m.n_obs,
        "n_dropped": m.frame.n_dropped,
        "sigma": m.sigma,
        "loglik": m.loglik,
        "aic": m.aic,
        "bic": m.bic,
        "deviance": m.deviance,
        "df": m.df,
        "df_residual": m.n_obs - m.df,
        "method": m.method,
        "family": m.family.name,
        "status": m.status.name,
        "converged": m.converged,
        "is_singular": m.is_singular,
        "n_iter": int(m.fit.n_iter),
    }
    return pd.DataFrame([row])


def augment(m: GLMM) -> pd.DataFrame:
    """One row per observation used; means of ordered levels are those of the codes."""
    groups = {
        t.group_name: np.asarray(t.levels)[np.asarray(t.group)]
        for t in m.frame.all_terms
    }
    y = m.frame.response_name
    groups.pop(y, None)

    def named(values):
        # columns of the data keep their names
        taken = {y, *groups}
        return {f".{k}" if k in taken else k: v for k, v in values.items()}

    fits = {
        "fitted": m.fitted.to_numpy(),
        "resid": m.residuals().to_numpy(),
        "fixed": _population_means(m),
    }
    given = {"weights": m.design.weights, "offset": m.design.offset}
    given = {k: np.asarray(v) for k, v in given.items() if v is not None}
    response = m._as_response(np.asarray(m.design.y))
    columns = {y: response, **named(fits), **groups, **named(given)}
    return pd.DataFrame(columns, index=m.frame.row_index)


def _population_means(m: GLMM) -> np.ndarray:
    table = m.predict(re="population").to_numpy()
    return table if table.ndim == 1 else table @ np.arange(table.shape[1])


# ---- text --------------------------------------------------------------------------


def _significant(x: float, digits: int = 4) -> int:
    """Decimals that show ``digits`` significant digits of x."""
    if x == 0 or not np.isfinite(x):
        return 3
    return int(np.clip(digits - 1 - np.floor(np.log10(abs(x))), 0, 8))


def _decimals(values: np.ndarray, digits: int = 4) -> int:
    """Common decimals of a column: the smallest entry keeps ``digits`` digits."""
    finite = np.abs(values[np.isfinite(values)])
    finite = finite[finite > 1e-6 * np.max(finite, initial=0.0)]
    if not len(finite):
        return 3
    return int(np.clip(max(_significant(v, digits) for v in finite), 0, 6))


def _number(x: float, decimals: int, least: float = 0.5) -> str:
    """Fixed decimals, or four digits where below ``least`` of the last of them."""
    if x is None or not np.isfinite(x):
        return "NA" if x is None or np.isnan(x) else str(x)
    if x != 0 and (abs(x) >= 1e7 or abs(x) < least * 10.0**-decimals):
        return f"{x:.4g}"
    return f"{x:.{decimals}f}"


def _table(rows: list[list[str]], left: int) -> list[str]:
    """Rows of text in columns; the first ``left`` columns flush left."""
    widths = [max(len(r[j]) for r in rows) for j in range(len(rows[0]))]
    return [
        " ".join(
            c.ljust(w) if j < left else c.rjust(w)
            for j, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _random_rows(m: GLMM) -> list[list[str]]:
    blocks = []
    width = max(len(t.z_names) for t in m.frame.all_terms)
    labels = m.frame.group_labels(every=True)
    scale2 = float(m.fit.params.sigma) ** 2
    for t, group, Lam in zip(m.frame.all_terms, labels, m.factors):
        cov = scale2 * (Lam @ Lam.T)
        sd = np.sqrt(np.diagonal(cov))
        for i, name in enumerate(t.z_names):
            corr = []
            if t.structure != "diag":
                with np.errstate(all="ignore"):
                    corr = [_number(cov[i, j] / (sd[i] * sd[j]), 3) for j in range(i)]
            corr += [""] * (width - 1 - len(corr))
            blocks.append((group if i == 0 else "", name, cov[i, i], sd[i], corr))
    if has_residual(m):
        blocks.append(("Residual", "", m.sigma**2, m.sigma, [""] * (width - 1)))
    rows = [["Groups", "Name", "Variance", "Std.Dev.", *_corr_head(width)]]
    places = [_decimals(np.array([b[i] for b in blocks])) for i in (2, 3)]
    for group, name, var, sd, corr in blocks:
        rows.append(
            [group, name, _number(var, places[0], 5), _number(sd, places[1], 5), *corr]
        )
    return rows


def _corr_head(width: int) -> list[str]:
    return ["Corr", *[""] * (width - 2)] if width > 1 else []


def _fixed_rows(m: GLMM) -> list[list[str]]:
    return _coefficient_rows(m.fixef, m.se, normal=m.is_generalized)


def _coefficient_rows(fixef, se, *, normal: bool) -> list[list[str]]:
    """Estimates with t values, or with z values and their probabilities."""
    est, size = fixef.to_numpy(), se.to_numpy()
    with np.errstate(all="ignore"):
        t = est / size
    rows = [["", "Estimate", "Std. Error", *(_NORMAL if normal else ["t value"])]]
    for name, b, s, tv in zip(fixef.index, est, size, t):
        d = max(3, _significant(s, 4))
        shown = [f"{v:.4g}" if d > 7 else _number(v, d) for v in (b, s)]
        chance = math.erfc(abs(tv) / math.sqrt(2.0))
        more = [f"{chance:.3g}" if np.isfinite(tv) else "NA"] if normal else []
        rows.append([name, *shown, _number(tv, 3), *more])
    return rows


def _groups_line(m: GLMM) -> str:
    groups = "; ".join(f"{g}, {J}" for g, J in m.n_groups.items())
    line = f"Number of obs: {m.n_obs}, groups: {groups}"
    if m.frame.n_dropped:
        causes = ", ".join(f"{c}: {k}" for c, k in m.frame.dropped_by.items())
        line += f"\n{m.frame.n_dropped} rows with missing values dropped ({causes})"
    return line


def _head(m: GLMM) -> list[str]:
    out = [f"Linear mixed model fit by {m.method}", f"Formula: {m.formula}"]
    if m.is_generalized:
        out[0] = f"Generalized linear mixed model fit by {_HOW[m.method]}"
        out.insert(1, f"Family: {m.family.name} ({m.family.link})")
    out += [f"Note: {notice}" for notice in m.frame.notices]
    if m.method == "PQL":
        return [*out, "", "(PQL has no likelihood: no AIC, BIC or deviance test)"]
    if m.method == "REML":
        return [*out, "", f"REML criterion at convergence: {-2.0 * m.loglik:.3f}"]
    rows = [
        ["AIC", "BIC", "logLik", "-2*log(L)", "df.resid"],
        [
            *(f"{v:.1f}" for v in (m.aic, m.bic, m.loglik, -2.0 * m.loglik)),
            str(m.n_obs - m.df),
        ],
    ]
    return [*out, "", *_table(rows, 0)]


def text(m: GLMM, *, full: bool = False) -> str:
    """Printed form; ``full`` adds scaled residuals and correlations of beta."""
    out = _head(m)
    if full:
        q = np.quantile(m.residuals("scaled").to_numpy(), [0, 0.25, 0.5, 0.75, 1])
        rows = [["Min", "1Q", "Median", "3Q", "Max"], [f"{v:.4f}" for v in q]]
        out += ["", "Scaled residuals:", *_table(rows, 0)]
    out += ["", "Random effects:"]
    out += [" " + line for line in _table(_random_rows(m), 2)]
    out += [_groups_line(m), "", "Fixed effects:"]
    out += _table(_fixed_rows(m), 1) if len(m.fixef) else ["(none)"]
    for part in m.frame.others:
        estimates, limits = m._other_fixef(part.name), at_limit(m)
        estimates.index = [
            f"{n}*" if f"{part.name}: {n}" in limits else n for n in estimates.index
        ]
        rows = _coefficient_rows(estimates, m.se_other(part.name), normal=True)
        out += ["", f"Fixed effects of {part.name}:", *_table(rows, 1)]
    if m.is_generalized and len(m.dispersion):
        rows = [["", "Estimate", "Std. Error"]]
        limits = at_limit(m)
        for name, v in m.dispersion.items():
            star = "*" if name in limits else ""
            size = "NA" if star else f"{m.dispersion_se[name]:.4g}"
            rows.append([str(name), f"{v:.4g}{star}", size])
        out += ["", "Own parameters of the family:", *_table(rows, 1)]
    if full and 1 < len(m.fixef) <= 20:
        out += ["", "Correlation of fixed effects:", *_table(_corr_rows(m), 1)]
    out += ["", verdict(m)]
    return "\n".join(out)


def _corr_rows(m: GLMM) -> list[list[str]]:
    cov = m.vcov.to_numpy()
    sd = np.sqrt(np.diagonal(cov))
    names = list(m.fixef.index)
    rows = [["", *(n[:11] for n in names[:-1])]]
    for i in range(1, len(names)):
        cells = [
            f"{cov[i, j] / (sd[i] * sd[j]):.3f}" if j < i else ""
            for j in range(len(names) - 1)
        ]
        rows.append([names[i][:11], *cells])
    return rows


def html(m: GLMM) -> str:
    """HTML form for notebooks."""
    parts = [f"<p>{'<br>'.join(_html.escape(x) for x in _head(m) if x)}</p>"]
    for title, rows in (
        ("Random effects", _random_rows(m)),
        ("Fixed effects", _fixed_rows(m)),
    ):
        cells = [
            "<tr>" + "".join(f"<{tag}>{_html.escape(c)}</{tag}>" for c in row) + "</tr>"
            for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows)
        ]
        parts.append(f"<table><caption>{title}</caption>{''.join(cells)}</table>")
    parts.append(f"<p>{_html.escape(_groups_line(m))}</p>")
    parts.append(f"<p>{_html.escape(verdict(m))}</p>")
    return "<div>" + "".join(parts) + "</div>"


class Summary:
    """The full table of a model; prints as text, shows as HTML in a notebook."""

    def __init__(self, m: GLMM):
        self.model = m

    def __repr__(self) -> str:
        return text(self.model, full=True)

    def _repr_html_(self) -> str:
        return html(self.model)
