"""Fixtures of training runs that several test files compare with."""

from pathlib import Path

import pytest
from helpers.training_runs import run_of, write_files

from jaxlm.training import loop


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="session")
def whole(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    loop.train(run_of(files, out))
    return out
