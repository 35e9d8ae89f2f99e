"""`griffin bench --tune`: what suits a model on this machine."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from griffin_gguf.cli.console import clean, note, out, print_json, size, table
from griffin_gguf.cli.progress import progress
from griffin_gguf.quant.wording import digits

if TYPE_CHECKING:
    from griffin_gguf.runtime.tuner import Duel, Speed
    from griffin_gguf.runtime.tuning import Tuning


def tune(path: Path, *, as_json: bool) -> None:
    """Try what there is to choose, show how it went, store what was best."""
    from griffin_gguf.runtime import tuner
    from griffin_gguf.runtime.errors import UnsupportedError
    from griffin_gguf.runtime.gguf_file import GgufFile
    from griffin_gguf.runtime.tuning import VARIABLE, store, store_path

    if store_path() is None:
        raise UnsupportedError(f"{VARIABLE}: is empty, so there is no file to store choices in")
    note_load("what is best now may not be best when other programs are gone")
    with progress(f"Tuning for {clean(path.name)}", unit="rounds") as report:
        tuning, duels = tuner.tune(path, progress=report)
    if not as_json:
        _show_duels(duels)
        _show_tuning(tuning)
    with GgufFile.open(path) as file:
        target = store(file, tuning)
    if as_json:
        print_json({"tuning": asdict(tuning), "stored": str(target), "duels": [asdict(duel) for duel in duels]})
    else:
        out().print(f"stored in {target}", markup=False, soft_wrap=True)


def note_load(consequence: str) -> None:
    """Tell where other programs keep this machine busy, and what of it."""
    from griffin_gguf.runtime.machine import usable_cores

    load, cores = os.getloadavg()[0], usable_cores()
    if load > cores / 2:
        note(f"a load of {load:.1f} on {cores} cores: {consequence}")


def _show_duels(duels: "list[Duel]") -> None:
    """A line for each side of a duel."""
    from griffin_gguf.runtime.tuner import ANSWER, PROMPT

    numbers = ("prompt\ntokens/s", "answer\ntokens/s", f"{PROMPT} read,\n{ANSWER} written", "load", "allocated")
    lines = table("", "", *numbers, "", right=numbers)
    for duel in duels:
        if duel.speed is None or duel.speed_of_best is None or duel.ratio is None:
            lines.add_row(duel.field, str(duel.value), *[""] * len(numbers), f"not tried: {duel.problem}")
            continue
        loads = duel.field == "buffers"
        lines.add_row(duel.field, _named(duel.field, duel.best), *_cells(duel.speed_of_best, loads=loads))
        verdict = f"{duel.ratio:.2f} of the time" + (": taken" if duel.won else f", not under {1 - duel.margin:.2f}")
        lines.add_row("", _named(duel.field, duel.value), *_cells(duel.speed, loads=loads), verdict)
    out().print(lines)
    note(
        "Each against the best so far, in turn, in medians; the best stays unless the other's time is under the part "
        "named. Repacked weights are a copy in memory, made at every start; mapped ones are the file's own pages."
    )


def _cells(speed: "Speed", *, loads: bool) -> list[str]:
    """The numbers of a line; those about loading only where `loads` says that they tell something."""
    load = f"{speed.load:.2f} s" if loads else ""
    allocated = size(max(speed.memory, 0)) if loads and speed.memory is not None else ""
    return [digits(speed.prefill), digits(speed.decode), f"{speed.seconds:.3g} s", load, allocated]


def _named(field: str, value: Any) -> str:
    """A value as people read it."""
    from griffin_gguf.runtime.machine import compute_threads

    return f"{compute_threads()} (one a core)" if field == "threads" and value is None else str(value)


def _show_tuning(tuning: "Tuning") -> None:
    words = (f"{field} {_named(field, value)}" for field, value in asdict(tuning).items())
    out().print(f"chosen: {', '.join(words)}", markup=False, soft_wrap=True)
