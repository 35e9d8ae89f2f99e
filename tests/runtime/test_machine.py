import platform
import subprocess
import sys
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


#: Blocks of 4 MiB freed behind one that stays, once a larger one has come and gone: the share of them that is kept.
HOLES = """
import numpy as np, psutil, sys
from griffin_gguf.runtime.machine import give_back_large_blocks

if sys.argv[1] == "told":
    assert give_back_large_blocks()
process = psutil.Process()
np.ones(30 << 20, np.uint8)
before = process.memory_info().rss
blocks = [np.ones(4 << 20, np.uint8) for _ in range(64)]
taken = process.memory_info().rss - before
del blocks[:-1]
print((process.memory_info().rss - before) / taken)
"""


def test_large_blocks_go_back_to_the_system() -> None:
    if platform.libc_ver()[0] != "glibc":  # another one has another way
        assert not machine.give_back_large_blocks()
        return
    kept = {
        how: float(subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, check=True).stdout)
        for how in ("told", "untold")
    }
    assert kept["told"] < 0.1
    assert kept["untold"] > 0.5  # else there is nothing to be told
