"""Families by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxglmm.families.base import CustomFamily, Family
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
from jaxglmm.families.mixtures import WithDispersion, ZeroInflated
from jaxglmm.families.ordinal import Cumulative
from jaxglmm.families.tweedie import Tweedie

__all__ = ["family_by_name", "family_names", "is_linear", "known_family"]

_FAMILIES: dict[str, Callable[..., Family]] = {
    "gaussian": Gaussian,
    "binomial": Binomial,
    "poisson": Poisson,
    "nbinom1": partial(NegativeBinomial, kind=1),
    "nbinom2": partial(NegativeBinomial, kind=2),
    "gamma": Gamma,
    "inverse_gaussian": InverseGaussian,
    "beta": Beta,
    "betabinomial": BetaBinomial,
    "student": Student,
    "tweedie": Tweedie,
    "lognormal": LogNormal,
    "genpois": GeneralizedPoisson,
    "truncated_poisson": TruncatedPoisson,
    "truncated_nbinom1": partial(TruncatedNegativeBinomial, kind=1),
    "truncated_nbinom2": partial(TruncatedNegativeBinomial, kind=2),
    "cumulative": Cumulative,
}


def family_names() -> list[str]:
    """Names that ``family_by_name`` knows."""
    return list(_FAMILIES)


def family_by_name(family: str | Family | None, link: str | None = None) -> Family:
    """Turn a name into a family; a family passes through, None is Gaussian.

    Parameters
    ----------
    family : str, Family or None
    link : str, optional
        Replaces the family's link.

    Raises
    ------
    ValueError
        If the name is unknown, or the family has no such link; the message lists
        those there are.

    Examples
    --------
    >>> family_by_name("binomial", link="probit")
    Binomial(link='probit')
    """
    if family is None:
        family = "gaussian"
    if isinstance(family, str):
        if family.lower() not in _FAMILIES:
            raise ValueError(
                f"unknown family {family!r}; this version knows {', '.join(_FAMILIES)}"
            )
        made = _FAMILIES[family.lower()]()
    elif isinstance(family, Family):
        made = family
    else:
        raise ValueError(
            f"unknown family {family!r}: a family is a name or an instance such as "
            f"Poisson(); this version knows {', '.join(_FAMILIES)}"
        )
    return made if link is None else _with_link(made, link)


def _with_link(family: Family, link: str) -> Family:
    if isinstance(family, ZeroInflated | WithDispersion):
        return dataclasses.replace(family, base=_with_link(family.base, link))
    if isinstance(family, CustomFamily):
        if link == family.link:
            return family
        raise ValueError(
            f"the custom family {family.name!r} takes the linear predictor itself; put "
            f"the link {link!r} into its log_density"
        )
    concrete: Any = family
    return dataclasses.replace(concrete, link=link)


def is_linear(family: Family) -> bool:
    """Whether the family is Gaussian with identity link and one residual variance."""
    return isinstance(family, Gaussian) and family.link == "identity"


def known_family(family: Family) -> bool:
    """Whether its code is this package's own, which keys of compiled programs know."""
    if isinstance(family, ZeroInflated | WithDispersion):
        return known_family(family.base)
    return not isinstance(family, CustomFamily) and type(family).__module__.startswith(
        "jaxglmm."
    )
