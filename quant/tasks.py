"""Tasks of lm-evaluation-harness: found, loaded, run on a `GriffinLM`, and what came of them."""

import difflib
import json
import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import lm_eval
import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from griffin_gguf.quant.harness import GriffinLM, Order
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError

#: lm-eval's own, by which a task draws its examples.
SEED = 1234

#: Draws for a standard error that no formula gives: it is certain to some 2 % then. lm-eval's default is 100,000.
DRAWS = 1000

_NO_METRICS = ("name", "alias", "sample_len", "sample_count")  # what lm-eval's results say of a task beside them
_WANTED = ("Overwriting default num_fewshot",)  # lm-eval's warning of what was asked for
_NO_COPIES = "DISABLE_MULTIPROC"  # lm-eval's own switch
_NOT_OURS = {"UNSAFE_CODE": "it runs programs that the model writes", "MULTIMODAL": "it is not of text alone"}


@dataclass(frozen=True)
class Tasks:
    """Tasks ready to run, and groups of them, by name; `order` are all names, each with how deep it lies in groups."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    order: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]  # what lm-eval said of them


@dataclass(frozen=True)
class Outcome:
    """A metric of a task or group. `stderr` is None where lm-eval has none, `shots` where a group's tasks differ."""

    task: str
    depth: int
    metric: str
    filter: str  # how the answer was taken out of the text: "none" where there is but one way
    value: float
    stderr: float | None
    higher_is_better: bool | None
    shots: int | None  # worked examples before every question
    documents: int


@dataclass(frozen=True)
class Evaluation:
    """What came of all tasks; `record` is lm-eval's own account, `warnings` what it said meanwhile.

    `tokens_asked` and `tokens_read` are those of `GriffinLM`.
    """

    outcomes: list[Outcome]
    tokens_asked: int
    tokens_read: int
    seconds: float
    lm_eval: str  # its version
    system_refused: bool
    warnings: list[str]
    record: dict[str, Any]

    def to_json(self, **about: Any) -> str:
        """All of it, after what there is to say `about` the run."""
        return json.dumps(about | asdict(self), indent=1, default=handle_non_serializable) + "\n"


def load_tasks(names: Sequence[str], folders: Sequence[Path] = ()) -> Tasks:
    """Load tasks, groups and tags by name, from YAML files below `folders` or lm-eval's own, with their data sets.

    Raises `UnsupportedError` for a name that is not known and a task that asks for more than can be done here,
    `GriffinError` where a data set cannot be had or a task is at fault.
    """
    tasks, groups, order = dict[str, Any](), dict[str, Any](), list[tuple[str, int]]()
    with _heard() as warnings:
        manager = _manager(names, folders)
        for name in dict.fromkeys(names):
            found: Any = _loaded(manager, name)
            tasks |= found["tasks"]
            groups |= found["groups"]
            roots = [name] if name in found["groups"] else list(found["tasks"])
            order += [pair for root in roots for pair in _below(root, 0, found["group_map"])]
    for name, task in tasks.items():
        _check(name, task)
    return Tasks(tasks, groups, tuple(dict.fromkeys(order)), tuple(warnings))


def run(
    lm: GriffinLM, tasks: Tasks, shots: int | None = None, limit: int | None = None, chat: bool = False
) -> Evaluation:
    """Run all tasks, at most `limit` documents of each, after `shots` examples (None: as each task says).

    A task that is made for no examples stays without, whatever `shots`. Raises what the model raises.
    """
    for task in tasks.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    begun = perf_counter()
    with _heard() as warnings, _alone():
        found: Any = evaluate(
            lm,
            {"tasks": tasks.tasks, "groups": tasks.groups},
            limit=limit,
            bootstrap_iters=DRAWS,
            log_samples=False,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    return Evaluation(
        _outcomes(found, tasks.order),
        lm.tokens_asked,
        lm.tokens_read,
        perf_counter() - begun,
        lm_eval.__version__,
        lm.system_refused,
        [*tasks.warnings, *warnings],
        found,
    )


def _check(name: str, task: Any) -> None:
    """Find out what a model cannot do here before it has done anything."""
    for flag, why in _NOT_OURS.items():
        if getattr(task, flag, False):
            raise UnsupportedError(f"task {name}: cannot run here: {why}")
    if task.OUTPUT_TYPE == "generate_until":
        Order.of(name, task.get_config("generation_kwargs"), 0)


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """An index that has all names: of `folders` alone where that will do, since lm-eval's own takes seconds."""
    for folder in folders:
        if not folder.is_dir():
            raise GriffinError(f"{folder}: there is no such folder")
    paths = list[str | Path](folders)
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(_is_whole(manager, name) for name in names):
        manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; there are {', '.join(near)}" if near else ""
            raise UnsupportedError(f"task {name}: is not known to lm-eval {lm_eval.__version__}{hint}")
    return manager


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether the index has a task, or a group with all that is in it. Of a tag there may be more elsewhere."""
    if name not in manager.all_groups:
        return name in manager.all_subtasks
    members: Any = (manager.task_index[name].cfg or {}).get("task")
    return isinstance(members, list) and all(isinstance(m, str) and _is_whole(manager, m) for m in members)


def _loaded(manager: TaskManager, name: str) -> Any:
    """A task, group or tag with all data. Whatever its code and its data set's raise comes as one `GriffinError`."""
    try:
        return manager.load(name)
    except ConnectionError as error:
        raise GriffinError(f"task {name}: its data set cannot be had: {_line(error)}") from error
    except Exception as error:
        raise GriffinError(f"task {name}: cannot be loaded: {type(error).__name__}: {_line(error)}") from error


def _below(name: str, depth: int, children: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """A name and all below it in groups, each with its depth."""
    yield name, depth
    for child in children.get(name, ()):
        yield from _below(child, depth + 1, children)


def _outcomes(found: Any, order: Sequence[tuple[str, int]]) -> list[Outcome]:
    """Every metric that is a number. What lm-eval calls "metric_stderr,filter" belongs to "metric,filter"."""
    outcomes: list[Outcome] = []
    for name, depth in order:
        values = found["results"][name]
        higher = found["higher_is_better"].get(name) or {}
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if key in _NO_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            outcomes.append(
                Outcome(
                    task=name,
                    depth=depth,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    higher_is_better=higher.get(metric),
                    shots=found["n-shot"].get(name),
                    documents=values["sample_count"][key] if "sample_count" in values else values["sample_len"],
                )
            )
    return outcomes


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect lm-eval's warnings, each once; what it prints goes to stderr."""
    found: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = _line(record.getMessage())
            if text not in found and not text.startswith(_WANTED):
                found.append(text)

    logger, ear = logging.getLogger("lm_eval"), Ear(logging.WARNING)
    logger.addHandler(ear)
    try:
        with redirect_stdout(sys.stderr):
            yield found
    finally:
        logger.removeHandler(ear)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep lm-eval from computing standard errors in copies of this process, which holds a model."""
    before = os.environ.get(_NO_COPIES)
    os.environ[_NO_COPIES] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_COPIES]
        if before is not None:
            os.environ[_NO_COPIES] = before


def _line(message: object, longest: int = 300) -> str:
    """On one line, of bounded length."""
    text = " ".join(str(message).split())
    return text if len(text) <= longest else text[:longest] + "…"
