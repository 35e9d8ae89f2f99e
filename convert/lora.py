"""LoRA adapters, merged into a checkpoint's weights a few rows at a time.

An adapter is a folder as PEFT saves it: adapter_config.json and adapter_model.safetensors, whose tensors are called
`base_model.model.` + a module's name + what they are to it. Of a weight W [out, in] they change

    W + s·B·A      A and B are lora_A [r, in] and lora_B [out, r]
    E + s·(B·A)ᵀ   for the embedding [V, H]: lora_embedding_A [r, V] and lora_embedding_B [H, r]
    m/‖W'‖·W'      DoRA: W' is the above, m lora_magnitude_vector; one norm a row, for the embedding one a column
    b + s·b'       b' is lora_B.bias

and any other tensor takes the place of the base's own (`bias`, `modules_to_save`, an embedding saved along). What
adapters replace is replaced first; then their products are added, adapter after adapter, each to what the last left.

The head is its own from here on: where it was tied to the embedding and an adapter changes one of the two, the other
stays, as it did while the adapter was trained. (Merging in place, PEFT would change both, and warns of it.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.convert.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from griffin_gguf.convert.checkpoint import FLOATS, Checkpoint, Rows, Stored, pieces, refuse_pickle, same_numbers
from griffin_gguf.convert.hub import folder_name
from griffin_gguf.runtime.arch import Role, Tensor, Transform
from griffin_gguf.runtime.errors import FileFormatError, UnsupportedError

F32 = NDArray[np.float32]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."

#: What a tensor is to its module -> the last words that may follow, "" for none; an adapter's name may stand between.
_PARTS: dict[str, tuple[str, ...]] = {
    "lora_A": ("weight",),
    "lora_B": ("weight", "bias"),
    "lora_embedding_A": ("",),
    "lora_embedding_B": ("",),
    "lora_magnitude_vector": ("", "weight"),
}
_BIAS = "lora_B.bias"
_BASE, _SAVED = "base_layer", "modules_to_save"  # followed by the name of the tensor that is replaced
_WHOLE = (_BASE, _SAVED, "")

_KEPT = 4  # factors and magnitudes in memory, of each adapter: as many as two tensors have
_ROWS = 16  # of one product: all are cut alike, so that the bytes do not depend on how the rows are asked for
_CALL = 1 << 18  # multiplications: no more than OpenBLAS does in the calling thread


def open_config(folder: Path, allow_unknown: bool = False) -> AdapterConfig:
    """The config of the adapter in `folder`; raises as `read_adapter_config`, and where there is no such folder."""
    if not folder.is_dir():
        raise FileFormatError(folder, "adapter", "expected a folder with an adapter that PEFT saved; there is none")
    config = read_adapter_config(folder / CONFIG, allow_unknown)
    if not (folder / WEIGHTS).exists() and (folder / _PICKLE).exists():
        refuse_pickle(folder / _PICKLE)
    return config


@dataclass(frozen=True)
class _Replacement:
    """A tensor of an adapter that takes the place of the base's. `own`: a copy that ends a tie to another tensor."""

    adapter: "Adapter"
    name: str
    own: bool


@dataclass(frozen=True)
class _Product:
    """s·left·right, float32 [rows, columns]; `left` gives rows, `right` is whole. `magnitude` where it is a DoRA's."""

    left: Rows
    right: Callable[[], F32]
    scale: float
    magnitude: Callable[[], F32] | None
    by_column: bool  # whose norms the magnitudes are

    def added(self, below: Rows, weight: Stored) -> Rows:
        """The rows of `below` with the product added; `weight` tells how many there are."""
        total = partial(self._total, below, weight.rows)
        if self.magnitude is None:
            return total
        if not self.by_column:
            return partial(_scaled_rows, total, self.magnitude)
        squares = np.zeros(weight.columns, np.float64)
        for span in pieces(weight):  # columns' norms take a pass over all rows
            found = total(*span)
            squares += np.einsum("rc,rc->c", found, found, dtype=np.float64)
        with np.errstate(all="ignore"):
            return partial(_scaled_columns, total, self.magnitude() / np.sqrt(squares).astype(np.float32))

    def _total(self, below: Rows, rows: int, start: int, stop: int) -> F32:
        first, last = start - start % _ROWS, min(stop + -stop % _ROWS, rows)
        found = _multiplied(self.left(first, last), self.right())[start - first : stop - first]
        with np.errstate(all="ignore"):  # what is no number any more, the encoder names
            found *= np.float32(self.scale)
            found += below(start, stop)
        return found


