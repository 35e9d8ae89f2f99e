"""Importance matrices: how large the inputs of each matrix product were over a text, in llama.cpp's GGUF format.

    general.type         "imatrix"
    imatrix.datasets     array of str: the texts' names
    imatrix.chunk_count  u32: windows of text that were run
    imatrix.chunk_size   u32: tokens of a window
    NAME.in_sum2         f32 [columns], or [matrices, columns]: sums of the squared inputs
    NAME.counts          f32 [1], or [matrices, 1]: how many inputs each row sums

NAME is the weight's. A weight of several matrices that every token passes (the gates) has one count and one row,
its matrices' columns one after another; one count a matrix is llama.cpp's way for experts, of which a token
passes few. So only the model tells how many matrices a row holds: `ImportanceMatrix.fitted`.

A file that `collect.py` wrote also names what it came from, under `griffin.imatrix.` (see `Collection`), and holds
`NAME.griffin_sums`, f64, as long as text is left to be run: with sums rounded to f32 at every interruption the
result would depend on those. llama.cpp passes over both. Format: tools/imatrix/imatrix.cpp (`save_imatrix`) and
common/imatrix-loader.cpp of llama.cpp.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from griffin_gguf.quant.writer import ALIGNMENT, header_bytes
from griffin_gguf.runtime.arch import Hyperparameters, Role, Tensor
from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile

_SUMS, _COUNTS, _EXACT = ".in_sum2", ".counts", ".griffin_sums"
_PREFIX = "griffin.imatrix."
_MOST_COUNTED = 2.0**53
_MOST_CHUNKS = 2**32 - 1
_MOST_NATS = 500.0  # a token; exp of it is a number

_V = GGUFValueType

#: The fields of `Collection` as keys.
_COLLECTION_KEYS = {
    "model": _V.STRING,
    "text_sha256": _V.STRING,
    "chunks_total": _V.UINT64,
    "nll": _V.FLOAT64,
    "nll_squares": _V.FLOAT64,
    "scored": _V.UINT64,
}


@dataclass(frozen=True)
class Entry:
    """One weight's inputs: `sums` f64 [matrices, columns] of squares, `counts` i64 [1] or [matrices]."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def means(self) -> NDArray[np.float32]:
        """Mean squares f32 [matrices, columns]; ones for a matrix that saw no token, as llama.cpp has it."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), 1.0).astype(np.float32)

    def plus(self, other: "Entry") -> "Entry":
        """Sums and counts of both, whose sums have one shape; one count beside several holds for each matrix."""
        return Entry(self.sums + other.sums, self.counts + other.counts)


@dataclass(frozen=True)
class Collection:
    """What a matrix was collected from, enough to go on where it stopped, and what the text scored so far."""

    model: str  # a fingerprint
    text_sha256: str
    chunks_total: int  # windows that make it complete
    nll: float = 0.0  # of the scored tokens: sum of negative log-likelihoods in nats
    nll_squares: float = 0.0
    scored: int = 0

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """exp of the mean over the scored tokens, and its standard error; None where fewer than 2 were scored."""
        if self.scored < 2:
            return None
        mean = self.nll / self.scored
        variance = max(0.0, self.nll_squares / self.scored - mean * mean)
        return exp(mean), exp(mean) * sqrt(variance / (self.scored - 1))


@dataclass(frozen=True)
class ImportanceMatrix:
    """Entries by the names of weights; `path` is where they lie, or shall lie. See the module's head."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    collection: Collection | None = None

    @property
    def complete(self) -> bool:
        """Whether all of the text was run."""
        return self.collection is None or self.chunk_count >= self.collection.chunks_total

    def importance(self, name: str) -> NDArray[np.float32] | None:
        """Mean squared inputs of the weight `name`, f32 [matrices, columns], or None where it has none.

        Rows are those of the model's matrices once the whole is `fitted`.
        """
        entry = self.entries.get(name)
        return None if entry is None else entry.means

    def fitted(self, hp: Hyperparameters) -> "ImportanceMatrix":
        """The same with one row a matrix of that model: gates [G, B], all other weights [1, columns].

        Raises `FileFormatError` for an entry that is no matrix of the model or has other columns.
        """
        shapes = {t.name: _matrices(t) for t in products(hp)}
        return replace(self, entries={name: self._fit(name, entry, shapes) for name, entry in self.entries.items()})

    def _fit(self, name: str, entry: Entry, shapes: Mapping[str, tuple[int, int]]) -> Entry:
        if name not in shapes:
            raise FileFormatError(self.path, name, "is no matrix product of this model")
        matrices, columns = shapes[name]
        if entry.sums.size != matrices * columns:
            raise FileFormatError(
                self.path, name, f"expected {matrices} × {columns} sums, as the model has it, found {entry.sums.size}"
            )
        if len(entry.counts) not in (1, matrices):
            raise FileFormatError(self.path, name, f"expected 1 or {matrices} counts, found {len(entry.counts)}")
        return Entry(entry.sums.reshape(matrices, columns), entry.counts)

    def missing(self, hp: Hyperparameters) -> list[str]:
        """Names of the model's weights that have no entry, in file order."""
        return [tensor.name for tensor in products(hp) if tensor.name not in self.entries]

    @classmethod
    def load(cls, path: Path | str) -> "ImportanceMatrix":
        """Read a file of this project or of llama.cpp. Raises `FileFormatError` naming the field at fault."""
        path = Path(path)
        if _is_legacy(path):
            raise FileFormatError(
                path, "format", "is llama.cpp's old .dat; expected a GGUF, which its llama-imatrix makes of it "
                "(--in-file OLD.dat -o NEW.gguf)"
            )  # fmt: skip
        with GgufFile.open(path) as file:
            found = _expect(file, "general.type", str)
            if found != "imatrix":
                raise FileFormatError(path, "general.type", f"expected 'imatrix', found {found!r}")
            size = _expect(file, "imatrix.chunk_size", int)
            if not size:
                raise FileFormatError(path, "imatrix.chunk_size", "expected at least 1 token, found 0")
            collection = _collection(file)
            return cls(
                path,
                _read_entries(file, exact=collection is not None),
                tuple(_expect(file, "imatrix.datasets", list)),
                _expect(file, "imatrix.chunk_count", int),
                size,
                collection,
            )

    def save(self, path: Path) -> None:
        """Write the file at `path`, whole or not at all. Raises `GriffinError` naming it."""
        content = self._bytes(path)
        with atomic(path) as file:
            file.write(content)
            file.sync()

    def _bytes(self, path: Path) -> bytes:
        writer: Any = _Writer(None, "")  # opens no file, we hand it a buffer
        writer.add_key_value("general.type", "imatrix", _V.STRING)
        # llama-quantize wants the key, and the package writes no empty arrays.
        writer.add_key_value("imatrix.datasets", list(self.datasets) or ["unknown"], _V.ARRAY, _V.STRING)
        writer.add_key_value("imatrix.chunk_count", self.chunk_count, _V.UINT32)
        writer.add_key_value("imatrix.chunk_size", self.chunk_size, _V.UINT32)
        if self.collection:
            for name, value in asdict(self.collection).items():
                writer.add_key_value(_PREFIX + name, value, _COLLECTION_KEYS[name])
        arrays: list[NDArray[Any]] = []
        for name, array in self._arrays(path):
            kind = GGMLQuantizationType.F64 if array.dtype == np.float64 else GGMLQuantizationType.F32
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
            arrays.append(array)
        parts = [header_bytes(writer), *(array.tobytes() for array in arrays)]
        return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in parts)

    def _arrays(self, path: Path) -> list[tuple[str, NDArray[Any]]]:
        """The file's tensors in order, in the shapes that llama.cpp gives them."""
        found: list[tuple[str, NDArray[Any]]] = []
        for name, entry in sorted(self.entries.items()):
            rows = (len(entry.counts), -1) if len(entry.counts) > 1 else (-1,)
            sums = entry.sums.reshape(rows)
            with np.errstate(over="ignore"):
                rounded = sums.astype(np.float32)
            if not np.isfinite(rounded).all():
                raise GriffinError(f"{path}: {name}: its sums are too large for float32")
            found.append((name + _SUMS, rounded))
            found.append((name + _COUNTS, entry.counts.astype(np.float32).reshape(rows)))
            if not self.complete:
                found.append((name + _EXACT, sums))
        return found


