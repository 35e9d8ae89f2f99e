"""What a process that runs a model takes beside weights, states and buffers: the program, and a vocabulary.

Both are measured, in a fresh process: what Python, NumPy and ggml take differs from one system to another.
"""

from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType, TokenType

from griffin_gguf.quant.file_types import Metadata
from griffin_gguf.quant.process import Progress, in_fresh_process
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.tokenizer import PREFIX

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_SMALLEST = len(_SPECIAL) + 256


@dataclass(frozen=True)
class Footprint:
    """Resident bytes: `program` with ggml started, and what a vocabulary adds."""

    program: int
    vocabulary: int


def footprint(vocab: int) -> Footprint:
    """Measure both in a fresh process, the vocabulary by one of `vocab` tokens as `vocabulary` makes it.

    Raises `BackendError` where that process fails, `UnsupportedError` for a vocabulary that is too small.
    """
    _check(vocab)
    return in_fresh_process(measure_footprint, Footprint, "a process without a model", {"vocab": vocab})


def measure_footprint(vocab: int, progress: Progress) -> Footprint:
    """Measure this process, which should be fresh: it loads what `runtime.load` does, but for a file."""
    # Imported for what their code takes: whoever runs a model has them.
    import griffin_gguf.runtime.backends.ggml
    import griffin_gguf.runtime.model  # noqa: F401
    from griffin_gguf.runtime.ggml.device import Device
    from griffin_gguf.runtime.ggml.selftest import selftest
    from griffin_gguf.runtime.machine import resident_bytes
    from griffin_gguf.runtime.tokenizer import Tokenizer

    selftest(device := Device(1, "CPU"))
    program, _ = resident_bytes()
    metadata = {name: value for name, (value, *_) in vocabulary(vocab).items()}
    tokenizer = Tokenizer.from_gguf(Path("vocabulary"), metadata)
    after, _ = resident_bytes()
    assert (device.is_cpu, tokenizer.vocab_size) == (True, vocab)  # both are there until now
    return Footprint(program, after - program)


def vocabulary(count: int) -> Metadata:
    """The tokenizer's keys with a stand-in for Gemma's tokens: as many bytes in a file, as much memory.

    Gemma's tokenizer.model has 4,241,003 bytes for 256,000 tokens, 9 of each token's not its text: so texts have 7.5
    bytes in the mean. Half of them begin with U+2581, SentencePiece's space. Raises `UnsupportedError` for fewer
    tokens than the 256 bytes and the special ones.
    """
    _check(count)
    words = [f"\u2581{i:05x}" if i % 2 else f"{i:07x}" for i in range(count - _SMALLEST)]
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(words)
    ids = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
    array, text, flag = GGUFValueType.ARRAY, GGUFValueType.STRING, GGUFValueType.BOOL
    return {
        PREFIX + "model": ("llama", text, None),
        PREFIX + "pre": ("default", text, None),
        PREFIX + "tokens": (tokens, array, text),
        PREFIX + "scores": ([-float(i) for i in range(count)], array, GGUFValueType.FLOAT32),
        PREFIX + "token_type": ([int(kind) for kind in types], array, GGUFValueType.INT32),
        **{f"{PREFIX}{name}_token_id": (i, GGUFValueType.UINT32, None) for name, i in ids.items()},
        PREFIX + "add_bos_token": (True, flag, None),
        PREFIX + "add_eos_token": (False, flag, None),
        PREFIX + "add_space_prefix": (False, flag, None),
    }


def _check(vocab: int) -> None:
    if vocab < _SMALLEST:
        raise UnsupportedError(f"vocab_size: expected at least {_SMALLEST}, the 256 bytes among them, found {vocab}")
