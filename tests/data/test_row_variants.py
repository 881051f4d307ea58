"""Rows in the many forms in which people write them: the text that they become, and the part of it in the loss mask.

VARIANTS has each row beside what it says. The writers (chatml, qwen, llama, gemma) write that conversation as the
format of each chat template is known, without jaxlm, and refuse what a template has no place for.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import pytest
from helpers.tiny_tokenizers import byte_fallback, byte_level, load, write_tiktoken

from jaxlm.data.documents import Document, DocumentTokenizer, TextOptions
from jaxlm.data.readers import InvalidRow, Row

# What a row says


@dataclass(frozen=True)
class Turn:
    """A message. An assistant's has reasoning, calls, whether it is trained on, and its content as the row writes it,
    if the reasoning is in there."""

    role: str
    text: str
    thought: str = ""
    calls: tuple[dict, ...] = ()
    learned: bool = False
    raw: str | None = None


@dataclass(frozen=True)
class Said:
    """A conversation."""

    turns: tuple[Turn, ...]
    system: str | None = None
    tools: tuple[dict, ...] = ()
    silent: bool = False  # the prompt has Qwen's empty block of reasoning (enable_thinking=false)


class Refused(Exception):
    """A chat template has no place for what is said. The text is a pattern of jaxlm's message."""


def user(text: str) -> Turn:
    return Turn("user", text)


def learned(text: str, *calls: dict, **fields) -> Turn:
    return Turn("assistant", text, calls=calls, learned=True, **fields)


def unlearned(text: str) -> Turn:
    return Turn("assistant", text)


def result(text: str) -> Turn:
    return Turn("tool", text)


def says(*turns: Turn, **fields) -> Said:
    return Said(turns, **fields)


# How each format writes it: pieces of text, and whether they are in the loss mask

Pieces = Iterator[tuple[str, bool]]


def chatml(said: Said, reasoning: bool = False) -> Pieces:
    if any(turn.thought and turn.raw is None for turn in said.turns) and not reasoning:
        raise Refused("does not write the reasoning")
    if said.tools:
        yield f"<|im_start|>tools\n{json.dumps(list(said.tools))}<|im_end|>\n", False
    if said.system is not None:
        yield f"<|im_start|>system\n{said.system}<|im_end|>\n", False
    for turn in said.turns:
        thought = f"<think>{turn.thought}</think>" if turn.thought and turn.raw is None else ""
        calls = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in turn.calls)
        yield f"<|im_start|>{turn.role}\n", False
        yield f"{thought}{turn.raw or turn.text}{calls}<|im_end|>", turn.learned
        yield "\n", False


def tagged(said: Said) -> Pieces:
    return chatml(said, reasoning=True)


QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json "
    "object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def qwen(said: Said) -> Pieces:
    """Reasoning is kept after the last question. The last answer has a block of it in any case."""
    if said.silent and said.turns[-1].thought:
        raise Refused("span of the assistant's message .* cannot be determined")
    tools = [QWEN_TOOLS.format("\n".join(json.dumps(tool) for tool in said.tools))] if said.tools else []
    if system := [said.system, *tools] if said.system is not None else tools:
        yield "<|im_start|>system\n" + "\n\n".join(system) + "<|im_end|>\n", False
    last = max(i for i, turn in enumerate(said.turns) if turn.role == "user")
    for is_result, group in groupby(enumerate(said.turns), lambda item: item[1].role == "tool"):
        if is_result:
            results = "".join(f"\n<tool_response>\n{turn.text}\n</tool_response>" for _, turn in group)
            yield f"<|im_start|>user{results}<|im_end|>\n", False
            continue
        for i, turn in group:
            yield f"<|im_start|>{turn.role}\n", False
            if i > last and (turn.thought or i == len(said.turns) - 1):
                thought = f"<think>\n{turn.thought}\n</think>\n\n"
                yield thought, turn.learned and not (said.silent and not turn.thought)
            calls = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in turn.calls]
            yield "\n".join([turn.text] * bool(turn.text or not calls) + calls) + "<|im_end|>", turn.learned
            yield "\n", False


