"""Adapters of mlx-lm: y = x w + scale * (x a) b, with a [inputs, r] and b [r, outputs] as mlx-lm 0.32 stores them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers.checkpoint_files import GEMMA, LLAMA

import jaxlm
from jaxlm.cli import main
from jaxlm.nn import einsum, lora, params

RANK, SCALE = 3, 2.5
# `mlx_lm.lora` writes all of its arguments (mlx_lm/lora.py, CONFIG_DEFAULTS).
CONFIG = {
    "model": "org/base", "train": True, "fine_tune_type": "lora", "optimizer": "adam", "optimizer_config": {"adam": {}},
    "data": "data", "seed": 0, "num_layers": 16, "batch_size": 4, "iters": 1000, "val_batches": 25,
    "learning_rate": 1e-5, "steps_per_report": 10, "steps_per_eval": 200, "resume_adapter_file": None,
    "adapter_path": "adapters", "save_every": 100, "test": False, "test_batches": 500, "max_seq_length": 2048,
    "config": None, "grad_checkpoint": False, "lr_schedule": None, "mask_prompt": False,
    "lora_parameters": {"rank": RANK, "dropout": 0.0, "scale": SCALE},
}  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
    checkpoint_files.write(path / "adapters.safetensors", tensors)
    return path


def factors(raw: dict[str, Any], spelling: int = 0, layers: tuple[int, ...] = (0, 1)) -> dict[str, np.ndarray]:
    """Factors of all weights of these layers, and of an untied head."""
    rng, tensors = np.random.default_rng(1), {}
    family, cfg = checkpoint_files.FAMILY[raw["model_type"]], checkpoint_files.config(raw)
    for row in lora.products(family.PARAMS, cfg):
        if row.path == "head" or int(row.path.split(".")[1]) in layers:
            (out, inputs), module = row.stored_shape, row.names[spelling].removesuffix(".weight")
            tensors[f"{module}.lora_a"] = rng.standard_normal((inputs, RANK)).astype(np.float32)
            tensors[f"{module}.lora_b"] = rng.standard_normal((RANK, out)).astype(np.float32)
    return tensors


SPECS = {"q": "BTD,NHD->BTNH", "k": "BTD,KHD->BTKH", "v": "BTD,KHD->BTKH", "o": "BTNH,DNH->BTD", "gate": "BTD,FD->BTF",
         "up": "BTD,FD->BTF", "down": "BTF,DF->BTD", "head": "BTD,VD->BTV"}  # fmt: skip


@pytest.mark.parametrize(("raw", "spelling"), [(LLAMA, 0), (GEMMA, 0), (GEMMA, 1)])
def test_the_products_are_those_of_numpy(raw: dict[str, Any], spelling: int, tmp_path: Path) -> None:
    arrays, adapter = checkpoint_files.tensors(raw, spelling=spelling), factors(raw, spelling)
    config = {"model_type": "gemma3", "text_config": raw} if spelling else raw
    base = checkpoint_files.folder(tmp_path / "base", config, arrays)
    model = jaxlm.load(base, adapter=write(tmp_path / "adapter", adapter))
    rng, leaves = np.random.default_rng(2), dict(lora.leaves(model.weights))
    assert len(leaves) == 14 + (raw is LLAMA)
    for row in params.tensors(model.family.PARAMS, model.config):
        if row.path not in leaves:
            continue
        spec = SPECS[row.path.split(".")[-1]]
        out, inputs = row.stored_shape
        x = rng.standard_normal((2, 5, inputs)).astype(np.float32)
        module = row.names[spelling].removesuffix(".weight")
        a, b = (adapter[f"{module}.lora_{half}"].astype(np.float64) for half in "ab")
        expected = x @ arrays[f"{module}.weight"].T.astype(np.float64) + x @ a @ b * SCALE
        contracted = spec.split(",")[0][2:]
        shaped = x.reshape(2, 5, *(getattr(model.config, letter) for letter in contracted))
        y = np.asarray(einsum(spec, jnp.asarray(shaped), leaves[row.path])).reshape(2, 5, out)
        # float32 products of at most 12 terms of size 1, then 3 terms of size up to 30.
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4 * math.sqrt(inputs))


def test_it_is_fused_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = checkpoint_files.folder(tmp_path / "base", LLAMA, checkpoint_files.tensors(LLAMA))
    adapter = write(tmp_path / "adapter", factors(LLAMA, layers=(1,)), model=str(base), num_layers=1)
    model = jaxlm.load(adapter)  # the base that it names
    assert model.source == str(adapter)
    tokens = np.array([[1, 5, 9, 2]], np.int32)
    expected = np.asarray(model.forward(tokens, model.weights)[0])
    assert main(["fuse", "-m", str(adapter), "--out", str(tmp_path / "fused")]) == 0
    fused = jaxlm.load(tmp_path / "fused")
    # As for PEFT's adapters: float32 sums in another order.
    np.testing.assert_allclose(fused.forward(tokens, fused.weights)[0], expected, rtol=1e-4, atol=1e-3)
    plain = jaxlm.load(base)
    assert np.abs(np.asarray(plain.forward(tokens, plain.weights)[0]) - expected).max() > 0.1
    assert main(["info", str(adapter)]) == 0
    assert "rank 3, scale 2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fine_tune_type": "dora"}, 'fine_tune_type is "dora".*mlx_lm.fuse --model BASE --adapter-path'),
        ({"fine_tune_type": "full"}, 'fine_tune_type is "full".*mlx_lm.fuse --model BASE --adapter-path'),
        ({"lora_parameters": {"rank": 3, "alpha": 6}}, "needs rank and scale"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "lora_parameters.rank is 0"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, r"misshapen: .*lora_a \[8, 3\] instead of \[8, 4\]"),
        ({"lora_parameters": None}, "lora_parameters is null"),
    ],
)
def test_what_is_not_lora_is_refused_with_the_way_out(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = checkpoint_files.folder(tmp_path / "base", LLAMA, checkpoint_files.tensors(LLAMA))
    with pytest.raises(ValueError, match=message):
        jaxlm.load(base, adapter=write(tmp_path / "adapter", factors(LLAMA), **fields))


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base = checkpoint_files.folder(tmp_path / "base", LLAMA, checkpoint_files.tensors(LLAMA))
    sound = factors(LLAMA)
    name = "model.layers.1.self_attn.q_proj.lora_b"
    cases = [
        ({key: value for key, value in sound.items() if key != name}, "missing the other of the two: .*q_proj.lora_a"),
        (sound | {"model.embed_tokens.lora_a": np.ones((24, 3), np.float32)}, "unexpected.*embed_tokens.lora_a"),
        (sound | {"model.layers.1.self_attn.q_proj.m": np.ones(8, np.float32)}, "unexpected.*q_proj.m"),
        (factors(LLAMA, layers=(0,)), "for the last of 2 layers"),
        ({}, r"missing: .*\.lora_a"),
    ]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            jaxlm.load(base, adapter=write(tmp_path / "adapter", tensors))


def test_the_alpha_of_old_configs_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = checkpoint_files.folder(tmp_path / "base", LLAMA, checkpoint_files.tensors(LLAMA))
    numbers = {"rank": RANK, "alpha": 16, "scale": SCALE, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    with caplog.at_level(logging.WARNING, logger="jaxlm"):
        model = jaxlm.load(base, adapter=write(tmp_path / "adapter", factors(LLAMA), lora_parameters=numbers))
    assert {leaf.scale for _, leaf in lora.leaves(model.weights)} == {SCALE}
    assert "alpha" in caplog.text
