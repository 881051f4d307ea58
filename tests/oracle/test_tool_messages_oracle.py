"""Messages of tools in real chat templates, in the form of the protocol, render as transformers renders them."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_chat import tokenizer_of

pytestmark = pytest.mark.oracle

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
ARGUMENTS = {"city": 'Zürich "West"', "days": 2}
TEMPLATES = (
    "Qwen-Qwen2.5-7B-Instruct",
    "Qwen-Qwen3-0.6B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
)


def conversation(arguments: Any, content: Any) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sun": true}'},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks."},
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_of_tools_render_as_in_transformers(name: str, shared: Path) -> None:
    tokenizer = tokenizer_of((shared / "chat_templates" / f"{name}.jinja").read_text())
    fixed = {"date_string": "26 Jul 2024", "add_generation_prompt": True}
    for length in (2, 4, 6):
        # transformers takes arguments as objects, and the protocol has them as JSON and null as content.
        theirs = conversation(ARGUMENTS, "")[:length]
        ours = conversation(json.dumps(ARGUMENTS), None)[:length]
        expected = tokenizer.hf.apply_chat_template(theirs, tools=TOOLS, tokenize=False, **fixed)
        assert tokenizer.prompt(ours, tools=TOOLS, **fixed) == expected
        if length > 2:
            assert json.dumps(json.dumps(ARGUMENTS))[1:-1] not in expected  # JSON in a text, as a string would give
            assert "days" in expected.split("How is the weather?")[1]
