"""The file format of SentencePiece models, as little of it as a BPE vocabulary needs.

It is a protocol buffer (sentencepiece_model.proto in google/sentencepiece); the field numbers below are that
file's. Written by hand, since the `protobuf` package would be a dependency, with a generated module tied to
its version, for three messages:

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    SentencePiece   1 piece (string)      2 score (float)  3 type (enum: GGUF's token types, same numbers)
    TrainerSpec     3 model_type (enum)   4 vocab_size     35 byte_fallback (bool)
    NormalizerSpec  1 name (string)       3 add_dummy_prefix   4 remove_extra_whitespaces   5 escape_whitespaces
"""

import struct
from collections.abc import Sequence
from functools import cache

_BPE = 2


def bpe_model(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], space_prefix: bool) -> bytes:
    """A ModelProto: BPE with byte fallback, text taken as it is, spaces escaped.

    Token i has `scores[i]` (higher merges first) and `types[i]` (1 normal, 2 unknown, 3 control,
    4 user defined, 5 unused, 6 byte); `space_prefix` puts a space before every text.
    """
    pieces = (
        _bytes(1, _bytes(1, token.encode()) + _float(2, score) + _int(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = _int(3, _BPE) + _int(4, len(tokens)) + _int(35, 1)
    normalizer = _bytes(1, b"identity") + _int(3, space_prefix) + _int(4, 0) + _int(5, 1)
    return b"".join(pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


@cache
def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
