"""How fast this machine's ggml multiplies with weights of each type, measured in a second or so a type."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant.encode import NEEDS_IMPORTANCE, encode
from griffin_gguf.quant.file_types import ALWAYS_F32
from griffin_gguf.quant.recipes import Planned, row_bytes
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context

#: Bytes of weights to multiply with: for few tokens more than caches hold; where arithmetic is the limit, fewer do.
_READ, _COMPUTED = 96 << 20, 4 << 20
_MANY = 64  # tokens at once from which on arithmetic is the limit
_TILE = 64  # rows that are encoded; the others repeat them
_SECONDS, _LEAST = 0.3, 3  # for which a product is repeated, and times


@dataclass(frozen=True)
class Rates:
    """`seconds` per weight of a product, by type and tokens at once; `bandwidth`, bytes a second of the fastest."""

    seconds: Mapping[tuple[T, int], float]
    bandwidth: float


def measure_rates(rows: Sequence[Planned], counts: Sequence[int], threads: int | None = None) -> Rates:
    """Measure products of 1 and of each of `counts` tokens on the CPU: of each type, with the largest matrix of `rows`.

    Of a small model no more weights are read than it has: the processor's caches may hold those. Raises `BackendError`
    where ggml cannot be loaded or has no memory.
    """
    matrices = [row for row in rows if row.tensor.role not in ALWAYS_F32]
    device, seconds, bandwidth = Device(threads, "CPU"), dict[tuple[T, int], float](), 0.0
    for type in dict.fromkeys(row.type for row in matrices):
        alike = [row for row in matrices if row.type is type]
        largest, total = max(alike, key=lambda row: row.nbytes), sum(row.nbytes for row in alike)
        for count in sorted({1, *counts}):
            nbytes = min(total, _READ if count < _MANY else _COMPUTED)
            seconds[type, count] = _seconds(device, largest, count, nbytes)
        of_a_weight = row_bytes(type, largest.columns) / largest.columns
        bandwidth = max(bandwidth, of_a_weight / seconds[type, 1])
    device.close()
    return Rates(seconds, bandwidth)


def _seconds(device: Device, row: Planned, count: int, nbytes: int) -> float:
    """Seconds per weight of products with some `nbytes` of weights such as `row`: those of the fastest pass."""
    width = row_bytes(row.type, row.columns)
    height = min(row.rows, max(1, nbytes // width))
    copies = max(1, nbytes // (height * width))
    weights, graph = Context(copies), Context(2 * copies + 1, nodes=2 * copies + 1)
    matrices = [weights.new((height, row.columns), int(row.type)) for _ in range(copies)]
    buffer = device.allocate(weights, "weights to measure with")
    encoded = _encoded(row.type, height, row.columns)
    for matrix in matrices:
        device.write(matrix, encoded)
    x = graph.input((count, row.columns))
    for matrix in matrices:
        graph.expand(graph.matmul(matrix, x))
    allocator = device.allocator()
    allocator.place(graph)
    device.write(x, np.random.default_rng(1).standard_normal(x.shape, np.float32))
    device.run(graph)  # wakes the threads
    times: list[float] = []
    while len(times) < _LEAST or sum(times) < _SECONDS:
        begun = perf_counter()
        device.run(graph)
        times.append(perf_counter() - begun)
    for opened in (allocator, buffer, graph, weights):
        opened.close()
    return min(times) / (copies * height * row.columns)


def _encoded(type: T, height: int, width: int) -> NDArray[np.uint8]:
    """Random weights, uint8 [height, bytes of a row]; encoding them all would take longer than the measurement."""
    tile = np.random.default_rng(0).standard_normal((min(height, _TILE), width), np.float32) * np.float32(0.02)
    rows = encode(type, tile, np.ones(width, np.float32) if type in NEEDS_IMPORTANCE else None)
    return np.ascontiguousarray(np.resize(rows, (height, rows.shape[1])))
