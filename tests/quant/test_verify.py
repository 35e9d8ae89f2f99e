"""Damage of every kind, found; sound files, passed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter
from gguf import GGMLQuantizationType as T
from hypothesis import event, given
from hypothesis import strategies as st
from models import random_model
from splitting import finish, split

from griffin_gguf.quant import verify as module
from griffin_gguf.quant.verify import Verification, verify
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.gguf_header import TensorInfo

KEY = "griffin.tensor_sha256"


def with_checksums(
    source: Path,
    target: Path,
    change: Callable[[list[str]], Any] = lambda digests: digests,
    order: Callable[[list[TensorInfo]], list[TensorInfo]] = lambda tensors: tensors,
) -> Path:
    """Copy a GGUF by way of gguf-py, checksums among its keys; `change` makes them what they should not be.

    The tensors come in another `order`, while the checksums stay in that of the source.
    """
    with GgufFile.open(source) as file:
        writer = GGUFWriter(target, file.metadata["general.architecture"])
        for name, value in file.metadata.items():
            if name not in ("general.architecture", KEY):
                writer.add_key_value(name, value, *file.types[name])
        digests = [hashlib.sha256(file.data(name).tobytes()).hexdigest() for name in file.tensors]
        writer.add_key_value(KEY, change(digests), GGUFValueType.ARRAY)
        for info in order(list(file.tensors.values())):
            writer.add_tensor(info.name, file.data(info.name).reshape(*info.shape[:-1], -1), raw_dtype=info.type)
        finish(writer)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Griffin, BF16, with checksums."""
    folder = tmp_path_factory.mktemp("model")
    return with_checksums(random_model(folder, "BF16", num_hidden_layers=3), folder / "m.gguf")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(model.read_bytes())
    return path


def located(path: Path, name: str) -> TensorInfo:
    with GgufFile.open(path) as file:
        return file.tensors[name]


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as raw:
        raw.seek(at)
        raw.write(data)


def only(found: Verification) -> str:
    """The one line of damage, less the file's path."""
    (line,) = found.damaged
    assert "\n" not in line
    path, _, rest = line.partition(": ")
    assert path in map(str, found.paths)
    return rest


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("sha256", [False, True])
def test_a_sound_file(model: Path, threads: int, sha256: bool) -> None:
    reports: list[tuple[int, int]] = []
    found = verify(model, sha256=sha256, threads=threads, progress=lambda *report: reports.append(report))
    assert found.sound
    assert (found.damaged, found.odd, found.unchecked, found.paths) == ([], [], [], [model])
    with GgufFile.open(model) as file:
        assert found.tensors == len(file.tensors)
        assert found.size == sum(info.nbytes for info in file.tensors.values())
    assert reports[-1] == (found.size, found.size)
    assert reports == sorted(reports)


def test_a_sound_file_in_parts(model: Path, tmp_path: Path) -> None:
    first = split(model, tmp_path, split_max_tensors=10)
    found = verify(first, sha256=True, threads=2)
    assert (found.damaged, found.odd) == ([], [])
    assert found.paths == sorted(tmp_path.iterdir())
    info = located(first, "blk.2.ffn_norm.weight")
    assert info.part
    overwrite(found.paths[info.part], info.offset, np.float32(np.inf).tobytes())
    lines = verify(first, sha256=True, threads=2).damaged
    assert lines == [
        f"{found.paths[info.part]}: blk.2.ffn_norm.weight: element 0: the number is infinite",
        f"{found.paths[info.part]}: blk.2.ffn_norm.weight: its SHA-256 is not the one in {KEY}",
    ]


def test_every_flipped_bit_of_a_tensor_shows_in_its_checksum(copy: Path) -> None:
    raw = copy.read_bytes()
    with GgufFile.open(copy) as file:
        tensors = list(file.tensors.values())
    rng = np.random.default_rng(0)
    for info in (tensors[0], tensors[7], tensors[-1]):
        for at in {0, info.nbytes - 1, int(rng.integers(info.nbytes))}:
            overwrite(copy, info.offset + at, bytes([raw[info.offset + at] ^ 1]))
            assert only(verify(copy, sha256=True, threads=1)) == f"{info.name}: its SHA-256 is not the one in {KEY}"
            assert verify(copy, threads=1).sound
            overwrite(copy, info.offset + at, raw[info.offset + at : info.offset + at + 1])
    assert verify(copy, sha256=True, threads=1).sound


def by_name(tensors: list[TensorInfo]) -> list[TensorInfo]:
    return sorted(tensors, key=lambda info: info.name)


def test_checksums_hold_where_another_program_has_put_the_tensors_in_another_order(model: Path, tmp_path: Path) -> None:
    """As llama-quantize does, and with it `ollama create`; the keys it carries along."""
    path = with_checksums(model, tmp_path / "m.gguf", order=by_name)
    assert verify(path, sha256=True, threads=1).sound
    info = located(path, "blk.1.ffn_norm.weight")
    raw = path.read_bytes()
    overwrite(path, info.offset, bytes([raw[info.offset] ^ 1]))
    assert only(verify(path, sha256=True, threads=1)) == f"{info.name}: its SHA-256 is not the one in {KEY}"


