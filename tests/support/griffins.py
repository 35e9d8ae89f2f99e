"""Hyperparameters of the published models and of tiny ones, and random weights in GGUF layout for them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from griffin_gguf.quant.file_types import ALWAYS_F32, Metadata
from griffin_gguf.runtime.arch import ARCHITECTURE, Hyperparameters, Tensor, to_metadata
from griffin_gguf.runtime.published import NINE_B as NINE_B
from griffin_gguf.runtime.published import TWO_B as TWO_B

Weights = dict[str, NDArray[np.float32]]


def tiny(**overrides: Any) -> Hyperparameters:
    """Five layers whose rows are multiples of 256, so that K-quants fit; some 2 million weights."""
    base = replace(
        TWO_B, layers=5, hidden=256, mlp_width=512, vocab=300, heads=2, head_width=128, rope_width=64, lru_width=512,
        gate_blocks=2, window=16, embedding_scale=16.0, recurrent=(True, True, False, True, True),
    )  # fmt: skip
    return replace(base, **overrides)


def metadata(hp: Hyperparameters) -> Metadata:
    """The keys of a GGUF of that model, without a tokenizer."""
    keys: Metadata = {"general.architecture": (ARCHITECTURE, GGUFValueType.STRING, None)}
    for name, (value, kind) in to_metadata(hp).items():
        keys[name] = (value, kind, GGUFValueType.BOOL if kind is GGUFValueType.ARRAY else None)
    return keys


def weights(hp: Hyperparameters, seed: int = 0) -> Weights:
    """Small random weights, float32, by GGUF name; decays below 0, as they must be."""
    rng = np.random.default_rng(seed)
    found = {t.name: rng.normal(0, 0.05, t.shape).astype(np.float32) for t in hp.tensors()}
    return {name: -abs(array) if name.endswith("ssm_a") else array for name, array in found.items()}


def reader(found: Weights) -> Callable[[Tensor, int, int], NDArray[np.float32]]:
    """Read rows as the writer asks for them."""

    def read(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
        return found[tensor.name].reshape(-1, tensor.shape[-1])[start:stop]

    return read


def importance(hp: Hyperparameters, seed: int = 0) -> Weights:
    """Random importance of every matrix, float32 [matrices, columns], by GGUF name."""
    rng = np.random.default_rng(seed)
    matrices = [t for t in hp.tensors() if t.role not in ALWAYS_F32]
    shapes = {t.name: (t.shape[0] if len(t.shape) == 3 else 1, t.shape[-1]) for t in matrices}
    return {name: rng.uniform(0.1, 2, shape).astype(np.float32) for name, shape in shapes.items()}
