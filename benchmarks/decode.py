"""Speed of the whole graph against its own matrix products alone, on a file with true shapes.

python benchmarks/decode.py MODEL.gguf [--rounds 7] [--threads 2]

The products are the file's own weights in their own types, gates and head included, in one graph without
anything else: what ggml's kernels allow. Both run in turn, so that a noisy machine hits both alike.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scale import machine
from timing import seconds

from griffin_gguf.runtime.arch import Role
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.backends.ggml_memory import GgmlState
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.tuning import Buffers, Tuning

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
                g.expand(g.matmul(backend.weights.of(count)[tensor.name], x))
        self._allocator = backend.device.allocator()
        self._allocator.place(g)
        for shape, x in inputs.items():
            backend.device.write(x, np.random.default_rng(0).standard_normal(shape, np.float32))

    def __call__(self) -> None:
        """Run it once."""
        self._backend.device.run(self._context)


def whole(backend: GgmlBackend, tokens: NDArray[np.int32], state: GgmlState) -> None:
    """Feed one chunk, and have the logits of its last token."""
    backend.run([(tokens, state)], "last")
    state.move(len(tokens), None, None, traced=False)


def measure(backend: GgmlBackend, name: str, count: int, repeats: int, rounds: int) -> None:
    """Print the speed of `count` tokens at once: decode after a prompt, prefill from an empty state on."""
    prompt = np.random.default_rng(1).integers(0, backend.hp.vocab, PREFILL).astype(np.int32)
    state, products, ours, bare = backend.new_state(), Products(backend, count), list[float](), list[float]()
    for _ in range(rounds + 1):  # the first builds graphs and warms up
        state.reset()
        if name == "decode":
            whole(backend, prompt, state)
        ours.append(median(seconds(lambda: whole(backend, prompt[:count], state)) for _ in range(repeats)))
        bare.append(median(seconds(products) for _ in range(repeats)))
    ratios = [b / o for o, b in zip(ours[1:], bare[1:], strict=True)]
    speeds = [count / median(times[1:]) for times in (ours, bare)]
    print(f"{name:8} whole {speeds[0]:7.2f} tokens/s, products {speeds[1]:7.2f} tokens/s, "
          f"ratio {median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})", flush=True)  # fmt: skip


def main() -> None:
    """Print decode and prefill speed and their parts of the products' speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--buffers", choices=get_args(Buffers), default="mapped")
    arguments = parser.parse_args()
    print(machine())
    with GgufFile.open(arguments.model) as file:
        backend = GgmlBackend(file, Tuning(arguments.threads, arguments.buffers))
        measure(backend, "decode", 1, 16, arguments.rounds)
        measure(backend, "prefill", PREFILL, 1, arguments.rounds)


if __name__ == "__main__":
    main()
