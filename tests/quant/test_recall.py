"""Trials by their definition, a model that copies at one distance, and the demo model from the beginning each time."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import griffins
import numpy as np
import pytest
from golden import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rewriting import rewritten

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant import recall as recalls
from griffin_gguf.quant.recall import CHOICES, Mean, Plan, Point, Recall, Share, measure_recall, wilson
from griffin_gguf.quant.recall_tasks import PASSAGE, TASKS, Ids, Material, Trial, prepare, trials
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.model import Model

TEXT = (ROOT / "cli" / "demo_model" / "heldout.txt").read_text(encoding="utf-8")[:20_000]  # some 5,000 tokens
LONGEST = 1500
ASKING = [task for task in TASKS if TASKS[task].asks]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recall") / "demo.gguf"
    convert(ROOT / "cli" / "demo_model", [(path, "F32")])
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> Iterator[Model]:
    with load(file, backend="ggml", threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def material(model: Model) -> Material:
    return prepare(model, TEXT, "text.txt", LONGEST, chat=False)


def drawn(material: Material, task: str, seed: int) -> Trial:
    return trials(TASKS[task], material, 1, seed)[0]


def whole(trial: Trial, distance: int, head: int, answer: int) -> Ids:
    """The text of a reading to the end of an answer."""
    filler = trial.filler[: distance - trial.least]
    return np.concatenate([trial.heads[head], filler, trial.question, trial.answers[answer]])


@settings(max_examples=40)
@given(task=st.sampled_from(list(TASKS)), seed=st.integers(0, 2**40), more=st.integers(0, 1000))
def test_every_token_of_an_answer_stood_the_distance_before(
    material: Material, task: str, seed: int, more: int
) -> None:
    trial = drawn(material, task, seed)
    distance = trial.least + more
    for i in (0, 1):
        text, length = whole(trial, distance, i, i), len(trial.answers[i])
        assert list(text[-length:]) == list(text[-length - distance : -distance])
        assert text[0] == material.tokenizer.bos
    assert {len(answer) for answer in trial.answers} == {len(trial.answers[0])}
    assert len({tuple(answer) for answer in trial.answers}) == len(trial.answers)
    assert len(trial.answers) == (CHOICES if TASKS[task].asks else 2)
    assert len(trial.heads[0]) == len(trial.heads[1])
    assert len(trial.filler) >= LONGEST - trial.least


@settings(max_examples=20)
@given(task=st.sampled_from(["passkey", "passkey-classic"]), seed=st.integers(0, 2**40))
def test_a_key_is_told_amid_a_text_and_asked_for(material: Material, task: str, seed: int) -> None:
    trial, decode = drawn(material, task, seed), material.tokenizer.decode
    for i in (0, 1):
        words, key = decode(whole(trial, LONGEST, i, i)), decode(trial.answers[i]).strip()
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert re.search(rf"\nThe pass key is {key}. Remember it. {key} is the pass key.\n", words)
        assert words.startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert words.endswith(f"\nWhat is the pass key? The pass key is {key}")
        filler = decode(trial.filler)
        assert ("The grass is green. The sky is blue." in filler) is (task == "passkey-classic")
        assert (filler[100:300] in 2 * TEXT) is (task == "passkey")
    assert "Remember it" not in decode(trial.filler)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**40))
def test_the_number_of_one_of_the_people_of_a_book_is_asked_for(material: Material, seed: int) -> None:
    trial, decode = drawn(material, "phonebook", seed), material.tokenizer.decode
    numbers = [decode(answer).strip() for answer in trial.answers]
    books: list[dict[str, str]] = []
    for i in (0, 1):
        book, question = decode(whole(trial, LONGEST, i, i)).rsplit("\n\n", 1)
        lines = re.findall(r"^(\w+ \w+): (\d{3}-\d{3}-\d{4})$", book, re.MULTILINE)
        books.append(dict(lines))
        assert len(books[i]) == len(lines) > 40  # each name once
        *examples, asked = [line.split(": ") for line in question.split("\n")]
        assert len(examples) == 2
        assert all(books[i][name] == number for name, number in examples)
        assert not {number for _, number in examples} & set(numbers)
        assert books[i][asked[0]] == asked[1] == numbers[i]
        assert set(numbers) <= set(books[i].values())
    changed = {name for name in books[0] if books[0][name] != books[1][name]}
    assert len(changed) == 2  # the two whose numbers have changed places
    assert {books[0][name] for name in changed} == {books[1][name] for name in changed} == set(numbers[:2])


def test_the_latest_number_of_a_book_is_no_better_a_guess_than_another(material: Material) -> None:
    short = replace(material, longest=0)
    places: list[int] = []
    for trial in trials(TASKS["phonebook"], short, 400, 0):
        head = material.tokenizer.decode(trial.heads[0])
        right, *others = (head.index(material.tokenizer.decode(answer).strip()) for answer in trial.answers)
        places.append(sum(other > right for other in others))
    counts = np.bincount(places, minlength=CHOICES)
    # 50 each, give or take four standard deviations
    assert (abs(counts - 400 / CHOICES) < 4 * math.sqrt(400 / CHOICES)).all()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**40))
def test_passages_and_filler_are_different_parts_of_the_text(material: Material, seed: int) -> None:
    trial = drawn(material, "passage", seed)
    ring = material.text.tolist() * 2
    found: list[set[int]] = []
    for part in (*trial.answers, trial.filler):
        starts = [i for i in range(len(material.text)) if ring[i : i + len(part)] == part.tolist()]
        assert len(starts) == 1
        found.append({i % len(material.text) for i in range(starts[0], starts[0] + len(part))})
    assert len(set.union(*found)) == 2 * PASSAGE + LONGEST  # nowhere together
    assert trial.least == PASSAGE


@settings(max_examples=100)
@given(
    count=st.integers(1, 60),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_pieces_of_a_text_read_round(material: Material, count: int, lengths: list[int], seed: int) -> None:
    text = replace(material, text=np.arange(count, dtype=np.int32))
    if sum(lengths) > count:
        problem = rf"^text.txt: text: expected at least {sum(lengths)} tokens for a distance of 1,500, found {count}$"
        with pytest.raises(FileFormatError, match=problem):
            text.cut(Random(seed), *lengths)
        return
    pieces = text.cut(Random(seed), *lengths)
    assert [len(piece) for piece in pieces] == lengths
    assert all((np.diff(piece) % count == 1 % count).all() for piece in pieces)
    together = np.concatenate(pieces)
    assert len(set(together.tolist())) == len(together)


def test_a_trial_depends_on_its_seed_its_task_and_its_number_alone(material: Material) -> None:
    def texts(task: str, count: int, seed: int, longest: int = LONGEST) -> list[list[int]]:
        made = trials(TASKS[task], replace(material, longest=longest), count, seed)
        return [whole(trial, 500, 0, 0).tolist() for trial in made]

    for task in TASKS:
        assert texts(task, 3, 0) == texts(task, 5, 0)[:3]
        assert not {tuple(text) for text in texts(task, 3, 0)} & {tuple(text) for text in texts(task, 3, 1)}
    assert texts("phonebook", 2, 0) == texts("phonebook", 2, 0, 600)  # the book only goes on


def test_a_chat_is_what_the_template_makes_of_the_message(model: Model) -> None:
    chat = prepare(model, TEXT, "text.txt", LONGEST, chat=True)
    for task, asked, begun in (
        ("passkey", r"\nWhat is the pass key\?", "The pass key is"),
        ("phonebook", r"\n\nWhat is the phone number of \w+ \w+\?", r"\w+ \w+:"),
    ):
        trial = drawn(chat, task, 0)
        words = model.tokenizer.decode(whole(trial, 700, 0, 0), special=True)
        pattern = rf"<bos><start_of_turn>user\n(.*){asked}<end_of_turn>\n<start_of_turn>model\n{begun} [\d-]+"
        assert re.fullmatch(pattern, words, re.DOTALL)
    assert drawn(chat, "passage", 0).heads[0].tolist() == drawn(replace(chat), "passage", 0).heads[0].tolist()
    plain = prepare(model, TEXT, "text.txt", LONGEST, chat=False)
    assert drawn(chat, "passage", 3).heads[0].tolist() == drawn(plain, "passage", 3).heads[0].tolist()


class Copying:
    """A model of the demo's tokens that is nearly sure of the token which stood `lag` tokens before the next one."""

    def __init__(self, model: Model, lag: int, sure: float = 20.0) -> None:
        self.lag, self.sure, self.tokenizer = lag, sure, model.tokenizer
        self.hp = replace(griffins.TWO_B, window=256, context=1024, vocab=model.hp.vocab)
        self.path, self.file = Path("copying.gguf"), SimpleNamespace(metadata={"general.file_type": 15})
        self.read = 0

    def reserve(self, count: int) -> None:
        self.room = count

    def new_state(self) -> "State":
        return State(self, [])

    def forward(self, tokens: Any, state: "State") -> NDArray[np.float32]:
        return self.forward_batch([(tokens, state)])[0]

    def forward_batch(self, batch: Sequence[tuple[Any, "State"]], every: bool = False) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = []
        for tokens, state in batch:
            rows = np.zeros((len(tokens), self.hp.vocab), np.float32)
            for row, token in zip(rows, tokens, strict=True):
                state.tokens.append(int(token))
                if len(state.tokens) >= self.lag:
                    row[state.tokens[-self.lag]] = self.sure
            state.logits = rows[-1]
            self.read += len(tokens)
            found.append(rows if every else rows[-1])
        return found


