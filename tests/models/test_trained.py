"""Trained models reproduce published greedy tokens and a published cross-entropy."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm


def test_stories260k_reproduces_the_published_greedy_tokens(shared: Path) -> None:
    """The 200 greedy float32 tokens that llama2.c publishes, decoded one at a time with a KV cache."""
    folder = shared / "checkpoints" / "stories260K"
    reference = json.loads((folder / "greedy_reference.json").read_text())
    expected = reference["greedy_ids"]
    model = jaxlm.load(folder, dtype="float32")
    ids, kv = list(reference["prompt_ids"]), model.init_kv(1, len(expected))
    logits, kv = model.forward([ids], model.weights, kv)
    while len(ids) < len(expected):
        ids.append(int(logits[0, -1].argmax()))
        logits, kv = model.forward([ids[-1:]], model.weights, kv)
    assert len(ids) >= 200
    assert ids == expected


def characters(vocabulary: Path, text: str) -> list[int]:
    """Ids of a vocabulary of single characters, as SentencePiece gives them: a space first, runs of spaces as one, a
    run of unknown characters as one <unk> (0)."""
    pieces = [line.split("\t")[0] for line in vocabulary.read_text("utf-8").split("\n") if line]
    text = re.sub(" +", " ", " " + text).replace(" ", "▁")
    ids = [pieces.index(c) if c in pieces else 0 for c in text]
    return [i for n, i in enumerate(ids) if i or not n or ids[n - 1]]


def test_babyllama_has_the_published_cross_entropy(shared: Path) -> None:
    """0.605 nats per character over the first 20 stories: BOS and the first 255 characters of each."""
    folder = shared / "checkpoints" / "babyllama_tok105"
    corpus = next((shared / "corpora" / "tinystories").glob("toyrnn*.txt")).read_text("utf-8")
    stories = [story.strip() for story in corpus.split("<|endoftext|>")][:20]
    ids = np.array([[1, *characters(folder / "tok105.vocab", story)][:256] for story in stories])
    model = jaxlm.load(folder, dtype="float32")

    def cross_entropy(weights: dict) -> float:
        log_probs = jax.nn.log_softmax(model.forward(ids[:, :-1], weights)[0])
        return -float(np.take_along_axis(np.asarray(log_probs), ids[:, 1:, None], axis=-1).mean())

    assert cross_entropy(model.weights) == pytest.approx(0.605, abs=0.01)
    layers = [{**w, "attn_norm": w["mlp_norm"], "mlp_norm": w["attn_norm"]} for w in model.weights["layers"]]
    assert cross_entropy({**model.weights, "layers": layers}) > 0.63
