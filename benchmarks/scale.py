"""Random checkpoints with the true shapes of RecurrentGemma, and the description of the machine.

The weights are one tile of random numbers, repeated: as large and as slow as the real ones, not as wise.
"""

import json
import os
import platform
import shutil
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import psutil

from griffin_gguf.runtime.arch import Tensor
from griffin_gguf.runtime.ggml import abi

DEMO = Path(__file__).resolve().parents[1] / "cli" / "demo_model"
SHARD_BYTES = 2 << 30

_COMMON = {
    "architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma", "attention_bias": False,
    "attention_window_size": 2048, "conv1d_width": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "block_types": ["recurrent", "recurrent", "attention"], "logits_soft_cap": 30.0, "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 256000,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS = {
    "2b": _COMMON | {"hidden_size": 2560, "lru_width": 2560, "intermediate_size": 15360,
                     "num_hidden_layers": 26, "num_attention_heads": 10},
    "9b": _COMMON | {"hidden_size": 4096, "lru_width": 4096, "intermediate_size": 24576,
                     "num_hidden_layers": 38, "num_attention_heads": 16},
}  # fmt: skip
CONFIGS["2b-short"] = CONFIGS["2b"] | {"num_hidden_layers": 3, "vocab_size": 32000}  # widths of the 2B, 0.3 G weights


def random_checkpoint(folder: Path, size: str) -> Path:
    """Write, unless it is there, a bf16 checkpoint of `size` in shards under `folder`; returns its folder."""
    from griffin_gguf.convert.config import read_config  # its reading of the config decides the tensors

    target = folder / f"random-{size}"
    if (target / "model.safetensors.index.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIGS[size], indent=1))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, target / name)
    hp = read_config(target / "config.json").hp
    tile = (np.random.default_rng(0).standard_normal(1 << 25, np.float32) * 0.02).view(np.uint32) >> 16
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(list(hp.tensors())), 1):
        name = f"model-{number:05}.safetensors"
        _write_shard(target / name, shard, tile.astype(np.uint16))
        weight_map |= {tensor.source: name for tensor in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def _shards(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in tensors:
        if shard and sum(2 * prod(t.shape) for t in [*shard, tensor]) > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_shard(path: Path, tensors: list[Tensor], tile: np.ndarray) -> None:
    header, at = {}, 0
    for tensor in tensors:
        size = 2 * prod(tensor.source_shape)
        header[tensor.source] = {"dtype": "BF16", "shape": tensor.source_shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            left = prod(tensor.source_shape)
            while left:
                part = tile[: min(left, tile.size)]
                part.tofile(file)
                left -= part.size


def machine() -> str:
    """One line about where the figures come from."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {cores} cores, {memory:.0f} GiB, {platform.system()}, ggml {abi.GGML_VERSION}"