def test_two_tensors_that_are_exchanged_are_damage_in_any_order(model: Path, tmp_path: Path) -> None:
    path = with_checksums(model, tmp_path / "m.gguf", order=by_name)
    one, other = (located(path, f"blk.{i}.ffn_norm.weight") for i in (0, 1))
    raw = path.read_bytes()
    overwrite(path, one.offset, raw[other.offset : other.offset + one.nbytes])
    overwrite(path, other.offset, raw[one.offset : one.offset + one.nbytes])
    assert len(verify(path, sha256=True, threads=1).damaged) == 2


def test_numbers_that_are_not_finite_are_counted_and_the_first_is_named(copy: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_PIECE", 64)  # many pieces
    matrix, vector = located(copy, "blk.0.ffn_up.weight"), located(copy, "output_norm.weight")
    for element in (100, 1000, 1001):
        overwrite(copy, matrix.offset + 2 * element, b"\x80\xff")
    overwrite(copy, vector.offset + 4 * 63, np.float32(np.nan).tobytes())
    assert verify(copy, threads=2).damaged == [
        f"{copy}: output_norm.weight: element 63: the number is NaN",
        f"{copy}: blk.0.ffn_up.weight: element 100: the number is infinite (3 such of {matrix.nbytes // 2})",
    ]


def test_decays_above_zero(copy: Path) -> None:
    info = located(copy, "blk.1.ssm_a")
    overwrite(copy, info.offset, np.array([0.5, 0.0, 1e-9], np.float32).tobytes())
    assert only(verify(copy, threads=1)).startswith("blk.1.ssm_a: expected no number above 0")
    assert only(verify(copy, threads=1)).endswith("found 2")


def test_all_findings_are_told(copy: Path) -> None:
    raw = copy.read_bytes()
    for old, new in (
        (b"blk.0.ssm_a", b"blk.0.ssm_b"),
        (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eos_token_ix"),
    ):
        assert raw.count(old) == 1
        raw = raw.replace(old, new)
    copy.write_bytes(raw)
    overwrite(copy, located(copy, "output_norm.weight").offset, np.float32(np.nan).tobytes())
    assert [line.removeprefix(f"{copy}: ") for line in verify(copy, threads=2).damaged] == [
        "tokenizer.ggml.eos_token_id: is missing",
        "blk.0.ssm_a: the tensor is missing",
        "blk.0.ssm_b: is no tensor of this model",
        "output_norm.weight: element 0: the number is NaN",
    ]


def test_hyperparameters_that_contradict_the_tensors(copy: Path) -> None:
    raw = copy.read_bytes()
    at = raw.index(b"recurrentgemma.feed_forward_length") + len(b"recurrentgemma.feed_forward_length") + 4
    overwrite(copy, at, (95).to_bytes(4, "little"))
    lines = verify(copy, threads=1).damaged
    assert len(lines) == 3 * 5  # gate and up with biases, down, in each layer
    assert all("expected shape" in line for line in lines)


def test_truncation_anywhere(copy: Path) -> None:
    raw = copy.read_bytes()
    with GgufFile.open(copy) as file:
        end = max(info.offset + info.nbytes for info in file.tensors.values())
    for length in (0, 3, 24, 1000, located(copy, "blk.1.ffn_up.weight").offset, end - 1):
        copy.write_bytes(raw[:length])
        assert only(verify(copy, threads=1))
    copy.write_bytes(raw[:end])
    assert verify(copy, threads=1).sound


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"absent\.gguf: file: cannot be read: No such file or directory"):
        verify(tmp_path / "absent.gguf")
    with pytest.raises(FileFormatError, match="is not a regular file"):
        verify(tmp_path)


def test_trailing_bytes_and_padding_are_warnings(tmp_path: Path) -> None:
    numbers = np.arange(3, dtype=np.float32)
    path = foreign(tmp_path / "f.gguf", [("a", numbers, T.F32), ("b", numbers, T.F32)])
    with GgufFile.open(path) as file:
        (header,) = (shard.header for shard in file.shards)
        assert header.end < header.data_offset
        assert file.size == header.data_offset + 64
    assert verify(path).odd == []
    for at in (header.data_offset - 1, header.data_offset + 12, header.data_offset + 63):
        overwrite(path, at, b"\x01")
    with path.open("ab") as raw:
        raw.write(bytes(5))
    found = verify(path)
    assert found.sound
    assert found.odd == [
        f"{path}: header: the {header.data_offset - header.end} bytes of padding after it are not all zero",
        f"{path}: a: the 20 bytes of padding after it are not all zero",
        f"{path}: b: the 20 bytes of padding after it are not all zero",
        f"{path}: file: 5 bytes follow the last tensor",
    ]


# ---- checksums


def test_a_file_without_checksums_is_refused(tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.gguf", [])
    assert verify(path).sound
    with pytest.raises(UnsupportedError, match=rf"f\.gguf: {KEY}: is missing: the file records no checksums"):
        verify(path, sha256=True)


def test_a_checksum_that_is_none(model: Path, tmp_path: Path) -> None:
    for value in ("", "A" * 64, "g" * 64, "a" * 63):
        path = with_checksums(model, tmp_path / "bad.gguf", lambda digests, value=value: [value, *digests[1:]])
        assert only(verify(path, sha256=True, threads=1)) == f"{KEY}[0]: expected the 64 hex digits of a SHA-256"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda digests: digests[1:], "expected 57 checksums, one a tensor, found 56"),
        (lambda digests: [*digests, digests[0]], "expected 57 checksums, one a tensor, found 58"),
        (lambda digests: [1] * len(digests), "expected an array of strings"),
    ],
)
def test_checksums_of_another_form(model: Path, tmp_path: Path, change: Any, problem: str) -> None:
    path = with_checksums(model, tmp_path / "bad.gguf", change)
    assert only(verify(path, sha256=True, threads=1)) == f"{KEY}: {problem}"


