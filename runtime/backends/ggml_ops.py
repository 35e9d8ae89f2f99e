"""The operations of griffin.py as nodes of a ggml graph, for one batch of chunks."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.backends.ggml_memory import Pool
from griffin_gguf.runtime.backends.rowwise import TILE, Deferred, Rows, Value, owned, rows_of, whole
from griffin_gguf.runtime.backends.scan import scan, scan_nodes
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.griffin import Rows as Wanted
from griffin_gguf.runtime.state import AttentionState, RecurrentState

#: The head's weight; a model whose head is its embedding has it where that lies on another device.
HEAD = "output.weight"


@dataclass(frozen=True)
class Part:
    """A sequence's chunk as far as a graph depends on it: `count` tokens on the state in `slot`.

    `first` where its text begins with it, `window` the rows of its ring that may be in use.
    """

    slot: int
    count: int
    first: bool
    window: int


@dataclass(frozen=True)
class Plan:
    """All that a graph depends on. Parts of one token come first: their recurrences are done together."""

    parts: tuple[Part, ...]
    rows: Wanted
    trace: bool

    @property
    def count(self) -> int:
        """Tokens."""
        return sum(part.count for part in self.parts)

    @property
    def starts(self) -> list[int]:
        """The row where each part begins, and, last, the number of rows."""
        return [0, *itertools.accumulate(part.count for part in self.parts)]

    @property
    def singles(self) -> int:
        """How many parts have one token."""
        return sum(part.count == 1 for part in self.parts)


@dataclass(frozen=True)
class GraphInputs:
    """What changes from run to run; a graph may use only some."""

    tokens: Tensor  # i32 [T]
    cos: Tensor  # f32 [T, 1, rope_width / 2]
    sin: Tensor  # likewise
    slots: Tensor  # i64 [T]: rows in the rings of all states that keys and values take
    masks: list[Tensor]  # f16 [T, window] for each part: 0 where a query sees a ring row, -inf where not


@dataclass(frozen=True)
class Constants:
    """Inputs that never change: rows of the batch, and the slots of the parts with one token."""

    last: Tensor  # i32 [S]: the last row of each part
    ids: Tensor  # i32 [singles], to read
    targets: Tensor  # i64 [singles], to write


@dataclass(frozen=True)
class Trace:
    """What lets states go back inside their chunks, by layer. Copies: a view would not keep its memory."""

    tails: dict[int, list[Tensor]]  # of each part of more than one token, [C-1, W]: what its convolution began with
    inputs: dict[int, list[Tensor]]  # likewise, [T, W]: what was convolved
    every_h: dict[int, Tensor]  # of the whole batch, [T, W]


class GgmlOps:
    """See the module's head. Element-wise operations are deferred (rowwise.py), `tile` rows at a time."""

    def __init__(
        self,
        context: Context,
        weights: Mapping[str, Tensor],
        hp: Hyperparameters,
        memory: Pool,
        plan: Plan,
        *,
        tile: int = TILE,
        attention: Literal["flash", "plain"] = "flash",
    ) -> None:
        self._graph, self._weights, self._hp, self._memory, self._plan = context, weights, hp, memory, plan
        self._tile, self._attention = tile, attention
        self._bounds = list(itertools.pairwise(plan.starts))
        self.inputs, self.constants = self._new_inputs(), self._new_constants()
        self.trace = Trace({}, {}, {})

    @staticmethod
    def tensors(hp: Hyperparameters, plan: Plan, tile: int = TILE) -> int:
        """At most so many tensors, views among them, are in a graph of that plan."""
        tiles = -(-plan.count // tile) + 2 * len(plan.parts)
        scans = sum(8 * scan_nodes(part.count) + 80 for part in plan.parts)
        return 64 + hp.layers * (80 + (60 + 6 * hp.conv_taps) * tiles + scans)

    def _new_inputs(self) -> GraphInputs:
        g, count, half = self._graph, self._plan.count, self._hp.rope_width // 2
        return GraphInputs(
            tokens=g.input((count,), abi.I32),
            cos=g.input((count, 1, half)),
            sin=g.input((count, 1, half)),
            slots=g.input((count,), abi.I64),
            masks=[g.input((part.count, part.window), abi.F16) for part in self._plan.parts],
        )

    def _new_constants(self) -> Constants:
        g, singles = self._graph, max(1, self._plan.singles)
        return Constants(
            g.input((len(self._plan.parts),), abi.I32), g.input((singles,), abi.I32), g.input((singles,), abi.I64)
        )

    # -- rows ---------------------------------------------------------------------------------------

    def _whole(self, *values: Value) -> list[Tensor]:
        return whole(self._graph, values, self._tile)

    def _rows(self, x: Value, start: int, stop: int) -> Rows:
        return rows_of(self._graph, x, start, stop)

    def _biased(self, name: str, y: Tensor) -> Deferred:
        """A product, which nothing else reads, plus its bias if it has one."""
        g, bias, product = self._graph, self._weights.get(f"{name}.bias"), owned(self._graph, y)
        if bias is None:
            return product

        def emit(start: int, stop: int) -> Rows:
            rows = product.rows(start, stop)
            return rows.after(g.add_into(rows.tensor, bias))

        return Deferred(y.shape, emit, y)

    def embed(self, tokens: Tensor) -> Tensor:
        rows = self._graph.get_rows(self._weights["token_embd.weight"], tokens)
        return self._graph.scale(rows, self._hp.embedding_scale)

    def norm(self, name: str, x: Value) -> Tensor:
        g, (x,) = self._graph, self._whole(x)
        block, _, kind = name.rpartition(".")
        if kind == "attn_norm":  # a block's first operation
            g.begin(int(block.removeprefix("blk.")), x)
        return g.mul(g.rms_norm(x, self._hp.norm_eps), self._weights[f"{name}.weight"])

    def linear(self, name: str, x: Value) -> Deferred:
        return self._biased(name, self._graph.matmul(self._weights[f"{name}.weight"], self._whole(x)[0]))

    def block_linear(self, name: str, x: Value) -> Deferred:
        g, weight, (x,) = self._graph, self._weights[f"{name}.weight"], self._whole(x)
        blocks, width = weight.shape[:2]
        y = g.matmul(weight, g.swap(g.reshape(x, (x.shape[0], blocks, width))))  # [G, T, B]
        if x.shape[0] > 1:  # of one token, [G, 1, B] already lies as [1, W]
            y = g.dense(g.swap(y))
        return self._biased(name, g.reshape(y, x.shape))

    def add(self, x: Value, y: Value) -> Deferred:
        return self._both("add", x, y)

    def mul(self, x: Value, y: Value) -> Deferred:
        return self._both("mul", x, y)

    def _both(self, op: Literal["add", "mul"], x: Value, y: Value) -> Deferred:
        """A commutative operation, in the place of what may be overwritten."""
        g = self._graph

        def emit(start: int, stop: int) -> Rows:
            a, b = self._rows(x, start, stop), self._rows(y, start, stop)
            if not a.own or (b.own and b.home is not None):
                a, b = b, a
            if not a.own:
                return Rows((g.add if op == "add" else g.mul)(a.tensor, b.tensor), True)
            return a.after((g.add_into if op == "add" else g.mul_into)(a.tensor, b.tensor))

        return Deferred(x.shape, emit, _home(x) or _home(y))

    def sigmoid(self, x: Value) -> Deferred:
        g = self._graph

        def emit(start: int, stop: int) -> Rows:
            rows = self._rows(x, start, stop)
            return rows.after(g.unary_into("sigmoid", rows.tensor)) if rows.own else Rows(
                g.unary("sigmoid", rows.tensor), True
            )  # fmt: skip

        return Deferred(x.shape, emit, _home(x))

    def gelu_gate(self, x: Value, y: Value) -> Deferred:
        def emit(start: int, stop: int) -> Rows:
            a, b = self._rows(x, start, stop), self._rows(y, start, stop)
            return Rows(self._graph.gelu_gate(a.tensor, b.tensor, own_x=a.own, own_y=b.own), True)

        return Deferred(x.shape, emit, _home(x) or _home(y))

    # -- RG-LRU -------------------------------------------------------------------------------------

    def conv(self, layer: int, name: str, z: Value) -> Tensor:
        """One token by ggml's own convolution, a chunk as a sum of rows: a transposed chunk costs more than that."""
        (z,) = self._whole(z)
        g, singles = self._graph, self._plan.singles
        found = [self._conv_of_tokens(layer, name, g.rows(z, 0, singles))] if singles else []
        found += [
            self._conv_of_chunk(layer, name, g.rows(z, start, stop) if len(self._bounds) > 1 else z, part.slot)
            for part, (start, stop) in zip(self._plan.parts, self._bounds, strict=True)
            if part.count > 1
        ]
        result = found[0]
        for rows in found[1:]:
            result = g.stack(result, rows)
        return result

    def _conv_of_tokens(self, layer: int, name: str, z: Tensor) -> Tensor:
        """One token of each text: z [S, W] -> [S, W]."""
        g, (texts, width), bias = self._graph, z.shape, self._weights.get(f"{name}.bias")
        taps = self._weights[f"{name}.weight"]
        kept = taps.shape[1] - 1
        if texts == 1:
            tail = self._state(layer, self._plan.parts[0].slot).tail
            padded = g.concat(tail, g.reshape(z, (width, 1)))
            g.store(g.view(padded, (width, kept), (kept + 1,), 1), tail)
        else:
            table = self._pooled(layer).tail  # [slots, W · (C-1)]
            tails = g.reshape(g.get_rows(table, self.constants.ids), (texts, width, kept))
            padded = g.concat(tails, g.reshape(z, (texts, width, 1)))
            after = g.dense(g.view(padded, (texts, width, kept), (width * (kept + 1), kept + 1), 1))
            g.expand(g.set_rows(table, g.reshape(after, (texts, width * kept)), self.constants.targets))
        c = g.reshape(g.conv(g.reshape(padded, (texts, width, kept + 1)), taps), (texts, width))
        return c if bias is None else g.add(c, bias)

    def _conv_of_chunk(self, layer: int, name: str, z: Tensor, slot: int) -> Tensor:
        """A chunk of one text, z [T, W] -> [T, W]: in place, the last tile first, since rows read earlier ones."""
        g, count, taps = self._graph, z.shape[0], self._weights[f"{name}.weight"]
        state, kept = self._state(layer, slot), taps.shape[1] - 1
        rows = g.dense(g.transpose(taps))  # [C, W]
        tail = g.dense(g.transpose(state.tail))  # [C-1, W]
        if self._plan.trace:
            self.trace.tails.setdefault(layer, []).append(g.output(tail))
            self.trace.inputs.setdefault(layer, []).append(g.output(g.scale(z, 1.0)))
        head = g.expand(g.stack(tail, g.rows(z, 0, min(count, kept))))  # the rows that the tail reaches into
        recent = g.rows(z, count - kept, count) if count >= kept else g.rows(head, count, count + kept)
        g.store(g.dense(g.transpose(recent)), state.tail)
        stops = [*range(count, kept, -self._tile), min(count, kept)]
        for stop, start in itertools.pairwise(stops):
            c = self._sum_of_taps(name, rows, [g.rows(z, start - kept + k, stop - kept + k) for k in range(kept + 1)])
            g.store(c, g.rows(z, start, stop))
        stop = stops[-1]
        c = self._sum_of_taps(name, rows, [g.rows(head, k, k + stop) for k in range(kept + 1)])
        g.store(c, g.rows(z, 0, stop))
        return g.latest(z)

    def _sum_of_taps(self, name: str, taps: Tensor, shifted: Sequence[Tensor]) -> Tensor:
        """Σ_k taps[k] ⊙ shifted[k] + bias: taps [C, W], each of `shifted` [T, W]."""
        g, bias = self._graph, self._weights.get(f"{name}.bias")
        c = g.mul(shifted[0], g.rows(taps, 0, 1))
        for k, x in enumerate(shifted[1:], 1):
            c = g.add_into(c, g.mul(x, g.rows(taps, k, k + 1)))
        return c if bias is None else g.add_into(c, bias)

    def decay(self, name: str, r: Value) -> tuple[Deferred, Deferred]:
        g, weight = self._graph, self._weights[name]
        begins = [row for row, part in zip(self._plan.starts, self._plan.parts, strict=False) if part.first]

        def emit_a(start: int, stop: int) -> Rows:
            rows = self._rows(r, start, stop)
            a = g.unary_into("exp", g.mul_into(rows.tensor, weight) if rows.own else g.mul(rows.tensor, weight))
            return Rows(a, False, rows.home)  # m reads it too

        def emit_m(start: int, stop: int) -> Rows:
            square = g.unary("sqr", a.rows(start, stop).tensor)
            m = g.unary_into("sqrt", g.scale_into(square, -1.0, 1.0))
            for row in begins:
                if start <= row < stop:
                    g.expand(g.scale_into(g.rows(m, row - start, row - start + 1), 0.0, 1.0))
            return Rows(g.latest(m), True)

        a = Deferred(r.shape, emit_a, _home(r))
        return a, Deferred(r.shape, emit_m, None)

    def scan(self, layer: int, a: Value, b: Value) -> Tensor:
        """In place on `b`; of one token of one text, in place on its h."""
        a, b = self._whole(a, b)
        g, plan = self._graph, self._plan
        if plan.count == 1:
            h = g.reshape(self._state(layer, plan.parts[0].slot).h, (1, b.shape[1]))
            return g.expand(g.add_into(g.mul_into(h, a), b))
        if plan.singles:
            self._scan_of_tokens(layer, g.rows(a, 0, plan.singles), g.rows(b, 0, plan.singles))
        for part, (start, stop) in zip(plan.parts, self._bounds, strict=True):
            if part.count > 1:
                scan(g, g.rows(a, start, stop), g.rows(b, start, stop), self._state(layer, part.slot).h)
        b = g.latest(b)
        if plan.trace:
            self.trace.every_h[layer] = g.output(g.scale(b, 1.0))
        return b

    def _scan_of_tokens(self, layer: int, a: Tensor, b: Tensor) -> None:
        g, table = self._graph, self._pooled(layer).h  # [slots, W]
        after = g.add_into(b, g.mul(a, g.get_rows(table, self.constants.ids)))
        g.expand(g.set_rows(table, after, self.constants.targets))

    def _state(self, layer: int, slot: int) -> RecurrentState[Tensor]:
        found = self._memory.of(slot)[layer]
        assert isinstance(found, RecurrentState)
        return found

    def _pooled(self, layer: int) -> RecurrentState[Tensor]:
        found = self._memory.layers[layer]
        assert isinstance(found, RecurrentState)
        return found

    # -- attention ----------------------------------------------------------------------------------

    def rope(self, x: Value) -> Tensor:
        """In place on `x`: ggml_rope computes its angles in f32, these come in f64 from griffin.angles."""
        (x,) = self._whole(x)
        g, hp, cos, sin = self._graph, self._hp, self.inputs.cos, self.inputs.sin
        half = cos.shape[-1]
        count, heads = x.shape[0], x.shape[1] // hp.head_width

        def part(start: int) -> Tensor:
            """Dimensions [start, start + half) of every head."""
            return g.view(x, (count, heads, half), (x.shape[1], hp.head_width), start)

        across = g.expand(g.mul(part(0), sin)), g.expand(g.mul(part(half), sin))
        g.expand(g.sub_into(g.mul_into(part(0), cos), across[1]))
        g.expand(g.add_into(g.mul_into(part(half), cos), across[0]))
        return g.latest(x)

    def attend(self, layer: int, q: Value, k: Value, v: Value) -> Tensor:
        """Of several texts, in place on `q`."""
        q, k, v = self._whole(q, k, v)
        g, pool = self._graph, self._memory.layers[layer]
        assert isinstance(pool, AttentionState)
        # Expanded here: a chunk without logits needs what is written even where nothing after it reads it.
        keys = g.expand(g.set_rows(pool.k, k, self.inputs.slots))
        values = g.expand(g.set_rows(pool.v, v, self.inputs.slots))
        if len(self._bounds) == 1:
            return g.reshape(self._attend(q, keys, values, 0), q.shape)
        for i, (start, stop) in enumerate(self._bounds):
            rows = g.rows(q, start, stop)
            g.store(g.reshape(self._attend(rows, keys, values, i), rows.shape), rows)
        return g.latest(q)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, index: int) -> Tensor:
        """One text's q [T, Q] over its own ring: [T, N, D]."""
        g, hp, part = self._graph, self._hp, self._plan.parts[index]
        queries = g.swap(g.reshape(q, (q.shape[0], hp.heads, hp.head_width)))  # [N, T, D]
        attention = g.attention if self._attention == "flash" else g.plain_attention
        k, v = self._heads(keys, part), self._heads(values, part)
        return attention(queries, k, v, self.inputs.masks[index], hp.head_width**-0.5)

    def _heads(self, rings: Tensor, part: Part) -> Tensor:
        """All rings [slots · R, J] -> the rows in use of one, [K, window, D], as a view."""
        hp, width = self._hp, rings.shape[1]
        first = part.slot * self._memory.ring * width
        return self._graph.view(rings, (hp.kv_heads, part.window, hp.head_width), (hp.head_width, width), first)

    def last(self, x: Value) -> Tensor:
        (x,) = self._whole(x)
        if len(self._bounds) == 1:
            return self._graph.rows(x, x.shape[0] - 1, x.shape[0])
        return self._graph.get_rows(x, self.constants.last)

    def head(self, x: Value) -> Tensor:
        weight = self._weights.get(HEAD) or self._weights["token_embd.weight"]
        return self._graph.matmul(weight, self._whole(x)[0])


def _home(x: Value) -> Tensor | None:
    return x.home if isinstance(x, Deferred) and x.done is None else None
