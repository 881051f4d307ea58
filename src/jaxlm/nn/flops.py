"""Model FLOPs from a config, for MFU (model FLOPs utilization). Recomputation is not counted."""

from typing import Any

from jaxlm.nn import params


def multiplied(table: params.Table, cfg: Any) -> int:
    """Number of parameters in matmuls: all parameters except an untied embedding, which is only looked up."""
    return params.count(table, cfg) - (0 if cfg.tied else cfg.V * cfg.D)


def training(table: params.Table, cfg: Any, T: int, adapter: int | None = None) -> float:
    """FLOPs per token of training on rows of T tokens, forward and backward.

    6 per parameter for the matmuls, and 6 N H T per layer for causal attention: half of PaLM's 12 (arXiv:2204.02311,
    appendix B), which counts masked scores too. A sliding window counts the tokens within it.

    Args:
        table: PARAMS of the family.
        cfg: Config of the model.
        T: Tokens per row.
        adapter: Number of parameters of a LoRA adapter. The frozen weights then get no gradient: 4 per parameter, and 6
            per parameter of the adapter.
    """
    attended = sum(_attended(T, window) for window in cfg.windows)
    weights = multiplied(table, cfg)
    matmuls = 6 * weights if adapter is None else 4 * weights + 6 * adapter
    return matmuls + 12 * cfg.N * cfg.H * attended


def _attended(T: int, window: int | None) -> float:
    """Average number of tokens that a token attends to: T / 2 with full attention."""
    if window is None or window >= T:
        return T / 2
    return window * (T - window / 2) / T
