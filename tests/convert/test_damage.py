"""Whatever stands in a checkpoint's JSON files: either it converts or it is refused in one line, never a traceback."""

import json
import random
from pathlib import Path

import pytest
from checkpoints import random_checkpoint, train_tokenizer
from damage import damaged
from fast_tokenizers import tokenizer_json

from griffin_gguf.convert import convert
from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.gguf_file import GgufFile


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json", "tokenizer.json"]
)
def test_damaged_json(tmp_path: Path, name):
    folder = random_checkpoint(tmp_path / "c", shards=2, num_hidden_layers=2, block_types=["attention", "recurrent"])
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
        (folder / name).write_text(json.dumps(tokenizer_json(train_tokenizer(384))))
    whole = json.loads((folder / name).read_text())
    decoder = {"4": {"content": "<start_of_turn>", "special": True}, "6": {"content": "<0x00>", "special": False}}
    if name == "tokenizer_config.json":
        whole |= {"added_tokens_decoder": decoder, "extra_special_tokens": ["<bos>"],
                  "chat_template": [{"name": "default", "template": "x"}]}  # fmt: skip
    rng = random.Random(name)
    refused = 0
    (folder / name).write_text(json.dumps(whole))
    convert(folder, [(tmp_path / "whole.gguf", "F16")])
    for i in range(150):
        (folder / name).write_text(json.dumps(damaged(whole, rng)))
        target = tmp_path / f"{i}.gguf"
        try:
            convert(folder, [(target, "F16")])
        except GriffinError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017 - some of them convert
            assert not target.exists()
        else:
            with GgufFile.open(target) as file:
                file.hyperparameters()
            target.unlink()
    assert refused > 20
