"""Perplexity and bits per byte of a model on texts, with a sliding window over long documents."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.data.documents import EMPTY, Document, DocumentTokenizer, TextOptions, boundary_tokens
from jaxlm.data.formats import Format
from jaxlm.data.readers import InvalidRow, explain_invalid
from jaxlm.data.sources import find_sources
from jaxlm.evaluation.scoring import ScoreRequest, scores, windows
from jaxlm.model import Model, require_model
from jaxlm.processing.tokenizer import Tokenizer

LENGTH = 2048  # default: tokens of a window at most
BLOCK = 1 << 20  # tokens packed together; bounds host memory and the time to the first result
Progress = Callable[[int, int], None]  # documents, tokens
Files = str | Path | Sequence[str | Path]


class Evaluation(NamedTuple):
    """The negative log-likelihood of texts, summed over all documents.

    All tokens in the loss mask of training are scored (all of a text, the assistant turns of a chat), except special
    tokens. The first token of a document is predicted from BOS, or from EOS if the vocabulary has no BOS, so that every
    byte is scored with every tokenizer (without either, it is not scored). BOS, EOS and the special tokens of a chat
    template are context and not scored: they are not part of the text, the prediction of the end depends on how the
    training data were split, and a vocabulary without EOS would have a better score. (The training loss includes the
    EOS.)

    Bits per byte are comparable across tokenizers. Perplexity is per token, and comparable only between models with the
    same tokenizer.

    Attributes:
        nats: Negative log-likelihood of the tokens that count.
        tokens: Number of tokens that count.
        bytes: Length of their text in UTF-8.
        documents: Number of documents.
        dropped: Number of rows that could not be used, by reason.
        notes: What is worth a word about the sources.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int
    dropped: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite if a float cannot represent it."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nats / log(2) / bytes."""
        return self.nats / math.log(2) / self.bytes


