"""What a user may ask of generation: one dataclass for the Python arguments and the command-line flags.

Imports neither JAX nor transformers, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from jaxlm.checkpoint.errors import explain_errors

# Where neither the user nor the model says anything. transformers would add top_k=50 whenever it samples.
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
    """How to continue a prompt. What is left at None is the model's own (its generation_config.json), else neutral."""

    max_tokens: int | None = None
    """Most tokens to generate; 256, or as many as the context has room for, when not given."""
    temperature: float | None = None
    """0 takes the likeliest token every time; higher is more random, 1 is the model's own distribution."""
    top_k: int | None = None
    """Draw from the K likeliest tokens only; 0 is off."""
    top_p: float | None = None
    """Draw from the likeliest tokens that hold this share of the probability; 1 is off."""
    min_p: float | None = None
    """Draw from tokens at least this fraction as likely as the likeliest; 0 is off."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens of the prompt and the answer less likely to come again; 1 is off."""
    presence_penalty: float | None = None
    """Taken off the logit of each token already generated, -2 to 2; 0 is off."""
    frequency_penalty: float | None = None
    """Taken off the logit of a token once for each time it was generated, -2 to 2; 0 is off."""
    logit_bias: dict[int, float] | None = None
    """Token ids and what to add to their logits: 100 all but forces a token, -100 all but bans it."""
    stop: tuple[str, ...] | None = None
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the model's own; their text is not part of it."""
    seed: int | None = None
    """Makes the draws repeatable; without it they differ from run to run."""
    ignore_eos: bool = False
    """Do not end at the model's end-of-text tokens."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many likeliest ones, 0 to 20."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", None if self.stop is None else _tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple(() if self.stop_token_ids is None else self.stop_token_ids))

    def validate(self) -> SamplingParams:
        """Itself. ValueError names the first field out of its range, the range, and its flag."""
        for name, (allowed, text) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed(value):
                raise ValueError(f"{name}={reprlib.repr(value)}: must be {text} (--{name.replace('_', '-')})")
        return self

    def resolve(self, generation_config: Mapping[str, Any]) -> SamplingParams:
        """With every sampling number filled in: the user's, else the model's, else the neutral one.

        As in transformers, a model samples by itself only where its file says `do_sample`; asking for a temperature,
        top_k, top_p or min_p samples too. `max_tokens` and `stop` fall back to the file's `max_new_tokens` and
        `stop_strings` (`stop=()` is none at all). `unsupported` names what else the file asks for. ValueError for a
        value out of range.
        """
        self.validate()
        given = {name: value for name, value in generation_config.items() if value is not None}
        model = {name: given.get(name, neutral) for name, neutral in DEFAULTS.items()}
        model["temperature"] = given.get("temperature", 1.0) if given.get("do_sample") or self._samples() else 0.0
        model["max_tokens"] = given.get("max_new_tokens")
        model["stop"] = given.get("stop_strings", ())
        with explain_errors("the model's generation_config.json is invalid", "set the parameter yourself"):
            return replace(self, **{k: v for k, v in model.items() if getattr(self, k) is None}).validate()

    def _samples(self) -> bool:
        """Whether the user asks for something that only sampling can do."""
        return bool(self.top_k) or bool(self.min_p) or (self.top_p is not None and self.top_p < 1)

    @property
    def penalized(self) -> bool:
        """Whether a resolved option needs the tokens so far to be counted."""
        return any(
            getattr(self, name) != DEFAULTS[name]
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
        )


def from_kwargs(**kwargs: Any) -> SamplingParams:
    """Options from keyword arguments, validated.

    TypeError, as for any function, for a name that is no option; ValueError for a value out of range.
    """
    names = [field.name for field in fields(SamplingParams)]
    for name in kwargs:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = _OTHER_TOOLS.get(name) or (
                f"did you mean {close[0]!r}?" if close else f"options: {', '.join(names)}"
            )
            raise TypeError(f"unknown option {name!r}; {hint}")
    return SamplingParams(**kwargs).validate()


def unsupported(generation_config: Mapping[str, Any]) -> list[str]:
    """Fields of a generation_config.json that ask for something else than is computed here, for the caller to name.

    A field that is not known here counts unless it is null, false or empty: it may be one of tomorrow's.
    """
    read = {"do_sample", "temperature", "max_new_tokens", "stop_strings", *DEFAULTS}
    return [
        name
        for name, value in generation_config.items()
        # `is False`: 0 equals False, and token 0 is a token.
        if not (name in read or name in _HARMLESS or value is False or value in (None, "", [], {}, _OFF.get(name)))
    ]


def _tuple(value: Any) -> tuple[Any, ...]:
    """Several values, or the one that was given alone."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _number(low: float, high: float = 3e38, *, above: bool = False) -> Callable[[Any], bool]:
    """Whether a value is a number in [low, high], or above low; float32 ends soon after 3e38."""

    def allowed(x: Any) -> bool:
        if not isinstance(x, Real) or isinstance(x, bool):
            return False
        number: Any = x  # not float(x), which overflows
        return (low < number if above else low <= number) and number <= high

    return allowed


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    """Whether a value is an integer in [low, high]; ids and counts are int32."""
    return lambda x: isinstance(x, Integral) and not isinstance(x, bool) and low <= int(x) <= high


def _biases(value: Any) -> bool:
    """Whether a value maps token ids to finite numbers."""
    token, bias = _integer(0), _number(-3e38)
    return isinstance(value, Mapping) and all(token(key) and bias(added) for key, added in value.items())


def _texts(stop: Any) -> bool:
    """Whether these are texts that may be looked for after every token."""
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
    "stop": (_texts, "at most 10,000 characters in texts, none of them empty"),
    "stop_token_ids": (lambda ids: all(map(_integer(0), ids)), "token ids (integers, 0 or more)"),
    # JAX keeps 32 bits of a seed: a longer one would repeat the draws of another.
    "seed": (_integer(0, 2**32 - 1), "an integer from 0 to 4294967295"),
    "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
    "logprobs": (_integer(0, 20), "an integer from 0 to 20"),
}

# What users of transformers and of other tools type.
_OTHER_TOOLS = {
    "do_sample": "temperature=0 is greedy, a temperature above 0 samples",
    "max_new_tokens": "did you mean 'max_tokens'? (it counts new tokens only)",
    "max_length": "did you mean 'max_tokens'? (it counts new tokens only)",
    "stop_strings": "did you mean 'stop'?",
}

# The values at which fields of transformers' GenerationConfig change nothing, beside null, false and empty.
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

# Fields that change no drawn token: ids read elsewhere, caches, forms of output, what only beam search reads, and
# max_length, where the context length bounds prompt and answer.
_HARMLESS = frozenset(
    """
    bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version _from_model_config _commit_hash
    use_cache cache_implementation cache_config max_cache_len low_memory prefill_chunk_size compile_config
    disable_compile continuous_batching_config output_attentions output_hidden_states output_scores output_logits
    return_dict_in_generate max_length early_stopping length_penalty renormalize_logits remove_invalid_values
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_early_exit assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size
    use_mtp speculation_type
    """.split()  # noqa: SIM905 (a list takes forty lines)
)
