"""torch.save's files: what is not a plain dict of tensors is refused by name, quickly, and nothing in it runs."""

import base64
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import checkpoint_files
from helpers.meta_writer import write_pth, write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint import pth, torch_pickle
from jaxlm.checkpoint.pth import read_pth
from jaxlm.checkpoint.safetensors import Tensor, read_into

# What torch 2.13 wrote for a state_dict (with its _metadata): a.weight, a float32 slice from element 4 on of a storage
# of 10, b.weight, a bfloat16 Parameter of 5, s, a float16 scalar, and tied, which is b.weight again.
TORCH = base64.b64decode(
    "gAJjY29sbGVjdGlvbnMKT3JkZXJlZERpY3QKcQApUnEBKFgIAAAAYS53ZWlnaHRxAmN0b3JjaC5fdXRpbHMKX3JlYnVpbGRfdGVuc29yX3YyCnED"
    "KChYBwAAAHN0b3JhZ2VxBGN0b3JjaApGbG9hdFN0b3JhZ2UKcQVYAQAAADBxBlgDAAAAY3B1cQdLCnRxCFFLBEsCSwOGcQlLA0sBhnEKiWgAKVJx"
    "C3RxDFJxDVgIAAAAYi53ZWlnaHRxDmN0b3JjaC5fdXRpbHMKX3JlYnVpbGRfcGFyYW1ldGVyCnEPaAMoKGgEY3RvcmNoCkJGbG9hdDE2U3RvcmFn"
    "ZQpxEFgBAAAAMXERaAdLBXRxElFLAEsFhXETSwGFcRSJaAApUnEVdHEWUnEXiGgAKVJxGIdxGVJxGlgBAAAAc3EbaAMoKGgEY3RvcmNoCkhhbGZT"
    "dG9yYWdlCnEcWAEAAAAycR1oB0sBdHEeUUsAKSmJaAApUnEfdHEgUnEhWAQAAAB0aWVkcSJoGnV9cSNYCQAAAF9tZXRhZGF0YXEkaAApUnElWAAA"
    "AABxJn1xJ1gHAAAAdmVyc2lvbnEoSwFzc3NiLg=="
)
FLOATS = np.arange(10, dtype=np.float32)
HALVES = np.arange(5).astype(ml_dtypes.bfloat16)
STORED = {"data/0": FLOATS.tobytes(), "data/1": HALVES.tobytes(), "data/2": np.float16(3).tobytes()}


def archive(path, table, stored=STORED, folder="t", compress=zipfile.ZIP_STORED, **more):
    """A .pth of any pickle; more: further entries, or others in the place of these."""
    with zipfile.ZipFile(path, "w", compress) as file:
        for name, data in {"data.pkl": table, "byteorder": b"little", **stored, **more}.items():
            file.writestr(f"{folder}/{name}", data)
    return path


def values(tensor):
    """The array that a Tensor stands for."""
    buffer = np.empty(tensor.nbytes, np.uint8)
    read_into(buffer, tensor, 0)
    return buffer.view(checkpoint_files.KINDS[tensor.dtype]).reshape(tensor.shape)


def write(path, arrays):
    kinds = {np.dtype(kind): name for name, kind in checkpoint_files.KINDS.items()}
    write_pth(path, ((name, kinds[a.dtype], a.shape, halves(a)) for name, a in arrays.items()))
    return path


