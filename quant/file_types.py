"""The file types: which role gets which tensor type in a file of which type. One table.

For everything that llama-quantize's policy speaks of (llama.cpp, src/llama-quant.cpp) it gives what that gives.
The policy says nothing of the recurrence: those rows are ours, chosen by tools/measure_recurrence.py, and
docs/quantization.md has the measurement.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType, LlamaFileType
from gguf import GGMLQuantizationType as T

from griffin_gguf.runtime.arch import Hyperparameters, Role
from griffin_gguf.runtime.errors import UnsupportedError

#: A GGUF's keys: (value, type, element type of an array).
Metadata = dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]

#: Key that says in words what general.file_type cannot: that single tensors' types were chosen.
RECIPE = "griffin.recipe"


@dataclass(frozen=True)
class Case:
    """What a rule may ask about: the i-th of the n tensors of its role, in a file with an importance matrix or not."""

    i: int
    n: int
    hp: Hyperparameters
    imatrix: bool


Condition = Callable[[Case], bool]


def _always(case: Case) -> bool:
    return True


def _more_bits(case: Case) -> bool:
    """Hold for the first and the last eighth, and every third between (llama.cpp: `use_more_bits`)."""
    i, n = case.i, case.n
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(count: int) -> Condition:
    return lambda case: case.i < count


def _first_part(parts: int) -> Condition:
    """Hold for the first n // parts."""
    return lambda case: case.i < case.n // parts


def _middle(case: Case) -> bool:
    """Hold for all but the first and the last eighth."""
    return case.n // 8 <= case.i < 7 * case.n // 8


def _grouped(case: Case) -> bool:
    """Hold where four or more query heads share a key/value head: the tensor is small, and much hangs on it."""
    return case.hp.heads // case.hp.kv_heads >= 4


def _with_imatrix(condition: Condition) -> Condition:
    return lambda case: case.imatrix and condition(case)


def _without_imatrix(condition: Condition) -> Condition:
    return lambda case: not case.imatrix and condition(case)


@dataclass(frozen=True)
class Rule:
    """A type, and when it is taken."""

    type: T
    when: Condition = _always


Rules = Mapping[Role, tuple[Rule, ...]]


@dataclass(frozen=True)
class FileType:
    """One row of `FILE_TYPES`: of a role's rules the first that holds decides, else `default`.

    `note` says in a few words what it is for. `importance` are tensor types that, in a file of this type, are too
    coarse to be chosen without an importance matrix, the head and the embedding excepted.
    """

    name: str
    id: LlamaFileType  # general.file_type
    default: T
    note: str
    rules: Rules = field(default_factory=dict[Role, tuple[Rule, ...]])
    importance: frozenset[T] = frozenset({T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS})

    @property
    def quantized(self) -> bool:
        """Whether its matrices are quantized: not so for F32, F16 and BF16."""
        return self.default not in PLAIN

    @property
    def needs_importance(self) -> bool:
        """Whether some tensor of the file may get a type that is too coarse without an importance matrix."""
        inner = (rules for role, rules in self.rules.items() if role not in (Role.EMBEDDING, Role.OUTPUT))
        return not self.importance.isdisjoint({self.default, *(rule.type for rules in inner for rule in rules)})

    @property
    def metadata(self) -> Metadata:
        """The keys by which a GGUF says that it is of this type."""
        return {
            "general.file_type": (int(self.id), GGUFValueType.UINT32, None),
            "general.quantization_version": (GGML_QUANT_VERSION, GGUFValueType.UINT32, None),
        }


#: Types that hold what the model was trained to, or nearly.
PLAIN = frozenset({T.F32, T.F16, T.BF16})

#: Roles that no file type quantizes: they are small, and the recurrence runs through them.
ALWAYS_F32 = frozenset({Role.VECTOR, Role.CONV})


def _all(type: T) -> tuple[Rule, ...]:
    return (Rule(type),)


def _rules(*tables: Rules, head: T = T.Q6_K) -> Rules:
    """The rules of a quantized file: `head` for the head, gates in Q8_0 (they cost little, and run at every step)."""
    merged: dict[Role, tuple[Rule, ...]] = {Role.OUTPUT: _all(head), Role.RECURRENT_GATE: _all(T.Q8_0)}
    for table in tables:
        merged.update(table)
    return merged


_ATTN_Q, _ATTN_K, _ATTN_V, _ATTN_OUTPUT = Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUTPUT
_FFN_GATE, _FFN_UP, _FFN_DOWN = Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN

