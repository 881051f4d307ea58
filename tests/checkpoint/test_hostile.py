"""Hostile files: an error message each time, never another exception, a hang, or memory beyond the file's size.

What fuzzing (tests/checkpoint/fuzz.py) has found stands here as a case of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoint_files, hostile
from helpers.hostile import READERS, ROPES, WORDS, judge, paths, replaced
from helpers.tiny_models import CONFIGS, FULL, SLIDING
from hypothesis import HealthCheck, given, settings

from jaxlm import models
from jaxlm.checkpoint import hub
from jaxlm.cli import main
from jaxlm.models.config_fields import MATHEMATICS
from jaxlm.processing import template_sandbox
from jaxlm.processing.tokenizer import Tokenizer

fuzz = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 1.0)


@pytest.mark.parametrize("name", READERS)
def test_fuzz(name, tmp_path):
    reader = READERS[name]
    reader.write(tmp_path)
    sound = (tmp_path / reader.file).read_bytes()
    assert judge(reader, tmp_path, sound) == ""

    @fuzz
    @given(hostile.hostile(reader.file, sound))
    def read(data):
        judge(reader, tmp_path, data)

    read()


def refusal(name: str, folder: Path, **fields: Any) -> str:
    """The message about a file with these fields exchanged or added."""
    reader = READERS[name]
    reader.write(folder)
    return judge(reader, folder, hostile.dump({**json.loads((folder / reader.file).read_bytes()), **fields}))


# config.json


def spellings(family: str) -> Any:
    """Configs of a family that have every field it reads, with every rope."""
    base = {
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1e4, "head_dim": 20,
        "layer_types": [FULL, FULL], "use_sliding_window": False, "sliding_window": None, **CONFIGS[family],
    }  # fmt: skip
    if family == "gemma3":
        del base["hidden_act"]
        base |= {"sliding_window_pattern": 2, "_sliding_window_pattern": 2, "rope_local_base_freq": 1e4}
        yield {"model_type": "gemma3", "text_config": base, "vision_config": {"a": 1}, "boi_token_index": 3}
    for rope in ROPES.values():
        yield {**base, "rope_scaling": rope}
        local = {"rope_type": "default", "rope_theta": 3e4}
        yield {**base, "rope_parameters": {FULL: rope, SLIDING: local} if family == "gemma3" else rope}


@pytest.mark.parametrize(
    "family", [f if f in ("llama3", "gemma3") else pytest.param(f, marks=pytest.mark.slow) for f in CONFIGS]
)
def test_any_value_in_any_field_of_a_config(family):
    """Either a config whose numbers make sense, or a message with the field's or the file's name."""
    read = refused = 0
    for config in spellings(family):
        hostile.use_config(config)
        for path in paths(config)[1:]:
            for word in WORDS:
                try:
                    hostile.use_config(replaced(config, path, word))
                    read += 1
                except ValueError as error:
                    assert "config.json" in str(error) or "model_type" in str(error)  # noqa: PT017
                    assert len(str(error)) < 3000  # noqa: PT017
                    refused += 1
    assert read > 100
    assert refused > 3000


YARN, LLAMA3, LINEAR = ROPES["yarn"], ROPES["llama3"], ROPES["linear"]
CONFIG_FAULTS = [
    ("llama3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("gemma3", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647"),
    ("qwen3", {"hidden_size": 10**12}, "hidden_size is 1000000000000"),
    ("olmo2", {"vocab_size": 10**400}, r"vocab_size is 1000.*\.\.\..*000, but must be"),
    ("llama3", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, but must be a number above 0"),
    ("llama3", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', but must be a number"),
    ("llama3", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, but must be true or false"),
    ("llama3", {"rope_scaling": True}, "rope_scaling is True"),
    ("llama3", {"rope_theta": -1}, "rope_theta is -1, but must be a number above 0"),
    ("llama3", {"rope_theta": [[]]}, r"rope_theta is \[\[\]\], but must be a number"),
    ("llama3", {"rope_scaling": {**LINEAR, "factor": 0}}, "factor is 0, but must be a number above 0"),
    ("llama3", {"rope_scaling": {**LINEAR, "factor": 10**400}}, "factor is 1000"),
    ("llama3", {"rope_scaling": {**LINEAR, "rope_type": []}}, r"rope_type \[\] is not supported"),
    ("llama3", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor must be below high_freq_factor"),
    ("llama3", {"rope_theta": 1, "rope_scaling": YARN}, "rope_theta 1"),
    ("llama3", {"rope_scaling": {**YARN, "truncate": 3}}, "truncate is 3, but must be true or false"),
    ("llama3", {"rope_scaling": {**YARN, "mscale": -1}}, "mscale is -1, but must be a number above 0"),
    ("llama3", {"hidden_act": {"a": {}}}, "hidden_act = {'a': {}}"),
    ("llama3", {name: [7, {}] for name in list(MATHEMATICS)[:50]}, "not compute .*; and 30 more fields"),
    ("llama3", {"layer_types": 3}, "layer_types = 3"),
    ("gemma3", {"layer_types": True}, "layer_types"),
    ("gemma3", {"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern is 0"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, but must be a number above 0"),
    ("gemma3", {"rope_parameters": ""}, "rope_parameters is ''"),
    ("gemma3", {"rope_parameters": {FULL: 3}}, "full_attention is 3"),
    ("gemma3", {"rope_parameters": {"x" * 5000: {}}}, "rope_parameters must have sections full_attention and sliding"),
    ("gemma3", {"text_config": [1]}, r"text_config is \[1\]"),
    ("llama3", {"model_type": []}, r"model_type \[\]"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "message"), CONFIG_FAULTS)
def test_what_a_config_is_refused_for(family, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        hostile.use_config({**CONFIGS[family], **fields})
    assert len(str(caught.value)) < 3000


def test_values_nested_as_deep_as_the_parser_goes(tmp_path):
    """Their repr would take a frame more than the parser had."""
    reader = READERS["model/config.json"]
    reader.write(tmp_path)
    sound = (tmp_path / "config.json").read_bytes()
    for depth in (50, 300, *range(900, 1000, 7), 5000, 100_000):
        data = sound.replace(b'"hidden_size": 8', b'"hidden_size": ' + b"[" * depth + b"]" * depth)
        assert "config.json" in judge(reader, tmp_path, data)


# generation_config.json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": [1, [2]]}, "config.json or generation_config.json: [2] in eos_token_id is not a token id"),
        ({"eos_token_id": "1"}, "'1' in eos_token_id is not a token id"),
        ({"eos_token_id": 10**30}, "in eos_token_id is not a token id"),
        ({"eos_token_id": -1}, "-1 in eos_token_id is not a token id"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"top_k": 2**31}, "top_k=2147483648"),
        ({"max_new_tokens": {"a": [[]]}}, "max_tokens={'a': [[]]}"),
        ({"stop_strings": ["x" * 99] * 200}, "stop=('xxx"),
        ({"top_p": "x" * 5000}, "top_p='xxx"),
    ],
)
def test_what_a_generation_config_is_refused_for(fields, message, tmp_path):
    assert message in refusal("model/generation_config.json", tmp_path, **fields)


# The tokenizer's files


def replace(old: str, new: str, pattern: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {pattern: old}, "content": new}


def template(pieces: list[Any]) -> dict[str, Any]:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": {}}


SEQUENCE, BOS = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<bos>", "type_id": 0}}
TOKENIZER_FAULTS = {
    "a normalizer that makes 10^12 letters of one": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 12}},
        "its normalizer can make a text 1,000,000,000,000 times longer",
    ),
    "the same by expressions that match nothing": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace("", "xx", "Regex")] * 12}},
        "its normalizer can make a text 531,441 times longer (limit: 100)",
    ),
    "a decoder": (
        {"decoder": {"type": "Sequence", "decoders": [replace("H", "H" * 1000)] * 4}},
        "its decoder can make a text 1,000,000,000,000 times longer",
    ),
    "a template that repeats": ({"post_processor": template([SEQUENCE] * 1000)}, "can make a text 1,000 times"),
    "a template without its token": ({"post_processor": template([BOS, SEQUENCE])}, "PanicException: no entry found"),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "PanicException: chunk size must"),
    "a map that is none": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "PanicException"),
    "a broken expression": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}},
        "Oniguruma error",
    ),
    "an expression that tries everything": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(e+)+$x|(?:.?){30}.{30}z"}, "behavior": "Isolated",
                           "invert": False}}, "",
    ),
    "no token for the unknown": ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}, "cannot enc"),
    "an empty vocabulary": ({"model": {"type": "Unigram", "vocab": [], "unk_id": 0, "byte_fallback": False}}, "Empty"),
    "ids without end": ({"added_tokens": [{"id": 2**32, "content": "a"}]}, "tokenizer.json, or another tokenizer file"),
    "a stride above the length": (
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 10}}, "stride",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZER_FAULTS)
def test_what_a_tokenizer_json_is_refused_for(case, tmp_path):
    fields, message = TOKENIZER_FAULTS[case]
    assert message in refusal("model/tokenizer.json", tmp_path, **fields)


def test_steps_that_real_tokenizers_have_are_not_refused(tmp_path):
    steps = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"), replace(" {2,}", " ", "Regex"), {"type": "NFC"}]
    fields = {"normalizer": {"type": "Sequence", "normalizers": steps}, "post_processor": template([SEQUENCE])}
    assert refusal("model/tokenizer.json", tmp_path, **fields) == ""


def test_growth_behind_escaped_letters(tmp_path):
    reader = READERS["model/tokenizer.json"]
    reader.write(tmp_path)
    normalizer = {"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 12}
    whole = {**json.loads((tmp_path / "tokenizer.json").read_bytes()), "normalizer": normalizer}
    data = hostile.dump(whole).replace(b'"Replace"', b'"Re\\u0070lace"')
    assert "1,000,000,000,000 times longer" in judge(reader, tmp_path, data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_max_length": {}}, "tokenizer file in the folder, cannot be read: download it again (TypeError"),
        ({"extra_special_tokens": [f"t{i}" for i in range(10_001)]}, "more than 10,000 special tokens"),
        ({"extra_special_tokens": {f"t{i}": "a" for i in range(10_001)}}, "more than 10,000 special tokens"),
        ({f"t{i}_token": f"t{i}" for i in range(10_001)}, "more than 10,000 special tokens"),
        ({"bos_token": {"content": 5}}, "tokenizer.json, or another tokenizer file"),
        ({"chat_template": 5}, ""),
    ],
)
def test_what_a_tokenizer_config_is_refused_for(fields, message, tmp_path):
    assert message in refusal("model/tokenizer_config.json", tmp_path, **fields)


def test_a_text_that_is_none(tmp_path):
    hostile.write_model(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    with pytest.raises(ValueError, match=f"the tokenizer {tmp_path} cannot encode this text"):
        tokenizer.encode("\ud800")
    tokenizer.hf.chat_template = "{{ messages[0].content }}{{ '\\ud800' }}"
    with pytest.raises(ValueError, match="cannot encode this text"):
        tokenizer.chat(hostile.USER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + b"IQ=\xff 259\n", "lines that are not a token and its rank"),
        (lambda data: data + b"IQ==\n", "lines that are not a token and its rank"),
        (lambda data: data + b"IQ== 1 2\n", "lines that are not a token and its rank"),
        (lambda data: data + b"YWE= x\n", "lines that are not a token and its rank"),
        (lambda data: data + b"YWE= 300\n", "missing or duplicate tokens"),
        (lambda data: data + b"YWE= -1\n", "missing or duplicate tokens"),
        (lambda data: data + b"IQ== 259\n", "missing or duplicate tokens"),
        (lambda data: data[:1000], "download it again"),
        (lambda data: data + b"YWFh" * 43 + b" 259\n", "has a token of more than 128 bytes"),
        (lambda data: data[1:], "sentencepiece"),
    ],
)
def test_what_a_tokenizer_model_is_refused_for(change, message, tmp_path):
    reader = READERS["tiktoken/tokenizer.model"]
    reader.write(tmp_path)
    said = judge(reader, tmp_path, change((tmp_path / "tokenizer.model").read_bytes()))
    assert message in said or "cannot be read" in said


# Large files


def test_many_entries_take_their_time_and_room_and_no_more(tmp_path, caplog):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{i}": entry for i in range(3000)} | {"b": 1}).encode()
    weights = len(text).to_bytes(8, "little") + text
    assert "the entry of 'b' is invalid" in judge(READERS["model/model.safetensors"], tmp_path, weights)
    name = len(text := b'{"%s": 1}' % (b"x" * 100_000)).to_bytes(8, "little") + text
    assert "x…' is invalid" in judge(READERS["model/model.safetensors"], tmp_path, name)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(5000)}}
    assert "of its 5000 shards" in judge(READERS["shards/model.safetensors.index.json"], tmp_path, hostile.dump(index))
    refusal("model/config.json", tmp_path, num_hidden_layers=0, **{f"x{i}" * 99: "a" for i in range(5000)})
    config = json.loads((tmp_path / "config.json").read_text())
    models.llama3.Config.from_hf({**config, "num_hidden_layers": 2})
    assert caplog.text.endswith(" and 4980 more\n")
    assert len(caplog.text) < 3_000


def test_layers_that_no_tensor_belongs_to(tmp_path):
    assert "missing: 17982 (model.layers.2.input" in refusal("model/config.json", tmp_path, num_hidden_layers=2000)
    said = refusal("model/config.json", tmp_path, hidden_size=2**30)
    assert "model.embed_tokens.weight [24, 8] instead of [24, 1073741824]" in said


def test_the_index_of_a_repository(tmp_path):
    """Read before the download, by other code."""
    path = tmp_path / "model.safetensors.index.json"
    for data in (
        b"[" * 100_000,
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": [1]}}',
        b'{"weight_map": 3}',
        b"\xff",
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="weight_map"):
            hub._shards(path)
    path.write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(ValueError, match=r"names 'x{100}…': jaxlm reads safetensors only"):
        hub._shards(path)


# The command line


COMMANDS = [
    ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("config.json", {"hidden_size": 10**12}, "hidden_size is 1000000000000"),
    ("config.json", {"rope_theta": [0]}, "rope_theta is [0]"),
    ("config.json", {"model_type": {}}, "model_type {} is not supported"),
    ("model.safetensors", b"\xff" * 99, "its header should have"),
    ("model.safetensors.index.json", b"[" * 10_000, "is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "data", "message"), COMMANDS)
def test_commands_end_with_one_message(file, data, message, tmp_path, capsys):
    hostile.write_model(tmp_path)
    if file.endswith("index.json"):
        (tmp_path / "model.safetensors").unlink()
    path = tmp_path / file
    path.write_bytes(data if isinstance(data, bytes) else hostile.dump({**checkpoint_files.LLAMA, **data}))
    for command in (["generate", "-m", str(tmp_path), "Hi"], ["info", str(tmp_path)]):
        assert main(command) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("jaxlm: ") == 1
        assert message in said.err
        assert "Traceback" not in said.err
        assert "please report" not in said.err


def test_what_info_tells_of_odd_configs(tmp_path, capsys):
    path = tmp_path / "alone.json"
    for fields in ({"text_config": None}, {"text_config": False}, {"dtype": []}, {"num_hidden_layers": 2000}):
        path.write_bytes(hostile.dump({**checkpoint_files.LLAMA, **fields}))
        assert main(["info", str(path)]) == 0
    assert "layers × 2000" in capsys.readouterr().out


def test_a_hostile_template_on_the_command_line(tmp_path):
    hostile.write_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    command = [sys.executable, "-m", "jaxlm", "generate", "-m", str(tmp_path), "Hi"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "jaxlm: the chat template cannot render these messages: it exceeds the limit" in done.stderr
    assert "Traceback" not in done.stderr


def test_families_are_all_here():
    assert {models.family_of(config["model_type"]) for config in CONFIGS.values()} == set(models.FAMILIES.values())
