"""Convert a checkpoint of true shapes: memory and time, against quantizing alone.

python benchmarks/conversion.py FOLDER [--size 2b] [--type Q4_K_M]      (FOLDER keeps the checkpoint and the GGUF)

"Alone" is a bare loop of ggml_quantize_chunk over as many rows of the same widths and types, from memory, on
all cores: no reading, no writing.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from scale import machine, random_checkpoint

from griffin_gguf.convert.config import read_config
from griffin_gguf.quant.encode import encode
from griffin_gguf.quant.file_types import file_type
from griffin_gguf.quant.recipes import Planned, plan

_CHUNK = 1 << 21  # elements a call


def main() -> None:
    """Make the checkpoint where it is not there, convert it, quantize alone, print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("2b", "9b"), default="2b")
    parser.add_argument("--type", default="Q4_K_M")
    arguments = parser.parse_args()
    print(machine())
    checkpoint = random_checkpoint(arguments.folder, arguments.size)
    target = arguments.folder / f"random-{arguments.size}-{arguments.type}.gguf"
    whole, rss, beyond = measured(["convert", checkpoint, "-o", target, "--type", arguments.type])
    print(f"convert: {whole:.1f} s, peak RSS {rss / 2**20:.0f} MiB, of it beyond mapped file pages "
          f"{beyond / 2**20:.0f} MiB, {target.stat().st_size / 1e9:.2f} GB", flush=True)  # fmt: skip
    alone = quantize_alone(plan(read_config(checkpoint / "config.json").hp, file_type(arguments.type)))
    print(f"quantizing alone: {alone:.1f} s; convert takes {whole / alone:.2f} times as long")


def measured(arguments: list[str | Path]) -> tuple[float, int, int]:
    """Run `griffin` with these arguments as a process: seconds, peak RSS, peak RSS less file pages, in bytes."""
    command = [sys.executable, "-m", "griffin_gguf.cli", *map(str, arguments)]
    start = time.perf_counter()
    child = psutil.Popen(command, stderr=subprocess.DEVNULL)
    rss = beyond = 0
    while child.poll() is None:
        try:
            memory = child.memory_info()
        except psutil.NoSuchProcess:
            break
        rss = max(rss, memory.rss)
        beyond = max(beyond, memory.rss - getattr(memory, "shared", 0))
        time.sleep(0.02)
    if child.wait():
        raise SystemExit(f"griffin {arguments[0]} ended with {child.returncode}")
    return time.perf_counter() - start, rss, beyond


def quantize_alone(rows: list[Planned]) -> float:
    """Seconds for every matrix of the plan, from random rows in memory, on all cores."""
    tile = np.random.default_rng(0).standard_normal(_CHUNK, np.float32) * np.float32(0.02)

    def job(row: Planned, count: int) -> None:
        encode(row.type, tile[: count * row.columns].reshape(count, row.columns))

    start = time.perf_counter()
    with ThreadPoolExecutor(psutil.cpu_count()) as pool:
        for row in rows:
            step = max(1, _CHUNK // row.columns)
            for at in range(0, row.rows, step):
                pool.submit(job, row, min(step, row.rows - at))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
