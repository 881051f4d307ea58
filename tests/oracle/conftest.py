"""Fixtures of the oracle tier."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real GGUF files that JAXLM_REAL_MODELS names."""
    folder = Path(os.environ.get("JAXLM_REAL_MODELS", ""))
    if not os.environ.get("JAXLM_REAL_MODELS") or not folder.is_dir():
        pytest.skip("real models are absent: set JAXLM_REAL_MODELS to their folder")
    return folder
