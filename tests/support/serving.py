"""A server as people start it: `griffin serve` in a process of its own, on a free port."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PATIENCE = 60.0  # seconds until it takes requests
_URL = re.compile(r"http://[^\s/]+:\d+")


@dataclass
class Serving:
    """A server that runs: where, and what it has said on stderr so far."""

    url: str
    process: subprocess.Popen[str]
    data: Path  # its GRIFFIN_DATA
    lines: list[str] = field(default_factory=list[str])

    @property
    def said(self) -> str:
        """All of stderr so far."""
        return "".join(self.lines)


@contextmanager
def serving(*paths: Path | str, **options: Any) -> Iterator[str]:
    """The base URL of a server of `paths`, one thread; `slots=2` is `--slots 2`. It ends with the context."""
    with running(*paths, **options) as server:
        yield server.url


@contextmanager
def running(
    *paths: Path | str, environment: dict[str, str] | None = None, data: Path | None = None, **options: Any
) -> Iterator[Serving]:
    """The same as a `Serving`; `environment` comes on top of this process's, `data` is its GRIFFIN_DATA."""
    with tempfile.TemporaryDirectory() as folder:
        place = data or Path(folder)
        command = [sys.executable, "-m", "griffin_gguf.cli", "serve", *map(str, paths), *_options(options)]
        variables = os.environ | {"GRIFFIN_DATA": str(place)} | (environment or {})
        with subprocess.Popen(command, text=True, env=variables, stderr=subprocess.PIPE) as process:
            server = Serving("", process, place)
            reader = threading.Thread(target=_read, args=(server,), daemon=True)
            reader.start()
            try:
                _wait(server)
                yield server
            finally:
                process.kill()
                reader.join()


def _options(options: dict[str, Any]) -> list[str]:
    """Keyword arguments as the command's options: True is a flag, a list is one that is repeated."""
    found: list[str] = []
    for name, value in ({"port": 0, "threads": 1, "host": "127.0.0.1"} | options).items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            found += [flag] if one is True else [flag, str(one)]
    return found


def _read(server: Serving) -> None:
    """Take all that the server says, so that it never waits for a reader."""
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.lines.append(line)
        if not server.url and (found := _URL.search(line)):
            server.url = found[0]


def _wait(server: Serving) -> None:
    """Until it has said where it is, which it does once it takes requests."""
    deadline = time.monotonic() + _PATIENCE
    while not server.url:
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the server does not run (exit code {server.process.poll()}): {server.said}")
        time.sleep(0.02)
