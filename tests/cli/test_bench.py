import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command import done, griffin, refused
from foreign import foreign

from griffin_gguf.quant import depth, speed
from griffin_gguf.runtime import tuner
from griffin_gguf.runtime.ggml import device
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.tuning import VARIABLE, Tuning, stored

DEPTH = ("bench", "--depth", "-t", "1")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where choices go; and tuning tries little, on one thread."""
    fields: list[tuple[str, list[Any]]] = [("attention", ["plain"]), ("chunk", [128])]
    monkeypatch.setattr(tuner, "_fields", lambda: iter(fields))
    monkeypatch.setattr(device, "compute_threads", lambda: 1)
    monkeypatch.setattr(tuner, "_DECODE_SECONDS", 0.01)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    return tmp_path / "tuning.json"


def test_tuning_prints_what_it_measured_and_stores_what_it_chose(model: Path, kept: Path) -> None:
    result = griffin("bench", "--tune", model)
    assert result.exit_code == 0, result.stderr
    for text in ("attention   flash ", " plain ", " of the time", "chosen: threads ", f"stored in {kept}"):
        assert text in result.stdout
    assert f"Tuning for {model.name}: 100 % (10 of 10 rounds)" in result.stderr
    with GgufFile.open(model) as file:
        found, notice = stored(file)
    assert notice is None
    assert f"attention {found.attention}, chunk {found.chunk}" in result.stdout


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("load", "told"), [(0.0, False), (999.0, True)])
def test_a_busy_machine_is_told(model: Path, monkeypatch: pytest.MonkeyPatch, load: float, told: bool) -> None:
    monkeypatch.setattr(tuner, "_fields", lambda: iter(()))
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    result = griffin("bench", "--tune", model)
    assert result.exit_code == 0
    assert ("a load of 999.0 on " in result.stderr) is told


def test_tuning_as_json(model: Path, kept: Path) -> None:
    found = json.loads(done("bench", "--tune", "--json", model))
    assert found["stored"] == str(kept)
    assert [duel["field"] for duel in found["duels"]] == ["attention", "chunk"]
    with GgufFile.open(model) as file:
        assert stored(file)[0] == Tuning(**found["tuning"])


def test_what_could_not_be_tried_is_told(model: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: list[tuple[str, list[Any]]] = [("buffers", ["repacked"])]
    monkeypatch.setattr(tuner, "_fields", lambda: iter(fields))
    monkeypatch.setattr(tuner.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    monkeypatch.setattr("griffin_gguf.runtime.model.psutil", type("Psutil", (), {"virtual_memory": _plenty}))
    page = done("bench", "--tune", model)
    assert "not tried: a copy of the weights takes " in page
    assert "buffers mapped" in page
    assert kept.exists()


def _plenty() -> Any:
    return type("Memory", (), {"available": 1 << 40})


def test_nothing_is_measured_that_could_not_be_stored(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(tuner, "tune", None)  # calling it would fail
    assert refused("bench", "--tune", model).startswith(f"{VARIABLE}: is empty")


def test_depth_is_a_table_of_ours_beside_others(model: Path) -> None:
    result = griffin(*DEPTH, model, "--tokens", "600")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("256", "512", "600")}
    assert list(rows) == ["256", "512", "600"]
    # 448 and 128 KiB a token
    assert rows["256"][-6:] == ["112.0", "MiB", "32.0", "MiB", "32.0", "MiB"]
    assert "Mistral" in result.stdout
    assert "(600 of 600 tokens)" in result.stderr


def test_depth_is_compared_with_the_beginning(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "_BLOCK_SECONDS", 0.01)
    page = done(*DEPTH, model, "--tokens", "6000")
    assert "from token 3,000 to 6,000: speed x" in page
    assert "state +0 bytes" in page


def test_depth_as_json_and_as_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged.", encoding="utf-8")
    folder = tmp_path / "figures"
    arguments = (*DEPTH, model, "--tokens", "300", "-f", tmp_path / "text.txt", "--plot", folder)
    found = json.loads(done(*arguments, "--json"))
    assert [point["position"] for point in found["points"]] == [256, 300]
    assert found["type"] == "Q8_0"
    assert {path.name for path in folder.iterdir()} == {"depth.json", "depth.svg", "depth.png"}
    assert json.loads((folder / "depth.json").read_bytes()) == found
    assert done(*arguments).splitlines()[-3:] == [str(folder / f"depth.{end}") for end in ("svg", "png", "json")]


def test_text_or_noise_takes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some words.", encoding="utf-8")
    sizes = [
        {point["state"] for point in json.loads(done(*DEPTH, model, "--tokens", "300", "--json", *more))["points"]}
        for more in ((), ("-f", tmp_path / "text.txt"))
    ]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tune", "--depth"), "expected one of --tune and --depth"),
        (("--tune", "-t", "1"), "--tune does not go with --threads"),
        (("--tune", "-p", "1"), "--tune does not go with --n-prompt"),
        (("--depth", "-d", "4"), "--depth does not go with --n-depth"),
        (("--depth", "-t", "1,2"), "--threads: --depth takes one number, found 2"),
        (("--depth", "--tokens", "0"), "Invalid value for '--tokens'"),
        (("--depth", "second.gguf"), "--depth takes one MODEL, found 2"),
        (("--tokens", "5"), "without --depth there is no --tokens"),
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-p", "many"), "--n-prompt: expected a number or a range such as 1-8+1 or 1-8*2, found 'many'"),
        (("-p", "1,,2"), "--n-prompt: expected a number or a range"),
        (("-d", "8-4"), "--n-depth: '8-4' is a range that leads nowhere"),
        (("-d", "1-8*1"), "leads nowhere"),
        (("-d", "0-8*2"), "leads nowhere"),
        (("-d", "1-8+0"), "leads nowhere"),
        (("-d", "1-100000"), "--n-depth: expected 1000 numbers at most, found 1001"),
        (("-n", str(2**31)), "--n-gen: expected numbers from 0 to 2147483647, found 2147483648"),
        (("-b", "0"), "--batch-size: expected numbers from 1"),
        (("-t", "0"), "--threads: expected numbers from 1"),
        (("-pg", "512"), "-pg: expected two numbers such as 512,128, found '512'"),
        (("-pg", "0,0"), "-pg: expected two numbers"),
        (("-r", "0"), "Invalid value for '--repetitions'"),
        (("-o", "xml"), "--output: expected md, json, csv, jsonl, found 'xml'"),
        (("-o", "csv", "--json"), "--output: expected json, as --json says, found 'csv'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(model: Path, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in refused("bench", model, *arguments, code=2)


def test_what_cannot_be_read_or_written_is_said_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "taken: File exists" in refused(*DEPTH, model, "--plot", tmp_path / "taken")
    assert refused(*DEPTH, model, "-f", tmp_path / "no.txt").endswith("no.txt: No such file or directory")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: text: is empty" in refused(*DEPTH, model, "-f", tmp_path / "empty.txt")
    assert "no.gguf" in refused(*DEPTH, tmp_path / "no.gguf", "--plot", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_matplotlib_there_are_no_plots_but_tables(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(*DEPTH, model, "--plot", tmp_path / "new").startswith("plots need matplotlib: pip install")
    assert not (tmp_path / "new").exists()
    assert "Gemma" in done(*DEPTH, model, "--tokens", "20")


FAST = ("bench", "-t", "1", "-r", "2", "-p", "16", "-n", "4")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that llama.cpp runs."""
    return foreign(tmp_path_factory.mktemp("other") / "other.gguf", "gemma", half=True)


