"""JSON with one value somewhere in it replaced by another: what a parser must survive."""

import random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 0.5, -1.5, float("inf"), float("nan"), "", "x", "<bos>", "\n",
    [], [1], ["a", "b"], [[]], [None], {}, {"a": 1}, {"content": "x"}, {"type": "Sequence", "x": [{}]}, "\ud800",
]  # fmt: skip


def damaged(value: Any, rng: random.Random) -> Any:
    """A copy of `value` with one node replaced; deeper nodes as likely as shallow ones."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        return {**value, name: damaged(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        return [*value[:i], damaged(value[i], rng), *value[i + 1 :]]
    return rng.choice(VALUES)