class State:
    def __init__(self, model: Copying, tokens: list[int], logits: NDArray[np.float32] | None = None) -> None:
        self.model, self.tokens, self.logits = model, tokens, logits

    def copy(self) -> "State":
        return State(self.model, list(self.tokens), self.logits)


def measured(model: Any, **plan: Any) -> dict[tuple[str, int], Point]:
    found = measure_recall(cast(Model, model), Plan(**plan), TEXT, "text.txt")
    return {(point.task, point.distance): point for point in found.points}


@pytest.mark.parametrize("lag", [300, 301, 777])
def test_a_model_that_copies_at_one_distance_is_right_there_and_nowhere_else(model: Model, lag: int) -> None:
    found = measured(Copying(model, lag), tasks=tuple(TASKS), distances=(300, 301, 302, 777, 1000), trials=3)
    sure = -math.log1p((model.hp.vocab - 1) * math.exp(-20))
    for (task, distance), point in found.items():
        if distance != lag:
            assert point.exact is None or point.exact.value == 0
            assert point.saved.value < 10
            continue
        if TASKS[task].asks:
            assert point.exact is not None
            assert point.choice is not None
            assert point.exact.value == point.choice.value == 1
            assert point.exact.low == pytest.approx(6 / (6 + 1.959964**2))  # of six readings
        # 20 nats a token where the other answer has another token in its place
        assert -(point.saved.value - point.unread.value) == pytest.approx(-sure, abs=1e-6)
        same = [_same(trial) for trial in trials(TASKS[task], prepare(model, TEXT, "text.txt", 1000, False), 3, 0)]
        assert point.saved.value == pytest.approx(20 * (1 - np.mean(same)), abs=1e-6)
        assert point.saved.stderr == pytest.approx(20 * np.std(same, ddof=1) / math.sqrt(3), abs=1e-6)


