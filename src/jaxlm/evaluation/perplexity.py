"""How well a model predicts texts: perplexity and bits per byte."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxlm.data.documents import EMPTY, Document, TextOptions, Texts, added
from jaxlm.data.sources import InvalidRow, find
from jaxlm.evaluation.scoring import ScoreRequest, scores, windows
from jaxlm.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxlm.model import Model

LENGTH = 2048  # tokens of a window at most, when none is asked for
BLOCK = 1 << 20  # tokens that are packed together: the memory of the host, and the time to a first result
Progress = Callable[[int, int], None]  # documents, tokens
Files = str | Path | Sequence[str | Path]


class Evaluation(NamedTuple):
    """What predicting texts has cost, summed over all documents.

    What counts is the text itself: every token that training would learn (all of a text, the assistant's turns of a
    chat) but special tokens. A document's first token is predicted from BOS, or from EOS where the vocabulary has no
    BOS: every byte is then paid for, whatever the tokenizer. BOS, EOS and the marks of a chat template are read and not
    predicted: they are no bytes of the text, how well a model tells where one ends depends on how its training data
    were cut, and a vocabulary without EOS would come off better. (The loss of training counts the EOS.)

    So `bits_per_byte` compares models with any two tokenizers. `perplexity`, the same cost a token, compares models
    with the same tokenizer alone: longer tokens are fewer and harder to guess.

    Attributes:
        nats: the negative log-probability of the tokens that count.
        tokens: how many these are.
        bytes: of their text in UTF-8.
        documents: how many were read.
        dropped: rows that gave none, why -> how many.
    """

    nats: float
    tokens: int
    bytes: int
    documents: int
    dropped: dict[str, int]

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); infinite where a float cannot hold it."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


class Marks:
    """What of a tokenizer's ids is no text."""

    def __init__(self, tokenizer: Tokenizer):
        hf = tokenizer.hf
        before, after = added(tokenizer)
        spelled = {i: str(token) for i, token in hf.added_tokens_decoder.items() if i in tokenizer.special_ids}
        if hf.unk_token_id not in (*before, *after):  # some vocabularies have one token for all three
            spelled.pop(hf.unk_token_id, None)  # it stands for text, and has to be predicted
        self.tokenizer, self.ids = tokenizer, np.array(sorted({*spelled, *before, *after}), int)
        names = sorted(map(re.escape, spelled.values()), key=len, reverse=True)
        self.names = re.compile("|".join(names) or "(?!)")
        self.first = tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(after[-1:]), None)

    def counted(self, document: Document) -> tuple[np.ndarray, np.ndarray, int]:
        """ids [n] with something to predict the first from, which of them count [n] bool, and the bytes of these."""
        counts = document.loss_mask & ~np.isin(document.ids, self.ids)
        size = len(self.names.sub("", document.text).encode())
        if not counts[:1].any():
            return document.ids, counts, size
        if self.first is None:  # the first token cannot be predicted, nor can its bytes count
            return document.ids, counts, size - len(self.tokenizer.decode(document.ids[:1]).encode())
        return np.insert(document.ids, 0, self.first), np.insert(counts, 0, False), size


