"""The devices of ggml: which there are, by what names, and what each can take."""

import ctypes
import functools
from dataclasses import dataclass

import psutil
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from griffin_gguf.runtime.errors import BackendError
from griffin_gguf.runtime.ggml import abi, remote, rpc
from griffin_gguf.runtime.ggml.graph import Context
from griffin_gguf.runtime.ggml.log import capture
from griffin_gguf.runtime.gguf_file import MATRIX_TYPES

#: enum ggml_backend_dev_type, as people say it; a server's devices all call themselves GPUs.
_KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator", 4: "several devices as one"}

#: What comes before HOST:PORT in the name of a server's device.
RPC_PREFIX = "rpc:"


@dataclass(frozen=True)
class DeviceInfo:
    """A device and what it can take.

    `memory_free` and `memory_total` are bytes, 0 where the device does not say. `types` are those of MATRIX_TYPES it
    multiplies with, `repacked` those that it can also hold in an order its kernels like better.
    """

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int
    maps_files: bool
    types: tuple[str, ...]
    repacked: tuple[str, ...]


@functools.cache
def _lib() -> abi.Library:
    lib = abi.load()
    capture(lib)
    return lib


@functools.cache
def _remote_lib() -> abi.Library:
    return remote.RemoteLibrary(_lib())


def library(device: int) -> abi.Library:
    """ggml's functions as they must be called for `device`: those that reach a server must not end the process."""
    registry = _lib().ggml_backend_dev_backend_reg(device)
    return _remote_lib() if _lib().ggml_backend_reg_name(registry).startswith(b"RPC") else _lib()


def handles() -> list[int]:
    """Every `ggml_backend_dev_t` known by now, in ggml's order."""
    lib = _lib()
    return [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]


def names() -> list[str]:
    """Their names."""
    return [_lib().ggml_backend_dev_name(device).decode() for device in handles()]


def find(name: str) -> int:
    """The device of that name, in either case, or the first one behind "rpc:HOST:PORT"; raises `BackendError`."""
    wanted = name
    if name.startswith(RPC_PREFIX):
        wanted = rpc.connect(name.removeprefix(RPC_PREFIX))[0]
    for handle, known in zip(handles(), names(), strict=True):
        if known.lower() == wanted.lower():
            return handle
    raise BackendError(f"ggml: no device {name!r}; there are {', '.join(names())}")


def best() -> int:
    """The device ggml holds for the fastest: a GPU, else an integrated one, else the CPU; raises `BackendError`."""
    for kind in (abi.DEVICE_GPU, abi.DEVICE_IGPU, abi.DEVICE_CPU):
        device: int | None = _lib().ggml_backend_dev_by_type(kind)
        if device:
            return device
    raise BackendError("ggml: found no device to run on")


def properties(device: int) -> abi.DeviceProps:
    """Name, kind, memory and abilities, as ggml has them."""
    props = abi.DeviceProps()
    library(device).ggml_backend_dev_get_props(device, ctypes.byref(props))
    return props


def memory_free(props: abi.DeviceProps) -> int:
    """Free bytes; of this machine's own, for which ggml holds all of it for free, what programs can still have."""
    return psutil.virtual_memory().available if props.type == abi.DEVICE_CPU else props.memory_free


def catalog() -> list[DeviceInfo]:
    """Every device there is, those of servers that were connected to among them."""
    return [_info(device) for device in handles()]


def _info(device: int) -> DeviceInfo:
    props = properties(device)
    return DeviceInfo(
        name=props.name.decode(),
        description=props.description.decode(errors="replace").strip(),
        kind="remote" if library(device) is not _lib() else _KINDS.get(props.type, str(props.type)),
        memory_free=memory_free(props),
        memory_total=props.memory_total,
        maps_files=props.caps.buffer_from_host_ptr,
        types=tuple(t.name for t in _matrix_types() if _multiplies(device, t, None)),
        repacked=tuple(
            t.name for t in _matrix_types() for b in extra_buffer_types(device) if _multiplies(device, t, b)
        ),
    )


def _matrix_types() -> list[GGMLQuantizationType]:
    return sorted(MATRIX_TYPES)


def extra_buffer_types(device: int) -> list[int]:
    """Buffer types beside the default, which hold weights in another order; most devices have none."""
    lib = _lib()
    registry = lib.ggml_backend_dev_backend_reg(device)
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    found, types = abi.GET_EXTRA_BUFTS(address)(device), list[int]()
    while found and (handle := found[len(types)]):
        types.append(handle)
    return types


def _multiplies(device: int, kind: GGMLQuantizationType, buffer_type: int | None) -> bool:
    """Whether a matrix of that type, lying in a buffer of that type (None: the default), can be multiplied with."""
    lib, context = library(device), Context(3)
    width = max(256, GGML_QUANT_SIZES[kind][0])
    weight = context.new((width, width), int(kind))
    buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context.handle, buffer_type) if buffer_type else None
    try:
        if buffer_type and not buffer:
            return False
        product = context.matmul(weight, context.new((1, width)))
        return bool(lib.ggml_backend_dev_supports_op(device, product.handle))
    finally:
        if buffer:
            lib.ggml_backend_buffer_free(buffer)
