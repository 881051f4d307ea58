"""The architectures of GGUF files: the config.json that their metadata stand for, and the names of their tensors.

Source: convert_hf_to_gguf.py, gguf-py/gguf/tensor_mapping.py and src/llama-model.cpp in ggml-org/llama.cpp.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import models
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.checkpoint.gguf import eos_ids, integer, read, read_values
from jaxlm.checkpoint.gguf_sampling import generation_config
from jaxlm.checkpoint.gguf_types import BY_NAME, READABLE
from jaxlm.checkpoint.hf import Checkpoint, MatchResult, match
from jaxlm.checkpoint.meta import ConcatTensor
from jaxlm.checkpoint.safetensors import DTYPES, Tensor, listed
from jaxlm.models.config import brief
from jaxlm.nn import params
from jaxlm.nn.rope import Rope

# Path in PARAMS: name in GGUF.
NAMES = {
    "embed": "token_embd.weight",
    "layers.attn_norm": "blk.{}.attn_norm.weight",
    "layers.q": "blk.{}.attn_q.weight",
    "layers.k": "blk.{}.attn_k.weight",
    "layers.v": "blk.{}.attn_v.weight",
    "layers.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.o": "blk.{}.attn_output.weight",
    "layers.attn_out_norm": "blk.{}.post_attention_norm.weight",
    "layers.mlp_norm": "blk.{}.ffn_norm.weight",
    "layers.gate": "blk.{}.ffn_gate.weight",
    "layers.up": "blk.{}.ffn_up.weight",
    "layers.down": "blk.{}.ffn_down.weight",
    "layers.mlp_out_norm": "blk.{}.post_ffw_norm.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
}
# OLMo 2 and 3 have only norms after attention and MLP.
OLMO = {"layers.attn_norm": NAMES["layers.attn_out_norm"], "layers.mlp_norm": NAMES["layers.mlp_out_norm"]}
HEADS_IN_PAIRS = ("q", "k")  # weights whose rows may be ordered by rotated pairs
ROPE_FACTORS = "rope_freqs.weight"


class Architecture(NamedTuple):
    """An architecture of GGUF: its model_type and class in transformers, the names that differ from NAMES, and whether
    the rows of q and k are ordered by rotated pairs, as in Meta's files."""

    model_type: str
    transformers: str
    names: Mapping[str, str] = {}
    in_pairs: bool = False

    def table(self, table: params.Table) -> dict[str, tuple[str, str]]:
        """The PARAMS of a family with the names of GGUF."""
        names = {**NAMES, **self.names}
        if unknown := [path for path in table if path not in names]:
            raise ValueError(f"weights without a name in GGUF: {listed(unknown)}")
        return {path: (letters, names[path]) for path, (letters, *_) in table.items()}


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", in_pairs=True),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", OLMO),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", in_pairs=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM"),
}
# Architectures that stand for another model_type if the metadata have a sliding window.
WITH_WINDOWS = {"olmo2": Architecture("olmo3", "Olmo3ForCausalLM", OLMO)}
# Key behind the name of the architecture: field of config.json.
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Field of config.json: field of a Config.
SIZES = {
    "max_position_embeddings": "context", "hidden_size": "D", "intermediate_size": "F", "num_hidden_layers": "L",
    "num_attention_heads": "N", "num_key_value_heads": "K", "head_dim": "H", "rms_norm_eps": "eps",
}  # fmt: skip
REQUIRED = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
            "attention.layer_norm_rms_epsilon")  # fmt: skip
SCALING = "rope.scaling."
# Keys that do not change what the forward pass computes. The number of rows of the embedding is the vocabulary.
HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
# Keys at the value that changes nothing.
NEUTRAL = {SCALING + "attn_factor": 1.0, SCALING + "yarn_attn_factor": 1.0, SCALING + "yarn_ext_factor": 1.0}
YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
MOST = 10_000  # items of an array that describes an architecture
GEMMA3_27B = 62  # layers of the one size of Gemma 3 whose query scale is not that of the head width
# Context lengths before the extension that rope factors are compared with. Llama 3.1 to 3.3 have 8,192.
ORIGINAL_CONTEXTS = tuple(2**n for n in range(11, 18))


