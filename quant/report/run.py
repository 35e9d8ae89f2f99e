"""The run of a report: what is to be measured, in which order, and what is there already.

A measurement has a key, made of everything that it depends on. One that an earlier, perhaps interrupted report has
under the same key is taken over, so a run goes on where it was stopped, and a further file costs only its own.
"""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, get_args

from griffin_gguf.quant.collect import fingerprint
from griffin_gguf.quant.file_types import type_name
from griffin_gguf.quant.process import in_fresh_process
from griffin_gguf.quant.report.data import VERSION, Cost, Machine, Quality, Report, Row, Settings, Text, short_names
from griffin_gguf.quant.report.measures import ANSWERS, PROMPT, Cut, Way, cut, measure_cost, measure_quality
from griffin_gguf.runtime.arch import ARCHITECTURE
from griffin_gguf.runtime.backends.rounded import Precision
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import compute_threads, usable_cores, usable_memory
from griffin_gguf.runtime.tuning import stored

#: A text is read to so many times the length that a model was trained on, unless told otherwise.
LENGTHS = 10
#: With `quick`: tokens of the text, runs of each speed. Else so many runs.
QUICK_TOKENS, QUICK_RUNS, RUNS = 4096, 3, 5
#: Positions at which decoding is timed, as far as the text is read; in a quick run the first few.
POSITIONS, QUICK_POSITIONS = tuple(512 * 4**i for i in range(8)), (512,)

#: An answer's token takes about so many times as long as a prompt's.
_SLOWER = 8

