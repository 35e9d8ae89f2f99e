"""Recipes: which tensor gets which type in a file of which type. Tables, and one function that walks them.

For everything that llama-quantize's policy speaks of (llama.cpp, src/llama-quant.cpp) the tables give what it
gives. It says nothing of the recurrence: those rows are ours, chosen by tools/measure_recurrence.py, and
docs/gguf-format.md has the measurement. Norms, biases, decay and convolution are F32 in every file.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFValueType, LlamaFileType
from gguf import GGMLQuantizationType as T

from griffin_gguf.runtime.arch import Hyperparameters, Role, Tensor
from griffin_gguf.runtime.errors import UnsupportedError

#: Whether a rule holds for the i-th of the n tensors of its role.
Condition = Callable[[int, int, Hyperparameters], bool]

#: A GGUF's keys: (value, type, element type of an array).
Metadata = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]


def _always(i: int, n: int, hp: Hyperparameters) -> bool:
    return True


def _more_bits(i: int, n: int, hp: Hyperparameters) -> bool:
    """Hold for the first and the last eighth, and every third between (llama.cpp: `use_more_bits`)."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _grouped(i: int, n: int, hp: Hyperparameters) -> bool:
    """Hold where four or more query heads share a key/value head: the tensor is small, and much hangs on it."""
    return hp.heads // hp.kv_heads >= 4


@dataclass(frozen=True)
class Rule:
    """A type, and when it is taken."""

    type: T
    when: Condition = _always


@dataclass(frozen=True)
class FileType:
    """One row of `FILE_TYPES`: of a role's rules the first that holds decides, else `default`."""

    name: str
    id: LlamaFileType  # general.file_type
    default: T
    rules: Mapping[Role, tuple[Rule, ...]] = field(default_factory=dict[Role, tuple[Rule, ...]])

    @property
    def metadata(self) -> Metadata:
        """The keys by which a GGUF says that it is of this type."""
        return {
            "general.file_type": (int(self.id), GGUFValueType.UINT32, None),
            "general.quantization_version": (GGML_QUANT_VERSION, GGUFValueType.UINT32, None),
        }


#: Roles that no file type quantizes: they are small, and the recurrence runs through them.
ALWAYS_F32 = frozenset({Role.VECTOR, Role.CONV})

_Q6_K, _Q8_0 = (Rule(T.Q6_K),), (Rule(T.Q8_0),)
_SOME_Q6_K = (Rule(T.Q6_K, _more_bits),)
_MEDIUM = {
    Role.OUTPUT: _Q6_K,
    Role.ATTN_V: _SOME_Q6_K,
    Role.FFN_DOWN: _SOME_Q6_K,
    Role.RECURRENT_GATE: _Q8_0,
}

#: Every file type we write, largest first. A tied embedding goes by the rules of `Role.OUTPUT`.
FILE_TYPES: dict[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", LlamaFileType.ALL_F32, T.F32),
        FileType("BF16", LlamaFileType.MOSTLY_BF16, T.BF16),
        FileType("F16", LlamaFileType.MOSTLY_F16, T.F16),
        FileType("Q8_0", LlamaFileType.MOSTLY_Q8_0, T.Q8_0),
        FileType("Q5_K_M", LlamaFileType.MOSTLY_Q5_K_M, T.Q5_K, _MEDIUM),
        FileType("Q4_K_M", LlamaFileType.MOSTLY_Q4_K_M, T.Q4_K, _MEDIUM),
        FileType("Q2_K", LlamaFileType.MOSTLY_Q2_K, T.Q2_K, {
            Role.OUTPUT: _Q6_K,
            Role.ATTN_V: (Rule(T.Q4_K, _grouped), Rule(T.Q3_K)),
            Role.FFN_DOWN: (Rule(T.Q3_K),),
            Role.ATTN_OUTPUT: (Rule(T.Q3_K),),
            Role.RECURRENT_LINEAR: (Rule(T.Q3_K),),  # in Q2_K they alone make half of the file's divergence
            Role.RECURRENT_GATE: _Q8_0,
        }),
    )
}  # fmt: skip

#: What a tensor gets whose rows are no multiple of its type's block; where that does not fit either, F16.
FALLBACKS: dict[T, T] = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}


@dataclass(frozen=True)
class Planned:
    """A tensor, the type it is written in and its size there; `note` tells of a fallback."""

    tensor: Tensor
    type: T
    nbytes: int
    note: str = ""

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as 2-D."""
        return prod(self.tensor.shape[:-1])

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.tensor.shape[-1]


def file_type(name: str) -> FileType:
    """Return the file type of that name, in either case; `UnsupportedError` names the choices."""
    found = FILE_TYPES.get(name.upper())
    if found is None:
        raise UnsupportedError(f"{name!r} is no file type; choose one of {', '.join(FILE_TYPES)}")
    return found


def row_bytes(type: T, columns: int) -> int:
    """Bytes of a row of that many elements, a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[type]
    assert columns % block == 0, f"{columns} columns in blocks of {block}"
    return columns // block * size


def plan(hp: Hyperparameters, file_type: FileType) -> list[Planned]:
    """List every tensor of the model in file order, with the type that `file_type` gives it."""
    totals = Counter(tensor.role for tensor in hp.tensors())
    seen: Counter[Role] = Counter()
    planned: list[Planned] = []
    for tensor in hp.tensors():
        wanted = _wanted(tensor.role, seen[tensor.role], totals[tensor.role], hp, file_type)
        seen[tensor.role] += 1
        type, note = _fitting(wanted, tensor.shape[-1])
        nbytes = prod(tensor.shape[:-1]) * row_bytes(type, tensor.shape[-1])
        planned.append(Planned(tensor, type, nbytes, note))
    return planned


def _wanted(role: Role, i: int, n: int, hp: Hyperparameters, file_type: FileType) -> T:
    """Apply the rules, whatever the shape."""
    if role in ALWAYS_F32:
        return T.F32
    if role is Role.EMBEDDING and not hp.untied:
        role = Role.OUTPUT
    for rule in file_type.rules.get(role, ()):
        if rule.when(i, n, hp):
            return rule.type
    return file_type.default


def _fitting(wanted: T, columns: int) -> tuple[T, str]:
    """Give `wanted`, or what stands in for it where its blocks do not divide a row, and the note that says so."""
    block = GGML_QUANT_SIZES[wanted][0]
    if columns % block == 0:
        return wanted, ""
    type = FALLBACKS.get(wanted, T.F16)
    if columns % GGML_QUANT_SIZES[type][0]:
        type = T.F16
    return type, f"{type.name} instead of {wanted.name}, whose blocks of {block} do not divide rows of {columns}"
