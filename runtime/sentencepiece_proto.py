"""The file format of SentencePiece models, as little of it as a BPE vocabulary needs.

It is a protocol buffer (sentencepiece_model.proto in google/sentencepiece); the field numbers below are that
file's. Written by hand, since the `protobuf` package would be a dependency, with a generated module tied to
its version, for three messages:

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece (string)      2 score (float)  3 type (enum: GGUF's token types, same numbers)
    TrainerSpec     3 model_type (enum)   4 vocab_size     35 byte_fallback (bool)
    NormalizerSpec  1 name (string)       3 add_dummy_prefix   4 remove_extra_whitespaces   5 escape_whitespaces
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_VARINT, _BYTES, _FLOAT = 0, 2, 5  # wire types
_BPE = 2
_SLICE = 1 << 13  # tokens put together at once, so that all of it stays in the processor's cache


def bpe_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], space_prefix: bool) -> bytes:
    """A ModelProto: BPE with byte fallback, text taken as it is, spaces escaped.

    Token i is a text without U+0000, with `scores[i]` (within float32; higher merges first) and `types[i]` (1 normal,
    2 unknown, 3 control, 4 user defined, 5 unused, 6 byte); `space_prefix` puts a space before every text.
    """
    trainer = _int(3, _BPE) + _int(4, len(tokens)) + _int(35, 1)
    normalizer = _bytes(1, b"identity") + _int(3, space_prefix) + _int(4, 0) + _int(5, 1)
    slices = [slice(start, start + _SLICE) for start in range(0, len(tokens), _SLICE)]
    pieces = b"".join(_pieces(tokens[s], scores[s], types[s]) for s in slices)
    return pieces + _bytes(2, trainer) + _bytes(3, normalizer)


def _pieces(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> bytes:
    """The tokens' SentencePiece messages, each as a field of ModelProto, without a loop over them.

    One of them is  head token tail,  where only the token's size varies. So all tokens are joined with zero bytes
    in place of tails and heads; those are computed as columns, and fill the zero bytes in order. For heads of one
    size, lengths take as many bytes as the longest token may need: a varint may be longer than its number.
    """
    width = len(_varint(4 * max(map(len, tokens)) + 32))  # a character has 4 bytes at most
    head, tail = 2 * (1 + width), 7
    text = "\0" * head + ("\0" * (tail + head)).join(tokens) + "\0" * tail
    out = np.array(np.frombuffer(text.encode(), np.uint8))
    gaps = np.flatnonzero(out == 0).reshape(len(tokens), head + tail)
    size = gaps[:, head] - gaps[:, head - 1] - 1  # of each token, in bytes
    frames = np.empty(gaps.shape, np.uint8)
    frames[:, 0] = _tag(1, _BYTES)
    _put_varints(frames[:, 1 : 1 + width], size + 1 + width + tail)
    frames[:, 1 + width] = _tag(1, _BYTES)
    _put_varints(frames[:, 2 + width : head], size)
    frames[:, head] = _tag(2, _FLOAT)
    frames[:, head + 1 : head + 5] = np.asarray(scores, "<f4").view(np.uint8).reshape(-1, 4)
    frames[:, head + 5] = _tag(3, _VARINT)
    frames[:, head + 6] = types
    out[gaps.reshape(-1)] = frames.reshape(-1)
    return out.tobytes()


def _put_varints(columns: NDArray[np.uint8], values: NDArray[np.int64]) -> None:
    """Write each of `values` [n] as a varint of as many bytes as `columns` [n, width] has."""
    width = columns.shape[1]
    for i in range(width):
        columns[:, i] = values >> 7 * i & 0x7F | (0x80 if i + 1 < width else 0)


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire_type: int) -> int:
    """What a field of a number up to 15 begins with."""
    return field << 3 | wire_type


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value
