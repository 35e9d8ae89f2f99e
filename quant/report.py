"""Measurements side by side: as cells for a table, as JSON, as Markdown."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import PurePath

from griffin_gguf.quant.measure import Measurement

MIB = 1 << 20

#: The columns of a report's table: heading, and what stands in a row.
COLUMNS: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("type", lambda m: m.type),
    ("bits/weight", lambda m: f"{m.bits_per_weight:.2f}"),
    ("file MiB", lambda m: f"{m.file_size / MIB:.1f}"),
    ("peak RAM MiB", lambda m: f"{m.peak_rss / MIB:.0f}"),
    ("prefill tok/s", lambda m: f"{m.prefill_speed:.1f}"),
    ("decode tok/s", lambda m: f"{m.decode_speed:.1f}"),
    ("perplexity", lambda m: f"{m.perplexity:.3f} ± {m.perplexity_stderr:.3f}"),
)


@dataclass
class Report:
    """One row a file, in the order they were measured; `text` is the name of what they were measured on."""

    text: str
    threads: int | None = None  # all cores if None
    rows: list[Measurement] = field(default_factory=list[Measurement])

    @property
    def headings(self) -> list[str]:
        """The table's first line."""
        return [heading for heading, _ in COLUMNS]

    @property
    def cells(self) -> list[list[str]]:
        """The table's other lines, as text."""
        return [[cell(row) for _, cell in COLUMNS] for row in self.rows]

    @property
    def names(self) -> list[str]:
        """Short names of the files, whole paths where short ones would be the same."""
        short = [PurePath(row.path).name for row in self.rows]
        return short if len(set(short)) == len(short) else [row.path for row in self.rows]

    @property
    def legend(self) -> str:
        """What the numbers are, in a line."""
        predicted = max((row.tokens for row in self.rows), default=0)
        backends = ", ".join(sorted({row.backend for row in self.rows}))
        threads = {None: "all cores", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        scored = f"Perplexity over {predicted} tokens of {self.text} ± standard error"
        return f"{scored}; median speeds ({backends}, {threads})."

    def to_json(self) -> str:
        """Every field of every row, unrounded, as `Measurement` names them."""
        content = {"text": self.text, "threads": self.threads, "rows": [asdict(row) for row in self.rows]}
        return json.dumps(content, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Render the table, numbers to the right, and the legend."""
        cells = [[name.replace("|", "\\|"), *line] for name, line in zip(self.names, self.cells, strict=True)]
        lines = [["file", *self.headings], ["---", "---"] + ["---:"] * (len(COLUMNS) - 1), *cells]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{self.legend}\n"
