"""What every file that appears whole rests on; tests/quant/test_writer.py has the faults of a long writing."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from griffin_gguf.runtime.atomic import PartialFile, check_targets
from griffin_gguf.runtime.errors import GriffinError


def test_a_system_that_writes_less_than_it_was_given() -> None:
    class Reluctant(io.RawIOBase):
        written = b""

        def write(self, data: Any) -> int:
            self.written += bytes(data[:7])
            return min(7, len(data))

    raw = Reluctant()
    file = PartialFile(Path("a.gguf"), raw)
    file.write(bytes(range(100)))
    file.write(np.arange(6, dtype=np.uint8).reshape(2, 3).data)
    assert raw.written == bytes(range(100)) + bytes(range(6))
    assert file.position == 106


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GriffinError, match="pipe: is no regular file"):
        check_targets([tmp_path / "pipe"])
    with pytest.raises(GriffinError, match="no regular file"):
        check_targets([Path(os.devnull)])
