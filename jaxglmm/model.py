"""The people's door: ``glmm(formula, data)``, names in and names out.

    frame, formula -> encoding -> Design (NumPy) -> cross-products -> one compiled
    program -> Fit (NumPy) -> GLMM, which puts the names back

Nothing here leaves float64, and no JAX array leaves the compiled call.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxglmm import report
from jaxglmm.covariance import structure
from jaxglmm.designs import Design
from jaxglmm.encoding import ModelFrame, model_frame
from jaxglmm.errors import ConvergenceError, ConvergenceWarning, Status
from jaxglmm.families import Family, family_by_name
from jaxglmm.fitting import Control, reml_flag
from jaxglmm.hostfit import (
    check_gaussian,
    effect_covariances,
    fit_host,
    term_factors,
    to_design,
)
from jaxglmm.inference.effects import random_part
from jaxglmm.results import Fit

if TYPE_CHECKING:
    from jaxglmm.inference.matrices import Matrices

__all__ = ["GLMM", "design", "glmm"]


def design(
    formula: str,
    data: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, str] | None = None,
    missing: str = "drop",
) -> Design:
    """Make the Design that :func:`jaxglmm.fit` takes, from a formula and a frame.

    Parameters
    ----------
    formula, data, weights, offset, contrasts, missing
        As for :func:`glmm`.

    Returns
    -------
    Design
        JAX arrays, in float64 where the caller has enabled it.

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> data = jg.datasets.sleepstudy()
    >>> with jax.enable_x64(True):
    ...     d = jg.design("Reaction ~ Days + (Days | Subject)", data)
    >>> d.X.shape, d.terms[0].n_levels
    ((180, 2), 18)
    """
    import jax

    frame = model_frame(
        formula, data, weights=weights, offset=offset, contrasts=contrasts,
        missing=missing,
    )  # fmt: skip
    return jax.tree.map(jax.numpy.asarray, to_design(frame))


def glmm(
    formula: str,
    data: Any,
    *,
    family: str | Family = "gaussian",
    method: str | None = None,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, str] | None = None,
    start: Any = None,
    control: Control | None = None,
    missing: str = "drop",
    strict: bool = False,
) -> GLMM:
    """Fit a mixed model from a formula and a data frame.

    Parameters
    ----------
    formula : str
        As in lme4: ``y ~ x * f + (1 + x | g) + (x || g) + (1 | a/b) + offset(z)``.
    data : pandas, polars or pyarrow table, or dict of arrays
    family : str or Family
        The response's distribution.
    method : {"REML", "ML"}, optional
        REML by default for Gaussian models.
    weights : str or array (n,), optional
        Prior weights, positive: Var(y_i) = sigma^2 / w_i.
    offset : str or array (n,), optional
        Column, expression such as ``"log(exposure)"``, or values; adds to the linear
        predictor, like ``offset()`` in the formula.
    contrasts : dict, optional
        Contrasts by factor, ``{"f": "sum"}``; treatment for unordered and polynomial
        for ordered factors otherwise.
    start : array (m,), optional
        Starting theta.
    control : Control, optional
        Optimizer and its limits.
    missing : {"drop", "raise"}
        Rows with missing values are left out and counted, or refused.
    strict : bool
        Raise instead of warn when the fit did not converge.

    Returns
    -------
    GLMM

    Raises
    ------
    FormulaError, DataError
        Saying what was found and what to do.
    ConvergenceError
        With ``strict=True``.

    Warns
    -----
    ConvergenceWarning
        If no optimum was reached; the message says why and what to do.

    Examples
    --------
    >>> import jaxglmm as jg
    >>> m = jg.glmm("Reaction ~ Days + (Days | Subject)", jg.datasets.sleepstudy())
    >>> m.fixef.round(3).to_dict()
    {'(Intercept)': 251.405, 'Days': 10.467}
    """
    fam = family_by_name(family)
    control = Control() if control is None else control
    if not isinstance(control, Control):
        kind = type(control).__name__
        raise TypeError(f"control must be a jaxglmm.Control; found {kind}")
    reml = reml_flag(method)
    frame = model_frame(
        formula, data, weights=weights, offset=offset, contrasts=contrasts,
        missing=missing,
    )  # fmt: skip
    check_gaussian(frame)
    arrays = to_design(frame)
    fitted = fit_host(arrays, reml, start, control)
    model = GLMM(
        fit=fitted, design=arrays, frame=frame, family=fam,
        method="REML" if reml else "ML", formula=formula,
    )  # fmt: skip
    if not model.converged:
        if strict:
            raise ConvergenceError(model.verdict)
        warnings.warn(model.verdict, ConvergenceWarning, stacklevel=2)
    return model


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GLMM:
    """A fitted mixed model with its names. Made by :func:`glmm`.

    ``fit`` holds the numbers (:class:`jaxglmm.Fit`, NumPy arrays), ``design`` the
    arrays, ``frame`` the names and the encodings that new data need.
    """

    fit: Fit
    design: Design
    frame: ModelFrame
    family: Family
    method: str
    formula: str

    # ---- estimates -----------------------------------------------------------------

    @cached_property
    def fixef(self) -> pd.Series:
        """Fixed effects, in the order of the columns of X."""
        return pd.Series(self.fit.params.beta, self.frame.X_names, name="Estimate")

    @cached_property
    def se(self) -> pd.Series:
        """Standard errors of the fixed effects."""
        size = np.sqrt(np.diagonal(self.fit.vcov_beta))
        return pd.Series(size, self.frame.X_names, name="Std. Error")

    @cached_property
    def vcov(self) -> pd.DataFrame:
        """Covariance matrix of the fixed effects, at the estimated theta."""
        names = self.frame.X_names
        return pd.DataFrame(self.fit.vcov_beta, index=names, columns=names)

    @cached_property
    def theta(self) -> pd.Series:
        """Relative covariance parameters, in lme4's order."""
        labels = [
            f"{t.group_name}.{label}"
            for t in self.frame.terms
            for label in structure(t.structure).theta_labels(t.z_names)
        ]
        return pd.Series(self.fit.params.theta, labels, name="theta")

    @property
    def sigma(self) -> float:
        """Residual standard deviation."""
        return float(self.fit.params.sigma)

    @cached_property
    def factors(self) -> list[np.ndarray]:
        """Relative factor Lambda (k, k) of every term."""
        return term_factors(self.fit.params.theta, self.design)

    @cached_property
    def varcorr(self) -> pd.DataFrame:
        """Variances and correlations: group, var1, var2, vcov, sdcor."""
        return report.varcorr(self)

    @cached_property
    def ranef(self) -> dict[str, pd.DataFrame]:
        """Conditional modes of the random effects: group -> levels x effects."""
        out: dict[str, list[pd.DataFrame]] = {}
        for t, b in zip(self.frame.terms, self.fit.b):
            part = pd.DataFrame(b, index=t.levels, columns=t.z_names)
            out.setdefault(t.group_name, []).append(part)
        return {
            g: parts[0] if len(parts) == 1 else pd.concat(parts, axis=1)
            for g, parts in out.items()
        }

    @cached_property
    def ranef_cov(self) -> dict[str, np.ndarray]:
        """Covariance of the random effects given y, by group: (levels, k, k).

        At the estimated theta, beta and sigma; rows and columns as in ``ranef``.
        """
        values = effect_covariances(self.design, self.fit)
        names = [
            self.frame.terms[b.terms[0]].group_name for b in self.design.layout.blocks
        ]
        by_group = dict(zip(names, values))
        return {g: by_group[g] for g in self.ranef}

    # ---- goodness ------------------------------------------------------------------

    @property
    def loglik(self) -> float:
        """Log-likelihood with every constant; the restricted one for REML."""
        return float(self.fit.loglik)

    @property
    def deviance(self) -> float:
        """Weighted sum of unit deviances, sum of w (y - mu)^2."""
        return float(np.sum(self._weights * (self.design.y - self._mu) ** 2))

    @property
    def df(self) -> int:
        """Number of parameters: beta, theta and sigma."""
        return len(self.fixef) + len(self.theta) + 1

    @property
    def aic(self) -> float:
        """Akaike's criterion, -2 loglik + 2 df."""
        return -2.0 * self.loglik + 2.0 * self.df

    @property
    def bic(self) -> float:
        """Bayesian information criterion, -2 loglik + log(n_obs) df."""
        return -2.0 * self.loglik + np.log(self.n_obs) * self.df

    @property
    def n_obs(self) -> int:
        """Rows used."""
        return len(self.design.y)

    @cached_property
    def n_groups(self) -> dict[str, int]:
        """Levels of every grouping factor."""
        return {t.group_name: t.n_levels for t in self.frame.terms}

    @property
    def status(self) -> Status:
        """How the fit ended; ``str`` of it is a sentence."""
        return Status(int(self.fit.status))

    @property
    def verdict(self) -> str:
        """How the fit ended, in a sentence with the numbers that show it."""
        return report.verdict(self)

    @property
    def converged(self) -> bool:
        """True where the estimates are an optimum, inside or on the boundary."""
        return bool(self.fit.converged)

    @property
    def is_singular(self) -> bool:
        """True where a variance is zero or a correlation +-1."""
        return bool(self.fit.is_singular)

    # ---- fitted values and residuals -----------------------------------------------

    @cached_property
    def _weights(self) -> np.ndarray:
        w = self.design.weights
        return np.ones(self.n_obs) if w is None else np.asarray(w)

    @cached_property
    def _mu(self) -> np.ndarray:
        terms = self.design.terms
        return self._fixed_part(self.design.X, self.design.offset) + (
            random_part([t.z for t in terms], [t.group for t in terms], self.fit.b)
        )

    def _fixed_part(self, X, offset) -> np.ndarray:
        eta = X @ np.asarray(self.fit.params.beta)
        return eta if offset is None else eta + offset

    @cached_property
    def fitted(self) -> pd.Series:
        """Conditional means, one per row used."""
        return pd.Series(self._mu, self.frame.row_index, name="fitted")

    def residuals(self, type: str = "response") -> pd.Series:
        """Residuals, one per row used.

        Parameters
        ----------
        type : {"response", "pearson", "deviance", "working", "scaled"}
            ``response`` and ``working``: y - fitted. ``pearson`` and ``deviance``:
            times sqrt(weight), as in lme4. ``scaled``: these over sigma.
        """
        raw = np.asarray(self.design.y) - self._mu
        scale = {
            "response": 1.0,
            "working": 1.0,
            "pearson": np.sqrt(self._weights),
            "deviance": np.sqrt(self._weights),
            "scaled": np.sqrt(self._weights) / self.sigma,
        }
        if type not in scale:
            raise ValueError(f"unknown residuals {type!r}; use one of {list(scale)}")
        return pd.Series(raw * scale[type], self.frame.row_index, name=type)

    # ---- prediction and simulation -------------------------------------------------

    def predict(
        self,
        newdata: Any = None,
        *,
        re: str = "conditional",
        type: str = "response",
        new_levels: str = "zero",
        se: bool = False,
        key: Any = None,
        offset: Any = None,
    ) -> pd.Series | pd.DataFrame:
        """Predict the mean for the fitted rows or for new data.

        Parameters
        ----------
        newdata : table, optional
            With the model's covariates, its offset column if it has one, and for
            conditional predictions its grouping factors.
        re : {"conditional", "population"}
            With the random effects of the levels known, or with all of them zero.
        type : {"response", "link"}
            The same for a Gaussian model with identity link.
        new_levels : {"zero", "draw", "error"}
            Effects of levels that were not in the data: their mean, a draw from their
            distribution (needs ``key``), or an error that names them.
        se : bool
            Return a frame with columns ``fit`` and ``se`` instead. The standard error
            is that of the mean at the estimated covariance parameters, with the
            variance of an unseen level's effect under ``re="conditional"``.
        key : int or PRNG key, optional
            For ``new_levels="draw"``: rows of one unseen level share its draw.
        offset : array, optional
            One value per row of newdata, for a model fitted with an array as offset.

        Returns
        -------
        Series, or DataFrame with ``se=True``
            NaN where a covariate is missing.
        """
        _choice("re", re, ("conditional", "population"))
        _choice("type", type, ("response", "link"))
        _choice("new_levels", new_levels, ("zero", "draw", "error"))
        from jaxglmm.inference.predict import predict

        return predict(
            self, newdata, conditional=re == "conditional", new_levels=new_levels,
            se=se, offset=offset, key=key,
        )  # fmt: skip

    def simulate(self, n: int = 1, *, key: Any, re: str = "population") -> pd.DataFrame:
        """Draw new responses from the fitted model.

        Parameters
        ----------
        n : int
            Number of response vectors.
        key : int or PRNG key
        re : {"population", "conditional"}
            Draw new random effects, or keep the conditional modes.

        Returns
        -------
        DataFrame, (n_obs, n)
        """
        _choice("re", re, ("population", "conditional"))
        from jaxglmm.inference.simulate import responses

        ys = responses(self, n, key, conditional=re == "conditional")
        names = [f"sim_{i + 1}" for i in range(n)]
        return pd.DataFrame(ys.T, index=self.frame.row_index, columns=names)

    def confint(self, *, method: str = "wald", level: float = 0.95) -> pd.DataFrame:
        """Confidence intervals of the fixed effects.

        Parameters
        ----------
        method : {"wald"}
            Estimate +- normal quantile x standard error.
        level : float

        Returns
        -------
        DataFrame
            Columns ``lower`` and ``upper``, a row per fixed effect. As in lme4, Wald
            intervals are not given for variance parameters, whose likelihood is far
            from quadratic.
        """
        _choice("method", method, ("wald",))
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie between 0 and 1; found {level}")
        half = NormalDist().inv_cdf(0.5 + level / 2.0) * self.se
        return pd.DataFrame({"lower": self.fixef - half, "upper": self.fixef + half})

    # ---- tables --------------------------------------------------------------------

    def tidy(self, *, conf_level: float = 0.95) -> pd.DataFrame:
        """One row per parameter, in the columns of R's broom.mixed."""
        return report.tidy(self, conf_level)

    def glance(self) -> pd.DataFrame:
        """One row for the whole model."""
        return report.glance(self)

    def augment(self) -> pd.DataFrame:
        """One row per observation: response, fitted values, residuals."""
        return report.augment(self)

    def matrices(self) -> Matrices:
        """X, Z, Lambda, G, R and V, labelled."""
        from jaxglmm.inference.matrices import model_matrices

        return model_matrices(self.design, self.frame, self.factors, self.sigma)

    def summary(self) -> report.Summary:
        """The table that lme4 prints, and the verdict."""
        return report.Summary(self)

    def __repr__(self) -> str:
        return report.text(self)

    def _repr_html_(self) -> str:
        return report.html(self)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is not one of {', '.join(map(repr, choices))}"
        )
