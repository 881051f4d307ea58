"""llama.cpp in a process of its own, through the package xllamacpp: loads GGUF files, continues texts, tokenizes.

The process reads one JSON object per line and answers with one. It ends with an error where llama.cpp has one.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class LlamaCpp:
    """The process. A file is loaded in the place of the one before."""

    def __init__(self, errors: IO[str]):
        self.errors = errors
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def ask(self, **request: Any) -> Any:
        """Sends a request, and returns the answer. RuntimeError with llama.cpp's messages if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        if line := self.process.stdout.readline():
            return json.loads(line)
        status = self.process.wait(timeout=60)
        self.errors.seek(0)
        raise RuntimeError(f"llama.cpp ended with status {status}: {self.errors.read()}")

    def load(self, path: Path, context: int = 1024) -> None:
        self.ask(load=str(path), context=context)

    def complete(self, prompt: str | Sequence[int], tokens: int = 64, probabilities: int = 0) -> dict[str, Any]:
        """The greedy continuation: `content`, `tokens`, `stop_type`, and `completion_probabilities` if asked for."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        return self.post("/completion", prompt=prompt, n_predict=tokens, temperature=0, return_tokens=True,
                         n_probs=probabilities, cache_prompt=False)  # fmt: skip

    def chat(self, messages: list[dict[str, str]], tokens: int = 64) -> str:
        """The greedy answer to a conversation, by the chat template in the file."""
        answer = self.post("/v1/chat/completions", messages=messages, max_tokens=tokens, temperature=0)
        return answer["choices"][0]["message"]["content"]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.ask(tokenize=list(texts))

    def post(self, path: str, **body: Any) -> Any:
        return self.ask(post=path, body=body)


@contextmanager
def llama_cpp() -> Iterator[LlamaCpp]:
    with tempfile.TemporaryFile("w+") as errors:
        running = LlamaCpp(errors)
        try:
            yield running
        finally:
            running.process.kill()
            running.process.communicate()


def post(server: Any, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def serve() -> None:
    import xllamacpp

    server = None
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            server = None
            params = xllamacpp.CommonParams()
            params.model.path = request["load"]
            params.n_ctx, params.n_parallel, params.warmup, params.verbosity = request["context"], 1, False, 1
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
            params.hostnames = ["127.0.0.1"]
            # As in jaxlm: keys and values as they are computed, softmax over all scores.
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            server = xllamacpp.Server(params)
            answer = {}
        elif "tokenize" in request:
            options = {"add_special": True, "parse_special": True}
            texts = request["tokenize"]
            answer = [post(server, "/tokenize", {"content": text, **options})["tokens"] for text in texts]
        else:
            answer = post(server, request["post"], request["body"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
