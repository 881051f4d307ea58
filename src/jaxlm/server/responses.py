"""The bodies of answers, as dicts of the OpenAI protocol."""

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlm.inference.completion import Completion, CompletionChunk

if TYPE_CHECKING:
    from jaxlm.server.reasoning import Parts

Answer = Completion | CompletionChunk


class Envelope:
    """What all answers to one request share: id, time, and model name."""

    def __init__(self, kind: str, model: str):
        self.kind: str = kind
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self.common: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        return {**self.common, "object": self.kind, "choices": choices, "usage": used}

    def part(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = self.kind + ".chunk" if self.kind.startswith("chat") else self.kind
        return {**self.common, "object": kind, "choices": choices, **more}


def usage(answers: Sequence[Answer], prompts: int) -> dict[str, Any]:
    """Token counts.

    Args:
        answers: The last chunk of each answer, or all answers. The first `prompts` of them have each prompt once.
        prompts: Number of prompts.
    """
    prompt = sum(answer.prompt_tokens for answer in answers[:prompts])
    generated = sum(answer.generation_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in answers[:prompts])},
    }


def message(parts: "Parts") -> dict[str, Any]:
    """The message of a chat, or the delta of a part of it."""
    found: dict[str, Any] = {"content": parts.content}
    if parts.reasoning:
        found["reasoning_content"] = parts.reasoning
    if parts.tool_calls:
        found["tool_calls"] = [*parts.tool_calls]
        found["content"] = parts.content or None
    return found


def encodable(text: str) -> str:
    r"""Text that can be written in UTF-8. A surrogate without its partner, which JSON can have, becomes \udc00."""
    return text.encode("utf-8", "backslashreplace").decode()


def error(text: str, kind: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": encodable(text), "type": kind, "param": None, "code": code}}
