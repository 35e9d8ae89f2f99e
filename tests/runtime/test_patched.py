"""The backend with replaced weights: equal to the file that would hold them, and whole again afterwards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from models import random_model
from numpy.typing import NDArray

from griffin_gguf.quant.encode import encode
from griffin_gguf.quant.quantizer import Settings, quantize
from griffin_gguf.runtime import load
from griffin_gguf.runtime.backends.ggml_memory import GgmlState
from griffin_gguf.runtime.backends.patched import PatchedBackend
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize
from griffin_gguf.runtime.tuning import Tuning

TOKENS = np.array([2, 9, 31, 7, 100, 54, 3, 88, 12, 4, 60, 21], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("patched")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return random_model(folder, "BF16")


@pytest.fixture
def backend(source: Path) -> Iterator[PatchedBackend]:
    with GgufFile.open(source) as file:
        made = PatchedBackend(file, Tuning(threads=1))
        yield made
        made.close()


class Encoder:
    """Encodes the file's weights as they are asked for."""

    def __init__(self, source: Path) -> None:
        self._source = source

    def __call__(self, name: str, type: T) -> NDArray[np.uint8]:
        with GgufFile.open(self._source) as file:
            return encode(type, np.ascontiguousarray(dequantize(file.tensors[name], file.read(name))))


def logits(backend: PatchedBackend) -> NDArray[np.float32]:
    return fed(backend, TOKENS, backend.new_state())


def fed(backend: PatchedBackend, tokens: NDArray[np.int32], state: GgmlState) -> NDArray[np.float32]:
    """Every token's logits."""
    found = backend.run([(tokens, state)], "every")
    assert found is not None
    state.move(len(tokens), None, None, traced=False)
    return found


def matrices(source: Path) -> list[str]:
    """Those whose rows blocks of 32 divide."""
    with GgufFile.open(source) as file:
        return [name for name, info in file.tensors.items() if info.type is T.BF16 and info.shape[-1] % 32 == 0]


@pytest.mark.parametrize("type", [T.Q8_0, T.Q4_0, T.F16])
def test_it_is_the_model_that_a_file_of_these_types_would_be(
    folder: Path, source: Path, backend: PatchedBackend, type: T
) -> None:
    names = matrices(source)
    quantize(source, folder / "other.gguf", "BF16", Settings(types=dict.fromkeys(names, type)), threads=1)
    backend.patch(dict.fromkeys(names, type), Encoder(source))
    with load(folder / "other.gguf", threads=1) as model:
        wanted = model.forward(TOKENS, model.new_state(), every=True)
    assert np.array_equal(logits(backend), wanted)


def test_the_files_own_weights_come_back(source: Path, backend: PatchedBackend) -> None:
    before = logits(backend)
    names = matrices(source)
    backend.patch({names[0]: T.Q4_0, names[3]: T.Q4_0}, Encoder(source))
    both = logits(backend)
    backend.patch({names[3]: T.Q4_0}, Encoder(source))
    one = logits(backend)
    backend.patch({}, Encoder(source))
    assert not np.array_equal(before, both)
    assert not np.array_equal(one, both)
    assert np.array_equal(logits(backend), before)


def test_a_state_goes_on_with_the_new_weights(source: Path, backend: PatchedBackend) -> None:
    """Its graph for one token holds addresses of weights, which must not outlive them."""
    types = dict.fromkeys(matrices(source), T.Q4_0)
    state, steady = backend.new_state(), backend.new_state()
    for s in (state, steady):
        fed(backend, TOKENS[:1], s)
    backend.patch(types, Encoder(source))
    copy = state.copy()
    coarse = fed(backend, TOKENS[1:2], copy)
    backend.patch({}, Encoder(source))
    fine = fed(backend, TOKENS[1:2], state)
    assert np.array_equal(fine, fed(backend, TOKENS[1:2], steady))
    assert not np.array_equal(fine, coarse)


def test_the_files_own_logits_can_be_had_from_what_goes_into_the_head(source: Path, backend: PatchedBackend) -> None:
    wanted = logits(backend)
    state = backend.new_state()
    hidden = np.concatenate([backend.hidden(TOKENS[:5], state), backend.hidden(TOKENS[5:], state)])
    assert hidden.shape == (len(TOKENS), backend.hp.hidden)
    backend.patch({"token_embd.weight": T.Q4_0}, Encoder(source))  # not with these
    assert np.allclose(backend.own_logits(hidden), wanted, atol=2e-2)
    assert np.abs(logits(backend) - wanted).max() > 4e-2


def test_whoever_fails_to_encode_leaves_the_files_own_weights(source: Path, backend: PatchedBackend) -> None:
    before = logits(backend)

    def failing(name: str, type: T) -> NDArray[np.uint8]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.patch({"token_embd.weight": T.Q4_0}, failing)
    assert np.array_equal(logits(backend), before)
