"""States in files: what goes in comes out, and what is not exactly a state of this model is refused."""

import errno
import json
import os
import random
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffins
import numpy as np
import pytest
from damage import damaged
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as safetensors_save

from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.saved_state import LAST_POSITION, LOGITS, Layout, Saved, load, save
from griffin_gguf.runtime.state import nbytes

MODEL = sha256(b"a model").hexdigest()
OTHER = sha256(b"another").hexdigest()
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
LAYOUT: Layout = {
    "blk.0.h": (F32, (5,)),
    "blk.0.tail": (F32, (5, 3)),
    "blk.1.k": (F16, (7, 3)),
    "blk.1.v": (F16, (7, 3)),
    LOGITS: (F32, (11,)),
}


def values(layout: Layout, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Random bits, so NaN and infinity too."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)
        for name, (dtype, shape) in layout.items()
    }


def state(seed: int = 0, position: int = 12345, layout: Layout = LAYOUT) -> Saved:
    arrays = values(layout, seed)
    logits = arrays.pop(LOGITS, None)
    return Saved(MODEL, position, arrays, logits)


def same_bits(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def equal(one: Saved, other: Saved) -> bool:
    return (
        (one.fingerprint, one.position, one.arrays.keys()) == (other.fingerprint, other.position, other.arrays.keys())
        and same_bits(one.logits, other.logits)
        and all(same_bits(array, other.arrays[name]) for name, array in one.arrays.items())
    )


def header(raw: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length])


def signed(table: Any, data: bytes) -> bytes:
    """A file of that header, with the right checksum wherever there is a place for one."""
    text = json.dumps(table).encode()
    if len(places := re.findall(rb'"crc32:[0-9a-f]{8}"', text)) == 1:
        blank = text.replace(places[0], b'"crc32:00000000"')
        found = zlib.crc32(struct.pack("<Q", len(blank)) + blank + data)
        text = text.replace(places[0], f'"crc32:{found:08x}"'.encode())
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("raw") / "a.state"
    save(path, state())
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.state"


def refusal(path: Path, raw: bytes, layout: Layout = LAYOUT) -> str:
    """What is said of a file, less its name: one line."""
    path.write_bytes(raw)
    with pytest.raises(FileFormatError) as caught:
        load(path, MODEL, layout)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    assert len(text) < len(str(path)) + 300
    return text.removeprefix(f"{path}: ")


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
LAYOUTS = st.dictionaries(
    st.one_of(st.from_regex(r"blk\.[0-9]{1,4}\.(h|tail|k|v)", fullmatch=True), st.just(LOGITS)),
    st.tuples(st.sampled_from([F16, F32]), SHAPES),
    max_size=6,
)


@given(layout=LAYOUTS, position=st.integers(0, LAST_POSITION), seed=st.integers(0, 2**32))
def test_what_goes_in_comes_out(tmp_path: Path, layout: dict[str, Any], position: int, seed: int) -> None:
    saved = state(seed, position, layout)
    save(tmp_path / "a.state", saved)
    found = load(tmp_path / "a.state", MODEL, layout)
    assert equal(found, saved)
    for array in found.arrays.values():
        assert array.flags.writeable
        assert array.flags.aligned
        assert array.flags.c_contiguous


def test_a_state_without_logits(path: Path) -> None:
    saved = Saved(MODEL, 0, state().arrays)
    save(path, saved)
    assert equal(load(str(path), MODEL, LAYOUT), saved)


def test_arrays_that_lie_otherwise_in_memory(path: Path) -> None:
    arrays = state().arrays
    odd = {name: np.asfortranarray(array).astype(array.dtype.newbyteorder(">")) for name, array in arrays.items()}
    odd["blk.0.h"] = np.repeat(arrays["blk.0.h"], 2)[::2]
    save(path, Saved(MODEL, 1, odd))
    assert equal(load(path, MODEL, LAYOUT), Saved(MODEL, 1, arrays))


