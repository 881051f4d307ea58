"""Sampling parameters: one dataclass for the Python arguments and the command-line flags.

Imports neither JAX nor transformers, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
import logging
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypedDict

from jaxlm.checkpoint.errors import explain_errors

_log = logging.getLogger(__name__)
# Used where neither the user nor generation_config.json sets a value. transformers would add top_k=50 when it samples.
DEFAULTS = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. If a field is None, the value of the model's generation_config.json is used, else the
    neutral value."""

    max_tokens: int | None = None
    """Maximum number of tokens to generate. Default: 256, within the context length."""
    temperature: float | None = None
    """Sampling temperature. 0 is greedy decoding, 1 is the model's own distribution. Default: 0, unless
    generation_config.json sets do_sample or top_k, top_p or min_p is given; then that of the file, else 1."""
    top_k: int | None = None
    """Sample from the K most likely tokens only. 0 is off."""
    top_p: float | None = None
    """Nucleus sampling: sample from the most likely tokens with this total probability. 1 is off."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as likely as the most likely one. 0 is off."""
    repetition_penalty: float | None = None
    """Penalty on tokens of the prompt and the answer. Values above 1 reduce repetition. 1 is off."""
    presence_penalty: float | None = None
    """Subtracted from the logit of each token already generated, -2 to 2. 0 is off."""
    frequency_penalty: float | None = None
    """Subtracted from the logit of a token for each time it was generated, -2 to 2. 0 is off."""
    logit_bias: dict[int, float] | None = None
    """Token ids and the values to add to their logits. 100 practically forces a token, -100 bans it."""
    stop: tuple[str, ...] | None = None
    """Stop strings. They end the answer and are not included in it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, in addition to the model's EOS tokens. Their text is not included."""
    seed: int | None = None
    """Random seed. Default: a new seed per run."""
    ignore_eos: bool = False
    """Do not stop at the model's EOS tokens."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many most likely tokens, 0 to 20."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", None if self.stop is None else _tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple(() if self.stop_token_ids is None else self.stop_token_ids))

    def validate(self) -> SamplingParams:
        """Checks all fields and returns self.

        Raises:
            ValueError: A field is out of range; the message has its name, range and flag.
        """
        for name, (allowed, text) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise ValueError(f"{name}={reprlib.repr(value)}: must be {text} (--{name.replace('_', '-')})")
        return self

    def resolve(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """Sets every sampling parameter that is None to the value of the model, else to the neutral value.

        As in transformers, sampling is off by default unless generation_config.json sets `do_sample`. Passing a
        temperature, top_k, top_p or min_p also turns it on. The defaults of `max_tokens` and `stop` are
        `max_new_tokens` and `stop_strings` in the file; `stop=()` means no stop strings. `unsupported` lists the other
        fields.

        Args:
            generation_config: Contents of generation_config.json.

        Raises:
            ValueError: A value is out of range.
        """
        self.validate()
        config = {name: value for name, value in generation_config.items() if value is not None}
        defaults = {name: config.get(name, neutral) for name, neutral in DEFAULTS.items()}
        defaults["temperature"] = config.get("temperature", 1.0) if config.get("do_sample") or self._samples() else 0.0
        defaults["max_tokens"] = config.get("max_new_tokens")
        defaults["stop"] = config.get("stop_strings", ())
        with explain_errors("the model's generation_config.json is invalid", "pass the parameter explicitly"):
            return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None}).validate()

    def _samples(self) -> bool:
        """Whether a parameter is set that has an effect only when sampling."""
        return bool(self.top_k) or bool(self.min_p) or (self.top_p is not None and self.top_p < 1)

    @property
    def penalized(self) -> bool:
        """Whether a penalty is on. Penalties need token counts."""
        return any(
            getattr(self, name) != DEFAULTS[name]
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
        )


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments, for type checkers: a misspelled option is a type error."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: dict[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: int | Sequence[int] | None
    seed: int | None
    ignore_eos: bool
    logprobs: int | None


def from_kwargs(others: Sequence[str] = (), /, **kwargs: Any) -> SamplingParams:
    """Creates validated SamplingParams from keyword arguments.

    Args:
        others: Names of other options of the caller, for the message about an unknown one.
        **kwargs: Fields of SamplingParams.

    Raises:
        TypeError: A name is unknown; the message suggests the correct one.
        ValueError: A value is out of range.
    """
    names = [field.name for field in fields(SamplingParams)]
    for name in kwargs:
        if name not in names:
            close = difflib.get_close_matches(name, [*names, *others], n=1)
            hint = _OTHER_TOOLS.get(name) or (
                f"did you mean {close[0]!r}?" if close else f"options: {', '.join([*names, *others])}"
            )
            raise TypeError(f"unknown option {name!r}; {hint}")
    return SamplingParams(**kwargs).validate()


def unsupported(generation_config: Mapping[str, Any]) -> list[str]:
    """Names of the fields of a generation_config.json that are set and not supported.

    Unknown fields are included unless they are null, false or empty, because a later version of transformers may have
    added them. Private fields (`_from_model_config`) and ids of tokens that are not forced are not.
    """
    read = {"do_sample", "temperature", "max_new_tokens", "stop_strings", *DEFAULTS}

    def is_harmless(name: str) -> bool:
        is_id = name.endswith(("_token_id", "_token_ids")) and not name.startswith("forced_")
        return name in read or name in _HARMLESS or name.startswith("_") or is_id

    return [
        name
        for name, value in generation_config.items()
        # `is False`, because 0 == False, and 0 is a valid token id.
        if not (is_harmless(name) or value is False or value in (None, "", [], {}, _OFF.get(name)))
    ]


def log_unsupported(generation_config: Mapping[str, Any]) -> None:
    """Logs the names of `unsupported` fields in one line."""
    if names := unsupported(generation_config):
        more = f" and {len(names) - 20} more" * (len(names) > 20)
        text = ", ".join(name[:80] for name in names[:20]) + more
        _log.warning("generation_config.json sets fields that jaxlm does not compute: %s", text)


def _tuple(value: Any) -> tuple[Any, ...]:
    """Converts a list or a single value to a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _number(low: float, high: float = 3e38, *, above: bool = False) -> Callable[[Any], bool]:
    """Tests for a number in [low, high], or in (low, high] if `above`. The maximum of float32 is about 3.4e38."""

    def allowed(x: Any) -> bool:
        if not isinstance(x, Real) or isinstance(x, bool):
            return False
        number: Any = x  # not float(x), which overflows
        return (low < number if above else low <= number) and number <= high

    return allowed


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    """Tests for an integer in [low, high]. Token ids and counts are int32."""
    return lambda x: isinstance(x, Integral) and not isinstance(x, bool) and low <= int(x) <= high


