"""Saving and loading a state, in milliseconds and GB/s, beside bare reading and writing of the same bytes.

python benchmarks/saved_state.py [--size 9b] [--rounds 15] [--folder .]

All reading is from the page cache. Writing ends there too, save for what says `synced`, which waits for the disk as
`save` does. CPU time stands beside wall time, for a machine that is shared.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scale import CONFIGS, machine

from griffin_gguf.runtime.saved_state import LOGITS, Layout, Saved, load, save
from griffin_gguf.runtime.state import CHUNK

MODEL = "0" * 64


def main() -> None:
    """Print a line for each way to move a state's bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["2b", "9b"], default="9b")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; the system's folder for temporary files if absent")
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(Path(folder), arguments.size, arguments.rounds)


def run(folder: Path, size: str, rounds: int) -> None:
    """Time every job once a round, in turn, so that a noisy machine hits all alike."""
    expected = layout(size)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, (dtype, shape) in expected.items()}
    logits = arrays.pop(LOGITS)
    state = Saved(MODEL, 3000, arrays, logits)
    path, bare = folder / "saved.state", folder / "bare"
    save(path, state)
    data = path.read_bytes()
    print(f"{size}: a file of {len(data):,} bytes, {logits.nbytes:,} of them logits; medians of {rounds} rounds")
    jobs: dict[str, Callable[[], object]] = {
        "bare read": lambda: read(path, len(data)),
        "load": lambda: load(path, MODEL, expected),
        "bare write": lambda: write(bare, data, sync=False),
        "bare write, synced": lambda: write(bare, data, sync=True),
        "save, synced": lambda: save(path, state),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    for name, found in times.items():
        wall, cpu = median(wall for wall, _ in found), median(cpu for _, cpu in found)
        print(f"{name:20} {wall * 1e3:7.2f} ms wall {cpu * 1e3:7.2f} ms CPU {len(data) / wall / 1e9:6.2f} GB/s")


def layout(size: str) -> Layout:
    """The arrays of a state of that size whose rings are f16, and its logits."""
    config = CONFIGS[size]
    ring = (config["attention_window_size"] + CHUNK, config["num_key_value_heads"] * config["head_dim"])
    width, kinds = config["lru_width"], config["block_types"]
    f16, f32 = np.dtype(np.float16), np.dtype(np.float32)
    recurrent: Layout = {"h": (f32, (width,)), "tail": (f32, (width, config["conv1d_width"] - 1))}
    attention: Layout = {"k": (f16, ring), "v": (f16, ring)}
    arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {LOGITS: (f32, (config["vocab_size"],))}
    for i in range(config["num_hidden_layers"]):
        layer = recurrent if kinds[i % len(kinds)] == "recurrent" else attention
        arrays |= {f"blk.{i}.{name}": row for name, row in layer.items()}
    return arrays


def read(path: Path, size: int) -> None:
    """Read a file into a fresh buffer."""
    with path.open("rb", buffering=0) as file:
        assert file.readinto(np.empty(size, np.uint8).data) == size


def write(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a new file."""
    path.unlink(missing_ok=True)
    with path.open("wb", buffering=0) as file:
        file.write(data)
        if sync:
            os.fsync(file.fileno())


def seconds(job: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
