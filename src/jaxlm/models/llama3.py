"""Llama 3, 3.1, 3.2 and 3.3 (Grattafiori et al. 2024, arXiv:2407.21783).

A pre-norm transformer with grouped-query attention, a gated SiLU MLP and rotary position embedding. 3.1 extends the
context by scaling low rotary frequencies (rope_type "llama3"): by 8 in 3.1 and 3.3, by 32 in 3.2. The 1B and 3B models
tie the output head to the embedding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxlm.models.config import Fields, family_load
from jaxlm.nn import Frequencies, KVCache, Rope, apply_rope, attend, einsum, embed, rms_norm, scan_layers


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
    context: int
    tied: bool

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], allow: Collection[str] = ()) -> "Config":
        f = Fields(hf, allow)
        f.must("hidden_act", "silu")
        V, D, F, L = map(f.number, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
        N, K, H = f.heads(D)
        eps, tied, context = f.real("rms_norm_eps", 1e-6), f.flag("tie_word_embeddings", False), f.context()
        return f.done(cls(V, D, F, L, N, K, H, eps, f.rope(context), context, tied))

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (None,) * self.L

    def frequencies(self, window: int | None = None) -> Frequencies:
        return self.rope.frequencies(self.H)


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


def layer(cfg, pos, freqs, x, w, cache):
    h = rms_norm(x, w["attn_norm"], cfg.eps)
    q, k, v = einsum(("BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH"), h, (w["q"], w["k"], w["v"]))
    a, cache = attend(apply_rope(q, pos, freqs), apply_rope(k, pos, freqs), v, pos, cache)
    x += einsum("BTNH,DNH->BTD", a, w["o"])
    h = rms_norm(x, w["mlp_norm"], cfg.eps)
    gate, up = einsum(("BTD,FD->BTF", "BTD,FD->BTF"), h, (w["gate"], w["up"]))
    return x + einsum("BTF,DF->BTD", jax.nn.silu(gate) * up, w["down"]), cache


def forward(
    cfg: Config, tokens: Int[Array, "B T"], w: Any, cache: KVCache | None, pos: Int[Array, "B T"], **options: Any
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Last hidden states and the updated KV cache. `options` go to `scan_layers`."""
    x = embed(tokens, w["embed"])
    layers = [partial(layer, cfg, pos, cfg.frequencies())]
    x, cache = scan_layers(layers, x, w["layers"], cache, pos, **options)
    return rms_norm(x, w["norm"], cfg.eps), cache


def logits(cfg: Config, x: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"]:
    """Float32 logits of hidden states."""
    return einsum("BTD,VD->BTV", x, w["embed"] if cfg.tied else w["head"], dtype="float32")


load = family_load(__name__)
