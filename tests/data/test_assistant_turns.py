"""Which tokens of a conversation are trained on, to the token, with the chat templates of real models."""

import json

import pytest
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from processing.test_tokenizer import byte_fallback

from jaxlm.data.documents import Document, TextOptions, Texts
from jaxlm.data.sources import InvalidRow, Row
from jaxlm.processing.tokenizer import Tokenizer

CALL = {"function": {"name": "sky", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "sky", "description": "d", "parameters": {"type": "object"}}}
QWEN_CALL = '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call>'
LLAMA_CALL = '{"name": "sky", "parameters": {"city": "Oslo"}}'
LLAMA = ["Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.2-3B", "Llama-3.3-70B"]
PLACES = {
    **{f"meta-llama-{name}-Instruct": ("llama3", "<|eot_id|>") for name in LLAMA},
    "Qwen-Qwen3-0.6B": ("qwen3", "<|im_end|>"),
    "Qwen3.maxtext-tokenizer_config": ("qwen3", "<|im_end|>"),
    "Qwen-Qwen2.5-7B-Instruct": ("qwen3", "<|im_end|>"),
    "allenai-OLMo-2-Instruct.reconstructed": ("olmo2", "<|endoftext|>"),
    "tulu.open-instruct": ("olmo2", "<|endoftext|>"),
    "google-gemma-3-1b-it": ("gemma3", "<end_of_turn>"),
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str, **fields) -> dict:
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture(scope="module")
def tokenizers(shared, tmp_path_factory):
    """name -> Texts of a real tokenizer (of Gemma 3, whose file is absent, a small one with its tokens)."""
    found: dict[str, Texts] = {}

    def load(name: str) -> Texts:
        if name not in found:
            folder = shared / "tokenizers" / name
            if name == "gemma3":
                folder = byte_fallback(tmp_path_factory.mktemp("gemma"))
            tok = Tokenizer.load(folder)
            assert tok is not None
            if name == "olmo2":
                tok.hf.bos_token = tok.hf.eos_token = "<|endoftext|>"
            tok.hf.chat_template = TEMPLATE
            found[name] = Texts(tok)
        return found[name]

    return load


def texts_of(tokenizers, shared, template: str, **options) -> Texts:
    """Texts with this template; the copy of the tokenizer is made once."""
    known = tokenizers(PLACES[template][0])
    known.tokenizer.hf.chat_template = (shared / "chat_templates" / f"{template}.jinja").read_text()
    texts = Texts(known.tokenizer, TextOptions(**options))
    texts.__dict__["rust"] = known.rust
    return texts


def document(texts: Texts, value: dict) -> Document:
    [made] = texts.documents([Row("a.jsonl", 3, value)])
    assert isinstance(made, Document), str(made)
    assert len(made.ids) == len(made.loss_mask)
    return made


def learned(texts: Texts, value: dict) -> str:
    made = document(texts, value)
    return texts.tokenizer.decode(made.ids[made.loss_mask], skip_special=False)


# Real templates


@pytest.mark.parametrize("template", PLACES)
def test_all_turns_with_the_token_that_ends_each(tokenizers, shared, template):
    texts = texts_of(tokenizers, shared, template)
    stop = PLACES[template][1]
    # What is said also stands elsewhere, and holds what a template writes, blanks that some of them strip, and emoji.
    answers = ["Hi", " two  words \n", f"on {stop} goes\n\n{stop}", "naïve 👩‍👩‍👧‍👦", "Hi"]
    messages = [{"role": "system", "content": "Hi"}]
    messages += [message for answer in answers for message in (user(f"Hi {stop}"), said(answer))]
    kept = [answer.strip() for answer in answers] if "llama" in template or "gemma" in template else answers
    assert learned(texts, {"messages": messages}) == "".join(answer + stop for answer in kept)


@pytest.mark.parametrize("template", PLACES)
def test_the_text_is_that_of_a_chat_with_bos_once(tokenizers, shared, template):
    texts = texts_of(tokenizers, shared, template)
    messages = [user("What is this?"), said("A test."), user("Why?"), said("To know.")]
    ids, tok = document(texts, {"messages": messages}).ids.tolist(), texts.tokenizer
    assert ids == tok.chat(messages, add_generation_prompt=False)
    if tok.bos_id is not None and tok.bos_id != tok.hf.eos_token_id:
        assert ids.count(tok.bos_id) == 1
        assert ids[0] == tok.bos_id


