"""Meta's original files against Meta's own code (packages llama-models and fairscale), on the CPU with random weights.

The files are written by torch.save. Meta's code runs in one process with the whole weights, and once in two processes
with a shard each. Its `apply_scaling` fixes the factor at 8, which is wrong for Llama 3.2: where the factor is another,
its code is patched.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import meta_files, varied_text
from helpers.meta_writer import write_pth
from oracle import reference
from oracle.reference import FAULT, LIMIT
from oracle.test_frequencies import ulps

import jaxlm
from jaxlm import Model
from jaxlm.checkpoint import hf, meta
from jaxlm.checkpoint.pth import read_pth
from jaxlm.checkpoint.safetensors import chunks

pytestmark = pytest.mark.oracle
PARAMS = {
    "dim": 128, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 200, "ffn_dim_multiplier": 0.25,
    "multiple_of": 96, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": False,
}  # fmt: skip
RAW = {
    "model_type": "llama", "vocab_size": 200, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT = [5, 0, 17, 2, 88, 1, 40]
NAMES = {0: "unscaled", 8: "scaled by 8", 32: "scaled by 32"}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Meta's layers want process groups: gloo, of this process alone, over no port."""
    import fairscale.nn.model_parallel.initialize as parallel
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel.initialize_model_parallel(1)
    yield
    parallel.destroy_model_parallel()
    dist.destroy_process_group()


def save(folder: Path, shards: int, factor: int, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """Writes a folder as Meta did, with torch.save; gives the whole tensors."""
    import torch

    whole = meta_files.renamed(meta_files.weights(RAW, seed=seed), RAW)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**PARAMS, "use_scaled_rope": bool(factor)}))
    for i, part in enumerate(meta_files.cut(whole, shards)):
        tensors = {name: torch.from_numpy(w.copy()).to(getattr(torch, dtype)) for name, w in part.items()}
        torch.save(tensors, folder / f"consolidated.{i:02}.pth")
    return {name: torch.from_numpy(w) for name, w in whole.items()}


def meta_model(tensors: dict[str, Any], factor: int, patch: pytest.MonkeyPatch, length: int = 128) -> Any:
    from llama_models.llama3 import model as code
    from llama_models.llama3.args import ModelArgs

    if factor not in (0, 8):
        patch.setattr(code, "apply_scaling", scaling_by(factor))
    args = ModelArgs(**{**PARAMS, "use_scaled_rope": bool(factor), "max_batch_size": 2, "max_seq_len": length})
    model = code.Transformer(args).eval()
    model.load_state_dict(tensors, strict=True)
    return model


def scaling_by(factor: int) -> Any:
    """Meta's own apply_scaling with another number in the place of its 8."""
    from llama_models.llama3 import model as code

    source = inspect.getsource(code.apply_scaling)
    assert source.count("scale_factor = 8") == 1
    space = dict(vars(code))
    exec(source.replace("scale_factor = 8", f"scale_factor = {factor}"), space)
    return space["apply_scaling"]


def logits(model: Any, tokens: np.ndarray, start: int = 0) -> np.ndarray:
    import torch

    return model(torch.from_numpy(tokens).long(), start).numpy()


