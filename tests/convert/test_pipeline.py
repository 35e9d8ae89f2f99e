import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import SHAPES, cast, random_checkpoint, random_weights, write_weights

from griffin_gguf.convert import convert
from griffin_gguf.convert.checkpoint import INDEX, SINGLE, Checkpoint
from griffin_gguf.convert.transforms import decay
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize
from griffin_gguf.runtime.tokenizer import Tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5000000000\n"


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with GgufFile.open(path) as file:
        file.hyperparameters()
        return {
            name: dequantize(info, file.data(name)).reshape(info.shape).copy() for name, info in file.tensors.items()
        }


# ---- what comes out


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_of_every_shape(tmp_path: Path, name):
    """F32 files against the checkpoint's own tensors, each mapped here by hand."""
    folder = random_checkpoint(tmp_path / "c", **SHAPES[name])
    convert(folder, [(tmp_path / "m.gguf", "f32")])
    found = tensors_of(tmp_path / "m.gguf")
    with Checkpoint(folder) as stored:
        source = {n: stored.read(n).reshape(t.shape) for n, t in stored.tensors.items()}
    pairs = {
        "token_embd.weight": source.pop("model.embed_tokens.weight"),
        "output_norm.weight": 1 + source.pop("model.final_norm.weight"),
    }
    if "lm_head.weight" in source:
        pairs["output.weight"] = source.pop("lm_head.weight")
    names = {"temporal_pre_norm": "attn_norm", "channel_pre_norm": "ffn_norm", "mlp_block.gate_proj": "ffn_gate",
             "mlp_block.up_proj": "ffn_up", "mlp_block.down_proj": "ffn_down", "temporal_block.q_proj": "attn_q",
             "temporal_block.k_proj": "attn_k", "temporal_block.v_proj": "attn_v",
             "temporal_block.o_proj": "attn_output", "temporal_block.linear_x": "ssm_x",
             "temporal_block.linear_y": "ssm_y", "temporal_block.linear_out": "ssm_out",
             "temporal_block.conv_1d": "ssm_conv1d"}  # fmt: skip
    for full, value in source.items():
        _, _, layer, rest = full.split(".", 3)
        short, _, kind = rest.rpartition(".")
        if kind == "recurrent_param":
            pairs[f"blk.{layer}.ssm_a"] = decay(value)
        elif short == "temporal_block.rg_lru":
            gate, part = kind.split("_gate_")
            mapped = value.transpose(0, 2, 1) if part == "weight" else value.reshape(-1)
            pairs[f"blk.{layer}.ssm_gate_{gate[0]}.{part}"] = mapped
        else:
            mapped = 1 + value if short.endswith("norm") else value[:, 0, :] if value.ndim == 3 else value
            pairs[f"blk.{layer}.{names[short]}.{kind}"] = mapped
    assert set(found) == set(pairs)
    for tensor, expected in pairs.items():
        np.testing.assert_array_equal(found[tensor], expected, err_msg=tensor)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 4])
