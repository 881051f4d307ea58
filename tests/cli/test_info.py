"""`jaxlm info`: what it tells must be what a model has that is really made."""

import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meta_files, tiny_files
from helpers.chat_templates import THINKING
from helpers.published_configs import CONFIGS, COUNTS
from helpers.stub_hub import Repo, StubHub, turn_to
from helpers.tiny_tokenizers import byte_level

from jaxlm import models
from jaxlm.checkpoint import safetensors
from jaxlm.cli import main
from jaxlm.nn import kv_cache as caches
from jaxlm.nn import params

GEMMA = {
    "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "torch_dtype": "float32",
    "max_position_embeddings": 2048, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    tiny_files.write(path)
    return path


def told(capsys, *argv: str) -> dict:
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def drawn(capsys, *argv: str) -> str:
    assert main(["info", *argv]) == 0
    return capsys.readouterr().out


def write_gemma(path: Path, **extra: tuple[int, ...]) -> None:
    """A checkpoint of GEMMA in its own spelling, with extra tensors of these shapes."""
    from safetensors.numpy import save_file

    family = models.family_of("gemma3_text")
    rows = params.tensors(family.PARAMS, family.Config.from_hf(GEMMA))
    tensors = {row.names[1]: np.zeros(row.stored_shape, np.float32) for row in rows}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(GEMMA))
    save_file({**tensors, **{n: np.zeros(s, np.float32) for n, s in extra.items()}}, path / "model.safetensors")


def test_the_tree(folder, capsys):
    lines = drawn(capsys, str(folder)).splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = [line.strip("│├└─ ") for line in lines]
    assert text[0].startswith(f"{folder}"[:40])
    for line in (
        "architecture  family llama3, model_type llama, LlamaForCausalLM", "parameters  102,848",
        "embedding and head 16,512", "per layer 43,136", "weights  0.4 MB in float32, 1 file",
        "sizes  V 258, D 64, F 160, L 2, N 4, K 2, H 16", "context  2,048 tokens", "rope: default, theta 10,000",
        "KV cache  512 bytes per token (256 per layer)", "2,048 tokens  1.0 MB", "layers × 2",
        "head: tied to the embedding",
        "tokenizer  258 tokens, BOS <begin>, no chat template", "stop tokens: <end> 257",
        "generation  greedy (no generation_config.json)",
    ):  # fmt: skip
        assert line in text, line
    assert any(" ".join(line.split()) == "q N H D 4 × 16 × 64 4,096" for line in text)


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_tokenizer_from_another_folder_changes_only_the_tokenizer(form, folder, tmp_path, capsys):
    """Not its folder's generation_config.json: `load` does not take that either."""
    import jaxlm

    model, there = str(tmp_path / "model"), tmp_path / "there"
    shutil.copytree(folder, model) if form == "hf" else meta_files.convert(folder, Path(model))
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, model)
    own = Path(model, "generation_config.json")
    own.write_text(json.dumps({"top_k": 3, "do_sample": True, "eos_token_id": 257}))
    there.mkdir()
    for path in Path(model).glob("tokenizer*"):
        path.rename(there / path.name)
    (there / "generation_config.json").write_text('{"top_k": 7, "do_sample": true, "eos_token_id": 5}')
    assert told(capsys, model)["tokenizer"] is None
    facts = told(capsys, model, "--tokenizer", str(there))
    assert facts["generation"]["options"]["top_k"] == 3
    loaded = jaxlm.load(model, tokenizer=there)
    assert loaded.generation_config["top_k"] == 3
    assert sorted(facts["tokenizer"]["stop"].values()) == list(loaded.tokenizer.stop_ids) == [257]
    (tmp_path / "empty").mkdir()
    assert main(["info", model, "--tokenizer", str(tmp_path / "empty")]) == 1
    assert "empty has no tokenizer" in capsys.readouterr().err


def test_a_narrow_terminal(capsys, tmp_path, monkeypatch):
    """Below the width of the columns each tensor still has a line of its own."""
    write_gemma(tmp_path / "g")
    for columns, q in ((45, "q  N H D  4 × 8 × 32  1,024"), (80, "q              N H D  4 × 8 × 32  1,024")):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = drawn(capsys, str(tmp_path / "g")).splitlines()
        assert all(len(line) <= columns for line in lines)
        assert f"│   │   ├── {q}" in lines


def test_json_matches_the_file(folder, capsys):
    facts = told(capsys, "-m", str(folder))
    tensors = safetensors.read_header(folder / "model.safetensors")
    assert facts["parameters"]["total"] == sum(math.prod(t.shape) for t in tensors.values())
    assert facts["weights"]["bytes"] == sum(t.nbytes for t in tensors.values())
    assert {t["name"] for t in facts["tensors"]} == {name for name in tensors if ".layers.1." not in name}
    assert facts["tokenizer"]["stop"] == {"<end>": 257}
    assert facts["generation"] == {"file": False, "options": {"temperature": 0.0}, "unsupported": []}


