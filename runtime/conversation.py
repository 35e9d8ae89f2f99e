"""A conversation: turns of a person and a model over one state, with a way back to each of them.

    S = what it begins with (nothing, or a document), then the tokens of each turn: its prompt, its answer

A snapshot knows by its position how much of S it has read, so from whichever is at hand, S from there on is all that
remains to be read. Each turn leaves two: `before` its answer, where the prompt ends and the logits are at hand, and
`after` it. So going back computes nothing, as long as the snapshot is kept; and the turns alone say what the
conversation is: the state follows when the next answer is asked for.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.chat import ChatTemplate, Message, stop_tokens
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.generate import Finish, Generation, generate
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.speculate import Speculation
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.turns import Beginning, Settings, Tally, Turn

#: Snapshots of a conversation that stay in memory.
IN_MEMORY = 8

#: Tokens of S that a drafter is told of after the state has gone to another place: enough to guess by, and soon read.
_TOLD = 2048

#: What stands for a system text where a template is tried; reserved by Unicode for use inside programs.
_MARK = "\ufdd1system\ufdd1"

#: (tokens read, tokens to be read before the answer)
Report = Callable[[int, int], None]


class Shelf:
    """A conversation's snapshots by name: here only the latest few, in memory."""

    def __init__(self, most: int = IN_MEMORY) -> None:
        self._most = most
        self._near: OrderedDict[str, Snapshot] = OrderedDict()

    def put(self, snapshot: Snapshot) -> str:
        """Keep it, as long as there is room; its name."""
        name = secrets.token_hex(8)
        self._remember(name, snapshot)
        return name

    def has(self, name: str) -> bool:
        """Whether it is still kept."""
        return name in self._near

    def get(self, name: str) -> Snapshot | None:
        """The snapshot of that name; None where it is no longer kept."""
        return self._near.get(name)

    def export(self, name: str, target: Path) -> None:
        """Put it into the file `target` too (docs/state.md, mode 0600), where it is kept. Raises `GriffinError`."""
        if (snapshot := self._near.get(name)) is not None:
            snapshot.save(target, private=True)

    def commit(self, conversation: "Conversation") -> None:
        """The conversation is this now: what it does not need may go."""
        for name in self._near.keys() - set(conversation.snapshots()):
            del self._near[name]

    def close(self) -> None:
        """Nothing will be asked any more."""
        self._near.clear()

    def _remember(self, name: str, snapshot: Snapshot) -> None:
        self._near[name] = snapshot
        while len(self._near) > self._most:
            self._near.popitem(last=False)


