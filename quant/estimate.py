"""What a model will take and how fast it can be, from its shapes alone: no weights are needed.

Sizes follow from the plan by which a file would be written, memory from graphs built over weights that lie nowhere
(`ggml_outline`) and from a process that has all but a model (`footprint`). Speeds are bounds: reading every weight once
a token at a given bandwidth, or the matrix products alone as fast as this machine does them (`rates`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as T
from gguf.utility import size_label

from griffin_gguf.quant.file_types import ALWAYS_F32, Metadata, file_type, type_name
from griffin_gguf.quant.footprint import Footprint, footprint, vocabulary
from griffin_gguf.quant.rates import Rates, measure_rates
from griffin_gguf.quant.recipes import Planned, plan
from griffin_gguf.quant.writer import ALIGNMENT, Output, file_size
from griffin_gguf.runtime import state as states
from griffin_gguf.runtime.arch import ARCHITECTURE, Hyperparameters, Role, to_metadata
from griffin_gguf.runtime.backends.ggml_outline import Outline
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.gguf_header import padded
from griffin_gguf.runtime.state import CHUNK

_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Layout:
    """A file as it is or would be: its type, its tensors with theirs, its size in bytes."""

    type: str
    rows: list[Planned]
    file_size: int


@dataclass(frozen=True)
class Memory:
    """What a process takes that runs a model, in bytes; the terms of `runtime.engine.Memory`, and what is beside them.

    `weights` are pages of the file, which the system may share, drop and read again; all else is allocated.
    """

    program: int
    vocabulary: int
    weights: int
    states: int
    logits: int
    buffers: int  # of passes over a chunk, and over a token of each text
    most_buffers: int  # the same where chunks are uneven and as many graphs are kept as ever are

    @property
    def total(self) -> int:
        """All of it, as after a chunk and some tokens."""
        return self.program + self.vocabulary + self.weights + self.states + self.logits + self.buffers

    @property
    def most(self) -> int:
        """All of it at any time."""
        return self.total - self.buffers + self.most_buffers


@dataclass(frozen=True)
class Estimate:
    """One type of a model. Sizes in bytes; speeds, tokens a second of all texts together, are upper bounds.

    `read` is what a token of each text reads: every weight once, and each text's state. `copies` are what repacked
    weights would add where `griffin bench --tune` takes them. `prefill` is None where a bandwidth was given.
    """

    type: str
    parameters: int
    bits_per_weight: float
    file_size: int
    state: int
    memory: Memory
    copies: int
    read: int
    decode: float
    prefill: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"memory": asdict(self.memory) | {"total": self.memory.total, "most": self.memory.most}}


def layouts(hp: Hyperparameters, types: Sequence[str], tokenizer: Metadata | None = None) -> list[Layout]:
    """The files of these types that a conversion would write, with the `tokenizer`'s keys or such as Gemma's.

    Where a type wants an importance matrix, there is to be one. Raises `UnsupportedError` for an unknown type.
    """
    kinds = [file_type(name) for name in types]
    keys = _keys(hp) | (vocabulary(hp.vocab) if tokenizer is None else tokenizer)
    plans = [plan(hp, kind, imatrix=kind.needs_importance) for kind in kinds]
    # A header is as long whatever the types: it is made once.
    first = Output(Path("model.gguf"), keys | kinds[0].metadata, plans[0])
    header = file_size(first) - _data_size(plans[0])
    return [Layout(kind.name, rows, header + _data_size(rows)) for kind, rows in zip(kinds, plans, strict=True)]


def layout_of(file: GgufFile) -> Layout:
    """The file as it is."""
    infos = file.tensors
    rows = [Planned(t, infos[t.name].type, infos[t.name].nbytes) for t in file.hyperparameters().tensors()]
    return Layout(type_name(file.metadata), rows, file.size)


def estimate(
    hp: Hyperparameters,
    found: Sequence[Layout],
    *,
    tokens: int,
    batch: int = 1,
    bandwidth: float | None = None,
    threads: int | None = None,
) -> list[Estimate]:
    """What each layout takes and how fast it can be, `batch` texts at once, each after `tokens` tokens.

    With a `bandwidth`, bytes a second, decoding is bound by that, else by products measured here on the CPU with
    `threads`, all cores unless given. Raises `UnsupportedError` for numbers out of range, `BackendError` where ggml
    cannot be loaded.
    """
    if not 1 <= batch <= CHUNK:
        raise UnsupportedError(f"batch: expected 1 to {CHUNK} texts, found {batch}")
    process = footprint(hp.vocab)
    rates = None
    if bandwidth is None:
        rates = measure_rates([row for layout in found for row in layout.rows], (batch, CHUNK), threads)
    case = _Case(hp, tokens, batch)
    return [case.estimate(layout, process, rates, bandwidth) for layout in found]


@dataclass(frozen=True)
class _Case:
    """What is asked: `batch` texts at once, each after `tokens` tokens."""

    hp: Hyperparameters
    tokens: int
    batch: int

    def estimate(self, layout: Layout, process: Footprint, rates: Rates | None, bandwidth: float | None) -> Estimate:
        hp, rows = self.hp, layout.rows
        types = {row.tensor.name: row.type for row in rows}
        kv = states.kv_type(types[_EMBEDDING])
        state = states.nbytes(hp, kv)
        with Outline(hp, types) as outline:
            buffers, copies = outline.buffers(self.batch), outline.repacked()
        memory = Memory(
            process.program, process.vocabulary, layout.file_size, self.batch * state, 3 * self.batch * 4 * hp.vocab,
            buffers.values + buffers.graphs + buffers.encoded, buffers.most + buffers.encoded,
        )  # fmt: skip
        texts = self.batch * self._state_read(kv)
        read = texts + sum(row.nbytes for row in self._multiplied(rows))
        if rates is None:
            assert bandwidth is not None, "one of both"
            decode, prefill = self.batch * bandwidth / read, None
        else:
            step = texts / rates.bandwidth + self._seconds(rows, rates, self.batch, self.batch)
            decode, prefill = self.batch / step, CHUNK / self._seconds(rows, rates, CHUNK, 1)
        bits = 8 * sum(row.nbytes for row in rows) / hp.parameters
        return Estimate(
            layout.type, hp.parameters, bits, layout.file_size, state, memory, copies, read, decode, prefill
        )

    def _multiplied(self, rows: Sequence[Planned]) -> list[Planned]:
        """All but an embedding that is not the head too: of that only a row is read."""
        return [row for row in rows if row.tensor.role is not Role.EMBEDDING or not self.hp.untied]

    def _seconds(self, rows: Sequence[Planned], rates: Rates, tokens: int, logits: int) -> float:
        """Products of a pass over so many tokens that gives so many rows of logits; vectors are read."""
        total = 0.0
        for row in self._multiplied(rows):
            if row.tensor.role in ALWAYS_F32:
                total += row.nbytes / rates.bandwidth
            else:
                head = row.tensor.role in (Role.OUTPUT, Role.EMBEDDING)
                total += row.rows * row.columns * rates.seconds[row.type, logits if head else tokens]
        return total

    def _state_read(self, kv: T) -> int:
        """Bytes of one state that a token reads or writes: of the rings, the rows that the window shows by then."""
        hp = self.hp
        recurrent = 2 * 4 * hp.lru_width * hp.conv_taps  # h and tail, read and written
        attention = 2 * GGML_QUANT_SIZES[kv][1] * min(self.tokens, hp.window) * hp.kv_heads * hp.head_width
        return sum(recurrent if layer else attention for layer in hp.recurrent)


def _keys(hp: Hyperparameters) -> Metadata:
    """The keys that a conversion writes, but for the type's and the tokenizer's."""
    text = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": "recurrentgemma",
        "general.size_label": size_label(hp.parameters, 0, 0, 0),
    }
    keys: Metadata = {name: (value, GGUFValueType.STRING, None) for name, value in text.items()}
    for name, (value, kind) in to_metadata(hp).items():
        keys[name] = (value, kind, GGUFValueType.BOOL if kind is GGUFValueType.ARRAY else None)
    return keys


def _data_size(rows: Sequence[Planned]) -> int:
    """Bytes of all tensors, each padded."""
    return sum(padded(row.nbytes, ALIGNMENT) for row in rows)
