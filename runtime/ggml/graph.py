"""Tensors with shapes, and the operations of ggml that Griffin needs.

ggml offers no getter for a tensor's shape or type, so both are kept here. Shapes are NumPy's (slowest
dimension first), the reverse of ggml's `ne`; an operation checks them before the call, since ggml itself
would end the process. All data named here is dense unless a view says otherwise.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi

_BYTES = {abi.F32: 4, abi.F16: 2, abi.I32: 4, abi.I64: 8}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A `ggml_tensor *` with its shape (NumPy order, 1 to 4 dimensions) and ggml type.

    A view lies `offset` bytes into the tensor whose handle is `root`.
    """

    handle: int
    shape: tuple[int, ...]
    type: int = abi.F32
    root: int = 0  # 0: itself
    offset: int = 0

    @property
    def owner(self) -> int:
        """The handle of the tensor that has the memory."""
        return self.root or self.handle


class Context:
    """A `ggml_context` for `tensors` headers and, where `nodes` is given, one graph of that many nodes.

    It holds no data: a buffer (weights, state) or the graph allocator gives each tensor its place.

    An operation in place returns a view, and the allocator gives memory back only when each of its views has been read.
    So whatever views a tensor later does it through the latest such result: nothing stays alive for want of a reader,
    and the order of the writes is in the graph.
    """

    _handle: int | None = None

    def __init__(self, tensors: int, nodes: int = 0) -> None:
        self.lib = abi.load()
        graph_bytes = self.lib.ggml_graph_overhead_custom(nodes, False) if nodes else 0
        nbytes = self.lib.ggml_tensor_overhead() * tensors + graph_bytes
        try:
            memory = np.empty(nbytes, np.uint8)  # ggml, asked for it, would end the process
        except MemoryError:
            raise BackendError(f"ggml: no memory for a graph of {tensors} tensors, {nbytes:,} bytes") from None
        self._memory: NDArray[np.uint8] | None = memory
        self._handle = self.lib.ggml_init(abi.InitParams(nbytes, memory.ctypes.data, True))
        if not self._handle:
            raise BackendError("ggml: out of memory for a context")
        self.graph: int = self.lib.ggml_new_graph_custom(self._handle, nodes, False) if nodes else 0
        self._latest: dict[int, Tensor] = {}  # by owner: what the last operation in place on it returned
        self.in_place: dict[int, int] = {}  # nodes that write into a tensor, by owner: only where it lies can they run
        self.begins: list[tuple[int, int]] = [(0, -1)]  # see `begin`

    @property
    def handle(self) -> int:
        """The `ggml_context *`."""
        assert self._handle, "used after close()"
        return self._handle

    @property
    def nbytes(self) -> int:
        """Bytes of the headers made so far and of the graph; what is held for more of them has not been touched."""
        return self.lib.ggml_used_mem(self.handle)

    def close(self) -> None:
        """Free every header; handles of this context are dead after it."""
        if self._handle:
            self.lib.ggml_free(self._handle)
            self._handle = self._memory = None

    def __del__(self) -> None:
        self.close()

    # -- tensors ------------------------------------------------------------------------------------

    def new(self, shape: Sequence[int], type: int = abi.F32) -> Tensor:
        """A tensor without data yet."""
        assert 1 <= len(shape) <= 4, shape
        assert all(n > 0 for n in shape), shape
        ne = (ctypes.c_int64 * len(shape))(*reversed(shape))
        handle = self.lib.ggml_new_tensor(self.handle, type, len(shape), ctypes.addressof(ne))
        return Tensor(handle, tuple(shape), type)

    def input(self, shape: Sequence[int], type: int = abi.F32) -> Tensor:
        """A tensor that the caller fills before each run of the graph."""
        tensor = self.new(shape, type)
        self.lib.ggml_set_input(tensor.handle)
        return tensor

    def view(self, x: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> Tensor:
        """Part of `x`: `strides` (all but the innermost, which is dense) and `offset` count elements."""
        assert len(strides) == len(shape) - 1, (shape, strides)
        assert offset + sum((n - 1) * s for n, s in zip(shape, (*strides, 1), strict=True)) < prod(x.shape), (x, shape)
        size = _BYTES[x.type]
        ne = [*reversed(shape), 1, 1, 1][:4]
        nb = [s * size for s in reversed(strides)]
        while len(nb) < 3:
            nb.append((nb[-1] if nb else size) * ne[len(nb)])
        base, start = self._latest.get(x.owner, x), x.offset + offset * size
        # ggml adds the offsets of views of views as size_t: one before the base's own wraps around, and is right.
        handle = self.lib.ggml_view_4d(self.handle, base.handle, *ne, *nb, (start - base.offset) % (1 << 64))
        return Tensor(handle, tuple(shape), x.type, x.owner, start)

    def latest(self, x: Tensor) -> Tensor:
        """A dense `x` after all that was done in place on it."""
        return self.reshape(x, x.shape) if x.owner in self._latest else x

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a dense `x` [T, ...]."""
        width = prod(x.shape[1:])
        shape = (stop - start, *x.shape[1:])
        strides = [prod(x.shape[i + 1 :]) for i in range(len(x.shape) - 1)]
        return self.view(x, shape, strides, start * width)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same dense data under another shape."""
        assert prod(shape) == prod(x.shape), (x.shape, shape)
        if x.owner in self._latest:
            return self.view(x, shape, [prod(shape[i + 1 :]) for i in range(len(shape) - 1)], 0)
        ne = [*reversed(shape), 1, 1, 1][:4]
        return Tensor(self.lib.ggml_reshape_4d(self.handle, x.handle, *ne), tuple(shape), x.type, x.owner, x.offset)

    def swap(self, x: Tensor) -> Tensor:
        """The two slowest dimensions of a 3-D `x` exchanged, as a strided view."""
        a, b, c = x.shape
        return Tensor(self.lib.ggml_permute(self.handle, x.handle, 0, 2, 1, 3), (b, a, c), x.type, x.owner, x.offset)

    def transpose(self, x: Tensor) -> Tensor:
        """[A, B] -> [B, A], as a strided view."""
        a, b = x.shape
        return Tensor(self.lib.ggml_permute(self.handle, x.handle, 1, 0, 2, 3), (b, a), x.type, x.owner, x.offset)

    def dense(self, x: Tensor) -> Tensor:
        """A contiguous copy of a view."""
        return Tensor(self.lib.ggml_cont(self.handle, x.handle), x.shape, x.type)

    # -- arithmetic ---------------------------------------------------------------------------------

    def unary(self, op: str, x: Tensor) -> Tensor:
        """sqr or sigmoid of each element."""
        return Tensor(getattr(self.lib, f"ggml_{op}")(self.handle, x.handle), x.shape)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, `y` repeated over the leading dimensions of `x`."""
        return self._binary("add", x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """x · y element by element, `y` repeated over the leading dimensions of `x`."""
        return self._binary("mul", x, y)

    def add_into(self, x: Tensor, y: Tensor) -> Tensor:
        """x += y; the result is `x` at the same place, to be used in its stead."""
        return self._binary("add_inplace", x, y)

    def mul_into(self, x: Tensor, y: Tensor) -> Tensor:
        """x ·= y; the result is `x` at the same place, to be used in its stead."""
        return self._binary("mul_inplace", x, y)

    def sub_into(self, x: Tensor, y: Tensor) -> Tensor:
        """x -= y; the result is `x` at the same place, to be used in its stead."""
        return self._binary("sub_inplace", x, y)

    def div_into(self, x: Tensor, y: Tensor) -> Tensor:
        """x /= y; the result is `x` at the same place, to be used in its stead."""
        return self._binary("div_inplace", x, y)

    def unary_into(self, op: str, x: Tensor) -> Tensor:
        """exp, sqrt or sigmoid of each element, at the place of `x`; the result is to be used in its stead."""
        return self._in_place(self.unary(f"{op}_inplace", x).handle, x)

    def scale_into(self, x: Tensor, factor: float, bias: float = 0.0) -> Tensor:
        """x = factor · x + bias; the result is `x` at the same place, to be used in its stead."""
        return self._in_place(self.lib.ggml_scale_bias_inplace(self.handle, x.handle, factor, bias), x)

    def round_into(self, x: Tensor, type: int) -> Tensor:
        """x = `x` rounded to the precision of `type`; the result is `x` at the same place, to be used in its stead."""
        short = self.lib.ggml_cast(self.handle, x.handle, type)
        return self._in_place(self.lib.ggml_cpy(self.handle, short, x.handle), x)

    def _in_place(self, handle: int, x: Tensor) -> Tensor:
        """Note that an operation in place on `x` has returned `handle`."""
        self.in_place[handle] = x.owner
        self._latest[x.owner] = Tensor(handle, x.shape, x.type, x.owner, x.offset)
        return self._latest[x.owner]

    def _binary(self, op: str, x: Tensor, y: Tensor) -> Tensor:
        padded = (1,) * (len(x.shape) - len(y.shape)) + y.shape
        assert all(n % m == 0 for n, m in zip(x.shape, padded, strict=True)), (op, x.shape, y.shape)
        result = Tensor(getattr(self.lib, f"ggml_{op}")(self.handle, x.handle, y.handle), x.shape)
        return self._in_place(result.handle, x) if op.endswith("_inplace") else result

    def scale(self, x: Tensor, factor: float, bias: float = 0.0) -> Tensor:
        """factor · x + bias."""
        return Tensor(self.lib.ggml_scale_bias(self.handle, x.handle, factor, bias), x.shape)

    def matmul(self, weight: Tensor, x: Tensor) -> Tensor:
        """x @ weight.T: weight [.., M, K] of any type, x [.., T, K] -> [.., T, M] in f32.

        Of several weights, each serves as many of the x as their numbers are multiples of each other.
        """
        assert weight.shape[-1] == x.shape[-1], (weight.shape, x.shape)
        assert len(weight.shape) == len(x.shape), (weight.shape, x.shape)
        assert all(n % m == 0 for n, m in zip(x.shape[:-2], weight.shape[:-2], strict=True)), (weight.shape, x.shape)
        shape = (*x.shape[:-1], weight.shape[-2])
        return Tensor(self.lib.ggml_mul_mat(self.handle, weight.handle, x.handle), shape)

    def gelu_gate(self, x: Tensor, y: Tensor, *, own_x: bool = False, own_y: bool = False) -> Tensor:
        """gelu_tanh(x) · y, exact to f32: gelu_tanh(x) = x·σ(u) with u = x·s, s = 2·sqrt(2/π)·(1 + 0.044715 x²).

        So it is u·σ(u) · y/s. ggml's own gelu reads a table of f16, off by up to 5e-4 of the value. What the caller
        owns of `x` and `y` is overwritten.
        """
        assert x.shape == y.shape, (x.shape, y.shape)
        slope = 2 * sqrt(2 / pi)
        s = self.scale_into(self.unary("sqr", x), 0.044715 * slope, slope)
        v = self.div_into(y, s) if own_y else self._binary("div", y, s)
        u = self.mul_into(x, s) if own_x else self.mul(x, s)
        return Tensor(self.lib.ggml_swiglu_split(self.handle, u.handle, v.handle), x.shape)

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """x · rsqrt(mean x² + eps) over the last dimension."""
        return Tensor(self.lib.ggml_rms_norm(self.handle, x.handle, eps), x.shape)

    # -- rows, convolution, attention ---------------------------------------------------------------

    def get_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows `ids` (i32 [T]) of `table` [V, H], dequantized: f32 [T, H]."""
        assert ids.type == abi.I32, ids
        return Tensor(self.lib.ggml_get_rows(self.handle, table.handle, ids.handle), (ids.shape[0], table.shape[1]))

    def set_rows(self, table: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        """Write `values` [T, J] to rows `ids` (i64 [T]) of `table` [R, J]; the result is `table` after it."""
        assert ids.type == abi.I64, ids
        assert table.shape[1] == values.shape[1], (table.shape, values.shape)
        handle = self.lib.ggml_set_rows(self.handle, table.handle, values.handle, ids.handle)
        return self._in_place(handle, table)

    def concat(self, x: Tensor, y: Tensor) -> Tensor:
        """`x` [.., A] before `y` [.., B] along the last dimension."""
        assert x.shape[:-1] == y.shape[:-1], (x.shape, y.shape)
        handle = self.lib.ggml_concat(self.handle, x.handle, y.handle, 0)
        return Tensor(handle, (*x.shape[:-1], x.shape[-1] + y.shape[-1]), x.type)

    def stack(self, x: Tensor, y: Tensor) -> Tensor:
        """The rows of `x` [A, W] before those of `y` [B, W]."""
        assert len(x.shape) == 2, x.shape
        assert x.shape[1] == y.shape[1], (x.shape, y.shape)
        handle = self.lib.ggml_concat(self.handle, x.handle, y.handle, 1)
        return Tensor(handle, (x.shape[0] + y.shape[0], x.shape[1]), x.type)

    def conv(self, x: Tensor, taps: Tensor) -> Tensor:
        """Depthwise: x [S, W, C-1+T], taps [W, C] -> [S, T, W], sum over k of taps[:, k] · x[.., t+k]."""
        texts, width, length = x.shape
        handle = self.lib.ggml_ssm_conv(self.handle, x.handle, taps.handle)
        return Tensor(handle, (texts, length - taps.shape[1] + 1, width))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """softmax(scale · q kᵀ + mask) v: q [N, T, D], k and v [K, R, D], mask f16 [T, R] -> [T, N, D].

        ggml's flash attention, which never holds the scores.
        """
        heads, count, width = q.shape
        assert mask.type == abi.F16, mask
        assert mask.shape == (count, k.shape[1]), (mask.shape, q.shape, k.shape)
        handle = self.lib.ggml_flash_attn_ext(self.handle, q.handle, k.handle, v.handle, mask.handle, scale, 0.0, 0.0)
        return Tensor(handle, (count, heads, width))

    def plain_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """The same by two products and a softmax: `k` and `v` meet the values in their own type."""
        _, count, width = q.shape
        assert mask.type == abi.F16, mask
        assert mask.shape == (count, k.shape[1]), (mask.shape, q.shape, k.shape)
        scores = self.matmul(k, q)  # [N, T, R]
        weights = self.lib.ggml_soft_max_ext(self.handle, scores.handle, mask.handle, scale, 0.0)
        turned = self.lib.ggml_cont(self.handle, self.lib.ggml_permute(self.handle, v.handle, 1, 0, 2, 3))
        across = Tensor(turned, (v.shape[0], width, v.shape[1]), v.type)  # [K, D, R]
        return self.dense(self.swap(self.matmul(across, Tensor(weights, scores.shape))))

    # -- the graph ----------------------------------------------------------------------------------

    def expand(self, x: Tensor) -> Tensor:
        """Put `x`, and whatever it needs, next in the graph's order; returns `x`."""
        self.lib.ggml_build_forward_expand(self.graph, x.handle)
        return x

    def store(self, value: Tensor, target: Tensor) -> None:
        """Copy `value` into a tensor that outlives the graph, at this point of its order."""
        assert prod(value.shape) == prod(target.shape), (value.shape, target.shape)
        handle = self.lib.ggml_cpy(self.handle, value.handle, target.handle)
        self.expand(self._in_place(handle, target))

    def begin(self, layer: int, x: Tensor) -> None:
        """What comes into the graph after `x`, the last value of what is before, belongs to `layer`.

        Before the first one it belongs to none, layer -1: the embedding. Several devices divide a graph there.
        """
        self.expand(x)
        self.begins.append((self.lib.ggml_graph_n_nodes(self.graph), layer))

    def is_used(self, x: Tensor) -> bool:
        """Whether some node of the placed graph reads the input `x`: only then has it memory."""
        return self.lib.ggml_get_data(x.handle) is not None

    def output(self, x: Tensor) -> Tensor:
        """Mark `x` as read by the caller after the run."""
        self.lib.ggml_set_output(x.handle)
        return self.expand(x)

    def nodes(self) -> list[int]:
        """The handles of the graph's nodes, in order."""
        lib: Any = self.lib
        return [lib.ggml_graph_node(self.graph, i) for i in range(lib.ggml_graph_n_nodes(self.graph))]
