import os
import pty
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command import done, griffin, start

from griffin_gguf.cli.commands.chat import _lines
from griffin_gguf.cli.conversation import Conversation
from griffin_gguf.runtime import load
from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.sampling import Sampling

GREEDY = Sampling(temperature=0)


class Counting:
    """A model that notes what it is fed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.fed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, tokens: Sequence[int], state: Any) -> Any:
        self.fed += tokens
        return self._model.forward(tokens, state)


def say(conversation: Conversation, text: str) -> str:
    with conversation.ask(text) as generation:
        return "".join(generation)


def test_each_turn_feeds_only_what_is_new_and_all_of_it(model: Path) -> None:
    with load(model, threads=1) as loaded:
        counting: Any = Counting(loaded)
        conversation = Conversation(counting, GREEDY, 12)
        messages = [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": say(conversation, "Hello.")},
        ]
        say(conversation, "What is a hacker?")
        template = ChatTemplate.from_gguf(model, loaded.file.metadata)
        assert template
        messages.append({"role": "user", "content": "What is a hacker?"})
        whole = template.render(messages)
        text = loaded.tokenizer.decode(counting.fed, special=True)
        assert text.startswith(whole)  # then the second answer, so nothing was fed twice


def test_a_stopped_answer_is_part_of_the_conversation(model: Path) -> None:
    with load(model, threads=1) as loaded:
        counting: Any = Counting(loaded)
        conversation = Conversation(counting, GREEDY, 1000)
        with conversation.ask("Hello.") as generation:
            next(generation)
            generation.cancel()
            list(generation)
        say(conversation, "Go on.")
        fed = loaded.tokenizer.decode(counting.fed, special=True)
        assert fed.count("Hello.") == 1
        assert f"{generation.text}<end_of_turn>\n<start_of_turn>user\nGo on.<end_of_turn>" in fed


def test_a_turn_that_fails_leaves_the_conversation_whole(model: Path) -> None:
    with load(model, threads=1) as loaded:
        conversation = Conversation(loaded, GREEDY, 8)
        say(conversation, "Hello.")
        with pytest.raises(RuntimeError), conversation.ask("Broken"):
            raise RuntimeError
        after = say(conversation, "Go on.")
        other = Conversation(loaded, GREEDY, 8)
        say(other, "Hello.")
        assert after == say(other, "Go on.")


def test_a_word_after_a_slash_is_a_command_and_not_for_the_model(model: Path) -> None:
    result = griffin("chat", model, "-t", "1", stdin="/help\n/nonsense\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    help_line, refusal = result.stderr.splitlines()
    assert "/clear forgets the conversation" in help_line
    assert refusal.startswith("/nonsense is no command. /clear")


def test_clear_forgets(model: Path) -> None:
    with load(model, threads=1) as loaded:
        conversation = Conversation(loaded, GREEDY, 8)
        first = say(conversation, "Hello.")
        say(conversation, "What is a hacker?")
        conversation.clear()
        assert say(conversation, "Hello.") == first


def test_piped_lines_are_turns(model: Path) -> None:
    lines = "What is a hacker?\n\n/clear\nWhat is a hacker?\n/bye\nnever read\n"
    text = done("chat", model, "-n", "12", "--temp", "0", "-t", "1", stdin=lines)
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    assert first == second != ""
    assert text.endswith("\n")


def test_a_cut_answer_and_timings_are_told(model: Path) -> None:
    result = griffin("chat", model, "-n", "3", "--temp", "0", "-t", "1", "--timings", stdin="Hello.\n")
    assert "(cut after 3 tokens; -n allows more)" in result.stderr
    assert "answer 3 tokens" in result.stderr


def test_without_a_template_the_text_goes_on(plain_model: Path) -> None:
    result = griffin("chat", plain_model, "-n", "8", "--temp", "0", "-t", "1", stdin="The evening was very fine, and\n")
    assert "has no chat template" in result.stderr
    expected = done(
        "generate", plain_model, "-n", "8", "--temp", "0", "-t", "1", "-p", "The evening was very fine, and"
    )
    assert result.stdout.rstrip("\n") == expected.rstrip("\n")


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


def drain(pipe: int) -> None:
    """Read what is in a pipe now."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while os.read(pipe, 1 << 16):
            pass
    os.set_blocking(pipe, True)


def test_on_a_terminal_there_is_a_prompt_and_ctrl_d_ends(model: Path) -> None:
    terminal, inner = pty.openpty()
    options = ("-n", "3", "--temp", "0", "-t", "1")
    with start("chat", model, *options, terminal=inner) as process:
        os.close(inner)
        assert "Ctrl-C stops an answer" in read_until(terminal, ">>> ")
        os.write(terminal, b"Hello.\n")
        assert "(cut after 3 tokens" in read_until(terminal, ">>> ")
        os.write(terminal, b"\x04")
        assert process.wait() == 0
    os.close(terminal)


def read_until(terminal: int, end: str) -> str:
    """What the program shows until `end`."""
    shown = ""
    while not shown.endswith(end):
        piece = os.read(terminal, 1 << 12).decode()
        assert piece, shown
        shown += piece
    return shown


def test_ctrl_c_at_the_prompt_helps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([KeyboardInterrupt(), " Hello. ", "", EOFError()])

    def typed(prompt: str) -> str:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert list(_lines()) == ["Hello."]
    assert "Ctrl-D ends it" in capsys.readouterr().err
