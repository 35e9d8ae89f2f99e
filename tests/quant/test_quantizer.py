import os
import re
from dataclasses import replace
from pathlib import Path

import griffins
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from griffin_gguf.quant.encode import encode, encoder
from griffin_gguf.quant.file_types import FILE_TYPES, Metadata, file_type
from griffin_gguf.quant.imatrix import Entry, ImportanceMatrix
from griffin_gguf.quant.overrides import TensorTypes
from griffin_gguf.quant.quantizer import Settings, dry_run, quantize
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime.arch import CHECKSUMS
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile

HP = griffins.tiny()
WEIGHTS = griffins.weights(HP)
IMPORTANCE = griffins.importance(HP)
IMATRIX = ImportanceMatrix(
    Path("tiny.imatrix.gguf"),
    {name: Entry(values.astype(np.float64) * 64, np.array([64])) for name, values in IMPORTANCE.items()},
    ("a text",),
    2,
    32,
)
EXTRA: Metadata = {
    "general.name": ("Tiny", GGUFValueType.STRING, None),
    "tokenizer.ggml.tokens": (["<pad>", "a", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "tokenizer.ggml.scores": ([0.0, -1.5, 2.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
    "tokenizer.ggml.bos_token_id": (2, GGUFValueType.UINT32, None),
    "tokenizer.ggml.add_bos_token": (True, GGUFValueType.BOOL, None),
    "other.number": (-3, GGUFValueType.INT16, None),
}


def gguf(path: Path, name: str = "F32", weights: griffins.Weights = WEIGHTS) -> Path:
    recipe = file_type(name)
    keys = griffins.metadata(HP) | EXTRA | recipe.metadata
    write([Output(path, keys, plan(HP, recipe))], encoder(griffins.reader(weights)))
    return path


@pytest.mark.parametrize("name", FILE_TYPES)
def test_the_plan_is_exact_and_the_bytes_are_ggmls(tmp_path: Path, name: str) -> None:
    source, target = gguf(tmp_path / "source.gguf"), tmp_path / "made.gguf"
    settings = Settings(imatrix=IMATRIX)
    planned = dry_run(source, name.lower(), settings, target=target)
    made = quantize(source, target, name, settings)
    assert made == planned
    assert planned.size == (tmp_path / "made.gguf").stat().st_size
    with GgufFile.open(tmp_path / "made.gguf") as file:
        assert planned.bits_per_weight == 8 * sum(i.nbytes for i in file.tensors.values()) / HP.parameters
        for row in planned.tensors:
            info = file.tensors[row.tensor.name]
            assert (info.type, info.nbytes, info.shape) == (row.type, row.nbytes, row.tensor.shape)
            whole, weights = WEIGHTS[info.name], IMPORTANCE.get(info.name)
            if weights is None:
                expected = encode(row.type, whole.reshape(-1, row.columns))
            else:
                matrices = zip(whole.reshape(len(weights), -1, row.columns), weights, strict=True)
                expected = np.concatenate([encode(row.type, matrix, one) for matrix, one in matrices])
            assert file.data(info.name).tobytes() == expected.tobytes()


def test_keys_are_copied_as_they_are(tmp_path: Path) -> None:
    source = gguf(tmp_path / "source.gguf", "BF16")
    quantize(source, tmp_path / "made.gguf", "Q4_K_M")
    with GgufFile.open(source) as before, GgufFile.open(tmp_path / "made.gguf") as after:
        assert before.metadata["general.file_type"] == 32
        assert {**after.metadata, CHECKSUMS: 0} == {
            **before.metadata, "general.file_type": 15, "general.quantization_version": 2, CHECKSUMS: 0
        }  # fmt: skip
        assert after.types == before.types


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_half_precision_sources(tmp_path: Path, name: str) -> None:
    source = gguf(tmp_path / "source.gguf", name)
    quantize(source, tmp_path / "made.gguf", "Q5_K_M")
    type = file_type(name).default
    with GgufFile.open(tmp_path / "made.gguf") as file:
        rounded = dequantize(encode(type, WEIGHTS["blk.0.ssm_x.weight"]), type)
        assert file.data("blk.0.ssm_x.weight").tobytes() == encode(T.Q5_K, rounded).tobytes()


def test_a_quantized_source_needs_leave(tmp_path: Path) -> None:
    source = gguf(tmp_path / "source.gguf", "Q8_0")
    target = tmp_path / "made.gguf"
    for attempt in (lambda: quantize(source, target, "Q4_K_M"), lambda: dry_run(source, "Q4_K_M", target=target)):
        with pytest.raises(UnsupportedError, match=r"source\.gguf: token_embd\.weight: is quantized already \(Q8_0\)"):
            attempt()
    assert not target.exists()
    leave = Settings(allow_requantize=True)
    assert dry_run(source, "Q4_K_M", leave, target=target) == quantize(source, target, "Q4_K_M", leave)


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    source = gguf(tmp_path / "source.gguf")
    before = source.read_bytes()
    (tmp_path / "soft.gguf").symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    for name in ("source.gguf", "soft.gguf", "hard.gguf"):
        with pytest.raises(GriffinError, match="is the input as well"):
            quantize(source, tmp_path / name, "Q8_0")
    assert source.read_bytes() == before


def test_another_alignment(tmp_path: Path) -> None:
    foreign = GGUFWriter(tmp_path / "source.gguf", "recurrentgemma")
    foreign.add_custom_alignment(256)
    for name, (value, kind, element) in griffins.metadata(HP).items():
        if name != "general.architecture":
            foreign.add_key_value(name, value, kind, element)
    for name, values in WEIGHTS.items():
        foreign.add_tensor(name, values)
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.write_tensors_to_file()
    foreign.close()
    quantize(tmp_path / "source.gguf", tmp_path / "made.gguf", "F32")
    with GgufFile.open(tmp_path / "made.gguf") as file:
        assert "general.alignment" not in file.metadata
        for name, values in WEIGHTS.items():
            assert file.data(name).tobytes() == values.tobytes()


def test_bad_weights_name_file_and_tensor(tmp_path: Path) -> None:
    bad = dict(WEIGHTS) | {"blk.2.attn_q.weight": np.full_like(WEIGHTS["blk.2.attn_q.weight"], 1e5)}
    source = gguf(tmp_path / "source.gguf", "F32", bad)
    with pytest.raises(FileFormatError, match=r"source\.gguf: blk\.2\.attn_q\.weight: holds 100000, and F16 ends"):
        quantize(source, tmp_path / "made.gguf", "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_bad_requests(tmp_path: Path) -> None:
    source = gguf(tmp_path / "source.gguf")
    with pytest.raises(UnsupportedError, match="'Q9' is no file type"):
        quantize(source, tmp_path / "made.gguf", "Q9")
    with pytest.raises(GriffinError, match=r"the folder .* does not exist"):
        quantize(source, tmp_path / "none" / "made.gguf", "Q8_0")
    with pytest.raises(FileFormatError, match=r"none\.gguf"):
        quantize(tmp_path / "none.gguf", tmp_path / "made.gguf", "Q8_0")
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match=r"source\.gguf"):
        quantize(source, tmp_path / "made.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_fallbacks_are_listed(tmp_path: Path) -> None:
    hp = griffins.tiny(mlp_width=544)
    source = tmp_path / "source.gguf"
    recipe = file_type("F32")
    keys = griffins.metadata(hp) | recipe.metadata
    write([Output(source, keys, plan(hp, recipe))], encoder(griffins.reader(griffins.weights(hp))))
    notes = dry_run(source, "Q4_K_M", target=tmp_path / "made.gguf").notes
    assert [note.split(": ")[0] for note in notes] == [f"blk.{i}.ffn_down.weight" for i in range(5)]
    assert "Q8_0 instead of Q6_K, whose blocks of 256 do not divide rows of 544" in notes[2]


def types_in(path: Path) -> dict[str, T]:
    with GgufFile.open(path) as file:
        return {name: info.type for name, info in file.tensors.items()}


def test_the_keys_of_an_importance_matrix(tmp_path: Path) -> None:
    source = gguf(tmp_path / "source.gguf")
    quantize(source, tmp_path / "made.gguf", "Q4_K_M", Settings(imatrix=IMATRIX))
    with GgufFile.open(tmp_path / "made.gguf") as file:
        found = {name: value for name, value in file.metadata.items() if name.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": "tiny.imatrix.gguf",
        "quantize.imatrix.dataset": "a text",
        "quantize.imatrix.entries_count": len(IMPORTANCE),
        "quantize.imatrix.chunks_count": 2,
    }
    leave = Settings(allow_requantize=True)
    quantize(tmp_path / "made.gguf", tmp_path / "again.gguf", "Q2_K", leave)
    with GgufFile.open(tmp_path / "again.gguf") as file:
        assert not any(name.startswith("quantize.") for name in file.metadata)


def test_types_that_need_an_importance_matrix_are_refused_without(tmp_path: Path) -> None:
    source, target = gguf(tmp_path / "source.gguf"), tmp_path / "made.gguf"
    wanted = r"blk\.0\.ssm_x\.weight: IQ2_XS in a file of type IQ2_XS needs an importance matrix, which griffin imatrix"
    with pytest.raises(UnsupportedError, match=wanted):
        quantize(source, target, "IQ2_XS")
    assert any("needs an importance matrix" in note for note in dry_run(source, "IQ2_XS", target=target).notes)
    partial = replace(IMATRIX, entries={n: e for n, e in IMATRIX.entries.items() if n != "blk.3.ffn_up.weight"})
    with pytest.raises(UnsupportedError, match=r"^blk\.3\.ffn_up\.weight: IQ2_XS"):
        quantize(source, target, "IQ2_XS", Settings(imatrix=partial))
    other = replace(IMATRIX, entries={"blk.9.ffn_up.weight": IMATRIX.entries["blk.0.ffn_up.weight"]})
    with pytest.raises(FileFormatError, match=r"tiny\.imatrix\.gguf: blk\.9\.ffn_up\.weight"):
        quantize(source, target, "Q4_K_M", Settings(imatrix=other))
    assert not target.exists()


def test_chosen_types(tmp_path: Path) -> None:
    source, target = gguf(tmp_path / "source.gguf"), tmp_path / "made.gguf"
    chosen = TensorTypes((("ffn_up", T.Q8_0), (r"blk\.[01]\.", T.Q6_K)), embedding=T.Q5_K)
    plain = {row.tensor.name: row.type for row in plan(HP, file_type("Q4_K_M"))}
    quantize(source, target, "Q4_K_M", Settings(chosen))
    for name, type in types_in(target).items():
        if plain[name] is T.F32:
            assert type is T.F32
        elif name == "token_embd.weight":
            assert type is T.Q5_K
        elif "ffn_up" in name:
            assert type is T.Q8_0
        else:
            assert type is (T.Q6_K if name.startswith(("blk.0.", "blk.1.")) else plain[name])
    with GgufFile.open(target) as file:
        assert re.fullmatch(r"Q4_K_M, \d+ tensors in other types", file.metadata["griffin.recipe"])
    with pytest.raises(UnsupportedError, match=r"--tensor-type attn_norm=Q8_0: is in no name of a tensor to quantize"):
        quantize(source, target, "Q4_K_M", Settings(TensorTypes((("attn_norm", T.Q8_0),))))


def test_what_has_its_type_already_is_copied(tmp_path: Path) -> None:
    source, target = gguf(tmp_path / "source.gguf", "Q8_0"), tmp_path / "made.gguf"
    quantize(source, target, "Q8_0")  # no leave needed: nothing is quantized again
    assert target.read_bytes() == source.read_bytes()
    keys = ["recurrentgemma.context_length=int:77", "my.note=str:a=b:c"]
    parts = quantize(source, tmp_path / "parts.gguf", "copy", Settings(keys=keys, max_bytes=500_000)).paths
    assert len(parts) > 2
    assert parts[0].name == f"parts-00001-of-{len(parts):05}.gguf"
    with GgufFile.open(parts[0]) as file, GgufFile.open(source) as before:
        assert file.metadata == before.metadata | {"recurrentgemma.context_length": 77, "my.note": "a=b:c"}
        assert all(file.data(name).tobytes() == before.data(name).tobytes() for name in before.tensors)
    quantize(parts[0], target, "COPY", Settings(keys=[f"recurrentgemma.context_length=int:{HP.context}"]))
    assert types_in(target) == types_in(source)
    with pytest.raises(UnsupportedError, match="COPY leaves every tensor as it is"):
        quantize(source, target, "COPY", Settings(TensorTypes(pure=True)))


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source, target = gguf(tmp_path / "source.gguf"), tmp_path / "made.gguf"
    whole = source.read_bytes()

    def cut(done: int, total: int) -> None:
        os.truncate(source, len(whole) // 2)

    def touch(done: int, total: int) -> None:
        with source.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        os.utime(source, ns=(0, done))

    for change, problem in ((cut, "has become shorter while it was read"), (touch, "was changed while it was read")):
        source.write_bytes(whole)
        with pytest.raises(FileFormatError, match=rf"source\.gguf: .*{problem}"):
            quantize(source, target, "Q8_0", threads=1, progress=change)
        assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_damaged_scales_are_not_passed_on(tmp_path: Path) -> None:
    source, target = gguf(tmp_path / "source.gguf", "Q8_0"), tmp_path / "made.gguf"
    with GgufFile.open(source) as file:
        at = file.tensors["blk.2.attn_q.weight"].offset
    data = bytearray(source.read_bytes())
    data[at + 34 * 5 : at + 34 * 5 + 2] = b"\x00\x7e"  # the sixth block's scale
    source.write_bytes(data)
    for name in ("COPY", "Q4_K_M"):
        with pytest.raises(
            FileFormatError, match=r"blk\.2\.attn_q\.weight: holds NaN or infinity: d is NaN in block 5"
        ):
            quantize(source, target, name, Settings(allow_requantize=True))
    assert not target.exists()


def test_nothing_that_is_read_is_overwritten(tmp_path: Path) -> None:
    source, matrix = gguf(tmp_path / "source.gguf"), tmp_path / "matrix.gguf"
    IMATRIX.save(matrix)
    before = matrix.read_bytes()
    settings = Settings(imatrix=ImportanceMatrix.load(matrix))
    for attempt in (quantize, dry_run):
        for target in (source, matrix):
            with pytest.raises(GriffinError, match=f"{target.name}: is the input as well"):
                attempt(source, target=target, type="Q8_0", settings=settings)
    assert matrix.read_bytes() == before


def test_what_a_matrix_lacks_is_told(tmp_path: Path) -> None:
    source, target = gguf(tmp_path / "source.gguf"), tmp_path / "made.gguf"
    lacking = replace(IMATRIX, entries={n: e for n, e in IMATRIX.entries.items() if n != "blk.3.ffn_up.weight"})
    notes = quantize(source, target, "Q4_K_M", Settings(imatrix=lacking)).notes
    assert notes == ["blk.3.ffn_up.weight: is not in tiny.imatrix.gguf: its errors are not weighed"]
    assert quantize(source, target, "Q4_K_M", Settings(imatrix=IMATRIX)).notes == []
    untied = griffins.tiny(untied=True)  # nothing is multiplied with its embedding, so no matrix has it
    recipe = file_type("F32")
    keys = griffins.metadata(untied) | recipe.metadata
    other = tmp_path / "untied.gguf"
    write([Output(other, keys, plan(untied, recipe))], encoder(griffins.reader(griffins.weights(untied))))
    renamed = {n.replace("token_embd", "output"): e for n, e in IMATRIX.entries.items()}
    matrix = replace(IMATRIX, entries=renamed)
    assert quantize(other, target, "Q4_K_M", Settings(imatrix=matrix)).notes == []
    for name in ("BF16", "F32"):
        quantize(source, target, name, Settings(imatrix=IMATRIX))
        with GgufFile.open(target) as file:
            assert not any(key.startswith("quantize.") for key in file.metadata)
    with pytest.raises(UnsupportedError, match="neither types nor an imatrix go with it"):
        quantize(source, target, "COPY", Settings(imatrix=IMATRIX))