def halves(array):
    data = array.tobytes()
    return [data[: len(data) // 2], data[len(data) // 2 :]]


# What is read


def test_what_torch_wrote(tmp_path):
    found = read_pth(archive(tmp_path / "x.pth", TORCH))
    assert [(t.name, t.dtype, t.shape) for t in found.values()] == [
        ("a.weight", "F32", (2, 3)), ("b.weight", "BF16", (5,)), ("s", "F16", ()), ("tied", "BF16", (5,))
    ]  # fmt: skip
    assert (values(found["a.weight"]) == FLOATS[4:].reshape(2, 3)).all()
    assert (values(found["b.weight"]) == HALVES).all()
    assert values(found["s"]) == 3
    assert found["tied"]._replace(name="b.weight") == found["b.weight"]


def test_a_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"F32": (3, 5), "BF16": (7,), "F16": (2, 3, 4)}
    arrays = {
        f"layers.{i}.{k}": rng.standard_normal(shapes[k]).astype(checkpoint_files.KINDS[k])
        for i in range(9)
        for k in shapes
    }
    arrays |= {
        "scalar": np.array(2.5, np.float32),
        "none": np.empty((0, 3), np.float32),
        "ß 😀": np.ones(1, np.float16),
    }
    path = write(tmp_path / "x.pth", arrays)
    found = read_pth(path)
    assert list(found) == list(arrays)
    assert all((values(found[name]) == array).all() for name, array in arrays.items())
    assert all(tensor.offset % 64 == 0 and tensor.file == path for tensor in found.values())
    assert zipfile.ZipFile(path).testzip() is None
    names = {info.filename for info in zipfile.ZipFile(path).infolist()}
    assert {"archive/data.pkl", "archive/byteorder", "archive/version", "archive/data/0"} <= names


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), max_size=6),
    kinds=st.lists(st.sampled_from(sorted(checkpoint_files.KINDS)), min_size=6, max_size=6),
)
def test_round_trips(shapes, kinds, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        str(i): rng.standard_normal(s).astype(checkpoint_files.KINDS[k]) for i, (s, k) in enumerate(zip(shapes, kinds))
    }
    found = read_pth(write(tmp_path / "x.pth", arrays))
    assert all((values(found[name]) == array).all() for name, array in arrays.items())


def test_shapes_that_take_64_bits(tmp_path, monkeypatch):
    """Numbers from 2**31 on, in a sparse file of 5 GB: the second tensor begins behind the zip's 32 bits."""
    path = tmp_path / "x.pth"
    numbers = (0, 1, 255, 256, 65536, 2**31 - 1, 2**31, 5 * 10**9)
    table = write_table([(str(n), "F16", (n,)) for n in numbers])
    views = torch_pickle.read_table(table)
    assert [(view.shape, view.storage.length) for view in views.values()] == [((n,), n) for n in numbers]

    class Hole:  # a chunk of zeros that takes no room
        nbytes = 5 << 30

    class Sparse(zipfile._ZipWriteFile):
        def write(self, data):
            if not isinstance(data, Hole):
                return super().write(data)
            self._zipfile.fp.seek(data.nbytes - 1, 1)
            self._zipfile.fp.write(b"\0")
            self._file_size += data.nbytes
            return data.nbytes

    monkeypatch.setattr(zipfile, "_ZipWriteFile", Sparse)
    write_pth(path, [("long", "BF16", (5 << 10, 1 << 19), [Hole()]), ("b", "F32", (10,), [FLOATS.tobytes()])])
    assert path.stat().st_size > 5 << 30
    assert path.stat().st_blocks * 512 < 1 << 20
    found = read_pth(path)
    assert found["long"].shape == (5 << 10, 1 << 19)
    assert found["b"].offset > 5 << 30
    assert (values(found["b"]) == FLOATS).all()


def test_the_helper_checks_what_it_writes(tmp_path):
    with pytest.raises(ValueError, match=r"data/0 got 8 of 12 bytes"):
        write_pth(tmp_path / "x.pth", [("a", "F32", (3,), [bytes(8)])])
    with pytest.raises(ValueError, match="same name"):
        write_pth(tmp_path / "x.pth", [("a", "F32", (1,), [bytes(4)])] * 2)


# What is refused


