"""Answers that are JSON, by a schema or any: which tokens may come next, by llguidance.

llguidance is the `server` extra's: it compiles a schema to a grammar over bytes and walks it along the bytes of each
token, so that whatever the vocabulary makes of a text, the text is right after every token. What a finished answer
holds, a JSON parser reads and the schema allows; an answer that `max_tokens` cuts is a beginning of such a text.

A schema is a stranger's. Its size and depth are looked at first, then `grammar_worker.py` compiles it in a process
with limits and walks along a few texts, and only what that one could do is compiled here. While it runs, llguidance's
own limits bound each step.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Collection
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import BusyError, UnsupportedError
from griffin_gguf.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_BYTES = 1 << 17  # of a schema as JSON
MAX_DEPTH = 64  # values within values
MAX_OPTIONAL = 900  # properties of one object that may be left out: any of them may come next

#: Between two tokens of JSON: nothing, a space, or new lines and an indentation, as llama.cpp's grammars have it. A
#: model may lay out its answer as it learned to, but none can go on with blanks for ever.
WHITESPACE = r" |\n{1,2}[ \t]{0,20}"

#: All options that a schema could set by itself under "x-guidance" are set here.
_OPTIONS: dict[str, Any] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,  # a keyword that would not be followed is an error
    "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}

#: Of llguidance's limits, what is not its default. A row has 4 items for each property that may come next; with
#: `MAX_OPTIONAL` of them the longest step takes some 20 ms for a vocabulary of 256,000. A state takes 1 to 2 kB.
#: Lexemes that are computed beforehand for every token would make compiling depend on the vocabulary.
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 4_000,
    "step_max_items": 200_000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,  # they would repeat the schema
}

_WALL_SECONDS = 30.0  # the worker's limit is on processor time; this one is for a machine that stands still
_WORKER = Path(__file__).with_name("grammar_worker.py")
_LONGEST_REASON = 200  # characters
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

_tables: "WeakKeyDictionary[Tokenizer, LLTokenizer]" = WeakKeyDictionary()
_building = Lock()
_examining = Lock()  # one at a time: a flood of hostile schemas takes one core
_examiners = BoundedSemaphore(3)  # that one and those who wait, so that the flood holds few threads


class JsonConstraint:
    """A `Constraint` of one answer: which tokens keep it on the way to JSON that the schema allows."""

    def __init__(self, matcher: "LLMatcher", eos: int, stops: Collection[int]) -> None:
        self._matcher, self._eos, self._stops = matcher, eos, frozenset(stops)
        self._stop_ids = np.array(sorted(stops), np.intp)

    def allow(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy of `logits`, float32 [V], with -inf for every token that may not come next.

        The stop tokens may come exactly where the text may end; other control tokens never. Raises
        `UnsupportedError` where the schema turns out to be too much at this place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=logits.size, bitorder="little").view(np.bool_)
        ends = allowed[self._eos]  # llguidance knows one end
        allowed[self._eos] = False
        allowed[self._stop_ids] = ends
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on behind `token`, which was chosen among those allowed. Errors as of `allow`."""
        if token not in self._stops:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedError(f"schema: too much to follow: {_one_line(self._matcher.get_error())}")


def json_constraint(
    tokenizer: Tokenizer, schema: dict[str, Any] | bool, stop_tokens: Collection[int]
) -> JsonConstraint:
    """What keeps one answer to JSON that `schema` allows; True: any object.

    `stop_tokens`, at least one, are those that end the answer. The first call of a tokenizer takes a second or two
    for a vocabulary of 256,000, the first of a schema some tenths for the process that examines it: neither belongs
    into an event loop. Raises `UnsupportedError` without llguidance, and for a schema that it cannot follow to the
    letter, that nothing satisfies, or that is too large, too deep or too hard; `BusyError` where too many that were
    never seen come at once.
    """
    if not stop_tokens:
        raise UnsupportedError("stop_tokens: expected at least one, to end the text where the schema allows it")
    if find_spec("llguidance") is None:
        raise UnsupportedError("JSON by a schema needs llguidance: pip install 'griffin-gguf[server]'")
    if schema is True:
        text = json.dumps(_ANY_OBJECT)
    else:
        text = _checked(schema)
        if reason := _refusal(text):
            raise UnsupportedError(f"schema: cannot be followed: {reason}")
    return JsonConstraint(_matcher(tokenizer, text), tokenizer.eos, stop_tokens)


