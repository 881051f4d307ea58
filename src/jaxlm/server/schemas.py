"""The bodies of requests, as pydantic models, and the options of the engine that they mean.

A field that would change the answer and is not supported is refused by name (REFUSED). Other fields that are not listed
are ignored, as by vLLM. docs/serving.md has a table of all fields of OpenAI's endpoints and vLLM's extensions.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jaxlm.inference.embeddings import Pooling

# Fields of SamplingParams with the name that they have in a request.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "logit_bias", "stop", "stop_token_ids", "seed", "ignore_eos")  # fmt: skip
STRUCTURED = "use response_format, regex or grammar"
# Fields that are refused, with the way out, unless they have no effect: empty, or a value of NO_EFFECT. Where this is
# True, False has an effect.
REFUSED = {
    "use_beam_search": "use n, and choose among the answers",
    "length_penalty": "it belongs to beam search",
    "best_of": "use n, and choose among the answers",
    "min_tokens": "use ignore_eos, or ask for a long answer",
    "include_stop_str_in_output": "append the stop string",
    "prompt_logprobs": "use echo and logprobs of /v1/completions",
    "allowed_token_ids": "use logit_bias or grammar",
    "bad_words": "use logit_bias",
    "logits_processors": "use logit_bias",
    "truncate_prompt_tokens": "send a shorter prompt",
    "return_tokens_as_token_ids": "use /tokenize",
    "return_token_ids": "use /tokenize",
    "guided_json": STRUCTURED,
    "guided_regex": STRUCTURED,
    "guided_choice": STRUCTURED,
    "guided_grammar": STRUCTURED,
    "structured_outputs": STRUCTURED,
}
REFUSED_IN_CHATS = {
    **REFUSED,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "answers are text",
    "modalities": "answers are text",
    "web_search_options": "give a tool that searches",
    "verbosity": "say it in a message",
    "reasoning_effort": 'use chat_template_kwargs, such as {"enable_thinking": false}',
    "documents": "write them in a message",
    "chat_template": "write the prompt, and use /v1/completions",
    "mm_processor_kwargs": "messages are text",
    "continue_final_message": "end with a message of the assistant, which is continued",
    "add_generation_prompt": "use chat_template_kwargs",
    "echo": "use /v1/completions",
}
REFUSED_IN_COMPLETIONS = {
    **REFUSED,
    "suffix": "the model only continues a prompt",
    "response_format": "use regex or grammar, or /v1/chat/completions",
    "add_special_tokens": "send token ids",
}
REFUSED_IN_EMBEDDINGS = {
    "dimensions": "the model was not trained for shorter embeddings",
    "messages": "use input",
    "truncate_prompt_tokens": "send a shorter input",
    "add_special_tokens": "send token ids",
    "normalize": "embeddings have norm 1",
}
NO_EFFECT: dict[str, Any] = {
    "best_of": (1,),
    "length_penalty": (1,),
    "function_call": ("none",),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "normalize": (True,),
    "response_format": ({"type": "text"},),
}
StopString = Annotated[str, Field(max_length=1000)]  # each token of an answer is compared with all of them
# The first error of a list ends its validation: a body has millions of numbers, and each error takes a kilobyte.
Ids = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Texts = str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)]


class Body(BaseModel):
    """A body. `refused` has the fields that are refused."""

    model_config = ConfigDict(extra="ignore")
    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        for name, way_out in cls.refused.items():
            value, neutral = given.get(name) if isinstance(given, dict) else None, NO_EFFECT.get(name, ())
            is_empty = not value and not (value is False and neutral == (True,))
            if not is_empty and value not in neutral:
                raise ValueError(f"{name} is not supported: {way_out}")
        return given


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingBody(Body):
    """The fields of both endpoints. top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, skip_special_tokens,
    regex and grammar are extensions."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    stop_token_ids: Ids | None = None
    seed: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
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
        found = {name: value for name, value in found.items() if value is not None}
        return found if self.skip_special_tokens else found | {"skip_special_tokens": False}


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

    refused = REFUSED_IN_CHATS

    messages: Objects = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _refuse_kwargs(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in ("chat_template", "documents", "continue_final_message", "tools", "conversation", "messages"):
            if given and name in given:
                raise ValueError(f"{name} is not supported: use it for variables of the template only")
        return given

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

    refused = REFUSED_IN_COMPLETIONS

    prompt: Texts
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    def options(self) -> dict[str, Any]:
        found = super().options()
        if self.max_tokens is not None:
            found["max_tokens"] = max(1, self.max_tokens)  # completions.complete handles 0
        if self.logprobs is not None:
            found |= {"logprobs": self.logprobs, "prompt_logprobs": self.echo}
        return found


class EmbeddingBody(Body):
    """POST /v1/embeddings. pooling is an extension."""

    refused = REFUSED_IN_EMBEDDINGS
    model: str | None = None
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "mean"


class TokenizeBody(Body):
    """POST /tokenize"""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Ids
