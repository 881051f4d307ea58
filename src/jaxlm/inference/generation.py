"""generate and stream: text from prompts in any format, with token counts and speeds."""

import hashlib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Unpack, overload

from jaxlm.devices import distributed, hardware
from jaxlm.inference.completion import Completion, CompletionChunk, join_chunks
from jaxlm.inference.engine import Engine
from jaxlm.inference.memory import check_memory
from jaxlm.inference.prompts import split_prompts
from jaxlm.inference.requests import RequestOptions, requests_for, require_untraced
from jaxlm.inference.sampling import LogitsProcessor
from jaxlm.model import Model, require_model

Message = Mapping[str, Any]  # {"role", "content"}, for a chat template
# One prompt: text, messages, or token ids.
Prompt = str | Sequence[Message] | Sequence[int]


@overload
def generate(
    model: Model,
    prompt: Prompt,
    *,
    n: None = None,
    batch_size: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Unpack[RequestOptions],
) -> Completion: ...


@overload
def generate(
    model: Model,
    prompt: Sequence[Prompt],
    *,
    n: None = None,
    batch_size: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Unpack[RequestOptions],
) -> list[Completion]: ...


@overload
def generate(
    model: Model,
    prompt: Prompt,
    *,
    n: int,
    batch_size: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Unpack[RequestOptions],
) -> list[Completion]: ...


@overload
def generate(
    model: Model,
    prompt: Sequence[Prompt],
    *,
    n: int,
    batch_size: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Unpack[RequestOptions],
) -> list[list[Completion]]: ...


def generate(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    n: int | None = None,
    batch_size: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Unpack[RequestOptions],
) -> Completion | list[Completion] | list[list[Completion]]:
    """Generates the continuation of a prompt, or the answer to a chat.

    Args:
        model: The model.
        prompt: A str (continued without the chat template), a list of messages {"role", "content"} (rendered by the
            chat template; a last message of the assistant is continued) or a list of token ids. A list of these is a
            batch.
        n: Number of completions of each prompt, which differ if the temperature is above 0. The prompt is prefilled
            once.
        batch_size: Number of sequences to decode together (continuous batching). The default depends on the platform.
        logits_processors: Functions of the logits [B,V] float32, called after logit bias and penalties. They are
            compiled into the program.
        **options: Fields of `SamplingParams` and of `RequestOptions`, such as template_args and schema. The default
            values come from the checkpoint's generation_config.json.

    Returns:
        A Completion, which is a str; a list of them for a batch or if n is given, and a list of lists for both.

    Raises:
        TypeError: An option is unknown, or it is called within jax.jit, jax.grad or jax.vmap.
        ValueError: A prompt or an option is invalid, or the logits are not finite.
        MemoryError: The KV cache does not fit.
    """
    prompts, single = _checked("generate", model, prompt, n, batch_size, logits_processors)
    samples = 1 if n is None else n
    chunks: list[list[list[CompletionChunk]]] = [[[] for _ in range(samples)] for _ in prompts]
    for chunk in _stream(model, prompts, n, batch_size, logits_processors, options):
        chunks[chunk.index][chunk.sample].append(chunk)
    completions = [[join_chunks(each) for each in of_prompt] for of_prompt in chunks]
    if n is None:
        flat = [each for [each] in completions]
        return flat[0] if single else flat
    return completions[0] if single else completions


def stream(
    model: Model,
    prompt: Prompt | Sequence[Prompt],
    *,
    n: int | None = None,
    batch_size: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    **options: Unpack[RequestOptions],
) -> Iterator[CompletionChunk]:
    """Like `generate`, but yields each CompletionChunk as soon as its text is final.

    `index` and `sample` say whose text a chunk is. A chunk never ends inside a character or inside a possible stop
    string. The arguments and errors are those of `generate`.
    """
    prompts, _ = _checked("stream", model, prompt, n, batch_size, logits_processors)
    return _stream(model, prompts, n, batch_size, logits_processors, options)


def _checked(
    caller: str,
    model: Model,
    prompt: Any,
    n: int | None,
    batch_size: int | None,
    logits_processors: Sequence[LogitsProcessor],
) -> tuple[list[Any], bool]:
    """Checks the arguments. Returns the prompts as a list, and whether there is a single one."""
    if isinstance(prompt, Model):
        raise TypeError(f"the arguments are in the wrong order: jaxlm.{caller}(model, prompt)")
    require_model(model, caller)
    require_untraced(model, caller)
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name}={reprlib.repr(value)}: must be an integer, 1 or more")
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more (--{name.replace('_', '-')})")
    if not isinstance(logits_processors, Sequence) or not all(map(callable, logits_processors)):
        raise ValueError("logits_processors must be a list of functions of the logits")
    return split_prompts(prompt)


def _stream(
    model: Model,
    prompts: list[Any],
    n: int | None,
    batch_size: int | None,
    logits_processors: Sequence[LogitsProcessor],
    options: Mapping[str, Any],
) -> Iterator[CompletionChunk]:
    """Prepares the requests. Computation starts when the first chunk is requested."""
    requests = requests_for(model, prompts, options, n or 1)
    if model.is_multiprocess:
        inputs = [(r.ids, r.max_tokens, sorted(r.stop_ids)) for r in requests]
        digest = hashlib.sha256(repr((inputs, requests[0].options, batch_size)).encode()).hexdigest()[:8]
        summary = f"{len(requests)} prompts of {sum(len(r.ids) for r in requests)} tokens ({digest})"
        distributed.assert_equal("what to generate", digest, summary)
    slots = min(len(requests), batch_size or hardware.BATCH[model.device.platform])
    # Prompts share prefixes. With sliding windows this takes more memory, which only equal prompts are worth.
    windows, distinct = any(model.config.windows), len({tuple(r.ids) for r in requests})
    shared = distinct < len(requests) if windows else len(requests) > 1
    lengths = check_memory(model, requests, slots, rings=not (shared and windows))

    def chunks() -> Iterator[CompletionChunk]:
        engine = Engine(model, slots, prefix_cache=shared, logits_processors=logits_processors, lengths=lengths)
        engine.add(*requests)
        try:
            while engine.is_busy:
                for chunk in engine.step():
                    if chunk.error is not None:
                        raise chunk.error
                    yield chunk
        finally:
            engine.drop()

    return chunks()
