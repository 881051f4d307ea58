"""Shared by the commands: flags for the model and for distributed runs, process settings, notices on stderr."""

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli.interrupts import ends_at_once
from jaxlm.cli.line_input import read_stdin
from jaxlm.cli.terminal import compiling, devnull, is_quiet, note
from jaxlm.devices.compilation_cache import use_compilation_cache
from jaxlm.devices.compiler_flags import use_compiler_flags

if TYPE_CHECKING:
    from jaxlm.model import Model

STORIES = Path(__file__).parents[1] / "stories"  # the default model: a checkpoint that ships with the package


@dataclass(frozen=True)
class _ModelFlags:
    """Which model, and how to load it."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = None
    """Hugging Face hub id, local folder or GGUF file (org/name:FILE.gguf on the hub). A LoRA adapter is loaded together
    with its base model."""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="ADAPTER")] = None
    """LoRA adapter (of PEFT or mlx-lm) to apply to the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto keeps the type in the checkpoint."""
    quantize: Literal["int8", "int8-weights", "int4", "fp8", "stored"] | None = None
    """Quantize the weights while they are loaded: int8 and fp8 need half of the memory of bfloat16, int4 a third.
    int8-weights keeps activations as they are; int8 rounds them to 8 bits too, which is faster. stored keeps the
    quantized weights of a GGUF file as they are; by default they become bfloat16."""
    format: Literal["hf", "meta"] | None = None
    """Checkpoint format: Hugging Face, or Meta's original files (consolidated.*.pth). Default: detected."""
    tokenizer: Path | None = None
    """Tokenizer folder or tokenizer.model, if it is not stored with the weights."""
    rope_factor: float | None = None
    """RoPE scaling factor for Meta's original files, whose params.json omits it: 8 for Llama 3.1 and 3.3, 32 for 3.2.
    Default: the factor of the published model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    token: str | None = None
    """Hub access token. Prefer HF_TOKEN or `hf auth login`, which keep it out of the shell history."""
    offline: bool = False
    """Use local files and the cache only, without network access."""
    allow_field: tuple[str, ...] = ()
    """Fields of config.json that jaxlm refuses, to ignore because they do not change the result."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="data=2,model=4")] = None
    """Device mesh: sizes of data and tensor parallelism. Default: all devices, with the sizes that decode a full batch
    fastest by arithmetic (jaxlm plan)."""


@dataclass(frozen=True)
class ProcessFlags:
    """Flags for distributed runs and error output. Listed before other base classes, so that its flags come last."""

    memory_hint: ClassVar[str] = (
        "--quantize int8 (or int4), --dtype bfloat16, fewer --max-tokens, a smaller --batch-size or a smaller model"
    )
    """How to reduce device memory, for the message of an out-of-memory error."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of process 0, for processes started without a launcher. Requires the next two flags."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Index of this process, from 0."""
    distributed: bool = False
    """Let jax.distributed detect the cluster. Not needed with srun, mpirun or on a TPU pod."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Print results and errors only: no notices, progress or statistics."""
    debug: bool = False
    """Show the traceback of an error, and log messages for debugging."""

    @property
    def stops_at_sigterm(self) -> bool:
        """Whether the command ends by itself after SIGTERM."""
        return False

    def begin(self) -> None:
        """Configures the process. A distributed run waits for all processes, then silences all but the coordinator."""
        from jaxlm.devices.distributed import CONNECT, gather, is_coordinator, num_launched, process_index, start

        set_up_process()
        if self.debug:
            log_debug_messages()
        elif self.quiet:
            silence_warnings()
        if not self.is_single_process and process_index() is None:
            where = f" at {self.coordinator}" if self.coordinator else ""
            if self.coordinator is None or None not in (self.num_processes, self.process_id):
                note(f"waiting up to {CONNECT} s for {self.num_processes or num_launched()} processes{where} …")
            import jax

            # It catches SIGTERM, which training handles and other commands do not.
            jax.config.update("jax_enable_preemption_service", self.stops_at_sigterm)
            start(self.coordinator, self.num_processes, self.process_id, self.distributed)
            silence_workers(is_coordinator())
            gather("here")  # only the first collective of Gloo has a timeout (30 s)

    @property
    def is_single_process(self) -> bool:
        """Whether neither the flags nor a launcher start several processes."""
        from jaxlm.devices.distributed import num_launched

        explicit = (self.coordinator, self.num_processes, self.process_id) != (None, None, None)
        return not (explicit or self.distributed or num_launched() > 1)


