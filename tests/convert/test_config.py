import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RecurrentGemmaConfig
from transformers.activations import ACT2FN

from griffin_gguf.convert import config as module
from griffin_gguf.convert.config import Config, read_config
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError

#: As published, in the older spelling with an underscore.
TWO_B: dict[str, Any] = {
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "bos_token_id": 2,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "eos_token_id": 1,
    "final_w_init_variance_scale": 0.07692307692307693,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "model_type": "recurrent_gemma",
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
    "w_init_variance_scale": 0.01,
}
NINE_B = {name: value for name, value in TWO_B.items() if name != "_block_types"} | {
    "block_types": ["recurrent", "recurrent", "attention"], "hidden_size": 4096, "intermediate_size": 24576,
    "lru_width": None, "num_attention_heads": 16, "num_hidden_layers": 38,
    "final_w_init_variance_scale": 0.05263157894736842, "transformers_version": "4.42.0.dev0",
}  # fmt: skip


def read(tmp_path: Path, content: Any, **options: Any) -> Config:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_config(path, **options)


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in TWO_B.items() if name not in names}


def test_the_2b_model(tmp_path: Path):
    config = read(tmp_path, TWO_B)
    hp = config.hp
    assert (hp.layers, hp.hidden, hp.mlp_width, hp.vocab) == (26, 2560, 7680, 256000)
    assert (hp.heads, hp.kv_heads, hp.head_width, hp.window) == (10, 1, 256, 2048)
    assert (hp.rope_width, hp.rope_base, hp.logit_cap, hp.norm_eps) == (128, 10000.0, 30.0, 1e-6)
    assert (hp.conv_taps, hp.lru_width, hp.gate_blocks, hp.context) == (4, 2560, 10, 8192)
    assert hp.embedding_scale == 50.5
    assert [i for i in range(26) if not hp.recurrent[i]] == [2, 5, 8, 11, 14, 17, 20, 23]
    assert hp.parameters == 2_682_862_080
    assert (config.tied, config.bos, config.eos, config.pad) == (True, 2, 1, 0)


def test_the_9b_model(tmp_path: Path):
    hp = read(tmp_path, NINE_B).hp
    assert (hp.layers, hp.hidden, hp.mlp_width, hp.lru_width, hp.gate_blocks) == (38, 4096, 12288, 4096, 16)
    assert hp.embedding_scale == 64
    assert sum(hp.recurrent) == 26
    assert round(hp.parameters / 1e9, 2) == 8.58


