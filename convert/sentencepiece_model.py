"""tokenizer.model: SentencePiece's own file, read field by field.

The sentencepiece package shows neither the normalizer nor which pieces are user defined, and the generated
reader for its file needs the protobuf package; so the few fields that matter are read here. Field numbers are
those of sentencepiece_model.proto in google/sentencepiece; wire format: key = number·8 + kind, kinds 0 varint,
1 eight bytes, 2 length and bytes, 5 four bytes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece

from griffin_gguf.convert.files import read_bytes
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_BPE = 2
_MAX_PIECES = 2**24

Value = int | bytes


@dataclass
class SentencePieceModel:
    """The pieces with their scores and types (numbered as GGUF's token types), and the special ids, -1 for none."""

    pieces: list[str] = field(default_factory=list[str])
    scores: list[float] = field(default_factory=list[float])
    types: list[int] = field(default_factory=list[int])
    unk: int = -1
    bos: int = -1
    eos: int = -1
    pad: int = -1
    space_prefix: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises `FileFormatError` for a file that is no such model and `UnsupportedError`, naming the setting, for one
    that a GGUF's tokenizer keys cannot express.
    """
    raw = read_bytes(path)
    model = SentencePieceModel()
    try:
        trainer, normalizer, denormalizer = _read_model(raw, model)
    except (ValueError, IndexError, struct.error) as error:
        raise FileFormatError(path, "SentencePiece model", f"cannot be read: {error}") from None
    _check_trainer(path, trainer)
    _check_normalizer(path, normalizer, denormalizer)
    model.space_prefix = bool(normalizer.get(3, 1))
    try:  # its own checks: duplicate or empty pieces, bytes missing, ...
        processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    except RuntimeError as error:
        raise FileFormatError(path, "SentencePiece model", f"SentencePiece refuses it: {error}") from None
    model.unk, model.bos = processor.unk_id(), processor.bos_id()
    model.eos, model.pad = processor.eos_id(), processor.pad_id()
    return model


def _read_model(raw: bytes, model: SentencePieceModel) -> tuple[dict[int, Value], dict[int, Value], dict[int, Value]]:
    """Fill `model` with the pieces; the fields of trainer, normalizer and denormalizer."""
    specs: dict[int, dict[int, Value]] = {2: {}, 3: {}, 5: {}}
    for number, value in _fields(raw):
        if number == 1:
            _read_piece(_message(value), model)
        elif number in specs:
            specs[number] |= dict(_fields(_message(value)))
    if not model.pieces:
        raise ValueError("it has no pieces")
    return specs[2], specs[3], specs[5]


def _read_piece(raw: bytes, model: SentencePieceModel) -> None:
    piece: dict[int, Value] = {1: b"", 2: bytes(4), 3: 1} | dict(_fields(raw))
    kind = piece[3]
    if not isinstance(kind, int) or not 1 <= kind <= 6:
        raise ValueError(f"piece {len(model.pieces)} has type {kind!r}")
    if len(model.pieces) == _MAX_PIECES:
        raise ValueError(f"more than {_MAX_PIECES} pieces")
    model.pieces.append(_message(piece[1]).decode())
    model.scores.append(struct.unpack("<f", _message(piece[2]))[0])
    model.types.append(kind)


def _check_trainer(path: Path, trainer: dict[int, Value]) -> None:
    kind = trainer.get(3, 1)
    if kind != _BPE:
        name = _KINDS.get(kind, kind) if isinstance(kind, int) else kind
        raise UnsupportedError(f"{path}: model_type: only bpe can be expressed in GGUF, found {name}")
    if not trainer.get(35, 0):
        raise UnsupportedError(f"{path}: byte_fallback: only models with byte fallback can be expressed in GGUF")
    if trainer.get(24, 0):
        raise UnsupportedError(f"{path}: treat_whitespace_as_suffix: cannot be expressed in GGUF")


def _check_normalizer(path: Path, normalizer: dict[int, Value], denormalizer: dict[int, Value]) -> None:
    name = normalizer.get(1, b"")
    if normalizer.get(2, b"") != b"":
        shown = name.decode(errors="replace") if isinstance(name, bytes) else name
        raise UnsupportedError(f"{path}: normalizer: {shown!r} rewrites text, which GGUF cannot express; only identity")
    if normalizer.get(4, 1):
        raise UnsupportedError(f"{path}: normalizer: remove_extra_whitespaces cannot be expressed in GGUF")
    if not normalizer.get(5, 1):
        raise UnsupportedError(f"{path}: normalizer: escape_whitespaces = false cannot be expressed in GGUF")
    if denormalizer.get(2, b"") != b"":
        raise UnsupportedError(f"{path}: denormalizer: cannot be expressed in GGUF")


def _fields(raw: bytes) -> Iterator[tuple[int, Value]]:
    """Yield (field number, value) of a message: varints as int, everything else as bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(raw, at)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if size < 0 or size > len(raw) - at:
            raise ValueError(f"a field of kind {kind} is cut short or unknown")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at byte `at`, seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


def _message(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("expected bytes, found a number")
    return value
