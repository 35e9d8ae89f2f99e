import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import griffins
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.quant import writer
from griffin_gguf.quant.encode import EncodingError, encode, encoder
from griffin_gguf.quant.file_types import FILE_TYPES, file_type
from griffin_gguf.quant.recipes import Planned, plan
from griffin_gguf.quant.writer import Output, file_size, files, write
from griffin_gguf.runtime.arch import CHECKSUMS, Tensor
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile

HP = griffins.tiny(layers=3, recurrent=(True, False, True))
WEIGHTS = griffins.weights(HP)
READ = griffins.reader(WEIGHTS)
IMPORTANCE = griffins.importance(HP)
ENCODE = encoder(READ, IMPORTANCE.get)
SOME = ("F32", "BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q2_K")


def output(path: Path, name: str = "Q4_K_M") -> Output:
    recipe = file_type(name)
    return Output(path, griffins.metadata(HP) | recipe.metadata, plan(HP, recipe))


def encoded(row: Planned) -> NDArray[np.uint8]:
    """The tensor encoded matrix by matrix, each as a whole."""
    weights = IMPORTANCE.get(row.tensor.name)
    matrices = WEIGHTS[row.tensor.name].reshape(1 if weights is None else len(weights), -1, row.columns)
    return np.concatenate(
        [encode(row.type, m, None if weights is None else weights[i]) for i, m in enumerate(matrices)]
    )


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def never(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
    raise AssertionError("nothing was to be read")


@pytest.mark.parametrize("name", FILE_TYPES)
def test_gguf_py_finds_every_tensor_with_the_bytes_that_encoding_it_whole_gives(tmp_path: Path, name: str) -> None:
    wanted = output(tmp_path / "a.gguf", name)
    write([wanted], ENCODE)
    assert wanted.path.stat().st_size == file_size(wanted)
    found = GGUFReader(wanted.path)
    assert [tensor.name for tensor in found.tensors] == [row.tensor.name for row in wanted.plan]
    for tensor, row in zip(found.tensors, wanted.plan, strict=True):
        assert tensor.tensor_type is row.type
        assert tuple(reversed(tensor.shape.tolist())) == row.tensor.shape
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == encoded(row).tobytes()
    with GgufFile.open(wanted.path) as ours:
        assert ours.hyperparameters() == HP


def test_one_pass_for_all_files(tmp_path: Path) -> None:
    rows_read: dict[str, int] = {}

    def read(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        rows_read[tensor.name] = rows_read.get(tensor.name, 0) + stop - start
        return READ(tensor, start, stop)

    together = [output(tmp_path / f"{name}.gguf", name) for name in SOME]
    write(together, encoder(read, IMPORTANCE.get))
    assert rows_read == {row.tensor.name: row.rows for row in together[0].plan}
    for name, done in zip(SOME, together, strict=True):
        write([output(tmp_path / "alone.gguf", name)], ENCODE)
        assert done.path.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_a_type_that_files_share_is_encoded_once(tmp_path: Path) -> None:
    elements = 0

    def counting(tensor: Tensor, start: int, stop: int, types: Sequence[Any]) -> list[NDArray[np.uint8]]:
        nonlocal elements
        assert len(set(types)) == len(types)
        elements += (stop - start) * tensor.shape[-1] * len(types)
        return ENCODE(tensor, start, stop, types)

    write([output(tmp_path / "a.gguf"), output(tmp_path / "b.gguf")], counting, threads=1)
    assert elements == HP.parameters


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(piece=st.integers(2000, 200_000), ahead=st.integers(1, 5), threads=st.integers(1, 5))
def test_neither_pieces_nor_threads_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, ahead: int, threads: int
) -> None:
    reference = output(tmp_path / "reference.gguf")
    if not reference.path.exists():
        write([reference], ENCODE)
    monkeypatch.setattr(writer, "_PIECE_ELEMENTS", piece)
    monkeypatch.setattr(writer, "_PIECES_AHEAD", ahead)
    write([output(tmp_path / "a.gguf")], ENCODE, threads=threads)
    assert (tmp_path / "a.gguf").read_bytes() == reference.path.read_bytes()


def test_memory_is_bounded_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_PIECE_ELEMENTS", 4096)
    asked = written = behind = 0

    def read(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        nonlocal asked, behind
        asked += (stop - start) * tensor.shape[-1] * 4
        behind = max(behind, asked - written)
        return READ(tensor, start, stop)

    def progress(done: int, total: int) -> None:
        nonlocal written
        written = done
        assert total == 4 * HP.parameters

    write([output(tmp_path / "a.gguf")], encoder(read), threads=1, progress=progress)
    assert written == asked == 4 * HP.parameters
    assert behind <= 4 * 4096 * writer._PIECES_AHEAD


def test_keys_keep_their_types(tmp_path: Path) -> None:
    kinds = {
        GGUFValueType.UINT8: 255, GGUFValueType.INT8: -128, GGUFValueType.UINT16: 65535, GGUFValueType.INT16: -1,
        GGUFValueType.UINT32: 2**32 - 1, GGUFValueType.INT32: -7, GGUFValueType.UINT64: 2**64 - 1,
        GGUFValueType.INT64: -(2**63), GGUFValueType.FLOAT32: 0.5, GGUFValueType.FLOAT64: 0.1, GGUFValueType.BOOL: True,
        GGUFValueType.STRING: "grüße",
    }  # fmt: skip
    wanted = output(tmp_path / "a.gguf")
    for kind, value in kinds.items():
        wanted.metadata[f"test.{kind.name}"] = (value, kind, None)
        wanted.metadata[f"test.array.{kind.name}"] = ([value, value], GGUFValueType.ARRAY, kind)
    wanted.metadata["test.empty"] = ("", GGUFValueType.STRING, None)
    write([wanted], ENCODE)
    with GgufFile.open(wanted.path) as found:
        assert len(found.metadata.pop(CHECKSUMS)) == len(wanted.plan)
        assert found.types.pop(CHECKSUMS) == (GGUFValueType.ARRAY, GGUFValueType.STRING)
        assert found.metadata == {name: value for name, (value, _, _) in wanted.metadata.items()}
        assert found.types == {name: (kind, element) for name, (_, kind, element) in wanted.metadata.items()}


def test_an_empty_array_is_refused(tmp_path: Path) -> None:
    wanted = output(tmp_path / "a.gguf")
    wanted.metadata["test.none"] = ([], GGUFValueType.ARRAY, GGUFValueType.STRING)
    with pytest.raises(UnsupportedError, match=r"a\.gguf: test\.none: an empty array"):
        write([wanted], encoder(never))
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match=r"none/a\.gguf: the folder .*none does not exist"):
        write([output(tmp_path / "none" / "a.gguf")], encoder(never))
    (tmp_path / "folder").mkdir()
    with pytest.raises(GriffinError, match="folder: is a folder"):
        write([output(tmp_path / "folder")], encoder(never))
    with pytest.raises(GriffinError, match="two outputs have the same path"):
        write([output(tmp_path / "a.gguf"), output(tmp_path / "folder" / ".." / "a.gguf")], encoder(never))
    with pytest.raises(UnsupportedError, match="threads: expected at least 1, found 0"):
        write([output(tmp_path / "a.gguf")], encoder(never), threads=0)
    with pytest.raises(GriffinError, match="cannot be written: File name too long"):
        write([output(tmp_path / ("x" * 250))], encoder(never))
    assert names_in(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [GriffinError("the source ends"), KeyboardInterrupt(), MemoryError()])
def test_whatever_happens_the_target_stays_as_it_was(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "old.gguf").write_bytes(b"old")
    last = list(HP.tensors())[-1]

    def read(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        if tensor.name == last.name:
            raise error
        return READ(tensor, start, stop)

    with pytest.raises(type(error)):
        write([output(tmp_path / "old.gguf"), output(tmp_path / "new.gguf", "Q8_0")], encoder(read))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("old.gguf", b"old")]


def test_until_it_is_complete_a_file_has_another_name(tmp_path: Path) -> None:
    names: set[str] = set()
    write([output(tmp_path / "a.gguf")], ENCODE, progress=lambda *_: names.update(names_in(tmp_path)))
    (partial,) = names
    assert partial.startswith(".a.gguf.")
    assert partial.endswith(".partial")
    assert names_in(tmp_path) == ["a.gguf"]


def test_values_that_cannot_be_encoded_name_their_tensor(tmp_path: Path) -> None:
    bad = dict(WEIGHTS)
    bad["blk.1.attn_k.weight"] = bad["blk.1.attn_k.weight"].copy()
    bad["blk.1.attn_k.weight"][-1, -1] = np.nan
    with pytest.raises(EncodingError, match=r"^blk\.1\.attn_k\.weight: holds NaN or infinity$"):
        write([output(tmp_path / "a.gguf")], encoder(griffins.reader(bad)))
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = file_size(output(tmp_path / "a.gguf"))
    for limit in (0, 100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(GriffinError, match=r"a\.gguf: cannot be written: File too large"):
                write([output(tmp_path / "a.gguf")], ENCODE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.iterdir())
    write([output(tmp_path / "a.gguf")], ENCODE)


def test_a_disk_that_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(GriffinError, match=r"a\.gguf: cannot be written: Input/output error"):
        write([output(tmp_path / "a.gguf")], ENCODE)
    assert not list(tmp_path.iterdir())


_ENDLESS = """
import os
import sys
from pathlib import Path
import griffins, numpy as np
from griffin_gguf.quant.file_types import file_type
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.encode import encoder
from griffin_gguf.quant.writer import Output, write
hp = griffins.NINE_B
rng = np.random.default_rng(0)
def read(tensor, start, stop):
    os.write(1, b"reading\\n")  # whole lines, from whichever thread
    return rng.standard_normal((stop - start, tensor.shape[-1]), np.float32)
write([Output(Path(sys.argv[1]), griffins.metadata(hp), plan(hp, file_type("Q2_K")))], encoder(read))
"""


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(tmp_path / "a.gguf")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as child:
        assert child.stdout
        for _ in range(6):  # by now the pool is busy and chunks are being written
            assert child.stdout.readline() == b"reading\n"
        assert names_in(tmp_path)[0].endswith(".partial")
        child.send_signal(signal.SIGINT)
        _, complaint = child.communicate(timeout=60)
    assert complaint.rstrip().endswith(b"KeyboardInterrupt")
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_it_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    for moment in (1, 2, 20, 100):
        target.write_bytes(b"old")
        with subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(target)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ) as child:
            assert child.stdout
            for _ in range(moment):
                assert child.stdout.readline() == b"reading\n"
            child.kill()
        assert target.read_bytes() == b"old"
        others = [path for path in tmp_path.iterdir() if path != target]
        assert all(path.name.startswith(".a.gguf.") and path.suffix == ".partial" for path in others)
        for path in others:
            path.unlink()


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GriffinError, match=r"a\.gguf: cannot be written: Read-only file system"):
        write([output(tmp_path / "a.gguf")], encoder(never))
    assert not list(tmp_path.iterdir())


