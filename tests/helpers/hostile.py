"""Files from strangers: hostile ones made from sound ones, and the judge of what reading them may do.

READERS has a line for every kind of file. `python tests/checkpoint/fuzz.py 300` reads hostile files for 300 seconds.
"""

import base64
import json
import math
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from helpers import checkpoint_files, gguf_writer
from helpers.hostile_templates import templates
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import CONFIGS, FULL, SLIDING
from jaxlm import models
from jaxlm.checkpoint.safetensors import read_index, read_into, read_json
from jaxlm.inference.prompts import stop_ids
from jaxlm.inference.requests import resolve
from jaxlm.inference.sampling_params import unsupported
from jaxlm.loading import load
from jaxlm.nn import params
from jaxlm.processing.detokenizer import TextStream, byte_alphabet
from jaxlm.processing.tokenizer import Tokenizer

ERRORS = (ValueError, OSError, MemoryError)
SECONDS = 5
USER = [{"role": "user", "content": "Hi there"}]


# What is read


class Reader(NamedTuple):
    """A kind of file: its name, what puts a sound one and all beside it into a folder, what reads it and uses what it
    has read, and words of which one must stand in every error message where its name does not."""

    file: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    names: tuple[str, ...] = ()


def write_model(folder: Path) -> None:
    checkpoint_files.folder(folder, checkpoint_files.LLAMA, checkpoint_files.tensors())
    tokenizer_of(TEMPLATE).hf.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))


def write_shards(folder: Path) -> None:
    checkpoint_files.folder(folder, checkpoint_files.LLAMA, checkpoint_files.tensors(), shards=2)


def write_tiktoken(folder: Path) -> None:
    tokens = [bytes([i]) for i in (*range(33, 256), *range(33))] + [b"ab", b"abc", b"hello"]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")


def write_gguf(folder: Path) -> None:
    tokens = [*byte_alphabet(), "<s>", "</s>", "ab"]
    metadata, tensors = gguf_writer.tiny_file("llama3", hidden_size=32, intermediate_size=32, vocab_size=len(tokens))
    metadata |= {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257, "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    tensors["rope_freqs.weight"] = gguf_writer.Raw(0, (4,), gguf_writer.rope_factors(1e4, 8, 8, 1, 4, 8192).tobytes())
    gguf_writer.write(folder / "model.gguf", metadata, tensors)
    read_gguf(folder)  # the memory of imports is not the file's


def write_config(folder: Path) -> None:
    """Nothing beside it, and every field that any family reads."""
    local = {"rope_type": "default", "rope_theta": 3e4}
    fields = {
        **CONFIGS["gemma3"], "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": True, "sliding_window_pattern": 2, "_sliding_window_pattern": 2, "dtype": "float32",
        "rope_local_base_freq": 1e4, "rope_parameters": {FULL: ROPES["yarn"], SLIDING: local}, "rope_scaling": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))


GENERATION = {
    "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.1,
    "max_new_tokens": 9, "stop_strings": ["a"], "eos_token_id": [1, 2], "bos_token_id": 0, "num_beams": 1,
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5, "partial_rotary_factor": 1.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 512},
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0,
             "beta_slow": 1.0, "truncate": True, "mscale": 1.0, "mscale_all_dim": 0.7},
}  # fmt: skip


def read_tensors(folder: Path) -> None:
    for tensor in read_index(folder).values():
        read_into(np.empty(tensor.nbytes, np.uint8), tensor, 0)


def read_model(folder: Path) -> None:
    model = load(folder, progress=False)
    stop_ids(model, resolve(model, {}))
    unsupported(model.generation_config)


def read_gguf(folder: Path) -> None:
    load(folder / "model.gguf", progress=False)


def read_config(folder: Path) -> None:
    use_config(read_json(folder / "config.json"))


def use_config(raw: dict[str, Any]) -> None:
    """What is made of a config before there are weights, and the numbers that a forward pass begins with."""
    family = models.family_of(raw.get("model_type"))
    cfg = family.Config.from_hf(raw)
    assert isinstance(hash(cfg), int)
    assert params.count(family.PARAMS, cfg) > 0
    for rope in (cfg.rope, getattr(cfg, "local_rope", cfg.rope)):
        assert all(np.isfinite(rope.frequencies(H).radians).all() for H in (2, 20, 256))
        assert math.isfinite(rope.amplitude)


def read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        return
    for name in ("vocab_size", "special_ids", "stop_ids", "thinking", "bos_id"):
        getattr(tokenizer, name)
    ids = tokenizer.encode("Hi there")
    stream = TextStream(tokenizer, ("e",), ids)
    assert isinstance("".join([*map(stream.push, ids), stream.flush()]), str)
    assert isinstance(tokenizer.decode(ids), str)
    if tokenizer.has_template:
        tokenizer.template_accepts("enable_thinking")
        tokenizer.chat(USER)


_TOKENIZER = ("the tokenizer", "tokenizer.json", "chat template")
READERS = {
    reader.write.__name__[6:] + "/" + reader.file: reader
    for reader in (
        Reader("model.safetensors", write_model, read_tensors),
        Reader("model.safetensors.index.json", write_shards, read_tensors, ("shards",)),
        Reader("config.json", write_model, read_model, ("model_type",)),
        Reader("config.json", write_config, read_config, ("model_type",)),
        Reader("generation_config.json", write_model, read_model),
        Reader("model.gguf", write_gguf, read_gguf),
        Reader("tokenizer.json", write_model, read_tokenizer, _TOKENIZER),
        Reader("tokenizer_config.json", write_model, read_tokenizer, _TOKENIZER),
        Reader("chat_template.jinja", write_model, read_tokenizer, _TOKENIZER),
        Reader("tokenizer.model", write_tiktoken, read_tokenizer, _TOKENIZER),
    )
}


