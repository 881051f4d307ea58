"""Sampling: the next token from logits, with logit bias, penalties, temperature, top-k, top-p and min-p.

Pure functions on logits [B,V] float32. Every sampling parameter is an array with one value per row. A batch can
therefore mix requests, and a new value needs no compilation, unless it switches on penalties, a logit bias or
log-probabilities. The order is that of transformers' `generate`: logit bias, repetition penalty (then presence and
frequency penalty), temperature, top-k, top-p, min-p.

Each filter is a threshold: a row keeps the logits at or above a value, so equal logits are kept or dropped together.
The top-k threshold is the k-th largest logit. The top-p threshold is the largest value at or above which the kept
probability reaches `top_p`. (transformers' top-p may split a group of equal logits.) The vocabulary is not sorted:
thresholds are read off the 64 largest logits of each row, or found by bisection on the bits (32 counts over V) if one
lies below them. Both ways give the same value. They run only in batches in which a row uses the filter.

The token of a row is bit-exactly independent of the other rows. Probabilities are summed as integers, because the order
of a sum depends on batch size and sharding, and integer sums do not depend on the order.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.devices import mesh
from jaxlm.inference.sampling_params import SamplingParams

# Larger than any logit, and small enough that the quotient of two such values does not overflow in float32.
HUGE = 2.0**126
# Largest logits of a row that are sorted, and the size of the blocks in which they are searched.
CANDIDATES, BLOCK = 64, 128


# A function of the logits [B,V] float32, called after logit bias and penalties and before the temperature. It is traced
# once per program. -inf excludes a token.
LogitsProcessor = Callable[[jax.Array], jax.Array]


class Sampling(NamedTuple):
    """Sampling parameters of each row, as arrays [B]. Neutral values are in parentheses."""

    temperature: Float[Array, " B"]  # (0: greedy, without the filters below)
    top_k: Int[Array, " B"]  # (0: off)
    top_p: Float[Array, " B"]  # (1: off; 0 keeps the largest only)
    min_p: Float[Array, " B"]  # (0: off; 1 keeps the largest only), relative to the largest probability
    repetition_penalty: Float[Array, " B"]  # (1), CTRL, arXiv:1909.05858, section 4.1
    presence_penalty: Float[Array, " B"]  # (0), subtracted from every token generated so far
    frequency_penalty: Float[Array, " B"]  # (0), subtracted once per time that a token was generated

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "Sampling":
        """One row per resolved SamplingParams."""
        kinds = {name: np.int32 if name == "top_k" else np.float32 for name in cls._fields}
        return cls(*(jax.device_put(np.array([getattr(r, name) for r in rows], kinds[name])) for name in cls._fields))


class Counts(NamedTuple):
    """Token counts for the penalties. Batches without penalties have None instead."""

    seen: Bool[Array, "B V"]  # in the prompt or generated
    generated: Int[Array, "B V"]  # number of times generated


def count(tokens: Int[Array, "B T"], pos: Int[Array, "B T"], vocab: int) -> Counts:
    """Counts after the prompts `tokens` [B,T] int32. Positions `pos` [B,T] int32 are -1 for padding."""
    generated = jnp.zeros((tokens.shape[0], vocab), jnp.int32)
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    # Padding gets an index past the end, which is dropped. A negative index would wrap to the last token.
    seen = (generated > 0).at[row, jnp.where(pos < 0, vocab, tokens)].set(True, mode="drop")
    return Counts(seen, generated)


def count_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> Counts:
    """`count` on the host, where another length of the prompts compiles nothing."""
    seen = np.zeros((len(prompts), vocab), np.bool_)
    for row, ids in zip(seen, prompts, strict=True):
        row[list(ids)] = True
    return Counts(*jax.device_put((seen, np.zeros((len(prompts), vocab), np.int32))))


def update(counts: Counts, tokens: Int[Array, " B"]) -> Counts:
    """Counts after one more generated token per row: tokens [B] int32, -1 for none."""
    batch, vocab = counts.generated.shape
    at = (jnp.arange(batch, dtype=jnp.int32), jnp.where(tokens < 0, vocab, tokens))
    return Counts(counts.seen.at[at].set(True, mode="drop"), counts.generated.at[at].add(1, mode="drop"))


def bias_of(rows: Sequence[Mapping[int, float] | None], vocab: int) -> np.ndarray | None:
    """`logit_bias` of all rows as [B,V] float32; None if no row has one.

    Raises:
        ValueError: A token id is outside the vocabulary.
    """
    if not any(rows):
        return None
    out = np.zeros((len(rows), vocab), np.float32)
    for i, row in enumerate(rows):
        for token, value in (row or {}).items():
            if not 0 <= token < vocab:
                raise ValueError(f"logit_bias has token {token}; this model's ids are 0 to {vocab - 1}")
            out[i, token] = value
    return out


def penalize(logits: Float[Array, "B V"], s: Sampling, counts: Counts) -> Float[Array, "B V"]:
    """Logits [B,V] after the penalties: repetition (prompt and generated tokens), presence and frequency (generated
    tokens only)."""
    repetition = s.repetition_penalty[:, None]
    repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(counts.seen, repeated, logits)
    logits -= s.presence_penalty[:, None] * (counts.generated > 0).astype(jnp.float32)
    return logits - s.frequency_penalty[:, None] * counts.generated.astype(jnp.float32)


def process(
    logits: Float[Array, "B V"],
    s: Sampling,
    counts: Counts | None = None,
    bias: Float[Array, "B V"] | None = None,
    processors: Sequence[LogitsProcessor] = (),
) -> Float[Array, "B V"]:
    """Logits [B,V] float32 whose softmax is sampled from, -inf for excluded tokens.

    Rows at temperature 0 get bias and penalties only. A temperature so low that the quotient overflows is increased.

    Args:
        logits: [B,V] float32.
        s: The sampling parameters.
        counts: Token counts; None if no row has a penalty.
        bias: Logit bias [B,V] float32, which is added first; None if no row has one.
        processors: Functions of the logits, which are called after the penalties.
    """
    if bias is not None:
        logits = logits + bias
    if counts is not None:
        logits = penalize(logits, s, counts)
    for processor in processors:
        processed = processor(logits)
        if getattr(processed, "shape", None) != logits.shape:
            what = getattr(processed, "shape", type(processed).__name__)
            raise ValueError(
                f"a logits processor returned {what}: it must return an array of the shape of its argument"
            )
        logits = processed.astype(jnp.float32)
    drawn = s.temperature > 0
    return lax.cond(jnp.any(drawn), lambda x: jnp.where(drawn[:, None], _filtered(x, s), x), lambda x: x, logits)


def sample(
    logits: Float[Array, "B V"],
    s: Sampling,
    keys: Key[Array, " B"],
    counts: Counts | None = None,
    bias: Float[Array, "B V"] | None = None,
    processors: Sequence[LogitsProcessor] = (),
) -> Int[Array, " B"]:
    """Samples the next tokens [B] int32: the argmax of the processed logits at temperature 0, else from their softmax.

    Gumbel-max: the argmax of logits plus Gumbel noise is distributed as the softmax (Maddison et al.,
    arXiv:1411.0030).

    Args:
        logits, s, counts, bias, processors: As in `process`.
        keys: Typed PRNG keys [B], which must not be reused (`step_keys`).
    """
    drawn = s.temperature > 0
    logits = process(logits, s, counts, bias, processors)

    def noisy(x: jax.Array) -> jax.Array:
        return x + jnp.where(drawn[:, None], jax.vmap(lambda key: _gumbel(key, x.shape[1]))(keys), 0.0)

    return _argmax(lax.cond(jnp.any(drawn), noisy, lambda x: x, logits))


def request_key(seed: int, ids: Sequence[int], number: int = 0) -> Key[Array, ""]:
    """The typed PRNG key of a request: that of the seed, folded with a hash of the prompt and with a number.

    Requests with different prompts or numbers share no random numbers, and the key does not depend on other requests.

    Args:
        seed: 32 bits.
        ids: Token ids of the prompt.
        number: Index of the request among those with an equal prompt.
    """
    digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).digest()  # the same on every machine, unlike hash()
    return _folded(np.uint32(seed), np.frombuffer(digest[:8], "<u4").astype(np.uint32), np.uint32(number))


@jax.jit
def _folded(seed: jax.Array, words: jax.Array, number: jax.Array) -> Key[Array, ""]:
    key = jax.random.key(seed)
    for word in (words[0], words[1], number):
        key = jax.random.fold_in(key, word)
    return key


def step_keys(keys: Key[Array, " B"], pos: Int[Array, " B"]) -> Key[Array, " B"]:
    """PRNG keys [B] of one step, from the keys [B] of the rows and the positions `pos` [B] int32 of the new tokens."""
    return jax.vmap(jax.random.fold_in)(keys, pos)


def logprobs(
    logits: Float[Array, "B V"], tokens: Int[Array, " B"], n: int
) -> tuple[Float[Array, " B"], Int[Array, "B n"], Float[Array, "B n"]]:
    """Log-probabilities (in nats) under the raw logits.

    Args:
        logits: [B,V] float32.
        tokens: [B] int32.
        n: Number of most likely tokens to return. Static.

    Returns:
        The log-probabilities of `tokens` [B] float32, the n most likely ids [B,n] int32, most likely first, and their
        log-probabilities [B,n] float32.
    """
    logits = logits - jnp.max(logits, -1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))
    values, ids = _top_k(logits, n)
    return jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0] - total[:, 0], ids, values - total


def _top_k(x: Float[Array, "B V"], n: int) -> tuple[Float[Array, "B n"], Int[Array, "B n"]]:
    """The n largest values of each row [B,n] and their indices; of equal values, the first. On a mesh, each device
    computes the n largest of its shard, and only these are all-gathered."""
    sharding = mesh.traced_spec("BV", x.shape)
    if len(sharding) < 2:
        values, ids = lax.top_k(x, n)
        return values, ids
    rows, axes = sharding

    def local(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(part, min(n, part.shape[1]))
        ids += lax.axis_index(axes) * part.shape[1]
        values, ids = (lax.all_gather(a, axes, axis=1, tiled=True) for a in (values, ids))
        values, best = lax.top_k(values, n)
        return values, jnp.take_along_axis(ids, best, -1)

    spec = jax.sharding.PartitionSpec
    return jax.shard_map(local, in_specs=spec(rows, axes), out_specs=spec(rows), check_vma=False)(x)


def _filtered(x: Float[Array, "B V"], s: Sampling) -> Float[Array, "B V"]:
    """Applies temperature, top-k, top-p and min-p. The result is not valid for rows at temperature 0."""
    drawn = s.temperature > 0
    x = jnp.minimum(x, HUGE)
    x /= jnp.maximum(jnp.where(drawn, s.temperature, 1.0)[:, None], jnp.max(x, -1, keepdims=True) / HUGE)
    by_k, by_p = drawn & (s.top_k > 0) & (s.top_k < x.shape[1]), drawn & (s.top_p < 1)
    x = _mask_below(x, by_k, lambda x: _top_k_threshold(x, jnp.where(by_k, s.top_k, 1)))
    x = _mask_below(x, by_p, lambda x: _top_p_threshold(x, jnp.where(by_p, s.top_p, 0.0)))
    return jnp.where(x < jnp.max(x, -1, keepdims=True) + jnp.log(s.min_p)[:, None], -jnp.inf, x)


def _mask_below(
    x: Float[Array, "B V"], rows: Bool[Array, " B"], threshold: Callable[[jax.Array], jax.Array]
) -> Float[Array, "B V"]:
    """-inf below the threshold [B] in `rows` [B] bool. The threshold is computed only if some row needs it."""
    lowest = jnp.full(x.shape[:1], -jnp.inf, x.dtype)
    at = lax.cond(jnp.any(rows), lambda x: jnp.where(rows, threshold(x), lowest), lambda x: lowest, x)
    return jnp.where(x < at[:, None], -jnp.inf, x)


def _top_k_threshold(x: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The k-th largest value of each row."""
    candidates = _largest(x)
    if candidates is None:
        return _bisection(x, jnp.int32(1), k)
    values, _ = candidates
    n = values.shape[1]
    found = jnp.take_along_axis(values, jnp.clip(k - 1, 0, n - 1)[:, None], 1)[:, 0]
    return lax.cond(jnp.all(k <= n), lambda x: found, lambda x: _bisection(x, jnp.int32(1), k), x)


