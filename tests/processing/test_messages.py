"""jaxlm.processing.messages: the forms of messages, which prompts and training rows have in common."""

import copy
import json
import time

import pytest
from helpers.chat_templates import HEADERS, THINKING
from helpers.tiny_chat import tokenizer_of
from helpers.tiny_tokenizers import byte_level, load, write_tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.documents import Document, DocumentTokenizer
from jaxlm.data.readers import Row
from jaxlm.processing.messages import names_role, near_role, normalize
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.written import dropped

# A role that is not here is not written. Calls are read as most templates do, by names that are also roles.
STRICT = (
    "{% for m in messages %}{% if m.role == 'developer' or m['role'] in ['user', 'system'] %}"
    "<{{ m.role }}>{{ m.content }}<end>"
    "{% elif m.role == 'assistant' %}<assistant>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}{% endfor %}<end>"
    "{% elif 'tool' == m.role or m.role == 'tool' %}<user>{{ m.content }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Sky?"}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}]
JSON_CALL = {"name": "sky", "arguments": '{"city": "Oslo"}'}
SAID = [{"role": "system", "content": "Be brief."}, USER]
# Name -> messages, and the same ones in the form that templates read.
FORMS = {
    "null content": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, CALLED[2]], CALLED),
    "JSON arguments": (
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": JSON_CALL}]}, CALLED[2]],
        CALLED,
    ),
    "function_call": (
        [USER, {"role": "assistant", "content": None, "function_call": JSON_CALL},
         {"role": "function", "content": "rain"}],
        CALLED,
    ),
    "from and value": (
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Sky?"}],
        SAID,
    ),
    "function_call and observation": (
        [{"from": "human", "value": "Sky?"}, {"from": "function_call", "value": json.dumps(JSON_CALL)},
         {"from": "observation", "value": "rain"}],
        CALLED,
    ),
    "developer": ([{"role": "developer", "content": "Be brief."}, USER], SAID),
    "parts": ([SAID[0], {"role": "user", "content": ["Sk", {"type": "text", "text": "y?"}]}], SAID),
    "null fields": ([SAID[0], {**USER, "tool_calls": None, "weight": None}], SAID),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    found = {"headers": load(write_tiktoken(tmp_path_factory.mktemp("headers")))}
    found["headers"].hf.chat_template = HEADERS.replace("strftime_now('%d %b %Y')", "'1 May 2000'")
    found["thinking"] = load(byte_level(tmp_path_factory.mktemp("thinking")))
    found["thinking"].hf.chat_template = THINKING
    found["strict"] = tokenizer_of(STRICT)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_begins_the_text_of_training(tokenizers, form):
    messages, plain = FORMS[form]
    before = copy.deepcopy(messages)
    for name, tok in tokenizers.items():
        prompt = tok.prompt(messages)
        if not (name == "strict" and form == "developer"):
            assert prompt == tok.prompt(plain), name
        row = Row("a.jsonl", 1, {"messages": [*messages, {"role": "assistant", "content": "Rain."}]})
        [made] = DocumentTokenizer(tok).documents([row])
        assert isinstance(made, Document), f"{name}: {made}"
        assert tok.decode(made.ids, skip_special=False).startswith(prompt), name
        assert made.ids.tolist()[: len(tok.chat(messages))] == tok.chat(messages), name
    assert messages == before


def test_roles_that_a_template_names_are_kept(tokenizers):
    """In training too. A name that the template has in another place is not a role."""
    tok = tokenizers["strict"]
    assert tok.prompt(FORMS["developer"][0]) == "<developer>Be brief.<end><user>Sky?<end><assistant>"
    assert tok.prompt(FORMS["function_call"][0]).count("<user>rain<end>") == 1
    [made] = DocumentTokenizer(tok).documents(
        [Row("a.jsonl", 1, {"messages": [*FORMS["developer"][0], {"role": "assistant", "content": "b"}]})]
    )
    assert isinstance(made, Document)
    assert tok.decode(made.ids, skip_special=False) == ("<developer>Be brief.<end><user>Sky?<end><assistant>b<end>")
    for template, named in [
        ("{% if message.role == 'tool' %}", True),
        ('{% if message["role"] == "tool" %}', True),
        ("{% if (m['role'] in ['ipython', 'tool']) %}", True),
        ("{% if m.role in ('tool',) %}", True),
        ("{% if m.role == 'user' %}{{ m['tool'] }}", False),
        ("{% if call.type == 'tool' %}", False),
        ("{% if m.role == 'tool_response' %}", False),
    ]:
        assert names_role(template, "tool") == named, template


def check_refused(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"does not write message 2: it has no place for the role 'critic'$"):
        tok.chat([USER, {"role": "critic", "content": "So so."}, USER])
    assert tok.chat([USER, {"role": "assistant", "content": "So so."}, USER])


def test_a_message_that_the_template_drops_is_refused(tokenizers):
    check_refused(tokenizers["strict"])


def test_a_message_that_a_published_template_drops_is_refused(shared, tmp_path):
    tok = load(byte_level(tmp_path))
    tok.hf.chat_template = (shared / "chat_templates/Qwen-Qwen3-0.6B.jinja").read_text()
    check_refused(tok)


