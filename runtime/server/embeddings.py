"""Vectors of texts, for whichever API asks: of unit length, made pass by pass beside the answers that run.

A model makes vectors for one request at a time. Nothing goes on for a client that went away, but for the pass in work.
Thousands of vectors are some hundred megabytes of JSON: `in_pieces` makes it while it is sent, a little at a time, so
that the event loop goes on with all else in between.
"""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.engine import BESIDE
from griffin_gguf.runtime.model import Model, Tokens
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.models import Served

T = TypeVar("T")

#: Texts whose vectors one request may ask for, as in OpenAI's API.
MOST_TEXTS = 2048

#: Bytes of an answer, about, that are made and sent at once: one or two vectors.
PIECE = 1 << 16

#: Stands in a message where its vectors come. No JSON has that byte.
PLACE = msgspec.Raw(b"\0")


@dataclass
class _Queue:
    """The requests of one model."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    count: int = 0


_queues: "weakref.WeakKeyDictionary[Model, _Queue]" = weakref.WeakKeyDictionary()


def bounded(count: int) -> None:
    """Raise `ApiError` where vectors of too many texts are wanted."""
    if count > MOST_TEXTS:
        raise ApiError(400, f"input: expected at most {MOST_TEXTS} texts, found {count}", param="input")


async def vectors(served: Served, texts: Sequence[Tokens], dimensions: int, waiting: int) -> NDArray[np.float32]:
    """The vector of each text's tokens, f32 [n, dimensions]: its first numbers, at unit length.

    At most `waiting` requests wait for their turn. Raises `ApiError`: 400 for a model that has read a document, and for
    more `dimensions` than there are, 429 where too many wait; `UnsupportedError` for tokens that are none.
    """
    entry, model = served.entry, served.model
    if entry.document is not None:
        whose = entry.name.rpartition("@")[0]
        raise ApiError(400, f"model: a vector is of a text that is read from its beginning; ask {whose}", param="model")
    if not 1 <= dimensions <= entry.embedding:
        problem = f"dimensions: expected from 1 to {entry.embedding}, found {dimensions}"
        raise ApiError(400, problem, param="dimensions")
    queue = _queues.setdefault(model, _Queue())
    if queue.count > waiting:
        raise ApiError(429, f"embeddings: {queue.count - 1} requests wait already", retry_after=1)
    queue.count += 1
    try:
        async with queue.turn:
            found = np.empty((len(texts), entry.embedding), np.float32)
            await _run(model.embedding(texts, found, BESIDE))
            return await _in_thread(lambda: unit(found[:, :dimensions]))
    finally:
        queue.count -= 1


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each of the rows, f32 [n, D], at length 1; one of nothing but zeros stays."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-12)).astype(np.float32)


def numbers(vector: NDArray[np.float32]) -> bytes:
    """A vector, f32 [D], as JSON."""
    return msgspec.json.encode(vector.tolist())


async def in_pieces(message: Any, items: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Yield `message` as JSON, with an array of `items`, each JSON itself, where it has `PLACE`.

    An item is made when its turn comes, and others have theirs after each piece.
    """
    before, after = msgspec.json.encode(message).split(PLACE)
    piece = bytearray(before + b"[")
    for i, item in enumerate(items):
        piece += b"," + item if i else item
        if len(piece) >= PIECE:
            yield bytes(piece)
            piece.clear()
            await asyncio.sleep(0)
    yield bytes(piece + b"]" + after)


async def _run(passes: Generator[None]) -> None:
    """All passes, each in a thread."""
    try:
        while await _in_thread(lambda: next(passes, True) is None):
            pass
    finally:
        passes.close()


async def _in_thread(work: Callable[[], T]) -> T:
    """`work` in a thread. A cancellation waits for its end: nobody is at the model then any more."""
    done = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.gather(done, return_exceptions=True)
        raise
