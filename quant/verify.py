"""Whether a GGUF is sound: its structure, every number that a block hangs on, and the checksums it records.

Everything is read once, by plain reads in pieces and never through the map, one tensor to a thread; so memory does
not depend on the file, and one that changes meanwhile is a finding like any other.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from griffin_gguf.quant.blocks import NUMBERS, damage
from griffin_gguf.runtime.arch import ARCHITECTURE, CHECKSUMS, Transform
from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.gguf_header import TensorInfo, padded
from griffin_gguf.runtime.gguf_shards import Shard
from griffin_gguf.runtime.machine import checked_threads, usable_cores
from griffin_gguf.runtime.tokenizer import Tokenizer

#: (done, total) bytes of tensors.
Progress = Callable[[int, int], None]

_PIECE = 4 << 20  # bytes that a thread reads at a time
_PATIENCE = 0.1  # seconds between two reports of progress

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Verification:
    """What was found, each a line that names file and field: `damaged` what must not be, `odd` what merely should not.

    `unchecked` says what could not be looked at. `paths` are the files read, with `tensors` tensors of `size` bytes.
    """

    paths: list[Path]
    tensors: int = 0
    size: int = 0
    damaged: list[str] = field(default_factory=list[str])
    odd: list[str] = field(default_factory=list[str])
    unchecked: list[str] = field(default_factory=list[str])

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged


def verify(
    path: Path, *, sha256: bool = False, threads: int | None = None, progress: Progress | None = None
) -> Verification:
    """Check the GGUF at `path`, of any architecture, and with `sha256` its bytes against the checksums it records.

    All that is wrong with the file comes back, none of it is raised. Raises `FileFormatError` for what is no file
    or cannot be read, `UnsupportedError` where there are no checksums to compare with, and for a number of threads
    that cannot be.
    """
    threads = checked_threads(threads) or usable_cores()
    try:
        file = GgufFile.open(path)
    except GriffinError as error:
        if not path.is_file() or not os.access(path, os.R_OK):
            raise
        return Verification([path], damaged=[str(error)])
    with file:
        if sha256 and CHECKSUMS not in file.metadata:
            raise UnsupportedError(f"{path}: {CHECKSUMS}: is missing: the file records no checksums to compare with")
        found = Verification(list(file.paths), len(file.tensors), sum(info.nbytes for info in file.tensors.values()))
        decays = _check_structure(file, found)
        try:
            found.odd += [str(error) for shard in file.shards for error in _untidy(shard)]
            results = _check_tensors(file, decays, sha256, threads, progress)
            found.damaged += [str(error) for result in results for error in result.errors]
            if sha256:
                digests = dict(zip(file.tensors, (result.digest for result in results), strict=True))
                found.damaged += map(str, _compare(file, digests))
            file.check_unchanged()
        except FileFormatError as error:
            found.damaged.append(str(error))
        return found


def _check_structure(file: GgufFile, found: Verification) -> frozenset[str]:
    """Check what the keys say, and the tensors against it; the names of those that hold decays."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        found.unchecked.append(
            f"{file.path}: general.architecture: this is {architecture!r}, so hyperparameters, names and shapes of "
            "tensors and the tokenizer were not checked"
        )
        return frozenset()
    for load in (Tokenizer.from_gguf, ChatTemplate.from_gguf):
        try:
            load(file.path, file.metadata)
        except GriffinError as error:
            found.damaged.append(str(error))
    try:
        hp = file.declared()
    except GriffinError as error:
        found.damaged.append(str(error))
        return frozenset()
    found.damaged += map(str, file.misfits(hp))
    return frozenset(tensor.name for tensor in hp.tensors() if tensor.spec.transform is Transform.DECAY)


def _untidy(shard: Shard) -> Iterator[FileFormatError]:
    """Padding that is not zero, and bytes after the last tensor's."""
    header = shard.header
    ends = [("header", header.end)] + [(info.name, info.offset + info.nbytes) for info in header.tensors.values()]
    for name, end in ends:
        stop = min(padded(end, header.alignment), shard.size)
        if end < stop and shard.read(end, stop, name).any():
            yield FileFormatError(shard.path, name, f"the {stop - end} bytes of padding after it are not all zero")
    last = padded(ends[-1][1], header.alignment)
    if shard.size > last:
        yield FileFormatError(shard.path, "file", f"{shard.size - last} bytes follow the last tensor")


@dataclass
class _Checked:
    """What reading one tensor brought."""

    errors: list[FileFormatError]
    digest: str


