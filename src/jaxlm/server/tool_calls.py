"""Tool calls: the forms in which models write them, and the grammars that force one."""

import ast
import json
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.inference.structured import compile_grammar, schema_text
from jaxlm.model import Model
from jaxlm.processing.chat_template import THINKING
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.server.responses import encodable

PYTHON_TAG = "<|python_tag|>"
Call = tuple[str, dict[str, Any]]  # name and arguments


class CallForm(NamedTuple):
    """How a model writes calls.

    Attributes:
        tags: Tags around each call; empty if an answer is either calls or text.
        arguments: The key of the arguments in JSON.
        begins: Without tags: how an answer with calls may begin, without blanks. {name} is that of a tool.
        parse: Reads the text between tags, or the whole answer. None if it is not calls.
    """

    tags: tuple[str, ...]
    arguments: str
    begins: tuple[str, ...]
    parse: Callable[[str], list[Call] | None]


def _json_calls(text: str) -> list[Call] | None:
    """Calls as JSON objects with a name and arguments or parameters. Several are separated by semicolons."""
    rest, calls = text.strip().removeprefix(PYTHON_TAG).lstrip(), []
    while rest:
        try:
            found, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        calls.append((found["name"], arguments))
        if not _is_json(arguments):  # a number that is too large for Python's floats
            return None
        rest = rest[end:].lstrip()
        if rest and not rest.startswith(";"):
            return None
        rest = rest.removeprefix(";").lstrip()
    return calls or None


def _gemma_calls(text: str) -> list[Call] | None:
    """Calls as JSON, or as Python calls with literal arguments: a list of them, or one per line, in a fence or not."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3].strip()
    if text.startswith("{"):
        return _json_calls(text)
    try:
        with warnings.catch_warnings(action="ignore"):  # they would quote the text
            body = ast.parse(text).body
        nodes = [statement.value for statement in body if isinstance(statement, ast.Expr)]
        if len(nodes) == 1 and isinstance(nodes[0], ast.List):
            nodes, body = nodes[0].elts, []
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # all of them from ast, for other text
        return None
    return calls if calls and len(nodes) >= len(body) and all(_is_json(arguments) for _, arguments in calls) else None


def _is_json(arguments: dict[str, Any]) -> bool:
    """Whether arguments can be written as JSON. Python's literals are more: sets, tuples as keys, infinity."""
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _python_call(node: ast.expr) -> Call:
    """name(key=literal, ...). Raises ValueError for other expressions."""
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a call with keyword arguments")
    return ast.unparse(node.func), {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


JSON = ('{"name"', '{"type"', '{"parameters"')  # how calls as JSON begin
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)

# Qwen 3 and Hermes: the tags are in the chat template.
HERMES = CallForm(("<tool_call>", "</tool_call>"), "arguments", (), _json_calls)
# Llama 3.1 to 3.3: the answer is a JSON object. A tag may stand before it. Source: Meta's model card and prompt formats
# of Llama 3.1 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1), and its chat template. Several
# calls with semicolons: vLLM's parser llama3_json.
LLAMA = CallForm((), "parameters", (PYTHON_TAG, *JSON), _json_calls)
# Gemma 3 has no tokens for calls, and its chat template has no tools. The prompts of Google's documentation ask for a
# list of Python calls or a JSON object (https://ai.google.dev/gemma/docs/capabilities/function-calling), or for a block
# of tool_code (https://ai.google.dev/gemma/docs/meme-generator). Chat templates with tools, such as vLLM's
# tool_chat_template_gemma3_pythonic.jinja, use the list.
PYTHON = ("[{name}(", "{name}(", "```tool_code", "```json", "```python")
GEMMA = CallForm((), "parameters", (*JSON, *PYTHON), _gemma_calls)


def form_of(model: Model) -> CallForm:
    """The form of a model's calls: that of its chat template, vocabulary or family, in this order."""
    assert model.tokenizer is not None
    template = model.tokenizer.hf.chat_template or ""
    texts = template.values() if isinstance(template, Mapping) else [template]
    rules = (
        (HERMES, any(HERMES.tags[0] in text for text in texts)),
        (LLAMA, PYTHON_TAG in model.tokenizer.hf.get_added_vocab()),
        (GEMMA, model.family.__name__.endswith(".gemma3")),
    )
    return next((form for form, applies in rules if applies), HERMES)


def written(call: Call, index: int) -> dict[str, Any]:
    """A call in the form of the protocol."""
    name, arguments = call
    function = {"name": encodable(name), "arguments": encodable(json.dumps(arguments, ensure_ascii=False))}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def forced_grammar(
    form: CallForm, tools: Sequence[Mapping[str, Any]], several: bool, tokenizer: Tokenizer, reasoning: str
) -> str:
    """A Lark grammar of an answer that calls one of the tools. The arguments match the JSON schema of the tool.

    Args:
        form: The form of the calls.
        tools: The tools that may be called.
        several: Whether there may be several calls.
        tokenizer: The tokenizer of the model.
        reasoning: "open" if the prompt ends inside of reasoning, "closed" if it ends after it, else "".
    """
    added = tokenizer.hf.get_added_vocab()

    def tag(name: str) -> str:
        return name if name in added else json.dumps(name)

    before = ""
    if tokenizer.thinking is not None and reasoning != "closed":
        thought = rf"/(.|\n)*/ {THINKING[1]} /\n{{0,2}}/ "
        before = thought if reasoning == "open" else f"({THINKING[0]} {thought})? "
    call = f'{tag(form.tags[0])} "\\n" object "\\n" {tag(form.tags[1])}' if form.tags else "object"
    more = ' ("\\n" call)*' if several and form.tags else ""
    lines = [f"start: {before}call{more}", f"call: {call}"]
    lines.append(f"object: {' | '.join(f'tool_{i}' for i in range(len(tools)))}")
    for i, tool in enumerate(tools):
        opening = f'{{"name": {json.dumps(tool["function"]["name"])}, "{form.arguments}": '
        lines.append(f'tool_{i}: {json.dumps(opening)} args_{i} "}}"')
        lines.append(f"args_{i}: %json {schema_text(parameters_of(tool))}")
    return "\n".join(lines)


def parameters_of(tool: Mapping[str, Any]) -> Any:
    """The JSON schema of the arguments. A tool without parameters takes none, as in the protocol."""
    given = tool["function"].get("parameters")
    return {"type": "object", "properties": {}, "additionalProperties": False} if given is None else given


def check_parameters(model: Model, tools: Sequence[Mapping[str, Any]]) -> None:
    """Names the tool whose parameters cannot be enforced.

    Raises:
        ValueError: The JSON schema of a tool is not valid or not supported.
    """
    assert model.tokenizer is not None
    for tool in tools:
        try:
            compile_grammar(model.tokenizer, model.config.V, schema=parameters_of(tool))
        except ValueError as error:
            raise ValueError(f"tools: the parameters of {tool['function']['name']!r}: {error}") from None
