"""The flags of `jaxlm bench serve`, and the servers that it starts."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxlm.checkpoint.errors import explain_errors, explain_missing_package
from jaxlm.cli.bench_common import integers, numbers_above_zero
from jaxlm.cli.common import GenerationFlags, ProcessFlags
from jaxlm.cli.errors import usage
from jaxlm.cli.prompt_lines import PromptLine, has_messages, read_prompts
from jaxlm.cli.terminal import note

if TYPE_CHECKING:
    from jaxlm.bench.serve_prompts import Prompts
    from jaxlm.bench.serve_session import Server, ServeSession

SLOTS = 8
LENGTHS = 256  # the length of a slot is a multiple of it


@dataclass(frozen=True)
class ServeFlags(GenerationFlags):
    """The flags that only serve has."""

    url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Measure the server at this base URL (http://127.0.0.1:8000/v1), instead of starting jaxlm serve."""
    clients: Annotated[str | None, tyro.conf.arg(metavar="N,N")] = None
    """Numbers of clients. Each sends its next request when its last one has ended. Default: 1,8."""
    rate: Annotated[str | None, tyro.conf.arg(metavar="X,X")] = None
    """Requests per second, sent at random times, whether or not earlier ones have ended."""
    requests: int | None = None
    """Number of requests of a load. Default: 2 per client, but at least 16."""
    seconds: float = 60.0
    """How long a load may send requests."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSONL file of prompts, such as {"prompt": "...", "completion": "..."}. Without -n, answers are as
    long as the completion. Default: random words."""
    slots: int | None = None
    """Number of requests that the servers decode together. Default: 8."""
    max_length: int | None = None
    """Maximum number of tokens of a prompt and its answer. Default: enough for the prompts."""
    first_token_limit: Annotated[float | None, tyro.conf.arg(metavar="MS")] = None
    """Milliseconds to the first token. Adds the goodput: the requests per second that meet this limit."""

    def check_serve(self, name: str | None, rivals: Sequence[str], prompt: str | None) -> None:
        """Exits with status 2 for wrong flags.

        Args:
            name: The model.
            rivals: Of --against.
            prompt: Of -p.
        """
        if (name is None) != (self.url is not None and not rivals):
            usage("pass one model, or --url URL of a server; --against needs a model (jaxlm bench --help)")
        if [*rivals] not in ([], ["llama.cpp"]):
            usage("--against must be llama.cpp with serve (jaxlm bench --help)")
        if self.prompts is not None and prompt is not None:
            usage("pass --prompts FILE, or -p for random words, not both (jaxlm bench --help)")
        if name is None and (self.slots, self.max_length) != (None, None):
            usage("--slots and --max-length do not apply to a server that runs: omit --url (jaxlm bench --help)")
        for flag in ("requests", "seconds", "slots", "max_length", "first_token_limit"):
            value = getattr(self, flag)
            if value is not None and not 0 < value < float("inf"):
                usage(f"--{flag.replace('_', '-')} is {value}, but must be above 0 (jaxlm bench --help)")
        clients = integers("--clients", self.clients or "1")
        numbers_above_zero("--rate", self.rate or "1")
        if self.requests is not None and self.requests < max(clients):
            usage(f"--requests is {self.requests}, but must be at least the number of clients, {max(clients)}")

    def serve_session(self, prompt: str | None, gen: str | None, rounds: int) -> "ServeSession":
        """The measurements that the flags ask for, without servers.

        Args:
            prompt, gen: Of -p and -n.
            rounds: Of -r.

        Raises:
            ValueError: The file of prompts is invalid.
            OSError: It cannot be read.
        """
        from jaxlm.bench.serve_load import Load
        from jaxlm.bench.serve_session import ServeSession

        clients = self.clients or (None if self.rate else "1,8")
        loads = [Load(clients=count) for count in integers("--clients", clients)] if clients else []
        loads += [Load(rate=rate) for rate in numbers_above_zero("--rate", self.rate)] if self.rate else []
        return ServeSession([], self._kinds(prompt, gen), loads, rounds, self.requests, self.seconds)

    def _kinds(self, prompt: str | None, gen: str | None) -> "list[Prompts]":
        from jaxlm.bench.serve_prompts import from_lines, random_words

        if self.prompts is None:
            lengths, answers = integers("-p", prompt or "128"), integers("-n", gen or "64")
            return [random_words(length, answer) for length in lengths for answer in answers]
        lines = [_text_and_answer(line) for line in read_prompts(self.prompts, raw=True)]
        counts = integers("-n", gen) if gen else [None]
        return [from_lines(self.prompts.name, lines, count) for count in counts]

    def length_of(self, session: "ServeSession") -> int:
        """The length of the slots."""
        longest = max(kind.longest for kind in session.kinds)
        return self.max_length or -(-longest // LENGTHS) * LENGTHS

    def serve_line(self, name: str | None, length: int) -> str:
        """What was measured."""
        if name is None:
            return f"- the server at {self.url}"
        where = f"; jaxlm at {self.url}" if self.url else ""
        cache = "" if self.kv_dtype == "auto" else f", KV cache in {self.kv_dtype}"
        slots = f"{self.slots or SLOTS} slots of {length:,} tokens"
        return f"- {name}, {self.quantize or self.dtype} weights{cache}{where}; {slots}"

    @contextmanager
    def servers(self, name: str | None, rivals: Sequence[str], length: int) -> "Iterator[list[Server]]":
        """Yields the servers to measure, jaxlm first. Those that it starts end with the context.

        Raises:
            ValueError: A server cannot be started, or the model has no GGUF file.
        """
        from jaxlm.bench import rival_files, serve_process
        from jaxlm.bench.serve_session import Server
        from jaxlm.exporting import open_model

        slots = self.slots or SLOTS
        with ExitStack() as started:

            def start(process: serve_process.ServerProcess) -> Server:
                started.callback(process.close)
                return Server(process.name, process.url)

            if self.url is not None:
                found = [Server("jaxlm" if rivals else "server", self.url.rstrip("/"))]
            else:
                with explain_missing_package("bench serve", "jaxlm[server]"):
                    import uvicorn  # noqa: F401  (fails here, not in the process)
                note("starting jaxlm serve, which compiles its programs …")
                found = [start(serve_process.start_jaxlm(self._model_arguments(name), slots, length))]
            if rivals:
                file = rival_files.gguf_for_server(open_model(self.source(name)), note)
                note("starting llama.cpp …")
                found.append(start(serve_process.start_llama_cpp(file, slots, length)))
            yield found

    def _model_arguments(self, name: str | None) -> list[str]:
        """The flags of the model as arguments of `jaxlm serve`."""
        if self.adapter is not None:
            raise ValueError("bench serve measures a model without adapters: merge --adapter first (jaxlm fuse)")
        arguments, of_processes = ["-m", str(name)], {field.name for field in fields(ProcessFlags)}
        for field in fields(GenerationFlags):
            value = getattr(self, field.name)
            if field.name in of_processes | {"model"} or value == field.default:
                continue
            if field.name == "token":  # a command line is visible to others
                os.environ["HF_TOKEN"] = value
                continue
            flag = f"--{field.name.replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            arguments += [flag if each is True else f"{flag}={each}" for each in values]
        return arguments


def _text_and_answer(line: PromptLine) -> tuple[str | list[int], str | None]:
    """The prompt of a line, and the answer beside it."""
    answer = line.fields.get("completion")
    with explain_errors(line.where):
        if line.tools or has_messages(line.prompt):
            raise ValueError('bench serve sends completions: write {"prompt": "..."} without messages')
        if answer is not None and not (isinstance(answer, str) and answer):
            raise ValueError("the field 'completion' must be a text")
    return line.prompt, answer
