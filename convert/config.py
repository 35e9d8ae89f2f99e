"""config.json -> `Hyperparameters`. Every field of the file is used, or listed here as one that may be ignored.

What a field means, and what stands in for an absent one, follows transformers 5.23
(models/recurrent_gemma/configuration_recurrent_gemma.py). A field that gives the model its shape has no default
here: transformers' defaults are no released model's.
"""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np

from griffin_gguf.convert.files import Fields, read_json
from griffin_gguf.runtime import arch
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

MODEL_TYPE = "recurrent_gemma"
TRAINED_CONTEXT = 8192  # tokens of the released models' training texts; no config says it
_DEFAULT_PATTERN = ["recurrent", "recurrent", "attention"]
_KINDS = {"recurrent": True, "attention": False}

#: transformers' names of gelu(x) = x/2·(1 + tanh(sqrt(2/pi)·(x + 0.044715·x³))); its "gelu" is another function.
_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

#: Fields that `read_config` uses -> the field of `Hyperparameters` that each one decides, where it is one.
USED: dict[str, str | None] = {
    "model_type": None,
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "mlp_width",
    "vocab_size": "vocab",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "attention_window_size": "window",
    "rms_norm_eps": "norm_eps",
    "partial_rotary_factor": "rope_width",
    "rope_theta": "rope_base",
    "rope_parameters": None,
    "rope_scaling": None,
    "logits_soft_cap": "logit_cap",
    "embeddings_scale_by_sqrt_dim": "embedding_scale",
    "conv1d_width": "conv_taps",
    "lru_width": "lru_width",
    "block_types": "recurrent",
    "_block_types": None,
    "attention_bias": "attention_bias",
    "max_position_embeddings": "context",
    "hidden_activation": None,
    "tie_word_embeddings": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

#: Fields that change no result of the model -> why.
IGNORED: dict[str, str] = {
    **dict.fromkeys(("w_init_variance_scale", "final_w_init_variance_scale", "initializer_range"), "initial weights"),
    **dict.fromkeys(("attention_dropout", "problem_type", "id2label", "label2id"), "training"),
    **dict.fromkeys(("torch_dtype", "dtype"), "each tensor names its own dtype"),
    **dict.fromkeys(("architectures", "transformers_version", "_name_or_path", "name_or_path"), "provenance"),
    **dict.fromkeys(("use_cache", "chunk_size_feed_forward", "is_encoder_decoder"), "transformers' way of running it"),
    **dict.fromkeys(("return_dict", "output_hidden_states", "output_attentions"), "transformers' return values"),
    **dict.fromkeys(("_attn_implementation", "_attn_implementation_autoset"), "transformers' kernels"),
}


@dataclass(frozen=True)
class Config:
    """What config.json says: `hp` as if the head were tied, and what belongs to other parts of the file.

    `tied` is False where the config says that the head has its own weights; token ids are None where the
    config has none.
    """

    hp: arch.Hyperparameters
    tied: bool
    bos: int | None
    eos: int | None
    pad: int | None


def read_config(path: Path, allow_unknown: bool = False) -> Config:
    """Read and check a config.json.

    Raises `FileFormatError` for a field that is missing, of the wrong type, out of bounds or at odds with
    another, and, unless `allow_unknown`, for one that nothing here knows; `UnsupportedError` for another model
    or a variant of it that we do not have.
    """
    fields = Fields(path, read_json(path))
    _check_variant(fields)
    fields.check_known(allow_unknown, USED, IGNORED)
    hp = _hyperparameters(fields)
    _check(path, hp)
    ids = {name: _token_id(fields, f"{name}_token_id", hp.vocab) for name in ("bos", "eos", "pad")}
    return Config(hp, fields.flag("tie_word_embeddings", True), **ids)


def _check_variant(fields: Fields) -> None:
    """Refuse other models, and variants of this one that GGUF's keys cannot say."""
    found = fields.values.get("model_type")
    if found != MODEL_TYPE:
        raise UnsupportedError(f"{fields.path}: model_type: only {MODEL_TYPE!r} can be converted, found {found!r}")
    activation = fields.values.get("hidden_activation") or _ACTIVATIONS[0]
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.path}: hidden_activation: expected {' or '.join(_ACTIVATIONS)}, found {activation!r}"
        )
    if not fields.flag("embeddings_scale_by_sqrt_dim", True):
        raise UnsupportedError(f"{fields.path}: embeddings_scale_by_sqrt_dim: only true is supported")


