"""Fixtures of every tier. This folder is on sys.path: `from helpers.tiny_models import tiny`."""

import contextlib
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import helpers.shape_checks  # noqa: F401  # install_import_hook names it
import pytest
from helpers.published import SHARED
from jaxtyping import install_import_hook

# The tests leave the user's caches alone. Programs are compiled once for all processes and runs: compiling is three
# quarters of a first run. Another folder may be set beforehand.
CACHE = tempfile.TemporaryDirectory(prefix="jaxlm-tests-")
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "xla"
os.environ["XDG_CACHE_HOME"] = CACHE.name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Eight devices made of one CPU, for meshes; everything else runs on the first, for a default device is no mesh.
os.environ["JAX_DEFAULT_DEVICE"] = "cpu"
# Optimizations are most of a compilation, and small programs need none: LLVM's, and the fusions of jax 0.10 (later
# versions do not have the flag). One module for LLVM instead of 32 saves a quarter of the rest there. The oracle tier
# compiles as users do.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
FLAGS = [] if os.environ.get("JAXLM_OPTIMIZED") else QUICK
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), *FLAGS, "--xla_force_host_platform_device_count=8"]
)

# Shapes and dtypes that jaxlm.nn annotates are checked while programs are traced: about 8 % of the time of tests/nn.
if not os.environ.get("JAXLM_OPTIMIZED"):  # the oracle tier runs the package as users do
    install_import_hook("jaxlm.nn", "helpers.shape_checks.check")


def pytest_configure() -> None:
    """Programs of days ago, most of them of code that has changed since, make room."""
    for path in PROGRAMS.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - 3 * 24 * 3600:
                path.unlink()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data (checkpoints, tokenizers, configs): ../shared/data, or what JAXLM_SHARED names."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is absent: {SHARED} (set JAXLM_SHARED to its folder)")
    return SHARED
