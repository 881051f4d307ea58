"""Downloads, the cache and every message, against a stub hub on loopback."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers.stub_hub import Repo, StubHub, turn_to

from jaxlm.checkpoint import download as download_module
from jaxlm.checkpoint import hub as hub_module
from jaxlm.checkpoint.source import ModelSource

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SIZE = 300_000
CUT = 120_000
SECRET = "hf_" + "secret"  # never as one literal: a traceback quotes source lines


def resolve(name: str | Path, **fields: Any) -> Path:
    return hub_module.resolve(ModelSource(name, **fields))


def weights(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def index(names: list[str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}).encode()


def small_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "qwen3"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"a": 1}',
        "tokenizer_config.json": b'{"b": 1}',
        "README.md": b"# text",
        "modeling_qwen3.py": b"raise SystemExit",
    }


def sharded() -> Repo:
    files = {name: weights(i) for i, name in enumerate(SHARDS)}
    others = {
        "model.safetensors": weights(9),  # named by no index, so not wanted
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "original/params.json": b"{}",
    }
    return Repo({**small_files(), **files, **others, "model.safetensors.index.json": index(SHARDS)})


def single(**options: object) -> Repo:
    return Repo({**small_files(), "model.safetensors": weights(1)}, **options)  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    from huggingface_hub import close_session

    repos = {"org/sharded": sharded(), "org/single": single(), "gpt2": single(commit="c" * 40)}
    with StubHub(repos) as stub:
        turn_to(stub, monkeypatch, tmp_path)
        monkeypatch.setattr(download_module, "_WAITS", (0.05,))
        yield stub
        close_session()


def sha256(name: str, hub: StubHub) -> str:
    return hashlib.sha256(hub.repos[name].files["model.safetensors"]).hexdigest()


def holds(folder: Path, repo: Repo, names: list[str]) -> None:
    for name in names:
        assert (folder / name).read_bytes() == repo.files[name], name


# Folders and names


def test_a_folder_is_returned_without_the_network(tmp_path: Path, hub: StubHub) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert not hub.requests


def test_a_relative_folder_wins_over_a_hub_id(tmp_path: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/single").mkdir(parents=True)
    (tmp_path / "org/single/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/single") == Path("org/single")
    assert not hub.requests


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == tmp_path


def test_a_folder_without_config_lists_what_it_holds(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"note{i:02}.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no config\.json \(it holds note00\.txt, .* and 2 more\)"):
        resolve(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"\(it holds nothing\)"):
        resolve(tmp_path / "empty")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match="is a file: pass the folder"):
        resolve(tmp_path / "model.safetensors")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="--revision v1 applies to a hub id only"):
        resolve(tmp_path, revision="v1")


@pytest.mark.parametrize("name", ["./x", "../x/y", "/no/such", "~/no-such-folder", "a/b/c", "a\\b", Path("a/b")])
def test_a_path_that_does_not_exist_never_reaches_the_hub(name: str | Path, hub: StubHub) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve(name)
    assert not hub.requests


@pytest.mark.parametrize("name", ["", "a b", "org/na--me", "org/", "-x/y"])
def test_a_name_that_is_neither(name: str, hub: StubHub) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        resolve(name)
    assert not hub.requests


# Downloads


def test_only_needed_files_are_asked_for_and_the_second_load_asks_nothing(hub: StubHub) -> None:
    folder = resolve("org/sharded")
    repo = hub.repos["org/sharded"]
    wanted = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    wanted += ["model.safetensors.index.json", *SHARDS]
    holds(folder, repo, wanted)
    assert {p.name for p in folder.iterdir()} == set(wanted)
    absent = set(hub_module.OPTIONAL) - set(repo.files)
    assert hub.names() == set(wanted) | absent  # neither model.safetensors nor original/, .bin, .py, README
    order = [r.path.rsplit("/", 1)[1] for r in hub.requests if r.method == "GET"]
    assert set(order[-len(SHARDS) * 2 :]) == set(SHARDS), "weights come last"
    hub.requests.clear()
    assert resolve("org/sharded") == folder
    assert not hub.requests
    assert not list(folder.parent.parent.rglob("*.incomplete"))


def test_a_single_file_and_a_legacy_name(hub: StubHub) -> None:
    for name in ("org/single", "gpt2"):
        holds(resolve(name), hub.repos[name], ["config.json", "model.safetensors"])
        hub.requests.clear()
        resolve(name)
        assert not hub.requests


def test_revisions(hub: StubHub) -> None:
    repo = hub.repos["org/single"]
    repo.refs.update({"v1": "b" * 40, "refs/pr/1": "d" * 40})
    main, tag, pull = (
        resolve("org/single"),
        resolve("org/single", revision="v1"),
        resolve("org/single", revision="refs/pr/1"),
    )
    assert [p.name for p in (main, tag, pull)] == ["a" * 40, "b" * 40, "d" * 40]
    hub.requests.clear()
    assert resolve("org/single", revision="v1") == resolve("org/single", revision="b" * 40) == tag
    assert resolve("org/single", revision="refs/pr/1", offline=True) == pull
    assert not hub.requests
    with pytest.raises(FileNotFoundError, match=r"org/single has no revision 'nope' \(--revision\)"):
        resolve("org/single", revision="nope")


def test_a_branch_that_moves_during_the_download_gives_one_commit(
    hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.repos["org/single"]
    repo.refs["old"] = repo.commit
    look_up = hub_module.look_up

    def move(name: str, revision: str | None, *more: bool) -> object:
        if revision == "a" * 40:
            repo.commit = "e" * 40
        return look_up(name, revision, *more)

    monkeypatch.setattr(hub_module, "look_up", move)
    folder = resolve("org/single")
    assert folder.name == "a" * 40
    assert (folder / "model.safetensors").is_file()
    assert not any("/main/" in r.path and "config.json" not in r.path for r in hub.requests)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../../../x.safetensors"], "outside the checkpoint's folder"),
        (["/etc/x.safetensors"], "outside the checkpoint's folder"),
        (["..\\x.safetensors"], "outside the checkpoint's folder"),
        (["C:x.safetensors"], "outside the checkpoint's folder"),
        (["pytorch_model.bin"], "safetensors only"),
        ([], "not a safetensors index"),
        ([SHARDS[0], "gone.safetensors"], r"the index of org/sharded names gone\.safetensors, which"),
    ],
)
def test_a_bad_index_is_refused(names: list[str], message: str, hub: StubHub) -> None:
    hub.repos["org/sharded"].files["model.safetensors.index.json"] = index(names)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve("org/sharded")
    assert not [r for r in hub.requests if r.path.startswith("/cdn/")]


def test_a_shard_name_that_is_no_text(hub: StubHub) -> None:
    hub.repos["org/sharded"].files["model.safetensors.index.json"] = b'{"weight_map": {"a": 3, "b": "x"}}'
    with pytest.raises(ValueError, match="not a safetensors index"):
        resolve("org/sharded")


# Interruptions


def test_a_broken_connection_is_resumed_within_a_call(hub: StubHub) -> None:
    hub.cut = CUT
    holds(resolve("org/single"), hub.repos["org/single"], ["model.safetensors"])
    got = hub.downloads("model.safetensors")
    assert [r.range for r in got] == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    assert sum(r.sent for r in got) == SIZE


def test_an_interrupted_download_is_resumed_by_the_next_call(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_WAITS", ())
    hub.cut = CUT
    with pytest.raises(ConnectionError, match="run again to resume"):
        resolve("org/sharded")
    arrived = sum(r.sent for name in SHARDS for r in hub.downloads(name))
    assert 0 < arrived < 3 * SIZE
    with pytest.raises(FileNotFoundError, match="lacks model-00001"):
        resolve("org/sharded", offline=True)
    hub.requests.clear()
    hub.cut = None
    holds(resolve("org/sharded"), hub.repos["org/sharded"], SHARDS)
    got = [r for name in SHARDS for r in hub.downloads(name)]
    assert f"bytes={CUT}-" in [r.range for r in got]
    assert sum(r.sent for r in got) == 3 * SIZE - arrived
    assert hub.names("GET") == set(SHARDS), "small files are not sent again"


def test_a_killed_process_is_resumed(hub: StubHub, cache: Path, tmp_path: Path) -> None:
    hub.cut, hub.hang = CUT, True
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(cache)}
    code = "import sys; from jaxlm.checkpoint import hub, source; hub.resolve(source.ModelSource(sys.argv[1]))"
    part = cache / "models--org--single/blobs" / f"{sha256('org/single', hub)}.incomplete"
    with subprocess.Popen([sys.executable, "-c", code, "org/single"], env=env, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 15
        while not (part.exists() and part.stat().st_size >= CUT // 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    assert kept >= CUT // 2
    hub.released.set()
    hub.cut = None
    hub.requests.clear()
    holds(resolve("org/single"), hub.repos["org/single"], ["model.safetensors"])
    (got,) = hub.downloads("model.safetensors")
    assert got.range == f"bytes={kept}-"
    assert got.sent == SIZE - kept


def test_ctrl_c_stops_the_other_files_and_keeps_what_arrived(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cut = CUT

    def interrupt(*_: object, **__: object) -> None:
        while len([r for r in hub.requests if r.sent == CUT]) < 3:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(download_module, "_WAITS", (60.0,))
    monkeypatch.setattr(download_module, "wait", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        resolve("org/sharded")
    assert time.monotonic() - start < 30, "it waited for the retry of a file"


def test_a_server_without_ranges_begins_again(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_WAITS", ())
    hub.cut = CUT
    with pytest.raises(ConnectionError):
        resolve("org/single")
    hub.cut, hub.ranges = None, False
    holds(resolve("org/single"), hub.repos["org/single"], ["model.safetensors"])


def test_damaged_bytes_never_enter_the_cache(hub: StubHub, cache: Path) -> None:
    hub.damage = True
    with pytest.raises(OSError, match=r"model\.safetensors is damaged"):
        resolve("org/single")
    assert not list(cache.rglob("*.incomplete"))
    with pytest.raises(FileNotFoundError, match="offline"):
        resolve("org/single", offline=True)
    hub.damage = False
    holds(resolve("org/single"), hub.repos["org/single"], ["model.safetensors"])


# A cache that others filled, or that is not whole


def blobs(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "blobs"


@pytest.mark.parametrize("gone", ["config.json", "tokenizer.json", "model.safetensors.index.json", SHARDS[1]])
def test_a_file_that_is_gone_is_noticed_and_fetched_alone(gone: str, hub: StubHub) -> None:
    folder = resolve("org/sharded")
    (folder / gone).resolve().unlink()  # its link dangles now
    with pytest.raises(FileNotFoundError, match="offline") if gone != "tokenizer.json" else nullcontext():
        resolve("org/sharded", offline=True)
    hub.requests.clear()
    assert resolve("org/sharded") == folder
    holds(folder, hub.repos["org/sharded"], [gone])
    assert hub.names("GET") == {gone}


def test_an_index_without_its_shards_is_not_complete(hub: StubHub) -> None:
    from huggingface_hub import hf_hub_download

    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "model.safetensors"):
        hf_hub_download("org/sharded", name)
    with pytest.raises(FileNotFoundError, match=f"lacks {SHARDS[0]}, {SHARDS[1]}, {SHARDS[2]} in the cache"):
        resolve("org/sharded", offline=True)
    holds(resolve("org/sharded"), hub.repos["org/sharded"], SHARDS)


def test_without_notes_the_network_is_asked_once(hub: StubHub, caplog: pytest.LogCaptureFixture) -> None:
    """Another tool fetched some files by name: what else the repository has is not known."""
    from huggingface_hub import hf_hub_download

    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        hf_hub_download("org/single", name)
    hub.requests.clear()
    folder = resolve("org/single", offline=True)  # usable, but not in silence
    assert "is loaded without" in caplog.text
    assert "generation_config.json" in caplog.text
    assert not hub.requests
    resolve("org/single")
    holds(folder, hub.repos["org/single"], ["generation_config.json", "tokenizer_config.json"])
    assert not hub.downloads("model.safetensors")
    hub.requests.clear()
    caplog.clear()
    assert resolve("org/single") == resolve("org/single", offline=True) == folder
    assert not hub.requests
    assert not caplog.text


def test_a_snapshot_of_huggingface_hub_needs_no_request(hub: StubHub) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/single", ignore_patterns=["original/*"])
    folder = Path(snapshot_download("org/single", local_files_only=True))
    hub.requests.clear()
    assert resolve("org/single") == folder
    assert not hub.requests
    (folder / "generation_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks generation_config\.json"):
        resolve("org/single", offline=True)


def test_an_old_commit_does_not_stand_in_for_the_branch(hub: StubHub) -> None:
    """Another tool moved the cached branch to a new commit and fetched only its config."""
    from huggingface_hub import hf_hub_download

    resolve("org/single")
    repo = hub.repos["org/single"]
    repo.commit = "e" * 40
    repo.files["model.safetensors"] = weights(5)
    hf_hub_download("org/single", "config.json")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        resolve("org/single", offline=True)
    holds(resolve("org/single"), repo, ["model.safetensors"])


# Offline and without network


def test_offline_touches_no_network_and_names_the_way_out(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    message = r"offline, and org/single at revision v1 lacks config\.json in the cache .*run once without --offline"
    with pytest.raises(FileNotFoundError, match=message):
        resolve("org/single", revision="v1", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="offline, and org/single lacks"):
        resolve("org/single")
    assert not hub.requests


def test_variables_set_before_the_start(hub: StubHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a user sets them."""
    hub.repos["org/single"].private = True
    code = "from jaxlm.checkpoint import hub, source; print(hub.resolve(source.ModelSource('org/single')))"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_good"}
    env.pop("HF_HUB_CACHE", None)
    outs = []
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        child = subprocess.run([sys.executable, "-c", code], env=env | extra, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        outs.append(child.stdout)
        seen, hub.requests[:] = list(hub.requests), []
        assert bool(seen) is not bool(extra)
    assert outs[0] == outs[1]
    assert Path(outs[0].strip()).is_relative_to(tmp_path / "home/hub")


@pytest.mark.parametrize("dead", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network(dead: str, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_hub_download

    for name in ("config.json", "model.safetensors"):
        hf_hub_download("org/single", name)
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", dead + "/{repo_id}/resolve/{revision}/{filename}")
    look_up = socket.getaddrinfo

    def no_such_name(host: str, *rest: object, **options: object) -> object:
        if host.endswith(".invalid"):
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(host, *rest, **options)  # type: ignore[arg-type]

    def no_retry(seconds: float) -> None:
        pytest.fail("the user waits for retries that cannot help")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    monkeypatch.setattr(time, "sleep", no_retry)
    with pytest.raises(ConnectionError, match=f"no folder 'gpt2' here, and no connection to {dead} .* run again"):
        resolve("gpt2")
    with pytest.raises(ConnectionError, match="a copy is cached, add --offline"):
        resolve("org/single")


def test_the_hub_falls_silent(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.2")
    monkeypatch.setattr(download_module, "_WAITS", ())
    hub.cut, hub.hang = CUT, True
    with pytest.raises(ConnectionError, match="timed out"):
        resolve("org/single")


def test_a_page_that_is_no_hub(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.portal = True
    with pytest.raises(OSError, match="does not answer like a Hugging Face hub: check HF_ENDPOINT"):
        resolve("org/single")


# Refusals


def test_gated(hub: StubHub) -> None:
    hub.repos["org/single"].gated = True
    hub.tokens.add("hf_other")
    message = (
        f"org/single is gated: accept its license at {hub.url}/org/single, then .*hf auth login.*HF_TOKEN.*--token"
    )
    for token in (None, "hf_other"):
        with pytest.raises(PermissionError, match=message):
            resolve("org/single", token=token)
    assert resolve("org/single", token="hf_good").is_dir()


def test_absent_or_private(hub: StubHub) -> None:
    hub.repos["org/single"].private = True
    for name, token in (("org/single", None), ("org/typo", None), ("org/typo", "hf_good")):
        with pytest.raises(FileNotFoundError, match=f"there is no model '{name}' .*--token"):
            resolve(name, token=token)
    assert resolve("org/single", token=" hf_good\n").is_dir()


def test_a_refused_token(hub: StubHub) -> None:
    with pytest.raises(PermissionError, match="the hub refuses the token"):
        resolve("org/single", token="hf_expired")


@pytest.mark.parametrize("token", ["", "hf_se cret", "hf_se\ncret", "hf_sécret"])
def test_a_malformed_token(token: str, hub: StubHub) -> None:
    with pytest.raises(ValueError, match=r"the token \(--token\) is empty or has blanks") as caught:
        resolve("org/single", token=token)
    assert "hf_se" not in str(caught.value)
    assert not hub.requests


def test_no_safetensors(hub: StubHub) -> None:
    files = {**small_files(), "pytorch_model.bin": b"pickle", "model.gguf": b"x"}
    hub.repos["org/single"].files = files
    message = r"no model\.safetensors, and jaxlm downloads no other \(it holds model.gguf, .*pytorch_model\.bin\)"
    with pytest.raises(FileNotFoundError, match=message):
        resolve("org/single")
    assert "pytorch_model.bin" not in hub.names()


def test_no_config(hub: StubHub) -> None:
    hub.repos["org/single"].files = {"model.gguf": b"x", "README.md": b""}
    with pytest.raises(FileNotFoundError, match=r"org/single has no config\.json, .* \(it holds model\.gguf\)"):
        resolve("org/single")


def test_the_hub_is_at_fault(hub: StubHub) -> None:
    hub.status = 503
    with pytest.raises(OSError, match="the hub answered 503 for org/single: wait, then run again"):
        resolve("org/single")
    assert len(hub.downloads("model.safetensors")) == 2, "a passing fault deserves another attempt"
    hub.status = 403
    hub.requests.clear()
    with pytest.raises(PermissionError, match="no access to org/single"):
        resolve("org/single")
    assert len(hub.downloads("model.safetensors")) == 1


def test_too_little_room_is_said_before_the_download(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(10**6, 10**6 - 5000, 5000)
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs 900,000 bytes \(0\.0 GB\) more and .* has 5,000 bytes .* HF_HOME"):
        resolve("org/sharded")
    assert not hub.downloads(SHARDS[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file that is always full")
def test_a_disk_that_fills_up(hub: StubHub, cache: Path) -> None:
    blobs(cache, "org/single").mkdir(parents=True)
    (blobs(cache, "org/single") / f"{sha256('org/single', hub)}.incomplete").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cache is too small for org/single .* free\)\. .* run again"):
        resolve("org/single")


# What others see


def test_the_token_is_nowhere_to_be_read(
    hub: StubHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/single"].private = True
    hub.tokens.add(SECRET)
    monkeypatch.setattr(download_module, "_WAITS", ())
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    hub.cut = CUT
    texts = []
    with caplog.at_level(logging.DEBUG):
        for name in list(logging.root.manager.loggerDict):
            caplog.set_level(logging.DEBUG, logger=name)
        for name in ("org/single", "org/absent"):
            with pytest.raises(OSError) as caught:
                resolve(name, token=SECRET)
            texts.append("".join(traceback.format_exception(caught.value)))
        hub.cut = None
        folder = resolve("org/single", token=SECRET)
    texts += [caplog.text, *capfd.readouterr(), *(p.read_text("latin-1") for p in folder.rglob("*"))]
    assert "resolve/main/config.json" in caplog.text, "the libraries' logs were not seen"
    assert SECRET not in "\n".join(texts)
    assert {r.token for r in hub.requests if not r.path.startswith("/cdn/")} == {SECRET}
    assert {r.token for r in hub.requests if r.path.startswith("/cdn/")} == {None}, "the CDN saw the token"


def test_progress_goes_to_stderr(hub: StubHub, capfd: pytest.CaptureFixture[str]) -> None:
    resolve("org/sharded")
    out, err = capfd.readouterr()
    assert out == ""
    assert "org/sharded (3 files): 100%" in err
    assert "900k/900k" in err
    assert "B/s]" in err


def test_several_loads_at_once(hub: StubHub) -> None:
    """The processes of one job resolve the same name together: each byte is sent once."""
    hub.delay = 0.3
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(resolve("org/sharded"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(folders) == 3
    holds(folders[0], hub.repos["org/sharded"], SHARDS)
    assert sum(r.sent for name in SHARDS for r in hub.downloads(name)) == 3 * SIZE


def test_files_that_huggingface_hub_downloads_itself(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest files, and all where hf_xet's speed is asked for; a size that the server does not tell, too."""
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "yes")
    monkeypatch.setattr(download_module, "_blob", None)
    holds(resolve("org/sharded"), hub.repos["org/sharded"], SHARDS)
    hub.requests.clear()
    resolve("org/sharded")
    assert not hub.requests


def test_what_a_run_has_not_written_yet_is_not_searched_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text("{}")
    for name in ("model", "adapter"):
        with pytest.raises(FileNotFoundError, match="written when the run has ended"):
            hub_module.resolve(ModelSource(str(tmp_path / name)))
    monkeypatch.chdir(tmp_path)  # in the folder of a run, hub ids are as elsewhere
    with pytest.raises(FileNotFoundError, match="offline"):
        hub_module.resolve(ModelSource("gpt2", offline=True))
