"""`griffin bench`: what a model costs on this machine, and what suits it best."""

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.commands.convert import new_folder
from griffin_gguf.cli.console import clean, note, out, print_json, size, table
from griffin_gguf.cli.options import Json, Model, Threads, add_command
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.text import read_text, write_text

if TYPE_CHECKING:
    from griffin_gguf.quant.depth import Change, Depth
    from griffin_gguf.runtime.tuner import Duel, Speed
    from griffin_gguf.runtime.tuning import Tuning


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "bench",
        bench,
        "griffin bench --tune model.gguf",
        "griffin bench --depth model.gguf --tokens 65536 --plot figures",
    )


def bench(
    path: Model,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest way to run such models here, and keep to it from now on.")
    ] = False,
    depth: Annotated[
        bool, typer.Option("--depth", help="Measure speed and memory while more and more tokens are read.")
    ] = False,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="With --depth: read so many.")] = 16384,
    text: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="With --depth: read this text, again and again; else noise."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="DIR", help="With --depth: write depth.svg, depth.png and depth.json there."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model on this machine.

    --tune takes minutes. It compares threads, ggml's two ways of attention, sizes of chunks, and weights mapped from
    the file with weights repacked in memory; every other command then runs models of these shapes and types the
    fastest way. Answers stay the same but for rounding.

    --depth shows that neither speed nor memory depends on how much has been read, beside the keys and values that
    Transformers would have to keep.
    """
    if tune == depth:
        raise typer.BadParameter("expected one of --tune and --depth")
    if tune:
        if threads is not None or text is not None or plot is not None:
            raise typer.BadParameter("--tune goes with none of --threads, --file and --plot")
        _tune(path, as_json=as_json)
    else:
        _depth(path, tokens, text, plot, threads, as_json=as_json)


def _tune(path: Path, *, as_json: bool) -> None:
    from griffin_gguf.runtime import tuner
    from griffin_gguf.runtime.errors import UnsupportedError
    from griffin_gguf.runtime.gguf_file import GgufFile
    from griffin_gguf.runtime.machine import usable_cores
    from griffin_gguf.runtime.tuning import VARIABLE, store, store_path

    if store_path() is None:
        raise UnsupportedError(f"{VARIABLE}: is empty, so there is no file to store choices in")
    load, cores = os.getloadavg()[0], usable_cores()
    if load > cores / 2:
        note(f"a load of {load:.1f} on {cores} cores: what is best now may not be best when other programs are gone")
    with progress(f"Tuning for {clean(path.name)}", unit="rounds") as report:
        tuning, duels = tuner.tune(path, progress=report)
    if not as_json:
        _show_duels(duels)
        _show_tuning(tuning)
    with GgufFile.open(path) as file:
        target = store(file, tuning)
    if as_json:
        print_json({"tuning": asdict(tuning), "stored": str(target), "duels": [asdict(duel) for duel in duels]})
    else:
        out().print(f"stored in {target}", markup=False, soft_wrap=True)


def _show_duels(duels: "list[Duel]") -> None:
    """A line for each side of a duel."""
    from griffin_gguf.runtime.tuner import ANSWER, PROMPT

    numbers = ("prompt\ntokens/s", "answer\ntokens/s", f"{PROMPT} read,\n{ANSWER} written", "load", "allocated")
    lines = table("", "", *numbers, "", right=numbers)
    for duel in duels:
        if duel.speed is None or duel.speed_of_best is None or duel.ratio is None:
            lines.add_row(duel.field, str(duel.value), *[""] * len(numbers), f"not tried: {duel.problem}")
            continue
        loads = duel.field == "buffers"
        lines.add_row(duel.field, _named(duel.field, duel.best), *_cells(duel.speed_of_best, loads=loads))
        verdict = f"{duel.ratio:.2f} of the time" + (": taken" if duel.won else f", not under {1 - duel.margin:.2f}")
        lines.add_row("", _named(duel.field, duel.value), *_cells(duel.speed, loads=loads), verdict)
    out().print(lines)
    note(
        "Each against the best so far, in turn, in medians; the best stays unless the other's time is under the part "
        "named. Repacked weights are a copy in memory, made at every start; mapped ones are the file's own pages."
    )


def _cells(speed: "Speed", *, loads: bool) -> list[str]:
    """The numbers of a line; those about loading only where `loads` says that they tell something."""
    load = f"{speed.load:.2f} s" if loads else ""
    allocated = size(max(speed.memory, 0)) if loads and speed.memory is not None else ""
    return [_digits(speed.prefill), _digits(speed.decode), f"{speed.seconds:.3g} s", load, allocated]


def _digits(rate: float) -> str:
    """Three digits, all of them where there are more before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _named(field: str, value: Any) -> str:
    """A value as people read it."""
    from griffin_gguf.runtime.machine import compute_threads

    return f"{compute_threads()} (one a core)" if field == "threads" and value is None else str(value)


