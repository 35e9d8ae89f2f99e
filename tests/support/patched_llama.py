"""A program: logits of a patched llama.cpp, through llama-cpp-python's bindings of the same release.

python patched_llama.py MODEL OUT.npy < plan.json, where LLAMA_CPP_LIB_PATH is the folder of the patched libllama. The
plan: `batches`, each a list of [sequence, position, tokens], and parameters of the context; with `forget_between`, each
batch finds sequence 0 without a past. OUT is f32 [tokens of all batches, V], in their order.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """Tokens of a sequence, the first at `position`."""

    sequence: int
    position: int
    tokens: Sequence[int]


def logits(programs: Path, model: Path, batches: Sequence[Sequence[Part]], **context: Any) -> NDArray[np.float32]:
    """Logits of every token of the batches, [T, V], from an empty context with these parameters."""
    plan = {"batches": [[(p.sequence, p.position, list(map(int, p.tokens))) for p in batch] for batch in batches]}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        done = subprocess.run(
            [sys.executable, __file__, model, out],
            input=json.dumps(plan | context),
            env=os.environ | {"LLAMA_CPP_LIB_PATH": str(programs)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(out)


def main() -> None:
    """See the module's head."""
    import llama_cpp as lib

    plan = json.load(sys.stdin)
    batches, forget = plan.pop("batches"), plan.pop("forget_between", False)
    silent = lib.llama_log_callback(lambda level, text, data: None)
    if "loud" not in plan:
        lib.llama_log_set(silent, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
    assert model, "the model does not load"
    params = lib.llama_context_default_params()
    params.n_threads = params.n_threads_batch = 1
    for name, value in plan.items():
        setattr(params, name, value)
    context = lib.llama_init_from_model(model, params)
    assert context, "no context"
    width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows: list[NDArray[np.float32]] = []
    for batch in batches:
        rows += _decode(lib, context, batch, width)
        if forget:
            lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, -1, -1)
    np.save(sys.argv[2], np.stack(rows))


def _decode(lib: Any, context: Any, parts: list[Any], width: int) -> list[NDArray[np.float32]]:
    count = sum(len(tokens) for _, _, tokens in parts)
    batch = lib.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    index = 0
    for sequence, position, tokens in parts:
        for offset, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position + offset
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, 1
            index += 1
    status = lib.llama_decode(context, batch)
    assert status == 0, f"llama_decode: {status}"
    found = [np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (width,)).copy() for i in range(count)]
    lib.llama_batch_free(batch)
    return found


if __name__ == "__main__":
    main()
