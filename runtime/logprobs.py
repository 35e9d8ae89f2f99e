"""What a model thought of the tokens that it said: their log probabilities, and those of the likeliest others."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime.sampling import top_k


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one token: natural logarithms of the model's own probabilities, whatever the sampling did to them.

    `top` are the likeliest tokens with theirs, likeliest first, of equals the lowest id first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """Of `token` and the `count` likeliest, by softmax over `logits`, f32 [V]; the sum is done in f64."""
    largest = float(logits.max())
    total = largest + math.log(np.exp(logits.astype(np.float64) - largest).sum())
    ids = top_k(logits, count) if count else np.empty(0, np.intp)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return TokenLogprobs(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ids))
