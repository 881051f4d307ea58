"""Options: ranges and their messages, what a model's generation_config.json fills in, what it asks for in vain."""

import dataclasses
import subprocess
import sys

import pytest

import jaxlm
from jaxlm.inference.sampling_params import SamplingOptions, SamplingParams, from_kwargs, log_unsupported, unsupported

# Files of published models, whole but for the token ids.
QWEN25 = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"}
LLAMA31 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "_from_model_config": True, "max_length": 131072}
GEMMA3 = {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid", "pad_token_id": 0}
MODELS = [QWEN25, QWEN3, LLAMA31, GEMMA3]
# What tools and other models write besides, with its source.
VARIANTS = [
    {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0},  # transformers
    {"max_length": 131072, "pad_token_id": 128004, "max_new_tokens": 2048},  # unsloth
    {"num_beams": 1, "early_stopping": False, "length_penalty": 1.0, "output_scores": False, "use_cache": True},
    {"num_assistant_tokens": 20, "assistant_lookbehind": 10, "prompt_lookup_num_tokens": None, "use_mtp": None},
    {"chat_format": "chatml", "max_window_size": 24000, "trust_remote_code": True},  # Qwen 1
    {"user_token_id": 195, "assistant_token_id": 196, "do_sample": True, "repetition_penalty": 1.05},  # Baichuan
    {"cache_implementation": "static", "cache_config": {"batch_size": 1}, "disable_compile": True},  # Gemma, GPTQ
    {"temperature": 0.0, "top_k": 1, "typical_p": 1.0, "renormalize_logits": True, "min_new_tokens": 0},  # vLLM's users
    {"_commit_hash": "0" * 40, "_attn_implementation": "sdpa", "transformers_version": "4.31.0"},
    {"decoder_start_token_id": 2, "forced_bos_token_id": None, "suppress_tokens": [], "guidance_scale": 1},
]

NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def numbers(options: SamplingParams) -> tuple:
    return tuple(getattr(options, name) for name in NUMBERS)


def test_imports_neither_jax_nor_transformers():
    heavy = "{'jax', 'transformers', 'torch', 'numpy'}"
    code = f"import sys, jaxlm.inference.sampling_params; sys.exit(bool({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("file", "want"),
    [
        ({}, (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)),
        (QWEN25, (0.7, 20, 0.8, 0.0, 1.05, 0.0, 0.0)),
        (QWEN3, (0.6, 20, 0.95, 0.0, 1.0, 0.0, 0.0)),
        (LLAMA31, (0.6, 0, 0.9, 0.0, 1.0, 0.0, 0.0)),
        (GEMMA3, (1.0, 64, 0.95, 0.0, 1.0, 0.0, 0.0)),
        ({"do_sample": True, "temperature": None, "top_k": None}, (1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)),
        ({"do_sample": False, "temperature": 0.6}, (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)),
        ({"temperature": 0.6, "repetition_penalty": 1.2}, (0.0, 0, 1.0, 0.0, 1.2, 0.0, 0.0)),
    ],
)
def test_defaults_come_from_generation_config(file, want):
    resolved = SamplingParams().resolve(file)
    assert numbers(resolved) == want
    assert resolved.resolve(QWEN25) == resolved


@pytest.mark.parametrize("file", MODELS)
def test_user_values_take_precedence(file):
    mine = dict(zip(NUMBERS, (0.3, 5, 0.5, 0.1, 1.5, -1.0, 2.0)))
    assert numbers(SamplingParams(**mine).resolve(file)) == tuple(mine.values())
    off = dict(zip(NUMBERS, (0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)))
    assert numbers(SamplingParams(**off).resolve(file)) == tuple(off.values())


@pytest.mark.parametrize(
    ("given", "file", "temperature"),
    [
        ({"top_p": 0.9}, {}, 1.0),
        ({"top_k": 3}, {}, 1.0),
        ({"min_p": 0.1}, {}, 1.0),
        ({"top_p": 0.0}, {}, 1.0),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, {}, 0.0),  # all of them off: nothing that only sampling does
        ({"top_p": 0.9}, {"temperature": 0.6}, 0.6),
        ({"top_p": 0.9, "temperature": 0.0}, {}, 0.0),
        ({"temperature": 0.0}, QWEN3, 0.0),
        ({"seed": 1, "repetition_penalty": 1.1}, {}, 0.0),
    ],
    ids=str,
)
def test_parameters_that_turn_on_sampling(given, file, temperature):
    assert SamplingParams(**given).resolve(file).temperature == temperature