def _hyperparameters(fields: Fields) -> arch.Hyperparameters:
    layers, hidden = fields.whole("num_hidden_layers"), fields.whole("hidden_size")
    heads = fields.whole("num_attention_heads")
    if not 0 < layers <= arch.KEYS["layers"][2] or heads < 1:
        raise FileFormatError(fields.path, "num_hidden_layers", f"{layers} layers of {heads} heads make no model")
    if fields.values.get("head_dim") is None and hidden % heads:
        raise FileFormatError(fields.path, "num_attention_heads", f"{heads} heads do not divide hidden_size {hidden}")
    double_width = fields.whole("intermediate_size")
    if double_width % 2:
        raise FileFormatError(fields.path, "intermediate_size", f"expected an even number, found {double_width}")
    head_width = fields.whole("head_dim", hidden // heads)
    base, partial = _rope(fields)
    pattern = _pattern(fields)
    return arch.Hyperparameters(
        layers=layers,
        context=fields.whole("max_position_embeddings", TRAINED_CONTEXT),
        hidden=hidden,
        mlp_width=double_width // 2,
        vocab=fields.whole("vocab_size"),
        heads=heads,
        kv_heads=fields.whole("num_key_value_heads", heads),
        head_width=head_width,
        window=fields.whole("attention_window_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_width=int(head_width * partial),
        rope_base=base,
        logit_cap=fields.number("logits_soft_cap", 30.0),
        embedding_scale=_bf16(sqrt(max(0, hidden))),
        conv_taps=fields.whole("conv1d_width", 4),
        lru_width=fields.whole("lru_width", hidden),
        gate_blocks=heads,
        recurrent=tuple(pattern[i % len(pattern)] for i in range(layers)),
        attention_bias=fields.flag("attention_bias", False),
    )


def _rope(fields: Fields) -> tuple[float, float]:
    """RoPE's base and the part of a head that it turns: transformers 5 keeps both in `rope_parameters`."""
    path = fields.path
    base, partial = fields.number("rope_theta", 10000.0), fields.number("partial_rotary_factor", 0.5)
    # transformers lets the older name win where both are there.
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    inner = fields.values.get(name)
    if inner is not None:
        if not isinstance(inner, dict):
            raise FileFormatError(path, name, f"expected an object, found {inner!r}")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default":
            raise UnsupportedError(f"{path}: {name}: only rope_type 'default' is supported, found {kind!r}")
        for key in inner:
            if key not in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
                raise FileFormatError(path, f"{name}.{key}", "is a field that we do not know")
        nested = Fields(path, inner)
        base, partial = nested.number("rope_theta", base), nested.number("partial_rotary_factor", partial)
    if not 0 < partial <= 1:
        raise FileFormatError(path, "partial_rotary_factor", f"expected more than 0 and at most 1, found {partial}")
    return base, partial


def _pattern(fields: Fields) -> list[bool]:
    """Which layers of one round are recurrent. Older transformers spell the field with an underscore."""
    found = {name: fields.values[name] for name in ("block_types", "_block_types") if fields.values.get(name)}
    for name, pattern in found.items():
        if not isinstance(pattern, list) or not all(isinstance(kind, str) and kind in _KINDS for kind in pattern):
            raise FileFormatError(fields.path, name, f"expected a list of {' and '.join(_KINDS)}, found {pattern!r}")
    if len(found) == 2 and found["block_types"] != found["_block_types"]:
        raise FileFormatError(fields.path, "_block_types", "contradicts block_types")
    return [_KINDS[kind] for kind in next(iter(found.values()), _DEFAULT_PATTERN)]


def _check(path: Path, hp: arch.Hyperparameters) -> None:
    """Refuse numbers that a GGUF could not hold or that contradict each other."""
    names = {field: name for name, field in USED.items() if field} | {"gate_blocks": "num_attention_heads"}
    for field, (_, _, limit) in arch.KEYS.items():
        value = getattr(hp, field)
        if field != "recurrent" and not (0 < value <= limit and np.float32(value) > 0):
            raise FileFormatError(path, names[field], f"expected more than 0 and at most {limit:g}, found {value}")
    for field, problem in arch.inconsistencies(hp):
        raise FileFormatError(path, names[field], problem)


def _token_id(fields: Fields, name: str, vocab: int) -> int | None:
    """A token's id; of a list (several tokens may end a text) the first."""
    value = fields.values.get(name)
    if isinstance(value, list) and value:
        value = value[0]
    if value is not None and (type(value) is not int or not 0 <= value < vocab):
        raise FileFormatError(fields.path, name, f"expected an id from 0 to {vocab - 1}, found {value!r}")
    return value


def _bf16(value: float) -> float:
    """`value` rounded to bfloat16, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
