"""Reading a Hugging Face config.json: what the code computes is taken, what it does not know is refused by name."""

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from jaxlm.nn.rope import TYPES, Rope

# Fields that do not change what the forward pass computes.
HARMLESS = set(
    """
    architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path use_cache
    initializer_range bos_token_id eos_token_id pad_token_id attention_dropout pretraining_tp
    cache_implementation max_window_layers unsloth_version unsloth_fixed _attn_implementation_autoset
    return_dict id2label label2id chunk_size_feed_forward task_specific_params problem_type is_encoder_decoder
    tokenizer_class auto_map
    """.split()  # noqa: SIM905
)
LARGEST = 2**31 - 1  # ids and positions are int32
LAYERS = 2_000  # so that what walks the layers of a config stays quick
REQUIRED: Any = object()
_FULL, _SLIDING = "full_attention", "sliding_attention"


class Fields:
    """The fields of a config, each taken once; `done` refuses by name what is left and matters.

    allow: names that pass although the code does not know them (`--allow-field`).
    """

    def __init__(self, hf: Mapping[str, Any], allow: Collection[str] = ()):
        self.left = dict(hf)
        self.allow = frozenset(allow)
        self.faults: list[str] = []

    def __call__(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a field; the default where it is absent or null."""
        value = self.left.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"config.json has no field {name!r}, which this architecture needs")
        return default

    def number(self, name: str, default: Any = REQUIRED) -> int:
        """A field that is a size: a whole number of at least 1."""
        value, most = self(name, default), LAYERS if name == "num_hidden_layers" else LARGEST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(
                f"config.json: {name} is {brief(value)}, but must be a whole number of at least 1 and at most {most:,}"
            )
        return value

    def real(self, name: str, default: Any = REQUIRED) -> float:
        """A field that is a number above 0."""
        return _positive(name, self(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        return _true_or_false(name, self(name, default))

    def section(self, name: str) -> dict[str, Any]:
        """A field that has fields of its own; empty where it is absent or null."""
        value = self(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} is {brief(value)}, but must be a section with fields of its own")
        return dict(value)

    def must(self, name: str, expected: Any) -> None:
        """Absent, null, or exactly this: the code computes nothing else."""
        value = self(name, expected)
        if value != expected and name not in self.allow:
            self.faults.append(f"{name} = {brief(value)} (only {expected!r} is computed)")

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
            raise ValueError(f"config.json: head_dim {H} is odd; rotary positions need pairs")
        return N, K, H

    def context(self, default: Any = REQUIRED) -> int:
        """The longest sequence, in tokens."""
        return self.number("max_position_embeddings", default)

    def windows(self, L: int, default_window: int, default_every: int) -> tuple[int | None, ...]:
        """Each layer's sliding window, None for one that sees everything: by layer_types, else every n-th."""
        window = self.number("sliding_window", default_window)
        every = self.number("sliding_window_pattern", self.number("_sliding_window_pattern", default_every))
        kinds = self("layer_types", [_FULL if (i + 1) % every == 0 else _SLIDING for i in range(L)])
        if not isinstance(kinds, list) or len(kinds) != L or not all(kind in (_FULL, _SLIDING) for kind in kinds):
            raise ValueError(f"config.json: layer_types must name {_FULL} or {_SLIDING} for each of {L} layers")
        return tuple(window if kind == _SLIDING else None for kind in kinds)

    def rope(self, context: int) -> Rope:
        """The rope section in its old spelling (rope_theta, rope_scaling) or its new one (rope_parameters)."""
        sections = self.section("rope_scaling") | self.section("rope_parameters")
        return read_rope({"rope_theta": self("rope_theta", None), **sections}, context, self.allow)

    def rope_sections(self) -> dict[str, dict[str, Any]]:
        """rope_parameters with a section for each kind of layer, empty where the file says nothing."""
        given = Fields(self.section("rope_parameters"))
        sections = {kind: given.section(kind) for kind in (_FULL, _SLIDING)}
        if given.left:
            raise ValueError(
                f"config.json: rope_parameters must have sections {_FULL} and {_SLIDING}, not {brief(list(given.left))}"
            )
        return {kind: {k: v for k, v in fields.items() if v is not None} for kind, fields in sections.items()}

    def done(self, config: Any) -> Any:
        """The config, unless a field was not read and is not known to be harmless: then an error that names it."""
        if not self.left.get("use_sliding_window", True):
            self.left.pop("sliding_window", None)  # transformers sees no window then
        for name, value in self.left.items():
            if name == "layer_types" and isinstance(value, list) and all(kind == _FULL for kind in value):
                continue
            if name not in HARMLESS and name not in self.allow and value not in (None, False, [], {}):
                self.faults.append(f"{name[:80]} = {brief(value)}")
        if self.faults:
            more = len(self.faults) - 20
            raise ValueError(
                "config.json asks for what this architecture does not compute: "
                + "; ".join(self.faults[:20])
                + f"; and {more} more fields" * (more > 0)
                + ". If a field does not change the result, let it pass with --allow-field NAME (allow_fields=[NAME])."
            )
        return config


def _positive(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 1e-15 < value < 1e15:
        raise ValueError(f"config.json: {name} is {brief(value)}, but must be a number above 0 (1e-15 to 1e15)")
    return value


def _true_or_false(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"config.json: {name} is {brief(value)}, but must be true or false")
    return value


def brief(value: Any) -> str:
    """The repr of a value from a file, where it may be as long and as nested as it likes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def read_rope(section: Mapping[str, Any], context: int, allow: Collection[str] = ()) -> Rope:
    """A Rope from the fields of a rope section; a type or field that the code does not compute is refused by name."""
    left = {name: value for name, value in section.items() if value is not None}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    if kind == "dynamic":
        raise ValueError(
            "config.json: rope_type 'dynamic' is not supported: its frequencies change with the length of the text, "
            "so that cached decoding differs from the full forward pass by definition"
        )
    if kind not in TYPES:
        raise ValueError(f"config.json: rope_type {brief(kind)} is not supported (known: {', '.join(TYPES)})")
    read = {ours: _rope_field(theirs, left.pop(theirs)) for theirs, ours in ROPE_FIELDS[kind].items() if theirs in left}
    missing = [name for name in _ROPE_NEEDS[kind] if ROPE_FIELDS[kind][name] not in read]
    if missing == ["original_max_position_embeddings"] and kind == "yarn":
        read["original_context"] = context
    elif missing:
        raise ValueError(f"config.json: rope_type {kind!r} lacks {', '.join(missing)}")
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind == "yarn":
        scales = [value and _positive(name, value) for name in _SCALES for value in [left.pop(name, 0)]]
        read.setdefault("amplitude", _yarn_amplitude(read["factor"], *scales))
    unknown = [name[:80] for name in left if name not in allow and name not in _ROPE_HARMLESS]
    if unknown:
        raise ValueError(
            f"config.json: rope_type {kind!r} has fields that are not supported: {', '.join(unknown[:20])}"
        )
    rope = Rope(type=kind, **read)
    if kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError("config.json: low_freq_factor must be below high_freq_factor")
    if kind == "yarn" and rope.theta == 1:
        raise ValueError("config.json: rope_theta 1 rotates every pair alike, which yarn cannot stretch")
    return rope


def _rope_field(name: str, value: Any) -> Any:
    return _true_or_false(name, value) if name == "truncate" else _positive(name, value)


def _yarn_amplitude(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """YaRN, section 3.4: 0.1 ln(factor) + 1; DeepSeek's two scales divide each other."""
    import math

    def grow(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grow(mscale) / grow(mscale_all_dim) if mscale and mscale_all_dim else grow(1)


# Hugging Face's name of each field that a type reads -> ours.
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
_SCALES = ("mscale", "mscale_all_dim")  # yarn, DeepSeek's; 0 is none
# Written by transformers beside every type; read by none of these.
_ROPE_HARMLESS = frozenset({"original_max_position_embeddings", "rope_theta"})