def _scaled_rows(total: Rows, magnitude: Callable[[], F32], start: int, stop: int) -> F32:
    """Each row brought to its magnitude."""
    found = total(start, stop)
    norms = np.sqrt(np.einsum("rc,rc->r", found, found, dtype=np.float64)).astype(np.float32)
    with np.errstate(all="ignore"):
        found *= (magnitude()[start:stop] / norms)[:, None]
    return found


def _scaled_columns(total: Rows, factors: F32, start: int, stop: int) -> F32:
    found = total(start, stop)
    with np.errstate(all="ignore"):
        found *= factors
    return found


class Adapter:
    """One adapter's folder, open for reading and known to fit.

    `replaced`, `products` and `added` (to biases) are by the checkpoint's names of the tensors that they change.
    """

    def __init__(self, config: AdapterConfig, expected: Mapping[str, Tensor], allow_unknown: bool = False) -> None:
        """Open what `open_config` read, and check all but the numbers against a model's tensors by checkpoint name.

        Raises `FileFormatError` and `UnsupportedError` naming file and tensor.
        """
        self.config, self.folder = config, config.path.parent
        self.name = folder_name(self.folder)
        self.replaced: dict[str, _Replacement] = {}
        self.products: dict[str, _Product] = {}
        self.added: dict[str, Rows] = {}
        self._lock = Lock()
        self._kept = lru_cache(_KEPT)(self._whole)
        self.stored = Checkpoint(self.folder, WEIGHTS)
        try:
            self._take_in(expected, allow_unknown)
        except BaseException:
            self.stored.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.stored.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows of a tensor of this adapter, all numbers."""
        return self._finite(name, self.stored.read(name, start, stop))

    def _finite(self, name: str, found: F32) -> F32:
        if not np.isfinite(found).all():
            raise _fault(self.stored.tensors[name], "holds NaN or infinity")
        return found

    def _whole(self, name: str, transposed: bool) -> F32:
        found = self.read(name)
        return np.ascontiguousarray(found.T) if transposed else found

    def _factor(self, name: str, transposed: bool = False) -> F32:
        """A whole tensor, kept for the next piece that needs it; several threads may ask at once."""
        with self._lock:
            return self._kept(name, transposed)

    def _scaled(self, name: str, scale: float, start: int, stop: int) -> F32:
        found = self.read(name, start, stop)
        found *= np.float32(scale)
        return found

    def _columns(self, name: str, start: int, stop: int) -> F32:
        return np.ascontiguousarray(self._finite(name, self.stored.read_columns(name, start, stop)).T)

    def _take_in(self, expected: Mapping[str, Tensor], allow_unknown: bool) -> None:
        """Give every tensor of the file its place."""
        parts: dict[str, dict[str, Stored]] = {}
        for name, found in self.stored.tensors.items():
            place = _place(name)
            if place is None or place[0] not in expected:
                if allow_unknown:
                    continue
                raise _fault(found, "fits no tensor of this model; --allow-unknown ignores it")
            if found.dtype not in FLOATS:
                raise _fault(found, f"expected {', '.join(FLOATS)}, found {found.dtype}")
            source, part = place
            others = parts.setdefault(source, {})
            if part in others:
                raise _fault(found, f"is the same to {source} as {others[part].name}")
            others[part] = found
        for source, found in parts.items():
            self._fit(expected[source], found, parts)
        if not parts:
            raise FileFormatError(self.folder / WEIGHTS, "tensors", "none of them fits this model")

    def _fit(self, tensor: Tensor, parts: dict[str, Stored], all_parts: Mapping[str, dict[str, Stored]]) -> None:
        """Check what there is for one tensor of the checkpoint, and take it in."""
        source, module = tensor.source, tensor.source.rpartition(".")[0]
        for part in _WHOLE:
            found = parts.get(part)
            if found is None:
                continue
            if source in self.replaced:
                raise _fault(found, f"replaces {source}, as does {self.replaced[source].name}")
            _check_shape(found, tensor.source_shape)
            own = part == _SAVED or (part == "" and self.config.saves(module))
            self.replaced[source] = _Replacement(self, found.name, own)
        if _BIAS in parts:
            bias = parts[_BIAS]
            if "lora_B" not in all_parts.get(f"{module}.weight", {}):
                raise _fault(bias, f"its other half, lora_B.weight of {module}, is missing")
            _check_shape(bias, tensor.source_shape)
            self.added[source] = partial(self._scaled, bias.name, self.config.scale_of(module))
        factors = {part: found for part, found in parts.items() if part in _PARTS}
        if factors:
            self.products[source] = self._product(tensor, module, factors)
            if tensor.role is not Role.EMBEDDING:
                there = _BIAS in all_parts.get(f"{module}.bias", {})
                self._agree(factors["lora_B"], "lora_bias", self.config.lora_bias, there)

    def _product(self, tensor: Tensor, module: str, parts: dict[str, Stored]) -> _Product:
        """The product that is to be added to a weight, from its factors."""
        some = next(iter(parts.values()))
        if tensor.spec.transform is not Transform.NONE or tensor.role is Role.VECTOR:
            raise UnsupportedError(f"{some.file}: {some.name}: only LoRA of linear layers and of the embedding merges")
        embedding = tensor.role is Role.EMBEDDING
        kind = "lora_embedding_" if embedding else "lora_"
        names = (f"{kind}A", f"{kind}B")
        for part, found in parts.items():
            if part not in (*names, "lora_magnitude_vector"):
                raise _fault(found, f"expected {' and '.join(names)} for {tensor.source}")
        for name in names:
            if name not in parts:
                raise _fault(some, f"its other half, {name} of {module}, is missing")
        a, b = (parts[name] for name in names)
        rows, columns = tensor.source_shape
        outputs, inputs = (columns, rows) if embedding else (rows, columns)
        rank = self.config.rank_of(module)
        _check_shape(a, (rank, inputs), f" by {CONFIG}")
        _check_shape(b, (outputs, rank), f" by {CONFIG}")
        magnitude = parts.get("lora_magnitude_vector")
        self._agree(magnitude or b, "use_dora", self.config.dora, magnitude is not None)
        if magnitude:
            _check_shape(magnitude, (outputs,))
        return _Product(
            left=partial(self._columns, a.name) if embedding else partial(self.read, b.name),
            right=partial(self._factor, b.name, True) if embedding else partial(self._factor, a.name),
            scale=self.config.scale_of(module),
            magnitude=(lambda: self._factor(magnitude.name)[0]) if magnitude else None,
            by_column=embedding,
        )

    def _agree(self, found: Stored, field: str, said: bool, there: bool) -> None:
        """Refuse a tensor that the config does not announce, and the lack of one that it does."""
        if said != there:
            problem = f"{CONFIG} says {field} = {str(said).lower()}, and the tensor for it is"
            raise _fault(found, f"{problem} {'there' if there else 'missing'}")


class Weights:
    """A checkpoint's tensors with adapters merged into them, read like the checkpoint's own, from any thread.

    `untied` tells whether head and embedding are different now, `changed` which adapter changed a tensor last.
    """

    def __init__(self, stored: Checkpoint, adapters: Sequence[Adapter], tied: bool, shared: bool) -> None:
        """`tied`: head and embedding hold the same numbers; `shared`: and to transformers they are one tensor.

        Raises `FileFormatError` for adapters that replace the same tensor by different ones.
        """
        self.adapters = adapters
        self._stored = stored
        self._tensors = {HEAD: stored.tensors[EMBEDDING]} | stored.tensors
        self._replaced = self._replacements(shared)
        self.changed = {source: found.adapter for source, found in self._replaced.items()}
        self._rows: dict[str, Rows] = {
            source: partial(found.adapter.read, found.name) for source, found in self._replaced.items()
        }
        for adapter in adapters:
            for source, product in adapter.products.items():
                self._rows[source] = product.added(self.rows(source), self._tensors[source])
            for source, bias in adapter.added.items():
                self._rows[source] = _sum(self.rows(source), bias)
            self.changed |= dict.fromkeys(adapter.products.keys() | adapter.added.keys(), adapter)
        self.untied = not tied
        if tied and {EMBEDDING, HEAD} & self.changed.keys():
            self.untied = not same_numbers(self.rows(EMBEDDING), self.rows(HEAD), self._tensors[EMBEDDING])

    def rows(self, source: str) -> Rows:
        """The reader of one tensor by the checkpoint's name."""
        return self._rows.get(source) or partial(self._stored.read, self._tensors[source].name)

    def file(self, source: str) -> Path:
        """Where a tensor lies, or what replaces it."""
        found = self._replaced.get(source)
        return found.adapter.folder / WEIGHTS if found else self._tensors[source].file

    def check_unchanged(self) -> None:
        """Raise `FileFormatError` where a file is not what it was when it was opened."""
        for stored in (self._stored, *(adapter.stored for adapter in self.adapters)):
            stored.check_unchanged()

    def _replacements(self, shared: bool) -> dict[str, _Replacement]:
        """What replaces which tensor. If head and embedding are one, then what replaces either, unless it is a copy."""
        found: dict[str, _Replacement] = {}
        for adapter in self.adapters:
            new = dict(adapter.replaced)
            for one, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)) if shared else ():
                if one in adapter.replaced and not adapter.replaced[one].own:
                    new.setdefault(other, adapter.replaced[one])
            for source, late in new.items():
                early = found.setdefault(source, late)
                readers = partial(early.adapter.read, early.name), partial(adapter.read, late.name)
                if early is not late and not same_numbers(*readers, self._tensors[source]):
                    problem = f"{early.adapter.folder} replaces {source} as well, by other numbers"
                    raise FileFormatError(adapter.folder / WEIGHTS, late.name, problem)
        return found


