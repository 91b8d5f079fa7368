"""Response families. A family is a log density of y given its linear predictor."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Family", "Gaussian", "family_by_name"]


@dataclass(frozen=True)
class Family:
    """Base class of the response families."""

    name = "family"
    link = "identity"


@dataclass(frozen=True)
class Gaussian(Family):
    """Normal response with identity link, Var(y_i) = sigma^2 / w_i.

    ``weights`` are precision weights: they divide the variance, as in lme4.
    """

    name = "gaussian"


_FAMILIES: dict[str, type[Family]] = {"gaussian": Gaussian}


def family_by_name(family: str | Family | None) -> Family:
    """Turn a name into a family; a family passes through, None is Gaussian.

    Raises
    ------
    ValueError
        If the name is unknown; the message lists those known.
    """
    if family is None:
        return Gaussian()
    if isinstance(family, tuple(_FAMILIES.values())):
        return family
    if isinstance(family, str) and family.lower() in _FAMILIES:
        return _FAMILIES[family.lower()]()
    raise ValueError(
        f"unknown family {family!r}; this version knows {', '.join(sorted(_FAMILIES))}"
    )