def open_gguf(path: Path, allow: Collection[str] = ()) -> tuple[Any, Any, Checkpoint]:
    """Reads the headers of a GGUF model, and matches its tensors with the PARAMS of its family.

    Args:
        path: a GGUF file, or any file of a split model.
        allow: unknown keys of the metadata to accept.

    Returns:
        The family, its Config, and the checkpoint, whose `folder` is the (first) file.

    Raises:
        ValueError: a file is damaged, or its architecture, a key or a type of tensor is not supported.
        FileNotFoundError: a file of a split model is missing.
    """
    file = read(path)
    with explain_errors(str(file.path)):
        architecture = _architecture(file.metadata)
        raw = hf_config(file.metadata, *_from_tensors(file.tensors))
        family = models.family_of(raw["model_type"])
        with explain_errors("its metadata, read as a config.json"):
            _refuse_unknown(raw, allow)
            config = family.Config.from_hf(raw, allow)
        tensors = loadable(file.tensors, family.NORM_IDENTITY - 1.0)
        if architecture.in_pairs:
            ends = tuple(NAMES[f"layers.{path}"].removeprefix("blk.{}") for path in HEADS_IN_PAIRS)
            heads = {name: t for name, t in tensors.items() if name.endswith(ends)}
            tensors |= {name: ConcatTensor(name, t.dtype, t.shape, (t,), H=config.H) for name, t in heads.items()}
        matched = match(architecture.table(family.PARAMS), config, tensors, (ROPE_FACTORS,), config="its metadata")
    found = {row.path: tensor for row, tensor in matched.pairs}
    pairs = [(row, found[row.path]) for row in params.tensors(family.PARAMS, config)]
    return (
        family,
        config,
        Checkpoint(file.path, raw, generation_config(file.metadata), MatchResult(pairs, [], []), "gguf"),
    )


def _refuse_unknown(raw: Mapping[str, Any], allow: Collection[str]) -> None:
    """Raises ValueError for unknown keys of the architecture, which are sizes or numbers of its forward pass."""
    unknown = [key for key, value in raw.items() if "." in key and key not in allow and value not in (None, False, [])]
    if unknown:
        named = "; ".join(f"{key[:80]} = {brief(raw[key])}" for key in unknown[:20])
        raise ValueError(
            f"keys that jaxlm does not know: {named}. If a key does not change the result, allow it with --allow-field "
            "NAME (allow_fields=[NAME])"
        )


def loadable(tensors: Mapping[str, Tensor], shift: float) -> dict[str, Any]:
    """The tensors with the type that they are loaded in: bfloat16 if any is quantized, else the one that has most
    bytes. One type for all: llama.cpp stores norms in float32 whatever the type of the others.

    Args:
        tensors: tensors, whose dtype is a type of GGUF.
        shift: what to add to norms: -1 for Gemma, whose norms are w + 1 in GGUF and w elsewhere.
    """
    kinds = Counter[str]()
    for tensor in tensors.values():
        kinds[tensor.dtype] += tensor.nbytes
    if unreadable := [kind for kind in kinds if kind not in READABLE]:
        names = [tensor.name for tensor in tensors.values() if tensor.dtype in unreadable]
        raise ValueError(
            f"{listed(names, 3)} of its tensors have a type that jaxlm does not read: {', '.join(unreadable)}. It "
            f"reads {', '.join(READABLE)}: use a file of another quantization, such as Q4_K_M or Q8_0"
        )
    quantized = any(BY_NAME[kind].elements > 1 for kind in kinds)
    most = "BF16" if quantized or not kinds else kinds.most_common(1)[0][0]
    dtype = most if most in DTYPES else "F32"
    found = {}
    for name, tensor in tensors.items():
        own = shift if name.endswith("norm.weight") else 0.0
        encoding = tensor.dtype if own or tensor.dtype != dtype else ""
        found[name] = tensor._replace(dtype=dtype, encoding=encoding, shift=own)
    return found


