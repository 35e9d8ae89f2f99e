import json
from dataclasses import asdict

from griffin_gguf.quant.measure import Measurement
from griffin_gguf.quant.report import COLUMNS, Report

ROW = Measurement(
    path="m.gguf", type="Q4_K_M", backend="ggml", parameters=1000, bits_per_weight=4.8765, file_size=3 << 20,
    load_seconds=0.25, peak_rss=100 << 20, rss_anonymous=None, rss_file=None, prefill_speed=321.04, decode_speed=45.67,
    perplexity=12.34567, perplexity_stderr=0.1234, bits_per_byte=1.5, tokens=2000,
)  # fmt: skip


def test_markdown() -> None:
    assert Report([ROW]).to_markdown() == (
        "| type | bits/weight | file MiB | peak RAM MiB | prefill tok/s | decode tok/s | perplexity |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| Q4_K_M | 4.88 | 3.0 | 100 | 321.0 | 45.7 | 12.346 ± 0.123 |\n"
    )


def test_cells() -> None:
    report = Report([ROW, ROW])
    assert len(report.headings) == len(COLUMNS)
    assert [len(line) for line in report.cells] == [len(COLUMNS)] * 2


def test_json_is_unrounded() -> None:
    assert json.loads(Report([ROW]).to_json()) == {"rows": [asdict(ROW)]}
    assert json.loads(Report().to_json()) == {"rows": []}
