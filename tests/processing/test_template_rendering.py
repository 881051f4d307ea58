"""Chat templates beside transformers' apply_chat_template: the same text, and nothing of transformers changed."""

import dataclasses
import enum
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.chat_templates import MADE, NO_SYSTEM
from helpers.tiny_chat import tokenizer_of

from jaxlm.processing import template_rendering as templates
from jaxlm.processing import template_sandbox
from jaxlm.processing.messages import normalize
from jaxlm.processing.tokenizer import Tokenizer


def add(a: int, b: float = 1.5) -> float:
    """
    Adds two numbers.

    Args:
        a: one of them (choices: [1, 2])
        b: the other
    """
    return a + b


SCHEMA = {"type": "function", "function": {"name": "now", "description": "é <b>", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}
SYSTEM, USER = {"role": "system", "content": " Be <brief>. "}, {"role": "user", "content": "Hi  there\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello\nyou"}
CHATS = {
    "one": [USER],
    "system": [SYSTEM, USER, ANSWER, USER],
    "turns": [USER, ANSWER, USER],
    "empty answer": [USER, {"role": "assistant", "content": ""}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, USER],
    "thinking": [USER, {"role": "assistant", "content": "4", "thinking": "2 + 2"}],
    "call": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "add", "content": "3.5"}],
    "call and none": [USER, {"role": "assistant", "content": None, "reasoning": None, "tool_calls": [CALL]}],
    "two from the user": [USER, USER],
    "a role of its own": [{"role": "narrator", "content": "so"}],
}
TOOLS = {"no tools": None, "empty": [], "schema": [SCHEMA], "function": [SCHEMA, add]}
OPTIONS = {
    "plain": {},
    "prompt": {"add_generation_prompt": True},
    "no thinking": {"add_generation_prompt": True, "enable_thinking": False},
    "continued": {"continue_final_message": True},
    "variables": {"date_string": "1 Jan 2026", "bos_token": "<other>", "documents": [{"title": "t", "text": "x"}]},
}
EVERYTHING = (
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ documents }}{{ add_generation_prompt }}"
    "{% for m in messages %}{% for name in m %}{{ name }}={{ m[name] }};{% endfor %}\n{% endfor %}\n"
    "  {% if tools %}\n  {{ tools[0].function }}\n  {% endif %}\n{{ bos_token }}{{ eos_token }}{{ date_string }}\n"
    "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 1) }}{{ namespace({'a': 1}, self=2).self }}"
    "{{ {'é': '<'} | tojson }}"
    "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}"
    "{{ strftime_now('%Y') }}"
)


def published(shared):
    files = sorted((shared / "chat_templates").glob("*.jinja"))
    found = {path.name: path.read_text() for path in files}
    for path in sorted((shared / "chat_templates").glob("*.json")):
        found[path.name] = json.loads(path.read_text())["chat_template"]
    return found


def both(tokenizer: Tokenizer, chat, tools, options) -> tuple[str | None, str | None]:
    """The texts of a conversation, ours and transformers' of the normalized messages; None for a refusal. A message
    without a text is normalized by us alone: there is nothing to continue then."""
    wants_text = options.get("continue_final_message") in (True, "content")
    try:
        normalized = [*normalize(chat[:-1]), chat[-1]] if wants_text else normalize(chat)
        theirs = tokenizer.hf.apply_chat_template(normalized, tokenize=False, tools=tools, **options)
    except Exception:
        theirs = None
    try:
        ours = tokenizer.render(chat, tools=tools, **{"add_generation_prompt": False, **options})
    except ValueError:
        ours = None
    return ours, theirs


def check_texts(found: dict[str, str]) -> int:
    """Every template gives the text of transformers for every chat, tools and options. Returns the number of texts."""
    written = 0
    for name, template in found.items():
        tokenizer, texts = tokenizer_of(template), 0
        for chat in CHATS:
            for tools in TOOLS:
                for options in OPTIONS:
                    ours, theirs = both(tokenizer, CHATS[chat], TOOLS[tools], OPTIONS[options])
                    assert ours == theirs, (name, chat, tools, options)
                    texts += theirs is not None
        assert texts > 20, name
        written += texts
    return written


def test_templates_give_the_text_of_transformers():
    made = {name: template for name, (template, _, _) in MADE.items()}
    assert check_texts({**made, "no system": NO_SYSTEM, "everything": EVERYTHING}) > 500


def test_published_templates_give_the_text_of_transformers(shared):
    found = published(shared)
    assert len(found) >= 12
    assert check_texts(found) > 1000


