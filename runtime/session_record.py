"""session.json: what a session on disk says of its conversation, read strictly."""

from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec

from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.conversation import Conversation
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.turns import Settings, SnapshotName, Turn

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the conversation began after; its state is the session's own, whatever becomes of the document."""

    name: str
    form: Literal["turn", "text"]
    state: SnapshotName


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that session.json says.

    `model` is a fingerprint, `model_name` for people, `changed` ISO 8601 in UTC. `unnamed` is a session that got its
    name from the clock. `sampling` has the fields of `Sampling`.
    """

    format: Literal[1] = 1
    model: str
    model_name: str
    changed: str
    unnamed: bool
    system: str
    sampling: dict[str, float | int | None]
    max_tokens: int
    stop: list[str]
    tokens_read: _Count
    document: Document | None
    turns: list[Turn]

    def settings(self, path: Path) -> Settings:
        """How to answer. Raises `FileFormatError` naming `path` for what is no setting, or out of range."""
        known = [field.name for field in fields(Sampling)]
        for name in self.sampling.keys() - set(known):
            raise FileFormatError(path, "sampling", f"expected some of {', '.join(known)}, found {name}")
        try:
            return Settings(Sampling(**cast(Any, self.sampling)), self.max_tokens, tuple(self.stop))
        except UnsupportedError as error:
            raise FileFormatError(path, "settings", str(error)) from None


def record_of(conversation: Conversation, model_name: str, unnamed: bool, document: Document | None) -> Record:
    """The conversation as it is now."""
    settings = conversation.settings
    return Record(
        model=conversation.fingerprint,
        model_name=model_name,
        changed=datetime.now(UTC).isoformat(),
        unnamed=unnamed,
        system=conversation.system,
        sampling=asdict(settings.sampling),
        max_tokens=settings.max_tokens,
        stop=list(settings.stop),
        tokens_read=conversation.tokens_read,
        document=document,
        turns=conversation.turns,
    )


def write_record(path: Path, record: Record) -> None:
    """Put it in the place of an older one, at once and whole. Raises `GriffinError` naming `path`."""
    with atomic(path, private=True) as file:
        file.write(msgspec.json.encode(record))
        file.sync()


def read_record(path: Path) -> Record:
    """What `write_record` wrote. Raises `FileFormatError` naming the field for anything else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except OSError as error:
        raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(path, "file", f"is no conversation of this version: {error}") from None


def check_tokens(path: Path, record: Record, vocab: int) -> None:
    """Raise `FileFormatError` for a token that the vocabulary does not have."""
    for i, turn in enumerate(record.turns):
        for name, tokens in (("prompt", turn.prompt), ("said", turn.said)):
            if max(tokens, default=0) >= vocab:
                raise FileFormatError(path, f"turns[{i}].{name}", f"expected tokens below {vocab}, found {max(tokens)}")