class SpecialTokens:
    """The special tokens of a tokenizer, which are not scored.

    Attributes:
        ids: Special tokens, BOS and EOS.
        names: A pattern that matches them in a text.
        first: The token that the first token of a document is predicted from: BOS or EOS; None without either.
    """

    def __init__(self, tokenizer: Tokenizer):
        hf = tokenizer.hf
        before, after = boundary_tokens(tokenizer)
        texts = {i: str(token) for i, token in hf.added_tokens_decoder.items() if i in tokenizer.special_ids}
        if hf.unk_token_id not in (*before, *after):  # some vocabularies have one token for BOS, EOS and UNK
            texts.pop(hf.unk_token_id, None)  # UNK represents text and is scored
        self.tokenizer, self.ids = tokenizer, np.array(sorted({*texts, *before, *after}), int)
        names = sorted(map(re.escape, texts.values()), key=len, reverse=True)
        self.names = re.compile("|".join(names) or "(?!)")
        self.first = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(after[-1:]), None)

    def counted(self, document: Document) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns the ids of a document [n] with a token to predict the first one from, which of them are scored [n]
        bool, and the number of bytes of these."""
        counts = document.loss_mask & ~np.isin(document.ids, self.ids)
        size = len(self.names.sub("", document.text).encode())
        if not counts[:1].any():
            return document.ids, counts, size
        if self.first is None:  # the first token cannot be predicted, so its bytes do not count
            return document.ids, counts, size - len(self.tokenizer.decode(document.ids[:1]).encode())
        return np.insert(document.ids, 0, self.first), np.insert(counts, 0, False), size


class DocumentReader:
    """Reads the documents of sources as score requests, and counts them.

    Attributes:
        documents, bytes: Number of documents and of bytes that count so far.
        dropped: Number of rows that could not be used so far, by reason.
    """

    def __init__(self, tokenizer: Tokenizer, files: Files, options: TextOptions, on_bad: str, **where: Any):
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad is {on_bad!r}, but must be stop or skip")
        self.texts, self.special = DocumentTokenizer(tokenizer, options), SpecialTokens(tokenizer)
        self.sources, self.on_bad = find_sources(files, **where), on_bad
        self.documents = self.bytes = 0
        self.dropped = Counter[str]()

    def blocks(self, length: int, stride: int) -> Iterator[list[ScoreRequest]]:
        """Yields score requests of about BLOCK tokens at a time."""
        block, size = [], 0
        for document in self._join_parts():
            ids, counts, nbytes = self.special.counted(document)
            self.documents += 1
            self.bytes += nbytes
            for request in windows(ids, counts, length, stride):
                block.append(request)
                size += len(request.tokens)
                if size >= BLOCK:
                    yield block
                    block, size = [], 0
        yield block

    def _join_parts(self) -> Iterator[Document]:
        """Yields whole documents. Rows that cannot be used are counted, or raise ValueError."""
        parts: list[Document] = []
        for item in self.texts.documents(row for source in self.sources for row in source.rows()):
            if isinstance(item, InvalidRow):
                self.dropped[item.why] += 1
                if item.why != EMPTY and self.on_bad == "stop":
                    raise ValueError(explain_invalid(item))
                continue
            parts.append(item)
            if item.ends:
                ids, loss_mask = (np.concatenate(arrays) for arrays in zip(*((p.ids, p.loss_mask) for p in parts)))
                yield item._replace(ids=ids, loss_mask=loss_mask, text="".join(part.text for part in parts))
                parts = []


def window_sizes(model: Model, length: int | None, stride: int | None, batch: int | None) -> tuple[int, int]:
    """Returns the length and the stride of windows, with their defaults. Raises ValueError for values out of range."""
    context = model.config.context
    T = min(context, LENGTH) if length is None else length
    step = max(1, T // 2) if stride is None else stride
    if not 1 <= T <= context:
        raise ValueError(f"length is {T:,}, but must be between 1 and {context:,}, the context of {model.source}")
    if not 1 <= step <= T:
        raise ValueError(f"stride is {step:,}, but must be between 1 and {T:,}, the length of a window")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}, but must be at least 1")
    return T, step


def evaluate(
    model: Model,
    files: Files,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    format: Format | None = None,
    train_on: Literal["assistant", "completion", "all"] | None = None,
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    on_bad: Literal["stop", "skip"] = "stop",
    split: str = "test",
    offline: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Computes perplexity and bits per byte of a model on texts.

    Every token that counts is scored once. Documents do not attend to each other. A document that is longer than a
    window is read with a sliding window, so that after the first window every token has at least length - stride tokens
    of context.

    Args:
        model: The model.
        files: Files, folders, globs or hub datasets.
        length: Length of a window in tokens. Default: the context, at most 2048.
        stride: Tokens from one window of a document to the next. Default: half of length.
        batch: Batch size: rows of `length` tokens. The default depends on the platform.
        format: Row format. Default: detected from the first row.
        train_on: Which tokens are scored: "assistant", "completion" or "all". Default: as in training.
        text_field: Field of a row that holds the text.
        prompt_field: Field of a row that holds the prompt.
        completion_field: Field of a row that holds the completion.
        on_bad: "stop" raises at a row that cannot be used, "skip" counts it.
        split: Split of a hub dataset, or of a folder whose files are named after splits.
        offline: Use the local cache only.
        progress: Called with the number of documents and tokens so far.

    Raises:
        ValueError: An argument is out of range, a row cannot be used, or there is no text to score.
        OSError: A source cannot be read.
    """
    tokenizer = _tokenizer(model)
    T, step = window_sizes(model, length, stride, batch)
    options = TextOptions(format, train_on, text_field, prompt_field, completion_field)
    reader = DocumentReader(tokenizer, files, options, on_bad, split=split, offline=offline)
    nats, tokens = 0.0, 0
    for block in reader.blocks(T, step):
        for _, score in scores(model, block, batch):
            nats -= float(score.logprobs.sum(dtype=np.float64))
            tokens += len(score.logprobs)
            if progress is not None:
                progress(reader.documents, tokens)
    notes = tuple(source.note for source in reader.sources if source.note)
    return _checked(Evaluation(nats, tokens, reader.bytes, reader.documents, dict(reader.dropped), notes), model)


def _tokenizer(model: Model) -> Tokenizer:
    require_model(model, "evaluate")
    if model.tokenizer is None:
        raise ValueError(f"{model.source} has no tokenizer: load it with tokenizer=FOLDER (--tokenizer)")
    return model.tokenizer


def _checked(result: Evaluation, model: Model) -> Evaluation:
    if not result.tokens:
        counts = ", ".join(f"{count:,} {why}" for why, count in result.dropped.items())
        raise ValueError(f"there is no text to score (rows dropped: {counts or 'none'})")
    if not math.isfinite(result.nats):
        raise ValueError(f"the logits of {model.source} are NaN or Inf: try --dtype float32, or check its weights "
                         "(jaxlm verify)")  # fmt: skip
    return result
