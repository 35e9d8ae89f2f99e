"""Speed of the whole graph against its own matrix products alone, on a file with true shapes.

python benchmarks/decode.py MODEL.gguf [--rounds 7] [--threads 2]

The products are the file's own weights in their own types, gates and head included, in one graph without
anything else: what ggml's kernels allow. Both run in turn, so that a noisy machine hits both alike.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from scale import machine

from griffin_gguf.runtime.arch import Role
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.gguf_file import GgufFile

PREFILL = 512


class Products:
    """A graph of every matrix product of one pass over `count` tokens; the head for the last token alone."""

    def __init__(self, backend: GgmlBackend, count: int) -> None:
        self._backend = backend
        self._context = g = Context(4096, nodes=4096)
        inputs = {}
        for tensor in backend.hp.tensors():
            if tensor.role in (Role.VECTOR, Role.CONV):
                continue
            head = tensor.role is Role.OUTPUT or (tensor.role is Role.EMBEDDING and not backend.hp.untied)
            shape = (*tensor.shape[:-2], 1 if head else count, tensor.shape[-1])
            if tensor.role is not Role.EMBEDDING or head:
                x = inputs.setdefault(shape, g.input(shape))
                g.expand(g.matmul(backend.weights.tensors[tensor.name], x))
        self._allocator = backend.device.allocator()
        self._allocator.place(g)
        for shape, x in inputs.items():
            backend.device.write(x, np.random.default_rng(0).standard_normal(shape, np.float32))

    def __call__(self) -> None:
        """Run it once."""
        self._backend.device.run(self._context)


def seconds(job: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def main() -> None:
    """Print decode and prefill speed and their parts of the products' speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(machine())
    with GgufFile.open(arguments.model) as file:
        backend = GgmlBackend(file, arguments.threads)
        prompt = np.random.default_rng(1).integers(0, backend.hp.vocab, PREFILL).astype(np.int32)
        for name, tokens, repeats in (("decode", prompt[:1], 8), ("prefill", prompt, 1)):
            state, products = backend.new_state(), Products(backend, len(tokens))
            backend.run(prompt, state, "last")
            jobs = {"whole": lambda t=tokens, s=state: backend.run(t, s, "last"), "products": products}
            times: dict[str, list[float]] = {key: [] for key in jobs}
            for _ in range(arguments.rounds):
                for key, job in jobs.items():
                    times[key].append(median(seconds(job) for _ in range(repeats)))
            ratios = [p / w for w, p in zip(times["whole"], times["products"], strict=True)]
            rates = {key: len(tokens) / median(values) for key, values in times.items()}
            print(f"{name:8} whole {rates['whole']:7.2f} tokens/s, products {rates['products']:7.2f} tokens/s, "
                  f"ratio {median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
