"""A program: logits of a patched llama.cpp, through llama-cpp-python's bindings of the same release.

python patched_llama.py MODEL OUT.npy < plan.json, where LLAMA_CPP_LIB_PATH is the folder of the patched libllama. The
plan: `steps`, each a batch or something done to the memory, and parameters of the context. OUT is f32 [tokens of all
batches, V], in their order.
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


#: A batch, or what is done between batches: ("forget", sequence, first position), ("copy", from, to), ("carry", from,
#: to), which saves a sequence's state and loads it as another's.
Step = Sequence[Part] | tuple[str, int, int]


def logits(programs: Path, model: Path, steps: Sequence[Step], **context: Any) -> NDArray[np.float32]:
    """Logits of every token of the batches, [T, V], from an empty context with these parameters."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        done = subprocess.run(
            [sys.executable, __file__, model, out],
            input=json.dumps({"steps": [_plain(step) for step in steps]} | context),
            env=os.environ | {"LLAMA_CPP_LIB_PATH": str(programs)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(out)


def _plain(step: Step) -> list[Any]:
    return [
        [part.sequence, part.position, list(map(int, part.tokens))] if isinstance(part, Part) else part for part in step
    ]


def main() -> None:
    """See the module's head."""
    import llama_cpp as lib

    plan = json.load(sys.stdin)
    steps = plan.pop("steps")
    said: list[str] = []
    keep = lib.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    lib.llama_log_set(keep, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
    assert model, "".join(said)
    params = lib.llama_context_default_params()
    params.n_threads = params.n_threads_batch = 1
    params.swa_full = False  # as llama.cpp's programs have it: no keys are kept but the window's
    for name, value in plan.items():
        setattr(params, name, value)
    context = lib.llama_init_from_model(model, params)
    assert context, "no context"
    vocab = lib.llama_model_get_vocab(model)
    assert vocab
    width = lib.llama_vocab_n_tokens(vocab)
    rows: list[NDArray[np.float32]] = []
    for step in steps:
        if isinstance(step[0], str):
            _change(lib, context, *step)
        else:
            rows += _decode(lib, context, step, width)
    np.save(sys.argv[2], np.stack(rows))


def _change(lib: Any, context: Any, what: str, first: int, second: int) -> None:
    memory = lib.llama_get_memory(context)
    if what == "forget":
        assert lib.llama_memory_seq_rm(memory, first, second, -1), f"sequence {first} cannot go back to {second}"
    elif what == "copy":
        lib.llama_memory_seq_cp(memory, first, second, -1, -1)
    else:
        size = lib.llama_state_seq_get_size(context, first)
        state = (ctypes.c_uint8 * size)()
        assert lib.llama_state_seq_get_data(context, state, size, first) == size
        assert lib.llama_state_seq_set_data(context, state, size, second) == size


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
