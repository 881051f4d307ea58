"""Fixtures for every tier. The folder of this file is on sys.path: `from recordings.weights import draw` works."""

import os
import tempfile
from pathlib import Path

import pytest

# The tests leave the user's caches alone, and compile a program once a run: all processes of a run share a folder, and
# several runs one that is set beforehand.
CACHE = tempfile.TemporaryDirectory(prefix="jaxlm-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{CACHE.name}/xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Eight devices made of one CPU, for meshes; everything else runs on the first, for a default device is no mesh.
os.environ["JAX_DEFAULT_DEVICE"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data (checkpoints, tokenizers, configs): ../shared/data, or what JAXLM_SHARED names."""
    folder = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data is absent: {folder} (set JAXLM_SHARED to its folder)")
    return folder
