"""What the random effects add to the linear predictor, sum_t z_i . b_t[group_i]."""

from __future__ import annotations

import numpy as np

__all__ = ["linear_predictors", "random_part"]


def linear_predictors(design, fit, *, conditional: bool = True) -> np.ndarray:
    """Linear predictors of every row, (n, R), at the conditional modes or at zero."""
    parts = [(design.X, design.offset), *((p.X, p.offset) for p in design.others)]
    out = []
    for r, ((X, offset), beta) in enumerate(
        zip(parts, (fit.params.beta, *fit.params.others))
    ):
        eta = X @ np.asarray(beta)
        if offset is not None:
            eta = eta + offset
        mine = [i for i, t in enumerate(design.terms) if t.predictor == r]
        if mine and conditional:
            terms = [design.terms[i] for i in mine]
            b = [fit.b[i] for i in mine]
            eta = eta + random_part([t.z for t in terms], [t.group for t in terms], b)
        out.append(eta)
    return np.stack(out, axis=1)


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