def test_dtypes_and_shards_change_nothing_but_rounding(tmp_path: Path, dtype, shards):
    convert(random_checkpoint(tmp_path / "c", dtype=dtype, shards=shards), [(tmp_path / "m.gguf", "F32")])
    found = tensors_of(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    exact = random_weights(config, np.random.default_rng(0))["model.layers.0.mlp_block.up_proj.weight"]
    rounded = cast(exact, dtype)
    expected = (rounded.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else rounded.astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_one_pass_writes_all_files_each_as_alone(tmp_path: Path, monkeypatch):
    folder = random_checkpoint(tmp_path / "c", hidden_size=256, lru_width=256, intermediate_size=512)
    types = ["F32", "bf16", "F16", "q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"]
    targets = [(tmp_path / f"{name}.gguf", name) for name in types]
    rows: dict[str, int] = {}
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Any:
        found = read(self, name, start, stop)
        rows[name] = rows.get(name, 0) + len(found)
        return found

    monkeypatch.setattr(Checkpoint, "read", counted)
    assert convert(folder, targets) == [path for path, _ in targets]
    with Checkpoint(folder) as stored:
        assert rows == {name: tensor.rows for name, tensor in stored.tensors.items()}
    for path, name in targets:
        convert(folder, [(tmp_path / "alone.gguf", name)])
        assert (tmp_path / "alone.gguf").read_bytes() == path.read_bytes()


def test_progress_ends_at_the_total(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    folder = random_checkpoint(tmp_path / "c")
    convert(folder, [(tmp_path / "m.gguf", "F16")], progress=lambda done, total: seen.append((done, total)))
    with GgufFile.open(tmp_path / "m.gguf") as file:
        total = 4 * file.hyperparameters().parameters
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("spelling", ["block_types", "_block_types"])
@pytest.mark.parametrize("pattern", [["attention", "recurrent", "recurrent"], ["recurrent", "attention"]])
def test_both_spellings_of_any_pattern(tmp_path: Path, spelling, pattern):
    folder = random_checkpoint(tmp_path / "c", spelling=spelling, block_types=pattern, num_hidden_layers=5)
    convert(folder, [(tmp_path / "m.gguf", "F16")])
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert [("recurrent" if r else "attention") for r in file.hyperparameters().recurrent] == (pattern * 5)[:5]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("lm_head", "untied"), [("none", False), ("same", False), ("different", True)])
def test_the_head_by_its_weights(tmp_path: Path, lm_head, untied, tied):
    folder = random_checkpoint(tmp_path / "c", lm_head=lm_head, tie_word_embeddings=tied)
    if lm_head == "none" and not tied:
        with pytest.raises(GriffinError, match=r"lm_head\.weight: the tensor is missing, .* tie_word_embeddings"):
            convert(folder, [(tmp_path / "m.gguf", "F16")])
        return
    convert(folder, [(tmp_path / "m.gguf", "F16")])
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.hyperparameters().untied is untied
        assert ("output.weight" in file.tensors) is untied


def test_keys(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "my-griffin")
    (folder / "README.md").write_text("---\ntags:\n- x\nlicense: cc-by-4.0\n---\nlicense: none\n")
    convert(folder, [(tmp_path / "m.gguf", "q8_0")])
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert Tokenizer.from_gguf(file.path, file.metadata).vocab_size == 384
        general = {name: value for name, value in file.metadata.items() if name.startswith("general.")}
        kinds = {name: file.types[name][0] for name in general}
    assert general == {
        "general.architecture": "recurrentgemma", "general.type": "model", "general.name": "my-griffin",
        "general.size_label": "155K", "general.license": "cc-by-4.0",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0, "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }  # fmt: skip
    assert kinds["general.file_type"] is kinds["general.quantization_version"] is gguf.GGUFValueType.UINT32
    oracle = gguf.GGUFReader(tmp_path / "m.gguf")
    assert oracle.fields["recurrentgemma.embedding_length"].contents() == 64
    assert oracle.fields["tokenizer.ggml.tokens"].contents(1) == "<eos>"


def test_a_folder_whose_name_is_no_text(tmp_path: Path):
    folder = random_checkpoint(tmp_path / os.fsdecode(b"gr\xff"))
    convert(folder, [(tmp_path / "m.gguf", "F16")])
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.metadata["general.name"] == "gr\ufffd"


# ---- what does not


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    """Change a JSON file of the folder; `...` takes a field out."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return apply


def weights(change: Callable[[dict[str, np.ndarray]], object], dtype: str = "f32") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = random_weights(json.loads((folder / "config.json").read_text()), np.random.default_rng(0))
        change(found)
        write_weights(folder, found, dtype)

    return apply


def put(name: str, value: float, index: tuple[int, ...]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda w: w[name].__setitem__(index, value)


def replace(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def index_of(shard: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))

    return apply


def cut(folder: Path) -> None:
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1)


def i8(folder: Path) -> None:
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw.replace(b'"dtype": "BF16", "shape": [64]', b'"dtype": "I16" , "shape": [64]', 1))


UP, LAMBDA, NORM = (
    f"model.layers.0.{n}"
    for n in ("mlp_block.up_proj.weight", "temporal_block.rg_lru.recurrent_param", "temporal_pre_norm.weight")
)
NAN, INF = float("nan"), float("inf")
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: file: is missing"),
    "another model": (edit("config.json", model_type="llama"), r"config\.json: model_type: only 'recurrent_gemma'"),
    "an unknown field": (edit("config.json", moe=True), r"config\.json: moe: is a field that we do not know"),
    "no weights": (lambda f: (f / SINGLE).unlink(), r"model\.safetensors: file: is missing"),
    "pickles": (only_pickles, r"pytorch_model\.bin: is a pickle"),
    "a pointer": (replace(SINGLE, LFS), r"model\.safetensors: file: this is a Git LFS pointer"),
    "a pointer for a config": (replace("config.json", LFS), r"config\.json: file: this is a Git LFS pointer"),
    "cut weights": (cut, r"model\.safetensors: data: expected .* cut short"),
    "a missing shard": (index_of("b.safetensors"), r"b\.safetensors: a: .* the file is missing"),
    "an index out of the folder": (
        index_of("../b.safetensors"), r"index\.json: a: '\.\./b\.safetensors' is no safetensors file of this folder"),
    "a missing tensor": (weights(lambda w: w.pop(UP)), f"{UP}: the tensor is missing"),
    "an unknown tensor": (weights(lambda w: w.update(extra=w[UP])), r"model\.safetensors: extra: is no tensor of this"),
    "a wrong shape": (weights(lambda w: w.update({UP: w[UP].T})), rf"{UP}: expected shape \(96, 64\) .* \(64, 96\)"),
    "fewer layers than the config": (edit("config.json", num_hidden_layers=6), "layers.4.* the tensor is missing"),
    "more layers than the config": (edit("config.json", num_hidden_layers=2), r"layers\.2\..* is no tensor of this"),
    "another width": (edit("config.json", lru_width=32), r"expected shape .* by config\.json"),
    "a wrong dtype": (i8, "expected BF16, F16, F32, found I16"),
    "NaN": (weights(put(UP, NAN, (95, 63))), rf"model\.safetensors: {UP}: holds NaN or infinity"),
    "infinity": (weights(put(UP, -INF, (0, 0))), rf"model\.safetensors: {UP}: holds NaN or infinity"),
    "NaN in a norm": (weights(put(NORM, NAN, (3,))), rf"{NORM}: holds NaN or infinity"),
    "-infinity in Lambda": (weights(put(LAMBDA, -INF, (3,))), rf"{LAMBDA}: holds NaN or infinity"),
    "a number past F16": (weights(put(UP, 1e5, (9, 9))), rf"{UP}: holds 100000, and F16 ends at 65504"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), r"tokenizer\.model: file: is missing"),
    "a bad tokenizer": (replace("tokenizer.model", "x"), r"tokenizer\.model: SentencePiece model: "),
    "bad tokenizer settings": (replace("tokenizer_config.json", "{"), r"tokenizer_config\.json: JSON: is not valid"),
    "more tokens than the vocabulary": (
        edit("config.json", vocab_size=300), r"embed_tokens\.weight: expected shape \(300, 64\)"),
    "an id past the vocabulary": (edit("config.json", eos_token_id=384), r"config\.json: eos_token_id: expected an id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_named_and_leave_no_file(tmp_path: Path, name):
    damage, message = BAD[name]
    folder = random_checkpoint(tmp_path / "c", dtype="bf16")
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(GriffinError, match=message) as caught:
        convert(folder, [(out / "a.gguf", "F32"), (out / "b.gguf", "F16")])
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


def test_nothing_is_begun_before_all_is_checked(tmp_path: Path, monkeypatch):
    """Of everything but the weights' values: no file is opened for writing at all."""
    monkeypatch.setattr("griffin_gguf.convert.pipeline.write", lambda *args, **options: pytest.fail("writing began"))
    late = {"NaN", "infinity", "NaN in a norm", "-infinity in Lambda", "a number past F16"}
    for i, name in enumerate(BAD.keys() - late):
        folder = random_checkpoint(tmp_path / str(i))
        BAD[name][0](folder)
        with pytest.raises(GriffinError):
            convert(folder, [(tmp_path / "m.gguf", "F32")])


def test_an_old_file_survives_a_failure(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")
    convert(folder, [(tmp_path / "m.gguf", "F16")])
    before = (tmp_path / "m.gguf").read_bytes()
    weights(put(UP, NAN, (0, 0)))(folder)
    with pytest.raises(GriffinError, match="holds NaN"):
        convert(folder, [(tmp_path / "m.gguf", "F16")])
    assert (tmp_path / "m.gguf").read_bytes() == before


def test_unknown_fields_and_tensors_may_be_allowed(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c", dtype="f32")
    convert(folder, [(tmp_path / "plain.gguf", "F32")])
    edit("config.json", moe=True)(folder)
    weights(lambda w: w.update(extra=w[UP]))(folder)
    convert(folder, [(tmp_path / "m.gguf", "F32")], allow_unknown=True)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_targets_are_checked_before_the_checkpoint(tmp_path: Path):
    absent = tmp_path / "absent"
    with pytest.raises(UnsupportedError, match="'Q9_Z' is no file type; choose one of F32"):
        convert(absent, [(tmp_path / "m.gguf", "Q9_Z")])
    with pytest.raises(GriffinError, match=r"m\.gguf: the folder .* does not exist"):
        convert(absent, [(absent / "m.gguf", "F32")])
    with pytest.raises(GriffinError, match="checkpoint: no such folder"):
        convert(absent, [(tmp_path / "m.gguf", "F32")])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(folder, [(out / "m.gguf", "F32")], progress=interrupt)
    assert list(out.iterdir()) == []


def test_the_checkpoint_is_left_alone(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c", shards=2)
    shutil.copytree(folder, tmp_path / "copy")
    convert(folder, [(tmp_path / "m.gguf", "Q4_K_M")])
    for path in (tmp_path / "copy").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(folder.iterdir())) == len(list((tmp_path / "copy").iterdir()))


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.model"])
def test_a_target_that_is_a_file_of_the_checkpoint_is_refused(tmp_path: Path, name):
    folder = random_checkpoint(tmp_path / "c")
    before = (folder / name).read_bytes()
    link = tmp_path / "link.gguf"
    link.symlink_to(folder / name)
    for target in (folder / name, link):
        with pytest.raises(GriffinError, match="is a file of the checkpoint"):
            convert(folder, [(target, "F32")])
    assert (folder / name).read_bytes() == before


def test_a_gguf_may_lie_in_the_checkpoints_folder_and_be_replaced(tmp_path: Path):
    folder = random_checkpoint(tmp_path / "c")
    for kind in ("F32", "Q8_0"):
        convert(folder, [(folder / "m.gguf", kind)])
    with GgufFile.open(folder / "m.gguf") as file:
        assert file.metadata["general.file_type"] == 7
