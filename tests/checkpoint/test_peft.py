"""Adapters in PEFT's form: what is written is read, what does not fit or is not computed is refused by name."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers.stub_hub import Repo, StubHub, turn_to
from helpers.tiny_adapter import beside, drawn
from helpers.tiny_models import CONFIGS, tiny

import jaxlm
from jaxlm import models
from jaxlm.adapters import fuse
from jaxlm.checkpoint import hf, peft
from jaxlm.checkpoint import hub as hub_module
from jaxlm.checkpoint.peft_config import read_settings
from jaxlm.checkpoint.source import ModelSource
from jaxlm.cli import main
from jaxlm.exporting import open_model
from jaxlm.loading.resolving import match_tensors
from jaxlm.nn import lora, params

SIZES = {
    name: checkpoint_files.LLAMA[name] for name in checkpoint_files.LLAMA if name not in ("model_type", "rope_theta")
}
RAW = {family: {**CONFIGS[family], **SIZES} for family in CONFIGS}
SEEING = {"model_type": "gemma3", "vision_config": {}, "tie_word_embeddings": True, "text_config": RAW["gemma3"]}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
TOKENS = [[1, 5, 9, 0]]


def of(raw: dict[str, Any]) -> tuple[Any, Any]:
    family = models.family_of(raw["model_type"])
    return family.PARAMS, family.Config.from_hf(raw)


def base(path: Path, raw: dict[str, Any] = checkpoint_files.LLAMA, spelling: int = 0, **more: np.ndarray) -> Path:
    """A checkpoint folder with drawn weights."""
    rng = np.random.default_rng(0)
    arrays = {
        row.names[spelling if len(row.names) > 2 else 0]: rng.standard_normal(row.stored_shape).astype(np.float32)
        for row in params.tensors(*of(raw))
    }
    return checkpoint_files.folder(path, raw, {**arrays, **more})


def tensors(names: tuple[str, ...] = ("q_proj",), rank: int = 2, kind: Any = np.float32, layers: int = 2) -> Any:
    """The tensors of an adapter of made.LLAMA under PEFT's names."""
    sizes = {"q_proj": (8, 8), "k_proj": (4, 8), "o_proj": (8, 8), "down_proj": (8, 12)}
    rng, found = np.random.default_rng(1), {}
    for i in range(layers):
        for name in names:
            out, inputs = sizes[name]
            part = "mlp" if name == "down_proj" else "self_attn"
            module = f"base_model.model.model.layers.{i}.{part}.{name}"
            found[f"{module}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(kind)
            found[f"{module}.lora_B.weight"] = rng.standard_normal((out, rank)).astype(kind)
    return found


def adapter(path: Path, arrays: Any = None, **fields: Any) -> Path:
    """An adapter's folder; fields: of its config, changed."""
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
    checkpoint_files.write(path / "adapter_model.safetensors", tensors() if arrays is None else arrays)
    return path


def find(folder: Path, raw: dict[str, Any] = checkpoint_files.LLAMA) -> peft.Adapter:
    return peft.find(folder, *of(raw), models.family_of(raw["model_type"]).IGNORED_PREFIXES)


def read(folder: Path, raw: dict[str, Any] = checkpoint_files.LLAMA) -> Any:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return peft.read(find(folder, raw), of(raw)[1].L, lambda stored: stored, lambda row: here)


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# There and back


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", RAW)
def test_what_is_written_is_read(family: str, dtype: Any, tmp_path: Path) -> None:
    table, cfg = of({**RAW[family], "tie_word_embeddings": False})
    rows = lora.targets(table, cfg, ["all-linear", "head"])
    tree = jax.tree.map(lambda a: (a + 0.1).astype(dtype), lora.init(rows, cfg.L, 3, 2 / 3, jax.random.key(0)))
    peft.write(tmp_path / "out", tree, table, cfg, base="org/name", dropout=0.1)
    same(read(tmp_path / "out", {**RAW[family], "tie_word_embeddings": False}), tree)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": 3, "lora_alpha": 2,
        "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none", "lora_dropout": 0.1,
        "base_model_name_or_path": "org/name", "target_modules": sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
    }  # fmt: skip


