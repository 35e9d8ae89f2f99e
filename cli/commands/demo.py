"""`griffin demo`: the whole way, on the small model that comes along."""

import os
import shlex
import shutil
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from griffin_gguf.cli.commands.convert import new_folder, run
from griffin_gguf.cli.commands.report import HELD_OUT
from griffin_gguf.cli.console import note, out, size
from griffin_gguf.cli.options import add_command
from griffin_gguf.cli.reporting import measure_report, show_report, write_report
from griffin_gguf.cli.running import load_model
from griffin_gguf.cli.text import read_text

if TYPE_CHECKING:
    from griffin_gguf.runtime.generate import Generation

_CHECKPOINT = HELD_OUT.parent
_TYPES = ("BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")
_PROMPT = "It is a truth universally acknowledged, that"
_ANSWER_TOKENS = 48
_MEASURED_TOKENS = 2048
_THREADS = 1  # so small a model runs faster than several threads can wait for each other
_WIDTH = 96  # of the paragraphs


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "demo", demo, "griffin demo", "griffin demo --dir somewhere-else")


def demo(
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the GGUF files go.")] = Path(
        "demo-output"
    ),
) -> None:
    """Convert, generate and measure, in under a minute.

    A small RecurrentGemma comes along, trained on novels for this demo. It becomes GGUF at five sizes; each goes on
    from the same words, and each is measured on text it has not seen.
    """
    begun = monotonic()
    targets = [(folder / f"demo-{kind}.gguf", kind) for kind in _TYPES]
    _title("1", "Convert", "one pass over the checkpoint, five files")
    with new_folder(folder):
        run(_CHECKPOINT, targets, threads=None)
    for path, kind in targets:
        out().print(f"   {kind:<7} {size(path.stat().st_size):>9}  [dim]{escape(str(path))}[/dim]", soft_wrap=True)

    _title("2", "Generate", f"each goes on from “{_PROMPT} …”")
    for path, kind in targets:
        generation = _continue(path)
        out().print(f"   [bold]{kind}[/bold] [dim]{generation.decode_rate:.0f} tokens per second[/dim]")
        out().print(_paragraph(generation.text), style="green", markup=False)

    _title("3", "Measure", "size, memory, speed; perplexity on unseen text, lower is better")
    _measure({path: path.name for path, _ in targets}, folder / "report")

    _title("✓", "Done", f"{monotonic() - begun:.0f} seconds, files in {folder}. Next:")
    program = _program()
    for line in (
        f"{program} chat {_quoted(folder / 'demo-Q8_0.gguf')}",
        f"{program} inspect {_quoted(folder / 'demo-Q4_K_M.gguf')}",
        f"{program} convert YOUR-RECURRENTGEMMA -o model.gguf --type Q4_K_M",
    ):
        out().print(f"   {line}", markup=False, soft_wrap=True)


def _measure(files: dict[Path, str], folder: Path) -> None:
    """A quick report: the table, and the page where plots can be drawn."""
    from griffin_gguf.quant.report.data import Settings

    settings = Settings(ctx=512, tokens=_MEASURED_TOKENS, quick=True, backend="auto", threads=_THREADS)
    with new_folder(folder):
        found = measure_report(files, read_text(HELD_OUT), HELD_OUT.name, settings, folder=folder)
        show_report(found)
        if find_spec("matplotlib") is None:
            note("for plots and a page of it all: pip install 'griffin-gguf[report]'")
        else:
            page, *_ = write_report(found, folder)
            out().print(f"\n   with plots: {page}", markup=False, soft_wrap=True)


def _program() -> str:
    """What to type for this command: its path, where the shell would not find it by name."""
    installed = Path(sys.executable).with_name("griffin")
    if shutil.which("griffin") or not installed.exists():
        return "griffin"
    return _quoted(Path(os.path.relpath(installed)))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _title(number: str, word: str, rest: str) -> None:
    out().print(f"\n[bold cyan]{number}  {word}[/bold cyan]: {escape(rest)}\n")


def _continue(path: Path) -> "Generation":
    """A continuation of the prompt, complete; the seed makes it the same each time."""
    from griffin_gguf.runtime.generate import generate
    from griffin_gguf.runtime.sampling import Sampling

    with load_model(path, "auto", _THREADS) as model:
        tokens = model.tokenizer.encode(_PROMPT)
        generation = generate(
            model, model.new_state(), tokens, Sampling(temperature=0.7, repeat_penalty=1.1, seed=1), _ANSWER_TOKENS
        )
        for _ in generation:
            pass
        return generation


def _paragraph(text: str) -> str:
    """A continuation as one indented paragraph."""
    width = min(out().width, _WIDTH)
    return textwrap.fill(f"… {' '.join(text.split())} …", width, initial_indent="   ", subsequent_indent="   ")
