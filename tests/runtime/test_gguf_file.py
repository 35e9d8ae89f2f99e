import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import random_checkpoint
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as T
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.convert import convert
from griffin_gguf.runtime import gguf_header
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_file import (
    GgufFile,
    _touch,  # pyright: ignore[reportPrivateUsage]
    dequantize,
)

U32, U64, STRING, ARRAY = 4, 10, 8, 9


# ---- files made by hand


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value % 2**64)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def tensor(name: str | bytes, ne: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    dims = u32(len(ne) if n_dims is None else n_dims) + b"".join(u64(n) for n in ne)
    return string(name) + dims + u32(kind) + u64(offset)


def build(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    counts = u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(keys) if n_keys is None else n_keys)
    head = magic + version + counts + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def write(raw: bytes) -> GgufFile:
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        return GgufFile.open(path)

    return write


ONE = np.arange(8, dtype="<f4").tobytes()
ARCHITECTURE = key("general.architecture", STRING, string("x"))
ALL_KINDS = [
    key("a.u8", 0, b"\xff"), key("a.i8", 1, b"\xff"), key("a.u16", 2, b"\xff\xff"), key("a.i16", 3, b"\xff\xff"),
    key("a.u32", U32, u32(7)), key("a.i32", 5, struct.pack("<i", -7)), key("a.f32", 6, struct.pack("<f", 0.5)),
    key("a.bool", 7, b"\x01"), key("a.string", STRING, string("grüße")), key("a.u64", U64, u64(2**63)),
    key("a.i64", 11, struct.pack("<q", -(2**62))), key("a.f64", 12, struct.pack("<d", 1e300)),
    key("a.strings", ARRAY, u32(STRING) + u64(3) + string("") + string("▁") + string("x")),
    key("a.bools", ARRAY, u32(7) + u64(2) + b"\x01\x00"), key("a.ints", ARRAY, u32(5) + u64(1) + u32(9)),
    key("a.empty", ARRAY, u32(6) + u64(0)),
]  # fmt: skip
SMALL = build(ALL_KINDS, [tensor("w", [4, 2]), tensor("b", [8], offset=32)], ONE + ONE)


def test_every_value_type(opened):
    file = opened(SMALL)
    assert file.metadata == {
        "a.u8": 255, "a.i8": -1, "a.u16": 65535, "a.i16": -1, "a.u32": 7, "a.i32": -7, "a.f32": 0.5, "a.bool": True,
        "a.string": "grüße", "a.u64": 2**63, "a.i64": -(2**62), "a.f64": 1e300, "a.strings": ["", "▁", "x"],
        "a.bools": [True, False], "a.ints": [9], "a.empty": [],
    }  # fmt: skip
    assert type(file.metadata["a.bool"]) is bool
    assert {type(v) for v in file.metadata["a.bools"]} == {bool}
    assert file.types["a.string"] == (GGUFValueType.STRING, None)
    assert file.types["a.empty"] == (GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def test_tensors_are_read_only_views_in_numpy_order(opened):
    file = opened(SMALL)
    assert file.size == len(SMALL)
    assert file.data_offset % 32 == 0
    assert list(file.tensors) == ["w", "b"]
    info = file.tensors["w"]
    assert (info.shape, info.type, info.nbytes, info.offset) == ((2, 4), T.F32, 32, file.data_offset)
    data = file.data("w")
    assert data.dtype == np.uint8
    assert not data.flags.writeable
    assert not data.flags.owndata
    np.testing.assert_array_equal(dequantize(info, data), np.arange(8, dtype=np.float32).reshape(2, 4))
    np.testing.assert_array_equal(dequantize(info, data, 1, 2), [[4, 5, 6, 7]])
    np.testing.assert_array_equal(dequantize(file.tensors["b"], file.data("b")), [np.arange(8)])


def test_views_outlive_the_file(opened):
    with opened(SMALL) as file:
        data = file.data("w")
    assert data.tobytes() == ONE


def test_version_2_and_padding_after_the_last_tensor(opened):
    assert opened(build([], [tensor("w", [8])], ONE + bytes(64), version=u32(2))).tensors["w"].nbytes == 32


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(opened, alignment):
    align = key("general.alignment", U32, u32(alignment))
    gap = bytes(-32 % alignment)
    raw = build(
        [align], [tensor("a", [8]), tensor("b", [8], offset=32 + len(gap))], ONE + gap + ONE, alignment=alignment
    )
    file = opened(raw)
    assert file.alignment == alignment
    assert file.data("b").tobytes() == ONE


def test_truncation_at_every_byte(tmp_path: Path):
    path = tmp_path / "cut.gguf"
    for length in range(len(SMALL)):
        path.write_bytes(SMALL[:length])
        with pytest.raises(FileFormatError, match=r"cut\.gguf: "):
            GgufFile.open(path)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "magic": (build(magic=b"GGML"), "magic: expected b'GGUF', found b'GGML'"),
    "version 1": (build(version=u32(1)), "version: expected 2 or 3, found 1"),
    "version 4": (build(version=u32(4)), "version: expected 2 or 3, found 4"),
    "big endian": (build(version=b"\x00\x00\x00\x03"), "version: this GGUF is big endian"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "tensor count -1": (build(n_tensors=-1), "tensor count: says 18446744073709551615 items"),
    "tensor count 2^63": (build(n_tensors=2**63), "tensor count: says 9223372036854775808 items"),
    "key count -1": (build(n_keys=-1), "key count: says"),
    "key count 2^63": (build(n_keys=2**63), "key count: says"),
    "key name of 2^63 bytes": (build([u64(2**63) + bytes(50)], n_keys=1), "name of key 0: says"),
    "key name too long": (build([key("k" * 70000, U32, u32(1))]), "name of key 0: says 70000 items, at most 65535"),
    "empty key": (build([key("", U32, u32(1))]), "name of key 0: expected printable text, found ''"),
    "a key that writes lines": (build([key("a\nb", U32, u32(1))]), r"name of key 0: expected .* found 'a\\nb'"),
    "key not UTF-8": (build([key(b"\xff", U32, u32(1))]), "name of key 0: is not UTF-8"),
    "duplicate key": (build([ARCHITECTURE, ARCHITECTURE]), "general.architecture: this key is there twice"),
    "unknown value type": (build([key("k", 13, bytes(8))]), "k: unknown value type 13"),
    "string longer than the file": (build([key("k", STRING, u64(2**40) + bytes(99))]), "k: says 1099511627776 items"),
    "string of -1 bytes": (build([key("k", STRING, u64(-1))]), "k: says"),
    "string not UTF-8": (build([key("k", STRING, string(b"ab\xc3"))]), "k: is not UTF-8"),
    "bool of 2": (build([key("k", 7, b"\x02")]), "k: expected a bool of 0 or 1, found 2"),
    "bools of 2": (build([key("k", ARRAY, u32(7) + u64(2) + b"\x01\x02")]), "k: expected bools of 0 or 1"),
    "nested array": (build([key("k", ARRAY, u32(ARRAY) + u64(1) + u32(0) + u64(0))]), "k: arrays of arrays"),
    "array of unknown type": (build([key("k", ARRAY, u32(99) + u64(1))]), "k: unknown value type 99"),
    "array longer than the file": (build([key("k", ARRAY, u32(U32) + u64(2**62))]), "k: says 4611686018427387904"),
    "array of -1": (build([key("k", ARRAY, u32(0) + u64(-1))]), "k: says"),
    "strings longer than the file": (build([key("k", ARRAY, u32(STRING) + u64(2**40))]), "k: says"),
    "one string too long": (build([key("k", ARRAY, u32(STRING) + u64(1) + u64(2**63))]), r"k\[0\]: says"),
    "one string not UTF-8": (
        build([key("k", ARRAY, u32(STRING) + u64(2) + string("a") + string(b"\xff"))]), r"k\[1\]: is not UTF-8"),
    "alignment 0": (build([key("general.alignment", U32, u32(0))]), "general.alignment: expected a power of 2"),
    "alignment 24": (build([key("general.alignment", U32, u32(24))]), "general.alignment: expected a power of 2"),
    "alignment 2^30": (build([key("general.alignment", U32, u32(2**30))]), "general.alignment: expected a power of 2"),
    "alignment of another type": (
        build([key("general.alignment", U64, u64(32))]), "general.alignment: expected UINT32, found UINT64"),
    "tensor name of 64 bytes": (build([], [tensor("t" * 64, [1])], ONE), "name of tensor 0: says 64 items, at most"),
    "empty tensor name": (build([], [tensor("", [1])], ONE), "name of tensor 0: expected printable text, found ''"),
    "a tensor that clears the screen": (build([], [tensor("\x1b[2J", [1])], ONE), "name of tensor 0: expected"),
    "duplicate tensor": (build([], [tensor("t", [8]), tensor("t", [8], offset=32)], ONE * 2), "t: this tensor is"),
    "no dimensions": (build([], [tensor("t", [])], ONE), "t: expected 1 to 4 dimensions, found 0"),
    "five dimensions": (build([], [tensor("t", [1] * 5)], ONE), "t: expected 1 to 4 dimensions, found 5"),
    "10^6 dimensions": (build([], [tensor("t", [1], n_dims=10**6)], ONE), "t: expected 1 to 4 dimensions"),
    "a zero dimension": (build([], [tensor("t", [8, 0])], ONE), r"t: dimensions \[8, 0\] hold a zero"),
    "a negative dimension": (build([], [tensor("t", [-1])], ONE), "t: dimensions .* overflow"),
    "a product that wraps": (
        build([], [tensor("t", [4194305, 4194305, 211106198978564])], ONE), "t: dimensions .* overflow"),
    "bytes that wrap": (build([], [tensor("t", [2**61 + 2])], ONE), "t: dimensions .* overflow"),
    "unknown tensor type": (build([], [tensor("t", [8], kind=4)], ONE), "t: unknown tensor type 4"),
    "huge tensor type": (build([], [tensor("t", [8], kind=2**32 - 1)], ONE), "t: unknown tensor type 4294967295"),
    "half a block": (build([], [tensor("t", [48], kind=8)], ONE * 4), "t: rows of 48 are no multiple of Q8_0's block"),
    "the first offset": (build([], [tensor("t", [8], offset=32)], ONE * 2), "t: expected offset 0, found 32"),
    "a gap": (build([], [tensor("s", [8]), tensor("t", [8], offset=64)], ONE * 3), "t: .* leaves a gap"),
    "an overlap": (build([], [tensor("s", [16]), tensor("t", [8], offset=32)], ONE * 3), "t: .* overlaps"),
    "an offset of 2^64 - 32": (build([], [tensor("s", [8]), tensor("t", [8], offset=-32)], ONE * 2), "t: expected off"),
    "a tensor past the end": (build([], [tensor("t", [1024, 1024])], ONE), "t: ends at byte .* cut short"),
    "a tensor one byte past the end": (build([], [tensor("t", [9])], ONE + b"abc"), "t: ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_file_and_field(opened, name):
    raw, message = HOSTILE[name]
    with pytest.raises(FileFormatError, match=rf"m\.gguf: {message}" if name != "Git LFS" else message) as caught:
        opened(raw)
    assert "\n" not in str(caught.value)


def test_a_header_beyond_the_limit_is_named(opened, monkeypatch):
    monkeypatch.setattr("griffin_gguf.runtime.gguf_header.MAX_HEADER", 100)
    with pytest.raises(FileFormatError, match="the header is longer than 100 bytes"):
        opened(build([key("k", STRING, string("x" * 60))], [tensor("t", [8])], ONE * 9))


def test_an_array_beyond_the_limit_is_named(opened, monkeypatch):
    monkeypatch.setattr("griffin_gguf.runtime.gguf_header.MAX_ARRAY", 3)
    with pytest.raises(FileFormatError, match="k: says 4 items, at most 3"):
        opened(build([key("k", ARRAY, u32(0) + u64(4) + bytes(4))]))


def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for path, message in (
        (tmp_path, "is not a regular file"),
        (tmp_path / "fifo", "is not a regular file"),
        (tmp_path / "absent", "cannot be read: No such file"),
        (tmp_path / "empty", "is empty"),
    ):
        with pytest.raises(FileFormatError, match=message):
            GgufFile.open(path)


# ---- arrays of many strings, read many at once


def strings(items: list[bytes]) -> bytes:
    return key("k", ARRAY, u32(STRING) + u64(len(items)) + b"".join(map(string, items)))


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two strings in a window of 64 bytes are many."""
    monkeypatch.setattr("griffin_gguf.runtime.gguf_header._FEW_STRINGS", 2)
    monkeypatch.setattr("griffin_gguf.runtime.gguf_header._WINDOW", 64)


ODD = ["", "a", "\0", "a\0", "\0" * 8, "\0" * 20, "▁the", "👍", "x" * 255, "x" * 256, "\x01" + "\0" * 7]
ITEMS = st.sampled_from(ODD) | st.text(st.characters(codec="utf-8"), max_size=12)


@pytest.mark.usefixtures("many")
@given(st.lists(ITEMS, max_size=40), st.text("ab\0", max_size=3))
@example(items=["abc"] * 3, after="")  # what follows the array might pass for more of it
def test_strings_are_read_as_they_were_written(tmp_path: Path, items, after):
    path = tmp_path / "strings.gguf"
    path.write_bytes(build([strings([item.encode() for item in items]), key("z", STRING, string(after))]))
    with GgufFile.open(path) as file:
        assert file.metadata == {"k": items, "z": after}


@pytest.mark.usefixtures("many")
@given(st.lists(st.sampled_from([b"a", b"the", b"\xff", b"\xe2\x96", b"\0", b"x" * 300]), max_size=40))
def test_the_first_string_that_is_no_unicode_is_named(tmp_path: Path, items):
    path = tmp_path / "strings.gguf"
    path.write_bytes(build([strings(items)]))
    bad = next((i for i, item in enumerate(items) if item in (b"\xff", b"\xe2\x96")), None)
    if bad is None:
        assert GgufFile.open(path).metadata["k"] == [item.decode() for item in items]
    else:
        with pytest.raises(FileFormatError, match=rf"k\[{bad}\]: is not UTF-8"):
            GgufFile.open(path)


@pytest.mark.usefixtures("many")
def test_strings_after_one_that_is_too_long_are_not_taken_for_the_first(opened):
    raw = key("k", ARRAY, u32(STRING) + u64(4) + b"\1" * 8 + string("abc") * 3 + string("abc"))
    with pytest.raises(FileFormatError, match=r"k\[0\]: says 72340172838076673 items"):
        opened(build([raw]))


@pytest.mark.usefixtures("many")
def test_a_cut_in_many_strings_is_named(tmp_path: Path):
    path = tmp_path / "cut.gguf"
    items = [b"%d" % i for i in range(30)]
    whole = build([strings(items)])
    start = whole.index(string(items[0]))
    for length in range(start + 8 * len(items), start + sum(len(string(item)) for item in items)):
        path.write_bytes(whole[:length])
        read = next(i for i in range(30) if start + sum(len(string(item)) for item in items[: i + 1]) > length)
        with pytest.raises(FileFormatError, match=rf"k\[{read}\]: "):
            GgufFile.open(path)


def test_a_vocabulary_is_read_at_once(opened, monkeypatch):
    items = [f"token {i}" for i in range(20_000)]
    lengths: list[int] = []
    plain = gguf_header._read_plain_strings  # pyright: ignore[reportPrivateUsage]

    def spy(*arguments: Any) -> list[str]:
        found = plain(*arguments)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(gguf_header, "_read_plain_strings", spy)
    assert opened(build([strings([item.encode() for item in items])])).metadata["k"] == items
    assert lengths[0] > 18_000


# ---- reading ahead


def test_warm_ends_with_the_file(opened):
    file = opened(SMALL)
    file.warm()
    file.warm()
    file.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "griffin-warm"]


def test_warm_touches_every_part_of_the_map_until_closed(monkeypatch):
    monkeypatch.setattr("griffin_gguf.runtime.gguf_file._TOUCHES", 2)
    touched: list[tuple[int, int]] = []
    closed = threading.Event()

    class Recorder:
        def __init__(self, size: int, last: bool) -> None:
            self.size, self.last = size, last

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, part: slice) -> NDArray[np.uint8]:
            touched.extend((self.size, at) for at in range(*part.indices(self.size)))
            if self.last:
                closed.set()
            return np.zeros(1, np.uint8)

    mappings: Any = [Recorder(5 << 16, last=False), Recorder(1, last=False), Recorder((5 << 16) + 1, last=True)]
    _touch(mappings, closed)
    assert touched == (
        [(5 << 16, at << 16) for at in range(5)] + [(1, 0)] + [((5 << 16) + 1, at << 16) for at in range(2)]
    )


def test_nothing_is_warmed_that_does_not_fit_into_memory(opened, monkeypatch):
    started: list[Any] = []
    monkeypatch.setattr("threading.Thread.start", started.append)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=len(SMALL) - 1))
    opened(SMALL).warm()
    assert not started


# ---- random bytes and round trips


@given(st.binary(max_size=200), st.integers(0, len(SMALL)))
def test_random_bytes_never_do_more_than_raise(tmp_path: Path, noise, at):
    path = tmp_path / "noise.gguf"
    path.write_bytes(SMALL[:at] + noise + SMALL[at + len(noise) :])
    with suppress(FileFormatError), GgufFile.open(path) as file:
        for info in file.tensors.values():
            assert file.data(info.name).nbytes == info.nbytes
            assert info.offset + info.nbytes <= file.size


NAMES = st.text("abc.▁_0", min_size=1, max_size=12)
VALUES: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    GGUFValueType.UINT32: st.integers(0, 2**32 - 1),
    GGUFValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(st.characters(codec="utf-8")),
}
ENTRIES = st.sampled_from(list(VALUES)).flatmap(
    lambda kind: (
        VALUES[kind].map(lambda v: (kind, None, v))
        | st.lists(VALUES[kind], min_size=1, max_size=5).map(lambda v: (GGUFValueType.ARRAY, kind, v))
    )
)
TYPES = [t for t in T if t not in (T.Q8_K, T.Q8_1)]
TENSORS = st.tuples(st.sampled_from(TYPES), st.lists(st.integers(1, 3), min_size=1, max_size=4))


@given(st.dictionaries(NAMES, ENTRIES, max_size=6), st.dictionaries(NAMES, TENSORS, max_size=5))
def test_what_gguf_writes_is_read_as_gguf_reads_it(tmp_path: Path, keys, tensors):
    path = tmp_path / "round.gguf"
    writer = gguf.GGUFWriter(path, "x")
    for name, (kind, element, value) in keys.items():
        writer.add_key_value(name, value, kind, element)
    rng = np.random.default_rng(0)
    for name, (kind, ne) in tensors.items():
        block_bytes = GGML_QUANT_SIZES[kind][1]
        shape = (*ne[:-1], ne[-1] * block_bytes)
        writer.add_tensor(name, rng.integers(0, 256, shape, np.uint8), raw_dtype=kind)
        assert prod(ne) * block_bytes == prod(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    with GgufFile.open(path) as file:
        assert file.metadata == {"general.architecture": "x"} | {name: entry[2] for name, entry in keys.items()}
        assert {name: file.types[name] for name in keys} == {name: entry[:2] for name, entry in keys.items()}
        assert file.data_offset == reader.data_offset
        assert list(file.tensors) == [t.name for t in reader.tensors]
        for oracle in reader.tensors:
            info = file.tensors[oracle.name]
            assert (info.type, info.nbytes, info.offset) == (oracle.tensor_type, oracle.n_bytes, oracle.data_offset)
            assert info.shape == tuple(reversed(oracle.shape.tolist()))
            assert file.data(info.name).tobytes() == oracle.data.tobytes()


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q5_K, T.Q2_K])
def test_rows_are_dequantized_as_by_gguf(opened, kind):
    rng = np.random.default_rng(0)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = rng.standard_normal((6, 512)).astype(np.float32)
    if kind in (T.Q5_K, T.Q2_K):
        encoded = rng.integers(0, 60, (6, 512 // block * block_bytes), np.uint8)
    else:
        encoded = np.ascontiguousarray(gguf.quants.quantize(raw, kind)).view(np.uint8).reshape(6, -1)
    file = opened(build([], [tensor("t", [512, 3, 2], kind=kind)], encoded.tobytes()))
    whole = dequantize(file.tensors["t"], file.data("t"))
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, gguf.quants.dequantize(encoded, kind))
    np.testing.assert_array_equal(dequantize(file.tensors["t"], file.data("t"), 2, 5), whole[2:5])


def test_a_type_that_cannot_be_dequantized_is_named(opened):
    file = opened(build([], [tensor("t", [8], kind=T.I32)], ONE))
    with pytest.raises(UnsupportedError, match="t: no way to read type I32"):
        dequantize(file.tensors["t"], file.data("t"))


# ---- hyperparameters


@pytest.fixture(scope="module")
def griffin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small Griffin, F32."""
    folder = tmp_path_factory.mktemp("griffin")
    convert(random_checkpoint(folder / "checkpoint", num_hidden_layers=3), [(folder / "m.gguf", "F32")])
    return (folder / "m.gguf").read_bytes()


def test_hyperparameters_of_a_whole_model(opened, griffin):
    hp = opened(griffin).hyperparameters()
    assert (hp.layers, hp.hidden, hp.vocab, hp.recurrent) == (3, 64, 384, (True, True, False))
    assert not hp.untied


def patched(raw: bytes, old: bytes, new: bytes) -> bytes:
    assert raw.count(old) == 1
    assert len(old) == len(new)
    return raw.replace(old, new)


def test_another_architecture(opened, griffin):
    raw = griffin.replace(string("recurrentgemma"), string("recurrentgemmb"), 1)
    with pytest.raises(UnsupportedError, match=r"general\.architecture: this is 'recurrentgemmb'"):
        opened(raw).hyperparameters()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (string("blk.1.ssm_a"), string("blk.1.ssm_b"), "blk.1.ssm_a: the tensor is missing"),
        (string("output_norm.weight") + u32(1) + u64(64), string("output_norm.weight") + u32(1) + u64(60),
         r"output_norm.weight: expected shape \(64,\), found \(60,\)"),
        (key("recurrentgemma.block_count", U32, u32(3)), key("recurrentgemma.block_count", U32, u32(4)),
         "attention.recurrent_layers: expected 4 entries"),
        (key("recurrentgemma.block_count", U32, u32(3)), key("recurrentgemma.block_count", U32, u32(2**31)),
         "block_count: expected more than 0 and at most 4096"),
        (key("recurrentgemma.feed_forward_length", U32, u32(96)), key("recurrentgemma.feed_forward_length", 5, u32(95)),
         r"ffn_gate.weight: expected shape \(95, 64\), found \(96, 64\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_hyperparameters(opened, griffin, old, new, message):
    with pytest.raises(FileFormatError, match=message):
        opened(patched(griffin, old, new)).hyperparameters()


def test_an_extra_tensor(opened, griffin):
    raw = griffin[:8] + u64(int.from_bytes(griffin[8:16], "little") + 1) + griffin[16:]
    file = opened(griffin)
    last = list(file.tensors.values())[-1]
    at = griffin.index(string(last.name)) + len(tensor(last.name, [0] * len(last.shape)))
    extra = tensor("rope_freqs", [8], offset=file.size - file.data_offset)
    with pytest.raises(FileFormatError, match="rope_freqs: is no tensor of this model"):
        opened(moved(raw, at, extra, file.data_offset) + ONE).hyperparameters()


def moved(raw: bytes, at: int, extra: bytes, data_offset: int) -> bytes:
    """`raw` with `extra` inserted into its header at byte `at`, its data aligned anew."""
    head = raw[:at] + extra
    return head + bytes(-len(head) % 32) + raw[data_offset:]


def test_vectors_must_be_f32_and_finite(opened, griffin):
    file = opened(griffin)
    offset = file.tensors["blk.0.ssm_a"].offset
    raw = griffin[:offset] + struct.pack("<f", float("nan")) + griffin[offset + 4 :]
    with pytest.raises(FileFormatError, match=r"blk\.0\.ssm_a: holds NaN or infinity"):
        opened(raw).hyperparameters()
    raw = griffin[:offset] + struct.pack("<f", 0.01) + griffin[offset + 4 :]
    with pytest.raises(FileFormatError, match=r"blk\.0\.ssm_a: expected no number above 0"):
        opened(raw).hyperparameters()
