"""Conversations, templates for them, and the demo model's vocabulary with the control tokens that these name."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import metadata_of

from griffin_gguf.runtime.chat import TEMPLATE_KEY, ChatTemplate
from griffin_gguf.runtime.tokenizer import Tokenizer

PATH = Path("model.gguf")
_DEMO = Path(__file__).parents[2] / "cli" / "demo_model"

GEMMA: str = json.loads((_DEMO / "tokenizer_config.json").read_text())["chat_template"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_RENAMED = {"<unused0>": "<|im_start|>", "<unused1>": "<|im_end|>"}

#: Messages of a conversation.
Messages = list[dict[str, str]]


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def chat_template(template: str = GEMMA) -> ChatTemplate:
    found = ChatTemplate.from_gguf(PATH, _metadata() | {TEMPLATE_KEY: template})
    assert found is not None
    return found


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(PATH, _metadata())


@cache
def transformers_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary as transformers has it."""
    backend: Any = AutoTokenizer.from_pretrained(_DEMO).backend_tokenizer
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {_RENAMED.get(name, name): i for name, i in vocab.items()}
    renamed = tokenizers.Tokenizer.from_str(json.dumps(content))
    renamed.add_special_tokens(list(_RENAMED.values()))
    return PreTrainedTokenizerFast(tokenizer_object=renamed, bos_token="<bos>", eos_token="<eos>")


@cache
def _metadata() -> dict[str, Any]:
    metadata = metadata_of((_DEMO / "tokenizer.model").read_bytes())
    metadata["tokenizer.ggml.tokens"] = [_RENAMED.get(token, token) for token in metadata["tokenizer.ggml.tokens"]]
    return metadata
