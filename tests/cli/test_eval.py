import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command import done, griffin, refused, start, start_python
from local_tasks import local_tasks

ONE = ("-t", "1", "--backend", "ggml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks(tmp_path_factory.mktemp("local"))


def test_a_table_and_its_json(model: Path, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    tasks = ("--tasks", "local_choices, local_words,local_answers", "--include-path", folder)
    result = griffin("eval", model, *tasks, *ONE, "--num-fewshot", "1", "--limit", "3", "--output", target)
    assert result.exit_code == 0, result.stderr
    account: Any = json.loads(target.read_text(encoding="utf-8"))
    assert [account[key] for key in ("model", "type", "num_fewshot", "limit", "batch")] == [str(model), "Q8_0", 1, 3, 8]
    lines = [line.split() for line in result.stdout.splitlines()]
    for outcome in account["outcomes"]:
        value = [f"{outcome['value']:.4f}"]
        error = [] if outcome["stderr"] is None else ["±", f"{outcome['stderr']:.4f}"]
        arrow = "↑" if outcome["higher_is_better"] else "↓"
        name = [outcome["metric"], *([f"({outcome['filter']})"] if outcome["filter"] != "none" else []), arrow]
        row = [*name, *value, *error, str(outcome["shots"]), str(outcome["documents"])]
        assert row in lines or [outcome["task"], *row] in lines
    assert f"{account['tokens_read']:,} tokens read, " in result.stderr
    assert "Scoring: 100 %" in result.stderr
    assert "Answering: 100 % (3 of 3 answers)" in result.stderr
    assert list(tmp_path.iterdir()) == [target]


def test_json_instead_of_the_table(model: Path, folder: Path) -> None:
    tasks = ("--tasks", "local_words", "--include-path", folder)
    account: Any = json.loads(done("eval", model, *tasks, *ONE, "--json", "--batch", "2"))
    assert account["batch"] == 2
    assert [outcome["metric"] for outcome in account["outcomes"]] == ["perplexity", "acc"]


def test_chats(model: Path, plain_model: Path, folder: Path) -> None:
    tasks = ("--tasks", "local_letters", "--include-path", folder, "--apply-chat-template")
    result = griffin("eval", model, *tasks, *ONE, "--limit", "1")
    assert result.exit_code == 0, result.stderr
    assert "the chat template takes no system message" in result.stderr
    assert refused("eval", plain_model, *tasks, *ONE).endswith(
        "tokenizer.chat_template: is missing; expected one to apply"
    )


def test_what_cannot_be_run_or_written_is_said_at_once(model: Path, folder: Path, tmp_path: Path) -> None:
    unknown = refused("eval", model, "--tasks", "local_words,local_endingz", "--include-path", folder)
    assert unknown.startswith("task local_endingz: is not known to lm-eval ")
    assert "; there are local_endings" in unknown
    assert "there is no such folder" in refused("eval", model, "--tasks", "x", "--include-path", tmp_path / "no")
    assert "expected names with commas" in refused("eval", model, "--tasks", " ,", code=2)
    assert "is no backend" in refused("eval", model, "--tasks", "local_words", "--backend", "torch", code=2)
    assert "does not exist" in refused("eval", model, "--tasks", "x", "--output", tmp_path / "no" / "found.json")
    assert "is the input as well" in refused("eval", model, "--tasks", "x", "--output", model)
    assert "this is no GGUF file" in refused("eval", folder / "words.yaml", "--tasks", "x")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    line = refused("eval", model, "--tasks", "hellaswag", "--output", tmp_path / "found.json")
    assert line == "tasks need lm-evaluation-harness: pip install 'griffin-gguf[eval]'"
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_out_of_reach_is_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\noutput_type: loglikelihood\ntest_split: test\n"
        "doc_to_text: ''\ndoc_to_target: ''\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with start("eval", model, "--tasks", "far", "--include-path", tmp_path) as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("griffin: error: task far: its data set cannot be had: Couldn't reach 'nobody/nothing'")
    assert err.count("\n") == 1


def test_it_needs_neither_torch_nor_transformers(model: Path, folder: Path) -> None:
    arguments = ["griffin", "eval", str(model), "--tasks", "local_words,local_answers", "--include-path", str(folder)]
    code = (
        "import sys; from importlib.machinery import PathFinder; find = PathFinder.find_spec\n"
        "away = ('torch', 'transformers')\n"
        "present = lambda _, name, *rest: None if name.split('.')[0] in away else find(name, *rest)\n"
        "PathFinder.find_spec = classmethod(present)\n"
        f"sys.argv = {[*arguments, *ONE, '--limit', '1']!r}\n"
        "from griffin_gguf.cli.main import main; import atexit\n"
        "atexit.register(lambda: print([name for name in away if name in sys.modules])); main()"
    )
    with start_python(code) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "local_words" in out
    assert out.endswith("[]\n")
    assert "%|" not in err  # no bars where there is no terminal


def test_an_interrupted_run_leaves_nothing(model: Path, tmp_path: Path, checkpoint: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    text = (checkpoint / "heldout.txt").read_text(encoding="utf-8")
    local_tasks(tasks)
    (tasks / "passages.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    arguments = ("--tasks", "local_passages", "--include-path", tasks, "--output", out / "found.json")
    with start("eval", model, *arguments, "-t", "1", "--backend", "numpy") as process:
        assert process.stderr
        assert process.stderr.readline().startswith("Reading: ")
        assert [file.name.startswith(".found.json.") for file in out.iterdir()] == [True]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith("griffin: interrupted\n")
    assert list(out.iterdir()) == []
