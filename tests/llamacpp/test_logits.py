"""Logits of the patched llama.cpp against ours and transformers', however a text is cut and whatever runs beside it.

What is compared is the largest difference as a part of the largest logit. llama.cpp's CPU backend reads GELU from a
table of f16, and by default keeps keys and values in f16: that is 3e-4 here. Types below F16 round what goes into a
product as well, so that two ways of cutting a text part by more, in ours as in theirs: their bar is that distance.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SHAPES, random_checkpoint
from models import random_model, transformers_logits
from numpy.typing import NDArray
from patched_llama import Part, logits
from safetensors.numpy import load_file, save_file

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.runtime import load

pytestmark = pytest.mark.llamacpp

#: More than two windows of the demo model, and more than a batch of llama.cpp's.
LENGTH = 700

#: Keys and values in f32, and attention that leaves them so.
EXACT = {"type_k": 0, "type_v": 0, "flash_attn_type": 0}

Logits = NDArray[np.float32]


def tokens(count: int = LENGTH, seed: int = 5) -> NDArray[np.int64]:
    """A text for the demo model."""
    return np.concatenate([[2], np.random.default_rng(seed).integers(5, 2560, count - 1)])


def ours(path: Path, text: NDArray[np.int64], size: int = 256) -> Logits:
    """Our logits of a text in chunks of `size`."""
    with load(path, threads=1) as model:
        state = model.new_state()
        chunks = [model.forward(text[i : i + size], state, every=True) for i in range(0, len(text), size)]
    return np.concatenate(chunks)


def difference(found: Logits, expected: Logits) -> float:
    """See the module's head."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def pieces(text: NDArray[np.int64], sizes: Sequence[int], sequence: int = 0) -> list[Part]:
    """The text cut into parts of these sizes in turn, over and over."""
    parts, start = [], 0
    while start < len(text):
        size = sizes[len(parts) % len(sizes)]
        parts.append(Part(sequence, start, text[start : start + size].tolist()))
        start += size
    return parts


@pytest.fixture(scope="module")
def expected(demo: dict[str, Path]) -> Logits:
    return ours(demo["F32"], tokens())


CUTS = pytest.mark.parametrize(
    ("sizes", "n_ubatch"),
    [
        ([LENGTH], 1024),
        ([LENGTH], 512),
        ([LENGTH], 64),
        ([LENGTH], 7),
        ([100, 1, 1, 128, 7, 33], 512),
        ([1], 512),
    ],
)


@CUTS
@pytest.mark.parametrize("options", [{}, EXACT], ids=["default", "exact"])
def test_however_a_text_is_cut(
    programs: Path, demo: dict[str, Path], expected: Logits, sizes: list[int], n_ubatch: int, options: dict[str, int]
) -> None:
    """F32 holds the very weights of BF16: the checkpoint is in bf16."""
    batches = [[part] for part in pieces(tokens(), sizes)]
    found = logits(programs, demo["F32"], batches, n_ctx=1024, n_batch=1024, n_ubatch=n_ubatch, **options)
    assert difference(found, expected) <= 1e-3


@pytest.mark.parametrize("kv_unified", [False, True])
def test_two_sequences_interleaved(programs: Path, demo: dict[str, Path], expected: Logits, kv_unified: bool) -> None:
    other = tokens(500, seed=8)
    mine, theirs = pieces(tokens(), [50, 3, 120]), pieces(other, [31, 64], sequence=1)
    rounds = max(len(mine), len(theirs))
    batches = [[*mine[i : i + 1], *theirs[i : i + 1]] for i in range(rounds)]
    found = logits(
        programs, demo["F32"], batches, n_ctx=2048, n_batch=1024, n_ubatch=64, n_seq_max=2, kv_unified=kv_unified
    )
    owners = np.concatenate([[part.sequence] * len(part.tokens) for batch in batches for part in batch])
    assert difference(found[owners == 0], expected) <= 1e-3
    assert difference(found[owners == 1], ours(demo["F32"], other)) <= 1e-3


def test_a_sequence_begins_anew(programs: Path, demo: dict[str, Path], expected: Logits) -> None:
    """The second text of a sequence begins at position 0, with what the first left in the memory's cells."""
    first, second = (Part(0, 0, text.tolist()) for text in (tokens(300, seed=9), tokens(100)))
    found = logits(programs, demo["F32"], [[first], ("forget", 0, 0), [second]], n_ctx=1024, n_batch=1024)
    assert difference(found[300:], expected[:100]) <= 1e-3


