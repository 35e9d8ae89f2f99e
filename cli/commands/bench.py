"""`griffin bench`: how fast models are on this machine, and what suits them best."""

from pathlib import Path
from typing import Annotated, Any

import typer

from griffin_gguf.cli.bench_depth import show_depth
from griffin_gguf.cli.bench_speed import Wanted, measure_speeds, parse_counts, parse_pairs
from griffin_gguf.cli.bench_tune import tune as tune_model
from griffin_gguf.cli.options import Json, add_command

_LISTS = "Tests (lists: 128,256 or 1-8*2; may be repeated)"
_OTHER = "Other measurements, of one model"

#: What --depth and --tune leave to others, by the option's name.
_OF_SPEED = ("--n-prompt", "--n-gen", "-pg", "--n-depth", "--batch-size", "--repetitions", "--output")
_OF_DEPTH = ("--tokens", "--file", "--plot")

_FORMATS = ("md", "json", "csv", "jsonl")
_PROMPT, _GEN, _REPETITIONS, _TOKENS = 512, 128, 5, 16384


def _list(*names: str, help: str) -> Any:
    return typer.Option(*names, metavar="N", rich_help_panel=_LISTS, help=help, show_default=False)


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "bench",
        bench,
        "griffin bench model.gguf",
        "griffin bench small.gguf large.gguf -p 512 -n 0 -t 1-8*2",
        "griffin bench model.gguf -d 0,4096,32768 -o json > speeds.json",
        "griffin bench --tune model.gguf",
        "griffin bench --depth model.gguf --tokens 65536 --plot figures",
    )


def bench(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="GGUF files: griffin's, or any that llama.cpp runs.", show_default=False),
    ],
    prompt: Annotated[
        list[str] | None, _list("--n-prompt", "-p", help=f"Read a prompt of so many tokens; {_PROMPT} unless given.")
    ] = None,
    gen: Annotated[
        list[str] | None, _list("--n-gen", "-n", help=f"Write so many, one at a time; {_GEN} unless given.")
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option("-pg", metavar="P,N", rich_help_panel=_LISTS, help="Read P, then write N, in one time."),
    ] = None,
    n_depth: Annotated[
        list[str] | None, _list("--n-depth", "-d", help="After so many others, which are not timed; 0 unless given.")
    ] = None,
    batch: Annotated[
        list[str] | None, _list("--batch-size", "-b", help="Tokens of the prompt in one call; 2048 unless given.")
    ] = None,
    threads: Annotated[
        list[str] | None, _list("--threads", "-t", help="CPU threads; as tuned, else one a core unless given.")
    ] = None,
    repetitions: Annotated[
        int | None,
        typer.Option(
            "--repetitions", "-r", metavar="N", min=1, help=f"Runs of each test; {_REPETITIONS} unless given."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FORMAT", help=f"{', '.join(_FORMATS)}; md unless given."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            rich_help_panel=_OTHER,
            help="Find the fastest way to run such models here, and keep to it from now on.",
        ),
    ] = False,
    depth: Annotated[
        bool,
        typer.Option(
            "--depth", rich_help_panel=_OTHER, help="Measure speed and memory while more and more tokens are read."
        ),
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=1,
            rich_help_panel=_OTHER,
            help=f"With --depth: read so many; {_TOKENS} unless given.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            rich_help_panel=_OTHER,
            help="With --depth: read this text, again and again; else noise.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="DIR",
            rich_help_panel=_OTHER,
            help="With --depth: write depth.svg, depth.png and depth.json there.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure models on this machine.

    Without --tune and --depth it does what llama-bench does: pp512 is reading a prompt of 512 tokens, tg128 is writing
    128 one at a time, in tokens per second, mean ± standard deviation. Options, tests, columns and field names are
    llama-bench's, so that figures can be compared with its own.

    --tune takes minutes. It compares threads, ggml's two ways of attention, sizes of chunks, and weights mapped from
    the file with weights repacked in memory; every other command then runs models of these shapes and types the
    fastest way. Answers stay the same but for rounding.

    --depth shows that neither speed nor memory depends on how much has been read, beside the keys and values that
    Transformers would have to keep.
    """
    if tune and depth:
        raise typer.BadParameter("expected one of --tune and --depth")
    speed: dict[str, Any] = dict(zip(_OF_SPEED, (prompt, gen, pairs, n_depth, batch, repetitions, output), strict=True))
    reading: dict[str, Any] = dict(zip(_OF_DEPTH, (tokens, text, plot), strict=True))
    if tune:
        _refuse("--tune does not go with", speed | reading | {"--threads": threads})
        tune_model(_one("--tune", paths), as_json=as_json)
    elif depth:
        _refuse("--depth does not go with", speed)
        counts = parse_counts("--threads", threads, least=1)
        if len(counts) > 1:
            raise typer.BadParameter(f"--threads: --depth takes one number, found {len(counts)}")
        show_depth(_one("--depth", paths), tokens or _TOKENS, text, plot, next(iter(counts), None), as_json=as_json)
    else:
        _refuse("without --depth there is no", reading)
        measure_speeds(paths, _wanted(speed, threads, as_json=as_json))


def _refuse(problem: str, options: dict[str, Any]) -> None:
    if found := [name for name, value in options.items() if value is not None]:
        raise typer.BadParameter(f"{problem} {found[0]}")


def _one(mode: str, paths: list[Path]) -> Path:
    if len(paths) > 1:
        raise typer.BadParameter(f"{mode} takes one MODEL, found {len(paths)}")
    return paths[0]


def _wanted(given: dict[str, Any], threads: list[str] | None, *, as_json: bool) -> Wanted:
    """The tests that the options ask for; usage errors name what is wrong."""
    from griffin_gguf.quant.speed import BATCH, plan

    output = given["--output"] or ("json" if as_json else "md")
    if output not in _FORMATS or (as_json and output != "json"):
        expected = "json, as --json says" if as_json else ", ".join(_FORMATS)
        raise typer.BadParameter(f"--output: expected {expected}, found {output!r}")

    def counts(option: str, default: int, least: int = 0) -> list[int]:
        return parse_counts(option, given[option], least=least) or [default]

    tests = plan(
        counts("--n-prompt", _PROMPT),
        counts("--n-gen", _GEN),
        parse_pairs("-pg", given["-pg"]),
        counts("--n-depth", 0),
        counts("--batch-size", BATCH, 1),
    )
    if not tests:
        raise typer.BadParameter("nothing to measure: --n-prompt and --n-gen are 0")
    repetitions = given["--repetitions"] or _REPETITIONS
    return Wanted(tests, parse_counts("--threads", threads, least=1) or [None], repetitions, output)
