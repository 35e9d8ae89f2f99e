"""llama.cpp's protocol for perplexity, through llama-cpp-python's own interface, against ours over the same files."""

from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest
from foreign import foreign
from llama_cpp import Llama

from griffin_gguf.quant.evaluate import Perplexity, score, windows
from griffin_gguf.quant.runner import open_runner

TEXT = "The fox of the river said that nothing under the moon grows for ever, and went home. " * 40


def by_llama_cpp_python(path: Path, ctx: int) -> tuple[float, float, int]:
    """As llama-perplexity: whole windows, BOS first in each, the later half scored; all in Python's floats."""
    # Attention and batches as in ours: f16 keys are summed up in another order otherwise, which moves the perplexity of
    # a model that knows nothing, and is sure of it, by up to 6e-4 of it.
    options = {"n_ctx": ctx, "n_batch": ctx, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True}
    model = Llama(str(path), logits_all=True, verbose=False, **options)
    try:
        tokens = model.tokenize(TEXT.encode(), add_bos=True)
        losses: list[float] = []
        for start in range(0, len(tokens) - ctx + 1, ctx):
            window = [model.token_bos(), *tokens[start + 1 : start + ctx]]
            model.reset()
            model.eval(window[: ctx // 2])
            model.eval(window[ctx // 2 : -1])
            for j in range(ctx // 2, ctx - 1):
                logits = np.array(model.scores[j], np.float64)
                losses.append(log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[window[j + 1]])
    finally:
        model.close()
    mean = sum(losses) / len(losses)
    variance = sum(x * x for x in losses) / len(losses) - mean * mean
    return exp(mean), exp(mean) * sqrt(variance / (len(losses) - 1)), len(losses)


@pytest.mark.parametrize("kind", ["gemma", "llama"])
@pytest.mark.parametrize("ctx", [64, 100])
def test_perplexity_is_that_of_llama_cpp(tmp_path: Path, kind: str, ctx: int) -> None:
    path = foreign(tmp_path / "model.gguf", kind)
    with open_runner(path, threads=1, context=ctx) as runner:
        assert runner.bos is not None
        found = Perplexity.of(score(runner, windows(runner.encode(TEXT), ctx, runner.bos)))
    value, stderr, count = by_llama_cpp_python(path, ctx)
    assert found.tokens == count > 300
    assert (found.value, found.stderr) == pytest.approx((value, stderr), rel=1e-5)
