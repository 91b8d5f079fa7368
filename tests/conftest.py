"""Test settings: float64, strict promotion, compiled programs kept for the session.

Most of the time of a test goes into compiling a program that then runs once, so XLA is
asked for quick compilation and slower code. ``XLA_FLAGS= pytest`` compiles as users do.
"""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # unknown to later
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAXGLMM_CACHE_DIR" not in os.environ:  # workers find that of their parent
    os.environ["JAXGLMM_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxglmm-tests-")
    atexit.register(shutil.rmtree, os.environ["JAXGLMM_CACHE_DIR"], True)

import jax
import numpy as np
import pytest

import jaxglmm as jg

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


MOST_MAPS = 20_000  # Linux allows a process 65,530, and a module may take half of them


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
    """Let go of what JAX compiled, where the process holds too many memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def sleepstudy():
    return jg.datasets.sleepstudy()


@pytest.fixture(scope="session")
def sleep_design(sleepstudy):
    return jg.design("Reaction ~ Days + (Days | Subject)", sleepstudy)


@pytest.fixture
def rng():
    return np.random.default_rng(20240607)
