"""adapter_config.json of PEFT, and of mlx-lm: how an adapter's tensors are used.

Fields that need other arithmetic than w + scale * b a, or a base with modified weights, are refused by name.
"""

import json
import logging
import math
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.errors import explain_errors
from jaxlm.checkpoint.safetensors import quoted, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_log = logging.getLogger(__name__)
WHOLE = "PEFT's merge_and_unload and then save_pretrained write a merged checkpoint, which jaxlm loads"
# Fields that do not change what the tensors compute: how they were trained, and by which program.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# Fields that need other arithmetic: only null, false or empty is accepted.
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
}  # fmt: skip
# Initializations that leave the base unchanged; the others subtract the initial adapter from the base.
INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
CONVERTED = "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…) converts it to an ordinary adapter"


class Layout(NamedTuple):
    """How a tool stores the factors of a module.

    Attributes:
        weights: the file.
        prefix, a, b: a factor's name is `<prefix><module><a or b>`.
        transposed: a is [inputs, r] and b [r, outputs] in the file, instead of [r, inputs] and [outputs, r].
    """

    weights: str
    prefix: str
    a: str
    b: str
    transposed: bool


PEFT = Layout(WEIGHTS, "base_model.model.", ".lora_A.weight", ".lora_B.weight", False)
MLX = Layout("adapters.safetensors", "", ".lora_a", ".lora_b", True)
LAYOUTS = (PEFT, MLX)


@dataclass(frozen=True)
class Settings:
    """Contents of an adapter's config.

    Attributes:
        base: the base model as the author named it.
        revision: the base's revision.
        rank, alpha, rslora: of all modules without a pattern of their own.
        ranks, alphas: patterns of module names with another rank or alpha.
        names: the adapted modules; empty if the config selects them in another way.
        layout: how the tensors are stored.
    """

    base: str | None
    revision: str | None
    rank: int
    alpha: float
    rslora: bool
    ranks: list[tuple[re.Pattern[str], int]]
    alphas: list[tuple[re.Pattern[str], float]]
    names: tuple[str, ...]
    layout: Layout = PEFT

    def of(self, module: str) -> tuple[int, float]:
        """A module's rank and alpha: those of the first pattern that matches, as in PEFT."""
        rank = next((n for pattern, n in self.ranks if pattern.match(module)), self.rank)
        return rank, next((x for pattern, x in self.alphas if pattern.match(module)), self.alpha)

    def targets(self, module: str) -> bool:
        """Whether the config names this module."""
        return any(module == name or module.endswith("." + name) for name in self.names)


def read_settings(folder: Path, allow: Collection[str] = ()) -> Settings:
    """Reads and checks adapter_config.json. allow: unknown fields to accept. ValueError names the file."""
    path = folder / CONFIG
    raw = read_json(path)
    with explain_errors(str(path)):
        if "peft_type" not in raw and ("lora_parameters" in raw or "fine_tune_type" in raw):
            return _mlx_settings(raw, folder)
        _check(raw, allow)
        return _settings(raw)


def _mlx_settings(raw: dict[str, Any], folder: Path) -> Settings:
    """The settings of an adapter of mlx-lm, whose config holds all arguments of `mlx_lm.lora`. Its `scale` is the
    factor on b a, not divided by the rank."""
    kind, found = raw.get("fine_tune_type") or "lora", raw.get("lora_parameters")
    if kind != "lora":
        raise ValueError(
            f"its fine_tune_type is {_shown(kind)}; jaxlm loads adapters of type lora. Merge it and load OUT: "
            f"mlx_lm.fuse --model BASE --adapter-path {folder} --save-path OUT"
        )
    if not isinstance(found, dict) or "scale" not in found:
        raise ValueError(f"lora_parameters is {_shown(found)}, and needs rank and scale")
    if "alpha" in found:
        _log.warning("%s: lora_parameters has alpha, which mlx-lm does not use: scale is used", folder / CONFIG)
    rank = _rank("lora_parameters.rank", found.get("rank"))
    scale = _alpha("lora_parameters.scale", found["scale"])
    return Settings(_text(raw, "model"), None, rank, scale * rank, False, [], [], (), MLX)


