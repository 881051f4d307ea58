"""What users do with a Model besides calling it: pickle, copies, other weights and processes, wrong arguments."""

import copy
import multiprocessing
import os
import pickle
import re
import signal
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_chat import TEMPLATE, tokenizer_of
from helpers.tiny_models import tiny

import jaxlm
from jaxlm import models
from jaxlm.cli.common import STORIES
from jaxlm.devices import pickling
from jaxlm.inference.prompts import split_prompts
from jaxlm.loading import spread
from jaxlm.model import Model
from jaxlm.models import llama3
from jaxlm.nn import lora, params

TOKENS = [[1, 5, 9]]


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(tiny("llama3"), tokenizer=tokenizer_of(TEMPLATE))


@pytest.fixture(scope="module")
def stories() -> Model:
    return jaxlm.load(STORIES)


def assert_same_arrays(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert (a.dtype, a.sharding, a.committed) == (b.dtype, b.sharding, b.committed)
        np.testing.assert_array_equal(a, b)


# Pickle and copy


@pytest.mark.smoke
@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy])
@pytest.mark.parametrize("where", ["default", "device", "mesh", "adapter"])
def test_a_copy_has_equal_weights_on_the_same_devices(model: Model, where: str, again: Any) -> None:
    if where == "mesh":
        model = spread(model, "data=2,model=2")
    elif where == "device":
        model = replace(model, weights=jax.device_put(model.weights, jax.devices()[3]))
    elif where == "adapter":
        rows = [row for row in params.tensors(model.family.PARAMS, model.config) if row.path.endswith(".q")]
        adapter = lora.init(rows, model.config.L, 2, 1.0, jax.random.key(0))
        model = replace(model, weights=lora.join(model.weights, adapter))
    other = again(model)
    assert_same_arrays(other.weights, model.weights)
    assert (other.family, other.config, repr(other)) == (model.family, model.config, repr(model))
    pointers = [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in (
        model.weights["norm"], other.weights["norm"])]  # fmt: skip
    assert pointers[0] != pointers[1]  # the original may be donated


def test_a_loaded_model_keeps_its_tokenizer_and_checkpoint(stories: Model) -> None:
    other = pickle.loads(pickle.dumps(stories))
    assert other.tokenizer.encode("Once upon a time") == stories.tokenizer.encode("Once upon a time")
    assert (other.checkpoint, other.generation_config) == (stories.checkpoint, stories.generation_config)
    assert copy.copy(stories).weights["norm"] is stories.weights["norm"]


def test_what_cannot_be_pickled_says_why(model: Model) -> None:
    with pytest.raises(TypeError, match="cannot be imported"):
        pickle.dumps(replace(model, family=outside_family()))
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.eval_shape(lambda weights: pickle.dumps(replace(model, weights=weights)) and 0, model.weights)
    with pytest.raises(TypeError, match="an Engine cannot be pickled or copied"):
        copy.copy(jaxlm.Engine(model, 1, length=16))
    axes = (("data", 2, jax.sharding.AxisType.Auto),)
    with pytest.raises(ValueError, match="mesh of 2 devices, of which this process lacks 1"):
        pickling.to_devices([pickling.HostArray(np.zeros(2), (0, 999), axes)])


def test_a_model_of_a_missing_device_goes_to_the_default_device() -> None:
    array = pickling.to_devices(pickling.HostArray(np.ones(2), (999,)))
    assert array.devices() == jnp.ones(2).devices()


def spawned(function: Any, *args: Any, **options: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result(timeout=200)


def test_a_model_crosses_to_a_spawned_process_and_back(stories: Model) -> None:
    assert_same_arrays(spawned(copy.copy, stories).weights, stories.weights)


@pytest.mark.slow
def test_a_spawned_process_generates_the_same_text(stories: Model) -> None:
    options = {"max_tokens": 8, "temperature": 0}
    there = spawned(jaxlm.generate, stories, "Once upon a time", **options)
    assert there == jaxlm.generate(stories, "Once upon a time", **options)
    assert there.generation_tokens == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_does_not_hang(model: Model) -> None:
    """JAX would wait for threads that the child does not have."""
    calls = [
        lambda: model.forward(TOKENS, model.weights),
        lambda: model.hidden_states(TOKENS),
        lambda: jaxlm.generate(model, [1, 2]),
    ]
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # if it hangs after all
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += "get_context('spawn')" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)


