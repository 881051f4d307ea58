"""generate and stream against the full forward pass: continuous batching, stop tokens, KV caches that grow."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_chat import model_of, quick_compilation
from helpers.tiny_models import tiny
from scipy.special import log_softmax

import jaxlm
from jaxlm.cli.common import STORIES
from jaxlm.devices import hardware
from jaxlm.inference import memory
from jaxlm.inference.compilation import CompiledSteps, clear_executables, executables
from jaxlm.inference.memory import cache_bytes
from jaxlm.models import gemma3, llama3
from jaxlm.nn import Rope

# Compiling is nearly all the time that these tests take: they share two models, prompts whose lengths fall into few
# buckets, and texts that fill the context: REST tokens after PROMPT.
CONTEXT = 64


@pytest.fixture(autouse=True)
def one_program_after_the_other(monkeypatch):
    """Programs are compiled when they are needed, so that a test can count them."""
    monkeypatch.setattr(CompiledSteps, "expect", lambda steps, *calls: None)


SIZES = {"V": 97, "D": 32, "F": 48, "N": 4, "K": 2, "H": 8, "context": CONTEXT, "tied": False}
LLAMA = llama3.Config(**SIZES, L=1, eps=1e-5, rope=Rope())
GEMMA = gemma3.Config(
    **SIZES, L=2, eps=1e-6, rope=Rope(theta=1e6, type="linear", factor=8.0), local_rope=Rope(), windows=(20, None),
    scale=8**-0.5,
)  # fmt: skip
PROMPT = [5, 0, 17, 96, 3, 0, 41]  # token 0 and the last id are tokens like others
REST = CONTEXT - len(PROMPT)


def llama(config=LLAMA):
    return model_of(llama3, config)


def gemma():
    return model_of(gemma3, GEMMA)


def full_forward(model, ids):
    """The logits [T,V] of T ids, without a cache."""
    T = len(ids)
    row = np.zeros((1, CONTEXT), np.int32)
    row[0, :T] = ids
    pos = np.where(np.arange(CONTEXT) < T, np.arange(CONTEXT), -1)[None]
    return np.asarray(model.forward(row, model.weights, None, jnp.asarray(pos))[0])[0, :T]


def likeliest(model, ids, made):
    """The token that a full forward pass finds likeliest at each place of an answer."""
    return full_forward(model, [*ids, *made])[len(ids) - 1 : -1].argmax(-1).tolist()


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, n).tolist() for n in lengths]


@pytest.mark.smoke
@pytest.mark.parametrize("make", [llama, gemma])
def test_greedy_equals_the_full_forward(make):
    model = make()
    made = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0).tokens
    assert len(set(made)) > 8
    assert len(made) == REST
    assert made == likeliest(model, PROMPT, made)


@pytest.mark.parametrize("make", [llama, gemma])
def test_chunked_prefill_past_the_window(make, monkeypatch):
    monkeypatch.setitem(hardware.CHUNK, "cpu", 16)
    model = make()
    prompt = (PROMPT * 8)[:40]
    made = jaxlm.generate(model, prompt, max_tokens=24, temperature=0).tokens
    assert len(made) == 24
    assert made == likeliest(model, prompt, made)


@pytest.mark.parametrize("make", [llama, gemma])
def test_more_prompts_than_rows(make):
    """Rows are reused as they end, some a step later than others; each text is what the prompt gives alone."""
    model = make()
    many = prompts(20, 9, 24, 12, 16, 11)
    together = jaxlm.generate(model, many, max_tokens=40, temperature=0, batch_size=3)
    assert [len(a.tokens) for a in together] == [40] * len(many)
    assert [a.tokens for a in together] == [likeliest(model, p, a.tokens) for p, a in zip(many, together)]


def test_sampled_text_does_not_depend_on_the_batch():
    model = llama()
    many = prompts(9, 14, 16, 11, 12)
    how = {"max_tokens": 40, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11}
    together = [a.tokens for a in jaxlm.generate(model, many, batch_size=4, **how)]
    assert together == [jaxlm.generate(model, p, **how).tokens for p in many]
    assert together == [a.tokens for a in jaxlm.generate(model, many[::-1], batch_size=4, **how)[::-1]]


@pytest.mark.parametrize(("family", "steps"), [pytest.param("llama", 4, marks=pytest.mark.slow), ("gemma", 1)])
def test_growing_cache_does_not_change_tokens(family, steps, monkeypatch):
    """From less than the window to all, with rows that end and join at all lengths; beside a cache of full length."""
    monkeypatch.setitem(hardware.STEPS, "cpu", steps)
    model = llama() if family == "llama" else gemma()
    many, grown = [PROMPT[:2], PROMPT, PROMPT[3:]], growths(monkeypatch)
    for how in ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 11}):
        texts = []
        for room in (1, 512):
            grown.clear()
            small_cache(monkeypatch, room)
            with quick_compilation():
                answers = jaxlm.generate(model, many, max_tokens=REST, batch_size=2, **how)
            texts.append([a.tokens for a in answers])
            assert grown == ([32, 64] if room == 1 else [])
        assert texts[0] == texts[1]


def small_cache(monkeypatch, headroom):
    """The KV cache starts with 16 slots, or twice as many for a prompt and this number of tokens."""
    monkeypatch.setattr(memory, "SMALLEST_CACHE", (16, 16, 16))
    monkeypatch.setattr(memory, "LEAST_HEADROOM", headroom)


def growths(monkeypatch):
    """The lengths that caches will have been made longer to."""
    grown, grow = [], CompiledSteps.resize_cache
    monkeypatch.setattr(
        CompiledSteps, "resize_cache", lambda steps, longer, kv: grown.append(longer.length) or grow(steps, longer, kv)
    )
    return grown


def test_cache_grows_with_the_text_not_with_max_tokens(monkeypatch):
    monkeypatch.setitem(hardware.STEPS, "cpu", 4)
    small_cache(monkeypatch, 1)
    model, grown, two = llama(), growths(monkeypatch), [PROMPT, PROMPT[3:]]
    with quick_compilation():
        long = jaxlm.generate(model, two, max_tokens=REST, temperature=0)
        assert grown == [32, 64]  # from 16
        ends = [text.tokens[4] for text in long]
        short = jaxlm.generate(model, two, max_tokens=REST, temperature=0, stop_token_ids=ends)
    assert all(len(text.tokens) <= 5 for text in short)
    assert grown == [32, 64]


def test_equal_prompts_differ_and_are_reproducible_with_a_seed():
    model = llama()
    how = {"max_tokens": REST, "temperature": 1.0}
    first = [a.tokens for a in jaxlm.generate(model, [PROMPT] * 3, seed=5, **how)]
    assert len({tuple(t) for t in first}) == 3
    assert first == [a.tokens for a in jaxlm.generate(model, [PROMPT] * 3, seed=5, **how)]
    assert first[0] == jaxlm.generate(model, PROMPT, seed=5, **how).tokens
    assert first[0] != jaxlm.generate(model, PROMPT, seed=6, **how).tokens
    drawn = jaxlm.generate(model, PROMPT, **how)
    assert drawn.tokens == jaxlm.generate(model, PROMPT, seed=drawn.seed, **how).tokens


def test_every_step_uses_a_different_key():
    """A flat distribution would repeat one token for ever if a key came twice."""
    model = llama()
    flat = jnp.zeros(model.weights["head"].shape)
    model = replace(model, weights={**model.weights, "head": flat})
    tokens = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=1.0, seed=0).tokens
    assert len(set(tokens)) > 30


def test_new_length_and_sampling_parameters_do_not_compile():
    model = llama()
    jaxlm.generate(model, PROMPT[:2], max_tokens=50, temperature=0)
    count = len(executables(model.family, model.config))
    for n in (3, 5, 7, 28):
        jaxlm.generate(model, (PROMPT * 4)[:n], max_tokens=60 - 2 * n, temperature=0.5, seed=n, top_k=n)
    assert len(executables(model.family, model.config)) == count
    clear_executables()
    for logprobs in (11, 3):  # another number of them compiles nothing
        jaxlm.generate(model, PROMPT, max_tokens=1, temperature=0, logprobs=logprobs)
        count, before = len(executables(model.family, model.config)), count if logprobs == 3 else 0
        assert (count > before) == (logprobs == 11)


def test_several_chunks_compile_once(monkeypatch):
    """A cache that a program returns is the same argument as a new one. Gemma's has layers of 79 and of 128 slots."""
    monkeypatch.setitem(hardware.CHUNK, "cpu", 64)
    model = tiny("gemma3", sliding_window=16)
    for prompt in ([7] * 120, [[8] * 120, [9] * 120]):
        jaxlm.generate(model, prompt, max_tokens=4, temperature=0, batch_size=1, ignore_eos=True)
    names = [key[0] for key in executables(model.family, model.config)]
    assert sorted(names) == sorted({*names})
    assert {"prefill", "insert", "decode"} <= {*names}


