"""What the commands share: the model's flags, the process's settings, and what is told on stderr."""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from jaxlm.model import Model

STORIES = Path(__file__).parents[1] / "stories"  # what runs where no model is named: a checkpoint in the package


@dataclass(frozen=True)
class _ModelFlags:
    """Which model, and how it is loaded."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"], metavar="NAME|FOLDER")] = None
    """Hugging Face hub id or a local folder; that of a LoRA adapter loads the base that it names."""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """LoRA adapter in PEFT's form, beside the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto keeps the file's."""
    format: Literal["hf", "meta"] | None = None
    """Form of the files: Hugging Face's, or Meta's originals (consolidated.*.pth); default: what the folder holds."""
    tokenizer: Path | None = None
    """Folder or tokenizer.model, where it does not lie beside the weights."""
    rope_factor: float | None = None
    """What Meta's params.json does not say: 8 for Llama 3.1 and 3.3, 32 for 3.2. Known for published models."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    token: str | None = None
    """Hub access token; better kept in HF_TOKEN or by `hf auth login`."""
    offline: bool = False
    """Use the local cache only, never the network."""
    allow_field: tuple[str, ...] = ()
    """Let a field of config.json pass that jaxlm does not know."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="data=2,model=4")] = None
    """How the devices share the work: copies for different rows of a batch, and parts of the weights. Default: all on
    model as far as the heads divide."""


@dataclass(frozen=True)
class ProcessFlags:
    """How the process meets others, and what it tells of errors. Named before other bases: its flags then come last."""

    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Several processes, started by hand: the address of process 0, with the next two."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""
    distributed: bool = False
    """Several processes, on a cluster that jax knows and whose launcher does not say so."""
    debug: bool = False
    """Show the traceback of an error."""

    def begin(self) -> None:
        """Settings of the process; one of several meets the others, and is silent unless it is the first."""
        from jaxlm.devices import distributed as processes

        set_up_process()
        if not self.alone and processes.process_index() is None:
            where = f" at {self.coordinator}" if self.coordinator else ""
            if self.coordinator is None or None not in (self.num_processes, self.process_id):
                count = self.num_processes or processes.num_launched()
                note(f"waiting for {count} processes{where}, {processes.CONNECT} s at most …")
            import jax

            jax.config.update("jax_enable_preemption_service", False)  # it would catch a SIGTERM and go on
            processes.start(self.coordinator, self.num_processes, self.process_id, self.distributed)
            silence_workers(processes.is_coordinator())
            processes.gather("here")  # the first exchange waits 30 s (Gloo), later ones as long as it takes

    @property
    def alone(self) -> bool:
        """Whether this is the only process, as far as flags and launcher say."""
        from jaxlm.devices import distributed as processes

        by_hand = (self.coordinator, self.num_processes, self.process_id) != (None, None, None)
        return not (by_hand or self.distributed or processes.num_launched() > 1)


@dataclass(frozen=True)
class ModelFlags(ProcessFlags, _ModelFlags):
    """Which model, how it is loaded, and in which process."""

    def options(self) -> dict[str, Any]:
        """The arguments of jaxlm.load beside the name and the type."""
        return {
            "adapter": self.adapter,
            "format": self.format,
            "tokenizer": self.tokenizer,
            "rope_factor": self.rope_factor,
            "revision": self.revision,
            "token": self.token,
            "offline": self.offline,
            "allow_fields": self.allow_field,
        }

    def stdin(self) -> str:
        """What stands on stdin; of several processes, on that of the first."""
        if self.alone:
            return sys.stdin.read()
        from jaxlm.devices import distributed as processes

        self.begin()
        return processes.broadcast(sys.stdin.read() if processes.is_coordinator() else "")

    def load(self) -> "Model":
        """Loads the model, with notices on stderr."""
        self.begin()
        import jaxlm
        from jaxlm.devices.hardware import unseen_accelerator
        from jaxlm.inference.decoding import on_compile

        name, options = self.model, self.options()
        if name is None and self.adapter is not None:  # it names its base
            name, options["adapter"] = self.adapter, None
        if name is None:
            name = str(STORIES)
            note("No model named (-m): using the story model that comes with jaxlm. It continues children's stories.")
        if unseen := unseen_accelerator():
            note(unseen)
        model = jaxlm.load(name, dtype=self.dtype, mesh=self.mesh, **options)
        if model.ignored:
            note(f"{len(model.ignored)} tensors are known but not used yet (vision): text only.")
        on_compile.set(compiling)
        return model


def set_up_process() -> None:
    """Settings of the whole process, which only the command line may make; environment variables win."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_folder() / "xla"
    # Extension modules turn a Ctrl-C in the middle of their import into an ImportError: here it just ends the process.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    import jax

    signal.signal(signal.SIGINT, before)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def nowhere() -> IO[str]:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def silence_workers(speaks: bool) -> None:
    """What libraries print on stdout goes to stderr (Gloo does), and of several processes one is heard. Errors are
    written to sys.__stderr__ by all of them."""
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding) if speaks else nowhere()
    os.dup2(2, 1)
    if not speaks:
        sys.stderr = nowhere()


def cache_folder() -> Path:
    """Where jaxlm keeps what it can make again: $XDG_CACHE_HOME/jaxlm or ~/.cache/jaxlm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"


def note(text: str) -> None:
    """A line on stderr, dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def compiling(name: str, seconds: float | None = None) -> None:
    """Tells of a compilation while it lasts. On a terminal the notice stands behind the text that the line holds
    already, and goes when it is over; elsewhere it is a line with the seconds."""
    if not sys.stderr.isatty():
        print(f"compiling {name} …" if seconds is None else f" {seconds:.1f} s", file=sys.stderr, flush=True,
              end="" if seconds is None else "\n")  # fmt: skip
    elif seconds is None:  # saves the cursor, and restores it to wipe what came after
        print(f"\0337\033[2m compiling {name} …\033[0m", end="", file=sys.stderr, flush=True)
    else:
        print("\0338\033[J", end="", file=sys.stderr, flush=True)
