"""jaxglmm: a differentiable mixed-model engine on JAX.

Two doors. For people, ``glmm(formula, data)``: names in, names out. For code, ``fit``
on a ``Design``: pytrees in, pytrees out, under ``jit``, ``vmap`` and ``grad``.

Names are imported when first used, so ``import jaxglmm`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Control": "control",
    "CheckpointError": "errors",
    "ConvergenceError": "errors",
    "ConvergenceWarning": "errors",
    "DataError": "errors",
    "Design": "designs",
    "DesignError": "errors",
    "Fit": "results",
    "FormulaError": "errors",
    "GLMM": "model",
    "Beta": "families",
    "BetaBinomial": "families",
    "Binomial": "families",
    "Cumulative": "families",
    "Family": "families",
    "Gamma": "families",
    "Gaussian": "families",
    "GeneralizedPoisson": "families",
    "InverseGaussian": "families",
    "LogNormal": "families",
    "NegativeBinomial": "families",
    "Poisson": "families",
    "Predictor": "designs",
    "Student": "families",
    "TruncatedNegativeBinomial": "families",
    "TruncatedPoisson": "families",
    "Tweedie": "families",
    "WithDispersion": "families",
    "ZeroInflated": "families",
    "NoticeWarning": "errors",
    "Params": "results",
    "Status": "errors",
    "Structure": "covariance",
    "Term": "designs",
    "bootstrap_lrt": "studies.nested",
    "clear_cache": "compiled",
    "design": "doors",
    "fit": "fitting",
    "fit_batch": "studies.batch",
    "glmm": "doors",
    "loglik": "fitting",
    "power": "studies.power",
    "power_curve": "studies.power",
    "recovery_study": "studies.recovery",
    "register_structure": "covariance",
    "simulate": "simulation",
}

__all__ = [*_HOMES, "datasets"]

if TYPE_CHECKING:
    from jaxglmm import datasets as datasets
    from jaxglmm.compiled import clear_cache as clear_cache
    from jaxglmm.control import Control as Control
    from jaxglmm.covariance import Structure as Structure
    from jaxglmm.covariance import register_structure as register_structure
    from jaxglmm.designs import Design as Design
    from jaxglmm.designs import Predictor as Predictor
    from jaxglmm.designs import Term as Term
    from jaxglmm.doors import design as design
    from jaxglmm.doors import glmm as glmm
    from jaxglmm.errors import CheckpointError as CheckpointError
    from jaxglmm.errors import ConvergenceError as ConvergenceError
    from jaxglmm.errors import ConvergenceWarning as ConvergenceWarning
    from jaxglmm.errors import DataError as DataError
    from jaxglmm.errors import DesignError as DesignError
    from jaxglmm.errors import FormulaError as FormulaError
    from jaxglmm.errors import NoticeWarning as NoticeWarning
    from jaxglmm.errors import Status as Status
    from jaxglmm.families import Beta as Beta
    from jaxglmm.families import BetaBinomial as BetaBinomial
    from jaxglmm.families import Binomial as Binomial
    from jaxglmm.families import Cumulative as Cumulative
    from jaxglmm.families import Family as Family
    from jaxglmm.families import Gamma as Gamma
    from jaxglmm.families import Gaussian as Gaussian
    from jaxglmm.families import GeneralizedPoisson as GeneralizedPoisson
    from jaxglmm.families import InverseGaussian as InverseGaussian
    from jaxglmm.families import LogNormal as LogNormal
    from jaxglmm.families import NegativeBinomial as NegativeBinomial
    from jaxglmm.families import Poisson as Poisson
    from jaxglmm.families import Student as Student
    from jaxglmm.families import TruncatedNegativeBinomial as TruncatedNegativeBinomial
    from jaxglmm.families import TruncatedPoisson as TruncatedPoisson
    from jaxglmm.families import Tweedie as Tweedie
    from jaxglmm.families import WithDispersion as WithDispersion
    from jaxglmm.families import ZeroInflated as ZeroInflated
    from jaxglmm.fitting import fit as fit
    from jaxglmm.fitting import loglik as loglik
    from jaxglmm.model import GLMM as GLMM
    from jaxglmm.results import Fit as Fit
    from jaxglmm.results import Params as Params
    from jaxglmm.simulation import simulate as simulate
    from jaxglmm.studies.batch import fit_batch as fit_batch
    from jaxglmm.studies.nested import bootstrap_lrt as bootstrap_lrt
    from jaxglmm.studies.power import power as power
    from jaxglmm.studies.power import power_curve as power_curve
    from jaxglmm.studies.recovery import recovery_study as recovery_study


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
