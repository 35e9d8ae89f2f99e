"""`griffin recall`: how far back a model can fetch what it has read."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.commands.convert import new_folder
from griffin_gguf.cli.commands.report import HELD_OUT
from griffin_gguf.cli.console import clean, note, out, table
from griffin_gguf.cli.options import Backend, Json, Model, Threads, add_command
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.text import read_text, write_text

if TYPE_CHECKING:
    from griffin_gguf.quant.recall import Mean, Recall, Share

_WIDE = 100  # columns of a terminal from which on distances are also given as ratios


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "recall",
        recall,
        "griffin recall model.gguf",
        "griffin recall model.gguf --task passkey-classic --distance 1000,10000,100000 --trials 20 -o recall",
        "griffin recall model-it.gguf --chat --task phonebook --longest 16384",
    )


def recall(
    path: Model,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--task", metavar="NAME", help="passkey, passkey-classic, phonebook or passage. May be given repeatedly."
        ),
    ] = ["passkey", "phonebook", "passage"],  # noqa: B006  typer copies it
    distance: Annotated[
        str | None,
        typer.Option(
            "--distance",
            metavar="N[,N...]",
            help="Tokens from where the answer stood to where it is to be given; else powers of two times the "
            "attention window, from a quarter of it or what the question needs.",
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            "--longest",
            metavar="N",
            min=1,
            help="Without --distance: go so far; four times the training length unless given.",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", metavar="N", min=2, help="So many texts a task, each read with two answers.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same texts.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option("--text", "-f", metavar="FILE", help="Text to hide keys in and take passages from; else novels."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the questions in the file's chat template.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write recall.svg, recall.png and recall.json there."),
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how far back a model can fetch what it has read.

    passkey hides a number in a text and asks for it; passkey-classic hides it among the five sentences of the paper
    that invented the task. phonebook asks for one of the numbers in a phone book. passage reads a passage a second
    time: small models that answer nothing may still find it less surprising.

    Each text is read twice, with two different answers, so that what a model likes to say anyway cancels out.
    """
    distances = parse_distances(distance) if distance is not None else ()
    if distances and longest is not None:
        raise typer.BadParameter("--distance and --longest: expected one of the two")
    words, name = read_text(text or HELD_OUT), (text or HELD_OUT).name
    from griffin_gguf.cli.running import load_model
    from griffin_gguf.quant.recall import Plan, measure_recall

    if output:
        from griffin_gguf.quant.drawing import check_matplotlib

        check_matplotlib()
    plan = Plan(tuple(dict.fromkeys(tasks)), distances, longest, trials, seed, chat)
    with (
        new_folder(output) if output else nullcontext(),
        load_model(path, backend, threads) as model,
        progress(f"Reading with {clean(path.name)}", unit="tokens") as report,
    ):
        found = measure_recall(model, plan, words, name, report)
        files = _write(found, output) if output else []
    if as_json:
        out().file.write(found.to_json())
        return
    _show(found)
    for file in files:
        out().print(str(file), markup=False, soft_wrap=True)


def parse_distances(text: str) -> tuple[int, ...]:
    """Rising whole numbers from "256,1024", in any order, each once; a usage error for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"--distance {text}: expected whole numbers from 1 with commas between them")
    return tuple(sorted({int(part) for part in parts}))


def _write(found: "Recall", folder: Path) -> list[Path]:
    from griffin_gguf.quant.recall_plots import draw_recall

    data = folder / "recall.json"
    write_text(data, found.to_json())
    return [*draw_recall(found, folder), data]


def _show(found: "Recall") -> None:
    """The table, and what its numbers are."""
    ratios = ("windows", "training\nlengths") if out().width >= _WIDE else ()
    headings = ("distance", *ratios, "greedy\nright", "likeliest\nright", "nats a token\nsaved", "of")
    lines, last = table("task", *headings, right=headings, tight=True), ""
    for point in found.points:
        lines.add_row(
            point.task if point.task != last else "",
            f"{point.distance:,}",
            *((f"{point.windows:.3g}", f"{point.trainings:.3g}") if ratios else ()),
            _share(point.exact),
            _share(point.choice),
            _mean(point.saved),
            f"{point.unread.value:.3f}",
        )
        last = point.task
    out().print(lines)
    note(
        f"Distance: tokens from where the answer stood to where it is to be given; also in attention windows "
        f"({found.window:,} tokens) and training lengths ({found.trained:,}). Greedy: the likeliest tokens, one after "
        f"another, were the right answer. Likeliest: it was the likeliest of {found.choices} answers, as it is by "
        f"chance in {100 / found.choices:.1f} %. In brackets Wilson's intervals of 95 %, over two readings of each of "
        f"{found.trials} texts. Saved: what the right answer costs less than after the same text with another answer "
        f"in its place (of: what it costs there), ± standard error. Hidden in and taken from {clean(found.text)}."
    )


def _share(share: "Share | None") -> str:
    """12 % (7 to 20)."""
    return "" if share is None else f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def _mean(mean: "Mean") -> str:
    return f"{mean.value:.4f} ± {mean.stderr:.4f}"
