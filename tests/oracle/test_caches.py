"""Caches, ragged batches and packed rows against transformers on each text alone, in float32.

Texts are longer than Gemma's window of 5. Every case plants a fault that published caches have had.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import FAMILIES, UNIFORM
from oracle import reference
from oracle.reference import FAULT, LIMIT, V

import jaxlm
from jaxlm.nn import attention_cpu
from jaxlm.nn import kv_cache as caches

attends = import_module("jaxlm.nn.attention")
pytestmark = pytest.mark.oracle
WINDOW = 5
TEXT = np.random.RandomState(5).randint(0, V, (3, 20)).astype(np.int32)
TEXT[:, 3], TEXT[:, 4] = 0, 2  # a padding id and a special id


@pytest.fixture(scope="module", params=FAMILIES)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, jaxlm.Model]]:
    """The oracle and ours."""
    with reference.quiet():
        fields = {"num_hidden_layers": 1} if request.param in UNIFORM else {}
        oracle = reference.build(request.param, seed=3, **fields)
        yield oracle, reference.pair(oracle, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def quick() -> Iterator[None]:
    with reference.quickly():
        yield


def alone(oracle: Any, tokens: np.ndarray) -> np.ndarray:
    """The oracle's logits [T,V] of one text [T], at positions from 0."""
    return reference.logits(oracle, tokens[None], np.arange(len(tokens), dtype=np.int32)[None])[0]


def stepwise(model: jaxlm.Model, kv: Any, first: int, tokens: np.ndarray, shift: int = 0) -> np.ndarray:
    """Logits [T,V] of a text [T]: `first` tokens at once, then one at a time, at positions `shift` too high."""
    out, kv = reference.forward(model, tokens[None, :first], kv=kv)
    outs = [out[0]]
    for i in range(first, len(tokens)):
        out, kv = reference.forward(model, tokens[None, i : i + 1], np.full((1, 1), i + shift), kv)
        outs.append(out[0])
    return np.concatenate(outs)


@pytest.mark.parametrize("chunk", [None, 6])
def test_decoding_equals_the_full_forward(models: tuple[Any, jaxlm.Model], chunk: int | None) -> None:
    oracle, model = models
    expected = alone(oracle, TEXT[0])
    kv = model.init_kv(1, 24, chunk=chunk)
    # The family with both kinds of layers is compiled as users compile.
    with nullcontext() if any(model.config.windows) else reference.quickly():
        assert reference.distance(stepwise(model, kv, 6, TEXT[0]), expected) <= LIMIT
        assert reference.distance(stepwise(model, kv, 6, TEXT[0], shift=1), expected) >= FAULT


def chunked(call: Any, kv: Any, size: int, tokens: np.ndarray) -> np.ndarray:
    """Logits of a text [T] written `size` tokens a call; a call is filled up with padding to what the cache takes."""
    T, outs = len(tokens), []
    for begin in range(0, T, size):
        pos = begin + np.arange(kv.chunk)
        pos[(pos >= T) | (pos >= begin + size)] = -1
        out, kv = call(tokens[None, np.maximum(pos, 0)], pos[None], kv)
        outs.append(out[0, pos >= 0])
    return np.concatenate(outs)


