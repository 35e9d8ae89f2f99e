"""`griffin devices`: what ggml can run on here."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.console import clean, out, print_json, size, table
from griffin_gguf.cli.options import Json, add_command

if TYPE_CHECKING:
    from griffin_gguf.runtime.ggml.catalog import DeviceInfo


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "devices", devices, "griffin devices", "griffin devices --rpc 192.168.1.20:50052 --json")


def devices(
    rpc: Annotated[
        list[str] | None,
        typer.Option("--rpc", metavar="HOST:PORT", help="Also those of this griffin rpc-server; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the devices that models can run on, and what each can take.

    A device that maps files runs a model where it lies on the disk; any other one gets a copy. What it repacks, it can
    hold in an order that its kernels may like better.
    """
    from griffin_gguf.runtime.ggml.catalog import catalog
    from griffin_gguf.runtime.ggml.rpc import connect

    for endpoint in rpc or ():
        connect(endpoint)
    found = catalog()
    if as_json:
        print_json([asdict(device) for device in found])
        return
    rows = table("device", "kind", "memory", "free", "maps files", "multiplies", "repacks", right=("memory", "free"))
    for name in ("multiplies", "repacks"):
        next(column for column in rows.columns if column.header == name).no_wrap = False
    for device in found:
        rows.add_row(
            clean(device.name),
            device.kind,
            size(device.memory_total) if device.memory_total else "unknown",
            size(device.memory_free) if device.memory_total else "unknown",
            "yes" if device.maps_files else "no",
            _multiplied(device),
            " ".join(device.repacked) or "nothing",
        )
    out().print(rows)
    for device in found:
        out().print(f"{clean(device.name)}: {clean(device.description)}", markup=False)


def _multiplied(device: "DeviceInfo") -> str:
    """The types it multiplies with, in few words."""
    from griffin_gguf.runtime.gguf_file import MATRIX_TYPES

    missing = sorted(t.name for t in MATRIX_TYPES if t.name not in device.types)
    if not missing:
        return "every type"
    return f"all but {' '.join(missing)}" if len(missing) < len(device.types) else " ".join(device.types) or "nothing"
