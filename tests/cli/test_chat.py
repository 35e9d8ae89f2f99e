import itertools
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from command import done, griffin, refused, start
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.cells import cell_len
from rich.console import Console
from terminals import on_terminal

from griffin_gguf.cli.chat import repl, show
from griffin_gguf.cli.chat.commands import COMMANDS
from griffin_gguf.cli.chat.repl import open_quotes, unquoted
from griffin_gguf.cli.chat.settings import OPTIONS, changed, value_of
from griffin_gguf.cli.chat.talk import Talk
from griffin_gguf.cli.chat.terminal import Terminal, _Commands
from griffin_gguf.cli.chat.wrap import Wrap
from griffin_gguf.runtime import load, sessions
from griffin_gguf.runtime.conversation import Conversation, Shelf
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.places import VARIABLE
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.turns import Settings

GREEDY = ("-n", "12", "--temp", "0", "-t", "1")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data"


def record(data: Path, name: str) -> dict[str, Any]:
    return json.loads((data / "sessions" / name / "session.json").read_text())


def users(data: Path, name: str) -> list[str]:
    return [turn["user"] for turn in record(data, name)["turns"]]


# Through pipes.


def test_piped_lines_are_turns(model: Path, data: Path) -> None:
    lines = "What is a hacker?\n\n/clear\nWhat is a hacker?\n/bye\nnever read\n"
    text = done("chat", model, *GREEDY, stdin=lines)
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    assert first == second != ""
    assert text.endswith("\n")
    assert not data.exists()  # nothing is kept


def test_a_message_of_several_lines_is_between_quotes(model: Path) -> None:
    quoted = griffin("chat", model, *GREEDY, stdin='"""\n/help\nWhat is\na hacker?\n"""\n/show messages\n')
    assert ">>> /help\n... What is\n... a hacker?\n" in quoted.stderr
    unfinished = griffin("chat", model, *GREEDY, stdin='"""What is\na hacker?\n')
    assert unfinished.stdout == done("chat", model, *GREEDY, "-p", "What is\na hacker?")


