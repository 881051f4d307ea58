"""`jaxlm fuse`, and --adapter of the commands that run a model, as a user types them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import meta_files, tiny_files

import jaxlm
from jaxlm import verification
from jaxlm.checkpoint import peft, safetensors
from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli import main
from jaxlm.loading import resolving
from jaxlm.models import llama3
from jaxlm.nn import lora


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    tiny_files.write(path)
    return path


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter that changes the text."""
    cfg = llama3.Config.from_hf(tiny_files.CONFIG)
    rows = lora.targets(llama3.PARAMS, cfg, ["all-linear"])
    tree = jax.eval_shape(lambda: lora.init(rows, cfg.L, 4, 0.5, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), tree)
    peft.write(tmp_path / "adapter", tree, llama3.PARAMS, cfg, base=str(base))
    return tmp_path / "adapter"


def text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["generate", *argv, "Once upon a time", "--max-tokens", "12", "--temperature", "0"]) == 0
    return capsys.readouterr().out


def test_fused_model_matches_the_adapted_model(base, adapter, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["fuse", "-m", str(base), "--adapter", str(adapter), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"wrote {out}: 20 tensors, 0.4 MB\n")
    for path in base.iterdir():
        same = (out / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name != "model.safetensors"), path.name
    texts = {text(capsys, "-m", str(base), "--adapter", str(adapter)), text(capsys, "-m", str(out))}
    texts |= {text(capsys, "-m", str(adapter)), text(capsys, "--adapter", str(adapter))}
    assert len(texts) == 1
    assert texts != {text(capsys, "-m", str(base))}
    ours = jaxlm.fuse(jaxlm.load(base, adapter=adapter))
    for a, b in zip(jax.tree.leaves(ours.weights), jax.tree.leaves(jaxlm.load(out).weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    jaxlm.export(ours, tmp_path / "again")  # as from Python
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(path.name for path in out.iterdir())


def test_base_from_adapter_config_and_another_dtype(adapter, tmp_path, capsys) -> None:
    for i, argv in enumerate((["-m", str(adapter)], ["--adapter", str(adapter)])):
        assert main(["fuse", *argv, "--out", str(tmp_path / str(i)), "--dtype", "bfloat16"]) == 0
    first, second = (tmp_path / str(i) / "model.safetensors" for i in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    assert {tensor.dtype for tensor in safetensors.read_header(first).values()} == {"BF16"}
    assert json.loads((tmp_path / "0/config.json").read_text()) == {**tiny_files.CONFIG, "dtype": "bfloat16"}
    exact = jaxlm.fuse(jaxlm.load(adapter)).weights
    rounded = jaxlm.load(tmp_path / "0", dtype="float32").weights
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert np.abs(a - b).max() <= 2**-8 * np.abs(a).max()  # rounded once


def test_base_in_meta_format(base, adapter, tmp_path, capsys) -> None:
    meta = meta_files.convert(base, tmp_path / "meta")
    loaded = jaxlm.load(meta, adapter=adapter)
    assert loaded.checkpoint.format == "meta"
    assert lora.count(loaded.weights) == lora.count(jaxlm.load(adapter).weights)
    argv = ["fuse", "-m", str(meta), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    assert main([*argv, "--format", "meta"]) == 1
    assert "Meta's format" in capsys.readouterr().err
    assert main(argv) == 0
    ours, fused = jaxlm.fuse(jaxlm.load(adapter)), jaxlm.load(tmp_path / "out")
    assert fused.checkpoint.format == "hf"
    for a, b in zip(jax.tree.leaves(ours.weights), jax.tree.leaves(fused.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_a_base_in_half_precision_is_rounded_once(base, adapter, tmp_path) -> None:
    half = tmp_path / "half"
    assert main(["export", str(base), str(half), "--dtype", "bfloat16"]) == 0
    assert main(["fuse", "-m", str(half), "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 0
    ours = jaxlm.fuse(jaxlm.load(half, adapter=adapter)).weights
    theirs = jaxlm.load(tmp_path / "out").weights
    assert ours["layers"][0]["q"].dtype == "bfloat16"
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert (a != b).mean() < 1e-3  # sums of another order, on the border of two values


def test_a_gguf_file_has_the_weights_of_the_folder(base, adapter, tmp_path, capsys) -> None:
    arguments = ["-m", str(base), "--adapter", str(adapter)]
    assert main(["export", *arguments, str(tmp_path / "model.gguf")]) == 1
    assert "use jaxlm fuse" in capsys.readouterr().err
    for name in ("model.gguf", "folder"):
        assert main(["fuse", *arguments, "--out", str(tmp_path / name)]) == 0
    file, folder = (jaxlm.load(tmp_path / name) for name in ("model.gguf", "folder"))
    assert file.config == folder.config
    for a, b in zip(jax.tree.leaves(file.weights), jax.tree.leaves(folder.weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("argv", [[], ["-m", "base"], ["-m", "base", "--adapter", "a"], ["--out", "x"]])
def test_usage(argv, capsys) -> None:
    assert main(["fuse", *argv]) == 2
    assert "jaxlm fuse -m BASE --adapter ADAPTER --out OUT" in capsys.readouterr().err


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == 1
    return capsys.readouterr().err


def test_fuse_errors(base, adapter, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    told = failure(capsys, "fuse", "-m", base, "--out", out)
    assert told.startswith(f"jaxlm: {base} is not an adapter")
    assert f"jaxlm fuse -m {base} --adapter ADAPTER" in told
    assert main(["fuse", "-m", str(adapter), "--out", str(out)]) == 0
    assert f"jaxlm: {out} is a checkpoint already: --force" in failure(capsys, "fuse", "-m", adapter, "--out", out)
    assert main(["fuse", "-m", str(adapter), "--out", str(out), "--force"]) == 0
    told = failure(capsys, "fuse", "-m", adapter, "--out", base, "--force")
    assert f"jaxlm: {base} holds the files that this model was loaded from" in told
    told = failure(capsys, "fuse", "-m", adapter, "--out", adapter, "--force")
    assert f"jaxlm: {adapter} exists and is not a checkpoint" in told


def test_commands_that_do_not_accept_adapters(base, adapter, tmp_path, capsys) -> None:
    told = failure(capsys, "export", "-m", base, "--adapter", adapter, tmp_path / "out")
    assert "jaxlm fuse" in told
    assert "jaxlm fuse" in failure(capsys, "export", adapter, tmp_path / "out")
    told = failure(capsys, "verify", "-m", base, "--adapter", adapter, "--against", "transformers")
    assert told.startswith("jaxlm: transformers runs models without adapters")
    assert not (tmp_path / "out").exists()
    subject = resolving.resolve(ModelSource(base, adapter=adapter))
    assert verification._references(None, subject) == ["self"]  # also where torch is installed


def test_an_adapter_of_another_shape(base, adapter, capsys) -> None:
    config = {**tiny_files.CONFIG, "intermediate_size": 96}
    (base / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import load_file, save_file

    arrays = load_file(base / "model.safetensors")
    arrays = {name: a[:96] if "gate" in name or "up" in name else a[:, :96] if "down" in name else a
              for name, a in arrays.items()}  # fmt: skip
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, base / "model.safetensors")
    told = failure(capsys, "generate", "-m", base, "--adapter", adapter, "Once")
    name = "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight"
    assert (
        f"{adapter}: the adapter does not match the model. misshapen: 6 ({name} [160, 4] instead of [96, 4], " in told
    )
    assert told.endswith(f"Is its base another? It names the base {base}.\n")


def test_info_shows_an_adapter(base, adapter, capsys) -> None:
    named = [["-m", str(base), "--adapter", str(adapter)], [str(adapter)], ["--adapter", str(adapter)]]
    for argv in named:
        assert main(["info", *argv, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["model"] == str(base)
        assert told["adapter"]["parameters"] == lora.count(jaxlm.load(adapter).weights)
        assert told["adapter"]["weights"]["q"] == {"count": 2, "ranks": [4], "scales": [0.5]}
    assert main(["info", *named[0]]) == 0
    shown = capsys.readouterr().out
    assert "q, k, v, o, gate, up, down: rank 4, scale 0.5, 2 of each" in shown
    assert main(["info", str(base), "--json"]) == 0
    assert "adapter" not in json.loads(capsys.readouterr().out)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert f"{adapter} is an adapter without the name of its base model" in failure(capsys, "info", adapter)
    assert main(["info"]) == 2
