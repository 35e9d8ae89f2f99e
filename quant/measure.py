"""One GGUF measured in a process of its own: speed, memory, perplexity.

A fresh process, because a peak of memory is the process's, and because a crash in native code then costs one row
of a report and not the report. It is started by `subprocess` and not `multiprocessing`, whose spawned children
import the program that started them, command line and all, and would count its memory as the model's.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray

from griffin_gguf.quant.evaluate import Progress, perplexity
from griffin_gguf.quant.file_types import RECIPE
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.errors import BackendError, GriffinError, UnsupportedError
from griffin_gguf.runtime.model import BackendName

Result = TypeVar("Result")

_PREFILL_TOKENS = 512
_PREFILL_RUNS = 4  # the first is a warm-up
_DECODE_TOKENS = 64
_SECONDS = 10.0  # each speed is measured for about this long at most


@dataclass(frozen=True)
class Measurement:
    """What one file costs and is worth. Sizes in bytes."""

    path: str
    type: str  # by its general.file_type
    backend: str
    parameters: int
    bits_per_weight: float  # of tensor data
    file_size: int
    load_seconds: float
    peak_rss: int  # after reading and writing text, before the perplexity
    rss_anonymous: int | None  # of it at that time: what the process allocated; Linux only
    rss_file: int | None  # and pages of mapped files, most of them weights
    prefill_speed: float  # tokens per second, median
    decode_speed: float
    perplexity: float
    perplexity_stderr: float
    bits_per_byte: float
    tokens: int  # predicted for the perplexity


def measure(
    path: Path,
    text: str,
    *,
    tokens: int,
    threads: int | None = None,
    backend: BackendName = "auto",
    progress: Progress | None = None,
) -> Measurement:
    """Measure the Griffin GGUF at `path` on at most `tokens` tokens of `text`, in a fresh process.

    Raises what loading the file raises, as a `GriffinError` with the same message, and `BackendError` where the
    process ends otherwise.
    """
    code = "from griffin_gguf.quant.measure import serve; serve()"
    request = {"path": str(path), "text": text, "tokens": tokens, "threads": threads, "backend": backend}
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            # What can be imported here can be there.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        ) as child,
    ):
        try:
            result = _converse(child, request, progress)
        except BaseException:
            child.kill()
            raise
        if result is None:
            status = child.wait()
            complaints.seek(0)
            last = (complaints.read().strip().splitlines() or ["no message"])[-1]
            raise BackendError(f"{path}: measuring it ended with status {status}: {last}")
        return result


def serve() -> None:
    """Be the fresh process: a request on stdin, lines of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints must not mix with the answers

    def answer(kind: str, value: Any) -> None:
        answers.write(json.dumps([kind, value]) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.buffer.read())
    try:
        result = _measure(**request, progress=lambda done, total: answer("progress", [done, total]))
    except GriffinError as error:
        answer("error", str(error))
    else:
        answer("result", asdict(result))


def _converse(child: "subprocess.Popen[str]", request: dict[str, Any], progress: Progress | None) -> Measurement | None:
    """Ask, and hear the answers; None where the process ended without one."""
    assert child.stdin
    assert child.stdout
    with suppress(BrokenPipeError), child.stdin:  # it may end before it has heard everything
        child.stdin.write(json.dumps(request))
    for line in child.stdout:
        kind, value = json.loads(line)
        if kind == "result":
            return Measurement(**value)
        if kind == "error":
            raise GriffinError(value)
        if progress:
            progress(*value)
    return None


def _measure(
    path: str, text: str, tokens: int, threads: int | None, backend: BackendName, progress: Progress
) -> Measurement:
    """Load, time, and score, in this process."""
    begun = perf_counter()
    model = load(path, backend=backend, threads=threads)
    load_seconds = perf_counter() - begun
    ids = model.tokenizer.encode(text)[: tokens + 1]
    if len(ids) < 3:
        raise UnsupportedError(f"a text of {len(ids) - 1} tokens is too short to measure; expected at least 2")
    prefill, decode = _speeds(model, ids)
    peak, anonymous, mapped = _memory()
    scored = perplexity(model, ids, progress)
    weights = sum(info.nbytes for info in model.file.tensors.values())
    return Measurement(
        path=path,
        type=type_name(model.file.metadata),
        backend=model.backend,
        parameters=model.hp.parameters,
        bits_per_weight=8 * weights / model.hp.parameters,
        file_size=model.file.size,
        load_seconds=load_seconds,
        peak_rss=peak,
        rss_anonymous=anonymous,
        rss_file=mapped,
        prefill_speed=prefill,
        decode_speed=decode,
        perplexity=scored.value,
        perplexity_stderr=scored.stderr,
        bits_per_byte=scored.bits_per_byte(len(model.tokenizer.decode(ids[1:]).encode())),
        tokens=scored.tokens,
    )


def type_name(metadata: Mapping[str, Any]) -> str:
    """Name the file type of a GGUF as `FILE_TYPES` does: Q4_K_M for general.file_type 15; else its recipe in words."""
    if isinstance(words := metadata.get(RECIPE), str):
        return words
    number = metadata.get("general.file_type")
    if number not in set(LlamaFileType):
        return "unknown"
    return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _speeds(model: Model, ids: Sequence[int]) -> tuple[float, float]:
    """Prefill and decode in tokens per second: medians, each of a few seconds' work."""
    prompt = ids[:_PREFILL_TOKENS]

    def prefill() -> tuple[Any, NDArray[np.float32]]:
        state = model.new_state()
        return state, model.forward(prompt, state)

    (state, logits), times = _repeat(prefill, _PREFILL_RUNS)

    def decode() -> None:
        nonlocal logits
        logits = model.forward([int(logits.argmax())], state)

    _, steps = _repeat(decode, _DECODE_TOKENS)
    return len(prompt) / statistics.median(times), 1 / statistics.median(steps)


def _repeat(work: Callable[[], Result], most: int) -> tuple[Result, list[float]]:
    """Do `work` up to `most` times, for `_SECONDS`; its last result, and the times it took but for the first."""
    times: list[float] = []
    while True:
        begun = perf_counter()
        result = work()
        times.append(perf_counter() - begun)
        if len(times) == most or sum(times) > _SECONDS:
            return result, times[1:] or times  # the first also builds graphs and touches pages


def _memory() -> tuple[int, int | None, int | None]:
    """Peak resident memory of this process; what is resident now as its own, and as pages of files."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss would count the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak, anonymous, mapped = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssFile"))
        return peak, anonymous, mapped
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, None, None  # macOS: in bytes
