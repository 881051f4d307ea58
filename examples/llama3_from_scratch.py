"""Llama 3 from scratch, in plain jax and optax: trains a small model on a text file, then samples from it.

    pip install jax optax
    python llama3_from_scratch.py input.txt
    python llama3_from_scratch.py input.txt --steps 5000 --prompt "JULIET:"

This file is for reading, from top to bottom. It imports nothing of jaxlm. jaxlm's own Llama is
src/jaxlm/models/llama3.py, which also reads checkpoints, runs on several devices and uses faster attention.

The architecture is that of "The Llama 3 Herd of Models" (arXiv:2407.21783). Four things differ from the Transformer of
2017: norms come before attention and MLP (RMSNorm), positions are rotations (RoPE), several query heads share a key and
value head (grouped-query attention), and the MLP has a gate (SwiGLU). No product has a bias.

Tiny Shakespeare (1.1 million characters), default settings: a validation loss of 1.70 nats per character after 2,000
steps, which take two and a half minutes of one CPU core. The sample has words, names of speakers and lines of verse.

Shapes: B batch, T tokens of a row, S keys of a row, V vocabulary, D model width, F MLP width, N query heads, K key and
value heads, H head width.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict[str, Any]
Cache = list[tuple[jax.Array, jax.Array]]  # keys and values [B,S,K,H] of each layer


class Config(NamedTuple):
    """The sizes of a model. Llama 3 8B has V=128,256, D=4,096, F=14,336, L=32, N=32, K=8, H=128."""

    V: int
    D: int = 128
    F: int = 352
    L: int = 4
    N: int = 4
    K: int = 2
    H: int = 32
    context: int = 64
    rope_theta: float = 500_000.0
    eps: float = 1e-5


# The parameters


def init(cfg: Config, key: jax.Array) -> Params:
    """Draws the initial parameters.

    A matrix is stored as [inputs, outputs]. Its entries are normal with a standard deviation of 0.02. The matrices that
    write to the residual stream are smaller: the stream is a sum of 2 L outputs, and should not grow with the depth.
    """
    keys = iter(jax.random.split(key, 2 + 7 * cfg.L))

    def matrix(inputs: int, outputs: int, std: float = 0.02) -> jax.Array:
        return std * jax.random.normal(next(keys), (inputs, outputs))

    small = 0.02 / math.sqrt(2 * cfg.L)
    layers = [
        {
            "attention_norm": jnp.ones(cfg.D),
            "q": matrix(cfg.D, cfg.N * cfg.H),
            "k": matrix(cfg.D, cfg.K * cfg.H),
            "v": matrix(cfg.D, cfg.K * cfg.H),
            "o": matrix(cfg.N * cfg.H, cfg.D, small),
            "mlp_norm": jnp.ones(cfg.D),
            "gate": matrix(cfg.D, cfg.F),
            "up": matrix(cfg.D, cfg.F),
            "down": matrix(cfg.F, cfg.D, small),
        }
        for _ in range(cfg.L)
    ]
    return {"embed": matrix(cfg.V, cfg.D), "layers": layers, "norm": jnp.ones(cfg.D), "head": matrix(cfg.D, cfg.V)}


# The model


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Divides each vector by the root of its mean square. Unlike LayerNorm, it subtracts no mean."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rope(x: jax.Array, pos: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding of queries or keys x [B,T,heads,H] at the positions pos [T].

    Component i and component i + H/2 form a pair, which is rotated by the angle pos * theta^(-2i/H). The product of a
    query and a key then depends on the difference of their positions only. The first pairs turn fast and tell close
    tokens apart, the last ones turn slowly and see long distances.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    angles = pos[:, None] * frequencies  # [T,H/2]
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]  # the same for all heads
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(cfg: Config, w: Params, x: jax.Array, start: Any, cache: Any) -> tuple[jax.Array, Any]:
    """Causal self-attention of x [B,T,D], whose first token has the position `start`.

    With a KV cache, the new keys and values are written into it, and the queries attend to all that is there.
    """
    B, T, _ = x.shape
    pos = start + jnp.arange(T)
    q = rope((x @ w["q"]).reshape(B, T, cfg.N, cfg.H), pos, cfg.rope_theta)
    k = rope((x @ w["k"]).reshape(B, T, cfg.K, cfg.H), pos, cfg.rope_theta)
    v = (x @ w["v"]).reshape(B, T, cfg.K, cfg.H)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, start, axis=1)
        cache = k, v

    # Grouped-query attention: N / K neighboring query heads share a head of keys and values. The KV cache is as much
    # smaller, which is what limits generation.
    keys, values = (jnp.repeat(x, cfg.N // cfg.K, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, keys) / math.sqrt(cfg.H)
    # A token sees itself and those before it, as many as there are in a row of the training. A sample may be longer.
    distance = pos[:, None] - jnp.arange(keys.shape[1])  # [T,S]
    is_visible = (distance >= 0) & (distance < cfg.context)
    weights = jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bnts,bsnh->btnh", weights, values)
    return out.reshape(B, T, cfg.N * cfg.H) @ w["o"], cache


def mlp(w: Params, x: jax.Array) -> jax.Array:
    """SwiGLU: one product decides, through SiLU, how much of another one passes."""
    return (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def forward(
    cfg: Config, params: Params, tokens: jax.Array, start: Any = 0, cache: Cache | None = None
) -> tuple[jax.Array, Cache | None]:
    """Computes the logits [B,T,V] of the token after each of the tokens [B,T], and the updated KV cache.

    x is the residual stream. Each layer reads it twice, and adds what it has found.
    """
    x = params["embed"][tokens]
    updated = []
    for i, w in enumerate(params["layers"]):
        out, layer_cache = attention(
            cfg, w, rms_norm(x, w["attention_norm"], cfg.eps), start, None if cache is None else cache[i]
        )
        x += out
        x += mlp(w, rms_norm(x, w["mlp_norm"], cfg.eps))
        updated.append(layer_cache)
    return rms_norm(x, params["norm"], cfg.eps) @ params["head"], None if cache is None else updated


# Training


def loss(cfg: Config, params: Params, rows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats: every token of a row [B,T+1] but the first is predicted from those before it."""
    logits, _ = forward(cfg, params, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def make_optimizer(steps: int, lr: float = 3e-3) -> optax.GradientTransformation:
    """AdamW with gradient clipping. The learning rate rises linearly, then falls along a cosine to a tenth.

    Weight decay is for matrices only: a norm's weight is meant to be near 1, not near 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, steps // 10), steps, lr / 10)
    is_matrix = partial(jax.tree.map, lambda w: w.ndim == 2)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def train(cfg: Config, data: np.ndarray, valid: np.ndarray, steps: int, batch: int = 12, seed: int = 0) -> Params:
    """Trains on rows that begin at random places of `data`. Prints the training and the validation loss."""
    params = init(cfg, jax.random.key(seed))
    print(f"{sum(w.size for w in jax.tree.leaves(params)):,} parameters, {steps:,} steps of {batch} x {cfg.context}")
    optimizer = make_optimizer(steps)
    state = optimizer.init(params)

    # Donated arguments are overwritten by the results, so that the parameters exist once.
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rows):
        value, gradient = jax.value_and_grad(partial(loss, cfg))(params, rows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    rng, start = np.random.default_rng(seed), time.perf_counter()
    valid_rows = rows_of(valid, cfg.context)
    for number in range(1, steps + 1):
        begins = rng.integers(len(data) - cfg.context, size=batch)
        rows = data[begins[:, None] + np.arange(cfg.context + 1)]
        params, state, value = step(params, state, rows)
        if number == 1 or number % max(1, steps // 10) == 0:
            print(
                f"step {number:5}: loss {value:.4f}, validation loss {evaluate(cfg, params, valid_rows):.4f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return params


def rows_of(data: np.ndarray, length: int) -> np.ndarray:
    """Rows of length + 1 tokens. The last token of a row is the first of the next, so that each is predicted once."""
    count = (len(data) - 1) // length
    return data[np.arange(count)[:, None] * length + np.arange(length + 1)]


@partial(jax.jit, static_argnums=0)
def evaluate(cfg: Config, params: Params, rows: jax.Array) -> jax.Array:
    """Mean loss of rows, 64 at a time."""
    return jax.lax.map(lambda row: loss(cfg, params, row[None]), rows, batch_size=64).mean()


# Sampling


@partial(jax.jit, static_argnums=(0, 3))
def sample(cfg: Config, params: Params, prompt: jax.Array, count: int, key: jax.Array, temperature: float) -> jax.Array:
    """Samples `count` tokens [B,count] after a prompt [B,T]. Temperature 0 takes the most likely token.

    The prompt is computed at once and leaves its keys and values in the KV cache (prefill). Each further step computes
    one token only (decoding).
    """
    B, T = prompt.shape
    empty = jnp.zeros((B, T + count, cfg.K, cfg.H))
    logits, cache = forward(cfg, params, prompt, 0, [(empty, empty)] * cfg.L)

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        # The argmax of logits / temperature + Gumbel noise is a sample of their softmax.
        return jnp.argmax(logits + temperature * jax.random.gumbel(key, logits.shape), axis=-1)

    def decode(carry, key):
        logits, cache, pos = carry
        token = choose(logits, key)
        logits, cache = forward(cfg, params, token[:, None], pos, cache)
        return (logits[:, -1], cache, pos + 1), token

    _, tokens = jax.lax.scan(decode, (logits[:, -1], cache, T), jax.random.split(key, count))
    return tokens.T


# The command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file to train on; its last tenth is validation data")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (2000)")
    parser.add_argument("--prompt", default="\n", help="beginning of the sample")
    parser.add_argument("--tokens", type=int, default=500, help="characters to sample (500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely characters (0.8)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, batches and sample (0)")
    args = parser.parse_args(arguments)

    # The vocabulary is the set of characters. Llama 3 itself has 128,256 tokens, most of them pieces of words.
    text = args.text.read_text()
    characters = sorted({*text, *args.prompt})
    ids = {character: i for i, character in enumerate(characters)}
    data = np.array([ids[character] for character in text], np.int32)
    split = len(data) * 9 // 10
    cfg = Config(V=len(characters))
    print(f"{len(text):,} characters, {len(characters)} of them different")

    params = train(cfg, data[:split], data[split:], args.steps, seed=args.seed)
    prompt = jnp.array([[ids[character] for character in args.prompt]])
    tokens = sample(cfg, params, prompt, args.tokens, jax.random.key(args.seed), args.temperature)
    print(args.prompt + "".join(characters[i] for i in tokens[0]))


if __name__ == "__main__":
    main()
