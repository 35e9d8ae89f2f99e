from pathlib import Path

import psutil
import pytest

from griffin_gguf.runtime import machine
from griffin_gguf.runtime.machine import usable_memory


@pytest.mark.parametrize(
    ("limits", "least"),
    [([], None), (["max\n"], None), (["1073741824\n"], 1 << 30), (["max\n", "4096\n"], 4096), ([f"{2**63}\n"], None)],
)
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: list[str], least: int | None
) -> None:
    paths = [tmp_path / str(i) for i in range(2)]
    for path, text in zip(paths, limits, strict=False):
        path.write_text(text)
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", tuple(paths))
    assert usable_memory() == (least or psutil.virtual_memory().total)
