import json
from pathlib import Path

from command import done, griffin, refused

from griffin_gguf.runtime.gguf_file import GgufFile


def test_dry_run_says_what_will_be_written(models: Path, tmp_path: Path) -> None:
    source, target = models / "demo_model-BF16.gguf", tmp_path / "small.gguf"
    table = done("quantize", source, target, "q4_k_m", "--dry-run")
    planned = json.loads(done("quantize", source, target, "q4_k_m", "--dry-run", "--json"))
    assert not target.exists()
    assert not planned["written"]

    summary = done("quantize", source, target, "q4_k_m")
    assert summary.startswith(str(target))
    assert planned["size"] == target.stat().st_size
    assert f"would have {planned['size']} bytes" in table
    with GgufFile.open(target) as file:
        types = {info.name: info.type.name for info in file.tensors.values()}
    assert {row["name"]: row["type"] for row in planned["tensors"]} == types
    assert all(name in table for name in types)


def test_quantizing_equals_converting(models: Path, tmp_path: Path) -> None:
    done("quantize", models / "demo_model-BF16.gguf", tmp_path / "q.gguf", "Q2_K", "-t", "1")
    assert (tmp_path / "q.gguf").read_bytes() == (models / "demo_model-Q2_K.gguf").read_bytes()


def test_json_of_a_real_run_is_alone_on_stdout(models: Path, tmp_path: Path) -> None:
    result = griffin("quantize", models / "demo_model-BF16.gguf", tmp_path / "q.gguf", "Q8_0", "--json")
    found = json.loads(result.stdout)
    assert found["written"]
    assert found["size"] == (tmp_path / "q.gguf").stat().st_size
    assert "Quantizing: 100 %" in result.stderr


def test_a_quantized_source_needs_permission(models: Path, tmp_path: Path) -> None:
    source, target = models / "demo_model-Q8_0.gguf", tmp_path / "q.gguf"
    assert "quantized already" in refused("quantize", source, target, "Q2_K")
    assert not target.exists()
    done("quantize", source, target, "Q2_K", "--allow-requantize")
    assert target.exists()


def test_input_and_output_must_differ(models: Path) -> None:
    source = models / "demo_model-BF16.gguf"
    before = source.read_bytes()
    assert "is the input as well" in refused("quantize", source, source, "Q8_0")
    assert source.read_bytes() == before


def test_a_truncated_source_is_one_line_and_no_file(models: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((models / "demo_model-BF16.gguf").read_bytes()[:-1])
    assert str(cut) in refused("quantize", cut, tmp_path / "q.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.gguf"]
