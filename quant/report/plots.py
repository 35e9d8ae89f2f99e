"""The plots of a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from griffin_gguf.quant.drawing import (
    COLORS,
    DARK,
    LIGHT,
    byte_axis,
    frame,
    label_ends,
    new_figure,
    plain_numbers,
    save,
)
from griffin_gguf.quant.report.advice import drift, pareto
from griffin_gguf.quant.report.data import Bin, Report, Row
from griffin_gguf.quant.report.table import labels
from griffin_gguf.quant.wording import size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 7.2  # inches: narrow, so that a phone shows letters of some size
_LINEAR = 3  # ratios beyond it have a logarithmic axis
_APART = 0.01  # of a loss: a line that ends further from its reference's has a name of its own


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Write every plot that the report has measurements for, as SVG and PNG; the SVGs by name, for a page."""
    found: dict[str, str] = {}
    for name, (height, has, drawing) in PLOTS.items():
        if not has(report):
            continue
        with new_figure(_WIDTH, height(report)) as figure:
            drawing(figure, report)
            save(figure, folder, name)
            found[name] = _inline(figure, name)
    return found


def _inline(figure: Figure, name: str) -> str:
    """The SVG with text as text, no background, and ids that no other plot of the page has."""
    import matplotlib as mpl

    target = StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = target.getvalue()
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])


def colors(report: Report) -> dict[int, str]:
    """A colour for each row, by its `id`; beyond so many they come again."""
    return {id(row): COLORS[i % len(COLORS)] for i, row in enumerate(report.rows)}


# -- size against perplexity ----------------------------------------------------------------------------


def draw_size(figure: Figure, report: Report) -> None:
    """File size against perplexity, bits per byte where vocabularies differ, and the line of those worth their size."""
    rows = [row for row in report.files if row.windows]
    named, shade = labels(rows), colors(report)
    plain = report.one_vocabulary
    axes: Axes = figure.subplots()
    frame(axes, "File size against perplexity" if plain else "File size against bits per byte of text")
    front = pareto(rows)
    axes.plot([r.file_size for r in front], [_loss(r, plain) for r in front], color=LIGHT, linewidth=6, zorder=1)
    for row in rows:
        axes.errorbar(
            row.file_size, _loss(row, plain), yerr=_paired_error(row, plain), fmt="o", color=shade[id(row)], capsize=3
        )
        axes.annotate(
            named[id(row)], (row.file_size, _loss(row, plain)), (7, 6), textcoords="offset points",
            color=shade[id(row)], fontsize=9, weight="bold",
        )  # fmt: skip
    axes.margins(x=0.16, y=0.16)
    axes.set_xlim(0, 1.14 * max(row.file_size for row in rows))
    byte_axis(axes.xaxis, max(row.file_size for row in rows))
    axes.set_ylabel(f"perplexity a token, windows of {report.settings.ctx}" if plain else "bits per byte")


def _loss(row: Row, plain: bool) -> float:
    assert row.windows
    return row.windows.perplexity if plain else row.windows.bits_per_byte


def _paired_error(row: Row, plain: bool) -> float:
    """Standard error of the difference to the reference, in the plot's unit; 0 for a reference itself."""
    if not row.windows or not row.windows.distance:
        return 0.0
    error, found = row.windows.distance.log_ratio_stderr, row.windows
    return found.perplexity * error if plain else error * found.tokens / (found.nbytes * log(2))


# -- divergence -----------------------------------------------------------------------------------------

_MARKS: tuple[tuple[str, str, str], ...] = (
    ("median", "|", "median"), ("mean", "o", "mean"), ("p99", "D", "99 %"), ("maximum", "x", "largest"),
)  # fmt: skip


def _diverging(report: Report) -> list[Row]:
    return [row for row in report.rows if row.windows and row.windows.distance]


