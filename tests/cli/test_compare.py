import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reports
from command import done, griffin, refused

from griffin_gguf.quant.report.compare import compare
from griffin_gguf.quant.report.data import Report, Spread
from griffin_gguf.runtime.errors import UnsupportedError


def written(path: Path, report: Report) -> Path:
    path.write_text(report.to_json(), encoding="utf-8")
    return path


def slower(report: Report) -> Report:
    rows = [replace(row, cost=row.cost and reports.cost(row.cost.memory.needed, 20.0)) for row in report.rows]
    return replace(report, rows=rows)


def test_what_has_changed_and_what_is_noise(tmp_path: Path) -> None:
    before = reports.typical()
    a, b = written(tmp_path / "a.json", before), written(tmp_path / "b.json", slower(before))
    lines = [line.split() for line in done("compare", a, b).splitlines()]
    (write,) = [line for line in lines if line[:1] == ["write"]][:1]
    assert write == ["write", "25", "tok/s", "20", "tok/s", "0.800", "changed"]
    assert ["load", "0.2", "s", "0.2", "s", "1.000", "runs", "overlap"] in lines
    assert ["perplexity", "41", "41", "1.000"] in lines
    assert lines[3][:2] == ["recurrentgemma", "BF16"]


def test_compared_in_json(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", reports.typical())
    found = json.loads(done("compare", a, a, "--json"))
    assert found["notes"] == found["unmatched"] == []
    assert {line["first"] / line["second"] for line in found["lines"]} == {1.0}
    measures = [line["measure"] for line in found["lines"] if line["row"] == "recurrentgemma Q2_K"]
    assert measures == ["file", "RAM needed", "load", "read", "write", "perplexity", "perplexity, one pass", "KL"]


def test_other_texts_and_machines_are_told_and_not_compared() -> None:
    one = reports.typical()
    other = replace(
        one,
        text=replace(one.text, sha256="cd" * 32),
        machine=replace(one.machine, cpu="Another"),
        complete=False,
        rows=[
            one.rows[0],
            replace(one.rows[1], cost=one.rows[1].cost and replace(one.rows[1].cost, threads=8, runs_on="numpy")),
            replace(one.rows[2], type="Q3_K_M"),
        ],
    )
    found = compare(one, other)
    assert not {line.measure for line in found.lines} & {"perplexity", "KL"}
    told = " ".join(found.notes)
    for words in (
        "other texts",
        "Another, 8 cores",
        "threads: 1 and 1, 8",
        "run by: ggml and ggml, numpy",
        "second report is not",
    ):
        assert words in told
    assert found.unmatched == ["recurrentgemma BF16 h in BF16", "recurrentgemma Q2_K", "recurrentgemma Q3_K_M"]
    swapped = [replace(row, reference=row.type == "Q8_0") for row in one.rows]
    told = " ".join(compare(one, replace(one, rows=swapped)).notes)
    assert "references, to which KL is taken: recurrentgemma BF16 and recurrentgemma Q8_0" in told
    windows = compare(one, replace(one, settings=replace(one.settings, ctx=256)))
    assert windows.notes == ["windows of 512 and 256: perplexities and KL are left out"]


def test_equal_things_seldom_look_changed() -> None:
    rng, changed = np.random.default_rng(0), 0
    for _ in range(1000):
        one, other = (replace(reports.row("a", "Q8_0", 8, 38.0), cost=None) for _ in range(2))
        costs = [replace(reports.cost(), decode=Spread.of(rng.normal(50, 2, 5).tolist())) for _ in range(2)]
        found = compare(reports.report(replace(one, cost=costs[0])), reports.report(replace(other, cost=costs[1])))
        changed += next(line.beyond for line in found.lines if line.measure == "write") is True
    assert 1 <= changed <= 25  # 0.8 % by chance


def test_files_of_one_type_are_matched_by_name() -> None:
    rows = [reports.row(name, "Q8_0", 8, 38.0 + i) for i, name in enumerate("ab")]
    rows[1] = replace(rows[1], family=1)
    found = compare(reports.report(*rows), reports.report(*rows[::-1]))
    assert {line.row for line in found.lines} == {"a.gguf", "b.gguf"}
    assert all(line.first == line.second for line in found.lines)


def test_reports_with_nothing_in_common() -> None:
    one = reports.report(reports.row("a", "Q8_0", 8, 38.0))
    with pytest.raises(UnsupportedError, match="no row in common: recurrentgemma Q8_0 and recurrentgemma Q2_K"):
        compare(one, reports.report(reports.row("a", "Q2_K", 5, 38.0)))


def test_what_is_no_report_is_one_line(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", reports.typical())
    (tmp_path / "b.json").write_text("{}")
    assert "b.json: report: is no report.json of griffin" in refused("compare", a, tmp_path / "b.json")
    assert refused("compare", tmp_path / "no.json", a).endswith("no.json: No such file or directory")
    assert griffin("compare", a).exit_code == 2
