"""The table of fields in docs/serving.md, the code, and the parameters of the openai client agree."""

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from jaxlm.server.schemas import NO_EFFECT, Body, ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
BODIES: dict[str, tuple[type[Body], Any, dict[str, Any]]] = {
    "chat/completions": (
        ChatBody,
        chat_create_params.CompletionCreateParamsBase,
        {"messages": [{"role": "user", "content": "a"}]},
    ),
    "completions": (CompletionBody, completion_create_params.CompletionCreateParamsBase, {"prompt": "a"}),
    "embeddings": (EmbeddingBody, embedding_create_params.EmbeddingCreateParams, {"input": "a"}),
}
STREAM = {"stream"}  # the client has it in subclasses of its parameters


def table() -> dict[str, list[list[str]]]:
    """endpoint -> supported, refused and ignored fields."""
    section = DOCS.read_text().split("## Fields")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    return {row[0].strip(): [re.findall(r"`(\w+)`", cell) for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_table_is_that_of_the_code(endpoint: str) -> None:
    kind, params, _ = BODIES[endpoint]
    supported, refused, ignored = table()[endpoint]
    assert supported == sorted(kind.model_fields)
    assert refused == sorted(kind.refused)
    assert ignored == sorted(ignored)
    assert not set(ignored) & {*supported, *refused}
    assert set(params.__annotations__) - STREAM <= {*supported, *refused, *ignored}


@pytest.mark.parametrize("endpoint", BODIES)
def test_refused_fields_are_named_with_the_way_out(endpoint: str) -> None:
    kind, _, sound = BODIES[endpoint]
    kind.model_validate({**sound, "user": "a", "unknown": [1]})
    for name, way_out in kind.refused.items():
        with pytest.raises(pydantic.ValidationError, match=re.escape(f"{name} is not supported: {way_out}")):
            kind.model_validate({**sound, name: ["something"]})
        neutral = NO_EFFECT.get(name, ())
        for value in (None, [], *neutral):
            kind.model_validate({**sound, name: value})
        if neutral == (True,):  # False changes the answer
            with pytest.raises(pydantic.ValidationError, match=f"{name} is not supported"):
                kind.model_validate({**sound, name: False})
        else:
            kind.model_validate({**sound, name: False})


@pytest.mark.parametrize(("kind", "fields"), [
    (CompletionBody, {"prompt": [[]] * 1000 + ["a"]}),
    (CompletionBody, {"prompt": [1] * 1000 + ["a"]}),
    (CompletionBody, {"prompt": "a", "stop_token_ids": ["a"] * 1000}),
    (EmbeddingBody, {"input": ["a"] * 1000 + [1]}),
    (ChatBody, {"messages": [1] * 1000}),
    (DetokenizeBody, {"tokens": ["a"] * 1000}),
])  # fmt: skip
def test_a_long_list_has_few_errors(kind: type[Body], fields: dict[str, Any]) -> None:
    """An error for each of a million numbers took a gigabyte, and three seconds in which nobody was answered."""
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate(fields)
    assert caught.value.error_count() < 10
