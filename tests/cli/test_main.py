import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from command import done, griffin, refused, start, start_python
from typer.testing import CliRunner

from griffin_gguf.cli import __version__
from griffin_gguf.cli.main import Griffin, app

COMMANDS = (
    "convert", "imatrix", "quantize", "verify", "inspect", "generate", "chat", "read", "states", "serve", "bench",
    "report", "compare", "eval", "recall", "estimate", "export-ollama", "llamacpp", "demo", "devices", "rpc-server",
)  # fmt: skip


def test_help_lists_every_command() -> None:
    page = done("--help")
    assert all(f" {name} " in page for name in COMMANDS)
    names = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_page_that_fits_the_terminal(name: str, width: str) -> None:
    result = CliRunner().invoke(app, [name, "-h"], env={"COLUMNS": width, "TERM": "dumb"}, prog_name="griffin")
    assert result.exit_code == 0
    assert f"Usage: griffin {name} " in result.stdout
    assert f"griffin {name} " in result.stdout.partition("Examples")[2]
    assert max(map(len, result.stdout.splitlines())) <= int(width)
    assert "…" not in result.stdout  # nothing was cut off


def test_no_arguments_print_the_help() -> None:
    assert "Usage: griffin" in griffin().output


def test_version() -> None:
    assert done("--version") == f"griffin {__version__}\n"


def test_help_loads_neither_numpy_nor_a_backend() -> None:
    code = (
        "import sys, griffin_gguf.cli.main as m; sys.exit(any(n in sys.modules for n in ('numpy', 'gguf', 'jinja2')))"
    )
    with start_python(code) as process:
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["fly"], "No such command 'fly'"),
        (["--fly"], "No such option: --fly"),
        (["inspect"], "Missing argument 'FILE'"),
        (["quantize", "a.gguf", "b.gguf", "Q9"], "'Q9' is no file type; choose one of F32"),
        (["generate", "a.gguf", "-p", "x", "-n", "0"], "--max-tokens"),
        (["generate", "a.gguf", "-p", "x", "--backend", "cuda"], "'cuda' is no backend"),
        (["generate", "a.gguf", "-p", "x", "-f", "y"], "expected one of the two"),
        (["convert", "somewhere", "-o", "x", "--type", "int3"], "'int3' is no file type"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(arguments: list[str], problem: str) -> None:
    line = refused(*arguments, code=2)
    assert problem in line
    assert "--help)" in line


def test_a_missing_file_is_named_in_one_line(tmp_path: Path) -> None:
    assert refused("inspect", tmp_path / "no.gguf").startswith(f"{tmp_path / 'no.gguf'}: ")


def test_control_characters_in_a_name_are_spelled_out(tmp_path: Path) -> None:
    assert "\\x1b[2J\\n" in refused("inspect", tmp_path / "\x1b[2J\n.gguf")


def test_debug_lets_the_traceback_through(tmp_path: Path) -> None:
    result = griffin("--debug", "inspect", tmp_path / "no.gguf")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "FileFormatError"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (KeyError("x"), "unexpected KeyError: 'x' (griffin --debug ... shows where)"),
    ],
)
def test_every_exception_becomes_one_line(error: Exception, line: str) -> None:
    result = CliRunner().invoke(_failing_with(error), ["fail"])
    assert (result.exit_code, result.stderr) == (1, f"griffin: error: {line}\n")


def test_an_interruption_has_its_exit_code() -> None:
    result = CliRunner().invoke(_failing_with(KeyboardInterrupt()), ["fail"])
    assert (result.exit_code, result.stderr) == (130, "")  # `main` says it


_INTERRUPTED_AGAIN = """
import os, signal, sys
from griffin_gguf.cli import main
def interrupt(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
def also(real):
    return lambda *arguments, **options: (interrupt(), real(*arguments, **options))
{}
sys.argv = ["griffin", "devices"]
main.main()
"""


@pytest.mark.parametrize(
    "moment",
    [
        "main.Griffin.invoke = interrupt",
        "main.Griffin.invoke = interrupt; main.err.print = also(main.err.print)",
        "main.Griffin.invoke = interrupt; main.sys.exit = interrupt",
    ],
)
def test_ctrl_c_held_down_is_one_interruption(moment: str) -> None:
    with start_python(_INTERRUPTED_AGAIN.format(moment)) as process:
        assert process.communicate() == ("", "griffin: interrupted\n")
        assert process.returncode == 130


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_an_empty_one(closed: str, model: Path) -> None:
    command = [sys.executable, "-m", "griffin_gguf.cli", "generate", str(model), "-p", "x", "-n", "4", "-t", "1"]
    words = done(*command[3:], "--temp", "0")
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command, "--temp", "0"]
    result = subprocess.run(shell, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}, check=False)
    assert result.returncode == 0
    assert result.stdout == ("" if ">&- 2" in closed or closed == ">&-" else words)
    assert result.stderr.startswith("" if "2>&-" in closed else "prompt ")
    assert "Error" not in result.stderr


def test_a_chat_needs_no_stdin(model: Path) -> None:
    command = [sys.executable, "-m", "griffin_gguf.cli", "chat", str(model), "-p", "Hi.", "-n", "4", "-t", "1"]
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    result = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (result.returncode, "error" in result.stderr, bool(result.stdout)) == (0, False, True)


def test_what_is_to_be_read_from_a_closed_stdin_is_nothing(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "griffin_gguf.cli", "read", str(model), "-", "--save", "x"]
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    result = subprocess.run(
        shell, capture_output=True, text=True, env=os.environ | {"GRIFFIN_DATA": str(tmp_path)}, check=False
    )
    assert (result.returncode, result.stderr) == (1, "griffin: error: stdin: text: expected some, found none\n")


def _failing_with(error: BaseException) -> typer.Typer:
    failing = typer.Typer(cls=Griffin)
    failing.callback()(lambda: None)

    @failing.command("fail")
    def fail() -> None:
        raise error

    return failing


@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json"), ("generate", "-p", "x", "-t", "1")])
def test_a_closed_pipe_ends_in_silence(arguments: tuple[str, ...], model: Path) -> None:
    with start(arguments[0], model, *arguments[1:]) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.wait() == 1
        assert process.stderr.read() == ""


def test_a_terminal_without_unicode_shows_question_marks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with start("inspect", model) as process:
        assert process.stdout
        page = process.stdout.read()
        assert process.wait() == 0
    assert "2560 ? 256" in page


def test_a_terminated_conversion_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from griffin_gguf.cli import main
from griffin_gguf.quant import writer
real = writer._Sink.write
def write_then_end(*arguments, **options):
    real(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
writer._Sink.write = write_then_end
sys.argv = ["griffin", "convert", {str(checkpoint)!r}, "-o", {str(tmp_path / "m.gguf")!r}]
main.main()
"""
    with start_python(code) as process:
        assert process.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_the_bare_command_shows_its_help_and_no_error() -> None:
    result = griffin()
    assert result.exit_code == 2
    assert "convert" in result.stdout + result.stderr
    assert "error" not in result.stderr
