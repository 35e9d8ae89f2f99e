"""Griffin's forward pass, written once over the operations that each backend gives.

Papers: Griffin, arXiv 2402.19427 (section 2 and appendix A); RecurrentGemma, arXiv 2404.07839. Names follow
them; dimension letters are those of arch.py. A chunk of T tokens continues from a state exactly: the
convolution, the scan and the attention all read what the chunks before left behind.
"""

from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.state import AttentionState, LayerState, RecurrentState

#: What the caller wants of a chunk: its tokens' logits, its last token's, or the state alone.
Rows = Literal["every", "last", "none"]

A = TypeVar("A")


@dataclass(frozen=True)
class Inputs(Generic[A]):
    """What changes from chunk to chunk."""

    tokens: A  # i32 [T]
    cos: A  # f32 [T, 1, rope_width / 2]: of position · base^(-2j / rope_width)
    sin: A  # likewise
    keep: A  # f32 [T, 1]: 0 at position 0, where nothing is remembered, else 1
    slots: A  # i64 [T]: the ring rows that the chunk's keys and values take
    mask: A  # [T, R]: 0 where a query sees a ring row, -inf where not


class Ops(Protocol[A]):
    """The operations of a backend. `name` is a weight's GGUF name without `.weight` and `.bias`."""

    def embed(self, tokens: A) -> A:
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

    def conv(self, name: str, z: A, tail: A) -> A:
        """Causal depthwise convolution over `tail` [W, C-1] and then `z` [T, W]; leaves the new tail."""
        ...

    def decay(self, name: str, r: A, keep: A) -> tuple[A, A]:
        """a = keep · exp(r ⊙ w) and sqrt(1 - a²), both [T, W]."""
        ...

    def scan(self, a: A, b: A, h: A) -> A:
        """h_t = a_t ⊙ h_{t-1} + b_t from `h` [W] on: every h_t, [T, W]; leaves the last in `h`."""
        ...

    def rope(self, x: A, cos: A, sin: A) -> A:
        """Turn pairs (j, j + half) of each head's first dimensions: x [T, heads · D], cos and sin [T, 1, half]."""
        ...

    def attend(self, q: A, k: A, v: A, ring: AttentionState[A], inputs: Inputs[A]) -> A:
        """Write k and v into the ring, then attend to the rows the mask shows: [T, Q]."""
        ...

    def last(self, x: A) -> A:
        """The last row: [T, H] -> [1, H]."""
        ...

    def head(self, x: A) -> A:
        """Logits cap · tanh(x @ Eᵀ / cap): [T, V]."""
        ...


def forward(ops: Ops[A], hp: Hyperparameters, state: list[LayerState[A]], inputs: Inputs[A], rows: Rows) -> A | None:
    """Logits f32 [T, V], [1, V] or None, as `rows` asks; `state` has moved on by T tokens after it."""
    x = ops.embed(inputs.tokens)
    for i in range(hp.layers):
        block, layer = f"blk.{i}", state[i]
        u = ops.norm(f"{block}.attn_norm", x)
        if isinstance(layer, RecurrentState):
            mixed = recurrent_block(ops, block, layer, inputs, u)
        else:
            mixed = attention_block(ops, block, layer, inputs, u)
        x = ops.add(mixed, x)
        x = ops.add(mlp(ops, block, ops.norm(f"{block}.ffn_norm", x)), x)
    if rows == "none":
        return None
    if rows == "last":
        x = ops.last(x)
    return ops.head(ops.norm("output_norm", x))


def recurrent_block(ops: Ops[A], block: str, state: RecurrentState[A], inputs: Inputs[A], u: A) -> A:
    """Two branches meet: RG-LRU(conv(W_x u)) ⊙ gelu(W_y u), then W_out. No nonlinearity on h.

    RG-LRU (eq. 1-4): r, i = σ(gates(c)); log a = -8·softplus(Λ) ⊙ r; h = a ⊙ h + sqrt(1 - a²) ⊙ (i ⊙ c).
    """
    c = ops.conv(f"{block}.ssm_conv1d", ops.linear(f"{block}.ssm_x", u), state.tail)
    i = ops.sigmoid(ops.block_linear(f"{block}.ssm_gate_i", c))
    r = ops.sigmoid(ops.block_linear(f"{block}.ssm_gate_r", c))
    a, m = ops.decay(f"{block}.ssm_a", r, inputs.keep)
    h = ops.scan(a, ops.mul(m, ops.mul(i, c)), state.h)
    return ops.linear(f"{block}.ssm_out", ops.gelu_gate(ops.linear(f"{block}.ssm_y", u), h))


def attention_block(ops: Ops[A], block: str, ring: AttentionState[A], inputs: Inputs[A], u: A) -> A:
    """Local attention; keys enter the ring already turned by their absolute positions."""
    q = ops.rope(ops.linear(f"{block}.attn_q", u), inputs.cos, inputs.sin)
    k = ops.rope(ops.linear(f"{block}.attn_k", u), inputs.cos, inputs.sin)
    v = ops.linear(f"{block}.attn_v", u)
    return ops.linear(f"{block}.attn_output", ops.attend(q, k, v, ring, inputs))


def mlp(ops: Ops[A], block: str, u: A) -> A:
    """W_down(gelu(W_gate u) ⊙ W_up u)."""
    gate, up = ops.linear(f"{block}.ffn_gate", u), ops.linear(f"{block}.ffn_up", u)
    return ops.linear(f"{block}.ffn_down", ops.gelu_gate(gate, up))


def chunk_inputs(hp: Hyperparameters, tokens: NDArray[np.int32], position: int, ring: int) -> Inputs[NDArray[Any]]:
    """The inputs of a chunk that starts at `position`, as arrays; the mask is bool [T, R], True where seen.

    The ring holds position p in row p % R. After the chunk is written, row s holds the latest position up to
    the last one that falls on it; a query at p sees positions p - window + 1 to p. Angles are computed in
    f64: in f32, as everywhere else, they are off by 0.05 rad after a million tokens.
    """
    p = np.arange(position, position + len(tokens))
    assert len(p) <= ring - hp.window + 1, "a longer chunk would overwrite keys that it still needs"
    held = p[-1] - (p[-1] - np.arange(ring)) % ring
    seen = (held >= 0) & (held <= p[:, None]) & (held > p[:, None] - hp.window)
    half = hp.rope_width // 2
    angle = p[:, None, None] * hp.rope_base ** (-np.arange(half) / half)
    return Inputs(
        tokens=tokens,
        cos=np.cos(angle).astype(np.float32),
        sin=np.sin(angle).astype(np.float32),
        keep=(p != 0).astype(np.float32)[:, None],
        slots=(p % ring).astype(np.int64),
        mask=seen,
    )
