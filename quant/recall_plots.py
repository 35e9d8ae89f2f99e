"""The plot of a recall measurement, by matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from griffin_gguf.quant.drawing import COLORS, DARK, frame, label_ends, new_figure, save
from griffin_gguf.quant.recall import INTERVAL, Mean, Point, Recall, Share
from griffin_gguf.quant.recall_tasks import TASKS
from griffin_gguf.quant.wording import clipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAPTION = (
    "{} ({}), {} trials of two readings each, filler: {}. Bars: intervals of 95 %.\n"
    "Distance: from where the answer stood to where it is to be given. Points of one distance stand side by side."
)
_SIDESTEP = 1.05  # factor between points of one distance, so that their bars do not lie on each other
_MARGIN = 1.3  # factor of distance beyond the outermost
_LINEAR = 1e-3  # nats: below it the axis of what is saved is linear, above logarithmic
_TICKS = (-1, -0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1, 1, 10)


@dataclass(frozen=True)
class _Line:
    """The points of one task, and how they are drawn."""

    task: str
    color: str
    points: list[Point]
    shift: float

    @property
    def at(self) -> list[float]:
        """Where the points stand."""
        return [point.distance * self.shift for point in self.points]


def draw_recall(recall: Recall, folder: Path) -> list[Path]:
    """Write recall.svg and recall.png: right answers and nats saved against distance. Returns them."""
    lines = _lines(recall)
    asked = [line for line in lines if TASKS[line.task].asks]
    with new_figure(9, 7.4 if asked else 4.2) as figure:
        axes: list[Axes] = list(figure.subplots(2 if asked else 1, sharex=True, squeeze=False).flat)
        words = clipped(Path(recall.path).name), recall.type, recall.trials, clipped(recall.text)
        figure.supxlabel(_CAPTION.format(*words), x=0.01, ha="left", fontsize=8)
        for one in axes:
            _mark(one, recall)
        if asked:
            _draw_answers(axes[0], asked, recall.choices)
        _draw_saved(axes[-1], lines)
        axes[-1].set_xlabel("distance, tokens")
        return save(figure, folder, "recall")


def _lines(recall: Recall) -> list[_Line]:
    tasks = list(dict.fromkeys(point.task for point in recall.points))
    return [
        _Line(
            task,
            COLORS[list(TASKS).index(task)],
            [point for point in recall.points if point.task == task],
            _SIDESTEP ** (i - (len(tasks) - 1) / 2),
        )
        for i, task in enumerate(tasks)
    ]


def _mark(axes: Axes, recall: Recall) -> None:
    """The distances as a logarithmic axis, and where the window and the training texts end on it."""
    distances = sorted({point.distance for point in recall.points})
    low, high = distances[0] / _MARGIN, distances[-1] * _MARGIN
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    marks = distances[:: -1 - len(distances) // 13]
    axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
    axes.xaxis.minorticks_off()
    for at, words in ((recall.window, " attention\n window"), (recall.trained, " training\n length")):
        if low < at < high:
            axes.axvline(at, color=DARK, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(at, 0.98, words, transform=axes.get_xaxis_transform(), fontsize=8, va="top", color=DARK)


def _draw_answers(axes: Axes, lines: list[_Line], choices: int) -> None:
    """Choices as filled points, greedy answers as hollow ones on dashed lines."""
    frame(axes, f"Right answers: the likeliest of {choices} (filled), the greedy one (hollow)")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.axhline(1 / choices, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
    labels = [(1 / choices, "by chance", DARK)]
    for line in lines:
        for fill, name, shares in (
            (line.color, line.task, [point.choice for point in line.points]),
            ("white", f"{line.task}, greedy", [point.exact for point in line.points]),
        ):
            found = [share for share in shares if share]
            _draw_shares(axes, line, found, fill)
            labels.append((found[-1].value, name, line.color))
    label_ends(axes, axes.get_xlim()[1], labels)


def _draw_shares(axes: Axes, line: _Line, shares: list[Share], fill: str) -> None:
    values = [share.value for share in shares]
    # rounding may put a share of 0 or 1 a hair outside its interval
    bars = [
        [max(0.0, share.value - share.low) for share in shares],
        [max(0.0, share.high - share.value) for share in shares],
    ]
    axes.errorbar(
        line.at,
        values,
        yerr=bars,
        color=line.color,
        linewidth=1.6,
        linestyle="solid" if fill == line.color else (0, (3, 2)),
        elinewidth=0.9,
        marker="o",
        markersize=5,
        markerfacecolor=fill,
    )


def _draw_saved(axes: Axes, lines: list[_Line]) -> None:
    frame(axes, "What having read the answer saves when it comes, nats a token")
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.axhline(0, color=DARK, linewidth=1)
    labels: list[tuple[float, str, str]] = []
    for line in lines:
        saved = [point.saved for point in line.points]
        bars = [INTERVAL * mean.stderr for mean in saved]
        axes.errorbar(
            line.at,
            [mean.value for mean in saved],
            yerr=bars,
            color=line.color,
            linewidth=1.6,
            elinewidth=0.9,
            marker="o",
            markersize=5,
        )
        labels.append((saved[-1].value, line.task, line.color))
    low, high = _range([point.saved for line in lines for point in line.points])
    axes.set_ylim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.minorticks_off()
    label_ends(axes, axes.get_xlim()[1], labels)


def _range(means: list[Mean]) -> tuple[float, float]:
    """All bars and some room, and at least the linear part of the axis."""
    low = min(mean.value - INTERVAL * mean.stderr for mean in means)
    high = max(mean.value + INTERVAL * mean.stderr for mean in means)
    return min(1.5 * low, -_LINEAR), max(1.5 * high, _LINEAR)
