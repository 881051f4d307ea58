"""Tiny chat models: an ASCII tokenizer with a chat template, and random weights with varied answers."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp

from helpers.random_weights import draw
from jaxlm.model import Model
from jaxlm.nn import params
from jaxlm.processing.tokenizer import Tokenizer

SPECIAL = ["<bos>", "<system>", "<user>", "<assistant>", "<end>", "<think>", "</think>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no such words') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@contextmanager
def quick_compilation() -> Iterator[None]:
    """Turns off most compiler optimizations: with tiny models, compiling takes nearly all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tokenizer_of(template: str | None, thinking: bool = False) -> Tokenizer:
    """Returns a tokenizer with a token per printable ASCII character and per each of 60 pairs, so that a text has many
    tokenizations."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Rust
    from transformers import PreTrainedTokenizerFast

    letters = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    pairs = list(itertools.islice(itertools.product("aeiou n", "tsrdlmkg"), 60))
    merges = [(a.replace(" ", "Ġ"), b) for a, b in pairs]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    rust = Rust(models.BPE(vocab=vocabulary, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(SPECIAL[:5])
    if thinking:
        rust.add_tokens([AddedToken(tag, normalized=False) for tag in SPECIAL[5:]])
    bos = rust.token_to_id("<bos>")
    rust.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<bos>", eos_token="<end>", chat_template=template)
    return Tokenizer(fast)


def model_of(family, config, tokenizer: Tokenizer | None = None) -> Model:
    weights: dict = {}
    for row in params.tensors(family.PARAMS, config):
        value = draw(row.names[0], row.stored_shape, 3, family.NORM_IDENTITY).reshape(row.shape)
        params.put(weights, row.path, jnp.asarray(value))
    return Model(family, config, weights, tokenizer)


SIZES = {"V": 168, "D": 32, "F": 48, "N": 4, "K": 2, "H": 8, "eps": 1e-6, "tied": False}


def bias_of(model: Model) -> dict[int, float]:
    """Returns a logit bias against special tokens. Text drops them, so its ids would not be those generated."""
    return {model.tokenizer.convert_tokens_to_ids(name): -1e4 for name in SPECIAL[:5]}
