"""Text to token ids and back: SentencePiece, rebuilt from a GGUF alone.

A GGUF holds a SentencePiece BPE vocabulary as parallel arrays (`tokenizer.ggml.tokens`, `.scores`,
`.token_type`) and a few flags. They are put back into the file format of SentencePiece and handed to that
library, so that the ids are its own in every corner.

One thing differs on purpose. Gemma's tokenizer.model calls `<start_of_turn>` and most of its like "user
defined": SentencePiece finds them in any text, so that a user's text could forge a turn. GGUF's types follow
llama.cpp and call them control tokens; here they come only from `encode(..., special=True)`.
"""

import codecs
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import sentencepiece
from gguf import TokenType

from griffin_gguf.runtime.arch import key
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.sentencepiece_proto import bpe_model

PREFIX = "tokenizer.ggml."
_KNOWN_TYPES = frozenset(int(t) for t in TokenType)
_GREATEST_SCORE = float(np.finfo(np.float32).max)  # SentencePiece stores float32
_AT_ONCE = 1 << 13  # tokens joined for a check: all of them would take memory that the processor has no cache for
_UNKNOWN_SURFACE = " \u2047 ".encode()  # how SentencePiece shows its unknown token
_SPACE = "\u2581"  # stands for a space inside pieces
_SHIELD = "\ufdd0"  # a code point that Unicode reserves for use inside programs

#: Flags that other tokenizers use: absent, or of the one value that changes nothing here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_eos_token": (False,),
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": ([],),
}


