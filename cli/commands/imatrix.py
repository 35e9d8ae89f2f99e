"""`griffin imatrix`: how much each input of each weight matters, for `quantize --imatrix`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import cell, note, out, print_json, table
from griffin_gguf.cli.options import Json, Threads, add_command
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.text import read_text

if TYPE_CHECKING:
    from griffin_gguf.quant.imatrix import ImportanceMatrix
    from griffin_gguf.quant.imatrix_statistics import Statistics

_STATISTICS = ("Σ(x²)", "min", "max", "mean", "σ", "active", "N", "entropy", "E (norm)", "ZD", "cos")


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "imatrix",
        imatrix,
        "griffin imatrix model-BF16.gguf -f calibration.txt -o imatrix.gguf",
        "griffin imatrix --in-file a.gguf --in-file b.gguf -o both.gguf",
        "griffin imatrix --in-file imatrix.gguf --show-statistics",
    )


def imatrix(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="A GGUF file that griffin wrote.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", "-f", metavar="TEXT", help="Text to run the model over, UTF-8.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")] = None,
    ctx: Annotated[int, typer.Option("--ctx", "-c", metavar="N", min=4, help="Tokens of a window.")] = 512,
    chunks: Annotated[
        int | None, typer.Option("--chunks", metavar="N", min=1, help="Take so many windows of TEXT; all unless given.")
    ] = None,
    ppl: Annotated[
        bool, typer.Option("--ppl/--no-ppl", help="Also compute the perplexity, over each window's later half.")
    ] = False,
    in_files: Annotated[
        list[Path], typer.Option("--in-file", metavar="FILE", help="A matrix to add to the result. Repeatable.")
    ] = [],  # noqa: B006  typer copies it
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Print what the result says of each weight.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how large each input of each matrix product is over a text: an importance matrix.

    MODEL runs over windows of TEXT; FILE is in llama.cpp's GGUF format. What is done is saved on the way: after an
    interruption the same command goes on where it stopped. Without MODEL, matrices that are there are joined or shown.
    """
    if model is None:
        result = _join(in_files, text, output, show_statistics)
    else:
        if text is None or output is None:
            raise typer.BadParameter("MODEL needs a text to run over (-f TEXT) and a file to write (-o FILE)")
        result = _collect(model, text, output, in_files, ctx=ctx, chunks=chunks, score=ppl, threads=threads)
    if as_json:
        print_json(_document(result, written=output is not None, with_statistics=show_statistics))
        return
    if output:
        _show_summary(result)
    if show_statistics:
        _show_statistics(result)


def _join(in_files: list[Path], text: Path | None, output: Path | None, show: bool) -> "ImportanceMatrix":
    """The sum of `in_files`, written where it is wanted."""
    from griffin_gguf.quant.imatrix import merge
    from griffin_gguf.runtime.atomic import check_targets

    if not in_files or text is not None:
        raise typer.BadParameter("expected MODEL and -f TEXT, or matrices to join or show (--in-file FILE)")
    if not (output or show):
        raise typer.BadParameter("expected a file to write (-o FILE) or --show-statistics")
    if output:
        check_targets([output], in_files)
    result = merge(_load(in_files), output or in_files[0])
    if output:
        result.save(output)
    return result


def _collect(
    model: Path,
    text: Path,
    output: Path,
    in_files: list[Path],
    *,
    ctx: int,
    chunks: int | None,
    score: bool,
    threads: int | None,
) -> "ImportanceMatrix":
    """Run the model over what is left of the text."""
    from griffin_gguf.quant.collect import Collector, Text
    from griffin_gguf.runtime.atomic import check_targets

    check_targets([output], [model, text, *in_files])
    words = Text(str(text), read_text(text))
    others = _load(in_files)
    with Collector(
        model, words, output, ctx=ctx, chunks=chunks, score=score, others=others, threads=threads
    ) as collector:
        if collector.done == collector.total:
            note(f"{output}: is complete already: nothing is left to run")
        elif output.exists() and not collector.done:
            note(f"{output}: is another file, and will be replaced")
        elif collector.done:
            note(f"{output}: going on after {collector.done} of {collector.total} windows")
        with progress("Collecting", unit="windows") as report:
            result = collector.run(report)
        scored = collector.matrix.collection
    if score and scored:
        found = scored.perplexity
        told = f"over {scored.scored} tokens: {found[0]:.4f} ± {found[1]:.4f}" if found else "is not known of that run"
        note(f"perplexity {told}")
    return result


def _load(paths: list[Path]) -> "list[ImportanceMatrix]":
    """Read matrices, and say which of them could go on."""
    from griffin_gguf.quant.imatrix import ImportanceMatrix

    found = [ImportanceMatrix.load(path) for path in paths]
    for matrix in found:
        if matrix.collection and not matrix.complete:
            note(f"{matrix.path}: is unfinished: {matrix.chunk_count} of {matrix.collection.chunks_total} windows")
    return found


def _show_summary(result: "ImportanceMatrix") -> None:
    summary = f"{len(result.entries)} weights, {result.chunk_count} windows of {result.chunk_size} tokens"
    out().print(f"{result.path}  {summary}", markup=False, soft_wrap=True)


def _show_statistics(result: "ImportanceMatrix") -> None:
    from griffin_gguf.quant.imatrix_statistics import statistics

    rows = table("weight", *_STATISTICS, right=_STATISTICS)
    for row in statistics(result):
        rows.add_row(cell(row.name), *_cells(row))
    out().print(rows)


def _cells(row: "Statistics") -> list[str]:
    numbers = [f"{value:.4g}" for value in (row.total, row.minimum, row.maximum, row.mean, row.stddev)]
    shares = (f"{row.active:.2%}", f"{row.elements}", f"{row.entropy:.4f}", f"{row.entropy_normalized:.2%}")
    return [*numbers, *shares, f"{row.zd:.2%}", "-" if row.cosine is None else f"{row.cosine:.4f}"]


def _document(result: "ImportanceMatrix", *, written: bool, with_statistics: bool) -> dict[str, Any]:
    """What `--json` prints."""
    from griffin_gguf.quant.imatrix_statistics import statistics

    scored = result.collection.perplexity if result.collection else None
    document: dict[str, Any] = {
        "path": str(result.path),
        "written": written,
        "datasets": list(result.datasets),
        "chunk_count": result.chunk_count,
        "chunk_size": result.chunk_size,
        "entries": len(result.entries),
        "perplexity": scored[0] if scored else None,
        "perplexity_stderr": scored[1] if scored else None,
    }
    return document | ({"statistics": [asdict(row) for row in statistics(result)]} if with_statistics else {})
