"""`griffin estimate`: what a model will take and how fast it can be, before there is any file."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import cell, note, out, print_json, size, table
from griffin_gguf.cli.options import TYPES_HELP, Json, Threads, add_command, parse_size, parse_types
from griffin_gguf.quant.wording import digits

if TYPE_CHECKING:
    from griffin_gguf.quant.estimate import Estimate, Layout
    from griffin_gguf.quant.file_types import Metadata
    from griffin_gguf.runtime.arch import Hyperparameters

_TYPES = ("BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "estimate",
        estimate,
        "griffin estimate --model 9b --bandwidth 100GB/s",
        "griffin estimate --model 2b --type Q4_K_M --ctx 100000 --batch 4",
        "griffin estimate --model model-Q4_K_M.gguf",
    )


def estimate(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="2b or 9b, a checkpoint's folder or its config.json, or a GGUF file that griffin wrote.",
            show_default=False,
        ),
    ],
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help=f"{TYPES_HELP}. Repeatable; {', '.join(_TYPES)} unless given, of a GGUF its own.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--ctx", metavar="N", min=1, help="Tokens that each text has by then.")] = 8192,
    batch: Annotated[
        int, typer.Option("--batch", metavar="N", min=1, max=512, help="Texts that are read and written at once.")
    ] = 1,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            "--bandwidth",
            metavar="RATE",
            help="Bound the speed by this memory bandwidth, such as 100GB/s, instead of measuring this machine.",
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Estimate file size, memory and speed of a model from its shapes alone: no weights are needed.

    File sizes are exact but for the vocabulary of a model that is not at hand. Memory is what the ggml backend plans
    on a CPU, and what a process without a model takes here. Speeds are upper bounds: by a memory bandwidth, or by
    matrix products of these types as fast as this machine does them, which takes a few seconds.
    """
    from griffin_gguf.quant.estimate import estimate as run

    rate = None if bandwidth is None else _rate(bandwidth)
    if rate is not None and threads is not None:
        raise typer.BadParameter("--threads is for speeds measured here, and goes not with --bandwidth")
    hp, layouts = _layouts(model, parse_types(types or []))
    if rate is None:
        _note_load()
    found = run(hp, layouts, tokens=tokens, batch=batch, bandwidth=rate, threads=threads)
    if as_json:
        print_json(_described(model, tokens, batch, rate, found))
        return
    _show(hp, found, tokens, batch, rate)


def _rate(text: str) -> float:
    """Bytes a second of "100GB/s"; a usage error for anything else."""
    try:
        return float(parse_size(text.strip().removesuffix("/s")))
    except typer.BadParameter:
        raise typer.BadParameter(f"--bandwidth {text}: expected a rate such as 100GB/s or 50GiB/s") from None


def _note_load() -> None:
    """Say so where other programs have the machine."""
    import os

    from griffin_gguf.runtime.machine import usable_cores

    load, cores = os.getloadavg()[0], usable_cores()
    if load > cores / 2:
        note(f"a load of {load:.1f} on {cores} cores: speeds are measured too low while other programs run")


def _layouts(model: str, types: list[str]) -> "tuple[Hyperparameters, list[Layout]]":
    """The model's numbers, and the files to estimate."""
    from griffin_gguf.quant.estimate import layout_of, layouts
    from griffin_gguf.runtime.errors import GriffinError
    from griffin_gguf.runtime.gguf_file import GgufFile
    from griffin_gguf.runtime.published import PUBLISHED

    path = Path(model)
    if hp := PUBLISHED.get(model.lower()):
        return hp, layouts(hp, types or _TYPES)
    if not path.exists():
        raise GriffinError(f"{model}: is no model; expected {' or '.join(PUBLISHED)}, a checkpoint's folder or a file")
    if path.is_dir() or path.suffix == ".json":
        hp, tokenizer = _checkpoint(path)
        return hp, layouts(hp, types or _TYPES, tokenizer)
    with GgufFile.open(path) as file:
        hp = file.hyperparameters()
        keys: Metadata = {
            name: (value, *file.types[name]) for name, value in file.metadata.items() if name.startswith("tokenizer.")
        }
        return hp, layouts(hp, types, keys) if types else [layout_of(file)]


