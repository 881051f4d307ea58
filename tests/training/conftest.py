"""Fixtures of training runs that several tests compare with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.training_runs import quick_runs, run_of, shared_programs, write_files

from jaxlm.training import loop


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Equal runs of a file compile once, and no run measures or plots."""
    with shared_programs(), quick_runs():
        yield


@pytest.fixture(scope="module")
def whole(files: dict[str, str], quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    loop.train(run_of(files, out))
    return out
