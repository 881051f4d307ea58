"""Meta's PyTorch code of Llama 3 (package llama-models with fairscale) as a reference.

It takes a start position instead of positions: each row of probes runs alone, with the RoPE table filled for its
positions from jaxlm's frequencies. Meta's own frequencies are compared separately, computed from the cos and sin of its
table. Its code fixes the RoPE scaling factor at 8, which is wrong for Llama 3.2: there it is patched, and the report
says so.
"""

# pyright: reportMissingImports=false
# PyTorch is optional: types are checked with and without it.

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from jaxlm.checkpoint.safetensors import read_index
from jaxlm.loading.resolving import Resolved
from jaxlm.verification.probes import CHATS, TEXTS, Probes, Trace

# Meta's names of Hugging Face's `model.layers.{}.…`, and the axis that its shards split.
LAYER = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
TOP = {"tok_embeddings": ("model.embed_tokens", 0), "norm": ("model.norm", None), "output": ("lm_head", 0)}


class Meta:
    """llama_models.llama3.model.Transformer."""

    def require(self, subject: Resolved) -> None:
        missing = [name for name in ("torch", "fairscale", "llama_models") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"Meta's code needs {', '.join(missing)}: pip install torch, then "
                "pip install --no-deps llama-models==0.3.0 fairscale==0.4.13"
            )
        cfg = subject.config
        if subject.checkpoint.config.get("model_type") != "llama" or cfg.rope.type not in ("default", "llama3"):
            raise ValueError("Meta's code computes only Llama 3 with default or llama3 RoPE: compare with transformers")
        fixed = (cfg.rope.low_freq_factor, cfg.rope.high_freq_factor, cfg.rope.original_context)
        if cfg.rope.type == "llama3" and fixed != (1, 4, 8192):
            raise ValueError(
                f"Meta's code fixes low_freq_factor, high_freq_factor and original context at 1, 4 and 8192, not "
                f"{fixed}: compare with transformers"
            )
        if cfg.H * cfg.N != cfg.D:
            raise ValueError("Meta's code computes only heads of width D / N: compare with transformers")

    def __call__(self, subject: Resolved, probes: Probes, dtype: str) -> list[Trace]:
        import torch

        with _alone(), torch.inference_mode():
            traces = [self.trace(subject, probes, name) for name in dict.fromkeys(("float32", dtype))]
        traces[0].ids, traces[0].chats = _tokenized(subject)
        return traces

    def trace(self, subject: Resolved, probes: Probes, dtype: str) -> Trace:
        import torch

        cfg = subject.config
        radians = torch.from_numpy(np.array(cfg.frequencies().radians))
        model = _build(subject, max(probes.tokens.shape[1], len(probes.prompt) + probes.steps)).to(
            getattr(torch, dtype)
        )
        own = torch.view_as_real(model.freqs_cis[1]).numpy()  # the angle of position 1 is the frequency
        hidden, logits = zip(*(_row(model, radians, *row, probes.indices) for row in zip(probes.tokens, probes.pos)))
        text, gaps = _greedy(model, radians, probes)
        patched = "" if cfg.rope.factor in (1.0, 8.0) else f", factor {cfg.rope.factor:g} patched in"
        return Trace(
            f"meta (llama-models{patched})",
            dtype,
            {"rope": np.arctan2(own[:, 1], own[:, 0])},
            {"rope": 1.0},
            [np.stack(states) for states in zip(*hidden)],
            np.stack(logits),
            text,
            gaps,
            used={"rope": radians.numpy()},
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Meta's layers need process groups: here of a single process, without a port."""
    import fairscale.nn.model_parallel.initialize as parallel
    import torch.distributed as dist

    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with redirect_stdout(sys.stderr):  # fairscale prints
        parallel.initialize_model_parallel(1)
    try:
        yield
    finally:
        parallel.destroy_model_parallel()
        dist.destroy_process_group()


def _build(subject: Resolved, length: int) -> Any:
    from llama_models.llama3 import model as code
    from llama_models.llama3.args import ModelArgs

    cfg = subject.config
    path = subject.checkpoint.folder / "params.json"
    arguments = json.loads(path.read_text()) if path.exists() else _arguments(cfg)
    arguments |= {"vocab_size": cfg.V, "max_batch_size": 1, "max_seq_len": length}
    published = code.apply_scaling
    if cfg.rope.factor not in (1.0, 8.0):
        code.apply_scaling = lambda freqs: _scaled(freqs, cfg.rope.factor)
    try:
        model = code.Transformer(ModelArgs(**arguments)).eval()
    finally:
        code.apply_scaling = published
    model.load_state_dict(dict(_meta_tensors(subject)), strict=True)
    return model


def _arguments(cfg: Any) -> dict[str, Any]:
    """params.json of a model in Hugging Face's format. Meta rounds int(8 D / 3) times a multiplier up to a multiple: F
    itself, of a number that is not above it."""
    return {
        "dim": cfg.D,
        "n_layers": cfg.L,
        "n_heads": cfg.N,
        "n_kv_heads": cfg.K,
        "multiple_of": cfg.F,
        "ffn_dim_multiplier": min(1.0, cfg.F / int(8 * cfg.D / 3)),
        "norm_eps": cfg.eps,
        "rope_theta": cfg.rope.theta,
        "use_scaled_rope": cfg.rope.type == "llama3",
    }


def _scaled(freqs: Any, factor: float) -> Any:
    """Llama 3.1's RoPE scaling with another factor than the 8 of Meta's code."""
    import torch

    turns = 8192 * freqs / (2 * math.pi)
    keep = torch.clamp((turns - 1) / (4 - 1), 0, 1)
    return (1 - keep) * freqs / factor + keep * freqs


def _row(model: Any, radians: Any, tokens: np.ndarray, pos: np.ndarray, indices: np.ndarray) -> tuple[list, np.ndarray]:
    """Hidden states [P,D] before the first layer and after each, the last one normed, and logits [P,V] of one row."""
    import torch

    states: list[np.ndarray] = []
    note = lambda module, args, out: states.append(out[0, indices].float().numpy())  # noqa: E731
    hooks = [m.register_forward_hook(note) for m in (model.tok_embeddings, *model.layers[:-1], model.norm)]
    model.freqs_cis = _rotations(radians, torch.from_numpy(pos))
    logits = model(torch.from_numpy(tokens[None]).long(), 0)[0, indices]
    for hook in hooks:
        hook.remove()
    return states, logits.numpy()


def _rotations(radians: Any, pos: Any) -> Any:
    import torch

    angles = torch.outer(pos.float(), radians)
    return torch.polar(torch.ones_like(angles), angles)


def _greedy(model: Any, radians: Any, probes: Probes) -> tuple[list[int], list[float]]:
    import torch

    model.freqs_cis = _rotations(radians, torch.arange(len(probes.prompt) + probes.steps))
    text, gaps, piece, start = [], [], list(probes.prompt), 0
    for _ in range(probes.steps):
        two = model(torch.tensor([piece]), start)[0, -1].topk(2)
        start += len(piece)
        piece = [int(two.indices[0])]
        text.append(piece[0])
        gaps.append(float(two.values[0] - two.values[1]))
    return text, gaps


# Files of one format under the names, and in the row order, of the other.


def names(L: int) -> Iterator[tuple[str, str, int | None]]:
    """(Meta's name, Hugging Face's, axis of Meta's shards) of every tensor."""
    for meta, (hf, axis) in TOP.items():
        yield f"{meta}.weight", f"{hf}.weight", axis
    for i in range(L):
        for meta, (hf, axis) in LAYER.items():
            yield f"layers.{i}.{meta}.weight", f"model.layers.{i}.{hf}.weight", axis


def _permuted(w: Any, heads: int, to_pairs: bool) -> Any:
    """Rows of q or k [heads*H,D] from Hugging Face's order (halves) to Meta's (pairs), or back."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, *((2, half) if to_pairs else (half, 2)), -1).transpose(1, 2).reshape(w.shape)


def _heads(cfg: Any, meta_name: str) -> int:
    return cfg.N if ".wq." in meta_name else cfg.K if ".wk." in meta_name else 0


def to_transformers(subject: Resolved) -> Iterator[tuple[str, Any]]:
    """Hugging Face's names and tensors of a checkpoint in Meta's format."""
    files = _pth(subject)
    for meta, hf, axis in names(subject.config.L):
        w = _joined(files, meta, axis)
        heads = _heads(subject.config, meta)
        yield hf, _permuted(w, heads, to_pairs=False) if heads else w


def _meta_tensors(subject: Resolved) -> Iterator[tuple[str, Any]]:
    """Meta's names and tensors of a checkpoint in either format."""
    if (subject.checkpoint.folder / "consolidated.00.pth").exists():
        files = _pth(subject)
        yield from ((meta, _joined(files, meta, axis)) for meta, _, axis in names(subject.config.L))
        return
    from safetensors import safe_open

    where = read_index(subject.checkpoint.folder)
    for meta, hf, _ in names(subject.config.L):
        hf = "model.embed_tokens.weight" if hf not in where else hf  # a tied head
        with safe_open(where[hf].file, "pt") as file:
            w = file.get_tensor(hf)
        heads = _heads(subject.config, meta)
        yield meta, _permuted(w, heads, to_pairs=True) if heads else w


def _pth(subject: Resolved) -> list[dict[str, Any]]:
    import torch

    paths = sorted(subject.checkpoint.folder.glob("consolidated.*.pth"))
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]


def _joined(files: list[dict[str, Any]], name: str, axis: int | None) -> Any:
    import torch

    return files[0][name] if axis is None or len(files) == 1 else torch.cat([file[name] for file in files], dim=axis)


def _tokenized(subject: Resolved) -> tuple[list[list[int]] | None, list[list[int]] | None]:
    """Token ids of TEXTS and CHATS by Meta's tokenizer, if the folder has its file."""
    path = subject.checkpoint.folder / "tokenizer.model"
    if not path.exists() or not path.read_bytes().startswith(b"IQ== "):
        return None, None
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    tokenizer = Tokenizer(path)
    ids = [tokenizer.encode(text, bos=True, eos=False, allowed_special="all") for text in TEXTS]
    chats = [[RawMessage.model_validate(message) for message in chat] for chat in CHATS]
    return ids, [ChatFormat(tokenizer).encode_dialog_prompt(chat).tokens for chat in chats]