def test_another_type_changes_the_bytes(folder, capsys):
    before, after = (told(capsys, str(folder), "--dtype", dtype) for dtype in ("auto", "bfloat16"))
    assert after["weights"]["bytes"] * 2 == before["weights"]["bytes"]
    assert after["kv"]["bytes_per_token"] * 2 == before["kv"]["bytes_per_token"]
    assert after["weights"]["stored"] == before["weights"]["stored"]
    assert "stored: 0.4 MB in float32" in drawn(capsys, str(folder), "--dtype", "bfloat16")


def test_cache_size_matches_an_allocated_cache(tmp_path, capsys):
    write_gemma(tmp_path / "g")
    facts = told(capsys, str(tmp_path / "g"))
    cfg = models.family_of("gemma3_text").Config.from_hf(GEMMA)
    for length, nbytes in facts["kv"]["bytes"].items():
        made = caches.init(1, int(length), cfg.windows, cfg.K, cfg.H, jnp.float32, 1)
        assert nbytes == params.nbytes(made.layers)
    assert list(facts["kv"]["bytes"]) == ["1024", "2048"]
    assert facts["kv"]["bytes_per_token"] == 7 * facts["kv"]["bytes_per_token_past_the_window"]
    assert facts["layers"] == [
        {"window": 16, "count": 6, "layers": [0, 1, 2, 3, 4, 6]},
        {"window": None, "count": 1, "layers": [5]},
    ]
    tree = drawn(capsys, str(tmp_path / "g"))
    assert "layers × 7; 6 sliding window of 16; 1 full attention (5)" in tree
    assert "rope: linear, theta 1,000,000, factor 8\n" in tree
    assert "local rope: default, theta 10,000\n" in tree


def test_weights_are_not_read(tmp_path, capsys, monkeypatch):
    """Not even to compare a stored head with the embedding that it is tied to."""
    write_gemma(tmp_path / "g", **{"lm_head.weight": (64, 32), "vision_tower.a.weight": (5, 4), "vision_tower.b": (2,)})
    monkeypatch.setattr(safetensors, "read_into", lambda *args: pytest.fail("a weight was read"))
    facts = told(capsys, str(tmp_path / "g"))
    assert facts["weights"]["ignored"] == {"vision_tower.*": 2}
    assert facts["weights"]["ignored_bytes"] == 4 * 22
    assert "ignored: 2 vision_tower.* (0.0 MB)" in drawn(capsys, str(tmp_path / "g"))


def test_a_config_without_weights(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GEMMA))
    other = tmp_path / "any-name.json"
    other.write_text(json.dumps({**GEMMA, "torch_dtype": None}))
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 64, "num_beams": 4}')
    alone = told(capsys, str(other))
    nbytes = 2 * alone["parameters"]["total"]
    absent = {"present": False, "reason": "", "dtype": "bfloat16", "config_dtype": None, "bytes": nbytes}
    assert alone["weights"] == absent
    assert alone["tokenizer"] is None
    assert "weights  not found; 0.1 MB in bfloat16 (config.json names no type)\n" in drawn(capsys, str(other))
    for name in (path, tmp_path):
        tree = drawn(capsys, str(name))
        assert "weights  not found; 0.2 MB in float32\n" in tree
        assert "holds neither model.safetensors nor" in " ".join(tree.replace("│", " ").split())
        assert "tokenizer  not found\n" in tree
        assert "generation  temperature 1.0, top_k 64; not supported: num_beams\n" in tree


def test_info_errors(tmp_path, folder, capsys):
    assert main(["info"]) == 2
    assert main(["info", "a", "-m", "b"]) == 2
    assert capsys.readouterr().err.count("pass one model: a hub id, a folder or a config.json") == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert main(["info", str(folder)]) == 1
    assert f"{folder}: the weights do not match config.json. missing: 9 (model.layers.2" in capsys.readouterr().err
    (tmp_path / "moe.json").write_text('{"model_type": "mixtral"}')
    assert main(["info", str(tmp_path / "moe.json")]) == 1
    assert "moe.json: model_type 'mixtral' is not supported" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"name": "jaxlm"}')
    assert main(["info", str(tmp_path / "other.json")]) == 1
    assert "other.json: config.json has no field 'model_type'" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_invalid_tokenizer_is_shown_with_the_other_facts(folder, capsys):
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot be read" in told(capsys, str(folder))["tokenizer"]["error"]
    assert "tokenizer  cannot be read: " in drawn(capsys, str(folder))


# Models at their published sizes


def config_file(folder: Path, name: str) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[name]))
    return str(path)


def test_published_sizes_have_their_published_counts(tmp_path, capsys):
    for name, count in COUNTS.items():
        path = config_file(tmp_path, name)
        assert told(capsys, path)["parameters"]["total"] == count, name
        assert all(len(line) <= 80 for line in drawn(capsys, path).splitlines()), name


