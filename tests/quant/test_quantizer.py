from pathlib import Path

import griffins
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from griffin_gguf.quant.encode import encode
from griffin_gguf.quant.quantizer import dry_run, quantize
from griffin_gguf.quant.recipes import FILE_TYPES, Metadata, file_type, plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile

HP = griffins.tiny()
WEIGHTS = griffins.weights(HP)
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
    write([Output(path, keys, plan(HP, recipe))], griffins.reader(weights))
    return path


@pytest.mark.parametrize("name", FILE_TYPES)
def test_the_plan_is_exact_and_the_bytes_are_ggmls(tmp_path: Path, name: str) -> None:
    source = gguf(tmp_path / "source.gguf")
    planned = dry_run(source, name.lower())
    made = quantize(source, tmp_path / "made.gguf", name)
    assert made == planned
    assert planned.size == (tmp_path / "made.gguf").stat().st_size
    with GgufFile.open(tmp_path / "made.gguf") as file:
        assert planned.bits_per_weight == 8 * sum(i.nbytes for i in file.tensors.values()) / HP.parameters
        for row in planned.tensors:
            info = file.tensors[row.tensor.name]
            whole = WEIGHTS[info.name].reshape(-1, row.columns)
            assert (info.type, info.nbytes, info.shape) == (row.type, row.nbytes, row.tensor.shape)
            assert file.data(info.name).tobytes() == encode(row.type, whole).tobytes()


def test_keys_are_copied_as_they_are(tmp_path: Path) -> None:
    source = gguf(tmp_path / "source.gguf", "BF16")
    quantize(source, tmp_path / "made.gguf", "Q4_K_M")
    with GgufFile.open(source) as before, GgufFile.open(tmp_path / "made.gguf") as after:
        assert before.metadata["general.file_type"] == 32
        assert after.metadata == before.metadata | {"general.file_type": 15, "general.quantization_version": 2}
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
    for attempt in (lambda: quantize(source, tmp_path / "made.gguf", "Q4_K_M"), lambda: dry_run(source, "Q4_K_M")):
        with pytest.raises(UnsupportedError, match=r"source\.gguf: token_embd\.weight: is quantized already \(Q8_0\)"):
            attempt()
    assert not (tmp_path / "made.gguf").exists()
    assert dry_run(source, "Q4_K_M", allow_requantize=True) == quantize(
        source, tmp_path / "made.gguf", "Q4_K_M", allow_requantize=True
    )


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
    write([Output(source, keys, plan(hp, recipe))], griffins.reader(griffins.weights(hp)))
    notes = dry_run(source, "Q4_K_M").notes
    assert [note.split(": ")[0] for note in notes] == [f"blk.{i}.ffn_down.weight" for i in range(5)]
    assert "Q8_0 instead of Q6_K, whose blocks of 256 do not divide rows of 544" in notes[2]
