"""A report as Markdown and as one HTML page that needs nothing else."""

from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from griffin_gguf.quant.drawing import COLORS, DARK, LIGHT
from griffin_gguf.quant.report.advice import (
    SHARE,
    TOLERANCE,
    Choice,
    against,
    best,
    choices,
    drift,
    pareto,
    sentence,
)
from griffin_gguf.quant.report.data import Report, Row
from griffin_gguf.quant.report.table import COLUMNS, DIVERGENCE, cells, escaped, labels, legend, markdown, told_by_type
from griffin_gguf.quant.wording import size_text

#: What a plot shows, under it.
CAPTIONS: Mapping[str, str] = {
    "size": "The lower and the further left the better. The pale line joins the files for which no other is both "
    "smaller and better. Bars: standard error of the difference to the reference, which is far smaller than that of a "
    "perplexity alone, since both read the same tokens.",
    "kl": "How far predictions move from the reference's. A small mean with a large 99 % is a file that is usually "
    "right and sometimes far off.",
    "ram": "While it read a prompt and wrote an answer. Mapped pages may be dropped by the system when memory is "
    "short; they are then read from the disk again, for every token.",
    "speed": "Bars are quartiles. A Griffin's line is flat because its memory has a fixed size.",
    "position": "Read in one pass, the state carried from the first token to the last. Dashed lines of their own "
    "colours are the reference with a recurrence of lower precision. The last panel divides by what fresh windows give "
    "on the same tokens: were errors to gather in the state, its lines would rise.",
}

_TITLES = {
    "size": "Size against quality",
    "kl": "Distance from the reference",
    "ram": "Memory",
    "speed": "Speed against length",
    "position": "Does error gather in the state?",
}


def to_html(report: Report, plots: Mapping[str, str], memory: int) -> str:
    """The page; `plots` are inline SVGs by name, `memory` that of the machine at hand, in bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("griffin_gguf.quant.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    columns = COLUMNS[1:] if told_by_type(report.rows) else COLUMNS  # the type stands at the head of a line then
    return environment.from_string(source).render(
        report=report,
        title=_title(report),
        made=datetime.fromisoformat(report.made).strftime("%d %B %Y, %H:%M UTC"),
        sentence=sentence(report, memory),
        label=labels(report.rows),
        columns=columns,
        lines=list(zip(report.files, cells(report.files, columns), strict=True)),
        worth={row.name for row in pareto(report.files)},
        divergence=DIVERGENCE,
        far=_diverging(report),
        choices=[_chosen(choice, report) for choice in choices(report.files)],
        id=id,
        share=f"{SHARE:.0%}",
        tolerance=f"{TOLERANCE:.0%}",
        plots=[(name, _TITLES[name], Markup(_themed(svg)), CAPTIONS[name]) for name, svg in plots.items()],
        drift=_drift_lines(report, labels(report.rows)),
        legend=legend(report),
        memory=size_text(report.machine.memory),
        text_size=size_text(report.text.nbytes),
        light=_colors(COLORS),
        dark=_colors(_ON_DARK),
    )


def to_markdown(report: Report, memory: int) -> str:
    """The tables and what they mean; plots are beside it in files of their own."""
    headings = ["file", *(column.heading for column in COLUMNS)]
    lines = [[row.name, *line] for row, line in zip(report.files, cells(report.files, COLUMNS), strict=True)]
    parts = [
        f"# {escaped(_title(report))}\n",
        f"{escaped(sentence(report, memory))}\n",
        markdown(headings, lines, 2),
        f"{escaped(legend(report))}\n",
    ]
    if far := _diverging(report):
        headings = ["", *(column.heading for column in DIVERGENCE)]
        parts += ["## Divergence from the reference\n", markdown(headings, [[r.name, *line] for r, line in far], 1)]
    if found := _drift_lines(report, {id(row): row.name for row in report.rows}):
        parts += ["## Divergence with carried state over that of fresh windows\n", markdown(found[0], found[1:], 1)]
    machine = report.machine
    parts.append(
        f"{machine.cpu}, {machine.cores} cores, {size_text(machine.memory)}, {machine.system}; griffin-gguf "
        f"{machine.griffin}, llama-cpp-python {machine.llama_cpp_python}; {report.made}.\n"
    )
    return "\n".join(parts)


def _title(report: Report) -> str:
    names = sorted({row.architecture for row in report.files})
    return f"What each quantization costs: {', '.join(names)}"


def _diverging(report: Report) -> list[tuple[Row, list[str]]]:
    rows = [row for row in report.rows if row.windows and row.windows.distance]
    return list(zip(rows, cells(rows, DIVERGENCE), strict=True))


def _drift_lines(report: Report, label: Mapping[int, str]) -> list[list[str]]:
    """The ratios of `advice.drift`, a line a row under a line of headings; empty where there are none."""
    found = [(row, drift(row, report.settings.ctx)) for row in report.rows]
    found = [(row, parts) for row, parts in found if parts]
    if not found:
        return []
    starts = max((parts for _, parts in found), key=len)
    lines = [[label[id(row)], *(f"{p.ratio:.3f} ± {p.stderr:.3f}" for p in parts)] for row, parts in found]
    return [["", *(f"from token {part.start:,}" for part in starts)], *lines]


def _chosen(choice: Choice, report: Report) -> tuple[str, str, str]:
    """A line of the table of advice: memory, file, why."""
    if choice.row is None or choice.row.cost is None:
        return size_text(choice.memory), "none of these", "the smallest needs more"
    row, top = choice.row, best(report.files)
    assert row.cost
    more = "the best here" if row is top else f"perplexity {against(row, top)}"
    return size_text(choice.memory), row.name, f"needs {size_text(row.cost.memory.needed)}, {more}"


#: `COLORS` as they are readable on a dark ground.
_ON_DARK = ("#6db3f2", "#f08a75", "#62c48f", "#e8b04f", "#b39ae0", "#6fd0e0", "#e08fbf", "#bfa97f", "#9fb0c0")


def _colors(shades: tuple[str, ...]) -> str:
    """Declarations of CSS variables."""
    return " ".join(f"--c{i}: {shade};" for i, shade in enumerate(shades))


def _themed(svg: str) -> str:
    """An SVG whose colours and letters are the page's."""
    for i, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--c{i})")
    return (
        svg.replace(DARK, "var(--ink)").replace(LIGHT, "var(--line)").replace("'DejaVu Sans'", "system-ui, sans-serif")
    )
