"""`griffin read`, `griffin states` and `griffin generate --from`, by their words and exit codes."""

import json
import os
import re
import signal
import tempfile
import threading
from hashlib import sha256
from pathlib import Path

import pytest
from command import done, griffin, refused, start, start_python

from griffin_gguf.cli import console
from griffin_gguf.runtime.places import VARIABLE

GREEDY = ("--temp", "0", "-t", "1")
TEXT = (Path(__file__).parents[2] / "cli/demo_model/heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data" / "documents"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some 400 tokens, as many as go through the weights at once."""
    path = tmp_path / "words.txt"
    path.write_text(f"{TEXT[5000:6200].strip()}\n", encoding="utf-8")
    return path


def state_of(data: Path, name: str) -> bytes:
    (path,) = (data / name).glob("*.state")
    return path.read_bytes()


def prompt_tokens(stderr: str) -> int:
    found = re.search(r"prompt (\d+) tokens", stderr)
    assert found
    return int(found[1])


def test_read_list_show_export_delete(model: Path, text: Path, data: Path, tmp_path: Path) -> None:
    result = griffin("read", model, text, "--save", "words", "-t", "1")
    assert result.exit_code == 0, result.stderr
    assert "Reading words.txt: 100 % (" in result.stderr
    (listed,) = json.loads(done("states", "--json"))
    tokens, nbytes = listed["tokens"], len(state_of(data, "words"))
    assert result.stdout == f"words: {tokens} tokens in a turn, kept in {nbytes / 1024:.1f} KiB\n"
    assert listed["sources"] == [
        {"name": "words.txt", "nbytes": text.stat().st_size, "sha256": sha256(text.read_bytes()).hexdigest()}
    ]
    assert (listed["name"], listed["form"], listed["model"]) == ("words", "turn", "demo_model")
    assert listed["nbytes"] == nbytes
    heading, row = (line.split() for line in done("states").splitlines() if line.split()[:1] in (["name"], ["words"]))
    assert heading == ["name", "model", "tokens", "size", "form", "created,", "UTC"]
    assert row[:8] == ["words", "demo_model", str(tokens), f"{nbytes / 1024:.1f}", "KiB", "in", "a", "turn"]
    assert json.loads(done("states", "show", "words", "--json")) == listed
    page = done("states", "show", "words")
    assert all(part in page for part in ("words.txt", listed["sources"][0]["sha256"], listed["path"], str(tokens)))
    assert done("states", "export", "words", "-o", tmp_path / "words.state") == f"{tmp_path / 'words.state'}\n"
    assert (tmp_path / "words.state").read_bytes() == state_of(data, "words")
    assert done("states", "delete", "words") == "deleted words\n"
    result = griffin("states")
    assert (result.stdout, result.exit_code) == ("", 0)
    assert result.stderr == f"no documents in {data}; griffin read makes one\n"
    assert done("states", "--json") == "[]\n"


def test_without_a_prompt_the_document_goes_on(model: Path, text: Path) -> None:
    done("read", model, text, "--save", "words", "--plain", "-t", "1")
    options = ("-n", "12", *GREEDY)
    expected = griffin("generate", model, "-f", text, *options)
    result = griffin("generate", model, "--from", "words", *options)
    assert result.stdout == expected.stdout != ""
    assert (prompt_tokens(result.stderr), prompt_tokens(expected.stderr) > 300) == (0, True)


def test_every_start_says_the_same_and_reads_only_the_prompt(model: Path, text: Path) -> None:
    done("read", model, text, "--save", "words", "--plain", "-t", "1")
    text.write_text(text.read_text(encoding="utf-8").rstrip("\n") + " And so he", encoding="utf-8")
    options = ("-n", "16", *GREEDY)
    expected = griffin("generate", model, "-f", text, *options)
    for _ in range(3):
        result = griffin("generate", model, "--from", "words", "-p", " And so he", *options)
        assert result.stdout == expected.stdout != ""
        assert prompt_tokens(result.stderr) < 10
    piped = done("generate", model, "--from", "words", *options, stdin=" And so he\n")
    assert piped == expected.stdout
    done("read", model, text, "--save", "turn", "-t", "1")
    assert done("generate", model, "--from", "turn", "-p", " And so he", *options) != expected.stdout


def test_files_pipes_and_stdin_are_read_alike(model: Path, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("One fine day.\n", encoding="utf-8")
    two.write_text("  Another, less so.\n\n", encoding="utf-8")
    whole = tmp_path / "whole.txt"
    whole.write_text("One fine day.\n\nAnother, less so.", encoding="utf-8")
    done("read", model, whole, "--save", "whole", "-t", "1")
    done("read", model, one, two, "--save", "files", "-t", "1")
    done("read", model, one, "-", "--save", "stdin", "-t", "1", stdin=two.read_text())
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(two.read_bytes()))
    writer.start()
    done("read", model, one, tmp_path / "pipe", "--save", "pipe", "-t", "1")
    writer.join()
    assert state_of(data, "whole") == state_of(data, "files") == state_of(data, "stdin") == state_of(data, "pipe")
    names = {d["name"]: [s["name"] for s in d["sources"]] for d in json.loads(done("states", "--json"))}
    assert (names["stdin"], names["pipe"]) == (["one.txt", "stdin"], ["one.txt", "pipe"])
    assert "stdin can be read only once" in refused("read", model, "-", "-", "--save", "twice", code=2)


def test_a_pipe_is_copied_into_the_documents_folder(
    model: Path, text: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    done("read", model, "-", "--save", "words", "-t", "1", stdin=text.read_bytes())
    assert sorted(path.suffix for path in (data / "words").iterdir()) == ["", ".json", ".state"]
    code = f"""
import resource, sys
from griffin_gguf.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
sys.argv = ["griffin", "read", {str(model)!r}, "-", "--save", "long", "-t", "1"]
main.main()
"""
    with start_python(code) as process:
        _, told = process.communicate(TEXT[:20_000])
    assert told == f"griffin: error: {data / 'long'}: cannot be written: File too large\n"
    assert [path.name for path in data.iterdir()] == ["words"]


def test_a_byte_order_mark_is_no_text(model: Path, text: Path, data: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    for name, path in (("words", text), ("marked", marked)):
        done("read", model, path, "--save", name, "-t", "1")
    assert state_of(data, "words") == state_of(data, "marked")


def test_a_narrow_terminal_cuts_no_name_and_no_number(
    model: Path, text: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a-document-of-quite-a-long-name-for-so-narrow-a-terminal"
    for name in ("words", long):
        done("read", model, text, "--save", name, "-t", "1")
    (listed, _) = json.loads(done("states", "--json"))
    for width in (80, 60, 40):
        monkeypatch.setattr(console, "_PIPE_WIDTH", width)
        page = done("states")
        rows = [line.split() for line in page.splitlines()]
        assert [row[0] for row in rows if row and row[0] in ("words", long)] == [long, "words"]
        assert page.count(f" {listed['tokens']} ") == page.count(f"{listed['nbytes'] / 1024:.1f} KiB") == 2
        assert page.count(listed["created"][:10]) == page.count(listed["created"][11:16]) == 2
        shown = done("states", "show", "words").split("\n")
        (path,) = (data / "words").glob("*.state")
        assert any(line.startswith(f"file     {path} (") for line in shown)
        assert f"SHA-256  {sha256(text.read_bytes()).hexdigest()}" in shown


def test_one_wrong_name_deletes_nothing(model: Path, text: Path, data: Path) -> None:
    for name in ("one", "two"):
        done("read", model, text, "--save", name, "-t", "1")
    assert refused("states", "delete", "one", "no", "two") == "document 'no': there is none"
    assert "expected 1 to 64 letters" in refused("states", "delete", "one", "../two")
    assert sorted(path.name for path in data.iterdir()) == ["one", "two"]
    assert done("states", "delete", "one", "two", "one") == "deleted one\ndeleted two\n"
    assert list(data.iterdir()) == []


def test_ctrl_c_keeps_what_was_read_and_the_same_command_goes_on(model: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT[:40_000], encoding="utf-8")
    command = ("read", model, path, "--save", "long", "-t", "1")
    with start(*command) as process:
        assert process.stderr
        assert re.match(r"Reading long\.txt: \d+ % \(", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        *_, kept, last = process.stderr.read().splitlines()
        assert process.wait() == 130
    found = re.fullmatch(r"([\d,]+) tokens are read and kept; the same command goes on from there", kept)
    assert found
    assert last == "griffin: interrupted"
    listing = griffin("states")
    assert f"long: an interrupted reading, {found[1]} tokens in; the same griffin read goes on\n" in listing.stderr
    assert "there is none" in refused("generate", model, "--from", "long", "-p", "x")
    result = griffin(*command)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"going on after {found[1]} tokens that an earlier run has read\n")
    done("read", model, path, "--save", "whole", "-t", "1")
    assert state_of(data, "long") == state_of(data, "whole")
    assert not griffin("states").stderr


def test_an_interrupted_reading_of_another_text_begins_anew(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT[:40_000], encoding="utf-8")
    with start("read", model, path, "--save", "long", "-t", "1") as process:
        assert process.stderr
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    path.write_text("Something short.", encoding="utf-8")
    result = griffin("read", model, path, "--save", "long", "-t", "1")
    assert "what an interrupted run has read is of no use: the text is another one; begins anew\n" in result.stderr
    assert "long: " in result.stdout


def test_what_exists_is_refused_unless_it_is_to_be_replaced(model: Path, text: Path, data: Path) -> None:
    done("read", model, text, "--save", "words", "-t", "1")
    before = state_of(data, "words")
    line = "document 'words': exists already; --replace reads it anew"
    assert refused("read", model, text, "--save", "words", "-t", "1") == line
    done("read", model, text, "--save", "words", "--plain", "--replace", "-t", "1")
    assert state_of(data, "words") != before


def test_a_model_without_a_template_reads_plain_text(plain_model: Path, text: Path) -> None:
    assert " tokens, kept in " in done("read", plain_model, text, "--save", "words", "-t", "1")
    (listed,) = json.loads(done("states", "--json"))
    assert listed["form"] == "text"


def test_what_is_wrong_is_one_line_and_leaves_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    latin1, blank = tmp_path / "latin1.txt", tmp_path / "blank.txt"
    latin1.write_bytes(b"caf\xe9")
    blank.write_bytes(b"\n")
    for file, problem in (
        (latin1, "latin1.txt: text: is not UTF-8: "),
        (blank, "blank.txt: text: expected some, found none"),
        (tmp_path / "no.txt", "no.txt: No such file or directory"),
        (tmp_path, f"{tmp_path}: Is a directory"),
    ):
        assert problem in refused("read", model, file, "--save", "words", "-t", "1")
    assert "is not UTF-8" in refused("read", model, "-", "--save", "words", "-t", "1", stdin=b"caf\xe9")
    assert "expected 1 to 64 letters" in refused("read", model, latin1, "--save", "../words", "-t", "1")
    assert "Missing option '--save'" in refused("read", model, latin1, code=2)
    assert not data.exists() or not list(data.iterdir())


def test_a_document_that_cannot_be_used_is_one_line(models: Path, model: Path, text: Path) -> None:
    done("read", model, text, "--save", "words", "-t", "1")
    other = models / "demo_model-Q2_K.gguf"
    assert "'words': was read with another model, demo_model (" in refused("generate", other, "--from", "words")
    assert refused("generate", model, "--from", "no") == "document 'no': there is none; known: words"
    assert "expected 1 to 64 letters" in refused("generate", model, "--from", "../words")
    for command in ("show", "delete"):
        assert "'no': there is none" in refused("states", command, "no")
    assert "'no': there is none" in refused("states", "export", "no", "-o", "x")


def test_a_damaged_document_hides_no_other(model: Path, text: Path, data: Path) -> None:
    for name in ("good", "bad"):
        done("read", model, text, "--save", name, "-t", "1")
    (data / "bad" / "document.json").write_bytes(b'{"version": "\x1b[2J"}')
    result = griffin("states")
    assert result.stderr.startswith(f"{data}/bad/document.json: contents: ")
    assert "\x1b" not in result.stderr
    assert " good " in result.stdout
    assert " bad " not in result.stdout
    assert "griffin states delete removes it" in refused("states", "show", "bad")
    done("states", "delete", "bad")
    assert griffin("states").stderr == ""
