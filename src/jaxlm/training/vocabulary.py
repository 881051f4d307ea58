"""The chat template that a run gives its tokenizer, and the tokens and weights that the template needs.

The rows of new tokens, in the embedding and the head, begin as the mean of the rows of all earlier tokens. Random rows
would make a new token as likely as the likeliest ones, or its input larger than any other (Hewitt 2021, "Initializing
new word embeddings for pretrained language models").
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.checkpoint.writer import LazyTensor
from jaxlm.processing.chat_formats import chat_format
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.training.config import Run

MULTIPLE = 64  # of a larger vocabulary, so that meshes divide it
ROWS = 4096  # that are read at a time for their mean


class Vocabulary(NamedTuple):
    """The vocabulary of a run.

    Attributes:
        size: vocab_size of the model, at least the number of tokens.
        new_rows: The rows (begin, end) of the embedding and the head that begin as the mean of the rows before; None
            without new tokens.
        notes: What the user should know.
    """

    size: int
    new_rows: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def set_chat_template(run: Run, tokenizer: Tokenizer, V: int) -> Vocabulary:
    """Gives the tokenizer the chat template of the run, and adds the tokens that the template needs.

    Args:
        run: The run.
        tokenizer: Its tokenizer, which is changed.
        V: vocab_size of the model.

    Returns:
        The vocabulary. Spare rows (of ids without a token) are used if there are enough, else it grows. A spare row is
        overwritten even if it is not 0: no data had its id, and many models have random or decayed spare rows.

    Raises:
        ValueError: The template is unknown, or the run trains an adapter and the template needs new tokens.
    """
    if run.chat_template is None:
        return Vocabulary(V)
    hf, before = tokenizer.hf, tokenizer.vocab_size
    template, tokens = chat_format(run.chat_template, hf)
    notes = []
    if hf.chat_template and hf.chat_template != template:
        notes.append(f"the chat template {run.chat_template} replaces that of the tokenizer")
    hf.chat_template = template
    missing = [token for token in tokens if token not in hf.get_vocab()]
    if missing and run.method == "lora":
        raise ValueError(
            f"the chat template {run.chat_template} needs the tokens {', '.join(missing)}, which the tokenizer of "
            f"{run.model} does not have, and an adapter cannot learn new tokens: train all weights (--method full), or "
            "use tokens that the vocabulary has (--chat-template FILE.jinja)"
        )
    tokenizer.add_special_tokens(tokens)
    if not missing:
        return Vocabulary(V, None, tuple(notes))
    needed = tokenizer.vocab_size
    grown = needed if needed <= V else -(-needed // MULTIPLE) * MULTIPLE
    size = max(V, grown)
    where = "spare rows of the vocabulary" if size == V else f"vocab_size {size:,} instead of {V:,}"
    notes.append(f"new tokens: {', '.join(missing)} ({where})")
    return Vocabulary(size, (before, grown), tuple(notes))


def with_vocab_size(raw: Mapping[str, Any], V: int) -> dict[str, Any]:
    """Returns the contents of config.json with another vocab_size, which a model with vision has in its text_config."""
    if isinstance(text := raw.get("text_config"), Mapping):
        return {**raw, "text_config": {**text, "vocab_size": V}}
    return {**raw, "vocab_size": V}


def read_with_new_rows(tensor: Any, shape: tuple[int, ...], new_rows: tuple[int, int], where: Any) -> jax.Array:
    """Reads a tensor of the checkpoint in float32, with new rows. A process reads the rows that its devices hold, and
    once all rows for their mean, which is then the same on every mesh.

    Args:
        tensor: The embedding or the head in its file.
        shape: Its shape in the run, [V,D].
        new_rows: As in Vocabulary.
        where: The sharding of the array.
    """
    begin, end = new_rows
    old = LazyTensor(tensor, (tensor.shape[0], *shape[1:]))
    sums = [old.read_rows(i, min(ROWS, begin - i)).sum(0, dtype=np.float64) for i in range(0, begin, ROWS)]
    mean = np.sum(sums, 0) / begin

    def block(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0])
        ids = np.arange(first, last)
        out = np.empty((last - first, *shape[1:]), np.float32)
        kept = max(0, min(last, len(old)) - first)
        if kept:
            out[:kept] = old.read_rows(first, kept)
        out[(begin <= ids) & (ids < end)] = mean
        return out[(slice(None), *index[1:])]

    return jax.make_array_from_callback(shape, where, block)
