"""jaxlm.processing.tokenizer, on small vocabularies made here and on real ones where they are at hand."""

import copy
import functools
import json
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxlm.processing.chat_template import split_thinking
from jaxlm.processing.tokenizer import Tokenizer

TEXT = (
    "Hello  world! I'm don't \t\n\n 12345 67, naïve café e\u0301 日本語 العربية 👩‍👩‍👧‍👦 🇩🇪 \ufffd \r\n"
    " <|endoftext|> <|im_start|>x <|eot_id|> </s> <s> <0x41> \u2581 end "
)
REAL = ["tokenizers/llama3", "tokenizers/qwen3", "tokenizers/olmo2", "checkpoints/stories260K"]
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


def byte_level(folder: Path, bos: bool = False, **config) -> Path:
    """A byte-level vocabulary of about 300 tokens, like Llama 3's (with bos) or Qwen's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        ["the cat sat on the mat, the cat said hello to the world 日本 日本語"] * 9,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tok.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False), "<two words>"])
    if bos:
        tok.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return save(tok, folder, config)


def byte_fallback(folder: Path, prefix: bool = False, **config) -> Path:
    """A vocabulary of pieces and single bytes, like Gemma's or (with prefix) Llama 2's, with Gemma 3's ids of turns."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *"etaonisrhldcumfpgwybvkxjqz",
        "▁",
        "th",
        "the",
        "▁the",
        ",",
        ".",
        "!",
    ]
    pieces += ["\n", "▁▁", *(f"<unused{n}>" for n in range(200))]
    pieces[105:107] = "<start_of_turn>", "<end_of_turn>"
    pieces = [*pieces, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tok.add_special_tokens([*pieces[:4], "<start_of_turn>", "<end_of_turn>"])
    tok.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return save(tok, folder, {"bos_token": "<bos>", "eos_token": "<eos>", **config})


def save(tok, folder: Path, config: dict) -> Path:
    tok.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def load_once(folder: Path) -> Tokenizer:
    return load(folder)


def load(folder: Path, *configs: dict) -> Tokenizer:
    tok = Tokenizer.load(folder, *configs)
    assert tok is not None
    return tok


@pytest.fixture(scope="session")
def real(shared):
    """name -> a real tokenizer."""
    return lambda name: load_once(shared / name)


@pytest.fixture
def templated(real, shared):
    """(tokenizer, template, named tokens) -> a real tokenizer with a real template, until the test ends."""
    undo = []

    def combine(name: str, template: str, **tokens: str | None) -> Tokenizer:
        tok = real(name)
        text = (shared / "chat_templates" / f"{template}.jinja").read_text()
        for which, value in {"chat_template": text, **tokens}.items():
            undo.append((tok.hf, which, getattr(tok.hf, which)))
            setattr(tok.hf, which, value)
        return tok

    yield combine
    for change in undo:
        setattr(*change)


# Loading


@pytest.mark.parametrize("name", REAL)
def test_ids_equal_those_of_the_file(real, shared, name):
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(shared / name / "tokenizer.json"))
    text = TEXT + (shared / "corpora/gsm8k/train.jsonl").read_text()[:20000]
    tok = real(name)
    assert tok.encode(text) == plain.encode(text).ids
    assert tok.encode(text, add_special_tokens=False) == plain.encode(text, add_special_tokens=False).ids
    assert tok.decode(tok.encode(text)) == plain.decode(plain.encode(text).ids)
    assert tok.vocab_size == max(plain.get_vocab().values()) + 1


def test_the_file_is_read_verbatim_whatever_class_the_config_names(tmp_path):
    import tokenizers

    byte_level(tmp_path, tokenizer_class="Qwen2Tokenizer", add_bos_token=True, bos_token="<|begin|>")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode(TEXT) == plain.encode(TEXT).ids


def test_a_folder_without_tokenizer(tmp_path, shared):
    assert Tokenizer.load(shared / "checkpoints/babyllama_tok105") is None
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


def test_meta_originals(tmp_path, real, templated, shared):
    shutil.copy(shared / "tokenizers/llama3/tokenizer.model", tmp_path)
    tok = load(tmp_path)
    text = TEXT + (shared / "corpora/wikitext2/wikitext2_test_tokenised.txt").read_text()[:20000]
    assert tok.encode(text) == real("tokenizers/llama3").encode(text)
    assert tok.get_vocab() == real("tokenizers/llama3").get_vocab()
    assert tok.stop_ids == (128001, 128009)
    turns = [{"role": "system", "content": " Be brief. "}, USER, {"role": "assistant", "content": "a\n"}, USER]
    assert tok.chat(turns) == templated("tokenizers/llama3", "meta-llama-Meta-Llama-3-8B-Instruct").chat(turns)


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


