"""The configuration of a training run: one tree of dataclasses, which is the Python argument, the YAML file and the
flags. The docstrings of the fields are the help texts."""

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.data.field_types import Checked
from jaxlm.data.formats import Format
from jaxlm.processing.chat_template import parse_value

# Renamed fields and groups: earlier name -> name. run.json of an earlier version has the earlier names, in the spelling
# of that time.
RENAMED_FIELDS = {"optimiser": "optimizer", "data.form": "data.format", "data.learn": "data.train_on"}


@dataclass(frozen=True)
class Data(Checked):
    """Training data."""

    train: tuple[str, ...] = ()
    """Training data: files (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow, also .gz and .zst of texts), folders,
    globs, or hub datasets. NAME=WEIGHT for each draws the rows of batches in these proportions."""
    valid: tuple[str, ...] = ()
    """Validation data, named likewise. A folder or dataset with splits contributes its validation split. SET=NAME is of
    a set with its own loss, valid_loss_SET."""
    streaming: bool = False
    """Read the training data while training, instead of tokenizing all of them to the disk first. Hub datasets are read
    over the network. The length of the run is --steps, not --epochs."""
    shuffle_buffer: int = 10_000
    """Documents that are shuffled together, in memory, with --data.streaming."""
    valid_split: float = 0.0
    """Fraction of the training documents to hold out as validation data, if --data.valid is not given."""
    dataset: Annotated[str | None, tyro.conf.arg(aliases=["--dataset"])] = None
    """Hub dataset to train on (wikitext, org/name)."""
    config: str | None = None
    """Configuration of a hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: Format | None = None
    """Row format. Default: detected from the first row."""
    train_on: Literal["assistant", "completion", "all"] | None = None
    """Loss mask: assistant turns, the completion, or all tokens. Default: assistant turns or completions if the format
    has them, else all tokens."""
    text_field: str = "text"
    """Field of a row that holds the text."""
    prompt_field: str = "prompt"
    """Field of a row that holds the prompt."""
    completion_field: str = "completion"
    """Field of a row that holds the completion."""
    template_arg: tuple[str, ...] = ()
    """Variables of the chat template, NAME=VALUE. VALUE is true, false or none (in any case), JSON or text."""
    packing: Literal["split", "whole", "none"] | None = None
    """Packing of documents into rows: split (cut where a row ends), whole (best fit, uncut) or none (one document per
    row). Default: split for text, whole for other formats."""
    long: Literal["truncate", "drop", "stop"] = "truncate"
    """Documents longer than a row, with packing whole or none: truncate, drop, or stop with an error."""
    on_bad: Literal["stop", "skip"] = "stop"
    """Invalid rows: stop with an error, or skip and count them."""

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables of `template_arg`. Raises ValueError for one without a value."""
        return dict(map(_template_variable, self.template_arg))


