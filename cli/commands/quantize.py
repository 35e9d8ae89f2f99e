"""`griffin quantize`: a GGUF to a smaller one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import note, out, print_json, size, table
from griffin_gguf.cli.mixing import CostsFile, MaxKl, TargetBpw, TargetSize, Text, Tokens, Wish, mixed
from griffin_gguf.cli.options import (
    TYPES_HELP,
    Imatrix,
    Json,
    SplitMaxSize,
    Threads,
    add_command,
    load_imatrix,
    parse_size,
    parse_type,
)
from griffin_gguf.cli.progress import progress

if TYPE_CHECKING:
    from griffin_gguf.quant.file_types import FileType
    from griffin_gguf.quant.overrides import TensorTypes
    from griffin_gguf.quant.quantizer import FilePlan


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "quantize",
        quantize,
        "griffin quantize model-BF16.gguf model-Q4_K_M.gguf Q4_K_M",
        "griffin quantize model-BF16.gguf model-Q2_K.gguf Q2_K --dry-run",
        "griffin quantize model-BF16.gguf model-IQ3_M.gguf IQ3_M --imatrix model.imatrix.gguf",
        "griffin quantize model-BF16.gguf model-mix.gguf --target-size 1.5GB -f calibration.txt",
        "griffin quantize model-BF16.gguf model-ssm.gguf Q4_K_M --tensor-type 'ssm_.*=Q6_K'",
    )


def _list_types(wanted: bool) -> None:
    if not wanted:
        return
    from griffin_gguf.quant.file_types import FILE_TYPES

    rows = table("type", "mostly", "importance matrix", "")
    for row in FILE_TYPES.values():
        needed = "needed" if row.needs_importance else "helps" if row.quantized and row.name != "Q8_0" else ""
        rows.add_row(row.name, row.default.name, needed, row.note)
    out().print(rows)
    raise typer.Exit


_TYPES, _FILE = "Types of single tensors", "Keys and files"

Source = Annotated[Path, typer.Argument(metavar="IN", help="A GGUF in F32, F16 or BF16.", show_default=False)]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF to write.", show_default=False)]
Type = Annotated[
    str | None, typer.Argument(metavar="TYPE", help=f"{TYPES_HELP}; COPY changes no tensor.", show_default=False)
]
ListTypes = Annotated[
    bool, typer.Option("--list-types", callback=_list_types, is_eager=True, help="Show all file types and exit.")
]
TensorType = Annotated[
    list[str],
    typer.Option(
        "--tensor-type",
        metavar="REGEX=TYPE",
        rich_help_panel=_TYPES,
        show_default=False,
        help="Tensors whose name the pattern is found in. Repeatable; the first that fits decides.",
    ),
]
TensorTypeFile = Annotated[
    Path | None,
    typer.Option(
        "--tensor-type-file", metavar="FILE", rich_help_panel=_TYPES, help="More of these, one REGEX=TYPE a line."
    ),
]
OutputType = Annotated[
    str | None,
    typer.Option("--output-tensor-type", metavar="TYPE", rich_help_panel=_TYPES, help="The head, tied or not."),
]
EmbeddingType = Annotated[
    str | None,
    typer.Option(
        "--token-embedding-type", metavar="TYPE", rich_help_panel=_TYPES, help="The embedding; tied, the head too."
    ),
]
Pure = Annotated[bool, typer.Option("--pure", rich_help_panel=_TYPES, help="TYPE's main tensor type for every matrix.")]
OverrideKv = Annotated[
    list[str],
    typer.Option(
        "--override-kv",
        metavar="KEY=KIND:VALUE",
        rich_help_panel=_FILE,
        show_default=False,
        help="Set a key; KIND is int, float, bool or str. Repeatable.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Write nothing; print each tensor's type and the file's exact size.")
]
AllowRequantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Take a quantized IN too, which loses quality twice.")
]


def quantize(
    source: Source,
    target: Target,
    name: Type = None,
    target_bpw: TargetBpw = None,
    target_size: TargetSize = None,
    max_kl: MaxKl = None,
    text: Text = None,
    tokens: Tokens = 2048,
    costs: CostsFile = None,
    tensor_types: TensorType = [],  # noqa: B006  typer copies it
    tensor_type_file: TensorTypeFile = None,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    pure: Pure = False,
    imatrix: Imatrix = None,
    override_kv: OverrideKv = [],  # noqa: B006  typer copies it
    split_max_size: SplitMaxSize = None,
    dry: DryRun = False,
    allow_requantize: AllowRequantize = False,
    threads: Threads = None,
    as_json: Json = False,
    list_types: ListTypes = False,
) -> None:
    """Rewrite a GGUF in another type, or in the mix of types that loses least at a given size.

    Each tensor's type follows TYPE's recipe (docs/quantization.md). A tensor whose rows do not fit is named. A mix is
    chosen by measuring what each tensor costs in each type.
    """
    from griffin_gguf.quant import quantizer
    from griffin_gguf.quant.overrides import TensorTypes
    from griffin_gguf.runtime.atomic import check_targets

    wish = Wish(target_bpw, target_size, max_kl, text, tokens, costs)
    check_targets([target], [path for path in (tensor_type_file, text, costs) if path])
    kind = _kind(name, wish)
    settings = quantizer.Settings(
        tensor_types=_tensor_types(tensor_types, tensor_type_file, output_type, embedding_type, pure),
        imatrix=load_imatrix(imatrix),
        keys=override_kv,
        max_bytes=parse_size(split_max_size) if split_max_size else None,
        allow_requantize=allow_requantize,
    )
    if kind is None:
        if settings.tensor_types != TensorTypes():
            raise typer.BadParameter("a target leaves no types to choose by hand; give TYPE in its place")
        kind, settings = mixed(source, target, wish, settings, threads)
    if dry:
        plan = quantizer.dry_run(source, kind, settings, target=target)
    else:
        with progress("Quantizing") as report:
            plan = quantizer.quantize(source, target, kind, settings, threads=threads, progress=report)
    for line in plan.notes:
        note(line)
    if as_json:
        print_json(_document(kind if isinstance(kind, str) else settings.recipe or kind.name, plan, written=not dry))
    elif dry:
        _show(plan)
    else:
        for path in plan.paths:
            out().print(str(path), markup=False, soft_wrap=True, end="\n" if path != plan.paths[-1] else "  ")
        out().print(_summary(plan), markup=False, soft_wrap=True)


def _kind(name: str | None, wish: Wish) -> "str | FileType | None":
    """The file type, COPY, or None for a mix; usage errors unless exactly one of them is meant."""
    from griffin_gguf.quant.quantizer import COPY

    if wish.targets + (name is not None) != 1:
        raise typer.BadParameter("expected one of TYPE, --target-bpw, --target-size and --max-kl")
    if not wish.targets and (wish.text or wish.costs):
        raise typer.BadParameter("--text and --costs are for --target-bpw, --target-size and --max-kl")
    if wish.size:
        parse_size(wish.size)
    if name is None:
        return None
    return COPY if name.upper() == COPY else parse_type(name)


def _tensor_types(
    patterns: list[str], file: Path | None, output: str | None, embedding: str | None, pure: bool
) -> "TensorTypes":
    """What the options say of single tensors; usage errors for types that do not exist."""
    from griffin_gguf.quant import overrides
    from griffin_gguf.runtime.errors import UnsupportedError

    try:
        return overrides.TensorTypes(
            (*map(overrides.parse_pattern, patterns), *(overrides.read_patterns(file) if file else ())),
            overrides.tensor_type(output) if output else None,
            overrides.tensor_type(embedding) if embedding else None,
            pure,
        )
    except UnsupportedError as error:
        raise typer.BadParameter(str(error)) from None


def _summary(plan: "FilePlan") -> str:
    return f"{size(plan.size)}, {plan.bits_per_weight:.2f} bits per weight"


def _show(plan: "FilePlan") -> None:
    """Print the table of a dry run."""
    rows = table("tensor", "shape", "from", "to", "size", right=("shape", "size"))
    for row in plan.tensors:
        shape = " × ".join(map(str, row.tensor.shape))
        source = plan.source_types[row.tensor.name].name
        rows.add_row(row.tensor.name, shape, source, row.type.name, size(row.nbytes))
    console = out()
    console.print(rows)
    names = ", ".join(map(str, plan.paths))
    console.print(f"{names} would have {plan.size} bytes: {_summary(plan)}", markup=False, soft_wrap=True)


def _document(name: str, plan: "FilePlan", *, written: bool) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "paths": list(map(str, plan.paths)),
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
