"""Pictures of studies, with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from jaxglmm.studies.bootstrap import Bootstrap
    from jaxglmm.studies.power import PowerCurve
    from jaxglmm.studies.recovery import RecoveryStudy

__all__ = ["plot_bootstrap", "plot_power", "plot_recovery"]


def _axes(ax: Any, **size: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'jaxglmm[plot]'"
        ) from error
    return plt.subplots(**size)[1]


def plot_recovery(study: RecoveryStudy, ax: Any) -> Any:
    """Standardized bias with two Monte Carlo errors, a colour per method."""
    table = study.summary()
    names = study.names
    ax = _axes(ax, figsize=(7.0, 1.0 + 0.4 * len(names)), layout="constrained")
    place = np.arange(len(names))
    methods = list(study.records)
    for k, method in enumerate(methods):
        rows = table[table["method"] == method]
        shift = 0.2 * (k - (len(methods) - 1) / 2.0)
        ax.errorbar(
            rows["bias"] / rows["sd"], place + shift,
            xerr=2.0 * rows["bias_mcse"] / rows["sd"], fmt="o", ms=4, label=method,
        )  # fmt: skip
    ax.axvline(0.0, color="0.6", lw=1, zorder=0)
    ax.set_yticks(place, names)
    ax.invert_yaxis()
    ax.set_xlabel("bias / standard deviation, with two Monte Carlo errors")
    if len(methods) > 1:
        ax.legend()
    return ax


def plot_power(curve: PowerCurve, ax: Any) -> Any:
    """Power against the last thing that varies, a line per combination of others."""
    table = curve.to_frame()
    varied = [c for c in curve.points.columns if len(set(curve.points[c])) > 1]
    x = varied[-1] if varied else None
    ax = _axes(ax, figsize=(6.0, 4.0), layout="constrained")
    others = varied[:-1]
    groups: list[tuple[Any, Any]] = [((), table)]
    if others:
        groups = list(table.groupby(others))
    for name, rows in groups:
        at = np.arange(len(rows)) if x is None else rows[x].astype(float)
        error = [rows["power"] - rows["lower"], rows["upper"] - rows["power"]]
        label = ", ".join(f"{c} {v:g}" for c, v in zip(others, name))
        ax.errorbar(at, rows["power"], yerr=error, marker="o", capsize=3, label=label)
    ax.axhline(0.8, color="0.6", lw=1, ls=":", zorder=0)
    ax.set_ylim(0.0, 1.02)
    ax.set_ylabel(f"power at alpha = {curve.alpha:g}")
    labels = {
        "effect": "effect", "n_levels": "number of groups", "rows": "rows per group",
    }  # fmt: skip
    ax.set_xlabel(labels.get(str(x), ""))
    if x is None:
        ax.set_xticks([])
        ax.set_xlim(-1.0, 1.0)
    ax.set_title(curve.test, fontsize="medium")
    if others:
        ax.legend()
    return ax


def plot_bootstrap(boot: Bootstrap, interval: pd.DataFrame, axes: Any) -> Any:
    """A histogram per quantity, with the estimate and the ends of its interval."""
    names = list(boot.estimate.index)
    n_columns = min(3, len(names))
    n_rows = -(-len(names) // n_columns)
    given = _axes(
        axes, nrows=n_rows, ncols=n_columns, figsize=(3.2 * n_columns, 2.4 * n_rows),
        layout="constrained",
    )  # fmt: skip
    flat = np.ravel(given)
    if len(flat) < len(names):
        raise ValueError(f"axes must hold {len(names)} Axes; found {len(flat)}")
    for spare in flat[len(names) :] if axes is None else ():
        spare.set_axis_off()
    ends = interval[["lower", "upper"]].to_numpy()
    for j, (name, ax) in enumerate(zip(names, flat)):
        draws = boot.replicates.iloc[:, j].to_numpy()
        draws = draws[np.isfinite(draws)]
        if len(draws):
            ax.hist(draws, bins=_bins(draws), color="0.8")
        ax.axvline(boot.estimate.iloc[j], color="C0", label="estimate")
        for end in ends[j][np.isfinite(ends[j])]:
            line = ax.axvline(end, color="C0", ls=":")
            line.set_label("interval" if end == ends[j][0] else "")
        ax.set_title(str(name), fontsize="medium")
        ax.set_yticks([])
    flat[0].legend(fontsize="x-small")
    return flat[: len(names)]


def _bins(draws: np.ndarray) -> int:
    """About sqrt(n), also where all draws are the same but for rounding."""
    spread = np.ptp(draws)
    if spread <= 1e-9 * np.abs(draws).max():
        return 1
    return int(np.clip(np.sqrt(len(draws)), 5, 50))
