"""The process that renders chat templates, as this program sees it: started at first use, ended with the program.

`chat_worker.py` says what it does and how it is spoken to. Any thread may ask. A process forked from this one starts
another for itself, and one that was ended from outside is replaced.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

_WORKER = Path(__file__).with_name("chat_worker.py")
_PATIENCE = 40.0  # seconds without any sign of life; a rendering ends long before
_AT_ONCE = 4  # renderings; each may take a core for a second and half a GB
_END = b"\0"  # of an answer


class _NoWorkerError(Exception):
    """There is none that answers; the message says why."""


class _Worker:
    """A running process, and the socket that it takes connections from."""

    def __init__(self, program: Path, patience: float) -> None:
        self.control, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                # -P: the worker's folder is not for importing from.
                [sys.executable, "-P", str(program)],
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is not meant for it
            )
        try:
            self._greet(patience)
        except BaseException:
            self.end()
            raise

    def _greet(self, patience: float) -> None:
        """Wait until it is ready."""
        errors = self._process.stderr
        assert errors
        self.control.settimeout(patience)
        with errors:
            try:
                if self.control.recv(1):
                    return
            except TimeoutError:
                raise _NoWorkerError(f"the renderer did not start within {patience:g} s") from None
            last = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise _NoWorkerError(f"the renderer ended with status {self._process.wait()}: {last}")

    def end(self) -> None:
        """End it and whatever it is rendering."""
        self.control.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def disown(self) -> None:
        """Forget it, in a process forked from the one that started it."""
        self.control.close()
        self._process.returncode = 0  # else `subprocess` would look for it among the children of this process


class Renderer:
    """Renders templates by a worker; `patience` is how long that may stand still, in seconds."""

    def __init__(self, program: Path = _WORKER, patience: float = _PATIENCE) -> None:
        self._program, self._patience = program, patience
        self._reset()

    def _reset(self) -> None:
        self._starting, self._room = Lock(), BoundedSemaphore(_AT_ONCE)
        self._worker: _Worker | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The worker's answer; `problem` also where it did not live to give one."""
        message = json.dumps(request).encode()
        try:
            with self._room:
                # It may have been ended from outside since it was last asked, but hardly twice in a row.
                answer = self._attempt(message) or self._attempt(message)
        except _NoWorkerError as error:
            return {"problem": str(error)}
        if not answer:
            return {"problem": "the renderer was ended"}
        return json.loads(answer.removesuffix(_END).rpartition(b"\n")[2])

    def _attempt(self, message: bytes) -> bytes:
        """What comes back for `message`; nothing from a worker that has ended. One that is of no use is ended."""
        worker = self._running()
        try:
            answer = _exchange(worker.control, message, self._patience)
        except TimeoutError:
            self._end(worker)
            raise _NoWorkerError(f"the renderer did not answer within {self._patience:g} s") from None
        if not answer:
            self._end(worker)
        return answer

    def _running(self) -> _Worker:
        with self._starting:
            self._worker = self._worker or _Worker(self._program, self._patience)
            return self._worker

    def _end(self, worker: _Worker | None) -> None:
        """Unless another thread has."""
        with self._starting:
            if worker and worker is self._worker:
                self._worker = None
                worker.end()

    def close(self) -> None:
        """End the worker; the next request starts another."""
        self._end(self._worker)

    def follow_forks(self) -> None:
        """From now on a process forked from this one has a worker of its own."""
        os.register_at_fork(
            # None is starting then: what it had open would stay open in the other process.
            before=lambda: self._starting.acquire(),
            after_in_parent=lambda: self._starting.release(),
            after_in_child=self._forked,
        )

    def _forked(self) -> None:
        if self._worker:
            self._worker.disown()
        self._reset()


def _exchange(control: socket.socket, message: bytes, patience: float) -> bytes:
    """The answer to `message` over a connection of its own, its end included; nothing from a worker that has ended."""
    here, there = socket.socketpair()
    with here:
        with there:
            try:
                socket.send_fds(control, [b"\n"], [there.fileno()])
            except OSError:
                return b""
        here.settimeout(patience)
        with suppress(BrokenPipeError, ConnectionResetError):  # what comes back will tell why
            here.sendall(message)
            here.shutdown(socket.SHUT_WR)
        parts: list[bytes] = []
        with suppress(ConnectionResetError):
            while part := here.recv(1 << 16):
                parts.append(part)
                if part.endswith(_END):
                    return b"".join(parts)
    return b""


_renderer = Renderer()
_renderer.follow_forks()
atexit.register(_renderer.close)

#: Ask the one worker of this program.
ask = _renderer.ask