def test_a_word_after_a_slash_is_a_command_and_not_for_the_model(model: Path) -> None:
    result = griffin("chat", model, "-t", "1", stdin="/help\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert all(f"/{name}" in result.stderr and command.help in result.stderr for name, command in COMMANDS.items())
    assert refused("chat", model, "-t", "1", stdin="/nonsense\n").startswith("/nonsense: is no command; /help lists")
    for message in ("/etc/hosts: what is it?", "/tmp is full", "/"):
        assert done("chat", model, *GREEDY, stdin=f"{message}\n") == done("chat", model, *GREEDY, "-p", message)


def test_a_cut_answer_and_timings_are_told(model: Path) -> None:
    result = griffin("chat", model, "-n", "3", "--temp", "0", "-t", "1", "--timings", stdin="Hello.\n")
    assert "(cut after 3 tokens; -n and /set max_tokens allow more)" in result.stderr
    assert "answer 3 tokens" in result.stderr
    assert "answer" not in griffin("chat", model, *GREEDY, stdin="Hello.\n").stderr


def test_without_a_template_the_text_goes_on(plain_model: Path) -> None:
    result = griffin("chat", plain_model, *GREEDY, stdin="The evening was very fine, and\n")
    assert "has no chat template" in result.stderr
    expected = done("generate", plain_model, *GREEDY, "-p", "The evening was very fine, and")
    assert result.stdout.rstrip("\n") == expected.rstrip("\n")
    assert (
        "has no chat template, and so no place for a system text"
        in griffin("chat", plain_model, "-t", "1", "--system", "Be brief.", stdin="Hello.\n").stderr
    )


def test_a_document_through_a_pipe_comes_before_the_message(model: Path, data: Path) -> None:
    result = griffin("chat", model, *GREEDY, "-p", "Summarize.", stdin="The fox\nsaid nothing.\n")
    assert result.exit_code == 0
    quoted = '"""The fox\nsaid nothing.\n\nSummarize."""\n'
    assert result.stdout == done("chat", model, *GREEDY, stdin=quoted) != ""
    assert done("chat", model, *GREEDY, "-p", "/help") != ""  # a message, whatever it looks like
    assert not data.exists()
    done("chat", model, *GREEDY, "-p", "Summarize.", "--session", "work", stdin="The fox\nsaid nothing.\n")
    assert users(data, "work") == ["The fox\nsaid nothing.\n\nSummarize."]


def test_a_system_text_stands_before_the_message(model: Path, data: Path) -> None:
    text = done("chat", model, *GREEDY, "-p", "Hello.", "--system", "Be brief.", "--session", "work")
    assert text == done("chat", model, *GREEDY, "-p", "Be brief.\n\nHello.", "--session", "merged")
    (one,), (other,) = record(data, "work")["turns"], record(data, "merged")["turns"]
    assert one["prompt"] == other["prompt"]
    assert (one["system"], one["user"]) == ("Be brief.", "Hello.")


def test_an_answer_ends_before_a_stop_text(model: Path) -> None:
    whole = done("chat", model, *GREEDY, "-p", "Hello.").rstrip("\n")
    word = whole.split()[2]
    expected = whole[: whole.index(word)]
    assert done("chat", model, *GREEDY, "-p", "Hello.", "--stop", word).rstrip("\n") == expected
    assert done("chat", model, *GREEDY, stdin=f"/set stop {word}\nHello.\n").rstrip("\n") == expected


def test_commands_go_back_and_on(model: Path) -> None:
    ask, more = "What is a hacker?", "Why?"
    answers = done("chat", model, *GREEDY, stdin=f'"""{ask}"""\n"""{more}"""\n')
    first = done("chat", model, *GREEDY, "-p", ask)
    second = answers.removeprefix(first)
    assert done("chat", model, *GREEDY, stdin=f"{ask}\n{more}\n/undo\n{more}\n") == answers + second
    assert done("chat", model, *GREEDY, stdin=f"{ask}\n{more}\n/regen\n") == answers + second
    assert done("chat", model, *GREEDY, stdin=f"{ask}\nHello.\n/edit {more}\n").endswith(second)
    drawn = ("chat", model, "-n", "12", "--temp", "1.5", "-t", "1")
    both = done(*drawn, "--seed", "3", stdin=f"{ask}\n/regen\n")
    assert both == done(*drawn, "--seed", "3", "-p", ask) + done(*drawn, "--seed", "4", "-p", ask)


def test_stats_tell_that_nothing_was_read_twice(model: Path) -> None:
    result = griffin("chat", model, *GREEDY, stdin="Hello.\nWhy?\n/stats\n/regen\n/stats\n/undo\n/stats\n")
    lines = [line.split() for line in result.stderr.splitlines()]
    have = [int(line[3]) for line in lines if line[:1] == ["conversation"]]
    read = [int(line[3]) for line in lines if line[:3] == ["read", "in", "all"]]
    assert have[0] == have[1] > have[2]
    assert read[0] == have[0] - 1  # an answer that was cut: nobody has read its last token
    assert read[1] == read[2] == read[0] + 11  # the answer again, its last token excepted
    assert result.stderr.count("none of them twice") == 1
    assert f"{read[1] - have[1]} of them since taken back or answered anew" in result.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/set heat 3", "heat: is no option; expected one of temperature, top_k"),
        ("/set top_k many", "top_k: expected a whole number, found 'many'"),
        ("/set top_k 1.5", "top_k: expected a whole number, found '1.5'"),
        ("/set top_p 2", "top_p: expected above 0 and at most 1, found 2.0"),
        ("/set temperature nan", "temperature: expected from 0 to 1000, found nan"),
        ("/set max_tokens 0", "max_tokens: expected a whole number of at least 1, found 0"),
        ("/set seed -1", "seed: expected a whole number of at least 0, or none, found -1"),
        ('/set stop "a', "stop: expected a text, or"),
        ('/set stop ""', "stop: expected no empty text"),
        ("/undo", "nothing has been said yet"),
        ("/regen", "nothing has been said yet"),
        ("/edit Why?", "nothing has been said yet"),
        ("/edit", "/edit: expected TEXT behind it where no one is at a terminal"),
        ("/show me", "/show me: expected model, settings, system, messages or nothing"),
        ("/fork", "/fork: expected NAME behind it"),
        ("/undo 3", "/undo: expected nothing behind it, found '3'"),
        ("/save a/b", "session 'a/b': expected a name of letters"),
        ("/load none", "session none: is not there; there is none yet"),
        ("/delete none", "session none: is not there; there is none yet"),
    ],
)
def test_what_a_command_cannot_do_is_one_line(model: Path, line: str, problem: str) -> None:
    assert refused("chat", model, "-t", "1", stdin=f"{line}\n").startswith(problem)


