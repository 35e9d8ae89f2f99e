"""Operations on rows, deferred until a product needs their result, and then done tile by tile.

ggml computes node by node: an operation on all tokens of a chunk reads and writes main memory once. A handful of them,
one after another on as many rows as a core's cache holds, go several times as fast. So element-wise operations only
note what is to be done (`Deferred`), and `whole` writes it into the graph for one tile of rows after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from griffin_gguf.runtime.ggml.graph import Context, Tensor

#: Rows of a tile: of 2,560 values, 1.25 MiB, shared by the threads.
TILE = 128


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a value; `own` where nothing else reads them, so that they may be overwritten.

    `home` is the tensor whose rows they are, None for rows that lie by themselves.
    """

    tensor: Tensor
    own: bool
    home: Tensor | None = None

    def after(self, tensor: Tensor) -> "Rows":
        """What an operation in place has made of them."""
        return Rows(tensor, self.own, self.home)


#: Nodes for rows [start, stop) of a value.
Emit = Callable[[int, int], Rows]


class Deferred:
    """A value f32 [T, W] that is not in the graph yet.

    `home` is a tensor of that shape whose rows are dead once those of the value are known: there it is put together.
    """

    def __init__(self, shape: tuple[int, ...], emit: Emit, home: Tensor | None) -> None:
        self.shape, self.home = shape, home
        self.done: Tensor | None = None  # once `whole` was asked for it
        self._emit = emit
        self._latest: tuple[int, Rows] | None = None  # the tile at hand, for a second reader

    def rows(self, start: int, stop: int) -> Rows:
        """Rows [start, stop)."""
        if self._latest is None or self._latest[0] != start:
            self._latest = start, self._emit(start, stop)
        return self._latest[1]


Value = Tensor | Deferred


def rows_of(context: Context, x: Value, start: int, stop: int) -> Rows:
    """Rows of any value; what is in the graph already belongs to others too."""
    if isinstance(x, Deferred):
        if x.done is None:
            return x.rows(start, stop)
        x = x.done
    return Rows(x if (start, stop) == (0, x.shape[0]) else context.rows(x, start, stop), False)


def owned(context: Context, x: Tensor) -> Deferred:
    """A tensor that has one reader, who may overwrite it."""

    def emit(start: int, stop: int) -> Rows:
        return Rows(rows_of(context, x, start, stop).tensor, True, x)

    return Deferred(x.shape, emit, x)


def whole(context: Context, values: Sequence[Value], tile: int) -> list[Tensor]:
    """All rows of each value, in tensors; those deferred are computed together, `tile` rows after another."""
    deferred = [x for x in values if isinstance(x, Deferred) and x.done is None]
    if deferred:
        count = deferred[0].shape[0]
        for start in range(0, count, tile):
            for x in deferred:
                _finish(context, x, start, min(start + tile, count))
    return [_known(x) for x in values]


def _known(x: Value) -> Tensor:
    if isinstance(x, Deferred):
        assert x.done is not None
        return x.done
    return x


def _finish(context: Context, x: Deferred, start: int, stop: int) -> None:
    """Put rows [start, stop) where they belong."""
    rows = x.rows(start, stop)
    if (start, stop) == (0, x.shape[0]):
        x.done = rows.tensor
        return
    assert x.home is not None, "a value without a home must be part of another"
    if rows.home is x.home:
        context.expand(rows.tensor)
    else:
        context.store(rows.tensor, context.rows(x.home, start, stop))
    if stop == x.shape[0]:
        x.done = context.latest(x.home)
