import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from checkpoints import cast, random_checkpoint, safetensors_header, write_safetensors, write_weights
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.convert.checkpoint import INDEX, SINGLE, Checkpoint
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError

RNG = np.random.default_rng(0)
WEIGHTS = {
    "matrix": RNG.standard_normal((7, 12), np.float32),
    "vector": RNG.standard_normal(9, np.float32),
    "taps": RNG.standard_normal((5, 1, 4), np.float32),
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5000000000\n"


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_as_safetensors_reads_them(tmp_path: Path, dtype, shards):
    write_weights(tmp_path, WEIGHTS, dtype, shards)
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(WEIGHTS)
        for file in tmp_path.glob("*.safetensors"):
            for name, oracle in safetensors.torch.load_file(file).items():
                found = checkpoint.read(name)
                assert found.dtype == np.float32
                assert checkpoint.tensors[name].shape == tuple(oracle.shape)
                expected = oracle.float().numpy()
                np.testing.assert_array_equal(found, expected.reshape(-1, expected.shape[-1]))


@given(st.sampled_from(["bf16", "f16", "f32"]), st.integers(0, 7), st.integers(0, 7))
def test_rows(tmp_path: Path, dtype, one, other):
    start, stop = sorted((one, other))
    write_safetensors(tmp_path / SINGLE, WEIGHTS, dtype)
    with Checkpoint(tmp_path) as checkpoint:
        whole = checkpoint.read("matrix")
        np.testing.assert_array_equal(checkpoint.read("matrix", start, stop), whole[start:stop])


def test_bf16_keeps_every_bit(tmp_path: Path):
    bits = np.arange(2**16, dtype=np.uint32) << 16
    every = bits.view(np.float32)[~np.isnan(bits.view(np.float32))].reshape(-1, 2)
    write_safetensors(tmp_path / SINGLE, {"w": every}, "bf16")
    with Checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("w").view(np.uint32), every.view(np.uint32))


def test_equal_compares_numbers(tmp_path: Path, monkeypatch):
    a = RNG.standard_normal((64, 8)).astype(np.float32)
    late = a.copy()
    late[63, 7] += 1
    write_safetensors(tmp_path / SINGLE, {"a": a, "same": a, "late": late, "flat": a.reshape(-1)}, "f32")
    monkeypatch.setattr("griffin_gguf.convert.checkpoint._CHUNK_BYTES", 256)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.equal("a", "same")
        assert not checkpoint.equal("a", "late")
        assert not checkpoint.equal("a", "flat")


