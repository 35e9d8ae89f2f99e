"""What a conversation consists of, as values."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.snapshot import Snapshot

_Token = Annotated[int, msgspec.Meta(ge=0)]
#: Of a snapshot; a file may be called so.
SnapshotName = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{16}\Z")]


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, eq=False):
    """What a person said and what was answered; `prompt` and `said` are its part of S.

    `said` has the answer's tokens and, where no template writes the answer's end, its stop token. `system` is the
    system text that came with the message, if any. With `anew` S begins with this turn. `attempt` counts how often the
    answer was asked for again.
    """

    user: str
    answer: str
    prompt: list[_Token]
    said: list[_Token]
    before: SnapshotName
    after: SnapshotName
    system: str = ""
    anew: bool = False
    attempt: int = 0


@dataclass(frozen=True)
class Settings:
    """How to answer. Raises `UnsupportedError` for a value out of range."""

    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 2048  # of an answer
    stop: tuple[str, ...] = ()  # texts before which an answer ends

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or isinstance(self.max_tokens, bool) or self.max_tokens < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UnsupportedError(f"max_tokens: expected a whole number of at least 1, found {self.max_tokens!r}")
        if not all(self.stop):
            raise UnsupportedError("stop: expected no empty text among them")


@dataclass(frozen=True)
class Beginning:
    """A document that was read before the first turn.

    `form` "turn": within the first user's turn, so that the first message goes on behind it; "text": as it is.
    """

    name: str
    form: Literal["turn", "text"]
    snapshot: Snapshot


@dataclass
class Tally:
    """Tokens that were fed, and the model's seconds."""

    read: int = 0
    reading: float = 0.0
    written: int = 0
    writing: float = 0.0
