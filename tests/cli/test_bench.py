import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command import done, griffin, refused

from griffin_gguf.quant import depth
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
        ((), "expected one of --tune and --depth"),
        (("--tune", "--depth"), "expected one of --tune and --depth"),
        (("--tune", "-t", "1"), "--tune goes with none of --threads, --file and --plot"),
        (("--depth", "--tokens", "0"), "Invalid value for '--tokens'"),
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
