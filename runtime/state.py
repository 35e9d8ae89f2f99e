"""What a Griffin remembers: arrays of fixed size, whatever the length of the text.

    RG-LRU layer     h [W] f32, the recurrence; tail [W, C-1] f32, the convolution's last inputs
    attention layer  k, v [R, J], a ring of R = window + CHUNK rows: position p lies in row p % R

A chunk's keys are written before they are read, hence the CHUNK rows beyond the window.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Generic, Protocol, Self, TypeVar

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from griffin_gguf.runtime.arch import Hyperparameters

#: Tokens that one pass over the weights may take: longer texts are fed in chunks of this.
CHUNK = 512

A = TypeVar("A")


@dataclass(frozen=True)
class RecurrentState(Generic[A]):
    """The memory of an RG-LRU layer."""

    h: A  # [W]
    tail: A  # [W, C-1], oldest first


@dataclass(frozen=True)
class AttentionState(Generic[A]):
    """The memory of a local-attention layer."""

    k: A  # [R, J], after RoPE
    v: A  # [R, J]


LayerState = RecurrentState[A] | AttentionState[A]


class State(Protocol):
    """The memory of one text on one backend; made by `Model.new_state`."""

    position: int  # tokens read so far
    owner: object  # the backend that made it, the only one that can go on from it

    def copy(self) -> Self:
        """An independent state that continues from the same point."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; the same at every position."""
        ...


def ring_rows(hp: Hyperparameters) -> int:
    """Rows R of an attention layer's ring."""
    return hp.window + CHUNK


def build(
    hp: Hyperparameters, vector: Callable[[tuple[int, ...]], A], kv: Callable[[tuple[int, ...]], A]
) -> list[LayerState[A]]:
    """One entry a layer, its arrays made by `vector(shape)` (f32) and `kv(shape)` (the cache's type)."""
    ring = (ring_rows(hp), hp.kv_heads * hp.head_width)
    return [
        RecurrentState(vector((hp.lru_width,)), vector((hp.lru_width, hp.conv_taps - 1)))
        if recurrent
        else AttentionState(kv(ring), kv(ring))
        for recurrent in hp.recurrent
    ]


def arrays(layers: list[LayerState[A]]) -> Iterator[A]:
    """Every array, layer by layer."""
    for layer in layers:
        for field in fields(layer):
            yield getattr(layer, field.name)


def kv_type(embedding: GGMLQuantizationType) -> GGMLQuantizationType:
    """Type of the rings' keys and values in ggml, for a file whose embedding is of that type.

    F16 costs up to 2e-3 of the largest logit: nothing beside quantized weights. An F32 file is there to be
    exact (1e-6), so its rings are F32 too.
    """
    exact = embedding is GGMLQuantizationType.F32
    return GGMLQuantizationType.F32 if exact else GGMLQuantizationType.F16


def nbytes(hp: Hyperparameters, kv: GGMLQuantizationType) -> int:
    """Bytes of one state whose rings are of type `kv`, F32 or F16."""
    item = GGML_QUANT_SIZES[kv][1]
    sizes: list[LayerState[int]] = build(hp, lambda s: 4 * prod(s), lambda s: item * prod(s))
    return sum(arrays(sizes))
