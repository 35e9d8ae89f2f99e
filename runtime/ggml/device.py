"""A device of ggml: buffers, mapped weights, and running a graph."""

import ctypes

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.log import capture, last_error
from griffin_gguf.runtime.machine import compute_threads


class Buffer:
    """Memory of a device that holds tensors; freed with the object."""

    handle: int | None = None

    def __init__(self, handle: int | None, what: str) -> None:
        if not handle:
            raise BackendError(f"ggml: no memory for {what}{last_error()}")
        self._lib = abi.load()
        self.handle = handle

    def clear(self) -> None:
        """Fill with zero bytes."""
        self._lib.ggml_backend_buffer_clear(self.handle, 0)

    def close(self) -> None:
        """Give the memory back; tensors in it are dead after it."""
        if self.handle:
            self._lib.ggml_backend_buffer_free(self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.close()


class Device:
    """The best device there is (Metal on a Mac, else the CPU), with `threads` CPU threads."""

    _backend: int | None = None  # until ggml is loaded, which may fail

    def __init__(self, threads: int | None = None) -> None:
        self.lib = abi.load()
        capture(self.lib)
        self._backend = self.lib.ggml_backend_init_best()
        if not self._backend:
            raise BackendError("ggml: found no device to run on")
        self._device: int = self.lib.ggml_backend_get_device(self._backend)
        props = abi.DeviceProps()
        self.lib.ggml_backend_dev_get_props(self._device, ctypes.byref(props))
        self.name: str = props.name.decode()
        self.is_cpu: bool = props.type == abi.DEVICE_CPU
        self._maps: bool = props.caps.buffer_from_host_ptr
        self.threads = threads or compute_threads()
        self._set_threads(self.threads)

    def _set_threads(self, count: int) -> None:
        """Only the CPU's registry has this function; other devices schedule themselves."""
        registry = self.lib.ggml_backend_dev_backend_reg(self._device)
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if address:
            abi.SET_N_THREADS(address)(self._backend, count)

    @property
    def _buffer_type(self) -> int:
        return self.lib.ggml_backend_get_default_buffer_type(self._backend)

    def allocate(self, context: Context, what: str) -> Buffer:
        """Memory for every tensor of `context`; `what` they are, for the error when there is not enough."""
        handle = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context.handle, self._buffer_type)
        return Buffer(handle, what)

    def map(self, mapping: NDArray[np.uint8], largest: int) -> Buffer | None:
        """A buffer over a mapped file, not copied; None where the device cannot.

        `mapping` starts on a page and must outlive the buffer; `largest` is the largest tensor's size.
        """
        if not self._maps:
            return None
        address: int = mapping.ctypes.data
        buffer = Buffer(
            self.lib.ggml_backend_dev_buffer_from_host_ptr(self._device, address, mapping.nbytes, largest),
            "the mapped file",
        )
        self.lib.ggml_backend_buffer_set_usage(buffer.handle, abi.USAGE_WEIGHTS)
        return buffer

    def place(self, buffer: Buffer, tensor: Tensor, data: NDArray[np.uint8]) -> None:
        """Let `tensor` lie where `data`, a part of the mapped file under `buffer`, lies."""
        address: int = data.ctypes.data
        assert address % self.lib.ggml_backend_buffer_get_alignment(buffer.handle) == 0
        status = self.lib.ggml_backend_tensor_alloc(buffer.handle, tensor.handle, address)
        assert status == abi.STATUS_SUCCESS, status

    def alignment(self, buffer: Buffer) -> int:
        """What a tensor's address in `buffer` must be a multiple of."""
        return self.lib.ggml_backend_buffer_get_alignment(buffer.handle)

    def write(self, tensor: Tensor, data: NDArray[np.generic]) -> None:
        """Copy `data` (dense, of the tensor's type and size) into `tensor`."""
        assert data.flags.c_contiguous
        assert data.nbytes == self.lib.ggml_nbytes(tensor.handle), (data.nbytes, tensor)
        self.lib.ggml_backend_tensor_set(tensor.handle, data.ctypes.data, 0, data.nbytes)

    def read(self, tensor: Tensor) -> NDArray[np.float32]:
        """A copy of an f32 `tensor`."""
        assert tensor.type == abi.F32, tensor
        out = np.empty(tensor.shape, np.float32)
        self.lib.ggml_backend_tensor_get(tensor.handle, out.ctypes.data, 0, out.nbytes)
        return out

    def unsupported(self, context: Context) -> str | None:
        """The first operation of the context's graph that this device lacks, or None."""
        for node in context.nodes():
            if not self.lib.ggml_backend_dev_supports_op(self._device, node):
                return self.lib.ggml_op_desc(node).decode()
        return None

    def allocator(self) -> "Allocator":
        """A place for the intermediate values of graphs of one shape."""
        return Allocator(self.lib.ggml_gallocr_new(self._buffer_type))

    def run(self, context: Context) -> None:
        """Compute the context's graph; raises `BackendError` when the device fails."""
        status = self.lib.ggml_backend_graph_compute(self._backend, context.graph)
        if status != abi.STATUS_SUCCESS:
            raise BackendError(f"ggml: {self.name} failed to compute a graph: status {status}{last_error()}")

    def close(self) -> None:
        """Release the device; its buffers must be gone before."""
        if self._backend:
            self.lib.ggml_backend_free(self._backend)
            self._backend = None

    def __del__(self) -> None:
        self.close()


class Allocator:
    """`ggml_gallocr`: places intermediate values so that dead ones are overwritten.

    Two graphs of the same shape may share one: neither moves the other's tensors, and a graph's values
    are dead once its outputs are read.
    """

    def __init__(self, handle: int) -> None:
        self._lib = abi.load()
        self._handle: int | None = handle

    def place(self, context: Context) -> None:
        """Give every tensor of the graph its address; raises `BackendError` when memory runs out."""
        if not self._lib.ggml_gallocr_alloc_graph(self._handle, context.graph):
            raise BackendError(f"ggml: no memory for a graph's intermediate values{last_error()}")

    def close(self) -> None:
        """Give the memory back."""
        if self._handle:
            self._lib.ggml_gallocr_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
