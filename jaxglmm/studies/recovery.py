"""Recovery studies: simulate at known parameters, fit, compare with the truth.

Of replicates r = 1 ... R that converged, for a parameter of truth t with estimates e_r,
and for fixed effects intervals e_r +- z s_r:

                                               Monte Carlo error
    bias      mean(e) - t                      sd(e) / sqrt(R)
    RMSE      sqrt(mean((e - t)^2))            sd((e - t)^2) / (2 RMSE sqrt(R))
    coverage  share of intervals with t in them      sqrt(c (1 - c) / R)

References: Morris, White, Crowther (2019), Stat. Med. 38(11), doi:10.1002/sim.8086.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxglmm.control import Control
from jaxglmm.designs import Design
from jaxglmm.errors import DesignError, Status
from jaxglmm.families import Family, family_by_name
from jaxglmm.fitting import What, fit_checked
from jaxglmm.results import Params, check_params
from jaxglmm.simulation import simulate
from jaxglmm.studies.arrange import arrange
from jaxglmm.studies.batch import check_batch
from jaxglmm.studies.checkpoint import design_facts
from jaxglmm.studies.lanes import Outcome, check_count
from jaxglmm.studies.parameters import n_fixed, parameter_names, truth_of
from jaxglmm.studies.study import (
    Running,
    as_key,
    record,
    run_study,
    warn_if_lost,
)
from jaxglmm.typing import Array

__all__ = ["RecoveryStudy", "recovery_study"]


@dataclass(frozen=True, repr=False)
class RecoveryStudy:
    """What a recovery study found; made by :func:`recovery_study`.

    Attributes
    ----------
    names : list of str
        Parameters, as lme4's ``confint`` names them.
    truth : array (q,)
    n_fixed : int
        How many of them, at the front, are fixed effects.
    level : float
        Of the intervals whose coverage is counted.
    records : dict
        Method -> arrays by replicate: ``estimate`` (n, q), ``se`` (n, n_fixed),
        ``loglik``, ``status``, ``converged``, ``is_singular``, ``n_iter`` (n,).
    """

    names: list[str]
    truth: np.ndarray
    n_fixed: int
    level: float
    records: dict[str, dict[str, np.ndarray]]

    def to_frame(self) -> pd.DataFrame:
        """One row per method and replicate: status, estimates, standard errors."""
        parts = []
        for method, r in self.records.items():
            n = len(r["status"])
            columns: dict[str, Any] = {
                "method": method,
                "replicate": np.arange(n),
                "status": [Status(int(s)).name for s in r["status"]],
            }
            for name in ("converged", "is_singular", "n_iter", "loglik"):
                columns[name] = r[name]
            for j, name in enumerate(self.names):
                columns[name] = r["estimate"][:, j]
            for j, name in enumerate(self.names[: self.n_fixed]):
                columns[f"se_{name}"] = r["se"][:, j]
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def rates(self) -> pd.DataFrame:
        """Per method: replicates, shares converged and singular, with their errors."""
        rows = []
        for method, r in self.records.items():
            n = len(r["status"])
            row: dict[str, Any] = {"method": method, "n": n}
            for name, flag in (
                ("converged", r["converged"]),
                ("singular", r["is_singular"] & r["converged"]),
            ):
                share = float(np.mean(flag))
                row[name] = share
                row[f"{name}_mcse"] = np.sqrt(share * (1.0 - share) / n)
            rows.append(row)
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """Per method and parameter: bias, RMSE and coverage with Monte Carlo errors.

        Over the replicates that converged (``n``). ``coverage`` is that of Wald
        intervals, for fixed effects; a correlation that a zero variance leaves without
        a meaning does not count.
        """
        z = NormalDist().inv_cdf(0.5 + self.level / 2.0)
        rows = []
        for method, r in self.records.items():
            ok = r["converged"]
            for j, (name, truth) in enumerate(zip(self.names, self.truth)):
                e = r["estimate"][ok, j]
                fine = np.isfinite(e)
                e, n = e[fine], int(fine.sum())
                row = {"method": method, "parameter": name, "truth": truth, "n": n}
                row |= _moments(e - truth)
                if j < self.n_fixed:
                    s = r["se"][ok, j][fine]
                    inside = np.abs(e - truth) <= z * s
                    share = float(np.mean(inside)) if n else np.nan
                    row["mean_se"] = float(np.mean(s)) if n else np.nan
                    row["coverage"] = share
                    row["coverage_mcse"] = np.sqrt(share * (1.0 - share) / max(n, 1))
                rows.append(row)
        columns = [
            "method", "parameter", "truth", "n", "mean", "bias", "bias_mcse", "sd",
            "rmse", "rmse_mcse", "mean_se", "coverage", "coverage_mcse",
        ]  # fmt: skip
        table = pd.DataFrame(rows)
        table["mean"] = table["truth"] + table["bias"]
        return table.reindex(columns=columns)

    def plot(self, ax: Any = None) -> Any:
        """Bias of every parameter in units of its standard deviation, with errors.

        Returns the matplotlib Axes.
        """
        from jaxglmm.studies.plots import plot_recovery

        return plot_recovery(self, ax)

    def __repr__(self) -> str:
        with pd.option_context("display.width", 120, "display.max_columns", None):
            return (
                f"{self.rates().to_string(index=False)}\n\n"
                f"{self.summary().round(4).to_string(index=False)}"
            )


def _moments(error: np.ndarray) -> dict[str, float]:
    n = len(error)
    if n < 2:
        return dict.fromkeys(("bias", "bias_mcse", "sd", "rmse", "rmse_mcse"), np.nan)
    rmse = float(np.sqrt(np.mean(error**2)))
    sd = float(np.std(error, ddof=1))
    spread = float(np.std(error**2, ddof=1))
    return {
        "bias": float(np.mean(error)),
        "bias_mcse": sd / np.sqrt(n),
        "sd": sd,
        "rmse": rmse,
        "rmse_mcse": spread / (2.0 * rmse * np.sqrt(n)) if rmse > 0 else 0.0,
    }


def recovery_study(
    key: Any,
    design: Any,
    params: Params | None = None,
    family: str | Family | None = None,
    n_sims: int = 1000,
    methods: Sequence[str] | None = None,
    *,
    n_quad: int | None = None,
    b: tuple[Array, ...] | None = None,
    covariates: Callable[[Array, Design], Design] | None = None,
    level: float = 0.95,
    names: Sequence[str] | None = None,
    control: Control | None = None,
    tile: int | None = None,
    threads: int | None = None,
    devices: Sequence[Any] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> RecoveryStudy:
    """Simulate responses at known parameters, fit them, and compare.

    Parameters
    ----------
    key : int or PRNG key
        The same key gives the same data, whatever the machine.
    design : Design or GLMM
        Its y is not used. Of a fitted model family, names and, where they are left out,
        truth, method, nodes and control are taken too.
    params : Params
        The truth.
    family : str or Family, optional
        As for :func:`jaxglmm.fit`; of a GLMM its own.
    n_sims : int
        Replicates.
    methods : sequence of str, optional
        Ways to fit the same data, such as ``("Laplace", "AGQ")``; the family's own
        default when left out.
    n_quad : int, optional
        Nodes per effect of ``"AGQ"``.
    b : tuple of Array, (J, k), optional
        Random effects to hold fixed; drawn anew for every replicate when left out.
    covariates : callable, optional
        A JAX function (key, design) -> design that draws covariates anew; shapes and
        grouping stay.
    level : float
        Of the intervals whose coverage is counted.
    names : sequence of str, optional
        Names of the parameters.
    control : Control, optional
    tile, threads, devices, progress
        As for :func:`jaxglmm.fit_batch`.
    checkpoint : str or Path, optional
        Folder for finished chunks, so that the same call goes on where it was stopped.

    Returns
    -------
    RecoveryStudy

    Raises
    ------
    CheckpointError
        If the folder holds a study that differs, or cannot be written.
    DesignError, TypeError, ValueError
        For parameters that do not fit the design or the family, and the like, before
        anything is simulated.

    Examples
    --------
    >>> import jax, jaxglmm as jg
    >>> with jax.enable_x64(True):
    ...     design = jg.design("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    ...     params = jg.fit(design).params
    >>> study = jg.recovery_study(1, design, params, n_sims=200, progress=False)
    >>> study.names
    ['beta[0]', 'sd_z0|term 0', 'sigma']
    >>> m = jg.glmm("Yield ~ 1 + (1 | Batch)", jg.datasets.dyestuff())
    >>> jg.recovery_study(1, m, n_sims=200, progress=False).names
    ['(Intercept)', 'sd_(Intercept)|Batch', 'sigma']
    """
    priors = frame = None
    if hasattr(design, "frame"):
        m = design
        if family is not None:
            raise ValueError("the family is the fitted model's; leave family= out")
        if params is None:
            warn_if_lost(m)
            params = m.fit.params
        methods = (m.method,) if methods is None else methods
        if n_quad is None and "AGQ" in methods:
            n_quad = m.n_quad
        control = m.control if control is None else control
        design, frame, family, priors = m.design, m.frame, m.family, m.priors
    elif not isinstance(design, Design):
        kind = type(design).__name__
        raise TypeError(f"design must be a Design or a fitted GLMM; found {kind}")
    if params is None:
        raise ValueError("recovery_study of a Design needs params=, the truth")
    if family is None and params.psi is not None and not np.size(params.psi):
        raise ValueError(
            "params.psi is there, so this is the truth of a generalized model: say "
            "family="
        )
    family = family_by_name(family)
    n_sims = check_count("n_sims", n_sims)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1; found {level}")
    if isinstance(methods, str):
        methods = (methods,)
    chosen: list[str | None] = [None] if methods is None else list(methods)
    if not chosen:
        raise ValueError("methods is empty; name one, or leave it out")
    if n_quad is not None and "AGQ" not in chosen:
        raise ValueError(f"n_quad={n_quad} is for methods=('AGQ',); leave it out")
    truth: Params = jax.tree.map(np.asarray, params)
    b = jax.tree.map(np.asarray, b)
    running = Running(tile, threads, devices, progress, checkpoint)
    prng, records = as_key(key), {}
    check_params(truth, design, 0 if truth.psi is None else family.n_own)
    labels = parameter_names(design, family, truth.psi is not None, frame)
    if names is not None:
        labels = _checked_names(names, len(labels))
    fits = [
        check_batch(
            design, family, method, n_quad if method == "AGQ" else None, priors, control
        )
        for method in chosen
    ]
    for what, checked in fits:
        facts = {
            **design_facts(checked), "params": truth, "effects": b, "key": prng,
            "covariates": covariates,
        }  # fmt: skip
        # covariates drawn anew belong to rows in their own order
        parts = checked, None if covariates else arrange(checked)
        records[what.method] = run_study(
            _replicate, what, (covariates,), (*parts, truth, b, prng), checked,
            n_sims, running, label=f"recovery, {what.method}", facts=facts,
            folder=what.method, own_code=covariates is None,
        )  # fmt: skip
    values = truth_of(truth, design, family)
    return RecoveryStudy(labels, values, n_fixed(design), level, records)


def _checked_names(names: Sequence[str], n: int) -> list[str]:
    labels = [str(name) for name in names]
    if len(labels) != n or len(set(labels)) < n:
        raise ValueError(f"names must hold {n} names, each once; found {labels}")
    return labels


def _replicate(what: What, covariates, shared, i, max_iter) -> Outcome:
    design, arranged, params, b, key = shared
    key_y: Array = key.replicate(i)
    if covariates is not None:
        key_x, key_y = jax.random.split(key_y)
        design = _drawn(covariates(key_x, design), design)
    y = simulate(key_y, params, design, what.family, b=b)
    data = design.replace(y=y) if arranged is None else arranged.with_response(y)
    fit = fit_checked(what, data, None, max_iter)
    return Outcome(record(fit, design, what.family), fit.n_iter, fit.converged)


def _drawn(found: Any, design: Design) -> Design:
    """What a user's function made of the design, if it is one of the same shape."""
    if not isinstance(found, Design):
        raise TypeError(
            f"covariates must return a Design; found {type(found).__name__}. As in "
            "design.replace(X=...)"
        )
    shapes = [[jnp.shape(x) for x in jax.tree.leaves(d)] for d in (found, design)]
    if shapes[0] != shapes[1]:
        raise DesignError(
            f"covariates must keep the shapes of the design, {shapes[1]}; found "
            f"{shapes[0]}"
        )
    return found
