"""The safetensors format and the index: every file that is not whole is refused by name, quickly, with a ValueError."""

import errno
import json
import os
import tracemalloc

import numpy as np
import pytest
from helpers import checkpoint_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.safetensors import Tensor, read_header, read_index, read_into

TWO = {"a": checkpoint_files.entry(0, 2, 3), "b": checkpoint_files.entry(24, 4)}


def test_header_says_where_every_tensor_lies(tmp_path):
    path = checkpoint_files.write(
        tmp_path / "x", {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "e": np.empty((0, 3), "f4")}
    )
    size = path.stat().st_size
    assert read_header(path) == {
        "a": Tensor("a", path, "F32", (2, 3), size - 24, 24),
        "e": Tensor("e", path, "F32", (0, 3), size, 0),
    }


def test_order_padding_and_metadata_do_not_matter(tmp_path):
    header = json.dumps({"b": TWO["b"], "__metadata__": {"format": "pt"}, "a": TWO["a"]}).encode() + b"     "
    tensors = read_header(checkpoint_files.write_raw(tmp_path / "x", header, bytes(40)))
    assert tensors["b"].offset == tensors["a"].offset + 24 == 8 + len(header) + 24


def test_every_type_of_the_format_is_read(tmp_path):
    sizes = {"F64": 8, "C64": 8, "I32": 4, "BF16": 2, "F16": 2, "BOOL": 1, "F8_E4M3": 1, "F6_E2M3": 0.75, "F4": 0.5}
    header, at = {}, 0
    for kind, size in sizes.items():
        nbytes = int(8 * size)
        header[kind] = {"dtype": kind, "shape": [8], "data_offsets": [at, at + nbytes]}
        at += nbytes
    assert list(read_header(checkpoint_files.write_raw(tmp_path / "x", header, bytes(at)))) == list(sizes)


def bad(**changes):
    """Header TWO with the entry of `b` changed."""
    return {"a": TWO["a"], "b": TWO["b"] | changes}


CORRUPT = {
    "negative offset": (bad(data_offsets=[-16, 0]), "'b' is invalid"),
    "end before begin": (bad(data_offsets=[40, 24]), "cannot have -16 bytes"),
    "offsets not whole": (bad(data_offsets=[24.0, 40]), "'b' is invalid"),
    "one offset": (bad(data_offsets=[24]), "'b' is invalid"),
    "offsets true": (bad(data_offsets=[False, True]), "'b' is invalid"),
    "offsets absurd": (bad(data_offsets=[24, 10**4000]), "'b' is invalid"),
    "overlap": ({"a": TWO["a"], "b": checkpoint_files.entry(20, 4)}, "'b' begins at byte"),
    "the same bytes twice": ({**TWO, "c": checkpoint_files.entry(24, 4)}, "begins at byte"),
    "hole": ({"a": TWO["a"], "b": checkpoint_files.entry(28, 3)}, "'b' begins at byte"),
    "wrong byte count": (bad(shape=[5]), "type F32 and shape [5] cannot have 16 bytes"),
    "half a byte": (bad(dtype="F4", shape=[33]), "cannot have 16 bytes"),
    "negative shape": (bad(shape=[-2, -2]), "'b' is invalid"),
    "absurd shape": (bad(shape=[10**12, 0]), "'b' is invalid"),
    "shape of a thousand axes": (bad(shape=[40] * 1000), "'b' is invalid"),
    "shape a word": (bad(shape="4"), "'b' is invalid"),
    "type a list": (bad(dtype=["F32"]), "'b' is invalid"),
    "no type": ({"a": TWO["a"], "b": {"shape": [4], "data_offsets": [24, 40]}}, "'b' is invalid"),
    "entry a list": ({"a": TWO["a"], "b": []}, "'b' is invalid"),
    "unknown type": (bad(dtype="I4"), "tensor 'b' has type 'I4', which jaxlm cannot read: convert it"),
    "a list": ([TWO], "its header is not a JSON object"),
    "not JSON": (b'{"a": ', "its header is not JSON"),
    "not text": (b'{"\xff\xfe": 1}', "its header is not JSON"),
    "a number too long to read": (b'{"a": ' + b"1" * 5000 + b"}", "its header is not JSON"),
    "too deep": (b'{"a":' * 100_000, "its header is not JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON value"),
    "a tensor twice": (json.dumps(TWO).encode()[:-1] + b', "b": {}}', "duplicate key 'b'"),
    "a key of an entry twice": (json.dumps(TWO).encode()[:-2] + b', "dtype": "F16"}}', "duplicate key 'dtype'"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_header(case, tmp_path):
    header, message = CORRUPT[case]
    path = checkpoint_files.write_raw(tmp_path / "model.safetensors", header, bytes(40))
    with pytest.raises(ValueError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\x01\0\0", "its header should have 1 bytes, the file has 3"),
        (b"\xff" * 7 + b"\x7f" + b"{}", "its header should have 9,223,372,036,854,775,807 bytes, the file has 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "run `git lfs pull`"),
    ],
)
def test_no_header_at_all(data, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [1, 40, 41, 100, 150])
def test_truncated_file(cut, tmp_path):
    """Within the data, between header and data, and within the header."""
    path = checkpoint_files.write_raw(tmp_path / "model.safetensors", TWO, bytes(40))
    whole = path.read_bytes()
    assert len(read_header(path)) == 2
    path.write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt .*: download it again"):
        read_header(path)


def test_file_that_is_too_long(tmp_path):
    path = checkpoint_files.write_raw(tmp_path / "model.safetensors", TWO, bytes(41))
    with pytest.raises(ValueError, match=r"its tensors end at byte [0-9]+, the file at"):
        read_header(path)


def test_absurd_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2 << 30).to_bytes(8, "little"))
    os.truncate(path, 3 << 30)  # a sparse file: it takes no room
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="header should have 2,147,483,648 bytes"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def judge(path):
    """read_header either raises ValueError or finds every tensor within the file."""
    try:
        tensors = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017  both outcomes are right
        return
    size = path.stat().st_size
    assert all(8 <= t.offset <= t.offset + t.nbytes <= size for t in tensors.values())


