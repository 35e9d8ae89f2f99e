"""The recurrence h = a·h + b over a chunk, three ways: blocked, a chain of tokens, and ggml's scan for Mamba.

python benchmarks/scan.py [--tokens 512] [--width 2560] [--rounds 9] [--threads 2]

ggml has no operation for it. `blocked` is the runtime's (runtime/backends/scan.py); `chain` does token after
token in place; `ssm_scan` is a Mamba of state width 1 whose step sizes and decays are chosen so that it computes the
same. Figures are for one layer; inputs of all three are prepared outside the time.
"""

import argparse
import ctypes
from collections.abc import Callable
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scale import machine
from timing import seconds

from griffin_gguf.runtime.backends.scan import scan
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor

Array = NDArray[np.float32]


def blocked(g: Context, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The runtime's form."""
    out = g.scale(b, 1.0)  # it works in place, and a run must find its input again
    scan(g, g.scale(a, 1.0), out, h)
    return out


def chain(g: Context, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """Two nodes a token."""
    out, last = g.scale(b, 1.0), g.reshape(h, (1, b.shape[1]))
    for t in range(b.shape[0]):
        last = g.expand(g.add_into(g.rows(out, t, t + 1), g.mul(g.rows(a, t, t + 1), last)))
    return out


def ssm_scan(g: Context, dt: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """exp(softplus(dt)·A) = a and x·softplus(dt) = b, with A = -1 and B = C = 1; the input h is left as it is."""
    function = ctypes.CDLL(str(abi.library_folder() / "libggml-base.so.0")).ggml_ssm_scan
    function.restype, function.argtypes = ctypes.c_void_p, [*[ctypes.c_void_p] * 8, ctypes.c_int64]
    (count, width), one = x.shape, g.scale(g.unary("sqr", dt), 0.0, 1.0)
    ones = g.view(one, (1, count, 1, 1), (count, 1, 1), 0)
    minus = g.scale(g.view(one, (width, 1), (1,), 0), -1.0)
    ids = g.input((1,), abi.I32)
    handle = function(
        g.handle, g.reshape(h, (1, width, 1, 1)).handle, g.reshape(x, (1, count, width, 1)).handle,
        g.reshape(dt, (1, count, width)).handle, minus.handle, ones.handle, ones.handle, ids.handle, 1,
    )  # fmt: skip
    return Tensor(handle, (count * width + width,))


class Form:
    """One form as a graph."""

    def __init__(self, device: Device, build: Callable[..., Tensor], arrays: list[Array]) -> None:
        self._device, self._arrays, self._context = device, arrays, Context(8192, nodes=8192)
        self._inputs = [self._context.input(array.shape) for array in arrays]
        self._result = self._context.output(build(self._context, *self._inputs))
        self._allocator = device.allocator()
        self._allocator.place(self._context)
        self.nodes = len(self._context.nodes())

    def fill(self) -> None:
        """A run may overwrite its inputs."""
        for tensor, array in zip(self._inputs, self._arrays, strict=True):
            self._device.write(tensor, array)

    def run(self) -> None:
        """Compute."""
        self._device.run(self._context)

    def result(self, count: int) -> Array:
        """The first `count` values."""
        return self._device.read(self._result).reshape(-1)[:count]


def main() -> None:
    """Print time, nodes and error of each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--tokens", 512), ("--width", 2560), ("--rounds", 9)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(machine())
    random, shape = np.random.default_rng(0), (arguments.tokens, arguments.width)
    a, b = random.uniform(0.5, 0.999, shape), random.standard_normal(shape)
    h = random.standard_normal(arguments.width)
    exact, last = np.empty(shape), h
    for t in range(len(a)):
        last = exact[t] = a[t] * last + b[t]
    y = -np.log(a)
    given = {
        "blocked": (blocked, [a, b, h]), "chain": (chain, [a, b, h]),
        "ssm_scan": (ssm_scan, [y + np.log(-np.expm1(-y)), b / y, h]),
    }  # fmt: skip
    device = Device(arguments.threads)
    forms = {
        name: Form(device, build, [x.astype(np.float32) for x in arrays]) for name, (build, arrays) in given.items()
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(arguments.rounds):
        for name, form in forms.items():
            form.fill()
            times[name].append(seconds(form.run))
    for name, form in forms.items():
        error = np.abs(form.result(exact.size) - exact.reshape(-1)).max() / np.abs(exact).max()
        print(f"{name:9} {median(times[name]) * 1e3:8.2f} ms (min {min(times[name]) * 1e3:.2f}), "
              f"{form.nodes:5} nodes, error {error:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
