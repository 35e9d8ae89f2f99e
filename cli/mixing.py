"""The automatic mix of `griffin quantize`: what the person asked for, and what came of it."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin_gguf.cli.console import note
from griffin_gguf.cli.options import parse_size
from griffin_gguf.cli.progress import Report, progress
from griffin_gguf.cli.text import read_text

if TYPE_CHECKING:
    from griffin_gguf.quant.automatic import Found, Goal
    from griffin_gguf.quant.file_types import FileType
    from griffin_gguf.quant.quantizer import Settings

_PANEL = "Automatic mix, in place of TYPE"

TargetBpw = Annotated[
    float | None,
    typer.Option(
        "--target-bpw", metavar="X", min=1, max=32, rich_help_panel=_PANEL, help="The best with X bits per weight."
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", metavar="SIZE", rich_help_panel=_PANEL, help="The best file of at most SIZE: 4.5GB."),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl", metavar="X", rich_help_panel=_PANEL, help="The smallest with at most this mean KL to IN, in nats."
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        "-f",
        metavar="FILE",
        rich_help_panel=_PANEL,
        help="Text to measure on what each tensor costs; without one --imatrix decides.",
    ),
]
Tokens = Annotated[
    int, typer.Option("--tokens", "-n", metavar="N", min=2, rich_help_panel=_PANEL, help="Tokens of it, at most.")
]
CostsFile = Annotated[
    Path | None,
    typer.Option(
        "--costs",
        metavar="FILE",
        rich_help_panel=_PANEL,
        help="Keep what was measured here, or take it from here: the next mix is chosen at once.",
    ),
]


@dataclass(frozen=True)
class Wish:
    """The options of an automatic mix as they were given."""

    bits_per_weight: float | None
    size: str | None
    max_kl: float | None
    text: Path | None
    tokens: int
    costs: Path | None

    @property
    def targets(self) -> int:
        """How many targets were named."""
        return sum(target is not None for target in (self.bits_per_weight, self.size, self.max_kl))


def mixed(
    source: Path, target: Path, wish: Wish, settings: "Settings", threads: int | None
) -> tuple["FileType", "Settings"]:
    """Find the mix, say what it came to, and return what `quantize` needs to write it."""
    from griffin_gguf.quant import automatic

    goal = _goal(source, target, wish, settings)
    text = read_text(wish.text) if wish.text else None
    with _Bars() as report:
        found = automatic.find_mix(
            source,
            goal,
            text=text,
            imatrix=settings.imatrix,
            tokens=wish.tokens,
            threads=threads,
            costs_file=wish.costs,
            progress=report,
        )
    _tell(found)
    if settings.imatrix is None:
        note("without --imatrix the types that need one were left out")
    kind, words = automatic.as_recipe(found)
    return kind, replace(settings, types=found.mix.types, recipe=words)


def _goal(source: Path, target: Path, wish: Wish, settings: "Settings") -> "Goal":
    """What to look for. Whatever `quantize` would refuse at the end is refused here, before minutes of measuring."""
    from griffin_gguf.quant.automatic import Goal, data_budget

    budget = data_budget(source, target, parse_size(wish.size) if wish.size else 0, settings)
    return Goal(wish.bits_per_weight, budget if wish.size else None, wish.max_kl)


def _tell(found: "Found") -> None:
    """Say what the mix costs, where it was measured."""
    if far := found.divergence:
        mean, same = f"{far.mean:.3g} ± {far.stderr:.1g}", f"{far.top1:.1%}"
        note(f"mean KL to the source {mean} over {far.tokens} tokens, the same token first in {same}")
    else:
        note("chosen by the importance matrix alone; with --text the loss would be measured")


class _Bars:
    """One bar after another: a new one for each label that is reported."""

    def __enter__(self) -> "_Bars":
        self._stack, self._label = ExitStack(), ""
        self._report: Report | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, label: str, done: int, total: int) -> None:
        if label != self._label:
            self._stack.close()
            self._label = label
            unit = "tensors" if "sample" in label else "tokens"
            self._report = self._stack.enter_context(progress(label.capitalize(), unit=unit))
        assert self._report
        self._report(done, total)
