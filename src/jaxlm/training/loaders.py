"""The data loaders of a run, from its options: training data, which may be a mixture, and validation data."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.atomic import write_atomically
from jaxlm.checkpoint.errors import explain_errors
from jaxlm.data.corpus import Corpus
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import DataLoader, held_out
from jaxlm.data.source_names import group_named, parse_weights, short_names
from jaxlm.data.sources import find_sources
from jaxlm.data.streaming import Position, StreamingLoader
from jaxlm.devices import distributed, mesh
from jaxlm.processing.tokenizer import NoChatTemplate
from jaxlm.training.config import Run

WINDOWS = "windows.json"  # in the run's folder: the positions of the windows of streamed data
Progress = Callable[[int, int], None]  # documents, tokens


def make_loaders(
    run: Run, tokenizer: Any, over: Any, progress: Progress | None
) -> tuple[DataLoader | StreamingLoader | Mixture, dict[str, DataLoader]]:
    """Returns the data loader of the training data, and those of the validation data by the names of their sets.

    Args:
        run: The run.
        tokenizer: Its tokenizer.
        over: Its mesh; None on one device.
        progress: Called with the number of documents and tokens so far while data are tokenized.
    """
    data = run.data
    weighted = parse_weights((*data.train, *filter(None, [data.dataset])))
    names, weights = [name for name, _ in weighted], [weight for _, weight in weighted if weight is not None]
    sources = [[name] for name in names] if weights else [names]
    sets = group_named(data.valid)
    share = local_rows(run.batch, over)
    load = partial(_load, run, share)
    if data.streaming:
        corpora = _corpora(run, tokenizer, list(sets.values()), ["validation"] * len(sets), progress)
        streams = _streams(run, tokenizer, sources, share, progress)
        valid = {name: load(corpus) for name, corpus in zip(sets, corpora)}
        return Mixture(names, streams, weights) if weights else streams[0], valid
    splits = ["train"] * len(sources) + ["validation"] * len(sets)
    corpora = _corpora(run, tokenizer, [*sources, *sets.values()], splits, progress)
    valid = {name: load(corpus) for name, corpus in zip(sets, corpora[len(sources) :])}
    corpora = corpora[: len(sources)]
    if data.valid_split:
        out = [held_out(len(corpus), data.valid_split, run.seed) for corpus in corpora]
        labels = short_names(names) if weights else [""]
        valid = {label: load(corpus, kept=kept) for label, corpus, kept in zip(labels, corpora, out)}
        loaders = [load(corpus, kept=~kept) for corpus, kept in zip(corpora, out)]
    else:
        loaders = [load(corpus) for corpus in corpora]
    return Mixture(names, loaders, weights) if weights else loaders[0], valid


def _load(run: Run, share: slice, corpus: Corpus, **more: Any) -> DataLoader:
    data = run.data
    return DataLoader(corpus, run.batch, run.length, run.seed, data.packing, share, data.long, **more)


def _corpora(
    run: Run, tokenizer: Any, names: Sequence[Sequence[str]], splits: Sequence[str], progress: Progress | None
) -> list[Corpus]:
    """Returns the corpora of sources. The coordinator tokenizes; the other processes load them from the cache."""
    from jaxlm.data.corpus import prepare

    data = run.data
    prepared = [
        partial(prepare, tuple(some), tokenizer, _options(run), split=split, config=data.config, revision=data.revision,
                on_bad=data.on_bad, streaming=data.streaming, progress=progress)
        for some, split in zip(names, splits)
    ]  # fmt: skip
    with _explained(run):
        corpora = [make() for make in prepared] if distributed.is_coordinator() else []
    distributed.gather("prepared")
    return corpora or [make() for make in prepared]


def _streams(
    run: Run, tokenizer: Any, names: Sequence[Sequence[str]], share: slice, progress: Progress | None
) -> list[StreamingLoader]:
    """Returns the data loaders of streamed sources. Every process reads them."""
    from jaxlm.data.documents import DocumentTokenizer

    data, before = run.data, _positions(run.out / WINDOWS)
    streams = []
    for i, some in enumerate(names):
        sources = find_sources(tuple(some), config=data.config, revision=data.revision, streaming=True)
        texts = DocumentTokenizer(tokenizer, _options(run))
        with _explained(run):
            stream = StreamingLoader(
                sources, texts, run.batch, run.length, run.seed, data.packing, share, data.long,
                buffer=data.shuffle_buffer, on_bad=data.on_bad, progress=progress,
            )  # fmt: skip
        digest, positions = before[i] if i < len(before) else ("", [])
        if digest == stream.digest:
            stream.continue_from(positions)
        streams.append(stream)
    return streams


def streams_of(data: Any) -> list[StreamingLoader]:
    """Returns the data loaders that are streamed of the training data."""
    return data.streams if isinstance(data, Mixture) else [data] if isinstance(data, StreamingLoader) else []


def describe(run: Run, data: Any) -> list[str]:
    """Returns lines about the training data, and a warning if one batch has more rows than an epoch. (Of a mixture, the
    numbers of epochs are logged.)"""
    lines = data.describe()
    if isinstance(data, Mixture) or streams_of(data) or data.epoch(1) <= 1:
        return lines
    rows = data.rows()
    what = f"an epoch has {rows:,} row{'s' * (rows != 1)} of {run.length:,} tokens, and a batch {run.batch:,}"
    way = "a smaller --batch or --length" + ("" if run.data.packing == "none" else ", or --data.packing none")
    return [*lines, f"{what}: each step trains on every document {data.epoch(1):.3g} times (choose {way})"]


def save_positions(data: Any, folder: Path) -> None:
    """Writes windows.json, with which a run of streamed data resumes without reading them from the beginning."""
    if streams := streams_of(data):
        write_atomically(folder / WINDOWS, json.dumps([[one.digest, one.positions] for one in streams]))


def _positions(path: Path) -> list[tuple[str, list[Position]]]:
    """Returns the digest and the positions of each stream of an earlier run."""
    if not path.exists():
        return []
    hint = "delete it, and the data are read again from their beginning"
    with explain_errors(f"{path} is damaged", hint, (ValueError, TypeError)):
        return [
            (str(digest), [Position(*place) for place in places]) for digest, places in json.loads(path.read_text())
        ]


def _options(run: Run) -> Any:
    """Returns how rows are read."""
    from jaxlm.data.documents import TextOptions

    fields = ("format", "train_on", "text_field", "prompt_field", "completion_field")
    return TextOptions(**{name: getattr(run.data, name) for name in fields}, template_args=run.data.template_variables)


@contextmanager
def _explained(run: Run) -> Iterator[None]:
    """Says what to do if the tokenizer has no chat template."""
    try:
        yield
    except NoChatTemplate:
        raise ValueError(
            f"messages need a chat template, and the tokenizer of {run.tokenizer or run.model} has none: choose one "
            "(--chat-template chatml)"
        ) from None


def local_rows(B: int, over: Any) -> slice:
    """Returns the range of rows of a batch that contains all rows of this process's devices."""
    if over is None:
        return slice(0, B)
    sharding = mesh.sharding("BT", (B, 1), over)
    spans = [index[0].indices(B) for index in sharding.addressable_devices_indices_map((B, 1)).values() if index]
    return slice(min(begin for begin, _, _ in spans), max(end for _, end, _ in spans))
