"""Running pip and cmake: what they say, line by line, their reason where they fail, and no process left behind."""

import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from griffin_gguf.runtime.errors import GriffinError

_ERROR = re.compile(r"\b(?:error|undefined reference)\b", re.IGNORECASE)

#: Lines of a tool's last words that are looked through for the reason.
_LAST = 300


def find(name: str) -> str | None:
    """The path of a program: on the PATH, or beside this Python, where pip puts cmake and ninja."""
    return shutil.which(name, path=_path())


def run(command: Sequence[str], read: Callable[[str], object]) -> None:
    """Run a tool to its end, each line of its output to `read`.

    Raises `ToolError` where it fails. Whatever it has started ends with it, and with whoever interrupts this.
    """
    last: deque[str] = deque(maxlen=_LAST)
    with subprocess.Popen(
        command,
        env=os.environ | {"PATH": _path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line)
                read(line)
        except BaseException:
            _end(process.pid)
            raise
    if process.returncode:
        raise ToolError(reason(last))


class ToolError(GriffinError):
    """A tool that failed: its reason."""


def reason(lines: Iterable[str]) -> str:
    """The first line that speaks of an error, with what cmake puts below it; else the last one."""
    said = [line.rstrip() for line in lines if line.strip()] or ["it gave no reason"]
    start = next((i for i, line in enumerate(said) if _ERROR.search(line)), len(said) - 1)
    words = [said[start].strip()]
    if words[0].endswith(":"):
        for line in said[start + 1 :]:
            if not line.startswith(" ") or line.strip().startswith("Call Stack"):
                break
            words.append(line.strip())
    return " ".join(words)


def _end(pid: int) -> None:
    """End a process and all that it has started: cmake's compilers are not its own children alone."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.terminate()


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
