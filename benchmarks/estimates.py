"""What `griffin estimate` says of the published models, against files of their shapes with random weights.

python benchmarks/estimates.py FOLDER [--sizes 2b 9b] [--type Q4_K_M] [--batch 1 4] [--rounds 5] [--threads 2]

Files are made in FOLDER unless they are there (9b at Q4_K_M: 5.4 GB). The estimate knows the shapes alone. Peaks are
those of fresh processes that read a chunk and write 16 tokens of each text. Speeds are measured in turn with the
products that bound them, so that a noisy machine hits both alike: what is printed is the part of the bound reached.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
from scale import machine, random_gguf
from timing import seconds

from griffin_gguf.quant.estimate import Estimate, Layout, estimate, layouts
from griffin_gguf.quant.memory import Watch
from griffin_gguf.runtime import load
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.published import PUBLISHED
from griffin_gguf.runtime.state import CHUNK

_TOKENS = 16


def run(path: Path, batch: int) -> None:
    """Be the fresh process: print the peak of its resident memory."""
    with Watch() as watch, load(path, backend="ggml", threads=1) as model:
        model.reserve(batch)
        states = [model.new_state() for _ in range(batch)]
        prompt = np.random.default_rng(0).integers(0, model.hp.vocab, model.chunk // batch)
        model.forward_batch([(prompt, state) for state in states])
        for _ in range(_TOKENS):
            model.forward_batch([([5], state) for state in states])
        print(watch.memory.peak)


def peak(path: Path, batch: int) -> int:
    """Bytes at most of such a process."""
    command = [sys.executable, __file__, str(path), "--run", str(batch)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def bound(hp: Hyperparameters, layout: Layout, batch: int, threads: int | None) -> Estimate:
    """The estimate of one file, by products measured now."""
    return estimate(hp, [layout], tokens=CHUNK, batch=batch, threads=threads)[0]


def compare_speed(path: Path, hp: Hyperparameters, layout: Layout, rounds: int, threads: int | None) -> None:
    """Print decode and prefill, their bounds, and the parts reached."""
    found: list[tuple[float, float, float, float]] = []
    with load(path, backend="ggml", threads=threads) as model:
        prompt, state = np.random.default_rng(0).integers(0, hp.vocab, CHUNK), model.new_state()
        for _ in range(rounds + 1):  # the first warms up
            state.reset()
            before = bound(hp, layout, 1, threads)
            prefill = CHUNK / seconds(lambda: model.forward(prompt, state))
            decode = 1 / min(seconds(lambda: model.forward([5], state)) for _ in range(_TOKENS))
            assert before.prefill is not None
            found.append((decode, before.decode, prefill, before.prefill))
    for name, ours, theirs in (("decode", 0, 1), ("prefill", 2, 3)):
        ratios = [row[ours] / row[theirs] for row in found[1:]]
        speeds = [median(row[i] for row in found[1:]) for i in (ours, theirs)]
        print(f"  {name:8} {speeds[0]:8.2f} tokens/s, bound {speeds[1]:8.2f}, part reached {median(ratios):.3f} "
              f"({min(ratios):.3f}, {max(ratios):.3f})", flush=True)  # fmt: skip


def main() -> None:
    """Print estimates, measurements and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run(arguments.folder, arguments.run)
        return
    print(machine())
    for size in arguments.sizes:
        hp, path = PUBLISHED[size], random_gguf(arguments.folder, size, arguments.type)
        (layout,) = layouts(hp, [arguments.type])
        print(f"{size} {layout.type}")
        rows = [("file", layout.file_size, path.stat().st_size)]
        for batch in arguments.batch:
            (one,) = estimate(hp, [layout], tokens=CHUNK, batch=batch, bandwidth=1e9)
            rows.append((f"RAM, {batch} at once", one.memory.total, peak(path, batch)))
        for name, expected, measured in rows:
            print(f"  {name:16} estimate {expected / 2**20:10.2f} MiB, measured {measured / 2**20:10.2f} MiB, "
                  f"ratio {expected / measured:.4f}", flush=True)  # fmt: skip
        if arguments.rounds:
            compare_speed(path, hp, layout, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
