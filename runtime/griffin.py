"""Griffin's forward pass, written once over the operations that each backend gives.

Papers: Griffin, arXiv 2402.19427 (section 2 and appendix A); RecurrentGemma, arXiv 2404.07839. Names follow
them; dimension letters are those of arch.py. A batch of T tokens holds a chunk of each of some sequences, one
behind another: what has no memory takes all rows alike, while the convolution, the scan and the attention go on,
sequence by sequence, from what the chunks before left behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.arch import Hyperparameters

#: What the caller wants of a batch: every token's logits, those of each sequence's last, what the head is given for the
#: last in their place, or the state alone.
Rows = Literal["every", "last", "hidden", "none"]

A = TypeVar("A")


@dataclass(frozen=True)
class Span:
    """A sequence's chunk: rows [start, stop) of the batch, the first of them at `position` of its text."""

    start: int
    stop: int
    position: int

    @property
    def count(self) -> int:
        """Tokens."""
        return self.stop - self.start


def spans(counts: Sequence[int], positions: Sequence[int]) -> list[Span]:
    """Chunks of so many tokens, one behind another."""
    stops = np.cumsum(counts).tolist()
    return [Span(stop - n, stop, p) for n, stop, p in zip(counts, stops, positions, strict=True)]


class Ops(Protocol[A]):
    """The operations of a backend on one batch, whose spans and states it knows.

    `name` is a weight's GGUF name without `.weight` and `.bias`, `layer` the number of the block.
    """

    def embed(self, tokens: Any) -> A:
        """Rows of the embedding, scaled: [T] -> [T, H]."""
        ...

    def norm(self, name: str, x: A) -> A:
        """x · rsqrt(mean x² + eps) · w."""
        ...

    def linear(self, name: str, x: A) -> A:
        """x @ Wᵀ, and + b where the model has one."""
        ...

    def block_linear(self, name: str, x: A) -> A:
        """As `linear` with a block-diagonal weight [G, B, B]: [T, W] -> [T, W]."""
        ...

    def add(self, x: A, y: A) -> A:
        """x + y."""
        ...

    def mul(self, x: A, y: A) -> A:
        """x ⊙ y."""
        ...

    def sigmoid(self, x: A) -> A:
        """1 / (1 + exp(-x))."""
        ...

    def gelu_gate(self, x: A, y: A) -> A:
        """gelu(x) ⊙ y, gelu by tanh."""
        ...

    def conv(self, layer: int, name: str, z: A) -> A:
        """Causal depthwise convolution over each state's tail [W, C-1] and then its rows of `z` [T, W]."""
        ...

    def decay(self, name: str, r: A) -> tuple[A, A]:
        """a = exp(r ⊙ w) and sqrt(1 - a²), both [T, W]; where a text begins, the latter is 1: nothing is forgotten."""
        ...

    def scan(self, layer: int, a: A, b: A) -> A:
        """h_t = a_t ⊙ h_{t-1} + b_t from each state's h [W] on, which is 0 where a text begins: every h_t, [T, W]."""
        ...

    def rope(self, x: A) -> A:
        """Turn pairs (j, j + half) of each head's first dimensions by their positions: x [T, heads · D]."""
        ...

    def attend(self, layer: int, q: A, k: A, v: A) -> A:
        """Write k and v into each state's ring, then attend to the window's rows: [T, Q]."""
        ...

    def last(self, x: A) -> A:
        """The last row of each of the S sequences: [T, H] -> [S, H]."""
        ...

    def head(self, x: A) -> A:
        """x @ Eᵀ: [T, V]. Logits are cap · tanh of it / cap, see `soft_cap`."""
        ...


def forward(ops: Ops[A], hp: Hyperparameters, tokens: Any, rows: Rows) -> A | None:
    """What `finished` takes: f32 [T, V], [S, V], [S, H] or None, as `rows` asks. The states have moved on then."""
    x = ops.embed(tokens)
    for i, recurrent in enumerate(hp.recurrent):
        block = f"blk.{i}"
        u = ops.norm(f"{block}.attn_norm", x)
        mixed = recurrent_block(ops, i, u) if recurrent else attention_block(ops, i, u)
        x = ops.add(mixed, x)
        x = ops.add(mlp(ops, block, ops.norm(f"{block}.ffn_norm", x)), x)
    if rows == "none":
        return None
    if rows != "every":
        x = ops.last(x)
    x = ops.norm("output_norm", x)
    return x if rows == "hidden" else ops.head(x)


