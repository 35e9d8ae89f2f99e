"""Small random RecurrentGemma checkpoints, written as Hugging Face folders with numpy alone."""

import io
import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]

#: One config per shape that the bars name; each is a set of overrides for `random_checkpoint`.
SHAPES: dict[str, dict[str, Any]] = {
    "window shorter than the text": {"attention_window_size": 5},
    "lru_width other than hidden": {"lru_width": 96},
    "attention_bias": {"attention_bias": True},
    "two kv heads": {"num_key_value_heads": 2},
    "attention first": {"block_types": ["attention", "recurrent"], "num_hidden_layers": 5},
    "recurrent only": {"block_types": ["recurrent"], "num_hidden_layers": 2},
    "attention only": {"block_types": ["attention"], "num_hidden_layers": 2},
    "untied head": {"lm_head": "different", "tie_word_embeddings": False},
    "heads wider than the model": {"head_dim": 32},
    "other constants": {"conv1d_width": 3, "logits_soft_cap": 5.0, "rms_norm_eps": 1e-4,
                        "rope_theta": 500.0, "partial_rotary_factor": 0.25},
}  # fmt: skip

_DEFAULTS: dict[str, Any] = {
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 16,
    "block_types": ["recurrent", "recurrent", "attention"],
    "bos_token_id": 2,
    "conv1d_width": 4,
    "eos_token_id": 1,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "intermediate_size": 192,
    "logits_soft_cap": 30.0,
    "lru_width": 64,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 384,
    "w_init_variance_scale": 0.01,
}

