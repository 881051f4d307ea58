"""transformers' models as the oracle: built tiny, given weights that show faults, saved, and run with exact masks.

torch is imported inside functions: the light tier collects these files without it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers.random_weights import draw
from helpers.tiny_chat import quick_compilation
from helpers.tiny_models import CONFIGS, FULL, SIZES, SLIDING

import jaxlm
from jaxlm.devices import hardware

LIMIT = 1e-4  # of the logits' deviation
FAULT = 100 * LIMIT  # what a planted fault must move them by
V = SIZES["vocab_size"]
# Compiler options without most optimizations, as in tests/conftest.py. Later versions of jax lack the second one.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if version("jaxlib").startswith("0.10."):
    QUICK["xla_cpu_use_fusion_emitters"] = False
BASE = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(family: str, seed: int = 0, change: Callable[..., np.ndarray] | None = None, **fields: Any) -> Any:
    """A float32 model of transformers with drawn weights and these config fields.

    change(name, value) may give other values. The padding id's embedding is not zero, as it is not in checkpoints.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # more only get into each other's way in models of this size
    config = transformers.AutoConfig.for_model(**deepcopy({**CONFIGS[family], **BASE, **fields}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    neutral = 0.0 if family == "gemma3" else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = draw(name, tuple(parameter.shape), seed, neutral)
            parameter.copy_(torch.from_numpy(value if change is None else change(name, value)))
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits the config.json of a saved model by hand."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=1))


def old_spelling(config: dict[str, Any]) -> None:
    """rope_parameters -> rope_theta, rope_scaling and rope_local_base_freq, as files had it before transformers 5."""
    section = config.pop("rope_parameters")
    if SLIDING in section or FULL in section:
        if "gemma3" in config["model_type"]:
            config["rope_local_base_freq"] = section[SLIDING]["rope_theta"]
        section = section[FULL]
        # These files spell the kinds of layers as a pattern.
        if "_sliding_window_pattern" in config and config.pop("layer_types"):
            config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    config["rope_theta"] = section.pop("rope_theta")
    config["rope_scaling"] = None if section["rope_type"] == "default" else section
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")


def share_frequencies(oracle: Any, model: jaxlm.Model) -> None:
    """Copies our rotary frequencies into the oracle: an ulp of a frequency is 1e-3 deviations at position 9,000.

    They are compared on their own in test_frequencies.py.
    """
    import torch

    rotary, cfg = _rotary(oracle), model.config
    ropes = {"inv_freq": cfg.rope}
    if hasattr(cfg, "local_rope"):
        ropes = {f"{FULL}_inv_freq": cfg.rope, f"{SLIDING}_inv_freq": cfg.local_rope}
    for buffer, rope in ropes.items():
        if hasattr(rotary, buffer):  # a model of one kind of layer has one buffer
            getattr(rotary, buffer).copy_(torch.from_numpy(np.array(rope.frequencies(cfg.H).radians)))


def _rotary(oracle: Any) -> Any:
    inner = oracle.model
    return getattr(inner, "language_model", inner).rotary_emb


def masks(oracle: Any, pos: np.ndarray) -> Any:
    """Additive masks [B,1,T,T] by position: transformers' own go by index and would take a jump for a new document."""
    import torch

    text = oracle.config.get_text_config()
    distance = torch.from_numpy(pos[:, None, :, None] - pos[:, None, None, :])
    valid = torch.from_numpy(pos >= 0)[:, None, None, :]

    def mask(window: int | None) -> Any:
        seen = (distance >= 0) & valid
        if window is not None:
            seen &= distance < window
        dtype = oracle.dtype
        return torch.where(seen, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))

    if SLIDING not in (getattr(text, "layer_types", None) or ()):
        return mask(None)
    return {FULL: mask(None), SLIDING: mask(text.sliding_window)}


def run(oracle: Any, tokens: np.ndarray, pos: np.ndarray, **more: Any) -> Any:
    """The oracle's output for tokens, pos [B,T]; pos -1 is padding."""
    import torch

    with torch.no_grad():
        return oracle(
            input_ids=torch.from_numpy(tokens).long(),
            position_ids=torch.from_numpy(np.maximum(pos, 0)).long(),
            attention_mask=masks(oracle, pos),
            use_cache=False,
            **more,
        )


def logits(oracle: Any, tokens: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """[B,T,V] float32."""
    return run(oracle, tokens, pos).logits.float().numpy()


def score_deviation(oracle: Any, tokens: np.ndarray, pos: np.ndarray) -> float:
    """The deviation of attention scores over what a query sees, averaged over queries that see 5 keys or more.

    Scores are read off the probabilities: within a row, log p is the score less a constant.
    """
    rows = []
    for layer in run(oracle, tokens, pos, output_attentions=True).attentions:
        p = layer.double().numpy()
        logs = np.log(np.where(p > 0, p, np.nan))
        enough = (p > 0).sum(-1) >= 5
        rows.append(np.nanstd(logs[enough], axis=-1))
    return float(np.mean(np.concatenate(rows)))


def distance(ours: Any, oracle: np.ndarray) -> float:
    """The largest difference of two sets of logits, in deviations of the oracle's."""
    return float(np.abs(np.asarray(ours) - oracle).max() / oracle.std())


def save(oracle: Any, folder: Path, **options: Any) -> Path:
    oracle.save_pretrained(folder, **options)
    return folder


def pair(oracle: Any, folder: Path, dtype: Any = "float32", **options: Any) -> jaxlm.Model:
    """Saves the oracle, loads what it saved, and shares the frequencies."""
    model = jaxlm.load(save(oracle, folder, **options), dtype=dtype)
    share_frequencies(oracle, model)
    return model


def forward(model: jaxlm.Model, tokens: Any, pos: Any = None, kv: Any = None) -> tuple[np.ndarray, Any]:
    out, kv = model.forward(np.asarray(tokens, np.int32), model.weights, kv, pos)
    return np.asarray(out), kv


def fresh(model: jaxlm.Model) -> Callable[..., tuple[np.ndarray, Any]]:
    """`forward` compiled anew, so that it sees what a test has patched in jaxlm.nn; quickly, for planted faults."""
    cfg, family = model.config, model.family

    @partial(jax.jit, compiler_options=QUICK)
    def program(tokens: jax.Array, weights: Any, pos: jax.Array, kv: Any) -> Any:
        x, kv = family.forward(cfg, tokens, weights, kv, pos)
        return family.logits(cfg, x, weights), kv

    def call(tokens: Any, pos: Any, kv: Any = None) -> tuple[np.ndarray, Any]:
        out, kv = program(jnp.asarray(tokens, jnp.int32), model.weights, jnp.asarray(pos, jnp.int32), kv)
        return np.asarray(out), kv

    return call


def faulty_logits(faulty: jaxlm.Model, model: jaxlm.Model, tokens: Any, pos: Any) -> np.ndarray:
    """The logits of a planted fault; where it lies in the weights alone, the program that is compiled already."""
    if faulty.config == model.config and len(faulty.weights["layers"]) == len(model.weights["layers"]):
        return forward(faulty, tokens, pos)[0]
    return fresh(faulty)(tokens, pos)[0]


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Without most of the compiler's optimizations, for comparisons that do not depend on them: compiling takes most of
    the time. test_logits, test_greedy and test_precision run what users run."""
    before = hardware.COMPILER_OPTIONS["cpu"]
    hardware.COMPILER_OPTIONS["cpu"] = {**before, **QUICK}  # of prefill and decode
    try:
        with quick_compilation():
            yield
    finally:
        hardware.COMPILER_OPTIONS["cpu"] = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks on unusual configs, which these are on purpose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def near_and_far(B: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """tokens, pos [B,64]: row 0 at positions 0 to 63, others at 0 to 31 and 9,000 to 9,031. Id 0 and the special ids
    are among the tokens."""
    tokens = np.random.RandomState(B).randint(0, V, (B, 64)).astype(np.int32)
    tokens[:, [0, 20, 40]], tokens[:, 30], tokens[:, [7, 50]] = 0, 1, 2
    pos = np.tile(np.arange(64, dtype=np.int32), (B, 1))
    pos[1:, 32:] += 9000 - 32
    return tokens, pos
