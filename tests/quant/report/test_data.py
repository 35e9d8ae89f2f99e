import json
from pathlib import Path
from statistics import quantiles, stdev
from typing import Any

import numpy as np
import pytest
import reports
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.quant.report.data import Report, Spread, bins, short_names
from griffin_gguf.runtime.errors import FileFormatError

PATH = Path("report.json")


def test_a_report_comes_back_as_it_went() -> None:
    report = reports.typical()
    assert Report.from_json(PATH, report.to_json().encode()) == report
    assert [row.name for row in report.files] == ["base-BF16.gguf", "base-Q8_0.gguf", "base-Q2_K.gguf"]
    assert [row.precision for row in report.precisions] == ["h in BF16"]
    assert report.reference_of(report.rows[2]) is report.rows[0]


def changed(path: str, value: Any) -> bytes:
    """The report's JSON with another value at "rows.0.type"."""
    content = json.loads(reports.typical().to_json())
    at: Any = content
    *steps, last = (int(step) if step.isdecimal() else step for step in path.split("."))
    for step in steps:
        at = at[step]
    at[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "report: is no report.json of griffin: Input data was truncated"),
        (b"\x00\x01", "report: is no report.json of griffin"),
        (b"[]", "report: is no report.json of griffin"),
        (b'{"format": "other", "version": 1}', "format: expected griffin-report 1, found other 1"),
        (changed("version", 2), "format: expected griffin-report 1, found griffin-report 2"),
        (changed("rows.0.type", 3), r"\$.rows\[0\].type: Expected `str`, got `int`"),
        (changed("rows.1.cost.memory", {}), r"\$.rows\[1\].cost.memory: Object missing required field `peak`"),
        (changed("rows.0.reference", False), r"rows: expected one reference in each family, found \[\]"),
        (changed("text", None), r"\$.text: Expected `object`, got `null`"),
    ],
)
def test_what_is_no_report_is_named(raw: bytes, problem: str) -> None:
    with pytest.raises(FileFormatError, match=f"^report.json: {problem}"):
        Report.from_json(PATH, raw)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_report_or_an_error(raw: bytes) -> None:
    with pytest.raises(FileFormatError):
        Report.from_json(PATH, raw)


@given(st.lists(st.floats(1, 1000), min_size=2, max_size=9))
def test_a_spread_is_of_all_runs(values: list[float]) -> None:
    found = Spread.of(values)
    assert [found.low, found.median, found.high] == quantiles(values, n=4, method="inclusive")
    assert found.sd == stdev(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.runs == len(values)


def test_bins_hold_every_token_once() -> None:
    at = np.array([1, 2, 3, 10, 11, 12, 13, 30])
    nll, kl = np.arange(8.0), np.arange(8.0) / 10
    first, second = bins(at, nll, kl, [1, 10, 20, 40])  # one token alone has no error: left out
    assert (first.start, first.stop, first.tokens, first.nll, first.kl) == (1, 10, 3, 1.0, pytest.approx(0.1))
    assert (second.tokens, second.nll, second.nll_stderr) == (4, 4.5, pytest.approx(np.std([3, 4, 5, 6], ddof=1) / 2))
    assert bins(at, nll, None, [1, 40])[0].kl is None


def test_short_names() -> None:
    assert short_names(["a/m.gguf", "b/n.gguf"]) == ["m.gguf", "n.gguf"]
    assert short_names(["a/m.gguf", "b/m.gguf"]) == ["a/m.gguf", "b/m.gguf"]
