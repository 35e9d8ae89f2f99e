"""The tokenizer's and chat template's keys of a GGUF, from the files of a checkpoint folder.

Types follow llama.cpp's conversion of Gemma: a token that belongs to the model's protocol is CONTROL, also
where tokenizer.model calls it user defined, so that no text can forge it. Ids of the vocabulary that no file
names are padding: `[PADn]`, type UNUSED.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from griffin_gguf.convert.config import Config
from griffin_gguf.convert.files import is_unicode, read_json, read_text
from griffin_gguf.convert.sentencepiece_model import read_sentencepiece
from griffin_gguf.convert.tokenizer_json import read_tokenizer_json
from griffin_gguf.quant.file_types import Metadata
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.tokenizer import PREFIX, Tokenizer

_PADDING_SCORE = -10000.0  # llama.cpp's
_END_OF_TURN = "<end_of_turn>"

#: Tokens of Gemma's protocol, by name.
_PROTOCOL = re.compile(r"<pad>|<bos>|<eos>|<mask>|<2mass>|\[@BOS@\]|<unused\d+>|<start_of_turn>|<end_of_turn>")

#: Types that no name and no settings file can change.
_FIXED = (TokenType.UNKNOWN, TokenType.BYTE)

#: Types whose text is only a name, which an added token may replace.
_RENAMEABLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED)


@dataclass
class _Vocabulary:
    """Tokens with their scores and types, and the special ids as the tokenizer's own file has them."""

    path: Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    ids: dict[str, int]  # bos, eos, pad, unk
    space_prefix: bool


def tokenizer_metadata(folder: Path, config: Config) -> Metadata:
    """Return the keys `tokenizer.*` for a checkpoint whose config.json says `config`.

    The result is one that `runtime.tokenizer.Tokenizer` accepts. Raises `FileFormatError` where the files are
    missing or broken or contradict each other, `UnsupportedError` for what GGUF cannot express.
    """
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    vocabulary = _read_vocabulary(folder, config.hp.vocab)
    for token, i, special in _added_by_id(settings_path, settings):
        _apply(settings_path, vocabulary, token, i, special)
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    for token in _special_by_name(settings_path, settings):
        _apply(settings_path, vocabulary, token, index.get(token), special=True)
    for i, token in enumerate(vocabulary.tokens):
        if _PROTOCOL.fullmatch(token) and vocabulary.types[i] not in _FIXED:
            vocabulary.types[i] = TokenType.CONTROL
    if settings.get("add_eos_token"):
        raise UnsupportedError(f"{settings_path}: add_eos_token: only false is supported")
    metadata = _keys(vocabulary, config, settings)
    Tokenizer.from_gguf(vocabulary.path, {name: value for name, (value, *_) in metadata.items()})
    template = _chat_template(folder, settings)
    if template is not None:
        metadata["tokenizer.chat_template"] = (template, GGUFValueType.STRING, None)
    return metadata


def _keys(vocabulary: _Vocabulary, config: Config, settings: dict[str, Any]) -> Metadata:
    ids = _special_ids(vocabulary, config, settings)
    add_bos = settings.get("add_bos_token")
    array, flag = GGUFValueType.ARRAY, GGUFValueType.BOOL
    return {
        PREFIX + "model": ("llama", GGUFValueType.STRING, None),
        PREFIX + "pre": ("default", GGUFValueType.STRING, None),
        PREFIX + "tokens": (vocabulary.tokens, array, GGUFValueType.STRING),
        PREFIX + "scores": (vocabulary.scores, array, GGUFValueType.FLOAT32),
        PREFIX + "token_type": ([int(kind) for kind in vocabulary.types], array, GGUFValueType.INT32),
        **{f"{PREFIX}{name}_token_id": (i, GGUFValueType.UINT32, None) for name, i in ids.items()},
        PREFIX + "add_bos_token": (add_bos if isinstance(add_bos, bool) else True, flag, None),
        PREFIX + "add_eos_token": (False, flag, None),
        PREFIX + "add_space_prefix": (vocabulary.space_prefix, flag, None),
    }


