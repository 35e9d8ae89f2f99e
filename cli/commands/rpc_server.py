"""`griffin rpc-server`: this machine's device for models that run elsewhere."""

import threading
from typing import Annotated

import typer

from griffin_gguf.cli.console import note
from griffin_gguf.cli.options import Threads, add_command

_LOOPBACK = "127.0.0.1"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "rpc-server",
        rpc_server,
        "griffin rpc-server",
        "griffin rpc-server --host 192.168.1.20 --port 50052 --threads 8",
    )


def rpc_server(
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="ADDRESS",
            help="The address to listen at; others than this machine's own loopback let everyone in who can reach it.",
        ),
    ] = _LOOPBACK,
    port: Annotated[int, typer.Option("--port", metavar="N", min=1, max=65535)] = 50052,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="One that griffin devices lists; the best unless given."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Offer a device of this machine to a griffin that runs elsewhere, until Ctrl-C.

    There, [bold]--device rpc:ADDRESS:PORT[/bold] takes it. One client is served at a time. The protocol is ggml's and
    knows no passwords and no encryption: whoever reaches the port can compute here and may read this process's memory,
    so let nobody reach it but your own machines. docs/distributed.md has the whole way.
    """
    from griffin_gguf.runtime.ggml.catalog import best, find
    from griffin_gguf.runtime.ggml.rpc import serve
    from griffin_gguf.runtime.machine import compute_threads

    handle = find(device) if device else best()
    if host != _LOOPBACK:
        note(f"Everyone who can reach {host}:{port} can compute here and may read this process's memory.")
    failed: list[BaseException] = []

    def run() -> None:
        try:
            serve(f"{host}:{port}", handle, threads or compute_threads())
        except BaseException as error:  # told by the thread that people wait for
            failed.append(error)

    # ggml's loop never comes back to Python, where Ctrl-C is noticed: so it gets a thread, which ends with the process.
    server = threading.Thread(target=run, daemon=True)
    server.start()
    server.join()
    raise failed[0]
