"""jaxlm's answers to the probes, and jaxlm against itself: KV cache, chunked prefill, batches, rewinding."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import loading
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import mesh
from jaxlm.inference.compilation import CompiledSteps
from jaxlm.loading import resolving
from jaxlm.model import Model
from jaxlm.nn.rope import FixedRope
from jaxlm.verification.probes import CHATS, TEXTS, Probes, Trace, positions

ROPES = ("rope", "local_rope")  # fields of a config
CACHED = 480  # positions of a cached probe without windows, so that its KV cache stays small


def subject_of(model: Model | ModelSource) -> resolving.Resolved:
    """What is known about a model before its weights are read."""
    if isinstance(model, Model):
        checkpoint: Any = model.checkpoint  # None if it has none; only references need it
        return resolving.Resolved(model.family, model.config, checkpoint, model.tokenizer, model.generation_config)
    return resolving.resolve(model)


def loaded(model: Model | ModelSource, dtype: str, device: Any = None, quantize: str | None = None) -> Model:
    """The model, read from its source if it is not in memory yet."""
    return model if isinstance(model, Model) else loading.load(model, dtype=dtype, device=device, quantize=quantize)


def dtype_of(model: Any, dtype: str) -> str:
    """The type of jaxlm's weights."""
    return str(model.dtype) if isinstance(model, Model) else dtype


def trace(model: Model, probes: Probes, reference: Trace | None) -> Trace:
    """jaxlm's answers, computed with the reference's rotary frequencies, which are compared on their own."""
    family, cfg = model.family, _shared_frequencies(model.config, reference)
    indices = jnp.asarray(probes.indices)

    @jax.jit
    def answers(tokens: jax.Array, pos: jax.Array, weights: Any) -> tuple[list[jax.Array], jax.Array]:
        states: list[jax.Array] = []
        x, _ = family.forward(cfg, tokens, weights, None, pos, hidden=states)
        states = [state[:, indices].astype(jnp.float32) for state in [*states[:-1], x]]
        return states, family.logits(cfg, x[:, indices], weights)

    with mesh.use_mesh_of(model.weights):
        hidden, logits = jax.device_get(answers(jnp.asarray(probes.tokens), jnp.asarray(probes.pos), model.weights))
    ropes = {name: getattr(model.config, name).frequencies(cfg.H) for name in ROPES if hasattr(cfg, name)}
    return Trace(
        "jaxlm",
        str(model.dtype),
        {name: np.asarray(rope.radians) for name, rope in ropes.items()},
        {name: rope.amplitude for name, rope in ropes.items()},
        hidden,
        logits,
        greedy=greedy(model, probes),
        ids=None if model.tokenizer is None else [model.tokenizer.encode(text) for text in TEXTS],
        chats=[model.tokenizer.chat(chat) for chat in CHATS]
        if model.tokenizer is not None and model.tokenizer.has_template
        else None,
    )


def _shared_frequencies(cfg: Any, reference: Trace | None) -> Any:
    """The config with the reference's rotary frequencies: one unit in the last place of a frequency moves the logits at
    position 9,000 by 1e-3 standard deviations."""
    if reference is None:
        return cfg
    shared = (reference.used or reference.radians).items()
    return replace(cfg, **{name: FixedRope(tuple(x.tolist()), reference.amplitude[name]) for name, x in shared})


def greedy(model: Model, probes: Probes) -> list[int]:
    """Greedy text through the compiled steps of generation."""
    from jaxlm.inference.generation import stream

    options: dict[str, Any] = {"max_tokens": probes.steps, "temperature": 0.0, "ignore_eos": True, "stop": ()}
    neutral: dict[str, Any] = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    pieces = stream(model, probes.prompt, **options, **neutral)
    return [token for piece in pieces for token in piece.tokens]


def itself(model: Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs of logits [n,V] that must be equal, by name: computed in another way, and by the plain forward pass."""
    cfg = model.config
    pos = positions(cfg.context, cfg.windows, far=min(CACHED, cfg.context) - 64)
    tokens = np.random.RandomState(1).randint(0, cfg.V, pos.shape).astype(np.int32)
    whole = _plain(model, tokens, pos)
    T = pos.shape[1]
    ones = [T // 4] + [1] * (T - T // 4)
    # A chunk never spans the jump of positions in the middle: a ring buffer needs consecutive positions.
    sevens = [min(7, end - begin) for end in (T // 2, T) for begin in range(end - T // 2, end, 7)]
    stepped, kv = _cached(model, tokens, pos, ones)
    chunked, _ = _cached(model, tokens, pos, sevens)
    # Rewinds by fewer tokens than a chunk. New tokens must not attend to those written after that position.
    back, other = T - min(8, T // 2), tokens.copy()
    other[:, back:] = (other[:, back:] + 1) % cfg.V
    rewound, _ = _cached(model, other[:, back:], pos[:, back:], [1] * (T - back), kv)
    alone = [_plain(model, tokens[[row]], pos[[row]]) for row in range(len(pos))]
    ends = {"decode": np.cumsum(ones) - 1, "chunks": np.cumsum(sevens) - 1}
    logits = {
        "decode = forward": (stepped, whole[:, ends["decode"]]),
        "prefill in chunks of 7 = forward": (chunked, whole[:, ends["chunks"]]),
        "rewound KV cache = forward": (rewound, _plain(model, other, pos)[:, back:]),
        "single row = batch": (np.concatenate(alone), whole),
    }
    return {name: (a.reshape(-1, cfg.V), b.reshape(-1, cfg.V)) for name, (a, b) in logits.items()}


def _plain(model: Model, tokens: np.ndarray, pos: np.ndarray) -> np.ndarray:
    return np.asarray(model.forward(tokens, model.weights, None, pos)[0])


def _cached(model: Model, tokens: np.ndarray, pos: np.ndarray, sizes: list[int], kv: Any = None) -> tuple[Any, Any]:
    """Logits [B,n,V] of the last token of each chunk, through the prefill step of generation; and the KV cache."""
    B = len(tokens)
    kv = model.init_kv(B, int(pos.max()) + 1, chunk=16) if kv is None else kv
    steps = CompiledSteps(model)
    last, out, begin = jnp.zeros((B, model.config.D), model.dtype), [], 0
    for size in sizes:
        piece = (jnp.asarray(tokens[:, begin : begin + size]), jnp.asarray(pos[:, begin : begin + size]))
        kv, last = steps.prefill(kv, last, *piece)
        out.append(np.asarray(_logits(model, last)))
        begin += size
    return np.stack(out, axis=1), kv


def _logits(model: Model, x: jax.Array) -> jax.Array:
    return model.family.logits(model.config, x[:, None], model.weights)[:, 0]
