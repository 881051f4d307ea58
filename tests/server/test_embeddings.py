"""Embeddings: those of Model.hidden_states, whatever else is in the batch, and through HTTP with the openai client."""

import base64
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import httpx
import jax
import numpy as np
import openai
import pytest
from helpers.serving import serving
from helpers.tiny_chat import TEMPLATE, quick_compilation, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm.devices import mesh
from jaxlm.inference.compilation import executables
from jaxlm.inference.embeddings import PER_ROW, ROW, Embedder, rows_of
from jaxlm.model import Model
from jaxlm.server.state import Server


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(tiny("llama3", max_position_embeddings=256), tokenizer=tokenizer_of(TEMPLATE))


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[openai.OpenAI]:
    with quick_compilation():
        served = Server(model, jaxlm.Engine(model, 2), "tiny", max_waiting=16)
        with serving(served) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            yield client


def expected(model: Model, ids: list[int], pooling: str = "mean") -> np.ndarray:
    """One prompt on its own, without padding, pooled in float64."""
    states = np.asarray(model.hidden_states([ids])[-1][0], np.float64)
    pooled = states.mean(axis=0) if pooling == "mean" else states[-1]
    return pooled / np.linalg.norm(pooled)


def prompts_of(lengths: list[int], V: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_embeddings_are_those_of_the_hidden_states(family: str) -> None:
    model = tiny(family)
    prompts = prompts_of([3, 1, 9, 4], model.config.V)
    poolings: tuple[Any, ...] = ("mean", "last")
    embedder = Embedder(model, nullcontext)
    with quick_compilation():
        for pooling in poolings:
            found = embedder.run(prompts, pooling)
            assert found.dtype == np.float32
            for ids, vector in zip(prompts, found, strict=True):
                np.testing.assert_allclose(vector, expected(model, ids, pooling), atol=2e-6)
            # The next token of the row would move them far beyond the limit.
            assert np.abs(found[0] - expected(model, prompts[0] + prompts[1], pooling)).max() > 1e-2


def test_embeddings_on_a_mesh_are_those_of_one_device() -> None:
    model = tiny("llama3")
    prompts = prompts_of([3, 1, 9, 1500, 1000], model.config.V)
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    over = jax.sharding.Mesh(devices, (mesh.DATA, mesh.MODEL))
    weights = jax.device_put(model.weights, jax.sharding.NamedSharding(over, jax.sharding.PartitionSpec()))
    sharded = Embedder(replace(model, weights=weights), nullcontext)
    [batch] = sharded.batches([len(ids) for ids in prompts])  # two rows
    with quick_compilation():
        found = sharded.run([prompts[i] for i in batch])
        assert len(Embedder(model, nullcontext).batches([len(ids) for ids in prompts])) == 2
        for i, vector in zip(batch, found, strict=True):
            np.testing.assert_allclose(vector, Embedder(model, nullcontext).run([prompts[i]])[0], atol=2e-6)


def test_rows_have_bounds() -> None:
    lengths = [3 * ROW, 1, ROW, ROW // 2, *[1] * 300]
    rows = rows_of(lengths)
    assert sorted(i for row in rows for i in row) == [*range(len(lengths))]
    assert all(len(row) <= PER_ROW and (len(row) == 1 or sum(lengths[i] for i in row) <= ROW) for row in rows)


def test_few_programs_are_compiled(model: Model) -> None:
    def programs() -> int:
        return sum(name == "embeddings" for name, *_ in executables(model.family, model.config))

    embedder, before = Embedder(model, nullcontext), programs()
    with quick_compilation():
        for n in range(17, 25):
            embedder.run(prompts_of([1] * n, 199))
    assert programs() == before + 1


def test_non_finite_hidden_states_are_an_error(model: Model) -> None:
    broken = replace(model, weights={**model.weights, "norm": model.weights["norm"] * np.nan})
    with quick_compilation(), pytest.raises(ValueError, match="NaN or Inf"):
        Embedder(broken, nullcontext).run([[1, 2]])


def test_the_openai_client_asks_for_base64_and_float(client: openai.OpenAI, model: Model) -> None:
    assert model.tokenizer is not None
    texts = ["hello", "a b c", "hello"]
    ids = [model.tokenizer.encode(text) for text in texts]
    answer = client.embeddings.create(model="tiny", input=texts)  # base64, which the client decodes
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    assert [one.index for one in answer.data] == [0, 1, 2]
    for one, other, tokens in zip(answer.data, plain.data, ids, strict=True):
        assert one.embedding == other.embedding
        np.testing.assert_allclose(one.embedding, expected(model, tokens), atol=2e-6)
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    by_ids = client.embeddings.create(model="tiny", input=ids)
    assert [one.embedding for one in by_ids.data] == [one.embedding for one in answer.data]
    [last] = client.embeddings.create(model="tiny", input=ids[1], extra_body={"pooling": "last"}).data
    np.testing.assert_allclose(last.embedding, expected(model, ids[1], "last"), atol=2e-6)


def test_base64_is_little_endian_float32(client: openai.OpenAI) -> None:
    body = {"input": "hello", "encoding_format": "base64"}
    raw = httpx.post(f"{client.base_url}embeddings", json=body).json()
    assert raw["pooling"] == "mean"
    vector = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    [plain] = client.embeddings.create(model="tiny", input="hello", encoding_format="float").data
    assert vector.tolist() == plain.embedding


@pytest.mark.parametrize(("fields", "message"), [
    ({"input": "a", "dimensions": 8}, "dimensions is not supported: the model was not trained for shorter"),
    ({"input": ""}, "input 0: the prompt is empty"),
    ({"input": ["a", ""]}, "input 1: the prompt is empty"),
    ({"input": []}, "empty"),
    ({"input": [[1], [199]]}, "input 1: .*0 to 198"),
    ({"input": "a " * 500}, "input 0 has 1,001 tokens"),
    ({"input": ["a"] * 2049}, "2,049 texts: send 2,048"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "pooling": "max"}, "pooling"),
])  # fmt: skip
def test_errors_name_what_is_wrong(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.post("/embeddings", body=fields, cast_to=object)
