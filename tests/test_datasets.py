"""The bundled data sets have the sizes and factors of their sources."""

import pandas as pd
import pytest

import jaxglmm as jg

SIZES = {
    "sleepstudy": (180, {"Subject": 18}),
    "cbpp": (56, {"herd": 15, "period": 4}),
    "dyestuff": (30, {"Batch": 6}),
    "dyestuff2": (30, {"Batch": 6}),
    "penicillin": (144, {"plate": 24, "sample": 6}),
    "pastes": (60, {"batch": 10, "cask": 3, "sample": 30}),
    "grouseticks": (403, {"INDEX": 403, "BROOD": 118, "YEAR": 3, "LOCATION": 63}),
    "contraception": (1934, {"district": 60, "use": 2, "livch": 4, "urban": 2}),
    "salamanders": (644, {"site": 23, "mined": 2, "spp": 7}),
    "owls": (599, {"Nest": 27, "FoodTreatment": 2, "SexParent": 2}),
}


def test_all_are_listed():
    assert jg.datasets.names() == sorted(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_levels(name):
    n, factors = SIZES[name]
    data = getattr(jg.datasets, name)()
    assert len(data) == n
    for column, levels in factors.items():
        assert isinstance(data[column].dtype, pd.CategoricalDtype)
        assert len(data[column].cat.categories) == levels
        assert data[column].nunique() == levels
    assert getattr(jg.datasets, name).__doc__
    assert any(ch.isdigit() for ch in jg.datasets.citation(name))
    pd.testing.assert_frame_equal(data, jg.datasets.load(name))


def test_known_values():
    data = jg.datasets.sleepstudy()
    assert data.loc[0].tolist() == [249.56, 0, "308"]
    assert jg.datasets.cbpp()["incidence"].sum() == 99
    assert jg.datasets.grouseticks()["TICKS"].sum() == 2567
    assert round(jg.datasets.dyestuff()["Yield"].mean(), 4) == 1527.5


def test_each_call_gives_a_fresh_frame():
    data = jg.datasets.dyestuff()
    data["Yield"] = 0.0
    assert jg.datasets.dyestuff()["Yield"].min() > 0


def test_unknown_name():
    with pytest.raises(ValueError, match="no data set 'sleep'; there are cbpp"):
        jg.datasets.load("sleep")
    with pytest.raises(ValueError, match="no data set 'sleep'"):
        jg.datasets.citation("sleep")
