"""FLOPs from a config: what a token costs, whatever is computed again, and what the hardware could do."""

from typing import Any

from jaxlm.nn import params


def multiplied(table: params.Table, cfg: Any) -> int:
    """Parameters that multiply each token: all but an embedding that is only looked up (a tied one is the head)."""
    return params.count(table, cfg) - (0 if cfg.tied else cfg.V * cfg.D)


def training(table: params.Table, cfg: Any, T: int, adapter: int | None = None) -> float:
    """FLOPs of training a token in rows of T: 6 N for the products, 6 H N_heads T a layer for causal attention (half of
    the 12 of PaLM, arXiv:2204.02311, appendix B, which counts what the mask hides); a window counts what it shows. With
    an `adapter` of so many parameters the weights beside it get no gradient: 4 N, and 6 for the adapter's own."""
    seen = sum(_seen(T, window) for window in cfg.windows)
    weights = multiplied(table, cfg)
    products = 6 * weights if adapter is None else 4 * weights + 6 * adapter
    return products + 12 * cfg.N * cfg.H * seen


def _seen(T: int, window: int | None) -> float:
    """How many tokens one sees on average, T / 2 where there is no window."""
    if window is None or window >= T:
        return T / 2
    return window * (T - window / 2) / T
