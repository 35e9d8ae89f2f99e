"""Speculation: guess the next tokens, let the model read them all at once, keep those it would have said itself.

A pass over several tokens costs less than as many passes over one, and the state after any token of a pass is at hand
(`State.rollback`). So a draft is fed behind the last token, the model's own next token is sampled after each row as
ever, and what follows the first difference is taken back. The text is the one that plain decoding gives, with the same
random numbers too, up to the rounding in which a pass over several tokens differs from passes over one.

A drafter guesses; `Pace` learns from measured times and from guesses that came true, how long a draft pays, if at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.state import State

#: Rows that a pass may have: a token and a draft of one less. Few, since each is a graph of its own.
ROWS = (1, 2, 4, 8, 16)

#: How sure a drafter can be: from 0 to one less.
GRADES = 8


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, and how sure each of them is if those before it are right: its grade."""

    tokens: Sequence[int] = ()
    grades: Sequence[int] = ()


class Drafter(Protocol):
    """What guesses. It may guess anything: a wrong draft costs time, never a wrong text."""

    def read(self, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`."""
        ...

    def draft(self, last: int, most: int) -> Draft:
        """Up to `most` (at least 1) tokens that may follow on what was read and then the token `last`."""
        ...

    def forget(self) -> None:
        """Another text begins."""
        ...


class Speculation:
    """A drafter at work on one text of `model`; hand it to `generate` along with the text's state.

    It goes on from one answer to the next as the state does: it has to see all that the state reads. `clock` gives
    seconds.
    """

    def __init__(self, model: Model, drafter: Drafter, clock: Callable[[], float] = perf_counter) -> None:
        self._model, self._drafter, self._clock = model, drafter, clock
        self._pace = Pace()
        self._guess = Draft()
        self._drafting = self._verifying = 0.0

    def read(self, tokens: Sequence[int]) -> None:
        """The state has read `tokens` by other ways than `verify`."""
        self._drafter.read(tokens)

    def forget(self) -> None:
        """The state is another, at position 0."""
        self._drafter.forget()

    def draft(self, last: int, most: int | None) -> list[int]:
        """At most `most` tokens that may follow on the token `last`: as many as it pays to verify, mostly none."""
        asked = self._pace.ask(ROWS[-1] - 1 if most is None else min(most, ROWS[-1] - 1))
        started = self._clock()
        self._guess = self._drafter.draft(last, asked) if asked else Draft()
        self._drafting = self._clock() - started
        self._pace.drafted(asked, self._drafting)
        return list(self._guess.tokens[: self._pace.choose(self._guess.grades, self._drafting)])

    def verify(self, tokens: Sequence[int], state: State) -> NDArray[np.float32]:
        """Feed a token and its draft: the logits after each, float32 [T, V]; `state` can go back to any of them."""
        started = self._clock()
        several = len(tokens) > 1
        logits = self._model.forward(tokens, state, every=several, trace=several)
        self._verifying = self._clock() - started
        return logits if several else logits[None]

    def learn(self, drafted: int, fed: Sequence[int], came: Sequence[int]) -> None:
        """After `verify` of `drafted` tokens and one before: the state holds `fed` of them, and `came` was sampled."""
        for token, guess, grade in zip(came, self._guess.tokens, self._guess.grades, strict=False):
            self._pace.outcome(grade, token == guess)
            if token != guess:
                break
        self._pace.passed(drafted + 1, len(fed), self._verifying, self._drafting)
        self._drafter.read(fed)


class Pace:
    """How many tokens to draft, by what passes of this text took and which guesses came true.

    Of the lengths it takes the one that promises most tokens a second. Beyond that it keeps accounts: what was spent on
    drafts that did not come true may never be more than three plain tokens' time and `ALLOWED` of all the time.
    So a text that nothing can be guessed of is at worst that much slower, and while a guess costs nothing, its worth
    is learned without verifying any.
    """

    ALLOWED = 0.02
    _START = 3.0  # plain tokens
    _SAVED = 6.0  # plain tokens: savings beyond that buy no more failures
    _MARGIN = 1.03  # a draft must promise so many times the plain speed
    _SLOPE = 0.3  # a further row's cost in plain tokens, before any was measured
    _DOUBT = 0.01  # what a pass takes from the costs of other lengths: one that was bad once is tried again some time
    _MEMORY = 16  # outcomes that a grade's worth is an average of
    _FIRST = 2  # plain passes are measured before anything else: the first of all may build and allocate
    _PLAIN = 16  # after so many passes with drafts, one without: what is compared with must not be of long ago
    _NOTHING = 0.02  # plain tokens: a draft that costs no more is always asked for

    def __init__(self) -> None:
        self._costs: dict[int, float] = {}  # seconds by rows
        self._right = [0.5] * GRADES
        self._seen = [2] * GRADES
        self._any_right = 0.5
        self._draft_cost: float | None = None  # seconds a token asked for
        self._total = self._lost = 0.0  # plain tokens, each at its time's price
        self._plain = self._since_plain = 0  # passes

    def ask(self, most: int) -> int:
        """How many tokens to ask a drafter for, at most `most`; 0 where a plain pass is to be measured first."""
        if self._plain < self._FIRST or self._since_plain == self._PLAIN:
            return 0
        plain = self._costs[1]
        if most < 1 or self._balance(plain) < 0:
            return 0
        each = self._draft_cost
        if each is None:
            return min(most, 3)
        if each * most <= self._NOTHING * plain:
            return most
        lengths = [rows - 1 for rows in ROWS[1:] if rows - 1 <= most]
        speeds = {k: self._speed([self._any_right] * k, k * each) for k in lengths}
        best = max(lengths, key=lambda k: speeds[k])
        if speeds[best] * plain > self._MARGIN:
            return best
        # It does not pay: try the shortest now and then, as often as the accounts allow.
        return 1 if each + self._cost(2) - plain <= self._balance(plain) else 0

    def choose(self, grades: Sequence[int], drafting: float) -> int:
        """How many tokens of a draft to verify that took `drafting` seconds."""
        if not grades:
            return 0
        plain = self._costs[1]
        chances = [self._right[grade] for grade in grades]
        best, fastest = 0, self._MARGIN / (plain + drafting)
        for k in (rows - 1 for rows in ROWS[1:] if rows <= len(grades) + 1):
            speed = self._speed(chances[:k], drafting)
            if speed > fastest and self._cost(k + 1) + drafting - plain <= self._balance(plain):
                best, fastest = k, speed
        return best

    def drafted(self, asked: int, seconds: float) -> None:
        """A draft that was `asked` for took so long."""
        if asked:
            each = seconds / asked
            self._draft_cost = each if self._draft_cost is None else _blend(self._draft_cost, each)

    def outcome(self, grade: int, right: bool) -> None:
        """A guess of that grade was followed by the token itself, or by another."""
        self._seen[grade] = min(self._seen[grade] + 1, self._MEMORY)
        self._right[grade] += (right - self._right[grade]) / self._seen[grade]
        self._any_right += (right - self._any_right) / self._MEMORY

    def passed(self, rows: int, gained: int, seconds: float, drafting: float) -> None:
        """A pass of so many rows took `seconds` and gave `gained` tokens, after `drafting` seconds."""
        self._costs[rows] = self._measured(rows, seconds)
        for fewer in [size for size in self._costs if size < rows]:
            self._costs[fewer] = min(self._costs[fewer], seconds)  # what costs more was measured in a busier moment
        self._plain += rows == 1
        self._since_plain = self._since_plain + 1 if rows > 1 else 0
        plain = self._costs.get(1, seconds)
        seconds = min(seconds, 2 * self._costs[rows])  # that the machine stood still is no draft's fault
        self._total += (seconds + drafting) / plain
        lost = drafting / plain + (seconds / plain - gained if rows > 1 else 0.0)
        self._lost = max(self._lost + lost, -self._SAVED)
        for other in self._costs.keys() - {1, rows}:
            self._costs[other] -= (self._costs[other] - plain) * self._DOUBT

    def _measured(self, rows: int, seconds: float) -> float:
        """What a pass costs as far as is known, after one that took so long."""
        if rows not in self._costs:
            # The first of a length may build and allocate, and a guess is not that far off.
            return min(seconds, 1.5 * self._cost(rows)) if 1 in self._costs else seconds
        if rows == 1 and self._plain < self._FIRST:
            return min(self._costs[1], seconds)
        return _blend(self._costs[rows], seconds)

    def _balance(self, plain: float) -> float:
        """Seconds that may be lost now."""
        return plain * (self._START + self.ALLOWED * self._total - self._lost)

    def _speed(self, chances: Sequence[float], drafting: float) -> float:
        """Tokens a second to expect of a draft whose tokens have these chances."""
        expected, all_right = 1.0, 1.0
        for chance in chances:
            all_right *= chance
            expected += all_right
        return expected / (self._cost(len(chances) + 1) + drafting)

    def _cost(self, rows: int) -> float:
        """Seconds of a pass: measured, else along the line through those that were; beyond them half as steep.

        Each further row costs less than the one before. A guess that is too low is soon measured, one that is too high
        never would be.
        """
        if rows in self._costs:
            return self._costs[rows]
        plain = self._costs[1]
        low = max(size for size in self._costs if size < rows)
        above = [size for size in self._costs if size > rows]
        if above:
            high = min(above)
            step = (self._costs[high] - self._costs[low]) / (high - low)
        elif low > 1:
            step = (self._costs[low] - plain) / (low - 1) / 2
        else:
            step = self._SLOPE * plain
        return self._costs[low] + step * (rows - low)


def _blend(known: float, new: float) -> float:
    """An average over time that follows a lower figure sooner than a higher: noise only ever adds, at times much."""
    return known + (new - known) * 0.5 if new < known else known + (min(new, 2 * known) - known) * 0.2


class PromptLookup:
    """Guesses that the text goes on as it did after the longest earlier place that ended the same way.

    A place must share the last two tokens at least; of equal ones the latest counts. The more it shares the surer: the
    grade. Looks back over `KEPT` tokens or more, up to twice as many.
    """

    KEPT = 1 << 16
    _SHORTEST = 2
    _LONGEST = _SHORTEST + GRADES - 1
    _PLACES = 16  # compared for a draft

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """See `Drafter`."""
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # where a pair of tokens ended last
        self._before: list[int] = []  # by end of a pair: where it ended the time before, or -1

    def read(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        if len(self._tokens) + len(tokens) > 2 * self.KEPT:
            tokens = [*self._tokens, *tokens][-self.KEPT :]
            self.forget()
        for token in tokens:
            self._tokens.append(int(token))
            pair = (*self._tokens[-2:-1], token)
            self._before.append(self._latest.get(pair, -1) if len(pair) == 2 else -1)
            if len(pair) == 2:
                self._latest[pair] = len(self._tokens) - 1

    def draft(self, last: int, most: int) -> Draft:
        """See `Drafter`."""
        text = self._tokens
        end, shared, best = self._latest.get((text[-1], last), -1) if text else -1, 0, -1
        for _ in range(self._PLACES):
            if end < 0 or shared == self._LONGEST:
                break
            common = self._common(end)
            if common > shared:
                shared, best = common, end
            end = self._before[end]
        if best < 0:
            return Draft()
        # Beyond the end of the text, the draft itself goes on: what repeats, repeats.
        known = [*text[best + 1 : best + 1 + most], last]
        tokens = [known[i % len(known)] if len(known) <= most else known[i] for i in range(most)]
        return Draft(tokens, [min(shared - self._SHORTEST + i, GRADES - 1) for i in range(most)])

    def _common(self, end: int) -> int:
        """How many tokens the text up to `end` ends with like the whole, `last` included; as far as it counts."""
        text, common = self._tokens, self._SHORTEST
        while common < self._LONGEST and common <= end and text[end - common] == text[-common]:
            common += 1
        return common


class DraftModel:
    """Guesses by a smaller model of the same vocabulary, which reads the text along with the large one.

    Its likeliest tokens are the guess, as long as it gives them a probability of `SURE` or more. Where nothing was
    asked of it for long, it goes on from the last `MISSED` tokens and never sees those before: its guesses may be
    worse for that, but the large model is never kept waiting. Raises `UnsupportedError` for another vocabulary.
    """

    SURE = 0.4
    MISSED = 64
    _PROMPT = 16  # tokens read at once that are no answer's

    def __init__(self, model: Model, target: Model) -> None:
        _check_vocabulary(model, target)
        self._model = model
        self.forget()

    def forget(self) -> None:
        """See `Drafter`."""
        self._state = self._model.new_state()
        self._unread: list[int] = []  # of the text, behind what the state holds (or `_mark`, where there is one)
        self._early: list[int] = []  # of the text, read before we were told of it
        self._beyond: list[int] = []  # drafted tokens that the state holds behind `_mark`
        self._mark: State | None = None  # the state before them

    def read(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        skipped = min(len(self._early), len(tokens))
        del self._early[:skipped]
        self._unread += tokens[skipped:]
        if len(tokens) >= self._PROMPT:
            self._catch_up()

    def draft(self, last: int, most: int) -> Draft:
        """See `Drafter`."""
        self._unread = [*self._unread, last][-self.MISSED :]
        logits = self._catch_up()
        self._early.append(last)
        if logits is None:
            return Draft()
        tokens, grades = list[int](), list[int]()
        while True:
            token, probability = _likeliest(logits)
            if probability < self.SURE:
                break
            tokens.append(token)
            grades.append(min(int(probability * GRADES), GRADES - 1))
            if len(tokens) == most:
                break
            if self._mark is None:
                self._mark = self._state.copy()
            logits = self._model.forward([token], self._state)
            self._beyond.append(token)
        return Draft(tokens, grades)

    def _catch_up(self) -> NDArray[np.float32] | None:
        """Let the state hold the text and nothing else; the logits after it, None where it has read nothing."""
        held = len(self._beyond)
        if self._unread[:held] == self._beyond:
            del self._unread[:held]
        else:
            assert self._mark is not None, "what is drafted lies behind a mark"
            # Its values, not the object: a backend may keep graphs that hold this one's place in memory.
            self._state.write(self._mark.read())
            self._state.move(self._mark.position - self._state.position, None, self._mark.logits, traced=False)
        self._mark, self._beyond = None, []
        if self._unread:
            self._model.forward(self._unread, self._state)
            self._unread = []
        return self._state.logits


def _likeliest(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The likeliest token and its probability."""
    token = int(np.argmax(logits))
    return token, 1 / float(np.exp(logits - logits[token]).sum())


def _check_vocabulary(model: Model, target: Model) -> None:
    field = "tokenizer.ggml.tokens"
    if model.file.metadata[field] != target.file.metadata[field]:
        raise UnsupportedError(f"{model.path}: {field}: expected the vocabulary of {target.path}, whose text it drafts")
