"""Calls that may reach another machine: made so that a lost connection becomes an error, not the process's end.

ggml's RPC client ends the process (`ggml_abort`) as soon as a server cannot be reached any more, on a thread of
its own. Here its abort callback never returns for such a message: that thread stays where it is, and so would every
caller that waits for it. So all calls to such devices run on one worker thread, and callers wait for it in Python,
where the callback can wake them. What is stuck stays stuck until the process ends; no such device can be used in it
again. Any other abort, a failed assertion, ends the process as ggml means it to.
"""

import contextlib
import ctypes
import functools
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi


class _Call:
    """A function with its arguments, and what came of it once `done` can be taken."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()

    def finish(self) -> None:
        """Wake the caller; more than one may want to."""
        with contextlib.suppress(RuntimeError):
            self.done.release()


_calls: "queue.SimpleQueue[_Call]" = queue.SimpleQueue()  # its put() may be called within itself, by a destructor
_waiting: set[_Call] = set()
_lost: list[str] = []


def _work() -> None:
    while True:
        call = _calls.get()
        try:
            call.result = call.function(*call.arguments)
        except BaseException as error:
            call.error = error
        call.finish()


@abi.ABORT_CALLBACK
def _aborted(message: bytes) -> None:
    text = message.decode(errors="replace")
    if "ggml-rpc" not in text:
        os.write(2, message + b"\n")  # ggml's own words, in its own way
        return
    _lost.append(text.partition(": ")[2].strip())
    for call in list(_waiting):
        call.finish()
    threading.Event().wait()


@functools.cache
def _worker() -> threading.Thread:
    """The worker, started once a process; a daemon, since it may never come back."""
    abi.load().ggml_set_abort_callback(ctypes.cast(_aborted, ctypes.c_void_p).value)
    thread = threading.Thread(target=_work, name="ggml-remote", daemon=True)
    thread.start()
    return thread


def is_over() -> bool:
    """Whether nothing remote can be called any more: a server went away, or the interpreter ends, threads with it."""
    return bool(_lost) or sys.is_finalizing()


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, a function of ggml; raises `BackendError` when a server goes away, and ever after."""
    if sys.is_finalizing():
        raise BackendError("rpc: the interpreter is ending")
    if threading.current_thread() is _worker():  # a function that calls others, or the garbage collector's destructors
        return function(*arguments)
    made = _Call(function, arguments)
    _waiting.add(made)
    try:
        if not _lost:
            _calls.put(made)
            made.done.acquire()
    finally:
        _waiting.discard(made)
    if _lost:
        raise BackendError(
            f"rpc: the connection to a server is lost ({_lost[0]}); its devices are gone for this process, start anew"
        )
    if made.error:
        raise made.error
    return made.result


#: Functions that may give memory of a server back.
_RELEASING = ("ggml_backend_buffer_free", "ggml_gallocr_free", "ggml_gallocr_alloc_graph", "ggml_backend_sched_free")


class Releases:
    """How often memory of a server may have been given back; to be read in a function that `call` runs."""

    count = 0


def _releasing(function: Callable[..., Any], *arguments: Any) -> Any:
    Releases.count += 1
    return function(*arguments)


class RemoteLibrary(abi.Library):
    """ggml's functions, each through `call`."""

    def __init__(self, lib: abi.Library) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = functools.partial(call, *[_releasing] * (name in _RELEASING), getattr(self._lib, name))
        setattr(self, name, function)  # found at once from now on
        return function