def _template_variable(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise ValueError(f"data.template_arg is {text!r}: write NAME=VALUE")
    return name, parse_value(value)


@dataclass(frozen=True)
class Optimizer(Checked):
    """Optimizer settings."""

    name: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    """Optimizer. muon applies to the matrices of layers; other weights use adam without weight decay."""
    lr: float = 3e-4
    """Peak learning rate. In finetune, 0 means 2e-4 for an adapter and 1e-5 for all weights."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate schedule after the warmup. wsd is constant and decays at the end."""
    warmup: float = 0.02
    """Linear warmup of the learning rate, in steps; below 1, as a fraction of all steps."""
    decay: float = 0.2
    """wsd: length of the final decay, as a fraction of all steps."""
    final: float = 0.1
    """Final learning rate, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay. Norms do not decay."""
    b1: float = 0.9
    """Decay rate of the first moment. The momentum of muon's matrices is always 0.95."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Adam epsilon."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the moments are stored. bfloat16 halves their memory; they are rounded stochastically."""
    clip: float = 1.0
    """Gradient clipping: maximum global norm of the gradient. 0 turns it off."""


@dataclass(frozen=True)
class LoraOptions(Checked):
    """LoRA settings (--method lora)."""

    rank: int = 16
    """Rank r of the adapter."""
    alpha: float = 32.0
    """LoRA alpha: the adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout rate of the adapter's inputs."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    targets: tuple[str, ...] = ()
    """Weights to adapt, by name (q or q_proj, ..., head). Default: all-linear, every matrix of the layers."""


@dataclass(frozen=True)
class Run(Checked):
    """A training run: what to train, on what, and how."""

    out: Path = Path("run")
    """Output folder: configuration, metrics, checkpoints, and at the end the model."""
    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"], metavar="MODEL")] = None
    """Checkpoint to start from: hub id, folder or .gguf file."""
    shape: Path | None = None
    """config.json of a new model with random weights."""
    tokenizer: Path | None = None
    """Folder of the tokenizer. Default: that of the checkpoint."""
    chat_template: Annotated[str | None, tyro.conf.arg(metavar="chatml|llama3|gemma|FILE.jinja")] = None
    """Chat template to train with, saved with the model: chatml, llama3, gemma, or a file. Special tokens that a named
    one needs are added to the vocabulary. Default: that of the tokenizer."""
    method: Literal["full", "lora"] = "full"
    """Train all weights (full) or a LoRA adapter (lora)."""
    adapter: Path | None = None
    """LoRA adapter to start from, in PEFT's format."""
    quantize: Literal["int8", "int8-weights", "int4", "fp8"] | None = None
    """Quantize the frozen weights while they are loaded, with --method lora (QLoRA)."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 0
    """Number of steps. 0: as many as --epochs needs, or 1000 without --epochs."""
    epochs: float = 0.0
    """Number of passes over the data, if --steps is 0."""
    batch: int = 32
    """Batch size: rows per step, over all devices."""
    length: int = 0
    """Row length in tokens. 0: the context length of the model, at most 1024."""
    accumulate: int = 1
    """Gradient accumulation: number of parts of a batch, computed one after the other to save memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations, matrix products and frozen weights. auto: bfloat16 on accelerators, float32 on CPU."""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which trained weights are stored. bfloat16 halves their memory; they are rounded stochastically."""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the gradients, and of their sum with --accumulate. bfloat16 halves their memory."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """Activation checkpointing: none, full, or dots (keep matmul outputs). auto: dots on CPU, where it is faster, else
    none."""
    z_loss: float = 0.0
    """z-loss coefficient."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="data=4,model=2")] = None
    """Device mesh: data parallelism with FSDP, times tensor parallelism. Default: all devices on data."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics, at most a tenth of all steps."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep."""
    eval_every: int = 200
    """Steps between evaluations (validation loss and sample texts). 0: only at the end."""
    eval_batches: int = 16
    """Maximum number of batches per evaluation. The last evaluation uses all validation data."""
    samples: tuple[str, ...] = ()
    """Prompts to continue at each evaluation. If the data are conversations, messages of the user to answer."""
    sample_tokens: int = 64
    """Maximum length of a sample text, in tokens."""
    report: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Services that also receive the metrics."""
    resume: Literal["auto", "never"] = "auto"
    """Resume from the last checkpoint in the output folder (auto), or stop with an error if there is one (never)."""

    def check(self) -> "Run":
        """Returns the run. Raises ValueError for values that are out of range or contradict each other."""
        if self.method == "lora" and self.model is None:
            raise ValueError("--method lora needs a checkpoint: give --model")
        if (self.model is None) == (self.shape is None):
            raise ValueError("give either --model (a checkpoint) or --shape (the config.json of a new model)")
        if self.adapter is not None and self.method != "lora":
            raise ValueError("--adapter needs --method lora; to train all weights, merge it first (jaxlm fuse)")
        if self.quantize is not None and self.method != "lora":
            raise ValueError("--quantize needs frozen weights, and --method full trains all of them: use --method lora")
        if not self.data.train and not self.data.dataset:
            raise ValueError("no training data: give --data.train FILES or --dataset NAME")
        if not 0 <= self.data.valid_split < 1:
            raise ValueError(f"data.valid_split is {self.data.valid_split}, but must be at least 0 and below 1")
        if self.data.valid_split and self.data.valid:
            raise ValueError("data.valid_split holds out training data, so it cannot be combined with data.valid")
        counts_epochs = self.epochs and not self.steps
        if self.data.streaming and (counts_epochs or self.data.valid_split):
            name, way = ("epochs", "--steps") if counts_epochs else ("data.valid_split", "--data.valid")
            raise ValueError(f"{name} needs the number of documents, which data.streaming does not know: give {way}")
        if self.data.shuffle_buffer != Data.shuffle_buffer and not self.data.streaming:
            raise ValueError(
                "data.shuffle_buffer needs data.streaming: without it, all documents are shuffled together"
            )
        if self.data.shuffle_buffer < 1:
            raise ValueError(f"data.shuffle_buffer is {self.data.shuffle_buffer}, but must be at least 1")
        for name in ("batch", "accumulate", "log_every", "save_every", "keep", "eval_batches", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("steps", "epochs", "length", "eval_every", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, but must be between 0 and {(1 << 32) - 1}")
        for name in ("lr", "warmup", "decay", "final", "weight_decay", "eps", "clip"):
            if getattr(self.optimizer, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self.optimizer, name)}, but must be at least 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self.optimizer, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self.optimizer, name)}, but must be in [0, 1)")
        if self.lora.rank < 1:
            raise ValueError(f"lora.rank is {self.lora.rank}, but must be at least 1")
        if not 0 <= self.lora.dropout < 1:
            raise ValueError(f"lora.dropout is {self.lora.dropout}, but must be in [0, 1)")
        if self.batch % self.accumulate:
            raise ValueError(f"batch is {self.batch}, which accumulate ({self.accumulate}) does not divide")
        if self.method != "lora" and self.lora != LoraOptions():
            raise ValueError("settings of an adapter (lora) need method lora: give --method lora, or omit them")
        return self


def current_name(name: str) -> str:
    """Returns today's name of a field that an earlier version called `name` ("data.form" -> "data.format")."""
    for old, new in RENAMED_FIELDS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def field_names(cls: type, before: str = "") -> Iterator[str]:
    """Yields the fields of a dataclass tree ("steps", "optimizer.lr"), groups left out."""
    for f in dataclasses.fields(cls):
        group = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        value = group() if group else None
        if dataclasses.is_dataclass(value):
            yield from field_names(type(value), f"{before}{f.name}.")
        else:
            yield f"{before}{f.name}"


def to_dict(value: Any) -> Any:
    """Returns a dataclass tree as plain values, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flags(values: dict[str, Any], typed: Collection[str] = (), before: str = "") -> list[str]:
    """Returns the fields of a YAML file as flags, whose names and types the command line checks.

    Args:
        values: The contents of the file.
        typed: Flags of the command line. They override the file.
        before: Prefix of the names ("optimizer.").

    Returns:
        The flags. A flag and its value are one token, so that a value may begin with a hyphen.
    """
    result = []
    for name, value in values.items():
        no = "no-" if value is False else ""
        flag = f"--{before}{no}{name}".replace("_", "-")
        if isinstance(value, dict):
            result += flags(value, typed, f"{before}{name}.")
        elif isinstance(value, bool):
            result.append(flag)
        elif value is not None and flag not in typed:
            result += [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return result
