"""The oracle for recipes: llama-quantize's own policy, out of the libllama that llama-cpp-python ships.

`types` asks the functions that llama.cpp's tests use (src/llama-ext.h): a model is made of a few numbers without
weights, tensors are named, and the policy fills in their types. The names are C++'s, so this holds for the one
release that pyproject.toml pins. They know of no importance matrix; `types_with_imatrix` asks the quantizer itself
for a dry run, over a file that has a header and a hole for its data.
"""

import ctypes
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from griffin_gguf.runtime.arch import Hyperparameters
from griffin_gguf.runtime.ggml import abi, log

#: Names and shapes in NumPy's order.
Tensors = Sequence[tuple[str, tuple[int, ...]]]

_POINTER = ctypes.c_void_p
_NUMBERS = "n_embd n_ff n_layer n_head n_head_kv n_expert n_embd_head_k n_embd_head_v"


class _Description(ctypes.Structure):
    """`struct llama_quant_model_desc`."""

    _fields_ = (("architecture", ctypes.c_char_p), *((name, ctypes.c_uint32) for name in _NUMBERS.split()))


def types(hp: Hyperparameters, file_type: LlamaFileType, tensors: Tensors) -> dict[str, GGMLQuantizationType]:
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


def types_with_imatrix(
    folder: Path, hp: Hyperparameters, file_type: LlamaFileType, tensors: Tensors
) -> dict[str, GGMLQuantizationType]:
    """Type of each tensor in a Gemma of that shape that is quantized with an importance matrix."""
    # "[   1/  12] blk.0.attn_k.weight - [2560, 256], type = f32, size = 2.50 MiB -> 0.35 MiB (q4_K)"
    pattern = r"\[ *\d+/ *\d+\] +(\S+) +- \[[^]]*\], type = +f32, (?:warning[^\n]*\n)*size = [^\n(]*(?:\((\w+)\))?"
    found = re.findall(pattern, _dry_run(folder, hp, file_type, tensors, imatrix=True))
    return {name: GGMLQuantizationType[kind.upper() if kind else "F32"] for name, kind in found}


def requires_imatrix(folder: Path, hp: Hyperparameters, file_type: LlamaFileType, tensors: Tensors) -> bool:
    """Whether the quantizer would refuse a Gemma of that shape without an importance matrix."""
    return "will require an imatrix" in _dry_run(folder, hp, file_type, tensors, imatrix=False)


def _dry_run(folder: Path, hp: Hyperparameters, file_type: LlamaFileType, tensors: Tensors, *, imatrix: bool) -> str:
    """What llama-quantize logs."""
    source = _hollow_gemma(folder / "gemma.gguf", hp, tensors)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.dry_run = int(file_type), True
    entry = llama_cpp.llama_model_imatrix_data
    importance = (entry * 2)(entry(b"any", (ctypes.c_float * 1)(1.0), 1))  # the last, empty one ends the array
    if imatrix:
        parameters.imatrix = ctypes.cast(importance, ctypes.POINTER(entry))
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: object) -> None:
        lines.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(listen, _POINTER())
    try:
        status = llama_cpp.llama_model_quantize(str(source).encode(), b"", ctypes.pointer(parameters))
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), _POINTER())
        log.capture(abi.load())  # llama_log_set has set ggml's log as well
    assert status == 0, "".join(lines)
    return "".join(lines)


def _hollow_gemma(path: Path, hp: Hyperparameters, tensors: Tensors) -> Path:
    """A Gemma 2 of that shape in F32 whose data is a hole of the right length."""
    writer = GGUFWriter(path, "gemma2")
    for name, value in (("block_count", hp.layers), ("context_length", 8192), ("embedding_length", hp.hidden),
                        ("feed_forward_length", hp.mlp_width), ("attention.head_count", hp.heads),
                        ("attention.head_count_kv", hp.kv_heads), ("attention.key_length", hp.head_width),
                        ("attention.value_length", hp.head_width), ("attention.sliding_window", 4096)):  # fmt: skip
        writer.add_uint32(f"gemma2.{name}", value)
    writer.add_float32("gemma2.attention.layer_norm_rms_epsilon", 1e-6)
    for name, shape in tensors:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + -size % 32 + sum(4 * prod(shape) for _, shape in tensors) + 32 * len(tensors))
    return path