def _architecture(metadata: Mapping[str, Any]) -> Architecture:
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"it is not a model (general.type is {brief(kind)}): pass the file of the model")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"the architecture {brief(name)} is not supported in GGUF. Supported: {', '.join(ARCHITECTURES)}"
        )
    window = metadata.get(f"{name}.attention.sliding_window")
    return WITH_WINDOWS[name] if window and name in WITH_WINDOWS else ARCHITECTURES[name]


def _from_tensors(tensors: Mapping[str, Tensor]) -> tuple[int | None, bool, np.ndarray | None]:
    """What tensors say about the config: the last three arguments of `hf_config`."""
    embed, factors = tensors.get(NAMES["embed"]), tensors.get(ROPE_FACTORS)
    values = None
    if factors is not None:
        if factors.dtype not in READABLE or len(factors.shape) != 1 or not 0 < factors.shape[0] <= MOST:
            raise ValueError(f"{ROPE_FACTORS} has type {factors.dtype} and shape {list(factors.shape)}: one axis of "
                             "numbers is supported")  # fmt: skip
        count = factors.shape[0]
        values = read_values(factors._replace(encoding=factors.dtype), (0, 1), (0, count), count)[0]
    return embed.shape[0] if embed and embed.shape else None, NAMES["head"] not in tensors, values


def hf_config(
    metadata: Mapping[str, Any], vocabulary: int | None, tied: bool, factors: np.ndarray | None
) -> dict[str, Any]:
    """The config.json that the metadata of a file stand for. Unknown keys of the architecture are fields of it.

    Args:
        metadata: the metadata.
        vocabulary: number of rows of the embedding. None: the key vocab_size.
        tied: whether the file has no head.
        factors: numbers by which rotary frequencies are divided [H/2], if the file has them.
    """
    name = metadata["general.architecture"]
    left = {key.removeprefix(name + "."): _plain(key, v) for key, v in metadata.items() if key.startswith(name + ".")}
    if missing := [f"{name}.{key}" for key in REQUIRED if key not in left]:
        raise ValueError(f"its metadata lack {listed(missing)}: download the file again, or convert the model again")
    architecture = _architecture(metadata)
    config: dict[str, Any] = {
        "architectures": [architecture.transformers],
        "model_type": architecture.model_type,
        "vocab_size": integer(left, "vocab_size", 0) if vocabulary is None else vocabulary,
        "tie_word_embeddings": tied,
    }
    config |= {field: left.pop(key) for key, field in FIELDS.items() if key in left}
    D, N = config["hidden_size"], config["num_attention_heads"]
    if type(D) is type(N) is int and N > 0:
        config.setdefault("head_dim", D // N)
    config.setdefault("num_key_value_heads", N)
    config.setdefault("rope_theta", 1e6 if name == "gemma3" else 1e4)
    H = config.get("head_dim")
    if (values := left.pop("attention.value_length", H)) != H:
        raise ValueError(
            f"its heads have keys of width {H} and values of width {values}: only equal widths are supported"
        )
    if left.pop("attention.causal", True) is not True:
        raise ValueError(f"{name}.attention.causal is not true: models without a causal mask are not supported")
    config["rope_scaling"] = _rope_scaling(factors, left, config, left.pop("rope.dimension_count", H))
    if name == "gemma3":
        config |= _gemma3(config, left.pop("attention.sliding_window_pattern", None))
    if architecture.model_type == "olmo3":
        config |= _pattern(left.pop("attention.sliding_window_pattern", None))
        # The converter writes transformers' attention_factor there, which yarn gives anyway.
        section, factor = config["rope_scaling"] or {}, left.get(SCALING + "attn_factor", 1.0)
        if section.get("rope_type") == "yarn" and factor != 1.0:
            section["attention_factor"] = left.pop(SCALING + "attn_factor")
    if (bos := metadata.get("tokenizer.ggml.bos_token_id")) is not None:
        config["bos_token_id"] = bos
    ends = eos_ids(metadata)
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    unknown = {key: value for key, value in left.items() if key not in HARMLESS and NEUTRAL.get(key) != value}
    return config | {f"{name}.{key}": value for key, value in unknown.items()}


def _plain(key: str, value: Any) -> Any:
    """A value as in JSON. An array of a value per layer is that value if all are equal."""
    if isinstance(value, np.ndarray | list):
        if len(value) > MOST:
            raise ValueError(f"its metadata have {len(value):,} items for {brief(key)}, more than {MOST:,}")
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if value and type(value[0]) in (int, float) and value.count(value[0]) == len(value):
            return value[0]
    return value


def _gemma3(config: Mapping[str, Any], pattern: Any) -> dict[str, Any]:
    """Fields of Gemma 3 that follow from the architecture in llama.cpp, unless the metadata have them."""
    D, N, L = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    fields: dict[str, Any] = {"query_pre_attn_scalar": D // N if L == GEMMA3_27B else config.get("head_dim")}
    fields |= _pattern(pattern)
    if not config.get("sliding_window"):
        fields |= {
            "sliding_window": None,
            "layer_types": ["full_attention"] * min(integer(config, "num_hidden_layers", 0), MOST),
        }
    return fields


def _pattern(pattern: Any) -> dict[str, Any]:
    """The field for attention.sliding_window_pattern: a period, or whether each layer has a window."""
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if local else "full_attention" for local in pattern]}
    return {} if pattern is None else {"sliding_window_pattern": pattern}


