"""A fitted model with its names: what :func:`jaxglmm.glmm` returns.

The numbers are those of a Fit in NumPy arrays; here they meet the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxglmm import report
from jaxglmm.covariance import structure
from jaxglmm.designs import Design
from jaxglmm.encoding import ModelFrame
from jaxglmm.errors import Status
from jaxglmm.families import Family, Gaussian
from jaxglmm.flatness import determined_covariance, flat_directions, moves
from jaxglmm.hostfit import (
    effect_covariances,
    generalized_covariances,
    term_factors,
)
from jaxglmm.inference.categories import has_levels, level_labels
from jaxglmm.inference.effects import linear_predictors
from jaxglmm.inference.rows import (
    RowStatistics,
    generalized_residuals,
    linear_residuals,
    own_values,
    row_statistics,
)
from jaxglmm.results import Fit, Params
from jaxglmm.verdict import verdict

if TYPE_CHECKING:
    from pathlib import Path

    from jaxglmm.control import Control
    from jaxglmm.inference.laplace_error import LaplaceError
    from jaxglmm.inference.matrices import Matrices
    from jaxglmm.studies.bootstrap import Bootstrap

__all__ = ["GLMM"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GLMM:
    """A fitted mixed model with its names. Made by :func:`glmm`.

    ``fit`` holds the numbers (:class:`jaxglmm.Fit`, NumPy arrays), ``design`` the
    arrays, ``frame`` the names and the encodings that new data need; ``n_quad``,
    ``priors`` and ``control`` are as :func:`glmm` was given them; the optimum is the
    best that ``n_starts`` starts led to.
    """

    fit: Fit
    design: Design
    frame: ModelFrame
    family: Family
    method: str
    formula: str
    n_quad: int | None = None
    priors: Callable[[Params], Any] | None = None
    control: Control | None = None
    n_starts: int = 1

    # ---- estimates -----------------------------------------------------------------

    @cached_property
    def fixef(self) -> pd.Series:
        """Fixed effects, in the order of the columns of X."""
        return pd.Series(self.fit.params.beta, self.frame.X_names, name="Estimate")

    @cached_property
    def se(self) -> pd.Series:
        """Standard errors of the fixed effects."""
        var = np.diagonal(self.determined_vcov)[: len(self.fixef)]
        size = self._sizes(var, slice(0, len(var)))
        return pd.Series(size, self.frame.X_names, name="Std. Error")

    @cached_property
    def flat_parameters(self) -> np.ndarray:
        """Which of (beta, others, theta, psi) have no standard error.

        Those that move along a direction in which the likelihood is flat.
        """
        eye = np.eye(len(self.flat_directions))
        return moves(eye, self.flat_directions, np.ones(len(eye)))

    @cached_property
    def flat_directions(self) -> np.ndarray:
        """Directions (P, k) of (beta, others, theta, psi) with a flat likelihood."""
        return flat_directions(self)

    @cached_property
    def determined_vcov(self) -> np.ndarray:
        """Covariance (P, P) of (beta, others, theta, psi), of beta for linear models.

        Right for every combination of them that no flat direction moves.
        """
        return determined_covariance(self)

    def _sizes(self, var: np.ndarray, at: slice) -> np.ndarray:
        """Standard errors from variances of the parameters ``at`` some place."""
        flat = self.flat_parameters[at]
        return np.sqrt(np.where(flat, np.nan, var))

    @cached_property
    def vcov(self) -> pd.DataFrame:
        """Covariance matrix of the fixed effects, at the estimated theta.

        NaN for those that the data do not determine; ``determined_vcov`` tells of
        the combinations that they do.
        """
        names, p = self.frame.X_names, len(self.fixef)
        flat = self.flat_parameters[:p]
        cov = np.where(flat | flat[:, None], np.nan, self.determined_vcov[:p, :p])
        return pd.DataFrame(cov, index=names, columns=names)

    @cached_property
    def fixef_zi(self) -> pd.Series:
        """Fixed effects of the zero inflation, on the logit scale."""
        return self._other_fixef("zi")

    @cached_property
    def fixef_dispersion(self) -> pd.Series:
        """Fixed effects of the dispersion model, on its log scale."""
        return self._other_fixef("dispersion")

    def _other_fixef(self, name: str) -> pd.Series:
        for part, beta in zip(self.frame.others, self.fit.params.others):
            if part.name == name:
                return pd.Series(beta, part.X_names, name="Estimate")
        raise AttributeError(f"the model has no {name}= formula")

    def se_other(self, name: str) -> pd.Series:
        """Standard errors of the fixed effects of ``"zi"`` or ``"dispersion"``."""
        start = self.design.X.shape[1]
        for part in self.frame.others:
            stop = start + part.X.shape[1]
            if part.name == name:
                var = np.diagonal(self.determined_vcov)[start:stop]
                size = self._sizes(var, slice(start, stop))
                return pd.Series(size, part.X_names, name="Std. Error")
            start = stop
        raise AttributeError(f"the model has no {name}= formula")

    @cached_property
    def dispersion(self) -> pd.Series:
        """The family's own parameters on their natural scale; see its docstring."""
        names = self.frame.own_names(self.family)
        if not self.is_generalized:
            return pd.Series([self.sigma], ["sigma"], name="Estimate")
        return pd.Series(own_values(self.family, self._psi)[0], names, name="Estimate")

    @cached_property
    def dispersion_se(self) -> pd.Series:
        """Standard errors of ``dispersion``, by the delta method."""
        values, slope = own_values(self.family, self._psi)
        n_own = len(values)
        cov = self.determined_vcov[-n_own:, -n_own:] if n_own else np.zeros((0, 0))
        var = np.diagonal(slope @ cov @ slope.T)
        total = len(self.determined_vcov)
        size = self._sizes(var, slice(total - n_own, total))
        return pd.Series(size, self.frame.own_names(self.family), name="Std. Error")

    @property
    def _psi(self) -> np.ndarray:
        psi = self.fit.params.psi
        return np.zeros(0) if psi is None else np.asarray(psi)

    @property
    def is_generalized(self) -> bool:
        """Whether the model was fitted as a generalized one, on all its parameters."""
        return self.fit.params.psi is not None

    @cached_property
    def theta(self) -> pd.Series:
        """Relative covariance parameters, in lme4's order."""
        labels = [
            f"{t.group_name}.{label}"
            for t in self.frame.all_terms
            for label in structure(t.structure).theta_labels(t.z_names)
        ]
        return pd.Series(self.fit.params.theta, labels, name="theta")

    @property
    def sigma(self) -> float:
        """Residual standard deviation; 1 for families without one."""
        if self.is_generalized and self.family.own_names == ("sigma",):
            return float(self.dispersion.iloc[0])
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
        if self.is_generalized:
            values = generalized_covariances(self.design, self.fit, self.family)
        else:
            values = effect_covariances(self.design, self.fit)
        layout, own = self.design.layout, len(self.frame.terms)
        by_group = {}
        for f, (block, value) in enumerate(zip(layout.blocks, values)):
            at = np.flatnonzero(np.array(layout.block_predictors(f)) == 0)
            if block.terms[0] < own and len(at):
                name = self.frame.terms[block.terms[0]].group_name
                by_group[name] = value[:, at[:, None], at]
        return {g: by_group[g] for g in self.ranef}

    # ---- goodness ------------------------------------------------------------------

    @property
    def loglik(self) -> float:
        """Log-likelihood with every constant; the restricted one for REML."""
        return float(self.fit.loglik)

    @property
    def deviance(self) -> float:
        """Sum of unit deviances at the conditional means; Gaussian: w (y - mu)^2."""
        if self.is_generalized:
            return float(np.sum(self._rows.unit_deviance))
        return float(np.sum(self._weights * (self.design.y - self._mu) ** 2))

    @property
    def df(self) -> int:
        """Number of parameters: fixed effects, theta, sigma or the family's own."""
        more = 1
        if self.is_generalized:
            more = len(self._psi) + sum(len(c) for c in self.fit.params.others)
        return len(self.fixef) + len(self.theta) + more

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
        return {t.group_name: t.n_levels for t in self.frame.all_terms}

    @property
    def status(self) -> Status:
        """How the fit ended; ``str`` of it is a sentence."""
        return Status(int(self.fit.status))

    @property
    def verdict(self) -> str:
        """How the fit ended, in a sentence with the numbers that show it."""
        return verdict(self)

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
    def _eta(self) -> np.ndarray:
        """Linear predictors at the conditional modes, (n, R)."""
        return linear_predictors(self.design, self.fit)

    @cached_property
    def _rows(self) -> RowStatistics:
        return row_statistics(self.family, self._eta, self._psi, self.design)

    @property
    def _mu(self) -> np.ndarray:
        return self._rows.mu if self.is_generalized else self._eta[:, 0]

    @cached_property
    def fitted(self) -> pd.Series:
        """Conditional means, one per row used; of ordered levels those of the codes."""
        return pd.Series(self._mu, self.frame.row_index, name="fitted")

    def residuals(self, type: str = "response") -> pd.Series:
        """Residuals, one per row used.

        Parameters
        ----------
        type : {"response", "pearson", "deviance", "working", "scaled"}
            ``response``: y - fitted. ``working``: that over d mu / d eta. ``pearson``:
            over the standard deviation of y; Gaussian: times sqrt(weight), as in lme4.
            ``deviance``: signed root of the unit deviance. ``scaled``: Pearson
            residuals, over sigma for Gaussian models.
        """
        y = np.asarray(self.design.y)
        if self.is_generalized:
            values = generalized_residuals(self._rows, y, type)
        else:
            values = linear_residuals(y - self._mu, self._weights, self.sigma, type)
        return pd.Series(values, self.frame.row_index, name=type)

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
        not_estimable: str = "nan",
    ) -> pd.Series | pd.DataFrame:
        """Predict the mean for the fitted rows or for new data.

        Parameters
        ----------
        newdata : table, optional
            With the model's covariates, its offset column if it has one, and for
            conditional predictions its grouping factors.
        re : {"conditional", "population"}
            With the random effects of the levels known, or with all of them zero.
        type : {"response", "link", "class"}
            Mean of the response, for which ``zi=`` and ``dispersion=`` count, or the
            linear predictor of the formula itself. Ordered responses: the probability
            of every level, a column each, or by ``"class"`` the most probable level.
        new_levels : {"zero", "draw", "error"}
            Effects of levels that were not in the data: their mean, a draw from their
            distribution (needs ``key``), or an error that names them.
        se : bool
            Return a frame with columns ``fit`` and ``se`` instead. The standard error
            is that of the mean at the estimated covariance parameters, with the
            variance of an unseen level's effect under ``re="conditional"``.
            Generalized models: with ``re="population"``, by the delta method over all
            fixed effects and the family's own parameters.
        key : int or PRNG key, optional
            For ``new_levels="draw"``: rows of one unseen level share its draw.
        offset : array, optional
            One value per row of newdata, for a model fitted with an array as offset.
        not_estimable : {"nan", "zero"}
            Where collinear columns were dropped: what to predict for rows that the
            data of the fit do not determine, as of a cell without data. NaN, or with
            the dropped columns counted as zero, which depends on how the formula is
            written.

        Returns
        -------
        Series, or DataFrame with ``se=True``
            NaN where a covariate is missing. Ordered responses: a DataFrame, with
            ``se=True`` of columns ``("fit", level)`` and ``("se", level)``.

        Warns
        -----
        NoticeWarning
            With the number of rows that are not estimable, where that gives NaN.
        """
        _choice("re", re, ("conditional", "population"))
        _choice("type", type, ("response", "link", "class"))
        _choice("new_levels", new_levels, ("zero", "draw", "error"))
        _choice("not_estimable", not_estimable, ("nan", "zero"))
        from jaxglmm.inference.predict import predict

        return predict(
            self, newdata, conditional=re == "conditional", new_levels=new_levels,
            se=se, offset=offset, key=key, type=type, not_estimable=not_estimable,
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
            Levels, where the response is a factor, else numbers.
        """
        _choice("re", re, ("population", "conditional"))
        from jaxglmm.inference.simulate import responses

        ys = responses(self, n, key, conditional=re == "conditional")
        columns = {f"sim_{i + 1}": self._as_response(y) for i, y in enumerate(ys)}
        return pd.DataFrame(columns, index=self.frame.row_index)

    def _as_response(self, y: np.ndarray) -> Any:
        """Values (n_obs,) of the response as the data have them."""
        levels, weights = self.frame.response_levels, self.design.weights
        if levels is None or not (has_levels(self) or weights is None):
            return y  # proportions of trials are no levels
        return level_labels(self, y)

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

    def bootstrap(
        self,
        n: int = 1000,
        *,
        key: Any,
        kind: str = "parametric",
        by: str | None = None,
        statistic: Callable[[Fit], Any] | None = None,
        control: Control | None = None,
        tile: int | None = None,
        threads: int | None = None,
        devices: Sequence[Any] | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Bootstrap:
        """Refit samples drawn from the model or from its data.

        Parameters
        ----------
        n : int
            Number of samples.
        key : int or PRNG key
            The same key gives the same samples, whatever the machine.
        kind : {"parametric", "semiparametric", "cases"}
            Responses from the model at its estimates; from its conditional modes and
            residuals, scaled to the estimated covariances (linear models); or whole
            levels of a grouping factor with their rows.
        by : str, optional
            For ``"cases"``, and for BCa intervals: the grouping factor, where factors
            are crossed; else the outermost.
        statistic : callable, optional
            A JAX function of a :class:`Fit` whose value, a number or an array, is
            followed beside the parameters. Use ``jax.numpy`` in it, and no ``float()``.
        control : Control, optional
            That of the fit when left out.
        tile, threads, devices, progress
            As for :func:`jaxglmm.fit_batch`.
        checkpoint : str or Path, optional
            Folder for finished chunks, so that the same call goes on where it was
            stopped.

        Returns
        -------
        Bootstrap
            Replicates of every parameter, with ``confint(method=...)``.

        Warns
        -----
        ConvergenceWarning
            Where the fit itself did not converge.

        Examples
        --------
        >>> import jaxglmm as jg
        >>> m = jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
        >>> b = m.bootstrap(200, key=1, progress=False)
        >>> b.replicates.shape
        (200, 3)
        """
        from jaxglmm.studies.bootstrap import bootstrap
        from jaxglmm.studies.study import Running

        running = Running(tile, threads, devices, progress, checkpoint)
        return bootstrap(self, n, key, kind, by, statistic, control, running)

    def laplace_error(
        self, n: int = 1000, *, key: Any, tol: float = 0.1
    ) -> LaplaceError:
        """Estimate how far the fit's log-likelihood is off, by importance sampling.

        Parameters
        ----------
        n : int
            Number of draws, in pairs; for every independent group of effects.
        key : int or PRNG key
            The same key gives the same answer.
        tol : float
            Error in the log-likelihood that does not matter. An error of 0.1 moves
            -2 log L by 0.2, and so a likelihood-ratio p-value of 0.05 to 0.044 or
            0.056 (one degree of freedom) if the other model has none.

        Returns
        -------
        LaplaceError
            The error, its Monte Carlo standard error, and a verdict in a sentence.

        Raises
        ------
        ValueError
            For linear models, REML and PQL, and with too many crossed effects.

        Notes
        -----
        At the fitted parameters: that the log-likelihood is right there does not say
        that the estimates maximize it. See :mod:`jaxglmm.inference.laplace_error`.
        """
        from jaxglmm.inference.laplace_error import laplace_error

        return laplace_error(self, n, key, tol)

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

        plain = isinstance(self.family, Gaussian)
        variance = (
            self._rows.variance
            if self.is_generalized
            else self.sigma**2 / self._weights
        )
        return model_matrices(
            self.design, self.frame, self.factors, float(self.fit.params.sigma),
            variance, additive=plain and self.family.link == "identity",
        )  # fmt: skip

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
