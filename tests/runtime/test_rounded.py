"""A recurrence of lower precision, against the same done by NumPy's own casts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_model
from numpy.typing import NDArray

from griffin_gguf.runtime import load
from griffin_gguf.runtime.backends import numpy as reference
from griffin_gguf.runtime.backends.rounded import Precision, RoundedBackend
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import Tuning

Array = NDArray[np.float32]
TOKENS = np.random.default_rng(0).integers(3, 100, 150).astype(np.int32)


def half(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def brain(x: Array) -> Array:
    """To the nearest bf16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


ROUNDING: dict[Precision, Any] = {"h in F16": half, "h in BF16": brain, "recurrence in BF16": brain}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("rounded"), "F32")


def rounded(source: Path, precision: Precision) -> Model:
    file = GgufFile.open(source)
    return Model(file, Tokenizer.from_gguf(source, file.metadata), RoundedBackend(file, precision, Tuning(threads=1)))


def by_numpy(source: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> Array:
    """Every token's logits by the reference backend with a scan that rounds."""
    convert = ROUNDING[precision]

    class Rounding(reference.NumpyOps):
        def scan(self, layer: int, a: Array, b: Array) -> Array:
            if precision == "recurrence in BF16":
                a, b = convert(a), convert(b)
            ((_, state),) = self._batch
            kept: Any = state.layers[layer]
            out, h = np.empty_like(b), kept.h
            for t in range(len(b)):
                h = out[t] = convert(a[t] * h + b[t])
            self.stores.append((kept.h, h))
            return out

    monkeypatch.setattr(reference, "NumpyOps", Rounding)
    with load(source, backend="numpy") as model:
        return model.forward(TOKENS, model.new_state(), every=True)


@pytest.mark.parametrize("precision", list(ROUNDING))
def test_logits_are_those_of_numpys_casts(source: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(source, threads=1) as model:
        exact = model.forward(TOKENS, model.new_state(), every=True)
    wanted = by_numpy(source, precision, monkeypatch)
    with rounded(source, precision) as model:
        found = model.forward(TOKENS, model.new_state(), every=True)
    effect, error = np.abs(wanted - exact).mean(), np.abs(found - wanted).mean()
    assert effect > 1e-6
    assert error < 0.1 * effect  # a number halfway between two may go either way


@pytest.mark.parametrize("precision", list(ROUNDING))
def test_h_is_of_that_precision_after_every_chunk(source: Path, precision: Precision) -> None:
    with rounded(source, precision) as model:
        state = model.new_state()
        for count in (1, 70, 1, 20):
            model.forward(TOKENS[:count], state)
            kept = {name: array for name, array in state.read().items() if name.endswith(".h")}
            assert kept
            for array in kept.values():
                assert np.array_equal(ROUNDING[precision](array), array)
                assert np.any(array)


def test_chunks_change_nothing(source: Path) -> None:
    with rounded(source, "h in BF16") as model:
        whole = model.forward(TOKENS, model.new_state(), every=True)
        state = model.new_state()
        cut = [model.forward(TOKENS[a:b], state, every=True) for a, b in ((0, 1), (1, 90), (90, 91), (91, 150))]
        assert np.allclose(np.concatenate(cut), whole, atol=1e-2 * np.abs(whole).max())
