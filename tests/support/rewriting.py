"""A GGUF of ours with other keys: the tensors stay, byte for byte."""

from pathlib import Path
from typing import Any

from griffin_gguf.quant.file_types import Metadata, file_type, type_name
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, header
from griffin_gguf.runtime.gguf_file import GgufFile


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """Copy `source` to `target` with other values of existing keys (dots as `__`); None takes a key out."""
    with GgufFile.open(source) as file:
        metadata: Metadata = {name: (value, *file.types[name]) for name, value in file.metadata.items()}
        tensors = plan(file.hyperparameters(), file_type(type_name(file.metadata)))
        data = source.read_bytes()[file.data_offset :]
    for name, value in changes.items():
        _, kind, element = metadata.pop(name.replace("__", "."))
        if value is not None:
            metadata[name.replace("__", ".")] = (value, kind, element)
    target.write_bytes(header(Output(target, metadata, tensors)) + data)
    return target
