"""Random RecurrentGemma models as GGUF files, by way of the real conversion, and transformers' answer to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import random_checkpoint
from numpy.typing import NDArray
from transformers import RecurrentGemmaForCausalLM

from griffin_gguf.convert.pipeline import convert


def random_model(folder: Path, file_type: str = "F32", **overrides: Any) -> Path:
    """Convert a random checkpoint (see `random_checkpoint`) under `folder`; returns the GGUF."""
    checkpoint = random_checkpoint(folder / "checkpoint", dtype="f32", **overrides)
    target = folder / "model.gguf"
    convert(checkpoint, [(target, file_type)])
    return target


def transformers_logits(checkpoint: Path, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [T, V] of the whole text in ONE f32 forward pass, which is where transformers is right."""
    model = RecurrentGemmaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None], use_cache=False).logits[0].numpy()


def transformers_hidden(checkpoint: Path, texts: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """What the head is given after the last token of each text, [n, H]: each in one pass of its own."""
    model = RecurrentGemmaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        passes = [model.model(torch.tensor(text)[None], use_cache=False).last_hidden_state for text in texts]
    return np.stack([hidden[0, -1].numpy() for hidden in passes])
