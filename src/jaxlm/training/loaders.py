"""The data loaders of a run, from its options: training data, which may be a mixture, and validation data."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxlm.data.corpus import Corpus
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import DataLoader, held_out
from jaxlm.data.sources import group_named, parse_weights, short_names
from jaxlm.devices import distributed, mesh
from jaxlm.processing.tokenizer import NoChatTemplate
from jaxlm.training.config import Run

Progress = Callable[[int, int], None]  # documents, tokens


def make_loaders(
    run: Run, tokenizer: Any, over: Any, progress: Progress | None
) -> tuple[DataLoader | Mixture, dict[str, DataLoader]]:
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
    splits = ["train"] * len(sources) + ["validation"] * len(sets)
    corpora = _corpora(run, tokenizer, [*sources, *sets.values()], splits, progress)
    load = partial(_load, run, local_rows(run.batch, over))
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
    from jaxlm.data.documents import TextOptions

    data = run.data
    fields = ("format", "train_on", "text_field", "prompt_field", "completion_field")
    options = TextOptions(
        **{name: getattr(data, name) for name in fields},
        template_args=data.template_variables,
    )
    prepared = [
        partial(prepare, tuple(some), tokenizer, options, split=split, config=data.config, revision=data.revision,
                on_bad=data.on_bad, progress=progress)
        for some, split in zip(names, splits)
    ]  # fmt: skip
    try:
        corpora = [make() for make in prepared] if distributed.is_coordinator() else []
    except NoChatTemplate:
        raise ValueError(
            f"messages need a chat template, and the tokenizer of {run.tokenizer or run.model} has none: choose one "
            "(--chat-template chatml)"
        ) from None
    distributed.gather("prepared")
    return corpora or [make() for make in prepared]


def local_rows(B: int, over: Any) -> slice:
    """Returns the range of rows of a batch that contains all rows of this process's devices."""
    if over is None:
        return slice(0, B)
    sharding = mesh.sharding("BT", (B, 1), over)
    spans = [index[0].indices(B) for index in sharding.addressable_devices_indices_map((B, 1)).values() if index]
    return slice(min(begin for begin, _, _ in spans), max(end for _, end, _ in spans))
