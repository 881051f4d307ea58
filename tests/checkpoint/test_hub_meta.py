"""Meta's own files on the hub: `original/` alone, and only when it is asked for."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import meta_files
from helpers.stub_hub import Repo, StubHub, turn_to

import jaxlm
from jaxlm.checkpoint import download as download_module
from jaxlm.checkpoint import hub as hub_module
from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli import main

CUT = 9000


def resolve(name: str | Path, **fields: Any) -> Path:
    return hub_module.resolve(ModelSource(name, **fields))


def files(folder: Path) -> dict[str, bytes]:
    """A repository as Meta keeps it: both forms, and what nobody needs."""
    others = {
        "config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"hf", "README.md": b"# text",
        "original/README.md": b"# text", "original/consolidated.00.pth.md5": b"0",
    }  # fmt: skip
    return {**others, **{f"original/{path.name}": path.read_bytes() for path in folder.iterdir()}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """org/one and org/two in one and in two shards, org/hf without original/."""
    from huggingface_hub import close_session

    repos = {"org/hf": Repo({"config.json": b"{}"})}
    for name, shards in (("org/one", 1), ("org/two", 2)):
        folder = meta_files.folder(tmp_path / name, shards)
        (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
        repos[name] = Repo(files(folder))
    with StubHub(repos) as stub:
        turn_to(stub, monkeypatch, tmp_path)
        monkeypatch.setattr(download_module, "_WAITS", (0.05,))
        yield stub
        close_session()


def holds(folder: Path, repo: Repo, names: list[str]) -> None:
    for name in names:
        assert (folder / name).read_bytes() == repo.files[f"original/{name}"], name


SHARDS = ["consolidated.00.pth", "consolidated.01.pth"]


@pytest.mark.parametrize(("name", "shards"), [("org/one", SHARDS[:1]), ("org/two", SHARDS)])
def test_only_original_is_asked_for_and_the_second_load_asks_nothing(
    name: str, shards: list[str], hub: StubHub
) -> None:
    folder = resolve(name, format="meta")
    wanted = ["params.json", "tokenizer.model", *shards]
    holds(folder, hub.repos[name], wanted)
    assert folder.name == "original"
    assert {path.name for path in folder.iterdir()} == set(wanted)
    assert {path.name for path in folder.parent.iterdir()} == {"original"}
    after = f"original/consolidated.{len(shards):02}.pth"  # tells that there are no more
    assert hub.names() == {f"original/{file}" for file in wanted} | {after}
    hub.requests.clear()
    assert resolve(name, format="meta") == folder
    assert resolve(name, format="meta", offline=True) == folder
    assert not hub.requests


def test_the_weights_are_those_of_the_files(hub: StubHub, tmp_path: Path) -> None:
    (tmp_path / "org/two/tokenizer.model").unlink()
    del hub.repos["org/two"].files["original/tokenizer.model"]
    there, here = jaxlm.load("org/two", format="meta"), jaxlm.load(tmp_path / "org/two")
    assert (np.asarray(there.weights["embed"]) == np.asarray(here.weights["embed"])).all()
    assert there.tokenizer is None
    hub.requests.clear()
    jaxlm.load("org/two", format="meta")
    assert not hub.requests  # that there is no tokenizer is known


def test_the_two_forms_do_not_mix_in_the_cache(hub: StubHub) -> None:
    folder = resolve("org/one", format="meta")
    hub.requests.clear()
    whole = resolve("org/one")
    assert whole == folder.parent
    assert not any(name.startswith("original/") for name in hub.names())
    with pytest.raises(FileNotFoundError, match=r"offline, and org/two lacks original/params\.json"):
        resolve("org/two", format="meta", offline=True)


def test_a_broken_connection_is_resumed_within_a_call(hub: StubHub) -> None:
    hub.cut = CUT
    holds(resolve("org/one", format="meta"), hub.repos["org/one"], ["consolidated.00.pth"])
    got = hub.downloads("original/consolidated.00.pth")
    assert [r.range for r in got[:3]] == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    assert sum(r.sent for r in got) == len(hub.repos["org/one"].files["original/consolidated.00.pth"])


def test_an_interrupted_download_is_resumed_by_the_next_call(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_WAITS", ())
    hub.cut = CUT
    with pytest.raises(ConnectionError, match="run again to resume"):
        resolve("org/two", format="meta")
    with pytest.raises(
        FileNotFoundError, match=r"offline, and org/two lacks original/consolidated\.00\.pth in the cache"
    ):
        jaxlm.load("org/two", format="meta", offline=True)
    hub.requests.clear()
    hub.cut = None
    holds(resolve("org/two", format="meta"), hub.repos["org/two"], SHARDS)
    assert f"bytes={CUT}-" in [r.range for name in SHARDS for r in hub.downloads(f"original/{name}")]
    assert "original/params.json" not in hub.names("GET")


def test_a_shard_that_is_gone_is_fetched_alone(hub: StubHub) -> None:
    folder = resolve("org/two", format="meta")
    blob = (folder / SHARDS[1]).resolve()
    (folder / SHARDS[1]).unlink()
    blob.unlink()
    hub.requests.clear()
    holds(resolve("org/two", format="meta"), hub.repos["org/two"], SHARDS)
    assert not hub.downloads(f"original/{SHARDS[0]}")
    assert hub.downloads(f"original/{SHARDS[1]}")


def test_a_snapshot_of_huggingface_hub_needs_no_request(hub: StubHub) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/two", endpoint=hub.url, allow_patterns="original/*")
    hub.requests.clear()
    folder = resolve("org/two", format="meta")
    holds(folder, hub.repos["org/two"], SHARDS)
    assert not hub.requests


def test_repositories_without_them(hub: StubHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"org/hf has no original/params\.json"):
        resolve("org/hf", format="meta")
    hub.repos["org/hf"].files["original/params.json"] = b"{}"
    with pytest.raises(FileNotFoundError, match=r"org/hf has original/params\.json but no weights"):
        resolve("org/hf", format="meta")
    with pytest.raises(FileNotFoundError, match="there is no model 'org/absent'"):
        resolve("org/absent", format="meta")
    hub.repos["org/one"].gated = True
    with pytest.raises(PermissionError, match="org/one is gated"):
        resolve("org/one", format="meta")


# On the command line


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(meta_files.folder(tmp_path / "x", use_scaled_rope=True))


def test_the_flags(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = meta_files.tokenizer(tmp_path / "tokenizer")
    command = ["generate", "a b", "-m", folder, "--tokenizer", str(tokenizer), "--max-tokens", "3", "--ignore-eos"]
    assert main([*command, "--rope-factor", "8", "--format", "meta", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 2
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "pass --rope-factor" in err
    assert "Traceback" not in err
    assert main([*command, "--rope-factor", "8", "--format", "hf"]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_flags_that_are_none(folder: str) -> None:
    for flags in (["--format", "gguf"], ["--rope-factor", "eight"]):
        command = [sys.executable, "-m", "jaxlm", "generate", "a", "-m", folder, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_info_describes_metas_files(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", folder, "--rope-factor", "8"]) == 0
    out = capsys.readouterr().out
    assert "factor 8" in out
    assert "12,448" in out
    assert main(["info", folder]) == 1
    assert "pass --rope-factor" in capsys.readouterr().err


def test_info_of_metas_files_on_the_hub_waits_for_them(hub: StubHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "org/two", "--format", "meta"]) == 1
    assert "cache" in capsys.readouterr().err
    assert not hub.requests
    del hub.repos["org/two"].files["original/tokenizer.model"]
    resolve("org/two", format="meta")
    assert main(["info", "org/two", "--format", "meta"]) == 0
    assert "2 files" in capsys.readouterr().out
