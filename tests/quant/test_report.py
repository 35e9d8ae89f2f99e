import json
from dataclasses import asdict, replace

from griffin_gguf.quant.measure import Measurement
from griffin_gguf.quant.report import COLUMNS, Report

ROW = Measurement(
    path="m.gguf", type="Q4_K_M", backend="ggml", parameters=1000, bits_per_weight=4.8765, file_size=3 << 20,
    load_seconds=0.25, peak_rss=100 << 20, rss_anonymous=None, rss_file=None, prefill_speed=321.04, decode_speed=45.67,
    perplexity=12.34567, perplexity_stderr=0.1234, bits_per_byte=1.5, tokens=2000,
)  # fmt: skip


def test_markdown() -> None:
    assert Report("novel.txt", 2, [ROW]).to_markdown() == (
        "| file | type | bits/weight | file MiB | peak RAM MiB | prefill tok/s | decode tok/s | perplexity |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| m.gguf | Q4_K_M | 4.88 | 3.0 | 100 | 321.0 | 45.7 | 12.346 ± 0.123 |\n"
        "\nPerplexity over 2000 tokens of novel.txt ± standard error; median speeds (ggml, 2 threads).\n"
    )


def test_cells() -> None:
    report = Report("novel.txt", rows=[ROW, ROW])
    assert len(report.headings) == len(COLUMNS)
    assert [len(line) for line in report.cells] == [len(COLUMNS)] * 2
    assert report.legend.endswith("(ggml, all cores).")
    assert Report("novel.txt", 1, [ROW]).legend.endswith("(ggml, 1 thread).")


def test_files_of_one_name_go_by_their_paths() -> None:
    rows = [replace(ROW, path=path) for path in ("a/m.gguf", "b/m.gguf")]
    assert Report("t", rows=rows).names == ["a/m.gguf", "b/m.gguf"]
    assert Report("t", rows=rows[:1]).names == ["m.gguf"]


def test_json_is_unrounded() -> None:
    assert json.loads(Report("t", 1, [ROW]).to_json()) == {"text": "t", "threads": 1, "rows": [asdict(ROW)]}
    assert json.loads(Report("t").to_json()) == {"text": "t", "threads": None, "rows": []}