@pytest.mark.parametrize("how", ["copy", "carry"])
@pytest.mark.parametrize("kv_unified", [False, True])
def test_a_sequence_goes_on_as_two(
    programs: Path, demo: dict[str, Path], expected: Logits, how: str, kv_unified: bool
) -> None:
    """By a copy in the memory, and by its state saved and loaded. The second goes on first, and by itself."""
    text = tokens().tolist()
    steps = [
        [Part(0, 0, text[:400])],
        (how, 0, 1),
        [Part(1, 400, text[400:450])],
        [Part(0, 400, text[400:500]), Part(1, 450, text[450:460])],
        [Part(1, 460, text[460:])],
    ]
    found = logits(programs, demo["F32"], steps, n_ctx=2048, n_batch=1024, n_seq_max=3, kv_unified=kv_unified)
    assert difference(found[400:450], expected[400:450]) <= 1e-3
    assert difference(found[450:550], expected[400:500]) <= 1e-3
    assert difference(found[550:], expected[450:]) <= 1e-3


def test_a_sequence_goes_back_some_tokens(programs: Path, demo: dict[str, Path], expected: Logits) -> None:
    """As a server does that guessed wrong: with states kept of the last tokens, also where a batch has fewer."""
    text, wrong = tokens().tolist(), tokens(20, seed=3).tolist()
    steps = [
        [Part(0, 0, text[:297] + wrong[:3])],
        ("forget", 0, 297),
        [Part(0, 297, text[297:298])],
        [Part(0, 298, text[298:299] + wrong[:4])],
        ("forget", 0, 299),
        [Part(0, 299, text[299:])],
    ]
    found = logits(programs, demo["F32"], steps, n_ctx=1024, n_batch=1024, n_ubatch=64, n_rs_seq=4)
    assert difference(found[:297], expected[:297]) <= 1e-3
    assert difference(found[300:302], expected[297:299]) <= 1e-3
    assert difference(found[306:], expected[299:]) <= 1e-3


@pytest.mark.parametrize("name", FILE_TYPES)
def test_each_file_type(programs: Path, demo: dict[str, Path], name: str) -> None:
    text = tokens(400)
    expected = ours(demo[name], text)
    rounding = difference(ours(demo[name], text, size=1), expected)
    found = logits(programs, demo[name], [[Part(0, 0, text.tolist())]], n_ctx=512, n_batch=512)
    assert difference(found, expected) <= max(1e-3, 2 * rounding)
    assert rounding <= 0.03


def straight(checkpoint: Path) -> Path:
    """Let every GELU see 10 alone, which the table passes through: what is left is exact, the recurrence with it."""
    weights = load_file(checkpoint / "model.safetensors")
    for name in list(weights):
        gate, _, part = name.rpartition(".")
        if gate.endswith(("gate_proj", "linear_y")):
            weights[name] = np.full_like(weights[name], 10 if part == "bias" else 0)
        if name.endswith(("down_proj.weight", "linear_out.weight")):
            weights[name] = weights[name] / 10
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


#: A model that has no recurrent layer is refused.
GRIFFINS = {name: shape for name, shape in SHAPES.items() if name != "attention only"}


@pytest.mark.parametrize("shape", GRIFFINS)
def test_each_shape_but_for_gelu_against_transformers(programs: Path, tmp_path: Path, shape: str) -> None:
    checkpoint = straight(random_checkpoint(tmp_path / "checkpoint", dtype="f32", **SHAPES[shape]))
    path = tmp_path / "model.gguf"
    convert(checkpoint, [(path, "F32")])
    text = np.random.default_rng(7).integers(0, 384, 600)
    expected = transformers_logits(checkpoint, text)
    assert 1 < np.abs(expected).max() < 29
    found = logits(programs, path, [[part] for part in pieces(text, [190, 1, 400])], n_ctx=1024, **EXACT)
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("shape", GRIFFINS)
def test_each_shape_against_transformers(programs: Path, tmp_path: Path, shape: str) -> None:
    path = random_model(tmp_path, **SHAPES[shape])
    text = np.random.default_rng(7).integers(0, 384, 300)
    found = logits(programs, path, [[part] for part in pieces(text, [90, 1, 200])], n_ctx=512, **EXACT)
    assert difference(found, transformers_logits(tmp_path / "checkpoint", text)) <= 5e-3


def test_a_model_without_recurrence_is_refused(programs: Path, tmp_path: Path) -> None:
    path = random_model(tmp_path, **SHAPES["attention only"])
    with pytest.raises(AssertionError, match=r"attention\.recurrent_layers names no layer"):
        logits(programs, path, [[Part(0, 0, [2])]])
