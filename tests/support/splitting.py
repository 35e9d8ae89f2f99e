"""GGUF files in several parts: as gguf-py's writer splits them, and one part at a time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from griffin_gguf.runtime.gguf_file import GgufFile

#: A key's value and type; a tensor's name, bytes shaped as rows, and type.
Keys = Mapping[str, tuple[Any, GGUFValueType]]
Tensors = Iterable[tuple[str, NDArray[np.generic], GGMLQuantizationType | None]]


def split(source: Path, folder: Path, *, split_max_tensors: int = 0, split_max_size: int = 0) -> Path:
    """Write `source` anew under `folder`, split as `GGUFWriter` does; returns the first file."""
    with GgufFile.open(source) as file:
        writer = GGUFWriter(
            folder / f"{source.stem}.gguf",
            file.metadata["general.architecture"],
            split_max_tensors=split_max_tensors,
            split_max_size=split_max_size,
        )
        for name, value in file.metadata.items():
            if name != "general.architecture":
                writer.add_key_value(name, value, *file.types[name])
        for info in file.tensors.values():
            data = file.data(info.name).reshape(*info.shape[:-1], -1)
            writer.add_tensor(info.name, data, raw_dtype=info.type)
        finish(writer)
    return min(folder.glob(f"{source.stem}-00001-of-*.gguf"))


def part(path: Path, no: int, count: int, total: int, tensors: Tensors = (), keys: Keys | None = None) -> Path:
    """Write one part by hand; `keys` stand in for, or add to, the three that every part has."""
    writer = GGUFWriter(path, "")
    split: dict[str, tuple[Any, GGUFValueType]] = {
        "split.no": (no, GGUFValueType.UINT16),
        "split.count": (count, GGUFValueType.UINT16),
        "split.tensors.count": (total, GGUFValueType.INT32),
    }
    for name, (value, kind) in {**split, **(keys or {})}.items():
        if value is not None:
            writer.add_key_value(name, value, kind)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    return path


def finish(writer: GGUFWriter) -> None:
    """Write what the writer has gathered."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
