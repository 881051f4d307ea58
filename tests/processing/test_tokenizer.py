"""jaxlm.processing.tokenizer. With published tokenizers and chat templates: test_chat_formats.py."""

import copy
import json
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers.published import TOKENIZERS
from helpers.tiny_tokenizers import PROSE, SMALL, byte_fallback, byte_level, load, load_once, save, write

from jaxlm.processing.chat_template import split_thinking
from jaxlm.processing.tokenizer import Tokenizer

TEXT = (
    "Hello  world! I'm don't \t\n\n 12345 67, naïve café e\u0301 日本語 العربية 👩‍👩‍👧‍👦 🇩🇪 \ufffd \r\n"
    " <|endoftext|> <|im_start|>x <|eot_id|> </s> <s> <0x41> \u2581 end "
)
USER = {"role": "user", "content": "Hi"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
)


# Loading


def check_ids(folder: Path, text: str) -> None:
    """Ids and text are those of the tokenizers library alone."""
    import tokenizers

    plain, tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), load_once(folder)
    assert tok.encode(text) == plain.encode(text).ids, folder
    assert tok.encode(text, add_special_tokens=False) == plain.encode(text, add_special_tokens=False).ids, folder
    assert tok.decode(tok.encode(text)) == plain.decode(plain.encode(text).ids), folder
    assert tok.vocab_size == max(plain.get_vocab().values()) + 1, folder


@pytest.mark.parametrize("kind", SMALL)
def test_ids_equal_those_of_the_file(kind, tmp_path):
    check_ids(write(kind, tmp_path), TEXT + PROSE)


def test_ids_of_published_files(shared):
    for name in TOKENIZERS:
        check_ids(shared / name, TEXT + (shared / "corpora/gsm8k/train.jsonl").read_text()[:20000])


def test_the_file_is_read_verbatim_whatever_class_the_config_names(tmp_path):
    import tokenizers

    byte_level(tmp_path, tokenizer_class="Qwen2Tokenizer", add_bos_token=True, bos_token="<|begin|>")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode(TEXT) == plain.encode(TEXT).ids


# tokenizer_config.json as tools write it: tool -> fields.
TOKENIZER_CONFIGS = {
    "transformers 4": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(1e30), "legacy": True,
                       "clean_up_tokenization_spaces": True, "added_tokens_decoder": {}, "sp_model_kwargs": {}},
    "transformers 5": {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
    "Llama": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False, "unk_token": None,
              "use_default_system_prompt": False, "spaces_between_special_tokens": False, "padding_side": "left"},
    "Qwen": {"tokenizer_class": "Qwen2Tokenizer", "errors": "replace", "split_special_tokens": False,
             "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    "Gemma": {"tokenizer_class": "GemmaTokenizer", "boi_token": "<|im_start|>", "processor_class": "Gemma3Processor",
              "extra_special_tokens": {"image_token": "<|im_end|>"}},
    "unsloth": {"padding_side": "right", "pad_token": "<|end|>", "model_input_names": ["input_ids", "attention_mask"]},
    "MLX": {"tool_parser_type": "json_tools", "tokenizer_file": None, "init_inputs": []},
    "remote code": {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["code.XTokenizer", None]}},
    "transformers.js": {"transformers.js_config": {}, "max_length": 512, "truncation_side": "right", "stride": 0},
}  # fmt: skip


@pytest.mark.parametrize("tool", TOKENIZER_CONFIGS)
def test_fields_of_tools_in_tokenizer_config_json_change_no_ids(tool, tmp_path, caplog):
    import tokenizers

    byte_level(tmp_path, bos=True, **{"bos_token": "<|begin|>", "eos_token": "<|end|>", **TOKENIZER_CONFIGS[tool]})
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode(TEXT) == plain.encode(TEXT).ids
    assert not [record for record in caplog.records if record.name.startswith("jaxlm")]


@pytest.mark.parametrize(
    ("bos", "field", "value"),
    [(True, "add_bos_token", False), (False, "add_bos_token", True), (True, "add_eos_token", True)],
)
def test_a_field_that_asks_for_other_ids_is_named(bos, field, value, tmp_path, caplog):
    byte_level(tmp_path, bos=bos, bos_token="<|begin|>", eos_token="<|end|>", **{field: value})
    load(tmp_path)
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("jaxlm")]
    assert f"{field} is {str(value).lower()}" in line


def test_a_folder_without_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors", "other.model", "other.vocab"):
        (tmp_path / name).write_text("{}")
    assert Tokenizer.load(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_corrupt_files_are_named(tmp_path, name):
    byte_level(tmp_path, eos_token="<|end|>")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=f"{name}.*download it again"):
        Tokenizer.load(tmp_path)


def test_tokens_that_no_config_names(tmp_path):
    tok = load(byte_level(tmp_path, bos=True), {}, {"eos_token_id": 1})
    assert (tok.bos_id, tok.bos_token, tok.eos_token) == (0, "<|begin|>", "<|end|>")
    assert tok.encode("the") == [0, *tok.encode("the", add_special_tokens=False)]
    (tmp_path / "b").mkdir()
    assert load(byte_level(tmp_path / "b")).bos_id is None


