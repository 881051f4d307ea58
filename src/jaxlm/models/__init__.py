"""The families: which module computes which `model_type` of Hugging Face's config.json.

A family is a module with Config, PARAMS, NORM_IDENTITY, IGNORED_PREFIXES, forward and logits; llama3.py is the one to
read first. `register` adds one from outside the package.
"""

from functools import partial
from typing import Any

from jaxlm.models import gemma3, llama3, olmo2, qwen3
from jaxlm.models.config import brief

FAMILIES: dict[str, Any] = {}


def register(model_type: str, family: Any) -> None:
    """Makes `load` use `family` for checkpoints whose config.json has this model_type, and gives it a `load`."""
    FAMILIES[model_type] = family
    family.load = partial(_load, family)


def _load(family: Any, name: Any, **options: Any) -> Any:
    from jaxlm.loading import load

    return load(name, family=family, **options)


def family_of(model_type: Any) -> Any:
    """The family of a model_type, or a ValueError that lists what is supported."""
    if model_type is None:
        raise ValueError("this is no config.json of a model: it has no model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {brief(model_type)} is not supported; jaxlm knows {', '.join(sorted(FAMILIES))}. "
            "Another family joins with jaxlm.models.register(model_type, module)."
        )
    return FAMILIES[model_type]


for _type, _family in (
    ("llama", llama3),
    ("qwen3", qwen3),
    ("olmo2", olmo2),
    ("gemma3_text", gemma3),
    ("gemma3", gemma3),
):
    register(_type, _family)
