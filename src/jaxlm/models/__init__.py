"""The model families: the module for each `model_type` of a Hugging Face config.json.

A family is a module with the attributes of `Family`, and its `Config` (family.py). To add one to the package:

- Copy llama3.py and list the new module in FAMILIES. Take the model_type out of unsupported.py.
- Give it a tiny configuration in tests/helpers/tiny_models.py, from which all tests take their families.
- Give it cases with planted faults (tests/oracle/cases.py, faults.py, test_verify.py), its class of rotary frequencies
  (test_frequencies.py), and a recording (tests/recordings/make.py).
- For GGUF, list its architecture in checkpoint/gguf_models.py, and in tests/helpers/gguf_writer.py.

docs/add_a_model.md goes through these steps.

`register` adds a family from outside the package:

    jaxlm.models.register("my_model", my_package.my_model)
    model = jaxlm.load("path/to/checkpoint")  # whose config.json has model_type "my_model"
"""

from typing import Any

from jaxlm.models import gemma3, llama3, olmo2, olmo3, qwen3, smollm3
from jaxlm.models.config import brief
from jaxlm.models.family import Family, check_family
from jaxlm.models.unsupported import REASONS

FAMILIES: dict[str, Family] = {
    "llama": llama3,
    "qwen3": qwen3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "gemma3_text": gemma3,
    "gemma3": gemma3,
}


def register(model_type: str, family: Family) -> None:
    """Makes `jaxlm.load` use `family` for checkpoints whose config.json has this model_type.

    Args:
        model_type: The field `model_type` of config.json.
        family: A module, or another object with the attributes of `Family`. It does not need a `load`.

    Raises:
        ValueError: The family lacks attributes, or a row of its PARAMS is invalid. All misfits are named together.
    """
    if not isinstance(model_type, str):
        raise ValueError(f"model_type must be a str, not {brief(model_type)}: register(model_type, family)")
    check_family(family)
    FAMILIES[model_type] = family


def family_of(model_type: Any) -> Family:
    """The family of a model_type.

    Raises:
        ValueError: model_type is None or not supported. The message says why (unsupported.py) and lists the supported
            ones.
    """
    if model_type is None:
        raise ValueError("config.json has no field 'model_type': it is not the config of a model, or is incomplete")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reason = REASONS.get(model_type) if isinstance(model_type, str) else None
        raise ValueError(
            f"model_type {brief(model_type)} is not supported{f': {reason}' if reason else ''}. Supported: "
            f"{', '.join(sorted(FAMILIES))}. Add a family with jaxlm.models.register(model_type, module)."
        )
    return FAMILIES[model_type]
