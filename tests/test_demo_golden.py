"""The built-in model, greedy, from checkpoint to text: one golden answer per file type guards the whole pipe.

The answers are the reference backend's. After a change that is meant to change them:
python tests/support/golden.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import COUNT, FILE, PROMPTS, greedy
from numpy.typing import NDArray
from transformers import RecurrentGemmaForCausalLM

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import Model, load

DEMO = Path(__file__).resolve().parents[1] / "cli" / "demo_model"
GOLDEN: dict[str, dict[str, list[int]]] = json.loads(FILE.read_text())

#: Types whose greedy text does not depend on how a processor rounds: ggml must say exactly the same.
EXACT = ("F32", "BF16")

#: How far below ggml's likeliest token a golden one may lie, in logits: its kernels round activations to 8 bits,
#: and the nearest ties in the golden text are closer than that.
ROUNDING = 0.25


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    targets = [(folder / f"{name}.gguf", name) for name in GOLDEN]
    convert(DEMO, targets)
    return {name: path for path, name in targets}


def choices(model: Model, prompt: str, answer: list[int]) -> NDArray[np.float32]:
    """Logits [COUNT, V] from which each token of the answer is chosen."""
    tokens = model.tokenizer.encode(prompt, special=True)
    return model.forward(tokens + answer, model.new_state(), every=True)[len(tokens) - 1 : -1]


@pytest.mark.parametrize("file_type", GOLDEN)
def test_the_reference_says_what_it_said(files: dict[str, Path], file_type: str) -> None:
    with load(files[file_type], backend="numpy") as model:
        for prompt, answer in GOLDEN[file_type].items():
            assert choices(model, prompt, answer).argmax(1).tolist() == answer, prompt


@pytest.mark.parametrize("file_type", EXACT)
def test_ggml_says_the_same_token_by_token(files: dict[str, Path], file_type: str) -> None:
    with load(files[file_type], backend="ggml", threads=1) as model:
        for prompt, answer in GOLDEN[file_type].items():
            assert greedy(model, prompt) == answer, prompt


@pytest.mark.parametrize("file_type", GOLDEN)
def test_ggml_says_the_same_but_for_near_ties(files: dict[str, Path], file_type: str) -> None:
    with load(files[file_type], backend="ggml", threads=1) as model:
        for prompt, answer in GOLDEN[file_type].items():
            logits = choices(model, prompt, answer)
            below = logits.max(1) - logits[np.arange(COUNT), answer]
            assert below.max() <= ROUNDING, prompt
            assert (below == 0).mean() >= 0.9, prompt


@pytest.mark.parametrize("prompt", PROMPTS)
def test_transformers_says_the_same(files: dict[str, Path], prompt: str) -> None:
    """Each golden token of the F32 file is transformers' own choice after what stands before it."""
    model = RecurrentGemmaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with load(files["F32"], backend="numpy") as ours:
        tokens = ours.tokenizer.encode(prompt, special=True)
    answer = GOLDEN["F32"][prompt]
    assert len(answer) == COUNT
    with torch.no_grad():
        logits = model(torch.tensor([tokens + answer]), use_cache=False).logits[0].numpy()
    assert np.argmax(logits[len(tokens) - 1 : -1], axis=1).tolist() == answer
