"""Exceptions and warnings, and the status codes of a fit with their sentences.

What shapes, names or dtypes reveal raises at once. What depends on values inside a
compiled function becomes a :class:`Status`, one per lane under ``vmap``.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "CheckpointError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataError",
    "DesignError",
    "FormulaError",
    "JaxGLMMError",
    "NoticeWarning",
    "Status",
]


class JaxGLMMError(Exception):
    """Base class of every error raised on purpose by jaxglmm."""


class FormulaError(JaxGLMMError, ValueError):
    """The formula does not parse, or names something that cannot be fitted."""


class DataError(JaxGLMMError, ValueError):
    """The data cannot be used as the formula asks."""


class DesignError(JaxGLMMError, ValueError):
    """Arrays given to the functional door do not fit together."""


class CheckpointError(JaxGLMMError, RuntimeError):
    """The folder of a study cannot be used, or holds another study."""


class ConvergenceError(JaxGLMMError, RuntimeError):
    """The fit did not converge and ``strict=True`` was asked for."""


class NoticeWarning(UserWarning):
    """A notice: a collinear column was dropped, or float32 data were met."""


class ConvergenceWarning(UserWarning):
    """The fit did not converge; the message says why and what to do."""


class Status(IntEnum):
    """How a fit ended. ``str(status)`` is a sentence.

    CONVERGED, BOUNDARY and LIMIT are answers; the rest say what went wrong. SEPARATED
    is told by the people's door alone, from the data of a fit that did not converge.
    """

    CONVERGED = 0
    BOUNDARY = 1
    MAX_ITER = 2
    NONFINITE = 3
    NOT_IDENTIFIED = 4
    STALLED = 5
    NO_MODE = 6
    LIMIT = 7
    SEPARATED = 8
    OUTSIDE = 9

    @property
    def ok(self) -> bool:
        """True for an optimum: inside, on the boundary, or at a limit."""
        return self in (Status.CONVERGED, Status.BOUNDARY, Status.LIMIT)

    def __str__(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: (
        "converged: the gradient is zero and the Hessian positive definite"
    ),
    Status.BOUNDARY: (
        "converged on the boundary: a variance is zero or a correlation is +-1, and "
        "the one-sided derivatives show that the boundary is the optimum"
    ),
    Status.MAX_ITER: "not converged: the iteration limit was reached",
    Status.NONFINITE: "not converged: the likelihood is not finite",
    Status.NOT_IDENTIFIED: (
        "not converged: the likelihood is flat in some direction, so a parameter is "
        "not identified by these data"
    ),
    Status.NO_MODE: (
        "not converged: the conditional modes of the random effects were not found"
    ),
    Status.LIMIT: (
        "converged at a limit: a parameter of the family, of the zero inflation or of "
        "a truncated mean runs to the end of its range, where the model is a simpler "
        "one and fits best"
    ),
    Status.SEPARATED: (
        "not converged: the covariates separate the responses, so some fixed effects "
        "have no finite maximum likelihood estimate"
    ),
    Status.OUTSIDE: (
        "not converged: some linear predictors belong to no mean, which has to be "
        "positive, or at most 1 for a proportion; use another link"
    ),
    Status.STALLED: "not converged: no further decrease could be found",
}
