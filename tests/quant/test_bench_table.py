import csv
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from griffin_gguf.quant import speed
from griffin_gguf.quant.bench_table import FIELDS, FORMATS, Machine, Row
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.catalog import catalog

#: llama-bench's own, in its order, of which ours are a part.
LLAMA_BENCH = (
    "build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params n_batch "
    "n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu "
    "no_kv_offload flash_attn devices tensor_split tensor_buft_overrides load_mode embeddings no_op_offload no_host "
    "fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts"
)

MACHINE = Machine("griffin 1, ggml 2", 'A "fast" CPU', "", "CUDA")


#: As in llama-bench's documentation.
QWEN = speed.Measured("ggml", "qwen2 7B Q4_K - Medium", round(4.36 * 2**30), 7_615_616_512, 8, 512, None, [])


def row(test: speed.Test, *ns: int, **changes: Any) -> Row:
    samples = speed.Samples(test.tokens, ns)
    time = datetime(2025, 4, 5, 6, 7, 8, tzinfo=UTC)
    return Row(MACHINE, Path("models/qwen.gguf"), replace(QWEN, **changes), test, samples, time)


#: Rates of 100, 200 and 300 a second: mean 200, sample standard deviation 100.
ROWS = [
    row(speed.Test(600, depth=512), 6 * 10**9, 3 * 10**9, 2 * 10**9),
    row(speed.Test(gen=128), 10**9, weights_nbytes=10 * 2**20, parameters=8_170_000, description="a | b\x1b[31m"),
]


def written(name: str, rows: list[Row], batches: tuple[int, ...] = (2048,)) -> str:
    form = FORMATS[name](MACHINE, batches)
    return form.head() + "".join(form.row(one) for one in rows) + form.foot()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def test_markdown_says_what_llama_bench_says() -> None:
    head, rule, first, second, empty, build = written("md", ROWS).splitlines()
    assert cells(head) == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert [cell[-1] for cell in cells(rule)] == ["-", ":", ":", "-", ":", ":", ":"]
    # In its documentation: | qwen2 7B Q4_K - Medium | 4.36 GiB | 7.62 B | CUDA | pp512 @ d512 | 6425.91 ± 18.88 |
    assert cells(first) == [
        "qwen2 7B Q4_K - Medium", "4.36 GiB", "7.62 B", "CUDA", "8", "pp600 @ d512", "200.00 ± 100.00",
    ]  # fmt: skip
    assert cells(second) == ["a \\| b?[31m", "10.00 MiB", "8.17 M", "CUDA", "8", "tg128", "128.00 ± 0.00"]
    assert (empty, build) == ("", "build: griffin 1, ggml 2")
    assert len({len(line) for line in (head, rule, first, second)}) == 1, "it can be read as it is"


@pytest.mark.parametrize("batches", [(128,), (2048, 128)])
def test_batches_have_a_column_where_they_are_not_the_usual_ones(batches: tuple[int, ...]) -> None:
    head, _, line, *_ = written("md", [row(speed.Test(600, batch=128), 10**9)], batches).splitlines()
    assert cells(head)[5] == "n_batch"
    assert cells(line)[5] == "128"


def test_json_has_llama_benchs_fields_and_every_sample() -> None:
    first, second = json.loads(written("json", ROWS))
    assert list(first) == [*FIELDS, "samples_ns", "samples_ts"]
    assert first == {
        "build_commit": "griffin 1, ggml 2",
        "cpu_info": 'A "fast" CPU',
        "gpu_info": "",
        "backends": "CUDA",
        "runner": "ggml",
        "model_filename": "models/qwen.gguf",
        "model_type": "qwen2 7B Q4_K - Medium",
        "model_size": round(4.36 * 2**30),
        "model_n_params": 7_615_616_512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": 8,
        "n_prompt": 600,
        "n_gen": 0,
        "n_depth": 512,
        "test_time": "2025-04-05T06:07:08Z",
        "avg_ns": 3_666_666_667,
        "stddev_ns": 2_081_665_999,
        "avg_ts": 200.0,
        "stddev_ts": 100.0,
        "samples_ns": [6 * 10**9, 3 * 10**9, 2 * 10**9],
        "samples_ts": [100.0, 200.0, 300.0],
    }
    assert (second["n_gen"], second["stddev_ts"]) == (128, 0)
    assert [name for name in LLAMA_BENCH.split() if name in FIELDS] == [name for name in FIELDS if name != "runner"]
    assert json.loads(written("json", [])) == []


def test_json_lines_and_csv_say_the_same() -> None:
    whole = json.loads(written("json", ROWS))
    assert [json.loads(line) for line in written("jsonl", ROWS).splitlines()] == whole
    names, *lines = csv.reader(io.StringIO(written("csv", ROWS)))
    assert names == list(FIELDS)
    assert lines == [[str(one[name]) for name in FIELDS] for one in whole]


def test_a_machine_is_as_ggml_describes_it() -> None:
    machine = Machine.here("griffin 1")
    cpu = next(device for device in catalog() if device.kind == "CPU")
    assert machine.build == f"griffin 1, ggml {abi.GGML_VERSION}"
    assert cpu.description in machine.cpu
    assert machine.backends