def test_prefill_computes_logits_of_one_position():
    """The compiled prefill has no buffer of the vocabulary's width."""
    model = llama(replace(LLAMA, V=9973))  # a number that no other dimension has
    jaxlm.generate(model, PROMPT * 4, max_tokens=1, temperature=0)
    texts = {key[0]: program.as_text() for key, program in executables(model.family, model.config).items()}
    assert not [line for line in texts["prefill"].splitlines() if "9973]" in line and "parameter" not in line]
    assert "9973]" in texts["first token"]


def test_completion_has_the_counts_and_speeds_of_its_last_chunk():
    model = llama()
    answer = jaxlm.generate(model, PROMPT, max_tokens=50, temperature=0)
    (*_, last) = jaxlm.stream(model, PROMPT, max_tokens=50, temperature=0)
    assert (answer.prompt_tokens, answer.generation_tokens) == (7, 50) == (last.prompt_tokens, last.generation_tokens)
    assert answer.tokens_per_second > 0
    assert answer.first_token_seconds > 0
    assert answer.compile_seconds >= 0


BIASED = {"max_tokens": REST, "logprobs": 4}  # in one program


def test_logprobs_use_the_raw_logits():
    model = llama()
    head = jnp.asarray(np.asarray(model.weights["head"]) / 3)  # logits of deviation 1
    model = replace(model, weights={**model.weights, "head": head})
    answer = jaxlm.generate(model, PROMPT, temperature=0.7, top_k=3, seed=1, logit_bias={7: 3.0, 8: -100.0}, **BIASED)
    logits = full_forward(model, PROMPT + answer.tokens)
    want = log_softmax(logits[len(PROMPT) - 1 : -1], -1)
    for token, got, row in zip(answer.tokens, answer.logprobs, want, strict=True):
        assert got.chosen == pytest.approx(row[token], abs=1e-5)
        best = np.argsort(-row)[:4]
        assert [t for t, _ in got.top] == best.tolist()
        np.testing.assert_allclose([v for _, v in got.top], row[best], atol=1e-5)


