"""The loss mask of conversations, to the token, with chat templates written here and those of published models."""

import json

import pytest
from helpers.chat_templates import MADE
from helpers.published import LLAMA, TEMPLATES
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_tokenizers import byte_fallback
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.documents import Document, DocumentTokenizer, TextOptions
from jaxlm.data.readers import InvalidRow, Row
from jaxlm.processing.tokenizer import Tokenizer

CALL = {"function": {"name": "sky", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "sky", "description": "d", "parameters": {"type": "object"}}}
THINK_CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call>'
HEADER_CALL = '{"name": "sky", "parameters": {"city": "Oslo"}}'
PUBLISHED = {**TEMPLATES, "google-gemma-3-1b-it": ("gemma3", "<end_of_turn>")}
TRIMMED = ("llama", "gemma", "headers", "turns")  # templates with these names trim answers


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


CHAT = {"messages": [user("a"), said("b"), user("c"), said("d")]}


@pytest.fixture(scope="module")
def tokenizers(request, tmp_path_factory):
    """Returns a function that loads a tokenizer by name: of MADE, or a published one (for Gemma 3, a small one with its
    special tokens)."""
    found: dict[str, DocumentTokenizer] = {}

    def load(name: str) -> DocumentTokenizer:
        if name not in found:
            if name in MADE:
                folder = MADE[name][1](tmp_path_factory.mktemp(name))
            elif name == "gemma3":
                folder = byte_fallback(tmp_path_factory.mktemp("gemma"))
            else:
                folder = request.getfixturevalue("shared") / "tokenizers" / name
            tok = Tokenizer.load(folder)
            assert tok is not None
            if name in ("olmo2", "roles"):
                tok.hf.bos_token = tok.hf.eos_token = stop_of(name)
            tok.hf.chat_template = TEMPLATE
            found[name] = DocumentTokenizer(tok)
        return found[name]

    return load


def stop_of(name: str) -> str:
    return "<|endoftext|>" if name == "olmo2" else MADE[name][2] if name in MADE else PUBLISHED[name][1]


@pytest.fixture
def texts_of(tokenizers, request):
    """Returns a function from a template to its tokenizer with it. The copy of its backend is made once."""

    def find(template: str, **options) -> DocumentTokenizer:
        made = template in MADE
        known = tokenizers(template if made else PUBLISHED[template][0])
        path = None if made else request.getfixturevalue("shared") / "chat_templates" / f"{template}.jinja"
        known.tokenizer.hf.chat_template = path.read_text() if path else MADE[template][0]
        texts = DocumentTokenizer(known.tokenizer, TextOptions(**options))
        texts.__dict__["rust"] = known.rust
        return texts

    return find


def document(texts: DocumentTokenizer, value: dict) -> Document:
    [made] = texts.documents([Row("a.jsonl", 3, value)])
    assert isinstance(made, Document), str(made)
    assert len(made.ids) == len(made.loss_mask)
    return made


def trained_on(texts: DocumentTokenizer, value: dict) -> str:
    """Returns the text in the loss mask of a row."""
    made = document(texts, value)
    return texts.tokenizer.decode(made.ids[made.loss_mask], skip_special=False)


# What every template is checked for


def check_all_turns(texts_of, template: str) -> None:
    """All answers are trained on, each with the token that ends it."""
    texts, stop = texts_of(template), stop_of(template)
    # Answers repeat other text, and contain what a template renders, white space that some templates strip, and emoji.
    empty = "<think>\n\n</think>\n\n" if template == "thinking" or "Qwen3" in template else ""
    answers = ["Hi", " two  words \n", f"on {stop} goes\n\n{stop}", "naïve 👩‍👩‍👧‍👦", "Hi"]
    messages = [{"role": "system", "content": "Hi"}]
    messages += [message for answer in answers for message in (user(f"Hi {stop}"), said(answer))]
    kept = [answer.strip() for answer in answers] if any(name in template for name in TRIMMED) else answers
    *earlier, last = kept
    expected = "".join(answer + stop for answer in earlier) + empty + last + stop
    assert trained_on(texts, {"messages": messages}) == expected, template


def check_text(texts_of, template: str) -> None:
    """The text is that of a chat, with BOS once."""
    texts = texts_of(template)
    messages = [user("What is this?"), said("A test."), user("Why?"), said("To know.")]
    ids, tok = document(texts, {"messages": messages}).ids.tolist(), texts.tokenizer
    assert ids == tok.chat(messages, add_generation_prompt=False), template
    if tok.bos_id is not None and tok.bos_id != tok.hf.eos_token_id:
        assert ids.count(tok.bos_id) == 1, template
        assert ids[0] == tok.bos_id, template


