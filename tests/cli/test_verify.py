import json
from pathlib import Path

import numpy as np
from command import done, griffin, refused
from gguf import GGUFWriter
from rewriting import rewritten
from splitting import finish, split

from griffin_gguf.runtime.gguf_file import GgufFile


def spoiled(source: Path, target: Path) -> Path:
    """A copy whose first decays are what none can be."""
    raw = bytearray(source.read_bytes())
    with GgufFile.open(source) as file:
        for name, value in (("blk.0.ssm_a", np.nan), ("blk.1.ssm_a", 0.5)):
            at = file.tensors[name].offset
            raw[at : at + 4] = np.float32(value).tobytes()
    target.write_bytes(raw)
    return target


def test_a_sound_file_is_one_line(model: Path) -> None:
    assert done("verify", model, "-t", "1").startswith(f"{model}: sound: ")
    assert "Verifying: 100 %" in griffin("verify", model).stderr


def test_every_finding_is_a_line_and_the_exit_code_is_1(model: Path, tmp_path: Path) -> None:
    path = spoiled(model, tmp_path / "m.gguf")
    result = griffin("verify", path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{path}: blk.0.ssm_a: element 0: the number is NaN",
        f"{path}: blk.1.ssm_a: expected no number above 0, since -8·softplus(Λ) has none, found 1",
        f"{path}: damaged: 2 findings",
    ]
    assert "griffin: error" not in result.stderr


def test_the_checksums_are_those_of_the_conversion(model: Path, tmp_path: Path) -> None:
    assert done("verify", model, "--sha256").endswith(", all as their checksums say\n")
    path = tmp_path / "m.gguf"
    raw = bytearray(model.read_bytes())
    with GgufFile.open(model) as file:
        raw[file.tensors["blk.0.ffn_up.weight"].offset + 2] ^= 1
    path.write_bytes(raw)
    assert done("verify", path)
    result = griffin("verify", path, "--sha256")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{path}: blk.0.ffn_up.weight: its SHA-256 is not the one in")


def test_json(model: Path, tmp_path: Path) -> None:
    found = json.loads(done("verify", model, "--json"))
    assert (found["sound"], found["damaged"], found["warnings"], found["files"]) == (True, [], [], [str(model)])
    result = griffin("verify", spoiled(model, tmp_path / "m.gguf"), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["sound"]
    assert len(found["damaged"]) == 2


def test_a_truncated_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:-100])
    result = griffin("verify", path)
    assert result.exit_code == 1
    assert "cut short" in result.stdout.splitlines()[0]
    assert result.stdout.splitlines()[1] == f"{path}: damaged: 1 finding"


def test_a_file_without_checksums_cannot_be_compared(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "f.gguf", "llama")
    writer.add_tensor("a", np.zeros(8, np.float32))
    finish(writer)
    assert "records no checksums" in refused("verify", tmp_path / "f.gguf", "--sha256")


def test_another_architecture_and_loose_ends_are_told(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    writer = GGUFWriter(path, "[bold]\x1b[2Jllama")
    writer.add_tensor("a", np.zeros(8, np.float32))
    finish(writer)
    path.write_bytes(path.read_bytes() + b"x")
    page = done("verify", path)
    warning, note, verdict = page.splitlines()
    assert warning == f"warning: {path}: file: 1 bytes follow the last tensor"
    assert note.startswith(f"note: {path}: general.architecture: this is '[bold]")
    assert verdict == f"{path}: sound: 1 tensors, 32 B"
    assert "\x1b" not in page


def test_a_split_file_is_one_file(model: Path, tmp_path: Path) -> None:
    first = split(model, tmp_path, split_max_tensors=60)
    found = json.loads(done("verify", first, "--json"))
    assert found["files"] == [str(path) for path in sorted(tmp_path.iterdir())]
    assert len(found["files"]) == 3
    assert f"open {first.name}" in griffin("verify", found["files"][1]).output


def test_damaged_keys_are_a_line(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "m.gguf", recurrentgemma__block_count=7)
    result = griffin("verify", path)
    assert result.exit_code == 1
    assert "recurrentgemma." in result.stdout


# ---- for another program


def test_a_file_that_ollama_reads_as_it_is_meant(model: Path, models: Path) -> None:
    for path in (model, models / "demo_model-BF16.gguf"):
        result = griffin("verify", "--for", "ollama", path)
        assert result.exit_code == 0
        (line,) = result.stdout.splitlines()
        assert line.startswith(f"{path}: sound, and as Ollama reads it: ")
        assert "Ollama as released cannot load this architecture" in result.stderr


def test_what_ollama_would_misread_is_a_line_each(model: Path, tmp_path: Path) -> None:
    changes = {"general__type": "adapter", "tokenizer__ggml__pre": None, "tokenizer__chat_template": "{{ messages }}"}
    path = rewritten(model, tmp_path / "m.gguf", **changes)
    assert done("verify", path)
    result = griffin("verify", "--for", "ollama", path)
    assert result.exit_code == 1
    kind, pre, template, verdict = result.stdout.splitlines()
    assert kind == f"{path}: general.type: expected STRING 'model', found STRING 'adapter'"
    assert pre == f"{path}: tokenizer.ggml.pre: expected STRING, found none"
    assert template.startswith(f"warning: {path}: tokenizer.chat_template: expected Gemma's, found another")
    assert verdict == f"{path}: sound, but not as Ollama reads it: 2 findings"
    found = json.loads(griffin("verify", "--for", "ollama", path, "--json").stdout)
    assert found["sound"]
    assert found["ollama"] == {"broken": [kind, pre], "warnings": [template.removeprefix("warning: ")]}
    assert "ollama" not in json.loads(done("verify", path, "--json"))


def test_damage_and_rules_are_told_together(model: Path, tmp_path: Path) -> None:
    path = spoiled(rewritten(model, tmp_path / "r.gguf", general__type=None), tmp_path / "m.gguf")
    result = griffin("verify", "--for", "ollama", path)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        f"{path}: general.type: expected STRING 'model', found none",
        f"{path}: damaged: 3 findings",
    ]


def test_a_split_file_is_not_for_ollama(model: Path, tmp_path: Path) -> None:
    result = griffin("verify", "--for", "ollama", split(model, tmp_path, split_max_tensors=60))
    assert result.exit_code == 1
    assert "split.count: expected one file, found 3 files; griffin quantize makes them one" in result.stdout


def test_another_program_is_not_known(model: Path) -> None:
    assert "'vllm' is no program known here; choose ollama" in griffin("verify", "--for", "vllm", model).stderr