def _checkpoint(path: Path) -> "tuple[Hyperparameters, Metadata | None]":
    """What config.json says, and the tokenizer of a folder that has one."""
    from griffin_gguf.convert.config import read_config
    from griffin_gguf.convert.vocab import tokenizer_metadata

    config = read_config(path / "config.json" if path.is_dir() else path)
    known = any((path / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    return replace(config.hp, untied=not config.tied), tokenizer_metadata(path, config) if known else None


def _described(model: str, tokens: int, batch: int, bandwidth: float | None, found: "list[Estimate]") -> dict[str, Any]:
    """Everything, for machines; sizes in bytes."""
    return {
        "model": model,
        "tokens": tokens,
        "batch": batch,
        "bandwidth": bandwidth,
        "estimates": [one.to_dict() for one in found],
        "caches": {name: batch * nbytes for name, nbytes in _caches(tokens).items()},
    }


def _caches(tokens: int) -> dict[str, int]:
    """What Transformers keep of a text of that length."""
    from griffin_gguf.quant.depth import CACHES

    return {cache.name: cache.nbytes(tokens) for cache in CACHES}


def _show(hp: "Hyperparameters", found: "list[Estimate]", tokens: int, batch: int, bandwidth: float | None) -> None:
    recurrent = sum(hp.recurrent)
    layers = f"{recurrent} recurrent and {hp.layers - recurrent} attention layers, a window of {hp.window:,} tokens"
    out().print(f"{hp.parameters:,} weights, {layers}", markup=False, soft_wrap=True)
    speeds = ("decode\ntokens/s", *(("prefill\ntokens/s",) if bandwidth is None else ()))
    headings = ("bits a\nweight", "file", "the same", "RAM", "at most", *speeds)
    lines = table("type", *headings, right=headings)
    parts = ("file's\npages", "states", "buffers", "logits", "vocabulary", "program", "repacked\n(if tuned)")
    split = table("RAM of", *parts, right=parts, tight=True)
    for one in found:
        rates = [digits(rate) for rate in (one.decode, one.prefill) if rate is not None]
        memory, name = one.memory, cell(one.type)
        sizes = (_decimal(one.file_size), *map(size, (one.file_size, memory.total, memory.most)))
        lines.add_row(name, f"{one.bits_per_weight:.2f}", *sizes, *rates)
        terms = (memory.weights, memory.states, memory.buffers, memory.logits, memory.vocabulary, memory.program)
        split.add_row(name, *map(size, terms), f"+ {size(one.copies)}")
    out().print(lines)
    out().print(split)
    out().print(_length_line(found[0], tokens, batch), markup=False, soft_wrap=True)
    note(_legend(batch, bandwidth))


def _decimal(count: int) -> str:
    """Bytes as shops and hubs count them."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def _length_line(found: "Estimate", tokens: int, batch: int) -> str:
    """That length costs nothing here, and what it costs elsewhere."""
    texts = "a text" if batch == 1 else f"{batch} texts"
    others = ", ".join(f"{name} {size(batch * nbytes)}" for name, nbytes in _caches(tokens).items())
    return (
        f"{texts} of {tokens:,} tokens: {size(found.memory.states)} of state, as at any length; "
        f"Transformers' keys and values: {others}"
    )


def _legend(batch: int, bandwidth: float | None) -> str:
    """What the numbers are."""
    ram = (
        "RAM is that of a process after a chunk and some tokens, on a CPU; at most: with as many graphs as are ever "
        "kept. Pages of the file can be dropped and read again, all else cannot. "
    )
    together = "" if batch == 1 else f"Speeds are of all {batch} texts together. "
    if bandwidth is not None:
        return f"{ram}{together}Decode is an upper bound: all weights read once a step, at {bandwidth / 1e9:g} GB/s."
    return (
        f"{ram}{together}Speeds are upper bounds: matrix products alone, as fast as measured here just now. "
        "docs/estimates.md: a 2B decoded at 0.8 of it and prefilled at 0.95."
    )
