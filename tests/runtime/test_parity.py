"""Both backends against transformers, in one f32 forward pass, on random models of many shapes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SHAPES
from models import random_model, transformers_hidden, transformers_logits

from griffin_gguf.runtime import load
from griffin_gguf.runtime.model import BackendName

#: Largest difference of logits, as a part of the largest logit.
BARS: dict[BackendName, float] = {"numpy": 1e-4, "ggml": 1e-3}
LENGTH = 300


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(tmp_path: Path, shape: str) -> None:
    path = random_model(tmp_path, **SHAPES[shape])
    random = np.random.default_rng(7)
    for backend, bar in BARS.items():
        with load(path, backend=backend, threads=1) as model:
            tokens = random.integers(0, model.hp.vocab, LENGTH)
            expected = transformers_logits(tmp_path / "checkpoint", tokens)
            state, logits, start = model.new_state(), [], 0
            while start < LENGTH:
                stop = min(LENGTH, start + int(random.integers(1, 120)))
                logits.append(model.forward(tokens[start:stop], state, every=True))
                start = stop
            found = np.concatenate(logits)
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= bar * np.abs(expected).max()
        assert (found.argmax(1) == expected.argmax(1)).all()


#: Layers that end on attention: what they remember has no reader within a chunk without logits.
ENDINGS = {
    "attention last": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "attention twice": {"block_types": ["recurrent", "attention", "attention"], "num_hidden_layers": 6},
    "a lone attention": {"block_types": ["attention"], "num_hidden_layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES | ENDINGS)
def test_a_prompt_longer_than_several_chunks_equals_one_pass(tmp_path: Path, shape: str) -> None:
    overrides: dict[str, Any] = {"attention_window_size": 100} | (SHAPES | ENDINGS)[shape]
    path = random_model(tmp_path, **overrides)
    tokens = np.random.default_rng(3).integers(0, 384, 1300)
    expected = transformers_logits(tmp_path / "checkpoint", tokens)[-1]
    for backend, bar in BARS.items():
        with load(path, backend=backend, threads=1) as model:
            state = model.new_state()
            found = model.forward(tokens, state)
        assert state.position == 1300
        assert np.abs(found - expected).max() <= bar * np.abs(expected).max()


#: Tokens of texts that are read together: more texts than are at once, one longer than a chunk, some of one token.
TOGETHER = (530, 1, 30, 5, 1, 2, 64, 130, 1, 9)


@pytest.mark.parametrize("shape", SHAPES | ENDINGS)
def test_a_texts_vector_is_what_transformers_gives_its_head_after_the_last_token(tmp_path: Path, shape: str) -> None:
    path = random_model(tmp_path, **(SHAPES | ENDINGS)[shape])
    random = np.random.default_rng(11)
    texts = [random.integers(0, 384, count) for count in TOGETHER]
    expected = transformers_hidden(tmp_path / "checkpoint", texts)
    for backend, bar in BARS.items():
        with load(path, backend=backend, threads=1) as model:
            found, slowly = model.embed(texts), np.empty((3, model.hp.hidden), np.float32)
            assert len(list(model.embedding(texts[:3], slowly, 100))) == 6  # passes over 561 tokens
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= bar * np.abs(expected).max()
        assert np.abs(slowly - expected[:3]).max() <= bar * np.abs(expected).max()


#: RMS difference as a part of the logits' RMS, some twice what was measured: ggml rounds activations to the
#: weights' precision before it multiplies (Q8_0: to 8 bits in blocks of 32).
ROUNDING = {"F32": 2e-6, "F16": 2e-3, "BF16": 1.6e-2, "Q8_0": 6e-2}


@pytest.mark.parametrize("file_type", ROUNDING)
def test_ggml_equals_numpy_on_the_same_file_but_for_rounding(tmp_path: Path, file_type: str) -> None:
    path = random_model(tmp_path, file_type)
    tokens = np.random.default_rng(5).integers(0, 384, 100)
    logits = {}
    for backend in BARS:
        with load(path, backend=backend, threads=1) as model:
            logits[backend] = model.forward(tokens, model.new_state(), every=True)
    difference = np.sqrt(((logits["ggml"] - logits["numpy"]) ** 2).mean())
    assert difference <= ROUNDING[file_type] * np.sqrt((logits["numpy"] ** 2).mean())
