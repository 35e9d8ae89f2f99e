import errno
import os
from pathlib import Path

import pytest
from command import done, griffin, refused
from hypothesis import example, given
from hypothesis import strategies as st
from rewriting import rewritten

from griffin_gguf.cli.modelfile import GEMMA_TEMPLATE, quoted
from griffin_gguf.quant.file_types import file_type, type_name
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, header
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.gguf_file import GgufFile


def parsed(modelfile: str) -> list[tuple[str, str]]:
    """Instructions and values as Ollama's parser (parser/parser.go) has them.

    A value goes on to the first line after which it is unquoted or its quotes are closed; characters that do not
    print are dropped, but for those that separate.
    """
    found: list[tuple[str, str]] = []
    left = modelfile
    while left := left.lstrip(" \t\r\n"):
        command, _, left = left.partition(" ")
        value = ""
        while left or value:
            c, left = left[:1], left[1:]
            whole = value.strip()
            mark = next((quotes for quotes in ('"""', '"') if whole.startswith(quotes)), "")
            closed = not mark or (len(whole) >= 2 * len(mark) and whole.endswith(mark))
            if c in ("\n", "\r", "") and closed:
                found.append((command, whole[len(mark) : len(whole) - len(mark)]))
                break
            if not c:
                raise ValueError(f"{command}: its quotes do not close")
            value += c if c.isprintable() or c in "\n\r\t" else ""
    return found


def written(*arguments: str | Path, into: Path) -> list[tuple[str, str]]:
    """Export, and parse the Modelfile."""
    done("export-ollama", *arguments, "-o", into)
    return parsed((into / "Modelfile").read_bytes().decode())


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
    assert not {"SYSTEM", "LICENSE"} & {line.split()[0] for line in lines if line}  # none was given, the file has none
    assert "Ollama as released cannot load this architecture" in result.stderr
    assert "griffin serve" in result.stderr


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


# ---- system text, licence, quoting


def test_system_text_and_licence(model: Path, tmp_path: Path) -> None:
    terms, system = 'Permission is granted,\n\tto "anyone".\n', 'Answer in "one" sentence.\nBe brief. '
    (tmp_path / "terms").write_text(terms, encoding="utf-8")
    found = written(model, "--system", system, "--license", tmp_path / "terms", into=tmp_path / "out")
    assert found[0] == ("FROM", f"./{model.name}")
    assert dict(found)["TEMPLATE"] == GEMMA_TEMPLATE
    assert dict(found)["SYSTEM"] == system
    assert dict(found)["LICENSE"] == terms
    assert {value for name, value in found if name == "PARAMETER"} >= {
        'stop "<start_of_turn>"', 'stop "<end_of_turn>"', "num_ctx 1024", "temperature 0.8", "top_k 40"
    }  # fmt: skip


def with_keys(source: Path, target: Path, **keys: str | int) -> Path:
    """A copy with more keys (dots as `__`)."""
    from gguf import GGUFValueType

    with GgufFile.open(source) as file:
        metadata = {name: (value, *file.types[name]) for name, value in file.metadata.items()}
        for name, value in keys.items():
            kind = GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32
            metadata[name.replace("__", ".")] = (value, kind, None)
        tensors = plan(file.hyperparameters(), file_type(type_name(file.metadata)))
        data = source.read_bytes()[file.data_offset :]
    target.write_bytes(header(Output(target, metadata, tensors)) + data)
    return target


def test_the_licence_is_what_the_file_says_unless_it_is_given(model: Path, tmp_path: Path) -> None:
    keys = {"general__license": "gemma", "general__license__link": "https://ai.google.dev/gemma/terms"}
    path = with_keys(model, tmp_path / "m.gguf", **keys)
    found = written(path, into=tmp_path / "out")
    assert dict(found)["LICENSE"] == "gemma\nhttps://ai.google.dev/gemma/terms"
    (tmp_path / "terms").write_text("Mine.", encoding="utf-8")
    assert dict(written(path, "--license", tmp_path / "terms", into=tmp_path / "out"))["LICENSE"] == "Mine."
    path = with_keys(model, tmp_path / "n.gguf", general__license=7)
    assert refused("export-ollama", path, "-o", tmp_path / "none").endswith(
        "n.gguf: general.license: expected a string, found int"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('a\nsay """\nb', "system: line 2 ends in three quotes"),
        ('"""\n', "system: line 1 ends in three quotes"),
        ('""" \t\r', "system: line 1 ends in three quotes"),
        ("a\n\x0cb", "system: line 2 has the character U+000C, which does not print"),
        ("\U0001f469\u200d\U0001f467", "system: line 1 has the character U+200D"),
        ("a\u00a0b", "system: line 1 has the character U+00A0"),
    ],
)
def test_what_a_modelfile_cannot_hold_is_refused(model: Path, tmp_path: Path, text: str, problem: str) -> None:
    assert problem in refused("export-ollama", model, "-o", tmp_path / "out", "--system", text)
    assert not (tmp_path / "out").exists()


@given(st.text() | st.text('" \t\n\ra', max_size=12))
@example('"')
@example('""')
@example('"""')
@example('say """ and go on')
@example("")
def test_quoted_text_comes_back_or_is_refused(text: str) -> None:
    def read_back(value: str) -> bool:
        try:
            return parsed(f"SYSTEM {value}\nFROM x\n") == [("SYSTEM", text), ("FROM", "x")]
        except ValueError:
            return False

    try:
        value = quoted("system", text)
    except GriffinError:
        assert not read_back(f'"""{text}"""')
    else:
        assert read_back(value)


def test_a_system_text_that_the_template_leaves_out_is_refused(plain_model: Path, tmp_path: Path) -> None:
    line = refused("export-ollama", plain_model, "-o", tmp_path / "out", "--system", "Be brief.")
    assert line.startswith("system: the template says nothing of system texts")
    (tmp_path / "own.tmpl").write_text("{{ .System }} {{ .Prompt }}", encoding="utf-8")
    template = ("--template", tmp_path / "own.tmpl")
    assert ("SYSTEM", "Be brief.") in written(plain_model, "--system", "Be brief.", *template, into=tmp_path / "out")


@pytest.mark.parametrize("name", ["it's.gguf", 'a"b.gguf', "line\nbreak.gguf", "m.gguf "])
def test_a_file_name_that_a_modelfile_cannot_hold(model: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(model.read_bytes())
    assert "file name: has characters that a Modelfile cannot hold" in refused(
        "export-ollama", path, "-o", tmp_path / "out"
    )


def test_numbers_are_written_out(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "m.gguf", recurrentgemma__context_length=1048576)
    assert ("PARAMETER", "num_ctx 1048576") in written(path, "--min-p", "0.00001", into=tmp_path / "out")
