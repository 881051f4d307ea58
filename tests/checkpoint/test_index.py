"""The index of a sharded checkpoint, and JSON files: what is missing, stale or corrupt is said by name."""

import json

import numpy as np
import pytest
from helpers import checkpoint_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint.safetensors import read_index, read_json


def index(folder, where):
    path = folder / "model.safetensors.index.json"
    path.write_text(where if isinstance(where, str) else json.dumps({"weight_map": where}))
    return path


def test_shards_are_read_through_the_index(tmp_path):
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors(), shards=3)
    assert {name: t.shape for name, t in read_index(folder).items()} == {
        n: a.shape for n, a in checkpoint_files.tensors().items()
    }


def test_a_single_file_goes_before_an_index(tmp_path):
    checkpoint_files.write(tmp_path / "model.safetensors", {"new": np.zeros(3, np.float32)})
    index(tmp_path, {"old": "model-00001-of-00002.safetensors"})
    assert list(read_index(tmp_path)) == ["new"]


def test_missing_shard(tmp_path):
    folder = checkpoint_files.folder(tmp_path / "m", checkpoint_files.LLAMA, checkpoint_files.tensors(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        read_index(folder)
    assert str(caught.value) == (
        f"{folder} lacks 1 (model-00002-of-00003.safetensors) of its 3 shards: download them again"
    )


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/other.safetensors", "..", "", "pytorch_model.bin", "a\\b"]
)
def test_shard_outside_the_folder_or_of_another_kind(shard, tmp_path):
    path = index(tmp_path, {"a": shard})
    with pytest.raises(ValueError) as caught:
        read_index(tmp_path)
    assert f"{path} names {shard!r}, which is not a safetensors file in the folder: refused" in str(caught.value)


def test_index_that_does_not_agree_with_its_shards(tmp_path):
    checkpoint_files.write(tmp_path / "1.safetensors", {"a": np.zeros(2, np.float32)})
    checkpoint_files.write(tmp_path / "2.safetensors", {"b": np.zeros(2, np.float32)})
    index(tmp_path, {"a": "2.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    with pytest.raises(ValueError, match=r"2 \(a, c\)\. .* revisions"):
        read_index(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    for name in "12":
        checkpoint_files.write(
            tmp_path / f"{name}.safetensors", {"a": np.zeros(2, np.float32), name: np.zeros(1, np.float32)}
        )
    index(tmp_path, {"a": "1.safetensors", "1": "1.safetensors", "2": "2.safetensors"})
    with pytest.raises(ValueError, match=r"2.safetensors repeats 1 \(a\)"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object, not a list"),
        ('{"weight_map": []}', "has no valid weight_map"),
        ('{"weight_map": {"a": 1}}', "has no valid weight_map"),
        ("{}", "has no valid weight_map"),
    ],
)
def test_corrupt_index(text, message, tmp_path):
    path = index(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        read_index(tmp_path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "download it again" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds neither model.safetensors nor model.safetensors.index.json. jaxlm reads safetensors"),
        (["pytorch_model.bin"], "It has pytorch_model.bin. jaxlm reads safetensors"),
        (["a.gguf"], "It has a.gguf. jaxlm reads"),
        (["model-1.safetensors", "model-2.safetensors"], "Download the index too, or rename a single file."),
        ([f"{i}.bin" for i in range(9)], "It has 0.bin, 1.bin, 2.bin, 3.bin, 4.bin, …."),
    ],
)
def test_folder_without_safetensors(files, message, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError) as caught:
        read_index(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1]", "should hold a JSON object, not a list"),
        (b'{"rms_norm_eps": NaN}', "is not valid JSON (NaN is not a JSON value)"),
        (b'{"rms_norm_eps": -Infinity}', "is not valid JSON (-Infinity is not a JSON value)"),
        (b'{"a": 1, "a": 2}', "is not valid JSON (duplicate key 'a')"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_json_that_is_none(data, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


anything = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x, max_size=4),
)


@settings(
    max_examples=100, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(anything | st.fixed_dictionaries({"weight_map": anything | st.dictionaries(st.text(), st.text())}))
def test_fuzz_index(tmp_path, index):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    try:
        assert read_index(tmp_path) == {}
    except (ValueError, FileNotFoundError) as error:
        assert str(tmp_path) in str(error)  # noqa: PT017