def test_thinking_is_learned_where_the_template_keeps_it(tokenizers, shared):
    texts = texts_of(tokenizers, shared, "Qwen-Qwen3-0.6B")
    think = "<think>\nhm\n</think>\n\n"
    assert learned(texts, {"messages": [user("a"), said(f"{think}b"), user("c"), said(f"{think}d")]}) == (
        f"b<|im_end|>{think}d<|im_end|>"
    )
    assert learned(texts, {"messages": [user("a"), said("b", reasoning_content="hm")]}) == f"{think}b<|im_end|>"
    # An empty block is the template's own: that is how it asks not to think.
    assert learned(texts, {"messages": [user("a"), said("b")]}) == "b<|im_end|>"
    assert "<think>" in texts.tokenizer.decode(document(texts, {"messages": [user("a"), said("b")]}).ids)
    silent = texts_of(tokenizers, shared, "Qwen-Qwen3-0.6B", template_args={"enable_thinking": False})
    assert learned(silent, {"messages": [user("a"), said("b"), user("c"), said("d")]}) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize(
    ("template", "call", "last"),
    [
        ("Qwen-Qwen3-0.6B", f"Let me see.\n{QWEN_CALL}<|im_end|>", "<think>\nrain\n</think>\n\nRain.<|im_end|>"),
        ("Qwen-Qwen2.5-7B-Instruct", f"Let me see.\n{QWEN_CALL}<|im_end|>", "Rain.<|im_end|>"),
        ("meta-llama-Llama-3.1-8B-Instruct", f"{LLAMA_CALL}<|eot_id|>", "Rain.<|eot_id|>"),
        ("meta-llama-Llama-3.2-3B-Instruct", f"{LLAMA_CALL}<|eot_id|>", "Rain.<|eot_id|>"),
    ],
)
def test_tool_calls_are_learned(tokenizers, shared, template, call, last):
    texts = texts_of(tokenizers, shared, template)
    end = PLACES[template][1]
    first = said("Let me see.", tool_calls=[CALL])
    result = {"role": "tool", "content": f"rain {end}"}
    final = said("Rain.", reasoning_content="rain") if "Qwen3" in template else said("Rain.")
    value = {"messages": [user("Sky?"), first, result, final], "tools": [TOOL]}
    assert learned(texts, value) == call + last
    # OpenAI's spelling: what is an object here is JSON in a string there; columns of a table have all fields.
    written = {"function": {"name": "sky", "arguments": json.dumps(CALL["function"]["arguments"])}}
    first = said("Let me see.", tool_calls=[written], name=None)
    again = {"messages": [user("Sky?"), first, result, final], "tools": json.dumps([TOOL])}
    assert document(texts, again).ids.tolist() == document(texts, value).ids.tolist()
    # After another question Qwen3 leaves out what was thought before the first answer.
    both = {"messages": [*value["messages"], user("Thanks"), said("You are welcome.")], "tools": [TOOL]}
    assert learned(texts, both) == f"{call}Rain.{end}You are welcome.{end}"


def test_a_call_of_a_built_in_tool_ends_with_another_token(tokenizers, shared):
    texts = texts_of(tokenizers, shared, "meta-llama-Llama-3.1-8B-Instruct", template_args={"builtin_tools": ["sky"]})
    messages = [user("Sky?"), said("", tool_calls=[CALL]), {"role": "tool", "content": "rain"}, said("Rain.")]
    called = '<|python_tag|>sky.call(city="Oslo")<|eom_id|>'
    assert learned(texts, {"messages": messages, "tools": [TOOL]}) == f"{called}Rain.<|eot_id|>"


def test_completions_of_messages(tokenizers, shared):
    texts = texts_of(tokenizers, shared, "Qwen-Qwen3-0.6B", train_on="completion")
    assert learned(texts, {"messages": [user("a"), said("b"), user("c"), said("d")]}) == "d<|im_end|>"
    texts = texts_of(tokenizers, shared, "Qwen-Qwen3-0.6B")
    chat = {"prompt": [user("a"), said("b"), user("c")], "completion": [said("d"), user("e"), said("f")]}
    assert learned(texts, chat) == "d<|im_end|>f<|im_end|>"
    texts = texts_of(tokenizers, shared, "Qwen-Qwen3-0.6B", train_on="assistant")
    assert learned(texts, chat) == "b<|im_end|>d<|im_end|>f<|im_end|>"
    texts = texts_of(tokenizers, shared, "Qwen-Qwen3-0.6B", train_on="all")
    assert document(texts, chat).loss_mask.all()


