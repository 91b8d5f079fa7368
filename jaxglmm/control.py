"""How to optimize: one frozen record, hashable, so that jit can take it as static."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Control"]


@dataclass(frozen=True)
class Control:
    """How to optimize.

    Parameters
    ----------
    optimizer : str or optax.GradientTransformation
        ``"newton"`` (default; trust radius, exact Hessian), ``"lbfgs"``, the name of
        another optax optimizer such as ``"adam"``, or an optax transformation.
    max_iter : int, optional
        Largest number of evaluations; 50 for Newton, 500 for L-BFGS, 5,000 otherwise.
    tol : float, optional
        Newton: decrement grad' hess^-1 grad at which to stop, eps^0.8 by default (1e-8
        for large crossed designs). optax: largest gradient element over the objective
        at which to stop, eps^0.6 by default; the verdict asks for a decrement of 1e-8
        (or of tol, where that is larger).
    information : {"observed", "expected"}
        The information in the log-determinant of the Laplace approximation. Observed
        is exact; expected is what lme4 uses, which differs where the link is not
        canonical.
    learning_rate : float, optional
        For an optax optimizer given by name; L-BFGS finds its own when left out.
    working_model : {"REML", "ML"}
        How ``method="PQL"`` estimates the covariance parameters of its working model.

    Raises
    ------
    ValueError
        For a limit that is not positive, or a learning rate that nothing would use.
    """

    optimizer: Any = "newton"
    max_iter: int | None = None
    tol: float | None = None
    learning_rate: float | None = None
    information: str = "observed"
    working_model: str = "REML"

    def __post_init__(self):
        for name, kind in (("max_iter", int), ("tol", float), ("learning_rate", float)):
            value = getattr(self, name)
            if value is None:
                continue
            number = kind(value) if np.ndim(value) == 0 else -1
            if not number > 0 or number != value:
                what = "a positive integer" if kind is int else "a positive number"
                raise ValueError(f"Control: {name} must be {what}; found {value!r}")
            object.__setattr__(self, name, number)
        choices = {
            "information": ("observed", "expected"),
            "working_model": ("REML", "ML"),
        }
        for name, (a, b) in choices.items():
            if getattr(self, name) not in (a, b):
                found = getattr(self, name)
                raise ValueError(
                    f"Control: {name} must be {a!r} or {b!r}; found {found!r}"
                )
        named = isinstance(self.optimizer, str) and self.optimizer != "newton"
        if self.learning_rate is not None and not named:
            raise ValueError(
                "Control: learning_rate is for an optax optimizer given by name; "
                f"{self.optimizer!r} does not use it"
            )
