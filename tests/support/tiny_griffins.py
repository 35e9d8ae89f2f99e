"""Tiny models with a tokenizer, as files."""

from pathlib import Path
from typing import Any

import griffins
from gguf import GGUFValueType

from griffin_gguf.quant.encode import encoder
from griffin_gguf.quant.file_types import Metadata, file_type
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write

CONTEXT = 64


def _typed(value: Any) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    if isinstance(value, list):
        element = GGUFValueType.INT32 if isinstance(value[0], int) else GGUFValueType.get_type(value[0])
        return value, GGUFValueType.ARRAY, element
    kind = GGUFValueType.get_type(value)
    return value, GGUFValueType.UINT32 if kind is GGUFValueType.INT32 else kind, None


def write_tiny(path: Path, type: str, tokenizer: dict[str, Any], **changes: Any) -> Path:
    hp = griffins.tiny(vocab=tokenizer["recurrentgemma.vocab_size"], context=CONTEXT, **changes)
    recipe = file_type(type)
    keys: Metadata = {name: _typed(value) for name, value in tokenizer.items()}
    keys |= griffins.metadata(hp) | recipe.metadata
    write([Output(path, keys, plan(hp, recipe))], encoder(griffins.reader(griffins.weights(hp))))
    return path