_MEDIUM: Rules = {_ATTN_V: (Rule(T.Q6_K, _more_bits),), _FFN_DOWN: (Rule(T.Q6_K, _more_bits),)}
_IQ4: Rules = {
    _ATTN_V: (Rule(T.Q5_K, _grouped),),
    _FFN_DOWN: (Rule(T.Q5_K, _without_imatrix(_first_part(8))),),
}


def _tiny(small: T, output: T | None, embedding: T) -> Rules:
    """The rules of 1 and 2 bits: `small` for what can bear no less, `output` for attn_output where it differs."""
    rules = {
        Role.EMBEDDING: _all(embedding),
        _ATTN_V: (Rule(T.Q4_K, _grouped), Rule(small)),
        _FFN_DOWN: (Rule(small, _first_part(8)),),
    }
    return _rules(rules, {_ATTN_OUTPUT: _all(output)} if output else {}, head=T.Q5_K)


_F = LlamaFileType

#: Every file type we write, largest first. A tied embedding goes by the rules of `Role.OUTPUT`.
FILE_TYPES: dict[str, FileType] = {
    row.name: row
    for row in (
        FileType("F32", _F.ALL_F32, T.F32, "nothing is lost"),
        FileType("BF16", _F.MOSTLY_BF16, T.BF16, "what the published checkpoints hold"),
        FileType("F16", _F.MOSTLY_F16, T.F16, "for programs without BF16"),
        FileType("Q8_0", _F.MOSTLY_Q8_0, T.Q8_0, "hardly to be told from BF16", _rules(head=T.Q8_0)),
        FileType("Q6_K", _F.MOSTLY_Q6_K, T.Q6_K, "very close to BF16", _rules()),
        FileType("Q5_K_M", _F.MOSTLY_Q5_K_M, T.Q5_K, "small loss", _rules(_MEDIUM)),
        FileType("Q5_1", _F.MOSTLY_Q5_1, T.Q5_1, "older; Q5_K_M is better", _rules()),
        FileType("Q5_K_S", _F.MOSTLY_Q5_K_S, T.Q5_K, "small loss", _rules()),
        FileType("Q5_0", _F.MOSTLY_Q5_0, T.Q5_0, "older; Q5_K_S is better", _rules(
            {_FFN_DOWN: (Rule(T.Q5_1, _with_imatrix(_first_part(8))),)})),
        FileType("Q4_1", _F.MOSTLY_Q4_1, T.Q4_1, "older; Q4_K_M is better", _rules()),
        FileType("Q4_K_M", _F.MOSTLY_Q4_K_M, T.Q4_K, "the usual choice", _rules(_MEDIUM)),
        FileType("Q4_K_S", _F.MOSTLY_Q4_K_S, T.Q4_K, "a little smaller than Q4_K_M", _rules(
            {_ATTN_V: (Rule(T.Q5_K, _first(4)),), _FFN_DOWN: (Rule(T.Q5_K, _first_part(8)),)})),
        FileType("Q4_0", _F.MOSTLY_Q4_0, T.Q4_0, "older; fast on some processors", _rules(
            {_FFN_DOWN: (Rule(T.Q4_1, _with_imatrix(_first_part(8))),)})),
        FileType("IQ4_NL", _F.MOSTLY_IQ4_NL, T.IQ4_NL, "for rows that are no multiple of 256", _rules(_IQ4)),
        FileType("IQ4_XS", _F.MOSTLY_IQ4_XS, T.IQ4_XS, "smaller than Q4_K_S, nearly as good", _rules(_IQ4)),
        FileType("Q3_K_L", _F.MOSTLY_Q3_K_L, T.Q3_K, "noticeable loss", _rules(
            {_ATTN_V: _all(T.Q5_K), _FFN_DOWN: _all(T.Q5_K), _ATTN_OUTPUT: _all(T.Q5_K)})),
        FileType("Q3_K_M", _F.MOSTLY_Q3_K_M, T.Q3_K, "noticeable loss", _rules({
            _ATTN_V: (Rule(T.Q5_K, _first(2)), Rule(T.Q4_K)),
            _FFN_DOWN: (Rule(T.Q5_K, _first_part(16)), Rule(T.Q4_K)),
            _ATTN_OUTPUT: _all(T.Q4_K)})),
        FileType("IQ3_M", _F.MOSTLY_IQ3_M, T.IQ3_S, "noticeable loss", _rules({
            _ATTN_V: _all(T.Q4_K), _FFN_DOWN: (Rule(T.Q4_K, _first_part(8)),), _ATTN_OUTPUT: _all(T.Q4_K)})),
        FileType("Q3_K_S", _F.MOSTLY_Q3_K_S, T.Q3_K, "large loss", _rules()),
        FileType("IQ3_S", _F.MOSTLY_IQ3_S, T.IQ3_S, "better than Q3_K_S", _rules(
            {_ATTN_V: (Rule(T.Q4_K, _grouped),)})),
        FileType("IQ3_XS", _F.MOSTLY_IQ3_XS, T.IQ3_S, "large loss", _rules({
            _ATTN_V: (Rule(T.Q4_K, _grouped),), _ATTN_K: _all(T.IQ3_XXS), _ATTN_Q: _all(T.IQ3_XXS),
            _FFN_GATE: (Rule(T.IQ3_XXS, _middle),), _FFN_UP: (Rule(T.IQ3_XXS, _middle),)})),
        FileType("IQ3_XXS", _F.MOSTLY_IQ3_XXS, T.IQ3_XXS, "large loss", _rules({
            Role.EMBEDDING: _all(T.IQ3_S), _ATTN_Q: _all(T.IQ2_S), _ATTN_K: _all(T.IQ2_S), _ATTN_OUTPUT: _all(T.IQ3_S),
            _ATTN_V: (Rule(T.Q4_K, _grouped), Rule(T.IQ3_S, _without_imatrix(_always))),
            _FFN_DOWN: (Rule(T.Q4_K, _without_imatrix(_first_part(8))), Rule(T.Q3_K, _without_imatrix(_always))),
            }, head=T.Q5_K)),
        FileType("Q2_K", _F.MOSTLY_Q2_K, T.Q2_K, "large loss, no importance matrix needed", _rules({
            _ATTN_V: (Rule(T.Q4_K, _grouped), Rule(T.Q3_K)), _FFN_DOWN: _all(T.Q3_K), _ATTN_OUTPUT: _all(T.Q3_K),
            Role.RECURRENT_LINEAR: _all(T.Q3_K)})),  # in Q2_K they alone make half of the file's divergence
        FileType("Q2_K_S", _F.MOSTLY_Q2_K_S, T.Q2_K, "large loss", _rules(
            {_ATTN_V: (Rule(T.Q4_K, _grouped),), _FFN_DOWN: (Rule(T.Q4_K, _first_part(8)),)}),
            importance=frozenset({T.Q2_K})),
        FileType("IQ2_M", _F.MOSTLY_IQ2_M, T.IQ2_S, "very large loss", _tiny(T.IQ3_S, T.IQ3_S, T.IQ3_S)),
        FileType("IQ2_S", _F.MOSTLY_IQ2_S, T.IQ2_XS, "very large loss", _tiny(T.IQ3_S, T.IQ3_S, T.IQ3_S)),
        FileType("IQ2_XS", _F.MOSTLY_IQ2_XS, T.IQ2_XS, "very large loss", _tiny(T.Q2_K, None, T.Q2_K)),
        FileType("IQ2_XXS", _F.MOSTLY_IQ2_XXS, T.IQ2_XXS, "very large loss", _tiny(T.Q2_K, None, T.Q2_K)),
        FileType("IQ1_M", _F.MOSTLY_IQ1_M, T.IQ1_M, "for study", _tiny(T.Q2_K, T.IQ2_XXS, T.Q2_K)),
        FileType("IQ1_S", _F.MOSTLY_IQ1_S, T.IQ1_S, "for study", _tiny(T.Q2_K, T.IQ2_XXS, T.Q2_K)),
    )
}  # fmt: skip

