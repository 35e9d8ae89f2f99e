"""How far back a model can fetch what it has read: look-ups and a second reading, against distance.

The two readings of a trial go side by side to the longest distance. At each distance on the way the question is put to
copies of their states, and each answer to a copy of that; so the trials at all distances are the same, and a distance
costs no reading of its own. What is in a trial, and what its distance is, stands in `recall_tasks.py`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.quant.evaluate import mean_and_error
from griffin_gguf.quant.file_types import type_name
from griffin_gguf.quant.recall_tasks import CHOICES, TASKS, Ids, Trial, prepare, trials
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.state import CHUNK, State

#: (tokens read, tokens to read)
Progress = Callable[[int, int], None]

_PIECE = CHUNK // 2  # tokens of each of the two readings that go through the weights at once
_LOGITS_BYTES = 64 << 20  # float32 logits of answers scored at once
_TRAININGS = 4  # training lengths that distances go up to, unless told

#: 95 % of a normal distribution lie within so many standard deviations of its mean.
INTERVAL = 1.959963984540054


@dataclass(frozen=True)
class Plan:
    """What to measure.

    `distances` rise; where there are none, each task takes powers of two times the attention window, from a quarter
    of it or the least that its question allows up to `longest`, by default four times the training length. With
    `chat` questions are put in the file's chat template.
    """

    tasks: Sequence[str] = ("passkey", "phonebook", "passage")
    distances: Sequence[int] = ()
    longest: int | None = None
    trials: int = 50
    seed: int = 0
    chat: bool = False


@dataclass(frozen=True)
class Share:
    """How often something was so, 0 to 1, and Wilson's interval of 95 %, all readings taken as independent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """A mean over trials with its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Point:
    """One task at one distance.

    `exact`: the greedy answer was the right one. `choice`: of the `CHOICES` answers the right one was the likeliest.
    Both are None for a passage, of which nothing is asked. `unread`: nats a token that an answer costs after the
    reading that has another in its place; `saved`: how much less it costs after the reading in which it stands.
    """

    task: str
    distance: int  # tokens
    windows: float  # the same in attention windows
    trainings: float  # and in training lengths
    exact: Share | None
    choice: Share | None
    saved: Mean
    unread: Mean


@dataclass(frozen=True)
class Recall:
    """Everything measured on one file. `text` is the name of the text that served as filler."""

    path: str
    type: str
    window: int
    trained: int
    text: str
    trials: int
    seed: int
    chat: bool
    choices: int = CHOICES
    points: list[Point] = field(default_factory=list[Point])

    def to_json(self) -> str:
        """All fields."""
        return json.dumps(asdict(self), indent=1) + "\n"


def measure_recall(model: Model, plan: Plan, text: str, name: str, progress: Progress | None = None) -> Recall:
    """Measure by `plan`, with `text`, called `name`, as filler and passages.

    Raises before anything is read: `UnsupportedError` for a plan that makes no sense, distances shorter than a
    question allows among it, `FileFormatError` for a text that is too short and for a chat without a template.
    `GriffinError` where logits are not finite.
    """
    trained = model.hp.context
    jobs = _jobs(model, plan, text, name, plan.longest or _TRAININGS * trained)
    reader = _Reader(model, sum(job.tokens for job in jobs), progress)
    found = Recall(str(model.path), type_name(model.file.metadata), model.hp.window, trained, name, plan.trials,
                   plan.seed, plan.chat)  # fmt: skip
    for job in jobs:
        scores = [[_Score.of(trial, rows) for rows in reader.read(trial, job.distances)] for trial in job.trials]
        for distance, column in zip(job.distances, zip(*scores, strict=True), strict=True):
            found.points.append(_point(job.task, distance, model.hp.window, trained, column))
    return found


@dataclass(frozen=True)
class _Job:
    """The trials of one task and the distances to measure them at."""

    task: str
    distances: Sequence[int]
    trials: Sequence[Trial]

    @property
    def tokens(self) -> int:
        """All tokens that will be read."""
        return sum(
            2 * (len(trial.heads[0]) + self.distances[-1] - trial.least)
            + 2 * len(self.distances) * (len(trial.question) + sum(map(len, trial.answers)))
            for trial in self.trials
        )


def _check(plan: Plan) -> None:
    """Raise `UnsupportedError` for a plan that makes no sense whatever the model."""
    if unknown := [task for task in plan.tasks if task not in TASKS]:
        raise UnsupportedError(f"task: expected one of {', '.join(TASKS)}, found {unknown[0]!r}")
    if len(set(plan.tasks)) < len(plan.tasks) or not plan.tasks:
        raise UnsupportedError(f"task: expected tasks, each once, found {list(plan.tasks)}")
    if plan.chat and not any(TASKS[task].asks for task in plan.tasks):
        raise UnsupportedError(f"chat: expected a task that asks a question, found only {', '.join(plan.tasks)}")
    if plan.trials < 2:  # one has no standard error
        raise UnsupportedError(f"trials: expected at least 2, found {plan.trials}")
    if any(b <= a for a, b in pairwise([0, *plan.distances])):
        raise UnsupportedError(f"distances: expected whole numbers that rise from 1, found {list(plan.distances)}")


