"""Reads a Hugging Face config.json. `Fields` is used by `Config.from_hf` of the model files.

A field that changes the output of the model and that the model file does not read is an error (config_fields.py lists
these fields). An unknown field is logged by name.
"""

import importlib
import logging
import math
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from jaxlm.models.config_fields import MATHEMATICS, is_bookkeeping, is_neutral
from jaxlm.nn.rope import TYPES, Rope

if TYPE_CHECKING:
    from jaxlm.model import Model

LARGEST = 2**31 - 1  # ids and positions are int32
LAYERS = 2_000  # maximum number of layers, since configs may be malicious
REQUIRED: Any = object()
QUANTIZATION = ("quantization_config", "quantization", "compression_config")  # the last ones: MLX, compressed-tensors
_FULL, _SLIDING = "full_attention", "sliding_attention"
_log = logging.getLogger(__name__)


def family_load(name: str) -> Callable[..., "Model"]:
    """Creates the function `load` of a model file (`load = family_load(__name__)`).

    jaxlm.loading imports the model files, so it is imported only when `load` is called.
    """

    def load(checkpoint: Any, **options: Any) -> "Model":
        """`jaxlm.load` for a checkpoint of this family. Raises ValueError for another family."""
        return importlib.import_module("jaxlm.loading").load(checkpoint, family=sys.modules[name], **options)

    return load


