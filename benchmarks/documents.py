"""What beginning behind a document saves: time to the first token from its state, and from its text, read anew.

python benchmarks/documents.py MODEL.gguf [-f TEXT] [--tokens 1000,10000,60000] [--rounds 7] [--threads 1]

Both begin with the model loaded and end with the logits behind a prompt of a few words; the files are in the page
cache. Processor time stands beside wall time, for a machine that is shared.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from scale import machine

import griffin_gguf.cli
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.documents import read
from griffin_gguf.runtime.places import VARIABLE
from griffin_gguf.runtime.reading import Part
from griffin_gguf.runtime.state import CHUNK

HELD_OUT = Path(griffin_gguf.cli.__file__).with_name("demo_model") / "heldout.txt"
PROMPT = "\n\nWhat was said of the weather?"


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-f", "--text", type=Path, default=HELD_OUT)
    parser.add_argument("--tokens", default="1000,10000,60000")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder, load(arguments.model, threads=arguments.threads) as model:
        os.environ[VARIABLE] = folder
        ids = model.tokenizer.encode(arguments.text.read_text(encoding="utf-8"), bos=False)
        for count in map(int, arguments.tokens.split(",")):
            compare(model, model.tokenizer.decode(ids[:count]), count, arguments.rounds)


def compare(model: Model, text: str, count: int, rounds: int) -> None:
    """Time both ways in turn, so that a noisy machine hits both."""
    document = read(model, [Part.text("text", text)], f"first-{count}", "text")
    prompt = model.tokenizer.encode(PROMPT, bos=False)

    def with_document() -> None:
        model.forward(prompt, model.new_state(document.snapshot(model)))

    def anew() -> None:
        state, ids = model.new_state(), model.tokenizer.encode(text) + prompt
        for start in range(0, len(ids), CHUNK):
            model.forward(ids[start : start + CHUNK], state)

    times = [(seconds(with_document), seconds(anew)) for _ in range(rounds)]
    for i, name in enumerate(("from the document", "read anew")):
        wall, cpu = (median(row[i][j] for row in times) for j in range(2))
        print(f"{document.tokens:>7} tokens  {name:18} {wall * 1e3:10.1f} ms wall {cpu * 1e3:10.1f} ms CPU")


def seconds(job: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU time of one call."""
    wall, cpu = perf_counter(), process_time()
    job()
    return perf_counter() - wall, process_time() - cpu


if __name__ == "__main__":
    main()