def draw_kl(figure: Figure, report: Report) -> None:
    """For every row its divergence from the reference: median, mean, 99 %, the largest."""
    rows = _diverging(report)[::-1]
    named, shade = labels(rows), colors(report)
    axes: Axes = figure.subplots()
    frame(axes, "KL divergence from the reference, nats a token", grid="x")
    for height, row in enumerate(rows):
        assert row.windows
        assert row.windows.distance
        far = row.windows.distance
        axes.plot([max(far.median, 1e-9), max(far.maximum, 1e-9)], [height] * 2, color=LIGHT, linewidth=5, zorder=1)
        for name, marker, _ in _MARKS:
            value = max(getattr(far, name), 1e-9)
            axes.plot(value, height, marker=marker, color=shade[id(row)], markersize=8 if marker == "|" else 6)
        axes.annotate(
            f"{far.mean:.2g}", (max(far.mean, 1e-9), height), (0, 7), textcoords="offset points", ha="center",
            color=shade[id(row)], fontsize=8,
        )  # fmt: skip
    axes.set(xscale="log", ylim=(-0.6, len(rows) - 0.3))
    plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(rows)), [named[id(row)] for row in rows])
    for _, marker, word in _MARKS:
        axes.plot([], [], marker=marker, color=DARK, linestyle="none", label=word)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)


# -- memory ---------------------------------------------------------------------------------------------


def draw_ram(figure: Figure, report: Report) -> None:
    """What each file needs, its own memory and mapped pages one on the other."""
    rows = [row for row in report.files if row.cost][::-1]
    named = labels(rows)
    axes: Axes = figure.subplots()
    frame(axes, "Memory while it runs", grid="x")
    own = [row.cost.memory.anonymous for row in rows if row.cost]
    mapped = [row.cost.memory.mapped for row in rows if row.cost]
    places = range(len(rows))
    axes.barh(places, own, color=COLORS[1], height=0.6, label="allocated: state, buffers, vocabulary, Python")
    axes.barh(places, mapped, left=own, color=COLORS[0], height=0.6, label="pages of files: weights and programs")
    for place, a, b in zip(places, own, mapped, strict=True):
        axes.annotate(size_text(a + b), (a + b, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [named[id(row)] for row in rows])
    most = max(a + b for a, b in zip(own, mapped, strict=True))
    axes.set_xlim(0, 1.14 * most)
    byte_axis(axes.xaxis, most)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)


# -- speed ----------------------------------------------------------------------------------------------


def _timed(report: Report) -> list[Row]:
    return [row for row in report.files if row.cost and len(row.cost.by_position) > 1]


def draw_speed(figure: Figure, report: Report) -> None:
    """Decoding at positions of a text; the bars are quartiles. Positions stand side by side, whatever lies between."""
    rows = _timed(report)
    named, shade = labels(rows), colors(report)
    positions = sorted({at.position for row in rows if row.cost for at in row.cost.by_position})
    axes: Axes = figure.subplots()
    frame(axes, "Speed of writing after so many tokens, tokens a second")
    ends: list[tuple[float, str, str]] = []
    for row in rows:
        assert row.cost
        found = row.cost.by_position
        x = [positions.index(at.position) for at in found]
        y = np.array([at.decode.median for at in found])
        spread = np.array([[at.decode.median - at.decode.low, at.decode.high - at.decode.median] for at in found]).T
        axes.errorbar(x, y, yerr=np.maximum(spread, 0), color=shade[id(row)], marker="o", markersize=4, capsize=2)
        ends.append((float(y[-1]), named[id(row)], shade[id(row)]))
    axes.set_ylim(0, None)
    axes.set_xticks(range(len(positions)), [f"{position:,}" for position in positions])
    axes.set_xlabel("tokens read before")
    label_ends(axes, len(positions) - 1, ends)


# -- position -------------------------------------------------------------------------------------------


def _streamed(report: Report) -> list[Row]:
    return [row for row in report.rows if row.stream and len(row.stream.bins) > 1]


