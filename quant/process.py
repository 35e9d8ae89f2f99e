"""Work in a process of its own, with progress.

A peak of memory is a process's, so what is measured runs in a fresh one; and a crash in native code then costs one
measurement and not all of them. It is started by `subprocess` and not `multiprocessing`, whose spawned children
import the program that started them, command line and all, and would count its memory as the model's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from tempfile import TemporaryFile
from typing import Any, TypeVar

import msgspec

from griffin_gguf.runtime.errors import BackendError, GriffinError

#: (done, total)
Progress = Callable[[int, int], None]
Result = TypeVar("Result")


def in_fresh_process(
    work: Callable[..., Result],
    kind: type[Result],
    subject: str,
    arguments: Mapping[str, Any],
    progress: Progress | None = None,
) -> Result:
    """Call `work(**arguments, progress=...)` in a fresh process; what it returns, a dataclass of type `kind`.

    `work` is a function of a module of this package; the arguments are values that JSON has. What it raises of
    `GriffinError` is raised here as one with the same message; `BackendError` names `subject` where the process ends
    otherwise.
    """
    request = {"module": work.__module__, "name": work.__qualname__, "arguments": dict(arguments)}
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            env=os.environ | _environment(),
        ) as child,
    ):
        try:
            answer = _converse(child, request, progress)
        except BaseException:
            child.kill()
            raise
        if answer is None:
            status = child.wait()
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["no message"])[-1]
            raise BackendError(f"{subject}: measuring it ended with status {status}: {last}")
        return msgspec.convert(answer, kind)


def _environment() -> dict[str, str]:
    """What can be imported here can be there; and a failed assertion of ggml ends with that, not with a backtrace."""
    return {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "GGML_NO_BACKTRACE": "1"}


def serve() -> None:
    """Be the fresh process: a request on stdin, lines of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints must not mix with the answers

    def answer(kind: str, value: Any) -> None:
        answers.write(json.dumps([kind, value]) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.buffer.read())
    work = getattr(import_module(request["module"]), request["name"])
    try:
        result = work(**request["arguments"], progress=lambda done, total: answer("progress", [done, total]))
    except GriffinError as error:
        answer("error", str(error))
    else:
        answer("result", msgspec.to_builtins(result))


def _converse(child: "subprocess.Popen[str]", request: dict[str, Any], progress: Progress | None) -> Any:
    """Ask, and hear the answers; None where the process ended without one."""
    assert child.stdin
    assert child.stdout
    with suppress(BrokenPipeError), child.stdin:  # it may end before it has heard everything
        child.stdin.write(json.dumps(request))
    for line in child.stdout:
        kind, value = json.loads(line)
        if kind == "result":
            return value
        if kind == "error":
            raise GriffinError(value)
        if progress:
            progress(*value)
    return None
