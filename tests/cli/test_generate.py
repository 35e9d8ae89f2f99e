import signal
from pathlib import Path

import pytest
from command import done, griffin, refused, start
from rewriting import rewritten

PROMPT = "The evening was very fine, and"
GREEDY = ("--temp", "0", "-t", "1")


def test_only_the_continuation_is_on_stdout(model: Path) -> None:
    result = griffin("generate", model, "-p", PROMPT, "-n", "12", *GREEDY)
    assert result.exit_code == 0
    assert result.stdout
    assert PROMPT not in result.stdout
    assert "answer 12 tokens" in result.stderr
    assert result.stderr.count("\n") == 1


def test_prompt_file_and_pipe_say_the_same(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(f"{PROMPT}\n", encoding="utf-8")
    options = ("-n", "12", *GREEDY)
    expected = done("generate", model, "-p", PROMPT, *options)
    assert done("generate", model, "-f", tmp_path / "prompt.txt", *options) == expected
    assert done("generate", model, *options, stdin=f"{PROMPT}\n") == expected
    assert done("generate", model, "-p", "-", *options, stdin=PROMPT) == expected
    assert done("generate", model, "-p", "Something else", *options) != expected


def test_both_backends_say_the_same(models: Path) -> None:
    path = models / "demo_model-BF16.gguf"
    texts = {done("generate", path, "-p", PROMPT, "-n", "12", *GREEDY, "--backend", name) for name in ("numpy", "ggml")}
    assert len(texts) == 1


def test_a_seed_repeats_and_another_does_not(model: Path) -> None:
    texts = [
        done("generate", model, "-p", PROMPT, "-n", "24", "--temp", "1.5", "-t", "1", "--seed", seed) for seed in "112"
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(model: Path) -> None:
    text = done("generate", model, "-p", PROMPT, "-n", "24", *GREEDY)
    stop = text[4:9]
    assert done("generate", model, "-p", PROMPT, "-n", "24", *GREEDY, "--stop", stop) == text[: text.index(stop)]


@pytest.mark.parametrize("options", [("-f", "{}/latin1.txt"), ("-p", "-")])
def test_text_that_is_not_utf8_is_one_line(model: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    filled = [option.format(tmp_path) for option in options]
    assert "is not UTF-8" in refused("generate", model, *filled, stdin=b"caf\xe9")


def test_a_missing_prompt_file_is_one_line(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "no.txt"
    assert refused("generate", model, "-f", path) == f"{path}: No such file or directory"


def test_a_file_without_a_tokenizer_is_one_line(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "m.gguf", tokenizer__ggml__tokens=None)
    assert "tokenizer.ggml.tokens" in refused("generate", path, "-p", PROMPT)


def test_ctrl_c_ends_with_130_and_keeps_what_was_written(endless_model: Path) -> None:
    with start("generate", endless_model, "-p", PROMPT, "-n", "1000000", "-t", "1") as process:
        assert process.stdout
        assert process.stderr
        first = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert len(first) == 10
        assert process.wait() == 130
        assert process.stderr.read() == "griffin: interrupted\n"
