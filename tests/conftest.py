"""Fixtures for every tier. The folder of this file is on sys.path: `from recordings.weights import draw` works."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data (checkpoints, tokenizers, configs): ../shared/data, or what JAXLM_SHARED names."""
    folder = Path(os.environ.get("JAXLM_SHARED") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data is absent: {folder} (set JAXLM_SHARED to its folder)")
    return folder
