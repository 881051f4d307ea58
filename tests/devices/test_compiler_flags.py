"""Flags of XLA's compiler for a process that computes on CPU."""

import importlib.metadata
import os
import platform
import subprocess
import sys

import pytest

from jaxlm.devices import compiler_flags

SCRIPT = """
import jax, jaxlm
jaxlm.use_compiler_flags()
print(jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(7)).sum())
"""


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    return monkeypatch


def flags() -> str:
    compiler_flags.use_compiler_flags()
    return os.environ["XLA_FLAGS"]


def test_this_jax_knows_the_flag() -> None:
    """XLA ends the process if it does not."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler_flags.VECTORS}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "21.0\n"


def test_other_flags_are_kept(on_cpu: pytest.MonkeyPatch) -> None:
    assert flags() == compiler_flags.VECTORS
    assert flags() == compiler_flags.VECTORS
    on_cpu.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    assert flags() == f"--xla_cpu_multi_thread_eigen=false {compiler_flags.VECTORS}"
    on_cpu.setenv("XLA_FLAGS", "--xla_backend_extra_options=--own")
    assert flags() == "--xla_backend_extra_options=--own"


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "cuda,cpu"])
def test_not_with_an_accelerator(platforms: str, on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setenv("JAX_PLATFORMS", platforms)
    assert flags() == ""


@pytest.mark.parametrize("installed", ["jax_plugins", "libtpu", None])
def test_the_packages_decide_without_a_setting(installed: str | None, on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.delenv("JAX_PLATFORMS")
    on_cpu.setattr(compiler_flags.importlib.util, "find_spec", lambda name: name if name == installed else None)
    assert flags() == ("" if installed else compiler_flags.VECTORS)


def test_not_on_other_processors_or_with_a_later_jax(on_cpu: pytest.MonkeyPatch) -> None:
    on_cpu.setattr(platform, "machine", lambda: "arm64")
    assert flags() == ""
    on_cpu.setattr(platform, "machine", lambda: "AMD64")
    assert flags() == compiler_flags.VECTORS
    on_cpu.setenv("XLA_FLAGS", "")
    on_cpu.setattr(importlib.metadata, "version", lambda _: ".".join(map(str, compiler_flags.NOT_TESTED)))
    assert flags() == ""
