"""What suits a machine: choices that never change what a model says, only how fast it does, and where they are kept.

`griffin bench --tune` measures and stores them; the runtime asks `stored`. They are kept in one file of the user's,
tuning.json, which is a cache: what cannot be read in it counts as never measured.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.ggml import abi
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import checked_threads, usable_cores
from griffin_gguf.runtime.state import CHUNK

Buffers = Literal["mapped", "repacked", "both"]
Attention = Literal["flash", "plain"]

#: Environment variable: another file in the place of the user's tuning.json; where it is empty, none.
VARIABLE = "GRIFFIN_TUNING"

_FORMAT = 1
_MOST_BYTES = 1 << 20  # read of a file: thousands of choices


@dataclass(frozen=True)
class Tuning:
    """How ggml shall run a model. Raises `UnsupportedError` for what cannot be.

    `threads` are the CPU's, None for one a physical core. `buffers` "mapped" lets weights lie where they are mapped
    from the file; "repacked" copies those that the device's own kernels want in another order; "both" has such copies
    for single tokens, and the file's for chunks. `attention` is ggml's flash attention or plain matrix products with a
    softmax. `chunk` is how many tokens at most go through the weights at once.
    """

    threads: int | None = None
    buffers: Buffers = "mapped"
    attention: Attention = "flash"
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        for name, choices in (("buffers", get_args(Buffers)), ("attention", get_args(Attention))):
            if getattr(self, name) not in choices:
                raise UnsupportedError(f"{name}: expected {' or '.join(choices)}, found {getattr(self, name)!r}")
        if not _is_whole(self.chunk) or not 1 <= self.chunk <= CHUNK:
            raise UnsupportedError(f"chunk: expected 1 to {CHUNK} tokens, found {self.chunk!r}")
        if self.threads is not None and not _is_whole(self.threads):
            raise UnsupportedError(f"threads: expected a whole number, found {self.threads!r}")
        checked_threads(self.threads)


def stored(file: GgufFile, devices: str = "") -> tuple[Tuning, str | None]:
    """What is stored for such a file on this machine, `Tuning()` where nothing is; and a notice where that is damaged.

    `devices` is how the user named the devices to run on, "" for ggml's own choice. Raises `BackendError` where ggml
    cannot be loaded, and never for what stands in the user's file.
    """
    path = store_path()
    if path is None:
        return Tuning(), None
    try:
        entry = _read(path).get(key(file, devices))
        return (Tuning() if entry is None else _parse(entry)), None
    except (UnsupportedError, ValueError) as problem:
        return Tuning(), f"{path}: stored choices are ignored: {problem}; griffin bench --tune makes them anew"


def store(file: GgufFile, tuning: Tuning, devices: str = "") -> Path:
    """Keep `tuning` for files such as this one on this machine; returns where.

    The file is replaced at once and whole. Others' choices in it stay, but for what another program stores in the
    same instant. Raises `GriffinError` where it cannot be written, `UnsupportedError` where there is to be none.
    """
    path = store_path()
    if path is None:
        raise UnsupportedError(f"{VARIABLE}: is empty, so there is no file to store choices in")
    try:
        choices = _read(path)
    except ValueError:  # damaged: nothing in it can be kept
        choices = {}
    choices[key(file, devices)] = asdict(tuning)
    text = json.dumps({"format": _FORMAT, "choices": choices}, indent=2, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GriffinError(f"{path}: cannot be written: {error.strerror}") from error
    with atomic(path) as out:
        out.write(text.encode())
    return path


def store_path() -> Path | None:
    """The file of choices: the one that `VARIABLE` names, none where that is empty, else the user's."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    from platformdirs import user_config_path

    return user_config_path("griffin-gguf", appauthor=False) / "tuning.json"


def key(file: GgufFile, devices: str = "") -> str:
    """What a choice holds for: models of these shapes and types, on this machine. Names follow `stored`."""
    return f"{_kind(file)} on {_machine(devices)}"


def _kind(file: GgufFile) -> str:
    """Numbers and tensors of a model without its weights: layers × width, and a digest of all the rest."""
    hp = file.hyperparameters()
    tensors = sorted((name, info.shape, info.type.name) for name, info in file.tensors.items())
    digest = hashlib.sha256(json.dumps([asdict(hp), tensors]).encode()).hexdigest()
    return f"{hp.layers} x {hp.hidden}, {digest[:16]}"


def _machine(devices: str) -> str:
    """Processor, cores, devices and ggml, in words."""
    lib = abi.load()

    def described(kind: int) -> str | None:
        device = lib.ggml_backend_dev_by_type(kind)
        return lib.ggml_backend_dev_description(device).decode(errors="replace").strip() if device else None

    best = described(abi.DEVICE_GPU) or described(abi.DEVICE_IGPU)  # in this order, as ggml_backend_init_best
    parts = [described(abi.DEVICE_CPU), f"{usable_cores()} cores", devices or best, f"ggml {abi.GGML_VERSION}"]
    return ", ".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any]:
    """All choices in a file, unchecked, by key; none where there is no file. Raises `ValueError` for damage."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    try:
        content: object = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    head = _object(content, "it")
    if head.get("format") != _FORMAT:
        raise ValueError(f"format: expected {_FORMAT}, found {head.get('format')!r}")
    return _object(head.get("choices"), "choices")


def _parse(entry: object) -> Tuning:
    """One choice. Raises `ValueError` for other fields, `UnsupportedError` for values that cannot be."""
    values, names = _object(entry, "a choice"), [field.name for field in fields(Tuning)]
    if values.keys() != set(names):
        raise ValueError(f"a choice: expected the fields {', '.join(names)}")
    return Tuning(**values)


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected a JSON object")
    return cast(dict[str, Any], value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