def test_speeds_are_a_table_as_llama_benchs(model: Path, other: Path) -> None:
    result = griffin(*FAST, model, other, "-d", "0,20", "-pg", "8,2")
    assert result.exit_code == 0, result.stderr
    head, rule, *rows, empty, build = result.stdout.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "model", "size", "params", "backend", "threads", "test", "t/s",
    ]  # fmt: skip
    assert set(rule) <= set("|-: ")
    names = [line.split("|")[6].strip() for line in rows]
    assert names == 2 * ["pp16", "tg4", "pp8+tg2", "pp16 @ d20", "tg4 @ d20", "pp8+tg2 @ d20"]
    models = [line.split("|")[1].strip() for line in rows]
    assert models == 6 * ["recurrentgemma 8.2M Q8_0"] + 6 * ["gemma ?B F16"]
    for line in rows:
        mean, sd = (float(part) for part in line.split("|")[7].split("±"))
        assert mean > 0
        assert sd >= 0
    assert empty == ""
    assert build.startswith("build: griffin ")
    assert f"{model.name}, pp16, tg4, pp8+tg2: 100 % (60 of 60 tokens)" in result.stderr
    assert f"{other.name}, pp16 @ d20, tg4 @ d20, pp8+tg2 @ d20: 100 % (80 of 80 tokens)" in result.stderr


