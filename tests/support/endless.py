"""A model that goes on talking: for what happens to an answer in the middle."""

from pathlib import Path

from gguf import TokenType
from rewriting import rewritten

from griffin_gguf.runtime.gguf_file import GgufFile


def endless_file(model: Path) -> Path:
    """endless.gguf beside `model`: the same, but no token that it knows ends an answer."""
    with GgufFile.open(model) as file:
        tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
        types = list(file.metadata["tokenizer.ggml.token_type"])
    types[tokens.index("<end_of_turn>")] = int(TokenType.NORMAL)
    unused, target = tokens.index("<unused0>"), model.with_name("endless.gguf")
    return rewritten(
        model,
        target,
        tokenizer__ggml__eos_token_id=unused,
        tokenizer__ggml__eot_token_id=unused,
        tokenizer__ggml__token_type=types,
    )