def test_tensors_are_stored_as_peft_has_them(tmp_path: Path) -> None:
    """[r, inputs] and [outputs, r], heads joined, the first index the outer one."""
    table, cfg = of(checkpoint_files.LLAMA)
    tree: dict[str, Any] = {"layers": [{}, {}]}
    q = lora.Lora(None, jnp.arange(16.0).reshape(2, 8), jnp.arange(16.0).reshape(2, 4, 2), None, 0.5)
    o = lora.Lora(None, jnp.arange(16.0).reshape(2, 2, 4), jnp.arange(16.0).reshape(8, 2), None, 0.5)
    tree["layers"][0] |= {"q": q, "o": o}
    peft.write(tmp_path / "out", tree, table, cfg)
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.model.layers.0.self_attn.") for name in stored}
    assert names == {f"{m}.lora_{x}.weight" for m in ("q_proj", "o_proj") for x in "AB"}
    for name, array in stored.items():
        assert array.shape == ((2, 8) if "lora_A" in name else (8, 2))
        np.testing.assert_array_equal(array.reshape(-1), np.arange(16))
    same(read(tmp_path / "out"), tree)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj"]


def test_leaves_of_different_ranks_and_scales(tmp_path: Path) -> None:
    model = tiny("llama3")
    tree, other = drawn(model, ("q", "v", "down"), 4, 2.5), drawn(model, ("v",), 2, lora.scale(7, 2, True))
    tree["layers"][1] |= other["layers"][1]
    table, cfg = model.family.PARAMS, model.config
    for rslora in (False, True):
        peft.write(tmp_path / "out", tree, table, cfg, rslora=rslora, force=True)
        found = read(tmp_path / "out", CONFIGS["llama3"])
        for (path, a), (_, b) in zip(lora.leaves(found), lora.leaves(tree), strict=True):
            assert a.scale == pytest.approx(b.scale, rel=1e-15), path
            np.testing.assert_array_equal(a.b, b.b)
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert config["rank_pattern"] == {"model.layers.1.self_attn.v_proj": 2}
        assert set(config["alpha_pattern"]) == {"model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("alpha", "rank"), [(32, 16), (16, 8), (1, 3), (0.3, 7), (20, 12), (10, 48), (-1, 5), (0, 4)])
def test_alpha_is_written_as_it_was_given(alpha: float, rank: int, rslora: bool) -> None:
    leaf = lora.Lora(None, jnp.zeros((rank, 1)), jnp.zeros((1, rank)), None, lora.scale(alpha, rank, rslora))
    assert peft._alpha(leaf, rslora) == alpha


# Scales


@pytest.mark.parametrize(
    ("fields", "q", "k"),
    [
        ({}, (2, 6), (2, 6)),
        ({"use_rslora": True}, (2, 6), (2, 6)),
        ({"alpha_pattern": {"q_proj": 8}}, (2, 8), (2, 6)),
        ({"alpha_pattern": {"_proj": 8}}, (2, 6), (2, 6)),  # the whole of a part of the name, as in PEFT
        ({"alpha_pattern": {".*_proj": 8}}, (2, 8), (2, 8)),
        ({"alpha_pattern": {"self_attn": 8}}, (2, 6), (2, 6)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 8, "q_proj": 1}}, (2, 1), (2, 6)),
        ({"alpha_pattern": {"q_proj": 1, "layers.0.self_attn.q_proj": 8}}, (2, 1), (2, 6)),  # the first counts
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 8}}, (2, 8), (2, 6)),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 8}}, (2, 6), (2, 6)),
        ({"alpha_pattern": {r"model\.layers\.(0|3)\.self_attn\.[kq]_proj": 8}}, (2, 8), (2, 8)),
        ({"alpha_pattern": {"layers.10.self_attn.q_proj": 8}}, (2, 6), (2, 6)),
        ({"rank_pattern": {"k_proj": 3}, "alpha_pattern": None}, (2, 6), (3, 6)),
    ],
)
def test_rank_and_alpha_of_a_module(fields: dict[str, Any], q: Any, k: Any, tmp_path: Path) -> None:
    settings = read_settings(adapter(tmp_path / "a", **fields))
    assert settings.of("model.layers.0.self_attn.q_proj") == q
    assert settings.of("model.layers.0.self_attn.k_proj") == k


