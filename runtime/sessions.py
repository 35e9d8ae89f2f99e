"""Conversations on disk: each a folder `data_folder()/sessions/NAME` that one process at a time has open.

    session.json    the turns, their tokens, the settings (session_record.py)
    SNAPSHOT.state  a snapshot (docs/state.md), by the name that a turn has for it
    lock            held as long as the session is open (session_folders.py)

States are written first, then session.json at once and whole, then what it does not need is deleted. So after a crash
the session is as it was before, or as it is now. A turn's state that is not there is no damage: what it would have
spared is read again; only that of a document cannot be. Conversations are private: folders have mode 0700, files 0600.
"""

import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from griffin_gguf.runtime.conversation import Conversation, Shelf
from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.saved_state import fingerprint
from griffin_gguf.runtime.session_folders import (
    RECORD,
    STATE,
    Lock,
    abandoned,
    folder,
    if_free,
    made,
    names,
    naming,
    nbytes_of,
    place,
    sweep,
    unknown,
)
from griffin_gguf.runtime.session_record import Document, Record, check_tokens, read_record, record_of, write_record
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.speculate import Speculation
from griffin_gguf.runtime.turns import Beginning, Settings

#: Bytes of snapshots that a session may have on disk; those of the latest `LEAST_TURNS` are there in any case.
MOST_BYTES = 1 << 30
LEAST_TURNS = 4

#: Of sessions that nobody has named, so many stay; all but the newest keep only their last turn's snapshots.
UNNAMED = 8

_IN_MEMORY = 4  # snapshots of a session that stay in memory: its last two turns'


@dataclass(frozen=True)
class Entry:
    """A session in a list, `changed` in ISO 8601 and UTC.

    Of one whose session.json cannot be read, `problem` says why, and `record` is None.
    """

    name: str
    nbytes: int
    changed: str
    record: Record | None = None
    problem: GriffinError | None = None


def entries() -> list[Entry]:
    """All sessions, the one changed last first."""
    found = [_entry(folder() / name) for name in names()]
    return sorted(found, key=lambda entry: (entry.changed, entry.name), reverse=True)


def latest(model: Model) -> str:
    """The name of the session with this model that was changed last.

    Raises `GriffinError` where there is none, `FileFormatError` where one that cannot be read may be it.
    """
    own = fingerprint(model.file)
    for entry in entries():
        if entry.problem:
            raise entry.problem
        if entry.record and entry.record.model == own:
            return entry.name
    raise GriffinError(f"{folder()}: holds no conversation with {model_name(model)} to go on with")


def exists(name: str) -> bool:
    """Whether there is such a session. Raises `GriffinError` for a name that none can have."""
    return (place(name) / RECORD).is_file()


def delete(name: str) -> None:
    """Delete a session. Raises `GriffinError` for one that is not there, or is open."""
    if not exists(name):
        raise unknown(name)
    lock = Lock(place(name))
    shutil.rmtree(place(name))
    lock.release()


def keep(model: Model, name: str, conversation: Conversation) -> "Session":
    """A new session of that name with the conversation as it is now, open; no byte is copied that can be linked.

    Raises `GriffinError` as `Session.begin` and `Session.commit` do; there is no such session then.
    """
    session = Session.begin(model, name)
    try:
        for snapshot in conversation.snapshots()[: session.most]:
            conversation.shelf.export(snapshot, session.file(snapshot))
        session.commit(conversation)
    except BaseException:
        session.close()
        raise
    return session


def model_name(model: Model) -> str:
    """What people call the model."""
    name = model.file.metadata.get("general.name")
    return name if isinstance(name, str) and name else model.path.stem


