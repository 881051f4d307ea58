"""Cost of structured output: masks on the host, and their use on the device, beside a decode step.

    python benchmarks/structured.py TOKENIZER [--vocab 151936] [--model MODEL] [--random-weights qwen3-0.6b]

The first table has the masks of JSON texts that follow four schemas, token by token as TOKENIZER splits them. The
second is for models that write JSON: MODEL, and random weights with TOKENIZER. Two loops take turns, token by token:
one free, one that follows a schema. A step is a forward pass, the argmax and its transfer. The masks are computed while
the forward pass runs.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlm
from jaxlm.bench import sources
from jaxlm.bench.cases import Case
from jaxlm.bench.measure import Jaxlm
from jaxlm.bench.random_model import random_model
from jaxlm.checkpoint.source import ModelSource
from jaxlm.devices import hardware
from jaxlm.inference import structured
from jaxlm.processing.tokenizer import Tokenizer

STRING, NUMBER = {"type": "string"}, {"type": "number"}
NODE = {"$ref": "#/$defs/node"}
STEPS = 32  # decode steps of which the mean is taken


def array(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def record(**properties: Any) -> dict[str, Any]:
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


ITEM = record(title={"type": "string", "maxLength": 80}, amount={"type": "integer", "minimum": 1}, price=NUMBER)
# name -> (schema, a value that follows it)
CASES: dict[str, tuple[Any, Any]] = {
    "any object": (True, {
        "id": 17, "title": "A walk in the park", "open": None, "tags": ["short", "2026", True],
        "at": {"lat": 52.5163, "lon": 13.3777, "note": "by the gate, \"left\" of the café\nsecond line"}}),
    "person": (record(
        name=STRING, age={"type": "integer", "minimum": 0, "maximum": 130}, email={"type": "string", "format": "email"},
        birthday={"type": "string", "format": "date"}, languages=array(STRING), height=NUMBER,
        married={"type": ["boolean", "null"]}), {
        "name": "Käthe O'Neill", "age": 41, "email": "kathe.oneill@example.org", "birthday": "1985-03-09",
        "languages": ["German", "English", "日本語"], "height": 1.72, "married": None}),
    "invoice": (record(
        number={"type": "string", "pattern": "^INV-[0-9]{4,8}$"}, currency={"enum": ["EUR", "USD", "JPY"]},
        items=array(ITEM, minItems=1, maxItems=50), total=NUMBER), {
        "number": "INV-20261130", "currency": "EUR", "items": [
            {"title": "Ball bearing, 608ZZ", "amount": 12, "price": 1.15},
            {"title": "Shipping and handling", "amount": 1, "price": 4.9}], "total": 18.7}),
    "tree": ({**record(root=NODE), "$defs": {"node": record(word=STRING, children=array(NODE))}}, {
        "root": {"word": "and", "children": [
            {"word": "or", "children": [{"word": "not", "children": []}]}, {"word": "xor", "children": []}]}}),
}  # fmt: skip


def summary(seconds: list[float]) -> str:
    us = np.asarray(seconds) * 1e6
    return f"{us.mean():,.0f} | {np.median(us):,.0f} | {np.percentile(us, 99):,.0f} | {us.max():,.0f}"


def table(*names: str) -> None:
    print("\n| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")


def masks(tokenizer: Tokenizer, vocab: int, rounds: int = 20) -> None:
    """Prints a row for each schema. Every round begins a new answer: what an earlier one computed is not reused."""
    begin = time.perf_counter()
    structured.compile_grammar(tokenizer, vocab, schema=True)
    print(f"V = {vocab:,}; first compile_grammar: {time.perf_counter() - begin:.2f} s")
    table("schema", "compile, ms", "masks", "mask, us: mean", "median", "p99", "largest", "accept, us: mean")
    every: list[float] = []
    for name, (schema, value) in CASES.items():
        begin = time.perf_counter()
        grammar = structured.compile_grammar(tokenizer, vocab, schema=schema)
        compiled, taken, accepted = time.perf_counter() - begin, [], []
        for n in range(rounds):
            text = json.dumps(value, ensure_ascii=False, indent=2 if n % 2 else None)
            constraint = grammar.start()
            for token in tokenizer.encode(text, add_special_tokens=False):
                a = time.perf_counter()
                mask = constraint.mask()
                b = time.perf_counter()
                constraint.accept(token)
                accepted.append(time.perf_counter() - b)
                taken.append(b - a)
                assert mask[token // 32] >> np.uint32(token % 32) & 1, "a token of the text is not in the mask"
            assert constraint.finished
        every += taken
        accept = statistics.mean(accepted) * 1e6
        print(f"| {name} | {compiled * 1e3:.1f} | {len(taken)} | {summary(taken)} | {accept:.1f} |")
    print(f"| all | | {len(every)} | {summary(every)} | |")


class Loop:
    """Writes greedily, a token for each row at a time. Row i follows schema i; an answer that ends begins again."""

    def __init__(self, model: jaxlm.Model, tokenizer: Tokenizer, batch: int, follows: bool):
        self.model, self.vocab, self.at = model, model.config.V, 0
        options = hardware.COMPILER_OPTIONS.get(model.device.platform)  # those of jaxlm.stream
        forward = lambda weights, kv, tokens, pos: model.forward(tokens, weights, kv, pos)  # noqa: E731
        self.forward = jax.jit(forward, donate_argnums=1, compiler_options=options)
        self.kv, self.masks = model.init_kv(batch, 512), list[float]()
        self.tokens = np.tile(tokenizer.encode("Here is the JSON:\n"), (batch, 1)).astype(np.int32)
        schemas = [schema for schema, _ in CASES.values()]
        grammars = (structured.compile_grammar(tokenizer, self.vocab, schema=schemas[i % 4]) for i in range(batch))
        self.grammars = list(grammars) if follows else []
        self.rows = [grammar.start() for grammar in self.grammars]

    def step(self) -> float:
        """Seconds of a step."""
        begin = time.perf_counter()
        pos = np.tile(np.arange(self.at, self.at + self.tokens.shape[1], dtype=np.int32), (len(self.tokens), 1))
        logits, self.kv = self.forward(self.model.weights, self.kv, self.tokens, pos)
        self.at += self.tokens.shape[1]
        if self.rows:
            before = time.perf_counter()
            bits = structured.batch_masks(self.rows, self.vocab)
            self.masks.append(time.perf_counter() - before)
            self.tokens = np.asarray(masked_argmax(logits, bits))
        else:
            self.tokens = np.asarray(argmax(logits))
        for i, row in enumerate(self.rows):
            row.accept(self.tokens[i, 0])
            self.rows[i] = self.grammars[i].start() if row.finished else row
        return time.perf_counter() - begin


@jax.jit
def argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits[:, -1], axis=1, keepdims=True).astype(jnp.int32)


@jax.jit
def masked_argmax(logits: jax.Array, bits: jax.Array) -> jax.Array:
    return jnp.argmax(structured.apply_mask(logits[:, -1], bits), axis=1, keepdims=True).astype(jnp.int32)


def beside_a_step(model: jaxlm.Model, tokenizer: Tokenizer, max_tokens: int) -> None:
    for batch in (1, 8):
        runner, case = Jaxlm(model), Case("decode", STEPS, 0, batch)
        prompts = case.prompts(model.config.V)
        engine = min(runner.run(case, prompts).seconds for _ in range(4)) / STEPS
        loops = [Loop(model, tokenizer, batch, follows) for follows in (False, True)]
        pairs = [[loop.step() for loop in loops] for _ in range(max_tokens)][3:]  # the first ones compile
        free, following = map(statistics.median, zip(*pairs))
        more = statistics.median(b - a for a, b in pairs)
        speeds = (
            f"{engine * 1e3:.1f} | {free * 1e3:.1f} | {following * 1e3:.1f} | {more * 1e3:+.2f} ({more / free:+.1%})"
        )
        print(f"| {model.source} | {model.config.V:,} | {batch} | {speeds} | {summary(loops[1].masks[3:])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--vocab", type=int, help="width of the logits; default: the tokenizer's ids")
    parser.add_argument("--model")
    parser.add_argument("--random-weights", metavar="NAME", help="shape of a published model, in bfloat16")
    parser.add_argument("--max-tokens", type=int, default=100)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    assert tokenizer is not None
    masks(tokenizer, args.vocab or tokenizer.vocab_size)
    if args.model or args.random_weights:
        table("model", "V", "B", "step of jaxlm.stream, ms", "step of the loop, ms", "with masks", "difference",
              "masks of B rows, us: mean", "median", "p99", "largest")  # fmt: skip
    if args.model:
        model = jaxlm.load(args.model)
        beside_a_step(model, model.tokenizer, args.max_tokens)
    if args.random_weights:
        shape = sources.find(ModelSource(args.random_weights))
        beside_a_step(random_model(shape, "bfloat16"), tokenizer, args.max_tokens)


if __name__ == "__main__":
    main()