# Other weights


def test_replace_takes_other_weights(model: Model) -> None:
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.weights)
    assert replace(model, weights=half).dtype == jnp.bfloat16
    assert replace(model, weights=params.stack(model.weights)).dtype == jnp.float32
    assert replace(model, weights=jax.eval_shape(lambda: model.weights)).dtype == jnp.float32


WRONG = {
    "no dict": (lambda w: [1], "weights must be a dict like model.weights, not list"),
    "missing": (lambda w: {k: v for k, v in w.items() if k != "norm"}, "norm is missing"),
    "unknown": (lambda w: {**w, "bias": w["norm"]}, "bias is unknown"),
    "no layers": (lambda w: {**w, "layers": 3}, "layers.0.attn_norm is missing"),
    "fewer layers": (lambda w: {**w, "layers": w["layers"][:1]}, "layers.1.attn_norm is missing"),
    "shape": (lambda w: {**w, "norm": w["norm"][1:]}, r"norm has the shape \[47\], not \[48\]"),
    "dtype": (lambda w: {**w, "norm": w["norm"].astype(int)}, "norm is an array of int32"),
    "float": (lambda w: {**w, "norm": 1.0}, "norm is float, not an array"),
    "stacked": (lambda w: params.stack({**w, "layers": w["layers"][:1] * 3}), "layers.2.attn_norm is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_do_not_fit(model: Model, case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        replace(model, weights=make(model.weights))
    if case != "float":  # which jax.jit makes an array
        for function in (model.forward, model.hidden_states):
            with pytest.raises(ValueError, match=message):
                function(TOKENS, make(model.weights))


# In notebooks


def test_views_are_short_and_escaped(model: Model) -> None:
    model = replace(model, source="<b>name</b>")
    html = model._repr_html_()
    assert len(repr(model)) < 120
    assert len(html) < 3000
    assert "&lt;b&gt;name" in html
    assert "<b>name" not in html
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(|white;|black", html)  # the colors of the notebook, light or dark
    assert "mesh data=2,model=2" in repr(spread(model, "data=2,model=2"))


# Wrong arguments


class TorchModel:
    """A model of another library, as far as its name goes."""

    __module__ = "transformers.models.qwen3.modeling_qwen3"


CALLS = {
    "generate": lambda model: jaxlm.generate(model, "a"),
    "stream": lambda model: jaxlm.stream(model, "a"),
    "Conversation": jaxlm.Conversation,
    "Engine": jaxlm.Engine,
    "evaluate": lambda model: jaxlm.evaluate(model, []),
    "export": lambda model: jaxlm.export(model, "out"),
    "fuse": jaxlm.fuse,
    "load_adapter": lambda model: jaxlm.load_adapter(model, "adapter"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("given", "way"), [
    ("org/name", r"not a name: jaxlm\.\w+\(jaxlm\.load\('org/name'\), …\)"), (Path("name"), "jaxlm.load"),
    (TorchModel(), "not TorchModel: load its checkpoint with jaxlm.load"), ({}, "not dict"), (None, "not NoneType"),
])  # fmt: skip
def test_what_is_no_model(call: str, given: Any, way: str) -> None:
    with pytest.raises(ValueError, match=f"^{call} needs a model, .*{way}"):
        CALLS[call](given)


def test_arguments_in_the_wrong_order(model: Model) -> None:
    with pytest.raises(TypeError, match=r"jaxlm\.generate\(model, prompt\)"):
        jaxlm.generate("Once", model)  # pyright: ignore
    with pytest.raises(TypeError, match="token ids"):
        model.forward(model.weights, TOKENS)  # pyright: ignore
    with pytest.raises(TypeError, match="load needs a hub id"):
        jaxlm.load(model)  # pyright: ignore


@pytest.mark.parametrize(("tokens", "error", "message"), [
    ([[1, 2], [3]], ValueError, "different lengths"), ([[1.0]], ValueError, "integers, not float"),
    ([["a"]], ValueError, "integers, not text"), ("text", TypeError, "tokenizer.encode"),
    ([1, 2], ValueError, r"\[B,T\]"), ([[199]], ValueError, "0 to 198"), ([[-1]], ValueError, "0 to 198"),
])  # fmt: skip
def test_tokens_that_forward_does_not_take(model: Model, tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.forward(tokens, model.weights)


def test_positions_and_caches_that_forward_does_not_take(model: Model) -> None:
    with pytest.raises(ValueError, match="pos must be integers"):
        model.forward(TOKENS, model.weights, None, 1.5)
    with pytest.raises(ValueError, match="pos must be integers"):
        model.hidden_states(TOKENS, pos=1.5)
    with pytest.raises(TypeError, match="kv must be a KV cache"):
        model.forward(TOKENS, model.weights, 3)  # pyright: ignore


@pytest.mark.parametrize("kind", [int, np.int64])
def test_positions_past_the_end_of_the_cache(model: Model, kind: Any) -> None:
    with pytest.raises(ValueError, match="do not fit a KV cache of 4"):
        model.forward(TOKENS, model.weights, model.init_kv(1, 4), kind(2))


def test_ids_in_jax_arrays_are_clamped(model: Model) -> None:
    """They may be traced, so they cannot be checked. The docstring of forward says what happens."""
    last = model.config.V - 1
    given, meant = (model.forward(jnp.array([[5, i]]), model.weights)[0] for i in (last + 1000, last))
    np.testing.assert_array_equal(given, meant)


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda f: jax.vmap(f, axis_size=1)])
def test_generate_within_transformations(model: Model, transform: Any) -> None:
    def length(weights: Any) -> Any:
        return float(len(jaxlm.generate(replace(model, weights=weights), [1, 2])))

    stacked = jax.tree.map(lambda leaf: leaf[None], model.weights)
    with pytest.raises(TypeError, match=r"cannot be called within jax\.jit, jax\.grad or jax\.vmap"):
        transform(length)(model.weights if transform in (jax.jit, jax.grad) else stacked)
    with pytest.raises(TypeError, match=r"jax\.jit"):
        jax.jit(lambda x: (jaxlm.generate(model, [1, 2]), x)[1])(1.0)
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.vmap(lambda ids: jaxlm.generate(model, ids) and 0)(jnp.ones((1, 2), jnp.int32))


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompt": 5}, "a prompt must be a str"), ({"prompt": None}, "a prompt must be a str"),
    ({"prompt": {"a", "b"}}, "a prompt must be a str"), ({"prompt": b"a"}, "a prompt must be a str"),
    ({"prompt": ""}, "the prompt is empty"), ({"prompt": []}, "the list of prompts is empty"),
    ({"prompt": ["a", ""]}, r"prompts\[1\]: the prompt is empty"), ({"prompt": [1.5]}, "a prompt must be a str"),
    ({"prompt": [{"role": "user", "text": "hi"}]}, "message 1 .user. has no content.*'text'"),
    ({"prompt": [{"content": "hi"}]}, "a message must be a dict with 'role'"),
    ({"prompt": CHAT[0]}, "a chat must be a list of messages"),
    ({"n": 1.5}, "n=1.5: must be an integer"), ({"n": 0}, "n=0"), ({"n": True}, "n=True"),
    ({"batch_size": "2"}, "batch_size='2'"), ({"max_tokens": "8"}, "max_tokens='8'"),
    ({"temperature": "hot"}, "temperature='hot'"), ({"stop_when": 3}, "stop_when=3: must be a function"),
    ({"constraint": 3}, "constraint=3: must be a function"), ({"template_args": ["x"]}, "must be a dict"),
    ({"echo": "yes"}, "echo='yes': must be True or False"), ({"logits_processors": abs}, "list of functions"),
    ({"logits_processors": [3]}, "list of functions"), ({"schema": 3}, "a JSON schema must be a dict"),
    ({"schema": "no"}, "not valid JSON"), ({"schema": {"type": "strin"}}, "Invalid type"), ({"regex": 3}, "a text"),
    ({"prompt": CHAT, "system": 3}, "system=3: must be a text"),
    ({"prompt": "a", "system": "x"}, "system= needs messages, because a text"),
    ({"prompt": [1, 2], "system": "x"}, "system= needs messages, because token ids"),
    ({"prompt": [{"role": "system", "content": "y"}, *CHAT], "system": "x"}, "omit one of them"),
    ({"prompt": [{"role": "developer", "content": "y"}, *CHAT], "system": "x"}, "omit one of them"),
])  # fmt: skip
def test_arguments_that_generate_refuses(model: Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        jaxlm.generate(model, **{"prompt": "a", **arguments})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("option", "message"), [
    ("sytem", "did you mean 'system'"), ("enable_thinking", "template_args="), ("shema", "did you mean 'schema'"),
])  # fmt: skip
def test_unknown_options(model: Model, option: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        jaxlm.generate(model, "a", **{option: "x"})


def test_a_sequence_of_token_ids_is_a_prompt(model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 3, "temperature": 0}
    assert jaxlm.generate(model, range(3, 6), **options).tokens == jaxlm.generate(model, [3, 4, 5], **options).tokens
    assert split_prompts(range(2)) == ([[0, 1]], True)
    assert split_prompts(deque(["a", "b"])) == (["a", "b"], False)


def test_a_system_message_stands_in_front(model: Model) -> None:
    engine = jaxlm.Engine(model, 1, length=64)
    [with_option] = engine.requests([CHAT], {"system": "be brief"})
    [written] = engine.requests([[{"role": "system", "content": "be brief"}, *CHAT]], {})
    assert with_option.ids == written.ids
    assert engine.requests([CHAT], {"system": None})[0].ids != written.ids


# Families


def outside_family(**changes: Any) -> Any:
    family = ModuleType("outside")
    for name in ("Config", "PARAMS", "NORM_IDENTITY", "IGNORED_PREFIXES", "layer", "forward", "logits"):
        setattr(family, name, changes.get(name, getattr(llama3, name)))
    return family


def test_fields_of_a_config_are_found_without_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Python 3.14, the namespace of a class has no __annotations__."""

    @dataclass(frozen=True)
    class Config(llama3.Config):
        extra: int = 0

    for cls in (Config, llama3.Config):
        monkeypatch.delattr(cls, "__annotations__")
    monkeypatch.setattr(models, "FAMILIES", {})
    models.register("outside", outside_family(Config=Config))


class Incomplete:
    V = D = 1


@pytest.mark.parametrize(("family", "messages"), [
    (ModuleType("outside"), ["outside is not a model family", "lacks Config", "lacks PARAMS", "lacks forward"]),
    (outside_family(Config=Incomplete), ["its Config lacks F", "its Config lacks from_hf"]),
    (outside_family(PARAMS=3), ["PARAMS is not a dict"]),
    (outside_family(PARAMS={**llama3.PARAMS, "layers.x": ("ZD", "m.x"), "y": "D"}),
     ["no size Z", "needs {} for the layer", r"PARAMS['y'] must be"]),
    (outside_family(PARAMS={}), ["lacks the row 'embed'", "lacks the row 'norm'"]),
])  # fmt: skip
def test_an_incomplete_family_is_refused(family: Any, messages: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        models.register("outside", family)
    assert all(message in str(refused.value) for message in messages)
    assert "outside" not in models.FAMILIES
