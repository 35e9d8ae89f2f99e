"""The built-in model, greedy, from checkpoint to text: one golden answer per file type guards the whole pipe.

After a change that is meant to change them: python tests/support/golden.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import COUNT, FILE, PROMPTS, greedy
from transformers import RecurrentGemmaForCausalLM

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import load
from griffin_gguf.runtime.model import BackendName

DEMO = Path(__file__).resolve().parents[1] / "cli" / "demo_model"
GOLDEN: dict[str, dict[str, list[int]]] = json.loads(FILE.read_text())
BACKENDS: tuple[BackendName, ...] = ("numpy", "ggml")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    targets = [(folder / f"{name}.gguf", name) for name in GOLDEN]
    convert(DEMO, targets)
    return {name: path for path, name in targets}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file_type", GOLDEN)
def test_greedy_text_is_golden(files: dict[str, Path], file_type: str, backend: BackendName) -> None:
    with load(files[file_type], backend=backend, threads=1) as model:
        for prompt in PROMPTS:
            assert greedy(model, prompt) == GOLDEN[file_type][prompt], prompt


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
