"""The bodies of requests, as pydantic models, and the options of the engine that they mean.

Fields that are not listed are ignored, as by vLLM. What would change the answer and is not supported is refused by
name.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Stop = str | list[str] | None
# Fields of SamplingParams with the name that they have in a request.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "logit_bias", "stop", "stop_token_ids", "seed", "ignore_eos")  # fmt: skip


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingBody(BaseModel):
    """The fields of both endpoints. top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, regex and grammar are
    extensions."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    regex: str | None = None
    grammar: str | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> dict[str, Any]:
        """Options of the engine (RequestOptions), without max_tokens and logprobs."""
        found = {name: getattr(self, name) for name in (*SAMPLING, "regex", "grammar")}
        return {name: value for name, value in found.items() if value is not None}


class JsonSchema(BaseModel):
    name: str = "schema"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _refuse_forced_calls(cls, value: Any) -> Any:
        if value == "required" or isinstance(value, Mapping):
            raise ValueError("forced tool calls are not supported: use auto or none")
        return value

    def options(self) -> dict[str, Any]:
        tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        found = super().options() | {"template_args": dict(self.chat_template_kwargs or {})}
        if self.tools and self.tool_choice != "none":
            found["template_args"]["tools"] = self.tools
        if tokens is not None:
            found["max_tokens"] = tokens
        if self.logprobs:
            found["logprobs"] = self.top_logprobs
        form = self.response_format
        if form is not None and form.type == "json_object":
            found["schema"] = True
        if form is not None and form.type == "json_schema":
            if form.json_schema is None or form.json_schema.schema_ is None:
                raise ValueError("response_format of type json_schema needs json_schema.schema")
            found["schema"] = form.json_schema.schema_
        return found


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    suffix: None = None
    best_of: int | None = None

    @field_validator("suffix", mode="before")
    @classmethod
    def _refuse_suffix(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported: the model only continues a prompt")
        return None

    @field_validator("best_of")
    @classmethod
    def _refuse_best_of(cls, value: int | None) -> int | None:
        if value is not None and value > 1:
            raise ValueError("not supported: use n, and choose among the answers")
        return value

    def options(self) -> dict[str, Any]:
        found = super().options()
        if self.max_tokens is not None:
            found["max_tokens"] = max(1, self.max_tokens)  # completions.complete handles 0
        if self.logprobs is not None:
            found |= {"logprobs": self.logprobs, "prompt_logprobs": self.echo}
        return found


class TokenizeBody(BaseModel):
    """POST /tokenize"""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """POST /detokenize"""

    tokens: list[int]
