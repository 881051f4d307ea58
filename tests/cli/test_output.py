"""What commands write where stdout has few letters, or is closed."""

import io
import json
import logging
import subprocess
import sys

import pytest

from jaxlm.cli import common
from jaxlm.cli.terminal import print_json, use_any_encoding
from jaxlm.nn import attention_reference


def stdout_in(encoding: str, monkeypatch) -> io.BytesIO:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    return raw


def test_letters_that_the_encoding_does_not_have(monkeypatch):
    raw = stdout_in("ascii", monkeypatch)
    use_any_encoding()
    print("café 👩")
    assert raw.getvalue() == b"caf\\xe9 \\U0001f469\n"


def test_json_stays_valid_in_any_encoding(monkeypatch):
    for encoding, kept in (("ascii", False), ("latin-1", False), ("utf-8", True), ("utf-16", True)):
        raw = stdout_in(encoding, monkeypatch)
        print_json({"text": "café 👩 €"})
        written = raw.getvalue().decode(encoding)
        assert json.loads(written) == {"text": "café 👩 €"}
        assert ("é" in written) == kept


def test_a_closed_stdout_is_an_error_for_a_person():
    command = f"{sys.executable} -m jaxlm --version >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "jaxlm: stdout is closed: redirect it to a file, or to /dev/null\n"


@pytest.mark.parametrize("debug", [True, False])
def test_debug_says_once_which_kernel_does_not_apply(debug, monkeypatch, capsys):
    logger = logging.getLogger("jaxlm")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(common, "use_compilation_cache", lambda: None)
    attention_reference.report_fallback.cache_clear()
    level = logger.level
    try:
        common.ProcessFlags(debug=debug).begin()
        for _ in range(2):
            attention_reference.report_fallback("splash attention", "32 tokens are not a multiple of 128")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err.count("32 tokens") == debug
