"""The bodies of requests, as pydantic models, and the options of the engine that they mean.

Fields that are not listed are ignored, as by vLLM. What would change the answer and is not supported is refused by
name.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jaxlm.inference.embeddings import Pooling

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


class Function(BaseModel):
    name: str = Field(min_length=1)
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: Function


class ChatBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """They stay as they were given, because the chat template writes them."""
        for tool in tools or ():
            Tool.model_validate(tool)
        return tools

    @model_validator(mode="after")
    def _check_forced_calls(self) -> Self:
        if self.is_forced:
            if not self.tools:
                raise ValueError("tool_choice forces a call, and there are no tools")
            if self.response_format is not None or self.regex is not None or self.grammar is not None:
                raise ValueError("tool_choice forces a call: omit response_format, regex and grammar")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        if named is not None and not self.callable_tools:
            raise ValueError(f"tool_choice has the name {named!r}, which no tool has")
        return self

    @property
    def is_forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)

    @property
    def takes_several_calls(self) -> bool:
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, ToolChoice)

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        named = self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None
        return [tool for tool in self.tools or () if named in (None, tool["function"]["name"])]

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


class EmbeddingBody(BaseModel):
    """POST /v1/embeddings. pooling is an extension."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "mean"
    dimensions: None = None

    @field_validator("dimensions", mode="before")
    @classmethod
    def _refuse_dimensions(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("not supported: the model was not trained for shorter embeddings")
        return None


class TokenizeBody(BaseModel):
    """POST /tokenize"""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    """POST /detokenize"""

    tokens: list[int]
