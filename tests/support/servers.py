"""Devices of other processes: griffin's RPC server on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from griffin_gguf.runtime.ggml.rpc import LIBRARY

_ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 60.0


@dataclass
class Server:
    """A server and where it listens."""

    endpoint: str
    process: subprocess.Popen[bytes]


@contextmanager
def rpc_server() -> Iterator[Server]:
    """A server of this machine's CPU, one thread, for as long as the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "griffin_gguf.cli", "rpc-server", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen([*command, "--device", "CPU"], stdout=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield Server(f"127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the server does not listen (exit code {process.poll()})")


def rpc_library(folder: Path) -> Path:
    """The RPC backend that the environment names, else one built into `folder`."""
    if given := os.environ.get(LIBRARY):
        return Path(given)
    environment = {**os.environ, "PYTHON": sys.executable}
    target = folder / "libggml-rpc.so"
    subprocess.run([_ROOT / "scripts" / "build-rpc", target], env=environment, check=True)
    return target