def test_the_last_message_is_continued():
    chats = [
        [USER, {"role": "assistant", "content": "so \n far  "}],
        [USER, {"role": "assistant", "content": "a", "thinking": " so far "}],
        [USER, {"role": "assistant", "content": "a", "reasoning_content": "b", "thinking": "c"}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}],
        [USER, {"role": "assistant", "content": ""}],
    ]
    bodies = ["{{ m.content }}", "{{ m.content | trim }}", "{{ m.reasoning_content }}|{{ m.content }}",
              "{{ m.thinking }}", "{{ m.content[:3] }}", "{{ m.role }}"]  # fmt: skip
    texts = 0
    for body in bodies:
        tokenizer = tokenizer_of(f"{{% for m in messages %}}<{{{{ m.role }}}}>{body}<end>\n{{% endfor %}}")
        for chat in chats:
            for field in (True, "content", "thinking", "reasoning_content", "reasoning", "tool_calls", "name"):
                ours, theirs = both(tokenizer, chat, None, {"continue_final_message": field})
                assert ours == theirs, (body, chat, field)
                texts += ours is not None
    assert texts > 20
    with pytest.raises(ValueError, match="add_generation_prompt"):
        tokenizer.render(chats[0], continue_final_message=True, add_generation_prompt=True)


def test_what_a_template_is_handed_is_plain():
    class Kind(str, enum.Enum):  # noqa: UP042  what a StrEnum would hide: its str() is another text
        A = "<a>"

    class Number(enum.IntEnum):
        ONE = 1

    @dataclasses.dataclass
    class Part:
        name: str
        values: tuple

    class Model:
        def model_dump(self):
            return {"kind": Kind.A}

    values = [Kind.A, Number.ONE, np.float32(0.5), np.bool_(False), np.str_("x"), np.arange(3), Part("p", (1, Model())),
              Model(), {Kind.A: [None, True]}, {1, 2}, object, b"b", 1.5, (1, "a")]  # fmt: skip
    chat = [{"role": "user", "content": "Hi", "extra": value} for value in values]
    tokenizer = tokenizer_of("{{ messages | tojson }}{% for m in messages %}{{ m.extra }}{% endfor %}{{ given }}")
    for value in (Kind.A, Part("p", (1,)), [np.int64(3)]):
        ours, theirs = both(tokenizer, chat, None, {"given": value})
        assert ours is not None
        assert ours == theirs


def test_what_is_handed_over_stays_as_it_was():
    chat = [{"role": "user", "content": "Hi", "list": [1]}, {"role": "assistant", "content": "so", "thinking": "x"}]
    before = json.dumps(chat)
    tokenizer_of(EVERYTHING + "{{ messages[-1].content }}").render(
        chat, add_generation_prompt=False, continue_final_message=True
    )
    assert json.dumps(chat) == before


def test_a_template_is_chosen_by_name_as_by_transformers():
    tokenizer = tokenizer_of(None)
    tokenizer.hf.chat_template = {"default": "plain", "tool_use": "with tools", "rag": "{{ documents | length }}"}
    documents = [{"title": "a", "text": "b"}]
    for tools in (None, [], [SCHEMA]):
        for options in (
            {},
            {"chat_template": "rag", "documents": documents},
            {"chat_template": "{{ messages[0].role }}"},
        ):
            ours, theirs = both(tokenizer, [USER], tools, options)
            assert ours == theirs is not None
    assert tokenizer.render([USER], tools=[SCHEMA]) == "with tools"


@pytest.mark.parametrize(
    "option", ["tokenize", "return_tensors", "sanitize_control_tokens", "return_assistant_tokens_mask"]
)
def test_options_about_ids_are_refused(option):
    """A template would not read them: whoever asks for them would wait for something that does not happen."""
    with pytest.raises(ValueError, match=f"{option}: .* token ids"):
        tokenizer_of(EVERYTHING).render([USER], **{option: True})


@pytest.mark.parametrize(("tools", "documents"), [([3], None), (["add"], None), (None, ["text"])])
def test_what_is_no_tool_and_no_document(tools, documents):
    with pytest.raises(ValueError, match="documents must be dicts" if documents else "a tool must be a JSON schema"):
        tokenizer_of(EVERYTHING).render([USER], tools=tools, documents=documents)


MARKED = {
    "one": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}",
    "within a macro": "{% macro say(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
    "{% for m in messages %}{{ m.role }}{{ say(m) }}{% endfor %}",
    "captured": "head{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}"
    "{% generation %}{% endgeneration %}",
    "nested": "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}{{ messages | length }}",
    "none": "{{ messages | length }}",
    "trimmed": "a \n  {%- generation -%}\n  b  {%- endgeneration -%}  c",
}  # fmt: skip


