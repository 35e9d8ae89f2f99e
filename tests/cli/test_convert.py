import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_safetensors
from command import done, griffin, refused

from griffin_gguf.runtime.gguf_file import GgufFile, dequantize


def test_several_types_are_written_under_their_names(models: Path) -> None:
    assert sorted(path.name for path in models.iterdir()) == [
        "demo_model-BF16.gguf",
        "demo_model-Q2_K.gguf",
        "demo_model-Q8_0.gguf",
    ]


def test_progress_and_paths(checkpoint: Path, tmp_path: Path) -> None:
    result = griffin("convert", checkpoint, "-o", tmp_path / "m.gguf", "--type", "f16")
    path = tmp_path / "m.gguf"
    assert result.exit_code == 0
    assert result.stdout == f"{path}  {path.stat().st_size / 2**20:.1f} MiB\n"
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Converting: 100 % (")
    assert 2 <= len(lines) <= 11
    with GgufFile.open(path) as file:
        file.hyperparameters()


def test_one_type_into_a_new_folder(checkpoint: Path, tmp_path: Path) -> None:
    done("convert", checkpoint, "-o", tmp_path / "new", "--type", "Q8_0")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo_model-Q8_0.gguf"]


def test_several_types_into_one_file_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    line = refused("convert", checkpoint, "-o", tmp_path / "m.gguf", "--type", "F32", "--type", "F16", code=2)
    assert "several types need a folder" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("config.json", b"{", "config.json: "),
        ("config.json", b'{"model_type": "gemma"}', "model_type"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        ("model.safetensors", b"\x00" * 3, "model.safetensors: "),
        ("tokenizer.model", b"\xff" * 100, "tokenizer.model: "),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_no_file(
    checkpoint: Path, tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (folder / name).write_bytes(content)
    assert problem in refused("convert", folder, "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    assert "nowhere" in refused("convert", tmp_path / "nowhere", "-o", tmp_path / "m.gguf")


def test_a_target_folder_that_is_missing_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "a") in refused("convert", checkpoint, "-o", tmp_path / "a" / "b" / "m.gguf")


def lora(folder: Path, checkpoint: Path, seed: int) -> np.ndarray:
    """An adapter of rank 2 for one layer; what it adds to that layer's weight."""
    sizes = json.loads((checkpoint / "config.json").read_text())
    random = np.random.default_rng(seed)
    a = random.standard_normal((2, sizes["hidden_size"]), np.float32)
    b = random.standard_normal((sizes["intermediate_size"] // 2, 2), np.float32)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    up = "base_model.model.model.layers.1.mlp_block.up_proj"
    weights = {f"{up}.lora_A.weight": a, f"{up}.lora_B.weight": b}
    write_safetensors(folder / "adapter_model.safetensors", weights, "f32")
    return 1.5 * b @ a


def test_adapters_are_merged(checkpoint: Path, tmp_path: Path) -> None:
    expected = sum(lora(tmp_path / name, checkpoint, seed) for seed, name in enumerate(("one", "two")))
    done("convert", checkpoint, "-o", tmp_path / "base.gguf", "--type", "F32")
    adapters = ("--lora", tmp_path / "one", "--lora", tmp_path / "two")
    done("convert", checkpoint, *adapters, "-o", tmp_path / "m.gguf", "--type", "F32")
    with GgufFile.open(tmp_path / "base.gguf") as base, GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.metadata["griffin.lora"] == ["one", "two"]
        assert file.metadata["general.name"] == base.metadata["general.name"]
        for name, info in file.tensors.items():
            found = dequantize(info, file.data(name)) - dequantize(info, base.data(name))
            if name == "blk.1.ffn_up.weight":
                np.testing.assert_allclose(found.reshape(info.shape), expected, atol=1e-5)
            else:
                assert not found.any(), name


def test_a_path_that_is_no_adapter_is_one_line_before_anything_is_fetched(checkpoint: Path, tmp_path: Path) -> None:
    line = refused("convert", "no-such-org/no-such-model", "--lora", tmp_path / "nowhere", "-o", tmp_path / "new")
    assert line.startswith(f"{tmp_path / 'nowhere'}: adapter: expected a folder")
    line = refused("convert", checkpoint, "--lora", checkpoint, "-o", tmp_path / "new")
    assert line == f"{checkpoint / 'adapter_config.json'}: file: is missing"
    assert list(tmp_path.iterdir()) == []
