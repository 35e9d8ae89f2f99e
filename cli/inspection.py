"""What there is to say about a GGUF, gathered once for people and for machines."""

from collections import Counter
from dataclasses import asdict
from math import prod
from typing import Any

from griffin_gguf.quant.file_types import type_name
from griffin_gguf.runtime.arch import ARCHITECTURE
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.state import kv_type, nbytes

_LONG = 8  # elements; longer arrays are told by their length


def describe(file: GgufFile) -> dict[str, Any]:
    """Everything `griffin inspect` shows, ready for JSON; sizes in bytes.

    "hyperparameters" and "memory" are None for another architecture. Raises `FileFormatError` where a file
    says it is ours and is not sound.
    """
    architecture = file.metadata.get("general.architecture")
    ours = architecture == ARCHITECTURE
    weights = sum(info.nbytes for info in file.tensors.values())
    elements = sum(prod(info.shape) for info in file.tensors.values())
    return {
        "path": str(file.path),
        "files": [str(path) for path in file.paths],
        "size": file.size,
        "architecture": architecture,
        "name": file.metadata.get("general.name"),
        "type": type_name(file.metadata),
        "parameters": elements,
        "bits_per_weight": 8 * weights / elements if elements else 0.0,
        "hyperparameters": asdict(file.hyperparameters()) if ours else None,
        "memory": _memory(file, weights) if ours else None,
        "types": _types(file),
        "metadata": {key: _shortened(value) for key, value in file.metadata.items()},
        "tensors": [
            {"name": info.name, "type": info.type.name, "shape": info.shape, "nbytes": info.nbytes}
            for info in file.tensors.values()
        ],
    }


def _memory(file: GgufFile, weights: int) -> dict[str, int]:
    """Weights, and one text's state, which no text outgrows, as the ggml backend keeps it."""
    state = nbytes(file.hyperparameters(), kv_type(file.tensors["token_embd.weight"].type))
    return {"weights": weights, "state": state, "total": weights + state}


def _types(file: GgufFile) -> dict[str, dict[str, int]]:
    """How many tensors and bytes there are of each type, most bytes first."""
    tensors: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for info in file.tensors.values():
        tensors[info.type.name] += 1
        size[info.type.name] += info.nbytes
    return {name: {"tensors": tensors[name], "nbytes": count} for name, count in size.most_common()}


def _shortened(value: Any) -> Any:
    """A key's value; of a long array, its length."""
    if isinstance(value, list) and len(value) > _LONG:
        return f"[{len(value)} values]"
    return value