def _largest(x: Float[Array, "B V"]) -> tuple[Float[Array, "B n"], Int[Array, "B n"]] | None:
    """The CANDIDATES largest values of each row in descending order, and their indices. None where devices share a
    vocabulary.

    No block but those with the CANDIDATES largest maxima can hold a larger value than all of these.
    """
    if len(mesh.traced_spec("BV", x.shape)) > 1:
        return None
    B, V = x.shape
    if V <= CANDIDATES * BLOCK:
        values, ids = lax.top_k(x, min(CANDIDATES, V))
        return values, ids
    blocks = jnp.pad(x, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf).reshape(B, -1, BLOCK)
    _, which = lax.top_k(jnp.max(blocks, -1), CANDIDATES)
    chosen = jnp.take_along_axis(blocks, which[..., None], 1).reshape(B, -1)
    values, at = lax.top_k(chosen, CANDIDATES)
    return values, jnp.take_along_axis(which, at // BLOCK, 1) * BLOCK + at % BLOCK


def _bisection(x: Float[Array, "B V"], weight: Int[Array, "*BV"], target: Int[Array, " B"]) -> Float[Array, " B"]:
    """The largest value of each row such that the weights of the logits at or above it sum to at least `target`.

    Found by bisection over bit patterns, from the highest bit down. Bit patterns of floats have the order
    of the numbers after negative ones are inverted and the sign bit of the others is set.

    Args:
        x: Logits [B,V] float32.
        weight: Weight of each logit [B,V] int32, or one scalar for all.
        target: [B] int32.
    """
    sign = jnp.uint32(1 << 31)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(bits < sign, bits | sign, ~bits)

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        trial = found | (sign >> i)
        above = jnp.sum(jnp.where(bits >= trial[:, None], weight, 0), -1, dtype=jnp.int32)
        return jnp.where(above >= target, trial, found)

    found = lax.fori_loop(jnp.uint32(0), jnp.uint32(32), step, jnp.zeros(x.shape[0], jnp.uint32))
    return lax.bitcast_convert_type(jnp.where(found < sign, ~found, found ^ sign), jnp.float32)


def _top_p_threshold(x: Float[Array, "B V"], share: Float[Array, " B"]) -> Float[Array, " B"]:
    """The largest value of each row such that the logits at or above it have the probability `share` [B].

    Probabilities are rounded to multiples of 2^-30. Measured at V = 262,144, the error of the kept share was at most
    3e-6 in normal, Laplace, Zipf and uniform rows, and 1e-4 in a row whose tail (4e-10 per token) rounds to zero.
    """
    weight = jnp.exp(x - jnp.max(x, -1, keepdims=True))
    # The sum, rounded up, in two integer parts of 11 bits (V up to 2^20 fits), so that the quotients sum to < 2^31.
    high = jnp.floor(weight * 2048)
    low = jnp.ceil((weight * 2048 - high) * 2048)
    high, low = (jnp.sum(part.astype(jnp.int32), -1, keepdims=True, dtype=jnp.int32) for part in (high, low))
    total = high.astype(jnp.float32) / 2048 + low.astype(jnp.float32) / 2048**2
    mass = jnp.round(weight * (2.0**30 / total)).astype(jnp.int32)
    whole = jnp.sum(mass, -1, dtype=jnp.int32)
    target = jnp.clip(jnp.ceil(whole.astype(jnp.float32) * share).astype(jnp.int32), 1, whole)
    candidates = _largest(x)
    if candidates is None:
        return _bisection(x, mass, target)
    values, ids = candidates
    # Where fewer logits are finite, indices may be those of the last block's padding, past V.
    masses = jnp.take_along_axis(mass, ids, 1, mode="fill", fill_value=0)
    reached = jnp.cumsum(masses, -1, dtype=jnp.int32) >= target[:, None]
    found = jnp.max(jnp.where(reached, values, -jnp.inf), -1)
    return lax.cond(jnp.all(reached[:, -1]), lambda x: found, lambda x: _bisection(x, mass, target), x)


def _gumbel(key: Key[Array, ""], size: int) -> Float[Array, " size"]:
    """Standard Gumbel noise [size] float32 from 32 random bits per value.

    jax.random.gumbel uses 23 bits. Its upper tail ends at 16, so that tokens with a probability below about 1e-8 are
    never sampled, even if a large vocabulary has many of them. Here the tail ends at 22.9, at the same cost.
    """
    bits = jax.random.bits(key, (size,), jnp.uint32)
    below_one = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-below_one))


def _argmax(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """First index of the largest value of each row: [B] int32. Two reductions are 3 to 9 times faster on CPU than XLA's
    argmax."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.min(jnp.where(x == jnp.max(x, -1, keepdims=True), index, x.shape[1] - 1), -1)
