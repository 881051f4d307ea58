"""The params.json of a Llama's config: the inverse of meta.hf_config, as far as that file can say what a model is."""

from typing import Any

from jaxlm.checkpoint.meta import FACTORS

# (D, F) -> multiple_of and ffn_dim_multiplier of Meta's own files; others would give the same width.
PUBLISHED = {
    (4096, 14336): (1024, 1.3),
    (8192, 28672): (4096, 1.3),
    (16384, 53248): (4096, 1.2),
    (2048, 8192): (256, 1.5),
    (3072, 8192): (256, 1.0),
}


def params_of(cfg: Any) -> dict[str, Any]:
    """What params.json can say of a Llama config. Whether that is all there is to say is for the caller to check."""
    multiple, factor = _mlp_numbers(cfg.D, cfg.F)
    return {
        "dim": cfg.D,
        "n_layers": cfg.L,
        "n_heads": cfg.N,
        "n_kv_heads": cfg.K,
        "vocab_size": cfg.V,
        "ffn_dim_multiplier": factor,
        "multiple_of": multiple,
        "norm_eps": cfg.eps,
        "rope_theta": cfg.rope.theta,
        "use_scaled_rope": cfg.rope.type == "llama3",
    }


def untold_factor(cfg: Any) -> float | None:
    """The factor of the rope where a loader cannot know it: params.json has no field for it."""
    told = cfg.rope.type != "llama3" or FACTORS.get((cfg.D, cfg.L, cfg.N)) == cfg.rope.factor
    return None if told else cfg.rope.factor


def _mlp_numbers(D: int, F: int) -> tuple[int, float]:
    """multiple_of and ffn_dim_multiplier from which Meta's formula makes exactly F; see meta._mlp_width."""
    if (D, F) in PUBLISHED:
        return PUBLISHED[D, F]
    base = int(8 * D / 3)
    multiple = next(m for m in (256, 64, 16, 4, 1) if F % m == 0)
    for digits in range(1, 18):  # the shortest factor that does
        factor = round((F - multiple / 2 + (multiple == 1)) / base, digits)
        if -(-int(factor * base) // multiple) * multiple == F:
            return multiple, factor
    raise AssertionError(f"no factor makes {F} of {D}")
