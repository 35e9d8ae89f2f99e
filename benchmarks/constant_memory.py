"""Read very many tokens: whether decoding stays as fast, and memory the same, as it was at token 3,000.

python benchmarks/constant_memory.py                       (the demo model at Q4_K_M: 1,000,000 tokens)
python benchmarks/constant_memory.py MODEL.gguf ...        (50,000 tokens each)

Tokens are random. They go in chunks but for some 32 before each row, which are decoded one at a time and timed. The
state at token 3,000 is kept as a copy; at the end both states decode in turn, so that the ratio of their speeds does
not depend on what else the machine does by then. Exit code 1: a bar is missed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from scale import DEMO, machine

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.depth import Point, early_position, measure_depth, rows
from griffin_gguf.runtime import load
from griffin_gguf.runtime.arch import Hyperparameters

LEAST_SPEED = 0.98  # of that at the beginning
MOST_GROWTH = 1 << 20  # bytes of resident memory


def main() -> int:
    """Run the demo model, or every model given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=25, help="of the comparison")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.models or convert(DEMO, [(Path(folder) / "demo-Q4_K_M.gguf", "Q4_K_M")])
        tokens = arguments.tokens or (50_000 if arguments.models else 1_000_000)
        met = [run(path, tokens, arguments.rounds, arguments.threads) for path in models]
    return 0 if all(met) else 1


def run(path: Path, tokens: int, rounds: int, threads: int | None) -> bool:
    """Print a row for each position, and the bars; whether all are met."""
    print(f"\n{path.name}\n{'position':>9} {'state bytes':>12} {'RSS MiB':>9} {'tokens/s':>9}")
    with load(path, backend="ggml", threads=threads) as model:
        positions = rows(tokens, early_position(model))
        found = measure_depth(model, positions, rounds=rounds, tell=show)
        size = formula(model.hp)
    change = found.change
    if change is None:
        print(f"no comparison: expected at least {2 * early_position(model):,} tokens")
        return False
    sizes = {point.state for point in found.points}
    print(f"from {change.early:,} to {change.late:,} tokens:")
    return all([
        bar(f"speed x{change.speed:.3f} (quartiles {change.low:.3f}, {change.high:.3f})", change.speed >= LEAST_SPEED,
            f"at least {LEAST_SPEED}"),
        bar(f"RSS {change.rss / 2**20:+.2f} MiB, of it allocated {(change.anonymous or 0) / 2**20:+.2f} MiB",
            change.rss <= MOST_GROWTH, f"at most {MOST_GROWTH / 2**20:+.2f} MiB"),
        bar(f"state {' '.join(map(str, sizes))} bytes", sizes == {size}, f"the formula's {size}"),
    ])  # fmt: skip


def show(point: Point) -> None:
    """Print a row."""
    columns = f"{point.position:>9,} {point.state:>12,} {point.rss / 2**20:>9.2f} {point.speed:>9.1f}"
    print(columns, flush=True)


def formula(hp: Hyperparameters) -> int:
    """Bytes of a state by docs/gguf-format.md, keys and values in f16, chunks of at most 512 tokens."""
    recurrent = sum(hp.recurrent)
    ring = 4 * (hp.window + 512) * hp.kv_heads * hp.head_width
    return 4 * hp.lru_width * hp.conv_taps * recurrent + ring * (hp.layers - recurrent)


def bar(what: str, met: bool, wanted: str) -> bool:
    """Print what was found beside what was to be; `met`."""
    print(f"  {what}: {'ok' if met else f'MISSED, expected {wanted}'}")
    return met


if __name__ == "__main__":
    sys.exit(main())