def check_reasoning(texts_of, template: str) -> None:
    """Reasoning is trained on where the template keeps it."""
    texts = texts_of(template)
    think = "<think>\nhm\n</think>\n\n"
    assert trained_on(texts, {"messages": [user("a"), said(f"{think}b"), user("c"), said(f"{think}d")]}) == (
        f"b<|im_end|>{think}d<|im_end|>"
    )
    assert trained_on(texts, {"messages": [user("a"), said("b", reasoning_content="hm")]}) == f"{think}b<|im_end|>"
    # The generation prompt does not have the empty block of an answer without reasoning: the model writes it.
    empty = "<think>\n\n</think>\n\n"
    assert trained_on(texts, {"messages": [user("a"), said("b")]}) == f"{empty}b<|im_end|>"
    assert trained_on(texts, CHAT) == f"b<|im_end|>{empty}d<|im_end|>"
    silent = texts_of(template, template_args={"enable_thinking": False})
    assert trained_on(silent, CHAT) == "b<|im_end|>d<|im_end|>"  # its prompt has the block


def check_tool_calls(texts_of, template: str, call: str, last: str) -> None:
    texts, end = texts_of(template), stop_of(template)
    first = said("Let me see." if "Let me" in call else "", tool_calls=[CALL])
    result = {"role": "tool", "content": f"rain {end}"}
    final = said("Rain.", reasoning_content="rain") if "<think>" in last else said("Rain.")
    value = {"messages": [user("Sky?"), first, result, final], "tools": [TOOL]}
    assert trained_on(texts, value) == call + end + last + end, template
    # In OpenAI's format the arguments are a JSON string. Columns of a table have all fields.
    written = {"function": {"name": "sky", "arguments": json.dumps(CALL["function"]["arguments"])}}
    first = {**first, "tool_calls": [written], "name": None}
    again = {"messages": [user("Sky?"), first, result, final], "tools": json.dumps([TOOL])}
    assert document(texts, again).ids.tolist() == document(texts, value).ids.tolist(), template
    # After another question templates drop the reasoning before the first answer.
    both = {"messages": [*value["messages"], user("Thanks"), said("You are welcome.")], "tools": [TOOL]}
    empty = "<think>\n\n</think>\n\n" if "<think>" in last else ""
    assert trained_on(texts, both) == f"{call}{end}Rain.{end}{empty}You are welcome.{end}", template


def check_built_in_call(texts_of, template: str) -> None:
    """A call of a built-in tool ends with another token."""
    texts = texts_of(template, template_args={"builtin_tools": ["sky"]})
    messages = [user("Sky?"), said("", tool_calls=[CALL]), {"role": "tool", "content": "rain"}, said("Rain.")]
    called = '<|python_tag|>sky.call(city="Oslo")<|eom_id|>'
    assert trained_on(texts, {"messages": messages, "tools": [TOOL]}) == f"{called}Rain.<|eot_id|>"


def check_completions(texts_of, template: str) -> None:
    """The template is one whose prompt ends a turn's empty reasoning block."""
    args = {"enable_thinking": False}
    texts = texts_of(template, train_on="completion", template_args=args)
    assert trained_on(texts, CHAT) == "d<|im_end|>"
    texts = texts_of(template, template_args=args)
    chat = {"prompt": [user("a"), said("b"), user("c")], "completion": [said("d"), user("e"), said("f")]}
    assert trained_on(texts, chat) == "d<|im_end|>f<|im_end|>"
    texts = texts_of(template, train_on="assistant", template_args=args)
    assert trained_on(texts, chat) == "b<|im_end|>d<|im_end|>f<|im_end|>"
    texts = texts_of(template, train_on="all")
    assert document(texts, chat).loss_mask.all()


def check_refused(texts_of, alternating: str, no_tools: str, calls_alone: str) -> None:
    """What a template cannot render is refused."""
    calls = [user("a"), said("", tool_calls=[CALL])]
    beside = [user("a"), said("Let me see.", tool_calls=[CALL]), {"role": "tool", "content": "b"}, said("c")]
    for template, value, message in [
        (alternating, {"messages": [user("a"), user("b"), said("c")]}, "roles must alternate"),
        (alternating, {"messages": [user("a"), said("b")], "tools": [TOOL]}, "does not support tools"),
        (no_tools, {"messages": calls}, r"tool calls of message 2 \(sky\)"),
        (no_tools, {"messages": [user("a"), said("b", reasoning_content="c")]}, "the reasoning of message 2"),
        (calls_alone, {"messages": beside, "tools": [TOOL]}, r"message 2 \(assistant\) beside its tool calls"),
    ]:
        [bad] = texts_of(template).documents([Row("a.jsonl", 3, value)])
        assert isinstance(bad, InvalidRow)
        assert bad.why == "refused by the chat template"
        with pytest.raises(ValueError, match=f"a.jsonl:3: .*{message}"):
            raise ValueError(str(bad))


@pytest.mark.parametrize("template", MADE)
def test_all_turns_with_the_token_that_ends_each(texts_of, template):
    check_all_turns(texts_of, template)


@pytest.mark.parametrize("template", MADE)
def test_the_text_is_that_of_a_chat_with_bos_once(texts_of, template):
    check_text(texts_of, template)


def test_reasoning_is_trained_on_where_the_template_keeps_it(texts_of):
    check_reasoning(texts_of, "thinking")


REASONED = "<think>\nrain\n</think>\n\nRain."


