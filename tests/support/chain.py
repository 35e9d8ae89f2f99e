"""A small graph by hand whose layers may lie on several devices, and what it must give."""

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.ggml.device import Buffer, Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.split import Split

WIDTH, LAYERS = 64, 4


class Chain:
    """A model of products: x -> σ(W_i x), each W_i on the device of layer i, and a memory h_i += of each."""

    def __init__(self, device: Device | Split) -> None:
        rng = np.random.default_rng(0)
        self.device = device
        self.matrices = [rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32) for _ in range(LAYERS)]
        self.kept: list[tuple[Context, Buffer]] = []
        self.weights = [self._on(i, (WIDTH, WIDTH), weights=True) for i in range(LAYERS)]
        self.memory = [self._on(i, (WIDTH,), weights=False) for i in range(LAYERS)]
        for tensor, matrix in zip(self.weights, self.matrices, strict=True):
            device.write(tensor, matrix)
        for tensor in self.memory:
            device.write(tensor, np.zeros(WIDTH, np.float32))

    def _on(self, layer: int, shape: tuple[int, ...], *, weights: bool) -> Tensor:
        context = Context(1)
        tensor = context.new(shape)
        self.kept.append((context, self.device.of_layer(layer).allocate(context, "a test", weights=weights)))
        return tensor

    def graph(self) -> tuple[Context, Tensor, Tensor]:
        g = Context(256, nodes=256)
        given = g.input((1, WIDTH))
        x = given
        for i, (weight, memory) in enumerate(zip(self.weights, self.memory, strict=True)):
            g.begin(i, x)
            x = g.unary("sigmoid", g.matmul(weight, x))
            total = g.add(g.reshape(x, (WIDTH,)), memory)
            g.store(total, memory)
            x = g.add_into(g.mul(x, x), x)  # in place: must not move to the next layer's device
        result = g.output(x)
        return g, given, result

    def expected(self, x: NDArray[np.float32], h: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        value = x.astype(np.float64)
        for i, matrix in enumerate(self.matrices):
            value = 1 / (1 + np.exp(-value @ matrix.T))
            h[i] = h[i] + value[0]
            value = value * value + value
        return value


def check(device: Device | Split, steps: int = 4) -> Chain:
    chain = Chain(device)
    allocator = device.allocator()
    h = [np.zeros(WIDTH) for _ in range(LAYERS)]
    graphs = [chain.graph() for _ in range(2)]  # two graphs take turns, as a model's do
    for context, _, _ in graphs:
        assert device.unsupported(context) is None
        allocator.place(context)
    for step in range(steps):
        context, given, result = graphs[step % 2]
        x = np.random.default_rng(step).normal(0, 1, (1, WIDTH)).astype(np.float32)
        device.write(given, x)
        device.run(context)
        assert np.allclose(device.read(result), chain.expected(x, h), atol=1e-5)
    for memory, value in zip(chain.memory, h, strict=True):
        assert np.allclose(device.read(memory), value, atol=1e-5)
    return chain