def test_logit_bias_and_penalties_change_the_text():
    model = llama()
    plain = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0).tokens
    assert jaxlm.generate(model, PROMPT, temperature=0, logit_bias={7: 100.0}, **BIASED).tokens == [7] * REST
    assert plain[0] not in jaxlm.generate(model, PROMPT, temperature=0, logit_bias={plain[0]: -100.0}, **BIASED).tokens
    penalized = jaxlm.generate(
        model, PROMPT, max_tokens=REST, temperature=0, presence_penalty=2, frequency_penalty=2
    ).tokens
    assert len(set(penalized)) > len(set(plain))


def test_stop_tokens_end_an_answer_and_ignore_eos_does_not():
    model = llama()
    plain = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0).tokens
    end = next(t for i, t in enumerate(plain) if i > 3 and t not in plain[:i])
    model = replace(model, generation_config={"eos_token_id": [96, end]})
    answer = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0)
    assert answer.tokens == plain[: plain.index(end) + 1]
    assert answer.finish_reason == "stop"
    model.generation_config["eos_token_id"] = 96
    assert jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0).tokens == plain
    for more in ({}, {"ignore_eos": True}):  # an id that the caller names counts beside the model's, and alone
        stopped = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0, stop_token_ids=[95, end], **more)
        assert (stopped.tokens, stopped.finish_reason) == (answer.tokens, "stop")
    with pytest.raises(ValueError, match=r"stop_token_ids has 97; this model's ids are 0 to 96"):
        jaxlm.generate(model, PROMPT, stop_token_ids=[97])
    model.generation_config["eos_token_id"] = end
    longer = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0, ignore_eos=True)
    assert (longer.tokens, longer.finish_reason) == (plain, "length")


