"""Renders one chat template; a program of its own, which `griffin_gguf.runtime.chat` starts by this file's path.

A template is a program that came with a model file. Jinja's sandbox keeps it from Python's objects but not
from looping for ever or filling the memory: `{{ 'x' * 10**10 }}` is a single C call that no check inside the
process can interrupt, and Jinja runs it while still compiling. A process has limits that hold.

Reads one JSON object from stdin: `template` and `variables`. Writes one to stdout: `text`, or `raised` (the
template's own `raise_exception`: the messages are at fault), or `problem` (the template is). Ends by a signal
where the time is over. Imports nothing but jinja2 and the standard library, to start in a few hundredths of a
second.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

# pyright: reportUnknownMemberType=false
# (the tables of Jinja's environment are not fully typed)

CPU_SECONDS = 1.0
MEMORY = 512 << 20  # bytes of address space, before the request's own share
OUTPUT = 4 << 20  # characters, before the request's own share


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


def main() -> None:
    """One request, one answer."""
    request = sys.stdin.buffer.read()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS knows no such limit; there the time bounds the memory
        memory = MEMORY + 32 * len(request)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    content = json.loads(request)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, inside C calls too
    reply = answer(content["template"], content["variables"], OUTPUT + len(request))
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