def test_every_option_of_sampling_can_be_set_and_is_shown_as_it_is_set() -> None:
    names = {field.name for field in fields(Sampling)} | {"max_tokens", "stop"}
    assert OPTIONS.keys() == names
    values = {"seed": "7", "max_tokens": "9", "top_k": "3", "repeat_last_n": "-1", "stop": '"\\n" "Ü:"'}
    settings = Settings()
    for name in names:
        settings = changed(settings, name, values.get(name, "0.5"))
        assert value_of(settings, name) == values.get(name, "0.5")
    assert settings.stop == ("\n", "Ü:")
    assert changed(settings, "stop", "none").stop == ()
    assert changed(settings, "seed", "none").sampling.seed is None
    assert changed(settings, "stop", "###  x").stop == ("###  x",)


@given(st.sampled_from(sorted(OPTIONS)), st.text())
def test_whatever_is_set_is_set_or_refused(name: str, text: str) -> None:
    with suppress(UnsupportedError):
        settings = changed(Settings(), name, text)
        assert changed(Settings(), name, value_of(settings, name)) == settings


WORDS = st.lists(st.tuples(st.text("abé", min_size=1, max_size=4), st.sampled_from(" \n")))


@given(WORDS, st.integers(1, 5), st.integers(8, 20))
def test_words_are_whole_on_a_line(words: list[tuple[str, str]], size: int, width: int) -> None:
    text = "".join(word + space for word, space in words)
    wrap = Wrap(width)
    shown = "".join(wrap.push(text[at : at + size]) for at in range(0, len(text), size)) + wrap.flush()
    assert shown.replace("\n", " ") == text.replace("\n", " ").rstrip(" ") + (" " if text.endswith("\n") else "")
    assert all(cell_len(line.rstrip(" ")) <= width for line in shown.split("\n"))
    for line, after in itertools.pairwise(shown.split("\n")):
        if f"{line}\n{after}" not in text:  # a line that we broke: the next word had no room on it
            assert cell_len(f"{line} {after.split(' ')[0]}") > width


@given(st.lists(st.text("ab日本👩\u0301", min_size=1, max_size=9)), st.integers(1, 5), st.integers(4, 12))
def test_wide_characters_come_at_once_and_break_anywhere(words: list[str], size: int, width: int) -> None:
    text = " ".join(words)
    wrap = Wrap(width)
    shown = "".join(wrap.push(text[at : at + size]) for at in range(0, len(text), size)) + wrap.flush()
    assert shown.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    if len(max(words, default="", key=len)) <= width:  # a longer word is broken by the terminal
        assert all(cell_len(line.rstrip(" ")) <= width for line in shown.split("\n"))


def test_what_has_no_spaces_is_not_held_back() -> None:
    wrap = Wrap(7)
    assert [wrap.push(piece) for piece in "日本語ab日"] == ["日", "本", "語", "", "", "\nab日"]
    wrap = Wrap(4)
    assert [wrap.push(piece) for piece in "a abcdefgh i"] == ["", "a", "", "", "", "", "\nabcde", "f", "g", "h", "", ""]
    assert wrap.flush() == "\ni"