@pytest.mark.parametrize("which", ["made", "published"])
def test_the_text_of_a_trained_model(which, request):
    """The package's story model beside a full forward pass, and stories260K beside the 200 greedy tokens that llama2.c
    publishes: text, stop strings, streaming."""
    if which == "published":
        folder = request.getfixturevalue("shared") / "checkpoints/stories260K"
        reference = json.loads((folder / "greedy_reference.json").read_text())
        model, ids, count, stop = jaxlm.load(folder), reference["prompt_ids"], 200, "Lily's mom"
    else:
        model, ids, count, stop = jaxlm.load(STORIES, dtype="float32"), [0], 32, " girl"
    options = {"max_tokens": count, "temperature": 0}
    answer = jaxlm.generate(model, ids, **options)
    if which == "made":
        greedy = likeliest(model, ids, answer.tokens)
        reference = {"greedy_ids": ids + greedy, "text": model.tokenizer.decode(greedy)}
    assert ids + answer.tokens == reference["greedy_ids"]
    assert answer.strip() == reference["text"].strip()[: len(answer.strip())]
    pieces = list(jaxlm.stream(model, ids, **options))
    assert "".join(pieces) == answer
    assert len(pieces) > 0.75 * count
    assert pieces[-1].finish_reason == "length"
    assert [p.generation_tokens for p in pieces] == sorted(p.generation_tokens for p in pieces)
    stopped = jaxlm.generate(model, ids, **options, stop=stop)
    assert stopped == answer[: answer.index(stop)]
    assert stopped.finish_reason == "stop"
    prompt = "Once upon a time, there was"
    longer = prompt + jaxlm.generate(model, prompt, **options)
    assert longer.startswith(answer.strip())


BAD = [
    ("", ValueError, "empty"),
    ([], ValueError, "empty"),
    ([97], ValueError, "0 to 96"),
    ([-1], ValueError, "0 to 96"),
    (list(range(90)), ValueError, "64"),
    ("text", ValueError, "no tokenizer"),
    ([{"role": "user", "content": "hi"}], ValueError, "no tokenizer"),
    ([1.5, 2], ValueError, r"prompts\[0\]: a prompt must be a str, a list of messages or a list of token ids, not 1.5"),
    ([[5], ["a"]], ValueError, r"prompts\[1\]: a prompt must be .*, not \['a'\]"),
    ([[5], {"role": "user"}], ValueError, r"prompts\[1\]: a prompt must be"),
    ([[5], [97]], ValueError, r"prompts\[1\]: the prompt has token id 97"),
]


@pytest.mark.parametrize(("prompt", "kind", "words"), BAD, ids=lambda x: str(x)[:20])
def test_bad_prompts(prompt, kind, words):
    model = llama()
    count = len(executables(model.family, model.config))
    with pytest.raises(kind, match=words):
        jaxlm.generate(model, prompt)
    assert len(executables(model.family, model.config)) == count


def test_max_tokens_over_the_context_raises_before_computation():
    model = llama()
    count = len(executables(model.family, model.config))
    with pytest.raises(ValueError, match=f"at most {REST}"):
        jaxlm.generate(model, PROMPT, max_tokens=REST + 1)
    assert len(executables(model.family, model.config)) == count
    assert len(jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0).tokens) == REST


def test_tokenizer_output_is_accepted_as_token_ids():
    model = llama()
    want = jaxlm.generate(model, PROMPT, max_tokens=REST, temperature=0).tokens
    for prompt in (
        {"input_ids": PROMPT, "attention_mask": [1] * 7},
        np.array(PROMPT),
        tuple(PROMPT),
        jnp.array(PROMPT),
    ):
        assert jaxlm.generate(model, prompt, max_tokens=REST, temperature=0).tokens == want
    for prompt in ([np.array(PROMPT)], np.array([PROMPT]), {"input_ids": [PROMPT]}):
        assert [a.tokens for a in jaxlm.generate(model, prompt, max_tokens=REST, temperature=0)] == [want]
    with pytest.raises(ValueError, match="list of messages"):
        jaxlm.generate(model, {"role": "user", "content": "hi"})


