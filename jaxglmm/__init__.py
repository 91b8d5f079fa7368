"""jaxglmm: a differentiable mixed-model engine on JAX.

Two doors. For people, ``glmm(formula, data)``: names in, names out. For code, ``fit`` on
a ``Design``: pytrees in, pytrees out, under ``jit``, ``vmap`` and ``grad``.

Names are imported when first used, so ``import jaxglmm`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Control": "fitting",
    "ConvergenceWarning": "errors",
    "DataError": "errors",
    "Design": "designs",
    "DesignError": "errors",
    "Fit": "results",
    "FormulaError": "errors",
    "GLMM": "model",
    "Gaussian": "families",
    "NoticeWarning": "errors",
    "Params": "results",
    "Status": "errors",
    "Structure": "covariance",
    "Term": "designs",
    "clear_cache": "compiled",
    "design": "model",
    "fit": "fitting",
    "glmm": "model",
    "loglik": "fitting",
    "register_structure": "covariance",
    "simulate": "simulation",
}

__all__ = [*_HOMES, "datasets"]

if TYPE_CHECKING:
    from jaxglmm import datasets
    from jaxglmm.compiled import clear_cache
    from jaxglmm.covariance import Structure, register_structure
    from jaxglmm.designs import Design, Term
    from jaxglmm.errors import (
        ConvergenceWarning,
        DataError,
        DesignError,
        FormulaError,
        NoticeWarning,
        Status,
    )
    from jaxglmm.families import Gaussian
    from jaxglmm.fitting import Control, fit, loglik
    from jaxglmm.model import GLMM, design, glmm
    from jaxglmm.results import Fit, Params
    from jaxglmm.simulation import simulate


def __getattr__(name: str) -> Any:
    if name == "datasets":
        return importlib.import_module("jaxglmm.datasets")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"jaxglmm.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'jaxglmm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