def test_safetensors_reads_it(path: Path) -> None:
    saved = state()
    save(path, saved)
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(LAYOUT)
        assert all(same_bits(file.get_tensor(name), array) for name, array in saved.arrays.items())
        assert same_bits(file.get_tensor(LOGITS), saved.logits)
        metadata = file.metadata()
    checksum = metadata.pop("griffin.checksum")
    assert metadata == {"griffin.state": "1", "griffin.model": MODEL, "griffin.position": "12345"}
    assert f"crc32:{zlib.crc32(path.read_bytes().replace(checksum.encode(), b'crc32:00000000')):08x}" == checksum


def test_it_reads_what_safetensors_writes(path: Path) -> None:
    metadata = {
        "griffin.state": "1", "griffin.model": MODEL, "griffin.position": "12345", "griffin.checksum": "crc32:00000000",
    }  # fmt: skip
    raw = safetensors_save(values(LAYOUT), metadata)
    path.write_bytes(raw.replace(b"crc32:00000000", f"crc32:{zlib.crc32(raw):08x}".encode()))
    assert equal(load(path, MODEL, LAYOUT), state(position=12345))


def test_every_flipped_byte_is_noticed(path: Path, raw: bytes) -> None:
    rng = random.Random(0)
    for at in range(len(raw)):
        damage = bytearray(raw)
        damage[at] ^= rng.randrange(1, 256)
        refusal(path, bytes(damage))


