"""Embeddings against the hidden states of transformers, which runs each prompt on its own, pooled by torch."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import DISTINCT, families
from oracle import reference
from oracle.reference import FAULT, LIMIT

from jaxlm.inference.embeddings import Embedder

pytestmark = pytest.mark.oracle


def pooled(oracle: Any, ids: list[int], pooling: str, layer: int = -1) -> np.ndarray:
    import torch

    pos = np.arange(len(ids))[None]
    states = reference.run(oracle, np.array([ids]), pos, output_hidden_states=True).hidden_states[layer][0]
    one = states.mean(dim=0) if pooling == "mean" else states[-1]
    return torch.nn.functional.normalize(one, dim=-1).numpy()


@pytest.mark.parametrize("family", families(*DISTINCT))
def test_embeddings_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    with reference.quiet():
        oracle = reference.build(family)
        model = reference.pair(oracle, tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, reference.V, n).tolist() for n in (5, 1, 23, 12)]
    embedder = Embedder(model, nullcontext)
    poolings: tuple[Any, ...] = ("mean", "last")
    for pooling in poolings:
        found = embedder.run(prompts, pooling)
        for ids, vector in zip(prompts, found, strict=True):
            assert reference.distance(vector, pooled(oracle, ids, pooling)) <= LIMIT
        # Faults: the layer before the last one, the other pooling, and a prompt that sees the one before it.
        other = "last" if pooling == "mean" else "mean"
        assert reference.distance(found[2], pooled(oracle, prompts[2], pooling, -2)) >= FAULT
        assert reference.distance(found[2], pooled(oracle, prompts[2], other)) >= FAULT
        assert reference.distance(found[0], pooled(oracle, prompts[3] + prompts[0], pooling)) >= FAULT