def merge(matrices: Sequence[ImportanceMatrix], path: Path) -> ImportanceMatrix:
    """Join matrices over several texts, of one model and one window: sums, counts and chunks add up.

    Raises `UnsupportedError` naming the file that has other entries or another chunk size than the first.
    """
    first, *others = matrices
    entries = dict(first.entries)
    for other in others:
        if other.chunk_size != first.chunk_size:
            raise UnsupportedError(
                f"{other.path}: imatrix.chunk_size: expected {first.chunk_size} as in {first.path}, "
                f"found {other.chunk_size}"
            )
        for name in sorted(entries.keys() ^ other.entries.keys()):
            fault = "is missing" if name in entries else "is too many"
            raise UnsupportedError(f"{other.path}: {name}: {fault}; expected the entries of {first.path}")
        for name, entry in other.entries.items():
            entries[name] = _joined(entries[name], entry, f"{other.path}: {name}", first.path)
    chunks = sum(matrix.chunk_count for matrix in matrices)
    if chunks > _MOST_CHUNKS:
        raise UnsupportedError(f"{others[-1].path}: imatrix.chunk_count: {chunks} chunks in all do not fit the format")
    datasets = tuple(name for matrix in matrices for name in matrix.datasets)
    return ImportanceMatrix(path, entries, datasets, chunks, first.chunk_size)


