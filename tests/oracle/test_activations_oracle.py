"""Model.activations against transformers with forward hooks: captured values, and activations that are zeroed."""

from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import DISTINCT, families, layers
from oracle import reference
from oracle.reference import FAULT, LIMIT

import jaxlm

pytestmark = pytest.mark.oracle
# The module of transformers whose output an activation is. Where a norm follows attention and MLP, it is another one.
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp",
    "attention": "self_attn",
    "mlp": "mlp",
    "residual": "",
}
INPUTS = {"o.input": "self_attn.o_proj", "down.input": "mlp.down_proj"}  # activations that are inputs of modules
AFTER_NORM = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
NORM_FOLLOWS = ("olmo2", "olmo3", "gemma3")


@pytest.fixture(scope="module", params=families(*DISTINCT))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, jaxlm.Model]:
    family = request.param
    with reference.quiet():
        oracle = reference.build(family, **layers(family, 3))
        return family, oracle, reference.pair(oracle, tmp_path_factory.mktemp(family))


def module_of(family: str, oracle: Any, layer: int, name: str) -> Any:
    path = AFTER_NORM[name] if family in NORM_FOLLOWS and name in AFTER_NORM else {**MODULES, **INPUTS}[name]
    return oracle.model.layers[layer].get_submodule(path)


def tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def test_captured_activations(pair: tuple[str, Any, jaxlm.Model]) -> None:
    family, oracle, model = pair
    tokens, pos = reference.near_and_far()
    expected, hooks = {}, []
    for i in range(3):
        for name in (*MODULES, *INPUTS):

            def keep(module: Any, inputs: Any, output: Any, key: str = f"layers.{i}.{name}") -> None:
                expected[key] = tensor(inputs if key.endswith(".input") else output).detach().numpy()

            hooks.append(module_of(family, oracle, i, name).register_forward_hook(keep))
    states = reference.run(oracle, tokens, pos, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    expected["embedding"] = states[0].numpy()
    logits, acts = model.activations(tokens, "*", pos=pos)
    assert reference.distance(logits, reference.logits(oracle, tokens, pos)) <= LIMIT
    assert acts.keys() - expected.keys() == {f"layers.{i}.residual_mid" for i in range(3)}
    for name, value in expected.items():
        ours = np.asarray(acts[name]).reshape(value.shape)
        assert reference.distance(ours, value) <= LIMIT, name
    if family in NORM_FOLLOWS:
        assert reference.distance(acts["layers.1.o"], expected["layers.1.attention"]) >= FAULT
        assert reference.distance(acts["layers.1.down"], expected["layers.1.mlp"]) >= FAULT


@pytest.mark.parametrize("name", ["attention", "mlp", "o", "v", "residual"])
def test_a_zeroed_position_gives_the_logits_of_a_hook_that_zeroes(
    pair: tuple[str, Any, jaxlm.Model], name: str
) -> None:
    family, oracle, model = pair
    tokens, pos = reference.near_and_far()
    plain = reference.logits(oracle, tokens, pos)

    def zero(module: Any, inputs: Any, output: Any) -> Any:
        changed = tensor(output).clone()
        changed[:, 20:30] = 0
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hook = module_of(family, oracle, 1, name).register_forward_hook(zero)
    expected = reference.logits(oracle, tokens, pos)
    hook.remove()
    logits, _ = model.activations(tokens, patch={f"layers.1.{name}": lambda x: x.at[:, 20:30].set(0)}, pos=pos)
    assert reference.distance(logits, expected) <= LIMIT
    assert reference.distance(plain, expected) >= FAULT
