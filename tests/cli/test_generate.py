import json
import os
import signal
from pathlib import Path

import pytest
from command import done, griffin, refused, start
from jsonschema import validate
from rewriting import rewritten

from griffin_gguf.runtime import grammar
from griffin_gguf.runtime.places import VARIABLE

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


@pytest.mark.parametrize("option", ["--prompt", "--stop"])
def test_an_argument_that_is_not_utf8_is_one_line(model: Path, option: str) -> None:
    found = refused("generate", model, "-p", "x", option, os.fsdecode("né ".encode() + b"caf\xe9 x"))
    assert found == f"{option}: text: is not UTF-8: invalid continuation byte at byte 7"


def test_a_byte_order_mark_is_no_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_text(PROMPT, encoding="utf-8-sig")
    options = ("-n", "12", *GREEDY)
    expected = done("generate", model, "-p", PROMPT, *options)
    assert done("generate", model, "-f", tmp_path / "marked.txt", *options) == expected
    assert done("generate", model, *options, stdin=f"\ufeff{PROMPT}".encode()) == expected


#: No text without end, so that an answer of so small a model is one.
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["fox", "crow"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8-sig")
    return path


def test_a_schema_makes_json_however_it_is_sampled_or_drafted(
    model: Path, models: Path, schema: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", model, "-p", "A fox, in JSON: ", "--schema", schema, "-n", "200", "-t", "1")
    greedy = griffin(*command, "--temp", "0")
    assert "cut by" not in greedy.stderr
    validate(json.loads(greedy.stdout), SCHEMA)
    for seed in "123":
        validate(json.loads(done(*command, "--temp", "2", "--top-k", "0", "--top-p", "1", "--seed", seed)), SCHEMA)
    draft = ("--draft", models / "demo_model-Q2_K.gguf")
    for options in (("--lookup",), draft):
        assert done(*command, "--temp", "0", *options) == greedy.stdout
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    done("read", model, "-", "--save", "words", "--plain", "-t", "1", stdin="A crow, in JSON")
    behind = done("generate", model, "--from", "words", "-p", ": ", *command[4:])
    validate(json.loads(behind), SCHEMA)


@pytest.mark.parametrize("options", [("-n", "2"), ("--stop", "kind")])
def test_json_that_is_cut_is_told(model: Path, schema: Path, options: tuple[str, str]) -> None:
    result = griffin("generate", model, "-p", "A fox: ", "--schema", schema, *GREEDY, *options)
    assert result.exit_code == 0
    assert result.stderr.startswith("cut by --max-tokens or --stop: the JSON may not be complete\n")


def test_true_is_any_object(model: Path, schema: Path) -> None:
    schema.write_text("true")
    text = done("generate", model, "-p", "x", "--schema", schema, "-n", "3", *GREEDY)
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "{}: schema: expected a JSON Schema, but Input data was truncated"),
        ("", "{}: schema: expected a JSON Schema, but Input data was truncated"),
        ("[1]", "{}: schema: expected a JSON Schema, but Expected `"),
        ("[" * 100_000, "{}: schema: expected a JSON Schema, but "),
        ("false", "schema: false allows nothing"),
        ('{"type": "string", "pattern": "("}', "schema: cannot be followed: "),
    ],
)
def test_what_is_no_schema_is_one_line(model: Path, schema: Path, text: str, problem: str) -> None:
    schema.write_text(text)
    found = refused("generate", model, "-p", "x", "--schema", schema)
    assert found.startswith(problem.replace("{}:", f"{schema}:"))


def test_without_the_extra_a_schema_is_one_line(model: Path, schema: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "find_spec", lambda _: None)
    found = refused("generate", model, "-p", "x", "--schema", schema)
    assert found == "JSON by a schema needs llguidance: pip install 'griffin-gguf[server]'"


@pytest.mark.parametrize("option", ["--presence-penalty", "--frequency-penalty"])
def test_a_penalty_ends_repetition(model: Path, option: str) -> None:
    def repeated(*options: str) -> int:
        words = done("generate", model, "-p", PROMPT, "-n", "60", *GREEDY, *options).split()
        return len(words) - len(set(words))

    assert repeated(option, "2") < repeated() < repeated(option, "-2")
    assert option in refused("generate", model, "-p", PROMPT, option, "2.5", code=2)


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
