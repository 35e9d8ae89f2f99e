"""Work in fresh processes. What is called there must be importable there: functions of this module are not."""

import os
import subprocess
from pathlib import Path
from typing import Any

import fresh
import pytest

from griffin_gguf.quant import process
from griffin_gguf.quant.process import in_fresh_process
from griffin_gguf.runtime.errors import BackendError, GriffinError


def test_arguments_progress_and_result() -> None:
    heard: list[tuple[int, int]] = []
    found = in_fresh_process(
        fresh.add, fresh.Sum, "it", {"a": 2, "b": 3.5, "words": "ünï"}, lambda *at: heard.append(at)
    )
    assert found == fresh.Sum(5.5, "ünï", found.process)
    assert found.process != os.getpid()
    assert heard == [(1, 2), (2, 2)]


def test_what_native_code_prints_is_no_answer() -> None:
    found = in_fresh_process(fresh.shouting, fresh.Sum, "it", {})
    assert found.words == "quiet"


def test_our_errors_come_back_with_their_message() -> None:
    with pytest.raises(GriffinError, match=r"^some\.gguf: field: is wrong$"):
        in_fresh_process(fresh.failing, fresh.Sum, "it", {})


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("abort", r"it: measuring it ended with status -6: ggml_abort: no such luck"),
        ("exit", r"it: measuring it ended with status 3: no message"),
        ("bug", r"it: measuring it ended with status 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_process_that_dies_is_an_error_that_names_the_file(how: str, told: str) -> None:
    with pytest.raises(BackendError, match=told):
        in_fresh_process(fresh.dying, fresh.Sum, "it", {"how": how})


def test_ctrl_c_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> "subprocess.Popen[str]":
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(process.subprocess, "Popen", popen)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_fresh_process(fresh.sleeping, fresh.Sum, "it", {}, interrupt)
    (child,) = started
    assert child.wait(timeout=10) != 0


def test_its_memory_is_its_own() -> None:
    """A child's ru_maxrss starts at its parent's, on Linux; ours must not, and no module of ours may come along."""
    ballast = bytearray(os.urandom(1 << 20)) * 300
    found = in_fresh_process(fresh.holding, fresh.Held, "it", {"mebibytes": 64})
    assert found.peak < len(ballast)
    assert found.anonymous - found.before >= 60 << 20
    assert found.after >= found.anonymous - (1 << 20)  # the most that was seen stays, though it was given back
    assert 1 << 20 < found.mapped < len(ballast)


def test_pages_of_a_mapped_file_are_mapped_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 64)
    found = in_fresh_process(fresh.mapping, fresh.Held, "it", {"path": str(path)})
    assert found.mapped - found.before >= 60 << 20
    assert found.anonymous < 64 << 20
