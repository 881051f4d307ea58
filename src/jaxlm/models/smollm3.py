"""SmolLM3 (Hugging Face 2025, huggingface.co/blog/smollm3).

Llama 3 without rotary position embedding in every fourth layer (NoPE: Yang et al. 2025, arXiv:2501.18795). A config may
give some layers sliding-window attention; the published models have none. The output head is tied to the embedding.
`diff llama3.py smollm3.py` shows the differences.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxlm.models.config import LARGEST, Fields, family_load
from jaxlm.nn import Frequencies, KVCache, Rope, apply_rope, attend, einsum, embed, rms_norm, scan_layers
from jaxlm.nn.params import period


@dataclass(frozen=True)
class Config:
    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    eps: float
    rope: Rope
    rotated: tuple[bool, ...]  # whether each layer has RoPE
    windows: tuple[int | None, ...]
    context: int
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], allow: Collection[str] = ()) -> "Config":
        f = Fields(hf, allow)
        f.must("hidden_act", "silu")
        V, D, F, L = map(f.number, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
        N, K, H = f.heads(D, default_K=4)
        eps, tied, context = f.real("rms_norm_eps", 1e-6), f.flag("tie_word_embeddings", True), f.context()
        rotated = read_rotated(f, L)
        windows = read_windows(f, rotated)
        return f.done(cls(V, D, F, L, N, K, H, eps, f.rope(context, 2e6), rotated, windows, context, tied))

    def frequencies(self, window: int | None = None) -> Frequencies:
        return self.rope.frequencies(self.H)


def read_rotated(f: Fields, L: int) -> tuple[bool, ...]:
    """Whether each layer has RoPE: no_rope_layers, which has 1 for a layer with it. Without it, every n-th has none."""
    every = f.number("no_rope_layer_interval", 4)
    found = f("no_rope_layers", [int((i + 1) % every != 0) for i in range(L)])
    if not isinstance(found, list) or len(found) < L or not all(value in (0, 1) for value in found):
        raise ValueError(f"config.json: no_rope_layers must list 1 (RoPE) or 0 (none) for each of {L} layers")
    return tuple(map(bool, found[:L]))


def read_windows(f: Fields, rotated: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Sliding window of each layer. Without layer_types, the layers without RoPE have it."""
    used, window = f.flag("use_sliding_window", False), f.number("sliding_window", NO_WINDOW)
    if used and window != NO_WINDOW:
        return f.windows_by_type(window, ["full_attention" if rotates else "sliding_attention" for rotates in rotated])
    if any(f.windows_by_type(window, ["full_attention"] * len(rotated))) and "layer_types" not in f.allow:
        f.faults.append("layer_types with 'sliding_attention' (without use_sliding_window and sliding_window)")
    return (None,) * len(rotated)


NO_WINDOW = LARGEST  # sliding_window is null
NORM_IDENTITY = 1.0  # initial value of norm weights

# path in the weights: (axes in the checkpoint's order, name in the checkpoint, aliases …)
PARAMS = {
    "embed": ("VD", "model.embed_tokens.weight"),
    "layers.attn_norm": ("D", "model.layers.{}.input_layernorm.weight"),
    "layers.q": ("NHD", "model.layers.{}.self_attn.q_proj.weight"),
    "layers.k": ("KHD", "model.layers.{}.self_attn.k_proj.weight"),
    "layers.v": ("KHD", "model.layers.{}.self_attn.v_proj.weight"),
    "layers.o": ("DNH", "model.layers.{}.self_attn.o_proj.weight"),
    "layers.mlp_norm": ("D", "model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate": ("FD", "model.layers.{}.mlp.gate_proj.weight"),
    "layers.up": ("FD", "model.layers.{}.mlp.up_proj.weight"),
    "layers.down": ("DF", "model.layers.{}.mlp.down_proj.weight"),
    "norm": ("D", "model.norm.weight"),
    "head": ("VD", "lm_head.weight"),
}
IGNORED_PREFIXES = ()  # prefixes of checkpoint tensors that are not used


def layer(cfg, pos, freqs, window, x, w, cache):  # freqs is None in layers without RoPE
    h = rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = einsum(("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH"), h, (w["q"], w["k"], w["v"]))
    if freqs is not None:
        q, k = apply_rope(q, pos, freqs), apply_rope(k, pos, freqs)
    a, cache = attend(q, k, v, pos, cache, window=window)
    x += einsum("BTNH,DNH->BTD", a, w["o"])
    h = rms_norm(x, w["mlp_norm"], cfg.eps)
    gate, up = einsum(("BTD,FD->BTF", "BTD,FD->BTF"), h, (w["gate"], w["up"]))
    return x + einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, w["down"]), cache


def forward(
    cfg: Config, tokens: Int[Array, "B T"], w: Any, cache: KVCache | None, pos: Int[Array, "B T"], **options: Any
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Last hidden states and the updated KV cache. `options` go to `scan_layers`."""
    x = embed(tokens, w["embed"])
    freqs = cfg.frequencies()
    types = period(list(zip(cfg.rotated, cfg.windows, strict=True)))
    layers = [partial(layer, cfg, pos, freqs if rotates else None, window) for rotates, window in types]
    x, cache = scan_layers(layers, x, w["layers"], cache, pos, **options)
    return rms_norm(x, w["norm"], cfg.eps), cache


def logits(cfg: Config, x: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states."""
    return einsum("BTD,VD->BTV", x, w["embed"] if cfg.tied else w["head"], dtype="float32")


load = family_load(__name__)
