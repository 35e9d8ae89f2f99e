"""`griffin quantize`: a GGUF to a smaller one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import note, out, print_json, size, table
from griffin_gguf.cli.options import TYPES, Json, Threads, add_command, parse_type
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.quantizer import FilePlan


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "quantize",
        quantize,
        "griffin quantize model-BF16.gguf model-Q4_K_M.gguf Q4_K_M",
        "griffin quantize model-BF16.gguf model-Q2_K.gguf Q2_K --dry-run",
    )


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A GGUF in F32, F16 or BF16.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF to write.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="TYPE", help=f"One of {', '.join(TYPES)}.", show_default=False)],
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; print each tensor's type and the file's exact size.")
    ] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a quantized IN too, which loses quality twice.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Rewrite a GGUF in another type.

    Each tensor's type follows the type's recipe (docs/gguf-format.md). A tensor whose rows do not fit is named.
    """
    from griffin_gguf.quant import quantizer

    kind = parse_type(name)
    if dry:
        plan = quantizer.dry_run(source, kind, allow_requantize=allow_requantize)
    else:
        with progress("Quantizing") as report:
            plan = quantizer.quantize(
                source, target, kind, threads=threads, progress=report, allow_requantize=allow_requantize
            )
    for line in plan.notes:
        note(line)
    if as_json:
        print_json(_document(target, kind.name, plan, written=not dry))
    elif dry:
        _show(target, plan)
    else:
        out().print(f"{target}  {_summary(plan)}", markup=False, soft_wrap=True)


def _summary(plan: "FilePlan") -> str:
    return f"{size(plan.size)}, {plan.bits_per_weight:.2f} bits per weight"


def _show(target: Path, plan: "FilePlan") -> None:
    """Print the table of a dry run."""
    rows = table("tensor", "shape", "from", "to", "size", right=("shape", "size"))
    for row in plan.tensors:
        shape = " × ".join(map(str, row.tensor.shape))
        source = plan.source_types[row.tensor.name].name
        rows.add_row(row.tensor.name, shape, source, row.type.name, size(row.nbytes))
    console = out()
    console.print(rows)
    console.print(f"{target} would have {plan.size} bytes: {_summary(plan)}", markup=False, soft_wrap=True)


def _document(target: Path, name: str, plan: "FilePlan", *, written: bool) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "path": str(target),
        "written": written,
        "type": name,
        "size": plan.size,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "notes": plan.notes,
        "tensors": [
            {
                "name": row.tensor.name,
                "shape": row.tensor.shape,
                "source_type": plan.source_types[row.tensor.name].name,
                "type": row.type.name,
                "nbytes": row.nbytes,
            }
            for row in plan.tensors
        ],
    }
