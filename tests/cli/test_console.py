import re
from io import StringIO

import pytest
from rich.console import Console

from griffin_gguf.cli.console import clean, size
from griffin_gguf.cli.progress import progress


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"), (5 << 40, "5120.0 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_control_characters_are_spelled_out() -> None:
    assert clean("a\tb\x1b[0m\u202e é 日") == "a\\tb\\x1b[0m\\u202e é 日"


def test_progress_off_a_terminal_is_a_line_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Working", unit="tokens") as report:
        for done in range(0, 1001, 5):
            report(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "Working: 0 % (0 of 1000 tokens)"
    assert lines[5].startswith("Working: 50 % (500 of 1000 tokens), ")
    assert lines[-1] == "Working: 100 % (1000 of 1000 tokens)"


def test_progress_of_nothing_is_done_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Working") as report:
        report(0, 0)
    assert capsys.readouterr().err == "Working: 100 % (0 B of 0 B)\n"


@pytest.mark.parametrize(("unit", "shown"), [("bytes", "0.5/1.0 KiB"), ("tokens", "512/1024 tokens")])
def test_progress_on_a_terminal_is_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch, unit: str, shown: str) -> None:
    screen = StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("griffin_gguf.cli.progress.err", terminal)
    with progress("Working", unit=unit) as report:
        report(512, 1024)
    assert "Working" in screen.getvalue()
    assert shown in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert screen.getvalue().endswith("\x1b[2K")  # the line is wiped
