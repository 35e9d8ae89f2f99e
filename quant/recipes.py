"""From a file type to a plan: every tensor of a model, in file order, with the type it gets and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from griffin_gguf.quant.file_types import ALWAYS_F32, FALLBACKS, Case, FileType
from griffin_gguf.runtime.arch import Hyperparameters, Role, Tensor


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


@dataclass(frozen=True)
class Choices:
    """What the person decides instead of the file type: `types` by tensor name, or `pure`, its default everywhere."""

    types: Mapping[str, T] = field(default_factory=dict[str, T])
    pure: bool = False


def row_bytes(type: T, columns: int) -> int:
    """Bytes of a row of that many elements, a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[type]
    assert columns % block == 0, f"{columns} columns in blocks of {block}"
    return columns // block * size


def plan(
    hp: Hyperparameters, file_type: FileType, choices: Choices = Choices(), *, imatrix: bool = False
) -> list[Planned]:
    """List every tensor of the model in file order, with the type that `file_type` or `choices` give it.

    `imatrix` says whether there is an importance matrix: some file types choose otherwise then.
    """
    totals = Counter(tensor.role for tensor in hp.tensors())
    seen: Counter[Role] = Counter()
    planned: list[Planned] = []
    for tensor in hp.tensors():
        case = Case(seen[tensor.role], totals[tensor.role], hp, imatrix)
        seen[tensor.role] += 1
        planned.append(planned_as(tensor, _wanted(tensor, case, file_type, choices), hp))
    return planned


def planned_as(tensor: Tensor, wanted: T, hp: Hyperparameters) -> Planned:
    """Plan a tensor in the type `wanted`, or in what stands in for it where blocks do not divide rows."""
    type, note = _fitting(wanted, tensor.shape[-1], T.Q8_0 if _is_head(tensor, hp) else FALLBACKS.get(wanted, T.F16))
    return Planned(tensor, type, prod(tensor.shape[:-1]) * row_bytes(type, tensor.shape[-1]), note)


def needs_importance(row: Planned, file_type: FileType) -> bool:
    """Whether llama.cpp's policy refuses this tensor of such a file without an importance matrix."""
    return row.type in file_type.importance and row.tensor.role not in (Role.EMBEDDING, Role.OUTPUT)


def _wanted(tensor: Tensor, case: Case, file_type: FileType, choices: Choices) -> T:
    """Apply the rules, whatever the shape."""
    if tensor.role in ALWAYS_F32:
        return T.F32
    if tensor.name in choices.types:
        return choices.types[tensor.name]
    if choices.pure:
        return file_type.default
    for rule in file_type.rules.get(Role.OUTPUT if _is_head(tensor, case.hp) else tensor.role, ()):
        if rule.when(case):
            return rule.type
    return file_type.default


def _is_head(tensor: Tensor, hp: Hyperparameters) -> bool:
    """Whether the logits come out of this tensor: a tied embedding goes by the head's rules."""
    return tensor.role is Role.OUTPUT or (tensor.role is Role.EMBEDDING and not hp.untied)


def _fitting(wanted: T, columns: int, stand_in: T) -> tuple[T, str]:
    """Give `wanted`, or `stand_in` where its blocks do not divide a row, and the note that says so."""
    block = GGML_QUANT_SIZES[wanted][0]
    if columns % block == 0:
        return wanted, ""
    type = stand_in if columns % GGML_QUANT_SIZES[stand_in][0] == 0 else T.F16
    return type, f"{type.name} instead of {wanted.name}, whose blocks of {block} do not divide rows of {columns}"
