"""What a person sets against the recipe, from the words of the command: types of tensors, values of keys."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from griffin_gguf.quant.encode import ENCODABLE
from griffin_gguf.quant.file_types import ALWAYS_F32, Metadata
from griffin_gguf.quant.recipes import Choices
from griffin_gguf.runtime import arch
from griffin_gguf.runtime.chat import ChatTemplate, stop_tokens
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError
from griffin_gguf.runtime.gguf_header import MAX_KEY
from griffin_gguf.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class TensorTypes:
    """Types by patterns of tensor names, the first that is found in a name decides; the two largest by role."""

    patterns: tuple[tuple[str, T], ...] = ()
    output: T | None = None
    embedding: T | None = None
    pure: bool = False

    def choices(self, hp: arch.Hyperparameters) -> Choices:
        """Say it for the tensors of one model, with llama-quantize's precedence.

        `output` and `embedding` come before patterns; but for a tied embedding, which is the head as well, patterns
        come before `output`.

        Raises `UnsupportedError` for a pattern that is in no name of a tensor that can be quantized, and for
        `output` or `embedding` beside nothing to apply to.
        """
        names = {tensor.name: tensor.role for tensor in hp.tensors() if tensor.role not in ALWAYS_F32}
        types: dict[str, T] = {}
        for pattern, type in self.patterns:
            found = [name for name in names if re.search(pattern, name)]
            if not found:
                raise UnsupportedError(f"--tensor-type {pattern}={type.name}: is in no name of a tensor to quantize")
            types |= {name: type for name in found if name not in types}
        if self.output is not None and hp.untied:
            types["output.weight"] = self.output
        elif self.output is not None:
            types.setdefault("token_embd.weight", self.output)
        if self.embedding is not None:
            types["token_embd.weight"] = self.embedding
        return Choices(types, self.pure)


def tensor_type(name: str) -> T:
    """Return the tensor type of that name, in either case; `UnsupportedError` names the choices."""
    found = T.__members__.get(name.upper())
    if found is None or found not in ENCODABLE:
        choices = ", ".join(sorted(type.name for type in ENCODABLE))
        raise UnsupportedError(f"{name!r} is no tensor type that can be written; choose one of {choices}")
    return found


def parse_pattern(text: str) -> tuple[str, T]:
    """Take REGEX=TYPE apart; raises `UnsupportedError` for anything else."""
    pattern, equals, name = text.rpartition("=")
    if not pattern or not equals:
        raise UnsupportedError(f"--tensor-type {text}: expected REGEX=TYPE")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UnsupportedError(f"--tensor-type {text}: {pattern!r} is no regular expression: {error}") from None
    return pattern, tensor_type(name)


def read_patterns(path: Path) -> list[tuple[str, T]]:
    """Read a file of REGEX=TYPE, one a line; empty lines and those that begin with # say nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors may begin it with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise FileFormatError(path, "file", f"cannot be read: {reason}") from None
    found: list[tuple[str, T]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(parse_pattern(line.strip()))
            except UnsupportedError as error:
                raise FileFormatError(path, f"line {number}", str(error)) from None
    return found


#: Keys that say how the file is made: nobody may set them.
_OURS = re.compile(r"general\.(architecture|type|file_type|quantization_version|alignment)$|(split|griffin|quantize)\.")
_FLOAT32_MAX = 3.4028234e38

_KINDS = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}.__getitem__}

#: The integers of GGUF and what they hold.
_INTEGERS = {V[f"UINT{bits}"]: range(1 << bits) for bits in (8, 16, 32, 64)} | {
    V[f"INT{bits}"]: range(-1 << (bits - 1), 1 << (bits - 1)) for bits in (8, 16, 32, 64)
}
_FITTING = {"float": (V.FLOAT32, V.FLOAT64), "str": (V.STRING,), "bool": (V.BOOL,), "int": tuple(_INTEGERS)}
_NEW = {"float": V.FLOAT32, "str": V.STRING, "bool": V.BOOL, "int": V.UINT32}


def override_keys(path: Path, metadata: Metadata, overrides: Sequence[str], tensor_names: Iterable[str]) -> Metadata:
    """Set keys of a model's metadata from KEY=TYPE:VALUE, with TYPE one of int, float, bool, str.

    A key keeps its type; a new one is u32 (i64 below 0), f32, bool or str. Raises `UnsupportedError` for a text of
    another form, a value that the key's type cannot hold and a key that is not the person's to set, and
    `FileFormatError` for numbers that contradict the model's others.
    """
    changed = dict(metadata)
    for text in overrides:
        key, value = _parse_override(text)
        changed[key] = _typed(text, value, metadata.get(key))
    values = {key: value for key, (value, _, _) in changed.items()}
    if overrides:
        names = list(tensor_names)
        before = arch.from_metadata(path, {key: value for key, (value, _, _) in metadata.items()}, names)
        after = arch.from_metadata(path, values, names)
        if [(t.name, t.shape) for t in before.tensors()] != [(t.name, t.shape) for t in after.tensors()]:
            raise UnsupportedError(f"--override-kv {', '.join(overrides)}: the model's tensors have other shapes")
    if "tokenizer.ggml.tokens" in values and any(text.startswith("tokenizer.") for text in overrides):
        tokenizer = Tokenizer.from_gguf(path, values)
        template = ChatTemplate.from_gguf(path, values)
        stop_tokens(values, tokenizer)
        if template:
            template.render([{"role": "user", "content": "Hello"}])
    return changed


def _parse_override(text: str) -> tuple[str, Any]:
    key, _, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not key or not colon or kind not in _KINDS:
        raise UnsupportedError(f"--override-kv {text}: expected KEY=KIND:VALUE with KIND one of {', '.join(_KINDS)}")
    if not key.isprintable() or len(key.encode(errors="replace")) > MAX_KEY:
        raise UnsupportedError(f"--override-kv {text}: expected a key of at most {MAX_KEY} bytes of printable text")
    if _OURS.match(key):
        raise UnsupportedError(f"--override-kv {text}: {key} says how the file is made, and cannot be set")
    try:
        found = _KINDS[kind](value)
        value.encode()  # an argument may hold bytes that are no UTF-8
    except (ValueError, KeyError):
        raise UnsupportedError(f"--override-kv {text}: {value!r} is no {kind}") from None
    return key, found


def _typed(text: str, value: Any, old: tuple[Any, V, V | None] | None) -> tuple[Any, V, V | None]:
    """Give the value the type of the key it replaces."""
    kind = type(value).__name__
    new = V.INT64 if kind == "int" and value < 0 else _NEW[kind]
    wanted = old[1] if old else new
    if wanted not in _FITTING[kind]:
        raise UnsupportedError(f"--override-kv {text}: the key's type is {wanted.name.lower()}")
    too_large = wanted is V.FLOAT32 and isfinite(value) and abs(value) > _FLOAT32_MAX
    if too_large or (wanted in _INTEGERS and value not in _INTEGERS[wanted]):
        raise UnsupportedError(f"--override-kv {text}: is outside of {wanted.name.lower()}")
    return value, wanted, None
