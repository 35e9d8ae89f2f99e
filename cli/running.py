"""Loading a model and streaming an answer, as `generate`, `chat` and `demo` do it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from griffin_gguf.cli.console import err, note
from griffin_gguf.cli.options import parse_backend

if TYPE_CHECKING:
    from griffin_gguf.runtime.generate import Generation
    from griffin_gguf.runtime.model import Model
    from griffin_gguf.runtime.speculate import Speculation


def load_model(
    path: Path, backend: str, threads: int | None, devices: Mapping[str, int | None] | None = None
) -> "Model":
    """Load the GGUF and pass on what the loader has to say."""
    from griffin_gguf.runtime import load

    model = load(path, backend=parse_backend(backend), threads=threads, devices=devices)
    if model.notice:
        note(model.notice)
    return model


@contextmanager
def speculating(
    model: "Model", draft: Path | None, lookup: bool, backend: str, threads: int | None
) -> Iterator["Speculation | None"]:
    """Speculation as --draft and --lookup ask for it; None where neither is given."""
    from griffin_gguf.runtime.speculate import DraftModel, PromptLookup, Speculation

    if draft is not None and lookup:
        raise typer.BadParameter("--draft and --lookup: expected one of the two")
    if draft is not None:
        with load_model(draft, backend, threads) as small:
            yield Speculation(model, DraftModel(small, model))
    else:
        yield Speculation(model, PromptLookup()) if lookup else None


def stream(generation: "Generation") -> None:
    """Write the text as it comes: that and nothing else to stdout, but for a terminal's last newline."""
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    if sys.stdout.isatty() and not generation.text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()


def show_timings(generation: "Generation", backend: str) -> None:
    """Tell tokens and speeds on stderr."""
    answer = len(generation.tokens)
    drafts = f"drafts {generation.accepted} of {generation.drafted} right · " if generation.drafted else ""
    err.print(
        f"prompt {generation.prompt_tokens} tokens, {generation.prefill_rate:.1f}/s · "
        f"answer {answer} tokens, {generation.decode_rate:.1f}/s · {drafts}{backend}",
        style="dim",
        soft_wrap=True,
    )