def test_checksums_are_of_the_bytes_as_written(tmp_path: Path) -> None:
    write([output(tmp_path / "a.gguf")], ENCODE)
    with GgufFile.open(tmp_path / "a.gguf") as file:
        assert file.metadata[CHECKSUMS] == [sha256(file.data(name).tobytes()).hexdigest() for name in file.tensors]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(most=st.integers(1, 2_000_000))
def test_a_split_file_is_the_whole_file_in_parts(tmp_path: Path, most: int) -> None:
    whole, parts = output(tmp_path / "whole.gguf"), output(tmp_path / "parts.gguf")
    parts.max_bytes = most
    write([whole, parts], ENCODE)
    made = [file.path for file in files(parts)]
    assert file_size(parts) == sum(path.stat().st_size for path in made)
    with GgufFile.open(whole.path) as one, GgufFile.open(made[0]) as several:
        assert several.metadata == one.metadata
        assert several.hyperparameters() == HP
        assert list(several.tensors) == list(one.tensors)
        assert all((several.data(name) == one.data(name)).all() for name in one.tensors)
    for path in made:
        found = GGUFReader(path)
        size = sum(tensor.n_bytes for tensor in found.tensors)
        assert size <= most or len(found.tensors) == 1
        path.unlink()


def test_a_split_file_that_cannot_be_placed_whole_is_not_placed_at_all(tmp_path: Path) -> None:
    parts = output(tmp_path / "parts.gguf")
    parts.max_bytes = 400_000
    names = [file.path for file in files(parts)]
    assert len(names) > 2

    def in_the_way(done: int, total: int) -> None:
        names[1].mkdir(exist_ok=True)

    with pytest.raises(GriffinError, match=f"{names[1].name}: is a folder"):
        write([parts], ENCODE, progress=in_the_way)
    assert list(tmp_path.iterdir()) == [names[1]]
    names[1].rmdir()
    write([parts], ENCODE)
    with GgufFile.open(names[0]) as file:
        assert file.hyperparameters() == HP


def test_a_folder_that_may_be_written_but_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    write([output(tmp_path / "a.gguf")], ENCODE)
    assert names_in(tmp_path) == ["a.gguf"]


def test_an_importance_of_each_matrix(tmp_path: Path) -> None:
    hp = griffins.tiny(layers=1, recurrent=(True,))
    gate = next(tensor for tensor in hp.tensors() if tensor.name == "blk.0.ssm_gate_i.weight")
    rows = griffins.weights(hp)[gate.name]
    importance = np.random.default_rng(1).random((2, 256)).astype(np.float32)
    encode_gate = encoder(griffins.reader({gate.name: rows}), {gate.name: importance}.get)
    both = np.concatenate([encode(T.IQ2_XS, rows[i], importance[i]) for i in range(2)])
    for cut in (1, 255, 256, 300):
        pieces = [encode_gate(gate, a, b, [T.IQ2_XS])[0] for a, b in ((0, cut), (cut, 512))]
        assert np.concatenate(pieces).tobytes() == both.tobytes()
    assert both.tobytes() != encode(T.IQ2_XS, rows.reshape(-1, 256), importance[0]).tobytes()
