"""Weights on a device: mapped from the file, and, where a machine gains by it, in another order for single tokens."""

import numpy as np

from griffin_gguf.runtime.backends.ggml_ops import HEAD
from griffin_gguf.runtime.ggml.device import Buffer, Device
from griffin_gguf.runtime.ggml.graph import Context, Tensor
from griffin_gguf.runtime.ggml.split import Devices
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.tuning import Buffers

_EMBEDDING = "token_embd.weight"

#: From so many tokens on, ggml's tiled products of rows as they lie in the file beat repacked ones.
TILED = 16


class Weights:
    """Every tensor of the file on the device: mapped where it can, else copied.

    The CPU has kernels for some types with rows interleaved ("CPU_REPACK"), faster for a token or a few, on many
    machines slower for a chunk. `buffers` "both" has such a copy beside the mapped file, "repacked" in its stead.
    """

    def __init__(self, file: GgufFile, devices: Devices, buffers: Buffers) -> None:
        self._mappings = file.mappings()  # keep the pages alive for as long as the tensors
        self._contexts: list[Context] = []
        self._buffers: list[Buffer] = []
        self.tensors: dict[str, Tensor] = {}
        self._repacked: dict[str, Tensor] = {}
        for device, names in _places(file, devices).items():
            self.tensors |= self._file(file, device, names)
            self._repacked |= {} if buffers == "mapped" else self._repack(file, device, names)
        if buffers == "repacked":
            self.tensors |= self._repacked

    def of(self, count: int) -> dict[str, Tensor]:
        """By name, the tensors for a graph of `count` tokens."""
        return self.tensors | self._repacked if count < TILED else self.tensors

    def _file(self, file: GgufFile, device: Device, names: dict[str, str]) -> dict[str, Tensor]:
        """Tensors where they lie in the file, or copied where the device cannot map."""
        context = Context(len(names))
        self._contexts.append(context)
        infos = {name: file.tensors[stored] for name, stored in names.items()}
        tensors = {name: context.new(t.shape, int(t.type)) for name, t in infos.items()}
        buffers = self._map(file, device)
        if buffers:
            for name, tensor in tensors.items():
                device.place(buffers[infos[name].part], tensor, file.data(names[name]))
            self._buffers += buffers.values()
        else:
            self._buffers.append(device.allocate(context, "the weights", weights=True))
            for name, tensor in tensors.items():
                device.write(tensor, file.data(names[name]))
        return tensors

    def _map(self, file: GgufFile, device: Device) -> dict[int, Buffer]:
        """A buffer over each part of the file; none where the device cannot."""
        largest: dict[int, int] = {}
        for info in file.tensors.values():
            largest[info.part] = max(info.nbytes, largest.get(info.part, 0))
        buffers: dict[int, Buffer] = {}
        for part, nbytes in largest.items():
            buffer = device.map(self._mappings[part], nbytes)
            if buffer is None or file.alignment % device.alignment(buffer):
                return {}
            buffers[part] = buffer
        return buffers

    def _repack(self, file: GgufFile, device: Device, names: dict[str, str]) -> dict[str, Tensor]:
        """Copies of the matrices that have kernels with an order of their own; not the embedding: its rows are read."""
        context = Context(len(names))
        wanted = {
            name: context.new(t.shape, int(t.type))
            for name, t in ((name, file.tensors[stored]) for name, stored in names.items())
            if len(t.shape) == 2 and name != "token_embd.weight" and device.repacks(t.shape, int(t.type))
        }
        if wanted:
            self._contexts.append(context)
            self._buffers.append(device.allocate_repacked(context, "the repacked weights"))
            for name, tensor in wanted.items():
                device.write(tensor, np.ascontiguousarray(file.data(names[name])))
        return wanted

    def close(self) -> None:
        """Give the buffers and the mappings back."""
        self.tensors = self._repacked = {}
        for buffer in self._buffers:
            buffer.close()
        for context in self._contexts:
            context.close()
        self._mappings = []


def _places(file: GgufFile, devices: Devices) -> dict[Device, dict[str, str]]:
    """For each device the tensors that lie on it: the name a graph knows them by, and the one they have in the file.

    A head that is the embedding is there twice where the two lie on different devices.
    """
    found: dict[Device, dict[str, str]] = {}
    for name in file.tensors:
        block = name.split(".")
        device = devices.of_layer(int(block[1])) if block[0] == "blk" else devices.of_head
        found.setdefault(devices.of_embedding if name == _EMBEDDING else device, {})[name] = name
    if HEAD not in file.tensors and devices.of_head is not devices.of_embedding:
        found.setdefault(devices.of_head, {})[HEAD] = _EMBEDDING
    return found
