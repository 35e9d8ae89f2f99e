"""Reports with figures made up by a rule, for what only reads them."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from griffin_gguf.quant.evaluate import Divergence
from griffin_gguf.quant.memory import Memory
from griffin_gguf.quant.report.data import (
    At,
    Bin,
    Cost,
    Machine,
    Quality,
    Report,
    Row,
    Settings,
    Spread,
    Text,
)

MIB = 1 << 20
WINDOWS = 40  # of 512 tokens


def spread(median: float) -> Spread:
    return Spread(median, 0.98 * median, 1.02 * median, 0.97 * median, 1.03 * median, median, 0.02 * median, 5)


def cost(needed: int = 100 * MIB, decode: float = 50.0, key: str = "cost") -> Cost:
    memory = Memory(needed, needed // 4, needed - needed // 4)
    by_position = [At(position, spread(decode)) for position in (0, 512, 2048)]
    return Cost(key, "ggml", 1, spread(0.2), memory, 1000, 512, 32, spread(8 * decode), spread(decode), by_position)


def quality(perplexity: float, kl: float | None = None, *, stream: bool = False, drift: float = 1.0) -> Quality:
    """With `drift` the divergence of the last window is so many times that of the first, in a stream."""
    far = None if kl is None else Divergence(kl, kl / 50, kl / 2, 5 * kl, 20 * kl, 0.9, 0.01, kl / 2, kl / 40, 10000)
    halves = None
    if kl is not None:
        noise = [1 + 0.1 * (-1) ** i for i in range(WINDOWS)]
        gathered = [1 + (drift - 1) * i / (WINDOWS - 1) if stream else 1 for i in range(WINDOWS)]
        halves = [kl * a * b for a, b in zip(noise, gathered, strict=True)]
    edges = [1, 64, 512, 4096, 20480]
    bins = [
        Bin(a, b, b - a, 3.0 - i / 10, 0.01, kl, None if kl is None else kl / 20)
        for i, (a, b) in enumerate(pairwise(edges))
    ]
    bits = 0.3 * perplexity**0.5
    key = f"{perplexity} {kl} {stream}"
    nll_error = 0.01
    return Quality(
        key, 10000, 40000, perplexity, nll_error * perplexity, 3.0, nll_error, bits, 1.0, far,
        bins if stream else [], halves,
    )  # fmt: skip


def row(name: str, type: str, size: int, perplexity: float, kl: float | None = None, **changes: Any) -> Row:
    """A file of so many MiB; the reference where there is no `kl`."""
    made = Row(
        f"{name}.gguf", f"models/{name}.gguf", type, "recurrentgemma", 0, kl is None, None, 1_000_000,
        "a vocabulary", 1024, size * MIB, size * MIB + 1000, cost(2 * size * MIB, 400 / size), quality(perplexity, kl),
        quality(perplexity + 1, kl, stream=True),
    )  # fmt: skip
    return replace(made, **changes)


def report(*rows: Row, **changes: Any) -> Report:
    machine = Machine("A processor", 8, 16 << 30, "Linux", "3.12", "0.1.0", "0.3.36")
    text = Text("novel.txt", 80000, 20480, "ab" * 32)
    made = Report(
        "2026-01-02T03:04:05+00:00", machine, text, Settings(512, None, False, "auto", 1), list(rows), complete=True
    )
    return replace(made, **changes)


def typical() -> Report:
    """A reference, two quantizations, and the reference with h in BF16, which drifts."""
    reference = row("base-BF16", "BF16", 16, 38.0)
    rounded = replace(
        reference,
        name="base-BF16.gguf, h in BF16",
        reference=False,
        precision="h in BF16",
        cost=None,
        windows=quality(38.01, 1e-5),
        stream=quality(39.5, 1e-5, stream=True, drift=900),
    )
    return report(reference, row("base-Q8_0", "Q8_0", 8, 38.05, 1e-4), row("base-Q2_K", "Q2_K", 5, 41.0, 0.05), rounded)