def _same(trial: Trial) -> float:
    """Share of the tokens that the two answers have in the same places."""
    return float((trial.answers[0] == trial.answers[1]).mean())


def test_a_number_that_goes_on_is_not_the_key(model: Model) -> None:
    class Babbling(Copying):
        """Copies, but says a digit where the answer should end."""

        def forward_batch(self, batch: Any, every: bool = False) -> list[NDArray[np.float32]]:
            found = super().forward_batch(batch, every)
            if every:
                for rows in found:
                    rows[-1] = 0
                    rows[-1, self.tokenizer.encode("7", bos=False)[-1]] = 1
            return found

    point = measured(Babbling(model, 300), tasks=("passkey",), distances=(300,), trials=2)["passkey", 300]
    assert point.exact is not None
    assert point.choice is not None
    assert (point.exact.value, point.choice.value) == (0, 1)


def test_a_model_to_which_all_is_alike_is_never_right(model: Model) -> None:
    for point in measured(Copying(model, 9999), distances=(300,), trials=2).values():
        assert (point.saved.value, point.saved.stderr) == (0, 0)
        assert point.unread.value == pytest.approx(math.log(model.hp.vocab))
        assert point.choice is None or point.choice.value == 0  # as likely as others is not the likeliest


def test_progress_counts_every_token(model: Model) -> None:
    ways: list[tuple[int, int]] = []
    copying = Copying(model, 300)
    plan = Plan(tuple(TASKS), (300, 400, 1000), trials=2)
    measure_recall(cast(Model, copying), plan, TEXT, "text.txt", lambda done, total: ways.append((done, total)))
    assert ways == sorted(ways)
    assert ways[-1] == (copying.read, copying.read)


def test_scores_are_those_of_the_whole_texts_from_the_beginning(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recalls, "_LOGITS_BYTES", 4 * model.hp.vocab * 20)  # so that answers go in several batches
    for task in ("passkey", "passage"):
        found = measured(model, tasks=(task,), distances=(280, 300), trials=2)[task, 300]
        made = trials(TASKS[task], prepare(model, TEXT, "text.txt", 300, False), 2, 0)
        nats = np.array(
            [[[_nats(model, trial, 300, i, j) for j in range(len(trial.answers))] for i in (0, 1)] for trial in made]
        )
        read, unread = nats[:, [0, 1], [0, 1]].mean(axis=1), nats[:, [0, 1], [1, 0]].mean(axis=1)
        assert found.saved.value == pytest.approx(np.mean(unread - read), abs=2e-4)
        assert found.unread.value == pytest.approx(np.mean(unread), abs=2e-4)
        assert found.saved.stderr == pytest.approx(np.std(unread - read, ddof=1) / math.sqrt(2), abs=2e-4)
        if found.choice:
            right = (nats[:, 0].argmin(axis=1) == 0).sum() + (nats[:, 1].argmin(axis=1) == 1).sum()
            assert found.choice.value == right / 4