def _check(raw: dict[str, Any], allow: Collection[str]) -> None:
    """ValueError for fields that are not computed, all of them at once."""
    kind, init = raw.get("peft_type"), raw.get("init_lora_weights")
    if kind != "LORA":
        fault = "it has no peft_type" if kind is None else f"its peft_type is {_shown(kind)}"
        raise ValueError(f"{fault}; jaxlm loads LoRA adapters (LORA). {WHOLE}")
    known = HARMLESS | READ
    given = [name for name, value in raw.items() if name not in known and value not in (None, False, [], {}, "")]
    refused = [name for name in given if name in REFUSED]
    if raw.get("bias") not in (None, "none"):
        refused.append("bias")
    if refused:
        fields = ", ".join(f"{name} {_shown(raw[name])}" for name in refused)
        raise ValueError(f"it has {fields}, which jaxlm does not compute. {WHOLE}")
    if unknown := [name for name in given if name not in allow]:
        names = ", ".join(quoted(name) for name in unknown[:10])
        raise ValueError(
            f"unknown fields {names} may change what the adapter computes. If they do not, accept them with "
            "--allow-field (allow_fields=)"
        )
    if not isinstance(init, bool | str | None) or init not in INITS:
        raise ValueError(
            f"its init_lora_weights is {_shown(init)}, which may have changed the base's weights before training. "
            f"{CONVERTED}; or: {WHOLE}"
        )


def _settings(raw: dict[str, Any]) -> Settings:
    targets = raw.get("target_modules")
    names = targets if isinstance(targets, list) and all(isinstance(name, str) for name in targets) else []
    if raw.get("layers_to_transform") not in (None, []) or raw.get("exclude_modules") not in (None, [], ""):
        names = []  # only some of the modules with these names
    rank, alpha = _rank("r", raw.get("r", 8)), _alpha("lora_alpha", raw.get("lora_alpha", 8))
    rslora = raw.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise ValueError(f"use_rslora is {_shown(rslora)} instead of true or false")
    patterns = (_patterns(raw, "rank_pattern", _rank), _patterns(raw, "alpha_pattern", _alpha))
    return Settings(_text(raw, "base_model_name_or_path"), _text(raw, "revision"), rank, alpha, rslora, *patterns,
                    tuple(names))  # fmt: skip


def _text(raw: dict[str, Any], name: str) -> str | None:
    value = raw.get(name) or None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {_shown(value)} instead of a string")
    return value


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise ValueError(f"{name} is {_shown(value)} instead of an integer of at least 1")
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30 or math.isnan(value):
        raise ValueError(f"{name} is {_shown(value)} instead of a number")
    return value


def _patterns(raw: dict[str, Any], name: str, number: Any) -> list[tuple[re.Pattern[str], Any]]:
    table = raw.get(name) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {_shown(table)} instead of a table")
    return [(_compiled(name, key), number(f"{name} of {quoted(key)}", value)) for key, value in table.items()]


def _compiled(name: str, key: str) -> re.Pattern[str]:
    """A key as PEFT's get_pattern_key reads it: a regular expression for a module's name or its end. It is untrusted:
    one that might backtrack without end is refused."""
    plain = re.sub(r"\\.|\(\?:", "(", key)
    endless = re.search(r"\(\?|\)[*+{]", plain) or sum(char in "*+?{" for char in plain) > 3
    try:
        if len(key) > 500 or endless:
            raise ValueError("too many repetitions")
        with warnings.catch_warnings(action="ignore"):
            return re.compile(rf"(.*\.)?({key})$")
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name} has the unsupported pattern {quoted(key)} ({error}): use the names of modules, such as "
            "layers.3.self_attn.q_proj"
        ) from None


def _shown(value: Any) -> str:
    """A value as JSON, cut to the length of a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "…"