def draw_position(figure: Figure, report: Report) -> None:
    """Loss, divergence, and what carrying the state adds to it, against the position in the text."""
    rows = _streamed(report)
    far = [row for row in rows if row.stream and row.stream.distance]
    panels: list[Any] = list(figure.subplots(3 if far else 1, sharex=True, squeeze=False)[:, 0])
    _draw_loss(panels[0], rows, report)
    if far:
        _draw_divergence(panels[1], far, report)
        _draw_drift(panels[2], far, report)
    axes: Axes
    for axes in panels:
        axes.set_xscale("log")
        trained = [row.context for row in rows if row.reference]
        last = max(b.stop for row in rows if row.stream for b in row.stream.bins)
        for length in {length for length in trained if length < last}:
            axes.axvline(length, color=DARK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.minorticks_off()
    panels[-1].set_xlabel("position in the text, tokens; dashed: the length it was trained on")


def _middles(found: Sequence[Bin]) -> list[float]:
    return [(b.start + b.stop) / 2 for b in found]


def _draw_loss(axes: Axes, rows: Sequence[Row], report: Report) -> None:
    named, shade = labels(rows), colors(report)
    plain = report.one_vocabulary
    frame(axes, "Loss, nats a token" if plain else "Loss, bits per byte")
    ends: list[tuple[float, str, str]] = []
    for row in rows:
        assert row.stream
        scale = 1.0 if plain else row.stream.tokens / (row.stream.nbytes * log(2))
        values = [scale * b.nll for b in row.stream.bins]
        dashes = "solid" if row.precision is None else (0, (2, 1.5))
        axes.plot(_middles(row.stream.bins), values, color=shade[id(row)], linewidth=1.6, linestyle=dashes)
        base = report.reference_of(row).stream
        if row.reference or (base and abs(values[-1] - scale * base.bins[-1].nll) > _APART * values[-1]):
            ends.append((values[-1], named[id(row)], shade[id(row)]))
    label_ends(axes, axes.get_xlim()[1], ends)


def _draw_divergence(axes: Axes, rows: Sequence[Row], report: Report) -> None:
    named, shade = labels(rows), colors(report)
    frame(axes, "KL divergence from the reference, nats a token")
    ends: list[tuple[float, str, str]] = []
    axes.set_yscale("log")
    for row in rows:
        assert row.stream
        values = np.array([max(b.kl or 0.0, 1e-9) for b in row.stream.bins])
        errors = np.array([b.kl_stderr or 0.0 for b in row.stream.bins])
        dashes = "solid" if row.precision is None else (0, (2, 1.5))
        x = _middles(row.stream.bins)
        axes.plot(x, values, color=shade[id(row)], linewidth=1.6, linestyle=dashes)
        axes.fill_between(
            x, np.maximum(values - errors, 1e-9), values + errors, color=shade[id(row)], alpha=0.18, linewidth=0
        )
        ends.append((float(values[-1]), named[id(row)], shade[id(row)]))
    plain_numbers(axes.yaxis)
    label_ends(axes, axes.get_xlim()[1], ends)


def _draw_drift(axes: Axes, rows: Sequence[Row], report: Report) -> None:
    named, shade = labels(rows), colors(report)
    frame(axes, f"The same over that in fresh windows of {report.settings.ctx}")
    axes.axhline(1, color=DARK, linewidth=0.8)
    ends: list[tuple[float, str, str]] = []
    for i, row in enumerate(rows):
        found = drift(row, report.settings.ctx)
        if len(found) < 2 or not row.stream:
            continue
        stops = [*(part.start for part in found[1:]), row.stream.bins[-1].stop]
        nudge = 1 + 0.02 * (i - len(rows) / 2)  # side by side
        x = [nudge * (part.start * stop) ** 0.5 for part, stop in zip(found, stops, strict=True)]
        y, errors = [part.ratio for part in found], [part.stderr for part in found]
        axes.errorbar(x, y, yerr=errors, color=shade[id(row)], marker="o", markersize=4, capsize=2, linewidth=1.2)
        ends.append((y[-1], named[id(row)], shade[id(row)]))
    if ends and max(ends)[0] > _LINEAR:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    label_ends(axes, axes.get_xlim()[1], ends)


#: Name -> (height in inches, whether the report has what it shows, the drawing).
PLOTS: Mapping[str, tuple[Callable[[Report], float], Callable[[Report], Any], Callable[[Any, Report], None]]] = {
    "size": (lambda _: 4.4, lambda r: [row for row in r.files if row.windows], draw_size),
    "kl": (lambda r: 1.5 + 0.42 * len(_diverging(r)), _diverging, draw_kl),
    "ram": (lambda r: 1.5 + 0.42 * len(r.files), lambda r: [row for row in r.files if row.cost], draw_ram),
    "speed": (lambda _: 3.8, _timed, draw_speed),
    "position": (lambda r: 9.6 if _diverging(r) else 3.8, _streamed, draw_position),
}
