"""Structured output: answers that match a JSON schema, a regular expression or a grammar (constrained decoding).

`compile_grammar` compiles a schema once. `Grammar.start` returns a `Constraint` for one answer: `mask` has the tokens
that may follow, `accept` takes the token that was sampled. Masks are computed on the host, while the device runs the
model. `apply_mask` sets the logits of all other tokens to -inf.

    grammar = compile_grammar(model.tokenizer, model.config.V, schema={"type": "object"})
    constraint = grammar.start()
    while not constraint.finished:
        logits = apply_mask(logits, constraint.mask()[None])
        ...
        constraint.accept(token)

The grammars are those of llguidance. Any object with the methods of `Constraint` can take the place of one.
"""

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxlm.checkpoint.errors import explain_missing_package
from jaxlm.inference import token_bytes

if TYPE_CHECKING:
    from jaxlm.processing.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
ALL = np.uint32(0xFFFFFFFF)  # a word of a mask that allows its 32 tokens
# Blanks that are allowed between the parts of JSON: nothing, one space, or a line break with an indentation. Without a
# bound a small model may write blanks until its token limit. Without any blanks it writes other texts than it learned.
WHITESPACE = r" |\n[ \t]{0,20}"
MAX_GRAMMARS = 32  # compiled grammars that are kept for each tokenizer


@runtime_checkable
class Constraint(Protocol):
    """What may follow in one answer. The engine calls `mask`, samples a token, and passes it to `accept`.

    A class with these methods can be passed instead of a grammar. The methods of one object are not called from two
    threads at a time.
    """

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, and nothing but a stop token may follow."""
        ...

    def mask(self) -> np.ndarray:
        """The tokens that may be next, [ceil(V / 32)] uint32. Bit `i % 32` of word `i // 32` is set for token i.

        The bits of stop tokens are set where the answer may end. Bits from V on are not set.

        Raises:
            ValueError: No token may follow, or the mask cannot be computed.
        """
        ...

    def accept(self, token: int) -> None:
        """Appends a token to the answer.

        Raises:
            ValueError: The token is not allowed. The state is unchanged.
        """
        ...


class Grammar:
    """A compiled grammar for a tokenizer (`compile_grammar`). It can be used from several threads."""

    def __init__(self, vocabulary: "_Vocabulary", matcher: Any):
        self._vocabulary = vocabulary
        self._matcher = matcher  # in its first state; never changed

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that masks are for."""
        return self._vocabulary.size

    def start(self) -> Constraint:
        """The constraint of a new answer."""
        return _Matcher(self._vocabulary, self._matcher.deep_copy())


class _Vocabulary:
    """A tokenizer as llguidance takes it, and which of its ids may be in a mask.

    Attributes:
        size: V.
        stop_ids: Ids that end an answer.
        tokenizer: llguidance's LLTokenizer.
        inside: The ids that may be in a mask where the answer may not end, [ceil(V / 32)] uint32: those that are
            tokens, without stop ids.
        at_end: The same where it may end: with stop ids.
        has_all_bytes: Whether each byte of UTF-8 is a token.
        grammars: Compiled grammars, least recently used first.
    """

    def __init__(self, tokenizer: "Tokenizer", size: int, stop_ids: Sequence[int]):
        import llguidance

        tokens = token_bytes.table(tokenizer, size, stop_ids)
        is_token = np.array([bool(token) for token in tokens])
        is_stop = np.zeros(size, np.bool_)
        is_stop[list(stop_ids)] = True
        self.size, self.stop_ids = size, frozenset(stop_ids)
        self.has_all_bytes = set(tokens) >= token_bytes.UTF8_BYTES
        self.inside, self.at_end = pack(is_token & ~is_stop), pack(is_token)
        wrapped = llguidance.TokenizerWrapper(token_bytes.Encoder(tokenizer, tokens, stop_ids[0]))
        self.tokenizer = llguidance.LLTokenizer(wrapped, eos_token=list(stop_ids))
        self.grammars: OrderedDict[str, Grammar] = OrderedDict()
        self.lock = threading.Lock()

    def grammar(self, source: str, what: str) -> Grammar:
        """The compiled grammar of a Lark text. `what` is what the user wrote, for messages."""
        with self.lock:
            if source in self.grammars:
                self.grammars.move_to_end(source)
                return self.grammars[source]
        found = Grammar(self, self._compile(source, what))
        with self.lock:
            self.grammars[source] = found
            while len(self.grammars) > MAX_GRAMMARS:
                self.grammars.popitem(last=False)
        return found

    def _compile(self, source: str, what: str) -> Any:
        import llguidance

        # Texts that the grammar forces are tokenized by bytes, which fails where a byte has no token.
        options = "" if self.has_all_bytes else '%llguidance {"no_forcing": true}\n'
        matcher = llguidance.LLMatcher(self.tokenizer, options + source, log_level=0)
        if matcher.is_error():
            reason = _reason(matcher)
            if what != "the grammar":  # a position in a text that the user did not write
                reason = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", reason)
            raise ValueError(f"{what} is not supported: {reason}{_way_out(what, reason)}")
        for text in matcher.get_grammar_warnings():
            _log.warning("%s: %s (not enforced)", what, text)
        try:
            first = _Matcher(self, matcher.deep_copy()).mask()  # some errors occur only here
        except ValueError as error:
            raise ValueError(f"no text that this tokenizer can write matches {what}: {error}") from None
        if not (first & self.inside).any():
            raise ValueError(f"{what} matches the empty text only")
        return matcher


