"""The recurrence h_t = a_t ⊙ h_{t-1} + b_t as a ggml graph: no operation does it, few can."""

import itertools

from griffin_gguf.runtime.ggml.graph import Context, Tensor

#: The longest block: beyond it, running products cost more than carries save.
_LONGEST_BLOCK = 32


def scan(g: Context, a: Tensor, b: Tensor, h: Tensor) -> None:
    """h_t = a_t ⊙ h_{t-1} + b_t, in place on `b` [T, W], in blocks of tokens, so that few nodes do it; `h` is left.

    First a chain inside all blocks at once, with the running product of `a` [T, W]; then, block by block, what
    the blocks before carry over: h_t = b'_t + (a_t ⋯ a_first) ⊙ h_last of the block before.
    """
    count, width = b.shape
    length = block_length(count)
    blocks = count // length

    def column(x: Tensor, j: int) -> Tensor:
        """Token j of every block: [blocks, W]."""
        return g.view(x, (blocks, width), (length * width,), j * width)

    local, product = column(b, 0), column(a, 0)
    for j in range(1, length):
        step = column(a, j)
        local = g.expand(g.add_into(column(b, j), g.mul(step, local)))
        product = g.expand(g.mul_into(step, product))
    bounds = [m * length for m in range(blocks)] + list(range(blocks * length, count + 1))
    carry = g.reshape(h, (1, width))
    for start, stop in itertools.pairwise(bounds):
        g.expand(g.add_into(g.rows(b, start, stop), g.mul(g.rows(a, start, stop), carry)))
        carry = g.rows(b, stop - 1, stop)
    g.store(carry, h)


def scan_nodes(count: int, length: int | None = None) -> int:
    """Computing nodes of a scan over `count` tokens in blocks of `length` (the best one if None)."""
    length = length or block_length(count)
    return 3 * (length - 1) + 2 * (count // length) + 2 * (count % length) + 1


def block_length(count: int) -> int:
    """Tokens a block of the scan so that it has the fewest nodes: 1 for one token, 16 for 512."""
    return min(range(1, min(count, _LONGEST_BLOCK) + 1), key=lambda length: scan_nodes(count, length))
