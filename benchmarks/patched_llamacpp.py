"""Our speed against the patched llama-bench on the same files: one model, one quantization, two programs.

python benchmarks/patched_llamacpp.py FOLDER LLAMACPP [--types Q4_K_M ...] [--rounds 5] [--threads 2] [--depths 0 4096]

FOLDER keeps the files of random weights with the 2B's shapes, LLAMACPP is what `griffin llamacpp build --into` filled.
The tests are llama-bench's: pp512 reads 512 tokens, tg32 writes 32 one at a time, both behind `depth` others that are
not timed. Both sides in turn, round by round; ours with weights mapped from the file, and with a copy beside them
("both"), as llama.cpp's are where it repacks them.
"""

import argparse
import json
import subprocess
from pathlib import Path
from statistics import median

import numpy as np
from llamacpp import opened
from numpy.typing import NDArray
from scale import machine, random_gguf
from timing import seconds

from griffin_gguf.runtime import Model
from griffin_gguf.runtime.machine import compute_threads
from griffin_gguf.runtime.state import State

PROMPT, WRITTEN = 512, 32
TESTS = {f"pp{PROMPT}": PROMPT, f"tg{WRITTEN}": WRITTEN}

#: Tokens per second by (test, depth).
Speeds = dict[tuple[str, int], float]


def theirs(program: Path, path: Path, depths: list[int], threads: int) -> Speeds:
    """One run of llama-bench."""
    depth = ",".join(map(str, depths))
    options = ("-p", str(PROMPT), "-n", str(WRITTEN), "-d", depth, "-t", str(threads), "-r", "1", "-o", "json")
    done = subprocess.run([program, "-m", path, *options], capture_output=True, text=True, check=True)
    return {
        (f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}", row["n_depth"]): row["avg_ts"]
        for row in json.loads(done.stdout)
    }


def ours(model: Model, beginnings: dict[int, State], tokens: NDArray[np.int32]) -> Speeds:
    """The same of ours, behind texts that were read before."""
    found: Speeds = {}
    for depth, beginning in beginnings.items():
        state = beginning.copy()
        taken = seconds(lambda state=state: model.forward(tokens[:PROMPT], state))
        found[f"pp{PROMPT}", depth] = PROMPT / taken
        state = beginning.copy()
        taken = seconds(lambda state=state: [model.forward(tokens[i : i + 1], state) for i in range(WRITTEN)])
        found[f"tg{WRITTEN}", depth] = WRITTEN / taken
    return found


def begun(model: Model, depths: list[int]) -> dict[int, State]:
    """States behind so many tokens of noise."""
    random = np.random.default_rng(1)
    found = {}
    for depth in depths:
        found[depth] = model.new_state()
        if depth:
            model.forward(random.integers(3, model.hp.vocab, depth), found[depth])
    return found


def compare(path: Path, program: Path, depths: list[int], rounds: int, threads: int) -> None:
    """Print a line for each test, depth and way of ours."""
    models = {way: opened(path, threads, way) for way in ("mapped", "both")}
    tokens = np.random.default_rng(0).integers(3, models["mapped"].hp.vocab, PROMPT).astype(np.int32)
    beginnings = {way: begun(model, depths) for way, model in models.items()}
    speeds: dict[str, list[Speeds]] = {way: [] for way in (*models, "llama.cpp")}
    for _ in range(rounds + 1):
        for way, model in models.items():
            speeds[way].append(ours(model, beginnings[way], tokens))
        speeds["llama.cpp"].append(theirs(program, path, depths, threads))
    for key in ((test, depth) for test in TESTS for depth in depths):
        for way in models:
            rounds_of = zip(speeds[way], speeds["llama.cpp"], strict=True)
            pairs = [(a[key], b[key]) for a, b in rounds_of][1:]  # the first warms up
            ratios = [a / b for a, b in pairs]
            print(f"{path.stem} {key[0]} @ {key[1]:<5} {way:7} {median(a for a, _ in pairs):7.2f} tok/s, llama.cpp "
                  f"{median(b for _, b in pairs):7.2f}, ratio {median(ratios):.3f} (min {min(ratios):.3f}, "
                  f"max {max(ratios):.3f})", flush=True)  # fmt: skip
    for model in models.values():
        model.close()


def main() -> None:
    """Compare every type asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("llamacpp", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q5_K_M", "Q8_0", "Q2_K"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=compute_threads())
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 4096])
    arguments = parser.parse_args()
    print(machine())
    program = arguments.llamacpp / "build" / "bin" / "llama-bench"
    for type in arguments.types:
        path = random_gguf(arguments.folder, "2b", type)
        compare(path, program, arguments.depths, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
