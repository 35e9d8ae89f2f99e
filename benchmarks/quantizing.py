"""The quantizer against ggml's own loops, on files with true shapes.

python benchmarks/quantizing.py types FOLDER [--shape 2b-short] [--type Q4_K_M ...] [--rounds 3]
python benchmarks/quantizing.py together FOLDER [--shape 2b]
python benchmarks/quantizing.py memory FOLDER [--shape 9b] [--type Q4_K_M]

FOLDER keeps what is made: random checkpoints and GGUF files. `types`: `quantize`, file to file, against a bare loop
of ggml_quantize_chunk over as many rows of the same widths and types that lie in memory, on the same number of
threads; no reading, checking, writing. `together`: the four types of the README in one pass over the checkpoint,
against each alone. `memory`: peak of `griffin quantize` as a process, without the pages of mapped files.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from conversion import measured
from scale import CONFIGS, machine, random_checkpoint

from griffin_gguf.convert.checkpoint import Checkpoint
from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.encode import encode
from griffin_gguf.quant.file_types import FILE_TYPES, file_type
from griffin_gguf.quant.imatrix import Entry, ImportanceMatrix, products
from griffin_gguf.quant.quantizer import Settings, quantize
from griffin_gguf.quant.recipes import Planned, plan
from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import usable_cores

MISSION = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")
_PIECE = 1 << 18  # elements a call, as the quantizer has it


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("types", "together", "memory"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=CONFIGS)
    parser.add_argument("--type", nargs="+", dest="types")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    print(f"{machine()}, {arguments.threads} threads", flush=True)
    shape = arguments.shape or {"types": "2b-short", "together": "2b", "memory": "9b"}[arguments.what]
    checkpoint = random_checkpoint(arguments.folder, shape)
    if arguments.what == "together":
        together(checkpoint, arguments.threads)
        return
    source = arguments.folder / f"random-{shape}-BF16.gguf"
    if not source.exists():
        convert(checkpoint, [(source, "BF16")])
    if arguments.what == "memory":
        memory(source, (arguments.types or ["Q4_K_M"])[0])
    else:
        types(source, arguments.types or [name for name, row in FILE_TYPES.items() if row.quantized], arguments)


def types(source: Path, names: list[str], arguments: argparse.Namespace) -> None:
    """Print, for each file type, weights a second and core of both, and the ratio; they run in turn."""
    with GgufFile.open(source) as file:
        hp = file.hyperparameters()
    target = source.with_name("target.gguf")
    settings = Settings(imatrix=flat_importance(hp))
    print("| file type | quantizer, M weights/s/core | bare loop | ratio |\n|---|---:|---:|---:|", flush=True)
    for name in names:
        rows = plan(hp, file_type(name), imatrix=True)
        jobs: dict[str, Callable[[], object]] = {
            "bare": lambda rows=rows: bare_loop(rows, arguments.threads),
            "ours": lambda name=name: quantize(source, target, name, settings, threads=arguments.threads),
        }
        times: dict[str, list[float]] = {key: [] for key in jobs}
        for _ in range(arguments.rounds):
            for key, job in jobs.items():
                times[key].append(seconds(job))
        rate = {key: hp.parameters / 1e6 / median(value) / arguments.threads for key, value in times.items()}
        ratio = median(bare / ours for bare, ours in zip(times["bare"], times["ours"], strict=True))
        print(f"| {name} | {rate['ours']:.1f} | {rate['bare']:.1f} | {ratio:.3f} |", flush=True)
    target.unlink()


def together(checkpoint: Path, threads: int) -> None:
    """Print the time of one pass for four types, of each alone, and of reading the checkpoint."""
    targets = [(checkpoint.with_name(f"target-{name}.gguf"), name) for name in MISSION]
    reading = seconds(lambda: read_all(checkpoint, threads))
    alone = [seconds(lambda one=one: convert(checkpoint, [one], threads=threads)) for one in targets]
    all_at_once = seconds(lambda: convert(checkpoint, targets, threads=threads))
    for path, _ in targets:
        path.unlink()
    limit = sum(alone) - (len(targets) - 1) * reading
    parts = ", ".join(f"{name} {time:.1f} s" for name, time in zip(MISSION, alone, strict=True))
    print(f"alone: {parts}, together {sum(alone):.1f} s; reading {reading:.1f} s")
    print(f"in one pass: {all_at_once:.1f} s, {all_at_once / limit:.3f} of the sum less three readings")


def memory(source: Path, name: str) -> None:
    """Print the peak of a process that quantizes `source`."""
    target = source.with_name("target.gguf")
    elapsed, rss, beyond = measured(["quantize", source, target, name])
    print(f"{source.stat().st_size / 1e9:.1f} GB to {name}, {target.stat().st_size / 1e9:.2f} GB in {elapsed:.0f} s: "
          f"peak RSS {rss / 2**20:.0f} MiB, beyond mapped file pages {beyond / 2**20:.0f} MiB")  # fmt: skip
    target.unlink()


def flat_importance(hp: Hyperparameters) -> ImportanceMatrix:
    """An importance matrix of random numbers near 1."""
    rng = np.random.default_rng(0)
    entries: dict[str, Entry] = {}
    for tensor in products(hp):
        matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
        entries[tensor.name] = Entry(rng.uniform(0.5, 1.5, (matrices, tensor.shape[-1])), np.array([1]))
    return ImportanceMatrix(Path("flat.gguf"), entries, ("none",), 1, 512)


def bare_loop(rows: list[Planned], threads: int) -> None:
    """Encode as many rows as the plan has from one tile of random numbers in memory."""
    rng = np.random.default_rng(0)
    tile = rng.standard_normal(_PIECE, np.float32) * np.float32(0.02)
    importance = rng.uniform(0.5, 1.5, max(row.columns for row in rows)).astype(np.float32)

    def job(row: Planned, count: int) -> None:
        encode(row.type, tile[: count * row.columns].reshape(count, row.columns), importance[: row.columns])

    with ThreadPoolExecutor(threads) as pool:
        for row in rows:
            step = max(1, _PIECE // row.columns)
            for at in range(0, row.rows, step):
                pool.submit(job, row, min(step, row.rows - at))


def read_all(checkpoint: Path, threads: int) -> None:
    """Read every tensor as float32, piece by piece."""
    with Checkpoint(checkpoint) as stored, ThreadPoolExecutor(threads) as pool:
        for name, tensor in stored.tensors.items():
            step = max(1, _PIECE // tensor.columns)
            for at in range(0, tensor.rows, step):
                pool.submit(stored.read, name, at, min(at + step, tensor.rows))


def seconds(job: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