def test_max_tokens_and_stop_come_from_generation_config():
    file = {"max_new_tokens": 64, "stop_strings": "END"}
    assert SamplingParams().resolve({}).max_tokens is None
    assert (SamplingParams().resolve(file).max_tokens, SamplingParams().resolve(file).stop) == (64, ("END",))
    mine = SamplingParams(max_tokens=3, stop=("x",), seed=9, logprobs=2, ignore_eos=True, logit_bias={1: 2.0}).resolve(
        file
    )
    assert (mine.max_tokens, mine.stop, mine.seed, mine.logprobs, mine.ignore_eos) == (3, ("x",), 9, 2, True)
    assert mine.logit_bias == {1: 2.0}
    assert SamplingParams(stop=()).resolve(file).stop == ()  # said to be none, unlike left out
    assert SamplingParams().resolve({}).stop == ()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_tokens", 0, "an integer, 1 or more (--max-tokens)"),
        ("max_tokens", 1.5, "an integer"),
        ("temperature", -0.1, "a finite number, 0 (greedy) or more (--temperature)"),
        ("temperature", float("nan"), "finite"),
        ("temperature", float("inf"), "finite"),
        ("temperature", "hot", "finite"),
        ("temperature", True, "finite"),
        ("top_k", -1, "an integer, 0 (off) or more (--top-k)"),
        ("top_k", 2.5, "an integer"),
        ("top_p", 1.01, "a number from 0 to 1 (off) (--top-p)"),
        ("top_p", -0.01, "from 0 to 1"),
        ("min_p", 1.01, "a number from 0 (off) to 1 (--min-p)"),
        ("min_p", float("nan"), "from 0"),
        ("repetition_penalty", 0, "a finite number above 0; 1 is off (--repetition-penalty)"),
        ("repetition_penalty", float("inf"), "above 0"),
        ("presence_penalty", 2.1, "a number from -2 to 2; 0 is off (--presence-penalty)"),
        ("frequency_penalty", -2.1, "a number from -2 to 2; 0 is off (--frequency-penalty)"),
        ("logit_bias", {-1: 1.0}, "token ids (integers, 0 or more) with finite numbers (--logit-bias)"),
        ("logit_bias", {"5": 1.0}, "integers"),
        ("logit_bias", {5: float("inf")}, "finite"),
        ("logit_bias", [5], "token ids"),
        ("stop", ("a", ""), "(--stop)"),
        ("stop", 5, "strings"),
        ("stop_token_ids", (3, -1), "token ids (integers, 0 or more) (--stop-token-ids)"),
        ("stop_token_ids", "5", "integers"),
        ("seed", -1, "an integer from 0 to 4294967295 (--seed)"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("ignore_eos", 1, "True or False (--ignore-eos)"),
        ("logprobs", 21, "an integer from 0 to 20 (--logprobs)"),
        ("logprobs", True, "an integer"),
    ],
)
def test_out_of_range(name, value, text):
    for check in (SamplingParams(**{name: value}).validate, lambda: SamplingParams(**{name: value}).resolve({})):
        with pytest.raises(ValueError) as error:
            check()
        shown = getattr(SamplingParams(**{name: value}), name)
        assert str(error.value).startswith(f"{name}={shown!r}: must be ")
        assert text in str(error.value)


def test_limits_of_the_ranges_are_allowed():
    low = {"max_tokens": 1, "temperature": 0, "top_k": 0, "top_p": 0, "min_p": 0, "repetition_penalty": 1e-3}
    low |= {"presence_penalty": -2, "frequency_penalty": -2, "logit_bias": {0: -1e9}, "seed": 0, "logprobs": 0}
    high = {"top_p": 1, "min_p": 1, "presence_penalty": 2, "frequency_penalty": 2, "seed": 2**32 - 1, "logprobs": 20}
    for options in (SamplingParams(), SamplingParams(**low), SamplingParams(**high), SamplingParams(logit_bias={})):
        assert options.validate() is options


def test_invalid_value_in_generation_config_raises_unless_overridden():
    file = {"do_sample": True, "temperature": -1.0}
    with pytest.raises(ValueError, match=r"generation_config.json .*temperature=-1.0"):
        SamplingParams().resolve(file)
    assert SamplingParams(temperature=0.5).resolve(file).temperature == 0.5