class Conversation:
    """Turns of a person and a model.

    `template` is the file's, None where it has none: then what the person writes is continued as plain text. `turns`,
    `system` and `settings` are the conversation; `tokens_read` counts what the model has read for it, once and again.
    `system` may change at any time: the next message says it to the model. Whoever wants the conversation kept calls
    `commit` after what changed it.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings | None = None,
        shelf: Shelf | None = None,
        speculation: Speculation | None = None,
        beginning: Beginning | None = None,
    ) -> None:
        self.template = ChatTemplate.from_gguf(model.path, model.file.metadata)
        if beginning and beginning.form == "turn" and self.template is None:
            raise UnsupportedError(
                f"{model.path}: has no chat template, and {beginning.name} was read in a turn of one"
            )
        self.turns: list[Turn] = []
        self.settings = settings or Settings()
        self.shelf = shelf or Shelf()
        self.beginning = beginning
        self.tokens_read = 0
        self.tally = Tally()
        self._model, self._speculation = model, speculation
        self._system = ""
        self._stops = stop_tokens(model.file.metadata, model.tokenizer)
        self._state = model.new_state()
        self._root = beginning.snapshot if beginning else self._state.snapshot()
        self._standing: Turn | Literal["root", "elsewhere"] = "elsewhere"  # the turn after which the state stands

    @property
    def system(self) -> str:
        """The system text. Setting it raises `UnsupportedError` where there is no template, and so no place for one."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        if text and self.template is None:
            raise UnsupportedError(f"{self._model.path}: has no chat template, and so no place for a system text")
        self._system = text

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self._state.owner.fingerprint

    @property
    def tokens(self) -> int:
        """Tokens that the conversation has: the length of S."""
        return self._root.position + len(self._sequence(self.turns))

    @property
    def last(self) -> Turn:
        """The last turn. Raises `UnsupportedError` at the beginning."""
        if not self.turns:
            raise UnsupportedError("nothing has been said yet")
        return self.turns[-1]

    def snapshots(self) -> list[str]:
        """The names of all turns' snapshots, the latest first."""
        return [name for turn in reversed(self.turns) for name in (turn.after, turn.before)]

    def commit(self) -> None:
        """Have it kept as it is now. Raises `GriffinError` where that fails; the conversation is whole still."""
        self.shelf.commit(self)

    def ask(self, text: str, report: Report | None = None) -> AbstractContextManager[Generation]:
        """Answer `text`: iterate over the generation within the block, to its end or until its `cancel`.

        Where the block raises, or nothing was answered before a cancel, this turn never was.
        """
        return self._answer(self.turns, text, 0, report)

    def edit(self, text: str, report: Report | None = None) -> AbstractContextManager[Generation]:
        """The same with `text` in the place of the last message and its answer, which stay where it fails."""
        last = self.last
        return self._answer([turn for turn in self.turns if turn is not last], text, 0, report)

    @contextmanager
    def regenerate(self, report: Report | None = None) -> Generator[Generation]:
        """The last message's answer again, another one where the settings leave a choice; as `ask`.

        With a seed it is drawn with the next one, as many times as it was asked for.
        """
        base, turn = self.turns[:-1], self.last
        turn = msgspec.structs.replace(turn, attempt=turn.attempt + 1)
        snapshot = self.shelf.get(turn.before) if turn.system == self._system_to_say(base) else None
        if snapshot is None:
            with self._answer(base, turn.user, turn.attempt, report) as generation:
                yield generation
            return
        said = self._sequence(base, turn)
        self._resume(snapshot, said)
        with self._generating(base, turn, [], said, None) as generation:
            yield generation

    def undo(self) -> Turn:
        """Take back the last message and its answer, which are returned. Raises `UnsupportedError` at the beginning."""
        turn = self.last
        self.turns = self.turns[:-1]
        return turn

    def clear(self) -> None:
        """Begin anew, with the same system text and after the same document."""
        self.turns = []

    def left_to_read(self) -> int:
        """Tokens of the conversation that the next message has to read once more: those that no snapshot has read."""
        count = 0
        for turn in reversed(self.turns):
            if self.shelf.has(turn.after):
                return count
            count += len(turn.said)
            if self.shelf.has(turn.before):
                return count
            count += len(turn.prompt)
            if turn.anew:
                break
        return count

    def settle(self) -> None:
        """Bring the state to where the conversation stands, as far as snapshots are kept, so that an answer is quick.

        Raises `FileFormatError` for a snapshot that is damaged, or none of this conversation.
        """
        self._settle(self.turns)

    @contextmanager
    def _answer(self, base: Sequence[Turn], text: str, attempt: int, report: Report | None) -> Generator[Generation]:
        """Answer `text` after the turns `base`."""
        system = self._system_to_say(base)
        prompt, anew = self._prompt(base, text, system)
        turn = Turn(text, "", prompt, [], "", "", system, anew, attempt)
        before = self._sequence([] if anew else base)
        self._settle([] if anew else base)
        at = self._state.position - self._root.position
        with self._generating(base, turn, before[at:] + prompt, before[:at], report) as generation:
            yield generation

    @contextmanager
    def _generating(
        self, base: Sequence[Turn], turn: Turn, tokens: list[int], before: list[int], report: Report | None
    ) -> Generator[Generation]:
        """Feed `tokens` to a state that has read `before`, and sample; then the turns are `base` and this one."""
        reader = _Reader(self._model, len(tokens), report)
        settings, start = self.settings, self._state.position
        generation = generate(
            reader,
            self._state,
            tokens,
            _of_attempt(settings.sampling, turn.attempt),
            settings.max_tokens,
            self._stops,
            settings.stop,
            self._speculation,
            before=before,
        )
        self._standing = "elsewhere"
        try:
            yield generation
        finally:
            generation.close()
            self._count(generation, self._state.position - start)
        if generation.finish is Finish.CANCELLED and not generation.tokens:
            return
        ended = self.template is None and generation.stop_token is not None
        said = generation.tokens + ([generation.stop_token] if ended and generation.stop_token is not None else [])
        turn = msgspec.structs.replace(
            turn,
            answer=generation.text,
            said=said,
            before=turn.before if reader.snapshot is None else self.shelf.put(reader.snapshot),
            after=self.shelf.put(self._state.snapshot()),
        )
        self.turns = [*base, turn]
        self._standing = turn

    def _count(self, generation: Generation, fed: int) -> None:
        """Note how many tokens were fed for this answer, and how long that took."""
        written = min(fed, len(generation.tokens) - len(generation.unfed)) if generation.tokens else 0
        self.tokens_read += fed
        self.tally.read += fed - written
        self.tally.reading += generation.prefill_seconds
        self.tally.written += written
        self.tally.writing += generation.decode_seconds

    def _sequence(self, turns: Sequence[Turn], last: Turn | None = None) -> list[int]:
        """S behind the beginning, as of these turns; then the prompt of `last`."""
        parts: list[list[int]] = [] if last is None else [last.prompt]
        if last is None or not last.anew:
            for turn in reversed(turns):
                parts += [turn.said, turn.prompt]
                if turn.anew:
                    break
        return [token for part in reversed(parts) for token in part]

    def _settle(self, base: Sequence[Turn]) -> None:
        """Let the state have read of S what the nearest snapshot has, and nothing else."""
        if self._standing == "root" if not base else self._standing is base[-1]:
            return
        said = self._sequence(base)
        for turn in reversed(base):
            for name in (turn.after, turn.before):
                if (snapshot := self.shelf.get(name)) is not None:
                    self._resume(snapshot, said)
                    self._standing = base[-1]
                    return
            if turn.anew:
                break
        self._resume(self._root, said)
        self._standing = base[-1] if base else "root"

    def _resume(self, snapshot: Snapshot, said: list[int]) -> None:
        """Go on from there; `said` is S behind the beginning."""
        count = snapshot.position - self._root.position
        if not 0 <= count <= len(said):
            raise GriffinError(f"snapshot: is of {snapshot.position} tokens, and none of this conversation")
        self._standing = "elsewhere"
        self._state.resume(snapshot)
        if self._speculation:
            self._speculation.forget()
            self._speculation.read(said[max(count - _TOLD, 0) : count])

    def _system_to_say(self, base: Sequence[Turn]) -> str:
        """The system text that the next message has to bring along."""
        known = next((turn.system for turn in reversed(base) if turn.system), "")
        return self.system if self.system != known else ""

    def _prompt(self, base: Sequence[Turn], text: str, system: str) -> tuple[list[int], bool]:
        """The tokens of this message behind S as of `base`; or of everything, and True."""
        tokenizer, beginning = self._model.tokenizer, self.beginning
        if self.template is None:
            return tokenizer.encode(text, bos=not base and beginning is None), not base
        messages = self._messages(base, system, text)
        if base:
            following = self.template.encode_next(tokenizer, messages)
            if following is not None:
                return following, False
        document = beginning is not None and beginning.form == "turn"
        tokens = self.template.prompt(tokenizer, messages, document=document).tokens
        return (_without_bos(tokenizer, tokens) if beginning and not document else tokens), True

    def _messages(self, base: Sequence[Turn], system: str, text: str) -> list[Message]:
        """Turns and a new message as the template takes them, each with the system text that comes along."""
        messages: list[Message] = []
        for said, user, answer in [*((turn.system, turn.user, turn.answer) for turn in base), (system, text, None)]:
            if said and (not messages or self._takes_later_systems):
                messages.append({"role": "system", "content": said})
            elif said:
                user = f"{said}\n\n{user}"
            messages.append({"role": "user", "content": user})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    @cached_property
    def _takes_later_systems(self) -> bool:
        """Whether a system text behind an answer is a message of its own: many templates refuse it, some drop it.

        Where a template has no place for any, it puts the text in front of the user's itself.
        """
        assert self.template is not None, "without one there is no system text"
        roles = (("user", "a"), ("assistant", "b"), ("system", _MARK), ("user", "c"))
        messages = [{"role": role, "content": content} for role, content in roles]
        try:
            return not self.template.takes_system or _MARK in self.template.render(messages)
        except FileFormatError:
            raise
        except GriffinError:
            return False


class _Reader:
    """The model as `generate` sees it: where the prompt has been read, there is a snapshot of the state."""

    def __init__(self, model: Model, prompt: int, report: Report | None) -> None:
        self._model, self._prompt, self._report = model, prompt, report
        self._read = 0
        self.snapshot: Snapshot | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """See `LanguageModel`."""
        return self._model.tokenizer

    def forward(self, tokens: Sequence[int], state: Any) -> NDArray[np.float32]:
        """See `LanguageModel`."""
        if self._report and self._read == 0 < self._prompt:
            self._report(0, self._prompt)
        logits = self._model.forward(tokens, state)
        if self._read < self._prompt:
            self._read += len(tokens)
            if self._report:
                self._report(self._read, self._prompt)
            if self._read == self._prompt:
                self.snapshot = state.snapshot()
        return logits


def _of_attempt(sampling: Sampling, attempt: int) -> Sampling:
    """With a seed: the next one for each attempt, or an answer that was asked for again would be the same."""
    return sampling if sampling.seed is None or not attempt else replace(sampling, seed=sampling.seed + attempt)


def _without_bos(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    return tokens[1:] if tokens[:1] == [tokenizer.bos] else tokens