def test_tool_calls_are_trained_on(texts_of):
    check_tool_calls(texts_of, "thinking", f"Let me see.\n{THINK_CALL}", REASONED)
    check_tool_calls(texts_of, "headers", HEADER_CALL, "Rain.")
    check_built_in_call(texts_of, "headers")


def test_completions_of_messages(texts_of):
    check_completions(texts_of, "thinking")


def test_what_a_template_cannot_render_is_refused(texts_of):
    check_refused(texts_of, "turns", "roles", "headers")


def test_published_templates(shared, texts_of):
    for template in PUBLISHED:
        check_all_turns(texts_of, template)
        check_text(texts_of, template)
    check_reasoning(texts_of, "Qwen-Qwen3-0.6B")
    check_tool_calls(texts_of, "Qwen-Qwen3-0.6B", f"Let me see.\n{THINK_CALL}", REASONED)
    check_tool_calls(texts_of, "Qwen-Qwen2.5-7B-Instruct", f"Let me see.\n{THINK_CALL}", "Rain.")
    for version in LLAMA[1:3]:
        check_tool_calls(texts_of, f"meta-llama-{version}-Instruct", HEADER_CALL, "Rain.")
    check_built_in_call(texts_of, "meta-llama-Llama-3.1-8B-Instruct")
    check_completions(texts_of, "Qwen-Qwen3-0.6B")
    check_refused(
        texts_of,
        "google-gemma-3-1b-it",
        "allenai-OLMo-2-Instruct.reconstructed",
        "meta-llama-Llama-3.1-8B-Instruct",
    )


# Other templates, with a small tokenizer

BLOCKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "INSIDE{% endgeneration %}OUTSIDE{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(("inside", "outside"), [("", "<end>"), ("<end>", ""), ("<end>\n", ""), ("", " <end>\n")])
def test_templates_with_generation_tags(inside, outside):
    texts = DocumentTokenizer(tokenizer_of(BLOCKS.replace("INSIDE", inside).replace("OUTSIDE", outside)))
    gap = " " if outside.startswith(" ") else ""
    assert trained_on(texts, CHAT) == f"b{gap}<end>d{gap}<end>"
    texts = DocumentTokenizer(texts.tokenizer, TextOptions(train_on="completion"))
    assert trained_on(texts, CHAT) == f"d{gap}<end>"


def test_generation_tags_that_miss_turns_are_not_used():
    template = BLOCKS.replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    assert (
        trained_on(DocumentTokenizer(tokenizer_of(template.replace("INSIDE", "<end>").replace("OUTSIDE", ""))), CHAT)
        == "b<end>d<end>"
    )


def test_a_prompt_that_opens_more_than_the_template_keeps():
    """As in DeepSeek-R1: the prompt ends in <think>, which earlier turns do not have."""
    template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    assert trained_on(DocumentTokenizer(tokenizer_of(template, thinking=True)), CHAT) == "b<end>d<end>"


def test_a_turn_whose_span_cannot_be_determined_is_refused():
    template = (
        "{% for m in messages %}{% if 'x' in m.content %}!{% endif %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    [bad] = DocumentTokenizer(tokenizer_of(template)).documents(
        [Row("a.jsonl", 3, {"messages": [user("a"), said("xb")]})]
    )
    assert str(bad).startswith("a.jsonl:3: ")
    assert "message 2" in str(bad)
    assert trained_on(DocumentTokenizer(tokenizer_of(template)), {"messages": [user("ax"), said("b")]}) == "b<end>"


def test_a_template_that_ends_no_turn():
    """What ends a turn instead is trained on, and the EOS of the document, if the last message is an answer."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    texts = DocumentTokenizer(tokenizer_of(template))
    assert trained_on(texts, CHAT) == "b\nd\n<end>"
    assert trained_on(texts, {"messages": [user("a"), said("b"), user("c")]}) == "b\n"
    assert "ends no turn with a token" in texts.notes[0]
    made = document(texts, {"messages": [user("a"), said("b"), user("c")]})
    assert texts.tokenizer.decode(made.ids, skip_special=False) == "user: a\nassistant: b\nuser: c\n<end>"


@given(st.lists(st.text("at \n<>e'x", max_size=6).map(lambda text: text + "n"), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_tokens_across_the_edge_of_a_span_are_split(answers):
    """The header ends in letters that merge with those of an answer. The letter after an answer ends its turn."""
    template = "{% for m in messages %}{{ m.role[:1] }}e {{ m.content }}a{% endfor %}"
    texts = DocumentTokenizer(EDGES)
    texts.tokenizer.hf.chat_template = template
    texts.__dict__["rust"] = EDGES_RUST
    messages = [message for answer in answers for message in (user("tt"), said(answer))]
    made = document(texts, {"messages": messages})
    assert (
        EDGES.decode(made.ids[made.loss_mask], skip_special=False)
        == "".join(f"{answer}a" for answer in answers) + "<end>"
    )
    whole = "".join(f"{message['role'][0]}e {message['content']}a" for message in messages)
    assert EDGES.decode(made.ids, skip_special=False) == f"{whole}<end>"


EDGES = tokenizer_of(TEMPLATE)
EDGES_RUST = DocumentTokenizer(EDGES).rust
