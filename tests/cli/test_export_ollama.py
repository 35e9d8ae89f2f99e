import errno
import os
from pathlib import Path

import pytest
from command import done, griffin, refused
from rewriting import rewritten

from griffin_gguf.cli.modelfile import GEMMA_TEMPLATE


def test_a_modelfile_beside_the_file(model: Path, tmp_path: Path) -> None:
    result = griffin("export-ollama", model, "-o", tmp_path / "out", "--temp", "0.3")
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", model.name]
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith(f'FROM ./{model.name}\n\nTEMPLATE """{GEMMA_TEMPLATE}"""\n')
    lines = text.splitlines()
    assert 'PARAMETER stop "<start_of_turn>"' in lines
    assert 'PARAMETER stop "<end_of_turn>"' in lines
    assert "PARAMETER temperature 0.3" in lines
    assert "PARAMETER num_ctx 1024" in lines
    assert "cannot load this architecture yet" in result.stderr


def test_the_file_is_linked_or_copied(model: Path, tmp_path: Path) -> None:
    done("export-ollama", model, "-o", tmp_path / "linked")
    done("export-ollama", model, "-o", tmp_path / "copied", "--copy")
    linked, copied = (tmp_path / name / model.name for name in ("linked", "copied"))
    assert linked.samefile(model)
    assert not copied.samefile(model)
    assert copied.read_bytes() == model.read_bytes()
    done("export-ollama", linked, "-o", tmp_path / "linked")  # into its own folder: stays
    assert linked.samefile(model)


def test_without_a_template_the_prompt_goes_in_as_it_is(plain_model: Path, tmp_path: Path) -> None:
    done("export-ollama", plain_model, "-o", tmp_path)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert "PARAMETER stop" not in text


def test_other_turns_than_gemmas_need_a_template(model: Path, tmp_path: Path) -> None:
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    path = rewritten(model, tmp_path / "m.gguf", tokenizer__chat_template=chatml)
    assert "--template FILE" in refused("export-ollama", path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "own.tmpl").write_text("{{ .Prompt }}!", encoding="utf-8")
    done("export-ollama", path, "-o", tmp_path / "out", "--template", tmp_path / "own.tmpl")
    assert 'TEMPLATE """{{ .Prompt }}!"""' in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "no.gguf" in refused("export-ollama", tmp_path / "no.gguf", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_by_the_file_that_does_not_fit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = refused("export-ollama", model, "-o", tmp_path / "out", "--copy")
    assert line.endswith(f"{tmp_path / 'out' / model.name}: cannot be written: No space left on device")
    assert not (tmp_path / "out").exists()
