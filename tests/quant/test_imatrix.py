import os
import struct
from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import griffins
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.quant.imatrix import Collection, Entry, ImportanceMatrix, merge, products
from griffin_gguf.quant.imatrix_statistics import statistics
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError

HP = griffins.tiny(hidden=8, mlp_width=12, lru_width=16, heads=2, head_width=4)
GATE = "blk.0.ssm_gate_i.weight"


def collected(seed: int = 0, tokens: int = 1024, collection: Collection | None = None) -> ImportanceMatrix:
    """A matrix of random sums for HP: two chunks of 512."""
    random = np.random.default_rng(seed)
    entries = {}
    for tensor in products(HP):
        shape = (tensor.shape[0] if len(tensor.shape) == 3 else 1, tensor.shape[-1])
        entries[tensor.name] = Entry(random.random(shape) * 1000 / 3, np.array([tokens]))
    return ImportanceMatrix(Path("a.gguf"), entries, ("a.txt",), 2, 512, collection)


def saved(path: Path, matrix: ImportanceMatrix) -> ImportanceMatrix:
    matrix.save(path)
    return ImportanceMatrix.load(path)


class _ForeignWriter(GGUFWriter):
    def add_architecture(self) -> None:
        pass


def foreign(path: Path, tensors: dict[str, NDArray[Any]], **changes: Any) -> Path:
    """A file as gguf-py writes it: keys may be replaced by `changes` (dots as `__`), or left out by None."""
    keys: dict[str, tuple[Any, GGUFValueType]] = {
        "general.type": ("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": (["wiki.txt"], GGUFValueType.ARRAY),
        "imatrix.chunk_count": (3, GGUFValueType.UINT32),
        "imatrix.chunk_size": (512, GGUFValueType.UINT32),
    } | {name.replace("__", "."): value for name, value in changes.items()}
    writer: Any = _ForeignWriter(path, "")
    for name, pair in keys.items():
        if pair is not None:
            writer.add_key_value(name, *pair)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def test_the_file_is_llama_cpps(tmp_path: Path) -> None:
    matrix = collected()
    matrix.save(tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[key].types == [GGUFValueType.UINT32]
    expected = [f"{name}{suffix}" for name in sorted(matrix.entries) for suffix in (".in_sum2", ".counts")]
    assert [tensor.name for tensor in reader.tensors] == expected
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert all(tensor.tensor_type.name == "F32" for tensor in reader.tensors)
    for name, entry in matrix.entries.items():
        assert found[f"{name}.in_sum2"].shape.tolist() == [entry.sums.size]
        assert found[f"{name}.in_sum2"].data.tolist() == entry.sums.astype(np.float32).reshape(-1).tolist()
        assert found[f"{name}.counts"].data.tolist() == [1024]


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    matrix = collected()
    found = saved(tmp_path / "m.gguf", matrix)
    assert found.importance("blk.0.ffn_gate.weight") == pytest.approx(
        matrix.entries["blk.0.ffn_gate.weight"].sums / 1024
    )
    assert found.importance("blk.0.ffn_norm.weight") is None
    gate = found.importance(GATE)
    assert gate is not None
    assert gate.shape == (1, 16)  # only the model says that this is two matrices
    fitted = found.fitted(HP).importance(GATE)
    assert fitted is not None
    assert fitted.dtype == np.float32
    assert fitted == pytest.approx(matrix.entries[GATE].sums / 1024)
    assert fitted.shape == (2, 8)
    found.fitted(HP).save(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_several_counts_and_none_at_all_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    sums, counts = f32(2, 4, 6, 8, 9, 10).reshape(3, 2), f32(2, 0, 5).reshape(3, 1)
    path = foreign(tmp_path / "m.gguf", {"x.weight.in_sum2": sums, "x.weight.counts": counts})
    found = ImportanceMatrix.load(path).importance("x.weight")
    assert found is not None
    assert found == pytest.approx(np.array([[1, 2], [1, 1], [1.8, 2]]))
    again = saved(tmp_path / "again.gguf", ImportanceMatrix.load(path))
    assert again.entries["x.weight"].counts.tolist() == [2, 0, 5]
    assert [t.shape.tolist() for t in GGUFReader(tmp_path / "again.gguf").tensors] == [[2, 3], [1, 3]]


ENTRY = {"x.weight.in_sum2": f32(1, 2, 3, 4), "x.weight.counts": f32(2)}
U32, F64 = GGUFValueType.UINT32, GGUFValueType.FLOAT64
COLLECTION = {
    "griffin__imatrix__model": ("m", GGUFValueType.STRING),
    "griffin__imatrix__text_sha256": ("t", GGUFValueType.STRING),
    "griffin__imatrix__chunks_total": (9, GGUFValueType.UINT64),
    "griffin__imatrix__nll": (0.0, F64),
    "griffin__imatrix__nll_squares": (0.0, F64),
    "griffin__imatrix__scored": (0, GGUFValueType.UINT64),
}
EXACT = {"x.weight.griffin_sums": np.array([1, 2, 3, 4], np.float64)}

#: field at fault, tensors, keys
HOSTILE: dict[str, tuple[str, dict[str, NDArray[Any]], dict[str, Any]]] = {
    "a model": ("general.type", ENTRY, {"general__type": ("model", GGUFValueType.STRING)}),
    "no type": ("general.type", ENTRY, {"general__type": None}),
    "a number as type": ("general.type", ENTRY, {"general__type": (1, U32)}),
    "no datasets": ("imatrix.datasets", ENTRY, {"imatrix__datasets": None}),
    "datasets of numbers": ("imatrix.datasets", ENTRY, {"imatrix__datasets": ([1], GGUFValueType.ARRAY)}),
    "no chunk count": ("imatrix.chunk_count", ENTRY, {"imatrix__chunk_count": None}),
    "a float as chunk count": ("imatrix.chunk_count", ENTRY, {"imatrix__chunk_count": (1.0, F64)}),
    "no chunk size": ("imatrix.chunk_size", ENTRY, {"imatrix__chunk_size": None}),
    "empty chunks": ("imatrix.chunk_size", ENTRY, {"imatrix__chunk_size": (0, U32)}),
    "no entries": ("tensors", {}, {}),
    "sums alone": ("x.weight.counts", {"x.weight.in_sum2": f32(1)}, {}),
    "counts alone": ("x.weight.in_sum2", {"x.weight.counts": f32(1)}, {}),
    "an unknown tensor": ("x.weight", ENTRY | {"x.weight": f32(1)}, {}),
    "no name": (".counts", ENTRY | {".counts": f32(1)}, {}),
    "wide sums": ("x.weight.in_sum2", ENTRY | {"x.weight.in_sum2": np.ones(4)}, {}),
    "counts as integers": ("x.weight.counts", ENTRY | {"x.weight.counts": np.ones(1, np.int32)}, {}),
    "a negative sum": ("x.weight.in_sum2", ENTRY | {"x.weight.in_sum2": f32(1, -1)}, {}),
    "an infinite sum": ("x.weight.in_sum2", ENTRY | {"x.weight.in_sum2": f32(1, np.inf)}, {}),
    "NaN": ("x.weight.in_sum2", ENTRY | {"x.weight.in_sum2": f32(1, np.nan)}, {}),
    "a negative count": ("x.weight.counts", ENTRY | {"x.weight.counts": f32(-1)}, {}),
    "half a token": ("x.weight.counts", ENTRY | {"x.weight.counts": f32(1.5)}, {}),
    "a count out of range": ("x.weight.counts", ENTRY | {"x.weight.counts": f32(1e30)}, {}),
    "counts that do not divide": ("x.weight.counts", ENTRY | {"x.weight.counts": f32(1, 1, 1)}, {}),
    "half a collection": ("griffin.imatrix.nll", ENTRY, COLLECTION | {"griffin__imatrix__nll": None}),
    "a bad score": ("griffin.imatrix.nll", ENTRY, COLLECTION | {"griffin__imatrix__nll": (float("nan"), F64)}),
    "a narrow total": ("griffin.imatrix.scored", ENTRY, COLLECTION | {"griffin__imatrix__scored": (1, U32)}),
    "exact sums of no collection": ("x.weight.griffin_sums", ENTRY | EXACT, {}),
    "exact sums that differ": (
        "x.weight.griffin_sums", ENTRY | {"x.weight.griffin_sums": np.array([1, 2, 3, 4.001])}, COLLECTION,
    ),
    "exact sums that are too few": ("x.weight.griffin_sums", ENTRY | {"x.weight.griffin_sums": np.ones(1)}, COLLECTION),
    "exact sums alone": ("x.weight.in_sum2", EXACT, COLLECTION),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_file_is_refused_by_its_field(tmp_path: Path, case: str) -> None:
    field, tensors, keys = HOSTILE[case]
    path = foreign(tmp_path / "m.gguf", tensors, **keys)
    with pytest.raises(FileFormatError) as caught:
        ImportanceMatrix.load(path)
    assert caught.value.field == field
    assert caught.value.path == path


def test_the_hostile_cases_start_from_files_that_load(tmp_path: Path) -> None:
    assert ImportanceMatrix.load(foreign(tmp_path / "a.gguf", ENTRY)).chunk_count == 3
    matrix = ImportanceMatrix.load(foreign(tmp_path / "b.gguf", ENTRY | EXACT, **COLLECTION))
    assert not matrix.complete
    assert matrix.collection == Collection("m", "t", 9)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_sound(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    content = bytearray(foreign(path, ENTRY | EXACT, **COLLECTION).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        matrix = ImportanceMatrix.load(path)
    except FileFormatError:
        return
    for name in matrix.entries:
        found = matrix.importance(name)
        assert found is not None
        assert np.isfinite(found).all()
        assert (found >= 0).all()


def test_the_old_format_is_named(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iif", 1, 1, 2.0))
    with pytest.raises(FileFormatError, match=r"old \.dat; expected a GGUF, which its llama-imatrix makes of it"):
        ImportanceMatrix.load(path)
    path.write_bytes(b"no matrix of any kind")
    with pytest.raises(FileFormatError, match="magic"):
        ImportanceMatrix.load(path)
    with pytest.raises(FileFormatError, match="cannot be read"):
        ImportanceMatrix.load(tmp_path / "absent.gguf")


def test_an_entry_must_be_a_product_of_the_model() -> None:
    matrix = collected()
    for name, fault in (
        ("blk.0.attn_q.weight", "is no matrix product"),  # layer 0 is recurrent
        ("output_norm.weight", "is no matrix product"),
        ("blk.0.ffn_up.weight", "expected 1 × 8 sums, as the model has it, found 9"),
    ):
        wrong = replace(matrix, entries={**matrix.entries, name: Entry(np.ones((1, 9)), np.array([1]))})
        with pytest.raises(FileFormatError, match=fault) as caught:
            wrong.fitted(HP)
        assert caught.value.field == name
    wrong = replace(matrix, entries={GATE: Entry(np.ones((4, 4)), np.ones(4, np.int64))})
    with pytest.raises(FileFormatError, match="expected 1 or 2 counts, found 4"):
        wrong.fitted(HP)


def test_weights_without_an_entry_are_named() -> None:
    matrix = collected()
    assert matrix.missing(HP) == []
    entries = {name: entry for name, entry in matrix.entries.items() if not name.endswith("ffn_up.weight")}
    assert replace(matrix, entries=entries).missing(HP) == [f"blk.{i}.ffn_up.weight" for i in range(HP.layers)]
    untied = replace(HP, untied=True)
    assert matrix.missing(untied) == ["output.weight"]
    with pytest.raises(FileFormatError, match=r"token_embd\.weight: is no matrix product"):
        matrix.fitted(untied)


def test_merging_adds(tmp_path: Path) -> None:
    a, b = collected(0), replace(collected(1, tokens=512), datasets=("b.txt",), chunk_count=1)
    # One read from a file, the other as it was collected: the rows of gates differ.
    whole = merge([saved(tmp_path / "a.gguf", a), b], tmp_path / "c.gguf")
    assert whole.datasets == ("a.txt", "b.txt")
    assert whole.chunk_count == 3
    assert whole.chunk_size == 512
    for name in a.entries:
        assert whole.importance(name) == pytest.approx((a.entries[name].sums + b.entries[name].sums) / 1536)
    assert saved(tmp_path / "c.gguf", whole).entries.keys() == a.entries.keys()


def test_merging_one_count_with_several() -> None:
    one = ImportanceMatrix(Path("a"), {"x": Entry(np.array([[1.0, 2, 3, 4]]), np.array([4]))}, (), 1, 8)
    two = ImportanceMatrix(Path("b"), {"x": Entry(np.ones((2, 2)), np.array([1, 0]))}, (), 1, 8)
    for order in ([one, two], [two, one]):
        entry = merge(order, Path("c")).entries["x"]
        assert entry.sums.tolist() == [[2, 3], [4, 5]]
        assert entry.counts.tolist() == [5, 4]
    three = replace(two, path=Path("d"), entries={"x": Entry(np.ones((4, 1)), np.ones(4, np.int64))})
    with pytest.raises(UnsupportedError, match="d: x: expected 2 counts as in b, found 4"):
        merge([two, three], Path("c"))


def _without(name: str) -> Callable[[ImportanceMatrix], ImportanceMatrix]:
    return lambda m: replace(m, entries={n: e for n, e in m.entries.items() if n != name})


def _with(name: str, entry: Entry) -> Callable[[ImportanceMatrix], ImportanceMatrix]:
    return lambda m: replace(m, entries={**m.entries, name: entry})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: replace(m, chunk_size=256), "imatrix.chunk_size: expected 512 as in a.gguf, found 256"),
        (_without(GATE), f"{GATE}: is missing"),
        (_with("blk.9.ffn_up.weight", Entry(np.ones((1, 8)), np.ones(1, np.int64))), "is too many"),
        (_with(GATE, Entry(np.ones((1, 8)), np.ones(1, np.int64))), "expected 16 sums as in a.gguf, found 8"),
        (lambda m: replace(m, chunk_count=2**32 - 1), "do not fit the format"),
    ],
)
def test_merging_refuses_what_does_not_belong_together(
    change: Callable[[ImportanceMatrix], ImportanceMatrix], fault: str
) -> None:
    other = change(replace(collected(1), path=Path("b.gguf")))
    with pytest.raises(UnsupportedError, match=fault.replace(".", r"\.")) as caught:
        merge([collected(), other], Path("c"))
    assert str(caught.value).startswith("b.gguf: ")


def test_an_unfinished_file_keeps_its_sums_exactly(tmp_path: Path) -> None:
    begun = Collection("model", "text", 3, nll=1 / 3, nll_squares=0.1, scored=7)
    matrix = collected(collection=begun)
    assert not matrix.complete
    found = saved(tmp_path / "m.gguf", matrix).fitted(HP)
    assert found.collection == begun
    assert all((found.entries[name].sums == matrix.entries[name].sums).all() for name in matrix.entries)
    assert {t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors} == {"F32", "F64"}
    done = saved(tmp_path / "m.gguf", replace(matrix, chunk_count=3))
    assert done.complete
    assert {t.tensor_type.name for t in GGUFReader(tmp_path / "m.gguf").tensors} == {"F32"}


def test_sums_that_float32_cannot_hold_are_not_written(tmp_path: Path) -> None:
    matrix = _with(GATE, Entry(np.full((2, 8), 1e39), np.array([1])))(collected())
    with pytest.raises(GriffinError, match=f"{GATE}: its sums are too large"):
        matrix.save(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_without_datasets_the_file_says_so(tmp_path: Path) -> None:
    assert saved(tmp_path / "m.gguf", replace(collected(), datasets=())).datasets == ("unknown",)


def test_statistics_by_their_definitions() -> None:
    x = np.array([0.0, 1e-5, 2, 2, 20])
    entries = {
        "blk.0.ffn_up.weight": Entry(2 * x[None], np.array([2])),
        "blk.3.ffn_up.weight": Entry(np.array([[0.0, 0, 3, 4, 0]]), np.array([1])),
        "token_embd.weight": Entry(np.zeros((1, 4)), np.array([8])),
        "blk.0.unseen.weight": Entry(np.zeros((1, 4)), np.array([0])),
        "blk.1.experts.weight": Entry(np.array([[8.0, 8], [5, 5]]), np.array([4, 0])),
    }
    rows = {row.name: row for row in statistics(ImportanceMatrix(Path("m"), entries, (), 1, 2))}
    assert list(rows) == ["blk.0.ffn_up.weight", "blk.3.ffn_up.weight", "blk.1.experts.weight", "token_embd.weight"]
    row = rows["blk.0.ffn_up.weight"]
    p = x[1:] / x.sum()
    assert (row.elements, row.minimum, row.maximum) == (5, 0, 20)
    assert row.total == pytest.approx(x.sum())
    assert row.mean == pytest.approx(x.mean())
    assert row.stddev == pytest.approx(x.std())
    assert row.active == pytest.approx(3 / 5)
    assert row.entropy == pytest.approx(-(p * np.log2(p)).sum())
    assert row.entropy_normalized == pytest.approx(row.entropy / log2(5))
    assert row.zd == pytest.approx(1 / 5)
    assert row.cosine is None
    later = rows["blk.3.ffn_up.weight"]
    assert later.cosine == pytest.approx((2 * 3 + 2 * 4) / (np.linalg.norm(x) * 5))
    assert rows["blk.1.experts.weight"].elements == 2
    assert rows["blk.1.experts.weight"].entropy_normalized == pytest.approx(1)
    dead = rows["token_embd.weight"]
    assert (dead.total, dead.active, dead.entropy, dead.zd, dead.cosine) == (0, 0, 0, 0, None)


def test_a_pipe_is_no_matrix_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="pipe: file: is not a regular file"):
        ImportanceMatrix.load(tmp_path / "pipe")
