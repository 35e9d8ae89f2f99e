"""Renders chat templates; a program of its own, which `chat_renderer.py` starts by this file's path.

A template is a program that came with a model file. Jinja's sandbox keeps it from Python's objects but not
from looping for ever or filling the memory: `{{ 'x' * 10**10 }}` is a single C call that no check inside the
process can interrupt, and Jinja runs it while still compiling. A process has limits that hold. To start Python for
each rendering takes 150 ms; so this program starts once and forks a child, which takes one, for each.

Standard input is a Unix socket. A line break is sent when all is ready. From then on each byte that comes brings a
connection: one end of another socket. On that the child reads one JSON object up to the end: `template` and
`variables`. It answers with one JSON object and a zero byte: `text`, or `raised` (the template's own
`raise_exception`: the messages are at fault), or `problem` (the template is). Where the child did not live to do so, a
line break and a `problem` from here follow whatever it wrote. The program ends, and its children with it, when
standard input does.

Imports nothing but jinja2 and the standard library, and renders nothing itself: no child finds a trace of another.
"""

import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

# pyright: reportUnknownMemberType=false
# (the tables of Jinja's environment are not fully typed)

CPU_SECONDS = 1.0
WALL_SECONDS = 30.0  # for a machine that stands still
MEMORY = 512 << 20  # bytes of address space, before the request's own share
OUTPUT = 4 << 20  # characters, before the request's own share

END = b"\0"  # ends an answer

_SIGNALS: dict[int, str] = {
    signal.SIGPROF: "the template did not end within a second of processor time",
    signal.SIGALRM: f"the template did not end within {WALL_SECONDS:g} s",
}


class RefusalError(Exception):
    """The template called `raise_exception`."""


def raise_exception(message: object) -> NoReturn:
    """For templates: refuse the messages."""
    raise RefusalError(str(message))


def strftime_now(form: str) -> str:
    """For templates: the local time."""
    return datetime.now().strftime(form)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """For templates: JSON without Jinja's escaping of HTML, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def render(template: str, variables: dict[str, Any], limit: int) -> str:
    """The text of `template`, at most `limit` characters; helpers and whitespace rules as in transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    parts: list[str] = []
    for part in environment.from_string(template).generate(variables):
        limit -= len(part)
        if limit < 0:
            raise OverflowError("the text does not end")
        parts.append(part)
    return "".join(parts)


def answer(template: str, variables: dict[str, Any], limit: int) -> dict[str, str]:
    """`render`, with whatever a template can do wrong told in the answer."""
    try:
        return {"text": render(template, variables, limit)}
    except RefusalError as error:
        return {"raised": str(error)[:1000]}
    except MemoryError:
        return {"problem": "needs too much memory"}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:1000]}


def confine(size: int) -> None:
    """Limit this process, for a request of `size` bytes. The clocks end it by a signal, inside C calls too."""
    if sys.platform == "linux":  # macOS knows no such limit; there the time bounds the memory
        memory = MEMORY + 32 * size
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)


def serve(connection: socket.socket) -> None:
    """One request, one answer."""
    with connection.makefile("rb") as stream:
        request = stream.read()
    confine(len(request))
    content = json.loads(request)
    reply = answer(content["template"], content["variables"], OUTPUT + len(request))
    signal.setitimer(signal.ITIMER_PROF, 0)
    connection.sendall(json.dumps(reply).encode() + END)


def start(connection: socket.socket, inherited: list[socket.socket]) -> int:
    """The process id of a child that serves `connection`; it has no use for what it inherited."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for other in inherited:
            other.close()
        serve(connection)
        status = 0
    finally:
        os._exit(status)


def reap(children: dict[int, socket.socket]) -> None:
    """Close the connections of children that have ended, and tell for them what they could not."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        with children.pop(child) as connection:
            code = os.waitstatus_to_exitcode(status)
            if code:
                tell(connection, _SIGNALS.get(-code, f"rendering ended with status {code}"))


def tell(connection: socket.socket, problem: str) -> None:
    """An answer that the child did not give; whoever asked may be gone."""
    with suppress(OSError):
        connection.sendall(b"\n" + json.dumps({"problem": problem}).encode() + END)


def heard(signum: int, frame: FrameType | None) -> None:
    """Nothing to do but not to ignore it."""


def main() -> None:
    """Serve until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what the program blocked or ignored must end a child all the same
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    control = socket.socket(fileno=sys.stdin.fileno())
    bell, ringer = socket.socketpair()  # rung when a child ends
    for end in (bell, ringer):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, heard)  # a signal without a handler rings nothing
    signal.set_wakeup_fd(ringer.fileno())
    render("{% for i in [] %}{{ i }}{% endfor %}", {}, 0)  # what Jinja loads late is loaded then
    gc.freeze()
    control.sendall(b"\n")
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, bell], [], [])
        if bell in ready:
            bell.recv(4096)
            reap(children)
        if control in ready:
            asked, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not asked:
                os.killpg(0, signal.SIGKILL)  # the children, and this process
            connection = socket.socket(fileno=descriptors[0])
            try:
                children[start(connection, [control, bell, ringer, *children.values()])] = connection
            except OSError as error:  # no more processes, for now
                with connection:
                    tell(connection, f"rendering did not begin: {error}")


if __name__ == "__main__":
    main()
