"""The oracle for recipes: llama-quantize's own policy, out of the libllama that llama-cpp-python ships.

The library exports the functions that llama.cpp's tests use (src/llama-ext.h): a model is made of a few numbers
without weights, tensors are named, and the policy fills in their types. The names are C++'s, so this holds for
the one release that pyproject.toml pins.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
from gguf import GGMLQuantizationType, LlamaFileType

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.ggml import abi

_POINTER = ctypes.c_void_p
_NUMBERS = "n_embd n_ff n_layer n_head n_head_kv n_expert n_embd_head_k n_embd_head_v"


class _Description(ctypes.Structure):
    """`struct llama_quant_model_desc`."""

    _fields_ = (("architecture", ctypes.c_char_p), *((name, ctypes.c_uint32) for name in _NUMBERS.split()))


def types(
    hp: Hyperparameters, file_type: LlamaFileType, tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, GGMLQuantizationType]:
    """Type of each (name, shape in NumPy's order) in a Gemma with the numbers of `hp`."""
    libraries = Path(llama_cpp.__path__[0]) / "lib"
    llama = ctypes.CDLL(str(next(libraries.glob("libllama.*"))))
    base = ctypes.CDLL(str(next(libraries.glob("libggml-base.*"))))
    from_metadata = llama["_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc"]
    init = llama["_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params"]
    compute = llama["_Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem"]
    from_metadata.restype = init.restype = base.ggml_set_name.restype = _POINTER
    numbers = (hp.hidden, hp.mlp_width, hp.layers, hp.heads, hp.kv_heads, 0, hp.head_width, hp.head_width)
    model = _POINTER(from_metadata(ctypes.byref(_Description(b"gemma2", *numbers))))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(file_type)
    state = _POINTER(init(model, ctypes.byref(parameters)))

    ggml = abi.load()
    context = ggml.ggml_init(abi.InitParams(len(tensors) * 1024 + 4096, None, True))
    handles = (_POINTER * len(tensors))()
    for i, (name, shape) in enumerate(tensors):
        ne = (ctypes.c_int64 * len(shape))(*reversed(shape))
        handles[i] = ggml.ggml_new_tensor(context, abi.F32, len(shape), ctypes.addressof(ne))
        base.ggml_set_name(_POINTER(handles[i]), name.encode())
    found = (ctypes.c_int * len(tensors))()
    compute(state, ctypes.c_int(int(file_type)), handles, found, ctypes.c_size_t(len(tensors)))
    ggml.ggml_free(context)
    return {name: GGMLQuantizationType(type) for (name, _), type in zip(tensors, found, strict=True)}
