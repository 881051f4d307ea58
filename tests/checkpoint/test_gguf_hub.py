"""GGUF files of hub repositories, against a stub hub on loopback."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.gguf_writer import content, tiny_file, write_split
from helpers.stub_hub import Repo, StubHub, turn_to
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.checkpoint import gguf_files
from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli import main


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    from huggingface_hub import close_session

    parts = write_split(tmp_path / "big.gguf", *tiny_file("llama3"))
    files = {
        "README.md": b"",
        "model.gguf": content(*tiny_file("llama3")),
        **{f"Q8_0/{p.name}": p.read_bytes() for p in parts},
        "lost-00001-of-00002.gguf": b"x",
    }
    with StubHub({"org/model-GGUF": Repo(files)}) as stub:
        turn_to(stub, monkeypatch, tmp_path)
        yield stub
        close_session()


def find(name: str, **fields: Any) -> Path | None:
    return gguf_files.find(ModelSource(name, **fields))


def test_a_file_is_downloaded_once(hub: StubHub) -> None:
    model = jaxlm.load("org/model-GGUF:model.gguf")
    np.testing.assert_array_equal(np.asarray(model.weights["embed"]), np.asarray(tiny("llama3").weights["embed"]))
    assert not hub.names("GET") - {"model.gguf"}, "other files are not downloaded"
    hub.requests.clear()
    assert find("org/model-GGUF:model.gguf") == find("org/model-GGUF:model.gguf", offline=True)
    assert find("org/model-GGUF:model.gguf", revision="a" * 40) is not None
    assert not hub.requests


def test_all_parts_are_downloaded(hub: StubHub) -> None:
    model = jaxlm.load("org/model-GGUF:Q8_0/big-00002-of-00003.gguf")
    np.testing.assert_array_equal(np.asarray(model.weights["embed"]), np.asarray(tiny("llama3").weights["embed"]))
    with pytest.raises(FileNotFoundError, match=r"lacks lost-00002-of-00002\.gguf of 2 parts"):
        find("org/model-GGUF:lost-00001-of-00002.gguf")


def test_what_is_not_there(hub: StubHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no absent\.gguf \(it holds .*model\.gguf"):
        find("org/model-GGUF:absent.gguf")
    with pytest.raises(FileNotFoundError, match=r"offline, and org/model-GGUF lacks model\.gguf"):
        find("org/model-GGUF:model.gguf", offline=True)
    with pytest.raises(FileNotFoundError, match="no model 'org/none'"):
        find("org/none:model.gguf")
    for name in ("org/model-GGUF:../model.gguf", "org/model-GGUF:/model.gguf"):
        with pytest.raises(ValueError, match="is not the path of a file in the repository"):
            find(name)


def test_info_describes_a_cached_file(hub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "org/model-GGUF:model.gguf"]) == 1
    assert "must be in the cache to be described" in capsys.readouterr().err
    jaxlm.load("org/model-GGUF:model.gguf")
    assert main(["info", "org/model-GGUF:model.gguf"]) == 0


def test_a_repository_of_gguf_files_is_named_with_one(hub: StubHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*model\.gguf.*-m org/model-GGUF:FILE\.gguf"):
        jaxlm.load("org/model-GGUF")
