"""How all plots look, by matplotlib, which only these need: `pip install 'griffin-gguf[report]'`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from griffin_gguf.quant.wording import UNITS
from griffin_gguf.runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DARK, LIGHT = "#333333", "#e6e6e6"

#: Colours of lines and points, to be told apart by those who see no red or green, too.
COLORS = ("#1f6fb4", "#c8503c", "#2b8a57", "#d08a1d", "#7a5aa6", "#3aa6b9", "#b05a8c", "#7d6b4f", "#5b6b7a")

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "svg.hashsalt": "griffin",
    "text.color": DARK,
    "axes.labelcolor": DARK,
    "text.parse_math": False,  # names of files are drawn too
}


def check_matplotlib() -> None:
    """Raise `UnsupportedError` where there is no matplotlib. Does not import it: memory may be measured next."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError("plots need matplotlib: pip install 'griffin-gguf[report]'")


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure, so many inches in size; what is drawn and saved in the block has our style."""
    check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), facecolor="white", layout="constrained")


def frame(axes: Axes, title: str, grid: str = "both") -> None:
    """A title on the left, a light grid along the axis or axes named, no box."""
    axes.set_title(title, loc="left", fontsize=11, weight="bold", color=DARK)
    axes.grid(visible=True, which="major", axis=grid, color=LIGHT, linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=DARK)
    axes.spines[:].set_visible(False)


def label_ends(axes: Axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, (value, text, color) each, no two at one height, none above the axes."""
    axes.get_figure(root=True).draw_without_rendering()  # pyright: ignore[reportOptionalMemberAccess]
    line = 12 / (axes.get_window_extent().height / axes.get_figure(root=True).dpi * 72)  # pyright: ignore[reportOptionalMemberAccess]
    to_axes = axes.transScale + axes.transLimits
    placed = [(float(to_axes.transform((x, value))[1]), text, color) for value, text, color in sorted(labels)]
    gaps = [line * (1 + text.count("\n")) for _, text, _ in placed]
    heights: list[float] = []
    for (wanted, _, _), gap in zip(placed, gaps, strict=True):
        heights.append(max(wanted, heights[-1] + gap if heights else -np.inf))
    ceiling = 1.0
    for i in reversed(range(len(heights))):  # what has been pushed out at the top comes down again
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gaps[i]
    for height, (_, text, color) in zip(heights, placed, strict=True):
        axes.text(1.015, height, text, transform=axes.transAxes, color=color, va="center", fontsize=9, weight="bold")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """As SVG and PNG; the same measurement gives the same SVG."""
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def byte_axis(axis: Any, most: float) -> None:
    """Round marks in the unit that suits `most` bytes, on an `axes.xaxis` or `axes.yaxis`."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    power = min(max(int(most).bit_length() - 1, 0) // 10, 4)
    unit = 1024**power
    marks = MaxNLocator(6).tick_values(0, most / unit)
    axis.set_major_locator(FixedLocator([float(mark * unit) for mark in marks]))
    axis.set_major_formatter(lambda value, _: f"{value / unit:g} {UNITS[power]}" if value else "0")


def plain_numbers(axis: Any) -> None:
    """Marks of a logarithmic axis as 0.001 and 2e-05, without powers set as formulas."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
