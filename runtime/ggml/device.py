"""A device of ggml: buffers, mapped weights, and running a graph."""

import contextlib
import ctypes
import functools
from collections.abc import Generator, Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi, remote
from griffin_gguf.runtime.ggml.catalog import best, extra_buffer_types, find, library, memory_free, properties
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.log import capture, last_error
from griffin_gguf.runtime.machine import compute_threads

#: NumPy's types of the tensors that are read back.
DTYPES = {abi.F32: np.dtype(np.float32), abi.F16: np.dtype(np.float16)}


@contextlib.contextmanager
def unless_over() -> Generator[None]:
    """What is released on a server that went away is gone already, and so is all that the process held at its end."""
    try:
        yield
    except BackendError:
        if not remote.is_over():
            raise


class Buffer:
    """Memory of a device that holds tensors; freed with the object."""

    handle: int | None = None

    def __init__(self, lib: abi.Library, handle: int | None, what: str) -> None:
        if not handle:
            raise BackendError(f"ggml: no memory for {what}{last_error()}")
        self._lib = lib
        self.handle = handle

    def clear(self) -> None:
        """Fill with zero bytes."""
        self._lib.ggml_backend_buffer_clear(self.handle, 0)

    def close(self) -> None:
        """Give the memory back; tensors in it are dead after it."""
        if self.handle:
            with unless_over():
                self._lib.ggml_backend_buffer_free(self.handle)
            self.handle = None

    def __del__(self) -> None:
        self.close()


class Device:
    """The device of that name, else the best there is (Metal on a Mac, else the CPU), with `threads` CPU threads.

    `name` is one of ggml's, such as "CPU", "Metal" or "RPC0", or "rpc:HOST:PORT" for the first device of a server.
    Raises `BackendError` where there is none such.
    """

    _backend: int | None = None  # until ggml is loaded, which may fail
    _nothing: tuple[Context, Buffer] | None = None

    def __init__(self, threads: int | None = None, name: str | None = None) -> None:
        self._device = find(name) if name else best()
        props = properties(self._device)
        self.lib = library(self._device)
        capture(abi.load())
        self._backend = self.lib.ggml_backend_dev_init(self._device, None)
        self.name: str = props.name.decode()
        if not self._backend:
            raise BackendError(f"ggml: cannot start the device {self.name}{last_error()}")
        self.is_cpu: bool = props.type == abi.DEVICE_CPU
        self.is_remote = isinstance(self.lib, remote.RemoteLibrary)
        self._maps: bool = props.caps.buffer_from_host_ptr
        self.memory_free = memory_free(props)  # bytes at that time, 0 where it does not say
        self.threads = threads or compute_threads()
        self._set_threads(self.threads)

    @property
    def backend(self) -> int:
        """The `ggml_backend *`."""
        assert self._backend, "used after close()"
        return self._backend

    @property
    def devices(self) -> list["Device"]:
        """Itself alone: split.py has several."""
        return [self]

    def of_layer(self, layer: int) -> "Device":
        """Where the weights and the state of that layer lie."""
        return self

    @property
    def of_embedding(self) -> "Device":
        """Where tokens become rows of the embedding."""
        return self

    @property
    def of_head(self) -> "Device":
        """Where the last norm and the logits are computed."""
        return self

    def _set_threads(self, count: int) -> None:
        """Only the CPU's registry has this function; other devices schedule themselves."""
        registry = self.lib.ggml_backend_dev_backend_reg(self._device)
        address = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        if address:
            abi.SET_N_THREADS(address)(self._backend, count)

    @property
    def _buffer_type(self) -> int:
        return self.lib.ggml_backend_get_default_buffer_type(self.backend)

    def allocate(self, context: Context, what: str, *, weights: bool = False) -> Buffer:
        """Memory for every tensor of `context`; `what` they are, for the error when there is not enough.

        Of `weights`, ggml knows that they stay as they are once written.
        """
        handle = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context.handle, self._buffer_type)
        buffer = Buffer(self.lib, handle, what)
        if weights:
            self.lib.ggml_backend_buffer_set_usage(buffer.handle, abi.USAGE_WEIGHTS)
        return buffer

    def map(self, mapping: NDArray[np.uint8], largest: int) -> Buffer | None:
        """A buffer over a mapped file, not copied; None where the device cannot.

        `mapping` starts on a page and must outlive the buffer; `largest` is the largest tensor's size.
        """
        if not self._maps:
            return None
        address: int = mapping.ctypes.data
        buffer = Buffer(
            self.lib,
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
        assert data.nbytes == abi.load().ggml_nbytes(tensor.handle), (data.nbytes, tensor)
        self.lib.ggml_backend_tensor_set(tensor.handle, data.ctypes.data, 0, data.nbytes)

    def read(self, tensor: Tensor) -> NDArray[Any]:
        """A copy of an f32 or f16 `tensor`."""
        out = np.empty(tensor.shape, DTYPES[tensor.type])
        self.lib.ggml_backend_tensor_get(tensor.handle, out.ctypes.data, 0, out.nbytes)
        return out

    def read_rows(self, tensor: Tensor, start: int, stop: int) -> NDArray[Any]:
        """A copy of rows [start, stop) of an f32 or f16 `tensor` [T, W]."""
        assert 0 <= start < stop <= tensor.shape[0], (start, stop, tensor)
        out = np.empty((stop - start, tensor.shape[1]), DTYPES[tensor.type])
        offset = start * out.itemsize * tensor.shape[1]
        self.lib.ggml_backend_tensor_get(tensor.handle, out.ctypes.data, offset, out.nbytes)
        return out

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor into another of its shape and type."""
        assert (source.shape, source.type) == (target.shape, target.type), (source, target)
        self.lib.ggml_backend_tensor_copy(source.handle, target.handle)

    @cached_property
    def _repacking(self) -> int | None:
        """The buffer type that lays weights out in the order of the CPU's fastest kernels, where there is one."""
        types = extra_buffer_types(self._device)
        return next((t for t in types if self.lib.ggml_backend_buft_name(t) == b"CPU_REPACK"), None)

    def repacks(self, shape: tuple[int, ...], type: int) -> bool:
        """Whether a matrix of that shape and type may be put into repacking memory: ggml would crash on another."""
        rows, columns = shape
        return self._repacking is not None and self._repacks(16 + rows % 16, columns, type)

    @functools.cache  # noqa: B019 - a device lives as long as its model
    def _repacks(self, rows: int, columns: int, type: int) -> bool:
        """Ask of a small matrix of as many columns."""
        context = Context(4)
        weight = context.new((rows, columns), type)
        buffer = self.allocate_repacked(context, "a trial")
        product = context.matmul(weight, context.new((1, columns)))
        found = self.lib.ggml_backend_dev_supports_op(self._device, product.handle)
        buffer.close()
        return found

    def allocate_repacked(self, context: Context, what: str) -> Buffer:
        """As `allocate`, in repacking memory: `write` puts a tensor's rows into that order."""
        buffer = Buffer(
            self.lib, self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context.handle, self._repacking), what
        )
        self.lib.ggml_backend_buffer_set_usage(buffer.handle, abi.USAGE_WEIGHTS)
        return buffer

    def unsupported(self, context: Context, nodes: Iterable[int] | None = None) -> str | None:
        """The first operation of the context's graph, or of these nodes of it, that this device lacks, or None."""
        lib = abi.load()  # no server is asked for this
        for node in context.nodes() if nodes is None else nodes:
            if not lib.ggml_backend_dev_supports_op(self._device, node):
                return lib.ggml_op_desc(node).decode()
        return None

    def allocator(self) -> "Allocator":
        """A place for the intermediate values of graphs of one shape."""
        return Allocator(self.lib, self._buffer_type)

    def run(self, context: Context) -> None:
        """Compute the context's graph; raises `BackendError` when the device fails."""
        status = self.lib.ggml_backend_graph_compute(self.backend, context.graph)
        if status != abi.STATUS_SUCCESS:
            raise BackendError(f"ggml: {self.name} failed to compute a graph: status {status}{last_error()}")

    def forget_graph(self) -> None:
        """Compute next to nothing, so that a server's latest graph is another than any of ours: see split.py."""
        if self._nothing is None:
            context = Context(2, nodes=1)
            x = context.new((1,))
            context.expand(context.unary("sqr", x))
            self._nothing = context, self.allocate(context, "one number")
        abi.load().ggml_backend_graph_compute(self.backend, self._nothing[0].graph)

    def close(self) -> None:
        """Release the device; its buffers must be gone before."""
        self._nothing = None
        if self._backend:
            with unless_over():
                self.lib.ggml_backend_free(self._backend)
            self._backend = None

    def __del__(self) -> None:
        self.close()


