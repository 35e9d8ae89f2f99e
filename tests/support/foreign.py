"""Small GGUF files of other architectures, of random weights, written with the gguf package alone.

Names and shapes are those that llama.cpp's own converter writes; llama.cpp refuses a file where one is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType, TokenType
from numpy.typing import NDArray
from vocabularies import metadata_of, train

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD = 2, 256, 512, 4, 2, 64
INNER, SSM, TAPS, RANK = 2 * HIDDEN, 16, 4, 16  # Mamba's
LORA = 32  # RWKV-7's

#: A tensor's name without "blk.N." -> its shape in NumPy's order; V stands for the vocabulary's size.
Shapes = dict[str, tuple[int, ...]]

_V = -1
_HEAD: Shapes = {"token_embd.weight": (_V, HIDDEN), "output_norm.weight": (HIDDEN,), "output.weight": (_V, HIDDEN)}
_TIED: Shapes = {name: shape for name, shape in _HEAD.items() if name != "output.weight"}
_ATTENTION: Shapes = {
    "attn_norm.weight": (HIDDEN,),
    "attn_q.weight": (HEADS * HEAD, HIDDEN),
    "attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD),
}
_FFN: Shapes = {
    "ffn_norm.weight": (HIDDEN,),
    "ffn_gate.weight": (MLP, HIDDEN),
    "ffn_up.weight": (MLP, HIDDEN),
    "ffn_down.weight": (HIDDEN, MLP),
}
_QWEN_BIASES: Shapes = {
    "attn_q.bias": (HEADS * HEAD,),
    "attn_k.bias": (KV_HEADS * HEAD,),
    "attn_v.bias": (KV_HEADS * HEAD,),
}
_MAMBA: Shapes = {
    "attn_norm.weight": (HIDDEN,),
    "ssm_in.weight": (2 * INNER, HIDDEN),
    "ssm_conv1d.weight": (INNER, TAPS),
    "ssm_conv1d.bias": (INNER,),
    "ssm_x.weight": (RANK + 2 * SSM, INNER),
    "ssm_dt.weight": (INNER, RANK),
    "ssm_dt.bias": (INNER,),
    "ssm_a": (INNER, SSM),
    "ssm_d": (INNER,),
    "ssm_out.weight": (HIDDEN, INNER),
}
_JAMBA_NORMS: Shapes = {"ssm_dt_norm.weight": (RANK,), "ssm_b_norm.weight": (SSM,), "ssm_c_norm.weight": (SSM,)}
_RWKV7: Shapes = {
    **{f"attn_norm{i}.{part}": (HIDDEN,) for i in ("", "_2") for part in ("weight", "bias")},
    **{f"time_mix_{x}0.weight": (HIDDEN,) for x in "wav"},
    **{f"time_mix_{x}1.weight": (LORA, HIDDEN) for x in "wavg"},
    **{f"time_mix_{x}2.weight": (HIDDEN, LORA) for x in "wavg"},
    "time_mix_lerp_fused.weight": (6, 1, 1, HIDDEN),
    **{f"time_mix_{x}.weight": (HIDDEN,) for x in ("k_k", "k_a", "r_k")},
    **{f"time_mix_{x}.weight": (HIDDEN, HIDDEN) for x in ("key", "value", "receptance", "output")},
    "time_mix_ln.weight": (HIDDEN,),
    "time_mix_ln.bias": (HIDDEN,),
    "channel_mix_lerp_k.weight": (1, 1, HIDDEN),
    "channel_mix_key.weight": (MLP, HIDDEN),
    "channel_mix_value.weight": (HIDDEN, MLP),
}

_NUMBERS: dict[str, Any] = {
    "context_length": 4096,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": MLP,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD,
    "attention.value_length": HEAD,
    "rope.dimension_count": HEAD,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
_SSM_NUMBERS: dict[str, Any] = {
    "ssm.conv_kernel": TAPS,
    "ssm.inner_size": INNER,
    "ssm.state_size": SSM,
    "ssm.time_step_rank": RANK,
}


@dataclass(frozen=True)
class Kind:
    """An architecture: its numbers beside `_NUMBERS`, tensors of the model, and of each layer in turn."""

    architecture: str
    blocks: tuple[Shapes, Shapes]
    ends: Shapes = field(default_factory=lambda: _HEAD)
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])


_DENSE = {**_ATTENTION, **_FFN}
_QWEN = {**_DENSE, **_QWEN_BIASES}
_POST_NORMS: Shapes = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}

KINDS = {
    "gemma": Kind("gemma", (_DENSE, _DENSE), _TIED),
    # Every other layer has a window, shorter than the tests' texts.
    "gemma2": Kind(
        "gemma2",
        ({**_DENSE, **_POST_NORMS}, {**_DENSE, **_POST_NORMS}),
        _TIED,
        {"attention.sliding_window": 64, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "llama": Kind("llama", (_DENSE, _DENSE)),
    # As llama.cpp's converter writes Mistral: of Llama's architecture, with other numbers.
    "mistral": Kind("llama", (_DENSE, _DENSE), numbers={"rope.freq_base": 1e6, "context_length": 32768}),
    "qwen2": Kind("qwen2", (_QWEN, _QWEN), numbers={"rope.freq_base": 1e6}),
    "mamba": Kind(
        "mamba",
        (_MAMBA, _MAMBA),
        numbers={**_SSM_NUMBERS, "feed_forward_length": 0, "attention.head_count": 0},
    ),
    "rwkv7": Kind(
        "rwkv7",
        (_RWKV7, _RWKV7),
        {
            **_HEAD,
            "output_norm.bias": (HIDDEN,),
            "token_embd_norm.weight": (HIDDEN,),
            "token_embd_norm.bias": (HIDDEN,),
        },
        {
            "attention.layer_norm_epsilon": 1e-5,
            "attention.head_count": 0,
            "wkv.head_size": HEAD,
            **{f"attention.{x}_lora_rank": LORA for x in ("decay", "iclr", "value_residual_mix", "gate")},
        },
    ),
    # A layer of Mamba, then one of attention.
    "jamba": Kind(
        "jamba",
        ({**_MAMBA, **_JAMBA_NORMS, **_FFN}, _DENSE),
        numbers={**_SSM_NUMBERS, "attention.head_count_kv": [0, KV_HEADS]},
    ),
}


#: What a file may hold that predicts nothing.
_BERT_LAYER: Shapes = {
    **{f"attn_{x}.weight": (HIDDEN, HIDDEN) for x in ("q", "k", "v", "output")},
    **{f"attn_{x}.bias": (HIDDEN,) for x in ("q", "k", "v", "output")},
    **{f"{x}_norm.{part}": (HIDDEN,) for x in ("attn_output", "layer_output") for part in ("weight", "bias")},
    "ffn_up.weight": (MLP, HIDDEN),
    "ffn_up.bias": (MLP,),
    "ffn_down.weight": (HIDDEN, MLP),
    "ffn_down.bias": (HIDDEN,),
}
BERT = Kind(
    "bert",
    (_BERT_LAYER, _BERT_LAYER),
    {
        "token_embd.weight": (_V, HIDDEN),
        "token_types.weight": (2, HIDDEN),
        "position_embd.weight": (4096, HIDDEN),
        "token_embd_norm.weight": (HIDDEN,),
        "token_embd_norm.bias": (HIDDEN,),
    },
    {
        "attention.layer_norm_epsilon": 1e-6,
        "attention.causal": False,
        "attention.head_count_kv": HEADS,
        "tokenizer.ggml.token_type_count": 2,
    },
)


def foreign(target: Path, kind: str | Kind = "llama", *, half: bool = False, bpe: bool = False, **numbers: Any) -> Path:
    """Write a model of `kind` to `target`, in F32 or in F16; `numbers` replace those of the architecture (dots as __).

    Its vocabulary is Gemma-like SentencePiece, or with `bpe` of bytes and merges like GPT-2's.
    """
    chosen = KINDS[kind] if isinstance(kind, str) else kind
    writer = GGUFWriter(target, chosen.architecture)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if half else LlamaFileType.ALL_F32)
    given = {name.replace("__", "."): value for name, value in numbers.items()}
    for name, value in {**_NUMBERS, **chosen.numbers, **given}.items():
        _add(writer, name if name.startswith("tokenizer.") else f"{chosen.architecture}.{name}", value)
    vocabulary = _bpe() if bpe else _sentencepiece()
    for name, value in vocabulary.items():
        _add(writer, name, value)
    for name, array in _tensors(chosen, len(vocabulary["tokenizer.ggml.tokens"])):
        plain = array.ndim < 2 or "ssm" in name or "lerp" in name
        writer.add_tensor(name, array.astype(np.float16) if half and not plain else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](name, value)


def _tensors(kind: Kind, vocab: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(7)
    layers = {f"blk.{i}.{name}": shape for i, block in enumerate(kind.blocks) for name, shape in block.items()}
    for name, shape in {**kind.ends, **layers}.items():
        real = tuple(vocab if n == _V else n for n in shape)
        noise = rng.normal(0, 1, real).astype(np.float32)
        if name.endswith("ssm_a"):
            yield name, -np.abs(noise) - np.float32(0.1)
        elif name.endswith(("norm.weight", "ln.weight", "ssm_d")):
            yield name, 1 + np.float32(0.1) * noise
        elif "lerp" in name:
            yield name, 0.5 + np.float32(0.1) * noise
        else:
            yield name, noise * np.float32(0.1 if len(real) == 1 else 1.5 / np.sqrt(real[-1]))


def _sentencepiece() -> dict[str, Any]:
    """Gemma's kind of vocabulary, as llama.cpp's converter writes it: user-defined pieces have plain spaces."""
    found = metadata_of(train())
    kinds = found["tokenizer.ggml.token_type"]
    tokens = [
        token.replace("\u2581", " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(found["tokenizer.ggml.tokens"], kinds, strict=True)
    ]
    return {name: value for name, value in found.items() if name.startswith("tokenizer.")} | {
        "tokenizer.ggml.tokens": tokens
    }


def _bpe() -> dict[str, Any]:
    """GPT-2's alphabet of bytes, a few merges, one special token; nothing is put before a text, as with Qwen2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    merges = ["t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and", "Ġ t", "Ġ s", "o u", "e r", "Ġ w", "r e"]
    tokens = alphabet + [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.NORMAL)] * (len(tokens) - 1) + [int(TokenType.CONTROL)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.padding_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }
