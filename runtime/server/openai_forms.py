"""The forms of an answer in OpenAI's API: a chat's message, or the older plain completion."""

from collections.abc import Sequence
from typing import Protocol

from griffin_gguf.runtime.logprobs import TokenLogprobs
from griffin_gguf.runtime.server.answers import Piece, Reply
from griffin_gguf.runtime.server.openai_messages import (
    Alternative,
    AnswerMessage,
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    Choice,
    CompletionLogprobs,
    Delta,
    Finish,
    Kind,
    Logprob,
    TextChoice,
)
from griffin_gguf.runtime.tokenizer import StreamDecoder, Tokenizer

_LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not, in OpenAI's API too


class Form(Protocol):
    """One of an answer's choices in the making. `prefix` is how ids begin, `whole` and `chunk` are kinds of object."""

    prefix: str
    whole: Kind
    chunk: Kind

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None: ...

    def opening(self) -> Choice | None:
        """What a stream begins with."""
        ...

    def piece(self, piece: Piece) -> Choice:
        """What a stream adds."""
        ...

    def ending(self, finish: Finish) -> Choice:
        """What a stream ends with."""
        ...

    def complete(self, pieces: Sequence[Piece], finish: Finish) -> Choice:
        """All of it."""
        ...


class ChatForm:
    """See the module's head."""

    prefix = "chatcmpl-"
    whole: Kind = "chat.completion"
    chunk: Kind = "chat.completion.chunk"

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._index, self._tokenizer, self._wanted = index, tokenizer, logprobs

    def opening(self) -> Choice | None:
        """Whose message it is."""
        return ChatDelta(index=self._index, finish_reason=None, delta=Delta("assistant", ""), logprobs=None)

    def piece(self, piece: Piece) -> Choice:
        """More of the message."""
        logprobs = self._logprobs(piece.logprobs)
        return ChatDelta(index=self._index, finish_reason=None, delta=Delta(content=piece.text), logprobs=logprobs)

    def ending(self, finish: Finish) -> Choice:
        """Why it ended."""
        return ChatDelta(index=self._index, finish_reason=finish, delta=Delta(), logprobs=None)

    def complete(self, pieces: Sequence[Piece], finish: Finish) -> Choice:
        """The message."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([one for piece in pieces for one in piece.logprobs])
        return ChatChoice(index=self._index, finish_reason=finish, message=AnswerMessage(text), logprobs=logprobs)

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self._wanted:
            return None
        return ChatLogprobs([Logprob(*self._token(o.token, o.logprob), self._others(o)) for o in found])

    def _others(self, one: TokenLogprobs) -> list[Alternative]:
        return [Alternative(*self._token(*other)) for other in one.top]

    def _token(self, token: int, logprob: float) -> tuple[str, float, list[int] | None]:
        raw = self._tokenizer.piece(token)
        text = raw.decode("utf-8", "replace") if raw else self._tokenizer.name(token)
        return text, finite(logprob), list(raw) or None


class TextForm:
    """See the module's head. Counts characters on the way: one instance makes one choice, once."""

    prefix = "cmpl-"
    whole: Kind = "text_completion"
    chunk: Kind = "text_completion"

    def __init__(self, index: int, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._index, self._tokenizer, self._wanted = index, tokenizer, logprobs
        self._decoder, self._offset = StreamDecoder(tokenizer), 0

    def opening(self) -> Choice | None:
        """Nothing."""
        return None

    def piece(self, piece: Piece) -> Choice:
        """More text."""
        return self._choice(piece.text, self._logprobs(piece.logprobs), None)

    def ending(self, finish: Finish) -> Choice:
        """Why it ended."""
        return self._choice("", None, finish)

    def complete(self, pieces: Sequence[Piece], finish: Finish) -> Choice:
        """The text."""
        text = "".join(piece.text for piece in pieces)
        return self._choice(text, self._logprobs([one for piece in pieces for one in piece.logprobs]), finish)

    def _choice(self, text: str, logprobs: CompletionLogprobs | None, finish: Finish | None) -> Choice:
        return TextChoice(index=self._index, finish_reason=finish, text=text, logprobs=logprobs)

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> CompletionLogprobs | None:
        if not self._wanted:
            return None
        made = CompletionLogprobs([], [], [], [])
        for one in found:
            own = self._shown(one.token)
            made.tokens.append(own)
            made.token_logprobs.append(finite(one.logprob))
            top = {self._shown(token): finite(logprob) for token, logprob in one.top}
            made.top_logprobs.append(top | {own: finite(one.logprob)})
            made.text_offset.append(self._offset)
            self._offset += len(self._decoder.push(one.token))
        return made

    def _shown(self, token: int) -> str:
        """A token as text; one that is part of a character as its bytes, so that no two look alike."""
        raw = self._tokenizer.piece(token)
        try:
            return raw.decode() or self._tokenizer.name(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """As JSON can have it."""
    return max(logprob, _LEAST_LOGPROB)


def finish_of(reply: Reply) -> Finish:
    """Why an answer ended, in OpenAI's words."""
    assert reply.finish in ("stop", "length"), reply.finish
    return "stop" if reply.finish == "stop" else "length"
