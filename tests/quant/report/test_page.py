"""The page, the Markdown and the plots, of figures made up."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import reports

from griffin_gguf.quant.report.page import to_html, to_markdown
from griffin_gguf.quant.report.plots import PLOTS, draw
from griffin_gguf.quant.report.table import COLUMNS, NONE, brief, cells, labels, legend

GIB = 1 << 30


class Page(HTMLParser):
    """What a page links to, the tags left open, and its text."""

    _LINKS = frozenset({"src", "href", "xlink:href", "action", "srcset"})
    _VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset")
        ]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("plots")
    return folder, draw(reports.typical(), folder)


def test_every_plot_is_there_as_svg_and_png(drawn: tuple[Path, dict[str, str]]) -> None:
    folder, inline = drawn
    assert set(inline) == set(PLOTS)
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for name in PLOTS for end in ("svg", "png")}
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in folder.glob("*.svg"):
        ElementTree.parse(path)


def test_plots_name_what_they_show(drawn: tuple[Path, dict[str, str]]) -> None:
    _, inline = drawn
    for name, wanted in {
        "size": ("BF16", "Q8_0", "Q2_K", "perplexity a token"),
        "kl": ("Q8_0", "Q2_K", "h in BF16", "median", "99 %"),
        "ram": ("BF16", "32 MiB", "allocated"),
        "speed": ("Q2_K", "2,048"),
        "position": ("h in BF16", "fresh windows of 512", "10,000"),
    }.items():
        for word in wanted:
            assert word in inline[name], (name, word)


def test_the_page_needs_no_network_and_follows_the_reader(drawn: tuple[Path, dict[str, str]]) -> None:
    html = to_html(reports.typical(), drawn[1], 16 * GIB)
    page = Page(html)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    svg = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert len(re.findall("<svg", svg)) == len(PLOTS)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(set(ids)) == len(ids) > 100
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert fixed <= {"#000000"}  # matplotlib's own for what has no colour to see
    assert "var(--c0)" in svg


def test_the_page_says_what_was_measured(drawn: tuple[Path, dict[str, str]]) -> None:
    page = Page(to_html(reports.typical(), drawn[1], 16 * GIB)).text
    for word in (
        "With 16 GiB of memory take base-Q8_0.gguf", "A processor, 8 cores, 16 GiB", "02 January 2026, 03:04 UTC",
        "38.000 ± 0.380", "+2.50 ± 0.12", "Does error gather in the state?", "from token 512", "novel.txt",
    ):  # fmt: skip
        assert word in page
    assert "Not finished" not in page
    assert "Not finished" in Page(to_html(replace(reports.typical(), complete=False), {}, GIB)).text


def test_names_are_only_text() -> None:
    evil = '<script>alert("1")</script>$\\frac{1}{2}$ & _x_ | y'
    rows = [replace(row, name=f"{evil}{i}", type=evil) for i, row in enumerate(reports.typical().rows)]
    report = reports.report(*rows)
    html = to_html(report, {}, GIB)
    page = Page(html)
    assert "script" not in page.tags
    assert evil in page.text
    markdown = to_markdown(report, GIB)
    assert markdown.count("\\| y") >= len(report.files)
    assert "<script" not in markdown.replace("\\<", "")


def test_names_in_plots_are_only_text(tmp_path: Path) -> None:
    evil = "<b>$\\frac&\x01\n"
    rows = [replace(row, type=f"{evil}{i}") for i, row in enumerate(reports.typical().rows)]
    for svg in draw(reports.report(*rows), tmp_path).values():
        assert "<b>" not in svg
        assert "&lt;b&gt;$\\frac&amp;\\x01\\n" in svg
        ElementTree.fromstring(svg)


def test_what_was_not_measured_is_a_dash_and_no_plot(tmp_path: Path) -> None:
    bare = replace(reports.row("base", "BF16", 16, 38.0), cost=None, windows=None, stream=None)
    report = reports.report(bare, complete=False)
    assert draw(report, tmp_path) == {}
    (line,) = cells(report.files, COLUMNS)
    assert line.count(NONE) == len(COLUMNS) - 3  # type, bits, size
    assert "Nothing has been measured yet" in to_markdown(report, GIB)


def test_markdown_has_every_table() -> None:
    text = to_markdown(reports.typical(), 16 * GIB)
    assert "| base-Q2_K.gguf | Q2_K | 41.94 | 5 MiB |" in text
    assert "## Divergence from the reference" in text
    assert "| base-BF16.gguf, h in BF16 | 1e-05 ± 2e-07 |" in text
    assert "## Divergence with carried state over that of fresh windows" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables if "base" in line} == {15, 8, 6}


def test_rows_of_one_type_go_by_their_names() -> None:
    one, other = reports.row("a", "Q8_0", 8, 38.0), reports.row("b", "Q8_0", 8, 38.0, 0.1)
    assert set(labels([one, other]).values()) == {"a.gguf", "b.gguf"}
    assert set(labels([one]).values()) == {"Q8_0"}


def test_labels_tell_rows_apart_whatever_their_names() -> None:
    long = "recurrentgemma-2b-it-with-a-long-name"
    files = [reports.row(f"{long}-{type}", type, 8, 38.0, 0.1) for type in ("Q8_0", "Q4_K_M")]
    gemma = reports.row("gemma-2b-it-with-a-long-name-Q8_0", "Q8_0", 8, 38.0, family=1)
    rounded = [replace(files[0], name=f"{files[0].name}, {p}", precision=p) for p in ("h in F16", "h in BF16")]
    twins = [replace(gemma, name=f"some/long/{folder}/of/mine/model-of-mine.gguf") for folder in ("folder", "f\noder")]
    found = labels([*files, gemma, *rounded, *twins])
    assert len(set(found.values())) == 7
    assert all(len(label) <= 24 + len(", h in BF16") for label in found.values())
    assert found[id(files[1])].endswith("Q4_K_M.gguf")
    assert found[id(rounded[1])].endswith(".gguf, h in BF16")


def test_the_legend_tells_threads_and_tokens() -> None:
    report = reports.typical()
    assert "(ggml, 1 thread)" in legend(report)
    many = [replace(row, cost=row.cost and replace(row.cost, threads=8)) for row in report.rows]
    assert "(ggml, 8 threads)" in legend(replace(report, rows=many))
    assert "20,480 tokens with carried state, 20 times the length that the reference was trained on" in legend(report)


def test_losses_of_several_vocabularies_are_given_per_byte(tmp_path: Path) -> None:
    one = reports.typical()
    other = reports.row("gemma", "Q8_0", 9, 300.0, architecture="gemma", vocabulary="another", family=1)
    report = reports.report(*one.rows, other)
    assert "bits/byte" not in [c.heading for c in brief(one, wide=True)]
    headings = [c.heading for c in brief(report, wide=False)]
    assert "bits/byte" in headings
    assert "perplexity" not in headings
    assert "compare bits per byte" in legend(report)
    plots = draw(report, tmp_path)
    assert "bits per byte" in plots["size"]
    assert "Loss, bits per byte" in plots["position"]
    assert "Loss, nats a token" in draw(one, tmp_path)["position"]


@pytest.mark.parametrize(("wide", "room"), [(False, 80), (True, 100)])
def test_a_terminal_has_room_for_the_brief_table(wide: bool, room: int) -> None:
    columns = brief(reports.typical(), wide=wide)
    widths = [
        max([*map(len, column.heading.replace("bits/", "bits /").rsplit(" ", 1)), *(len(line[i]) for line in lines)])
        for lines in [cells(reports.typical().files, columns)]
        for i, column in enumerate(columns)
    ]
    assert sum(widths) + 2 * (len(columns) - 1) + 2 <= room
    assert len(columns) == (10 if wide else 8)
