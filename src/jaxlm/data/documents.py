"""Rows to documents: token ids, and which of them are learned.

A row has one of five forms, told by its fields. A text is learned whole. The others are conversations: they go through
the checkpoint's chat template, and the assistant's turns are learned, with the token that ends each, and nothing else.
Where there is no chat template, a prompt and its completion follow each other as they are.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.assistant_turns import AssistantTurns, Spans
from jaxlm.data.formats import FORMATS, Chat, InvalidRowError, TextOptions, conversation, text_of
from jaxlm.data.sources import PART, InvalidRow, Row, cut
from jaxlm.processing.tokenizer import Tokenizer

BATCH = 1000  # texts that are tokenized at once
EMPTY = "empty text"
_DIGEST_NAMES = {"format": "form", "train_on": "learn"}


class Document(NamedTuple):
    """ids [n] int32, BOS and EOS included where the tokenizer has them. learned [n] bool: whether predicting this id
    counts in the loss. ends: the document is complete (False: the next one goes on with it). text: what is learned."""

    source: str
    number: int
    ids: np.ndarray
    loss_mask: np.ndarray
    ends: bool = True
    text: str = ""


class Prepared(NamedTuple):
    """A text to be tokenized. spans: what of it is learned, None for all. bos, eos: whether these are added."""

    row: Row
    text: str
    spans: Spans | None
    bos: bool
    eos: bool


class Texts:
    """Makes documents of rows, which must all have one format: `format` and `train_on` are known after the first.

    Raises ValueError where no row could be read: without a template for messages, or with train_on="assistant" for
    texts.
    """

    def __init__(self, tokenizer: Tokenizer, options: TextOptions | None = None):
        if not getattr(tokenizer.hf, "is_fast", False):
            raise ValueError("training takes a tokenizer with a tokenizer.json: transformers has only a slow one here")
        self.tokenizer, self.options = tokenizer, options or TextOptions()
        if self.options.format not in (None, *FORMATS):
            raise ValueError(f"format {self.options.format!r} is not one of {', '.join(FORMATS)}")
        self.format: str | None = None
        self.train_on = self.options.train_on
        self.turns = AssistantTurns(tokenizer, self.options.template_args) if tokenizer.has_template else None
        self.before, self.after = added(tokenizer)

    @cached_property
    def rust(self) -> Any:
        """A copy that only tokenizes: a post-processor may move offsets, and adds what is added here."""
        from tokenizers import Tokenizer as Rust

        rust = Rust.from_str(self.tokenizer.hf.backend_tokenizer.to_str())
        rust.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        rust.no_truncation()
        rust.no_padding()
        return rust

    def identity(self) -> dict[str, Any]:
        """All that documents depend on besides their rows, as plain values."""
        hf = self.tokenizer.hf
        return {
            "tokenizer": hashlib.blake2b(hf.backend_tokenizer.to_str().encode()).hexdigest(),
            "added": [self.before, self.after],
            "template": [hf.chat_template, hf.special_tokens_map, self.tokenizer.stop_ids],
            # Named as in earlier versions: a run resumes only with the same digest.
            "options": {_DIGEST_NAMES.get(k, k): v for k, v in dataclasses.asdict(self.options).items()},
        }

    def documents(self, rows: Iterable[Row | InvalidRow]) -> Iterator[Document | InvalidRow]:
        """The documents of these rows in order, and in their places the rows that give none."""
        batch: list[Prepared | InvalidRow] = []
        size, begins = 0, True
        for row in rows:
            for item in [row] if isinstance(row, InvalidRow) else self._prepared(row, begins):
                batch.append(item)
                size += 0 if isinstance(item, InvalidRow) else len(item.text)
                if len(batch) >= BATCH or size >= PART:
                    yield from self._tokenized(batch)
                    batch, size = [], 0
            begins = begins if isinstance(row, InvalidRow) else row.ends
        yield from self._tokenized(batch)

    def _prepared(self, row: Row, begins: bool) -> Iterator[Prepared | InvalidRow]:
        try:
            format, train_on = self._settled(row)
            if format != "text":
                chat = conversation(row.value, format, self.options, train_on, template=self.turns is not None)
                yield self._chat(row, chat) if isinstance(chat, Chat) else self._pair(row, *chat)
                return
            text = text_of(row.value, self.options)
            _check(text, whole=begins and row.ends)
            *parts, last = cut(text)
            for n, part in enumerate(parts):
                yield Prepared(row._replace(ends=False), part, None, begins and n == 0, eos=False)
            yield Prepared(row, last, None, begins and not parts, eos=row.ends)
        except InvalidRowError as fault:
            yield InvalidRow(row.source, row.number, fault.why, str(fault))

    def _settled(self, row: Row) -> tuple[str, str]:
        """Form and what is learned: the first row's, which all others must have."""
        format = self.options.format_of(row.value)
        if format is None or (self.format and format != self.format):
            wanted = self.format or self.options.format
            fields = " or ".join(" and ".join(self.options.fields(one)) for one in ([wanted] if wanted else FORMATS))
            seen = "is a text" if isinstance(row.value, str) else f"has the fields {', '.join(row.value) or '(none)'}"
            raise InvalidRowError(
                "fields are missing",
                f"a row with {fields} is expected, this {seen}: other names are given by text_field, or prompt_field "
                "and completion_field (flags too)",
            )
        if self.format is None:
            self.format, self.train_on = format, self.train_on or FORMATS[format][1]
            if format == "text" and self.train_on != "all":
                raise ValueError(f"{row.source} holds texts, in which nobody speaks: train_on={self.train_on} is for "
                                 "messages, prompts and instructions")  # fmt: skip
        return format, self.train_on or ""

    def _chat(self, row: Row, chat: Chat) -> Prepared:
        if self.turns is None:
            self.tokenizer.render(chat.messages)  # which says that there is no template, and what to do
        assert self.turns is not None
        try:
            text, spans = self.turns.find(*chat)
        except ValueError as error:
            raise InvalidRowError("refused by the chat template", str(error)) from None
        if not spans and self.train_on != "all":
            roles = ", ".join(dict.fromkeys(message["role"] for message in chat.messages))
            raise InvalidRowError("no assistant turn", f"no turn of the assistant to learn from (roles: {roles})")
        _check(text)
        closed = text.rstrip().endswith(self.turns.stops)
        return Prepared(row, text, None if self.train_on == "all" else spans, bos=False, eos=not closed)

    def _pair(self, row: Row, prompt: str, completion: str) -> Prepared:
        text = prompt + completion
        _check(text)
        return Prepared(row, text, None if self.train_on == "all" else [(len(prompt), len(text))], bos=True, eos=True)

    def _tokenized(self, batch: list[Prepared | InvalidRow]) -> Iterator[Document | InvalidRow]:
        texts = [item.text for item in batch if isinstance(item, Prepared)]
        whole = all(item.spans is None for item in batch if isinstance(item, Prepared))
        encode = self.rust.encode_batch_fast if whole else self.rust.encode_batch  # which knows no offsets
        encodings = iter(encode(texts, add_special_tokens=False) if texts else [])
        for item in batch:
            yield item if isinstance(item, InvalidRow) else self._document(item, next(encodings))

    def _document(self, item: Prepared, encoding: Any) -> Document | InvalidRow:
        ids, learned = encoding.ids, [True] * len(encoding.ids)
        if item.spans is not None:
            ids, learned = self._learned(item, encoding)
        twice = bool(self.before) and ids[: len(self.before)] == self.before
        begin = self.before if item.bos and not twice else []
        end = self.after if item.eos and ids[-len(self.after) :] != self.after else []
        # An end that the template leaves out is learned where an answer ends there.
        open_end = item.spans is None or not item.text[item.spans[-1][1] :].strip()
        ids = np.array([*begin, *ids, *end], np.int32)
        learned = np.array([*[item.spans is None] * len(begin), *learned, *[open_end] * len(end)], bool)
        row = item.row
        if item.spans is not None and not learned[1:].any():
            return InvalidRow(row.source, row.number, "nothing to learn", "what is to be learned of this row is empty")
        text = item.text if item.spans is None else "".join(item.text[a:b] for a, b in item.spans)
        return Document(row.source, row.number, ids, learned, row.ends, text)

    def _learned(self, item: Prepared, encoding: Any) -> tuple[list[int], np.ndarray]:
        """Which tokens lie within the spans. Where a token reaches over the edge of one, the text is tokenized in
        pieces: as it is when a prompt is answered."""
        spans = item.spans or []
        begins, ends = np.array(encoding.offsets, int).reshape(-1, 2).T
        learned = np.zeros(len(begins), bool)
        for start, stop in spans:
            learned |= (begins >= start) & (ends <= stop) & (begins < stop)
        edges = [edge for span in spans for edge in span]
        if not any(((begins < edge) & (ends > edge)).any() for edge in edges):
            return encoding.ids, learned
        places = [0, *edges, len(item.text)]
        parts = [item.text[a:b] for a, b in pairwise(places)]
        pieces = [piece.ids for piece in self.rust.encode_batch(parts, add_special_tokens=False)]
        ids = [token for piece in pieces for token in piece]
        text, whole = (self.rust.decode(some, skip_special_tokens=False) for some in (ids, encoding.ids))
        if text != whole:
            return encoding.ids, learned  # a tokenizer to which the beginning of a text is special
        return ids, np.repeat(np.arange(len(pieces)) % 2 == 1, [len(piece) for piece in pieces])


def _check(text: str, whole: bool = True) -> None:
    """Fault for what cannot be tokenized, and for a text of blanks."""
    if whole and not text.strip():
        raise InvalidRowError(EMPTY, "the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRowError(
            "invalid UTF-8", "half of a surrogate pair (\\ud800 to \\udfff) stands alone in it"
        ) from None


def added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after every document: what the tokenizer adds to a text, and at its end EOS."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    before, after = full[:at], full[at + len(plain) :]
    eos = tokenizer.hf.eos_token_id
    eos = min(tokenizer.eos_ids) if eos is None and len(tokenizer.eos_ids) == 1 else eos
    return before, after if eos is None or after[-1:] == [eos] else [*after, eos]