def test_chunks_of_every_size_equal_the_whole(models: tuple[Any, jaxlm.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, model = models
    tokens = TEXT[0, :9]
    expected = alone(oracle, tokens)
    sliding = any(model.config.windows)
    call = reference.fresh(model)
    for size in range(1, len(tokens) + 1):
        kv = model.init_kv(1, len(tokens), chunk=size if sliding else None)
        assert reference.distance(chunked(call, kv, size, tokens), expected) <= LIMIT, size
    if sliding:  # a ring of exactly `window` slots: writing 4 at once destroys what the first needs
        ring = replace(model.init_kv(1, len(tokens), chunk=1), chunk=4)
        assert reference.distance(chunked(call, ring, 4, tokens), expected) >= FAULT
    exact = attention_cpu.attention_mask

    def newest_query_for_all(query: Any, key: Any, window: int | None) -> Any:
        return exact(
            query._replace(pos=jnp.broadcast_to(query.pos.max(1, keepdims=True), query.pos.shape)), key, window
        )

    monkeypatch.setattr(attention_cpu, "attention_mask", newest_query_for_all)
    faulty = chunked(reference.fresh(model), model.init_kv(1, len(tokens)), 4, tokens)
    assert reference.distance(faulty, expected) >= FAULT


LENGTHS = (3, 12, 7)


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Three texts of LENGTHS in one batch -> tokens, pos [3,12]; padding holds a real token's id."""
    tokens, pos = np.full((3, 12), 9, np.int32), np.full((3, 12), -1, np.int32)
    for row, n in enumerate(LENGTHS):
        if side == "right":
            places = np.arange(n)
        elif side == "left":
            places = 12 - n + np.arange(n)
        else:
            places = np.sort(np.random.RandomState(row).permutation(12)[:n])
        tokens[row, places], pos[row, places] = TEXT[row, :n], np.arange(n)
    return tokens, pos


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("side", ["right", "left", "within"])
def test_padding_changes_nothing(models: tuple[Any, jaxlm.Model], side: str) -> None:
    oracle, model = models
    tokens, pos = padded(side)
    expected = np.concatenate([alone(oracle, TEXT[row, :n]) for row, n in enumerate(LENGTHS)])
    for kv in (None, model.init_kv(3, 12), model.init_kv(3, 16, chunk=12)):
        out, _ = reference.forward(model, tokens, pos, kv)
        assert np.isfinite(out).all()
        assert reference.distance(out[pos >= 0], expected) <= LIMIT
    if side != "right":  # where causality hides it
        out, _ = reference.forward(model, tokens, np.tile(np.arange(12), (3, 1)))  # a mask that forgets padding
        assert reference.distance(out[pos >= 0], expected) >= FAULT


def decoded(call: Any, kv: Any, jump: bool = False) -> np.ndarray:
    """Logits of the tokens that follow a ragged prefill, two a row; a finished row is padding."""
    tokens, pos = padded("right")
    _, kv = call(tokens, pos, kv)
    outs = []
    for step in range(2):
        places = np.array([[n + step] for n in LENGTHS], np.int32)
        given = np.where(places < 13, places, -1)  # the longest row has room for one more
        out, kv = call(TEXT[np.arange(3)[:, None], places], np.where(jump & (given > 0), 12 + step, given), kv)
        outs.append(out[given >= 0])
    return np.concatenate(outs)


def test_ragged_rows_decode_as_each_alone(models: tuple[Any, jaxlm.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, model = models
    whole = [alone(oracle, TEXT[row, : n + 2]) for row, n in enumerate(LENGTHS)]
    expected = np.concatenate([[w[n] for w, n in zip(whole, LENGTHS)], [w[n + 1] for w, n in zip(whole, LENGTHS)]])
    expected = np.delete(expected, 4, axis=0)  # the longest row has ended
    for kv in (model.init_kv(3, 13), model.init_kv(3, 16, chunk=12)):
        call = reference.fresh(model)
        assert reference.distance(decoded(call, kv), expected) <= LIMIT
        assert reference.distance(decoded(call, kv, jump=True), expected) >= FAULT  # positions jump by the pad count


def test_padding_never_lands_in_the_last_slot(models: tuple[Any, jaxlm.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative indices wrap: x.at[-1].set(v, mode="drop") writes the last slot."""
    oracle, model = models
    tokens = TEXT[:1, :8]
    expected = alone(oracle, tokens[0])[-1:]

    def last(call: Any, length: int) -> np.ndarray:
        """The last logits, once the rest and some padding have gone to a cache of this length."""
        kv = model.init_kv(1, length)
        for pos in ([*range(7), -1], [-1] * 8):
            _, kv = call(tokens, np.array([pos]), kv)
        return call(np.roll(tokens, 1), np.array([[7] + [-1] * 7]), kv)[0][0, :1]

    call = reference.fresh(model)
    assert reference.distance(last(call, 8), expected) <= LIMIT
    assert reference.distance(last(call, 9), expected) <= LIMIT
    monkeypatch.setattr(caches, "slot_index", lambda pos, S, length: pos % S)  # -1 is the last slot
    assert reference.distance(last(reference.fresh(model), 8), expected) >= FAULT


def test_rewinding(models: tuple[Any, jaxlm.Model]) -> None:
    """Positions are written anew with another text: within the ring's slack, and any number in a cache of all."""
    oracle, model = models
    chunk, past = 4, 14
    call = reference.fresh(model)

    def rewound(back: int, kv: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ours and the oracle's logits of 4 tokens of another text after `back` positions are taken back."""
        for begin in range(0, past, chunk):
            pos = np.where(begin + np.arange(chunk) < past, begin + np.arange(chunk), -1)
            _, kv = call(TEXT[:1, np.maximum(pos, 0)], pos[None], kv)
        begin = past - back
        text = np.concatenate([TEXT[0, :begin], TEXT[1, :4]])
        out, _ = call(text[None, begin:], begin + np.arange(4)[None], kv)
        return out[0], alone(oracle, text)[begin:]

    for back in range(1, chunk + 1):
        assert reference.distance(*rewound(back, model.init_kv(1, 24, chunk=chunk))) <= LIMIT, back
    for back in (9, 14):
        assert reference.distance(*rewound(back, replace(model.init_kv(1, 24), chunk=24))) <= LIMIT, back
    if any(model.config.windows):  # further back the ring has lost what is needed: prefill again
        assert reference.distance(*rewound(9, model.init_kv(1, 24, chunk=chunk))) >= FAULT
    assert reference.distance(*rewound(14, model.init_kv(1, 24, chunk=chunk))) <= LIMIT


@pytest.mark.usefixtures("quick")
def test_packed_documents_do_not_see_each_other(
    models: tuple[Any, jaxlm.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, model = models
    parts = [TEXT[0, :6], TEXT[1, :1], TEXT[2, :8], TEXT[1, :1], TEXT[0, 5:10]]
    tokens = np.concatenate([*parts[:2], [9, 9], *parts[2:]]).astype(np.int32)
    pos = np.concatenate([*[np.arange(len(p)) for p in parts[:2]], [-1, -1], *[np.arange(len(p)) for p in parts[2:]]])
    expected = np.concatenate([alone(oracle, part) for part in parts])
    out, _ = reference.forward(model, tokens[None], pos[None])
    assert reference.distance(out[0, pos >= 0], expected) <= LIMIT
    monkeypatch.setattr(attends, "segment_ids", jnp.zeros_like)
    out, _ = reference.fresh(model)(tokens[None], pos[None])
    assert reference.distance(out[0, pos >= 0], expected) >= FAULT