class Allocator:
    """`ggml_gallocr`: places intermediate values so that dead ones are overwritten.

    Graphs may share one as long as it does not grow: a graph's values are dead once its outputs are read. `buffer_type`
    is the memory's.
    """

    def __init__(self, lib: abi.Library, buffer_type: int) -> None:
        self._lib, self._type = lib, buffer_type
        self._handle: int | None = lib.ggml_gallocr_new(buffer_type)

    def place(self, context: Context) -> None:
        """Give every tensor of the graph its address; raises `BackendError` when memory runs out."""
        if not self._lib.ggml_gallocr_alloc_graph(self._handle, context.graph):
            why = last_error()
            self.close()  # it has kept the plan that there was no memory for, and would follow it the next time
            self._handle = self._lib.ggml_gallocr_new(self._type)
            raise BackendError(f"ggml: no memory for a graph's intermediate values{why}")

    def measure(self, context: Context) -> int:
        """Bytes that the graph's values would take. Nothing is taken; an allocator that measures places no graph."""
        nbytes = ctypes.c_size_t()
        self._lib.ggml_gallocr_reserve_n_size(self._handle, context.graph, None, None, ctypes.addressof(nbytes))
        return nbytes.value

    @property
    def nbytes(self) -> int:
        """Bytes that are held; where they grow, what was placed before must be placed anew."""
        return self._lib.ggml_gallocr_get_buffer_size(self._handle, 0)

    def close(self) -> None:
        """Give the memory back."""
        if self._handle:
            with unless_over():
                self._lib.ggml_gallocr_free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()
