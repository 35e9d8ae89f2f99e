"""Answers of vectors: as JSON in pieces, between which a server's event loop is free for others."""

import asyncio
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from griffin_gguf.runtime.server.embeddings import MOST_TEXTS, PIECE, PLACE, bounded, in_pieces, numbers, unit
from griffin_gguf.runtime.server.errors import ApiError


class Message(msgspec.Struct):
    name: str
    rows: msgspec.Raw
    count: int


def rows(count: int, size: int = 2560) -> NDArray[np.float32]:
    return unit(np.random.default_rng(count).normal(size=(count, size)).astype(np.float32))


def collected(found: NDArray[np.float32], name: str = "a") -> tuple[list[bytes], list[int]]:
    """The pieces, and how often others had had their turn when each came."""

    async def run() -> tuple[list[bytes], list[int]]:
        turns, pieces, seen = 0, list[bytes](), list[int]()

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        await asyncio.sleep(0)
        async for piece in in_pieces(Message(name, PLACE, 3), map(numbers, found)):
            pieces.append(piece)
            seen.append(turns)
        beside.cancel()
        return pieces, seen

    return asyncio.run(run())


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_the_pieces_are_the_message_with_its_vectors(count: int) -> None:
    found = rows(count)
    name = '"\0[]\\'  # text that looks like the place never is it
    value: dict[str, Any] = msgspec.json.decode(b"".join(collected(found, name)[0]))
    assert list(value) == ["name", "rows", "count"]
    assert (value["name"], value["count"]) == (name, 3)
    assert np.array_equal(np.array(value["rows"], np.float32).reshape(found.shape), found)


def test_others_have_their_turn_between_any_two_pieces() -> None:
    found = rows(100)
    pieces, turns = collected(found)
    longest = max(len(numbers(row)) for row in found)
    assert max(map(len, pieces)) <= PIECE + longest + 100
    assert len(pieces) > 50
    assert all(later > earlier for earlier, later in pairwise(turns))


def test_one_request_is_of_so_many_texts() -> None:
    bounded(MOST_TEXTS)
    with pytest.raises(ApiError, match=r"^input: expected at most 2048 texts, found 2049$") as caught:
        bounded(MOST_TEXTS + 1)
    assert (caught.value.status, caught.value.param) == (400, "input")