def test_lines_break_between_words_and_nowhere_else() -> None:
    wrap = Wrap(10)
    text = wrap.push("one two three\n  four five six seven") + wrap.flush()
    assert text == "one two\nthree\n  four\nfive six\nseven"


@pytest.mark.parametrize(
    ("text", "unfinished", "message"),
    [
        ("Hello.", False, "Hello."),
        ('"""', True, ""),
        ('"""a', True, "a"),
        ('"""a"""', False, "a"),
        ('"""\na\n\nb\n"""', False, "a\n\nb"),
        ('a """', False, 'a """'),
        ('""""""', False, ""),
    ],
)
def test_quotes(text: str, unfinished: bool, message: str) -> None:
    assert open_quotes(text) is unfinished
    assert unquoted(text) == message


def test_bytes_that_are_no_text_are_one_line_that_names_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("chat", model, "-p", "a\udcff", stdin=b"\xff").startswith("--prompt: text: is not UTF-8")
    assert refused("chat", model, "-p", "a", "--system", "\udcff").startswith("--system: text: is not UTF-8")
    assert refused("chat", model, "-p", "a", stdin=b"a\xff").startswith("stdin: text: is not UTF-8")
    assert refused("chat", model, "-t", "1", stdin=b"/bye\xff\n").startswith("stdin: line 1: is not UTF-8")
    typed = iter(["a\udcff", None])
    with load(model, threads=1) as loaded:
        talk = Talk(loaded, Conversation(loaded), typed=True)
        with monkeypatch.context() as patch:
            said: list[str] = []
            patch.setattr(repl, "complain", said.append)
            repl.run(talk, lambda _: next(typed))
    assert said == ["your message: text: is not UTF-8: invalid byte behind 1 characters"]


# Sessions.


def test_a_session_goes_on(model: Path, data: Path) -> None:
    whole = done("chat", model, *GREEDY, stdin="Hello.\nWhy?\nAnd?\n")
    first = done("chat", model, *GREEDY, "--session", "work", stdin="Hello.\n")
    second = done("chat", model, "-t", "1", "--session", "work", "-p", "Why?")  # the settings are kept too
    third = done("chat", model, "-t", "1", "-c", stdin="And?\n")
    assert first + second + third == whole
    assert users(data, "work") == ["Hello.", "Why?", "And?"]
    assert record(data, "work")["tokens_read"] == sum(
        len(turn["prompt"]) + len(turn["said"]) for turn in record(data, "work")["turns"]
    ) - (record(data, "work")["turns"][-1]["said"] != [] and len(record(data, "work")["turns"][-1]["said"]) == 12)


def test_options_on_the_command_line_come_before_those_of_the_session(model: Path, data: Path) -> None:
    done("chat", model, *GREEDY, "--session", "work", "--stop", "#", "-p", "Hello.")
    done("chat", model, "--session", "work", "-n", "3", "-t", "1", "--system", "Be brief.", "-p", "Why?")
    found = record(data, "work")
    assert (found["max_tokens"], found["sampling"]["temperature"], found["stop"]) == (3, 0.0, ["#"])
    assert [turn["system"] for turn in found["turns"]] == ["", "Be brief."]


def test_sessions_are_forked_saved_loaded_listed_and_deleted(model: Path, data: Path) -> None:
    lines = ["One.", "/save copy", "Two.", "/fork branch", "Three.", "/load work", "Four.", "/sessions", "/clear"]
    lines += ["/delete copy", "Five.", "/load copy"]
    result = griffin("chat", model, *GREEDY, "--session", "work", stdin="\n".join(lines))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("griffin: error: session copy: is not there; there are branch, ")
    assert users(data, "branch") == ["One.", "Two.", "Three."]
    assert users(data, "work") == ["One.", "Two.", "Four."]
    unnamed = [path.name for path in (data / "sessions").iterdir() if path.name.startswith("chat-")]
    assert [users(data, name) for name in unnamed] == [["Five."]]
    assert {"work", "branch", *unnamed} == {path.name for path in (data / "sessions").iterdir()}
    listed = [line.split()[:3] for line in result.stderr.splitlines()]
    assert ["work", "demo_model", "3"] in listed
    assert ["copy", "demo_model", "1"] in listed
    assert "Now in branch. The other one stays as it is: /load work" in result.stderr


