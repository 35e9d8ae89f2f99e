import json
import os
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
from command import done, griffin, refused, start
from foreign import foreign

from griffin_gguf.quant.report import run
from griffin_gguf.quant.report.plots import PLOTS

FAST = ("--quick", "-n", "128", "-c", "32", "-t", "1")
_LLAMA = struct.pack("<Q", 5) + b"llama"  # as a GGUF has the string
PLOTS_OF_FILES = {f"{name}.{end}" for name in PLOTS for end in ("svg", "png")}


def read(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_files_side_by_side(models: Path, tmp_path: Path) -> None:
    files = [models / f"demo_model-{kind}.gguf" for kind in ("BF16", "Q2_K")]
    result = griffin("report", *files, *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = read(tmp_path / "out")
    assert found["complete"]
    assert [(row["type"], row["reference"]) for row in found["rows"]] == [("BF16", True), ("Q2_K", False)]
    assert all(row["windows"]["tokens"] == 60 and row["stream"]["tokens"] == 127 for row in found["rows"])
    assert all(f" {row['windows']['perplexity']:.3f} " in result.stdout for row in found["rows"])
    assert f"{found['rows'][1]['windows']['distance']['top1']:.1%}" in result.stdout
    assert "With " in result.stdout
    assert "BF16.gguf  " not in result.stdout  # the types tell them apart
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "report.html", *PLOTS_OF_FILES,
    }  # fmt: skip
    for name in ("report.html", "report.md", "report.json", "size.svg"):
        assert str(tmp_path / "out" / name) in result.stdout
    assert "60 tokens of heldout.txt" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "[6/6] demo_model-Q2_K.gguf: the text in one pass: 100 % (" in result.stderr


def test_it_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    """Killed at its second measurement; the same command makes those that are missing."""
    folder = tmp_path / "out"
    arguments = ("report", model, *FAST, "-o", folder)
    with start(*arguments) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("[2/3]"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 130
    assert f"{folder / 'report.json'}: keeps what has been measured" in rest
    kept = read(folder)
    assert not kept["complete"]
    assert kept["rows"][0]["cost"]
    assert {path.name for path in folder.iterdir()} == {"report.json"}
    result = griffin(*arguments)
    assert result.exit_code == 0
    assert "1 of 3 measurements are there already" in result.stderr
    assert read(folder)["rows"][0]["cost"] == kept["rows"][0]["cost"]
    assert read(folder)["complete"]


def test_kill_9_leaves_what_was_measured(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with start("report", model, *FAST, "-o", folder) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("[3/3]"):
                break
        process.kill()
    kept = read(folder)
    assert [bool(kept["rows"][0][measure]) for measure in ("cost", "windows", "stream")] == [True, True, False]


def test_a_finished_report_is_drawn_again_without_measuring(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("report", model, *FAST, "-o", tmp_path / "out")
    done(*arguments)
    (tmp_path / "out" / "report.html").unlink()
    monkeypatch.setattr(run, "in_fresh_process", None)  # calling it would fail
    done(*arguments)
    assert (tmp_path / "out" / "report.html").exists()


def test_files_of_one_type_are_named(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    page = done("report", model, other, *FAST)
    assert page.count(" Q8_0 ") == 2
    assert f" {model.name} " in page
    assert " other.gguf " in page


def test_a_checkpoint_is_converted_first_and_once(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some words of my own, and a few more of them. " * 9, encoding="utf-8")
    folder = tmp_path / "out"
    arguments = ("report", checkpoint, "--type", "q8_0", "-f", tmp_path / "text.txt", *FAST, "-o", folder)
    done(*arguments)
    (row,) = read(folder)["rows"]
    assert (row["type"], row["name"]) == ("Q8_0", f"{checkpoint.name} as Q8_0")
    (model,) = (folder / "models").glob(f"*/{checkpoint.name}-Q8_0.gguf")
    before = model.stat().st_mtime_ns
    result = griffin(*arguments)
    assert "1 files are there already" in result.stderr
    assert "3 of 3 measurements are there already" in result.stderr
    assert model.stat().st_mtime_ns == before


def test_a_checkpoint_that_has_changed_is_converted_again(checkpoint: Path, tmp_path: Path) -> None:
    copy, folder = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(checkpoint, copy)
    arguments = ("report", copy, "--type", "Q8_0", *FAST, "-o", folder)
    done(*arguments)
    first = read(folder)["rows"][0]["windows"]["perplexity"]
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"attention_window_size": 256', '"attention_window_size": 2'))
    done(*arguments)
    assert read(folder)["rows"][0]["windows"]["perplexity"] != first


def test_another_checkpoint_of_that_name_is_not_taken_for_it(checkpoint: Path, tmp_path: Path) -> None:
    """Older than what was converted from the first one."""
    folder, copies = tmp_path / "out", [tmp_path / which / "ckpt" for which in "ab"]
    for copy in copies:
        shutil.copytree(checkpoint, copy)
    config = copies[1] / "config.json"
    config.write_text(config.read_text().replace('"attention_window_size": 256', '"attention_window_size": 2'))
    os.utime(config, (1e9, 1e9))
    for copy in copies:
        done("report", copy, "--type", "Q8_0", *FAST, "-o", folder)
        wanted = json.loads(done("report", copy, "--type", "Q8_0", *FAST, "--json"))["rows"][0]["windows"]["perplexity"]
        assert read(folder)["rows"][0]["windows"]["perplexity"] == wanted


def test_two_checkpoints_of_one_name_are_two_rows(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"attention_window_size": 256', '"attention_window_size": 2'))
    found = json.loads(done("report", checkpoint, other, "--type", "Q8_0", "--json", *FAST))
    first, second = found["rows"]
    assert first["windows"]["perplexity"] != second["windows"]["perplexity"]
    assert [row["name"] for row in (first, second)] == [f"{checkpoint} as Q8_0", f"{other} as Q8_0"]


@pytest.mark.parametrize("kinds", [("gemma", "llama", "mamba"), ("qwen2", "rwkv7")])
def test_models_of_other_architectures_stand_beside_it(model: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    files = [foreign(tmp_path / f"{kind}.gguf", kind, bpe=kind == "qwen2") for kind in kinds]
    folder = tmp_path / "out"
    result = griffin("report", model, *files, *FAST, "-o", folder)
    assert result.exit_code == 0, result.stderr
    found = read(folder)
    ours, *others = found["rows"]
    assert [row["architecture"] for row in found["rows"]] == ["recurrentgemma", *kinds]
    assert ours["cost"]["runs_on"] == "ggml"
    assert ours["cost"]["state"] > 0
    for kind, row in zip(kinds, others, strict=True):
        assert row["reference"]
        assert row["cost"]["runs_on"] == "llama.cpp"
        assert (row["cost"]["state"] is None) == (kind in ("gemma", "llama", "qwen2"))  # theirs grows with the text
        assert row["windows"]["bits_per_byte"] > ours["windows"]["bits_per_byte"]  # they have learned nothing
        assert f"{row['windows']['bits_per_byte']:.4f}" in result.stdout
        assert row["windows"]["nbytes"] > 0
    assert PLOTS_OF_FILES - {path.name for path in folder.iterdir()} == {"kl.svg", "kl.png"}  # no quantization of any


def test_a_quantized_model_of_another_architecture_is_compared_with_its_own(tmp_path: Path) -> None:
    full = foreign(tmp_path / "full.gguf", "llama")
    half = foreign(tmp_path / "half.gguf", "llama", half=True)
    found = json.loads(done("report", full, half, *FAST, "--json"))
    one, other = found["rows"]
    assert (one["family"], one["reference"], other["reference"]) == (other["family"], True, False)
    assert 0 < other["windows"]["distance"]["mean"] < 1e-3
    assert other["windows"]["distance"]["top1"] > 0.9


def test_bad_input_is_one_line_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "in_fresh_process", None)
    folder = tmp_path / "out"
    command = ("report", model, *FAST, "-o", folder)
    assert refused("report", model, tmp_path / "no.gguf").endswith("no.gguf: there is no such file or folder")
    assert refused(*command, "-f", tmp_path / "no.txt").endswith("no.txt: No such file or directory")
    for name, raw, problem in (
        ("empty.txt", b"", "empty.txt: text: has 0 bytes; expected a window of 32 tokens at least"),
        ("short.txt", b"A few words.", "bytes; expected a window of 32 tokens at least"),
        ("long-words.txt", b"a truth universally " * 2, "long-words.txt: text: has 14 tokens; expected a window of 32"),
        ("binary.txt", b"GGUF\x00\xff\xfe", "binary.txt: text: is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(raw)
        assert problem in refused(*command, "-f", tmp_path / name)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:5000])
    assert "broken.gguf" in refused("report", broken, *FAST)
    assert "none of the files to measure" in refused(*command, "--reference", broken)
    usage = refused("report", model, "-n", "100", code=2)
    assert "--tokens 100: expected a window of 512 (--ctx) at least" in usage
    (tmp_path / "taken").write_text("a file")
    assert "taken: File exists" in refused("report", model, *FAST, "-o", tmp_path / "taken")
    assert not folder.exists()


def test_a_model_that_nothing_runs_is_named(tmp_path: Path) -> None:
    unknown = foreign(tmp_path / "unknown.gguf", "llama")
    other = _LLAMA.replace(b"llama", b"lxama")
    unknown.write_bytes(unknown.read_bytes().replace(b"llama.", b"lxama.").replace(_LLAMA, other))
    assert "general.architecture" in refused("report", unknown, *FAST)


def test_brackets_in_names_are_only_text(model: Path, models: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("x[bold red]y.gguf", "[.gguf")]
    for file in files:
        shutil.copy(model, file)
    mixed = tmp_path / "mixed.gguf"
    done("quantize", models / "demo_model-BF16.gguf", mixed, "Q8_0", "--tensor-type", "attn_q=Q6_K", "-t", "1")
    recipe = b"Q8_0, 2 tensors in other types"
    evil = tmp_path / "evil.gguf"
    evil.write_bytes(mixed.read_bytes().replace(recipe, b"[/x] of mine".ljust(len(recipe))))
    page = done("report", *files, evil, *FAST, "-o", tmp_path / "out")
    for text in ("x[bold red]y.gguf", "[.gguf", "[/x] of mine"):
        assert text in page
    kept = tmp_path / "out" / "report.json"
    assert "[/x] of mine" in done("compare", kept, kept)


def test_somebody_elses_report_json_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"mine": true}')
    assert "report.json: report: is no report.json of griffin" in refused("report", model, *FAST, "-o", tmp_path)
    assert (tmp_path / "report.json").read_text() == '{"mine": true}'


def test_a_disk_that_is_full_is_an_error_and_what_was_written_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:  # a report.json is synced, and then its folder: the empty one, and that of one measurement
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("griffin_gguf.runtime.atomic.os.fsync", full)
    result = griffin("report", model, *FAST, "-o", folder)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("report.json: cannot be written: No space left on device")
    monkeypatch.undo()
    assert read(folder)["rows"][0]["cost"]
    assert {path.name for path in folder.iterdir()} == {"report.json"}
    assert "1 of 3 measurements are there already" in griffin("report", model, *FAST, "-o", folder).stderr


def test_without_matplotlib_there_is_a_table_but_no_page(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert refused("report", model, *FAST, "-o", tmp_path / "new").startswith("plots need matplotlib: pip install")
    assert not (tmp_path / "new").exists()
    assert "perplexity" in done("report", model, *FAST)
