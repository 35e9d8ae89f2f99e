"""Reading texts of any length into a document: in chunks, with checkpoints, in memory that stays the same.

The texts are gone through twice. First their bytes: each must be UTF-8, their SHA-256 tells whether what an
interrupted run has read is still what there is to read, and where white space at their ends begins is known only there.
Then their tokens, always in the same chunks. Those that the checkpoint's state holds are passed over, which costs next
to nothing beside reading them. So a reading that was interrupted ends in the very bits of one that was not.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import BinaryIO, Self

from msgspec.structs import replace

from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.document_files import Checkpoint, Form, Place, Record, Source
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.long_text import encode_pieces
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.saved_state import fingerprint
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.state import CHUNK, State

#: (bytes read, bytes to read) of this run.
Report = Callable[[int, int], None]

#: Seconds between two checkpoints: writing one takes some tenths.
CHECKPOINT_SECONDS = 30.0

_BETWEEN = "\n\n"  # texts
_SURVEYED, _ENCODED = 1 << 20, 1 << 12  # bytes at once: few for the tokenizer, see long_text.py


@dataclass(frozen=True)
class Part:
    """A text: what errors call it, and how its bytes are opened, as often as needed.

    They are UTF-8; a byte-order mark in front is no part of the text.
    """

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]

    @classmethod
    def file(cls, path: Path) -> Self:
        """Of a regular file."""
        return cls(str(path), lambda: path.open("rb"))

    @classmethod
    def text(cls, name: str, text: str) -> Self:
        """Of a string."""
        return cls(name, lambda: BytesIO(text.encode()))


class Reading:
    """A document in the making: begun, or continued where an interrupted reading of the same stands.

    `kept` tokens are in the checkpoint; `notice` says why a checkpoint that was there is of no use. A context manager.
    """

    def __init__(self, model: Model, parts: Sequence[Part], name: str, form: Form, *, replacing: bool = False) -> None:
        """Find out what there is to read; nothing is read by the model yet.

        `replacing` allows that there is a document. Raises `UnsupportedError` for what is no name, no text at all, a
        form that the model's file has no template for, and an existing document; `BusyError` while another process
        reads it; `FileFormatError` for a text that cannot be read, is not UTF-8 or is all white space.
        """
        self._model, self._parts, self._place = model, parts, Place(name)
        self._opening = _opening(model, form)
        self.kept = 0
        self.notice: str | None = None
        self._start: Snapshot | None = None
        self._saved: str | None = None  # the state file of the checkpoint
        if not parts:
            raise UnsupportedError("read: expected at least one text")
        with ExitStack() as stack:
            stack.enter_context(self._place.locked())
            if self._place.complete and not replacing:
                raise UnsupportedError(f"document {name!r}: exists already; --replace reads it anew")
            self._spans = [_survey(part, form) for part in parts]
            self._made = _nothing(model, form, [span.source for span in self._spans])
            self._resume()
            self._stack = stack.pop_all()

    def run(self, report: Report | None = None, every: float = CHECKPOINT_SECONDS) -> None:
        """Read what is left and make it the document.

        A checkpoint is written `every` so many seconds, and where an exception, `report`'s among them, comes between
        two chunks; the next run goes on from it. Raises whatever the model raises, and `GriffinError` for a text that
        is not the same any more, or a disk that is full.
        """
        state, since = self._model.new_state(self._start), monotonic()
        texts, total = _Texts(self._parts, self._spans), sum(source.nbytes for source in self._made.sources)
        ahead, before = self.kept, 0  # tokens to pass over, and the bytes that they were
        try:
            for chunk in self._chunks(texts):
                if ahead >= len(chunk):
                    ahead, before = ahead - len(chunk), texts.nbytes
                    continue
                self._check_boundary(ahead)
                self._model.forward(chunk, state)
                if report:
                    report(texts.nbytes - before, total - before)
                if monotonic() - since >= every:
                    self._keep(state)
                    since = monotonic()
            self._check_boundary(ahead)
        except BaseException:
            if texts.changed:
                self._place.forget()
            elif not state.torn and state.position > self.kept:
                self._keep(state)
            raise
        self._place.finish(self._record(state))

    def _check_boundary(self, ahead: int) -> None:
        if ahead:
            problem = f"expected whole chunks of {CHUNK}, found {self.kept}; griffin states delete removes it"
            raise FileFormatError(self._place.path, "tokens of the unfinished reading", problem)

    def _chunks(self, texts: "_Texts") -> Iterator[list[int]]:
        """All tokens, CHUNK at a time, whatever was read already."""
        held = list(self._opening)
        for ids in encode_pieces(self._model.tokenizer, texts):
            held += ids
            while len(held) >= CHUNK:
                yield held[:CHUNK]
                del held[:CHUNK]
        if held:
            yield held

    def _resume(self) -> None:
        """Go on from the checkpoint where there is one of the same reading."""
        try:
            found = self._place.checkpoint()
            if found is None:
                return
            if why := self._difference(found):
                self.notice = f"what an interrupted run has read is of no use: {why}"
                return
            start = self._model.load_snapshot(self._place.path / found.state)
            if start.position != found.tokens:
                raise FileFormatError(self._place.path, found.state, f"expected {found.tokens} tokens in it")
        except FileFormatError as error:
            self.notice = f"what an interrupted run has read is lost: {error}"
        else:
            self.kept, self._start, self._saved = found.tokens, start, found.state

    def _difference(self, found: Checkpoint) -> str | None:
        """Why a checkpoint is not of this reading; None where it is."""
        wanted = self._made
        if [source.sha256 for source in found.sources] != [source.sha256 for source in wanted.sources]:
            return "the text is another one"
        if (found.fingerprint, found.vocabulary) != (wanted.fingerprint, wanted.vocabulary):
            return "it was for another model"
        if found.form != wanted.form:
            return "it was " + ("in a turn of a chat" if found.form == "turn" else "plain text")
        return None if found.backend == wanted.backend else f"it was by the backend {found.backend}"

    def _keep(self, state: State) -> None:
        """Write a checkpoint."""
        made = replace(self._made, tokens=state.position, state=self._place.save(state))
        self._place.keep(made, self._saved)
        self.kept, self._saved = state.position, made.state

    def _record(self, state: State) -> Record:
        made, model = self._made, self._model
        return Record(
            version=1,
            form=made.form,
            fingerprint=made.fingerprint,
            model=str(model.file.metadata.get("general.name") or model.path.stem),
            backend=made.backend,
            tokens=state.position,
            sources=made.sources,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            state=self._place.save(state),
        )

    def close(self) -> None:
        """Let others read into the document's folder."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class _Span:
    """A text that was gone through, and what of it is read: characters `start` to `end`.

    In a turn, a text is without white space at both ends, as templates have a message; plain text only without its
    last newline, as `griffin generate` takes a prompt.
    """

    source: Source
    start: int
    end: int