def _special_ids(vocabulary: _Vocabulary, config: Config, settings: dict[str, Any]) -> dict[str, int]:
    """GGUF's name of each special token -> its id: by config.json, by the tokenizer's file, by name."""
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    found: dict[str, int] = {}
    for name, of_config, key in (
        ("bos", config.bos, "bos"),
        ("eos", config.eos, "eos"),
        ("padding", config.pad, "pad"),
        ("unknown", None, "unk"),
    ):
        by_name = index.get(_content(settings.get(f"{key}_token")) or f"<{key}>", -1)
        candidates = (i for i in (of_config, vocabulary.ids.get(key, -1), by_name) if i is not None and i >= 0)
        i = next(candidates, None)
        if i is not None:
            found[name] = i
    if _END_OF_TURN in index:
        found["eot"] = index[_END_OF_TURN]
    return found


def _read_vocabulary(folder: Path, size: int) -> _Vocabulary:
    """tokenizer.model, or tokenizer.json where only that exists; ids up to `size` that it lacks are padding."""
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    found: dict[int, tuple[str, float, int]]
    if model.exists() or not fast.exists():
        path, source = model, read_sentencepiece(model)
        found = dict(enumerate(zip(source.pieces, source.scores, source.types, strict=True)))
        ids = {"unk": source.unk, "bos": source.bos, "eos": source.eos, "pad": source.pad}
        space_prefix = source.space_prefix
    else:
        path, bpe = fast, read_tokenizer_json(fast)
        found = {
            i: (token, bpe.scores.get(token, 0.0), bpe.types.get(token, TokenType.NORMAL))
            for token, i in bpe.ids.items()
        }
        ids, space_prefix = {"unk": bpe.unk}, False
    needed = max(found) + 1
    if needed > size:
        raise FileFormatError(path, "vocabulary", f"holds {needed} tokens, config.json's vocab_size is {size}")
    rows = [found.get(i, (f"[PAD{i}]", _PADDING_SCORE, TokenType.UNUSED)) for i in range(size)]
    tokens, scores, types = (list(column) for column in zip(*rows, strict=True))
    return _Vocabulary(path, tokens, scores, types, ids, space_prefix)


def _added_by_id(path: Path, settings: dict[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Yield (token, id, whether it is special) of the tokens that tokenizer_config.json adds."""
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise FileFormatError(path, "added_tokens_decoder", "expected an object that maps ids to tokens")
    for key, token in decoder.items():
        content = _content(token)
        if not key.isdecimal() or not key.isascii() or len(key) > 9 or content is None:
            raise FileFormatError(path, "added_tokens_decoder", f"expected an id and its token, found {key!r}: {token}")
        yield content, int(key), isinstance(token, dict) and token.get("special") is True


def _special_by_name(path: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the tokens that tokenizer_config.json calls special without their ids."""
    for field in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(field) or []
        tokens = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(tokens, list) or any(_content(token) is None for token in tokens):
            raise FileFormatError(path, field, "expected a list of tokens")
        yield from filter(None, map(_content, tokens))


def _content(token: Any) -> str | None:
    """A token's text; files write a token as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _apply(path: Path, vocabulary: _Vocabulary, token: str, i: int | None, special: bool) -> None:
    """Give one added token its place and type."""
    if i is None or i >= len(vocabulary.tokens):
        raise FileFormatError(path, "added tokens", f"{token!r} (id {i}) is not in the vocabulary")
    kind, present = vocabulary.types[i], vocabulary.tokens[i]
    if kind == TokenType.BYTE and len(token) == 1 and present == f"<0x{ord(token):02X}>":
        return  # a byte under its character's name
    if present != token:
        if kind not in _RENAMEABLE:
            raise FileFormatError(
                path, "added tokens", f"{token!r}: its id {i} is {present!r} in {vocabulary.path.name}"
            )
        vocabulary.tokens[i] = token
    if kind not in _FIXED:
        vocabulary.types[i] = TokenType.CONTROL if special else TokenType.USER_DEFINED


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json has: a template, or several of which one is the default."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    found = settings.get("chat_template")
    if isinstance(found, list):
        defaults = [e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"]
        if not defaults:
            raise FileFormatError(folder / "tokenizer_config.json", "chat_template", "has no template named 'default'")
        found = defaults[0]
    if found is not None and not (isinstance(found, str) and is_unicode(found)):
        raise FileFormatError(folder / "tokenizer_config.json", "chat_template", "expected text")
    return found
