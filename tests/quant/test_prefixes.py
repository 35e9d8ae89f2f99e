from collections.abc import Sequence
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import griffins
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.quant import prefixes
from griffin_gguf.quant.prefixes import Reading
from griffin_gguf.runtime.errors import UnsupportedError

VOCAB = 4
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=9)


class Memory:
    """A state that knows all that it has read, and how many of its kind there are."""

    living = most = 0

    def __init__(self, tokens: tuple[int, ...] = ()) -> None:
        self.tokens = tokens
        Memory.living += 1
        Memory.most = max(Memory.most, Memory.living)

    def __del__(self) -> None:
        Memory.living -= 1

    def copy(self) -> "Memory":
        return Memory(self.tokens)


def logits_after(tokens: Sequence[int]) -> NDArray[np.float32]:
    return np.random.default_rng([7, *tokens]).normal(size=VOCAB).astype(np.float32)


class Remembering:
    """A model whose logits are those of all tokens before; `fed` counts what it was given to read."""

    path = Path("fake.gguf")
    chunk = 3
    state_nbytes = 8

    def __init__(self) -> None:
        self.hp = replace(griffins.TWO_B, vocab=VOCAB)
        self.fed = 0
        self.passes: list[int] = []
        Memory.living = Memory.most = 0

    def reserve(self, count: int) -> None:
        pass

    def new_state(self) -> Memory:
        return Memory()

    def forward_batch(self, batch: Sequence[tuple[Any, Memory]], every: bool) -> list[NDArray[np.float32]]:
        assert len({id(state) for _, state in batch}) == len(batch)
        self.passes.append(len(batch))
        found: list[NDArray[np.float32]] = []
        for tokens, state in batch:
            assert len(tokens)
            rows: list[NDArray[np.float32]] = []
            for token in tokens:
                self.fed += 1
                state.tokens += (int(token),)
                rows.append(logits_after(state.tokens))
            found.append(np.array(rows) if every else rows[-1])
        return found


def read(texts: Sequence[Sequence[int]], wanted: Sequence[int], batch: int) -> tuple[Any, Reading]:
    """Read all; every text's logits were given once for each token from `wanted` on, and are right; all were ended."""
    model: Any = Remembering()
    reading = Reading(model, texts, wanted, batch)
    given: list[dict[int, NDArray[np.float32]]] = [{} for _ in texts]
    ended = [0] * len(texts)
    for reached in reading:
        for i in reached.texts:
            assert reached.state.tokens == tuple(texts[i][: reached.read])  # pyright: ignore[reportAttributeAccessIssue]
            first = reached.read + 1 - len(reached.logits)
            for count, row in enumerate(reached.logits, first):
                assert count not in given[i]
                given[i][count] = row
            ended[i] += reached.read == len(texts[i])
    assert ended == [1] * len(texts)
    for text, start, rows in zip(texts, wanted, given, strict=True):
        for count in range(start, len(text) + 1):
            np.testing.assert_array_equal(rows[count], logits_after(text[:count]))
    return model, reading


@given(st.lists(TEXT, min_size=1, max_size=14), st.integers(1, 5), st.data(), st.integers(1, 4))
def test_what_texts_have_in_common_is_read_once(
    texts: list[list[int]], batch: int, data: st.DataObject, rows: int
) -> None:
    wanted = [data.draw(st.integers(1, len(text))) for text in texts]
    with pytest.MonkeyPatch.context() as patch:  # so that branches are read in pieces
        patch.setattr(prefixes, "_LOGITS_BYTES", 4 * VOCAB * rows)
        patch.setattr(prefixes, "_CHUNKS", 1)
        model, reading = read(texts, wanted, batch)
    beginnings = {tuple(text[:count]) for text in texts for count in range(1, len(text) + 1)}
    assert model.fed == reading.read == reading.total == len(beginnings)
    assert reading.asked == sum(map(len, texts))
    assert max(model.passes) <= batch
    # Three a text of the batch, one for each halving, and the one that the reader still looks at.
    assert Memory.most <= 3 * batch + log2(len(texts)) + 2


def test_states_are_few_although_every_text_parts_somewhere_else() -> None:
    comb = [[0] * i + [1] for i in range(1, 200)]
    model, _ = read(comb, [len(text) for text in comb], 1)
    assert Memory.most <= 3
    assert model.fed == 199 + 199  # the zeros once, and every end


def test_texts_without_a_common_beginning_fill_the_passes() -> None:
    texts = [[i, i, i] for i in range(4)] * 2
    model, _ = read(texts, [3] * 8, 4)
    assert model.passes == [4]
    assert model.fed == 12


def test_an_empty_text_is_refused() -> None:
    model: Any = Remembering()
    with pytest.raises(UnsupportedError, match="at least one token in each"):
        Reading(model, [[1], []], [1, 0], 2)


def test_no_room_for_the_states_is_said_before_anything_is_read() -> None:
    model: Any = Remembering()
    model.state_nbytes = 1 << 50
    with pytest.raises(UnsupportedError, match=r"fake\.gguf: 4 texts at once take 3 states.*expected a smaller batch"):
        Reading(model, [[1], [2]], [1, 1], 4)
    assert model.fed == 0
