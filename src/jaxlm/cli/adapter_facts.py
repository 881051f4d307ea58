"""What `jaxlm info` tells of a LoRA adapter, from its config and the header of its file."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm.cli.common import ModelFlags


def split(name: str | None, flags: ModelFlags) -> tuple[str, Path | None]:
    """The model's name, and the folder of its adapter: one that is named alone, as model or as adapter, names it."""
    from jaxlm.checkpoint import hub
    from jaxlm.checkpoint.peft_config import read_settings

    if name is not None and flags.adapter is not None:
        return name, hub.resolve_adapter(flags.source(name).of_adapter())
    alone = str(name or flags.adapter)
    folder = None
    if flags.adapter is not None:
        folder = hub.resolve_adapter(flags.source(alone))
    elif not (Path(alone).expanduser() / hub.CONFIG).is_file() and Path(alone).expanduser().is_dir():
        with suppress(OSError):
            folder = hub.resolve_adapter(flags.source(alone))
    if folder is None:
        return alone, None
    base = read_settings(folder, flags.allow_field).base
    if base is None:
        raise ValueError(f"{alone} is an adapter and does not say of which model: name it (-m BASE --adapter {alone})")
    return base, folder


def describe(folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None, allow: tuple[str, ...]) -> Any:
    """Parameters, bytes, and for each kind of weight the layers, ranks and scales; as plain values. tensors: the
    model's, by name."""
    from jaxlm import models
    from jaxlm.checkpoint import peft
    from jaxlm.nn import params

    family = models.family_of(config.get("model_type"))
    cfg = family.Config.from_hf(config, allow)
    here = {name: tensor for name, tensor in (tensors or {}).items() if tensor.file.is_file()}
    own = {row.path: here[name] for row in params.tensors(family.PARAMS, cfg) for name in row.names if name in here}
    found = peft.find(folder, family.PARAMS, cfg, family.IGNORED_PREFIXES, allow, own)
    kinds: dict[str, dict[str, Any]] = {}
    for row, a, _, scale in found.pairs:
        kind = kinds.setdefault(row.path.split(".")[-1], {"count": 0, "ranks": [], "scales": []})
        kind["count"] += 1
        kind["ranks"] = sorted({*kind["ranks"], a.shape[0]})
        kind["scales"] = sorted({*kind["scales"], scale})
    halves = [tensor for pair in found.pairs for tensor in (pair.a, pair.b)]
    return {
        "folder": str(folder),
        "parameters": sum(tensor.shape[0] * tensor.shape[1] for tensor in halves),
        "bytes": sum(tensor.nbytes for tensor in halves),
        "weights": kinds,
        "unread": len(found.ignored),
    }


def lines(adapter: dict[str, Any]) -> tuple[str, list[str]]:
    """The same for people: what stands beside the title, and a line for the weights that are adapted alike."""
    from jaxlm.devices.hardware import gigabytes

    alike: dict[str, list[str]] = {}
    for name, kind in adapter["weights"].items():
        ranks, scales = (", ".join(f"{n:g}" for n in kind[numbers]) for numbers in ("ranks", "scales"))
        alike.setdefault(f"rank {ranks}, scale {scales}, {kind['count']} of each", []).append(name)
    told = [f"{', '.join(names)}: {what}" for what, names in alike.items()]
    if adapter["unread"]:
        told.append(f"not read: {adapter['unread']} tensors of the half that sees")
    return f"{adapter['parameters']:,} parameters, {gigabytes(adapter['bytes'])}, {adapter['folder']}", told