class _Matcher:
    """The `Constraint` of a grammar of llguidance.

    Where the grammar leaves one text only, the mask has the first token of its usual tokenization. `accept` takes every
    token that the grammar allows.
    """

    def __init__(self, vocabulary: _Vocabulary, matcher: Any):
        self._vocabulary, self._matcher = vocabulary, matcher

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> np.ndarray:
        length = -(-self._vocabulary.size // 32)  # llguidance adds a word where V is a multiple of 32
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32, length)
        if self._matcher.is_error():  # its masks of an error allow stop tokens
            raise ValueError(_reason(self._matcher))
        # A grammar can name ids that are no tokens, and stop tokens where it does not end.
        ends = self._matcher.is_accepting()
        allowed = words & (self._vocabulary.at_end if ends else self._vocabulary.inside)
        if not allowed.any():
            raise ValueError("no token of the vocabulary may follow")
        return allowed

    def accept(self, token: int) -> None:
        token, matcher = int(token), self._matcher
        is_stop = token in self._vocabulary.stop_ids
        if self.finished and is_stop:
            return
        fits = 0 <= token < self._vocabulary.size and not (is_stop and not matcher.is_accepting())
        if self.finished or not fits or matcher.try_consume_tokens([token]) != 1:
            why = f": {_reason(matcher)}" if matcher.is_error() else ""
            raise ValueError(f"token {token} is not allowed here by the grammar of this answer{why}")

    def copy(self) -> "_Matcher":
        return _Matcher(self._vocabulary, self._matcher.deep_copy())


def _reason(matcher: Any) -> str:
    """llguidance's error in one line, without the state of the parser and the lines of the grammar."""
    text = re.split(r"<state>|\n\s*\d+ \| ", str(matcher.get_error()))[0]
    text = " ".join(re.sub(r"(?s)regex parse error:.*error: ", "", text).split())
    return "no token of the vocabulary may follow" if text == "NoExtensionBias" else text[:300]


def _way_out(what: str, reason: str) -> str:
    if what == "the JSON schema" and any(word in reason for word in ("Unimplemented", "oneOf", "Unknown format")):
        return '; leave it out, or put "x-guidance": {"lenient": true} in the schema, and it is not enforced'
    if "look-around" in reason or "lookaround" in reason:
        return "; write the expression without lookahead, lookbehind and \\b, and ^ and $ at its ends only"
    return ""


_vocabularies: "WeakKeyDictionary[Tokenizer, dict[Any, _Vocabulary]]" = WeakKeyDictionary()
_lock = threading.Lock()


def compile_grammar(
    tokenizer: "Tokenizer",
    vocab_size: int,
    *,
    schema: Any = None,
    regex: str | None = None,
    grammar: str | None = None,
    stop_ids: Sequence[int] | None = None,
) -> Grammar:
    """Compiles what an answer must match. Pass one of `schema`, `regex` and `grammar`.

    The first call for a tokenizer takes about a second. Its vocabulary and the last 32 grammars are kept as long as the
    tokenizer exists. Special and added tokens are not used in texts. Blanks between the parts of JSON are bounded: one
    space, or a line break with an indentation of at most 20. `"x-guidance"` in a schema changes this
    (`whitespace_flexible`, `whitespace_pattern`).

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: V, the width of the logits. Ids without a token are never allowed.
        schema: A JSON schema: a dict, JSON text, or a pydantic model class. True allows any JSON object.
        regex: A regular expression in Rust's syntax. It must match the whole answer.
        grammar: A grammar in llguidance's variant of Lark. It can name special tokens (`<|python_tag|>`).
        stop_ids: Token ids that end an answer. Default: `tokenizer.stop_ids`.

    Raises:
        ValueError: Not one of the three is given, the text is not valid or not supported, no text matches it, the
            tokenizer has no stop token or is of a kind that is not supported, or llguidance is not installed.

    Source: https://github.com/guidance-ai/llguidance, docs/json_schema.md and docs/syntax.md.
    """
    if sum(given is not None for given in (schema, regex, grammar)) != 1:
        raise ValueError("pass one of schema, regex and grammar")
    for name, text in (("regex", regex), ("grammar", grammar)):
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{name} must be a text, not {type(text).__name__}")
    with explain_missing_package("structured output", "jaxlm[server]", "llguidance"):
        from llguidance import regex_to_lark
    if regex is not None:
        source, what = f"start: /{regex_to_lark(regex)}/", "the regular expression"
    elif grammar is not None:
        source, what = grammar, "the grammar"
    else:
        source, what = f"start: %json {schema_text(schema)}", "the JSON schema"
    return _vocabulary(tokenizer, vocab_size, stop_ids).grammar(source, what)