class Fields:
    """The fields of a config.json. Each is read once; `done` raises an error for unread fields that change the output.

    Args:
        hf: The fields of config.json.
        allow: Names of fields to ignore that would be refused (`--allow-field`).
    """

    def __init__(self, hf: Mapping[str, Any], allow: Collection[str] = ()):
        self.left = dict(hf)
        self.allow = frozenset(allow)
        self.faults: list[str] = []
        self.layers = hf.get("num_hidden_layers")
        self.H: int | None = None

    def __call__(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a field; the default if it is absent or null."""
        value = self.left.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"config.json has no field {name!r}, which this architecture requires: add it")
        return default

    def number(self, name: str, default: Any = REQUIRED) -> int:
        """A field that is a size: an integer of at least 1."""
        value, largest = self(name, default), LAYERS if name == "num_hidden_layers" else LARGEST
        if type(value) is not int or not 1 <= value <= largest:
            raise ValueError(f"config.json: {name} is {brief(value)}, but must be an integer from 1 to {largest:,}")
        return value

    def real(self, name: str, default: Any = REQUIRED) -> float:
        """A field that is a number above 0."""
        return _positive(name, self(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        return _true_or_false(name, self(name, default))

    def section(self, name: str) -> dict[str, Any]:
        """A field that is an object; empty if it is absent or null."""
        value = self(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} is {brief(value)}, but must be an object")
        return dict(value)

    def must(self, name: str, expected: Any) -> None:
        """Checks that a field is absent, null, or `expected`, the only value that is supported."""
        value = self(name, expected)
        if value != expected and name not in self.allow:
            self.faults.append(f"{name} = {brief(value)} (only {expected!r} is supported)")

    def heads(
        self, D: int, default_H: int | None = None, default_N: int = REQUIRED, default_K: int | None = None
    ) -> tuple[int, int, int]:
        """N, K, H: query heads, kv heads and head width."""
        N = self.number("num_attention_heads", default_N)
        K = self.number("num_key_value_heads", default_K or N)
        H = self.number("head_dim", default_H or D // N)
        if N % K:
            raise ValueError(f"config.json: num_attention_heads {N} is not a multiple of num_key_value_heads {K}")
        if H % 2:
            raise ValueError(f"config.json: head_dim {H} is odd, but rotary position embedding needs an even width")
        self.H = H
        return N, K, H

    def context(self, default: Any = REQUIRED) -> int:
        """The context length in tokens."""
        return self.number("max_position_embeddings", default)

    def windows(self, L: int, default_window: int, default_every: int) -> tuple[int | None, ...]:
        """Sliding window of each layer; None for full attention. Without layer_types, every n-th layer is full."""
        window = self.number("sliding_window", default_window)
        every = self.number("sliding_window_pattern", self.number("_sliding_window_pattern", default_every))
        return self.windows_by_type(window, [_FULL if (i + 1) % every == 0 else _SLIDING for i in range(L)])

    def windows_by_type(self, window: int, default: list[str]) -> tuple[int | None, ...]:
        """Sliding window of each layer, from layer_types or this default for it."""
        kinds, L = self("layer_types", default), len(default)
        if not isinstance(kinds, list) or len(kinds) != L or not all(kind in (_FULL, _SLIDING) for kind in kinds):
            raise ValueError(f"config.json: layer_types must list {_FULL!r} or {_SLIDING!r} for each of {L} layers")
        return tuple(window if kind == _SLIDING else None for kind in kinds)

    def rope(self, context: int, default_theta: float | None = None) -> Rope:
        """The rope section, in transformers 4's format (rope_theta, rope_scaling) or 5's (rope_parameters)."""
        sections = self.section("rope_scaling") | self.section("rope_parameters")
        if (original := self("original_max_position_embeddings", None)) is not None:
            sections["original_max_position_embeddings"] = original  # it has priority in transformers too
        theta = self("rope_theta", default_theta)
        sections["rope_theta"] = theta if sections.get("rope_theta") is None else sections["rope_theta"]
        return read_rope(sections, context, self.allow)

    def rope_sections(self) -> dict[str, dict[str, Any]]:
        """The section of rope_parameters for each layer type; empty if the file has none."""
        ropes = Fields(self.section("rope_parameters"))
        sections = {kind: ropes.section(kind) for kind in (_FULL, _SLIDING)}
        if ropes.left:
            raise ValueError(
                f"config.json: rope_parameters must have sections {_FULL} and {_SLIDING}, not {brief(list(ropes.left))}"
            )
        return {kind: {k: v for k, v in fields.items() if v is not None} for kind, fields in sections.items()}

    def done(self, config: Any) -> Any:
        """Returns the config, and logs the names of unknown fields.

        Raises:
            ValueError: Fields change the output and are not computed.
        """
        for name in QUANTIZATION:  # checkpoint/quantized.py reads them, or refuses them
            self.left.pop(name, None)
        self._drop_unused_windows()
        unknown = []
        for name, value in self.left.items():
            if name in self.allow or is_bookkeeping(name):
                continue
            if name not in MATHEMATICS:
                unknown += [name] if value not in (None, False, "", [], {}) else []
            elif not is_neutral(name, value, self.H):
                self.faults.append(f"{name} = {brief(value)} (jaxlm does not compute {MATHEMATICS[name].needs} here)")
        if self.faults:
            more = len(self.faults) - 20
            raise ValueError(
                "config.json has fields that this architecture does not support: "
                + "; ".join(self.faults[:20])
                + f"; and {more} more fields" * (more > 0)
                + ". If a field does not change the result, allow it with --allow-field NAME (allow_fields=[NAME])."
            )
        if unknown:
            more = f" and {len(unknown) - 20} more" * (len(unknown) > 20)
            names = ", ".join(name[:80] for name in unknown[:20])
            _log.warning("config.json has fields that jaxlm does not know and does not use: %s%s", names, more)
        return config

    def _drop_unused_windows(self) -> None:
        """Drops the fields of a sliding window that no layer has, as in transformers' Qwen3Config. There the default of
        use_sliding_window is false; only configs of its kind have max_window_layers."""
        left, kinds = self.left, self.left.get("layer_types")
        first, layers = left.get("max_window_layers"), self.layers  # the first layer with a window
        if (
            (isinstance(kinds, list) and kinds and all(kind == _FULL for kind in kinds))
            or not left.get("use_sliding_window", first is None)
            or not left.get("sliding_window", True)
            or (type(first) is int and type(layers) is int and first >= layers)
        ):
            left.pop("use_sliding_window", None)
            left.pop("sliding_window", None)


def _positive(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 1e-15 < value < 1e15:
        raise ValueError(f"config.json: {name} is {brief(value)}, but must be a number above 0 (1e-15 to 1e15)")
    return value


def _true_or_false(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"config.json: {name} is {brief(value)}, but must be true or false")
    return value


def brief(value: Any) -> str:
    """The repr of a value from a file, shortened, because it may be long and deeply nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def read_rope(section: Mapping[str, Any], context: int, allow: Collection[str] = ()) -> Rope:
    """Reads a RoPE section of config.json. Raises ValueError for a type or field that is not supported."""
    left = {name: value for name, value in section.items() if value is not None}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    if kind == "default" and left.get("factor") == 1:
        left.pop("factor")
    if kind == "dynamic":
        raise ValueError(
            "config.json: rope_type 'dynamic' is not supported: its frequencies depend on the sequence length, "
            "so cached decoding would differ from the full forward pass"
        )
    if kind not in TYPES:
        raise ValueError(f"config.json: rope_type {brief(kind)} is not supported (supported: {', '.join(TYPES)})")
    read = {ours: _rope_field(theirs, left.pop(theirs)) for theirs, ours in ROPE_FIELDS[kind].items() if theirs in left}
    missing = [name for name in _ROPE_NEEDS[kind] if ROPE_FIELDS[kind][name] not in read]
    if missing == ["original_max_position_embeddings"] and kind == "yarn":
        read["original_context"] = context
    elif missing:
        raise ValueError(f"config.json: rope_type {kind!r} requires {', '.join(missing)}: add it")
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "yarn":
        scales = [value and _positive(name, value) for name in _SCALES for value in [left.pop(name, 0)]]
        read.setdefault("amplitude", _yarn_amplitude(read["factor"], *scales))
        _ignore_attn_factor(left, read["amplitude"])
    unknown = [name[:80] for name in left if name not in allow and name not in _ROPE_HARMLESS]
    if unknown:
        raise ValueError(
            f"config.json: rope_type {kind!r} has fields that are not supported: {', '.join(unknown[:20])}"
        )
    rope = Rope(type=kind, **read)
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError("config.json: low_freq_factor must be below high_freq_factor")
    if kind == "yarn" and rope.theta == 1:
        raise ValueError("config.json: rope_theta 1 gives every pair the same frequency, which yarn cannot scale")
    return rope


def _ignore_attn_factor(left: dict[str, Any], amplitude: float) -> None:
    """Drops a field of the first YaRN code, a factor on the amplitude. transformers does not read it.

    DeepSeek-R1-0528-Qwen3-8B has it in its config.json.
    """
    if (factor := left.pop("attn_factor", None)) is not None:
        product = amplitude * _positive("attn_factor", factor)
        _log.warning(
            "config.json: attn_factor in the RoPE section is not used, as in transformers; vLLM multiplies the yarn "
            'attention factor by it. To do the same, replace it by "attention_factor": %.10g',
            product,
        )


def _rope_field(name: str, value: Any) -> Any:
    return _true_or_false(name, value) if name == "truncate" else _positive(name, value)


def _yarn_amplitude(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """YaRN, section 3.4: 0.1 ln(factor) + 1. With both of DeepSeek's mscale fields, the ratio of their amplitudes."""

    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return amplitude(mscale) / amplitude(mscale_all_dim) if mscale and mscale_all_dim else amplitude(1)


# Per rope type: Hugging Face's field name -> the field of Rope.
ROPE_FIELDS = {
    "default": {"rope_theta": "theta"},
    "linear": {"rope_theta": "theta", "factor": "factor"},
    "llama3": {
        "rope_theta": "theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_context",
    },
    "yarn": {
        "rope_theta": "theta",
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "amplitude",
    },
}
_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_SCALES = ("mscale", "mscale_all_dim")  # yarn, DeepSeek's fields; 0 means absent
# transformers writes these fields for every type; types that do not use them ignore them.
# `finetuned` is of the first YaRN code, and acts beside a rope_type of it that is refused.
_ROPE_HARMLESS = frozenset({"original_max_position_embeddings", "rope_theta", "finetuned"})