def llama(said: Said) -> Pieces:
    """The date is 1 May 2000. Tools are in the first question. A turn is either a text or one call."""
    if any(turn.thought and turn.raw is None for turn in said.turns):
        raise Refused("does not write the reasoning")
    if any(turn.calls and turn.text for turn in said.turns):
        raise Refused("beside its tool calls")
    if any(len(turn.calls) > 1 for turn in said.turns):
        raise Refused("single tool-calls at once")
    environment = "Environment: ipython\n" if said.tools else ""
    yield "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", False
    yield f"{environment}Cutting Knowledge Date: December 2023\nToday Date: 1 May 2000\n\n", False
    yield f"{said.system or ''}<|eot_id|>", False
    for i, turn in enumerate(said.turns):
        role = "ipython" if turn.role == "tool" else turn.role
        yield f"<|start_header_id|>{role}<|end_header_id|>\n\n", False
        if said.tools and i == 0:
            yield (
                (
                    "Given the following functions, please respond with a JSON for a function call with its proper "
                    "arguments that best answers the given prompt.\n\nRespond in the format "
                    '{"name": function name, "parameters": dictionary of argument name and its value}.'
                    "Do not use variables.\n\n"
                ),
                False,
            )
            yield "".join(json.dumps(tool, indent=4) + "\n\n" for tool in said.tools), False
        text = json.dumps(turn.text) if turn.role == "tool" else turn.raw or turn.text
        for call in turn.calls:
            text = json.dumps({"name": call["name"], "parameters": call["arguments"]})
        yield f"{text}<|eot_id|>", turn.learned


def gemma(said: Said) -> Pieces:
    """There are no tools and no reasoning. What the system says begins the first question."""
    if said.tools:
        raise Refused("does not support tools")
    if any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(said.turns) if i % 2 == 0):
        raise Refused("roles must alternate")
    if any(turn.calls for turn in said.turns):
        raise Refused("does not render the tool calls")
    if any(turn.thought and turn.raw is None for turn in said.turns):
        raise Refused("does not write the reasoning")
    yield "<bos>", False
    for i, turn in enumerate(said.turns):
        system = f"{said.system}\n\n" if said.system is not None and i == 0 else ""
        yield f"<start_of_turn>{'model' if turn.role == 'assistant' else turn.role}\n{system}", False
        yield f"{turn.raw or turn.text}<end_of_turn>", turn.learned
        yield "\n", False


def expected(write: Callable[[Said], Pieces], said: Said | str) -> tuple[str, str] | str:
    """Returns the text, and the part of it in the loss mask; if the row is refused, the pattern of the message."""
    if isinstance(said, str):
        return said
    try:
        pieces = list(write(said))
    except Refused as refused:
        return str(refused)
    return "".join(text for text, _ in pieces), "".join(text for text, inside in pieces if inside)


# Chat templates

