from pathlib import Path

from command import griffin

TYPES = ("BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")


def test_the_demo_converts_generates_and_measures(tmp_path: Path) -> None:
    result = griffin("demo", "--dir", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    names = [f"demo-{kind}.gguf" for kind in TYPES]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "report"}
    assert {"report.html", "report.json", "size.png"} <= {path.name for path in (tmp_path / "out" / "report").iterdir()}
    converted, generated, measured, rest = _parts(result.stdout)
    assert all(name in converted for name in names)
    assert all(f"   {kind} " in generated for kind in TYPES)
    assert generated.count("   … ") == len(TYPES)
    assert all(f" {kind} " in measured for kind in TYPES)
    assert f"with plots: {tmp_path / 'out'}/report/report.html" in measured
    assert f"chat {tmp_path / 'out'}/demo-Q8_0.gguf" in rest


def _parts(page: str) -> list[str]:
    """The four parts of the page, by their titles."""
    titles = ("1  Convert", "2  Generate", "3  Measure", "✓  Done")
    places = [page.index(title) for title in titles]
    assert places == sorted(places)
    return [page[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]