@contextmanager
def little_memory(allowed=8e6):
    """What a lying length would take is gigabytes."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < allowed


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def opcodes(*parts):
    """A pickle of protocol 2."""
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


HOOKS = b"\x89ccollections\nOrderedDict\n)R"


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(kind=b"FloatStorage", key=b"0", length=10, offset=0, shape=(10,), strides=(1,), args=HOOKS):
    """The opcodes of one tensor, right or wrong in any number."""
    storage = b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu") + number(length) + b"tQ"
    sizes = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + b"".join(sizes) + args + b"tR"


def table(*tensors):
    return opcodes(b"}", *(text(b"w%d" % i) + t + b"s" for i, t in enumerate(tensors)))


PICKLES = {
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "protocol 4, torch.save writes 2"),
    "stack global in protocol 2": (opcodes(b"X\x02\0\0\0osX\x06\0\0\0system\x93"), "has STACK_GLOBAL"),
    "inst": (opcodes(b"(X\x02\0\0\0lsios\nsystem\n"), "has INST"),
    "obj": (opcodes(b"(cos\nsystem\nX\x02\0\0\0lso"), "names 'os.system'"),
    "newobj": (opcodes(b"ccollections\nOrderedDict\n)\x81"), "has NEWOBJ"),
    "extension": (opcodes(b"\x82\x01"), "has EXT1"),
    "another function of torch": (opcodes(b"ctorch.hub\nload\n"), "names 'torch.hub.load'"),
    "a function inside an admitted one": (opcodes(b"ctorch._utils\n_rebuild_tensor_v2.__call__\n"), r"_v2\.__call__'"),
    "a name as a value": (opcodes(b"}", text(b"w"), b"ccollections\nOrderedDict\ns"), "'w' is not a tensor"),
    "building a name": (opcodes(b"ccollections\nOrderedDict\n}b"), "sets items of something that is not a dict"),
    "integers": (table(tensor(b"LongStorage")), "names 'torch.LongStorage'.*must be F32, BF16, F16"),
    "no dict": (opcodes(b")"), "holds a tuple instead of a dict"),
    "a tensor alone": (opcodes(tensor()), "holds a View instead of a dict"),
    "a number": (opcodes(b"}", text(b"epoch"), b"K\x01s"), "'epoch' is not a tensor"),
    "a dict in the dict": (opcodes(b"}", text(b"model"), b"}s"), "'model' is not a tensor"),
    "a key that is no name": (opcodes(b"}K\x01", tensor(), b"s"), "keys are not distinct names"),
    "a key twice": (opcodes(b"}", text(b"w"), tensor(), b"s", text(b"w"), tensor(), b"s"), "distinct names"),
    "a key twice at once": (opcodes(b"}(", text(b"w"), tensor(), text(b"w"), tensor(), b"u"), "distinct names"),
    "an odd dict": (opcodes(b"}(", text(b"w"), b"u"), "keys are not distinct names"),
    "huge memo": (opcodes(b"K\x01r\xff\xff\xff\xff" * 3), "holds a int"),
    "absent memo": (opcodes(b"j\xff\xff\xff\x7f"), "not in its memo"),
    "memo of nothing": (opcodes(b"q\0"), "not on the stack"),
    "memo of a mark": (opcodes(b"(q\0"), "not on the stack"),
    "long bytes": (opcodes(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"), "has BINBYTES8"),
    "long text": (opcodes(b"X\xff\xff\xff\x7fabc"), "is truncated"),
    "long text of protocol 4": (opcodes(b"\x8d\xff\xff\xff\xff\0\0\0\0abc"), "has BINUNICODE8"),
    "long array": (opcodes(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f"), "has BYTEARRAY8"),
    "long number": (opcodes(b"\x8b\xff\xff\xff\x7f"), "has LONG4"),
    "decimal number": (opcodes(b"L" + b"9" * 10000 + b"L\n"), "has LONG"),
    "string escapes": (opcodes(b"S'\\d'\n"), "has STRING"),
    "frame": (opcodes(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f"), "has FRAME"),
    "protocol 5": (pickle.dumps({}, 5), "protocol 5"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "has DICT"),
    "deep marks": (opcodes(b"(" * 100_000), "more than 10,000"),
    "deep tuples": (opcodes(b")" + b"\x85" * 100_000), "holds a tuple"),
    "deep dicts": (opcodes(b"}" * 100_000), "more than 10,000"),
    "doubling": (opcodes(b")q\0" + b"h\0h\0\x86q\0" * 1000), "holds a tuple"),
    "a dict in itself": (opcodes(b"}q\0", text(b"w"), b"h\0s"), "'w' is not a tensor"),
    "an empty pickle": (b"", "is truncated"),
    "no end": (b"\x80\x02}", "is truncated"),
    "unknown opcode": (opcodes(b"\xff"), r"has b'\\xff'"),
    "nothing to take": (b"\x80\x02.", "not on the stack"),
    "no mark": (opcodes(b"}t"), "not on the stack"),
    "reduce of a dict": (opcodes(b"})R"), "calls a function in another way"),
    "ordered dict of items": (opcodes(b"ccollections\nOrderedDict\n}\x85R"), "calls a function in another way"),
    "a tensor of no storage": (opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n(}K\0))\x89}tR"), "calls a function"),
    "metadata of a tensor": (table(tensor(args=b"\x89ccollections\nOrderedDict\n)R}")), "calls a function"),
    "persistent id of another form": (opcodes(b"K\x01Q"), "not a storage"),
    "persistent text": (opcodes(b"Pstorage\n"), "has PERSID"),
    "storage of another type": (
        table(tensor().replace(b"ctorch\nFloatStorage", b"ccollections\nOrderedDict")), "not a storage"
    ),
    "a view for a storage": (opcodes(text(b"storage"), b"Q"), "not a storage"),
    "absent storage": (table(tensor(key=b"9")), "no data/9, the storage of 'w0'"),
    "storage of another entry": (table(tensor(key=b"../data.pkl")), r"no data/\.\./data\.pkl"),
    "longer storage": (table(tensor(length=11, shape=(11,))), "40 bytes, not 11 elements of type F32"),
    "shorter storage": (table(tensor(length=9, shape=(9,))), "40 bytes, not 9 elements"),
    "negative storage": (table(tensor(length=-10)), "not -10 elements"),
    "beyond the storage": (table(tensor(shape=(11,))), r"'w0' of shape \[11\] does not fit"),
    "offset beyond": (table(tensor(offset=1)), "does not fit"),
    "offset negative": (table(tensor(offset=-1)), "is invalid"),
    "shape negative": (table(tensor(shape=(-5, -2), strides=(-2, 1))), "is invalid"),
    "shape absurd": (table(tensor(shape=(2**62, 2**62), strides=(2**62, 1))), "does not fit"),
    "shape beyond 64 bits": (table(tensor(shape=(2**200,))), "is invalid"),
    "many axes": (table(tensor(shape=(1,) * 65, strides=(1,) * 65)), "is invalid"),
    "transposed": (table(tensor(shape=(2, 5), strides=(1, 2))), "'w0' is not contiguous: save it from"),
    "broadcast": (table(tensor(shape=(1000, 10), strides=(0, 1))), "not contiguous"),
    "fewer strides": (table(tensor(shape=(2, 5), strides=(1,))), "not contiguous"),
    "overlap": (
        table(tensor(shape=(6,)), tensor(shape=(6,), offset=4)), "'w0' and 'w1' share a part of their bytes"
    ),
    "true for a size": (table(tensor(shape=(1,)).replace(b"(\x8a\x01\x01t", b"(\x88t", 1)), "is invalid"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_is_no_table_of_tensors(name, tmp_path):
    data, message = PICKLES[name]
    path = archive(tmp_path / "x.pth", data)
    with little_memory(), pytest.raises(ValueError, match=message) as caught:
        read_pth(path)
    assert str(path) in str(caught.value)
    assert "nothing in it was executed" in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.mkdir, eval, Path.mkdir])
def test_nothing_runs(function, protocol, tmp_path):
    """Each of these does run where it is unpickled."""
    marker = tmp_path / "ran"
    argument = {eval: f"__import__('os').mkdir({str(marker)!r})", os.mkdir: str(marker), Path.mkdir: marker}[function]
    data = pickle.dumps({"w": Evil(function, (argument,))}, protocol)
    pickle.loads(data)
    assert marker.exists()
    marker.rmdir()
    path = archive(tmp_path / "x.pth", data)
    with pytest.raises(ValueError, match="nothing in it was executed"):
        read_pth(path)
    assert not marker.exists()


@pytest.mark.parametrize("call", [b"cos\nmkdir\n", b"cposix\nmkdir\n", b"cbuiltins\neval\n"])
def test_nothing_runs_beside_sound_tensors(call, tmp_path):
    """The call comes first, last, as a tensor's hooks, and as a state."""
    marker = tmp_path / "ran"
    argument = str(marker).encode() if b"mkdir" in call else f"__import__('os').mkdir({str(marker)!r})".encode()
    evil = call + text(argument) + b"\x85R"
    sound = text(b"w") + tensor() + b"s"
    pickle.loads(opcodes(evil))
    assert marker.exists()
    marker.rmdir()
    last, first = opcodes(b"}", sound, text(b"x"), evil, b"s"), opcodes(evil, b"}", sound)
    for data in (last, first, opcodes(b"}", sound, evil, b"b"), table(tensor(args=b"\x89" + evil))):
        with pytest.raises(ValueError, match="nothing in it was executed"):
            read_pth(archive(tmp_path / "x.pth", data))
    assert not marker.exists()


