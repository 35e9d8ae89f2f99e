"""Our speed against llama.cpp's own, on models of one size: it runs a Gemma of the 2B's shapes, we RecurrentGemma.

python benchmarks/llamacpp.py FOLDER [--types Q4_K_M ...] [--rounds 7] [--threads 2]

FOLDER keeps the files of random weights (some 14 GB for all four types). The models are not quite of one size, so
decode is given by bytes of weights read, and prefill by multiplications. Both run in turn, round by round: a
machine's mood hits both alike. Ours is given with weights mapped from the file ("mapped"), and with a copy beside them
in the order of the CPU's own kernels for single tokens ("both"). llama.cpp is what llama-cpp-python installs, with its
own defaults but for threads.
"""

import argparse
import ctypes
from pathlib import Path
from statistics import median

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from scale import machine, random_gguf
from timing import seconds

from griffin_gguf.runtime import Model
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import compute_threads
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import Buffers, Tuning

THEIRS = "llama.cpp"
PROMPT = 512
DECODED = 8  # tokens a round

_SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)  # it tells on stderr what it loads


class Llama:
    """llama.cpp on one sequence, with neither sampling nor Python between its tokens."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 2 * PROMPT, PROMPT, PROMPT
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, path

    def forget(self) -> None:
        """Back to an empty context."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def forward(self, tokens: NDArray[np.int32]) -> None:
        """Feed tokens; the logits of the last are computed and waited for."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        assert status == 0, status
        assert llama_cpp.llama_get_logits_ith(self._context, -1)

    def close(self) -> None:
        """Give the memory back."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def matrices(path: Path) -> tuple[int, int]:
    """Bytes of weights that one token reads, and multiplications that one token of a prompt takes without the head."""
    with GgufFile.open(path) as file:
        found = [t for t in file.tensors.values() if len(t.shape) > 1 and "conv1d" not in t.name]
    return sum(t.nbytes for t in found), sum(int(np.prod(t.shape)) for t in found if t.name != "token_embd.weight")


def opened(path: Path, threads: int, buffers: Buffers) -> Model:
    """Our model with weights where `buffers` says."""
    file = GgufFile.open(path)
    backend = GgmlBackend(file, Tuning(threads, buffers))
    return Model(file, Tokenizer.from_gguf(path, file.metadata), backend)


def compare(folder: Path, type: str, rounds: int, threads: int) -> None:
    """Print the rows of one type: the speeds, and ours as parts of llama.cpp's."""
    ours, theirs = random_gguf(folder, "2b", type), random_gguf(folder, "2b", type, gemma=True)
    models = {buffers: opened(ours, threads, buffers) for buffers in ("mapped", "both")}
    states = {name: model.new_state() for name, model in models.items()}
    llama = Llama(theirs, threads)
    prompt = np.random.default_rng(0).integers(3, 256000, PROMPT).astype(np.int32)

    def forward(name: str, tokens: NDArray[np.int32]) -> None:
        if name in models:
            models[name].forward(tokens, states[name])
        else:
            llama.forward(tokens)

    names = [*models, THEIRS]
    decode: dict[str, list[float]] = {name: [] for name in names}
    prefill: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):  # the first warms up
        llama.forget()
        for state in states.values():
            state.reset()
        for name in names:
            prefill[name].append(seconds(lambda name=name: forward(name, prompt)))
        for name in names:
            times = [seconds(lambda name=name: forward(name, prompt[:1])) for _ in range(DECODED)]
            decode[name].append(median(times))
    llama.close()
    for model in models.values():
        model.close()
    (bytes_ours, work_ours), (bytes_theirs, work_theirs) = matrices(ours), matrices(theirs)
    _print(f"{type} decode", "GB/s", (bytes_ours / 1e9, bytes_theirs / 1e9), decode)
    flops = 2 * PROMPT / 1e9
    _print(f"{type} prefill", "GFLOP/s", (flops * work_ours, flops * work_theirs), prefill)


def _print(name: str, unit: str, work: tuple[float, float], times: dict[str, list[float]]) -> None:
    """A line for each way of ours; `work` is ours and llama.cpp's of one run."""
    theirs = [work[1] / t for t in times[THEIRS][1:]]
    for way in times:
        if way != THEIRS:
            ours = [work[0] / t for t in times[way][1:]]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            print(f"{name:15} {way:7} {median(ours):7.1f} {unit}, llama.cpp {median(theirs):7.1f} {unit}, "
                  f"ratio {median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})", flush=True)  # fmt: skip


def main() -> None:
    """Compare every type asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q5_K_M", "Q8_0", "Q2_K"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=compute_threads())
    arguments = parser.parse_args()
    print(machine())
    for type in arguments.types:
        compare(arguments.folder, type, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
