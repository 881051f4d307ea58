"""The cache of compiled programs on disk."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxlm.devices import compilation_cache

SCRIPT = """
import jax, jaxlm
from jaxlm.devices import compilation_cache
compilation_cache.SECONDS = 0
print(jaxlm.use_compilation_cache())
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(7)).block_until_ready()
"""


def run(**environment: str) -> Path:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    return Path(done.stdout.strip())


def test_programs_are_stored_on_disk(tmp_path: Path) -> None:
    common = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    folder = run(**common)
    assert folder == tmp_path / "jaxlm" / "xla"
    stored = {path.name for path in folder.iterdir() if not path.name.endswith("-atime")}
    assert stored
    assert run(**common) == folder
    assert {path.name for path in folder.iterdir() if not path.name.endswith("-atime")} == stored


@pytest.fixture
def settings() -> Iterator[None]:
    """Restores the settings of jax."""
    before = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}  # fmt: skip
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("given", [True, False])
def test_the_folder(given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "variable"))
    folder = compilation_cache.use_compilation_cache(*[tmp_path / "argument"] * given)
    assert folder == tmp_path / ("argument" if given else "variable")
    assert jax.config.jax_compilation_cache_dir == str(folder)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("settings")
def test_a_bucket_is_for_jax_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/xla")
    compilation_cache.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/xla"  # pyright: ignore[reportAttributeAccessIssue]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("settings")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.use_compilation_cache(tmp_path / "file" / "xla")
    assert jax.config.jax_compilation_cache_dir is None  # pyright: ignore[reportAttributeAccessIssue]
    [record] = caplog.records
    assert "cannot be written" in record.message
