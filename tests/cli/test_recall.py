import json
import sys
from pathlib import Path

import pytest
import typer
from command import done, griffin, refused
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.cli.commands.recall import parse_distances

FAST = ("--trials", "2", "-t", "1")


def test_a_table_and_files(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = griffin("recall", model, *FAST, "--distance", "400,300", "-o", folder)
    assert result.exit_code == 0, result.stderr
    found = json.loads((folder / "recall.json").read_bytes())
    assert [(point["task"], point["distance"]) for point in found["points"]] == [
        (task, distance) for task in ("passkey", "phonebook", "passage") for distance in (300, 400)
    ]
    assert (found["type"], found["window"], found["trained"], found["text"]) == ("Q8_0", 256, 1024, "heldout.txt")
    lines = [line.split() for line in result.stdout.splitlines()]
    for task in ("passkey", "phonebook", "passage"):
        at = next(i for i, line in enumerate(lines) if line[:1] == [task])
        assert lines[at][1:4] == ["300", "1.17", "0.293"]
        assert lines[at + 1][:3] == ["400", "1.56", "0.391"]
    for point in found["points"]:
        assert f"{point['saved']['value']:.4f} ± {point['saved']['stderr']:.4f} " in result.stdout
    assert f" {100 * found['points'][0]['choice']['value']:.0f} % (" in result.stdout
    assert result.stdout.splitlines()[-3:] == [str(folder / f"recall.{end}") for end in ("svg", "png", "json")]
    assert "by chance in 12.5 %" in result.stderr
    assert f"Reading with {model.name}: 100 % (" in result.stderr


def test_json_is_the_same_for_the_same_seed(model: Path) -> None:
    arguments = ("recall", model, *FAST, "--task", "passage", "--longest", "100", "--json")
    first, other = done(*arguments), done(*arguments, "--seed", "1")
    assert first == done(*arguments)
    assert [point["distance"] for point in json.loads(first)["points"]] == [64, 100]
    assert json.loads(first)["points"] != json.loads(other)["points"]


def test_a_text_and_tasks_of_ones_own(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("All happy families are alike. " * 40, encoding="utf-8")
    arguments = ("--task", "passkey-classic", "--task", "passkey", "--task", "passkey", "--distance", "150", "-f", text)
    found = json.loads(done("recall", model, *FAST, *arguments, "--json"))
    assert [point["task"] for point in found["points"]] == ["passkey-classic", "passkey"]
    assert found["text"] == "own.txt"


def test_questions_in_a_chat(model: Path, plain_model: Path) -> None:
    arguments = (*FAST, "--distance", "300", "--task", "passkey", "--json")
    plain, chat = (json.loads(done("recall", model, *arguments, *more)) for more in ((), ("--chat",)))
    assert (plain["chat"], chat["chat"]) == (False, True)
    assert plain["points"] != chat["points"]
    assert refused("recall", plain_model, *arguments, "--chat").endswith(
        "tokenizer.chat_template: is missing; a chat needs one"
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--distance", ""), "expected whole numbers from 1 with commas"),
        (("--distance", "256,"), "expected whole numbers from 1 with commas"),
        (("--distance", "0,256"), "expected whole numbers from 1 with commas"),
        (("--distance", "-5"), "expected whole numbers from 1 with commas"),
        (("--distance", "300", "--longest", "600"), "--distance and --longest: expected one of the two"),
        (("--longest", "0"), "Invalid value for '--longest'"),
        (("--trials", "1"), "Invalid value for '--trials'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(model: Path, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in refused("recall", model, *arguments, code=2)


def test_what_cannot_be_measured_or_written_is_one_line_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    new, short, taken = tmp_path / "new", tmp_path / "short.txt", tmp_path / "taken"
    short.write_text("Call me Ishmael.", encoding="utf-8")
    taken.write_text("a file")
    for arguments, problem in (
        (("--task", "poem"), "task: expected one of passkey, passkey-classic, phonebook, passage, found 'poem'"),
        (("--distance", "30"), "phonebook: distance: expected at least "),
        (("-f", short), "short.txt: text: expected at least "),
        (("-f", tmp_path / "no.txt"), "no.txt: No such file or directory"),
        (("-f", model), f"{model}: text: is not UTF-8"),
        (("--task", "passage", "--chat"), "chat: expected a task that asks a question, found only passage"),
    ):
        assert problem in refused("recall", model, *arguments, "-o", new, "-t", "1")
        assert not new.exists()
    assert "taken: File exists" in refused("recall", model, "-o", taken)
    assert "no.gguf" in refused("recall", tmp_path / "no.gguf", "-o", new)
    assert not new.exists()


def test_without_matplotlib_there_is_a_table_but_no_plot(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ("recall", model, *FAST, "--task", "passage", "--distance", "60")
    assert refused(*arguments, "-o", tmp_path / "new").startswith("plots need matplotlib: pip install")
    assert not (tmp_path / "new").exists()
    assert "passage" in done(*arguments)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=8), st.sampled_from([",", " , ", ", "]))
def test_distances_rise_each_once(numbers: list[int], between: str) -> None:
    assert list(parse_distances(between.join(map(str, numbers)))) == sorted(set(numbers))


@given(st.text("0123456789,.-+ eE²٣", max_size=12))
def test_other_distances_are_refused(text: str) -> None:
    parts = [part.strip() for part in text.split(",")]
    if all(part and set(part) <= set("0123456789") and set(part) != {"0"} for part in parts):
        assert parse_distances(text)
    else:
        with pytest.raises(typer.BadParameter, match="expected whole numbers"):
            parse_distances(text)
