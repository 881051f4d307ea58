"""Structured output: every finished answer of random logits matches its schema, regular expression or grammar."""

import ast
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jsonschema
import llguidance.hf
import numpy as np
import pydantic
import pytest
from helpers import tiny_tokenizers
from helpers.gguf_writer import write
from helpers.json_schemas import random_schema
from helpers.tiny_chat import quick_compilation
from helpers.tiny_models import tiny

from jaxlm.inference import structured, token_bytes
from jaxlm.inference.engine import Engine
from jaxlm.inference.structured import Constraint, apply_mask, batch_masks, compile_grammar
from jaxlm.processing.tokenizer import Tokenizer

V = 333  # more than the tokenizers have, and not a multiple of 32
KINDS = ["byte_level", "byte_fallback", "byte_fallback_prefix", "gguf"]
masked = jax.jit(apply_mask)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_compilation():
        yield


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "gguf":
        return tiny_tokenizers.load(write(folder / "model.gguf", gguf_metadata(), {}))
    return tiny_tokenizers.load(tiny_tokenizers.write(request.param, folder))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A byte-level vocabulary of 298 tokens, with two stop tokens."""
    folder = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("byte_level"), eos_token="<|end|>")
    return tiny_tokenizers.load(folder, {"eos_token_id": [1, 3]})


def gguf_metadata() -> dict:
    """SentencePiece's, with byte fallback, a token of the user's, and blanks of the user's."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "<turn>",
        "▁▁",
        "▁",
        *"abcdefin",
        "ab",
        "▁a",
    ]
    kinds = [2, 3, 3, *[6] * 256, 4, 4, *[1] * 11]
    scores = [0.0] * 261 + [-float(i) for i in range(11)]
    names = {"model": "llama", "tokens": pieces, "token_type": kinds, "scores": scores, "add_space_prefix": False,
             "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in names.items()}


def width(tokenizer: Tokenizer) -> int:
    return max(V, tokenizer.vocab_size + 5)


def ids_of(mask: np.ndarray) -> list[int]:
    """The tokens of a mask, read bit by bit as its documentation says."""
    return [i for i in range(32 * len(mask)) if int(mask[i // 32]) >> (i % 32) & 1]


def closing_bias(tokenizer: Tokenizer, size: int) -> np.ndarray:
    """Added to random logits, so that answers end: what closes something is likely, blanks and escapes are not."""
    bias = np.zeros(size, np.float32)
    for i, token in enumerate(token_bytes.table(tokenizer, size, tokenizer.stop_ids)):
        first = token[:1]
        bias[i] = (
            5 * (first in (b'"', b"}", b"]", b")")) - 2 * (first in b" \n\t\\") - 3 * (max(token, default=0) > 127)
        )
    bias[list(tokenizer.stop_ids)] = 6
    return bias


@cache
def engine_of(size: int, bias: bytes) -> Engine:
    """Eight rows of a model whose logits are this bias."""
    model = tiny("llama3", vocab_size=size, tie_word_embeddings=False)
    model = replace(model, weights={**model.weights, "head": jnp.zeros_like(model.weights["head"])})
    added = jnp.asarray(np.frombuffer(bias, np.float32))
    return Engine(model, 8, length=512, logits_processors=[lambda logits: logits + added])


def generate(
    constraints: Sequence[Constraint], size: int, bias: np.ndarray, max_tokens: int = 400, seed: int = 0
) -> list[tuple[list[int], bool]]:
    """The tokens of requests with these constraints without their stop token, and whether the answer ended."""
    engine, stop = engine_of(size, bias.tobytes()), set(np.flatnonzero(bias == 6).tolist())
    options = {"max_tokens": max_tokens, "temperature": 1.0, "ignore_eos": True}
    requests = [
        engine.submit([5, n % 300], seed=seed + n, constraint=lambda c=c: c, **options)
        for n, c in enumerate(constraints)
    ]
    while engine.is_busy:
        engine.step()
    assert [request.error for request in requests] == [None] * len(requests)
    return [([t for t in request.tokens if t not in stop], request.finished == "stop") for request in requests]


def run(tokenizer: Tokenizer, starts: Sequence[Constraint], **options) -> Iterator[str]:
    """Texts of the answers that ended."""
    size = width(tokenizer)
    table = token_bytes.table(tokenizer, size, tokenizer.stop_ids)
    for tokens, ended in generate(starts, size, closing_bias(tokenizer, size), **options):
        if ended:
            text = b"".join(table[i] for i in tokens).decode()
            assert tokenizer.decode(tokens).removeprefix(" ") == text.removeprefix(" ")
            yield text


def validate(text: str, schema: dict) -> None:
    kind = jsonschema.Draft202012Validator
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def ended(schemas: Sequence[dict], answers: Sequence[tuple[list[int], bool]], at_least: int) -> list[Any]:
    """The schemas and answers of those that ended."""
    found = [(schema, answer) for schema, answer in zip(schemas, answers, strict=True) if answer[1]]
    assert len(found) >= at_least
    return found


class Inner(pydantic.BaseModel):
    x: int = 3


class Outer(pydantic.BaseModel):
    inner: Inner
    many: list[Inner]
    free: dict[str, int]


class Open(pydantic.BaseModel, extra="allow"):
    y: int


def test_the_fields_of_a_pydantic_model_are_the_only_ones(tokenizer) -> None:
    def accepts(schema: Any, text: str) -> bool:
        constraint = compile_grammar(tokenizer, V, schema=schema).start()
        try:
            for token in [*tokenizer.encode(text, add_special_tokens=False), min(tokenizer.stop_ids)]:
                constraint.accept(token)
        except ValueError:
            return False
        return True

    assert accepts(Outer, '{"inner": {"x": 1}, "many": [{"x": 2}], "free": {"z": 5}}')
    assert not accepts(Outer, '{"inner": {"x": 1, "z": 1}, "many": [], "free": {}}')
    assert not accepts(Outer, '{"inner": {"x": 1}, "many": [], "free": {}, "z": 1}')
    assert accepts(Open, '{"y": 1, "z": 1}')
    assert accepts({"type": "object", "properties": {"y": {"type": "integer"}}}, '{"y": 1, "z": 1}')
    with pytest.raises(ValueError, match="pydantic model class"):
        compile_grammar(tokenizer, V, schema=Inner(x=1))


def test_answers_match_200_schemas(tokenizer) -> None:
    """At least 95 % must end within 400 tokens; each of those is valid."""
    schemas = [random_schema(seed) for seed in range(200)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    starts = [compile_grammar(tokenizer, V, schema=schema).start() for schema in schemas]
    table = token_bytes.table(tokenizer, V, tokenizer.stop_ids)
    answers = generate(starts, V, closing_bias(tokenizer, V))
    for schema, (tokens, _) in ended(schemas, answers, at_least=190):
        text = b"".join(table[i] for i in tokens).decode()
        assert tokenizer.decode(tokens) == text
        validate(text, schema)


@pytest.mark.smoke
def test_answers_of_every_kind_of_tokenizer(any_tokenizer) -> None:
    schemas = [random_schema(seed) for seed in range(1000, 1016)]
    starts = [compile_grammar(any_tokenizer, width(any_tokenizer), schema=schema).start() for schema in schemas]
    size = width(any_tokenizer)
    answers = generate(starts, size, closing_bias(any_tokenizer, size))
    for schema, (tokens, _) in ended(schemas, answers, at_least=13):
        validate(any_tokenizer.decode(tokens), schema)


REGEXES = [
    "abc", "a|bc|", "[a-c]{2,5}", r"\d{3}-\d{4}", "(foo|bar)+", "x?y*z+", r"[A-Z]{2}\d{2}", "(red|green|blue)",
    r"\$\d+\.\d{2}", "[^a-z]{3}", "é+日{1,2}", r"\w{1,8}@\w{1,8}\.(com|org)", "(a(b(c)?)?)?d", r"-?(0|[1-9]\d{0,3})",
    "(yes|no|maybe)( not)?", r"\[(\d(,\d){0,3})?\]", "0x[0-9a-fA-F]{1,8}", r"(\d{1,3}\.){3}\d{1,3}", "a{3}b{2}",
    "[01]{8}", r"#[0-9a-f]{6}", "(the |a )?(cat|mat|hat)", r"[\x20-\x7e]{1,9}", "A.C", r"(?i)hello", "a/b\\\\c",
    "[\\[\\]]{2}", "(ab|abc)(cd|d)", "[a-z]+(-[a-z]+){0,2}", r"T\d{2}:\d{2}Z", "^hello$", r"[-+*/]\s\d",
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_regexes(tokenizer, regex) -> None:
    starts = [compile_grammar(tokenizer, V, regex=regex).start() for _ in range(4)]
    texts = list(run(tokenizer, starts))
    assert len(texts) >= 3
    for text in texts:
        assert re.fullmatch(regex, text)


EXPRESSION = r"""
start: sum
sum: product (("+" | "-") product)*
product: atom ("*" atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""
TABLE = 'start: row{2,3}\nrow: WORD ("," WORD){2} "\\n"\nWORD: /[a-z]{1,4}/'
CALL = 'start: "call " NAME " " args\nNAME: "add" | "sub"\nargs: %json {"type": "array", "items": {"type": "integer"}}'


def is_nested(text: str) -> bool:
    while "()" in text or "[]" in text:
        text = text.replace("()", "").replace("[]", "")
    return not text


@pytest.mark.parametrize(
    ("grammar", "is_right"),
    [
        (EXPRESSION, lambda text: isinstance(ast.literal_eval(repr(eval(text))), int)),
        (TABLE, lambda text: re.fullmatch("([a-z]{1,4},[a-z]{1,4},[a-z]{1,4}\n){2,3}", text)),
        (CALL, lambda text: text[:8] in ("call add", "call sub") and isinstance(json.loads(text[8:]), list)),
        ('start: pair+\npair: "(" pair* ")" | "[" pair* "]"', is_nested),
    ],
    ids=["expression", "table", "json", "nested"],
)
def test_answers_match_grammars(tokenizer, grammar, is_right) -> None:
    texts = list(run(tokenizer, [compile_grammar(tokenizer, V, grammar=grammar).start() for _ in range(8)]))
    assert len(texts) >= 6
    assert all(map(is_right, texts)), texts


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(min_length=1, max_length=12)
    zip: int = pydantic.Field(ge=10_000, lt=100_000)


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = pydantic.Field(ge=0, le=9)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    tricks: list[str] = pydantic.Field(max_length=2)


class Person(pydantic.BaseModel):
    name: str = "Ann"
    email: str | None = None
    home: Address
    pets: list[Cat | Dog] = pydantic.Field(max_length=2)
    main: Cat | Dog = pydantic.Field(discriminator="kind")


def test_answers_are_instances_of_pydantic_models(tokenizer) -> None:
    texts = list(run(tokenizer, [compile_grammar(tokenizer, V, schema=Person).start() for _ in range(16)]))
    assert len(texts) >= 14
    for text in texts:
        Person.model_validate_json(text)


def test_a_model_writes_json(tokenizer) -> None:
    """The logits of a tiny model instead of random ones. Unlikely blanks, so that it does not repeat them."""
    model, size = tiny("llama3", vocab_size=V), V
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["cat", "mat"]}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    constraint = compile_grammar(tokenizer, size, schema=schema).start()
    tokens = [5]
    while not constraint.finished and len(tokens) < 40:
        padded = jnp.asarray([tokens + [0] * (40 - len(tokens))], jnp.int32)
        logits = model.forward(padded, model.weights)[0][:, len(tokens) - 1] + closing_bias(tokenizer, size)
        tokens.append(int(masked(logits, constraint.mask()[None]).argmax()))
        constraint.accept(tokens[-1])
    validate(tokenizer.decode(tokens[1:]), schema)


# A finite language: what may follow can be listed.
LANGUAGE = ["the", "the cat", "the cat sat", "that", "on", "on the mat", "a", "日本", "日本語", "cat1", "cat2"]


def test_masks_are_the_tokens_that_may_follow(tokenizer) -> None:
    """For every prefix of a finite language, the mask has exactly the tokens that continue it; where one byte only can
    follow, at least one of them and no other."""
    table = token_bytes.table(tokenizer, V, tokenizer.stop_ids)
    words = [word.encode() for word in LANGUAGE]
    states = [(b"", compile_grammar(tokenizer, V, regex="|".join(LANGUAGE)).start())]
    seen = 0
    while states:
        prefix, constraint = states.pop()
        rest = [word[len(prefix) :] for word in words if word.startswith(prefix)]
        fits = [i for i, token in enumerate(table) if token and any(word.startswith(token) for word in rest)]
        stops = list(tokenizer.stop_ids) if b"" in rest else []
        found = ids_of(constraint.mask())
        text = [i for i in found if i not in tokenizer.stop_ids]
        assert sorted(set(found) - set(text)) == stops, prefix
        is_forced = len({word[:1] for word in rest}) == 1
        assert set(text) <= set(fits), prefix
        assert text or rest == [b""] if is_forced else sorted(text) == fits, prefix
        assert constraint.finished == (rest == [b""]), prefix
        for i in range(V):
            if i in fits:
                after = constraint.copy()
                after.accept(i)
                states.append((prefix + table[i], after))
            elif i not in stops:
                with pytest.raises(ValueError, match="not allowed"):
                    constraint.copy().accept(i)
        seen += 1
    assert seen > 60


def test_a_wrong_token_changes_nothing(tokenizer) -> None:
    constraint = compile_grammar(tokenizer, V, regex="a[bc]").start()
    first, second = (tokenizer.encode(text)[0] for text in "ab")
    before = constraint.mask()
    for token in (second, 1, 310, -1, V, 10**9):
        with pytest.raises(ValueError, match="token"):
            constraint.accept(token)
    np.testing.assert_array_equal(constraint.mask(), before)
    constraint.accept(first)
    constraint.accept(second)
    assert constraint.finished
    assert ids_of(constraint.mask()) == [1, 3]
    with pytest.raises(ValueError, match="token"):
        constraint.accept(second)
    constraint.accept(3)  # either stop token
    assert constraint.finished


def test_a_grammar_that_becomes_too_complex(tokenizer) -> None:
    """llguidance bounds the rules that may apply at one place. Its masks of an error would allow stop tokens."""
    rules = [f'r{i}: "xy" "{i}"' for i in range(3000)]
    text = "\n".join(["start: " + " | ".join(f"r{i}" for i in range(3000)), *rules])
    constraint = compile_grammar(tokenizer, V, grammar=text).start()
    with pytest.raises(ValueError, match=r"300. items"):
        constraint.accept(tokenizer.encode("x")[0])
    with pytest.raises(ValueError, match=r"300. items"):
        constraint.mask()
    assert not constraint.finished


def test_stop_tokens_are_allowed_where_an_answer_may_end(tokenizer) -> None:
    grammar = compile_grammar(tokenizer, V, regex="ab?")
    constraint, (a, b) = grammar.start(), (tokenizer.encode(text)[0] for text in "ab")
    assert ids_of(constraint.mask()) == [a]
    constraint.accept(a)
    assert not constraint.finished
    assert ids_of(constraint.mask()) == sorted([1, 3, b])
    constraint.accept(1)
    assert constraint.finished
    one = compile_grammar(tokenizer, V, regex="ab?", stop_ids=[3]).start()
    one.accept(a)
    assert ids_of(one.mask()) == sorted([3, b])


def test_special_and_added_tokens_and_padding_are_never_text(any_tokenizer) -> None:
    """Any text at all: every id in the mask decodes to text."""
    size = width(any_tokenizer)
    found = ids_of(compile_grammar(any_tokenizer, size, regex=r"[\s\S]*").start().mask())
    added = any_tokenizer.hf.added_tokens_decoder
    special = {i for i, token in added.items() if token.special or token.content.strip("▁")}
    assert special
    assert not (set(found) & special) - set(any_tokenizer.stop_ids)
    assert max(found) < any_tokenizer.vocab_size < size
    assert set(any_tokenizer.stop_ids) <= set(found)
    # All others, but for bytes that begin no character: 0x80 to 0xC1, and from 0xF5.
    others = set(any_tokenizer.hf.get_vocab().values()) - special - set(found)
    table = token_bytes.table(any_tokenizer, size)
    assert all(0x80 <= table[i][0] <= 0xC1 or table[i][0] >= 0xF5 for i in others)


def test_blanks_that_were_added_are_text(tmp_path) -> None:
    tokenizer = tiny_tokenizers.load(write(tmp_path / "model.gguf", gguf_metadata(), {}))
    two, turn = tokenizer.hf.convert_tokens_to_ids(["▁▁", "<turn>"])
    table = token_bytes.table(tokenizer, V)
    assert (table[two], table[turn]) == (b"  ", b"\xff<turn>")


def test_a_grammar_can_name_a_special_token(tokenizer) -> None:
    constraint = compile_grammar(tokenizer, V, grammar='start: <think> /[a-z]{2}/ </think> "x"').start()
    think, end = tokenizer.hf.convert_tokens_to_ids(["<think>", "</think>"])
    assert ids_of(constraint.mask()) == [think]
    for token in (think, *tokenizer.encode("sa"), end, *tokenizer.encode("x")):
        assert token in ids_of(constraint.mask())
        constraint.accept(token)
    assert constraint.finished
    everything = ids_of(compile_grammar(tokenizer, V, grammar='start: <[*]> "x"').start().mask())
    assert max(everything) < tokenizer.vocab_size
    assert not {1, 3} & set(everything)  # an answer of this grammar cannot end here


def test_bytes_of_tokens_are_those_of_llguidance(any_tokenizer) -> None:
    """llguidance's own reading of the tokenizer, for all tokens that are text."""
    theirs = llguidance.hf.from_tokenizer(any_tokenizer.hf)
    blanks = {i for i, token in any_tokenizer.hf.added_tokens_decoder.items() if not token.content.strip("▁ ")}
    ours = token_bytes.table(any_tokenizer, any_tokenizer.vocab_size)
    text = [i for i, token in enumerate(ours) if not token.startswith(b"\xff") and i not in blanks]
    assert len(text) > 250
    assert [ours[i] for i in text] == [theirs.decode_bytes([i]) for i in text]


def test_masks_of_a_published_tokenizer(shared) -> None:
    """Qwen 3: V is a multiple of 32 and larger than the tokenizer; JSON as the tokenizer splits it is allowed."""
    tokenizer = tiny_tokenizers.load_once(shared / "tokenizers" / "qwen3")
    schema = {"properties": {"first_name": {"type": "string"}, "tags": {"type": "array"}}, "type": "object",
              "required": ["first_name", "tags"]}  # fmt: skip
    grammar = compile_grammar(tokenizer, 151936, schema=schema)
    for text in (
        '{"first_name":"Ann \\"B\\" 日本","tags":[]}',
        '{\n  "first_name": "",\n  "tags": [\n    1, {}\n  ]\n}',
    ):
        constraint = grammar.start()
        for token in tokenizer.encode(text):
            mask = constraint.mask()
            assert mask.shape == (4748,)
            assert mask[token // 32] >> np.uint32(token % 32) & 1, tokenizer.decode([token])
            constraint.accept(token)
        assert constraint.finished
        assert np.flatnonzero(constraint.mask()).tolist() == [151645 // 32]


def test_blanks_are_bounded(tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}

    def accepts(text: str, options: dict | None = None) -> bool:
        content = schema if options is None else {**schema, "x-guidance": options}
        constraint = compile_grammar(tokenizer, V, schema=content).start()
        try:
            for token in tokenizer.encode(text):
                constraint.accept(token)
        except ValueError:
            return False
        return constraint.finished

    spaced, two, tabs = '{"a": [1, 2]}', '{"a":  [1,2]}', '{"a":[\n\t\t1]}'
    assert accepts('{"a":[1,2]}')
    assert accepts(spaced)
    assert accepts(json.dumps({"a": [1, 2]}, indent=2))
    assert accepts(tabs)
    assert not accepts(two)
    assert not accepts('{"a":\n\n[1]}')
    assert not accepts('{"a":\n' + " " * 21 + "[1]}")
    assert accepts(two, {"whitespace_flexible": True})
    assert not accepts(spaced, {"whitespace_flexible": False})
    assert accepts(two, {"whitespace_pattern": " {2}"})
    assert accepts(spaced, {"lenient": True})  # another option keeps the bound
    assert not accepts(two, {"lenient": True})


def test_true_is_any_json_object(tokenizer) -> None:
    texts = list(run(tokenizer, [compile_grammar(tokenizer, V, schema=True).start() for _ in range(16)]))
    assert len(texts) >= 12
    assert all(isinstance(json.loads(text), dict) for text in texts)
    text = next(run(tokenizer, [compile_grammar(tokenizer, V, schema='{"type": "boolean"}').start()]))
    assert text in ("true", "false")


def test_properties_come_in_the_order_of_the_schema(tokenizer) -> None:
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in "zay"}, "required": list("ayz")}
    text = next(run(tokenizer, [compile_grammar(tokenizer, V, schema=schema).start()]))
    assert list(json.loads(text))[:3] == list("zay")


def test_cut_answers_are_prefixes(tokenizer) -> None:
    """An answer that a token limit cut can be replayed and completed to a valid one."""
    schemas = [random_schema(seed) for seed in range(300, 324)]
    grammars = [compile_grammar(tokenizer, V, schema=schema) for schema in schemas]
    bias = closing_bias(tokenizer, V)
    cut = generate([grammar.start() for grammar in grammars], V, bias, max_tokens=7)
    table, completed = token_bytes.table(tokenizer, V, tokenizer.stop_ids), 0
    for schema, grammar, (tokens, has_ended) in zip(schemas, grammars, cut):
        if has_ended:
            continue
        assert len(tokens) == 7
        constraint = grammar.start()
        for token in tokens:
            constraint.accept(token)
        ((rest, ended),) = generate([constraint], V, bias)
        if ended:
            validate(b"".join(table[i] for i in tokens + rest).decode(), schema)
            completed += 1
    assert completed >= 15


def test_copies_are_independent(tokenizer) -> None:
    first = compile_grammar(tokenizer, V, regex="(ab|ac)d").start()
    a, b, c, d = tokenizer.encode("abcd")
    first.accept(a)
    second = first.copy()
    first.accept(b)
    assert ids_of(first.mask()) == [d]
    assert ids_of(second.mask()) == sorted([b, c])
    second.accept(c)
    second.accept(d)
    assert second.finished
    assert not first.finished


class Countdown:
    """A constraint of a user: only token 7, `left` times, then token 1."""

    def __init__(self, left: int):
        self.left = left

    @property
    def finished(self) -> bool:
        return self.left == 0

    def mask(self) -> np.ndarray:
        return structured.pack(np.arange(V) == (7 if self.left else 1))

    def accept(self, token: int) -> None:
        if token != 7:
            raise ValueError("only 7")
        self.left -= 1

    def copy(self) -> "Countdown":
        return Countdown(self.left)


def test_a_constraint_of_the_user_in_a_batch_with_others(tokenizer) -> None:
    grammar = compile_grammar(tokenizer, V, regex="[0-9]{3}")
    rows: list[Constraint] = [Countdown(5), grammar.start(), Countdown(2)]
    assert all(isinstance(row, Constraint) for row in rows)
    (first, _), (digits, _), (last, _) = generate(rows, V, closing_bias(tokenizer, V))
    assert (first, last) == ([7] * 5, [7] * 2)
    assert re.fullmatch("[0-9]{3}", tokenizer.decode(digits))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, V])
def test_apply_mask(vocab) -> None:
    rng = np.random.default_rng(vocab)
    logits, allowed = rng.normal(size=(3, vocab)).astype(np.float32), rng.random((3, vocab)) < 0.5
    bits = np.stack([structured.pack(row) for row in allowed])
    assert bits.shape == (3, -(-vocab // 32))
    assert bits.dtype == np.uint32
    assert [[int(row[i // 32]) >> (i % 32) & 1 for i in range(vocab)] for row in bits] == allowed.astype(int).tolist()
    with jax.numpy_dtype_promotion("strict"):
        out = jax.jit(apply_mask)(logits, bits)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.where(allowed, logits, -np.inf))
    all_rows = np.tile(structured.all_bits(vocab), (3, 1))
    np.testing.assert_array_equal(masked(logits, all_rows), logits)
    np.testing.assert_array_equal(batch_masks([None] * 3, vocab), all_rows)


def test_a_mask_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1.*uint32"):
        batch_masks([None, Countdown(1)], V + 32)


def test_a_grammar_is_compiled_once_for_all_threads(tmp_path) -> None:
    tokenizer = tiny_tokenizers.load(tiny_tokenizers.byte_level(tmp_path, eos_token="<|end|>"))
    made = []
    original = token_bytes.table
    vocabularies, results = [], []

    def work(seed: int) -> None:
        grammar = compile_grammar(tokenizer, V, schema=random_schema(seed % 3))
        vocabularies.append(grammar._vocabulary)
        results.append((seed % 3, generate([grammar.start()], V, bias)[0]))

    bias = closing_bias(tokenizer, V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_bytes, "table", lambda *args: made.append(1) or time.sleep(0.1) or original(*args))
        threads = [threading.Thread(target=partial(work, seed)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 1
    assert len({id(v) for v in vocabularies}) == 1
    assert len(results) == 12
    assert all(result == dict(results)[seed] for seed, result in results)


def test_caches_are_bounded(tokenizer) -> None:
    grammars = [compile_grammar(tokenizer, V, regex=f"a{{{n}}}") for n in range(1, structured.MAX_GRAMMARS + 10)]
    assert len(grammars[0]._vocabulary.grammars) == structured.MAX_GRAMMARS
    assert compile_grammar(tokenizer, V, regex=f"a{{{structured.MAX_GRAMMARS}}}") in grammars
    for size in range(V, V + 10):
        compile_grammar(tokenizer, size, regex="a")
    assert len(structured._vocabularies[tokenizer]) <= 3


@pytest.mark.parametrize(
    ("given", "noun"),
    [
        ({}, "one of schema"),
        ({"schema": True, "regex": "a"}, "one of schema"),
        ({"schema": {"not": {"type": "string"}}}, "not"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "lenient"),
        ({"schema": {"type": "string", "format": "color"}}, "color"),
        ({"schema": {"type": "objekt"}}, "objekt"),
        ({"schema": {"$ref": "#/$defs/none"}}, "none"),
        ({"schema": {"type": "string", "minLength": "3"}}, "minLength"),
        ({"schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
        ({"schema": {"type": "string", "pattern": "^(?!a)b$"}}, "lookahead"),
        ({"schema": {"const": float("nan")}}, "JSON"),
        ({"schema": {"const": {1, 2}}}, "JSON"),
        ({"schema": "{'a': 1}"}, "JSON"),
        ({"schema": 3}, "dict"),
        ({"schema": False}, "dict"),
        ({"schema": [1]}, "dict"),
        ({"regex": "a("}, "unclosed"),
        ({"regex": "(?=a)b"}, "lookahead"),
        ({"regex": r"\bab"}, "lookahead"),
        ({"regex": r"[^\s\S]"}, "no text"),
        ({"regex": ""}, "empty"),
        ({"regex": 3}, "regex"),
        ({"grammar": "start: name"}, "name"),
        ({"grammar": "start: A\nA: /a/ & /b/"}, "no text"),
        ({"grammar": "this is no grammar"}, "grammar"),
    ],
)
def test_what_is_wrong_is_named(tokenizer, given, noun, capfd) -> None:
    with pytest.raises(ValueError, match=noun) as error:
        compile_grammar(tokenizer, V, **given)
    assert "\n" not in str(error.value)
    assert "<state>" not in str(error.value)
    assert not any(capfd.readouterr())


def test_lenient_schemas_name_what_is_not_enforced(tokenizer, caplog) -> None:
    compile_grammar(tokenizer, V, schema={"type": "object", "not": {}, "x-guidance": {"lenient": True}})
    assert "not enforced" in caplog.text
    assert '"not"' in caplog.text


def test_tokenizers_that_are_refused(tokenizer, tmp_path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    with pytest.raises(ValueError, match="stop token"):
        compile_grammar(tokenizer, V, regex="a", stop_ids=[])
    pieces = {"[UNK]": 0, "[SEP]": 1, **{f"##{c}": 2 + i for i, c in enumerate('abcdeiknomprtux0123456789:{}[],.-+"')}}
    backend = Backend(models.WordPiece({**pieces, **{p[2:]: 50 + i for p, i in pieces.items() if p[0] == "#"}}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tiny_tokenizers.save(backend, tmp_path, {"eos_token": "[SEP]"})
    with pytest.raises(ValueError, match="WordPiece"):
        compile_grammar(tiny_tokenizers.load(tmp_path), V, regex="a")


def test_a_vocabulary_that_lacks_a_character(tmp_path) -> None:
    """Without byte fallback, nothing can be written that needs a character without a token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    pieces = {piece: i for i, piece in enumerate(["<unk>", "</s>", "▁", *"abc"])}
    backend = Backend(models.BPE(pieces, [], unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "</s>"])
    tiny_tokenizers.save(backend, tmp_path, {"unk_token": "<unk>", "eos_token": "</s>"})
    tokenizer = tiny_tokenizers.load(tmp_path)
    with pytest.raises(ValueError, match="no text"):
        compile_grammar(tokenizer, 6, schema=True)
    constraint = compile_grammar(tokenizer, 6, regex="ab[{]").start()
    for token in (3, 4):
        constraint.accept(token)
    with pytest.raises(ValueError, match="no token"):
        constraint.mask()
