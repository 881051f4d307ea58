"""Other implementations, each in a process of its own, which is this module: transformers on torch, and llama.cpp.

The process loads the model and writes one JSON line. Then it answers each line {"kind", "tokens", "depth", "batch",
"prompts"} with one: the seconds that prefill or decoding took, or null where it cannot run the case. It ends when its
standard input does.
"""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxlm.bench.cases import Case, Sample

# rival -> (package to import, how to install it)
PACKAGES = {
    "transformers": ("torch", "pip install torch, or all rivals: pip install 'jaxlm[bench]'"),
    "llama.cpp": ("xllamacpp", "pip install 'jaxlm[bench]'"),
}
# The contestants of transformers: dtype, and whether the cache is static and the model compiled. The best one counts.
TRANSFORMERS = {
    "transformers float32": ("float32", False),
    "transformers bfloat16": ("bfloat16", False),
    "transformers bfloat16 compiled": ("bfloat16", True),
}
Run = Callable[[Case, list[list[int]]], float | None]  # -> seconds


def require(names: Sequence[str]) -> None:
    """Raises ValueError with the command to install the first rival that is not installed."""
    for name in names:
        package, install = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--against {name} needs {package}: {install}")


class Rival:
    """The process of a contestant.

    Attributes:
        name: Its name, which begins with that of the rival.
    """

    def __init__(self, name: str, *arguments: str):
        """Starts the process, and waits until it has loaded the model.

        Args:
            name: The name.
            arguments: Of `serve`.

        Raises:
            ValueError: The process ends; the message has the last line of its stderr.
        """
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  `close` closes it
        command = [sys.executable, "-m", "jaxlm.bench.rivals", *arguments]
        # In a session of its own, so that Ctrl-C does not reach it.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, start_new_session=True)  # fmt: skip
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def run(self, case: Case, prompts: list[list[int]]) -> Sample | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**case._asdict(), "prompts": prompts}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        seconds = self._read()
        return None if seconds is None else Sample(seconds)

    def _read(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        raise ValueError(f"{self.name} ended with status {status}: {lines[-1] if lines else 'it says nothing'}")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def start_transformers(name: str, folder: Path, platform: str) -> Rival:
    """Starts a contestant of TRANSFORMERS with a checkpoint folder, on the platform of jax."""
    dtype, is_compiled = TRANSFORMERS[name]
    return Rival(name, "transformers", str(folder), dtype, str(int(is_compiled)), platform)


def start_llama_cpp(file: Path, dtype: str, slots: int, context: int) -> Rival:
    """Starts llama.cpp with a GGUF file, for at most `slots` rows of `context` tokens each."""
    return Rival(f"llama.cpp {dtype}", "llama.cpp", str(file), str(slots), str(context))


# The process


def serve_transformers(folder: str, dtype: str, is_compiled: str, platform: str) -> Run:
    """Prefill is one call of the model with logits of the last token. Decoding is `generate`, whose first token is not
    timed."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if platform == "gpu" and torch.cuda.is_available() else "cpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    static: dict[str, Any] = {}
    if is_compiled == "1":
        static = {"cache_implementation": "static"}
        if device.type == "cpu":  # on GPU, `generate` compiles by itself
            model.forward = torch.compile(model.forward)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def prefill(case: Case, ids: Any) -> float | None:
        if static:
            return None
        cache = model(ids[:, : case.depth], use_cache=True, logits_to_keep=1).past_key_values if case.depth else None
        begin = now()
        model(ids[:, case.depth :], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return now() - begin

    def decode(case: Case, ids: Any) -> float:
        times: list[float] = []
        watch = [lambda *_, **__: bool(times.append(now()))]  # False: it does not stop
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.max_tokens, do_sample=False,
                       pad_token_id=0, eos_token_id=None, stopping_criteria=watch, **static)  # fmt: skip
        return times[-1] - times[0]

    def run(case: Case, prompts: list[list[int]]) -> float | None:
        with torch.no_grad():
            ids = torch.tensor(prompts, device=device)
            return prefill(case, ids) if case.kind == "prefill" else decode(case, ids)

    return run


def llama_cpp_server(file: str, slots: int, context: int) -> Any:
    """The server of llama.cpp, which listens on a free port of the loopback address, with a thread per core.

    Args:
        file: A GGUF file.
        slots: Number of requests that are decoded together.
        context: Maximum number of tokens of a prompt and its answer.
    """
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup = context * slots, slots, True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
    params.cache_ram_mib = 0  # it copies the KV cache of each prompt that another one replaces
    params.hostnames, params.verbosity = ["127.0.0.1"], -1
    return xllamacpp.Server(params)


def serve_llama_cpp(file: str, slots: str, context: str) -> Run:
    """Requests are made within the process. The server listens on the loopback address only. Tokens that are in the KV
    cache before a case begins come from an earlier request with the same beginning."""
    server = llama_cpp_server(file, int(slots), int(context))
    pool = ThreadPoolExecutor(int(slots))

    def ask(prompts: list[list[int]], tokens: int, reuse: bool) -> list[dict[str, Any]]:
        """The timings of requests that run together."""

        def one(slot: int, prompt: list[int]) -> dict[str, Any]:
            answer: Any = server.handle_completions({
                "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": reuse,
                "id_slot": slot, "timings_per_token": True,
            })  # fmt: skip
            answer = json.loads(answer) if isinstance(answer, str) else answer
            if "timings" not in answer:
                raise ValueError(str(answer))
            return answer["timings"]

        return list(pool.map(one, range(len(prompts)), prompts))

    def run(case: Case, prompts: list[list[int]]) -> float | None:
        reuse = case.depth > 0
        if reuse:
            ask([prompt[: case.depth] for prompt in prompts], 1, reuse=True)
        begin = time.perf_counter()
        timings = ask(prompts, case.max_tokens, reuse)
        seconds = time.perf_counter() - begin
        if case.kind == "decode":  # predicted_ms begins at the first token
            return max(each["predicted_ms"] for each in timings) / 1e3
        # With a sliding window, it may not be able to reuse the KV cache.
        return seconds if all(each["prompt_n"] == case.tokens for each in timings) else None

    return run


SERVERS: dict[str, Callable[..., Run]] = {"transformers": serve_transformers, "llama.cpp": serve_llama_cpp}


def main(rival: str, *arguments: str) -> None:
    """Serves cases from standard input. What libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = SERVERS[rival](*arguments)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = request.pop("prompts")
        print(json.dumps(run(Case(**request), prompts)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
