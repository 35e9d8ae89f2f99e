"""The command's entry, and the one place where errors become a line and an exit code.

0 done; 1 an error, told in one line; 2 a usage error, likewise; 130 and 143 ended by Ctrl-C and by SIGTERM;
1 in silence where the reader of a pipe has gone. A server that was told to end has done what it was asked: 0.
"""

import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from griffin_gguf.cli import __version__
from griffin_gguf.cli.commands import (
    bench,
    chat,
    compare,
    convert,
    demo,
    devices,
    estimate,
    eval,
    export_ollama,
    generate,
    imatrix,
    inspect,
    llamacpp,
    quantize,
    read,
    recall,
    report,
    rpc_server,
    serve,
    states,
    verify,
)
from griffin_gguf.cli.console import complain, err, out

_FAILED, _USAGE, _INTERRUPTED, _TERMINATED = 1, 2, 130, 128 + signal.SIGTERM


class Griffin(TyperGroup):
    """The group of all commands; `--debug` lets tracebacks through."""

    debug = False

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Parse, run, exit."""
        options["standalone_mode"] = False  # errors come here
        try:
            code = super().main(*args, **options)
        except Exception as error:
            if self.debug:
                raise
            code = self._fail(error)
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Typer ends the program in silence where `| head` has closed stdout, so nothing may wait."""
        self.debug = bool(ctx.params.get("debug"))
        result = super().invoke(ctx)
        sys.stdout.flush()
        return result

    def _fail(self, error: Exception) -> int:
        """Say what went wrong; the exit code."""
        if format_message := getattr(error, "format_message", None):  # typer's usage errors; their class is private
            context = getattr(error, "ctx", None)
            if not format_message():  # no command at all: the help page has been shown
                return _USAGE
            complain(f"{format_message()} (see {context.command_path if context else 'griffin'} --help)")
            return _USAGE
        complain(_message(error))
        return _FAILED


def _message(error: Exception) -> str:
    """One line for any exception: ours as they are, the system's with their file, bugs by name."""
    from griffin_gguf.runtime.errors import GriffinError  # here: it brings NumPy along, which --help can do without

    if isinstance(error, GriffinError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"unexpected {type(error).__name__}: {error} (griffin --debug ... shows where)"


app = typer.Typer(
    cls=Griffin,
    name="griffin",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out().print(f"griffin {__version__}")
        raise typer.Exit


@app.callback(epilog="Each command has its own page: [bold]griffin convert --help[/bold]")
def griffin(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """RecurrentGemma (Griffin) in GGUF: convert a checkpoint, quantize it, run it, measure what that costs.

    Convert a checkpoint, then chat with the file. New here? Try [bold]griffin demo[/bold].
    """


for command in (
    convert,
    quantize,
    imatrix,
    inspect,
    verify,
    generate,
    chat,
    read,
    states,
    serve,
    bench,
    report,
    compare,
    eval,
    recall,
    estimate,
    export_ollama,
    llamacpp,
    demo,
    devices,
    rpc_server,
):
    command.register(app)


def main() -> NoReturn:
    """`griffin` on the command line."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # so that `finally` clauses clean up
    try:
        app(prog_name="griffin")
    except SystemExit as end:
        if end.code not in (_INTERRUPTED, _TERMINATED):
            raise
        _leave(end.code)
    except KeyboardInterrupt:  # another one, while the first was being dealt with
        _leave(_INTERRUPTED)
    raise AssertionError("unreachable: the group exits")


def _leave(code: int) -> NoReturn:
    """End by a signal. Files are cleaned up, but a thread may be deep in ggml for seconds: Python would wait for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # held down, Ctrl-C comes again and again
    if code == _INTERRUPTED:
        err.print("griffin: interrupted")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _open_streams() -> None:
    """Put an empty stream where the caller has closed one: to Python it is None, and files opened later take its place.

    In this order, since each takes the lowest number that is free.
    """
    null = Path(os.devnull)
    sys.stdin = sys.stdin or null.open(encoding="utf-8")
    sys.stdout = sys.stdout or null.open("w", encoding="utf-8")
    sys.stderr = sys.stderr or null.open("w", encoding="utf-8")
