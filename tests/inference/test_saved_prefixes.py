"""The prefix cache saved to a file and loaded by another engine."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny_models import families, tiny

import jaxlm
from jaxlm.checkpoint.safetensors import read_header
from jaxlm.checkpoint.writer import copied_entry, write_safetensors
from jaxlm.devices import topology
from jaxlm.loading import spread

LONG = [(7 * i) % 90 for i in range(60)]
OTHER = [(11 * i) % 90 for i in range(40)]


def answer(engine: jaxlm.Engine, prompt: list[int]) -> list[int]:
    request = engine.submit(prompt, max_tokens=8, temperature=0, ignore_eos=True)
    while engine.is_busy:
        engine.step()
    assert request.error is None
    return request.tokens


@pytest.mark.parametrize("family", families("llama3", "gemma3"))
def test_another_engine_takes_the_prefixes(family: str, tmp_path: Path) -> None:
    """Gemma's sliding windows included. The file has the tokens of both requests but the last ones."""
    model, path = tiny(family, max_position_embeddings=128), tmp_path / "prefixes.safetensors"
    with jaxlm.Engine(model, 3) as engine:
        expected = [answer(engine, prompt) for prompt in (LONG, OTHER)]
        assert engine.save_prefix_cache(path) == len(LONG) + len(OTHER) + 2 * 7
    with jaxlm.Engine(model, 2) as engine:
        assert engine.load_prefix_cache(str(path)) == len(LONG) + len(OTHER) + 2 * 7
        assert [answer(engine, prompt) for prompt in (LONG, OTHER)] == expected
        assert engine.scheduler.hits == len(LONG) + len(OTHER) - 2  # one token is left to compute


def test_a_smaller_engine_takes_the_prefixes_used_last(tmp_path: Path) -> None:
    model, path = tiny("llama3", max_position_embeddings=128), tmp_path / "prefixes.safetensors"
    with jaxlm.Engine(model, 3) as engine:
        [expected, _] = [answer(engine, prompt) for prompt in (LONG, OTHER)]
        answer(engine, LONG)
        engine.save_prefix_cache(path)
    with jaxlm.Engine(model, 1, length=50) as engine:  # also shorter than the prefix
        assert engine.load_prefix_cache(path) == 49
        short = LONG[:40]
        assert (
            answer(engine, short) == jaxlm.generate(model, short, max_tokens=8, temperature=0, ignore_eos=True).tokens
        )
        assert engine.scheduler.hits == 39
    with jaxlm.Engine(model, 1) as engine:
        engine.load_prefix_cache(path)
        assert answer(engine, LONG) == expected


def test_rows_with_requests_stay(tmp_path: Path) -> None:
    """Prefixes are loaded while a request decodes, which has penalties."""
    model, path = tiny("qwen3", max_position_embeddings=128), tmp_path / "prefixes.safetensors"
    with jaxlm.Engine(model, 1) as engine:
        expected = answer(engine, LONG)
        engine.save_prefix_cache(path)
    options = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "repetition_penalty": 1.3}
    with jaxlm.Engine(model, 2) as engine:
        request = engine.submit(OTHER, **options)
        while not request.tokens:
            engine.step()
        assert engine.load_prefix_cache(path) == len(LONG) + 7
        assert answer(engine, LONG) == expected
        assert engine.scheduler.hits == len(LONG) - 1
        while engine.is_busy:
            engine.step()
    assert request.tokens == jaxlm.generate(model, OTHER, **options).tokens


@pytest.mark.slow
def test_a_mesh_loads_what_one_device_saved(tmp_path: Path) -> None:
    model = tiny("gemma3", max_position_embeddings=128, num_attention_heads=8, num_key_value_heads=4)
    path = tmp_path / "prefixes.safetensors"
    with jaxlm.Engine(model, 2) as engine:
        expected = answer(engine, LONG)
        engine.save_prefix_cache(path)
    with jaxlm.Engine(spread(model, topology.make("data=2,model=4", 4)), 2) as engine:
        engine.load_prefix_cache(path)
        assert answer(engine, LONG) == expected
        assert engine.scheduler.hits == len(LONG) - 1


def test_what_is_refused(tmp_path: Path) -> None:
    model, path = tiny("llama3", max_position_embeddings=128), tmp_path / "prefixes.safetensors"
    engine = jaxlm.Engine(model, 1)
    answer(engine, LONG)
    engine.save_prefix_cache(path)
    changed = jax.tree.map(lambda a: a, model.weights)
    changed["layers"][-1]["o"] = changed["layers"][-1]["o"].at[1:].multiply(1.001)
    with pytest.raises(ValueError, match="other weights"):
        jaxlm.Engine(replace(model, weights=changed), 1).load_prefix_cache(path)
    rounded = jax.tree.map(lambda a: a.astype("bfloat16"), model.weights)
    with pytest.raises(ValueError, match="other weights"):
        jaxlm.Engine(replace(model, weights=rounded), 1).load_prefix_cache(path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        engine.load_prefix_cache(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        engine.load_prefix_cache(tmp_path / "missing")
    with pytest.raises(ValueError, match="no prefix cache"):
        jaxlm.Engine(model, 1, prefix_cache=False).load_prefix_cache(path)
    names = read_header(path)
    entries = [copied_entry(tensor) for name, tensor in names.items() if name != "0.layers.1.v"]
    with open(tmp_path / "less.safetensors", "wb") as file:
        write_safetensors(file, entries, lambda nbytes: None)
    with pytest.raises(ValueError, match=r"lacks 1 \(0.layers.1.v\)"):
        engine.load_prefix_cache(tmp_path / "less.safetensors")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="corrupt"):
        engine.load_prefix_cache(tmp_path / "x.npy")