@pytest.mark.parametrize("kind", MARKED)
def test_marked_spans_are_those_of_transformers(kind):
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = tokenizer_of(MARKED[kind])
    for chat in (CHATS["system"], CHATS["turns"], CHATS["empty answer"]):
        [text], [spans] = render_jinja_template(
            [chat], chat_template=MARKED[kind], return_assistant_tokens_mask=True, **tokenizer.hf.special_tokens_map
        )
        assert templates.write(tokenizer.hf, chat) == (text, spans)
    assert bool(spans) == (kind != "none")


def test_text_that_is_marked_is_paid_for_too():
    tokenizer = tokenizer_of(
        "{% generation %}a{% endgeneration %}{% set l = 'a' * 90000 %}{% for i in range(99) %}{{ l }}{% endfor %}"
    )  # few steps, but nine million characters
    with pytest.raises(Exception, match="limit on output"):
        templates.write(tokenizer.hf, [USER])


# Beside transformers

ALONE = """
import types
from transformers import tokenization_utils_base
from transformers.utils import chat_template_utils
import jinja2.defaults, jinja2.runtime, jinja2.sandbox
modules = [chat_template_utils, tokenization_utils_base, jinja2.defaults, jinja2.runtime, jinja2.sandbox]
tables = [jinja2.defaults.DEFAULT_FILTERS, jinja2.defaults.DEFAULT_TESTS, jinja2.defaults.DEFAULT_NAMESPACE]
def now():
    return [dict(vars(module)) for module in modules] + [dict(table) for table in tables]
before = now()
from helpers.tiny_chat import tokenizer_of
from jaxlm.data.assistant_turns import AssistantTurns
chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "so"}]
tok = tokenizer_of("{{ messages[0].content }}{% generation %}{{ messages[-1].content }}<end>{% endgeneration %}{{ x }}")
assert tok.render(chat) == "Hiso<end>" and tok.template_accepts("x") and tok.stop_ids
assert AssistantTurns(tok, {}).find(chat, None) == ("Hiso<end>", [(2, 9)])
for old, new in zip(before, now()):
    new = {name: value for name, value in new.items() if not isinstance(value, types.ModuleType)}  # imported since
    assert all(old[name] is value for name, value in new.items()), [n for n in new if old.get(n) is not new[n]]
print("untouched")
"""


def test_transformers_is_left_as_it_was():
    """In a process of its own: no test has rendered there before."""
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}" + ALONE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "untouched", done.stderr


def test_threads_render_at_once(monkeypatch):
    """Each within bounds of its own, one of them with transformers alone, whose rendering has none."""
    monkeypatch.setattr(template_sandbox, "SECONDS", 60.0)
    slow = "{% for i in range(3000) %}{{ messages[0].content }}{% endfor %}"
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    mark = "{% generation %}" + slow + "{% endgeneration %}"
    texts: dict[str, object] = {}
    barrier = threading.Barrier(6)

    def work(name: str, template: str, how) -> None:
        tokenizer, chat = tokenizer_of(template), [{"role": "user", "content": name}]
        barrier.wait()
        try:
            texts[name] = how(tokenizer, chat)
        except ValueError as error:
            texts[name] = str(error)

    def render(tokenizer, chat):
        return tokenizer.render(chat)

    def write(tokenizer, chat):
        return templates.write(tokenizer.hf, chat)

    def theirs(tokenizer, chat):
        return tokenizer.hf.apply_chat_template(chat, tokenize=False)

    jobs = {"a": (slow, render), "b": (slow, render), "c": (mark, write), "d": (mark, write), "e": (endless, render),
            "f": (slow + "{{ 'x' | wordwrap(9) }}", theirs)}  # fmt: skip
    template_sandbox._environment.cache_clear()
    template_sandbox._compiled.cache_clear()
    threads = [threading.Thread(target=work, args=(name, *job)) for name, job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts.pop("e") == (
        "the chat template cannot render these messages: it exceeds the limit on output and steps"
    )
    assert texts == {
        "a": "a" * 3000,
        "b": "b" * 3000,
        "c": ("c" * 3000, [(0, 3000)]),
        "d": ("d" * 3000, [(0, 3000)]),
        "f": "f" * 3000 + "x",
    }


def test_anything_with_the_two_public_parts_of_a_tokenizer_will_do():
    hf = SimpleNamespace(
        special_tokens_map={"bos_token": "<s>"}, get_chat_template=lambda **how: "{{ bos_token }}{{ n }}"
    )
    began = time.process_time()
    assert templates.render(hf, [USER], n=3) == "<s>3"
    assert time.process_time() - began < 5
