"""Predictions of ordered responses: a probability for every level of the response.

    P(y = k | eta) = F(tau_k - eta) - F(tau_{k-1} - eta)

Columns k are in the order of the levels, rows those of the other predictions; the class
is the level that is most probable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jaxglmm.families import Cumulative
from jaxglmm.inference.rows import Means, category_means

if TYPE_CHECKING:
    from jaxglmm.model import GLMM

__all__ = ["has_levels", "level_labels", "most_probable", "probabilities"]


def has_levels(m: GLMM) -> bool:
    """Whether predictions are of levels instead of a mean."""
    return isinstance(m.family, Cumulative) and m.frame.response_levels is not None


def level_labels(m: GLMM, codes: np.ndarray) -> pd.Categorical:
    """Level codes (n,) as the response had them; -1 is missing."""
    return pd.Categorical.from_codes(
        codes.astype(int), m.frame.response_levels, ordered=has_levels(m)
    )


def probabilities(
    m: GLMM,
    eta: np.ndarray,
    index: pd.Index,
    se: Callable[[Means], np.ndarray] | None,
) -> pd.DataFrame:
    """Probabilities (n, levels) at eta (n,); with ``se`` below "fit", and "se" too."""
    levels = pd.Index(m.frame.response_levels)
    means = category_means(m.family, eta[:, None], m.fit.params.psi)
    fit = pd.DataFrame(np.stack([v.mu for v in means], axis=1), index, levels)
    if se is None:
        return fit
    sizes = np.stack([se(v) for v in means], axis=1)
    return pd.concat({"fit": fit, "se": pd.DataFrame(sizes, index, levels)}, axis=1)


def most_probable(m: GLMM, table: pd.DataFrame) -> pd.Series:
    """The most probable level of every row; missing where there are no numbers."""
    p = table.to_numpy()
    known = ~np.isnan(p).any(axis=1)
    codes = np.where(known, np.nan_to_num(p).argmax(axis=1), -1)
    return pd.Series(level_labels(m, codes), table.index, name="class")