#: What a tensor gets whose rows are no multiple of its type's block (the head: Q8_0); where that does not fit, F16.
FALLBACKS: dict[T, T] = {
    **dict.fromkeys((T.Q2_K, T.Q3_K), T.Q4_0),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
}

#: File types that llama.cpp has and a Griffin cannot be, with the reason.
_EXPERTS = "is llama.cpp's type for experts, and a Griffin has none; --tensor-type REGEX=MXFP4 gives it to others"
_ELSEWHERE = {"MXFP4": _EXPERTS, "MXFP4_MOE": _EXPERTS}


def file_type(name: str) -> FileType:
    """Return the file type of that name, in either case; `UnsupportedError` names the choices."""
    found = FILE_TYPES.get(name.upper())
    if found is None:
        reason = _ELSEWHERE.get(name.upper(), f"is no file type; choose one of {', '.join(FILE_TYPES)}")
        raise UnsupportedError(f"{name!r} {reason}")
    return found


def type_name(metadata: Mapping[str, Any]) -> str:
    """Name the file type of a GGUF as `FILE_TYPES` does: Q4_K_M for general.file_type 15; else its recipe in words."""
    if isinstance(words := metadata.get(RECIPE), str):
        return words
    number = metadata.get("general.file_type")
    if number not in set(LlamaFileType):
        return "unknown"
    return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
