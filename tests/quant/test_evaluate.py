from collections.abc import Sequence
from math import exp, log, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.quant import evaluate
from griffin_gguf.quant.evaluate import Perplexity, compare, kl, perplexity, score, stream, windows
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError

VOCAB = 7


class Remembering:
    """A model whose logits depend on all tokens so far, so that a lost or repeated token shows."""

    def __init__(self, seed: int = 0, sharpness: float = 1.0, vocab: int = VOCAB) -> None:
        self.vocab = vocab
        self.table = np.random.default_rng(seed).normal(0, 3, (31, vocab))
        self.sharpness = sharpness
        self.calls: list[int] = []

    def new_state(self) -> SimpleNamespace:
        return SimpleNamespace(hash=1)

    def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
        self.calls.append(len(tokens))
        rows = []
        for token in tokens:
            state.hash = (state.hash * 31 + token + 1) % 1009
            rows.append(self.table[state.hash % 31] * self.sharpness)
        return np.array(rows, np.float32)

    def probabilities(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        logits = self.forward(tokens[:-1], self.new_state(), True).astype(np.float64)
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


TOKENS = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()


def test_perplexity_by_its_definition() -> None:
    model = Remembering()
    nll = -np.log(model.probabilities(TOKENS)[np.arange(99), TOKENS[1:]])
    found = perplexity(model, TOKENS)
    assert found.tokens == 99
    assert found.nll == pytest.approx(nll.sum() / 99, rel=1e-6)
    assert found.value == pytest.approx(exp(nll.sum() / 99), rel=1e-6)
    stderr = sqrt(((nll - nll.mean()) ** 2).sum() / 98) / sqrt(99)
    assert found.nll_stderr == pytest.approx(stderr, rel=1e-6)
    assert found.stderr == pytest.approx(found.value * stderr, rel=1e-6)
    assert found.bits_per_byte(200) == pytest.approx(nll.sum() / log(2) / 200, rel=1e-6)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    found = perplexity(Remembering(sharpness=0), TOKENS)
    assert found.value == pytest.approx(VOCAB, rel=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-12)


def test_kl_by_its_definition() -> None:
    reference, model = Remembering(), Remembering(sharpness=0.8)
    p, q = reference.probabilities(TOKENS), model.probabilities(TOKENS)
    wanted = (p * np.log(p / q)).sum(axis=1)
    found = kl(reference, model, TOKENS)
    assert found.mean == pytest.approx(wanted.mean(), rel=1e-5)
    assert found.median == pytest.approx(np.median(wanted), rel=1e-5)
    assert found.maximum == pytest.approx(wanted.max(), rel=1e-5)
    assert found.stderr == pytest.approx(wanted.std(ddof=1) / sqrt(99), rel=1e-5)
    assert compare(reference, model, stream(TOKENS)).kl == pytest.approx(wanted, rel=1e-4)
    assert found.tokens == 99
    assert found.top1 == 1.0  # the same order, only less sure


def test_kl_of_a_model_to_itself_and_to_another() -> None:
    same = kl(Remembering(), Remembering(), TOKENS)
    assert (same.mean, same.maximum, same.top1) == (0.0, 0.0, 1.0)
    p, q = Remembering(0).probabilities(TOKENS), Remembering(5).probabilities(TOKENS)
    other = kl(Remembering(0), Remembering(5), TOKENS)
    assert other.top1 == (p.argmax(axis=1) == q.argmax(axis=1)).mean() < 0.5
    assert other.mean > 1


@settings(max_examples=25, deadline=None)
@given(logits=st.integers(1, 4000), rows=st.integers(1, 4000), most=st.integers(1, 120))
def test_chunks_bound_memory_and_change_nothing(logits: int, rows: int, most: int) -> None:
    whole, far = perplexity(Remembering(), TOKENS), kl(Remembering(), Remembering(5), TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_LOGITS_BYTES", logits)
        patch.setattr(evaluate, "_ROWS_BYTES", rows)
        patch.setattr(evaluate, "_MOST_TOKENS", most)
        model = Remembering()
        progress: list[tuple[int, int]] = []
        cut = perplexity(model, TOKENS, lambda done, total: progress.append((done, total)))
        assert kl(Remembering(), Remembering(5), TOKENS) == far
    assert (cut.nll, cut.nll_stderr) == (whole.nll, whole.nll_stderr)
    assert sum(model.calls) == 99
    assert max(model.calls) <= max(1, min(most, logits // (4 * VOCAB)))
    assert progress == [(int(done), 99) for done in np.cumsum(model.calls)]


@pytest.mark.parametrize("tokens", [[], [2], [2, 3]])
def test_too_short_a_text(tokens: list[int]) -> None:
    with pytest.raises(UnsupportedError, match="too short to measure"):
        perplexity(Remembering(), tokens)
    with pytest.raises(UnsupportedError, match="too short to measure"):
        kl(Remembering(), Remembering(), tokens)


def test_logits_that_are_no_numbers() -> None:
    with pytest.raises(GriffinError, match="tokens 0 to 99: the model's logits hold NaN or infinity"):
        perplexity(Remembering(sharpness=float("nan")), TOKENS)


def test_vocabularies_that_differ() -> None:
    with pytest.raises(UnsupportedError, match="vocabularies of 7 and 8 tokens cannot be compared"):
        kl(Remembering(), Remembering(vocab=8), TOKENS)


def test_what_else_tells_two_models_apart() -> None:
    reference, model = Remembering(), Remembering(5)
    p, q = reference.probabilities(TOKENS), model.probabilities(TOKENS)
    own = np.arange(99), TOKENS[1:]
    found = kl(reference, model, TOKENS)
    wanted = (p * np.log(p / q)).sum(axis=1)
    assert found.p99 == pytest.approx(np.quantile(wanted, 0.99), rel=1e-5)
    assert found.rms_change == pytest.approx(sqrt(((q[own] - p[own]) ** 2).mean()), rel=1e-5)
    ratio = np.log(p[own] / q[own])  # of the likelihoods of what did follow
    assert found.log_ratio == pytest.approx(ratio.mean(), rel=1e-5)
    assert found.log_ratio_stderr == pytest.approx(ratio.std(ddof=1) / sqrt(99), rel=1e-5)
    assert exp(found.log_ratio) == pytest.approx(
        perplexity(model, TOKENS).value / perplexity(reference, TOKENS).value, rel=1e-6
    )


def llama_perplexity(model: Remembering, tokens: Sequence[int], ctx: int, bos: int | None) -> tuple[float, float]:
    """What llama-perplexity does, written down from its description: perplexity and standard error."""
    losses: list[float] = []
    for i in range(len(tokens) // ctx):
        window = list(tokens[i * ctx : (i + 1) * ctx])
        if bos is not None:
            window[0] = bos
        probabilities = model.probabilities(window)
        losses += [-log(probabilities[j][window[j + 1]]) for j in range(ctx // 2, ctx - 1)]
    mean = sum(losses) / len(losses)
    variance = sum(x * x for x in losses) / len(losses) - mean * mean
    return exp(mean), exp(mean) * sqrt(variance / (len(losses) - 1))


@settings(max_examples=40, deadline=None)
@given(ctx=st.integers(4, 50), count=st.integers(4, 130), bos=st.sampled_from([None, 0, 3]))
def test_windows_are_read_as_llama_perplexity_reads_them(ctx: int, count: int, bos: int | None) -> None:
    tokens = np.random.default_rng(count).integers(0, VOCAB, count).tolist()
    if count < ctx or (count // ctx) * (ctx - 1 - ctx // 2) < 2:
        with pytest.raises(UnsupportedError, match="too short"):
            score(Remembering(), windows(tokens, ctx, bos))
        return
    found = Perplexity.of(score(Remembering(), windows(tokens, ctx, bos)))
    assert (found.value, found.stderr) == pytest.approx(llama_perplexity(Remembering(), tokens, ctx, bos), rel=1e-6)


def test_scored_tokens_know_where_they_lie() -> None:
    found = score(Remembering(), windows(TOKENS, 10, 2))
    assert found.at.tolist() == [start + i for start in range(0, 100, 10) for i in range(6, 10)]
    assert score(Remembering(), stream(TOKENS)).at.tolist() == list(range(1, 100))


def test_the_first_half_of_a_window_needs_no_logits() -> None:
    class Sparing(Remembering):
        def forward(self, tokens: Sequence[int], state: Any, every: bool = False) -> NDArray[np.float32]:
            found = super().forward(tokens, state, True)
            return found if every else found[-1]

    model = Sparing()
    score(model, windows(TOKENS, 20, 2))
    assert model.calls == [10, 9] * 5


def test_windows_of_nothing() -> None:
    with pytest.raises(UnsupportedError, match="a text of 99 tokens is too short; expected a window of 100 at least"):
        windows(TOKENS[:99], 100, 2)
    with pytest.raises(UnsupportedError, match="expected at least 4 tokens each, found 3"):
        windows(TOKENS, 3, 2)
