"""`griffin serve`: models for other programs, by the interfaces that they speak already."""

import logging
import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.console import clean, err
from griffin_gguf.cli.options import (
    Backend,
    DeviceNames,
    LayersOn,
    Threads,
    add_command,
    parse_backend,
    parse_devices,
    parse_size,
)

if TYPE_CHECKING:
    from griffin_gguf.runtime.server.models import Models
    from griffin_gguf.runtime.server.settings import Settings

_KEY = "GRIFFIN_API_KEY"

#: What the `server` extra brings along.
_EXTRA = ("llguidance", "prometheus_client", "starlette", "uvicorn")

_LIMITS, _ACCESS, _MEMORY = "Limits", "Who may ask", "Memory"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "serve",
        serve,
        "griffin serve model.gguf",
        "griffin serve small.gguf large.gguf --slots 16 --keep-alive -1",
        "GRIFFIN_API_KEY=$(cat key.txt) griffin serve model.gguf --host 0.0.0.0 --allow-host griffin.example.org",
    )


def serve(
    paths: Annotated[
        list[Path], typer.Argument(metavar="MODEL", help="GGUF files that griffin wrote.", show_default=False)
    ],
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes one that is free.")
    ] = 11434,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar=_KEY,
            show_envvar=False,
            rich_help_panel=_ACCESS,
            help=f"Ask clients for this key; better given by {_KEY}, since all users of a machine see its commands.",
        ),
    ] = None,
    no_api_key: Annotated[
        bool,
        typer.Option("--no-api-key", rich_help_panel=_ACCESS, help="Let everyone ask who can reach --host."),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            rich_help_panel=_ACCESS,
            help="Another name by which clients call this server. May be repeated.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            rich_help_panel=_ACCESS,
            help="A site whose pages may ask: https://app.example.org, or * for all. May be repeated.",
        ),
    ] = None,
    slots: Annotated[
        int, typer.Option("--slots", metavar="N", min=1, rich_help_panel=_LIMITS, help="Answers of a model at once.")
    ] = 8,
    waiting: Annotated[
        int, typer.Option("--waiting", metavar="N", min=0, rich_help_panel=_LIMITS, help="Requests that may wait.")
    ] = 64,
    max_body: Annotated[
        str, typer.Option("--max-body", metavar="SIZE", rich_help_panel=_LIMITS, help="The largest request.")
    ] = "4MiB",
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            min=0,
            rich_help_panel=_LIMITS,
            help="What running answers have at the end, once SIGTERM or Ctrl-C came.",
        ),
    ] = 30,
    keep_alive: Annotated[
        str,
        typer.Option(
            "--keep-alive",
            metavar="TIME",
            rich_help_panel=_MEMORY,
            help="Unload a model that was not used for so long: 30s, 5m, 1h; -1: never.",
        ),
    ] = "5m",
    cache: Annotated[
        str,
        typer.Option(
            "--cache",
            metavar="SIZE",
            rich_help_panel=_MEMORY,
            help="Memory for states of prompts that may come again, of each model; 0: none.",
        ),
    ] = "256MiB",
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir", metavar="DIR", rich_help_panel=_MEMORY, help="Keep states that leave memory there."
        ),
    ] = None,
    cache_disk: Annotated[
        str | None,
        typer.Option(
            "--cache-disk",
            metavar="SIZE",
            rich_help_panel=_MEMORY,
            help="At most so much of them, of each model; 1GiB unless given.",
        ),
    ] = None,
    threads: Threads = None,
    backend: Backend = "auto",
    device: DeviceNames = None,
    layers_on: LayersOn = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what is asked and answered to the log, for finding mistakes.")
    ] = False,
) -> None:
    """Serve models to other programs, until Ctrl-C.

    It speaks Ollama's API and OpenAI's (under /v1), so that programs written for either can use a Griffin, and has a
    page for people at /chat. Several may ask at once, and what they ask again is not processed again.

    Only this machine is let in. Any other --host needs an API key (or --no-api-key), and the way there encryption of
    its own: docs/server.md.
    """
    if no_api_key and api_key is not None:
        raise typer.BadParameter("--api-key and --no-api-key: expected one of the two")
    if cache_disk is not None and cache_dir is None:
        raise typer.BadParameter("--cache-disk: expected --cache-dir with it")
    os.environ.pop(_KEY, None)  # no process that this one starts needs it
    _check_extra()
    from griffin_gguf.runtime.machine import give_back_large_blocks
    from griffin_gguf.runtime.server.app import create_app
    from griffin_gguf.runtime.server.models import Models
    from griffin_gguf.runtime.server.run import bind, run, url
    from griffin_gguf.runtime.server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        open_to_all=no_api_key,
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
        slots=slots,
        waiting=waiting,
        max_body=_size("--max-body", max_body),
        grace=grace,
        keep_alive=_seconds(keep_alive),
        cache_nbytes=_size("--cache", cache, least=0),
        cache_folder=cache_dir,
        cache_folder_nbytes=_size("--cache-disk", cache_disk or "1GiB"),
        threads=threads,
        backend=parse_backend(backend),
        devices=parse_devices(device, layers_on),
        log_prompts=log_prompts,
    )
    if cache_dir is not None:
        _make_folder(cache_dir)
    with bind(settings) as bound:
        give_back_large_blocks()
        models = Models(paths, settings)
        _log_to_stderr()
        run(create_app(models, settings), bound, lambda: _welcome(models, settings, url(settings, bound)))


