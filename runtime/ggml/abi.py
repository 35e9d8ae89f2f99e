"""The C functions of ggml that we call, and the version they hold for. Declarations, nothing else.

llama-cpp-python installs all of ggml as shared libraries (`llama_cpp/lib/`) but binds none of it; this
module does, with the prototypes of ggml.h, ggml-alloc.h and ggml-backend.h. Signatures and enum values
change between ggml releases without notice, so `load` refuses any version but the one written here.

Every pointer is an `int` (or None for NULL). A failed GGML_ASSERT ends the process: whoever calls a
function here checks types and shapes first.
"""

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from griffin_gguf.runtime.errors import BackendError

#: The ggml release these declarations were written against (llama-cpp-python 0.3.36).
GGML_VERSION = "0.25.3"

# enum ggml_type: these ids also stand in GGUF files and never change.
F32, F16, I32, I64, BF16 = 0, 1, 26, 27, 30

# enum ggml_backend_dev_type
DEVICE_CPU, DEVICE_GPU, DEVICE_IGPU = 0, 1, 2

# enum ggml_backend_buffer_usage
USAGE_WEIGHTS = 1

STATUS_SUCCESS = 0


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`: a context holds tensor headers only, under `no_alloc`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class DeviceCaps(ctypes.Structure):
    """`struct ggml_backend_dev_caps`."""

    _fields_ = tuple(
        (name, ctypes.c_bool) for name in ("async_", "host_buffer", "buffer_from_host_ptr", "events", "mmap_support")
    )


class DeviceProps(ctypes.Structure):
    """`struct ggml_backend_dev_props`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", DeviceCaps),
    )


#: One letter a C type, so that a prototype below reads as in the header.
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,  # any pointer or handle
    "P": ctypes.POINTER(DeviceProps),
    "G": InitParams,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "z": ctypes.c_size_t,
    "f": ctypes.c_float,
    "b": ctypes.c_bool,
    "B": ctypes.c_uint8,
    "s": ctypes.c_char_p,
    "v": None,
}

#: function -> "result arguments"
_PROTOTYPES: dict[str, str] = {
    # about the library
    "ggml_version": "s",
    "ggml_log_set": "v pp",
    "ggml_set_abort_callback": "p p",
    # quantization: type, src (f32), dst, first element, rows, row length, importance (f32 or NULL)
    "ggml_quantize_chunk": "z ipplllp",
    # contexts and tensors: ne0 is the fastest dimension
    "ggml_init": "p G",
    "ggml_free": "v p",
    "ggml_used_mem": "z p",
    "ggml_tensor_overhead": "z",
    "ggml_graph_overhead_custom": "z zb",
    "ggml_new_tensor": "p piip",
    "ggml_nbytes": "z p",
    "ggml_get_data": "p p",
    "ggml_op_desc": "s p",
    "ggml_set_input": "v p",
    "ggml_set_output": "v p",
    # operations: the context comes first
    "ggml_add": "p ppp",
    "ggml_add_inplace": "p ppp",
    "ggml_mul": "p ppp",
    "ggml_div": "p ppp",
    "ggml_mul_inplace": "p ppp",
    "ggml_sub_inplace": "p ppp",
    "ggml_mul_mat": "p ppp",
    "ggml_scale_bias": "p ppff",
    "ggml_sqr": "p pp",
    "ggml_sqrt": "p pp",
    "ggml_sigmoid": "p pp",
    "ggml_swiglu_split": "p ppp",
    "ggml_div_inplace": "p ppp",
    "ggml_scale_bias_inplace": "p ppff",
    "ggml_exp_inplace": "p pp",
    "ggml_sqrt_inplace": "p pp",
    "ggml_sigmoid_inplace": "p pp",
    "ggml_soft_max_ext": "p pppff",
    "ggml_gallocr_get_buffer_size": "z pi",
    "ggml_backend_buft_name": "s p",
    "ggml_rms_norm": "p ppf",
    "ggml_get_rows": "p ppp",
    "ggml_set_rows": "p pppp",
    "ggml_concat": "p pppi",
    "ggml_cont": "p pp",
    "ggml_cpy": "p ppp",
    "ggml_cast": "p ppi",
    "ggml_permute": "p ppiiii",
    "ggml_reshape_4d": "p ppllll",
    "ggml_view_4d": "p ppllllzzzz",
    "ggml_ssm_conv": "p ppp",
    "ggml_flash_attn_ext": "p pppppfff",
    # graphs
    "ggml_new_graph_custom": "p pzb",
    "ggml_build_forward_expand": "v pp",
    "ggml_graph_n_nodes": "i p",
    "ggml_graph_node": "p pi",
    "ggml_gallocr_new": "p p",
    "ggml_gallocr_free": "v p",
    "ggml_gallocr_alloc_graph": "b pp",
    "ggml_gallocr_reserve_n_size": "v ppppp",
    # devices, buffers, data
    "ggml_backend_free": "v p",
    "ggml_backend_get_default_buffer_type": "p p",
    "ggml_backend_dev_by_type": "p i",
    "ggml_backend_dev_description": "s p",
    "ggml_backend_dev_get_props": "v pP",
    "ggml_backend_dev_backend_reg": "p p",
    "ggml_backend_dev_buffer_from_host_ptr": "p ppzz",
    "ggml_backend_dev_supports_op": "b pp",
    "ggml_backend_reg_get_proc_address": "p ps",
    "ggml_backend_reg_by_name": "p s",
    "ggml_backend_reg_name": "s p",
    "ggml_backend_reg_dev_count": "z p",
    "ggml_backend_reg_dev_get": "p pz",
    "ggml_backend_register": "v p",
    "ggml_backend_load": "p s",
    "ggml_backend_dev_count": "z",
    "ggml_backend_dev_get": "p z",
    "ggml_backend_dev_name": "s p",
    "ggml_backend_dev_init": "p ps",
    "ggml_backend_alloc_ctx_tensors_from_buft": "p pp",
    "ggml_backend_buffer_free": "v p",
    "ggml_backend_buffer_clear": "v pB",
    "ggml_backend_buffer_set_usage": "v pi",
    "ggml_backend_buffer_get_alignment": "z p",
    "ggml_backend_tensor_alloc": "i ppp",
    "ggml_backend_tensor_set": "v ppzz",
    "ggml_backend_tensor_get": "v ppzz",
    "ggml_backend_tensor_copy": "v pp",
    "ggml_backend_graph_compute": "i pp",
    # several devices: backends, buffer types (NULL: the default), their count, tensors of a graph, parallel, offload
    "ggml_backend_sched_new": "p ppizbb",
    "ggml_backend_sched_free": "v p",
    "ggml_backend_sched_set_tensor_backend": "v ppp",
    "ggml_backend_sched_alloc_graph": "b pp",
    "ggml_backend_sched_graph_compute": "i pp",
    "ggml_backend_sched_get_n_splits": "i p",
}

#: `ggml_log_callback`: level, text, user data.
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
LOG_LEVEL_ERROR = 4

#: `ggml_abort_callback_t`: the message; the process ends when it returns.
ABORT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

#: `ggml_backend_set_n_threads_t`, had by proc address from a device's registry.
SET_N_THREADS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)

#: `ggml_backend_dev_get_extra_bufts_t`, likewise: a device to its further buffer types, the last one NULL.
GET_EXTRA_BUFTS = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)

#: `ggml_backend_rpc_add_server_t`, likewise: endpoint to the registry of its devices.
RPC_ADD_SERVER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)

#: `ggml_backend_rpc_start_server_t`, likewise: endpoint, folder of the cache or NULL, threads, devices; never returns.
RPC_START_SERVER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)


class Library:
    """ggml's functions under their own names, typed by `_PROTOTYPES`."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        for name, prototype in _PROTOTYPES.items():
            result, _, arguments = prototype.partition(" ")
            function = _find(libraries, name)
            function.restype = _TYPES[result]
            function.argtypes = [_TYPES[letter] for letter in arguments]
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"{name} is not declared in {__name__}")


def _find(libraries: list[ctypes.CDLL], name: str) -> Any:
    for library in libraries:
        try:
            return getattr(library, name)
        except AttributeError:
            continue
    raise BackendError(f"ggml: the installed libraries have no function {name}")


def library_folder() -> Path:
    """Where llama-cpp-python keeps ggml's libraries; raises `BackendError` where it is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BackendError("ggml: the package llama-cpp-python is not installed")
    return Path(spec.origin).parent / "lib"


@functools.cache
def load() -> Library:
    """Open ggml once a process and check its version; raises `BackendError`.

    The very files that libllama itself links against are opened (`libggml.so.0`, `libggml.0.dylib`), so that
    a process that also imports llama_cpp holds one ggml, not two.
    """
    folder = library_folder()
    pattern = "lib{}.0.dylib" if sys.platform == "darwin" else "lib{}.so.0"
    try:
        # ggml-base first: the others need its symbols.
        libraries = [
            ctypes.CDLL(str(folder / pattern.format(n)), mode=ctypes.RTLD_GLOBAL)
            for n in ("ggml-base", "ggml-cpu", "ggml")
        ]
    except OSError as error:
        raise BackendError(f"ggml: cannot load the libraries of llama-cpp-python: {error}") from None
    version = _find(libraries, "ggml_version")
    version.restype = ctypes.c_char_p
    check_version(version().decode())
    return Library(libraries)


def check_version(found: str) -> None:
    """Refuse any ggml but the declared one: a changed prototype would corrupt memory, not fail."""
    if found != GGML_VERSION:
        raise BackendError(
            f"ggml: these declarations are for version {GGML_VERSION}, the installed llama-cpp-python has {found}; "
            "install the release that griffin-gguf asks for"
        )
