"""`griffin eval`: how well a model does tasks, by lm-evaluation-harness."""

import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.console import cell, clean, err, note, out, table
from griffin_gguf.cli.options import Backend, Json, Model, Threads, add_command, parse_backend
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.tasks import Evaluation, Outcome, Tasks

_WARNINGS = 5  # of lm-eval's that are shown; --output and --json have all


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "eval",
        evaluate,
        "griffin eval model.gguf --tasks hellaswag,arc_easy",
        "griffin eval model.gguf --tasks mmlu --num-fewshot 5 --limit 100 --output mmlu.json",
        "griffin eval model.gguf --tasks mine --include-path my-tasks",
    )


def evaluate(
    path: Model,
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="NAME[,NAME...]", help="Tasks, groups or tags of lm-eval.", show_default=False),
    ],
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", metavar="N", min=0, help="Examples before each question; else the task's own."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N documents of each task.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, max=512, help="Texts read at once.")] = 8,
    include_path: Annotated[
        list[Path] | None,
        typer.Option("--include-path", metavar="DIR", help="Also know the tasks in this folder. May be repeated."),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the file's chat format; examples become turns.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Also write the results there, as JSON.")
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    r"""Measure what a model can do, by tasks of lm-evaluation-harness: MMLU, HellaSwag, ARC and thousands more.

    It needs [bold]pip install 'griffin-gguf\[eval]'[/bold], and a network for data sets that are not in its cache. What
    requests have in common, such as the examples before each question, is read once.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"--tasks {tasks!r}: expected names with commas between them")
    parse_backend(backend)
    _check(path, output)
    from griffin_gguf.runtime.atomic import atomic

    with atomic(output) if output else nullcontext() as file:  # made now, so that hours are not spent for nothing
        with err.status("Loading tasks"):
            ready = _load(names, include_path or [])
        found, text = _run(path, ready, num_fewshot, limit, batch, backend, threads, chat=apply_chat_template)
        if as_json:
            out().file.write(text)
        else:
            _show(found)
        if file:
            file.write(text.encode())
            file.sync()


def _check(path: Path, output: Path | None) -> None:
    """Find out what cannot be run or written before anything is loaded."""
    from griffin_gguf.runtime.atomic import check_targets
    from griffin_gguf.runtime.errors import UnsupportedError
    from griffin_gguf.runtime.gguf_file import GgufFile

    if find_spec("lm_eval") is None:
        raise UnsupportedError("tasks need lm-evaluation-harness: pip install 'griffin-gguf[eval]'")
    if output:
        check_targets([output], [path])
    with GgufFile.open(path) as file:
        file.hyperparameters()


def _load(names: list[str], folders: list[Path]) -> "Tasks":
    if not err.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of lm-eval and datasets; read when tqdm is imported
    from griffin_gguf.quant.tasks import load_tasks

    return load_tasks(names, folders)


def _run(
    path: Path,
    tasks: "Tasks",
    shots: int | None,
    limit: int | None,
    batch: int,
    backend: str,
    threads: int | None,
    *,
    chat: bool,
) -> "tuple[Evaluation, str]":
    """What came of the tasks, and that as JSON with how they were run."""
    from griffin_gguf.cli.running import load_model
    from griffin_gguf.quant.file_types import type_name
    from griffin_gguf.quant.harness import GriffinLM
    from griffin_gguf.quant.tasks import SEED, run

    with load_model(path, backend, threads) as model:
        lm = GriffinLM(model, batch, chat, lambda label, unit: progress(label, unit=unit))
        found = run(lm, tasks, shots, limit, chat)
        text = found.to_json(
            model=str(path),
            type=type_name(model.file.metadata),
            backend=model.backend,
            num_fewshot=shots,
            limit=limit,
            batch=batch,
            apply_chat_template=chat,
            seed=SEED,
        )
    return found, text


def _show(found: "Evaluation") -> None:
    """The table, and what one must know to read it."""
    numbers = ("value", "shots", "documents")
    rows = table("task", "metric", *numbers, right=numbers)
    last = None
    for outcome in found.outcomes:
        name = "" if outcome.task == last else "  " * outcome.depth + outcome.task
        rows.add_row(
            cell(name), cell(_metric(outcome)), _value(outcome), _count(outcome.shots), _count(outcome.documents)
        )
        last = outcome.task
    out().print(rows)
    saved = f", {found.tokens_asked / found.tokens_read:.1f} times as many without common beginnings"
    note(
        f"{found.tokens_read:,} tokens read{saved if found.tokens_read else ''}; {found.seconds:.0f} s; "
        f"lm-eval {found.lm_eval}"
    )
    if found.system_refused:
        note("the chat template takes no system message: descriptions of tasks, which lm-eval puts there, are left out")
    for warning in found.warnings[:_WARNINGS]:
        note(f"lm-eval: {clean(warning)}")
    if len(found.warnings) > _WARNINGS:
        note(f"lm-eval: {len(found.warnings) - _WARNINGS} more warnings (--json has all)")


def _metric(outcome: "Outcome") -> str:
    """Its name, how the answer was found where there are several ways, and which way is better."""
    name = outcome.metric if outcome.filter == "none" else f"{outcome.metric} ({outcome.filter})"
    return clean(name) + {True: " ↑", False: " ↓", None: ""}[outcome.higher_is_better]


def _value(outcome: "Outcome") -> str:
    return f"{outcome.value:.4f}" + (f" ± {outcome.stderr:.4f}" if outcome.stderr is not None else "")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
