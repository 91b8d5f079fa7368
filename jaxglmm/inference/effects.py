"""What the random effects add to the linear predictor, sum_t z_i . b_t[group_i]."""

from __future__ import annotations

import numpy as np

__all__ = ["random_part"]


def random_part(z, group, b, *, unseen=None) -> np.ndarray:
    """Sum over terms of z_i . b[group_i], (n,).

    ``unseen[t]`` (n, k) stands in where the code is -1; zero when left out.
    """
    total = np.zeros(len(z[0]))
    for t, (zt, gt, bt) in enumerate(zip(z, group, b)):
        effects = bt[np.maximum(gt, 0)]
        other = 0.0 if unseen is None else unseen[t]
        effects = np.where((gt >= 0)[:, None], effects, other)
        total += np.sum(zt * effects, axis=1)
    return total
