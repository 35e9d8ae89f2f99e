"""Running llama.cpp's programs, and text for them."""

import subprocess
from pathlib import Path

from served_models import CHECKPOINT


def run(program: Path, *arguments: str | Path) -> str:
    """Run a program, which must succeed; all that it says."""
    done = subprocess.run(
        [program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def held_out(folder: Path, size: int) -> Path:
    """The first `size` bytes of text that the demo model has not read."""
    path = folder / "text.txt"
    path.write_bytes((CHECKPOINT / "heldout.txt").read_bytes()[:size])
    return path
