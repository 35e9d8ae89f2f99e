"""Reading GGUF: the one gate through which every GGUF of this project passes.

`gguf_header` checks all of a file's header, `gguf_shards` that the files of a split one belong together. So a view
that `data` returns lies inside the file as it was when opened. A file that another program shrinks while it is
mapped ends this process with SIGBUS, as it would any program that maps it: writers here never touch a finished
file, they rename a new one over it, which leaves a mapping whole. Whoever reads a whole file once takes `read`,
which goes past the map and then raises instead, and `check_unchanged` at the end.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from numpy.typing import NDArray

from griffin_gguf.runtime import arch
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_header import TensorInfo, ValueType
from griffin_gguf.runtime.gguf_shards import SPLIT_KEYS, Shard, open_shards

_T = GGMLQuantizationType

#: Types a matrix may have: those both backends can multiply with.
MATRIX_TYPES = frozenset({
    _T.F32, _T.F16, _T.BF16, _T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.Q8_0, _T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K,
    _T.Q6_K, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ3_XXS, _T.IQ3_S, _T.IQ1_S, _T.IQ1_M, _T.IQ4_NL, _T.IQ4_XS,
    _T.MXFP4,
})  # fmt: skip


#: Bytes between two touches of a mapped file: as many as Linux maps at once around a page that is missing.
_TOUCH = 1 << 16
_TOUCHES = 1 << 10  # in one go, during which other threads run


class GgufFile:
    """An open GGUF, of one file or several: its keys as plain Python values, its tensors as views over mapped files.

    `path` is the first file, `paths` all of them, `size` the sum of their bytes. `metadata` holds int, float, bool,
    str and lists of them, without the keys that only say how files belong together; `types` each key's value type
    and, of an array, its element type. `tensors` are in file order, all offsets multiples of `alignment`;
    `data_offset` is where those of the first file begin. A context manager.
    """

    shards: list[Shard]
    path: Path
    paths: tuple[Path, ...]
    size: int
    alignment: int
    data_offset: int
    metadata: dict[str, Any]
    types: dict[str, ValueType]
    tensors: dict[str, TensorInfo]

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        first = shards[0].header
        self.path, self.paths = shards[0].path, tuple(shard.path for shard in shards)
        self.size = sum(shard.size for shard in shards)
        self._warming: threading.Thread | None = None
        self._closed = threading.Event()
        self.alignment = min(shard.header.alignment for shard in shards)  # all are powers of 2
        self.data_offset = first.data_offset
        self.metadata = {name: value for name, value in first.metadata.items() if name not in SPLIT_KEYS}
        self.types = {name: kind for name, kind in first.types.items() if name not in SPLIT_KEYS}
        self.tensors = {
            info.name: replace(info, part=part)
            for part, shard in enumerate(shards)
            for info in shard.header.tensors.values()
        }

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the GGUF at `path`, of any architecture, and check all of its header.

        Where `path` is the first of several files, NAME-00001-of-0000N.gguf, all of them are opened as one.
        Raises `FileFormatError` naming the field at fault, also where a file cannot be read or is missing.
        """
        return cls(open_shards(Path(path)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give up the files; a mapping goes when the last view of `data` is gone."""
        self._closed.set()
        if self._warming is not None:
            self._warming.join()
            self._warming = None
        for shard in self.shards:
            shard.close()

    def warm(self) -> None:
        """Start to bring all files into memory, in a thread of its own that ends with `close`.

        For whoever is about to read every weight: page faults, and a disk's waits, go by while something else is
        done. Nothing happens where the machine has less memory free than the files have bytes.
        """
        if self._warming is None and self.size <= psutil.virtual_memory().available:
            arguments = (self.mappings(), self._closed)
            self._warming = threading.Thread(target=_touch, args=arguments, name="griffin-warm", daemon=True)
            self._warming.start()

    def mappings(self) -> list[NDArray[np.uint8]]:
        """View each whole file as mapped, uint8 [its size]: read-only, starting on a page. In order of `part`."""
        return [shard.mapping() for shard in self.shards]

    def data(self, name: str) -> NDArray[np.uint8]:
        """View the bytes of a tensor, uint8 [nbytes]: read-only, over the mapped file, never a copy."""
        info = self.tensors[name]
        return self.shards[info.part].mapping()[info.offset : info.offset + info.nbytes]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Read the bytes [start, stop) of a tensor, by default all, as uint8 [stop - start]: read-only, never mapped.

        Threads may read at once. Raises `FileFormatError` where the file has become shorter or cannot be read.
        """
        info = self.tensors[name]
        stop = info.nbytes if stop is None else stop
        assert 0 <= start <= stop <= info.nbytes, (name, start, stop)
        return self.shards[info.part].read(info.offset + start, info.offset + stop, name)

    def check_unchanged(self) -> None:
        """Raise `FileFormatError` where a file's size or time of modification is not what it was at opening."""
        for shard in self.shards:
            shard.check_unchanged()

    def hyperparameters(self) -> arch.Hyperparameters:
        """Return the model's numbers, once every tensor it needs is known to be here with its shape, and no other.

        Raises `UnsupportedError` for another architecture, `FileFormatError` for anything inconsistent.
        """
        return self._hyperparameters

    @cached_property
    def _hyperparameters(self) -> arch.Hyperparameters:
        hp = self.declared()
        for error in self.misfits(hp):
            raise error
        for tensor in hp.tensors():
            self._check_values(tensor)
        return hp

    def declared(self) -> arch.Hyperparameters:
        """Return the model's numbers as the keys give them; of the tensors, only names are looked at.

        Raises as `hyperparameters` does.
        """
        hp = arch.from_metadata(self.path, self.metadata, self.tensors)
        if hp.layers * 8 > len(self.tensors):  # a layer has more than 8: spares walking a hostile layer count
            raise FileFormatError(
                self.path, arch.key("block_count"), f"{hp.layers} layers cannot be in {len(self.tensors)} tensors"
            )
        return hp

    def misfits(self, hp: arch.Hyperparameters) -> Iterator[FileFormatError]:
        """Yield, as errors, every tensor of the model that is missing or has another shape or type, and every other."""
        expected = {tensor.name: tensor for tensor in hp.tensors()}
        for tensor in expected.values():
            info = self.tensors.get(tensor.name)
            if info is None:
                yield FileFormatError(self.path, tensor.name, "the tensor is missing")
            elif problem := _misfit(tensor, info):
                yield FileFormatError(self.paths[info.part], tensor.name, problem)
        for info in self.tensors.values():
            if info.name not in expected:
                yield FileFormatError(self.paths[info.part], info.name, "is no tensor of this model")

    def _check_values(self, tensor: arch.Tensor) -> None:
        """Raise where a vector holds what no model has."""
        if not _is_plain(tensor):
            return
        path = self.paths[self.tensors[tensor.name].part]
        values = self.read(tensor.name).view(np.float32)
        if not np.isfinite(values).all():
            raise FileFormatError(path, tensor.name, "holds NaN or infinity")
        if tensor.spec.transform is arch.Transform.DECAY and (values > 0).any():
            raise FileFormatError(path, tensor.name, "expected no number above 0: -8·softplus(Λ) has none")


def _touch(mappings: Sequence[NDArray[np.uint8]], closed: threading.Event) -> None:
    """Read a byte of every page that the system does not map along with another."""
    for mapping in mappings:
        for start in range(0, len(mapping), _TOUCH * _TOUCHES):
            if closed.is_set():
                return
            mapping[start : start + _TOUCH * _TOUCHES : _TOUCH].max()


def _is_plain(tensor: arch.Tensor) -> bool:
    """Whether the tensor is F32 in every file."""
    return tensor.role in (arch.Role.VECTOR, arch.Role.CONV)


def _misfit(tensor: arch.Tensor, info: TensorInfo) -> str | None:
    """What keeps `info` from being `tensor`, in a type that the backends read."""
    if info.shape != tensor.shape:
        return f"expected shape {tensor.shape}, found {info.shape}"
    if _is_plain(tensor) and info.type is not _T.F32:
        return f"expected type F32, found {info.type.name}"
    if info.type not in MATRIX_TYPES:
        return f"type {info.type.name} cannot be multiplied with"
    return None


def dequantize(info: TensorInfo, data: NDArray[np.uint8], start: int = 0, stop: int | None = None) -> NDArray[Any]:
    """Rows [start, stop) of a tensor seen as 2-D [rows, cols], as float32 [stop - start, cols].

    `data` is what `GgufFile.data` returned; a one-dimensional tensor is one row. F32 comes back as a view.
    """
    block, block_bytes = GGML_QUANT_SIZES[info.type]
    row_bytes = info.shape[-1] // block * block_bytes
    rows = data.reshape(-1, row_bytes)[start:stop]
    if info.type not in MATRIX_TYPES:
        raise UnsupportedError(f"{info.name}: no way to read type {info.type.name}")
    return widened(rows) if info.type is _T.BF16 else gguf_dequantize(rows, info.type)


def widened(bf16: NDArray[np.uint8]) -> NDArray[np.float32]:
    """bf16 bytes [..., 2n] as float32 [..., n], of which they are the upper halves; 25 times as fast as gguf's way."""
    return np.left_shift(bf16.view("<u2"), 16, dtype=np.uint32).view(np.float32)
