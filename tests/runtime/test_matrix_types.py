"""Every type that a matrix may have: both backends compute the same with it."""

from pathlib import Path

import gguf
import griffins
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from splitting import finish

from griffin_gguf.quant.blocks import E8M0, NUMBERS, SCATTERED_F16
from griffin_gguf.runtime.arch import Role
from griffin_gguf.runtime.backends import Backend
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.backends.numpy import NumpyBackend
from griffin_gguf.runtime.gguf_file import MATRIX_TYPES, GgufFile
from griffin_gguf.runtime.tuning import Tuning

HP = griffins.tiny(layers=2, recurrent=(True, False), mlp_width=256, lru_width=256, gate_blocks=1, vocab=256)
WEIGHTS = griffins.weights(HP)

#: RMS difference of logits as a part of their RMS, some twice what was measured. ggml rounds activations to what
#: its kernels multiply with: 16 bits, or 8 bits in blocks of 32 or 256.
EXACT, HALF, BRAIN, BYTES = 1e-6, 5e-4, 4e-3, 2.2e-2
BARS = {T.F32: EXACT, T.F16: HALF, T.BF16: BRAIN}

#: What a block's second scale must be to its first so that random blocks average near 0.
SECOND = {T.Q4_1: -7.5, T.Q5_1: -15.5, T.Q2_K: 1.5, T.Q4_K: 7.5, T.Q5_K: 15.5}


def encoded(type: T, weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Something of the size of `weight` in that type, uint8 [..., bytes of a row].

    Of a quantized type random blocks, whose scales make them as large: encoding may take ggml many seconds of
    preparation, and every block that can be read is as good.
    """
    if type in BARS:
        return gguf.quants.quantize(weight, type).view(np.uint8).reshape(*weight.shape[:-1], -1)
    block, size = GGML_QUANT_SIZES[type]
    blocks = np.random.default_rng(weight.size).integers(0, 256, (weight.size // block, size), np.uint8)
    scaled(type, blocks, 1.0)
    scaled(type, blocks, float(weight.std() / gguf.quants.dequantize(blocks, type).std()))
    return blocks.reshape(*weight.shape[:-1], -1)


def scaled(type: T, blocks: NDArray[np.uint8], scale: float) -> None:
    """Write the scales into every block."""
    for number, factor in zip(NUMBERS[type], (1.0, SECOND.get(type, 1.0)), strict=False):
        raw = np.float16(scale * factor).view(np.uint16)
        at = number.offset
        if number.format is E8M0:
            blocks[:, at] = 127 + round(np.log2(scale))
        elif number.format is SCATTERED_F16:  # 4 bits each in the high ends of four u16
            for i in range(4):
                blocks[:, at + 2 * i + 1] = blocks[:, at + 2 * i + 1] & 0x0F | (raw >> 4 * i & 0x0F) << 4
        else:
            blocks[:, at : at + 2] = np.frombuffer(raw.tobytes(), np.uint8)


def model(path: Path, type: T) -> Path:
    """A tiny Griffin whose every matrix, embedding and gates among them, is of that type."""
    writer = GGUFWriter(path, "recurrentgemma")
    for name, (value, kind, element) in griffins.metadata(HP).items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, element)
    for tensor in HP.tensors():
        plain = tensor.role in (Role.VECTOR, Role.CONV)
        kind = T.F32 if plain else type
        writer.add_tensor(tensor.name, encoded(kind, WEIGHTS[tensor.name]), raw_dtype=kind)
    finish(writer)
    return path


def logits_of(backend: Backend, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    found = backend.run([(tokens, backend.new_state())], "every")
    backend.close()
    assert found is not None
    return found


@pytest.mark.parametrize("type", sorted(MATRIX_TYPES), ids=lambda type: type.name)
def test_both_backends_compute_the_same(tmp_path: Path, type: T) -> None:
    tokens = np.random.default_rng(1).integers(0, HP.vocab, 12).astype(np.int32)
    with GgufFile.open(model(tmp_path / "m.gguf", type)) as file:
        assert file.tensors["blk.0.ssm_gate_i.weight"].type is type
        logits = [logits_of(backend, tokens) for backend in (NumpyBackend(file), GgmlBackend(file, Tuning(threads=1)))]
    difference = np.sqrt(((logits[1] - logits[0]) ** 2).mean()) / np.sqrt((logits[0] ** 2).mean())
    assert difference <= BARS.get(type, BYTES)
