"""--draft and --lookup: other speed, the same text."""

from pathlib import Path

import pytest
from command import done, griffin, refused
from models import random_model

PROMPT = "The evening was very fine, and the evening was very fine, and the evening was"
OPTIONS = ("-p", PROMPT, "-n", "40", "--temp", "0", "-t", "1")


def test_the_text_is_that_of_plain_decoding(models: Path) -> None:
    # F32 arithmetic all the way, so that rounding decides nothing.
    path = models / "demo_model-BF16.gguf"
    plain = done("generate", path, *OPTIONS)
    for options in (("--lookup",), ("--draft", path), ("--draft", models / "demo_model-Q2_K.gguf")):
        result = griffin("generate", path, *OPTIONS, *options)
        assert (result.exit_code, result.stdout) == (0, plain)
        assert "answer 40 tokens" in result.stderr


def test_a_conversation_goes_on_with_drafts(models: Path) -> None:
    path = models / "demo_model-BF16.gguf"
    turns = "Say it again.\nSay it again.\n/clear\nSay it again.\n"
    options = ("-n", "12", "--temp", "0", "-t", "1")
    plain = done("chat", path, *options, stdin=turns)
    assert plain.count("\n") >= 3
    for drafting in (("--lookup",), ("--draft", models / "demo_model-Q8_0.gguf")):
        assert done("chat", path, *options, *drafting, stdin=turns) == plain


def test_one_of_the_two(model: Path) -> None:
    result = griffin("generate", model, "-p", PROMPT, "--lookup", "--draft", model)
    assert result.exit_code == 2
    assert "--draft and --lookup: expected one of the two" in result.stderr


def test_a_draft_of_another_vocabulary_is_one_line(model: Path, tmp_path: Path) -> None:
    other = random_model(tmp_path)
    assert "expected the vocabulary of" in refused("generate", model, *OPTIONS, "--draft", other)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_tells_of_both(command: str) -> None:
    page = done(command, "--help")
    assert "--draft" in page
    assert "--lookup" in page
