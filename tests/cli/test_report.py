import json
import shutil
from pathlib import Path

from command import done, griffin, refused

FAST = ("-n", "64", "-t", "1")


def test_files_side_by_side(models: Path, tmp_path: Path) -> None:
    files = [models / f"demo_model-{kind}.gguf" for kind in ("BF16", "Q2_K")]
    result = griffin("report", *files, *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [row["type"] for row in found["rows"]] == ["BF16", "Q2_K"]
    assert all(row["tokens"] == 64 for row in found["rows"])
    assert all(f" {row['perplexity']:.3f} ± " in result.stdout for row in found["rows"])
    assert not any(file.name in result.stdout for file in files)  # the types tell them apart
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert markdown.splitlines()[2].startswith("| demo_model-BF16.gguf | BF16 |")
    assert "64 tokens of heldout.txt" in markdown
    assert "Measuring demo_model-Q2_K.gguf: 100 % (64 of 64 tokens)" in result.stderr


def test_files_of_one_type_are_named(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    page = done("report", model, other, *FAST)
    assert page.count(" Q8_0 ") == 2
    assert f" {model.name} " in page
    assert " other.gguf " in page


def test_a_checkpoint_is_converted_first(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some words of my own, and a few more of them.", encoding="utf-8")
    found = json.loads(done("report", checkpoint, "--type", "q8_0", "--json", "-f", tmp_path / "text.txt", *FAST))
    (row,) = found["rows"]
    assert row["type"] == "Q8_0"
    assert 2 <= row["tokens"] < 64
    assert row["path"] == f"{checkpoint} as Q8_0"


def test_what_is_not_there_is_one_line(model: Path, tmp_path: Path) -> None:
    assert refused("report", model, tmp_path / "no.gguf").endswith("no.gguf: there is no such file or folder")
    assert refused("report", model, "-f", tmp_path / "no.txt").endswith("no.txt: No such file or directory")


def test_a_text_that_is_too_short_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("", encoding="utf-8")
    result = griffin("report", model, "-f", tmp_path / "text.txt", "-t", "1")
    assert result.exit_code == 1
    assert "too short" in result.stderr.splitlines()[-1]


def test_two_checkpoints_of_one_name_are_two_rows(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"attention_window_size": 256', '"attention_window_size": 2'))
    found = json.loads(done("report", checkpoint, other, "--type", "Q8_0", "--json", *FAST))
    first, second = found["rows"]
    assert first["perplexity"] != second["perplexity"]
    assert [row["path"] for row in (first, second)] == [f"{checkpoint} as Q8_0", f"{other} as Q8_0"]


def test_what_cannot_be_measured_or_written_is_said_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    foreign, taken = tmp_path / "foreign.gguf", tmp_path / "taken"
    for path in (foreign, taken):
        path.write_text("no GGUF")
    assert "foreign.gguf: " in refused("report", model, foreign)
    assert "taken: File exists" in refused("report", model, "-o", taken)
