"""Test settings: float64, strict promotion, compiled programs kept for the session."""

import os
import tempfile

os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault(
    "JAXGLMM_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"jaxglmm-tests-{os.getuid()}"),
)

import jax
import numpy as np
import pytest

import jaxglmm as jg

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def sleepstudy():
    return jg.datasets.sleepstudy()


@pytest.fixture(scope="session")
def sleep_design(sleepstudy):
    return jg.design("Reaction ~ Days + (Days | Subject)", sleepstudy)


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)
