import json
import signal
from pathlib import Path

import pytest
from command import done, griffin, refused, start

from griffin_gguf.quant.imatrix import ImportanceMatrix


@pytest.fixture(scope="module")
def text(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven windows of 512 tokens of a novel, and some tokens more."""
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text((checkpoint / "heldout.txt").read_text(encoding="utf-8")[:12000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def matrix(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    summary = done("imatrix", model, "-f", text, "-o", path, "--chunks", "2", "-t", "1")
    assert summary == f"{path}  63 weights, 2 windows of 512 tokens\n"
    return path


def test_a_matrix_is_collected_and_told_how_far_it_is(model: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "imatrix.gguf"
    command = ("imatrix", model, "-f", text, "-o", target, "--ctx", "100", "--chunks", "3", "--ppl", "-t", "1")
    result = griffin(*command, "--json")
    assert "Collecting: 100 % (3 of 3 windows)" in result.stderr
    assert "perplexity over 147 tokens: " in result.stderr
    found = json.loads(result.stdout)
    assert found.pop("perplexity") > found.pop("perplexity_stderr") > 0
    assert found == {
        "path": str(target),
        "written": True,
        "datasets": [text.name],
        "chunk_count": 3,
        "chunk_size": 100,
        "entries": 63,
    }
    loaded = ImportanceMatrix.load(target)
    assert (loaded.chunk_count, loaded.chunk_size, len(loaded.entries)) == (3, 100, 63)
    again = griffin(*command)
    assert "is complete already" in again.stderr
    assert again.exit_code == 0


def test_a_run_without_ppl_cannot_tell_it_later(model: Path, text: Path, matrix: Path) -> None:
    again = griffin("imatrix", model, "-f", text, "-o", matrix, "--chunks", "2", "--ppl", "-t", "1")
    assert "is complete already" in again.stderr
    assert "perplexity is not known of that run" in again.stderr


def test_statistics_of_a_file_and_of_a_run(model: Path, text: Path, matrix: Path, tmp_path: Path) -> None:
    rows = json.loads(done("imatrix", "--in-file", matrix, "--show-statistics", "--json"))
    assert not rows["written"]
    totals = [row["total"] for row in rows["statistics"]]
    assert totals == sorted(totals, reverse=True)
    assert {row["name"] for row in rows["statistics"]} == ImportanceMatrix.load(matrix).entries.keys()
    table = done("imatrix", "--in-file", matrix, "--show-statistics")
    assert all(row["name"] in table for row in rows["statistics"])
    assert "100.00%" in table
    command = ("imatrix", model, "-f", text, "-o", tmp_path / "m.gguf", "--chunks", "2", "-t", "1")
    assert done(*command, "--show-statistics").splitlines()[1:] == table.splitlines()


def test_matrices_are_joined(model: Path, text: Path, matrix: Path, tmp_path: Path) -> None:
    target = tmp_path / "both.gguf"
    assert "4 windows" in done("imatrix", "--in-file", matrix, "--in-file", matrix, "-o", target)
    one, both = ImportanceMatrix.load(matrix), ImportanceMatrix.load(target)
    assert both.datasets == one.datasets * 2
    for name, entry in one.entries.items():
        assert (both.entries[name].sums == 2 * entry.sums).all()
    on_top = done("imatrix", model, "-f", text, "-o", target, "--chunks", "1", "--in-file", matrix, "-t", "1")
    assert "3 windows" in on_top
    assert ImportanceMatrix.load(target).chunk_count == 3


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    target, whole = tmp_path / "imatrix.gguf", tmp_path / "whole.gguf"
    command = ("imatrix", model, "-f", checkpoint / "heldout.txt", "--ctx", "20", "-t", "1", "-o")
    with start(*command, target) as process:
        assert process.stderr
        assert process.stderr.readline().startswith("Collecting: 0 % (1 of ")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
        assert process.returncode == 130
        assert told.endswith("griffin: interrupted\n")
    kept = ImportanceMatrix.load(target)
    assert kept.collection
    assert 0 < kept.chunk_count < kept.collection.chunks_total
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]
    assert "is unfinished: " in griffin("imatrix", "--in-file", target, "--show-statistics").stderr
    few = str(kept.chunk_count + 5)  # the rest of the text would take half a minute
    assert f"going on after {kept.chunk_count} of {few} windows" in griffin(*command, target, "--chunks", few).stderr
    done(*command, whole, "--chunks", few)
    assert target.read_bytes() == whole.read_bytes()


def test_what_is_missing_is_a_usage_error(model: Path, text: Path, matrix: Path, tmp_path: Path) -> None:
    assert "expected MODEL" in refused("imatrix", code=2)
    assert "MODEL needs a text" in refused("imatrix", model, "-o", tmp_path / "m.gguf", code=2)
    assert "MODEL needs a text" in refused("imatrix", model, "-f", text, code=2)
    assert "expected MODEL" in refused("imatrix", "-f", text, "--in-file", matrix, "-o", tmp_path / "m.gguf", code=2)
    assert "expected a file to write" in refused("imatrix", "--in-file", matrix, code=2)
    assert not list(tmp_path.iterdir())


def test_no_input_is_overwritten(model: Path, text: Path, matrix: Path) -> None:
    before = matrix.read_bytes()
    assert "is the input as well" in refused("imatrix", "--in-file", matrix, "-o", matrix)
    assert "is the input as well" in refused("imatrix", model, "-f", text, "--in-file", matrix, "-o", matrix)
    assert "is the input as well" in refused("imatrix", model, "-f", text, "-o", text)
    assert matrix.read_bytes() == before


def test_other_files_are_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    assert "general.type: expected 'imatrix'" in refused("imatrix", "--in-file", model, "--show-statistics")
    short = refused("imatrix", model, "-f", text, "-o", tmp_path / "m.gguf", "-c", "99999")
    assert short.startswith(f"{text}: has ")
    assert short.endswith("expected at least a window of 99999")
    assert "No such file" in refused("imatrix", model, "-f", tmp_path / "no.txt", "-o", tmp_path / "m.gguf")