def test_tensors_that_changed_places(model: Path, tmp_path: Path) -> None:
    path = with_checksums(model, tmp_path / "bad.gguf", lambda digests: [digests[1], digests[0], *digests[2:]])
    assert [line.removeprefix(f"{path}: ") for line in verify(path, sha256=True, threads=2).damaged] == [
        f"token_embd.weight: its SHA-256 is not the one in {KEY}",
        f"output_norm.weight: its SHA-256 is not the one in {KEY}",
    ]


# ---- other architectures


def foreign(path: Path, tensors: list[tuple[str, np.ndarray[Any, Any], T]]) -> Path:
    writer = GGUFWriter(path, "llama")
    for name, data, type in tensors:
        writer.add_tensor(name, data, raw_dtype=type)
    finish(writer)
    return path


def test_another_architecture_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    blocks = np.zeros((4, GGML_QUANT_SIZES[T.IQ1_M][1]), np.uint8)
    blocks[2, 48:] = np.frombuffer(b"\x00\x10\x00\x00\x00\xc0\x00\x70", np.uint8)
    numbers = np.array([1, np.inf], np.float64)
    path = foreign(tmp_path / "f.gguf", [("a", blocks, T.IQ1_M), ("b", numbers, T.F64), ("c", np.arange(4), T.I64)])
    found = verify(path, threads=1)
    assert found.damaged == [f"{path}: a: block 2: d is NaN", f"{path}: b: element 1: the number is infinite"]
    (line,) = found.unchecked
    assert "this is 'llama'" in line


def test_a_type_that_files_do_not_have(tmp_path: Path) -> None:
    path = foreign(tmp_path / "f.gguf", [("a", np.zeros((1, GGML_QUANT_SIZES[T.Q8_1][1]), np.uint8), T.Q8_1)])
    assert only(verify(path)) == "a: the type Q8_1 has no place in files"


# ---- files that change, and threads


def test_a_file_that_shrinks_while_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1024)
    embedding = located(copy, "token_embd.weight")
    read = GgufFile.read

    def shrinking(file: GgufFile, name: str, start: int, stop: int) -> Any:
        if start:
            os.truncate(copy, embedding.offset + 2000)
        return read(file, name, start, stop)

    monkeypatch.setattr(GgufFile, "read", shrinking)
    lines = verify(copy, sha256=True, threads=1).damaged
    assert all("has become shorter while it was read" in line for line in lines[:-1])
    assert {line.split(": ")[1] for line in lines[:-1]} >= {"token_embd.weight"}
    assert lines[-1] == f"{copy}: file: was changed while it was read"


def test_a_file_that_is_written_to_while_it_is_read(copy: Path) -> None:
    def touch(done: int, total: int) -> None:
        os.utime(copy, ns=(0, 12345))

    assert only(verify(copy, threads=1, progress=touch)) == "file: was changed while it was read"


def test_an_interruption_ends_all_threads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_PIECE", 1024)
    with pytest.raises(KeyboardInterrupt):
        verify(model, sha256=True, threads=2, progress=interrupt)


def test_threads_that_cannot_be(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="threads: "):
        verify(model, threads=0)


# ---- random damage


@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
    header=st.booleans(),
)
def test_flipped_bytes_are_found_or_harmless_and_never_more(
    model: Path, tmp_path: Path, flips: list[tuple[float, int]], header: bool
) -> None:
    original, data = model.read_bytes(), located(model, "token_embd.weight").offset
    raw, limit = bytearray(original), data if header else len(original)
    for place, flip in flips:
        raw[int(place * limit)] ^= flip
    path = tmp_path / "noise.gguf"
    path.write_bytes(raw)
    try:
        found = verify(path, sha256=True, threads=1)
    except UnsupportedError as error:
        event(str(error).removeprefix(str(path)))
        return  # the key of the checksums has another name now
    assert all("\n" not in line and line.startswith(str(path)) for line in found.damaged + found.odd)
    if raw[data:] != original[data:]:
        assert found.damaged or found.odd