TEXTS = st.sampled_from(["", "a", " b\n", "<think>hm</think>c"])
MAYBE = st.none() | TEXTS
CALLS = st.sampled_from([None, [], [CALL], [JSON_CALL], JSON_CALL, json.dumps([CALL]), [{"name": "f"}], [CALL, CALL]])
CONTENTS = MAYBE | st.lists(TEXTS | st.builds(lambda text: {"type": "text", "text": text}, TEXTS), max_size=2)
ROLE_NAMES = st.sampled_from(
    ["user", "Human", "assistant", "GPT", "system", "developer", "tool", "Observation", "function", "narrator"]
)
MESSAGES = st.fixed_dictionaries(
    {"role": ROLE_NAMES, "content": CONTENTS},
    optional={
        "tool_calls": CALLS, "function_call": CALLS, "reasoning_content": MAYBE, "thinking": MAYBE, "name": MAYBE,
        "weight": st.sampled_from([None, 0, 1]), "images": st.just([]),
    },
)  # fmt: skip
CALL_MESSAGES = st.builds(
    lambda role, call: {"from": role, "value": json.dumps(call)},
    st.sampled_from(["function_call", "Tool_Call"]),
    st.sampled_from([CALL, JSON_CALL, [CALL, JSON_CALL]]),
)
SHAREGPT = st.builds(
    lambda message: {"from": message.pop("role"), "value": message.pop("content"), **message}, MESSAGES
)


@given(st.lists(MESSAGES | SHAREGPT | CALL_MESSAGES, min_size=1, max_size=3), st.sampled_from(["", STRICT, HEADERS]))
@settings(max_examples=150, deadline=None)
def test_normalized_messages_stay_as_they_are(messages, template):
    before = copy.deepcopy(messages)
    try:
        once = normalize(messages, template)
    except ValueError:
        once = []
    assert normalize(once, template) == once
    assert messages == before
    for message in once:
        assert isinstance(message["content"], str)
        assert None not in message.values()
        for call in message.get("tool_calls", ()):
            assert isinstance(call["function"]["arguments"], dict)


@pytest.mark.parametrize(
    "compared",
    [
        "message.role == 'developer'", "message['role'] == \"developer\"", "message.get('role') == 'developer'",
        "'developer' == message.role", "'developer' != message['role']", "(message['role'])=='developer'",
        "message.role | lower == 'developer'", "message.role in ('system', 'developer')", "message.role != 'developer'",
    ],
)  # fmt: skip
def test_a_role_that_a_template_compares_is_kept(compared):
    template = f"{{% if {compared} %}}x{{% endif %}}"
    assert names_role(template, "developer")
    for role in ("developer", "Developer"):
        assert normalize([{"role": role, "content": "a"}], template)[0]["role"] == "developer"
    assert (
        normalize([{"role": "developer", "content": "a"}], template.replace("developer", "tool"))[0]["role"] == "system"
    )


def test_a_template_that_joins_arguments_gets_them_as_json():
    """As DeepSeek's, which adds them to a text."""
    tok = tokenizer_of("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
                       "{{ c['function']['name'] + c['function']['arguments'] }}{% endfor %}{% endfor %}")  # fmt: skip
    for messages in (CALLED, [USER, {"role": "assistant", "tool_calls": [{"function": JSON_CALL}]}, CALLED[2]]):
        assert tok.render(messages) == 'Sky?sky{"city": "Oslo"}rain'


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_under_the_name_that_a_template_reads(name):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.NAME }}{{ m.content }}<end>{% endfor %}".replace("NAME", name)
    row = {"messages": [USER, {"role": "assistant", "content": "b", name: "why"}]}
    [made] = DocumentTokenizer(tokenizer_of(template)).documents([Row("a", 1, row)])
    assert isinstance(made, Document), made
    other = {"messages": [USER, {"role": "assistant", "content": "b", "reasoning_content": "why"}]}
    [made] = DocumentTokenizer(tokenizer_of(template)).documents([Row("a", 1, other)])
    assert isinstance(made, Document) == (name != "reasoning")  # the template would drop it


def test_the_number_of_renderings_does_not_grow_with_the_conversation(monkeypatch):
    """Also if the template changes contents, or messages have fields that it does not read."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tok, counted = tokenizer_of(template), []
    render = Tokenizer.render
    monkeypatch.setattr(Tokenizer, "render", lambda *args, **how: counted.append(1) or render(*args, **how))
    turns = [m for i in range(30) for m in (USER, {"role": "assistant", "content": f"<think>a</think>b{i}", "id": i})]
    tok.prompt([*turns, USER])
    assert len(counted) <= 3


@pytest.mark.parametrize(("role", "near"), [("asistant", "assistant"), ("Usr", "user"), ("sytem", "system")])
def test_a_misspelled_role_gets_a_proposal(role, near):
    assert near_role(role) == f" (did you mean {near!r}?)"


@pytest.mark.parametrize("role", ["tool", "System", "developer", "critic"])
def test_a_known_role_and_a_role_of_its_own_get_none(role):
    assert near_role(role) == ""


def test_many_messages_take_linear_time() -> None:
    """A request has hundreds of thousands of messages at most. The square of 60,000 took half a minute."""
    messages = [{"role": "user", "content": "a"}] * 60_000
    begin = time.perf_counter()
    assert dropped(lambda each: "".join(message["content"] for message in each), messages, "a" * 60_000) is None
    assert time.perf_counter() - begin < 5