def test_options_are_lists_that_may_be_repeated(model: Path) -> None:
    page = done("bench", model, "-t", "1", "-r", "1", "-p", "2,4", "-p", "8-16*2", "-n", "1-3+2", "-b", "4", "-b", "8",
                "-o", "json")  # fmt: skip
    found = json.loads(page)
    assert [(row["n_batch"], row["n_prompt"], row["n_gen"]) for row in found] == [
        (batch, prompt, gen) for batch in (4, 8) for prompt, gen in ((2, 0), (4, 0), (8, 0), (16, 0), (0, 1), (0, 3))
    ]
    assert all(len(row["samples_ts"]) == 1 for row in found)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int | None, int]]:
    """What would be measured: names of tests, threads, repetitions. Each takes a second."""
    found: list[tuple[list[str], int | None, int]] = []

    def measure(path: Path, tests: Any, *, threads: int | None, repetitions: int, progress: Any) -> speed.Measured:
        assert {test.batch for test in tests} == {2048}
        found.append(([test.name for test in tests], threads, repetitions))
        samples = [speed.Samples(test.tokens, (10**9,) * repetitions) for test in tests]
        return speed.Measured("ggml", "griffin", 1, 1, threads or 7, 512, None, samples)

    monkeypatch.setattr(speed, "measure", measure)
    return found


def test_every_number_of_threads_has_its_rows(model: Path, asked: list[tuple[list[str], int | None, int]]) -> None:
    rows = json.loads(done("bench", model, "-t", "1-4*2", "-p", "2", "-n", "0", "-r", "1", "--json"))
    assert [row["n_threads"] for row in rows] == [1, 2, 4]
    assert asked == [(["pp2"], threads, 1) for threads in (1, 2, 4)]


def test_without_options_it_is_llama_benchs_default(
    model: Path, asked: list[tuple[list[str], int | None, int]]
) -> None:
    lines = done("bench", model).splitlines()
    assert asked == [(["pp512", "tg128"], None, 5)]
    assert [line.split("|")[7].strip() for line in lines[2:4]] == ["512.00 ± 0.00", "128.00 ± 0.00"]


def test_formats_say_the_same_things(model: Path) -> None:
    rows = json.loads(done(*FAST, model, "-o", "json"))
    lines = [json.loads(line) for line in done(*FAST, model, "-o", "jsonl").splitlines()]
    names, *cells = csv.reader(io.StringIO(done(*FAST, model, "-o", "csv")))
    fixed = ("model_filename", "model_type", "n_prompt", "n_gen", "n_threads", "model_n_params")
    for name in fixed:
        values = [row[name] for row in rows]
        assert [line[name] for line in lines] == values
        assert [line[names.index(name)] for line in cells] == [str(value) for value in values]
    for row in rows:
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["avg_ts"] == pytest.approx(sum(tokens * 1e9 / ns for ns in row["samples_ns"]) / 2)
    assert rows[0]["model_filename"] == str(model)


def test_nothing_is_measured_where_a_model_cannot_be_opened(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:5000])
    assert "cut.gguf: " in refused(*FAST, model, tmp_path / "cut.gguf")
    assert "no.gguf: file: cannot be read" in refused(*FAST, model, tmp_path / "no.gguf")


def test_a_file_that_llama_cpp_dies_of_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # of which nothing is told then
    hostile = foreign(tmp_path / "hostile.gguf", block_count=600)
    assert "hostile.gguf: measuring it ended with status -6" in refused(*FAST, hostile)


def test_a_busy_machine_is_told_with_speeds_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0.0, 0.0))
    assert "a load of 999.0 on " in griffin(*FAST, model).stderr
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "a load of" not in griffin(*FAST, model).stderr


def test_what_the_loader_has_to_say_is_passed_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuning.json").write_text("no JSON")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    assert "stored choices are ignored" in griffin(*FAST, model).stderr
