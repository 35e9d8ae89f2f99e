"""Texts with something in them to fetch, as tokens: a pass key, a phone number, a passage that comes again.

A trial is read as head, filler, question, and then the answer, which stands in the head. Its `distance` is how many
tokens before each token of the answer the same token stood in the head. So an answer at distance W is the last that an
attention layer with a window of W keys can see.

There are two heads, which are read with the same filler and the same question, and differ in what the answer is. What
an answer costs after the head that has another in its place is what it costs unread: no other control is as like.
Pieces are encoded one by one, so that an answer is the same tokens in both places, and distances are exact.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.chat import TEMPLATE_KEY, ChatTemplate
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.tokenizer import Tokenizer

Ids = NDArray[np.int32]

CHOICES = 8  # answers to choose between
PASSAGE = 48  # tokens of a passage
_LEAD = 64  # tokens of text before what is to be fetched: a text's beginning is no place like others
_EXAMPLES = 2  # of a look-up, before the one that counts
_LINES = 256  # of a phone book, encoded at once

# The words of Mohtashami and Jaggi, arXiv 2305.16300.
_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_KEYS = range(10_000, 100_000)

_FIRST = (
    "James Mary John Linda Robert Susan Michael Karen David Nancy William Lisa Richard Betty Joseph Helen Thomas "
    "Sandra Charles Donna Daniel Carol Matthew Ruth Anthony Sharon Mark Michelle Donald Laura Steven Sarah Paul "
    "Kimberly Andrew Deborah Joshua Jessica Kenneth Shirley Kevin Cynthia Brian Angela George Melissa Edward Brenda "
    "Ronald Amy Timothy Anna Jason Rebecca Jeffrey Virginia Ryan Kathleen Jacob Pamela Gary Martha Eric Debra "
    "Jonathan Amanda Stephen Stephanie Larry Carolyn Justin Christine Scott Marie Brandon Janet Frank Catherine "
    "Gregory Frances Samuel Ann Raymond Joyce Patrick Diane Alexander Alice Jack Julie Dennis Heather Jerry Teresa "
    "Tyler Doris Aaron Gloria Peter Evelyn"
)
_LAST = (
    "Smith Johnson Williams Brown Jones Miller Davis Wilson Anderson Taylor Thomas Moore Martin Jackson Thompson "
    "White Lee Harris Clark Lewis Robinson Walker Young Allen King Wright Scott Hill Green Adams Nelson Baker Hall "
    "Campbell Mitchell Carter Roberts Phillips Evans Turner Parker Collins Edwards Stewart Morris Murphy Cook "
    "Rogers Morgan Peterson Cooper Reed Bailey Bell Kelly Howard Ward Cox Richardson Wood Watson Brooks Bennett "
    "Gray James Hughes Price Myers Long Foster Sanders Ross Morales Powell Sullivan Russell Jenkins Perry Butler "
    "Barnes Fisher Henderson Coleman Simmons Patterson Jordan Reynolds Hamilton Graham Kim Wallace Woods Cole West "
    "Owens Gibson Hunt Black Stone Fox"
)


@dataclass(frozen=True)
class Trial:
    """One text with something to fetch, in two readings.

    The two `heads` are of one length; the first answer stands in the first, the second in the second, `after` tokens
    before the end. All answers are of one length; the others are what else might be said.
    """

    heads: tuple[Ids, Ids]
    after: int
    filler: Ids  # as much as is needed at the longest distance, or more
    question: Ids  # may be empty
    answers: tuple[Ids, ...]

    @property
    def least(self) -> int:
        """The distance without any filler."""
        return len(self.answers[0]) + self.after + len(self.question)


@dataclass(frozen=True)
class Material:
    """What trials are made from.

    `opening` begins a text (BOS, or what a chat template puts before a message); `closing` is what the template puts
    between a message and its answer, None where no chat is held. `text` are the tokens of the text named `name`;
    `longest` is the longest distance.
    """

    tokenizer: Tokenizer
    opening: Ids
    closing: Ids | None
    text: Ids
    name: str
    longest: int

    def ids(self, words: str) -> Ids:
        """Tokens of a piece."""
        return np.array(self.tokenizer.encode(words, bos=False), np.int32)

    def question(self, plain: str, asked: str, begun: str) -> Ids:
        """`plain`; in a chat `asked`, and an answer that is begun."""
        if self.closing is None:
            return self.ids(plain)
        return np.concatenate([self.ids(asked), self.closing, self.ids(begun)])

    def cut(self, random: Random, *lengths: int) -> list[Ids]:
        """Pieces of the text with as much of it between them as there is, from a random place on, read round.

        Raises `FileFormatError` where the text is too short for them.
        """
        left = len(self.text) - sum(lengths)
        if left < 0:
            problem = f"expected at least {sum(lengths):,} tokens for a distance of {self.longest:,}"
            raise FileFormatError(self.name, "text", f"{problem}, found {len(self.text):,}")
        at, pieces = random.randrange(len(self.text)), list[Ids]()
        for length in lengths:
            pieces.append(self.text.take(range(at, at + length), mode="wrap"))
            at += length + left // len(lengths)
        return pieces


@dataclass(frozen=True)
class Task:
    """A kind of trial; `asks` says whether it has a question."""

    name: str
    asks: bool
    build: Callable[[Material, Random], Trial]


def prepare(model: Model, text: str, name: str, longest: int, chat: bool) -> Material:
    """What this model's trials are made from; raises `FileFormatError` for a chat where there is no usable template."""
    tokenizer = model.tokenizer
    opening, closing = tokenizer.encode(""), None
    if chat:
        template = ChatTemplate.from_gguf(model.path, model.file.metadata)
        if template is None:
            raise FileFormatError(model.path, TEMPLATE_KEY, "is missing; a chat needs one")
        content = "\ufdd1content\ufdd1"  # U+FDD1 is reserved for use inside programs
        parts = template.render([{"role": "user", "content": content}]).split(content)
        if len(parts) != 2:
            raise FileFormatError(model.path, TEMPLATE_KEY, "does not show a message's text exactly once")
        opening = tokenizer.encode(parts[0], special=True)
        closing = np.array(tokenizer.encode(parts[1], bos=False, special=True), np.int32)
    ids = np.array(tokenizer.encode(text, bos=False), np.int32)
    return Material(tokenizer, np.array(opening, np.int32), closing, ids, name, longest)