def at_positions(model: Any, ours: Model, tokens: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """Meta's logits of rows at any positions: its table of rotations is filled for them, from our frequencies."""
    import torch

    radians = torch.from_numpy(np.array(ours.config.frequencies().radians))
    rows = []
    for row, places in zip(tokens, pos):
        angles = torch.outer(torch.from_numpy(places).float(), radians)
        model.freqs_cis = torch.polar(torch.ones_like(angles), angles)
        rows.append(logits(model, row[None])[0])
    return np.stack(rows)


def load(folder: Path, factor: int, **options: Any) -> Model:
    return jaxlm.load(folder, rope_factor=factor or None, **options)


@pytest.mark.parametrize("factor", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_logits(shards: int, factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Meta's code stands at the first 64 positions; at 9,000 and more with shared frequencies."""
    oracle = meta_model(save(tmp_path, shards, factor), factor, monkeypatch)
    ours = load(tmp_path, factor)
    tokens, pos = reference.near_and_far()
    near, _ = ours.forward(tokens, ours.weights)
    assert reference.distance(near, logits(oracle, tokens)) < LIMIT
    far, _ = ours.forward(tokens, ours.weights, None, pos)
    expected = at_positions(oracle, ours, tokens, pos)
    assert reference.distance(far, expected) < LIMIT
    if factor:  # the other published factor is far off, at far positions
        other = load(tmp_path, 40 - factor)
        assert reference.distance(other.forward(tokens, other.weights, None, pos)[0], expected) > FAULT


@pytest.mark.parametrize("factor", NAMES, ids=NAMES.get)
def test_frequencies(factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from llama_models.llama3 import model as code

    save(tmp_path, 1, factor)
    ours = load(tmp_path, factor).config
    table = {}
    outer = torch.outer
    monkeypatch.setattr(torch, "outer", lambda t, freqs: table.setdefault("freqs", freqs) is None or outer(t, freqs))
    if factor == 32:
        monkeypatch.setattr(code, "apply_scaling", scaling_by(32))
    code.precompute_freqs_cis(16, 4, 500000.0, bool(factor))
    theirs = table["freqs"].numpy()
    assert ulps(np.asarray(ours.frequencies().radians), theirs) <= 2


def test_greedy_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Meta's own cache, a token at a time."""
    import torch

    oracle = meta_model(save(tmp_path, 2, 8, seed=3), 8, monkeypatch)
    expected, piece, start = [], PROMPT, 0
    for _ in range(64):
        best = oracle(torch.tensor([piece]), start)[0, -1].argmax()
        start, piece = start + len(piece), [int(best)]
        expected.append(piece[0])
    assert len(set(expected)) >= 20  # a text that repeats itself proves little
    got = jaxlm.generate(load(tmp_path, 8), PROMPT, max_tokens=64, temperature=0, ignore_eos=True)
    assert got.tokens == expected


def rows_left_in_pairs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hf, "in_pairs", lambda w, H: w)


def rows_reordered_the_other_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hf, "in_pairs", lambda w, H: w.reshape(-1, H // 2, 2, w.shape[-1]).swapaxes(1, 2))


def up_for_gate(patch: pytest.MonkeyPatch) -> None:
    gate, up = meta.NAMES["layers.gate"], meta.NAMES["layers.up"]
    patch.setattr(meta, "NAMES", {**meta.NAMES, "layers.gate": up, "layers.up": gate})


def shards_in_another_order(patch: pytest.MonkeyPatch) -> None:
    read = meta.read_shards
    patch.setattr(meta, "read_shards", lambda *args: read(*args)[::-1])


@pytest.mark.parametrize(
    "fault", [rows_left_in_pairs, rows_reordered_the_other_way, up_for_gate, shards_in_another_order]
)
def test_planted_faults_show(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = meta_model(save(tmp_path, 2, 0), 0, monkeypatch)
    tokens, _ = reference.near_and_far()
    fault(monkeypatch)
    ours = load(tmp_path, 0)
    assert reference.distance(ours.forward(tokens, ours.weights)[0], logits(oracle, tokens)) > FAULT


def test_two_processes_of_metas_code_with_a_shard_each(tmp_path: Path) -> None:
    """As these files are meant to be run: fairscale's layers decide what a shard is."""
    save(tmp_path, 2, 8)
    tokens, _ = reference.near_and_far()
    np.save(tmp_path / "tokens.npy", tokens)
    script = Path(__file__).with_name("meta_processes.py")
    args = json.dumps({**PARAMS, "use_scaled_rope": True, "max_batch_size": 2, "max_seq_len": 128})
    command = [sys.executable, str(script), str(tmp_path), args, "2"]
    ranks = [subprocess.Popen([*command, str(rank)], env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}) for rank in (0, 1)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    ours = load(tmp_path, 8)
    got, _ = ours.forward(tokens, ours.weights)
    assert reference.distance(got, np.load(tmp_path / "logits.npy")) < LIMIT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_of_torch_are_read_and_the_helpers_by_torch(dtype: str, tmp_path: Path) -> None:
    """The helper stands in for torch.save in the tests that run without torch."""
    import torch

    save(tmp_path, 2, 0, dtype)
    for path in sorted(tmp_path.glob("*.pth")):
        theirs, found = torch.load(path, weights_only=True), read_pth(path)
        assert list(found) == list(theirs)
        for name, tensor in theirs.items():
            data = b"".join(map(bytes, chunks(found[name])))
            assert found[name].shape == tuple(tensor.shape)
            assert data == tensor.view(torch.uint8).numpy().tobytes()
        write_pth(tmp_path / "again", ((t.name, t.dtype, t.shape, chunks(t)) for t in found.values()))
        for mmap in (False, True):
            again = torch.load(tmp_path / "again", weights_only=True, mmap=mmap)
            assert list(again) == list(theirs)
            assert all(
                torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype
                for name, tensor in theirs.items()
            )


def test_what_else_torch_saves(tmp_path: Path) -> None:
    """Parameters, a state_dict, tied tensors and views are read; the rest is refused."""
    import torch

    path = tmp_path / "x.pth"
    layer = torch.nn.Linear(3, 4)
    torch.save(layer.state_dict(), path)
    assert {name: t.shape for name, t in read_pth(path).items()} == {"weight": (4, 3), "bias": (4,)}
    w = torch.arange(24.0).reshape(6, 4)
    torch.save({"a": w, "b": w, "rows": torch.nn.Parameter(torch.arange(12.0).reshape(4, 3)[1:3])}, path)
    found = read_pth(path)
    assert found["a"].offset == found["b"].offset
    assert b"".join(map(bytes, chunks(found["rows"]))) == np.arange(3.0, 9.0, dtype=np.float32).tobytes()
    refused = {
        "is not contiguous": {"a": w.t()},
        "share a part": {"a": w[:4], "b": w[2:]},
        "'torch.LongStorage'": {"a": torch.arange(3)},
        "'torch.DoubleStorage'": {"a": w.double()},
        "'n' is not a tensor": {"n": 1},
        "'m' is not a tensor": {"m": {"w": w}},
        "instead of a dict": w,
        "which no table of tensors needs": layer,
    }
    for message, value in refused.items():
        torch.save(value, path)
        with pytest.raises(ValueError, match="nothing in it was executed") as caught:
            read_pth(path)
        assert message in str(caught.value)
    torch.save({"a": w}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"PyTorch before 1\.6"):
        read_pth(path)
    torch.save({"a": w}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match=r"pickle protocol 4, torch\.save writes 2"):
        read_pth(path)


# Token ids


@pytest.fixture(scope="module")
def tokenizers(shared: Path) -> tuple[Any, Any]:
    """Ours and Meta's, from the same file."""
    from llama_models.llama3.tokenizer import Tokenizer

    path = shared / "tokenizers/llama3/tokenizer.model"
    return jaxlm.processing.tokenizer.Tokenizer.load(path), Tokenizer(path)


def test_token_ids(tokenizers: tuple[Any, Any], shared: Path) -> None:
    ours, theirs = tokenizers
    texts = varied_text.texts(shared)
    assert sum(map(len, texts)) > 1_500_000
    got = ours.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]
    different = [
        t for t, ids in zip(texts, got) if ids != theirs.encode(t, bos=False, eos=False, allowed_special="all")
    ]
    assert different == []
    assert ours.encode("a b") == theirs.encode("a b", bos=True, eos=False)
    assert ours.vocab_size == theirs.n_words == 128256
    assert ours.bos_id == theirs.bos_id


def test_chat_ids(tokenizers: tuple[Any, Any]) -> None:
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat

    ours, theirs = tokenizers
    for chat in varied_text.CHATS:
        messages = [RawMessage.model_validate(message) for message in chat]
        assert ours.chat(chat) == ChatFormat(theirs).encode_dialog_prompt(messages).tokens


def test_what_ends_an_answer(tokenizers: tuple[Any, Any], shared: Path, tmp_path: Path) -> None:
    meta_files.folder(tmp_path)
    model = jaxlm.load(tmp_path, tokenizer=shared / "tokenizers/llama3/tokenizer.model")
    assert sorted(model.tokenizer.stop_ids) == sorted(tokenizers[1].stop_tokens)
