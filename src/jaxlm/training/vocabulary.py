"""The chat template that a run gives its tokenizer, and the tokens and weights that the template needs.

The rows of new tokens, in the embedding and the head, begin as the mean of the rows of all earlier tokens. Random rows
would make a new token as likely as the likeliest ones, or its input larger than any other (Hewitt 2021, "Initializing
new word embeddings for pretrained language models").
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn import params
from jaxlm.processing.chat_formats import chat_format
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.training import step
from jaxlm.training.config import Run

MULTIPLE = 64  # of a larger vocabulary, so that meshes divide it


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


def with_new_rows(weights: Any, table: params.Table, config: Any, new_rows: tuple[int, int], over: Any) -> Any:
    """Returns weights whose embedding and head have the vocabulary of the config, with new rows.

    Args:
        weights: The weights of the checkpoint, sharded over the mesh. Their embedding and head are consumed.
        table: The family's PARAMS.
        config: The family's Config of the run.
        new_rows: As in Vocabulary.
        over: The mesh; None for one device.
    """
    for row in params.tensors(table, config):
        if row.letters.startswith("V"):
            fill = partial(_filled, V=config.V, begin=new_rows[0], end=new_rows[1])
            sharding = step.weight_sharding(row.letters, row.shape, over)
            params.put(weights, row.path, jax.jit(fill, out_shardings=sharding)(params.get(weights, row.path)))
    return weights


def _filled(old: jax.Array, V: int, begin: int, end: int) -> jax.Array:
    """[V',D] to [V,D], whose rows from `begin` to `end` are the mean of those before."""
    mean = old[:begin].mean(0, dtype=jnp.float32).astype(old.dtype)
    rest = [(0, 0)] * (old.ndim - 1)
    index = jnp.arange(V).reshape(V, *[1] * len(rest))
    return jnp.where((begin <= index) & (index < end), mean, jnp.pad(old, [(0, V - len(old)), *rest]))
