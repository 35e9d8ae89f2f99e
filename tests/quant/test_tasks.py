import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_tasks import NAMES, local_tasks

import griffin_gguf.cli
from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.harness import GriffinLM
from griffin_gguf.quant.tasks import SEED, Tasks, load_tasks, run
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.errors import GriffinError

DEMO = Path(griffin_gguf.cli.__file__).with_name("demo_model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    target = tmp_path_factory.mktemp("tasks") / "demo-Q8_0.gguf"
    convert(DEMO, [(target, "Q8_0")])
    with load(target, backend="ggml", threads=1) as loaded:
        yield loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return local_tasks(tmp_path)


def changed(folder: Path, name: str, old: str, new: str) -> None:
    """Change the YAML file of a task."""
    file = folder / f"{name}.yaml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def contexts(tasks: Tasks, name: str) -> list[str]:
    return [instance.args[0] for instance in tasks.tasks[name].instances]


def test_metrics_are_counted_by_hand(model: Model, folder: Path) -> None:
    tasks = load_tasks(["local_endings"], [folder])
    found = run(GriffinLM(model), tasks, limit=6)
    documents = [json.loads(line) for line in (folder / "endings.jsonl").read_text(encoding="utf-8").splitlines()]
    instances = tasks.tasks["local_endings"].instances
    assert len(instances) == 6 * 4
    right = dict.fromkeys(("acc", "acc_norm"), 0)
    for i, document in enumerate(documents[:6]):
        scores = [instance.resps[0][0] for instance in instances[4 * i : 4 * i + 4]]
        by_length = [score / len(ending) for score, ending in zip(scores, document["endings"], strict=True)]
        right["acc"] += scores.index(max(scores)) == document["label"]
        right["acc_norm"] += by_length.index(max(by_length)) == document["label"]
    assert {outcome.metric: outcome.value for outcome in found.outcomes} == {k: v / 6 for k, v in right.items()}
    for outcome in found.outcomes:
        p = outcome.value
        assert outcome.stderr == pytest.approx((p * (1 - p) / 5) ** 0.5)
        assert (outcome.task, outcome.depth, outcome.filter) == ("local_endings", 0, "none")
        assert (outcome.documents, outcome.shots, outcome.higher_is_better) == (6, 0, True)


def test_a_group_comes_before_its_tasks(model: Model, folder: Path) -> None:
    found = run(GriffinLM(model), load_tasks(["local_words", "local_choices"], [folder]), limit=3).outcomes
    assert [(o.task, o.depth, o.metric) for o in found] == [
        ("local_words", 0, "perplexity"),
        ("local_words", 0, "acc"),
        ("local_choices", 0, "acc"),
        ("local_endings", 1, "acc"),
        ("local_endings", 1, "acc_norm"),
        ("local_letters", 1, "acc"),
    ]
    assert found[2].value == pytest.approx((found[3].value + found[5].value) / 2)
    assert found[2].documents == 6
    assert [o.higher_is_better for o in found[:2]] == [False, True]


@pytest.mark.parametrize(
    ("own", "shots", "wanted"), [(None, None, 0), (None, 2, 2), (1, None, 1), (1, 2, 2), (0, 2, 0), (3, 0, 0)]
)
def test_examples_before_a_question(
    model: Model, folder: Path, own: int | None, shots: int | None, wanted: int
) -> None:
    if own is not None:
        changed(folder, "letters", "output_type:", f"num_fewshot: {own}\noutput_type:")
    tasks = load_tasks(["local_letters"], [folder])
    found = run(GriffinLM(model), tasks, shots, limit=2)
    assert all(text.count("Answer:") == wanted + 1 for text in contexts(tasks, "local_letters"))
    assert [outcome.shots for outcome in found.outcomes] == [wanted]


def test_examples_are_drawn_alike_every_time(model: Model, folder: Path) -> None:
    drawn: list[list[str]] = []
    for _ in range(2):
        tasks = load_tasks(["local_endings"], [folder])
        run(GriffinLM(model), tasks, shots=2, limit=2)
        drawn.append(contexts(tasks, "local_endings"))
    assert drawn[0] == drawn[1]


def test_the_account_is_json(model: Model, folder: Path) -> None:
    found = run(GriffinLM(model), load_tasks(NAMES, [folder]), limit=1)
    assert 0 < found.tokens_read < found.tokens_asked
    account: Any = json.loads(found.to_json(model="m", seed=SEED))
    assert list(account)[:3] == ["model", "seed", "outcomes"]
    assert account["tokens_read"] == found.tokens_read
    assert account["record"]["results"]["local_passages"]["bits_per_byte,none"] == found.outcomes[-3].value
    assert account["record"]["n-samples"]["local_letters"] == {"original": 6, "effective": 1}
    assert "samples" not in account["record"]


def test_what_lm_eval_warns_of_is_kept(model: Model, folder: Path) -> None:
    changed(folder, "letters", "{metric: acc, aggregation: mean, higher_is_better: true}", "{metric: acc}")
    found = run(GriffinLM(model), load_tasks(["local_letters"], [folder]), shots=1, limit=1)
    assert any("metric acc is defined, but aggregation is not" in text for text in found.warnings)
    assert not any("Overwriting" in text for text in found.warnings)  # that was asked for


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="nowhere: there is no such folder"):
        load_tasks(["local_words"], [tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("words", "words.jsonl", "wards.jsonl", "cannot be loaded: FileNotFoundError: .*wards.jsonl"),
        ("words", "test_split: test", "test_split: tost", "cannot be loaded: KeyError: 'tost'"),
        ("words", "{{text}}", "{{nothing}}", "cannot be loaded: UndefinedError: 'nothing' is undefined"),
        ("words", "output_type: ", "unsafe_code: true\noutput_type: ", "cannot run here: it runs programs"),
        (
            "answers",
            "do_sample: false",
            "penalty_alpha: 1",
            "generation_kwargs: expected until, .* found .*penalty_alpha",
        ),
    ],
)
def test_a_task_at_fault_is_named(folder: Path, name: str, old: str, new: str, problem: str) -> None:
    changed(folder, name, old, new)
    with pytest.raises(GriffinError, match=f"task local_{name}: {problem}") as caught:
        load_tasks([f"local_{name}"], [folder])
    assert "\n" not in str(caught.value)