def recurrent_block(ops: Ops[A], layer: int, u: A) -> A:
    """Two branches meet: RG-LRU(conv(W_x u)) ⊙ gelu(W_y u), then W_out. No nonlinearity on h.

    RG-LRU (eq. 1-4): r, i = σ(gates(c)); log a = -8·softplus(Λ) ⊙ r; h = a ⊙ h + sqrt(1 - a²) ⊙ (i ⊙ c).
    """
    block = f"blk.{layer}"
    c = ops.conv(layer, f"{block}.ssm_conv1d", ops.linear(f"{block}.ssm_x", u))
    i = ops.sigmoid(ops.block_linear(f"{block}.ssm_gate_i", c))
    r = ops.sigmoid(ops.block_linear(f"{block}.ssm_gate_r", c))
    a, m = ops.decay(f"{block}.ssm_a", r)
    h = ops.scan(layer, a, ops.mul(m, ops.mul(i, c)))
    return ops.linear(f"{block}.ssm_out", ops.gelu_gate(ops.linear(f"{block}.ssm_y", u), h))


def attention_block(ops: Ops[A], layer: int, u: A) -> A:
    """Local attention; keys enter the ring already turned by their absolute positions."""
    block = f"blk.{layer}"
    q, k = ops.rope(ops.linear(f"{block}.attn_q", u)), ops.rope(ops.linear(f"{block}.attn_k", u))
    return ops.linear(f"{block}.attn_output", ops.attend(layer, q, k, ops.linear(f"{block}.attn_v", u)))


def mlp(ops: Ops[A], block: str, u: A) -> A:
    """W_down(gelu(W_gate u) ⊙ W_up u)."""
    gate, up = ops.linear(f"{block}.ffn_gate", u), ops.linear(f"{block}.ffn_up", u)
    return ops.linear(f"{block}.ffn_down", ops.gelu_gate(gate, up))


def soft_cap(hp: Hyperparameters, z: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits cap · tanh(z / cap), in the place of `z`, f32 of any shape."""
    cap = np.float32(hp.logit_cap)
    np.divide(z, cap, out=z)
    np.tanh(z, out=z)
    return np.multiply(z, cap, out=z)


def finished(hp: Hyperparameters, z: NDArray[np.float32] | None, rows: Rows) -> NDArray[np.float32] | None:
    """What a batch gives: `forward`'s values of those `rows`, logits under their cap."""
    return z if z is None or rows == "hidden" else soft_cap(hp, z)


def angles(hp: Hyperparameters, batch: Sequence[Span]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of position · base^(-2j / rope_width), f32 [T, 1, rope_width / 2] each.

    Angles are computed in f64: in f32, as everywhere else, they are off by 0.05 rad after a million tokens.
    """
    half = hp.rope_width // 2
    p = np.concatenate([np.arange(s.position, s.position + s.count) for s in batch])
    angle = p[:, None, None] * hp.rope_base ** (-np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def ring_slots(span: Span, ring: int) -> NDArray[np.int64]:
    """The rows of its ring that a span's keys and values take, i64 [T]: the ring holds position p in row p % R."""
    return np.arange(span.position, span.position + span.count) % ring


def visible(hp: Hyperparameters, span: Span, ring: int, rows: int) -> NDArray[np.bool_]:
    """Which of the first `rows` rows of its ring each token of a span sees, bool [T, rows].

    After the chunk is written, row s holds the latest position up to the last one that falls on it; a query at
    p sees positions p - window + 1 to p. Rows beyond p, left there by a text that was rolled back, count as
    positions one turn of the ring before, out of the window.
    """
    assert span.count <= ring - hp.window, "a longer chunk would overwrite keys that it still needs"
    p = np.arange(span.position, span.position + span.count)
    held = p[-1] - (p[-1] - np.arange(rows)) % ring
    return (held >= 0) & (held <= p[:, None]) & (held > p[:, None] - hp.window)
