"""Documents as states: texts that a model has read once and that any number of answers begin from.

`reading.py` reads them, `document_files.py` says how they lie on the disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from griffin_gguf.runtime.atomic import atomic, check_targets
from griffin_gguf.runtime.document_files import Form, Place, Record, Source, names
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.reading import Part, Reading, Report
from griffin_gguf.runtime.saved_state import fingerprint
from griffin_gguf.runtime.snapshot import Snapshot

_PIECE = 1 << 20  # bytes copied at once


@dataclass(frozen=True)
class Document:
    """What was read, with which model.

    `form`: "turn", in a user's open turn, or "text", as it is. `fingerprint` and `model` are the model's, the latter
    its name; `backend` read it, `tokens` in all; `created` is a time in ISO 8601, UTC. `path` is the state's file
    (docs/state.md).
    """

    name: str
    form: Form
    fingerprint: str
    model: str
    backend: str
    tokens: int
    sources: tuple[Source, ...]
    created: str
    path: Path

    @property
    def nbytes(self) -> int:
        """Of the state's file. Raises `FileFormatError` where there is none."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise FileFormatError(self.path, "file", f"cannot be read: {error.strerror}") from error

    def snapshot(self, model: Model) -> Snapshot:
        """The state behind the document, last logits included: what every start from it goes on from.

        Raises `UnsupportedError` for a model or a backend that it was not read with, `FileFormatError` for a file that
        is not what was written.
        """
        if (own := fingerprint(model.file)) != self.fingerprint:
            raise UnsupportedError(
                f"document {self.name!r}: was read with another model, {self.model} ({self.fingerprint[:12]}); "
                f"{model.path.name} is {own[:12]}"
            )
        try:
            snapshot = model.load_snapshot(self.path)
        except FileFormatError as error:
            if self.backend == model.backend:
                raise
            problem = f"was read by the backend {self.backend}, and {model.backend} cannot go on from that"
            raise UnsupportedError(f"document {self.name!r}: {problem}: {error}") from error
        if snapshot.position != self.tokens or snapshot.logits is None:
            raise FileFormatError(self.path, "griffin.position", f"expected {self.tokens} tokens and the last logits")
        return snapshot


@dataclass(frozen=True)
class Unfinished:
    """A reading that was interrupted, `tokens` in."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Survey:
    """All that there is: documents and interrupted readings by name, and what is wrong with the rest."""

    documents: list[Document]
    unfinished: list[Unfinished]
    damaged: list[FileFormatError]


def documents() -> list[Document]:
    """All that are complete and sound, by name; `survey` says what is wrong with others."""
    return survey().documents


def find(name: str) -> Document:
    """The document of that name.

    Raises `UnsupportedError` where there is none, `FileFormatError` where its file is damaged.
    """
    document = _document(Place(name))
    if document is None:
        known = ", ".join(other for other in names() if Place(other).complete)
        hint = f"known: {known}" if known else "griffin read makes one"
        raise UnsupportedError(f"document {name!r}: there is none; {hint}")
    return document


def survey() -> Survey:
    """Everything, where one damaged document is not to hide the others."""
    found = Survey([], [], [])
    for name in names():
        place = Place(name)
        try:
            if (document := _document(place)) and document.nbytes:
                found.documents.append(document)
            if checkpoint := place.checkpoint():
                found.unfinished.append(Unfinished(name, checkpoint.tokens))
        except FileFormatError as error:
            found.damaged.append(error)
    return found


def expect(name: str) -> None:
    """Raise `UnsupportedError` where `delete` would find neither a document nor an unfinished reading."""
    Place(name).expect()


def delete(name: str) -> None:
    """Remove a document, or an unfinished reading, sound or not.

    Raises `UnsupportedError` where there is none, `BusyError` while it is being read.
    """
    Place(name).delete()


def export(name: str, target: Path) -> None:
    """Copy the state's file to `target`, for `Model.load_state`. Errors as of `find`, and of writing."""
    document = find(name)
    check_targets([target], [document.path])
    try:
        source = document.path.open("rb")
    except OSError as error:
        raise FileFormatError(document.path, "file", f"cannot be read: {error.strerror}") from error
    with source, atomic(target) as file:
        while piece := source.read(_PIECE):
            file.write(piece)
        file.sync()


def read(
    model: Model,
    parts: Sequence[Part],
    name: str,
    form: Form = "turn",
    report: Report | None = None,
    *,
    replace: bool = False,
) -> Document:
    """Read texts, a blank line between two, into the document `name`; or go on where a reading of them stopped.

    Errors as of `Reading`.
    """
    with Reading(model, parts, name, form, replacing=replace) as reading:
        reading.run(report)
    return find(name)


def _document(place: Place) -> Document | None:
    record: Record | None = place.record()
    if record is None:
        return None
    return Document(
        place.name,
        record.form,
        record.fingerprint,
        record.model,
        record.backend,
        record.tokens,
        record.sources,
        record.created,
        place.path / record.state,
    )
