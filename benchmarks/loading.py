"""Time from process start to the first token, by what takes it, on a file in the page cache.

python benchmarks/loading.py MODEL.gguf [--rounds 7] [--threads 2]

Every round is a fresh process: imports (Python itself, all packages, ggml's libraries), then `load`, one token as
the prompt, its logits. Wall time, and processor time of all threads, which a busy machine changes less; medians.
`griffin generate -n 1` is the same for a person, with what the command imports and with sampling.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

_IMPORTS, _AFTER = "imports", "beyond imports"
_PARTS = ("header", "tokenizer", "weights", "first token")


class Clock:
    """Seconds of wall and of processor time that each part took."""

    def __init__(self) -> None:
        self.parts = {name: [0.0, 0.0] for name in _PARTS}

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Count every call of `owner.name`, a method or class method, as `part`."""
        original = getattr(owner, name)
        setattr(owner, name, lambda *args: self.count(part, lambda: original(*args)))

    def count(self, part: str, job: Callable[[], Any]) -> Any:
        """Do `job` as a part, less what of it belongs to parts inside it."""
        inside = [sum(column) for column in zip(*self.parts.values(), strict=True)]
        wall, processor = time.monotonic(), time.process_time()
        result = job()
        took = time.monotonic() - wall, time.process_time() - processor
        outside = [sum(column) for column in zip(*self.parts.values(), strict=True)]
        for i, seconds in enumerate(took):
            self.parts[part][i] += seconds - (outside[i] - inside[i])
        return result


def first_token(path: Path, threads: int | None, started: float) -> dict[str, list[float]]:
    """Load and run in this process, begun at `started`; seconds of each part."""
    import griffin_gguf.runtime.backends.ggml  # noqa: F401 - `load` imports it when it is called
    from griffin_gguf.runtime import load
    from griffin_gguf.runtime.ggml import abi
    from griffin_gguf.runtime.gguf_file import GgufFile
    from griffin_gguf.runtime.tokenizer import Tokenizer

    abi.load()
    imports = [time.monotonic() - started, time.process_time()]
    clock = Clock()
    clock.wrap(GgufFile, "open", "header")
    clock.wrap(GgufFile, "hyperparameters", "header")
    clock.wrap(Tokenizer, "from_gguf", "tokenizer")
    model = clock.count("weights", lambda: load(path, backend="ggml", threads=threads))
    clock.count("first token", lambda: model.forward(model.tokenizer.encode("")[:1], model.new_state()))
    after = [time.monotonic() - started - imports[0], time.process_time() - imports[1]]
    return {_IMPORTS: imports, **clock.parts, _AFTER: after}


def _fresh(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """One round of `first_token`."""
    command = [sys.executable, __file__, str(arguments.model), "--started", str(time.monotonic())]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _generate(arguments: argparse.Namespace) -> float:
    """Wall time of the command."""
    command = [sys.executable, "-m", "griffin_gguf.cli", "generate", str(arguments.model), "-p", "a", "-n", "1"]
    command += ["--threads", str(arguments.threads)] if arguments.threads else []
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    """Print every part's median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.started is not None:
        print(json.dumps(first_token(arguments.model, arguments.threads, arguments.started)))
        return
    from scale import machine  # here: a round's own imports are measured

    print(machine())
    _fresh(arguments)  # brings the file into the page cache
    rounds = [_fresh(arguments) for _ in range(arguments.rounds)]
    for part in rounds[0]:
        wall, processor = (median(found[part][i] for found in rounds) for i in (0, 1))
        print(f"{part:15} {wall:6.3f} s, processor {processor:6.3f} s", flush=True)
    print(f"griffin generate -n 1, process and all: {median(_generate(arguments) for _ in rounds):.3f} s")


if __name__ == "__main__":
    main()