def _vocabulary(tokenizer: "Tokenizer", size: int, stop_ids: Sequence[int] | None) -> _Vocabulary:
    """The vocabulary of a tokenizer, made once. Two with other stop ids or another V are kept beside it."""
    ends = sorted(i for i in set(tokenizer.stop_ids if stop_ids is None else stop_ids) if 0 <= i < size)
    if not ends:
        raise ValueError(
            "structured output needs a stop token, and this tokenizer has none: set tokenizer.hf.eos_token"
        )
    key = (size, tuple(ends), len(tokenizer))
    with _lock:  # also while it is made, so that it is made once
        known = _vocabularies.setdefault(tokenizer, {})
        if key not in known:
            while len(known) > 2:
                known.pop(next(iter(known)))
            known[key] = _Vocabulary(tokenizer, size, ends)
        return known[key]


def schema_text(schema: Any) -> str:
    """A JSON schema as JSON, with the default for blanks."""
    content = _schema_dict(schema)
    options = content.get("x-guidance", {})
    if isinstance(options, Mapping) and not options.keys() & {"whitespace_flexible", "whitespace_pattern"}:
        content["x-guidance"] = {"whitespace_pattern": WHITESPACE, **options}
    try:
        return json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the JSON schema cannot be written as JSON: {error}") from None


def _schema_dict(schema: Any) -> dict[str, Any]:
    """A JSON schema as a dict. Its properties keep their order, which is that of the answer."""
    if schema is True:
        return {"type": "object"}
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the JSON schema is not valid JSON: {error}") from None
        if schema is True:
            return {}
    elif isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = _closed(schema.model_json_schema())
    if not isinstance(schema, Mapping):
        raise ValueError(f"a JSON schema must be a dict, JSON text of an object, a pydantic model class or True, not "
                         f"{schema!r:.80}")  # fmt: skip
    return dict(schema)


def _closed(schema: Any) -> Any:
    """The JSON schema of a pydantic model without fields that the model does not have. pydantic ignores them by
    default, and its schema allows them. A model with extra="allow" says so in its schema."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: value if key in ("default", "examples", "enum", "const") else _closed(value)
        for key, value in schema.items()
    }
    is_object = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    return {**closed, "additionalProperties": False} if is_object and "additionalProperties" not in schema else closed


def all_bits(vocab_size: int) -> np.ndarray:
    """A mask that allows all V tokens, for rows without a constraint: [ceil(V / 32)] uint32."""
    return np.full(-(-vocab_size // 32), ALL)


def pack(allowed: np.ndarray) -> np.ndarray:
    """The mask [ceil(V / 32)] uint32 of booleans [V]."""
    padded = np.pad(np.asarray(allowed, np.bool_), (0, -len(allowed) % 32))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def batch_masks(rows: Sequence[Constraint | None], vocab_size: int) -> np.ndarray:
    """The masks of a batch [B,ceil(V / 32)] uint32. None is a row without a constraint.

    Raises:
        ValueError: A mask has another length, or cannot be computed. The message has the number of the row.
    """
    out = np.tile(all_bits(vocab_size), (len(rows), 1))
    for i, row in enumerate(rows):
        if row is not None:
            mask = row.mask()
            if mask.shape != out[i].shape or mask.dtype != np.uint32:
                raise ValueError(f"row {i}: mask() returned {mask.dtype} {mask.shape}, not uint32 {out[i].shape}")
            out[i] = mask
    return out


def apply_mask(logits: Float[Array, "B V"], bits: UInt32[Array, "B W"]) -> Float[Array, "B V"]:
    """Logits [B,V] float32 with -inf for the tokens whose bit is not set. Pure.

    Args:
        logits: [B,V] float32.
        bits: Masks [B,ceil(V / 32)] uint32: bit `i % 32` of word `i // 32` is that of token i.
    """
    batch, vocab = logits.shape
    each = (bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    allowed = jax.lax.reshape(each, (batch, bits.shape[1] * 32))[:, :vocab]
    return jnp.where(allowed == 1, logits, -jnp.inf)
