"""Model FLOPs and bytes from a config: of training, for MFU (model FLOPs utilization), of a forward pass and of a
decoding step, for their speed limits. Recomputation is not counted."""

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


def forward(table: params.Table, cfg: Any, T: int, depth: int = 0) -> float:
    """FLOPs of a forward pass over a row of T tokens with logits of the last token only: prefill, and with T = 1 a
    decoding step.

    2 per parameter and token for the matmuls, 2 V D for the logits, and per layer 4 N H for each pair of a token and a
    token that it attends to (the products with keys and with values). A token attends to itself, to the tokens before
    it in the row, and to the `depth` tokens in the KV cache, as far as they are within the window of the layer.

    Args:
        table: PARAMS of the family.
        cfg: Config of the model.
        T: Tokens of the row.
        depth: Tokens that are already in the KV cache.
    """
    head = cfg.V * cfg.D
    layers = multiplied(table, cfg) - head
    pairs = sum(attended_pairs(T, depth, window) for window in cfg.windows)
    return 2.0 * layers * T + 2.0 * head + 4.0 * cfg.N * cfg.H * pairs


def attended_pairs(T: int, depth: int = 0, window: int | None = None) -> int:
    """Number of pairs of a token of a row and a token that it attends to, in one layer. The tokens have the positions
    `depth` to `depth + T - 1`. Both numbers of the pair may be of the same token."""
    end = depth + T
    if window is None or window >= end:
        return (end * (end + 1) - depth * (depth + 1)) // 2
    start = min(max(depth, window), end)  # the first position that attends to `window` tokens, and not to all
    return attended_pairs(start - depth, depth) + (end - start) * window


def decode_bytes(weights: Any, cfg: Any, rows: int, length: int, cache_itemsize: int) -> int:
    """Bytes that a decoding step must read: every weight once, and the keys and values of each row.

    An untied embedding is not read, but for one row per token, which is not counted. A layer with a sliding window
    reads the tokens within it.

    Args:
        weights: Weights of the model, or their shapes (params.shapes).
        cfg: Config of the model.
        rows: Batch size.
        length: Tokens that the new token attends to, itself included.
        cache_itemsize: Bytes of one number of the KV cache.
    """
    embedding = 0 if cfg.tied else params.nbytes(weights["embed"])
    slots = sum(length if window is None else min(length, window) for window in cfg.windows)
    return params.nbytes(weights) - embedding + rows * 2 * slots * cfg.K * cfg.H * cache_itemsize
