"""tokenizer.json: the tokenizers package's file, for checkpoints that ship no tokenizer.model.

Its BPE applies a list of merges in order. SentencePiece's BPE, which GGUF's keys express, has no list: it joins
whichever neighbours make the piece of the highest score, so a merge that makes the piece number k of the list
becomes the score -k. The two agree where the list is one that was made from a SentencePiece model, as all of
Gemma's are: every way to put a piece together from two others is in it, in one run. That is checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import TokenType

from griffin_gguf.convert.files import is_count, read_json
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

_MAX_ID = 2**24
_MAX_TOKEN = 250  # characters; Gemma's longest has 31
_GEMMA_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}

#: Gemma's splits at spaces, of which its normalizer has left none.
_PRE_TOKENIZERS = (None, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False})  # fmt: skip

#: Settings of the BPE model -> values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "byte_fallback": (True,),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (False, None),
}
_LAST = -1e9
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass
class Bpe:
    """A vocabulary in GGUF's terms: token -> id, types where not normal, scores where merges make the token."""

    ids: dict[str, int]
    types: dict[str, TokenType] = field(default_factory=dict[str, TokenType])
    scores: dict[str, float] = field(default_factory=dict[str, float])
    unk: int = -1


def read_tokenizer_json(path: Path) -> Bpe:
    """Read a tokenizer.json.

    Raises `FileFormatError` for a broken file and `UnsupportedError`, naming the part, for a tokenizer that a
    GGUF's keys cannot express.
    """
    root = read_json(path)
    _check_stages(path, root)
    model = root["model"]
    bpe = Bpe(_vocab(path, model.get("vocab")))
    unk = model.get("unk_token")
    if not isinstance(unk, str) or unk not in bpe.ids:
        raise FileFormatError(path, "model.unk_token", f"expected a token of the vocabulary, found {unk!r}")
    bpe.unk, bpe.types[unk] = bpe.ids[unk], TokenType.UNKNOWN
    _add_tokens(path, bpe, root.get("added_tokens") or [])
    _retire_unreachable(bpe)
    _restore_tab(path, bpe)
    _score(path, bpe, model.get("merges"))
    return bpe


def _check_stages(path: Path, root: Mapping[str, Any]) -> None:
    """Refuse normalizers, pre-tokenizers and models other than Gemma's."""
    if root.get("normalizer") != _GEMMA_NORMALIZER:
        raise UnsupportedError(
            f"{path}: normalizer: only Gemma's (' ' becomes U+2581) can be expressed in GGUF, "
            f"found {_named(root.get('normalizer'))}"
        )
    if root.get("pre_tokenizer") not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{path}: pre_tokenizer: {_named(root.get('pre_tokenizer'))} cannot be expressed in GGUF"
        )
    model = root.get("model")
    if not isinstance(model, dict):
        raise FileFormatError(path, "model", "is missing")
    for name, neutral in _NEUTRAL.items():
        if model.get(name) not in neutral:
            raise UnsupportedError(
                f"{path}: model.{name}: only {neutral[0]!r} can be expressed in GGUF, found {model.get(name)!r}"
            )


def _named(stage: Any) -> str:
    """A stage of the file by its type, a sequence by those of its members."""
    if not isinstance(stage, dict):
        return repr(stage)
    inner = next((value for value in stage.values() if isinstance(value, list)), [])
    return f"{stage.get('type')!r}" + (f" of {', '.join(map(_named, inner))}" if inner else "")


def _vocab(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab or not all(is_count(i) and i < _MAX_ID for i in vocab.values()):
        raise FileFormatError(path, "model.vocab", "expected an object that maps tokens to ids")
    longest = max(vocab, key=len)
    if len(longest) > _MAX_TOKEN:
        raise FileFormatError(path, "model.vocab", f"token {vocab[longest]} has more than {_MAX_TOKEN} characters")
    if len(set(vocab.values())) < len(vocab):
        raise FileFormatError(path, "model.vocab", "two tokens have the same id")
    return dict(vocab)


def _add_tokens(path: Path, bpe: Bpe, added: Any) -> None:
    """Added tokens are found in the text before anything else: control tokens, or user defined ones."""
    names = {i: token for token, i in bpe.ids.items()}
    if not isinstance(added, list):
        raise FileFormatError(path, "added_tokens", "expected a list")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not is_count(token.get("id")):
            raise FileFormatError(path, "added_tokens", f"expected tokens with id and content, found {token!r}")
        content, i = token["content"], token["id"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise UnsupportedError(f"{path}: added_tokens: {content!r}: {flag} cannot be expressed in GGUF")
        if names.get(i, content) != content or bpe.ids.get(content, i) != i or i >= _MAX_ID:
            raise FileFormatError(path, "added_tokens", f"{content!r} has id {i}, which the vocabulary contradicts")
        names[i], bpe.ids[content] = content, i
        if content not in _BYTES:
            bpe.types.setdefault(content, TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED)


def _retire_unreachable(bpe: Bpe) -> None:
    """Mark tokens that hold a character which is no token itself: text has that character as bytes.

    SentencePiece would join even such characters. It takes tokens of type UNUSED apart again, and their score
    lets all others go first.
    """
    characters = {token for token in bpe.ids if len(token) == 1}
    for token in bpe.ids.keys() - bpe.types.keys() - _BYTES:
        if not characters.issuperset(token):
            bpe.types[token], bpe.scores[token] = TokenType.UNUSED, _LAST


def _restore_tab(path: Path, bpe: Bpe) -> None:
    """Mark the byte tokens. Files made from Gemma's first models hold a tab in place of its byte token."""
    tab = "<0x09>"
    if tab not in bpe.ids and "\t" in bpe.ids:
        bpe.ids[tab] = bpe.ids.pop("\t")
        bpe.types.pop("\t", None)
    missing = _BYTES - bpe.ids.keys()
    if missing:
        raise FileFormatError(path, "model.vocab", f"the byte token {min(missing)!r} is missing")
    bpe.types |= dict.fromkeys(_BYTES, TokenType.BYTE)


def _score(path: Path, bpe: Bpe, merges: Any) -> None:
    """Give every piece that merges make its score, and check that scores say all that the merges say."""
    if not isinstance(merges, list):
        raise FileFormatError(path, "model.merges", "expected a list")
    pairs: set[tuple[str, str]] = set()
    last = ""
    for number, merge in enumerate(merges):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair) or "".join(pair) not in bpe.ids:
            raise FileFormatError(path, "model.merges", f"merge {number} makes no token: {merge!r}")
        piece = "".join(pair)
        if piece in bpe.types:
            continue  # found in the text as it is, or not at all: never put together
        if piece != last and piece in bpe.scores:
            raise UnsupportedError(
                f"{path}: model.merges: merges that make {piece!r} lie apart, which scores cannot express"
            )
        bpe.scores.setdefault(piece, -float(len(bpe.scores)))
        pairs.add((pair[0], pair[1]))
        last = piece
    _check_complete(path, bpe, pairs)


def _check_complete(path: Path, bpe: Bpe, pairs: set[tuple[str, str]]) -> None:
    """Refuse a list without a merge that SentencePiece would do: two parts that text can hold make a token."""
    made = bpe.scores.keys()
    for token in bpe.ids.keys() - bpe.types.keys():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            possible = (at == 1 or left in made) and (len(right) == 1 or right in made)
            if possible and (left, right) not in pairs:
                raise UnsupportedError(
                    f"{path}: model.merges: {left!r} and {right!r} make the token {token!r} but have no merge, "
                    "which scores cannot express"
                )