def _show_tuning(tuning: "Tuning") -> None:
    words = (f"{field} {_named(field, value)}" for field, value in asdict(tuning).items())
    out().print(f"chosen: {', '.join(words)}", markup=False, soft_wrap=True)


def _depth(
    path: Path, tokens: int, text: Path | None, plot: Path | None, threads: int | None, *, as_json: bool
) -> None:
    from griffin_gguf.cli.running import load_model
    from griffin_gguf.quant.depth import early_position, measure_depth, rows
    from griffin_gguf.runtime.errors import FileFormatError

    words = read_text(text) if text else ""
    if text and not words:
        raise FileFormatError(text, "text", "is empty")
    if plot:
        from griffin_gguf.quant.plots import check_matplotlib

        check_matplotlib()
    with (
        new_folder(plot) if plot else nullcontext(),
        load_model(path, "ggml", threads) as model,
        progress(f"Reading with {clean(path.name)}", unit="tokens") as report,
    ):
        positions = rows(tokens, early_position(model))
        found = measure_depth(model, positions, model.tokenizer.encode(words) if words else (), progress=report)
        files = _write(found, plot) if plot else []
    if as_json:
        out().file.write(found.to_json())
        return
    _show_depth(found)
    for file in files:
        out().print(str(file), markup=False, soft_wrap=True)


def _write(found: "Depth", folder: Path) -> list[Path]:
    from griffin_gguf.quant.plots import draw_depth

    data = folder / "depth.json"
    write_text(data, found.to_json())
    return [*draw_depth(found, folder), data]


def _show_depth(found: "Depth") -> None:
    """The table, what has changed, and what the other columns are."""
    from griffin_gguf.quant.depth import CACHES

    headings = ("tokens\nread", "decode\ntokens/s", "memory of\nthe process", "of it the\nstate")
    names = tuple(cache.name.replace("-", "-\n", 1) for cache in CACHES)
    lines = table(*headings, *names, right=(*headings, *names))
    for point in found.points:
        others = [size(cache.nbytes(point.position)) for cache in CACHES]
        lines.add_row(f"{point.position:,}", _digits(point.speed), size(point.rss), size(point.state), *others)
    out().print(lines)
    if found.change:
        out().print(_change_line(found.change), markup=False, soft_wrap=True)
    note(
        "The columns on the right: keys and values in f16 of other models, by their published shapes, also at lengths "
        "beyond their contexts. Mistral-7B-v0.1 has a window of 4,096 tokens; v0.2 has none: it takes what Llama-3-8B "
        "takes."
    )


def _change_line(change: "Change") -> str:
    return (
        f"from token {change.early:,} to {change.late:,}: speed x{change.speed:.3f} (both states decoded in turn; "
        f"quartiles {change.low:.3f} and {change.high:.3f}), memory {change.rss / 2**20:+.2f} MiB, "
        f"state {change.state:+,} bytes"
    )
