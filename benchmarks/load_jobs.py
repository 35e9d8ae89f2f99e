"""What clients of a loaded server ask, what the model says to it by itself, and whether an answer is that.

At temperature 0 an answer is decided by its prompt. Only rounding, which differs between a pass for one text and one
for many, may turn it where two tokens are as good as equal; so a solo run keeps how far apart the best two were.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime import Model
from griffin_gguf.runtime.chat import ChatTemplate, stop_tokens
from griffin_gguf.runtime.generate import generate
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.tokenizer import Tokenizer

#: Best two logits nearer than this part of the largest are a tie for passes that round in different ways.
TIE = 1e-3

#: "" is a conversation without a system text; the others are shared by many.
_SYSTEMS = (
    "",
    "You are a dictionary. Answer in one sentence, in plain words, and never with a question of your own.",
    "You are a lady of quality who has read every novel that was ever printed, and remembers all of them but one. "
    "You answer at some length, with the manners of your time, and mention the weather wherever that is no rudeness.",
)
_ASKED = (
    "gentleman",
    "cynic",
    "saint",
    "daemon",
    "bug",
    "hacker",
    "war",
    "politician",
    "novel",
    "machine",
    "kluge",
    "faith",
)
_LATER = ("And a lady?", "Why do you say so?", "Is that all that there is to be said about it?")
_OPENINGS = (
    "It was a fine morning in May, and Elizabeth",
    "CHAPTER I\n\n",
    '"My dear Mr. Bennet," said his lady to him one day,',
    "The party drove off in very good spirits; and",
    "Emma could not help thinking that Mr. Knightley",
    "Sir Walter Elliot, of Kellynch Hall, in Somersetshire,",
    "Captain Wentworth had no fortune. He had been",
    "Mr. Darcy walked about the room, and",
)  # fmt: skip


class Verdict(Enum):
    """What an answer is, beside the solo run."""

    SAME = "same"
    TIE = "tie"  # another from a token on whose rival was as good
    WRONG = "wrong"


@dataclass(frozen=True)
class Solo:
    """An answer by itself.

    Token i begins at character `starts[i]`; `margins[i]` is how far ahead it was, as a part of the largest logit. Where
    a stop token ended the answer it is the last one of both.
    """

    text: str
    starts: tuple[int, ...]
    margins: tuple[float, ...]

    def judge(self, text: str, reach: int) -> Verdict:
        """What `text` is; `reach` is the length of the longest token, by which a difference may show late."""
        if text == self.text:
            return Verdict.SAME
        pairs = zip(text, self.text, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(self.text)))
        near = (start for start, margin in zip(self.starts, self.margins, strict=True) if margin < TIE)
        return Verdict.TIE if any(start <= first < start + reach for start in near) else Verdict.WRONG


@dataclass(frozen=True)
class Job:
    """A prompt, `messages` of a chat or else a `text`, and at most how many tokens shall answer it.

    A prompt may have two readings: an earlier answer as the tokens that it was sampled as, which a server remembers
    for a time, and as its text encoded anew. Where these differ there are two solo runs.
    """

    limit: int
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    solos: tuple[Solo, ...] = ()

    def judge(self, text: str, reach: int) -> Verdict:
        """The best that `text` is by any of them."""
        verdicts = {solo.judge(text, reach) for solo in self.solos}
        return next(verdict for verdict in Verdict if verdict in verdicts)


@dataclass
class Jobs:
    """All that is asked: first messages, each with those that may follow its answer; texts; and long texts."""

    chats: list[tuple[Job, list[Job]]] = field(default_factory=list[tuple[Job, list[Job]]])
    texts: list[Job] = field(default_factory=list[Job])
    long: list[Job] = field(default_factory=list[Job])
    reach: int = 0  # characters of the longest token

    @property
    def all(self) -> list[Job]:
        """One after the other."""
        return [job for first, later in self.chats for job in (first, *later)] + self.texts + self.long

    @property
    def margins(self) -> list[float]:
        """Of all tokens."""
        return [margin for job in self.all for solo in job.solos for margin in solo.margins]


class _Noting:
    """The model as `generate` sees it, with a note of every margin."""

    def __init__(self, model: Model) -> None:
        self._model, self.margins = model, list[float]()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._model.tokenizer

    def forward(self, tokens: Sequence[int], state: Any) -> NDArray[np.float32]:
        """The model's. Prompts are shorter than a chunk here, so that each pass chooses a token."""
        logits = self._model.forward(tokens, state)
        second, best = np.partition(logits, -2)[-2:]
        self.margins.append(float((best - second) / np.abs(logits).max()))
        return logits