def _nats(model: Model, trial: Trial, distance: int, head: int, answer: int) -> float:
    """Nats a token of an answer after a head, in one pass over the whole text."""
    text, length = whole(trial, distance, head, answer), len(trial.answers[answer])
    logits = model.forward(text, model.new_state(), every=True)[-length - 1 : -1].astype(np.float64)
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[range(length), text[-length:]]))


def test_each_task_begins_where_its_question_fits(model: Model) -> None:
    found = measured(Copying(model, 300), longest=1500, trials=2)
    distances = {task: [d for name, d in found if name == task] for task in ("passkey", "phonebook", "passage")}
    assert distances["passage"] == [64, 128, 256, 512, 1024, 1500]
    assert distances["passkey"] == [64, 128, 256, 512, 1024, 1500]
    assert distances["phonebook"] in ([256, 512, 1024, 1500], [512, 1024, 1500])
    point = found["passkey", 512]
    assert (point.windows, point.trainings) == (2, 0.5)
    default = measured(Copying(model, 300), tasks=("passage",), trials=2)
    assert max(distance for _, distance in default) == 4096  # four times the training length


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (
            {"tasks": ("passkey", "poem")},
            "task: expected one of passkey, passkey-classic, phonebook, passage, found 'po",
        ),
        ({"tasks": ("passage", "passage")}, "task: expected tasks, each once"),
        ({"tasks": ()}, "task: expected tasks, each once"),
        ({"trials": 1}, "trials: expected at least 2, found 1"),
        ({"trials": 0}, "trials: expected at least 2, found 0"),
        ({"distances": (500, 300)}, "distances: expected whole numbers that rise from 1"),
        ({"distances": (0, 300)}, "distances: expected whole numbers that rise from 1"),
        ({"tasks": ("passage",), "chat": True}, "chat: expected a task that asks a question"),
        ({"tasks": ("passage",), "distances": (47, 500)}, "passage: distance: expected at least 48, .* found 47"),
        ({"tasks": ("passage",), "longest": 40}, "passage: distance: expected at least 48, .* found 40"),
        ({"tasks": ("phonebook",), "distances": (100,)}, "phonebook: distance: expected at least [12]"),
        (
            {"tasks": ("passkey",), "longest": 9000},
            "text.txt: text: expected at least 9,064 tokens for a distance of 9",
        ),
        ({"tasks": ("phonebook",), "longest": 10**6}, "phonebook: distance: expected at most the .* that all names"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_read(model: Model, plan: Any, problem: str) -> None:
    copying = Copying(model, 300)
    with pytest.raises(GriffinError, match=problem):
        measured(copying, **{"trials": 2, **plan})
    assert copying.read == 0


def test_a_chat_needs_a_template_that_shows_the_message(file: Path, tmp_path: Path) -> None:
    for template, problem in ((None, "is missing"), ("{{ bos_token }}hello", "does not show a message's text")):
        path = rewritten(file, tmp_path / "other.gguf", tokenizer__chat_template=template)
        with load(path, backend="numpy") as other, pytest.raises(FileFormatError, match=problem):
            measured(other, chat=True, trials=2, distances=(300,))


def test_logits_that_are_no_numbers(model: Model) -> None:
    with pytest.raises(GriffinError, match=r"copying.gguf: the model's logits hold NaN or infinity"):
        measured(Copying(model, 300, sure=math.nan), distances=(300,), trials=2)


@given(count=st.integers(1, 10_000), data=st.data())
def test_wilson_interval_is_where_the_share_is_196_deviations_away(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    share = wilson(hits, count)
    assert share.value == hits / count
    assert 0 <= share.low <= share.high <= 1
    for end in (share.low, share.high):
        variance = end * (1 - end) / count
        assert (share.value - end) ** 2 == pytest.approx(1.959963984540054**2 * variance, abs=1e-12)


def test_json_holds_everything() -> None:
    share, mean = Share(0.5, 0.4, 0.6), Mean(0.2, 0.01)
    points = [
        Point("passkey", 64, 0.25, 0.0625, share, share, mean, mean),
        Point("passage", 64, 1, 2, None, None, mean, mean),
    ]
    found = Recall("a.gguf", "Q4_K_M", 256, 1024, "heldout.txt", 50, 7, True, points=points)
    data = json.loads(found.to_json())

    def restored(value: Any) -> Point:
        shares = {name: Share(**value[name]) if value[name] else None for name in ("exact", "choice")}
        means = {name: Mean(**value[name]) for name in ("saved", "unread")}
        return Point(**{**value, **shares, **means})

    assert Recall(**{**data, "points": [restored(value) for value in data["points"]]}) == found
    assert data["choices"] == CHOICES