def test_scales_follow_the_ranks(tmp_path: Path) -> None:
    arrays = {**tensors(), **tensors(("k_proj",), rank=9)}
    fields = {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 9}, "use_rslora": True}
    found = {pair.row.path: pair.scale for pair in find(adapter(tmp_path / "a", arrays, **fields)).pairs}
    assert found["layers.1.q"] == 6 / 2**0.5
    assert found["layers.0.k"] == 2


def test_defaults_of_peft(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", tensors(rank=8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": "all-linear"}')
    assert {pair.scale for pair in find(folder).pairs} == {1.0}


# Refused configs


REFUSED = [
    ({"peft_type": "IA3"}, 'its peft_type is "IA3"; jaxlm loads LoRA adapters (LORA). PEFT\'s merge_and_unload'),
    ({"peft_type": None}, "it has no peft_type"),
    ({"use_dora": True}, "it has use_dora true, which jaxlm does not compute. PEFT's merge_and_unload"),
    ({"bias": "lora_only"}, 'it has bias "lora_only"'),
    ({"modules_to_save": ["embed_tokens"]}, 'it has modules_to_save ["embed_tokens"]'),
    ({"fan_in_fan_out": True}, "it has fan_in_fan_out true"),
    ({"lora_bias": True, "use_qalora": True}, "it has lora_bias true, use_qalora true"),
    ({"layer_replication": [[0, 4], [2, 5]]}, "it has layer_replication [[0, 4], [2, 5]]"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "it has target_parameters"),
    ({"trainable_token_indices": [1, 2]}, "it has trainable_token_indices [1, 2]"),
    ({"alora_invocation_tokens": [5]}, "it has alora_invocation_tokens [5]"),
    ({"init_lora_weights": "pissa"}, 'its init_lora_weights is "pissa"'),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion=…) converts it"),
    ({"init_lora_weights": "olora"}, 'its init_lora_weights is "olora"'),
    ({"init_lora_weights": "corda"}, 'its init_lora_weights is "corda"'),
    ({"init_lora_weights": "lora_ga"}, 'its init_lora_weights is "lora_ga"'),
    ({"init_lora_weights": "loftq"}, 'its init_lora_weights is "loftq"'),
    ({"init_lora_weights": ["x"]}, 'its init_lora_weights is ["x"]'),
    ({"mixture": {"experts": 2}}, "unknown fields 'mixture'"),
    ({"r": 0}, "r is 0 instead of an integer"),
    ({"r": True}, "r is true instead of an integer"),
    ({"r": 2.5}, "r is 2.5 instead of an integer"),
    ({"r": "8"}, 'r is "8" instead of an integer'),
    ({"lora_alpha": None}, "lora_alpha is null instead of a number"),
    ({"lora_alpha": 10**400}, "lora_alpha is 10000000"),
    ({"use_rslora": "yes"}, 'use_rslora is "yes" instead of true or false'),
    ({"rank_pattern": [1]}, "rank_pattern is [1] instead of a table"),
    ({"rank_pattern": {"q_proj": -1}}, "rank_pattern of 'q_proj' is -1 instead of an integer"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern of 'q_proj' is \"x\" instead of a number"),
    ({"alpha_pattern": {"(": 1}}, "alpha_pattern has the unsupported pattern '(' (missing )"),
    ({"alpha_pattern": {"((a|b|ab)*)*c": 1}}, "(too many repetitions)"),
    ({"alpha_pattern": {"(?x:(a+) +)b": 1}}, "(too many repetitions)"),
    ({"alpha_pattern": {".*.*.*.*x": 1}}, "(too many repetitions)"),
    ({"alpha_pattern": {"a" * 501: 1}}, "(too many repetitions)"),
    ({"alpha_pattern": {r"(\1": 1}}, "unsupported pattern"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3 instead of a string"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[json.dumps(f)[:60] for f, _ in REFUSED])
def test_what_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_settings(adapter(tmp_path / "a", **fields))
    assert str(error.value).startswith(f"{tmp_path / 'a' / 'adapter_config.json'}: ")
    assert message in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_what_says_nothing_of_the_result_passes(init: Any, tmp_path: Path) -> None:
    settings = read_settings(adapter(
        tmp_path / "a", init_lora_weights=init, lora_dropout=0.1, loftq_config={"a": 1}, megatron_core="megatron.core",
        use_dora=False, modules_to_save=None, unheard_of=None, another={}, task_type="SEQ_CLS", peft_version="0.99",
        revision="main", layers_pattern=None,
    ))  # fmt: skip
    assert (settings.rank, settings.alpha, settings.revision) == (2, 6, "main")


def test_an_unknown_field_passes_when_it_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", mixture=2, use_dora=True)
    with pytest.raises(ValueError, match="use_dora true"):  # known, and not computed
        read_settings(folder, ["mixture", "use_dora"])
    assert read_settings(adapter(folder, mixture=2), ["mixture"]).rank == 2
    place = base(tmp_path / "base")
    assert jaxlm.load(place, adapter=folder, allow_fields=["mixture"]).checkpoint.adapter.folder == folder


def test_a_hostile_pattern_ends(tmp_path: Path) -> None:
    keys = {f"({'.*' * 3}){i}": 1 for i in range(20)}
    begun = time.monotonic()
    settings = read_settings(adapter(tmp_path / "a", rank_pattern=keys))
    for i in range(50):
        settings.of(f"model.layers.{i}.self_attn.q_proj" + "." * 20)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object, not a list"),
        ('{"r": NaN}', "NaN is not a JSON value"),
    ],
)
def test_a_broken_config(text: str, message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        find(folder)


# Tensors that do not fit


def misfits() -> list[Any]:
    whole, name = tensors(), "base_model.model.model.layers.0.self_attn.q_proj"
    half = {k: v for k, v in whole.items() if k != f"{name}.lora_B.weight"}
    return [
        ({}, {"target_modules": None}, "missing: 1 (base_model.model.…"),
        (half, {}, f"missing the other of the two: 1 ({name}.lora_A.weight). Is"),
        ({**whole, "base_model.model.score.weight": np.zeros((2, 8), np.float32)}, {},
         "unexpected, or different from the base's: 1 (base_model.model.score.weight)"),
        ({**whole, f"{name[:-6]}w_proj.lora_A.weight": np.zeros((2, 8), np.float32)}, {}, "w_proj.lora_A.weight"),
        ({**whole, "base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((2, 8), np.float32)}, {},
         "unexpected, or different from the base's: 1 (base_model.model.model.embed_tokens.lora_embedding_A)"),
        ({**whole, f"{name}.lora_magnitude_vector": np.zeros(8, np.float32)}, {}, "lora_magnitude_vector"),
        ({**whole, "base_model.model.model.embed_tokens.lora_A.weight": np.zeros((2, 8), np.float32)}, {},
         "unexpected, or different from the base's: 1 (base_model.model.model.embed_tokens.lora_A.weight)"),
        (tensors(rank=3), {}, f"misshapen: 4 ({name}.lora_A.weight [3, 8] instead of [2, 8], "),
        ({**whole, f"{name}.lora_B.weight": np.zeros((2, 8), np.float32)}, {}, "[2, 8] instead of [8, 2]"),
        ({**whole, f"{name}.lora_A.weight": np.zeros((16,), np.float32)}, {}, "[16] instead of [2, 8]"),
        ({**whole, f"{name}.lora_A.weight": np.zeros((2, 8), np.int8)}, {},
         f"of an unsupported type (supported: F32, BF16, F16): 1 ({name}.lora_A.weight I8)"),
        (whole, {"target_modules": ["q_proj", "k_proj"]}, "target_modules names them: 2 (model.layers.0.self_attn.k_"),
        (tensors(layers=1), {}, "missing, though target_modules names them: 1 (model.layers.1.self_attn.q_proj)"),
        (tensors(layers=3), {}, "base's: 2 (base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
    ]  # fmt: skip


@pytest.mark.parametrize(("arrays", "fields", "message"), misfits())
def test_tensors_that_do_not_fit(arrays: Any, fields: Any, message: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", arrays, base_model_name_or_path="org/other", **fields)
    with pytest.raises(ValueError) as error:
        find(folder)
    told = str(error.value)
    assert told.startswith(f"{folder}: the adapter does not match the model. ")
    assert message in told
    assert told.endswith("Is its base another? It names the base org/other.")


def test_all_misfits_are_told_together(tmp_path: Path) -> None:
    arrays = {**tensors(rank=3), "a": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match=r"(?s)misshapen: 4.*missing, though.*: 2.*unexpected, .*: 1 \(a\)"):
        find(adapter(tmp_path / "a", arrays, target_modules=["q_proj", "o_proj"]))


def test_a_head_that_is_tied(tmp_path: Path) -> None:
    arrays = {**tensors(), "base_model.model.lm_head.lora_A.weight": np.zeros((2, 8), np.float32)}
    arrays |= {"base_model.model.lm_head.lora_B.weight": np.zeros((24, 2), np.float32)}
    folder = adapter(tmp_path / "a", arrays)
    assert "head" in {pair.row.path for pair in find(folder).pairs}
    with pytest.raises(ValueError, match="untied head"):
        find(folder, {**checkpoint_files.LLAMA, "tie_word_embeddings": True})


def test_a_copy_of_a_tied_head_passes(tmp_path: Path) -> None:
    place = base(tmp_path / "base", {**checkpoint_files.LLAMA, "tie_word_embeddings": True})
    value = np.empty((24, 8), np.float32)
    hf.read_block(hf.read_index(place)["model.embed_tokens.weight"], value)
    copies = {f"base_model.model.{name}.weight": value for name in ("lm_head", "model.embed_tokens")}
    assert jaxlm.load(place, adapter=adapter(tmp_path / "a", {**tensors(), **copies})).checkpoint.adapter


def test_copies_of_the_base_pass(tmp_path: Path) -> None:
    """PEFT stores a head that it adapts, in the type of the training; another one would be lost silently."""
    place = base(tmp_path / "base")
    head = hf.read_index(place)["lm_head.weight"]
    value = np.empty(head.shape, np.float32)
    hf.read_block(head, value)
    name = "base_model.model.lm_head.base_layer.weight"
    for copy in (value, value.astype(checkpoint_files.KINDS["BF16"])):
        assert jaxlm.load(place, adapter=adapter(tmp_path / "a", {**tensors(), name: copy})).checkpoint.adapter
    for other in (value + 1, value[:-1], np.zeros(value.shape, np.int8)):
        folder = adapter(tmp_path / "a", {**tensors(), name: other})
        with pytest.raises(ValueError, match=rf"unexpected, or different from the base's: 1 \({name}\)"):
            jaxlm.load(place, adapter=folder)


@pytest.mark.parametrize(
    "only", [{"layers_to_transform": [0]}, {"exclude_modules": ["layers.1"]}, {"layers_to_transform": 0}]
)
def test_layers_that_are_left_out_on_purpose(only: dict[str, Any], tmp_path: Path) -> None:
    found = find(adapter(tmp_path / "a", tensors(layers=1), layers_pattern="layers", **only))
    assert [pair.row.path for pair in found.pairs] == ["layers.0.q"]


def test_a_hostile_file(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or corrupt"):
        find(folder)


# Spellings, and the half of a model that sees


@pytest.mark.parametrize("spelling", [0, 1, 2])
def test_every_spelling_of_a_row(spelling: int, tmp_path: Path) -> None:
    rows = [row for row in lora.products(*of(RAW["gemma3"])) if row.path.endswith(".q")]
    arrays = {}
    for row in rows:
        module = "base_model.model." + row.names[spelling].removesuffix(".weight")
        arrays[f"{module}.lora_A.weight"] = np.ones((2, row.stored_shape[1]), np.float32)
        arrays[f"{module}.lora_B.weight"] = np.ones((row.stored_shape[0], 2), np.float32)
    folder = adapter(tmp_path / "a", arrays)
    assert [pair.row.path for pair in find(folder, RAW["gemma3"]).pairs] == ["layers.0.q", "layers.1.q"]
    ours, other = (rows[0].names[i % 3].removesuffix(".weight") for i in (spelling, spelling + 1))
    twice = {**arrays, **{name.replace(ours, other): array for name, array in arrays.items()}}
    with pytest.raises(ValueError, match=r"stored under two names: 1 \("):
        find(adapter(tmp_path / "b", twice), RAW["gemma3"])


def test_a_model_that_sees(tmp_path: Path) -> None:
    """Written under the names that transformers' modules have; what is adapted of the other half waits beside."""
    table, cfg = of(SEEING)
    rows = lora.targets(table, cfg, ["q"])
    tree = jax.tree.map(lambda a: a + 0.1, lora.init(rows, cfg.L, 2, 3.0, jax.random.key(0)))
    peft.write(tmp_path / "a", tree, table, cfg, has_vision=True)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    same(read(tmp_path / "a", SEEING), tree)
    from safetensors.numpy import load_file

    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    arrays = load_file(tmp_path / "a/adapter_model.safetensors")
    arrays |= {f"base_model.model.{tower}.lora_A.weight": np.ones((2, 4), np.float32),
               f"base_model.model.{tower}.lora_B.weight": np.ones((4, 2), np.float32)}  # fmt: skip
    checkpoint_files.write(tmp_path / "a/adapter_model.safetensors", arrays)
    place = base(
        tmp_path / "base", SEEING, 1, **{f"{tower}.weight".removeprefix("model."): np.ones((4, 4), np.float32)}
    )
    model = jaxlm.load(place, adapter=tmp_path / "a")
    assert len(model.ignored) == 3
    for use in (lambda: fuse(model), lambda: open_model(ModelSource(place, adapter=tmp_path / "a"), fuse=True)):
        with pytest.raises(ValueError, match="also adapts the vision tower, which is not loaded yet"):
            use()


# Loading


def logits(model: Any) -> np.ndarray:
    return np.asarray(model.forward(TOKENS, model.weights)[0])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_with_an_adapter(dtype: str, tmp_path: Path) -> None:
    place, names = base(tmp_path / "base"), ("q_proj", "k_proj", "o_proj", "down_proj")
    folder = adapter(tmp_path / "a", tensors(names), target_modules=names)
    model, plain = jaxlm.load(place, adapter=folder, dtype=dtype), jaxlm.load(place, dtype=dtype)
    assert f"{place} with {folder}: llama3, " in repr(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.weights)} == {model.dtype}
    by_hand = dict(plain.weights)
    by_hand["layers"] = [dict(layer) for layer in plain.weights["layers"]]
    stored = tensors(names)
    for i in range(2):
        for ours, theirs in (("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("o", "self_attn.o_proj"),
                             ("down", "mlp.down_proj")):  # fmt: skip
            a, b = (stored[f"base_model.model.model.layers.{i}.{theirs}.lora_{x}.weight"] for x in "AB")
            w = by_hand["layers"][i][ours]
            by_hand["layers"][i][ours] = (w + (3 * b @ a).reshape(w.shape)).astype(jnp.float32)
    expected = np.asarray(plain.forward(TOKENS, by_hand)[0])
    far = np.abs(logits(plain) - expected).max()
    assert np.abs(logits(model) - expected).max() < (1e-5 if dtype == "auto" else 0.2) * far
    whole = fuse(model)
    assert whole.checkpoint.adapter is None
    assert np.abs(logits(whole) - expected).max() < (1e-5 if dtype == "auto" else 0.2) * far


def test_an_adapter_alone_brings_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = base(tmp_path / "base")
    folder = adapter(tmp_path / "a", base_model_name_or_path=str(place), revision="main")
    model = jaxlm.load(folder)
    assert model.checkpoint.folder == place
    assert model.source == str(folder)
    np.testing.assert_array_equal(logits(model), logits(jaxlm.load(place, adapter=folder)))
    (folder / "config.json").write_text((place / "config.json").read_text())  # some tools leave the base's there
    assert jaxlm.load(folder).checkpoint.adapter.folder == folder
    described = match_tensors(ModelSource(folder), headers_only=True).checkpoint
    assert (described.folder, described.adapter.folder) == (place, folder)
    table, cfg = of(checkpoint_files.LLAMA)
    monkeypatch.chdir(tmp_path)  # a folder is written so that it can be found from elsewhere
    peft.write(tmp_path / "b", read(folder), table, cfg, base="base")
    monkeypatch.chdir("/")
    assert jaxlm.load(tmp_path / "b").checkpoint.folder == place


def refusals(tmp_path: Path) -> list[Any]:
    place, folder = base(tmp_path / "base"), adapter(tmp_path / "a")
    lost = adapter(tmp_path / "lost", base_model_name_or_path="/nowhere/base")
    (empty := tmp_path / "empty").mkdir()
    pickled = adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    chained = adapter(tmp_path / "chained", base_model_name_or_path=str(folder))
    started, run = tmp_path / "started", tmp_path / "run"
    for folder_of_run in (started, run):
        folder_of_run.mkdir()
        (folder_of_run / "run.json").write_text("{}")
    adapter(run / "adapter")
    return [
        (
            (folder, None),
            ValueError,
            f"{folder} is an adapter without the name of its base model: pass the base (-m BASE --adapter",
        ),
        (
            (folder, folder),
            ValueError,
            f"{folder} is an adapter: pass its base model with {folder}, or",
        ),
        ((chained, None), ValueError, f"{folder} is an adapter: pass its base model with {chained}"),
        (
            (lost, None),
            FileNotFoundError,
            f"{lost} is an adapter of /nowhere/base, and there is no folder '/nowhere/base'",
        ),
        (
            (place, place),
            FileNotFoundError,
            f"{place} is not an adapter, it has no adapter_config.json: it is a checkpoint",
        ),
        (
            (place, empty),
            FileNotFoundError,
            f"{empty} is not an adapter, it has no adapter_config.json (it holds nothing)",
        ),
        (
            (place, place / "config.json"),
            NotADirectoryError,
            "config.json is a file: pass the folder that holds adapter",
        ),
        (
            (place, pickled),
            FileNotFoundError,
            "adapter_model.bin): jaxlm reads safetensors only",
        ),
        ((place, tmp_path / "x"), FileNotFoundError, "there is no folder"),
        ((empty, None), FileNotFoundError, f"{empty} is not a checkpoint: it has no config.json"),
        ((run, None), FileNotFoundError, f"is the folder of a training run: pass {run / 'adapter'}"),
        ((place, run), FileNotFoundError, f"is the folder of a training run: pass {run / 'adapter'}"),
        ((started, None), FileNotFoundError, "its model is written when the run has ended"),
    ]


def test_names_that_are_wrong(tmp_path: Path) -> None:
    for (name, beside_it), kind, message in refusals(tmp_path):
        with pytest.raises(kind) as error:
            jaxlm.load(name, adapter=beside_it)
        assert message in str(error.value)


def test_float16_that_does_not_hold_the_values(tmp_path: Path) -> None:
    arrays = tensors()
    next(iter(arrays.values()))[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"lora_A\.weight has values beyond float16's 65,504: use another dtype"):
        jaxlm.load(base(tmp_path / "base"), adapter=adapter(tmp_path / "a", arrays), dtype="float16")


# Writing


def test_only_an_adapter_is_replaced(tmp_path: Path) -> None:
    model = tiny("llama3")
    tree, out = drawn(model, ("q",)), tmp_path / "out"
    args = (tree, model.family.PARAMS, model.config)
    peft.write(out, *args)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is an adapter already: --force"):
        peft.write(out, *args)
    peft.write(out, *args, force=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    place = base(tmp_path / "base")
    for used in (place, tmp_path):
        with pytest.raises(FileExistsError, match="exists and is not an adapter, it holds"):
            peft.write(used, *args, force=True)
    with pytest.raises(FileExistsError, match="exists and is not a checkpoint, it holds"):
        jaxlm.export(jaxlm.load(place), out, force=True)


def test_an_adapter_on_a_mesh_is_written_as_from_one_device(tmp_path: Path) -> None:
    from jaxlm.loading import spread

    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    model = tiny("llama3", num_hidden_layers=1, **sizes)
    tree = drawn(model)
    there = spread(beside(model, tree), "model=4")
    args = (model.family.PARAMS, model.config)
    moved: dict[str, Any] = {"layers": [{}]}
    for path, leaf in lora.leaves(there.weights):
        params.put(moved, path, replace(leaf, w=None))
    for name, value in (("one", tree), ("mesh", moved)):
        peft.write(tmp_path / name, value, *args)
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == (
        tmp_path / "mesh/adapter_model.safetensors"
    ).read_bytes()
    peft.write(tmp_path / "none", moved, *args, writes=False)
    assert not (tmp_path / "none").exists()


# The hub


def resolve_adapter(name: str, **fields: Any) -> Path:
    return hub_module.resolve_adapter(ModelSource(name, **fields))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import close_session

    place = base(tmp_path / "base")
    folder = adapter(tmp_path / "a", base_model_name_or_path="org/base")
    repos = {
        "org/base": Repo({path.name: path.read_bytes() for path in place.iterdir()}),
        "org/adapter": Repo({**{path.name: path.read_bytes() for path in folder.iterdir()}, "code.py": b"raise"}),
        "org/mlx": Repo(
            {"adapter_config.json": b'{"lora_parameters": {}}', "adapters.safetensors": b"x", "a.npz": b""}
        ),
        "org/pickle": Repo({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, commit="b" * 40),
    }
    with StubHub(repos) as stub:
        turn_to(stub, monkeypatch, tmp_path)
        yield stub
        close_session()


def test_an_adapter_from_the_hub(hub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="offline, and the adapter org/adapter is not in the cache"):
        resolve_adapter("org/adapter", offline=True)
    assert not hub.requests
    folder = resolve_adapter("org/adapter")
    assert hub.names("GET") == {"adapter_config.json", "adapter_model.safetensors"}
    same(read(folder), read(tmp_path / "a"))
    hub.requests.clear()
    assert resolve_adapter("org/adapter", offline=True) == folder == resolve_adapter("org/adapter")
    assert not hub.requests


def test_an_adapter_of_mlx_lm_from_the_hub(hub: StubHub) -> None:
    folder = resolve_adapter("org/mlx")
    assert hub.names("GET") == {"adapter_config.json", "adapters.safetensors"}
    hub.requests.clear()
    assert resolve_adapter("org/mlx", offline=True) == folder == resolve_adapter("org/mlx")
    assert not hub.requests


def test_an_adapter_of_the_hub_brings_its_base(hub: StubHub, tmp_path: Path) -> None:
    model = jaxlm.load("org/adapter")
    np.testing.assert_array_equal(logits(model), logits(jaxlm.load(tmp_path / "base", adapter=tmp_path / "a")))
    hub.requests.clear()
    np.testing.assert_array_equal(logits(jaxlm.load("org/base", adapter="org/adapter", offline=True)), logits(model))
    np.testing.assert_array_equal(logits(jaxlm.load("org/adapter", offline=True)), logits(model))
    assert not hub.requests


def test_info_of_an_adapter_of_the_hub_downloads_no_base_weights(hub: StubHub, capsys) -> None:
    assert main(["info", "org/adapter", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "org/base"
    assert facts["adapter"]["parameters"] > 0
    assert {r.range for r in hub.downloads("model.safetensors")} == {"bytes=0-100000"}


def test_what_the_hub_does_not_have(hub: StubHub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"org/pickle has no adapter_model\.safetensors \(it holds adapter_model"
    ):
        resolve_adapter("org/pickle")
    with pytest.raises(FileNotFoundError, match=r"org/base has no adapter_config\.json, so it is not an adapter"):
        resolve_adapter("org/base")
    with pytest.raises(FileNotFoundError, match="there is no model 'org/nothing'"):
        resolve_adapter("org/nothing")
    with pytest.raises(FileNotFoundError, match="there is no model 'org/nothing'"):
        jaxlm.load("org/nothing")
    with pytest.raises(FileNotFoundError, match=r"org/pickle has no config\.json"):
        jaxlm.load("org/pickle")