def _check_extra() -> None:
    """Say what to install where something of the extra is absent."""
    from griffin_gguf.runtime.errors import UnsupportedError

    if absent := [name for name in _EXTRA if find_spec(name) is None]:
        raise UnsupportedError(f"serve needs {', '.join(absent)}: pip install 'griffin-gguf[server]'")


def _make_folder(folder: Path) -> None:
    """Make the cache's folder, for its owner alone, and see that files can be written there."""
    from griffin_gguf.runtime.errors import GriffinError

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise GriffinError(f"--cache-dir {folder}: cannot be written to: {error.strerror}") from None


def _seconds(text: str) -> float:
    """A time as Ollama writes it, or a number of seconds."""
    from griffin_gguf.runtime.errors import UnsupportedError
    from griffin_gguf.runtime.server.ollama_options import keep_alive

    try:
        found = keep_alive(float(text) if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII) else text)
    except UnsupportedError as error:
        raise typer.BadParameter(f"--keep-alive: {error}") from None
    assert found is not None, "only None gives None"
    return found


def _size(option: str, text: str, least: int = 1) -> int:
    """Bytes; a usage error names the option."""
    if text == "0" and least == 0:
        return 0
    try:
        return parse_size(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{option}: {error}") from None


class _Lines(logging.Handler):
    """The log on stderr, a line each, made safe to show."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        text = f"{self.format(record)}"
        err.print("\n".join(clean(line) for line in text.splitlines()), markup=False, soft_wrap=True)


def _log_to_stderr() -> None:
    """Show what the server logs, and of what it is built on only what is wrong."""
    lines = _Lines()
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for name, level in {
        "griffin.server": logging.INFO,
        "uvicorn.error": logging.ERROR,
        "asyncio": logging.ERROR,
    }.items():
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(lines)
        logger.propagate = False


def _welcome(models: "Models", settings: "Settings", url: str) -> None:
    """Tell where the server is and what it has."""
    key = "asks for its API key" if settings.api_key is not None else "asks for no key"
    lines = [
        f"griffin serves at {url} ({key}; Ctrl-C ends it)",
        *(f"  {entry.name:<32} {entry.path}" for entry in models.entries()),
        f"  chat in the browser: {url}/chat",
        f"  Ollama's programs:   OLLAMA_HOST={url}",
        f"  OpenAI's programs:   OPENAI_BASE_URL={url}/v1",
    ]
    for line in lines:
        err.print(clean(line), markup=False, soft_wrap=True)
