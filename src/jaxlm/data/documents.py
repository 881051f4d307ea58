"""Converts rows to documents: token ids and their loss mask.

All tokens of a text are in the loss mask. Rows of other formats are conversations, which the chat template renders.
Their loss mask has the assistant turns, including the token that ends each. Without a chat template, a prompt and its
completion are concatenated.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.assistant_turns import AssistantTurns, Spans
from jaxlm.data.formats import (
    FORMATS,
    REFUSED,
    RESERVED,
    Chat,
    InvalidRowError,
    TextOptions,
    conversation,
    text_of,
    unused_fields,
)
from jaxlm.data.readers import PART, InvalidRow, Row, split_text
from jaxlm.processing.messages import ASSISTANT, REASONING, normalize
from jaxlm.processing.tokenizer import Tokenizer

BATCH = 1000  # texts per call of the tokenizer
EMPTY = "empty text"
# Options are digested under the names of earlier versions, so that digests stay the same and runs resume.
_DIGEST_NAMES = {"format": "form", "train_on": "learn"}


class Document(NamedTuple):
    """A tokenized document.

    Attributes:
        source, number: As in Row.
        ids: [n] int32, with BOS and EOS if the tokenizer has them.
        loss_mask: [n] bool, whether predicting this id counts in the loss.
        ends: Whether the document ends here; if not, the next one continues it.
        text: The text in the loss mask.
    """

    source: str
    number: int
    ids: np.ndarray
    loss_mask: np.ndarray
    ends: bool = True
    text: str = ""


class Prepared(NamedTuple):
    """A text to tokenize.

    Attributes:
        row: Its row.
        text: The text.
        spans: The spans of the text in the loss mask; None for all of it.
        bos, eos: Whether to add BOS and EOS.
    """

    row: Row
    text: str
    spans: Spans | None
    bos: bool
    eos: bool


class DocumentTokenizer:
    """Tokenizes rows to documents. All rows must have the same format. Defaults are detected from the first row.

    Raises ValueError if no row can be used: messages without a chat template, or texts with train_on="assistant".
    """

    def __init__(self, tokenizer: Tokenizer, options: TextOptions | None = None):
        if not getattr(tokenizer.hf, "is_fast", False):
            raise ValueError("the tokenizer has no tokenizer.json: training needs a fast tokenizer")
        self.tokenizer, self.options = tokenizer, options or TextOptions()
        if reserved := [name for name in RESERVED if name in self.options.template_args]:
            raise ValueError(f"template_args cannot set {reserved[0]}")
        for name in self.options.template_args:
            if tokenizer.has_template and not tokenizer.template_accepts(name):
                raise ValueError(f"the chat template does not use the variable {name!r} (--data.template-arg)")
        self.format: str | None = None
        self._empty_answers = 0  # rows that have one
        self._first_source = ""  # which has the first row, whose format all rows must have
        self.train_on = self.options.train_on
        self.turns = AssistantTurns(tokenizer, self.options.template_args) if tokenizer.has_template else None
        self.before, self.after = boundary_tokens(tokenizer)
        self.unused: dict[str, None] = {}  # fields that are not read, in the order in which they appear
        self._used: set[tuple[str, str]] = set()  # roles and fields of messages that the template reads
        self._turns_of_rows: dict[str, AssistantTurns] = {}

    @cached_property
    def rust(self) -> Any:
        """A copy of the backend without post-processor, which may move offsets, and adds what is added here."""
        from tokenizers import Tokenizer as Rust

        rust = Rust.from_str(self.tokenizer.hf.backend_tokenizer.to_str())
        rust.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        rust.no_truncation()
        rust.no_padding()
        return rust

    @cached_property
    def template_source(self) -> str:
        """The source of the chat template, of several one after the other; empty if there is none."""
        template = self.tokenizer.hf.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, dict) else template

    def identity(self) -> dict[str, Any]:
        """Returns everything besides the rows that determines the documents, as plain values, for the digest."""
        hf = self.tokenizer.hf
        return {
            "tokenizer": hashlib.blake2b(hf.backend_tokenizer.to_str().encode()).hexdigest(),
            "added": [self.before, self.after],
            "template": [hf.chat_template, hf.special_tokens_map, self.tokenizer.stop_ids],
            "options": {_DIGEST_NAMES.get(k, k): v for k, v in dataclasses.asdict(self.options).items()},
        }

    def documents(self, rows: Iterable[Row | InvalidRow]) -> Iterator[Document | InvalidRow]:
        """Yields the documents of rows in order, and an InvalidRow in place of each row that cannot be used."""
        batch: list[Prepared | InvalidRow] = []
        size, begins = 0, True
        for row in rows:
            for item in [row] if isinstance(row, InvalidRow) else self._prepare(row, begins):
                batch.append(item)
                size += 0 if isinstance(item, InvalidRow) else len(item.text)
                if len(batch) >= BATCH or size >= PART:
                    yield from self._tokenize(batch)
                    batch, size = [], 0
            begins = begins if isinstance(row, InvalidRow) else row.ends
        yield from self._tokenize(batch)

    def _prepare(self, row: Row, begins: bool) -> Iterator[Prepared | InvalidRow]:
        try:
            format, train_on = self._resolve_format(row)
            if format != "text":
                chat = conversation(
                    row.value, format, self.options, train_on, self.turns is not None, self.template_source
                )
                prepared = self._chat(row, chat) if isinstance(chat, Chat) else self._pair(row, *chat)
                self._note_unused(row, format, prepared.text)
                yield prepared
                return
            text = text_of(row.value, self.options)
            _check(text, whole=begins and row.ends)
            if begins and not isinstance(row.value, str):
                self._note_unused(row, format, text)
            *parts, last = split_text(text)
            for n, part in enumerate(parts):
                yield Prepared(row._replace(ends=False), part, None, begins and n == 0, eos=False)
            yield Prepared(row, last, None, begins and not parts, eos=row.ends)
        except InvalidRowError as error:
            yield InvalidRow(row.source, row.number, error.why, str(error))

    def _resolve_format(self, row: Row) -> tuple[str, str]:
        """Returns the format and `train_on` of the first row, which all other rows must have."""
        format = self.options.format_of(row.value)
        if format is None or (self.format and format != self.format):
            wanted = self.format or self.options.format
            if not isinstance(row.value, str) and {"chosen", "rejected"} <= row.value.keys():
                raise InvalidRowError("unsupported field", f"the field chosen: {REFUSED['chosen']}")
            raise InvalidRowError("missing fields", self._explain_format(row, format, wanted))
        if self.format is None:
            self.format, self.train_on = format, self.train_on or FORMATS[format][1]
            self._first_source = row.source
            if format == "text" and self.train_on != "all":
                raise ValueError(f"{row.source} holds texts, which have no turns: use --data.train-on all instead of "
                                 f"{self.train_on}")  # fmt: skip
        return format, self.train_on or ""

    def _explain_format(self, row: Row, format: str | None, wanted: str | None) -> str:
        """Returns what to do about a row of another format (None: of none) than is wanted (None: any)."""
        fields = " or ".join(" and ".join(self.options.fields(one)) for one in ([wanted] if wanted else FORMATS))
        actual = "is a text" if isinstance(row.value, str) else f"has the fields {', '.join(row.value) or '(none)'}"
        message = f"expected a row with {fields}, but this one {actual}"
        if format:
            message += f", after rows of the format {self.format} in {self._first_source}"
            if row.source == self._first_source:
                return f"{message}: all rows of a source have one format"
            return (
                f"{message}: give each training source a weight (a.jsonl=1 b.jsonl=1), or each validation source a "
                "name (x=a.jsonl y=b.jsonl), so that each is read in its own format"
            )
        known = (
            self.options.fields(wanted) if wanted else [name for one in FORMATS for name in self.options.fields(one)]
        )
        others = [] if isinstance(row.value, str) else [name for name in row.value if name not in known]
        for name in others:
            if near := difflib.get_close_matches(name.lower(), known, 1, 0.75):
                return f"{message}: did you mean {near[0]!r} instead of {name!r}?"
        if wanted and not isinstance(row.value, str):
            lacking = [name for name in known if name not in row.value]
            return f"{message}: {' and '.join(lacking)} is absent or empty"
        return f"{message}: name other fields (--data.text-field, or --data.prompt-field and --data.completion-field)"

    def _chat(self, row: Row, chat: Chat) -> Prepared:
        if self.turns is None:
            self.tokenizer.render(chat.messages)  # raises: there is no chat template
        answers = [message for message in chat.messages if message["role"] == ASSISTANT]
        if self.train_on == "all" and len(chat.turns) < len(answers):
            why = "an assistant turn is not to be trained on, but --data.train-on all is every token"
            raise InvalidRowError("unsupported field", why)
        turns = self._turns_with(chat.template_args)
        try:
            text, spans = turns.find(chat.messages, chat.tools, chat.turns)
        except ValueError as error:
            raise InvalidRowError("refused by the chat template", str(error)) from None
        if not spans and self.train_on != "all":
            roles = ", ".join(dict.fromkeys(message["role"] for message in chat.messages))
            raise InvalidRowError("no assistant turn", f"no assistant turn to train on (roles: {roles})")
        _check(text)
        self._empty_answers += any(_is_blank(chat.messages[i]) for i in chat.turns)
        self._note_unused_of_messages(turns, chat, text)
        closed = text.rstrip().endswith(turns.stops)
        return Prepared(row, text, None if self.train_on == "all" else spans, bos=False, eos=not closed)

    def _turns_with(self, template_args: Mapping[str, Any]) -> AssistantTurns:
        """Returns the assistant turns with the variables that a row sets."""
        assert self.turns is not None
        used = {name: value for name, value in template_args.items() if self.tokenizer.template_accepts(name)}
        self.unused |= {f"chat_template_kwargs.{name}": None for name in template_args if name not in used}
        if not used:
            return self.turns
        key = json.dumps(used, sort_keys=True)
        if key not in self._turns_of_rows:
            if len(self._turns_of_rows) >= 64:  # a date in each row
                self._turns_of_rows.clear()
            self._turns_of_rows[key] = AssistantTurns(self.tokenizer, {**self.options.template_args, **used})
        return self._turns_of_rows[key]

    def _note_unused(self, row: Row, format: str, text: str) -> None:
        self.unused |= dict.fromkeys(unused_fields(row.value, format, self.options, text))

    def _note_unused_of_messages(self, turns: AssistantTurns, chat: Chat, text: str) -> None:
        """Notes the fields of messages without which the text is the same. One message per role and field is tried."""
        template = self.tokenizer.hf.get_chat_template(tools=chat.tools)
        messages = normalize(chat.messages, template)
        for i, message in enumerate(messages):
            for name in message:
                key, note = (message["role"], name), f"messages.{name} ({message['role']})"
                if name in ("role", "content", "tool_calls", *REASONING) or key in self._used or note in self.unused:
                    continue
                if name in template:
                    others = {other: value for other, value in message.items() if other != name}
                    try:
                        read = turns.render([*messages[:i], others, *messages[i + 1 :]], chat.tools) != text
                    except ValueError:
                        read = True  # the template needs it
                    if read:
                        self._used.add(key)
                        continue
                self.unused[note] = None

    @property
    def notes(self) -> list[str]:
        """What is worth a word about the documents so far."""
        notes = [f"fields that are not used: {', '.join(self.unused)}"] if self.unused else []
        given = {"text_field": "text", "prompt_field": "prompt", "completion_field": "prompt"}
        for name, format in given.items():
            if (field := getattr(self.options, name)) != getattr(TextOptions, name) and format != self.format:
                notes.append(f"{name} is {field}, but the format of the rows is {self.format}: it has no effect")
        if (n := self._empty_answers) and self.train_on != "all":
            notes.append(f"{n:,} row{'s have' if n > 1 else ' has'} an empty answer: what is trained on is its end")
        turns = [] if self.turns is None or self.train_on == "all" else [self.turns, *self._turns_of_rows.values()]
        if any(ends.closing is not None for one in turns for ends in one.ends.values()):
            notes.append(
                "the chat template ends no turn with a token: EOS follows the last answer of a conversation alone"
            )
        return notes

    def _pair(self, row: Row, prompt: str, completion: str) -> Prepared:
        text = prompt + completion
        self._empty_answers += not completion.strip()
        _check(text)
        return Prepared(row, text, None if self.train_on == "all" else [(len(prompt), len(text))], bos=True, eos=True)

    def _tokenize(self, batch: list[Prepared | InvalidRow]) -> Iterator[Document | InvalidRow]:
        texts = [item.text for item in batch if isinstance(item, Prepared)]
        need_offsets = any(item.spans is not None for item in batch if isinstance(item, Prepared))
        encode = self.rust.encode_batch if need_offsets else self.rust.encode_batch_fast
        encodings = iter(encode(texts, add_special_tokens=False) if texts else [])
        for item in batch:
            yield item if isinstance(item, InvalidRow) else self._document(item, next(encodings))

    def _document(self, item: Prepared, encoding: Any) -> Document | InvalidRow:
        ids, loss_mask = encoding.ids, [True] * len(encoding.ids)
        if item.spans is not None:
            ids, loss_mask = self._mask_spans(item, encoding)
        has_bos = bool(self.before) and ids[: len(self.before)] == self.before
        begin = self.before if item.bos and not has_bos else []
        end = self.after if item.eos and ids[-len(self.after) :] != self.after else []
        # The EOS of a document counts if its last token does, as after an answer that the template does not end.
        open_end = item.spans is None or not item.text[item.spans[-1][1] :].strip()
        ids = np.array([*begin, *ids, *end], np.int32)
        loss_mask = np.array([*[item.spans is None] * len(begin), *loss_mask, *[open_end] * len(end)], bool)
        row = item.row
        if item.spans is not None and not loss_mask[1:].any():
            return InvalidRow(row.source, row.number, "empty loss mask", "this row has no token to train on")
        text = item.text if item.spans is None else "".join(item.text[a:b] for a, b in item.spans)
        return Document(row.source, row.number, ids, loss_mask, row.ends, text)

    def _mask_spans(self, item: Prepared, encoding: Any) -> tuple[list[int], np.ndarray]:
        """Returns the ids and which of them are within the spans. If a token crosses the edge of a span, the text is
        tokenized in parts, as in inference, where prompt and answer are tokenized separately."""
        spans = item.spans or []
        begins, ends = np.array(encoding.offsets, int).reshape(-1, 2).T
        loss_mask = np.zeros(len(begins), bool)
        for start, stop in spans:
            loss_mask |= (begins >= start) & (ends <= stop) & (begins < stop)
        edges = [edge for span in spans for edge in span]
        if not any(((begins < edge) & (ends > edge)).any() for edge in edges):
            return encoding.ids, loss_mask
        parts = [item.text[a:b] for a, b in pairwise([0, *edges, len(item.text)])]
        pieces = [piece.ids for piece in self.rust.encode_batch(parts, add_special_tokens=False)]
        ids = [token for piece in pieces for token in piece]
        in_pieces, at_once = (self.rust.decode(some, skip_special_tokens=False) for some in (ids, encoding.ids))
        if in_pieces != at_once:
            return encoding.ids, loss_mask  # the tokenizer treats the beginning of a text specially
        return ids, np.repeat(np.arange(len(pieces)) % 2 == 1, [len(piece) for piece in pieces])


def _is_blank(message: Mapping[str, Any]) -> bool:
    """Whether a normalized message says nothing: neither content nor tool calls nor reasoning."""
    return not any(message.get(name) for name in ("tool_calls", *REASONING)) and not message["content"].strip()


def _check(text: str, whole: bool = True) -> None:
    """Raises InvalidRowError for a text that cannot be tokenized, and if it is whole, for a blank one."""
    if whole and not text.strip():
        raise InvalidRowError(EMPTY, "the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRowError(
            "invalid UTF-8", "the text has half of a surrogate pair (\\ud800 to \\udfff) alone"
        ) from None


def boundary_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids before and after every document: what the tokenizer adds to a text, and EOS at its end."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    before, after = full[:at], full[at + len(plain) :]
    eos = tokenizer.hf.eos_token_id
    eos = min(tokenizer.eos_ids) if eos is None and len(tokenizer.eos_ids) == 1 else eos
    return before, after if eos is None or after[-1:] == [eos] else [*after, eos]