def test_non_finite_weights_raise():
    model = llama()
    weights = {**model.weights, "norm": model.weights["norm"].at[3].set(jnp.nan)}
    with pytest.raises(ValueError, match="not finite"):
        jaxlm.generate(jaxlm.Model(model.family, model.config, weights), PROMPT, max_tokens=REST)


def test_max_new_tokens_of_the_model_are_limited_by_the_context():
    model = llama()
    model = replace(model, generation_config={"max_new_tokens": 4096})
    assert len(jaxlm.generate(model, PROMPT, temperature=0).tokens) == REST
    model = replace(model, generation_config={"max_new_tokens": 50})
    assert len(jaxlm.generate(model, PROMPT, temperature=0).tokens) == 50


def test_memory_check_includes_cache_growth(monkeypatch):
    """While a cache of 48 becomes one of 192 there are both."""
    model = llama(replace(LLAMA, context=256))
    monkeypatch.setattr(memory, "HEADROOM", 16)
    grown = cache_bytes(model, 192, 1) + cache_bytes(model, 48, 1) + cache_bytes(model, 16, None)
    grown += memory.temporary_bytes(model, 1, len(PROMPT) + 130)
    monkeypatch.setattr(hardware, "available_memory", lambda device: grown - 1)
    with pytest.raises(MemoryError, match=r"1 sequences of 137 tokens"):
        jaxlm.generate(model, PROMPT, max_tokens=130)


def test_a_kv_cache_that_does_not_fit_is_an_error_before_it_is_allocated():
    model = llama()
    with pytest.raises(
        MemoryError, match=r"a KV cache of 1,000,000 rows and 1,000,000 tokens need .* GB free: use fewer rows"
    ):
        model.init_kv(1_000_000, 1_000_000)


def test_forward_with_a_manual_decoding_loop():
    """Past the cache: an error where it can be seen, else NaN; rewinding without saying so forgets what came after."""
    model = llama()
    row = np.arange(12)[None]
    want = full_forward(model, row[0])[None]
    _, kv = model.forward(row[:, :10], model.weights, model.init_kv(1, 10))
    with pytest.raises(ValueError, match="cache of 10"):
        model.forward(row[:, 10:], model.weights, kv, 10)
    assert np.isnan(model.forward(row[:, 10:], model.weights, kv)[0]).all()
    _, kv = model.forward(row[:, 5:7], model.weights, kv, 5)
    again, _ = model.forward(row[:, 7:9], model.weights, kv)
    np.testing.assert_allclose(again, want[:, 7:9], atol=1e-4 * float(want.std()))
    with pytest.raises(ValueError, match="0 to 96"):
        model.forward([[97]], model.weights)
    with pytest.raises(ValueError, match="shape"):
        model.forward([1, 2], model.weights)


def test_out_of_memory_message_suggests_a_batch_size(monkeypatch):
    model = llama()
    caches = 3 * cache_bytes(model, CONTEXT, 1) + 4 * cache_bytes(model, 16, None)  # 4 rows are prefilled
    free = caches + memory.temporary_bytes(model, 3, CONTEXT) + 10
    monkeypatch.setattr(hardware, "available_memory", lambda device: free)
    with pytest.raises(MemoryError, match="batch_size=3"):
        jaxlm.generate(model, [PROMPT] * 4, max_tokens=REST)
    assert len(jaxlm.generate(model, [PROMPT] * 4, max_tokens=REST, batch_size=3)) == 4


def test_invalid_model_and_tokens_raise() -> None:
    model = tiny("llama3")
    with pytest.raises(ValueError, match=r"not a name: jaxlm.generate\(jaxlm.load\('a/b'\)"):
        jaxlm.generate("a/b", "Once")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="shape"):
        model.forward([[]], model.weights)
    with pytest.raises(ValueError, match="float32"):
        model.forward([[1.5]], model.weights)
    with pytest.raises(ValueError, match="KV cache of 1"):
        model.forward([[1], [2]], model.weights, model.init_kv(1, 8))
    with pytest.raises(ValueError, match="at least one row"):
        model.init_kv(0, 8)
    assert {"load", "generate", "verify"} <= set(dir(jaxlm))
