"""compare_outputs.py runs jaxlm, transformers and Meta's code, each in a process of its own."""

import os
import subprocess
import sys

import pytest
from examples.conftest import EXAMPLES

import jaxlm

pytestmark = pytest.mark.oracle


def compare(folder: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "compare_outputs.py"), "--model", folder, "--prompt", "Once upon"]
    env = {name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_DEVICE"}
    return subprocess.run([*command, *flags], env=env, capture_output=True, text=True, timeout=300)


def test_four_implementations_agree(folder: str) -> None:
    done = compare(folder, "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, 17))
    assert all(len(row) == 5 and len(set(row[1:])) == 1 for row in rows)
    assert len({row[1] for row in rows}) > 8  # a text that repeats itself proves little
    expected = jaxlm.generate(jaxlm.load(folder), "Once upon", max_tokens=16, temperature=0, ignore_eos=True)
    assert [int(row[1]) for row in rows] == expected.tokens


def test_a_difference_is_found(example, folder: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    module = example("compare_outputs")
    monkeypatch.setattr(module, "run", lambda name, *_: [1, 2, 4 if name == "mesh" else 3])
    assert module.main(folder, max_tokens=3) == 1
    out = capsys.readouterr().out
    assert out.count("differ") == 1
    assert "mesh: not the tokens of single_device." in out