def test_what_a_template_cannot_say_is_refused(tokenizers, shared):
    gemma = texts_of(tokenizers, shared, "google-gemma-3-1b-it")
    olmo = texts_of(tokenizers, shared, "allenai-OLMo-2-Instruct.reconstructed")
    calls = [user("a"), said("", tool_calls=[CALL])]
    for texts, value, message in [
        (gemma, {"messages": [user("a"), user("b"), said("c")]}, "roles must alternate"),
        (gemma, {"messages": [user("a"), said("b")], "tools": [TOOL]}, "tools, which this chat template does not"),
        (olmo, {"messages": calls}, r"does not write the tool calls of message 2 \(sky\)"),
    ]:
        [bad] = texts.documents([Row("a.jsonl", 3, value)])
        assert isinstance(bad, InvalidRow)
        assert bad.why == "refused by the chat template"
        with pytest.raises(ValueError, match=f"a.jsonl:3: .*{message}"):
            raise ValueError(str(bad))


# Other templates, with a small tokenizer

BLOCKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "INSIDE{% endgeneration %}OUTSIDE{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)
CHAT = {"messages": [user("a"), said("b"), user("c"), said("d")]}


@pytest.mark.parametrize(("inside", "outside"), [("", "<end>"), ("<end>", ""), ("<end>\n", ""), ("", " <end>\n")])
def test_templates_with_generation_tags(inside, outside):
    texts = Texts(tokenizer_of(BLOCKS.replace("INSIDE", inside).replace("OUTSIDE", outside)))
    gap = " " if outside.startswith(" ") else ""
    assert learned(texts, CHAT) == f"b{gap}<end>d{gap}<end>"
    texts = Texts(texts.tokenizer, TextOptions(train_on="completion"))
    assert learned(texts, CHAT) == f"d{gap}<end>"


def test_generation_tags_that_leave_turns_out_are_not_trusted():
    template = BLOCKS.replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    assert (
        learned(Texts(tokenizer_of(template.replace("INSIDE", "<end>").replace("OUTSIDE", ""))), CHAT) == "b<end>d<end>"
    )


def test_a_prompt_that_opens_more_than_the_template_keeps():
    """As with DeepSeek-R1: the prompt ends in <think>, which is not there in what was said before."""
    template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    assert learned(Texts(tokenizer_of(template, thinking=True)), CHAT) == "b<end>d<end>"


def test_a_turn_whose_place_does_not_show_is_refused():
    template = (
        "{% for m in messages %}{% if 'x' in m.content %}!{% endif %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    [bad] = Texts(tokenizer_of(template)).documents([Row("a.jsonl", 3, {"messages": [user("a"), said("xb")]})])
    assert "a.jsonl:3: the chat template writes message 2, of the assistant, in a way that does not show" in str(bad)
    assert learned(Texts(tokenizer_of(template)), {"messages": [user("ax"), said("b")]}) == "b<end>"


def test_a_template_that_ends_no_turn():
    """The end of the document is learned instead, where an answer is the last."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    texts = Texts(tokenizer_of(template))
    assert learned(texts, CHAT) == "bd<end>"
    assert learned(texts, {"messages": [user("a"), said("b"), user("c")]}) == "b"
    made = document(texts, {"messages": [user("a"), said("b"), user("c")]})
    assert texts.tokenizer.decode(made.ids, skip_special=False) == "user: a\nassistant: b\nuser: c\n<end>"


@given(st.lists(st.text("at \n<>e'x", max_size=6).map(lambda text: text + "n"), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_tokens_that_would_reach_over_the_edge_are_cut_there(answers):
    """The header ends in letters that merge with those of an answer."""
    template = "{% for m in messages %}{{ m.role[:1] }}e {{ m.content }}a{% endfor %}"
    texts = Texts(EDGES)
    texts.tokenizer.hf.chat_template = template
    texts.__dict__["rust"] = EDGES_RUST
    messages = [message for answer in answers for message in (user("tt"), said(answer))]
    made = document(texts, {"messages": messages})
    assert EDGES.decode(made.ids[made.loss_mask], skip_special=False) == "".join(answers)
    whole = "".join(f"{message['role'][0]}e {message['content']}a" for message in messages)
    assert EDGES.decode(made.ids, skip_special=False) == f"{whole}<end>"


EDGES = tokenizer_of(TEMPLATE)
EDGES_RUST = Texts(EDGES).rust
