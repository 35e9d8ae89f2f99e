"""Vectors of texts: what they leave behind, and what happens beside them."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import random_model

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.engine import Engine
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sampling import Sampling

TEXTS = [np.random.default_rng(seed).integers(3, 384, 20 + 90 * seed) for seed in range(12)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["numpy", "ggml"])
def model(path: Path, request: pytest.FixtureRequest) -> Iterator[Model]:
    with load(path, backend=request.param, threads=1) as loaded:
        yield loaded


def test_the_head_makes_the_last_logits_of_a_vector(path: Path) -> None:
    with load(path, backend="numpy") as model:
        hidden = model.embed(TEXTS[3:4])[0]
        expected = model.forward(TEXTS[3], model.new_state())
        head = model.file.tensors["token_embd.weight"]
        weight = model.file.data(head.name).view(np.float32).reshape(model.vocab, -1)
        assert np.allclose(30 * np.tanh(weight @ hidden / 30), expected, atol=1e-5)


def test_each_text_stands_for_itself(model: Model) -> None:
    together = model.embed(TEXTS)
    assert together.shape == (len(TEXTS), model.hp.hidden)
    for text, vector in zip(TEXTS, together, strict=True):
        alone = model.embed([text])[0]
        assert np.abs(vector - alone).max() <= 1e-5 * np.abs(alone).max()
    assert np.abs(together[0] - together[1]).max() > 0.1 * np.abs(together).max()


def test_no_texts_give_no_vectors(model: Model) -> None:
    assert model.embed([]).shape == (0, model.hp.hidden)


def test_no_state_is_left_and_no_more_than_a_few_are_held(path: Path) -> None:
    with load(path, backend="ggml", threads=1) as model:
        backend = model._backend  # pyright: ignore[reportPrivateUsage]
        assert isinstance(backend, GgmlBackend)
        before = backend.memory.taken
        model.embed(TEXTS[:1] * 100)
        assert backend.memory.taken == before
        half = model.embedding(TEXTS, np.empty((len(TEXTS), model.hp.hidden), np.float32), 16)
        next(half)
        assert before < backend.memory.taken <= before + 8
        half.close()
        assert backend.memory.taken == before
        assert backend.memory.slots <= 16


def test_answers_go_on_beside_it_as_if_alone(model: Model) -> None:
    greedy = Sampling(temperature=0)
    expected = model.embed(TEXTS)
    with Engine(model, slots=2) as engine:
        alone = engine.submit([2, 7, 9], greedy, max_tokens=150)
        assert len("".join(alone)) > 0
        found = np.empty_like(expected)
        thread = threading.Thread(target=lambda: list(model.embedding(TEXTS, found, 32)))
        thread.start()
        beside = engine.submit([2, 7, 9], greedy, max_tokens=150)
        text = "".join(beside)
        thread.join()
    assert text == alone.text
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_cannot_be_read_is_refused(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="at least one"):
        model.embed([TEXTS[0], []])
    with pytest.raises(UnsupportedError, match="outside the vocabulary of 384"):
        model.embed([TEXTS[0], [384]])
    model.close()
    with pytest.raises(UnsupportedError, match="closed"):
        model.embed(TEXTS[:1])