def test_bos_of_real_tokenizers(real):
    assert real("tokenizers/qwen3").encode("") == []
    assert real("tokenizers/llama3").encode("<|begin_of_text|>a") == [128000, 64]


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
        ([{"role": "user", "content": ["a"]}, {"role": "assistant", "content": {}.keys}], "template|content"),
        ([], "empty"),
        ("Hi", "'role' and 'content', got 'H'"),
        ([{"content": "Hi"}], "'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type 'image': images and other .* not supported"),
        ([{"role": "user", "content": {"type": "image_url", "image_url": {}}}], "part of type 'image_url'"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "a content part of a message must be {'type': 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "a content part of a message must be"),
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


def test_real_templates_accept(templated):
    qwen = templated("tokenizers/qwen3", "Qwen-Qwen3-0.6B")
    assert qwen.template_accepts("enable_thinking")
    assert qwen.render([USER], enable_thinking=False).endswith("<think>\n\n</think>\n\n")
    llama = templated("tokenizers/llama3", "meta-llama-Llama-3.2-3B-Instruct")
    assert llama.template_accepts("date_string")
    assert not llama.template_accepts("enable_thinking")
    assert "Today Date: 1 May 2000" in llama.render([USER], date_string="1 May 2000")
    assert "Today Date: 26 Jul 2024" not in llama.render([USER])  # strftime_now is there


@pytest.mark.parametrize("version", ["Meta-Llama-3-8B", "Llama-3.1-8B", "Llama-3.2-3B", "Llama-3.3-70B"])
def test_llama_chat_has_one_bos(templated, version):
    tok = templated("tokenizers/llama3", f"meta-llama-{version}-Instruct")
    ids = tok.chat([USER])
    assert ids[0] == 128000
    assert ids.count(128000) == 1
    assert ids[-4:] == tok.encode("<|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)


def test_gemma_refusals(tmp_path, shared):
    templates = shared / "chat_templates"
    tok = load(byte_fallback(tmp_path))
    system = {"role": "system", "content": "Be brief."}
    tok.hf.chat_template = (templates / "google-gemma-2-2b-it.jinja").read_text()
    with pytest.raises(ValueError, match="System role not supported"):
        tok.chat([system, USER])
    tok.hf.chat_template = (templates / "google-gemma-3-1b-it.jinja").read_text()
    with pytest.raises(ValueError, match="must alternate"):
        tok.chat([USER, USER])
    ids = tok.chat([system, USER])
    assert ids[:2] == [2, 105]
    assert ids.count(2) == 1


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


@pytest.mark.parametrize(
    ("name", "template", "stop"),
    [
        ("llama3", "meta-llama-Meta-Llama-3-8B-Instruct", "<|eot_id|>"),
        ("llama3", "meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>"),
        ("llama3", "meta-llama-Llama-3.2-3B-Instruct", "<|eot_id|>"),
        ("llama3", "meta-llama-Llama-3.3-70B-Instruct", "<|eot_id|>"),
        ("qwen3", "Qwen-Qwen3-0.6B", "<|im_end|>"),
        ("qwen3", "Qwen3.maxtext-tokenizer_config", "<|im_end|>"),
        ("qwen3", "Qwen-Qwen2.5-7B-Instruct", "<|im_end|>"),
        ("olmo2", "allenai-OLMo-2-Instruct.reconstructed", "<|endoftext|>"),
        ("olmo2", "tulu.open-instruct", "<|endoftext|>"),
    ],
)
def test_the_template_closes_the_turn_with_a_stop(templated, name, template, stop):
    # OLMo's templates write the tokenizer's eos_token; the others must be found without its help
    tok = templated(f"tokenizers/{name}", template, eos_token=stop if name == "olmo2" else None)
    assert tok.stop_ids == (tok.convert_tokens_to_ids(stop),)


def test_gemma_stops(tmp_path, shared):
    tok = load(byte_fallback(tmp_path))
    tok.hf.chat_template = (shared / "chat_templates/google-gemma-3-1b-it.jinja").read_text()
    assert tok.stop_ids == (1, 106)
    generation_config = json.loads((shared / "generation_configs/google-gemma-3-1b-it.json").read_text())
    assert load(tmp_path, generation_config).stop_ids == (1, 106)


def test_published_generation_configs(tmp_path, shared):
    config = json.loads((shared / "generation_configs/meta-llama-Meta-Llama-3.1-8B-Instruct.json").read_text())
    assert load(byte_level(tmp_path), config).stop_ids == (128001, 128008, 128009)


# Thinking


def test_thinking_tokens(tmp_path):
    (tmp_path / "b").mkdir()
    assert load(byte_level(tmp_path)).thinking == ("<think>", "</think>")
    assert load(byte_fallback(tmp_path / "b")).thinking is None


def test_thinking_tokens_of_real_tokenizers(real):
    assert real("tokenizers/qwen3").thinking == ("<think>", "</think>")
    assert real("tokenizers/llama3").thinking is None


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