class Session(Shelf):
    """A session that is open here; made by `begin`, `open` and `keep`.

    `name` is None as long as there is no folder: a session without a name of its own gets both by the first `commit`
    of a turn. `record` is what was found, None in a new one; `most` snapshots may lie on disk. `saved`: all that was
    to be kept is.
    """

    def __init__(self, model: Model, name: str | None, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(_IN_MEMORY)
        self.name = name
        self.unnamed = name is None
        self.record: Record | None = None
        self.saved = True
        self.most = max(most_bytes // (model.state_nbytes + 4 * model.vocab), 2 * LEAST_TURNS)
        self._model = model
        self._root: str | None = None  # the state of the document that it began after
        self._lock: Lock | None = None

    @classmethod
    def begin(cls, model: Model, name: str | None = None, most_bytes: int = MOST_BYTES) -> "Session":
        """A new one. Raises `GriffinError` for a name that none can have, or that one has."""
        session = cls(model, name, most_bytes)
        if name is not None:
            session._lock = made(place(name))
        return session

    @classmethod
    def open(cls, model: Model, name: str) -> "Session":
        """One that is there. Raises `GriffinError` for one that is not, is damaged, of another model, or open."""
        if not exists(name):
            raise unknown(name)
        session = cls(model, name)
        session._lock = Lock(session.path)
        try:
            session._read(session.path / RECORD)
        except BaseException:
            session.close()
            raise
        return session

    @property
    def path(self) -> Path:
        """Its folder, once it has a name."""
        assert self.name is not None, "it has none before its first turn"
        return place(self.name)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return nbytes_of(self.path) if self._lock else 0

    def settings(self) -> Settings:
        """Those that were found, or the usual ones."""
        return self.record.settings(self.path / RECORD) if self.record else Settings()

    def conversation(self, settings: Settings, speculation: Speculation | None = None) -> Conversation:
        """The conversation that was found, ready to go on at once.

        Raises `FileFormatError` for a state that is damaged, and `GriffinError` where that of the document is missing.
        """
        record, beginning = self.record, None
        assert record is not None, "it was opened, not begun"
        if document := record.document:
            if not self.file(document.state).exists():
                raise GriffinError(f"session {self.name}: the state of its document {document.name} is missing")
            beginning = Beginning(document.name, document.form, self._loaded(document.state))
        conversation = Conversation(self._model, settings, self, speculation, beginning)
        conversation.turns, conversation.system = list(record.turns), record.system
        conversation.tokens_read = record.tokens_read
        conversation.settle()
        return conversation

    def file(self, name: str) -> Path:
        """Where the snapshot of that name lies, or would."""
        return self.path / f"{name}{STATE}"

    def has(self, name: str) -> bool:
        """See `Shelf`."""
        return super().has(name) or (self._lock is not None and self.file(name).is_file())

    def get(self, name: str) -> Snapshot | None:
        """See `Shelf`. Raises `FileFormatError` for a damaged one."""
        near = super().get(name)
        if near is None and self.has(name):
            near = self._loaded(name, "delete this file, and its text is read again")
            self._remember(name, near)
        return near

    def export(self, name: str, target: Path) -> None:
        """See `Shelf`: one file under two names, where that can be."""
        if self._lock is None or not self.file(name).is_file():
            super().export(name, target)
            return
        try:
            target.hardlink_to(self.file(name))
        except OSError:  # on another file system, or on one without such links
            with naming(target):
                shutil.copyfile(self.file(name), target)
                target.chmod(0o600)

    def commit(self, conversation: Conversation) -> None:
        """See `Shelf`: it is all on the disk when this returns. Raises `GriffinError` where it cannot be."""
        self.saved = False
        self._write(conversation)
        super().commit(conversation)
        self.saved = True

    def _write(self, conversation: Conversation) -> None:
        if self._lock is None:
            if not conversation.turns:
                return
            self._lock = made(_unnamed_place())
            self.name = self._lock.folder.name
            with naming(folder()):
                _tidy()
        wanted = conversation.snapshots()[: self.most]
        for name in wanted:
            if not self.file(name).exists():
                super().export(name, self.file(name))
        document = self._document(conversation.beginning)
        write_record(self.path / RECORD, record_of(conversation, model_name(self._model), self.unnamed, document))
        sweep(self.path, {*wanted, *([document.state] if document else [])})

    def close(self) -> None:
        """Let others open it. One in which nothing was ever said was never there."""
        super().close()
        if self._lock is not None:
            if not (self.path / RECORD).exists():
                shutil.rmtree(self.path)
            self._lock.release()
            self._lock = None

    def _read(self, path: Path) -> None:
        """Take over what session.json says, once it is known to be right."""
        record, own = read_record(path), fingerprint(self._model.file)
        if record.model != own:
            found = f"{record.model_name} ({record.model[:12]})"
            raise GriffinError(
                f"session {self.name}: is a conversation with another model, {found}; this is "
                f"{model_name(self._model)} ({own[:12]})"
            )
        check_tokens(path, record, self._model.vocab)
        record.settings(path)
        self.record, self.unnamed = record, record.unnamed
        self._root = record.document.state if record.document else None

    def _document(self, beginning: Beginning | None) -> Document | None:
        """What session.json says of the document, whose state lies here then."""
        if beginning is None:
            return None
        name = self._root or secrets.token_hex(8)
        if not self.file(name).exists():
            beginning.snapshot.save(self.file(name), private=True)
        self._root = name
        return Document(beginning.name, beginning.form, name)

    def _loaded(self, name: str, remedy: str = "") -> Snapshot:
        """A snapshot's file. Raises `FileFormatError` that says what is wrong with it, and what helps."""
        path, backend = self.file(name), self._model.backend
        try:
            return self._model.load_snapshot(path)
        except FileFormatError as error:
            problem = str(error).removeprefix(f"{path}: {error.field}: ")
            if problem.startswith("expected dtype"):  # the one thing in which the two backends' states differ
                other = "numpy" if backend == "ggml" else "ggml"
                problem, remedy = f"was kept by another backend than {backend}", f"go on with --backend {other}"
            raise FileFormatError(path, error.field, f"{problem}; {remedy}" if remedy else problem) from error


def _tidy() -> None:
    """One more unnamed session begins: of those before it only the newest stay, each with its last turn's snapshots."""
    before = [entry for entry in entries() if entry.record and entry.record.unnamed]
    for i, entry in enumerate(before):
        with if_free(path := folder() / entry.name) as free:
            record = _entry(path).record if free else None
            if record is None or not entry.record or record.changed != entry.record.changed:
                continue  # another process has just gone on with it
            if i >= UNNAMED - 1:
                shutil.rmtree(path)
            else:
                last = [name for turn in record.turns[-1:] for name in (turn.before, turn.after)]
                sweep(path, {*last, *([record.document.state] if record.document else [])})
    for path in filter(abandoned, folder().iterdir()):
        with if_free(path) as free:
            if free and abandoned(path):
                shutil.rmtree(path)


def _entry(path: Path) -> Entry:
    nbytes, file = nbytes_of(path), path / RECORD
    try:
        record = read_record(file)
    except GriffinError as error:
        changed = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat()
        return Entry(path.name, nbytes, changed, problem=error)
    return Entry(path.name, nbytes, record.changed, record)


def _unnamed_place() -> Path:
    """A folder named by the clock."""
    base = datetime.now().strftime("chat-%Y%m%d-%H%M%S")
    return next(path for i in range(1000) if not (path := folder() / (f"{base}-{i}" if i else base)).exists())
