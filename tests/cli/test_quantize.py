import json
import signal
from pathlib import Path

import pytest
from command import done, griffin, refused, start

from griffin_gguf.quant.file_types import FILE_TYPES
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


def test_all_types_are_listed() -> None:
    listed = {line.split()[0] for line in done("quantize", "--list-types").splitlines() if line.strip()}
    assert set(FILE_TYPES) <= listed


def test_types_of_single_tensors(models: Path, tmp_path: Path) -> None:
    source, target = models / "demo_model-BF16.gguf", tmp_path / "q.gguf"
    (tmp_path / "types.txt").write_text("# the recurrence\nssm_[xy]=IQ4_XS\n")
    done("quantize", source, target, "Q4_K_M", "--tensor-type", "ffn_down=q8_0", "--tensor-type-file",
         tmp_path / "types.txt", "--token-embedding-type", "Q5_K")  # fmt: skip
    with GgufFile.open(target) as file:
        types = {name: info.type.name for name, info in file.tensors.items()}
    assert types["token_embd.weight"] == "Q5_K"
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.0.ssm_x.weight"] == types["blk.1.ssm_y.weight"] == "IQ4_XS"
    done("quantize", source, target, "Q4_K_M", "--pure")
    with GgufFile.open(target) as file:
        assert {info.type.name for info in file.tensors.values()} == {"F32", "Q4_K"}


def test_splitting_joining_and_other_keys(models: Path, tmp_path: Path) -> None:
    source = models / "demo_model-Q8_0.gguf"
    done("quantize", source, tmp_path / "s.gguf", "COPY", "--split-max-size", "3M", "--override-kv",
         "general.name=str:Split")  # fmt: skip
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == [f"s-{i:05}-of-{len(parts):05}.gguf" for i in range(1, len(parts) + 1)]
    assert len(parts) > 2
    assert "Split" in done("inspect", tmp_path / parts[0])
    done("quantize", tmp_path / parts[0], tmp_path / "whole.gguf", "COPY", "--override-kv",
         "general.name=str:demo_model")  # fmt: skip
    assert (tmp_path / "whole.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("Q4_K_M", "--tensor-type", "ffn_up"), "expected REGEX=TYPE"),
        (("Q4_K_M", "--output-tensor-type", "Q4_K_M"), "is no tensor type"),
        (("Q4_K_M", "--split-max-size", "big"), "'big' is no size"),
        (("Q9",), "is no file type"),
        (("mxfp4",), "is llama.cpp's type for experts"),
    ],
)
def test_usage_errors(models: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    line = refused("quantize", models / "demo_model-BF16.gguf", tmp_path / "q.gguf", *arguments, code=2)
    assert problem in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("IQ2_XS",), "needs an importance matrix, which griffin imatrix makes"),
        (("Q4_K_M", "--tensor-type", "conv=Q8_0"), "is in no name of a tensor to quantize"),
        (("Q4_K_M", "--override-kv", "general.name=Tiny"), "expected KEY=KIND:VALUE"),
        (("Q4_K_M", "--imatrix", "none.gguf"), "none.gguf: file: cannot be read"),
        (("Q4_K_M", "--tensor-type-file", "none.txt"), "none.txt: file: cannot be read"),
    ],
)
def test_refusals(models: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in refused("quantize", models / "demo_model-BF16.gguf", tmp_path / "q.gguf", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("tokenizer.ggml.eos_token_id=int:99999999", "tokenizer.ggml.eos_token_id"),
        ("tokenizer.ggml.model=str:gpt2", "tokenizer.ggml.model"),
        ("tokenizer.chat_template=str:{{", "tokenizer.chat_template"),
    ],
)
def test_keys_that_would_make_the_file_useless(models: Path, tmp_path: Path, override: str, problem: str) -> None:
    line = refused("quantize", models / "demo_model-BF16.gguf", tmp_path / "q.gguf", "Q8_0", "--override-kv", override)
    assert problem in line
    assert not list(tmp_path.iterdir())


def test_a_table_of_types_is_no_target(models: Path, tmp_path: Path) -> None:
    table = tmp_path / "types.txt"
    table.write_text("ffn_up=Q8_0")
    assert "is the input as well" in refused("quantize", models / "demo_model-BF16.gguf", table, "Q4_K_M",
                                             "--tensor-type-file", table)  # fmt: skip
    assert table.read_text() == "ffn_up=Q8_0"


def test_names_are_printed_as_they_are(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "a:x:b.gguf"
    assert str(target) in done("quantize", models / "demo_model-BF16.gguf", target, "Q8_0", "-t", "1")


def test_ctrl_c_while_ggml_makes_its_tables_leaves_nothing(models: Path, tmp_path: Path) -> None:
    """Types of 1 and 2 bits begin with seconds of work that cannot be stopped; nobody waits for it."""
    (tmp_path / "text.txt").write_text("It was a fine morning. " * 200)
    matrix, target = tmp_path / "m.imatrix.gguf", tmp_path / "out" / "q.gguf"
    target.parent.mkdir()
    source = models / "demo_model-BF16.gguf"
    done("imatrix", source, "-f", tmp_path / "text.txt", "-o", matrix, "-t", "1")
    with start("quantize", source, target, "IQ1_S", "--imatrix", matrix) as process:
        assert process.stderr
        while not any(target.parent.iterdir()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read().endswith("griffin: interrupted\n")
    assert not any(target.parent.iterdir())
