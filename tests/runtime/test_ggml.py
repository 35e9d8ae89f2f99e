"""ggml by ctypes: the operations one by one against NumPy, the self-test, the blocked scan."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from griffins import NINE_B, TWO_B
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.runtime import state
from griffin_gguf.runtime.backends.scan import block_length, scan, scan_nodes
from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.device import Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.selftest import selftest

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(threads=1)


def compute(device: Device, build: Callable[..., Tensor], *arrays: Array, keep: int | None = None) -> list[Array]:
    """Run `build(context, *inputs)`; its result, and with `keep` also that input as the graph left it."""
    context = Context(4096, nodes=4096)
    inputs = [context.input(array.shape) for array in arrays]
    result = context.output(build(context, *inputs))
    allocator = device.allocator()
    allocator.place(context)
    for tensor, array in zip(inputs, arrays, strict=True):
        device.write(tensor, array)
    device.run(context)
    return [device.read(result)] + ([device.read(inputs[keep])] if keep is not None else [])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 530), seed=st.integers(0, 99))
def test_the_blocked_scan_equals_the_recurrence(device: Device, count: int, seed: int) -> None:
    width = 8
    a = np.random.default_rng(seed).uniform(0, 1, (count, width)).astype(np.float32)
    a[a > 0.9] = 1.0  # what is never forgotten must be carried over every block
    b, h = normal(count, width, seed=seed), normal(width, seed=seed + 1)
    expected, last = np.empty((count, width)), h.astype(np.float64)
    for t in range(count):
        last = expected[t] = a[t] * last + b[t]

    def build(context: Context, a: Tensor, b: Tensor, h: Tensor) -> Tensor:
        out = context.scale(b, 1.0)  # a copy, since the scan works in place
        scan(context, a, out, h)
        return out

    found, carried = compute(device, build, a, b, h, keep=2)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(carried, found[-1])


def test_the_scan_takes_few_nodes() -> None:
    assert block_length(1) == 1
    assert scan_nodes(512) < 120
    assert all(1 <= block_length(n) <= n for n in range(1, 600))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gelu_is_exact_to_f32(device: Device, scale: float) -> None:
    x, y = normal(7, 64) * np.float32(scale), normal(7, 64, seed=1)
    wide = x.astype(np.float64)
    expected = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) * y
    found = compute(device, lambda g, x, y: g.gelu_gate(x, y), x, y)[0]
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_a_view_beyond_its_tensor_is_caught_before_ggml(device: Device) -> None:
    context = Context(8)
    x = context.new((4, 8))
    with pytest.raises(AssertionError):
        context.view(x, (4, 4), (8,), 5)
    with pytest.raises(AssertionError):
        context.matmul(x, context.new((2, 9)))
    with pytest.raises(AssertionError):
        context.reshape(x, (5, 8))


def test_the_self_test_passes_here(device: Device) -> None:
    selftest(device)


def test_the_self_test_sees_arguments_in_another_order(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a release had exchanged the two numbers of ggml_scale_bias, which no linker would notice."""
    lib = abi.load()
    real = lib.ggml_scale_bias

    def exchanged(context: int, x: int, factor: float, bias: float) -> int:
        return real(context, x, bias, factor)

    monkeypatch.setattr(lib, "ggml_scale_bias", exchanged)
    with pytest.raises(BackendError, match=f"self-test.*{abi.GGML_VERSION}"):
        selftest(device)


def test_every_declared_function_is_there() -> None:
    lib = abi.load()
    assert lib.ggml_version().decode() == abi.GGML_VERSION
    assert ctypes.sizeof(abi.InitParams) == 24
    with pytest.raises(AttributeError, match="not declared"):
        _ = lib.ggml_mul_mat_id


def test_state_bytes_of_the_published_models() -> None:
    """docs/gguf-format.md's figures: 18 (26) RG-LRU layers of 4·4·W bytes, 8 (12) pairs of rings in f16."""
    assert state.nbytes(TWO_B, GGMLQuantizationType.F16) == 18 * 16 * 2560 + 8 * 2 * 2560 * 256 * 2
    assert state.nbytes(NINE_B, GGMLQuantizationType.F16) == 26 * 16 * 4096 + 12 * 2 * 2560 * 256 * 2


def test_what_ggml_says_ends_up_in_our_error_and_not_on_stderr(
    device: Device, capfd: pytest.CaptureFixture[str]
) -> None:
    context = Context(1)
    context.new((1 << 40, 1 << 6))
    with pytest.raises(BackendError, match=r"no memory for a test \(.*failed to allocate"):
        device.allocate(context, "a test")
    assert capfd.readouterr().err == ""
