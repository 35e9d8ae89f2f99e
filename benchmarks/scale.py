"""Random checkpoints and GGUF files with the true shapes of RecurrentGemma and of a Gemma; the machine, described.

The weights are one tile of random numbers, repeated: as large and as slow as the real ones, not as wise.
"""

import functools
import json
import os
import platform
import shutil
import struct
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import psutil
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from griffin_gguf.convert.config import Config, read_config
from griffin_gguf.convert.vocab import tokenizer_metadata
from griffin_gguf.quant.encode import encode
from griffin_gguf.quant.file_types import Metadata, file_type
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime.arch import ARCHITECTURE, Hyperparameters, Tensor, to_metadata
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


#: A Gemma-2B in the terms of our own table: attention in every layer, and no biases (which are left out when written).
GEMMA = Hyperparameters(
    layers=18, context=8192, hidden=2048, mlp_width=16384, vocab=256000, heads=8, kv_heads=1, head_width=256,
    window=2048, norm_eps=1e-6, rope_width=256, rope_base=10000.0, logit_cap=30.0, embedding_scale=45.25, conv_taps=4,
    lru_width=2048, gate_blocks=8, recurrent=(False,) * 18,
)  # fmt: skip
_TILE = 1 << 18  # elements; as many as quant.writer asks for at once


def random_checkpoint(folder: Path, size: str) -> Path:
    """Write, unless it is there, a bf16 checkpoint of `size` in shards under `folder`; returns its folder."""
    target = folder / f"random-{size}"
    if (target / "model.safetensors.index.json").exists():
        return target
    hp = _described(target, size).hp
    tile = (np.random.default_rng(0).standard_normal(1 << 25, np.float32) * 0.02).view(np.uint32) >> 16
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(list(hp.tensors())), 1):
        name = f"model-{number:05}.safetensors"
        _write_shard(target / name, shard, tile.astype(np.uint16))
        weight_map |= {tensor.source: name for tensor in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def random_gguf(folder: Path, size: str, type: str, *, gemma: bool = False) -> Path:
    """Write, unless it is there, a GGUF of `size` in the file type `type`; returns its path.

    With `gemma` it is a Gemma-2B for llama.cpp to run, whatever the size: the same vocabulary and the same types.
    The weights repeat one encoded tile, so that it takes hardly longer than the disk.
    """
    target = folder / f"{'gemma' if gemma else f'random-{size}'}-{type}.gguf"
    if target.exists():
        return target
    described = folder / f"described-{size}"
    config = _described(described, size)
    hp, chosen = GEMMA if gemma else config.hp, file_type(type)
    keys = _gemma_keys(hp) if gemma else _keys(hp)
    rows = [row for row in plan(hp, chosen) if not (gemma and row.tensor.name.endswith(".bias"))]
    write([Output(target, keys | chosen.metadata | tokenizer_metadata(described, config), rows)], _tiles)
    return target


def _described(folder: Path, size: str) -> Config:
    """What a checkpoint has beside its weights: config.json and the demo model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[size], indent=1))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return read_config(folder / "config.json")


def _keys(hp: Hyperparameters) -> Metadata:
    keys: Metadata = {"general.architecture": (ARCHITECTURE, GGUFValueType.STRING, None)}
    for name, (value, kind) in to_metadata(hp).items():
        keys[name] = (value, kind, GGUFValueType.BOOL if kind is GGUFValueType.ARRAY else None)
    return keys


def _gemma_keys(hp: Hyperparameters) -> Metadata:
    counts = {
        "context_length": 8192, "embedding_length": hp.hidden, "block_count": hp.layers,
        "feed_forward_length": hp.mlp_width, "attention.head_count": hp.heads, "attention.head_count_kv": hp.kv_heads,
        "attention.key_length": hp.head_width, "attention.value_length": hp.head_width,
    }  # fmt: skip
    keys: Metadata = {"general.architecture": ("gemma", GGUFValueType.STRING, None)}
    keys |= {f"gemma.{name}": (value, GGUFValueType.UINT32, None) for name, value in counts.items()}
    return keys | {"gemma.attention.layer_norm_rms_epsilon": (hp.norm_eps, GGUFValueType.FLOAT32, None)}


def _tiles(tensor: Tensor, start: int, stop: int, types: Sequence[GGMLQuantizationType]) -> list[NDArray[np.uint8]]:
    """An encoder for `quant.writer.write`: rows cut from one tile."""
    count = (stop - start) * tensor.shape[-1]
    tiles = [_tile(type, tensor.name.endswith("ssm_a")) for type in types]
    return [tile.reshape(-1)[: tile.size * count // _TILE].reshape(stop - start, -1) for tile in tiles]


@functools.cache
def _tile(type: GGMLQuantizationType, negative: bool) -> NDArray[np.uint8]:
    random = np.random.default_rng(0).standard_normal((_TILE // 256, 256), np.float32) * np.float32(0.02)
    return encode(type, -abs(random) if negative else random)


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
