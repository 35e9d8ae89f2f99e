import json
from pathlib import Path
from typing import Any

import pytest

from griffin_gguf.convert.config import read_config
from griffin_gguf.runtime.published import PUBLISHED

#: What the checkpoints' config.json say, but for what shapes nothing.
COMMON = {
    "model_type": "recurrent_gemma", "attention_bias": False, "attention_window_size": 2048, "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "logits_soft_cap": 30.0, "num_key_value_heads": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "vocab_size": 256000, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
PATTERN = ["recurrent", "recurrent", "attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "2b": {"_block_types": PATTERN, "hidden_size": 2560, "lru_width": 2560, "intermediate_size": 15360,
           "num_attention_heads": 10, "num_hidden_layers": 26},
    "9b": {"block_types": PATTERN, "hidden_size": 4096, "lru_width": 4096, "intermediate_size": 24576,
           "num_attention_heads": 16, "num_hidden_layers": 38},
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), [("2b", 2_682_862_080), ("9b", 8_579_977_216)])
def test_numbers_are_those_of_the_published_configs(name: str, parameters: int, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(COMMON | CONFIGS[name]))
    found = read_config(path).hp
    assert found.norm_eps == pytest.approx(PUBLISHED[name].norm_eps, rel=1e-7)
    expected = {field: value for field, value in vars(PUBLISHED[name]).items() if field != "norm_eps"}
    assert {field: getattr(found, field) for field in expected} == expected
    assert PUBLISHED[name].parameters == parameters
