"""OLMo 3 (Olmo team 2025, arXiv:2512.13961).

OLMo 2's layer: norms on the outputs of attention and MLP only, queries and keys normalized over all their heads at
once. Three of four layers have sliding-window attention. Context extension (rope_type "yarn") is for the layers with
full attention; the others keep their frequencies. `diff olmo2.py olmo3.py` shows the differences.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
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
    context: int
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], allow: Collection[str] = ()) -> "Config":
        f = Fields(hf, allow)
        f.must("hidden_act", "silu")
        V, D, F, L = map(f.number, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
        N, K, H = f.heads(D)
        eps, tied, context = f.real("rms_norm_eps", 1e-5), f.flag("tie_word_embeddings", False), f.context()
        windows, theta = f.windows(L, 4096, 4), f("rope_theta", 5e5)
        sections = f.rope_sections()  # transformers 5: one section per layer type
        full = {"rope_theta": theta, **f.section("rope_scaling"), **sections["full_attention"]}
        local = {"rope_theta": theta, **sections["sliding_attention"]}
        ropes = read_rope(full, context, allow), read_rope(local, context, allow)
        return f.done(cls(V, D, F, L, N, K, H, eps, *ropes, windows, context, tied))

    def frequencies(self, window: int | None = None) -> Frequencies:
        return (self.rope if window is None else self.local_rope).frequencies(self.H)


NORM_IDENTITY = 1.0  # initial value of norm weights

# path in the weights: (axes in the checkpoint's order, name in the checkpoint, aliases …)
PARAMS = {
    "embed": ("VD", "model.embed_tokens.weight"),
    "layers.q": ("NHD", "model.layers.{}.self_attn.q_proj.weight"),
    "layers.k": ("KHD", "model.layers.{}.self_attn.k_proj.weight"),
    "layers.v": ("KHD", "model.layers.{}.self_attn.v_proj.weight"),
    "layers.q_norm": ("NH", "model.layers.{}.self_attn.q_norm.weight"),
    "layers.k_norm": ("KH", "model.layers.{}.self_attn.k_norm.weight"),
    "layers.o": ("DNH", "model.layers.{}.self_attn.o_proj.weight"),
    "layers.attn_norm": ("D", "model.layers.{}.post_attention_layernorm.weight"),
    "layers.gate": ("FD", "model.layers.{}.mlp.gate_proj.weight"),
    "layers.up": ("FD", "model.layers.{}.mlp.up_proj.weight"),
    "layers.down": ("DF", "model.layers.{}.mlp.down_proj.weight"),
    "layers.mlp_norm": ("D", "model.layers.{}.post_feedforward_layernorm.weight"),
    "norm": ("D", "model.norm.weight"),
    "head": ("VD", "lm_head.weight"),
}
IGNORED_PREFIXES = ()  # prefixes of checkpoint tensors that are not used


def layer(cfg, pos, freqs, window, x, w, cache):
    q, k, v = einsum(("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH"), x, (w["q"], w["k"], w["v"]))
    q, k = rms_norm(q, w["q_norm"], cfg.eps, axes=2), rms_norm(k, w["k_norm"], cfg.eps, axes=2)
    a, cache = attend(apply_rope(q, pos, freqs), apply_rope(k, pos, freqs), v, pos, cache, window=window)
    x += rms_norm(einsum("BTNH,DNH->BTD", a, w["o"]), w["attn_norm"], cfg.eps)
    gate, up = einsum(("BTD,FD->BTF", "BTD,FD->BTF"), x, (w["gate"], w["up"]))
    return x + rms_norm(einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, w["down"]), w["mlp_norm"], cfg.eps), cache


def forward(
    cfg: Config, tokens: Int[Array, "B T"], w: Any, cache: KVCache | None, pos: Int[Array, "B T"], **options: Any
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Last hidden states and the updated KV cache. `options` go to `scan_layers`."""
    x = embed(tokens, w["embed"])
    freqs = {window: cfg.frequencies(window) for window in cfg.windows}
    layers = [partial(layer, cfg, pos, freqs[window], window) for window in period(cfg.windows)]
    x, cache = scan_layers(layers, x, w["layers"], cache, pos, **options)
    return rms_norm(x, w["norm"], cfg.eps), cache


def logits(cfg: Config, x: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states."""
    return einsum("BTD,VD->BTV", x, w["embed"] if cfg.tied else w["head"], dtype="float32")


load = family_load(__name__)