@given(data=st.data())
def test_every_flipped_bit_is_noticed(tmp_path: Path, raw: bytes, data: st.DataObject) -> None:
    damage = bytearray(raw)
    damage[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    refusal(tmp_path / "a.state", bytes(damage))


def test_every_truncation_is_noticed(path: Path, raw: bytes) -> None:
    for length in range(len(raw)):
        refusal(path, raw[:length])


@given(more=st.binary(min_size=1, max_size=20))
def test_every_byte_too_many_is_noticed(tmp_path: Path, raw: bytes, more: bytes) -> None:
    assert re.fullmatch(rf"file: expected {len(raw)} bytes, found \d+", refusal(tmp_path / "a.state", raw + more))


@given(garbage=st.binary(max_size=200))
def test_no_garbage_is_a_state(tmp_path: Path, garbage: bytes) -> None:
    refusal(tmp_path / "a.state", garbage)
    refusal(tmp_path / "a.state", struct.pack("<Q", len(garbage)) + garbage)


@given(seed=st.integers(0, 2**32))
def test_whatever_a_signed_header_says(tmp_path: Path, raw: bytes, seed: int) -> None:
    """With the right checksum: an error, or exactly the arrays that were asked for, from where they lie."""
    table = header(raw)
    data = raw[-sum(array.nbytes for array in values(LAYOUT).values()) :]
    path = tmp_path / "a.state"
    path.write_bytes(signed(damaged(table, random.Random(seed)), data))
    with suppress(FileFormatError):
        found = load(path, MODEL, LAYOUT)
        assert 0 <= found.position <= LAST_POSITION
        assert equal(found, Saved(MODEL, found.position, state().arrays, state().logits))


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def _set(target: str, field: str, value: Any) -> Change:
    return lambda table, _: table[target].update({field: value})


def _meta(field: str, value: Any) -> Change:
    return _set("__metadata__", f"griffin.{field}", value)


CHANGES: list[tuple[Change, str]] = [
    (lambda table, _: table.pop("__metadata__"), "griffin.state: is missing: this is no saved state"),
    (lambda table, _: table.update(__metadata__="x"), "griffin.state: is missing: this is no saved state"),
    (lambda _, meta: meta.pop("griffin.state"), "griffin.state: is missing: this is no saved state"),
    (_meta("state", "2"), "griffin.state: expected version 1, found '2'"),
    (_meta("state", 1), "griffin.state: expected version 1, found 1"),
    (lambda _, meta: meta.pop("griffin.model"), "griffin.model: is missing"),
    (_meta("model", OTHER), f"griffin.model: was saved for another model, {OTHER[:12]}; this is {MODEL[:12]}"),
    (_meta("model", MODEL.upper()), "griffin.model: expected 64 hex digits, found "),
    (_meta("model", None), "griffin.model: expected 64 hex digits, found None"),
    (lambda _, meta: meta.pop("griffin.position"), "griffin.position: is missing"),
    (_meta("position", 5), "griffin.position: expected a whole number in a string, found 5"),
    (_meta("position", "-1"), "griffin.position: expected a whole number in a string, found '-1'"),
    (_meta("position", "01"), "griffin.position: expected a whole number in a string, found '01'"),
    (_meta("position", "1\n"), r"griffin.position: expected a whole number in a string, found '1\n'"),
    (_meta("position", "١"), r"griffin.position: expected a whole number in a string, found '\u0661'"),
    (_meta("position", str(2**63)), f"griffin.position: expected at most {LAST_POSITION}, found {2**63}"),
    (_meta("position", "9" * 20), "griffin.position: expected a whole number in a string, found '999"),
    (lambda _, meta: meta.pop("griffin.checksum"), "griffin.checksum: is missing"),
    (_meta("checksum", "crc32:0000000"), "griffin.checksum: expected crc32: and 8 hex digits, found 'crc32:0000000'"),
    (_meta("checksum", "crc32:ABCDEF00"), "griffin.checksum: expected crc32: and 8 hex digits, found 'crc32:ABCDEF00'"),
    (_meta("date", "today"), "header: 'griffin.date' is a field that we do not know"),
    (lambda table, _: table.pop("blk.1.k"), "blk.1.k: the array is missing"),
    (lambda table, _: table.update({"blk\n2": 5}), r"header: 'blk\n2' is no array of this model's state"),
    (lambda table, _: table.update({"blk.1.k": 5}), "blk.1.k: expected dtype, shape and data_offsets, found 5"),
    (_set("blk.1.k", "more", 1), "blk.1.k: expected dtype, shape and data_offsets, found {"),
    (_set("blk.1.k", "dtype", "BF16"), "blk.1.k: expected dtype F16, found 'BF16'"),
    (_set("blk.1.k", "dtype", ["F16"]), "blk.1.k: expected dtype F16, found ['F16']"),
    (_set("blk.1.k", "shape", [3, 7]), "blk.1.k: expected shape [7, 3], found [3, 7]"),
    (_set("blk.1.k", "shape", [7.0, 3]), "blk.1.k: expected shape [7, 3], found [7.0, 3]"),
    (_set("blk.1.k", "shape", [2**64]), f"blk.1.k: expected shape [7, 3], found [{2**64}]"),
    (_set("blk.0.h", "data_offsets", [False, 20]), "blk.0.h: expected data_offsets [0, 20], found [False, 20]"),
    (_set("blk.0.h", "data_offsets", [-20, 0]), "blk.0.h: expected data_offsets [0, 20], found [-20, 0]"),
    (_set("blk.1.v", "data_offsets", [0, 42]), "blk.1.v: expected data_offsets [166, 208], found [0, 42]"),
    (lambda table, _: table.pop(LOGITS), "blk.1.k: expected data_offsets [80, 122], found [124, 166]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "problem"), CHANGES, ids=[problem for _, problem in CHANGES])
def test_each_field_is_checked(path: Path, raw: bytes, change: Change, problem: str) -> None:
    table = header(raw)
    change(table, table["__metadata__"])
    assert refusal(path, signed(table, raw[-208:])).startswith(problem)


def test_the_header_as_such_is_checked(path: Path, raw: bytes) -> None:
    for text, problem in {
        b"[]": "header: expected a JSON object, found list",
        b"{": "header: is not valid JSON: ",
        b"\xff": "header: is not valid JSON: 'utf-8' codec",
        b"[" * 2000: "header: is not valid JSON: maximum recursion",
        b"1" * 2000: "header: expected a JSON object, found int",
        b'{"a": 1, "a": 1}': "header: is not valid JSON: a name is there twice",
    }.items():
        assert refusal(path, struct.pack("<Q", len(text)) + text).startswith(problem)
    huge = struct.pack("<Q", 2**64 - 1) + raw[8:]
    assert refusal(path, huge) == f"header length: expected at most 2304, found {2**64 - 1}: no state of this model"
    assert refusal(path, b"") == "header length: the file ends 8 bytes too early"


def test_the_checksum_is_compared(path: Path, raw: bytes) -> None:
    checksum = header(raw)["__metadata__"]["griffin.checksum"]
    other = "crc32:01234567"
    problem = f"griffin.checksum: the file is damaged: this is {other}, its bytes have {checksum}"
    assert refusal(path, raw.replace(checksum.encode(), other.encode())) == problem
    text = json.dumps(header(raw)).replace(checksum, f"\\u0063{checksum[1:]}").encode()
    assert "to stand once in the header" in refusal(path, struct.pack("<Q", len(text)) + text + raw[-208:])


def test_a_state_of_another_layout_is_refused(path: Path, raw: bytes) -> None:
    wide = {**LAYOUT, "blk.1.k": (F32, (7, 3))}
    assert refusal(path, raw, wide) == "blk.1.k: expected dtype F32, found 'F16'"
    deeper = {**LAYOUT, "blk.2.h": (F32, (5,))}
    assert refusal(path, raw, deeper) == "blk.2.h: the array is missing"
    headless = {name: row for name, row in LAYOUT.items() if name != LOGITS}
    assert refusal(path, raw, headless) == "header: 'logits' is no array of this model's state"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in {
        "none": "No such file",
        ".": "not a regular file",
        "pipe": "not a regular file",
        "a\0b": "null",
    }.items():
        with pytest.raises(FileFormatError, match=rf": file: .*{problem}"):
            load(f"{tmp_path}/{name}", MODEL, LAYOUT)


def test_a_file_that_becomes_shorter_while_it_is_read(path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fstat", lambda _: SimpleNamespace(st_size=len(raw)))
    assert refusal(path, raw[:-3]) == "data: the file ends 3 bytes too early"


def test_what_cannot_be_written_leaves_the_older_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, state())

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(GriffinError, match=r"a\.state: cannot be written: Read-only file system$"):
            save(path, state(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 10, path.stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(GriffinError, match=r"a\.state: cannot be written: File too large$"):
                save(path, state(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(GriffinError, match="cannot be written"):
            save(path, state(1))
    assert list(path.parent.iterdir()) == [path]
    assert equal(load(path, MODEL, LAYOUT), state())
    save(path, state(1))
    assert equal(load(path, MODEL, LAYOUT), state(1))


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    for target, problem in ((tmp_path, "is a folder"), (tmp_path / "none" / "a", "the folder .* does not exist")):
        with pytest.raises(GriffinError, match=problem):
            save(target, state())
    assert not list(tmp_path.iterdir())


_SAVING = """
import sys
from test_saved_state import state
from griffin_gguf.runtime.saved_state import save
print("ready", flush=True)
seed = 0
while True:
    save(sys.argv[1], state(seed % 2))
    seed += 1
"""


def test_killed_at_any_moment_a_whole_state_is_there(path: Path) -> None:
    save(path, state())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for _ in range(3):
        command = [sys.executable, "-c", _SAVING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
            for _ in range(200):  # meanwhile a reader sees whole states only
                found = load(path, MODEL, LAYOUT)
                assert equal(found, state()) or equal(found, state(1))
            assert child.poll() is None
            child.kill()
        found = load(path, MODEL, LAYOUT)
        assert equal(found, state()) or equal(found, state(1))


def test_the_documented_sizes() -> None:
    text = (Path(__file__).parents[2] / "docs/state.md").read_text(encoding="utf-8")
    for hp, name in ((griffins.TWO_B, "2B"), (griffins.NINE_B, "9B")):
        size = nbytes(hp, GGMLQuantizationType.F16)
        assert re.search(rf"^\| {name} .* {size:,} \| {size + 4 * hp.vocab:,} \|$", text, re.MULTILINE)