def _joined(entry: Entry, other: Entry, field: str, path: Path) -> Entry:
    """The sum of both; entries that were `fitted` and ones that were not may differ in shape alone."""
    if entry.sums.size != other.sums.size:
        raise UnsupportedError(f"{field}: expected {entry.sums.size} sums as in {path}, found {other.sums.size}")
    rows = max(len(entry.counts), len(other.counts))
    if min(len(entry.counts), len(other.counts)) not in (1, rows):
        raise UnsupportedError(f"{field}: expected {len(entry.counts)} counts as in {path}, found {len(other.counts)}")
    shape = (max(len(entry.sums), len(other.sums)), -1)
    return Entry(entry.sums.reshape(shape), entry.counts).plus(Entry(other.sums.reshape(shape), other.counts))


def products(hp: Hyperparameters) -> list[Tensor]:
    """The model's weights that inputs are multiplied with, in file order.

    The embedding is one where it is the head too, since looking up its rows multiplies nothing.
    """
    rest = {Role.VECTOR, Role.CONV} | ({Role.EMBEDDING} if hp.untied else set())
    return [tensor for tensor in hp.tensors() if tensor.role not in rest]


def _matrices(tensor: Tensor) -> tuple[int, int]:
    """How many matrices the weight holds, and the columns of each."""
    return (tensor.shape[0] if len(tensor.shape) == 3 else 1), tensor.shape[-1]


class _Writer(GGUFWriter):
    def add_architecture(self) -> None:
        """Write none: a matrix is no model."""


def _is_legacy(path: Path) -> bool:
    """Whether the file starts as the old format does: i32 entries, i32 length, a weight's name of that length."""
    try:
        if not path.is_file():  # opening a FIFO would wait for a writer
            return False
        with path.open("rb") as file:
            head = file.read(8 + 64)
    except OSError:
        return False  # GgufFile says what is wrong
    if len(head) < 8:
        return False
    _, length = struct.unpack_from("<ii", head)
    return 0 < length <= 64 and head[8 : 8 + length].endswith(b".weight")


_Kinds = Mapping[type, tuple[str, tuple[GGUFValueType, GGUFValueType | None]]]
_EXPECTED: _Kinds = {
    str: ("a string", (_V.STRING, None)),
    int: ("UINT32", (_V.UINT32, None)),
    list: ("an array of strings", (_V.ARRAY, _V.STRING)),
}


