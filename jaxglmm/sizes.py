"""Numbers too large or too small to compute with, named before anything is fitted.

A linear model squares its response, others take powers of it that their variance asks
for; weights that count rows cannot exceed the integers that float64 tells apart; and an
offset must leave something of the response (identity link), or of the mean (links that
are logarithms). Columns are looked at where they are made,
:func:`jaxglmm.collinear.check_sizes`.
"""

from __future__ import annotations

import numpy as np

from jaxglmm import data as tables
from jaxglmm.encoding import ModelFrame
from jaxglmm.errors import DataError
from jaxglmm.families import Family, is_linear

__all__ = ["check_numbers"]

EPS = float(np.finfo(np.float64).eps)
LARGEST = {  # response by family; its inverse is the smallest
    "gaussian": 1e100,
    "inverse_gaussian": 1e50,  # its variance is the cube of the mean
    "lognormal": np.inf,
}
COUNT = 1e15  # counts and weights beyond cannot be told from their neighbours
SHARE = 1e-12  # a row whose weight is this part of the largest does not count
LINK = 1e3  # spread of an offset on a link of logarithms, whose mean is exp(it)
LOGARITHMIC = ("log", "logit", "probit", "cloglog")


def check_numbers(frame: ModelFrame, family: Family) -> None:
    """Refuse response, weights and offset of extreme size.

    Raises
    ------
    DataError
        Naming what was found, and where.
    """
    linear = is_linear(family)
    if frame.response_levels is None:
        _check_size(frame, f"the response {frame.response_name}", frame.y,
                    *_limits(family, linear))  # fmt: skip
    offsets = {"the offset": frame.offset}
    offsets |= {f"the offset of {p.name}": p.offset for p in frame.others}
    for what, offset in offsets.items():
        if offset is not None:
            _check_size(frame, what, offset, 0.0, 1e150)
    if frame.weights is not None and linear:
        _check_share(frame)
    elif frame.weights is not None:
        _check_size(frame, "the weights", frame.weights, 1 / COUNT, COUNT)
    if frame.offset is not None and frame.response_levels is None:
        _check_offset(frame, family.link)


def _limits(family: Family, linear: bool) -> tuple[float, float]:
    """Least and largest size of the response."""
    if linear:
        return 1e-150, 1e150
    if family.support in ("count", "positive count"):
        return 0.0, COUNT
    largest = LARGEST.get(family.name, LARGEST["gaussian"])
    return 1.0 / largest, largest


def _where(frame: ModelFrame, values: np.ndarray) -> str:
    """Largest value, and the rows that have it."""
    top = np.max(np.abs(values))
    where = tables.show_rows(np.abs(values) == top, frame.kept)
    return f"{top:.3g}, in {where}"


def _check_size(
    frame: ModelFrame, what: str, values: np.ndarray, least: float, most: float
) -> None:
    top = float(np.max(np.abs(values)))
    if top and not least <= top <= most:
        raise DataError(
            f"the largest of {what} is {_where(frame, values)}. Sizes from "
            f"{least:.0g} to {most:.0g} can be computed with: give it in another unit."
        )


def _check_share(frame: ModelFrame) -> None:
    """Refuse weights that leave fewer rows than there are fixed effects."""
    weights, p = frame.weights, frame.X.shape[1]
    assert weights is not None
    _check_size(frame, "the weights", weights, 0.0, 1e300)
    few = int(np.count_nonzero(weights > SHARE * weights.max()))
    if few <= p:
        raise DataError(
            f"the largest of the weights is {_where(frame, weights)}, beside which but "
            f"{few} of {len(weights)} rows count, for {p} fixed effects. Correct it, "
            "or remove the rows that do not count."
        )


def _check_offset(frame: ModelFrame, link: str) -> None:
    y, offset = frame.y, frame.offset
    assert offset is not None
    name, top = frame.response_name, float(np.max(np.abs(offset)))
    if link in ("identity", "log"):
        with np.errstate(all="ignore"):
            target = y if link == "identity" else np.log(y)
        if np.max(np.abs(target - offset)) <= 4.0 * EPS * top:
            what = name if link == "identity" else f"log({name})"
            raise DataError(
                f"the offset equals {what}, the response itself, so nothing is left to "
                "explain. Leave it out, or take the known part of the mean instead."
            )
    largest = f"the largest of the offset is {_where(frame, offset)}"
    if link == "identity" and EPS * top > 1e-3 * float(np.ptp(y)):
        raise DataError(
            f"{largest}, where {name} spans {np.ptp(y):.3g}: rounding loses the "
            "response in their difference. Give both in the same unit."
        )
    if link in LOGARITHMIC and (np.ptp(offset) > LINK or EPS * top > 1e-6):
        raise DataError(
            f"{largest}, on the scale of the {link} link, where no mean is that large. "
            "Give it in another unit, for instance its logarithm."
        )
