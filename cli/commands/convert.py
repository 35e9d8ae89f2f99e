"""`griffin convert`: a Hugging Face checkpoint to GGUF."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.console import note, out, size
from griffin_gguf.cli.options import (
    TYPES_HELP,
    Imatrix,
    SplitMaxSize,
    Threads,
    add_command,
    load_imatrix,
    parse_size,
    parse_type,
    parse_types,
)
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.imatrix import ImportanceMatrix


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "convert",
        convert,
        "griffin convert ./recurrentgemma-2b-it -o model.gguf --type Q4_K_M",
        "griffin convert google/recurrentgemma-2b-it -o models --type BF16 --type Q8_0 --type Q4_K_M",
        "griffin convert ./recurrentgemma-2b-it --lora ./my-adapter -o mine.gguf --type Q4_K_M",
    )


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint's folder, or its id on a hub.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="The GGUF, or a folder to put it in.")
    ] = Path(),
    types: Annotated[
        list[str], typer.Option("--type", metavar="TYPE", help=f"{TYPES_HELP}. May be given repeatedly.")
    ] = ["BF16"],  # noqa: B006  typer copies it
    loras: Annotated[
        list[Path] | None,
        typer.Option(
            "--lora",
            metavar="ADAPTER",
            help="Merge the LoRA adapter in this folder, as PEFT saves it. Given repeatedly, one after the other.",
            show_default=False,
        ),
    ] = None,
    imatrix: Imatrix = None,
    split_max_size: SplitMaxSize = None,
    allow_unknown: Annotated[
        bool,
        typer.Option("--allow-unknown", help="Go on past fields of JSON files and tensors not known here."),
    ] = False,
    threads: Threads = None,
) -> None:
    """Convert a RecurrentGemma checkpoint to GGUF.

    CKPT holds config.json, safetensors and a tokenizer. Several types are written in one pass over it, into a
    folder, as NAME-TYPE.gguf. A file appears under its name when it is complete. Memory does not grow with the model.
    Adapters are merged in float32 as the weights pass, the checkpoint itself is left as it is.
    """
    targets = plan_targets(checkpoint, output, parse_types(types))
    importance, most = load_imatrix(imatrix), parse_size(split_max_size) if split_max_size else None
    with new_folder(targets[0][0].parent):
        written = run(
            checkpoint,
            targets,
            threads=threads,
            allow_unknown=allow_unknown,
            imatrix=importance,
            max_bytes=most,
            loras=loras or (),
        )
    for path in written:
        out().print(f"{path}  {size(path.stat().st_size)}", markup=False, soft_wrap=True)


def run(
    checkpoint: str | Path,
    targets: Sequence[tuple[Path, str]],
    *,
    threads: int | None,
    allow_unknown: bool = False,
    imatrix: "ImportanceMatrix | None" = None,
    max_bytes: int | None = None,
    loras: Sequence[Path] = (),
) -> list[Path]:
    """Convert, showing how far it is, and say which tensors could not have the type their recipe names.

    Returns the files written.
    """
    from griffin_gguf.convert.pipeline import convert as convert_checkpoint
    from griffin_gguf.quant.recipes import plan
    from griffin_gguf.runtime.gguf_file import GgufFile

    with progress("Converting") as report:
        written = convert_checkpoint(
            checkpoint,
            targets,
            threads=threads,
            progress=report,
            allow_unknown=allow_unknown,
            imatrix=imatrix,
            max_bytes=max_bytes,
            loras=loras,
        )
    with GgufFile.open(written[0]) as file:
        hp = file.hyperparameters()
    for path, name in targets:
        for row in plan(hp, parse_type(name), imatrix=imatrix is not None):
            if row.note:
                note(f"{path.name}: {row.tensor.name}: {row.note}")
    return written


def plan_targets(checkpoint: str, output: Path, types: Sequence[str]) -> list[tuple[Path, str]]:
    """The files to write and their types; several files, or an existing folder as `output`, get their own names."""
    is_file = output.suffix == ".gguf" and not output.is_dir()
    if len(types) == 1 and is_file:
        return [(output, types[0])]
    if is_file or output.is_file():
        what = "several types need a folder" if len(types) > 1 else "expected a folder or a name that ends in .gguf"
        raise typer.BadParameter(f"--output {output}: {what}")
    name = Path(checkpoint).resolve().name or "model"
    return [(output / f"{name}-{kind}.gguf", kind) for kind in types]


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Have `folder` for the block; where the block fails, one that was made here goes again if it is empty."""
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