class _Texts:
    """The pieces of all texts together, once; `nbytes` of them are read, and one of them may have `changed`."""

    def __init__(self, parts: Sequence[Part], spans: Sequence[_Span]) -> None:
        self.nbytes, self.changed = 0, False
        self._parts, self._spans = parts, spans

    def __iter__(self) -> Iterator[str]:
        for i, (part, span) in enumerate(zip(self._parts, self._spans, strict=True)):
            if i:
                yield _BETWEEN
            digest, start, at = hashlib.sha256(), self.nbytes, 0
            for piece in _decoded(part, _ENCODED, digest.update, self._count):
                if kept := piece[max(span.start - at, 0) : max(span.end - at, 0)]:
                    yield kept
                at += len(piece)
            if (self.nbytes - start, digest.hexdigest()) != (span.source.nbytes, span.source.sha256):
                self.changed = True
                raise GriffinError(f"{part.name}: has changed while it was read")

    def _count(self, raw: bytes) -> None:
        self.nbytes += len(raw)


def _survey(part: Part, form: Form) -> _Span:
    """Go through a text's bytes. Raises `FileFormatError` for one that is not UTF-8, or all white space."""
    digest, nbytes, at = hashlib.sha256(), 0, 0
    first, behind, tail = None, 0, ""  # where what is no white space begins and ends; the last two characters

    def count(raw: bytes) -> None:
        nonlocal nbytes
        nbytes += len(raw)

    for piece in _decoded(part, _SURVEYED, digest.update, count):
        if kept := piece.rstrip():
            first = at + len(piece) - len(piece.lstrip()) if first is None else first
            behind = at + len(kept)
        at, tail = at + len(piece), (tail + piece)[-2:]
    if first is None:
        raise FileFormatError(part.name, "text", "expected some, found none")
    source = Source(Path(part.name).name, nbytes, digest.hexdigest())
    if form == "turn":
        return _Span(source, first, behind)
    return _Span(source, 0, at - len(tail) + len(tail.removesuffix("\n").removesuffix("\r")))


def _decoded(part: Part, size: int, *seen: Callable[[bytes], None]) -> Iterator[str]:
    """A text in pieces of `size` bytes, each shown to `seen` before, without a byte-order mark."""
    decoder, at, begun = codecs.getincrementaldecoder("utf-8")(), 0, False
    try:
        with part.open() as file:
            raw = b"-"
            while raw:
                raw = file.read(size)
                for look in seen:
                    look(raw)
                waiting = len(decoder.getstate()[0])
                try:
                    piece = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    where = f"{error.reason} at byte {at - waiting + error.start}"
                    raise FileFormatError(part.name, "text", f"is not UTF-8: {where}") from None
                yield piece if begun else piece.removeprefix(codecs.BOM_UTF8.decode())
                begun = begun or bool(piece)
                at += len(raw)
    except OSError as error:
        raise FileFormatError(part.name, "text", f"cannot be read: {error.strerror}") from error


def _opening(model: Model, form: Form) -> list[int]:
    """The tokens before the text."""
    if form == "text":
        return model.tokenizer.encode("")
    template = ChatTemplate.from_gguf(model.path, model.file.metadata)
    if template is None:
        raise UnsupportedError(f"{model.path}: has no chat template, so a document is read as plain text")
    return template.opening(model.tokenizer)


def _nothing(model: Model, form: Form, sources: Sequence[Source]) -> Checkpoint:
    """What is to be read, none of it read."""
    vocabulary = {name: value for name, value in model.file.metadata.items() if name.startswith("tokenizer.")}
    return Checkpoint(
        version=1,
        form=form,
        fingerprint=fingerprint(model.file),
        backend=model.backend,
        vocabulary=hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest(),
        sources=tuple(sources),
        tokens=0,
        state="",
    )
