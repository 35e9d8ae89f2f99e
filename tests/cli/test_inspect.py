import json
from pathlib import Path

import pytest
from command import done, refused
from gguf import GGUFWriter
from numpy import float32, zeros
from rewriting import rewritten
from splitting import split

from griffin_gguf.runtime import load
from griffin_gguf.runtime.gguf_file import GgufFile


def test_the_table_tells_hyperparameters_tensors_and_memory(model: Path) -> None:
    page = done("inspect", model)
    with GgufFile.open(model) as file:
        hp, names = file.hyperparameters(), list(file.tensors)
    assert f"{hp.parameters:,} in Q8_0" in page
    assert " RRARRARR" in page
    assert all(name in page for name in names)
    assert "tokenizer.chat_template" in page
    assert "of state, at any length" in page


def test_json_is_the_file(model: Path) -> None:
    found = json.loads(done("inspect", model, "--json"))
    with GgufFile.open(model) as file:
        assert found["size"] == file.size == model.stat().st_size
        assert found["hyperparameters"]["hidden"] == file.hyperparameters().hidden
        assert [row["nbytes"] for row in found["tensors"]] == [info.nbytes for info in file.tensors.values()]
    assert found["memory"]["total"] == found["memory"]["weights"] + found["memory"]["state"]
    assert sum(row["nbytes"] for row in found["types"].values()) == found["memory"]["weights"]
    assert found["metadata"]["tokenizer.ggml.tokens"] == f"[{found['hyperparameters']['vocab']} values]"


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_the_state_is_as_large_as_it_really_is(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    done("convert", checkpoint, "-o", path, "--type", kind)
    found = json.loads(done("inspect", path, "--json"))
    with load(path, backend="ggml", threads=1) as loaded:
        assert found["memory"]["state"] == loaded.new_state().nbytes


def test_another_architecture_is_listed_and_said_to_be_foreign(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("blk.0.attn_q.weight", zeros((32, 32), float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    page = done("inspect", path)
    assert "blk.0.attn_q.weight" in page
    assert "llama.block_count" in page
    found = json.loads(done("inspect", path, "--json"))
    assert (found["architecture"], found["hyperparameters"], found["memory"]) == ("llama", None, None)


def test_hostile_text_is_shown_as_text(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "m.gguf", tokenizer__chat_template="\x1b]0;owned\x07[bold]x[/bold]\n[/]")
    page = done("inspect", path)
    assert "\\x1b]0;owned\\x07[bold]x[/bold]\\n[/]" in page
    assert "\x1b" not in page


def test_a_file_at_odds_with_itself_is_one_line(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "m.gguf", recurrentgemma__block_count=7)
    assert "recurrentgemma." in refused("inspect", path)


def test_inspect_adds_the_parts_up(model: Path, tmp_path: Path) -> None:
    first = split(model, tmp_path, split_max_tensors=60)
    found, whole = json.loads(done("inspect", first, "--json")), json.loads(done("inspect", model, "--json"))
    assert found["size"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {**found, "path": 0, "files": 0, "size": 0} == {**whole, "path": 0, "files": 0, "size": 0}
    assert "3 files, of which this is the first" in done("inspect", first)
    assert "of which this is the first" not in done("inspect", model)
