"""The command on a terminal of its own: what a person types, and what is shown."""

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

_PATIENCE = 300.0  # seconds
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_=>78])")

# A terminal with colours and a cursor that moves; that does not answer when it is asked where the cursor is.
_ENVIRONMENT = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PROMPT_TOOLKIT_NO_CPR": "1"}


class Terminal:
    """`type` sends keys; `wait_for` gives all that was shown since the last call, up to and with a text."""

    def __init__(self, process: "subprocess.Popen[bytes]", keyboard: int) -> None:
        self.process, self._keyboard = process, keyboard
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait_for(self, text: str) -> str:
        while text not in self._shown:
            piece = os.read(self._keyboard, 1 << 16)
            assert piece, self._shown
            self._shown += _ESCAPES.sub("", piece.decode("utf-8", "replace")).replace("\r", "")
        end = self._shown.index(text) + len(text)
        found, self._shown = self._shown[:end], self._shown[end:]
        return found

    def end(self) -> int:
        """Wait until the program has ended, whatever it still says; its exit code."""
        while self.process.poll() is None:
            if select.select([self._keyboard], [], [], 0.05)[0]:
                try:
                    os.read(self._keyboard, 1 << 16)
                except OSError:  # how Linux says that nobody holds the other end any more
                    break
        return self.process.wait()


def _control() -> None:
    """Let stdin be this process's own terminal, from which Ctrl-C comes as a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def on_terminal(*arguments: str | Path, **environment: str) -> Iterator[Terminal]:
    """Start `griffin` on a terminal."""
    keyboard, inner = pty.openpty()
    command = [sys.executable, "-m", "griffin_gguf.cli", *map(str, arguments)]
    environ = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | _ENVIRONMENT | environment
    with subprocess.Popen(
        command,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environ,
        start_new_session=True,
        preexec_fn=_control,
    ) as process:
        os.close(inner)
        deadline = Timer(_PATIENCE, process.kill)  # a program that hangs must not hang its test
        deadline.start()
        try:
            yield Terminal(process, keyboard)
        finally:
            deadline.cancel()
            process.kill()
            os.close(keyboard)
