"""The scripts of examples/ do what they say. A tiny model stands in for a real checkpoint.

Those that need torch are in test_compare_outputs.py, the notebooks in test_notebooks.py (oracle tier).
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from examples.conftest import EXAMPLES

import jaxlm
from jaxlm.model import Model
from jaxlm.models import llama3

Example = Callable[[str], ModuleType]


def test_one_device_and_a_mesh_generate_the_same_tokens(
    example: Example, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the script adds to it
    arguments = ["--model", folder, "--prompt", "Once upon", "--max-tokens", "16"]
    tokens = tyro.cli(example("generate_single_device").main, args=arguments)
    assert len(set(tokens)) > 8  # a text that repeats itself proves little
    assert tyro.cli(example("generate_mesh").main, args=arguments) == tokens


def test_a_training_step_of_nnx(example: Example, folder: str) -> None:
    module = example("nnx_step")
    losses, text = module.main(model=folder, steps=40, lr=1e-2)
    assert losses[-1] < losses[0] / 20
    assert text.startswith(". She counted one")  # by heart


def test_fine_tuning(example: Example, folder: str, tmp_path: Path) -> None:
    module = example("finetune_lora")
    losses, before, after = module.main(model=folder, steps=6, out=tmp_path)
    assert losses[-1] < losses[0]
    assert len(after) == len(module.QUESTIONS)
    assert after != before


def test_the_server_answers(example: Example, folder: str) -> None:
    answer, streamed = example("serve_and_ask").main(model=folder, question="Hello", max_tokens=8)
    messages = [{"role": "user", "content": "Hello"}]
    assert answer == jaxlm.generate(jaxlm.load(folder), messages, max_tokens=8, temperature=0)
    assert streamed == answer != ""


def test_a_family_from_outside(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("custom_model")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(jaxlm.models, "FAMILIES", dict(jaxlm.models.FAMILIES))
    monkeypatch.setattr(module, "CONFIG", {**module.CONFIG, "num_hidden_layers": 1, "hidden_size": 32})
    losses, model = module.main(data=str(EXAMPLES.parent / "docs" / "ser*.md"), steps=12, out=tmp_path)
    assert losses[-1] < losses[0] - 0.5
    assert model.family is module
    assert "mlp_norm" not in model.weights["layers"][0]
    # The KV cache works in a layer that jaxlm does not know.
    tokens = [[5, 9, 300, 4, 7]]
    expected, _ = model.forward(tokens, model.weights)
    kv = model.init_kv(1, 8)
    for position, token in enumerate(tokens[0]):
        got, kv = model.forward([[token]], model.weights, kv, position)
        np.testing.assert_allclose(got[0, 0], expected[0, position], atol=1e-4)


@pytest.fixture(scope="module")
def scratch(example: Example) -> ModuleType:
    return example("llama3_from_scratch")


def test_from_scratch_trains_and_samples(
    scratch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "Config", partial(scratch.Config, D=48, F=96, L=2, N=2, K=1, H=24, context=32))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    flags = ["--steps", "60", "--prompt", "the quick", "--tokens", "60", "--temperature", "0"]
    scratch.main([str(tmp_path / "text.txt"), *flags])
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("validation loss ")[1].split(",")[0]) for line in lines if line.startswith("step")]
    assert losses[0] > 3
    assert losses[-1] < 0.5
    assert "brown fox jumps over" in lines[-1]


def test_from_scratch_is_the_llama_of_jaxlm(scratch: ModuleType) -> None:
    """With the same weights, logits are those of models/llama3.py, which is compared with transformers. Sampling with a
    KV cache gives the tokens of full forward passes."""
    cfg = scratch.Config(V=40, D=32, F=48, L=2, N=4, K=2, H=8, context=32)
    params = jax.tree.map(lambda w: 10 * w if w.ndim == 2 else 1.3 * w, scratch.init(cfg, jax.random.key(1)))
    tokens = jax.random.randint(jax.random.key(2), (2, 24), 0, cfg.V)
    forward = jax.jit(scratch.forward, static_argnums=0)
    got, _ = forward(cfg, params, tokens[:, :-1])
    model = in_jaxlm(cfg, params)
    expected, _ = model.forward(tokens[:, :-1], model.weights)
    np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.std(expected)))

    sampled = scratch.sample(cfg, params, tokens[:, :5], 19, jax.random.key(0), 0.0)
    assert len(np.unique(sampled)) > 8  # a text that repeats itself proves little
    logits, _ = forward(cfg, params, jnp.concatenate([tokens[:, :5], sampled], axis=1)[:, :-1])
    assert sampled.tolist() == logits[:, 4:].argmax(-1).tolist()


def in_jaxlm(cfg: Any, params: dict[str, Any]) -> Model:
    """The parameters of llama3_from_scratch.py as a model of jaxlm, whose matrices are [outputs, inputs]."""
    raw = {
        "model_type": "llama", "vocab_size": cfg.V, "hidden_size": cfg.D, "intermediate_size": cfg.F,
        "num_hidden_layers": cfg.L, "num_attention_heads": cfg.N, "num_key_value_heads": cfg.K, "head_dim": cfg.H,
        "rms_norm_eps": cfg.eps, "rope_theta": cfg.rope_theta, "max_position_embeddings": 64, "hidden_act": "silu",
    }  # fmt: skip
    heads = {"q": (cfg.N, cfg.H, cfg.D), "k": (cfg.K, cfg.H, cfg.D), "v": (cfg.K, cfg.H, cfg.D)}
    heads["o"] = (cfg.D, cfg.N, cfg.H)
    layers = [
        {
            {"attention_norm": "attn_norm"}.get(name, name): w.T.reshape(heads.get(name, w.T.shape))
            for name, w in each.items()
        }
        for each in params["layers"]
    ]
    weights = {"embed": params["embed"], "layers": layers, "norm": params["norm"], "head": params["head"].T}
    return Model(llama3, llama3.Config.from_hf(raw), weights)


@pytest.mark.oracle  # for its time: it needs no torch
def test_two_processes(folder: str) -> None:
    """The coordinator prints the text of a single process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    env = {**os.environ, "PATH": path, "XLA_FLAGS": flags}
    del env["JAX_DEFAULT_DEVICE"]
    command = ["bash", str(EXAMPLES / "multi_process.sh"), folder, "Once upon"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = jaxlm.generate(jaxlm.load(folder), "Once upon", max_tokens=32, temperature=0)
    assert done.stdout.strip() == expected.strip()