def _passkey(material: Material, random: Random) -> Trial:
    lead, filler = material.cut(random, _LEAD, material.longest)
    return _hide_key(material, random, lead, filler)


def _passkey_classic(material: Material, random: Random) -> Trial:
    noise = np.resize(material.ids(_NOISE), _LEAD + material.longest)  # over and over
    return _hide_key(material, random, noise[:_LEAD], noise)


def _hide_key(material: Material, random: Random, lead: Ids, filler: Ids) -> Trial:
    ids = material.ids
    answers = _alike(ids(f" {key}") for key in random.sample(_KEYS, len(_KEYS)))
    before, between, after = ids("\nThe pass key is"), ids(". Remember it."), ids(" is the pass key.\n")
    begin = [material.opening, ids(_INTRODUCTION), lead, before]
    one, other = (np.concatenate([*begin, answer, between, answer, after]) for answer in answers[:2])
    question = material.question(
        "\nWhat is the pass key? The pass key is", "\nWhat is the pass key?", "The pass key is"
    )
    return Trial((one, other), len(after), filler, question, answers)


def _phonebook(material: Material, random: Random) -> Trial:
    """The other head has the number of the one asked for in the line of a second one, and that one's in this line."""
    ids, people = material.ids, _people(random)
    examples = _lines(islice(people, _EXAMPLES))
    names = [name for name, _ in islice(people, CHOICES)]
    numbers = list(_alike(ids(f" {number}") for _, number in people))
    # Anyone among those to choose from: the latest number of the book is no better a guess than another.
    asked, second = random.sample(range(CHOICES), 2)

    def head(numbers: Sequence[Ids]) -> list[Ids]:
        lines = ((ids(f"{name}:"), number, ids("\n")) for name, number in zip(names, numbers, strict=True))
        return [material.opening, ids(examples), *chain.from_iterable(lines)]

    swapped = list(numbers)
    swapped[asked], swapped[second] = numbers[second], numbers[asked]
    after = sum(map(len, head(numbers)[2 + 3 * asked + 2 :]))
    one, other = np.concatenate(head(numbers)), np.concatenate(head(swapped))
    name = names[asked]
    # The book's last line may be cut off, so the question stands apart.
    question = material.question(f"\n\n{examples}{name}:", f"\n\nWhat is the phone number of {name}?", f"{name}:")
    rest = [number for i, number in enumerate(numbers) if i not in (asked, second)]
    answers = (numbers[asked], numbers[second], *rest)
    return Trial((one, other), after, _book(material, people), question, answers)


def _alike(drawn: Iterator[Ids]) -> tuple[Ids, ...]:
    """The first of what is drawn that are as many tokens as the first of all: `CHOICES` of them."""
    first = next(drawn)
    return (first, *islice((ids for ids in drawn if len(ids) == len(first)), CHOICES - 1))


def _people(random: Random) -> Iterator[tuple[str, str]]:
    """Names, each once, with numbers."""
    names = [f"{first} {last}" for last in _LAST.split() for first in _FIRST.split()]
    for name in random.sample(names, len(names)):
        number = f"{random.randrange(200, 1000)}-{random.randrange(200, 1000)}-{random.randrange(10_000):04}"
        yield name, number


def _lines(people: Iterator[tuple[str, str]]) -> str:
    return "".join(f"{name}: {number}\n" for name, number in people)


def _book(material: Material, people: Iterator[tuple[str, str]]) -> Ids:
    """Further lines, as many tokens as the longest distance."""
    pieces, missing = [np.empty(0, np.int32)], material.longest
    while missing > 0:
        lines = _lines(islice(people, _LINES))
        if not lines:
            problem = f"expected at most the {material.longest - missing:,} tokens that all names make"
            raise UnsupportedError(f"phonebook: distance: {problem}, found {material.longest:,}")
        pieces.append(material.ids(lines))
        missing -= len(pieces[-1])
    return np.concatenate(pieces)


def _passage(material: Material, random: Random) -> Trial:
    lead, one, other, filler = material.cut(random, _LEAD, PASSAGE, PASSAGE, material.longest)
    begin = np.array(material.tokenizer.encode(""), np.int32)  # nothing is asked, so there is no chat to be held
    heads = np.concatenate([begin, lead, one]), np.concatenate([begin, lead, other])
    return Trial(heads, 0, filler, np.empty(0, np.int32), (one, other))


_TABLE = (
    Task("passkey", True, _passkey),  # a number of five digits, told in the midst of a text
    Task("passkey-classic", True, _passkey_classic),  # the same amid the five sentences of the original
    Task("phonebook", True, _phonebook),  # the number of one of the people in a phone book
    Task("passage", False, _passage),  # part of a text, read again after other text
)
TASKS = {task.name: task for task in _TABLE}


def trials(task: Task, material: Material, count: int, seed: int) -> Sequence[Trial]:
    """So many, each drawn by `seed`, the task and its own number alone. Raises what building them does."""
    return [task.build(material, Random(f"{seed} {task.name} {i}")) for i in range(count)]
