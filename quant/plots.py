"""Plots of measurements, by matplotlib, which only these need: `pip install 'griffin-gguf[report]'`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from griffin_gguf.quant.depth import CACHES, Depth
from griffin_gguf.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, DARK, LIGHT = "#1f6fb4", "#333333", "#e6e6e6"
OTHERS = ("#c8503c", "#d08a1d", "#7a5aa6")

#: Marks of a logarithmic axis of bytes.
_SIZES = [count << 10 * unit for unit in range(5) for count in (1, 10, 100)]


_CAPTION = (
    "Griffin: {}, measured. Others: their keys and values in f16 by their published shapes;\ndashed beyond the context "
    "they were made for. Mistral-7B without its window, as in v0.2, takes what Llama-3-8B takes."
)


def check_matplotlib() -> None:
    """Raise `UnsupportedError` where there is no matplotlib. Does not import it: memory may be measured next."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError("plots need matplotlib: pip install 'griffin-gguf[report]'")


def draw_depth(depth: Depth, folder: Path) -> list[Path]:
    """Write depth.svg and depth.png: memory and speed against position. Returns them.

    Lines of other models are dashed beyond the context they were made for.
    """
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "svg.hashsalt": "griffin",
        "text.color": DARK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 7.2), facecolor="white", layout="constrained")
        memory, speed = figure.subplots(2, sharex=True, height_ratios=(3, 1.2))
        figure.supxlabel(
            _CAPTION.format(_clipped(Path(depth.path).stem)), x=0.01, ha="left", fontsize=8, parse_math=False
        )
        _draw_memory(memory, depth)
        _draw_speed(speed, depth)
        return _save(figure, folder, "depth")


def _draw_memory(axes: Axes, depth: Depth) -> None:
    """What each model holds of the text, and the whole of our process."""
    positions = [point.position for point in depth.points]
    last = depth.points[-1]
    _frame(axes, "Memory that the text read so far takes")
    axes.set(xscale="log", yscale="log")
    labels: list[tuple[float, str, str]] = []
    for cache, color in zip(CACHES, OTHERS, strict=True):
        bends = (
            positions[0],
            cache.window or 1,
            cache.context,
            positions[-1],
        )  # straight between, with two log axes
        points = sorted({min(max(p, positions[0]), positions[-1]) for p in bends})
        for part, dashes in (
            ([p for p in points if p <= cache.context], "solid"),
            ([p for p in points if p >= cache.context], (0, (4, 2))),
        ):
            axes.plot(part, [cache.nbytes(p) for p in part], color=color, linewidth=1.8, linestyle=dashes)
        labels.append((cache.nbytes(last.position), cache.name, color))
    axes.plot(positions, [p.state for p in depth.points], color=OURS, linewidth=2.6, marker="o", markersize=4)
    axes.plot(positions, [p.rss for p in depth.points], color=OURS, linewidth=1.2, marker="o", markersize=3)
    labels += [(last.state, "Griffin's state", OURS), (last.rss, "Griffin's whole program,\nweights and all", OURS)]
    low, high = min(value for value, *_ in labels), max(value for value, *_ in labels)
    low = min(low, *(cache.nbytes(positions[0]) for cache in CACHES))
    axes.set_ylim(low / 2.5, high * 2.5)
    axes.set_yticks([size for size in _SIZES if low / 2.5 <= size <= high * 2.5])
    axes.yaxis.set_major_formatter(lambda value, _: size_text(value))
    axes.yaxis.minorticks_off()
    _label_ends(axes, last.position, [(v, f"{name}: {size_text(v)}", color) for v, name, color in labels])


def _draw_speed(axes: Axes, depth: Depth) -> None:
    """Decoding, from 0, so that a slope looks as large as it is."""
    positions, speeds = [p.position for p in depth.points], [p.speed for p in depth.points]
    _frame(axes, "Speed of decoding, tokens a second")
    axes.plot(positions, speeds, color=OURS, linewidth=2, marker="o", markersize=4)
    axes.set_ylim(0, 1.3 * max(speeds))
    marks = [p for p in positions if p & (p - 1) == 0] or positions[-1:]
    marks = marks[:: -1 - len(marks) // 9]  # 8 at most, the last among them: more would not stand side by side
    axes.set_xticks(marks, [f"{p:,}" for p in marks])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("tokens read", color=DARK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    text = f"{speeds[-1]:,.0f}" if speeds[-1] >= 100 else f"{speeds[-1]:.3g}"
    if change := depth.change:
        text += f"\n{change.speed:.3f} of the speed\nat {change.early:,} tokens"
    _label_ends(axes, positions[-1], [(speeds[-1], text, OURS)])


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, weight="bold", color=DARK)
    axes.grid(visible=True, which="major", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=DARK)
    axes.spines[:].set_visible(False)


def _label_ends(axes: Axes, x: float, labels: list[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, (value, text, color) each, no two at one height."""
    to_axes = axes.transScale + axes.transLimits
    gap, lowest = 0.045, -np.inf  # of the height of the axes a line of text
    for value, text, color in sorted(labels):
        lines = text.count("\n") + 1
        height = max(float(to_axes.transform((x, value))[1]), lowest + gap * lines / 2)
        lowest = height + gap * lines / 2
        axes.text(1.015, height, text, transform=axes.transAxes, color=color, va="center", fontsize=9, weight="bold")


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """As SVG and PNG; the same measurement gives the same SVG."""
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _clipped(name: str) -> str:
    """A name in at most 40 characters."""
    return name if len(name) <= 40 else f"{name[:39]}…"


def size_text(count: float) -> str:
    """Bytes in binary units, three digits as a rule: 512 MiB, 1.75 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(count).bit_length() - 1, 0) // 10, len(units) - 1)
    value = count / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 100 else f"{value:.3g} {units[power]}"