def test_a_vocabulary_and_template(tmp_path, capsys):
    byte_level(tmp_path, eos_token="<|end|>", chat_template=THINKING)
    config_file(tmp_path, "Qwen-Qwen3-4B")
    (tmp_path / "Qwen-Qwen3-4B.json").rename(tmp_path / "config.json")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [3, 1]})
    )
    tree = drawn(capsys, str(tmp_path))
    count = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) + 3  # added tokens
    assert f"{count:,} tokens, no BOS token, chat template, reasoning" in tree
    assert "stop tokens: <|end|> 1, <|im_end|> 3" in tree
    assert "generation  temperature 0.6, top_k 20, top_p 0.95" in tree


def test_a_published_vocabulary_and_template(shared, tmp_path, capsys):
    for source, name in (("configs/Qwen-Qwen3-4B.json", "config.json"), ("tokenizers/qwen3/tokenizer.json", ""),
                         ("tokenizers/qwen3/tokenizer_config.json", ""),
                         ("generation_configs/Qwen-Qwen3-4B.json", "generation_config.json")):  # fmt: skip
        (tmp_path / (name or Path(source).name)).symlink_to(shared / source)
    tree = drawn(capsys, str(tmp_path))
    assert "151,669 tokens, no BOS token, chat template, reasoning" in tree
    assert "stop tokens: <|endoftext|> 151643, <|im_end|> 151645" in tree
    assert "generation  temperature 0.6, top_k 20, top_p 0.95" in tree


# The hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """org/tiny, in two shards with 400 kB between them."""
    from huggingface_hub import close_session
    from safetensors.numpy import load_file, save

    tensors = load_file(folder / "model.safetensors")
    parts = [{n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % 2 == part} for part in (0, 1)]
    names = [f"model-0000{part + 1}-of-00002.safetensors" for part in (0, 1)]
    index = {"weight_map": {n: name for part, name in zip(parts, names) for n in part}}
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
    files |= {name: save(part) for part, name in zip(parts, names)}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    repos = {"org/tiny": Repo(files), "org/gated": Repo(files, gated=True), "org/none": Repo({"README.md": b""})}
    with StubHub(repos) as stub:
        turn_to(stub, monkeypatch, tmp_path)
        yield stub
        close_session()


def test_only_headers_are_downloaded_from_the_hub(folder, hub, tmp_path, capsys):
    here, there = told(capsys, str(folder)), told(capsys, "org/tiny")
    assert there.pop("model") == "org/tiny"
    assert here.pop("model") == str(folder)
    assert there["weights"].pop("files") == 2
    assert here["weights"].pop("files") == 1
    assert here == there
    ranges = {r.range for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET"}
    assert ranges == {"bytes=0-100000"}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    asked = len(hub.requests)
    assert told(capsys, "org/tiny", "--offline")["weights"]["present"] is False
    assert len(hub.requests) == asked


@pytest.mark.parametrize(("name", "message"), [
    ("org/gated", "org/gated is gated: accept its license"), ("org/absent", "there is no model 'org/absent'"),
    ("org/none", "org/none has no config.json"),
])  # fmt: skip
def test_hub_errors(hub, capsys, name, message):
    assert main(["info", name]) == 1
    assert message in capsys.readouterr().err


def test_offline_without_a_copy(hub, capsys):
    assert main(["info", "org/tiny", "--offline"]) == 1
    assert "offline, and org/tiny lacks config.json in the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "lines"),
    [
        (
            "data=2,model=4",
            ["data 2 × model 4, 8 devices", "K  2 of 8 on each device\n", "N  8 of 32 on each device\n"],
        ),
        ("model=16", ["K  1 of 8 on each device, replicated on 2 devices", "F  896 of 14,336 on each device"]),
        ("model=3", ["N  all 32 on each device: 3 does not divide it", "V  42,752 of 128,256 on each device\n"]),
    ],
)
def test_mesh(tmp_path, capsys, mesh, lines):
    """No device is needed to ask what each would hold."""
    config = config_file(tmp_path, "meta-llama-Llama-3.1-8B")
    assert main(["info", config, "--mesh", mesh]) == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line in out


def test_bytes_per_device_of_a_mesh(tmp_path, capsys):
    config = config_file(tmp_path, "meta-llama-Llama-3.1-8B")
    assert main(["info", config, "--mesh", "data=2,model=16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    heads, norms = 2 * 32 * 8 * 128 * 4096, 65 * 4096  # k and v go over 8 of 16; norms are whole
    divided = told["parameters"]["total"] - heads - norms
    assert told["mesh"]["weights"] == 2 * (divided // 16 + heads // 8 + norms)
    assert told["mesh"]["kv"]["8192"] == 2 * 32 * 128 * 2 * 8192
    assert main(["info", config, "--mesh", "model=16,rows=2"]) == 1
    assert "rows" in capsys.readouterr().err