def test_a_hub_cache_of_symlinks(tmp_path: Path):
    """The hub's cache keeps files under their hash and links to them from the model's folder."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    random_checkpoint(snapshot, shards=2)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.relpath(blobs / str(i), snapshot))
    with Checkpoint(snapshot) as checkpoint:
        assert checkpoint.read("model.final_norm.weight").shape == (1, 64)


# ---- hostile headers


def entry(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def file_of(header: Any, data: bytes = bytes(16)) -> bytes:
    return safetensors_header(header) + data


def raw_header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header: the file has 0 bytes"),
    "seven bytes": (bytes(7), "header: the file has 7 bytes"),
    "Git LFS": (LFS, "file: this is a Git LFS pointer"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "header: says 1000 bytes, at most 2"),
    "header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", "header: says 9223372036854775808 bytes"),
    "header of 100 MB and a byte": (struct.pack("<Q", 10**8 + 1) + bytes(100), "header: says 100000001 bytes"),
    "no JSON": (raw_header(b"{nonsense}"), "header: is not valid JSON"),
    "no UTF-8": (raw_header(b"\xff\xfe{}"), "header: is not UTF-8"),
    "endless nesting": (raw_header(b"[" * 100_000), "header: is not valid JSON"),
    "an endless number": (raw_header(b'{"a":' + b"9" * 5000 + b"}"), "header: is not valid JSON"),
    "a list": (raw_header(b"[]"), "header: expected a JSON object, found list"),
    "a name twice": (raw_header(b'{"a": 1, "a": 2}'), "header: 'a' is there twice"),
    "a name that writes lines": (file_of({"a\nb": entry(0, 16)}), r"header: 'a\\nb' is no name for a tensor"),
    "an entry that is a number": (file_of({"a": 1}), "a: expected dtype, shape and data_offsets"),
    "an entry without a shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "a: expected dtype, shape"),
    "a dtype that is a number": (file_of({"a": entry(0, 16, dtype=3)}), "a: dtype: expected a name"),
    "a negative shape": (file_of({"a": entry(0, 16, [-4])}), "a: shape: expected"),
    "a shape of floats": (file_of({"a": entry(0, 16, [4.0])}), "a: shape: expected"),
    "a shape of truths": (file_of({"a": entry(0, 4, [True])}, bytes(4)), "a: shape: expected"),
    "a shape that is a word": (file_of({"a": entry(0, 16, "4")}), "a: shape: expected"),
    "twenty dimensions": (file_of({"a": entry(0, 4, [1] * 20)}, bytes(4)), "a: shape: expected up to 8"),
    "a shape that wraps": (file_of({"a": entry(0, 16, [2**62 + 1, 4])}), "a: data_offsets: 16 bytes cannot hold F32"),
    "negative offsets": (file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}), "a: data_offsets"),
    "offsets backwards": (file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}), "a: data_offsets"),
    "three offsets": (file_of({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}), "a: data_offsets"),
    "too few bytes": (file_of({"a": entry(0, 16, [5])}), "a: data_offsets: 16 bytes cannot hold F32 of shape"),
    "an overlap": (file_of({"a": entry(0, 12), "b": entry(8, 16)}), "b: data_offsets: it overlaps another tensor"),
    "the same bytes twice": (file_of({"a": entry(0, 16), "b": entry(0, 16)}), "b: data_offsets: it overlaps"),
    "a gap": (file_of({"a": entry(0, 4), "b": entry(8, 16)}), "b: data_offsets: it leaves a gap"),
    "a gap at the start": (file_of({"a": entry(4, 16)}), "a: data_offsets: it leaves a gap"),
    "cut short": (file_of({"a": entry(0, 32)}), "data: expected .* it is cut short"),
    "bytes left over": (file_of({"a": entry(0, 8)}), "data: expected .* followed by bytes that belong to no tensor"),
    "far past the end": (file_of({"a": entry(0, 2**62)}), "data: expected .* it is cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_with_file_and_field(tmp_path: Path, name):
    raw, message = HOSTILE[name]
    (tmp_path / SINGLE).write_bytes(raw)
    with pytest.raises(FileFormatError, match=rf"model\.safetensors: {message}") as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncation_at_every_byte(tmp_path: Path):
    write_safetensors(tmp_path / SINGLE, {"w": np.ones((2, 3), np.float32)}, "f32")
    raw = (tmp_path / SINGLE).read_bytes()
    for length in range(len(raw)):
        (tmp_path / SINGLE).write_bytes(raw[:length])
        with pytest.raises(FileFormatError, match=r"model\.safetensors: "):
            Checkpoint(tmp_path)


@given(st.binary(max_size=60), st.integers(0, 300))
def test_random_bytes_never_do_more_than_raise(tmp_path: Path, noise, at):
    write_safetensors(tmp_path / SINGLE, WEIGHTS, "f16")
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[:at] + noise + raw[at + len(noise) :])
    try:
        checkpoint = Checkpoint(tmp_path)
    except FileFormatError:
        return
    with checkpoint:
        for name, stored in checkpoint.tensors.items():
            assert stored.offset + stored.nbytes <= len(raw)
            if stored.dtype in ("BF16", "F16", "F32") and stored.nbytes:
                checkpoint.read(name)


def test_a_dtype_that_is_no_float_is_listed_but_not_read(tmp_path: Path):
    (tmp_path / SINGLE).write_bytes(file_of({"a": entry(0, 16, [16], "I8")}))
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(UnsupportedError, match=r"a: expected dtype .* found I8"):
        checkpoint.read("a")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path):
    write_safetensors(tmp_path / SINGLE, WEIGHTS, "f32")
    with Checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / SINGLE, 400)
        with pytest.raises(FileFormatError, match="taps: the file has become shorter"):
            checkpoint.read("taps")


# ---- folders


def index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write two shards, then edit their weight_map."""
    write_weights(folder, WEIGHTS, "f32", 2)
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("weight_map"), "index.json: weight_map: expected an object"),
        (lambda c: c.update(weight_map={}), "index.json: weight_map: expected an object"),
        (lambda c: c.update(weight_map=[FIRST]), "index.json: weight_map: expected an object"),
        (lambda c: c["weight_map"].update(vector="../model.safetensors"), "vector: '../model.safetensors' is no safet"),
        (lambda c: c["weight_map"].update(vector="/etc/x.safetensors"), "vector: '/etc/x.safetensors' is no safet"),
        (lambda c: c["weight_map"].update(vector="sub/x.safetensors"), "vector: 'sub/x.safetensors' is no safet"),
        (lambda c: c["weight_map"].update(vector="C:x.safetensors"), "vector: 'C:x.safetensors' is no safet"),
        (lambda c: c["weight_map"].update(vector="pytorch_model.bin"), "vector: 'pytorch_model.bin' is no safet"),
        (lambda c: c["weight_map"].update(vector=7), "vector: 7 is no safetensors file"),
        (lambda c: c["weight_map"].update(vector="x.safetensors"), "x.safetensors: vector: .* the file is missing"),
        (lambda c: c["weight_map"].update(taps=FIRST), "00002.safetensors: taps: is here, but .* places it in .*00001"),
        (lambda c: c["weight_map"].update(other=FIRST), "00001-of-00002.safetensors: other: .* but it is not"),
        (lambda c: c["weight_map"].pop("vector"), "00002-of-00002.safetensors: vector: is no tensor of"),
    ],
)  # fmt: skip
def test_indexes_that_do_not_fit_their_shards(tmp_path: Path, change, message):
    index(tmp_path, change)
    with pytest.raises(FileFormatError, match=message):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path):
    index(tmp_path, lambda c: None)
    write_safetensors(tmp_path / FIRST, WEIGHTS, "f32")
    with pytest.raises(FileFormatError, match=f"{FIRST}: vector: is here, but .* places it in {SECOND}"):
        Checkpoint(tmp_path)