def test_vocab_json_and_merges(tmp_path):
    tok = load(byte_level(tmp_path))
    old = tmp_path / "old"
    old.mkdir()
    tok.backend_tokenizer.model.save(str(old))
    (old / "config.json").write_text('{"model_type": "gpt2"}')
    text = "the cat, naïve 日本"
    assert load(old).encode(text) == tok.encode(text)
    (old / "merges.txt").unlink()
    (old / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match=r"vocab\.json"):
        Tokenizer.load(old)


def test_code_in_the_folder_never_runs(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError):
        Tokenizer.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_sentencepiece_is_checked_against_sentencepiece(tmp_path, monkeypatch):
    import transformers

    hf = load(byte_fallback(tmp_path)).hf
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        Tokenizer.load(tmp_path)

    class Processor:
        prefix: tuple[int, ...] = ()

        def __init__(self, path: str): ...

        def encode(self, text: str) -> list[int]:
            return [*self.prefix, *hf.encode(text, add_special_tokens=False)]

    for name in ("google", "google.protobuf"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sentencepiece", types.SimpleNamespace(SentencePieceProcessor=Processor))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: copy.deepcopy(hf))
    assert load(tmp_path).encode("the") == hf.encode("the")
    Processor.prefix = (30,)
    with pytest.raises(ValueError, match=r"tokenizer\.model: use a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_loading_is_silent_and_importing_is_light(tmp_path):
    byte_level(tmp_path, eos_token="<|end|>", model_max_length=4, clean_up_tokenization_spaces=True)
    code = f"""
import sys
from jaxlm.processing.tokenizer import Tokenizer
assert not sys.modules.keys() & {{"transformers", "tokenizers", "jax", "jinja2"}}
tok = Tokenizer.load({str(tmp_path)!r})
assert tok.decode(tok.encode("the cat , sat" * 9)) == "the cat , sat" * 9
import logging, transformers
transformers.logging.get_logger("transformers").warning("PyTorch was not found, by someone else")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[transformers] PyTorch was not found, by someone else"
    assert not done.stdout


# What users of transformers expect


def test_the_rest_is_transformers(tmp_path):
    tok = load(byte_level(tmp_path, bos=True, eos_token="<|end|>"))
    assert tok.eos_token_id == 1
    assert tok("the")["input_ids"] == tok.encode("the")
    assert len(tok) == len(tok.hf) == tok.vocab_size > tok.hf.vocab_size
    for other in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert other.encode(TEXT) == tok.encode(TEXT)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tok.no_such_thing


def test_decode_leaves_spaces_alone(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"well": 0, ",": 1, "n't": 2, "[U]": 3}, "[U]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = load(save(plain, tmp_path, {"clean_up_tokenization_spaces": True}))
    assert tok.decode([0, 1, 2]) == "well , n't"


def test_decode_of_special_and_unknown_ids(tmp_path):
    tok = load(byte_level(tmp_path, bos=True))
    ids = [0, *tok.encode("the cat", add_special_tokens=False), 1, 99999]
    assert tok.decode(ids) == "the cat"
    assert tok.decode(ids, skip_special=False) == "<|begin|>the cat<|end|>"
    assert tok.special_ids == {0, 1, 2, 3}


# BOS


def test_bos_exactly_once(tmp_path):
    tok = load(byte_level(tmp_path, bos=True, bos_token="<|begin|>", chat_template=STRICT, eos_token="<|end|>"))
    for text in ("the", "<|begin|>the"):
        assert tok.encode(text) == [0, *tok.encode("the", add_special_tokens=False)]
    assert tok.encode("") == [0]
    assert tok.encode("<|begin|>") == [0]
    assert tok.encode("the<|begin|>").count(0) == 2
    assert tok.encode("<|begin|>the", add_special_tokens=False) == tok.encode("the")
    assert tok.chat([USER]).count(0) == 1
    tok.hf.chat_template = CHATML  # writes none
    assert tok.chat([USER]).count(0) == 0


def test_bos_stays_where_the_tokenizer_adds_none(tmp_path):
    tok = load(byte_level(tmp_path, bos_token="<|begin|>"))
    the = tok.encode("the")
    assert 0 not in the
    assert tok.encode("<|begin|>the") == [0, *the]
    assert tok.encode("<|begin|><|begin|>the") == [0, 0, *the]


# Chat templates


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "chat_template.json"])
def test_where_templates_lie(tmp_path, place):
    byte_level(tmp_path, eos_token="<|end|>", **({"chat_template": CHATML} if place == "tokenizer_config.json" else {}))
    if place.startswith("chat"):
        text = CHATML if place.endswith("jinja") else json.dumps({"chat_template": CHATML})
        (tmp_path / place).write_text(text)
    tok = load(tmp_path)
    assert tok.has_template
    assert tok.render([USER]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tok.render([USER], add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert tok.chat([USER]) == tok.encode(tok.render([USER]))
    assert tok.chat([USER], enable_thinking=False) == tok.encode(tok.render([USER]) + "<think>\n\n</think>\n\n")


def test_no_template(tmp_path):
    tok = load(byte_level(tmp_path))
    assert not tok.has_template
    assert not tok.template_accepts("tools")
    with pytest.raises(ValueError, match=r"no chat template.*Qwen/Qwen3-0.6B"):
        tok.chat([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, USER], "roles must alternate"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": {}.keys}], "the content <built-in"),
        ([], "empty"),
        ("Hi", "'role' and 'content', got 'H'"),
        ([{"content": "Hi"}], "'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type 'image': images and other .* not supported"),
        ([{"role": "user", "content": {"type": "image_url", "image_url": {}}}], "part of type 'image_url'"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "a content part must be {'type': 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "a content part must be"),
    ],
)
def test_what_a_template_refuses(tmp_path, messages, message):
    tok = load(byte_level(tmp_path, bos_token="<|begin|>", eos_token="<|end|>", chat_template=STRICT))
    if message.startswith("template"):
        tok.hf.chat_template = "{% for m in messages %}{{ 'x' + m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=message):
        tok.chat(messages)


def test_text_parts_are_put_together(tmp_path):
    """Whatever the template does with a list: most write its repr, or leave it out."""
    tok = load(byte_level(tmp_path, chat_template=CHATML))
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}], "name": "x"}
    assert tok.render([parts]) == tok.render([USER])
    assert isinstance(parts["content"], list)


def test_broken_templates_and_tools(tmp_path):
    tok = load(byte_level(tmp_path, chat_template="{% for m in messages %}"))
    with pytest.raises(ValueError, match="chat template"):
        tok.render([USER])
    with pytest.raises(ValueError, match="chat template"):
        tok.template_accepts("tools")
    assert tok.stop_ids == ()
    tok.hf.chat_template = "{{ tools[0].function.name }}"

    def weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return city

    assert tok.render([USER], tools=[weather]) == "weather"
    with pytest.raises(ValueError, match="tool has no valid JSON schema"):
        tok.render([USER], tools=[lambda city: city])


def test_templates_run_in_a_sandbox(tmp_path):
    tok = load(byte_level(tmp_path, chat_template="{{ ''.__class__.__mro__ }}"))
    with pytest.raises(ValueError, match="chat template"):
        tok.render([USER])


def test_template_accepts(tmp_path):
    tagged = CHATML.replace("{% for", "{%- generation -%}{% endgeneration %}{% for")
    tok = load(byte_level(tmp_path, chat_template=tagged))
    assert tok.template_accepts("enable_thinking")
    assert tok.template_accepts("messages")
    assert not tok.template_accepts("m")
    assert not tok.template_accepts("think_hard")


# Stop ids


def test_stop_ids_are_a_union(tmp_path):
    byte_level(tmp_path, eos_token="<|end|>", chat_template=CHATML)
    assert load(tmp_path).stop_ids == (1, 3)
    assert load(tmp_path, {"eos_token_id": [7, 3]}, {"eos_token_id": 2}).stop_ids == (1, 2, 3, 7)
    assert load(tmp_path, {"eos_token_id": None}, {}).stop_ids == (1, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    assert load(tmp_path).stop_ids == (1, 3, 8, 9)
    assert load(tmp_path, {}, {}).stop_ids == (1, 3)


def test_what_closes_a_turn(tmp_path):
    tok = load(byte_level(tmp_path, chat_template=CHATML))
    tok.hf.add_tokens(["<|im"])
    assert tok.stop_ids == (3,)
    tok.hf.chat_template = "{% for m in messages %}{{ ' ' + m.content + ' <|end|> ' }}{% endfor %}"
    assert tok.stop_ids == (1,)
    tok.hf.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m.content + ' over<|end|>' }}{% endfor %}"
    assert tok.stop_ids == ()
    tok.hf.chat_template = "{{ '<|end|>' }}"
    assert tok.stop_ids == ()


# Thinking


def test_thinking_tokens(tmp_path):
    (tmp_path / "b").mkdir()
    assert load(byte_level(tmp_path)).thinking == ("<think>", "</think>")
    assert load(byte_fallback(tmp_path / "b")).thinking is None


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("<think>\nhm\n</think>\n\nYes. ", False, ("hm", "Yes. ")),
        ("\n<think>\n\n</think>\n\nYes", False, ("", "Yes")),
        ("<think>\nhm", False, ("hm", "")),
        ("hm\n</think>\nYes", True, ("hm", "Yes")),
        ("<think>hm</think>Yes", True, ("hm", "Yes")),
        ("hm", True, ("hm", "")),
        (" Yes: the tag </think> closes", False, ("", " Yes: the tag </think> closes")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("", False, ("", "")),
    ],
)
def test_split_thinking(text, opened, parts):
    assert split_thinking(text, opened) == parts