_OUTPUTS = ("temporal_block.o_proj", "temporal_block.linear_out", "mlp_block.down_proj")
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def random_checkpoint(
    folder: Path,
    *,
    dtype: Literal["bf16", "f16", "f32"] = "bf16",
    shards: int = 1,
    seed: int = 0,
    lm_head: Literal["none", "same", "different"] = "none",
    spelling: Literal["block_types", "_block_types"] = "block_types",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint into `folder` and return it. `overrides` are fields of config.json.

    Logits are of order 1 to 10; decays spread from near 0 to near 1. transformers loads the folder, except
    that it reads the spelling `_block_types` no longer and takes its own pattern instead.
    """
    unknown = set(overrides) - set(_DEFAULTS)
    assert not unknown, unknown
    config: dict[str, Any] = {**_DEFAULTS, "torch_dtype": _DTYPES[dtype], **overrides}
    weights = random_weights(config, np.random.default_rng(seed))
    if lm_head != "none":
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding if lm_head == "same" else embedding[::-1].copy()
    config[spelling] = config.pop("block_types")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_weights(folder, weights, dtype, shards)
    write_tokenizer(folder, config["vocab_size"])
    return folder


def random_weights(config: dict[str, Any], rng: np.random.Generator) -> Weights:
    """Every tensor of a checkpoint with that config but lm_head, float32, by its checkpoint name."""
    H, V, F = config["hidden_size"], config["vocab_size"], config["intermediate_size"] // 2
    found: Weights = {
        "model.embed_tokens.weight": 2 * _normal(rng, (V, H), H),
        "model.final_norm.weight": _normal(rng, (H,), 100),
    }
    pattern = config["block_types"]
    for i in range(config["num_hidden_layers"]):
        kind = pattern[i % len(pattern)]
        block = _attention(config, rng) if kind == "attention" else _recurrent(config, rng)
        block = {f"temporal_block.{name}": value for name, value in block.items()}
        for norm in ("temporal_pre_norm", "channel_pre_norm"):
            block[f"{norm}.weight"] = _normal(rng, (H,), 100)
        block |= _linear(rng, "mlp_block.gate_proj", F, H) | _linear(rng, "mlp_block.up_proj", F, H)
        block |= _linear(rng, "mlp_block.down_proj", H, F)
        for name in block.keys() & {f"{block_out}.weight" for block_out in _OUTPUTS}:
            block[name] *= 4  # else the embedding shines through all blocks, and every token predicts itself
        found |= {f"model.layers.{i}.{name}": value for name, value in block.items()}
    return found


def _attention(config: dict[str, Any], rng: np.random.Generator) -> Weights:
    H, D, bias = config["hidden_size"], config["head_dim"], config["attention_bias"]
    Q, J = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    q, k, v = (_linear(rng, f"{n}_proj", rows, H, bias) for n, rows in (("q", Q), ("k", J), ("v", J)))
    q["q_proj.weight"] *= 2  # attention that prefers some keys
    return q | k | v | _linear(rng, "o_proj", H, Q)


def _recurrent(config: dict[str, Any], rng: np.random.Generator) -> Weights:
    H, G, C = config["hidden_size"], config["num_attention_heads"], config["conv1d_width"]
    W = config["lru_width"] or H
    B = W // G
    block = _linear(rng, "linear_x", W, H) | _linear(rng, "linear_y", W, H) | _linear(rng, "linear_out", H, W)
    block |= {"conv_1d.weight": _normal(rng, (W, 1, C), C), "conv_1d.bias": _normal(rng, (W,), 100)}
    for gate in ("input", "recurrent"):
        block[f"rg_lru.{gate}_gate_weight"] = _normal(rng, (G, B, B), B)
        block[f"rg_lru.{gate}_gate_bias"] = _normal(rng, (G, B), 4)
    decay = rng.uniform(0.2, 0.999, W)  # what a half-open recurrence gate multiplies h with
    block["rg_lru.recurrent_param"] = np.log(np.expm1(-np.log(decay) / 4)).astype(np.float32)
    return block


def _linear(rng: np.random.Generator, name: str, rows: int, columns: int, bias: bool = True) -> Weights:
    found = {f"{name}.weight": _normal(rng, (rows, columns), columns)}
    return found | ({f"{name}.bias": _normal(rng, (rows,), 100)} if bias else {})


def _normal(rng: np.random.Generator, shape: tuple[int, ...], fan: int) -> NDArray[np.float32]:
    return (rng.standard_normal(shape, np.float32) / np.sqrt(fan)).astype(np.float32)


def write_weights(folder: Path, weights: Weights, dtype: str = "bf16", shards: int = 1) -> None:
    """Write safetensors: one file, or `shards` of them with an index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: weights[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(file: Path, weights: Weights, dtype: str = "bf16") -> None:
    """Write one safetensors file, all tensors in one dtype: u64 header length, JSON header, bytes back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes] = []
    end = 0
    for name, value in weights.items():
        pieces.append(cast(value, dtype).tobytes())
        start, end = end, end + len(pieces[-1])
        header[name] = {"dtype": dtype.upper(), "shape": list(value.shape), "data_offsets": [start, end]}
    file.write_bytes(safetensors_header(header) + b"".join(pieces))


def safetensors_header(header: Any) -> bytes:
    """The length and the JSON that start a safetensors file."""
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def cast(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 to the bits of `dtype`; bf16, which NumPy lacks, as uint16, rounded to nearest even."""
    if dtype != "bf16":
        return values.astype(_DTYPES[dtype])
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.model and tokenizer_config.json with Gemma's special tokens and a chat template."""
    (folder / "tokenizer.model").write_bytes(train_tokenizer(vocab_size))
    config = {
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "GemmaTokenizer", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@cache
def train_tokenizer(vocab_size: int, **overrides: Any) -> bytes:
    """A SentencePiece BPE model with byte fallback and Gemma's settings; `overrides` are the trainer's."""
    options: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": vocab_size, "byte_fallback": True, "split_digits": True,
        "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
        "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>",
        "user_defined_symbols": "<start_of_turn>,<end_of_turn>", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2,
    } | overrides  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(_sentences()), model_writer=model, **options
    )
    return model.getvalue()


def _sentences() -> Sequence[str]:
    """Text enough for some hundreds of merges."""
    rng = np.random.default_rng(1)
    syllables = ["ba", "ke", "lo", "mi", "nu", "ra", "se", "ti", "vo", "wy", "the", "ing", "an", "é", "ß", "日本"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(600)]
    return [" ".join(rng.choice(words, 12)) + "." for _ in range(400)]
