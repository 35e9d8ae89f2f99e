"""Speed of ggml's matrix products by type and by tokens at once, as rows lie in the file and repacked; and of BLAS.

python benchmarks/products.py [--types Q4_K ...] [--tokens 1 8 16 512] [--threads 2]

One weight of 7,680 x 2,560 in as many copies as do not fit into a cache. It is what ratios in docs/performance.md
rest on, and it decides which copy of a weight serves which number of tokens (`TILED` in ggml_weights.py). BLAS is
NumPy's, on the same weights in f32.
"""

import argparse
import math
from statistics import median

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from scale import machine
from timing import seconds

from griffin_gguf.quant.encode import encode
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor

ROWS, COLUMNS, COPIES = 7680, 2560, 12
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"]


def rates(device: Device, weights: list[Tensor], nbytes: int, tokens: list[int]) -> str:
    """GFLOP/s for each number of tokens, and GB/s where it is one."""
    found: list[str] = []
    for count in tokens:
        g = Context(64, nodes=64)
        x = g.input((count, COLUMNS))
        for weight in weights:
            g.expand(g.matmul(weight, x))
        allocator = device.allocator()
        allocator.place(g)
        device.write(x, np.random.default_rng(1).standard_normal((count, COLUMNS), np.float32))
        device.run(g)
        time = median(seconds(lambda g=g: device.run(g)) for _ in range(15 if count < 64 else 3))
        work = 2 * ROWS * COLUMNS * len(weights) * count / time / 1e9
        found.append(f"{work:8.1f}" + (f" ({nbytes * len(weights) / time / 1e9:4.1f} GB/s)" if count == 1 else ""))
    return " ".join(found)


def measure(device: Device, name: str, values: NDArray[np.float32], tokens: list[int]) -> None:
    """Print a line for the weights as they lie in a file, and one for repacked ones where there are such."""
    type = GGMLQuantizationType[name]
    encoded = encode(type, values)
    ways = {"file": device.allocate, "repacked": device.allocate_repacked}
    for way, allocate in ways.items():
        if way == "repacked" and not device.repacks((ROWS, COLUMNS), int(type)):
            continue
        context = Context(COPIES)
        weights = [context.new((ROWS, COLUMNS), int(type)) for _ in range(COPIES)]
        buffer = allocate(context, "weights")
        for weight in weights:
            device.write(weight, encoded)
        print(f"{name:5} {way:9} {rates(device, weights, encoded.nbytes, tokens)}", flush=True)
        buffer.close()


def main() -> None:
    """Print GFLOP/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 512])
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(machine())
    print(f"GFLOP/s at {', '.join(map(str, arguments.tokens))} tokens")
    device = Device(arguments.threads)
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    for name in arguments.types:
        measure(device, name, values, arguments.tokens)
    x = np.random.default_rng(1).standard_normal((max(arguments.tokens), COLUMNS), np.float32)
    time = median(seconds(lambda: x @ values.T) for _ in range(5))
    print(f"BLAS  f32, {len(x)} tokens: {2 * math.prod((*values.shape, len(x))) / time / 1e9:.1f}, all threads")


if __name__ == "__main__":
    main()
