"""Response families. A family is a log density of y given its linear predictors.

links                g and its inverse
special, deviances   careful functions with short derivative rules
base                 the interface, and custom families from a log density
continuous           Gaussian, Student, LogNormal, Gamma, InverseGaussian, Beta
binary, counts       proportions of trials; counts and truncated counts
ordinal              Cumulative
mixtures             ZeroInflated (and hurdle), WithDispersion
names, checks        families by name; is y in the support?
"""

from jaxglmm.families.base import Family
from jaxglmm.families.binary import BetaBinomial, Binomial
from jaxglmm.families.continuous import (
    Beta,
    Gamma,
    Gaussian,
    InverseGaussian,
    LogNormal,
    Student,
)
from jaxglmm.families.counts import (
    GeneralizedPoisson,
    NegativeBinomial,
    Poisson,
    TruncatedNegativeBinomial,
    TruncatedPoisson,
)
from jaxglmm.families.links import LINKS, Link
from jaxglmm.families.mixtures import WithDispersion, ZeroInflated
from jaxglmm.families.names import family_by_name, family_names, is_linear, known_family
from jaxglmm.families.ordinal import Cumulative
from jaxglmm.families.tweedie import Tweedie

__all__ = [
    "LINKS",
    "Beta",
    "BetaBinomial",
    "Binomial",
    "Cumulative",
    "Family",
    "Gamma",
    "Gaussian",
    "GeneralizedPoisson",
    "InverseGaussian",
    "Link",
    "LogNormal",
    "NegativeBinomial",
    "Poisson",
    "Student",
    "TruncatedNegativeBinomial",
    "TruncatedPoisson",
    "Tweedie",
    "WithDispersion",
    "ZeroInflated",
    "family_by_name",
    "family_names",
    "is_linear",
    "known_family",
]
