"""Converts prompts in any format to token ids, and resolves max_tokens and stop tokens."""

import operator
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxlm.data.formats import is_system
from jaxlm.devices.mesh import traced
from jaxlm.inference.sampling_params import SamplingParams
from jaxlm.processing.messages import ASSISTANT, ROLES
from jaxlm.processing.tokenizer import Tokenizer
from jaxlm.processing.tokenizer_files import eos_ids

if TYPE_CHECKING:
    from jaxlm.model import Model

KINDS = "a str, a list of messages or a list of token ids"
DEFAULT_TOKENS = 256  # max_tokens if neither the user nor the model sets it

# Arguments of Tokenizer.chat that continue the last message.
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}


def split_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """Returns the prompts as a list, and whether `prompt` is a single prompt.

    Raises:
        ValueError: The list is empty, or `prompt` is a single message.
    """
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, Mapping):  # the output of a transformers tokenizer
        if "input_ids" not in prompt:
            raise ValueError("a chat must be a list of messages: [{'role': 'user', 'content': …}]")
        prompt = prompt["input_ids"]
    if not isinstance(prompt, list | tuple):
        prompt = _listed(prompt)
    if not len(prompt):
        raise ValueError("the list of prompts is empty: pass at least one prompt")
    single = isinstance(prompt[0], Integral | Mapping)
    return [prompt] if single else list(prompt), single


def _listed(prompt: Any) -> list[Any]:
    """The list of an array of token ids, or of a sequence such as a range.

    Raises:
        TypeError: The array is traced.
        ValueError: It is something else.
    """
    if isinstance(prompt, jax.Array) and traced(prompt):
        raise TypeError("a prompt cannot be traced, because text is generated on the host: call it outside of jax.jit, "
                        "jax.grad and jax.vmap, or use model.forward")  # fmt: skip
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
        return list(prompt)
    found = np.asarray(prompt).tolist() if hasattr(prompt, "__array__") else None
    if not isinstance(found, list):
        raise ValueError(f"a prompt must be {KINDS}, or a list of these, not {reprlib.repr(prompt)}")
    return found


def to_ids(model: "Model", prompt: Any, template_args: dict[str, Any], system: str | None = None) -> list[int]:
    """Converts one prompt to token ids.

    Args:
        model: The model.
        prompt: A str, a list of messages, or a list of token ids. A last message of the assistant is continued.
        template_args: Other arguments of Tokenizer.chat: tools, and variables of the chat template.
        system: A system message to put in front of messages.

    Raises:
        ValueError: The prompt is invalid or empty, or has ids outside the vocabulary.
    """
    if system is not None:
        prompt = _with_system(prompt, system)
    if isinstance(prompt, str) and prompt:
        ids = _tokenizer(model).encode(prompt)
    elif isinstance(prompt, list | tuple) and any(isinstance(part, Mapping) for part in prompt):
        continued = CONTINUED if is_continued(prompt, template_args) else {}
        ids = _tokenizer(model).chat(prompt, **{**continued, **template_args})
    else:
        ids = _integers(prompt)
    if not ids:
        bos = model.tokenizer.hf.bos_token if model.tokenizer is not None else None
        hint = f", or {bos!r} to generate without a prompt" if bos else ""
        raise ValueError(f"the prompt is empty: pass some text{hint}")
    if min(ids) < 0 or max(ids) >= model.config.V:
        raise ValueError(f"the prompt has token id {min(ids) if min(ids) < 0 else max(ids)}; "
                         f"this model's ids are 0 to {model.config.V - 1}")  # fmt: skip
    return ids


def is_continued(prompt: Any, template_args: Mapping[str, Any]) -> bool:
    """Whether a prompt ends with a message of the assistant, which is continued, not answered, unless asked for."""
    last = prompt[-1] if isinstance(prompt, list | tuple) and prompt else None
    if template_args.get("add_generation_prompt") or not isinstance(last, Mapping):
        return False
    return ROLES.get(str(last.get("role", last.get("from"))).lower()) == ASSISTANT


def _with_system(prompt: Any, system: str) -> list[Any]:
    """Messages with a system message in front of them."""
    if not isinstance(prompt, list | tuple) or not any(isinstance(part, Mapping) for part in prompt):
        kind = "a text" if isinstance(prompt, str) else "token ids"
        raise ValueError(
            f"system= needs messages, because {kind} as a prompt is continued without the chat template: pass "
            "[{'role': 'user', 'content': …}]"
        )
    if any(is_system(message) for message in prompt):
        raise ValueError("the messages have a system message, and so has system=: omit one of them")
    return [{"role": "system", "content": system}, *prompt]


def _tokenizer(model: "Model") -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError(f"{model.source} has no tokenizer: pass token ids (a list of int) instead of text")
    return model.tokenizer


def _integers(prompt: Any) -> list[int]:
    try:
        return [operator.index(i) for i in prompt]
    except TypeError:
        raise ValueError(f"a prompt must be {KINDS}, not {reprlib.repr(prompt)}") from None


class TooLongError(ValueError):
    """A prompt, or a prompt and max_tokens, exceed the context length or the length of an engine."""


def resolve_max_tokens(model: "Model", ids: list[int], max_tokens: int | None) -> int:
    """The maximum number of tokens to generate after the prompt `ids`.

    Args:
        model: The model.
        ids: Token ids of the prompt.
        max_tokens: The user's limit. None: that of generation_config.json, else DEFAULT_TOKENS, within the context.

    Raises:
        TooLongError: Prompt and max_tokens exceed the context length.
    """
    context = model.config.context
    left = context - len(ids)
    if left < 1:
        raise TooLongError(
            f"the prompt has {len(ids):,} tokens, and the context length of {model.source} is {context:,}: "
            "shorten the prompt"
        )
    if max_tokens is not None and max_tokens > left:
        raise TooLongError(
            f"{len(ids):,} prompt tokens and max_tokens={max_tokens:,} exceed the context length of {model.source}, "
            f"{context:,}: shorten the prompt, or set max_tokens to at most {left} (--max-tokens {left})"
        )
    return max_tokens or min(model.generation_config.get("max_new_tokens") or DEFAULT_TOKENS, left)


def stop_ids(model: "Model", options: SamplingParams) -> frozenset[int]:
    """The stop token ids: those of the sampling parameters and, unless ignore_eos is set, the EOS ids of the model.

    The EOS ids are those in model.generation_config, the EOS token of the tokenizer, and the end-of-turn token of its
    chat template.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    given = options.stop_token_ids
    if given and max(given) >= model.config.V:
        raise ValueError(f"stop_token_ids has {max(given)}; this model's ids are 0 to {model.config.V - 1}")
    if options.ignore_eos:
        return frozenset(given)
    ends, tokenizer = eos_ids(model.generation_config), model.tokenizer
    if tokenizer is None:
        return frozenset([*given, *ends])
    unset = model.generation_config.get("eos_token_id") is None
    return frozenset([*given, *tokenizer.stop_ids_beside(tokenizer.eos_ids if unset else ends)])