class Tokenizer:
    """A SentencePiece BPE vocabulary with byte fallback.

    `vocab_size` is the number of tokens, `bos` and `eos` their ids, `pad` an id or None; `control_tokens` maps
    the names of all control tokens to their ids.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._tokens, types, scores = _arrays(path, metadata)
        self._types = bytes(types)
        self.vocab_size = len(self._tokens)
        self.bos = _required_id(path, metadata, "bos", self.vocab_size)
        self.eos = _required_id(path, metadata, "eos", self.vocab_size)
        self.pad = special_id(path, metadata, "padding", self.vocab_size)
        self.add_bos = _flag(path, metadata, "add_bos_token")
        self._space_prefix = _flag(path, metadata, "add_space_prefix")
        _check_unknown(path, self._types, _required_id(path, metadata, "unknown", self.vocab_size))
        self.control_tokens = _control_tokens(path, self._tokens, self._types)
        try:
            model = bpe_model(self._tokens, scores, types, self._space_prefix)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise FileFormatError(path, PREFIX + "tokens", f"SentencePiece refuses them: {error}") from error

    @classmethod
    def from_gguf(cls, path: Path, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Rebuild the tokenizer of a GGUF from its metadata (plain Python values).

        Raises `FileFormatError` naming the key where one is missing, of the wrong type or inconsistent, and
        `UnsupportedError` for a tokenizer that is not SentencePiece BPE or asks for more than these keys say.
        """
        return cls(path, metadata)

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids that only `encode(..., special=True)` and `bos` can yield."""
        return frozenset(self.control_tokens.values())

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any control token's name; compiled when a chat needs it, which takes a while."""
        # Of names that begin at one place the longest wins, as in SentencePiece: hence the order.
        names = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `bos` the begin-of-sequence token comes first, where the file's `add_bos_token` wants one and the
        text does not itself begin with it. Without `special` the text is only text: whatever it says, no
        control id comes out. With it (rendered chat templates) the names of control tokens are those tokens,
        except where `shield` has been. Raises `GriffinError` for text that is no Unicode (lone surrogates).
        """
        _check_unicode(text)
        ids = self._encode_special(text) if special else self._encode_text(text)
        if bos and self.add_bos and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def shield(self, text: str) -> str:
        """`text` changed so that `encode(..., special=True)` takes control tokens' names in it for mere text.

        For what goes into a chat template but must not write its turns. U+FDD0 separates the characters of
        each name; `encode` drops it again.
        """
        return self._control.sub(lambda name: "".join(c + _SHIELD for c in name[0]), text)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`, U+FFFD where their bytes are no UTF-8; control tokens only with `special`.

        Undoes `encode`, except that the character U+2581 comes back as a space: SentencePiece's own way.
        """
        text = b"".join(self._bytes(i) if special else self.piece(i) for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._space_prefix else text

    def piece(self, token: int) -> bytes:
        """The bytes that `token` adds to a text: nothing for a control token, one byte for a byte token."""
        return b"" if self._type(token) == TokenType.CONTROL else self._bytes(token)

    def name(self, token: int) -> str:
        """The token as the vocabulary writes it, such as `▁the`, `<0x0A>` or `<eos>`."""
        self._type(token)
        return self._tokens[token]

    def _type(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise GriffinError(f"token {token}: expected an id from 0 to {self.vocab_size - 1}")
        return self._types[token]

    def _bytes(self, token: int) -> bytes:
        kind, text = self._type(token), self._tokens[token]
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if kind == TokenType.UNKNOWN:
            return _UNKNOWN_SURFACE
        return (text if kind == TokenType.CONTROL else text.replace(_SPACE, " ")).encode()

    def _encode_text(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._control.split(text)):  # text, name, text, name, ..., text
            ids += [self.control_tokens[part]] if i % 2 else self._encode_text(part.replace(_SHIELD, ""))
        return ids


class StreamDecoder:
    """The text of tokens that come one by one: a character appears with the token that completes it.

    Unlike `Tokenizer.decode` it keeps a leading space, since it continues a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        return self._utf8.decode(self._tokenizer.piece(token))

    def flush(self) -> str:
        """U+FFFD for a character left incomplete, or nothing; the decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def special_id(path: Path, metadata: Mapping[str, Any], name: str, vocab: int) -> int | None:
    """The id under `tokenizer.ggml.<name>_token_id`, None where the file has none; `vocab` ids exist.

    Raises `FileFormatError` for a value that is no id.
    """
    field = f"{PREFIX}{name}_token_id"
    value = metadata.get(field)
    if value is not None and (type(value) is not int or not 0 <= value < vocab):
        raise FileFormatError(path, field, f"expected an id from 0 to {vocab - 1}, found {value!r}")
    return value


def array(path: Path, metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """The array under `tokenizer.ggml.<name>`, all of whose elements are of the type `kind`.

    Raises `FileFormatError` where there is none.
    """
    values = metadata.get(PREFIX + name)
    if values is None:
        raise FileFormatError(path, PREFIX + name, "is missing")
    if not isinstance(values, list) or not {kind}.issuperset(map(type, cast("list[Any]", values))):
        raise FileFormatError(path, PREFIX + name, f"expected an array of {kind.__name__}")
    return cast("list[Any]", values)


def _required_id(path: Path, metadata: Mapping[str, Any], name: str, vocab: int) -> int:
    found = special_id(path, metadata, name, vocab)
    if found is None:
        raise FileFormatError(path, f"{PREFIX}{name}_token_id", "is missing")
    return found


def _flag(path: Path, metadata: Mapping[str, Any], name: str) -> bool:
    value = metadata.get(PREFIX + name)
    if not isinstance(value, bool):
        problem = "is missing" if value is None else f"expected true or false, found {value!r}"
        raise FileFormatError(path, PREFIX + name, problem)
    return value


def _arrays(path: Path, metadata: Mapping[str, Any]) -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores, checked one by one and against each other."""
    kind = metadata.get(PREFIX + "model")
    if kind is None:
        raise FileFormatError(path, PREFIX + "model", "is missing: the file has no tokenizer")
    if kind != "llama":
        raise UnsupportedError(f"{path}: {PREFIX}model: only 'llama' (SentencePiece BPE) runs here, found {kind!r}")
    for name, neutral in _NEUTRAL.items():
        value = metadata.get(PREFIX + name, neutral[0])
        if value not in neutral:
            raise UnsupportedError(f"{path}: {PREFIX}{name}: only {neutral[0]!r} runs here")
    tokens = array(path, metadata, "tokens", str)
    scores = array(path, metadata, "scores", float)
    types = array(path, metadata, "token_type", int)
    for name, values in (("scores", scores), ("token_type", types)):
        if len(values) != len(tokens):
            raise FileFormatError(path, PREFIX + name, f"expected {len(tokens)}, one a token, found {len(values)}")
    rows = metadata.get(key("vocab_size"), len(tokens))
    if len(tokens) != rows:
        raise FileFormatError(path, PREFIX + "tokens", f"expected {rows}, the model's vocabulary, found {len(tokens)}")
    _check_tokens(path, tokens, scores, types)
    return tokens, types, scores


def _check_tokens(path: Path, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> None:
    """Refuse what SentencePiece would refuse or take for something else."""
    if not _all_sound(tokens, scores, types):
        raise _first_fault(path, tokens, scores, types)
    expected = {f"<0x{byte:02X}>" for byte in range(256)}
    found = {tokens[i] for i in _of_type(types, TokenType.BYTE)}
    if found != expected:
        wrong = min(found ^ expected)
        problem = f"{wrong!r} is no byte" if wrong in found else f"no byte token {wrong!r}"
        raise FileFormatError(path, PREFIX + "tokens", f"expected the 256 byte tokens <0x00> to <0xFF>: {problem}")


def _all_sound(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> bool:
    """Whether `_first_fault` would find none: the same questions, asked of all tokens at once."""
    different = set(tokens)
    return (
        _KNOWN_TYPES.issuperset(types)
        and bool((np.abs(np.asarray(scores, np.float64)) <= _GREATEST_SCORE).all())
        and len(different) == len(tokens)
        and "" not in different
        and all(_is_text("".join(tokens[i : i + _AT_ONCE])) for i in range(0, len(tokens), _AT_ONCE))
    )


def _first_fault(path: Path, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> FileFormatError:
    """What is wrong with the first token that has something wrong."""
    seen: dict[str, int] = {}
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if not abs(score) <= _GREATEST_SCORE:
            wanted = "a number of float32" if math.isfinite(score) else "a finite number"
            return FileFormatError(path, PREFIX + "scores", f"token {i}: expected {wanted}, found {score}")
        if kind not in _KNOWN_TYPES:
            return FileFormatError(path, PREFIX + "token_type", f"token {i}: {kind} is no token type")
        if not token or not _is_text(token):
            return FileFormatError(path, PREFIX + "tokens", f"token {i}: {token!r} is no name for a token")
        if seen.setdefault(token, i) != i:
            return FileFormatError(path, PREFIX + "tokens", f"token {i}: {token!r} is already token {seen[token]}")
    raise AssertionError("unreachable: some token has a fault")


def _of_type(types: Sequence[int], kind: TokenType) -> list[int]:
    """The ids of all tokens of one type."""
    return np.flatnonzero(np.frombuffer(bytes(types), np.uint8) == kind).tolist()


def _check_unknown(path: Path, types: Sequence[int], unknown: int) -> None:
    """SentencePiece has exactly one unknown token, and it must be the one the file names."""
    found = _of_type(types, TokenType.UNKNOWN)
    if found != [unknown]:
        problem = f"expected one token of type unknown, with id {unknown}, found {len(found)}: {found[:4]}"
        raise FileFormatError(path, PREFIX + "token_type", problem)


def _control_tokens(path: Path, tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    control = {tokens[i]: i for i in _of_type(types, TokenType.CONTROL)}
    for name, i in control.items():
        if len(name) == 1:  # SentencePiece looks single characters up by name: text could reach it
            raise FileFormatError(path, PREFIX + "tokens", f"token {i}: {name!r} is too short for a control token")
    return control


def _is_text(text: str) -> bool:
    """Whether SentencePiece takes it: Unicode, without U+0000."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}"
        raise GriffinError(f"text: expected Unicode, but {problem}") from None