def judge(reader: Reader, folder: Path, data: bytes) -> str:
    """Reads a folder in which the file has these bytes; -> the message of the error, "" for none."""
    (folder / reader.file).write_bytes(data)
    error, began = None, time.process_time()
    tracemalloc.start()
    try:
        reader.read(folder)
    except ERRORS as raised:
        error = raised
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - began < SECONDS, repr(error)
    # A template may make texts of sandbox.LIMIT characters, of four bytes at most, and copies of them.
    spare = 160 << 20 if reader.file == "chat_template.jinja" else 8 << 20
    assert peak < 64 * len(data) + spare, f"{peak:,} bytes"
    if error is None:
        return ""
    assert any(name in str(error) for name in (reader.file, *reader.names)), repr(error)[:1000]
    assert len(str(error)) < 3000, repr(error)[:1000]
    return str(error)


# What is hostile

DEEP = 1000
WORDS = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, 10**9, 10**12, 10**30, 10**400, -(10**400), 0.0,
    -0.5, 0.5, 1.5, 1e-300, 5e-324, 1e38, 1e308, math.inf, -math.inf, math.nan, "", "a", "\0", "\ud800", "1", "é" * 40,
    "x" * 5000, [], [0], [[]], ["a"], [None], [[[0]]], [1, 1.5, "a", None, {}], {}, {"a": 1}, {"": {}}, {"a": {"a": 0}},
    ["full_attention"], [10**400], [-1], {"rope_type": "linear"}, {"content": "a"}, [{"name": "a", "template": "b"}],
]  # fmt: skip
# What a parser may stumble over, written in place of a value.
TEXTS = [
    b"NaN", b"1e999", b"-1e999", b"-Infinity", b"1" * 4400, b"-0", b"0x10", b'"\\ud800"', b'"\xff"', b"\x00", b"nul",
    b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b"[" * 300 + b"]" * 300, b'{"a":' * 300 + b"1" + b"}" * 300,
    b"[" * 900 + b"]" * 900, b'{"a":' * 950 + b"1" + b"}" * 950, b'{"a":1,"a":2}', b'"' + b"\\u0000" * 9 + b'"', b"",
]  # fmt: skip

scalars = st.sampled_from(WORDS) | st.integers() | st.floats() | st.text(max_size=6)
values = st.sampled_from(WORDS) | st.recursive(
    scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=6), x, max_size=4), max_leaves=6
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value within a JSON value."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(way for key, part in below for way in paths(part, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at the end of a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def dump(value: Any) -> bytes:
    """JSON, with infinities as numbers that are too large, which every parser takes."""
    return re.sub(r"\bInfinity", "1e999", json.dumps(value)).encode()


@st.composite
def json_like(draw: Callable[..., Any], sound: Any) -> bytes:
    """JSON in which up to three values are exchanged or added."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(sound)))
        kind = draw(st.sampled_from(["value", "value", "text", "other"]))
        if kind == "text":
            return dump(replaced(sound, path, "@@@")).replace(b'"@@@"', draw(st.sampled_from(TEXTS)))
        new = draw(values)
        if kind == "other" and isinstance(sound, dict):
            names = [*sound, "x", "rope_scaling", "rope_parameters", "text_config", "layer_types"]
            sound = {**sound, draw(st.sampled_from(names)): new}
        else:
            sound = replaced(sound, path, new)
    return dump(sound)


_WORD = re.compile(rb'"[^"]*"|-?[0-9][0-9.e+-]*|true|false|null|[{}\[\]]')


@st.composite
def bytes_like(draw: Callable[..., Any], sound: bytes) -> bytes:
    """Bytes with a few of them changed, cut off, put in, left out, repeated, or exchanged for absurd lengths."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at, other = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        match draw(st.sampled_from(["flip", "cut", "put", "leave out", "repeat", "length", "word"])):
            case "flip":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[at:]
            case "put":
                data[at:at] = draw(st.binary(max_size=20))
            case "leave out":
                del data[at:other]
            case "repeat":
                data[at:at] = data[at:other][:2000]
            case "length":
                length = draw(st.sampled_from([0, 1, -1, 2**31, 2**63 - 1])).to_bytes(8, "little", signed=True)
                data[at : at + draw(st.integers(1, 8))] = length[: draw(st.integers(1, 8))]
            case "word" if found := list(_WORD.finditer(bytes(data[:20_000]))):
                word = draw(st.sampled_from(found))
                data[word.start() : word.end()] = draw(st.sampled_from([*TEXTS, b"-1", b"1e5", b"[]", b"{}", b"null"]))
    return bytes(data)


def hostile(name: str, sound: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, and what a sound file can be turned into."""
    kinds = [st.binary(max_size=200), bytes_like(sound)]
    if name.endswith(".json"):
        kinds += [values.map(dump), *[json_like(json.loads(sound))] * 3]
    if name.endswith(".jinja"):
        kinds += [templates.map(str.encode)] * 4
    return st.one_of(kinds)
