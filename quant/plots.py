"""The plot of speed and memory against tokens read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from griffin_gguf.quant.depth import CACHES, Depth
from griffin_gguf.quant.drawing import COLORS, DARK, frame, label_ends, new_figure, save
from griffin_gguf.quant.wording import clipped, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS = COLORS[0], (COLORS[1], COLORS[3], COLORS[4])

#: Marks of a logarithmic axis of bytes.
_SIZES = [count << 10 * unit for unit in range(5) for count in (1, 10, 100)]


_CAPTION = (
    "Griffin: {}, measured. Others: their keys and values in f16 by their published shapes;\ndashed beyond the context "
    "they were made for. Mistral-7B without its window, as in v0.2, takes what Llama-3-8B takes."
)


def draw_depth(depth: Depth, folder: Path) -> list[Path]:
    """Write depth.svg and depth.png: memory and speed against position. Returns them.

    Lines of other models are dashed beyond the context they were made for.
    """
    with new_figure(9, 7.2) as figure:
        memory, speed = figure.subplots(2, sharex=True, height_ratios=(3, 1.2))
        figure.supxlabel(_CAPTION.format(clipped(Path(depth.path).stem)), x=0.01, ha="left", fontsize=8)
        _draw_memory(memory, depth)
        _draw_speed(speed, depth)
        return save(figure, folder, "depth")


def _draw_memory(axes: Axes, depth: Depth) -> None:
    """What each model holds of the text, and the whole of our process."""
    positions = [point.position for point in depth.points]
    last = depth.points[-1]
    frame(axes, "Memory that the text read so far takes")
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
    label_ends(axes, last.position, [(v, f"{name}: {size_text(v)}", color) for v, name, color in labels])


def _draw_speed(axes: Axes, depth: Depth) -> None:
    """Decoding, from 0, so that a slope looks as large as it is."""
    positions, speeds = [p.position for p in depth.points], [p.speed for p in depth.points]
    frame(axes, "Speed of decoding, tokens a second")
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
    label_ends(axes, positions[-1], [(speeds[-1], text, OURS)])