class Solist:
    """Runs jobs by themselves."""

    def __init__(self, model: Model) -> None:
        template = ChatTemplate.from_gguf(Path(model.path), model.file.metadata)
        assert template is not None, "the demo model has one"
        self._model, self._template = model, template
        self._stops = stop_tokens(model.file.metadata, model.tokenizer)

    def jobs(self, long: int, seed: int) -> Jobs:
        """All jobs, `long` of them long, with their answers."""
        rng, vocabulary = random.Random(seed), self._model.hp.vocab
        made = Jobs(reach=max(len(self._model.tokenizer.decode([token])) for token in range(vocabulary)))
        for system in _SYSTEMS:
            for thing in _ASKED:
                turns = [{"role": "user", "content": f"What is a {thing}?"}]
                first = [{"role": "system", "content": system}, *turns] if system else turns
                made.chats.append(self._chat(first, rng))
        made.texts = [self._run(Job(rng.randint(16, 64), text=text)) for text in _OPENINGS]
        endings = ("and", "but", "for", "so that", "while")
        made.long = [
            self._run(Job(256, text=f"{_OPENINGS[i % len(_OPENINGS)]} {endings[i % len(endings)]}"))
            for i in range(long)
        ]
        return made

    def _chat(self, messages: list[dict[str, str]], rng: random.Random) -> tuple[Job, list[Job]]:
        """A first turn and what may follow it."""
        job = Job(rng.randint(16, 96), tuple(messages))
        tokens = self._template.prompt(self._model.tokenizer, messages).tokens
        solo, said = self._answer(tokens, job.limit)
        answered = [*messages, {"role": "assistant", "content": solo.text}]
        later = [
            self._run(
                Job(rng.randint(16, 64), (*answered, {"role": "user", "content": text})), (tokens, solo.text, said)
            )
            for text in _LATER
        ]
        return Job(job.limit, job.messages, solos=(solo,)), later

    def _run(self, job: Job, known: tuple[list[int], str, list[int]] | None = None) -> Job:
        """A job with its answers; `known` is an earlier answer in it: the prompt, the text, its tokens."""
        if not job.messages:
            readings = [self._model.tokenizer.encode(job.text)]
        else:
            said = [None, partial(_said, known)] if known else [None]
            prompts = (self._template.prompt(self._model.tokenizer, job.messages, one).tokens for one in said)
            readings = [list(tokens) for tokens in {tuple(tokens) for tokens in prompts}]
        solos = tuple(self._answer(tokens, job.limit)[0] for tokens in readings)
        return Job(job.limit, job.messages, job.text, solos)

    def _answer(self, tokens: Sequence[int], limit: int) -> tuple[Solo, list[int]]:
        noting = _Noting(self._model)
        state = self._model.new_state()
        generation = generate(noting, state, tokens, Sampling(temperature=0), limit, self._stops)
        text = "".join(generation)
        decode, said = self._model.tokenizer.decode, generation.tokens
        starts = [len(decode(said[:i])) for i in range(len(noting.margins))]
        return Solo(text, tuple(starts), tuple(noting.margins)), said


def _said(known: tuple[list[int], str, list[int]], before: Sequence[int], text: str) -> list[int] | None:
    prompt, answer, tokens = known
    return tokens if (list(before), text) == (prompt, answer) else None