def test_after_a_document(model: Path, tmp_path: Path, data: Path) -> None:
    text = tmp_path / "fox.txt"
    text.write_text("The fox of the river said that nothing under the moon grows for ever.")
    done("read", model, text, "--save", "fox", "-t", "1")
    answer = done("chat", model, *GREEDY, "--from", "fox", "--session", "work", "-p", "What grows?")
    assert answer == done("chat", model, *GREEDY, "-p", "What grows?", stdin=text.read_text())
    assert record(data, "work")["document"]["name"] == "fox"
    assert "has begun already" in refused("chat", model, "-t", "1", "--session", "work", "--from", "fox")
    assert "goat" in refused("chat", model, "-t", "1", "--from", "goat")
    shown = griffin("chat", model, "-t", "1", "-c", stdin="/show\n").stderr
    assert "document  fox, " in shown


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("-c", "--session", "x"), "--continue and --session: expected one of the two"),
        (("-c", "--no-save"), "--continue and --no-save: expected one of the two"),
        (("--session", "x", "--no-save"), "--session and --no-save: expected one of the two"),
        (("-c", "--from", "x"), "--continue and --from: expected one of the two"),
    ],
)
def test_options_that_contradict_each_other(model: Path, options: tuple[str, ...], problem: str) -> None:
    assert problem in refused("chat", model, *options, code=2)


def test_a_session_that_cannot_be_opened_is_one_line(models: Path, model: Path, data: Path) -> None:
    assert "holds no conversation with demo_model to go on with" in refused("chat", model, "-t", "1", "-c")
    done("chat", model, *GREEDY, "--session", "work", "-p", "Hello.")
    other = models / "demo_model-BF16.gguf"
    assert "session work: is a conversation with another model" in refused(
        "chat", other, "-t", "1", "--session", "work"
    )
    (data / "sessions" / "work" / "session.json").write_text("{}")
    assert "session.json: file: is no conversation of this version" in refused(
        "chat", model, "-t", "1", "--session", "work"
    )


def test_a_session_is_for_one_process(model: Path) -> None:
    with start("chat", model, *GREEDY, "--session", "work") as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("Hello.\n")
        process.stdin.flush()
        assert process.stdout.readline()
        expected = f"session work: is open already, in process {process.pid}"
        process.stdin.write("/stats\n")
        process.stdin.flush()
        assert process.stderr
        while "snapshots" not in process.stderr.readline():
            pass
        assert refused("chat", model, "-t", "1", "--session", "work") == expected
        process.stdin.close()
        assert process.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(endless_model: Path) -> None:
    with start("chat", endless_model, "-n", "1000000", "-t", "1") as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for _ in range(2):
            process.stdin.write("Tell me a long story.\n")
            process.stdin.flush()
            assert os.read(process.stdout.fileno(), 1)  # the answer has begun
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "(stopped)\n"
            drain(process.stdout.fileno())
        process.stdin.write("/bye\n")
        process.stdin.close()
        assert process.wait() == 0


def test_a_second_ctrl_c_through_a_pipe_ends_the_program_and_loses_nothing(endless_model: Path, data: Path) -> None:
    with start("chat", endless_model, "-n", "1000000", "-t", "1", "--session", "work") as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write("One.\nTwo.\nThree.\nFour.\n")  # the lines are there already, so nobody waits between
        process.stdin.flush()
        process.stdin.close()
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "(stopped)\n"
        process.send_signal(signal.SIGINT)
        os.set_blocking(process.stdout.fileno(), True)
        while os.read(process.stdout.fileno(), 1 << 16):
            pass
        assert process.wait() == 130
    assert users(data, "work")[0] == "One."
    assert len(users(data, "work")) <= 2