def test_a_pointer_among_the_shards(tmp_path: Path):
    index(tmp_path, lambda c: None)
    (tmp_path / SECOND).write_bytes(LFS)
    with pytest.raises(FileFormatError, match=f"{SECOND}: file: this is a Git LFS pointer"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"model\.safetensors: file: is missing"),
        (["pytorch_model.bin"], r"pytorch_model\.bin: is a pickle: loading it can run any code"),
        (["weights.pt"], r"weights\.pt: is a pickle"),
        ([FIRST, SECOND], r"index\.json: file: is missing, and the folder holds shards"),
        ([SINGLE, INDEX], r"index\.json: file: model\.safetensors is there as well"),
    ],
)
def test_folders_without_one_clear_set_of_weights(tmp_path: Path, files, message):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(GriffinError, match=message):
        Checkpoint(tmp_path)


def test_weights_that_are_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(FileFormatError, match="is not a regular file"):
        Checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / SINGLE).symlink_to("nowhere")
    with pytest.raises(FileFormatError, match="is missing"):
        Checkpoint(tmp_path)


def test_cast_rounds_to_nearest_even():
    """The helper of these tests, against numbers worked out by hand."""
    values = np.array([1.0, 1.00390625, 1.01171875, 50.5, 50.596], np.float32)
    np.testing.assert_array_equal(cast(values, "bf16"), [0x3F80, 0x3F80, 0x3F82, 0x424A, 0x424A])
