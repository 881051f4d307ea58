"""What a training run is: one tree of dataclasses, at once the Python argument, the YAML file and the flags."""

import dataclasses
import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# Renamed fields and groups: earlier name -> name. run.json of an earlier version has the earlier names.
RENAMED_FIELDS = {"optimiser": "optimizer", "data.form": "data.format", "data.learn": "data.train_on"}
# What other tools (transformers, TRL, PEFT, axolotl, nanoGPT) call a field.
OTHER_TOOLS = {
    "model_name_or_path": "model", "base_model": "model", "config_name": "shape", "tokenizer_name": "tokenizer",
    "output_dir": "out", "out_dir": "out", "overwrite_output_dir": "resume", "resume_from_checkpoint": "resume",
    "dataset_name": "data.dataset", "dataset_config_name": "data.config", "train_file": "data.train",
    "train_data": "data.train", "validation_file": "data.valid", "dataset_text_field": "data.text_field",
    "assistant_only_loss": "data.train_on", "completion_only_loss": "data.train_on", "train_on_inputs": "data.train_on",
    "sample_packing": "data.packing",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_steps": "steps", "max_iters": "steps",
    "batch_size": "batch", "train_batch_size": "batch", "micro_batch_size": "batch", "global_batch_size": "batch",
    "per_device_train_batch_size": "batch", "gradient_accumulation_steps": "accumulate",
    "max_seq_length": "length", "max_length": "length", "block_size": "length", "sequence_len": "length",
    "seq_len": "length", "context_length": "length",
    "lora_r": "lora.rank", "r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout", "use_rslora": "lora.rslora", "target_modules": "lora.targets",
    "lora_target_modules": "lora.targets",
    "learning_rate": "optimizer.lr", "optim": "optimizer.name", "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule", "warmup_steps": "optimizer.warmup", "warmup_ratio": "optimizer.warmup",
    "warmup_iters": "optimizer.warmup", "adam_beta1": "optimizer.b1", "beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2", "beta2": "optimizer.b2", "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip", "grad_clip": "optimizer.clip", "gradient_clipping": "optimizer.clip",
    "gradient_checkpointing": "remat", "activation_checkpointing": "remat",
    "bf16": "dtype", "fp16": "dtype", "tf32": "dtype", "precision": "dtype", "torch_dtype": "dtype",
    "save_steps": "save_every", "save_total_limit": "keep", "eval_steps": "eval_every", "eval_interval": "eval_every",
    "eval_iters": "eval_batches", "logging_steps": "log_every", "log_interval": "log_every", "report_to": "report",
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """What is learned from."""

    train: tuple[str, ...] = ()
    """Files (.txt, .jsonl, .json, .parquet), folders, globs, or hub datasets."""
    valid: tuple[str, ...] = ()
    """The same, for the loss on what is not learned; of a folder or dataset with splits the one for validation."""
    dataset: Annotated[str | None, tyro.conf.arg(aliases=["--dataset"])] = None
    """A hub dataset by name (wikitext, org/name), to learn from."""
    config: str | None = None
    """Of a hub dataset that has several configurations."""
    revision: str | None = None
    """Of a hub dataset: branch, tag or commit."""
    format: str | None = None
    """text, messages, prompt, instruction, question or conversations; default: what the first rows look like."""
    train_on: Literal["assistant", "completion", "all"] | None = None
    """Which tokens count; default: answers where there are any, else all."""
    text_field: str = "text"
    """Field of a row that is a text."""
    prompt_field: str = "prompt"
    """Field of a prompt."""
    completion_field: str = "completion"
    """Field of its completion."""
    template_arg: tuple[str, ...] = ()
    """A variable of the chat template, NAME=VALUE (JSON, else text)."""
    packing: Literal["split", "whole", "none"] | None = None
    """Rows are filled with documents cut where a row ends, with whole documents, or with one each."""
    long: Literal["truncate", "drop", "stop"] = "truncate"
    """What happens to a document that is longer than a row, where it is not cut."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What happens at a row that cannot be used."""


@dataclass(frozen=True)
class Optimizer:
    """How weights follow their gradients."""

    name: Literal["adamw", "muon", "adafactor", "lion"] = "adamw"
    """The method; muon (Jordan 2024) is for the matrices of layers, the rest then goes by adam without decay."""
    lr: float = 3e-4
    """Learning rate at its highest."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: down along a cosine or a line, or (wsd) stable and then down."""
    warmup: float = 0.02
    """Steps in which the rate rises from 0; below 1 a part of all steps."""
    decay: float = 0.2
    """wsd: the part of all steps in which the rate goes down at the end."""
    final: float = 0.1
    """The rate at the end, relative to `lr`."""
    weight_decay: float = 0.1
    """Decoupled decay of weights that are multiplied (not of norms)."""
    b1: float = 0.9
    """Decay of the mean of gradients; muon's matrices have their own, 0.95."""
    b2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """What is added to the denominator."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 does not clip."""


@dataclass(frozen=True)
class LoraOptions:
    """What is trained beside frozen weights (--method lora)."""

    rank: int = 16
    """r, the inner width of what is added."""
    alpha: float = 32.0
    """What is added is weighed by alpha / rank."""
    dropout: float = 0.0
    """Part of an adapter's inputs that is dropped at each step."""
    rslora: bool = False
    """Weigh by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    targets: tuple[str, ...] = ()
    """Weights by name (q or q_proj, …, head); all-linear, or none named, is every product of the layers."""


@dataclass(frozen=True)
class Run:
    """A training run. Its folder holds all of it: configuration, metrics, checkpoints, the model at the end."""

    out: Path = Path("run")
    """The run's folder."""
    model: str | None = None
    """Checkpoint to go on from: hub id or folder."""
    shape: Path | None = None
    """config.json of a model that begins with random weights."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, where no checkpoint brings one."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or an adapter."""
    adapter: Path | None = None
    """Adapter in PEFT's format to go on from."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 0
    """Steps in all; 0: as many as `epochs` says, or 1000."""
    epochs: float = 0.0
    """How often all data are seen, where no steps are given."""
    batch: int = 32
    """Rows of a step, over all devices."""
    length: int = 0
    """Tokens of a row; 0: as many as the model is made for, 1024 at most."""
    accumulate: int = 1
    """Parts into which a batch is cut to save memory; the gradient is that of the whole."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of products and activations, and of frozen weights; what is trained is float32. auto: bfloat16 on
    accelerators, float32 on CPU."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass computes again: nothing, all, or all but products."""
    z_loss: float = 0.0
    """Weight of the squared log-denominator of the softmax."""
    mesh: str | None = None
    """data=4,model=2; default: all devices on data."""
    seed: int = 0
    """Of the first weights and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics; a tenth of all steps at most."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """How many checkpoints are kept."""
    eval_every: int = 200
    """Steps between losses on `data.valid` and sample texts; 0: at the end alone."""
    eval_batches: int = 16
    """Batches of an evaluation at most; the one at the end sees all of `data.valid`."""
    samples: tuple[str, ...] = ()
    """Prompts that are continued at each evaluation."""
    sample_tokens: int = 64
    """Length of these texts at most."""
    report: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics also go."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on where the folder's last checkpoint ends."""

    def check(self) -> "Run":
        """Raises ValueError for what cannot be run."""
        if (self.model is None) == (self.shape is None):
            raise ValueError("name a checkpoint (--model) or a config.json for random weights (--shape), one of them")
        if self.method == "lora" and self.model is None:
            raise ValueError("LoRA adapts a checkpoint: name it (--model)")
        if self.adapter is not None and self.method != "lora":
            raise ValueError("an adapter goes on with --method lora; to train all weights, jaxlm fuse it first")
        if not self.data.train and not self.data.dataset:
            raise ValueError("name what to learn from: --data.train FILES, or --dataset NAME from the hub")
        for name in ("batch", "accumulate", "log_every", "save_every", "keep", "eval_batches", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("steps", "epochs", "length", "eval_every", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be below 0")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to {(1 << 32) - 1}")
        for name in ("lr", "warmup", "decay", "final", "weight_decay", "eps", "clip"):
            if getattr(self.optimizer, name) < 0:
                raise ValueError(f"optimizer.{name} is {getattr(self.optimizer, name)}, but must not be below 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self.optimizer, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self.optimizer, name)}, but must be from 0 to below 1")
        if self.lora.rank < 1 or not 0 <= self.lora.dropout < 1:
            raise ValueError(f"lora.rank is {self.lora.rank} (at least 1), lora.dropout {self.lora.dropout} (0 to 1)")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} cannot be cut into {self.accumulate} equal parts (accumulate)")
        return self


def current_name(name: str) -> str:
    """Returns today's name of a field that an earlier version called `name` ("optimiser.lr" -> "optimizer.lr")."""
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


def suggest(name: str, fields: Collection[str]) -> str:
    """Returns what to use in place of `name`, which is none of `fields`, as a phrase; "" where nothing is close."""
    if (new := current_name(name)) != name:
        return f"{name} is now {new}"
    last = name.rpartition(".")[2]
    by_last = {f.rpartition(".")[2]: f for f in reversed(list(fields))}
    by_last |= {old.rpartition(".")[2]: new for old, new in RENAMED_FIELDS.items()}
    if field := OTHER_TOOLS.get(last) or by_last.get(last):
        return f"use {field}"
    meant = {**OTHER_TOOLS, **by_last, **RENAMED_FIELDS, **{f: f for f in fields}}
    close = difflib.get_close_matches(name, meant, n=1) or difflib.get_close_matches(last, meant, n=1)
    return f"did you mean {meant[close[0]]}?" if close else ""


def to_dict(value: Any) -> Any:
    """A dataclass tree as plain values, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flags(values: dict[str, Any], given: Collection[str] = (), before: str = "") -> list[str]:
    """The fields of a YAML file as flags of the command, which checks names and types; those `given` there win. A flag
    and its value are one token, so that the value may begin with a hyphen."""
    found = []
    for name, value in values.items():
        no = "no-" if value is False else ""
        flag = f"--{before}{no}{name}".replace("_", "-")
        if isinstance(value, dict):
            found += flags(value, given, f"{before}{name}.")
        elif isinstance(value, bool):
            found.append(flag)
        elif value is not None and flag not in given:
            found += [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return found