class Pressing(Shelf):
    """A shelf beside which somebody presses Ctrl-C while it keeps a turn."""

    def commit(self, conversation: Conversation) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        super().commit(conversation)
        os.kill(os.getpid(), signal.SIGINT)


def lines(*texts: str) -> Callable[[Talk], str | None]:
    """A person who types these."""
    left = iter(texts)

    def read(talk: Talk) -> str | None:
        talk.interrupts.forget()
        return next(left, None)

    return read


def test_ctrl_c_while_a_turn_is_kept_loses_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with load(model, threads=1) as loaded:
        conversation = Conversation(loaded, Settings(Sampling(temperature=0), 4), Pressing())
        repl.run(Talk(loaded, conversation, typed=True), lines("Hello.", "Why?"))
    assert [turn.user for turn in conversation.turns] == ["Hello.", "Why?"]
    assert all(len(turn.said) == 4 for turn in conversation.turns)
    assert "(stopped" not in capsys.readouterr().err


@pytest.mark.parametrize(("line", "kept"), [
    ("Why?", "the message is not kept"),
    ("/edit Why?", "the last message and its answer stay"),
    ("/regen", "the last message and its answer stay"),
])  # fmt: skip
def test_ctrl_c_before_an_answer_begins_stops_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, kept: str
) -> None:
    usual = signal.getsignal(signal.SIGINT)
    with load(model, threads=1) as loaded:
        conversation = Conversation(loaded, Settings(Sampling(temperature=0), 4), Shelf(1))
        repl.run(talk := Talk(loaded, conversation, typed=True), lines("Hello."))
        before, settle = conversation.turns, conversation._settle  # pyright: ignore[reportPrivateUsage]

        def pressed(*arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            settle(*arguments)

        monkeypatch.setattr(conversation, "_settle", pressed)
        repl.run(talk, lines(line))
    assert conversation.turns == before
    assert f"(stopped before it began: {kept})" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is usual


def drain(pipe: int) -> None:
    """Read what is in a pipe now."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while os.read(pipe, 1 << 16):
            pass
    os.set_blocking(pipe, True)


# At a terminal.


def test_at_a_terminal(endless_model: Path, data: Path) -> None:
    with on_terminal("chat", endless_model, "-n", "1000000", "-t", "1") as terminal:
        assert "Ctrl-C stops an answer" in terminal.wait_for(">>> ")
        terminal.type("Tell me a story.\r")
        terminal.wait_for("Tell me a story.")
        terminal.wait_for("\n")
        terminal.wait_for(" ")  # the answer has begun
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for(">>> ")
        terminal.type("\x03")  # on an empty line
        terminal.wait_for("Ctrl-D or /bye ends the chat")
        terminal.wait_for(">>> ")
        terminal.type('/set max_tokens 4\r"""Two\rlines"""\r')
        terminal.wait_for("(cut after 4 tokens")
        terminal.wait_for(">>> ")
        terminal.type("/undo now\r")
        terminal.wait_for("griffin: error: /undo: expected nothing behind it")
        terminal.wait_for(">>> ")
        terminal.type("/edit\r")
        assert "Two" in terminal.wait_for("... lines")
        terminal.type(" more\r")
        terminal.wait_for("(cut after 4 tokens")
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        terminal.wait_for("Kept as chat-")
        assert terminal.end() == 0
    (session,) = (data / "sessions").iterdir()
    assert users(data, session.name) == ["Tell me a story.", "Two\nlines more"]
    history = data / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+Tell me a story." in history.read_text()
    with on_terminal("chat", endless_model, "-c", "-t", "1") as terminal:
        assert ">>> Two\n... lines more" in terminal.wait_for("2 turns, ")
        terminal.wait_for(">>> ")
        terminal.type("/bye\r")
        assert terminal.end() == 0


def test_with_no_save_nothing_is_on_disk(model: Path, data: Path) -> None:
    with on_terminal("chat", model, *GREEDY, "--no-save") as terminal:
        terminal.wait_for(">>> ")
        terminal.type("Hello.\r")
        terminal.wait_for("(cut after 12 tokens")
        terminal.wait_for(">>> ")
        terminal.type("/stats\r")
        terminal.wait_for("2 of 2, in memory only")
        terminal.wait_for(">>> ")
        terminal.type("/bye\r")
        assert terminal.end() == 0
    assert not data.exists()


def test_on_a_dumb_terminal_there_is_a_prompt_and_ctrl_d_ends(model: Path) -> None:
    with on_terminal("chat", model, "-n", "3", "--temp", "0", "-t", "1", TERM="dumb") as terminal:
        assert "Ctrl-C stops an answer" in terminal.wait_for(">>> ")
        terminal.type("Hello.\r")
        terminal.wait_for("(cut after 3 tokens")
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        assert terminal.end() == 0


@pytest.fixture
def talk(model: Path) -> Iterator[Talk]:
    with load(model, threads=1) as loaded:
        yield Talk(loaded, Conversation(loaded), typed=True)


def test_at_the_edit_prompt_commands_are_commands(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.conversation.settings = Settings(Sampling(temperature=0), 2)

    def said(*typed: str) -> list[str]:
        repl.run(talk, lines(*typed))
        return [turn.user for turn in talk.conversation.turns]

    assert said("One.", "/edit", "/undo") == []
    assert said("One.", "/edit", "/set max_tokens 3", "Two.") == ["One.", "Two."]
    assert talk.conversation.settings.max_tokens == 3
    assert said("/edit", "/word") == ["One.", "/word"]
    assert said('"""/help"""', "/edit", "/stats") == ["One.", "/word", "/stats"]  # the old message was such a line


def test_what_was_stored_moves_no_cursor(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.conversation.settings = Settings(Sampling(temperature=0), 2)
    repl.run(talk, lines("\x1b[2JHello.\x07\x9b"))
    (turn,) = talk.conversation.turns
    talk.conversation.turns = [replace(turn, answer="a\x1b]0;title\x07\tb\r\nc", system="\x1b[8m")]
    talk.conversation.system = "\x1b[8m"
    capsys.readouterr()
    show.messages(talk)
    show.system(talk)
    show.resumed(talk)
    shown = capsys.readouterr().err
    assert not set(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) & set(shown)
    assert shown.count("\\x1b[2JHello.\\x07\\x9b") == 2
    assert "a\\x1b]0;title\\x07" in shown


def test_a_long_turn_is_shown_in_part(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.conversation.settings = Settings(Sampling(temperature=0), 2)
    repl.run(talk, lines("Hello."))
    (turn,) = talk.conversation.turns
    for user, answer in (("\n".join(map(str, range(50))), "word " * 5000 + "end"), ("x" * 10000, "y\n" * 100 + "end")):
        talk.conversation.turns = [replace(turn, user=user, answer=answer)]
        capsys.readouterr()
        show.resumed(talk)
        shown = capsys.readouterr().err.rstrip("\n").split("\n")
        assert len(shown) <= 14
        assert shown[0].startswith(f">>> {user[0]}")
        assert "…" in shown[3]
        assert any(line.endswith("end") for line in shown)


@pytest.mark.parametrize("width", [60, 80, 160])
def test_in_a_narrow_list_names_are_whole(talk: Talk, monkeypatch: pytest.MonkeyPatch, data: Path, width: int) -> None:
    console = Console(width=width, force_terminal=True, color_system=None, record=True, file=StringIO())
    monkeypatch.setattr(show, "err", console)
    told: list[str] = []
    monkeypatch.setattr(show, "note", told.append)
    talk.conversation.settings = Settings(Sampling(temperature=0), 2)
    repl.run(talk, lines("Tell me about the number of all the things that there are."))
    names = ["chat-20260131-142530", "chat-20260131-142530-1", "x" * 64, "bad"]
    for name in names:
        sessions.keep(talk.model, name, talk.conversation).close()
    (data / "sessions" / "bad" / "session.json").write_text("{")
    show.sessions(sessions.entries(), talk)
    shown = console.export_text()
    assert all(f" {name} " in shown for name in names)
    assert ("demo_model" in shown) == (width >= 90)
    assert "session.json" not in shown
    assert any("bad/session.json: file: is no conversation" in line for line in told)


def full(*_: Any, **__: Any) -> None:
    raise GriffinError("x.state: cannot be written: No space left on device")


def test_what_is_not_kept_is_not_called_so(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk.take_up(Conversation(talk.model, Settings(Sampling(temperature=0), 2), sessions.Session.begin(talk.model)))
    with monkeypatch.context() as patch:
        patch.setattr("griffin_gguf.runtime.snapshot.Snapshot.save", full)
        repl.run(talk, lines("Hello.", "/clear", "/fork other", "/load other"))
        told = capsys.readouterr().err
        assert told.count("griffin: error: x.state: cannot be written: No space left") == 4
        assert "With --no-save nothing is kept on disk" in told
        assert [turn.user for turn in talk.conversation.turns] == ["Hello."]
        with pytest.raises(GriffinError, match=r"the conversation is NOT kept: x\.state: cannot be written: No space"):
            show.farewell(talk)
    show.farewell(talk)
    (name,) = sessions.names()
    assert f"Kept as {name}" in capsys.readouterr().err.replace("\n", " ")
    assert users(data, name) == ["Hello."]
    repl.run(talk, lines(f"/save {name}", f"/fork {name}"))
    assert capsys.readouterr().err.count(f"session {name}: is the one you are in") == 2
    talk.conversation.shelf.close()


def test_a_history_that_cannot_be_written_is_told_once(
    talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    told = "With --no-save nothing is kept on disk."
    with create_pipe_input() as keys:
        Terminal(tmp_path / "file" / "chat-history", input=keys, output=DummyOutput())
        shown = capsys.readouterr().err.replace("\n", "")
        assert "/file: File exists: what you type is not kept." in shown
        path = tmp_path / "chat-history"
        terminal = Terminal(path, input=keys, output=DummyOutput())
        path.unlink()
        path.mkdir()  # nobody, root included, can write to that
        keys.send_text("one\r")
        assert terminal(talk) == "one"
        assert told in capsys.readouterr().err.replace("\n", " ")
        keys.send_text("two\r")
        assert terminal(talk) == "two"
        assert told not in capsys.readouterr().err.replace("\n", " ")
        keys.send_text("\x1b[A\r")
        assert terminal(talk) == "two"


def test_keys(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    with create_pipe_input() as keys:
        terminal = Terminal(None, input=keys, output=DummyOutput())
        keys.send_text(" Hello. \r")
        assert terminal(talk) == "Hello."
        keys.send_text('"""a\rb\r"""\r')
        assert terminal(talk) == '"""a\nb\n"""'
        keys.send_text("a\x1b\rb\r")  # Alt-Enter
        assert terminal(talk) == "a\nb"
        keys.send_text("half a line\x03")
        assert terminal(talk) == ""
        assert capsys.readouterr().err == ""
        keys.send_text("\x03")
        assert terminal(talk) == ""
        assert "Ctrl-D or /bye ends the chat" in capsys.readouterr().err
        talk.draft = "old"
        keys.send_text(" and new\r")
        assert terminal(talk) == "old and new"
        talk.draft = None
        keys.send_text("\x1b[A\x1b[A\r")  # twice up
        assert terminal(talk) == "a\nb"
        keys.send_text("\x04")
        assert terminal(talk) is None


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/re", ["/regen"]),
        ("/s", ["/system", "/set", "/show", "/save", "/sessions", "/stats"]),
        ("/set top", ["top_k", "top_p"]),
        ("/show mes", ["messages"]),
        ("/load w", ["work"]),
        ("/nonsense ", []),
        ("re", []),
        ("/undo ", []),
    ],
)
def test_tab_completes(typed: str, offered: list[str], data: Path) -> None:
    (data / "sessions" / "work").mkdir(parents=True)
    (data / "sessions" / "work" / "session.json").touch()
    found = _Commands().get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in found] == offered