class Reading:
    """The documents of sources on their way to the model, counted as they pass.

    Attributes:
        documents, bytes: so far. dropped: rows that gave none, why -> how many.
    """

    def __init__(self, tokenizer: Tokenizer, files: Files, options: TextOptions, on_bad: str, **where: Any):
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad is {on_bad!r}: stop or skip")
        self.texts, self.marks, self.on_bad = Texts(tokenizer, options), Marks(tokenizer), on_bad
        self.sources = find(files, **where)
        self.documents = self.bytes = 0
        self.dropped = Counter[str]()

    def blocks(self, length: int, stride: int) -> Iterator[list[ScoreRequest]]:
        """Some BLOCK tokens of pieces at a time."""
        block, size = [], 0
        for document in self._whole():
            ids, counts, nbytes = self.marks.counted(document)
            self.documents += 1
            self.bytes += nbytes
            for piece in windows(ids, counts, length, stride):
                block.append(piece)
                size += len(piece.tokens)
                if size >= BLOCK:
                    yield block
                    block, size = [], 0
        yield block

    def _whole(self) -> Iterator[Document]:
        """Documents that came in parts are joined; what is none is counted, or raises ValueError."""
        parts: list[Document] = []
        for one in self.texts.documents(row for source in self.sources for row in source.rows()):
            if isinstance(one, InvalidRow):
                self.dropped[one.why] += 1
                if one.why != EMPTY and self.on_bad == "stop":
                    raise ValueError(f"{one} (on_bad=skip leaves such rows out and counts them)")
                continue
            parts.append(one)
            if one.ends:
                ids, loss_mask = (np.concatenate(arrays) for arrays in zip(*((p.ids, p.loss_mask) for p in parts)))
                yield one._replace(ids=ids, loss_mask=loss_mask, text="".join(part.text for part in parts))
                parts = []


def sizes(model: "Model", length: int | None, stride: int | None, batch: int | None) -> tuple[int, int]:
    """Tokens of a window, and from one to the next; ValueError for what cannot be."""
    context = model.config.context
    T = min(context, LENGTH) if length is None else length
    step = max(1, T // 2) if stride is None else stride
    if not 1 <= T <= context:
        raise ValueError(f"length is {T:,}: give 1 to {context:,}, the context of {model.source} (--length)")
    if not 1 <= step <= T:
        raise ValueError(f"stride is {step:,}: give 1 to {T:,}, the length of a window (--stride)")
    if batch is not None and batch < 1:
        raise ValueError(f"batch is {batch}: give at least 1 row (--batch)")
    return T, step


def evaluate(
    model: "Model",
    files: Files,
    *,
    length: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    format: str | None = None,
    train_on: Literal["assistant", "completion", "all"] | None = None,
    text_field: str = "text",
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    on_bad: Literal["stop", "skip"] = "stop",
    split: str = "test",
    offline: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """How well a model predicts the documents of these files, folders, globs or hub datasets: see Evaluation.

    length: tokens that are read at once; the context, at most 2048, when not given. stride: tokens from one window of a
    longer document to the next; half of length when not given. Every token is predicted once, and after the first
    window sees at least length - stride tokens before it; documents do not see each other. batch: rows of `length`
    tokens that are computed together. format, train_on, the fields, on_bad, split: as in training (TextOptions,
    sources.find). progress: is told documents and tokens so far. Raises ValueError or OSError with what is wrong,
    where, and the way out.
    """
    tokenizer = _tokenizer(model)
    T, step = sizes(model, length, stride, batch)
    options = TextOptions(format, train_on, text_field, prompt_field, completion_field)
    read = Reading(tokenizer, files, options, on_bad, split=split, offline=offline)
    nats, tokens = 0.0, 0
    for block in read.blocks(T, step):
        for _, found in scores(model, block, batch):
            nats -= float(found.logprobs.sum(dtype=np.float64))
            tokens += len(found.logprobs)
            if progress is not None:
                progress(read.documents, tokens)
    return _checked(Evaluation(nats, tokens, read.bytes, read.documents, dict(read.dropped)), model)


def _tokenizer(model: "Model") -> Tokenizer:
    if isinstance(model, str | Path):
        raise ValueError(f"evaluate takes a model, not a name: jaxlm.evaluate(jaxlm.load({str(model)!r}), …)")
    if model.tokenizer is None:
        raise ValueError(f"{model.source} has no tokenizer: load it with tokenizer=FOLDER (--tokenizer)")
    return model.tokenizer


def _checked(found: Evaluation, model: "Model") -> Evaluation:
    if not found.tokens:
        counts = ", ".join(f"{count:,} {why}" for why, count in found.dropped.items())
        raise ValueError(f"there is no text to predict (rows dropped: {counts or 'none'})")
    if not math.isfinite(found.nats):
        raise ValueError(f"{model.source} gives logits that are no numbers: try --dtype float32, or look at its "
                         "weights (jaxlm verify)")  # fmt: skip
    return found
