"""Whether a response lies in the support of its family, which takes these weights.

Host side, NumPy: y (n,), weights (n,) or None. Rows of weight zero are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxglmm.errors import DataError

__all__ = ["ROLES", "SUPPORTS", "check_support", "check_weights", "in_range"]

_SHOWN = 5

#: what the prior weights of a family mean
ROLES = {
    "precision": "weights divide the variance",
    "trials": "weights are the numbers of trials, y being the proportion of successes",
    "replication": "a row of weight w counts as w rows",
}


def _whole(y: np.ndarray) -> np.ndarray:
    return np.abs(y - np.round(y)) <= 1e-7 * np.maximum(1.0, np.abs(y))


#: support -> (test, what it takes)
SUPPORTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "real": (np.isfinite, "finite numbers"),
    "positive": (lambda y: (y > 0) & np.isfinite(y), "numbers above 0"),
    "nonnegative": (lambda y: (y >= 0) & np.isfinite(y), "numbers of at least 0"),
    "unit": (lambda y: (y > 0) & (y < 1), "numbers strictly between 0 and 1"),
    "proportion": (lambda y: (y >= 0) & (y <= 1), "proportions from 0 to 1"),
    "count": (
        lambda y: (y >= 0) & np.isfinite(y) & _whole(np.where(np.isfinite(y), y, 0)),
        "counts 0, 1, 2, ...",
    ),
    "positive count": (
        lambda y: (y >= 1) & np.isfinite(y) & _whole(np.where(np.isfinite(y), y, 0)),
        "counts 1, 2, 3, ...",
    ),
}


def in_range(y: Any, support: str) -> Any:
    """Whether values are in the range of a support, whole or not; traced ones too."""
    if support == "positive":
        return y > 0
    if support in ("nonnegative", "count"):
        return y >= 0
    if support == "positive count":
        return y >= 1
    if support == "unit":
        return (y > 0) & (y < 1)
    if support == "proportion":
        return (y >= 0) & (y <= 1)
    return y == y


def listed(rows: np.ndarray, values: np.ndarray) -> str:
    """Rows and their values in words: ``row 3 has -1, row 8 has 0.5``, and so on."""
    shown = ", ".join(f"row {i} has {values[i]:.6g}" for i in rows[:_SHOWN])
    more = f", and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{len(rows)} of {len(values)} rows (counted from 0): {shown}{more}"


def check_support(
    name: str, y: np.ndarray, weights: np.ndarray | None, inside: np.ndarray, takes: str
) -> None:
    """Raise where ``inside`` is false in a row that counts."""
    used = np.ones(len(y), bool) if weights is None else weights != 0
    rows = np.flatnonzero(used & ~inside)
    if len(rows):
        raise DataError(
            f"family {name!r} takes {takes}, and the response has other values in "
            f"{listed(rows, y)}."
        )


def check_weights(name: str, role: str, weights: np.ndarray | None) -> None:
    """Raise unless the weights are finite and not negative."""
    if weights is None:
        return
    rows = np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))
    if len(rows):
        raise DataError(
            f"for family {name!r} {ROLES[role]}: they must be finite and not negative, "
            f"unlike in {listed(rows, weights)}."
        )


def check_trials(name: str, y: np.ndarray, weights: np.ndarray | None) -> None:
    """Raise unless trials and successes are whole numbers."""
    if weights is None:
        rows = np.flatnonzero((y != 0) & (y != 1))
        if len(rows):
            raise DataError(
                f"family {name!r} found proportions without trials in "
                f"{listed(rows, y)}. Give the numbers of trials as weights, or a "
                "response of cbind(successes, failures); without weights the response "
                "must be 0 or 1."
            )
        return
    rows = np.flatnonzero(~_whole(weights))
    if len(rows):
        raise DataError(
            f"for family {name!r} {ROLES['trials']}: they must be whole numbers, "
            f"unlike in {listed(rows, weights)}."
        )
    successes = y * weights
    rows = np.flatnonzero(np.abs(successes - np.round(successes)) > 1e-3)
    if len(rows):
        raise DataError(
            f"family {name!r} needs whole numbers of successes, and proportion times "
            f"trials is something else in {listed(rows, successes)}. Is the response a "
            "proportion of the trials in the weights?"
        )
