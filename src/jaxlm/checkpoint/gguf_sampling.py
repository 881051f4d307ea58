"""The default sampling parameters of a GGUF file (`general.sampling.*`), as fields of generation_config.json.

Source: gguf-py/gguf/constants.py and common/common.cpp in ggml-org/llama.cpp, which uses them where no flag is given.
"""

import logging
from collections.abc import Mapping
from typing import Any

PREFIX = "general.sampling."
# Key behind the prefix: field of generation_config.json.
FIELDS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# The other keys, at the values that change nothing. The rest of mirostat's and xtc's keys act only beside these.
NEUTRAL = {"xtc_probability": 0, "mirostat": 0}
COMPANIONS = ("xtc_threshold", "mirostat_tau", "mirostat_eta")
_log = logging.getLogger(__name__)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a generation_config.json that the metadata stand for; empty if they have none. Keys that jaxlm does
    not compute are logged by name."""
    found = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    config = {field: found.pop(key) for key, field in FIELDS.items() if key in found}
    if isinstance(config.get("top_k"), int | float):
        config["top_k"] = max(0, config["top_k"])  # llama.cpp: no limit from 0 down
    if config.get("repetition_penalty", 1) == 1:
        found.pop("penalty_last_n", None)  # how far back the penalty looks
    others = [key for key, value in found.items() if key not in COMPANIONS and NEUTRAL.get(key, "") != value]
    if others:
        names = ", ".join(f"{PREFIX}{key[:80]}" for key in others[:20])
        _log.warning("the GGUF file has sampling parameters that jaxlm does not support and ignores: %s", names)
    return {"do_sample": config.get("temperature") != 0, **config} if config else {}
