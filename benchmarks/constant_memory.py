"""Read tens of thousands of tokens: state bytes, resident memory and decode speed against position.

python benchmarks/constant_memory.py [MODEL.gguf] [--tokens 30000]     (the demo model where none is given)

Of every 3,000 tokens the last --decode go one at a time, the others in chunks: for a large model decoding all
would take an hour.
"""

import argparse
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from scale import DEMO, machine

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import load

FIRST = 3000
STEP = 3000


def main() -> None:
    """Print one row every `STEP` tokens, and what has changed since token `FIRST`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=30000)
    parser.add_argument("--decode", type=int, default=STEP, choices=range(1, STEP + 1), metavar=f"1..{STEP}")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.tokens < FIRST:
        parser.error(f"--tokens: expected at least {FIRST}")
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or convert(DEMO, [(Path(folder) / "demo.gguf", "Q4_K_M")])[0]
        run(path, arguments.tokens, arguments.decode, arguments.threads)


def run(path: Path, count: int, decode: int, threads: int | None) -> None:
    """Feed `count` random tokens, `STEP` a row of the table."""
    process = psutil.Process()
    random = np.random.default_rng(0)
    print(f"{'position':>9} {'state bytes':>12} {'RSS MiB':>9} {'tokens/s':>9}")
    rows: list[tuple[int, float, float]] = []
    with load(path, backend="ggml", threads=threads) as model:
        state = model.new_state()
        for _ in range(count // STEP):
            tokens = random.integers(0, model.hp.vocab, STEP)
            if decode < STEP:
                model.forward(tokens[:-decode], state)
            times = deque[float](maxlen=1000)
            for i in range(STEP - decode, STEP):
                start = time.perf_counter()
                model.forward(tokens[i : i + 1], state)
                times.append(time.perf_counter() - start)
            rows.append((state.nbytes, process.memory_info().rss / 2**20, 1 / median(times)))
            print(f"{state.position:>9,} {rows[-1][0]:>12,} {rows[-1][1]:>9.1f} {rows[-1][2]:>9.1f}", flush=True)
    first, last = rows[FIRST // STEP - 1], rows[-1]
    print(f"since token {FIRST:,}: state {last[0] - first[0]:+,} bytes, RSS {last[1] - first[1]:+.2f} MiB, "
          f"speed x{last[2] / first[2]:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
