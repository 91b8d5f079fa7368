"""Small published data sets, each as a pandas frame with its citation.

Factors come as categoricals in the order of levels their source gives. ``names()``
lists the sets, ``citation(name)`` says where one comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources

import pandas as pd

__all__ = [
    "cbpp",
    "citation",
    "contraception",
    "dyestuff",
    "dyestuff2",
    "grouseticks",
    "load",
    "names",
    "owls",
    "pastes",
    "penicillin",
    "salamanders",
    "sleepstudy",
]


@dataclass(frozen=True)
class _Source:
    citation: str
    factors: dict[str, list[str] | None] = field(default_factory=dict)


_SPECIES = ["GP", "PR", "DM", "EC-A", "EC-L", "DES-L", "DF"]

_SOURCES: dict[str, _Source] = {
    "sleepstudy": _Source(
        "Belenky et al. (2003), J. Sleep Res. 12, 1-12: mean reaction time (ms) of 18 "
        "subjects on 10 days, sleep restricted to 3 hours a night from day 1 on. "
        "doi:10.1046/j.1365-2869.2003.00337.x",
        {"Subject": None},
    ),
    "cbpp": _Source(
        "Lesnoff et al. (2004), Prev. Vet. Med. 64, 27-40: new serological cases of "
        "contagious bovine pleuropneumonia in 15 zebu herds over 4 periods. "
        "doi:10.1016/j.prevetmed.2004.03.005",
        {"herd": [str(i) for i in range(1, 16)], "period": ["1", "2", "3", "4"]},
    ),
    "dyestuff": _Source(
        "Davies and Goldsmith (1972), Statistical Methods in Research and Production, "
        "4th ed., table 6.4: yield (grams) of dyestuff from 6 batches.",
        {"Batch": None},
    ),
    "dyestuff2": _Source(
        "Box and Tiao (1973), Bayesian Inference in Statistical Analysis, table 5.1.4: "
        "simulated yields whose between-batch variance is estimated as zero.",
        {"Batch": None},
    ),
    "penicillin": _Source(
        "Davies and Goldsmith (1972), Statistical Methods in Research and Production, "
        "4th ed., table 6.6: growth inhibition (mm), 6 samples on 24 plates.",
        {"plate": None, "sample": None},
    ),
    "pastes": _Source(
        "Davies and Goldsmith (1972), Statistical Methods in Research and Production, "
        "4th ed., table 6.5: strength of a chemical paste, casks within batches.",
        {"batch": None, "cask": None, "sample": None},
    ),
    "grouseticks": _Source(
        "Elston et al. (2001), Parasitology 122, 563-569: ticks on the heads of red "
        "grouse chicks. doi:10.1017/S0031182001007740",
        {"INDEX": None, "BROOD": None, "YEAR": ["95", "96", "97"], "LOCATION": None},
    ),
    "contraception": _Source(
        "Huq and Cleland (1990), Bangladesh Fertility Survey 1989: contraceptive use "
        "of 1,934 women in 60 districts; age is centred.",
        {
            "woman": None,
            "district": None,
            "use": ["N", "Y"],
            "livch": ["0", "1", "2", "3+"],
            "urban": ["N", "Y"],
        },
    ),
    "salamanders": _Source(
        "Price et al. (2016), Ecology 97, 3420-3432: salamander counts at 23 streams, "
        "with and without mountaintop mining. doi:10.1002/ecy.1585",
        {"site": None, "mined": ["yes", "no"], "spp": _SPECIES},
    ),
    "owls": _Source(
        "Roulin and Bersier (2007), Anim. Behav. 74, 1099-1106: begging calls of barn "
        "owl nestlings. doi:10.1016/j.anbehav.2006.12.027",
        {
            "Nest": None,
            "FoodTreatment": ["Deprived", "Satiated"],
            "SexParent": ["Female", "Male"],
        },
    ),
}


def names() -> list[str]:
    """Names of the bundled data sets."""
    return sorted(_SOURCES)


def citation(name: str) -> str:
    """Where a data set comes from."""
    return _find(name).citation


def _find(name: str) -> _Source:
    if name not in _SOURCES:
        raise ValueError(f"no data set {name!r}; there are {', '.join(names())}")
    return _SOURCES[name]


def load(name: str) -> pd.DataFrame:
    """Load a data set by name.

    Examples
    --------
    >>> load("dyestuff").shape
    (30, 2)
    """
    source = _find(name)
    file = resources.files("jaxglmm") / "data_sets" / f"{name}.csv"
    with file.open("r") as lines:
        frame = pd.read_csv(lines, dtype={c: str for c in source.factors})
    for column, levels in source.factors.items():
        values = frame[column]
        levels = sorted(values.unique(), key=_natural) if levels is None else levels
        frame[column] = pd.Categorical(values, categories=levels)
    return frame


def _natural(level: str) -> tuple[int, float, str]:
    """Numbers by value before text by letter."""
    return (0, float(level), "") if level.isdigit() else (1, 0.0, level)


def sleepstudy() -> pd.DataFrame:
    """Reaction times under sleep deprivation: Reaction, Days, Subject."""
    return load("sleepstudy")


def cbpp() -> pd.DataFrame:
    """Pleuropneumonia in zebu herds: herd, incidence, size, period."""
    return load("cbpp")


def dyestuff() -> pd.DataFrame:
    """Yield of dyestuff by batch: Batch, Yield."""
    return load("dyestuff")


def dyestuff2() -> pd.DataFrame:
    """Simulated yields with no variance between batches: Batch, Yield."""
    return load("dyestuff2")


def penicillin() -> pd.DataFrame:
    """Growth inhibition, crossed: diameter, plate, sample."""
    return load("penicillin")


def pastes() -> pd.DataFrame:
    """Paste strength, nested: strength, batch, cask, sample."""
    return load("pastes")


def grouseticks() -> pd.DataFrame:
    """Ticks on grouse chicks: INDEX, TICKS, BROOD, HEIGHT, YEAR, LOCATION, cHEIGHT."""
    return load("grouseticks")


def contraception() -> pd.DataFrame:
    """Contraceptive use in Bangladesh: woman, district, use, livch, age, urban."""
    return load("contraception")


def salamanders() -> pd.DataFrame:
    """Salamander counts: site, mined, cover, sample, DOP, Wtemp, DOY, spp, count."""
    return load("salamanders")


def owls() -> pd.DataFrame:
    """Begging calls of owlets: Nest, FoodTreatment, SexParent, and five numbers."""
    return load("owls")