def _biases(value: Any) -> bool:
    """Tests for a mapping of token ids to finite numbers."""
    token, bias = _integer(0), _number(-3e38)
    return isinstance(value, Mapping) and all(token(key) and bias(added) for key, added in value.items())


def _texts(stop: Any) -> bool:
    """Tests for non-empty stop strings whose total length is limited, since they are searched after every token."""
    return all(isinstance(text, str) and text for text in stop) and sum(map(len, stop)) <= 10_000


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_integer(1), "an integer, 1 or more"),
    "temperature": (_number(0), "a finite number, 0 (greedy) or more"),
    "top_k": (_integer(0), "an integer, 0 (off) or more"),
    "top_p": (_number(0, 1), "a number from 0 to 1 (off)"),
    "min_p": (_number(0, 1), "a number from 0 (off) to 1"),
    "repetition_penalty": (_number(0, above=True), "a finite number above 0; 1 is off"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2; 0 is off"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2; 0 is off"),
    "logit_bias": (_biases, "token ids (integers, 0 or more) with finite numbers"),
    "stop": (_texts, "non-empty strings, at most 10,000 characters in all"),
    "stop_token_ids": (lambda ids: all(map(_integer(0), ids)), "token ids (integers, 0 or more)"),
    # JAX uses 32 bits of a seed, so a longer seed would be equivalent to a shorter one.
    "seed": (_integer(0, 2**32 - 1), "an integer from 0 to 4294967295"),
    "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
    "logprobs": (_integer(0, 20), "an integer from 0 to 20"),
}

# Names in transformers and other tools.
_OTHER_TOOLS = {
    "do_sample": "temperature=0 is greedy, a temperature above 0 samples",
    "max_new_tokens": "did you mean 'max_tokens'? It counts new tokens only",
    "max_length": "did you mean 'max_tokens'? It counts new tokens only",
    "stop_strings": "did you mean 'stop'?",
    "num_predict": "did you mean 'max_tokens'?",
    "n_predict": "did you mean 'max_tokens'?",
    "max_completion_tokens": "did you mean 'max_tokens'?",
    "temp": "did you mean 'temperature'?",
    "repeat_penalty": "did you mean 'repetition_penalty'?",
    "eos_token_id": "did you mean 'stop_token_ids'?",
    "top_logprobs": "did you mean 'logprobs'?",
    "num_return_sequences": "did you mean 'n', of jaxlm.generate?",
    "response_format": "did you mean 'schema', of jaxlm.generate?",
    "json_schema": "did you mean 'schema', of jaxlm.generate?",
    "enable_thinking": "pass it to the chat template: template_args={'enable_thinking': False}",
    "tools": "pass them to the chat template: template_args={'tools': […]}",
    "streamer": "jaxlm.stream yields the text in chunks",
}

# Neutral values of fields of transformers' GenerationConfig, other than null, false and empty.
_OFF = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}

# Fields that do not change the sampled tokens: caches, output formats, options of beam search and of speculative
# decoding, what tools for chats and servers add, and max_length (the context length limits prompt and answer).
_HARMLESS = frozenset(
    """
    transformers_version use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size
    compile_config disable_compile continuous_batching_config output_attentions output_hidden_states output_scores
    output_logits return_dict_in_generate max_length early_stopping length_penalty renormalize_logits
    remove_invalid_values is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size use_mtp speculation_type
    trust_remote_code chat_format max_window_size max_context_size max_position_embeddings
    """.split()  # noqa: SIM905 (a list takes forty lines)
)