class NoteHandler(logging.Handler):
    """Prints log messages as notices, so that they do not appear in the text of an answer."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


def log_debug_messages() -> None:
    """Writes all messages of jaxlm's loggers to stderr."""
    logger, handler = logging.getLogger("jaxlm"), NoteHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def silence_warnings() -> None:
    """Turns off warnings of jaxlm and of the libraries that it loads models with."""
    for name in ("jaxlm", "transformers", "huggingface_hub", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@dataclass(frozen=True)
class ModelFlags(ProcessFlags, _ModelFlags):
    """Flags for the model and for distributed runs."""

    def source(self, name: str | None = None) -> ModelSource:
        """The checkpoint that the flags select: `name`, else --model, else the base model of --adapter."""
        name = name or self.model
        return ModelSource(
            name=str(name or self.adapter),
            adapter=self.adapter if name else None,
            format=self.format,
            tokenizer=self.tokenizer,
            rope_factor=self.rope_factor,
            revision=self.revision,
            token=self.token,
            offline=self.offline,
            allow_fields=self.allow_field,
        )

    def stdin(self) -> str:
        """Reads stdin; in a distributed run, that of the coordinator. A process may have no stdin."""
        if self.is_single_process:
            return read_stdin()
        from jaxlm.devices.distributed import broadcast, is_coordinator

        self.begin()
        return broadcast(read_stdin() if is_coordinator() else "")

    def load(self) -> "Model":
        """Loads the model, with notices on stderr."""
        with ends_at_once():
            self.begin()
            from jaxlm.inference.compilation import on_compile
            from jaxlm.processing.tokenizer_files import import_transformers

            import_transformers()
            model = self._load()
        for text in model.checkpoint.notes if model.checkpoint else ():
            note(f"{text}.")
        if model.ignored:
            note(f"{len(model.ignored)} tensors of the vision tower are not loaded: text only.")
        on_compile.set(compiling)
        return model

    def _load(self) -> "Model":
        import jaxlm
        from jaxlm.devices.hardware import unseen_accelerator

        name = None
        if self.model is None and not self.adapter:
            name = str(STORIES)
            note("No model given (-m): using the story model that ships with jaxlm. It continues children's stories.")
        if unseen := unseen_accelerator():
            note(unseen)
        return jaxlm.load(self.source(name), **self.load_options(), progress=progress_flag())

    def load_options(self) -> dict[str, Any]:
        """Arguments of `load` besides the source."""
        return {"dtype": self.dtype, "quantize": self.quantize, "mesh": self.mesh}


@dataclass(frozen=True)
class GenerationFlags(ModelFlags):
    """ModelFlags, and those of the KV cache."""

    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = "auto"
    """Data type of the KV cache. int8 and fp8 take about half the memory of bfloat16. auto depends on the platform."""

    def load_options(self) -> dict[str, Any]:
        return {**super().load_options(), "kv_dtype": self.kv_dtype}


def set_up_process() -> None:
    """Configures jax for the process. The library does not change process-wide settings. Environment variables take
    precedence."""
    with ends_at_once():
        import jax  # noqa: F401
    use_compilation_cache()
    use_compiler_flags()


def silence_workers(is_coordinator: bool) -> None:
    """Redirects the output of libraries from stdout to stderr (Gloo prints there), and discards the output of all
    processes but the coordinator. Errors of every process go to sys.__stderr__."""
    options = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
    sys.stdout = os.fdopen(os.dup(1), "w", **options) if is_coordinator else devnull()
    os.dup2(2, 1)
    if not is_coordinator:
        sys.stderr = devnull()


def progress_flag() -> bool | None:
    """The argument `progress` of load and export: None shows a bar on a terminal."""
    return False if is_quiet() or os.environ.get("TERM") == "dumb" else None
