"""What ggml's Metal backend computes, as a table, and a look into a graph's nodes to hold against it.

The facts are those of `ggml_metal_device_supports_op` in ggml-metal/ggml-metal-device.m, and of the assertions in
ggml-metal-ops.cpp that end a process where that function has not looked, in ggml 0.25.3 (llama-cpp-python 0.3.36), for
GPUs of Apple silicon: M1 (family Apple7) and later, which have simdgroup reductions, simdgroup matrices and bfloat.
"""  # fmt: skip

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

#: The release whose sources the table was made from: another one needs another look.
SOURCE = "0.25.3"

_VIEWS = ("NONE", "RESHAPE", "VIEW", "TRANSPOSE", "PERMUTE")
_FLOATS = frozenset({T.F32, T.F16})
_F32 = frozenset({T.F32})
_LEGACY = frozenset({T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0})
_RING = frozenset({T.F32, T.F16, T.BF16, T.IQ4_NL}) | _LEGACY
#: Types of weights for which there are kernels that multiply and that pick rows.
_WEIGHTS = frozenset({
    T.F32, T.F16, T.BF16, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S,
    T.IQ1_S, T.IQ1_M, T.IQ4_NL, T.IQ4_XS, T.MXFP4,
}) | _LEGACY  # fmt: skip
_HEADS = frozenset({32, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576})


class _Struct(ctypes.Structure):
    """`struct ggml_tensor` of that release, as far as it is read."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


@dataclass(frozen=True)
class Node:
    """An operation, or an operand: its name as `ggml_op_desc` has it, type, `ne` and `nb`, fastest dimension first."""

    op: str
    type: T
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    src: tuple["Node", ...] = ()

    @property
    def dense_rows(self) -> bool:
        """`ggml_is_contiguous_rows`: an element lies right behind the one before it."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.ne[0] == block or self.nb[0] == size

    @property
    def transposed(self) -> bool:
        """`ggml_is_transposed`."""
        return self.nb[0] > self.nb[1]

    def __str__(self) -> str:
        return f"{self.op} of " + ", ".join(f"{s.type.name} {list(s.ne)}" for s in self.src) + f" to {self.type.name}"


def node(lib: object, handle: int) -> Node:
    """The node at `handle`, with its operands."""
    raw = _Struct.from_address(handle)
    return _plain(lib, handle, tuple(_plain(lib, s) for s in raw.src if s))


def _plain(lib: object, handle: int, src: tuple[Node, ...] = ()) -> Node:
    raw = _Struct.from_address(handle)
    name: str = lib.ggml_op_desc(handle).decode()  # pyright: ignore[reportAttributeAccessIssue]
    return Node(name, T(raw.type), tuple(raw.ne), tuple(raw.nb), src)


@dataclass(frozen=True)
class Rule:
    """When an operation is computed: types of each operand (in order) and of the result, which rows must be dense."""

    operands: tuple[frozenset[T], ...]
    result: frozenset[T] = _F32
    dense: tuple[int, ...] = ()
    also: Callable[[Node], bool] = field(default=lambda _: True)

    def allows(self, op: Node) -> bool:
        """Whether this operation fits."""
        return (
            len(op.src) >= len(self.operands)
            and all(s.type in types for s, types in zip(op.src, self.operands, strict=False))
            and op.type in self.result
            and all(op.src[i].dense_rows for i in self.dense)
            and self.also(op)
        )


def _broadcasts(op: Node) -> bool:
    matrix, x = op.src[:2]
    return matrix.ne[0] == x.ne[0] and all(x.ne[i] % matrix.ne[i] == 0 for i in (2, 3)) and not matrix.transposed


def _attends(op: Node) -> bool:
    q, k, v, mask = op.src[:4]
    return (
        q.ne[0] in _HEADS
        and k.ne[0] >= v.ne[0]
        and k.type is v.type
        and k.ne[1:3] == v.ne[1:3]
        and mask.ne[1] >= q.ne[1]
        and q.ne[1] < 65536
    )


_ELEMENTWISE = Rule((_FLOATS,), _FLOATS, dense=(0,))
_BINARY = Rule((_FLOATS, _FLOATS), _FLOATS, (0, 1), lambda op: op.src[0].type is op.src[1].type)
_COPY = Rule(
    (_FLOATS,), _RING, also=lambda op: op.src[0].type is T.F32 or op.type in _FLOATS  # f16 to f16 or f32 only
)  # fmt: skip

#: Operation -> when Metal computes it. What is not here it may compute too, but our graphs have no need of it.
TABLE = {
    **dict.fromkeys(("SCALE", "SQR", "SQRT", "EXP", "SIGMOID", "TANH"), _ELEMENTWISE),
    **dict.fromkeys(("ADD", "SUB", "MUL", "DIV"), _BINARY),
    **dict.fromkeys(("CPY", "CONT"), _COPY),
    "SWIGLU": Rule((_FLOATS, _FLOATS), _FLOATS, (0, 1), lambda op: op.src[0].ne == op.src[1].ne),
    "RMS_NORM": Rule((_F32,), dense=(0,)),
    "SOFT_MAX": Rule((_F32,), dense=(0,), also=lambda op: all(s.type in _FLOATS for s in op.src)),
    "CONCAT": Rule((_FLOATS, _FLOATS), _FLOATS, also=lambda op: op.src[0].type is op.src[1].type is op.type),
    "GET_ROWS": Rule((_WEIGHTS | {T.I32}, frozenset({T.I32}))),
    "SET_ROWS": Rule((_F32, frozenset({T.I64, T.I32})), _RING),
    "MUL_MAT": Rule((_WEIGHTS, _F32), also=_broadcasts),
    "SSM_CONV": Rule((_F32, _F32)),
    "FLASH_ATTN_EXT": Rule((_F32, _FLOATS | _LEGACY, _FLOATS | _LEGACY, frozenset({T.F16})), also=_attends),
}


def computes(op: Node) -> bool:
    """Whether Metal computes this node."""
    if op.op in _VIEWS:
        return True
    return op.op in TABLE and prod(op.ne) > 0 and TABLE[op.op].allows(op)