def _rope_scaling(
    factors: np.ndarray | None, left: dict[str, Any], config: Mapping[str, Any], rotated: Any
) -> dict[str, Any] | None:
    """The field rope_scaling, from keys in `left`, which are taken out, or from the rope factors."""
    kind = left.pop(SCALING + "type", "linear" if left.get(SCALING + "factor") else "none")
    factor = left.pop(SCALING + "factor", None) or None
    original = left.pop(SCALING + "original_context_length", None)
    H, section = config.get("head_dim"), {}
    if kind == "yarn":
        section = {"factor": factor, "original_max_position_embeddings": original}
        section |= {field: left.pop(SCALING + key) for key, field in YARN.items() if SCALING + key in left}
    elif kind != "none" and (kind != "linear" or factor is not None):  # an unknown kind is refused with the config
        section = {"factor": factor}
    if section:
        section = {"rope_type": kind, **section}
    if factors is not None:
        if section:
            raise ValueError(f"it has both {ROPE_FACTORS} and {SCALING}type {brief(kind)}: only one is supported")
        section = llama3_scaling(factors, config["rope_theta"], H, original)
    if rotated != H and type(rotated) is type(H) is int:
        section["partial_rotary_factor"] = rotated / H
    return section or None


def llama3_scaling(factors: np.ndarray, theta: Any, H: Any, original: Any) -> dict[str, Any]:
    """The section of rope_type llama3 that gives these factors, by which frequencies are divided.

    Args:
        factors: the factors [H/2] float32.
        theta: base of the frequencies.
        H: head width.
        original: context length before the extension; None if the metadata do not state it.

    Raises:
        ValueError: no section gives these factors.
    """
    if type(H) is int and factors.shape == (H // 2,) and isinstance(theta, float) and theta > 1:
        factor = round(float(factors.max()), 4) if np.isfinite(factors).all() else 0.0
        base = Rope(theta).frequencies(H).radians
        if factor > 1:
            for context in [original] if type(original) is int and original > 0 else ORIGINAL_CONTEXTS:
                rope = Rope(theta, "llama3", factor, context)
                if np.allclose(base / rope.frequencies(H).radians, factors, rtol=1e-4, atol=0):
                    return {
                        "rope_type": "llama3",
                        "factor": factor,
                        "low_freq_factor": rope.low_freq_factor,
                        "high_freq_factor": rope.high_freq_factor,
                        "original_max_position_embeddings": context,
                    }
    raise ValueError(
        f"its factors of rotary frequencies ({ROPE_FACTORS}) are not those of Llama 3.1 to 3.3, the only ones that are "
        "supported: use the model in Hugging Face's format"
    )
