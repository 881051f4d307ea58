"""Gemma 3, text (Gemma team 2025, arXiv:2503.19786): 270M and 1B, and the language model of 4B, 12B and 27B.

Five of six layers have sliding-window attention and rotary theta 10,000. Every sixth layer has full attention and theta
1,000,000; its frequencies are divided by 8 from 4B on. Norms are applied before and after attention and MLP, and to
every query and key head; their weights are stored as w - 1. The embedding is scaled by sqrt(D) in the activations'
dtype.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.models.config import Fields, family_load, read_rope
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
    local_rope: Rope
    windows: tuple[int | None, ...]
    scale: float
    context: int
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], allow: Collection[str] = ()) -> "Config":
        text = hf
        if hf.get("text_config") is not None:  # a vision-language model: read its language model
            outer = Fields(hf, allow)
            text = {"tie_word_embeddings": hf.get("tie_word_embeddings"), **outer.section("text_config")}
            for name in VISION_FIELDS:
                outer(name, None)
            outer.done(None)
        f = Fields(text, allow)
        f.must("hidden_activation", "gelu_pytorch_tanh")
        f.must("hidden_act", "gelu_pytorch_tanh")
        V, D = f.number("vocab_size", 262208), f.number("hidden_size", 2304)
        F, L = f.number("intermediate_size", 9216), f.number("num_hidden_layers", 26)
        N, K, H = f.heads(D, 256, default_N=8, default_K=4)
        eps, tied, context = f.real("rms_norm_eps", 1e-6), f.flag("tie_word_embeddings", True), f.context(131072)
        windows, scale = f.windows(L, 4096, 6), f.real("query_pre_attn_scalar", 256) ** -0.5
        sections = f.rope_sections()  # transformers 5: one section per layer type
        full = {"rope_theta": f("rope_theta", 1e6), **f.section("rope_scaling"), **sections["full_attention"]}
        local = {"rope_theta": f("rope_local_base_freq", 1e4), **sections["sliding_attention"]}
        ropes = read_rope(full, context, allow), read_rope(local, context, allow)
        return f.done(cls(V, D, F, L, N, K, H, eps, *ropes, windows, scale, context, tied))

    def frequencies(self, window: int | None = None) -> Frequencies:
        return (self.rope if window is None else self.local_rope).frequencies(self.H)


# Fields of the outer config of vision-language models.
VISION_FIELDS = ("text_config", "vision_config", "boi_token_index", "eoi_token_index", "image_token_index",
                 "image_token_id", "mm_tokens_per_image", "tie_word_embeddings")  # fmt: skip
NORM_IDENTITY = 0.0  # initial value of norm weights
norm = partial(rms_norm, offset=1.0)


def names(tail: str) -> tuple[str, ...]:
    """Names of a tensor: in text models, in vision-language models on the hub, and as transformers 5 saves those."""
    return "model." + tail, "language_model.model." + tail, "model.language_model." + tail


# path in the weights: (axes in the checkpoint's order, name in the checkpoint, aliases …)
PARAMS = {
    "embed": ("VD", *names("embed_tokens.weight")),
    "layers.attn_norm": ("D", *names("layers.{}.input_layernorm.weight")),
    "layers.q": ("NHD", *names("layers.{}.self_attn.q_proj.weight")),
    "layers.k": ("KHD", *names("layers.{}.self_attn.k_proj.weight")),
    "layers.v": ("KHD", *names("layers.{}.self_attn.v_proj.weight")),
    "layers.q_norm": ("H", *names("layers.{}.self_attn.q_norm.weight")),
    "layers.k_norm": ("H", *names("layers.{}.self_attn.k_norm.weight")),
    "layers.o": ("DNH", *names("layers.{}.self_attn.o_proj.weight")),
    "layers.attn_out_norm": ("D", *names("layers.{}.post_attention_layernorm.weight")),
    "layers.mlp_norm": ("D", *names("layers.{}.pre_feedforward_layernorm.weight")),
    "layers.gate": ("FD", *names("layers.{}.mlp.gate_proj.weight")),
    "layers.up": ("FD", *names("layers.{}.mlp.up_proj.weight")),
    "layers.down": ("DF", *names("layers.{}.mlp.down_proj.weight")),
    "layers.mlp_out_norm": ("D", *names("layers.{}.post_feedforward_layernorm.weight")),
    "norm": ("D", *names("norm.weight")),
    "head": ("VD", "lm_head.weight", "language_model.lm_head.weight"),
}
# The vision tower is not supported yet.
IGNORED_PREFIXES = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")


def layer(cfg, pos, freqs, window, x, w, cache):
    h = norm(x, w["attn_norm"], cfg.eps)
    q, k, v = einsum(("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH"), h, (w["q"], w["k"], w["v"]))
    q, k = norm(q, w["q_norm"], cfg.eps), norm(k, w["k_norm"], cfg.eps)
    a, cache = attend(
        apply_rope(q, pos, freqs), apply_rope(k, pos, freqs), v, pos, cache, window=window, scale=cfg.scale
    )
    x += norm(einsum("BTNH,DNH->BTD", a, w["o"]), w["attn_out_norm"], cfg.eps)
    h = norm(x, w["mlp_norm"], cfg.eps)
    gate, up = einsum(("BTD,FD->BTF", "BTD,FD->BTF"), h, (w["gate"], w["up"]))
    y = einsum("BTF,DF->BTD", jax.nn.gelu(gate, approximate=True) * up, w["down"])
    return x + norm(y, w["mlp_out_norm"], cfg.eps), cache


def forward(
    cfg: Config, tokens: Int[Array, "B T"], w: Any, cache: KVCache | None, pos: Int[Array, "B T"], **options: Any
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Last hidden states and the updated KV cache. `options` go to `scan_layers`."""
    x = embed(tokens, w["embed"])
    x *= jnp.asarray(cfg.D**0.5, x.dtype)
    freqs = {window: cfg.frequencies(window) for window in cfg.windows}
    layers = [partial(layer, cfg, pos, freqs[window], window) for window in period(cfg.windows)]
    x, cache = scan_layers(layers, x, w["layers"], cache, pos, **options)
    return norm(x, w["norm"], cfg.eps), cache


def logits(cfg: Config, x: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states."""
    return einsum("BTD,VD->BTV", x, w["embed"] if cfg.tied else w["head"], dtype="float32")


load = family_load(__name__)