SAVED = [
    {},
    {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 7, "lru_width": 120,
     "intermediate_size": 250, "attention_window_size": 33, "block_types": ["attention", "recurrent"],
     "attention_bias": True, "logits_soft_cap": 5.0, "vocab_size": 777, "eos_token_id": [3, 9],
     "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "rope_theta": 7.0, "partial_rotary_factor": 1.0},
    {"hidden_size": 100, "num_attention_heads": 4, "head_dim": 36, "tie_word_embeddings": False},
]  # fmt: skip


@pytest.mark.parametrize("overrides", SAVED)
def test_what_transformers_saves_means_what_it_means_there(tmp_path: Path, overrides):
    oracle = RecurrentGemmaConfig(**overrides)
    oracle.save_pretrained(tmp_path)
    config = read_config(tmp_path / "config.json")
    hp = config.hp
    assert hp.mlp_width == oracle.intermediate_size // 2
    assert (hp.heads, hp.kv_heads, hp.head_width) == (
        oracle.num_attention_heads, oracle.num_key_value_heads, oracle.head_dim)  # fmt: skip
    rope: Any = oracle.rope_parameters
    assert (hp.rope_base, hp.rope_width) == (rope["rope_theta"], int(oracle.head_dim * rope["partial_rotary_factor"]))
    assert list(hp.recurrent) == [kind == "linear_attention" for kind in oracle.layers_block_type]
    assert (hp.lru_width, hp.window, hp.norm_eps) == (
        oracle.lru_width, oracle.attention_window_size, oracle.rms_norm_eps)  # fmt: skip
    assert (hp.attention_bias, config.tied) == (oracle.attention_bias, oracle.tie_word_embeddings)
    assert hp.embedding_scale == float(torch.tensor(oracle.hidden_size**0.5, dtype=torch.bfloat16))


def test_absent_fields_mean_what_they_mean_to_transformers(tmp_path: Path):
    names = (
        "num_key_value_heads", "head_dim", "lru_width", "attention_bias", "_block_types", "rope_theta",
        "partial_rotary_factor", "logits_soft_cap", "rms_norm_eps", "conv1d_width", "hidden_activation",
    )  # fmt: skip
    hp, oracle = read(tmp_path, without(*names)).hp, RecurrentGemmaConfig(**without(*names))
    assert (hp.kv_heads, hp.head_width, hp.lru_width) == (
        oracle.num_key_value_heads, oracle.head_dim, oracle.lru_width)  # fmt: skip
    assert (hp.logit_cap, hp.norm_eps, hp.conv_taps) == (
        oracle.logits_soft_cap, oracle.rms_norm_eps, oracle.conv1d_width)  # fmt: skip
    assert oracle.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert (hp.rope_base, hp.rope_width) == (10000.0, 128)
    assert list(hp.recurrent) == [kind == "linear_attention" for kind in oracle.layers_block_type]


@pytest.mark.parametrize(
    "extra",
    [
        {"rope_scaling": None}, {"max_position_embeddings": 4096}, {"eos_token_id": [1, 107]}, {"pad_token_id": None},
        {"block_types": ["recurrent", "recurrent", "attention"]}, {"rope_theta": 10000}, {"dtype": "float32"},
        {"initializer_range": 0.02},
    ],
)  # fmt: skip
def test_fields_that_real_configs_may_hold(tmp_path: Path, extra):
    config = read(tmp_path, TWO_B | extra)
    assert config.hp.context == extra.get("max_position_embeddings", 8192)
    assert config.eos == 1


@pytest.mark.parametrize("hidden", [1, 3, 64, 100, 2560, 4096, 5120, 1 << 20])
def test_the_embedding_scale_is_rounded_as_by_torch(tmp_path: Path, hidden):
    config = read(tmp_path, TWO_B | {"hidden_size": hidden})
    assert config.hp.embedding_scale == float(torch.tensor(hidden**0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", module._ACTIVATIONS)
def test_the_activations_are_one_function(name):
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    expected = x / 2 * (1 + torch.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(ACT2FN[name](x), expected, rtol=0, atol=1e-9)
    assert (ACT2FN["gelu"](x) - expected).abs().max() > 1e-4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sliding_windows": 3}, "sliding_windows: is a field that we do not know"),
    ({"a\nb": 3}, r"'a\\nb': is a field that we do not know"),
    ({"model_type": "gemma"}, "model_type: only 'recurrent_gemma' can be converted, found 'gemma'"),
    ({"model_type": None}, "model_type: only 'recurrent_gemma'"),
    ({"hidden_activation": "gelu"}, "hidden_activation: expected gelu_pytorch_tanh .* found 'gelu'"),
    ({"hidden_activation": ["gelu"]}, "hidden_activation: expected"),
    ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim: only true"),
    ({"hidden_size": None}, "hidden_size: is missing"),
    ({"hidden_size": "2560"}, "hidden_size: expected a whole number, found '2560'"),
    ({"hidden_size": 2560.0}, "hidden_size: expected a whole number"),
    ({"hidden_size": True}, "hidden_size: expected a whole number, found True"),
    ({"hidden_size": 0}, "hidden_size: expected more than 0"),
    ({"hidden_size": -2560}, "hidden_size: expected more than 0"),
    ({"hidden_size": 2**21}, "hidden_size: expected more than 0 and at most"),
    ({"hidden_size": 10**400}, "hidden_size: expected a whole number up to"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 layers"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: 0 layers"),
    ({"num_attention_heads": 0}, "num_hidden_layers: 26 layers of 0 heads"),
    ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads: 3 heads do not divide hidden_size"),
    ({"num_attention_heads": 3}, "num_attention_heads: 3 gate blocks do not divide"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: 10 query heads are no multiple of 3"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected more than 0"),
    ({"intermediate_size": 15361}, "intermediate_size: expected an even number"),
    ({"head_dim": 255, "partial_rotary_factor": 0.2}, "partial_rotary_factor: expected an even number"),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor: expected more than 0 and at most 1"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected more than 0 and at most 1"),
    ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor: expected more than 0"),
    ({"rope_theta": -1.0}, "rope_theta: expected more than 0"),
    ({"rope_theta": float("inf")}, "rope_theta: expected a number up to"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: only rope_type 'default'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: only rope_type 'default'"),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"rope_parameters\.factor: is a field"),
    ({"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ({"logits_soft_cap": "30"}, "logits_soft_cap: expected a number"),
    ({"logits_soft_cap": 0.0}, "logits_soft_cap: expected more than 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected more than 0"),
    ({"rms_norm_eps": 1e-46}, "rms_norm_eps: expected more than 0"),  # 0 as the f32 that a GGUF holds
    ({"conv1d_width": 1}, "conv1d_width: expected at least 2 taps"),
    ({"attention_window_size": 0}, "attention_window_size: expected more than 0"),
    ({"lru_width": 2561}, "num_attention_heads: 10 gate blocks do not divide the RG-LRU width 2561"),
    ({"_block_types": ["recurrent", "mamba"]}, "_block_types: expected a list of recurrent and attention"),
    ({"_block_types": "recurrent"}, "_block_types: expected a list"),
    ({"_block_types": [["recurrent"]]}, "_block_types: expected a list"),
    ({"block_types": ["attention"]}, "_block_types: contradicts block_types"),
    ({"attention_bias": 1}, "attention_bias: expected true or false"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false"),
    ({"eos_token_id": 256000}, "eos_token_id: expected an id from 0 to 255999, found 256000"),
    ({"bos_token_id": -1}, "bos_token_id: expected an id"),
    ({"pad_token_id": "<pad>"}, "pad_token_id: expected an id"),
    ({"vocab_size": 2**40}, "vocab_size: expected more than 0 and at most"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_fields_are_named_with_their_file(tmp_path: Path, change, message):
    with pytest.raises(GriffinError, match=rf"config\.json: {message}") as caught:
        read(tmp_path, TWO_B | change)
    assert isinstance(caught.value, (FileFormatError, UnsupportedError))
    assert "\n" not in str(caught.value)


def test_unknown_fields_may_be_allowed(tmp_path: Path):
    assert read(tmp_path, TWO_B | {"novelty": [1]}, allow_unknown=True) == read(tmp_path, TWO_B)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "JSON: is not valid JSON"),
        ("[1]", "JSON: expected a JSON object, found list"),
        ('{"model_type": "recurrent_gemma", "model_type": "x"}', "JSON: 'model_type' is there twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "file: this is a Git LFS pointer"),
        ("[" * 100_000, "JSON: is not valid JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content, message):
    with pytest.raises(FileFormatError, match=rf"config\.json: {message}"):
        read(tmp_path, content)


def test_a_missing_config(tmp_path: Path):
    with pytest.raises(FileFormatError, match=r"config\.json: file: is missing"):
        read_config(tmp_path / "config.json")


def test_every_field_is_used_or_ignored_for_a_reason():
    assert not set(module.USED) & set(module.IGNORED)
    assert all(module.IGNORED.values())
    saved = set(RecurrentGemmaConfig().to_dict())
    assert saved <= set(module.USED) | set(module.IGNORED)