def _expect(file: GgufFile, key: str, kind: type) -> Any:
    """The value of a key that must be there, in that type."""
    words, wanted = _EXPECTED[kind]
    found = file.types.get(key)
    if found is None:
        raise FileFormatError(file.path, key, "is missing; this is no importance matrix")
    if found != wanted and not (kind is list and found[0] is _V.ARRAY and not file.metadata[key]):
        raise FileFormatError(file.path, key, f"expected {words}, found {(found[1] or found[0]).name}")
    return file.metadata[key]


def _collection(file: GgufFile) -> Collection | None:
    """What `griffin.imatrix.` says, where any of it is there: then all of it must be."""
    if not any(key.startswith(_PREFIX) for key in file.metadata):
        return None
    values: dict[str, Any] = {}
    for name, kind in _COLLECTION_KEYS.items():
        key = _PREFIX + name
        if file.types.get(key, (None, None))[0] is not kind:
            raise FileFormatError(file.path, key, f"expected {kind.name}, found {file.metadata.get(key)!r}")
        values[name] = file.metadata[key]
        if kind is _V.FLOAT64 and not 0 <= values[name] < np.inf:
            raise FileFormatError(file.path, key, f"expected a number from 0 on, found {values[name]}")
    found = Collection(**values)
    if found.nll > _MOST_NATS * max(found.scored, 1):
        raise FileFormatError(file.path, _PREFIX + "nll", f"{found.nll:g} nats cannot be of {found.scored} tokens")
    return found


def _read_entries(file: GgufFile, *, exact: bool) -> dict[str, Entry]:
    """Every entry, with sums and counts in full; `exact` ones are taken where they are there."""
    known = (_SUMS, _COUNTS, _EXACT) if exact else (_SUMS, _COUNTS)
    names: dict[str, None] = {}
    for tensor in file.tensors:
        suffix = next((suffix for suffix in known if tensor.endswith(suffix) and tensor != suffix), None)
        if suffix is None:
            raise FileFormatError(file.path, tensor, f"expected a name that ends in {' or '.join(known)}")
        names[tensor.removesuffix(suffix)] = None
    if not names:
        raise FileFormatError(file.path, "tensors", "holds no entries")
    return {name: _read_entry(file, name) for name in names}


def _read_entry(file: GgufFile, name: str) -> Entry:
    sums, counts = _floats(file, name + _SUMS), _floats(file, name + _COUNTS)
    if (counts % 1).any() or counts.max() > _MOST_COUNTED:
        raise FileFormatError(file.path, name + _COUNTS, "expected whole numbers of tokens")
    if sums.size % counts.size:
        raise FileFormatError(file.path, name + _COUNTS, f"{counts.size} counts for {sums.size} sums")
    if name + _EXACT in file.tensors:
        wide = _floats(file, name + _EXACT, GGMLQuantizationType.F64)
        with np.errstate(over="ignore"):
            if not np.array_equal(wide.astype(np.float32), sums):
                raise FileFormatError(file.path, name + _EXACT, f"expected the numbers of {name + _SUMS}, found others")
        sums = wide
    return Entry(sums.astype(np.float64).reshape(counts.size, -1), counts.astype(np.int64))


def _floats(
    file: GgufFile, name: str, kind: GGMLQuantizationType = GGMLQuantizationType.F32
) -> NDArray[np.floating[Any]]:
    """All numbers of a tensor, which must be there, of that type, finite and not negative; flat."""
    info = file.tensors.get(name)
    if info is None:
        raise FileFormatError(file.path, name, "is missing")
    if info.type is not kind:
        raise FileFormatError(file.path, name, f"expected type {kind.name}, found {info.type.name}")
    values = file.data(name).view(np.float64 if kind is GGMLQuantizationType.F64 else np.float32)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise FileFormatError(file.path, name, "holds numbers that are negative, NaN or infinite")
    return values
