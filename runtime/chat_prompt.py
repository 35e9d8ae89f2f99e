"""From a conversation's rendered text to tokens, and where other conversations are likely to part from it.

Pure functions; `chat.py` renders. A conversation is a list of spans of tokens: what the template wrote (with the
texts of messages in it), then an answer as it was sampled, then what the template wrote, and so on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from griffin_gguf.runtime.tokenizer import Tokenizer

#: Names that end a turn wherever a vocabulary has them as control tokens. (In Gemma's, `</s>` is a mere HTML tag.)
END_TOKENS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "</s>")

#: Marks are no closer than this many tokens: reading so few again costs less than keeping a state for them.
NEAREST = 16

#: The tokens that an earlier answer was sampled as: asked with the tokens before it and its text.
Said = Callable[[Sequence[int], str], Sequence[int] | None]


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as tokens that end where the answer begins, or goes on.

    `marks` are counts of them, ascending, 0 < mark < len(tokens), at which other conversations are likely to part from
    this one: where the leading system text ends, and before each later turn's first control token. They are hints
    for whoever keeps states. Where the last message is an assistant's, the last `begun` tokens are that message.
    """

    tokens: list[int]
    marks: tuple[int, ...]
    begun: int = 0


def walk(tokenizer: Tokenizer, parts: Sequence[str], answers: Sequence[str], said: Said, bos: bool) -> list[list[int]]:
    """The spans of a conversation for as long as `said` knows its answers.

    `parts` is the text around the answers, one more than there are `answers`. What comes back begins and ends with
    what the template wrote; its last span stands before the first answer that `said` does not know.
    """
    spans = [tokenizer.encode(parts[0], bos=bos, special=True)]
    before = list(spans[0])
    for answer, part in zip(answers, parts[1:], strict=True):
        known = said(before, answer)
        if known is None:
            break
        spans += [list(known), tokenizer.encode(part, bos=False, special=True)]
        before += spans[-2] + spans[-1]
    return spans


def later_turns(tokenizer: Tokenizer, spans: Sequence[Sequence[int]]) -> list[int]:
    """Counts of tokens after which a turn begins, all but the first, ascending.

    A turn begins with the control token that follows the end of another, or right behind that end where only text
    follows. Control tokens in a sampled answer are no turns.
    """
    ends = {tokenizer.control_tokens.get(name, tokenizer.eos) for name in END_TOKENS} | {tokenizer.eos}
    found: list[int] = []
    start = 0
    for i, span in enumerate(spans):
        if i % 2 == 0:
            found += [start + _turn_behind(tokenizer, span, at) for at, token in enumerate(span) if token in ends]
        start += len(span)
    return found


def _turn_behind(tokenizer: Tokenizer, span: Sequence[int], end: int) -> int:
    """Where in `span` the turn begins of which the last one's end token is at `end`."""
    at = end + 1
    while at < len(span) and tokenizer.piece(span[at]).isspace():
        at += 1
    return at if at < len(span) and tokenizer.name(span[at]) in tokenizer.control_tokens else end + 1


def marks(tokens: Sequence[int], turns: Sequence[int], system: int | None, begun: int) -> tuple[int, ...]:
    """The marks of a prompt: `system`, where its system text ends, and of `turns` those that are far enough apart.

    The turn of the answer itself needs none where nothing of it is there yet: the prompt's end is as good.
    """
    last = len(tokens) - (0 if begun else NEAREST - 1)
    wanted = [turn for turn in turns[:-1] if turn < len(tokens)] + [turn for turn in turns[-1:] if turn < last]
    kept: list[int] = [] if system is None or not 0 < system < len(tokens) else [system]
    for turn in wanted:
        if turn >= (kept[-1] if kept else 0) + NEAREST:
            kept.append(turn)
    return tuple(kept)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