fuzz = settings(
    max_examples=80, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.integers(0, 200),
    st.binary(max_size=9),
)
def test_fuzz_bytes(tmp_path, changes, at, more):
    whole = bytearray(checkpoint_files.write_raw(tmp_path / "x", TWO, bytes(40)).read_bytes())
    for place, byte in changes:
        whole[place % len(whole)] = byte
    (tmp_path / "x").write_bytes(bytes(whole[:at]) + more + bytes(whole[at + (len(more) + at) % 3 :]))
    judge(tmp_path / "x")


numbers = st.one_of(st.integers(-50, 50), st.sampled_from([2**31, 2**63, 10**30, 1e300]), st.booleans(), st.none())
anything = st.recursive(
    numbers | st.text(max_size=4), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(), x)
)
likely = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "I8", "X"]) | anything,
        "shape": st.lists(numbers, max_size=4) | anything,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | anything,
    }
)


@fuzz
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | st.text(), likely | anything) | anything)
def test_fuzz_entries(tmp_path, header):
    judge(checkpoint_files.write_raw(tmp_path / "x", header, bytes(40)))


# The system's own errors


class Broken:
    """A file on a disk that fails."""

    def __init__(self, path, *args, **kwargs):
        self.file = open(path, "rb")  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def read(self, *args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    readinto = read

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_read_errors_name_the_file(tmp_path, monkeypatch):
    path = checkpoint_files.write(tmp_path / "model.safetensors", {"a": np.zeros(4, np.float32)})
    tensor = read_header(path)["a"]
    monkeypatch.setattr(safetensors, "open", Broken, raising=False)
    for read in (lambda: read_header(path), lambda: read_into(np.empty(16, np.uint8), tensor, 0)):
        with pytest.raises(OSError) as caught:
            read()
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))


def test_permission_denied_names_the_file(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = checkpoint_files.write(tmp_path / "model.safetensors", {"a": np.zeros(4, np.float32)})
    monkeypatch.setattr(safetensors, "open", refuse, raising=False)  # root may read everything: no chmod
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        read_header(path)


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model\.safetensors"):
        read_index(tmp_path)