def _checked(schema: dict[str, Any] | bool) -> str:
    """The schema as JSON, once its size and depth are known to be bearable: neither is taken on trust."""
    if not isinstance(schema, dict):
        raise UnsupportedError("schema: false allows nothing")
    seen, level = 0, cast("list[Any]", [schema])
    for _ in range(MAX_DEPTH):
        seen += len(level)
        if seen > MAX_BYTES:
            raise _too_large()
        if any(_optional(value) > MAX_OPTIONAL for value in level):
            raise UnsupportedError(f"schema: expected at most {MAX_OPTIONAL} properties that an object may leave out")
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            break
    else:
        raise UnsupportedError(f"schema: expected at most {MAX_DEPTH} values within values")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"schema: is no JSON: {error}") from None
    if len(text) > MAX_BYTES:
        raise _too_large()
    return text


def _inner(value: Any) -> Collection[Any]:
    """The values within `value`, of which each takes a byte of JSON at least."""
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).values()
    return cast("list[Any]", value) if isinstance(value, list) else ()


def _optional(value: Any) -> int:
    """How many properties an object that is a schema names and does not ask for."""
    schema = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, dict):
        return 0
    asked = cast("list[Any]", required) if isinstance(required, list) else []
    return len(cast("dict[str, Any]", named).keys() - {name for name in asked if isinstance(name, str)})


def _too_large() -> UnsupportedError:
    return UnsupportedError(f"schema: expected at most {MAX_BYTES} bytes of JSON")


@lru_cache(maxsize=256)
def _refusal(text: str) -> str:
    """Why the schema `text` cannot be followed, on one line; empty where it can. Found out in a process of its own.

    Raises `UnsupportedError` where that came to no answer and `BusyError` where others wait: another time it might.
    """
    request = json.dumps({"schema": text, "options": _OPTIONS, "limits": _LIMITS}).encode()
    if not _examiners.acquire(blocking=False):
        raise BusyError("schema: several others are being examined")
    try:
        with _examining:
            worker = subprocess.run(
                # -P: the worker's folder is not for importing from.
                [sys.executable, "-P", str(_WORKER)],
                input=request,
                capture_output=True,
                timeout=_WALL_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"schema: it did not compile within {_WALL_SECONDS:g} s") from None
    finally:
        _examiners.release()
    if worker.returncode == -signal.SIGPROF:
        return "it did not compile within a second of processor time"
    if worker.returncode:
        raise UnsupportedError("schema: compiling it took more memory than it may, or failed")
    return _one_line(json.loads(worker.stdout)["problem"])


def _matcher(tokenizer: Tokenizer, text: str) -> "LLMatcher":
    """A matcher at the beginning of a schema that was examined."""
    from llguidance import LLMatcher, LLParserLimits

    grammar = LLMatcher.grammar_from_json_schema(text, overrides=cast("Any", _OPTIONS))
    return LLMatcher(_table(tokenizer), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))


def _table(tokenizer: Tokenizer) -> "LLTokenizer":
    """llguidance's tables of a vocabulary; made once, gone with the tokenizer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    with _building:
        if tokenizer not in _tables:
            _tables[tokenizer] = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)))
        return _tables[tokenizer]


class _Vocabulary:
    """A tokenizer as llguidance's `TokenizerWrapper` asks for one.

    `tokens` are the bytes that each adds to a text; control tokens, which add none, go by their names, and being
    special are never bytes of a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.bos_token_id, self.eos_token_id = tokenizer.bos, tokenizer.eos
        self.special_token_ids = sorted(tokenizer.control_ids | {tokenizer.eos})
        self.tokens = [tokenizer.piece(i) or tokenizer.name(i).encode() for i in ids]
        self._of_byte = {tokenizer.name(i): i for i in ids if len(self.tokens[i]) == 1}
        self._tokenizer = ref(tokenizer)  # what is cached by a tokenizer must not keep it

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of text that a grammar forces: those that the model would see it as."""
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "a constraint is used while its model is"
        found = tokenizer.encode(text.decode(), bos=False)
        if b"".join(map(tokenizer.piece, found)) == text:
            return found
        # Some vocabularies put a space in front of every text, within its first token.
        return [self._of_byte[f"<0x{byte:02X}>"] for byte in self.tokens[found[0]][1:]] + found[1:]


def _one_line(reason: str) -> str:
    """A message of llguidance's fit for an error: printable, on one line, bounded, no advice to programmers."""
    reason = reason.removesuffix("\n<non-verbose/>").partition(". Enable '")[0].partition("; consider ")[0]
    line = " ".join("".join(c if c.isprintable() else " " for c in reason).split())
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "…"
