"""`griffin bench --depth`: speed and memory of a model while more and more is read."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from griffin_gguf.cli.commands.convert import new_folder
from griffin_gguf.cli.console import clean, note, out, size, table
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.text import read_text, write_text
from griffin_gguf.quant.wording import digits

if TYPE_CHECKING:
    from griffin_gguf.quant.depth import Change, Depth


def show_depth(
    path: Path, tokens: int, text: Path | None, plot: Path | None, threads: int | None, *, as_json: bool
) -> None:
    """Read so many tokens, of `text` or random ones; show the rows, and draw them in the folder `plot`."""
    from griffin_gguf.cli.running import load_model
    from griffin_gguf.quant.depth import early_position, measure_depth, rows
    from griffin_gguf.runtime.errors import FileFormatError

    words = read_text(text) if text else ""
    if text and not words:
        raise FileFormatError(text, "text", "is empty")
    if plot:
        from griffin_gguf.quant.drawing import check_matplotlib

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
    _show(found)
    for file in files:
        out().print(str(file), markup=False, soft_wrap=True)


def _write(found: "Depth", folder: Path) -> list[Path]:
    from griffin_gguf.quant.plots import draw_depth

    data = folder / "depth.json"
    write_text(data, found.to_json())
    return [*draw_depth(found, folder), data]


def _show(found: "Depth") -> None:
    """The table, what has changed, and what the other columns are."""
    from griffin_gguf.quant.depth import CACHES

    headings = ("tokens\nread", "decode\ntokens/s", "memory of\nthe process", "of it the\nstate")
    names = tuple(cache.name.replace("-", "-\n", 1) for cache in CACHES)
    lines = table(*headings, *names, right=(*headings, *names))
    for point in found.points:
        others = [size(cache.nbytes(point.position)) for cache in CACHES]
        lines.add_row(f"{point.position:,}", digits(point.speed), size(point.rss), size(point.state), *others)
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
