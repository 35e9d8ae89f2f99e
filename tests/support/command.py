"""Running `griffin`: in this process, or in one of its own where signals and pipes matter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Timer

from typer.testing import CliRunner, Result

from griffin_gguf.cli.main import app

#: Wide enough that no table or help page breaks a line.
_WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
_PATIENCE = 300.0  # seconds


def griffin(*arguments: str | Path, stdin: str | bytes = "") -> Result:
    """Run the command here; `stdout`, `stderr` and `exit_code` are in the result."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env=_WIDE, prog_name="griffin")


def done(*arguments: str | Path, stdin: str | bytes = "") -> str:
    """Run the command, which must succeed; what it printed to stdout."""
    result = griffin(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: str | Path, code: int = 1, stdin: str | bytes = "") -> str:
    """Run the command, which must fail with that code, silent but for one line; that line."""
    result = griffin(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("griffin: error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("griffin: error: ").rstrip("\n")


def start(*arguments: str | Path, terminal: int | None = None) -> "AbstractContextManager[subprocess.Popen[str]]":
    """Start the command in a process of its own, with text pipes or on a terminal."""
    return _start("-m", "griffin_gguf.cli", *map(str, arguments), terminal=terminal)


def start_python(code: str) -> "AbstractContextManager[subprocess.Popen[str]]":
    """Start a program of a few lines, likewise."""
    return _start("-c", code)


@contextmanager
def _start(*arguments: str, terminal: int | None = None) -> "Iterator[subprocess.Popen[str]]":
    ends = subprocess.PIPE if terminal is None else terminal
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, text=True, env=os.environ | _WIDE, stdin=ends, stdout=ends, stderr=ends) as process:
        deadline = Timer(_PATIENCE, process.kill)  # a program that hangs must not hang its test
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
