"""The model of `bench`, `plan` and `check`: a checkpoint, a config.json or the name of a published model."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import models
from jaxlm.bench import published
from jaxlm.checkpoint.source import ModelSource
from jaxlm.loading import resolving


class Shape(NamedTuple):
    """What is known of a model without its weights.

    Attributes:
        name: For messages and records.
        family: The module of the architecture.
        config: The model's Config.
        dtype: The type of the weights in the checkpoint, as config.json states it; bfloat16 if it does not.
        raw: The contents of config.json; of a vision-language model those of its text model.
    """

    name: str
    family: Any
    config: Any
    dtype: str
    raw: dict[str, Any]


def find(source: ModelSource) -> Shape:
    """Reads the config of a model. No weight is read.

    A local path comes first, then the table of published models, which needs no network, then the hub.

    Raises:
        ValueError: The architecture is not supported.
        OSError: There is no such model; the message names published models that resemble it.
    """
    name = str(source.name)
    model = None if Path(name).expanduser().exists() else published.find(name)
    if model is not None:
        family = models.family_of(model.config["model_type"])
        raw = model.config.get("text_config") or model.config
        return Shape(model.id, family, family.Config.from_hf(model.config), model.config["torch_dtype"], raw)
    if "/" not in name and not Path(name).expanduser().exists() and not source.adapter:
        similar = published.suggestions(name)
        hint = f": did you mean {', '.join(similar)}?" if similar else "; a hub id is ORGANIZATION/NAME"
        raise ValueError(f"there is no published model and no folder {name!r}{hint}")
    try:
        resolved = resolving.match_tensors(source, headers_only=True)
    except OSError as error:
        if similar := published.suggestions(name):
            error.add_note(f"Published models of a similar name: {', '.join(similar)}")
        raise
    config = resolved.checkpoint.config
    named = [one.get(key) for one in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    dtype = next((kind for kind in named if kind in ("float32", "bfloat16", "float16")), "bfloat16")
    return Shape(name, resolved.family, resolved.config, dtype, config.get("text_config") or config)