def good(path):
    return archive(path, TORCH)


def sections(data):
    """Offsets of the zip's table of entries and of the record that ends it."""
    end = data.rindex(b"PK\5\6")
    return int.from_bytes(data[end + 16 : end + 20], "little"), end


def patched(data, at, value, size=4):
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def test_compressed_entries(tmp_path):
    path = archive(tmp_path / "x.pth", TORCH, compress=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"is compressed or encrypted, which torch\.save never does"):
        read_pth(path)


def test_a_compressed_bomb_is_not_expanded(tmp_path):
    path = archive(tmp_path / "x.pth", bytes(1 << 28), compress=zipfile.ZIP_DEFLATED)
    with little_memory(), pytest.raises(ValueError, match="compressed"):
        read_pth(path)


LIES = {
    "entry longer": (lambda d, t, e: patched(patched(d, t + 20, 10**6), t + 24, 10**6), "ends before|overlaps"),
    "entry 4 GB": (lambda d, t, e: patched(patched(d, t + 20, 2**32 - 2), t + 24, 2**32 - 2), "the file ends before"),
    "entry of two sizes": (lambda d, t, e: patched(d, t + 24, 10), "has 10 bytes"),
    "entry elsewhere": (lambda d, t, e: patched(d, t + 42, 3), "is not where the zip's table says"),
    "entry behind the file": (lambda d, t, e: patched(d, t + 42, 2**31), "is not where|Bad offset"),
    "encrypted": (lambda d, t, e: patched(d, t + 8, 1, 2), "encrypted"),
    "newer zip": (lambda d, t, e: patched(d, t + 6, 99, 2), "zip file version 9.9"),
    "table longer": (lambda d, t, e: patched(d, e + 12, 2**31), "Bad|negative|seek|Invalid|table has"),
    "table elsewhere": (lambda d, t, e: patched(d, e + 16, 2**31), "overlaps another entry"),
    "name twice": (lambda d, t, e: d.replace(b"t/data/1", b"t/data/0"), "'t/data/0' is in it twice"),
    "truncated": (lambda d, t, e: d[: len(d) // 2], "not a zip"),
    "head alone": (lambda d, t, e: d[:100], "not a zip"),
    "empty": (lambda d, t, e: b"", "not a zip"),
    "garbage": (lambda d, t, e: bytes(range(256)) * 4, "not a zip"),
    "no table of tensors": (lambda d, t, e: d.replace(b"data.pkl", b"data.pkx"), "holds 0 data.pkl"),
    "big-endian": (lambda d, t, e: d.replace(b"little", b"biggie"), "byte order"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_zip_that_lies(name, tmp_path):
    change, message = LIES[name]
    data = good(tmp_path / "x.pth").read_bytes()
    path = tmp_path / "y.pth"
    path.write_bytes(change(data, *sections(data)))
    with little_memory(), pytest.raises(ValueError, match=message) as caught:
        read_pth(path)
    assert str(caught.value).startswith(f"{path} cannot be read")


def test_two_entries_over_each_other(tmp_path):
    data = good(tmp_path / "x.pth").read_bytes()
    first, _ = sections(data)
    second = data.index(b"PK\1\2", first + 4)
    path = tmp_path / "y.pth"
    path.write_bytes(patched(data, second + 42, 0))  # byteorder, where data.pkl lies
    with pytest.raises(ValueError, match="overlaps another entry"):
        read_pth(path)


def test_a_table_of_entries_too_long_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "LIMIT", 1 << 17)
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(4000):
            file.writestr(f"t/data/{i}", b"")
    with pytest.raises(ValueError, match=r"table has \d+,\d+ bytes, more than 131,072"):
        read_pth(path)


def test_a_pickle_too_long_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pth, "LIMIT", 1 << 17)
    with pytest.raises(ValueError, match="table has 200,000 bytes"):
        read_pth(archive(tmp_path / "x.pth", bytes(200_000)))


def test_files_of_other_forms_name_the_way_out(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100))  # the magic number of torch 1.5
    with pytest.raises(ValueError, match=r"PyTorch before 1\.6"):
        read_pth(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git-lfs pointer, not the weights: run `git lfs pull`"):
        read_pth(path)
    with pytest.raises(FileNotFoundError):
        read_pth(tmp_path / "absent.pth")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
    where=st.sampled_from(["anywhere", "pickle", "table"]),
)
def test_a_damaged_file_is_a_value_error_or_sound(changes, cut, where, tmp_path):
    data = bytearray(good(tmp_path / "x.pth").read_bytes())
    begin, end = 0, len(data)
    if where == "pickle":
        begin, end = data.index(TORCH), data.index(TORCH) + len(TORCH)
    elif where == "table":
        begin = sections(bytes(data))[0]
    for at, new in changes:
        at = begin + at % (end - begin)
        data[at : at + len(new)] = new
    path = tmp_path / "y.pth"
    path.write_bytes(data[: cut % len(data)] if cut is not None else data)
    tensors, message = [], str(path)
    with little_memory():
        try:
            tensors = list(read_pth(path).values())
        except ValueError as error:
            message = str(error)
    assert str(path) in message
    for found in tensors:
        assert isinstance(found, Tensor)
        assert 0 <= found.offset <= found.offset + found.nbytes <= path.stat().st_size


def test_the_stack_machine_alone_with_random_opcodes():
    rng = np.random.default_rng(0)
    admitted = [code for code, name in torch_pickle._OPCODES.items() if name in torch_pickle._ADMITTED]
    ended = 0
    for _ in range(3000):
        parts = [admitted[i] for i in rng.integers(0, len(admitted), 30)]
        data = b"\x80\x02}" + b"".join(part + io.BytesIO(rng.bytes(8)).read(int(rng.integers(0, 5))) for part in parts)
        try:
            torch_pickle.read_table(data + b".")
            ended += 1
        except ValueError:
            pass
    assert ended < 3000