def _place(name: str) -> tuple[str, str] | None:
    """The checkpoint's tensor that an adapter's tensor changes, and how: one of `_PARTS`, `_BIAS` and `_WHOLE`."""
    if not name.startswith(_PREFIX):
        return None
    words = name.removeprefix(_PREFIX).split(".")
    at = next((i for i, word in enumerate(words) if word in _PARTS or word in (_BASE, _SAVED)), len(words))
    if at == len(words):
        return ".".join(words), ""
    part, rest = words[at], words[at + 1 :]
    last = rest.pop() if rest and (part not in _PARTS or rest[-1] in _PARTS[part]) else ""
    if len(rest) > (part != _BASE) or last not in _PARTS.get(part, (last,)):
        return None
    if part not in _PARTS:
        return ".".join([*words[:at], last]), part
    if last == "bias":
        return ".".join([*words[:at], "bias"]), _BIAS
    return ".".join([*words[:at], "weight"]), part


def _check_shape(found: Stored, expected: tuple[int, ...], why: str = "") -> None:
    if found.shape != expected:
        raise _fault(found, f"expected shape {expected}{why}, found {found.shape}")


def _fault(found: Stored, problem: str) -> FileFormatError:
    return FileFormatError(found.file, found.name, problem)


def _sum(one: Rows, other: Rows) -> Rows:
    return lambda start, stop: one(start, stop) + other(start, stop)


def _multiplied(left: F32, right: F32) -> F32:
    """left·right in blocks, each so small that BLAS starts no threads of its own."""
    rows, columns = len(left), right.shape[1]
    step = max(16, _CALL // (_ROWS * len(right)))
    out = np.empty((rows, columns), np.float32)
    with np.errstate(all="ignore"):
        for i in range(0, rows, _ROWS):
            for j in range(0, columns, step):
                np.matmul(left[i : i + _ROWS], right[:, j : j + step], out=out[i : i + _ROWS, j : j + step])
    return out