def _jobs(model: Model, plan: Plan, text: str, name: str, longest: int) -> list[_Job]:
    """Draw all trials, so that all that can be found out before anything is read is found out."""
    _check(plan)
    material = prepare(model, text, name, plan.distances[-1] if plan.distances else longest, plan.chat)
    grid = plan.distances or _grid(model.hp.window, longest)
    jobs = list[_Job]()
    for task in plan.tasks:
        drawn = trials(TASKS[task], material, plan.trials, plan.seed)
        least = max(trial.least for trial in drawn)
        fitting = [distance for distance in grid if distance >= least]
        if len(fitting) < len(plan.distances) or not fitting:
            raise UnsupportedError(
                f"{task}: distance: expected at least {least}, which the answer, the question and what stands between "
                f"them take, found {plan.distances[0] if plan.distances else longest}"
            )
        jobs.append(_Job(task, fitting, drawn))
    return jobs


def _grid(window: int, longest: int) -> list[int]:
    """Powers of two times the window from a quarter of it on, and the longest."""
    doubled = [window * 2**i // 4 for i in range(longest.bit_length() + 2)]
    return sorted({distance for distance in [*doubled, longest] if 0 < distance <= longest})


class _Reader:
    """Reads trials, and tells how far it is."""

    def __init__(self, model: Model, total: int, progress: Progress | None) -> None:
        self._model, self._total, self._progress, self._done = model, total, progress, 0
        self._count = max(1, _LOGITS_BYTES // (4 * model.hp.vocab))  # tokens of answers at once
        model.reserve(CHOICES + 3)

    def read(self, trial: Trial, distances: Sequence[int]) -> "list[list[list[_Answer]]]":
        """For each distance, for each head, for each answer: what the model made of it."""
        states = [self._model.new_state() for _ in trial.heads]
        self._feed(states, trial.heads)
        found, at = list[list[list[_Answer]]](), 0
        for distance in distances:
            end = distance - trial.least
            self._feed(states, [trial.filler[at:end]] * len(states))
            at = end
            found.append([self._ask(state, trial) for state in states])
        return found

    def _feed(self, states: Sequence[State], texts: Sequence[Ids]) -> None:
        """Read texts of one length, in pieces small enough to tell of."""
        for start in range(0, len(texts[0]), _PIECE):
            batch = [(text[start : start + _PIECE], state) for text, state in zip(texts, states, strict=True)]
            self._model.forward_batch(batch)
            self._tell(sum(len(piece) for piece, _ in batch))

    def _ask(self, state: State, trial: Trial) -> "list[_Answer]":
        asked = state.copy()
        first = self._model.forward(trial.question, asked) if len(trial.question) else state.logits
        assert first is not None, "a state that has just read has logits"
        step = max(1, self._count // max(map(len, trial.answers)))
        found = list[_Answer]()
        for start in range(0, len(trial.answers), step):
            answers = trial.answers[start : start + step]
            logits = self._model.forward_batch([(answer, asked.copy()) for answer in answers], every=True)
            for answer, rows in zip(answers, logits, strict=True):
                found.append(_Answer.of(self._model, answer, np.concatenate([first[None], rows])))
        self._tell(len(trial.question) + sum(map(len, trial.answers)))
        return found

    def _tell(self, tokens: int) -> None:
        self._done += tokens
        if self._progress:
            self._progress(self._done, self._total)


@dataclass(frozen=True)
class _Answer:
    """Its log-likelihood, in nats, and whether the greedy answer is it, with no further digit behind it."""

    likelihood: float
    greedy: bool

    @classmethod
    def of(cls, model: Model, tokens: Ids, logits: NDArray[np.float32]) -> "_Answer":
        """By the logits [T+1, V] before each of the tokens [T], and after the last."""
        if not np.isfinite(logits).all():
            raise GriffinError(f"{model.path}: the model's logits hold NaN or infinity")
        best = logits.argmax(axis=1)
        ended = not model.tokenizer.piece(int(best[-1]))[:1].isdigit()
        rows = logits[:-1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        likelihoods = rows[np.arange(len(tokens)), tokens] - np.log(np.exp(rows).sum(axis=1))
        return cls(float(likelihoods.sum()), ended and bool((best[:-1] == tokens).all()))


@dataclass(frozen=True)
class _Score:
    """A trial at one distance: whether each reading's answer was right, and nats a token, means of both readings."""

    exact: tuple[bool, ...]
    choice: tuple[bool, ...]
    saved: float
    unread: float

    @classmethod
    def of(cls, trial: Trial, found: "Sequence[Sequence[_Answer]]") -> "_Score":
        """From what was made of each answer after each of the two heads; answer i stands in head i."""
        nats = np.array([[answer.likelihood for answer in answers] for answers in found]) / len(trial.answers[0])
        read, unread = float(nats[[0, 1], [0, 1]].mean()), float(nats[[0, 1], [1, 0]].mean())
        exact = tuple(answers[i].greedy for i, answers in enumerate(found))
        choice = tuple(bool(row[i] > np.delete(row, i).max()) for i, row in enumerate(nats))
        return cls(exact, choice, read - unread, -unread)


def _point(task: str, distance: int, window: int, trained: int, scores: Sequence[_Score]) -> Point:
    asked, readings = TASKS[task].asks, 2 * len(scores)
    return Point(
        task,
        distance,
        distance / window,
        distance / trained,
        wilson(sum(sum(score.exact) for score in scores), readings) if asked else None,
        wilson(sum(sum(score.choice) for score in scores), readings) if asked else None,
        Mean(*mean_and_error(np.array([score.saved for score in scores]))),
        Mean(*mean_and_error(np.array([score.unread for score in scores]))),
    )


def wilson(hits: int, count: int) -> Share:
    """The share of hits among `count` trials with Wilson's score interval of 95 %."""
    share, z2 = hits / count, INTERVAL * INTERVAL
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = INTERVAL / (1 + z2 / count) * sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Share(share, max(0.0, middle - half), min(1.0, middle + half))
