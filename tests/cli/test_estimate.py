import json
from pathlib import Path
from typing import Any

import pytest
from command import done, refused

from griffin_gguf.quant.depth import CACHES

FAST = ("estimate", "--bandwidth", "100GB/s")


def found(*arguments: str | Path) -> dict[str, Any]:
    return json.loads(done("estimate", *arguments, "--json"))


def test_all_types_of_a_published_model() -> None:
    lines = [line.split() for line in done(*FAST, "--model", "9B", "--ctx", "100000", "--batch", "4").splitlines()]
    assert lines[0][:2] == ["8,579,977,216", "weights,"]
    sizes = [line[2:4] for line in lines if line and line[0] in ("BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")]
    assert [" ".join(size) for size in sizes[:5]] == ["17.17 GB", "9.13 GB", "6.19 GB", "5.37 GB", "3.74 GB"]
    (last,) = [" ".join(line) for line in lines if line[:2] == ["4", "texts"]]
    assert last.startswith("4 texts of 100,000 tokens: 126.5 MiB of state, as at any length; Transformers'")
    assert "Gemma-7B 170.9 GiB, Llama-3-8B 48.8 GiB, Mistral-7B-v0.1 2.0 GiB" in last


def test_json_of_one_type() -> None:
    one = found("--model", "2b", "--type", "q4_k_m", "--batch", "2", "--bandwidth", "50GiB/s", "--ctx", "5000")
    assert (one["model"], one["tokens"], one["batch"], one["bandwidth"]) == ("2b", 5000, 2, 50 * 2**30)
    (row,) = one["estimates"]
    assert (row["type"], row["parameters"], row["state"]) == ("Q4_K_M", 2_682_862_080, 21_708_800)
    assert row["decode"] == pytest.approx(2 * 50 * 2**30 / row["read"])
    assert row["prefill"] is None
    memory = row["memory"]
    parts = ("program", "vocabulary", "weights", "states", "logits", "buffers")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert memory["most"] == memory["total"] - memory["buffers"] + memory["most_buffers"]
    assert one["caches"] == {cache.name: 2 * cache.nbytes(5000) for cache in CACHES}


def test_a_checkpoints_files_are_as_large_as_its_conversions(checkpoint: Path, models: Path) -> None:
    types = [option for name in ("BF16", "Q8_0", "Q2_K") for option in ("--type", name)]
    rows = found("--model", checkpoint, "--bandwidth", "1GB/s", *types)["estimates"]
    for row in rows:
        size = (models / f"demo_model-{row['type']}.gguf").stat().st_size
        assert row["file_size"] == pytest.approx(size, abs=200)  # but for the name and the licence
    # of config.json alone the vocabulary is not known
    (alone,) = found("--model", checkpoint / "config.json", "--bandwidth", "1GB/s", "--type", "BF16")["estimates"]
    assert alone["file_size"] == pytest.approx(rows[0]["file_size"], rel=0.02)


def test_a_file_as_it_is_and_in_another_type(model: Path, models: Path) -> None:
    (own,) = found("--model", model, "--bandwidth", "1GB/s")["estimates"]
    assert (own["type"], own["file_size"]) == ("Q8_0", model.stat().st_size)
    (other,) = found("--model", model, "--type", "Q2_K", "--bandwidth", "1GB/s")["estimates"]
    assert other["file_size"] == pytest.approx((models / "demo_model-Q2_K.gguf").stat().st_size, abs=200)


def test_speeds_are_measured_here_unless_a_bandwidth_is_given(model: Path) -> None:
    page = done("estimate", "--model", model, "-t", "1")
    assert "prefill" in page
    (row,) = [line.split() for line in page.splitlines() if line.split()[:1] == ["Q8_0"]][:1]
    assert len(row) == 12  # type, bits, four sizes with units, two speeds
    assert "prefill" not in done(*FAST, "--model", model)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--model", "2b", "--type", "Q7"), "'Q7' is no file type; choose one of F32, BF16"),
        (("--model", "2b", "--bandwidth", "fast"), "--bandwidth fast: expected a rate such as 100GB/s or 50GiB/s"),
        (("--model", "2b", "--bandwidth", "1GB/s", "-t", "1"), "--threads is for speeds measured here"),
        (("--model", "2b", "--batch", "513"), "Invalid value for '--batch'"),
        (("--model", "2b", "--ctx", "0"), "Invalid value for '--ctx'"),
        ((), "Missing option '--model'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(arguments: tuple[str, ...], problem: str) -> None:
    assert problem in refused("estimate", *arguments, code=2)


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    assert refused(*FAST, "--model", "7b").startswith(
        "7b: is no model; expected 2b or 9b, a checkpoint's folder or a file"
    )
    assert "config.json" in refused(*FAST, "--model", tmp_path)
    (tmp_path / "text.gguf").write_text("no model")
    assert "text.gguf: magic: " in refused(*FAST, "--model", tmp_path / "text.gguf")
