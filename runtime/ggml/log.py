"""What ggml has to say: kept for our errors instead of printed between the lines of the command."""

import atexit
import ctypes
import functools
from collections import deque

from griffin_gguf.runtime.ggml import abi

_errors: deque[str] = deque(maxlen=1)


@abi.LOG_CALLBACK
def _keep(level: int, text: bytes, _: int) -> None:
    if level == abi.LOG_LEVEL_ERROR:
        _errors.append(text.decode(errors="replace").strip())


def capture(lib: abi.Library) -> None:
    """Send ggml's messages here, whoever has them now, until the interpreter ends: no Python may be called then."""
    lib.ggml_log_set(ctypes.cast(_keep, ctypes.c_void_p).value, None)
    _give_up_at_exit(lib)


@functools.cache
def _give_up_at_exit(lib: abi.Library) -> None:
    atexit.register(lib.ggml_log_set, None, None)


def last_error() -> str:
    """The latest error in brackets, to end a message of ours with, or nothing; it is told once."""
    return f" ({_errors.pop()})" if _errors else ""