ANSWER = (
    "{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>{% endfor %}"
)
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>{{ '\n' }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\nANSWER<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("ANSWER", ANSWER)
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
TAGGED = CHATML.replace(
    f"{ANSWER}<|im_end|>",
    f"{{% if m.role == 'assistant' %}}{{% generation %}}{THOUGHT}{ANSWER}<|im_end|>{{% endgeneration %}}"
    f"{{% else %}}{ANSWER}<|im_end|>{{% endif %}}",
)
STOP_OUTSIDE = TAGGED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
OWN = {"chatml": (CHATML, chatml), "tagged": (TAGGED, tagged)}
PUBLISHED = {
    "Qwen-Qwen3-0.6B": (byte_level, qwen),
    "meta-llama-Llama-3.1-8B-Instruct": (write_tiktoken, llama),
    "google-gemma-3-1b-it": (byte_fallback, gemma),
}

# The rows

PROMPT = "<|im_start|>assistant\n<think>\n\n</think>\n\nx"
SKY = {"type": "function", "function": {"name": "sky", "description": "d", "parameters": {"type": "object"}}}
CALL = {"name": "sky", "arguments": {"city": "Oslo"}}
ARGUMENTS = '{"city": "Oslo"}'
AB = says(user("a"), learned("b"))
SAB = says(user("a"), learned("b"), system="s")
ABCD = says(user("a"), learned("b"), user("c"), learned("d"))
ABC_D = says(user("a"), unlearned("b"), user("c"), learned("d"))
CALLED = says(user("a"), learned("", CALL), result("rain"), learned("b"), tools=(SKY,))
BARE = replace(CALLED, tools=())  # no schema of the tool
HM = says(user("a"), learned("b", thought="hm"))
NO_THINKING = replace(AB, silent=True)


def u(text="a", **fields) -> dict:
    return {"role": "user", "content": text, **fields}


def a(text="b", **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


def t(text="rain", **fields) -> dict:
    return {"role": "tool", "content": text, **fields}


def turn(role: str, text: str, **fields) -> dict:
    return {"from": role, "value": text, **fields}


def called(**call) -> dict:
    """A row with a call, in OpenAI's form but for what is given."""
    return {"messages": [u(), a(None, **call), t(), a()], "tools": [SKY]}


def function(**fields) -> list[dict]:
    return [{"id": "call_1", "type": "function", "function": {"name": "sky", **fields}}]


S = {"role": "system", "content": "s"}
TWO = ({"name": "sky", "arguments": {"city": "Oslo"}}, {"name": "sky", "arguments": {"city": "Rome"}})
# Name -> the row, what it says or the message of the refusal, and options.
VARIANTS: dict[str, tuple] = {
    # OpenAI's messages
    "messages": ({"messages": [u(), a()]}, AB),
    "messages with a system": ({"messages": [S, u(), a()]}, SAB),
    "messages of four turns": ({"messages": [u(), a(), u("c"), a("d")]}, ABCD),
    "messages that end with a question": ({"messages": [u(), a(), u("c")]}, says(user("a"), learned("b"), user("c"))),
    "developer": ({"messages": [{**S, "role": "developer"}, u(), a()]}, SAB),
    "null content beside a call": (called(tool_calls=function(arguments=CALL["arguments"])), CALLED),
    "arguments as JSON": (called(tool_calls=function(arguments=ARGUMENTS)), CALLED),
    "no content beside a call": (
        {"messages": [u(), {"role": "assistant", "tool_calls": function(arguments=ARGUMENTS)}, t(), a()],
         "tools": [SKY]}, CALLED),
    "no arguments": ({"messages": [u(), a(None, tool_calls=function())]},
                     says(user("a"), learned("", {"name": "sky", "arguments": {}}))),
    "empty arguments": ({"messages": [u(), a("", tool_calls=function(arguments=""))]},
                        says(user("a"), learned("", {"name": "sky", "arguments": {}}))),
    "arguments that are no JSON": (called(tool_calls=function(arguments="{city")), "of a tool call must be JSON"),
    "arguments that are no object": (called(tool_calls=function(arguments='"Oslo"')), "must be an object"),
    "parameters in place of arguments": (called(tool_calls=function(arguments=None, parameters=ARGUMENTS)), CALLED),
    "a call without function": (called(tool_calls=[CALL]), CALLED),
    "one call that is no list": (called(tool_calls=CALL), CALLED),
    "calls as JSON": (called(tool_calls=json.dumps([CALL])), CALLED),
    "a call without a name": (called(tool_calls=[{"arguments": {}}]), "must have a name"),
    "function_call": (called(function_call={"name": "sky", "arguments": ARGUMENTS}), CALLED),
    "function_call as JSON": (called(function_call=json.dumps(CALL)), CALLED),
    "function_call beside tool_calls": (called(function_call=CALL, tool_calls=[CALL]), "both 'tool_calls' and"),
    "role function": ({"messages": [u(), a(None, function_call=CALL), {**t(), "role": "function", "name": "sky"}, a()],
                       "tools": [SKY]}, CALLED),
    "functions": ({**called(function_call=CALL), "functions": [SKY["function"]], "tools": None}, CALLED),
    "functions as JSON": ({**called(tool_calls=[CALL]), "functions": json.dumps([SKY["function"]]), "tools": []},
                          CALLED),
    "functions beside tools": ({**called(tool_calls=[CALL]), "functions": [SKY["function"]]}, "without tools beside"),
    "functions that are no objects": ({"messages": [u(), a()], "functions": ["sky"]}, "a list of objects"),
    "tools as JSON": ({**called(tool_calls=[CALL]), "tools": json.dumps([SKY])}, CALLED),
    "tools that are no JSON": ({"messages": [u(), a()], "tools": "sky"}, "tools must be JSON"),
    "no tools": ({"messages": [u(), a()], "tools": []}, AB),
    "null tools": ({"messages": [u(), a()], "tools": None}, AB),
    "blank tools": ({"messages": [u(), a()], "tools": ""}, AB),
    "a call without tools": ({"messages": [u(), a(None, tool_calls=[CALL]), t(), a()]}, BARE),
    "two calls": ({"messages": [u(), a(None, tool_calls=list(TWO)), t(), t("sun"), a()], "tools": [SKY]},
                  says(user("a"), learned("", *TWO), result("rain"), result("sun"), learned("b"), tools=(SKY,))),
    "a call beside text": ({"messages": [u(), a("I look.", tool_calls=[CALL]), t(), a()]},
                           says(user("a"), learned("I look.", CALL), result("rain"), learned("b"))),
    "a call of the user": ({"messages": [u(tool_calls=[CALL]), a()]}, "only the assistant makes"),
    "ids of calls": ({"messages": [u(), a(None, tool_calls=function(arguments=ARGUMENTS)),
                                   t(tool_call_id="call_1", name="sky"), a()], "tools": [SKY]}, CALLED),
    "names": ({"messages": [u(name="Ann"), a(name="Bob")]}, AB),
    "weight 0 and 1": ({"messages": [u(), a(weight=0), u("c"), a("d", weight=1)]}, ABC_D),
    "weight as a float": ({"messages": [u(), a(weight=0.0), u("c"), a("d", weight=1.0)]}, ABC_D),
    "weight of a question": ({"messages": [u(weight=1), a()]}, AB),
    "half a weight": ({"messages": [u(), a(weight=0.5)]}, "weight=0.5: only 0 and 1"),
    "no text at all": ({"messages": [u(), a(None)]}, "has no content"),
    "a question without text": ({"messages": [u(None), a()]}, r"message 1 \(user\) has no content"),
    "a number as content": ({"messages": [u(), a(5)]}, "the content 5"),
    "a refusal": ({"messages": [u(), a(None, refusal="no")]}, "'refusal', which is not supported"),
    # ShareGPT's conversations
    "human and gpt": ({"conversations": [turn("human", "a"), turn("gpt", "b")]}, AB),
    "human, gpt and system": ({"conversations": [turn("system", "s"), turn("human", "a"), turn("gpt", "b")]}, SAB),
    "user and chatgpt": ({"conversations": [turn("user", "a"), turn("chatgpt", "b")]}, AB),
    "user and model": ({"conversations": [turn("user", "a"), turn("model", "b")]}, AB),
    "user and bot": ({"conversations": [turn("user", "a"), turn("bot", "b"), turn("user", "c"), turn("ai", "d")]},
                     ABCD),
    "prompter and assistant": ({"conversations": [turn("prompter", "a"), turn("assistant", "b")]}, AB),
    "capitals": ({"conversations": [turn("System", "s"), turn("Human", "a"), turn("GPT", "b")]}, SAB),
    "capitals in messages": ({"messages": [{"role": "User", "content": "a"}, {"role": "Assistant", "content": "b"}]},
                             AB),
    "function_call and observation": (
        {"conversations": [turn("human", "a"), turn("function_call", json.dumps(CALL)), turn("observation", "rain"),
                           turn("gpt", "b")], "tools": json.dumps([SKY])}, CALLED),
    "tool_call and tool_response": (
        {"conversations": [turn("human", "a"), turn("tool_call", json.dumps(CALL)), turn("tool_response", "rain"),
                           turn("gpt", "b")], "tools": [SKY]}, CALLED),
    "function_call and function_response": (
        {"conversations": [turn("human", "a"), turn("function_call", json.dumps([CALL])),
                           turn("function_response", "rain"), turn("gpt", "b")], "tools": [SKY]}, CALLED),
    "two calls in a function_call": (
        {"conversations": [turn("human", "a"), turn("function_call", json.dumps(TWO))]},
        says(user("a"), learned("", *TWO))),
    "function_call that is no JSON": ({"conversations": [turn("human", "a"), turn("function_call", "sky()")]},
                                      "function_call must be JSON"),
    "function_call beside tool_calls of a turn": (
        {"conversations": [turn("human", "a"), turn("function_call", json.dumps(CALL), tool_calls=[CALL])]},
        "a call as its content, and tool calls"),
    "ipython": ({"messages": [u(), a(None, tool_calls=[CALL]), {**t(), "role": "ipython"}, a()]}, BARE),
    "roles in conversations": ({"conversations": [u(), a()]}, AB),
    "from and value in messages": ({"messages": [turn("human", "a"), turn("gpt", "b")]}, AB),
    "fields of both kinds": (
        {"messages": [{**turn("human", "a"), "role": None, "content": None},
                      {"role": "assistant", "content": "b", "from": None, "value": None}]}, AB),
    "one conversation that is no list": ({"conversations": "a"}, "conversations must be a list"),
    # system and history beside them
    "system beside conversations": ({"system": "s", "conversations": [turn("human", "a"), turn("gpt", "b")]}, SAB),
    "system beside messages": ({"system": "s", "messages": [u(), a()]}, SAB),
    "system beside a prompt": ({"system": "s", "prompt": "a", "completion": "b"}, SAB),
    "system beside an instruction": ({"system": "s", "instruction": "a", "output": "b"}, SAB),
    "system_prompt beside a question": ({"system_prompt": "s", "question": "a", "answer": "b"}, SAB),
    "system beside messages of a prompt": ({"system": "s", "prompt": [u()], "completion": [a()]}, SAB),
    "empty system": ({"system": "", "messages": [u(), a()]}, AB),
    "null system": ({"system": None, "messages": [u(), a()]}, AB),
    "the same system twice": ({"system": "s", "system_prompt": "s", "messages": [S, u(), a()]}, SAB),
    "the same system as developer": ({"system": "s", "messages": [{**S, "role": "Developer"}, u(), a()]}, SAB),
    "two systems": ({"system": "z", "messages": [S, u(), a()]}, "two system messages"),
    "two systems in capitals": ({"system": "z", "conversations": [turn("System", "s"), turn("human", "a"),
                                                                turn("gpt", "b")]}, "two system messages"),
    "two systems in two fields": ({"system": "z", "system_prompt": "s", "messages": [u(), a()]}, "two system messages"),
    "a system that is no text": ({"system": ["s"], "messages": [u(), a()]}, "the field system must be a string"),
    "a question that says system": ({"system": "s", "messages": [u("system"), a()]},
                                    says(user("system"), learned("b"), system="s")),
    "history beside an instruction": ({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}, ABC_D),
    "system and history": ({"system": "s", "instruction": "c", "output": "d", "history": [["a", "b"]]},
                           replace(ABC_D, system="s")),
    "history beside a prompt": ({"prompt": "c", "completion": "d", "history": [["a", "b"]]}, ABC_D),
    "history of messages": ({"prompt": "c", "completion": "d", "history": [u(), a()]}, ABC_D),
    "history that begins with the system": ({"system": "s", "prompt": "c", "completion": "d", "history": [S, u(), a()]},
                                            replace(ABC_D, system="s")),
    "history beside conversations": ({"conversations": [turn("human", "c"), turn("gpt", "d")], "history": [["a", "b"]]},
                                     ABCD),
    "history that is trained on": ({"prompt": "c", "completion": "d", "history": [["a", "b"]]}, ABCD,
                                   {"train_on": "assistant"}),
    "no history": ({"instruction": "a", "output": "b", "history": []}, AB),
    "history that is no list": ({"instruction": "a", "output": "b", "history": "c"}, "history must be a list"),
    "history of three": ({"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}, "pairs of a question and"),
    # Alpaca's instructions, questions
    "instruction": ({"instruction": "a", "output": "b"}, AB),
    "instruction and input": ({"instruction": "a", "input": "1 2", "output": "b"},
                              says(user("a\n\n1 2"), learned("b"))),
    "instruction and empty input": ({"instruction": "a", "input": "", "output": "b"}, AB),
    "instruction and null input": ({"instruction": "a", "input": None, "output": "b"}, AB),
    "input without instruction": ({"instruction": "", "input": "a", "output": "b"}, AB),
    "instruction and its text": ({"instruction": "a", "input": "", "output": "b", "text": "### Instruction:\na\n\n"
                                  "### Response:\nb"}, AB),
    "instruction and another text": ({"instruction": "a", "output": "b", "text": "xyz"}, "the field text has a text"),
    "instruction and another answer": ({"instruction": "a", "output": "b", "response": "xyz"}, "field response has a"),
    "question and answer": ({"question": "a", "answer": "b", "id": 3}, AB),
    "question and context": ({"question": "a", "answer": "b", "context": "xyz"}, "the field context has a text"),
    "question and reasoning": ({"question": "a", "answer": "b", "reasoning": "hm"}, HM),
    "other names": ({"ask": "a", "say": "b"}, AB, {"prompt_field": "ask", "completion_field": "say"}),
    # trl's prompts and completions, preferences
    "prompt and completion": ({"prompt": "a", "completion": "b"}, AB),
    "prompt and completion as messages": ({"prompt": [S, u()], "completion": [a()]}, SAB),
    "prompt of four turns": ({"prompt": [u(), a(), u("c")], "completion": [a("d")]}, ABC_D),
    "prompt as messages, completion as text": ({"prompt": [S, u()], "completion": "b"}, SAB),
    "prompt as text, completion as a message": ({"prompt": "a", "completion": a()}, AB),
    "completion of two turns": ({"prompt": [u()], "completion": [a(), u("c"), a("d")]}, ABCD),
    "completion with a call": ({"prompt": [u()], "completion": [a(None, tool_calls=[CALL]), t(), a()], "tools": [SKY]},
                               CALLED),
    "chat_template_kwargs": ({"prompt": "a", "completion": "b", "chat_template_kwargs": {"enable_thinking": False}},
                             NO_THINKING),
    "chat_template_kwargs as JSON": ({"messages": [u(), a()], "chat_template_kwargs": '{"enable_thinking": false}'},
                                     NO_THINKING),
    "chat_template_kwargs that are null": ({"messages": [u(), a()], "chat_template_kwargs": {"enable_thinking": None}},
                                           AB),
    "chat_template_kwargs that are no object": ({"messages": [u(), a()], "chat_template_kwargs": [1]}, "be an object"),
    "chat_template_kwargs with tools": ({"messages": [u(), a()], "chat_template_kwargs": {"tools": [SKY]}},
                                        "chat_template_kwargs cannot set tools"),
    "chat_template_kwargs with a prompt": (
        {"messages": [u(), a()], "chat_template_kwargs": {"add_generation_prompt": False}},
        "chat_template_kwargs cannot set add_generation_prompt"),
    "chosen and rejected": ({"chosen": [u(), a()], "rejected": [u(), a("c")]}, "preference data"),
    "prompt, chosen and rejected": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
    "messages, chosen and rejected": ({"messages": [u(), a()], "chosen": [u(), a()], "rejected": [u(), a("c")]},
                                      "preference data"),
    "the chosen as completions": ({"prompt": "a", "chosen": "b", "rejected": "c"}, AB, {"completion_field": "chosen"}),
    "KTO": ({"prompt": "a", "completion": "b", "label": True}, "labeled as good or bad"),
    "KTO, bad": ({"prompt": [u()], "completion": [a()], "label": False}, "labeled as good or bad"),
    "documents": ({"messages": [u(), a()], "documents": [{"title": "t", "text": "x"}]}, "documents are not supported"),
    "a prompt within a question": (
        {"messages": [u(PROMPT), a(), u("c"), a("d")], "chat_template_kwargs": {"enable_thinking": False}},
        says(user(PROMPT), learned("b"), user("c"), learned("d"), silent=True)),
    # Reasoning
    "reasoning_content": ({"messages": [u(), a(reasoning_content="hm")]}, HM),
    "reasoning": ({"messages": [u(), a(reasoning="hm")]}, HM),
    "thinking": ({"messages": [u(), a(thinking="hm")]}, HM),
    "reasoning of a completion": ({"prompt": [u()], "completion": a(reasoning="hm")}, HM),
    "reasoning beside messages": ({"messages": [u(), a()], "reasoning": "hm"}, "must be a field of the assistant's"),
    "reasoning after a prompt without": (
        {"messages": [u(), a(reasoning="hm")], "chat_template_kwargs": {"enable_thinking": False}},
        replace(HM, silent=True)),
    "reasoning under two names": ({"messages": [u(), a(reasoning="hm", reasoning_content="hm")]}, HM),
    "two reasonings": ({"messages": [u(), a(reasoning="hm", thinking="so")]}, "thinking and reasoning, which differ"),
    "empty and other reasoning": ({"messages": [u(), a(reasoning_content="", thinking="hm")]}, HM),
    "reasoning that is no text": ({"messages": [u(), a(reasoning=["hm"])]}, "'reasoning' that is not a string"),
    "reasoning without answer": ({"messages": [u(), a(None, reasoning="hm")]},
                                 says(user("a"), learned("", thought="hm"))),
    "reasoning of an earlier turn": (
        {"messages": [u(), a(reasoning_content="so"), u("c"), a("d", reasoning_content="hm")]},
        says(user("a"), learned("b", thought="so"), user("c"), learned("d", thought="hm"))),
    "reasoning before a call": (
        {"messages": [u(), a(None, reasoning_content="so", tool_calls=[CALL]), t(), a(reasoning_content="hm")],
         "tools": [SKY]},
        says(user("a"), learned("", CALL, thought="so"), result("rain"), learned("b", thought="hm"), tools=(SKY,))),
    "<think>": ({"messages": [u(), a("<think>\nhm\n</think>\n\nb")]},
                says(user("a"), learned("b", thought="hm", raw="<think>\nhm\n</think>\n\nb"))),
    "<think> of an earlier turn": (
        {"messages": [u(), a("<think>so</think>b"), u("c"), a("<think>hm</think>d")]},
        says(user("a"), learned("b", thought="so", raw="<think>so</think>b"), user("c"),
             learned("d", thought="hm", raw="<think>hm</think>d"))),
    "<think> and empty reasoning": (
        {"messages": [u(), a("<think>hm</think>b", reasoning_content="")]},
        says(user("a"), learned("b", thought="hm", raw="<think>hm</think>b"))),
    "<think> of a completion": (
        {"prompt": "a", "completion": "<think>hm</think>b"},
        says(user("a"), learned("b", thought="hm", raw="<think>hm</think>b"))),
    # Contents of parts
    "text parts": ({"messages": [u([{"type": "text", "text": "a"}]), a([{"type": "text", "text": "b"}])]}, AB),
    "several parts": ({"messages": [u([{"type": "text", "text": "a"}, " b ", {"type": "text", "text": "c"}]), a()]},
                      says(user("a b c"), learned("b"))),
    "parts that are texts": ({"messages": [u(["a"]), a(["b"])]}, AB),
    "input_text and output_text": ({"messages": [u([{"type": "input_text", "text": "a"}]),
                                                 a([{"type": "output_text", "text": "b"}])]}, AB),
    "one part that is no list": ({"messages": [u({"type": "text", "text": "a"}), a()]}, AB),
    "parts with null fields": ({"messages": [u([{"type": "text", "text": "a", "image_url": None}]), a()]}, AB),
    "parts of a result": ({"messages": [u(), a(None, tool_calls=[CALL]), t([{"type": "text", "text": "rain"}]), a()],
                           "tools": [SKY]}, CALLED),
    "an image": ({"messages": [u([{"type": "image"}, {"type": "text", "text": "a"}]), a()]}, "part of type 'image'"),
    "the address of an image": ({"messages": [u([{"type": "image_url", "image_url": {"url": "x"}}]), a()]},
                                "part of type 'image_url'"),
    "a part without type": ({"messages": [u([{"text": "a"}]), a()]}, "a content part must be"),
    "images of a message": ({"messages": [u(images=["x.png"]), a()]}, "'images', which is not supported"),
    "images of a row": ({"messages": [u(), a()], "images": ["x.png"]}, "the field images: only text"),
    "no images": ({"messages": [u(images=[]), a()], "images": []}, AB),
    # Roles, and flags of turns
    "an unknown role": ({"messages": [u(), {"role": "critic", "content": "x"}, u("c"), a()]}, "has the role 'critic'"),
    "a misspelled role": ({"messages": [u(), a(), u("c"), {"role": "asistant", "content": "d"}]}, "mean 'assistant'"),
    "an unknown name": ({"conversations": [turn("human", "a"), turn("claude", "b")]}, "has the role 'claude'"),
    "a role that is no text": ({"messages": [u(), {"role": 1, "content": "b"}]}, "the role 1, which is not a string"),
    "no role": ({"messages": [u(), {"content": "b"}]}, "'role' and 'content'"),
    "no answer": ({"messages": [u(), u("c")]}, r"no assistant turn to train on \(roles: user\)|must alternate"),
    "train": ({"messages": [u(), a(train=False), u("c"), a("d", train=True)]}, ABC_D),
    "trainable": ({"messages": [u(), a(trainable=False), u("c"), a("d", trainable=True)]}, ABC_D),
    "loss": ({"messages": [u(loss=False), a(loss=False), u("c"), a("d", loss=True)]}, ABC_D),
    "train in conversations": (
        {"conversations": [turn("human", "a"), turn("gpt", "b", train=False), turn("human", "c"), turn("gpt", "d")]},
        ABC_D),
    "null flags": ({"messages": [u(weight=None), a(weight=None, train=None)]}, AB),
    "a trained question": ({"messages": [u(loss=True), a()]}, "only assistant turns are"),
    "flags that disagree": ({"messages": [u(), a(weight=0, train=True)]}, "which disagree"),
    "a flag that is no number": ({"messages": [u(), a(weight="1")]}, "only 0 and 1"),
    "no turn that is trained on": ({"messages": [u(), a(weight=0)]}, "no assistant turn to train on"),
    "a turn that is not trained on, and all": ({"messages": [u(), a(weight=0), u("c"), a("d")]},
                                               "train-on all is every token", {"train_on": "all"}),
    "the last turn": ({"messages": [u(), a(), u("c"), a("d")]}, ABC_D, {"train_on": "completion"}),
    # Rows of tables, which have all fields
    "null fields of messages": (
        {"messages": [u(name=None, tool_calls=None, tool_call_id=None),
                      a(name=None, tool_calls=None, function_call=None, reasoning_content=None, refusal=None)],
         "tools": None, "system": None, "history": None, "chosen": None, "images": None, "label": None}, AB),
    "null fields of calls": (
        called(tool_calls=[{"id": None, "type": "function", "index": None,
                            "function": {"name": "sky", "arguments": ARGUMENTS, "parameters": None}}]), CALLED),
    "null messages beside a prompt": ({"messages": None, "prompt": "a", "completion": "b", "text": None}, AB),
    "null messages alone": ({"messages": None}, "messages must be a list of messages, not None"),
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict:
    """Name -> DocumentTokenizer with a template written here, and how it writes."""
    found = {}
    for name, (template, write) in OWN.items():
        tok = load(byte_level(tmp_path_factory.mktemp(name)))
        tok.hf.chat_template = template
        found[name] = DocumentTokenizer(tok), write
    return found


@pytest.fixture(scope="module")
def published(shared, tmp_path_factory) -> dict:
    """The same with published templates, and small tokenizers that have their special tokens."""
    found = {}
    for name, (files, write) in PUBLISHED.items():
        tok = load(files(tmp_path_factory.mktemp("tokenizer")))
        tok.hf.chat_template = (shared / f"chat_templates/{name}.jinja").read_text()
        date = {"date_string": "1 May 2000"} if write is llama else {}
        found[name] = DocumentTokenizer(tok, TextOptions(template_args=date)), write
    return found


def converted(texts: DocumentTokenizer, row: dict, **options) -> Document | InvalidRow:
    """The document of a row, by a copy of a DocumentTokenizer: making one takes longer than a row."""
    texts = copy.copy(texts)
    texts.options = replace(texts.options, **options)
    texts.train_on = texts.options.train_on
    [made] = texts.documents([Row("a.jsonl", 1, copy.deepcopy(row))])
    return made


def check(found: dict, row: dict, said: Said | str, options: dict) -> None:
    for name, (texts, write) in found.items():
        made, want = converted(texts, row, **options), expected(write, said)
        if isinstance(want, str):
            assert isinstance(made, InvalidRow), f"{name} does not refuse the row"
            assert re.search(want, str(made)), f"{name}: {made}"
            continue
        assert isinstance(made, Document), f"{name}: {made}"
        tok = texts.tokenizer
        text, inside = (tok.decode(ids, skip_special=False) for ids in (made.ids, made.ids[made.loss_mask]))
        assert (text, inside) == want, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(own, variant):
    row, said, options = (*VARIANTS[variant], {})[:3]
    check(own, row, said, options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_with_published_templates(published, variant):
    row, said, options = (*VARIANTS[variant], {})[:3]
    check(published, row, said, options)


def test_what_the_writers_write():
    """Some of it in full, so that a fault of a writer cannot hide one of the package."""
    said = replace(BARE, system="s")
    assert expected(chatml, said) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>{"name": "sky", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        '<tool_call>{"name": "sky", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>b<|im_end|>',
    )
    assert expected(qwen, said) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n",
        '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
        "<think>\n\n</think>\n\nb<|im_end|>",
    )
    assert expected(llama, said) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 1 May 2000\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "sky", "parameters": {"city": "Oslo"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"rain"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>",
        '{"name": "sky", "parameters": {"city": "Oslo"}}<|eot_id|>b<|eot_id|>',
    )
    assert expected(gemma, replace(ABC_D, system="s")) == (
        "<bos><start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\nd<end_of_turn>\n",
        "d<end_of_turn>",
    )
    assert expected(qwen, HM)[1] == "<think>\nhm\n</think>\n\nb<|im_end|>"
    assert expected(qwen, NO_THINKING)[1] == "b<|im_end|>"


# transformers' own mask


def messages_of(said: Said) -> list[dict]:
    messages = [] if said.system is None else [{"role": "system", "content": said.system}]
    for one in said.turns:
        message: dict = {"role": one.role, "content": one.raw or one.text}
        if one.calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in one.calls]
        if one.thought and one.raw is None:
            message["reasoning_content"] = one.thought
        messages.append(message)
    return messages


@pytest.mark.parametrize("stop_inside", [True, False])
def test_tagged_templates_have_the_mask_of_transformers(own, stop_inside):
    """The stop token is trained on as well, where the tags exclude it."""
    texts, compared = copy.copy(own["tagged"][0]), 0
    tok = texts.tokenizer
    tok.hf.chat_template = TAGGED if stop_inside else STOP_OUTSIDE
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    try:
        for variant, (row, said, *options) in VARIANTS.items():
            answers = [] if isinstance(said, str) else [one for one in said.turns if one.role == "assistant"]
            if not answers or not all(one.learned for one in answers):
                continue
            made = converted(texts, row, **(options or [{}])[0])
            assert isinstance(made, Document), f"{variant}: {made}"
            theirs = tok.hf.apply_chat_template(
                messages_of(said), list(said.tools) or None, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = np.array(theirs["assistant_masks"], bool)
            if not stop_inside:
                mask[1:] |= mask[:-1] & (made.ids[1:] == stop)
            assert made.ids.tolist() == theirs["input_ids"], variant
            assert made.loss_mask.tolist() == mask.tolist(), variant
            compared += 1
    finally:
        tok.hf.chat_template = TAGGED
    assert compared > 60


# Several templates


def test_the_template_for_tools_is_used_where_there_are_tools(tmp_path):
    """As transformers does. It may have another header and another end of a turn."""
    tok = load(byte_level(tmp_path))
    for_tools = CHATML.replace("<|im_end|>", "<|end|>").replace("assistant\n", "assistant with tools\n")
    for_tools = for_tools.replace("{{ m.role }}", "{{ m.role }}{{ ' with tools' if m.role == 'assistant' }}")
    tok.hf.chat_template = {"default": CHATML, "tool_use": for_tools}
    assert tok.stop_ids == tuple(sorted(tok.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])))
    texts = DocumentTokenizer(tok)
    messages, called_sky = messages_of(AB), messages_of(CALLED)
    rows = [{"messages": messages}, {"messages": called_sky, "tools": [SKY]}, {"messages": messages, "tools": []}]
    made = list(texts.documents([Row("a.jsonl", i, row) for i, row in enumerate(rows)]))
    for row, document in zip(rows, made, strict=True):
        assert isinstance(document, Document), str(document)
        tools = row.get("tools") or None
        text = tok.decode(document.ids, skip_special=False)
        assert text == tok.hf.apply_chat_template(row["messages"], tools, tokenize=False)
        prompt = tok.prompt(row["messages"][:1], tools)
        assert prompt == tok.hf.apply_chat_template(
            row["messages"][:1], tools, tokenize=False, add_generation_prompt=True
        )
        assert text.startswith(prompt)
    plain, with_tools, empty = (tok.decode(one.ids[one.loss_mask], skip_special=False) for one in made)
    assert plain == empty == "b<|im_end|>"
    assert with_tools == f"<tool_call>{json.dumps(CALL)}</tool_call><|end|>b<|end|>"
    assert texts.notes == []
