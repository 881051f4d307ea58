"""The hardware matrix (`jaxlm check`): its models, its devices, and the records of both (bench/records.py)."""

import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import models
from jaxlm.bench.published import MODELS, find
from jaxlm.bench.records import SCHEMA, Record
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import hardware, host_memory, specs
from jaxlm.devices.specs import Spec
from jaxlm.loading import resolving
from jaxlm.nn import params
from jaxlm.version import __version__

PACKAGES = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin", "jax-rocm7-plugin"), "cpu": ()}


class Subject(NamedTuple):
    """A model to check.

    Attributes:
        name: Hub id, or another name.
        family: The module of the architecture.
        cfg: The model's Config.
        tuned: Whether it is instruction-tuned; None if it is not published as either.
        page, config_page: Its page and its config.json on the web.
        source: Where its weights are; None for the hub id.
    """

    name: str
    family: Any
    cfg: Any
    tuned: bool | None
    page: str | None
    config_page: str | None
    source: ModelSource | None = None

    @property
    def parameters(self) -> int:
        return params.count(self.family.PARAMS, self.cfg)

    @property
    def shapes(self) -> str:
        """A digest of the shapes of the weights and the KV cache. The programs of two models that share it take the
        same time and memory."""
        rows = [(row.path, row.shape) for row in params.tensors(self.family.PARAMS, self.cfg)]
        text = repr((self.family.__name__, rows, self.cfg.windows, self.cfg.K, self.cfg.H))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Device(NamedTuple):
    """Devices of one kind.

    Attributes:
        name: Of the file and the column: v5e-8, H100, cpu.
        spec: Figures of one device.
        count: Number of devices.
        machine: Processor, cores and memory of the machine, if the device is at hand.
    """

    name: str
    spec: Spec
    count: int
    machine: dict[str, Any] | None = None


class Settings(NamedTuple):
    """What every check of a call has in common.

    Attributes:
        batch: Rows that are decoded together.
        context: Tokens per row in the KV cache, at most the context length of the model.
        dtype: Name of the dtype of weights and activations.
        quantize: The type of quantized weights; None if they are not.
    """

    batch: int = 8
    context: int = 4096
    dtype: str = "bfloat16"
    quantize: str | None = None


def published() -> list[Subject]:
    """Every published model, the smallest first."""
    found = [_published(name) for name in MODELS]
    return sorted(found, key=lambda subject: (subject.parameters, subject.name))


def _published(name: str, source: ModelSource | None = None) -> Subject:
    model = MODELS[name]
    family = models.family_of(model.config["model_type"])
    return Subject(
        name, family, family.Config.from_hf(model.config), model.tuned, model.page, model.config_page, source
    )


def subject_of(name: str, listed_as: str | None = None, tokenizer: Path | None = None) -> Subject:
    """The model of a hub id, a folder or a .gguf file.

    Args:
        name: A published model's hub id or the part after the organization; or what `load` takes.
        listed_as: The published model whose weights these are, or another name: a hub id, a URL, or any text.
        tokenizer: Folder of the tokenizer, if it is not in the checkpoint.

    Raises:
        ValueError, OSError: The checkpoint cannot be read, or its shapes are not those of `listed_as`.
    """
    known = find(name)
    if known is not None and listed_as is None and not Path(name).exists():
        return _published(known.id)
    source = ModelSource(name, tokenizer=tokenizer)
    resolved = resolving.match_tensors(source, headers_only=True)
    label = listed_as or (name if not Path(name).exists() else Path(name).name)
    if (known := find(label)) is not None:
        subject = _published(known.id, source)
        mine = subject._replace(family=resolved.family, cfg=resolved.config)
        if mine.shapes != subject.shapes:
            raise ValueError(f"{name} does not have the shapes of {known.id}: check --as, or choose another name")
        return subject
    is_url = label.startswith(("https://", "http://"))
    is_hub = label.count("/") == 1 and not Path(label).exists()
    page = label if is_url else f"https://huggingface.co/{label}" if is_hub else None
    text = label.split("://", 1)[1].partition("/")[2] if is_url else label
    return Subject(text, resolved.family, resolved.config, None, page, None, source)


def named(text: str) -> Device:
    """The device of a name such as v5e-8, H100 or cpu.

    Raises:
        ValueError: The name is unknown, or there is no TPU slice of this size.
    """
    if text.lower() == "cpu":
        return _this_cpu("cpu")
    spec, count = specs.parse(text)
    if spec.platform == "tpu":
        specs.slice_shape(spec, count)
    return Device(specs.slice_name(spec, count), spec, count)


def at_hand(name: str | None = None) -> Device:
    """The devices of this machine that jax uses.

    Args:
        name: A name for them. Default: that of the device; cpu for a CPU.
    """
    first, count = jax.local_devices()[0], jax.local_device_count()
    if first.platform == "cpu":
        return _this_cpu(name or "cpu")
    machine = _machine() | {"accelerator": first.device_kind}
    spec = specs.of_device(first)
    if spec is None:
        limit = (first.memory_stats() or {}).get("bytes_limit", 0)
        spec = _unknown(first.device_kind, first.platform, limit)
    return Device(name or specs.slice_name(spec, count), spec, count, machine)


def _this_cpu(name: str) -> Device:
    machine = _machine()
    return Device(name, _unknown("cpu", "cpu", machine["memory"]), 1, machine)


def _unknown(kind: str, platform: str, memory: int) -> Spec:
    """The specification of a device whose rates are unknown: they are 1, and not used."""
    return Spec(kind, kind, platform, memory, 1, 1, 1, 0, 1, "")


def _machine() -> dict[str, Any]:
    """Processor, cores and bytes of memory of this machine, in whole GiB: the kernel keeps a varying part."""
    memory = host_memory.host_memory("MemTotal") or hardware.available_memory(jax.devices("cpu")[0]) or 0
    return {"processor": _processor(), "cores": _cores(), "memory": round(memory / 2**30) << 30}


def _processor() -> str:
    """The name of the processor, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(spec: Spec) -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"jaxlm": __version__, "jax": jax.__version__, "python": platform.python_version()}
    for name in ("jaxlib", *PACKAGES[spec.platform]):
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def blank(subject: Subject, device: Device, settings: Settings, method: str, command: str) -> Record:
    """A record without a result."""
    sizes = {letter: getattr(subject.cfg, letter) for letter in "VDFLNKH"}
    return {
        "schema": SCHEMA,
        "model": subject.name,
        "family": subject.family.__name__.rpartition(".")[2],
        "tuned": subject.tuned,
        "parameters": subject.parameters,
        "sizes": sizes,
        "shapes": subject.shapes,
        "page": subject.page,
        "config_page": subject.config_page,
        "device": device.name,
        "platform": device.spec.platform,
        "devices": device.count,
        "cores": device.spec.cores,
        "device_memory": int(device.spec.memory),
        "machine": device.machine,
        "method": method,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(device.spec),
        "command": command,
        "batch": settings.batch,
        "context": min(settings.context, subject.cfg.context),
        "dtype": settings.dtype,
        **({} if settings.quantize is None else {"quantize": settings.quantize}),
    }
