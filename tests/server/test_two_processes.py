"""jaxlm serve over two processes, on loopback: they answer as one, and end together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jax
import pytest
from helpers import tiny_files
from helpers.process_pair import free_port
from helpers.tiny_adapter import drawn

import jaxlm
from jaxlm.checkpoint import peft
from jaxlm.models import llama3

ENV = {key: value for key, value in os.environ.items() if key != "JAX_DEFAULT_DEVICE"}
ENV["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and an adapter of it."""
    root = tmp_path_factory.mktemp("served")
    (root / "base").mkdir()
    tiny_files.write(root / "base")
    base = jaxlm.load(root / "base", device=jax.devices()[0])
    cfg = llama3.Config.from_hf(tiny_files.CONFIG)
    peft.write(root / "adapter", drawn(base), llama3.PARAMS, cfg, base=str(root / "base"))
    return root


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[tuple[list[Any], str]]:
    """Two processes that serve, and the address of process 0."""
    common = ["-m", str(folder / "base"), "--adapter", f"other={folder / 'adapter'}", "--slots", "4", *flags]
    common += ["--mesh", "model=2", "--num-processes", "2", "--coordinator", f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "jaxlm", "serve", "--max-length", "64", "--served-model-name", "tiny", *common]
    pipes: Any = {"env": ENV, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*command, "--port", "0", "--process-id", str(i)], **pipes) for i in range(2)]
    try:
        lines = []
        for line in processes[0].stderr:
            lines.append(line)
            if found := re.search(r"Serving tiny, other on (http://\S+)/v1", line):
                yield processes, found[1]
                break
        else:
            raise AssertionError(lines)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_they_answer_as_one_and_end_together(folder: Path) -> None:
    """Texts and log-probabilities are those of one process alone, for both models, with a grammar and with n. A client
    that leaves frees its slot. SIGTERM ends both with status 0, after the running answer."""
    base = jaxlm.load(folder / "base", device=jax.devices()[0])
    models = {"tiny": base, "other": jaxlm.load_adapter(base, folder / "adapter")}
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 3, "n": 2},
        {"temperature": 0.9, "seed": 4, "regex": "yes|no"},
        {"temperature": 0, "logprobs": 2, "seed": 0},
    ]
    asked = [(name, {"max_tokens": 9, **each}) for each in options for name in models]
    with started(folder) as (processes, url), httpx.Client(base_url=url, timeout=120) as http:

        def ask(name: str, given: dict[str, Any]) -> dict[str, Any]:
            answer = http.post("/v1/completions", json={"model": name, "prompt": "hello", **given})
            assert answer.status_code == 200, answer.text
            return answer.json()

        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda each: ask(*each), asked)]
        for (name, given), answer in zip(asked, answers):
            expected: Any = jaxlm.generate(models[name], "hello", **{"n": 1, **given})
            assert [choice["text"] for choice in answer["choices"]] == [str(each) for each in expected], (name, given)
            if "logprobs" in given:
                scores = answer["choices"][0]["logprobs"]["token_logprobs"]
                assert scores == pytest.approx([each.chosen for each in expected[0].logprobs], abs=1e-4)
        refused = http.post("/v1/embeddings", json={"input": "hello"})
        assert refused.status_code == 400
        assert "several processes" in refused.json()["error"]["message"]
        body = {"prompt": "hello", "max_tokens": 50, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
        end = time.monotonic() + 10
        while "jaxlm_requests_running 0.0" not in http.get("/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.05)
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for process in processes:
                process.send_signal(signal.SIGTERM)
            assert [*lines][-2] == "data: [DONE]"
        assert [process.wait(60) for process in processes] == [0, 0]


def test_a_dead_process_ends_the_server_with_a_message(folder: Path) -> None:
    with started(folder) as (processes, url):
        assert httpx.get(url + "/health", timeout=60).status_code == 200
        processes[1].kill()
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 1
        assert "process 0: jaxlm: another process ended or cannot be reached" in errors


@pytest.mark.slow
def test_a_port_in_use_ends_both_processes(folder: Path) -> None:
    with started(folder) as (_, url):
        port, where = url.rpartition(":")[2], f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "jaxlm", "serve", "-m", str(folder / "base"), "--port", port,
                   "--num-processes", "2", "--coordinator", where]  # fmt: skip
        pipes: Any = {"env": ENV, "text": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        pair = [subprocess.Popen([*command, "--process-id", str(i)], **pipes) for i in range(2)]
        ended = [process.communicate(timeout=90)[1] for process in pair]
        assert [process.returncode for process in pair] == [1, 1]
        assert all("cannot listen on 127.0.0.1" in errors for errors in ended)