#: (what is measured now, tokens done, tokens in all)
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A file to measure, the name it shall have, and what its header says."""

    path: Path
    name: str
    row: Row  # without family and measurements
    model: str  # digest of shapes and name: files of one model in several types have the same
    shapes: str  # digest of shapes alone
    fingerprint: str  # of the file, and of how it is run here

    @classmethod
    def open(cls, path: Path, name: str) -> "Source":
        """Read the header. Raises `FileFormatError` or `UnsupportedError` for what cannot be measured."""
        with GgufFile.open(path) as file:
            architecture = file.metadata.get("general.architecture")
            if not isinstance(architecture, str):
                raise FileFormatError(path, "general.architecture", "is missing, or no text")
            if architecture == ARCHITECTURE:
                file.hyperparameters()
            tokens = file.metadata.get("tokenizer.ggml.tokens")
            shapes = sorted((info.name, info.shape) for info in file.tensors.values())
            row = Row(
                name,
                str(path),
                type_name(file.metadata),
                architecture,
                family=0,
                reference=False,
                precision=None,
                parameters=sum(prod(info.shape) for info in file.tensors.values()),
                vocabulary=_digest(tokens),
                context=_context(file),
                weights=sum(info.nbytes for info in file.tensors.values()),
                file_size=file.size,
            )
            called = file.metadata.get("general.name")
            return cls(path, name, row, _digest(shapes, called), _digest(architecture, shapes), _fingerprint(file))


def _fingerprint(file: GgufFile) -> str:
    """Of the content, as far as a look at each tensor tells, of size and time, and of what a Griffin is tuned to."""
    stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in file.paths]
    griffin = file.metadata["general.architecture"] == ARCHITECTURE
    return _digest(fingerprint(file), stamps, asdict(stored(file)[0]) if griffin else None, compute_threads())


def _context(file: GgufFile) -> int:
    """Tokens that a model was trained on at once, by its header."""
    found = file.metadata.get(f"{file.metadata['general.architecture']}.context_length")
    if not isinstance(found, int) or found < 1:
        raise FileFormatError(file.path, "context_length", f"expected a whole number from 1, found {found!r}")
    return found


def families(sources: Sequence[Source], reference: Path | None = None) -> list[Row]:
    """The rows of a report: sources of one model are a family, with the one of most bits a weight as reference.

    One model are files whose tensors have the same shapes and that say the same `general.name`. With a `reference` all
    files of its shapes are its family. Raises `UnsupportedError` for files of one model whose tokenizers differ, and
    for a `reference` that is none of the sources.
    """
    named = next((s for s in sources if reference is not None and s.path.samefile(reference)), None)
    if reference is not None and named is None:
        raise UnsupportedError(f"{reference}: reference: is none of the files to measure")
    groups: dict[str, list[Source]] = {}
    for source in sources:
        same = named is not None and source.shapes == named.shapes
        groups.setdefault(named.model if named and same else source.model, []).append(source)
    family: dict[int, tuple[int, Source]] = {}  # by the source's id: its family's number, and the reference there
    for number, group in enumerate(groups.values()):
        chosen = named if named in group else max(group, key=lambda s: s.row.bits_per_weight)
        for source in group:
            if source.row.vocabulary != chosen.row.vocabulary:
                problem = f"is another than in {chosen.path}: files of one model must have one tokenizer"
                raise UnsupportedError(f"{source.path}: tokenizer.ggml.tokens: {problem}")
            family[id(source)] = number, chosen
    names = short_names([source.name for source in sources])
    return [
        replace(source.row, name=name, family=family[id(source)][0], reference=family[id(source)][1] is source)
        for source, name in zip(sources, names, strict=True)
    ]


def with_precisions(rows: Sequence[Row]) -> list[Row]:
    """The rows and, behind them, the references of Griffins again, in every precision of the recurrence."""
    references = [row for row in rows if row.reference and row.architecture == ARCHITECTURE]
    more = [
        replace(row, name=f"{row.name}, {precision}", reference=False, precision=precision)
        for row in references
        for precision in get_args(Precision)
    ]
    return [*rows, *more]


@dataclass(frozen=True)
class _Step:
    """One measurement: of row `index`, under which `key`, by which function and arguments; `work` in tokens read."""

    index: int
    field: str  # of `Row`
    key: str
    label: str
    work: int
    function: Callable[..., Any]
    kind: type[Cost] | type[Quality]
    arguments: dict[str, Any]


class Run:
    """A report in the making. `report` holds what is there at any moment; `run` measures the rest."""

    def __init__(
        self,
        sources: Sequence[Source],
        words: str,
        text: str,
        settings: Settings,
        *,
        reference: Path | None = None,
        kept: Report | None = None,
    ) -> None:
        """`text` is the name of `words`; `kept` an earlier report to take measurements from.

        Raises as `families` does, and `FileFormatError` naming `text` where it is shorter than a window.
        """
        rows = families(sources, reference)
        self._sources = {str(source.path): source for source in sources}
        self._settings = settings
        self._words, self._text = _cut(words, text, rows, _most_tokens(rows, settings), settings.ctx)
        # Lower precisions are operations of ggml's graphs; beside NumPy's f32 keys they would be something else.
        self._rows = rows if settings.quick or settings.backend == "numpy" else with_precisions(rows)
        self._machine = this_machine()
        self.report = Report(_now(), self._machine, self._text, settings, list(self._rows))
        self._known = {measure.key: measure for measure in kept.measures} if kept else {}
        self._steps = [step for i in range(len(self._rows)) for step in self._steps_of(i)]

    @property
    def steps(self) -> int:
        """Measurements in all."""
        return len(self._steps)

    @property
    def known(self) -> int:
        """Measurements that need not be made."""
        return sum(isinstance(self._known.get(step.key), step.kind) for step in self._steps)

    def run(self, tell: Tell | None = None, save: Callable[[Report], None] | None = None) -> Report:
        """Measure what is missing. `save` is given the report after each measurement, and at the end.

        Raises what the measurements raise; what was measured before that has been saved.
        """
        missing = [step for step in self._steps if not self._take(step)]
        self._set_aside()
        if save:
            save(self.report)
        total, done = sum(step.work for step in missing), 0
        for number, step in enumerate(missing, 1):
            label = f"[{number}/{len(missing)}] {step.label}"

            def progress(part: int, whole: int, step: _Step = step, label: str = label, done: int = done) -> None:
                if tell:
                    tell(label, done + step.work * part // max(whole, 1), total)

            progress(0, 1)
            found = in_fresh_process(
                step.function, step.kind, self._rows[step.index].path, {"key": step.key, **step.arguments}, progress
            )
            self._put(step, found)
            done += step.work
            if save:
                save(self.report)
        self.report = replace(self.report, complete=True)
        if save:
            save(self.report)
        return self.report

    def _set_aside(self) -> None:
        """Keep what is known and not asked for now."""
        wanted = {step.key for step in self._steps}
        others = [measure for key, measure in self._known.items() if key not in wanted]
        self.report = replace(
            self.report,
            other_costs=[measure for measure in others if isinstance(measure, Cost)],
            other_qualities=[measure for measure in others if isinstance(measure, Quality)],
        )

    def _take(self, step: _Step) -> bool:
        """Use what is known of a step."""
        if not isinstance(found := self._known.get(step.key), step.kind):
            return False
        self._put(step, found)
        return True

    def _put(self, step: _Step, found: Cost | Quality) -> None:
        rows = list(self.report.rows)
        rows[step.index] = replace(rows[step.index], **{step.field: found})
        self.report = replace(self.report, rows=rows)

    def _steps_of(self, index: int) -> list[_Step]:
        row = self._rows[index]
        ways: tuple[Way, ...] = ("windows", "stream")
        steps = [self._quality(index, way) for way in ways]
        return steps if row.precision else [self._cost(index), *steps]

    @property
    def _common(self) -> dict[str, Any]:
        return {"backend": self._settings.backend, "threads": self._settings.threads}

    def _cost(self, index: int) -> _Step:
        row, settings = self._rows[index], self._settings
        wanted = QUICK_POSITIONS if settings.quick else POSITIONS
        positions = [position for position in wanted if position <= max(self._text.tokens, PROMPT)]
        runs = QUICK_RUNS if settings.quick else RUNS
        arguments = self._common | {
            "path": row.path, "text": self._words, "context": row.context, "positions": positions, "runs": runs,
        }  # fmt: skip
        key = self._key(row, "cost", positions, runs, asdict(self._machine))
        work = positions[-1] + (runs + 1) * (PROMPT + _SLOWER * ANSWERS[0] * (len(positions) + 1))
        label = f"{row.name}: memory and speed"
        return _Step(index, "cost", key, label, work, measure_cost, Cost, arguments)

    def _quality(self, index: int, way: Way) -> _Step:
        row, settings = self._rows[index], self._settings
        reference = None if row.reference else self.report.reference_of(row).path
        arguments = self._common | {
            "path": row.path, "reference": reference, "precision": row.precision, "text": self._words,
            "context": row.context, "way": way, "ctx": settings.ctx,
        }  # fmt: skip
        key = self._key(row, way, settings.ctx, reference and self._sources[reference].fingerprint)
        what = {"windows": f"perplexity in windows of {settings.ctx}", "stream": "the text in one pass"}[way]
        work = self._text.tokens * (2 if reference else 1)
        return _Step(index, way, key, f"{row.name}: {what}", work, measure_quality, Quality, arguments)

    def _key(self, row: Row, *what: Any) -> str:
        made = (VERSION, version("griffin-gguf"), version("llama-cpp-python"))
        settings = (self._settings.backend, self._settings.threads)
        source = self._sources[row.path]
        return _digest(made, source.fingerprint, row.precision, self._text.sha256, settings, *what)


def _most_tokens(rows: Sequence[Row], settings: Settings) -> int:
    """How much of a text is read: to so many times the longest training length of a Griffin, unless asked otherwise."""
    if settings.tokens:
        return settings.tokens
    lengths = [row.context for row in rows if row.architecture == ARCHITECTURE] or [row.context for row in rows]
    return max(QUICK_TOKENS, settings.ctx) if settings.quick else LENGTHS * max(lengths)


def _cut(words: str, name: str, rows: Sequence[Row], tokens: int, ctx: int) -> tuple[str, Text]:
    """At most so many `tokens` of a text, as the first Griffin has them, or the first row: all models read the same."""
    row = next((row for row in rows if row.architecture == ARCHITECTURE), rows[0])
    arguments = {"path": row.path, "text": words, "tokens": tokens}
    # What llama.cpp thinks of a file may end the process.
    found = cut(**arguments) if row.architecture == ARCHITECTURE else in_fresh_process(cut, Cut, row.path, arguments)
    if found.tokens < ctx:
        raise FileFormatError(name, "text", f"has {found.tokens} tokens; expected a window of {ctx} at least")
    raw = words.encode()[: found.nbytes]
    return raw.decode(), Text(name, len(raw), found.tokens, hashlib.sha256(raw).hexdigest())


def this_machine() -> Machine:
    """What is measured on."""
    return Machine(
        cpu_name(),
        usable_cores(),
        usable_memory(),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        platform.python_version(),
        version("griffin-gguf"),
        version("llama-cpp-python"),
    )


def cpu_name() -> str:
    """The processor, as it calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        found = next((value.strip() for name, _, value in lines if name.strip() == "model name"), "")
        if found:
            return found
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=os.fspath).encode()).hexdigest()
