"""Several files as one GGUF, and reading past the map."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from models import random_model
from splitting import finish, part, split

from griffin_gguf.quant.quantizer import quantize
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_file import GgufFile

U16, U32, I32, STRING = GGUFValueType.UINT16, GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.STRING
ONE = np.arange(8, dtype=np.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("whole"), "BF16")


LIMITS = [{"split_max_tensors": 1}, {"split_max_tensors": 7}, {"split_max_size": 100_000}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_parts_are_one_file(whole: Path, tmp_path: Path, limits: dict[str, int]) -> None:
    first = split(whole, tmp_path, **limits)
    with GgufFile.open(whole) as expected, GgufFile.open(first) as file:
        count = len(list(tmp_path.iterdir()))
        assert count > 3
        assert file.path == first
        assert file.paths == tuple(sorted(tmp_path.iterdir()))
        assert file.size == sum(path.stat().st_size for path in file.paths)
        assert file.metadata == expected.metadata
        assert file.types == expected.types
        assert file.hyperparameters() == expected.hyperparameters()
        assert list(file.tensors) == list(expected.tensors)
        assert [info.part for info in file.tensors.values()] == sorted(info.part for info in file.tensors.values())
        assert {info.part for info in file.tensors.values()} == set(range(count))
        for name, info in expected.tensors.items():
            found = file.tensors[name]
            assert (found.type, found.shape, found.nbytes) == (info.type, info.shape, info.nbytes)
            assert file.data(name).tobytes() == expected.data(name).tobytes()
            oracle = {t.name: t for t in gguf.GGUFReader(file.paths[found.part]).tensors}[name]
            assert (found.offset, found.nbytes) == (oracle.data_offset, oracle.n_bytes)


@pytest.mark.parametrize("backend", ["numpy", "ggml"])
def test_a_split_model_gives_the_same_logits(whole: Path, tmp_path: Path, backend: Any) -> None:
    first = split(whole, tmp_path, split_max_tensors=9)
    tokens = np.random.default_rng(0).integers(0, 384, 40)
    logits = []
    for path in (whole, first):
        with load(path, backend=backend, threads=1) as model:
            logits.append(model.forward(tokens, model.new_state(), every=True))
    assert np.array_equal(logits[0], logits[1])


def test_a_device_that_cannot_map_gets_copies_of_all_parts(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = split(whole, tmp_path, split_max_tensors=9)
    monkeypatch.setattr("griffin_gguf.runtime.ggml.device.Device.map", lambda *_: None)
    with load(first, backend="ggml", threads=1) as copied, load(whole, backend="numpy") as reference:
        found = copied.forward([1, 2, 3], copied.new_state())
        expected = reference.forward([1, 2, 3], reference.new_state())
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()


def test_a_split_source_is_quantized_as_the_whole_one(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, split_max_tensors=5)
    quantize(whole, tmp_path / "a.gguf", "Q8_0", threads=1)
    quantize(first, tmp_path / "b.gguf", "Q8_0", threads=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# ---- parts that do not belong together


def pair(folder: Path, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> Path:
    """Two parts with a tensor each; `first` and `second` change arguments of `part`."""
    one = {"no": 0, "count": 2, "total": 2, "tensors": [("a", ONE, None)], "keys": {"x.y": (1, U32)}}
    two = {"no": 1, "count": 2, "total": 2, "tensors": [("b", ONE, None)], "keys": {}}
    part(folder / "m-00002-of-00002.gguf", **(two | (second or {})))
    return part(folder / "m-00001-of-00002.gguf", **(one | (first or {})))


def test_a_pair_by_hand(tmp_path: Path) -> None:
    with GgufFile.open(pair(tmp_path)) as file:
        assert file.metadata == {"x.y": 1}
        assert [(info.name, info.part) for info in file.tensors.values()] == [("a", 0), ("b", 1)]
        assert file.data("b").tobytes() == ONE.tobytes()


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    with GgufFile.open(pair(tmp_path, {"tensors": [], "total": 1}, {"total": 1})) as file:
        assert file.tensors["b"].part == 1


def test_each_part_has_its_own_alignment(tmp_path: Path) -> None:
    path = pair(tmp_path)
    writer = gguf.GGUFWriter(path, "x")
    writer.add_custom_alignment(4096)
    writer.add_key_value("split.no", 0, U16)
    writer.add_key_value("split.count", 2, U16)
    writer.add_key_value("split.tensors.count", 2, I32)
    writer.add_tensor("a", ONE)
    finish(writer)
    with GgufFile.open(path) as file:
        assert file.alignment == 32
        assert file.tensors["a"].offset % 4096 == 0
        assert file.data("a").tobytes() == file.data("b").tobytes() == ONE.tobytes()


@pytest.mark.parametrize("count", [0, 1])
def test_a_file_put_together_again_is_whole(tmp_path: Path, count: int) -> None:
    path = part(tmp_path / "any.gguf", 0, count, 3, [("a", ONE, None)], {"x.y": (1, U32)})
    with GgufFile.open(path) as file:
        assert (file.metadata, list(file.tensors), file.paths) == ({"x.y": 1}, ["a"], (path,))


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "count in the second": ({}, {"count": 3}, r"00002\.gguf: split\.count: expected 2, found 3"),
    "number in the second": ({}, {"no": 0}, r"m-00002-of-00002\.gguf: split\.no: expected 1, found 0"),
    "total in the second": ({}, {"total": 3}, r"m-00002-of-00002\.gguf: split\.tensors\.count: expected 2, found 3"),
    "total in both": ({"total": 3}, {"total": 3}, r"m-00001.*: split\.tensors\.count: says 3 tensors, the 2 files h"),
    "negative total": ({"total": -1}, {"total": -1}, r"m-00001.*: split\.tensors\.count: says -1 tensors"),
    "a number past the count": ({"no": 2}, {}, r"m-00001.*: split\.no: expected less than split\.count, which is 2"),
    "a name at odds with the number": ({"no": 1}, {}, r"m-00001.*: split\.no: is 1 and split\.count 2: .* -00002-of-"),
    "a name at odds with the count": ({"count": 3}, {}, r"m-00001.*: split\.no: is 0 and split\.count 3: .* -00001-of"),
    "the same tensor": ({}, {"tensors": [("a", ONE, None)]}, r"m-00002.*: a: this tensor is in m-00001-of-00002\.gguf"),
    "another key": ({}, {"keys": {"x.z": (1, U32)}}, r"m-00002.*: x\.z: is not what m-00001-of-00002\.gguf says"),
    "another value": ({}, {"keys": {"x.y": (2, U32)}}, r"m-00002.*: x\.y: is not what m-00001-of-00002\.gguf says"),
    "no number": ({"keys": {"split.no": (None, U16)}}, {}, r"m-00001.*: split\.no: is missing"),
    "no number in the second": ({}, {"keys": {"split.no": (None, U16)}}, r"m-00002.*: split\.no: is missing"),
    "no total": ({"keys": {"split.tensors.count": (None, I32)}}, {}, r"m-00001.*: split\.tensors\.count: is missing"),
    "a count of another type": ({"keys": {"split.count": (2, U32)}}, {}, r"m-00001.*: split\.count: expected UINT16"),
    "a count that is text": ({"keys": {"split.count": ("2", STRING)}}, {}, r"m-00001.*: split\.count: expected UINT16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_parts_at_odds_are_refused_with_file_and_field(tmp_path: Path, name: str) -> None:
    first, second, message = BAD[name]
    path = pair(tmp_path, first, second)
    with pytest.raises(FileFormatError, match=message) as caught:
        GgufFile.open(path)
    assert "\n" not in str(caught.value)


def test_another_part_names_the_first(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(FileFormatError, match=r"split\.no: is file 2 of 2; open m-00001-of-00002\.gguf"):
        GgufFile.open(tmp_path / "m-00002-of-00002.gguf")


def test_a_missing_part_is_named(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, split_max_tensors=30)
    lost = sorted(tmp_path.iterdir())[1]
    lost.unlink()
    with pytest.raises(FileFormatError, match=rf"{lost.name}: file: is missing: split\.count in {first.name} is"):
        GgufFile.open(first)


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    path = pair(tmp_path).rename(tmp_path / "renamed.gguf")
    with pytest.raises(FileFormatError, match=r"renamed\.gguf: split\.no: .* ends in -00001-of-00002\.gguf"):
        GgufFile.open(path)


def test_a_bad_tensor_is_named_with_its_own_file(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, split_max_tensors=9)
    with GgufFile.open(first) as file:
        info = file.tensors["blk.1.ssm_a"]
        home = file.paths[info.part]
    assert home != first
    with home.open("r+b") as raw:
        raw.seek(info.offset)
        raw.write(np.float32(np.nan).tobytes())
    with GgufFile.open(first) as file, pytest.raises(FileFormatError, match=rf"{home.name}: blk\.1\.ssm_a: holds NaN"):
        file.hyperparameters()


def descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    path = pair(tmp_path, {"total": 3}, {"total": 3})
    before = descriptors()
    for _ in range(3):
        with pytest.raises(FileFormatError):
            GgufFile.open(path)
    pair(tmp_path)
    for _ in range(3):
        GgufFile.open(path).close()
    assert descriptors() == before


@given(st.sampled_from([1, 2]), st.integers(0, 300), st.binary(min_size=1, max_size=8))
def test_noise_in_a_part_never_does_more_than_raise(tmp_path: Path, no: int, at: int, noise: bytes) -> None:
    pair(tmp_path)
    path = tmp_path / f"m-0000{no}-of-00002.gguf"
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    with suppress(FileFormatError), GgufFile.open(tmp_path / "m-00001-of-00002.gguf") as file:
        for name, info in file.tensors.items():
            assert file.data(name).nbytes == file.read(name).nbytes == info.nbytes


# ---- reading past the map


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "copy.gguf"))


@given(data=st.data())
def test_read_gives_what_the_map_shows(whole: Path, data: st.DataObject) -> None:
    with GgufFile.open(whole) as file:
        name = data.draw(st.sampled_from(list(file.tensors)))
        stop = data.draw(st.integers(0, file.tensors[name].nbytes))
        start = data.draw(st.integers(0, stop))
        assert file.read(name, start, stop).tobytes() == file.data(name)[start:stop].tobytes()
        assert file.read(name).tobytes() == file.data(name).tobytes()


def test_long_reads_are_put_together(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("griffin_gguf.runtime.gguf_shards._LONGEST_READ", 1000)
    with GgufFile.open(whole) as file:
        assert file.read("token_embd.weight").tobytes() == file.data("token_embd.weight").tobytes()


def test_threads_read_at_once(whole: Path) -> None:
    with GgufFile.open(whole) as file, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: file.read(name).tobytes(), list(file.tensors) * 4))
        assert found == [file.data(name).tobytes() for name in file.tensors] * 4


def test_a_file_that_becomes_shorter_is_an_error_not_a_signal(copy: Path) -> None:
    with GgufFile.open(copy) as file:
        last = list(file.tensors)[-1]
        os.truncate(copy, file.tensors[last].offset + 3)
        with pytest.raises(FileFormatError, match=rf"copy\.gguf: {last}: .* has become shorter while it was read"):
            file.read(last)
        os.truncate(copy, 0)
        with pytest.raises(FileFormatError, match=r"token_embd\.weight: .* has become shorter while it was read"):
            file.read("token_embd.weight", 10, 20)


def appended(path: Path) -> None:
    with path.open("ab") as raw:
        raw.write(b"x")


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [appended, touched, lambda path: os.truncate(path, 100)])
def test_a_change_is_noticed(copy: Path, change: Callable[[Path], None]) -> None:
    with GgufFile.open(copy) as file:
        file.check_unchanged()
        change(copy)
        with pytest.raises(FileFormatError, match=r"copy\.gguf: file: was changed while it was read"):
            file.check_unchanged()


def test_a_change_of_any_part_is_noticed(tmp_path: Path) -> None:
    with GgufFile.open(pair(tmp_path)) as file:
        file.check_unchanged()
        touched(file.paths[1])
        with pytest.raises(FileFormatError, match=r"m-00002-of-00002\.gguf: file: was changed"):
            file.check_unchanged()


def test_a_file_that_another_replaces_is_still_the_one_opened(copy: Path, tmp_path: Path) -> None:
    with GgufFile.open(copy) as file:
        expected = file.read("output_norm.weight").tobytes()
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(copy)
        file.check_unchanged()
        assert file.read("output_norm.weight").tobytes() == expected
