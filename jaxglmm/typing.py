"""Array aliases and the dimension glossary.

n       rows of data
p       columns of X
k       effects per level of one term; K of one grouping factor (all its terms)
J       levels of a grouping factor
q       effects in all, sum of J K
m       covariance parameters theta
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import numpy as np

__all__ = ["Array", "ArrayLike"]

Array: TypeAlias = Any  # a JAX array or tracer, or a NumPy array on the host
ArrayLike: TypeAlias = jax.Array | np.ndarray | float | int