def _check_tensors(
    file: GgufFile, decays: frozenset[str], sha256: bool, threads: int, progress: Progress | None
) -> list[_Checked]:
    """Read every tensor, the largest first so that no thread is left with it at the end; results in file order."""
    total = sum(info.nbytes for info in file.tensors.values())
    done, lock, stop = 0, Lock(), Event()

    def advance(count: int) -> bool:
        nonlocal done
        with lock:
            done += count
        return not stop.is_set()

    with ExitStack() as stack:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        stack.callback(stop.set)
        futures: dict[str, Future[_Checked]] = {}
        for info in sorted(file.tensors.values(), key=lambda info: -info.nbytes):
            futures[info.name] = pool.submit(_check_tensor, file, info, info.name in decays, sha256, advance)
        pending = set(futures.values())
        while pending:
            finished, pending = wait(pending, _PATIENCE, FIRST_COMPLETED)
            for future in finished:
                future.result()  # raises what is our own fault
            if progress:
                progress(done, total)
        return [futures[name].result() for name in file.tensors]


def _check_tensor(
    file: GgufFile, info: TensorInfo, decays: bool, sha256: bool, advance: Callable[[int], bool]
) -> _Checked:
    """Read one tensor piece by piece; `advance` takes the bytes read and says whether to go on."""
    checks = _Values(info, decays)
    digest = hashlib.sha256()
    path = file.paths[info.part]
    block_bytes = GGML_QUANT_SIZES[info.type][1]
    step = max(1, _PIECE // block_bytes) * block_bytes
    for start in range(0, info.nbytes, step):
        try:
            piece = file.read(info.name, start, min(start + step, info.nbytes))
        except FileFormatError as error:
            return _Checked([error], "")
        checks.add(piece)
        if sha256:
            digest.update(piece.data)
        if not advance(piece.nbytes):
            break
    return _Checked([FileFormatError(path, info.name, line) for line in checks.problems()], digest.hexdigest())


class _Values:
    """The numbers of one tensor, piece after piece."""

    def __init__(self, info: TensorInfo, decays: bool) -> None:
        self._type = info.type
        self._decays = decays and info.type is T.F32
        self._block, self._block_bytes = GGML_QUANT_SIZES[info.type]
        self._blocks = 0  # so far
        self._bad = self._above = 0
        self._first = ""

    def add(self, piece: NDArray[np.uint8]) -> None:
        """Check whole blocks, which follow those before."""
        if self._type in NUMBERS and (found := damage(self._type, piece)):
            if not self._bad:
                what = "element" if self._block == 1 else "block"
                self._first = f"{what} {self._blocks + found.first}: {found.problem}"
            self._bad += found.count
        if self._decays:
            self._above += int((piece.view(np.float32) > 0).sum())
        self._blocks += piece.nbytes // self._block_bytes

    def problems(self) -> Iterator[str]:
        """What is wrong with them."""
        if self._type not in NUMBERS:
            yield f"the type {self._type.name} has no place in files"
        if self._bad:
            others = f" ({self._bad} such of {self._blocks})" if self._bad > 1 else ""
            yield self._first + others
        if self._above:
            yield f"expected no number above 0, since -8·softplus(Λ) has none, found {self._above}"


def _compare(file: GgufFile, digests: dict[str, str]) -> Iterator[FileFormatError]:
    """Set the tensors' checksums against those that the file records: in the order that fits them best."""
    if file.types[CHECKSUMS] != (GGUFValueType.ARRAY, GGUFValueType.STRING):
        yield FileFormatError(file.path, CHECKSUMS, "expected an array of strings")
        return
    recorded: list[str] = file.metadata[CHECKSUMS]
    if len(recorded) != len(digests):
        yield FileFormatError(
            file.path, CHECKSUMS, f"expected {len(digests)} checksums, one a tensor, found {len(recorded)}"
        )
        return
    expected = min(
        (dict(zip(names, recorded, strict=True)) for names in _orders(file)),
        key=lambda each: sum(each[name] != digest for name, digest in digests.items()),
    )
    for i, (name, digest) in enumerate(expected.items()):
        info = file.tensors[name]
        if not _SHA256.fullmatch(digest):
            yield FileFormatError(file.path, f"{CHECKSUMS}[{i}]", "expected the 64 hex digits of a SHA-256")
        elif digests[name] and digests[name] != digest:
            yield FileFormatError(file.paths[info.part], name, f"its SHA-256 is not the one in {CHECKSUMS}")


def _orders(file: GgufFile) -> Iterator[list[str]]:
    """In which the checksums may stand: the file's, and the one that we write.

    llama-quantize writes tensors in an order of its own, and carries all keys along.
    """
    yield list(file.tensors)
    try:
        written = [tensor.name for tensor in file.declared().tensors()]
    except GriffinError:  # of another architecture, or damaged, which is told elsewhere
        return
    if set(written) == set(file.tensors):
        yield written
