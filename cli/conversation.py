"""A conversation with a model: every turn is read once, and only what is new."""

from collections.abc import Iterator
from contextlib import contextmanager

from griffin_gguf.runtime.chat import ChatTemplate, Message, stop_tokens
from griffin_gguf.runtime.generate import Generation, generate
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.speculate import Speculation


class Conversation:
    """Turns of a person and a model over one state.

    `template` is the file's, None where it has none: then what the person writes is continued as plain text.
    """

    def __init__(
        self, model: Model, sampling: Sampling, max_tokens: int, speculation: Speculation | None = None
    ) -> None:
        self.template = ChatTemplate.from_gguf(model.path, model.file.metadata)
        self._model, self._sampling, self._max_tokens = model, sampling, max_tokens
        self._speculation = speculation
        self._stops = stop_tokens(model.file.metadata, model.tokenizer)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._begin()
        self._messages: list[Message] = []
        self._unfed: list[int] = []

    @contextmanager
    def ask(self, text: str) -> Iterator[Generation]:
        """Answer `text`: iterate over the generation within the block, to its end or until its `cancel`.

        Where the block raises, this turn never was; the next one reads the conversation before it anew (without
        a template: begins a new one).
        """
        said: Message = {"role": "user", "content": text}
        generation = generate(
            self._model,
            self._state,
            self._next_tokens(said),
            self._sampling,
            self._max_tokens,
            self._stops,
            speculation=self._speculation,
        )
        try:
            yield generation
        except BaseException:
            generation.close()
            messages = self._messages
            self.clear()
            self._messages = messages
            raise
        self._messages += [said, {"role": "assistant", "content": generation.text}]
        self._unfed = list(generation.unfed)
        if self.template is None and generation.stop_token is not None:
            self._unfed.append(generation.stop_token)

    def _next_tokens(self, said: Message) -> list[int]:
        """What the state has not read yet, `said` included."""
        tokenizer = self._model.tokenizer
        if self.template is None:
            return self._unfed + tokenizer.encode(said["content"], bos=not (self._state.position or self._unfed))
        messages = [*self._messages, said]
        if self._state.position:
            following = self.template.encode_next(tokenizer, messages)
            if following is not None:
                return self._unfed + following
            self._begin()
        return self.template.encode(tokenizer, messages)

    def _begin(self) -> None:
        """Read nothing so far."""
        self._state = self._model.new_state()
        if self._speculation:
            self._speculation.forget()