@pytest.mark.parametrize("file", [*MODELS, *VARIANTS], ids=lambda file: " ".join(file)[:40])
def test_published_files_and_variants_have_no_unsupported_fields(file, caplog):
    assert unsupported(file) == []
    log_unsupported(file)
    assert not caplog.records


def test_unsupported_fields_are_logged_in_one_line(caplog):
    log_unsupported({"num_beams": 4, "top_k": 3, "_private": 1, "token_healing": True})
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith("does not compute: num_beams, token_healing")


def test_every_field_of_transformers_is_known():
    """A field that is neither read nor listed as harmless is reported: so is none that transformers sets by default."""
    from transformers import GenerationConfig

    config = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert unsupported(config.to_dict()) == []


def test_unsupported_fields_are_listed():
    wanted = {
        "num_beams": 4,
        "typical_p": 0.9,
        "no_repeat_ngram_size": 3,
        "penalty_alpha": 0.6,
        "bad_words_ids": [[5]],
        "suppress_tokens": [0],
        "forced_eos_token_id": 0,  # a token, though it equals False
        "min_new_tokens": 5,
        "guidance_scale": 1.5,
        "epsilon_cutoff": 3e-4,
        "sequence_bias": [[[1], 2.0]],
        "top_h": 0.5,
        "sampler_of_the_future": 0.3,
    }
    neutral = {
        "num_beams": 1,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "typical_p": 1.0,
        "penalty_alpha": 0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "diversity_penalty": 0.0,
        "encoder_repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "guidance_scale": None,
        "suppress_tokens": [],
        "token_healing": False,
        "sampler_of_the_future": None,
    }
    assert unsupported({**wanted, **QWEN25, "eos_token_id": [1, 0]}) == list(wanted)
    assert unsupported({**neutral, "max_new_tokens": 9, "stop_strings": ["x"]}) == []


def test_penalized():
    assert not SamplingParams().resolve({}).penalized
    for name in NUMBERS[4:]:
        assert SamplingParams(**{name: 1.5}).resolve({}).penalized
    assert SamplingParams().resolve(QWEN25).penalized


def test_keyword_arguments_are_the_fields():
    """SamplingOptions is for type checkers, SamplingParams for everything else."""
    assert set(SamplingOptions.__annotations__) == {field.name for field in dataclasses.fields(SamplingParams)}
    assert jaxlm.SamplingParams is SamplingParams


def test_from_kwargs():
    options = from_kwargs(temperature=0.5, stop="END", logit_bias={3: -1.0})
    assert options == SamplingParams(temperature=0.5, stop=("END",), logit_bias={3: -1.0})
    assert from_kwargs(stop=["a", "b"]).stop == ("a", "b")
    assert from_kwargs(stop=None).stop is None
    assert from_kwargs(stop_token_ids=5).stop_token_ids == from_kwargs(stop_token_ids=[5]).stop_token_ids == (5,)
    assert from_kwargs(stop_token_ids=None).stop_token_ids == ()
    with pytest.raises(ValueError, match="top_p=2: must be"):
        from_kwargs(top_p=2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("topk", "did you mean 'top_k'?"),
        ("max_new_tokens", "did you mean 'max_tokens'?"),
        ("do_sample", "temperature=0 is greedy"),
        ("stop_strings", "did you mean 'stop'?"),
        ("zzz", "options: max_tokens, temperature, "),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(TypeError) as error:
        from_kwargs(**{name: 1})
    assert str(error.value).startswith(f"unknown option {name!r}; {hint}")


def test_command_line(capsys):
    import tyro

    line = "--temperature 0.5 --stop END ### --logit-bias 5 -1.5 7 2 --ignore-eos --top-k 3 --seed 0"
    line += " --stop-token-ids 7 9"
    options = tyro.cli(SamplingParams, args=line.split())
    assert options == SamplingParams(
        temperature=0.5,
        stop=("END", "###"),
        stop_token_ids=(7, 9),
        logit_bias={5: -1.5, 7: 2.0},
        ignore_eos=True,
        top_k=3,
        seed=0,
    )
    with pytest.raises(SystemExit):
        tyro.cli(SamplingParams, args=["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(SamplingParams):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "most likely tokens" in shown
