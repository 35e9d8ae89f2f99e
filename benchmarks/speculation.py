"""What speculation wins and what it can lose: answers drafted by lookup, and by a drafter of a given accuracy.

python benchmarks/speculation.py MODEL.gguf [--tokens 200] [--rounds 3] [--threads 2]

On a file with true shapes and random weights, which says nothing of its own: its logits are computed, and then the
next token of a given text is made the likeliest. The texts: a passage that stands in the prompt, told again; prose that
goes on; random tokens. Then the demo model, which speaks for itself. Plain and drafted runs take turns.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scale import DEMO, machine

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.generate import Generation, generate
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.speculate import GRADES, Draft, Drafter, PromptLookup, Speculation
from griffin_gguf.runtime.state import State

GREEDY = Sampling(temperature=0)
HELD_OUT = DEMO / "heldout.txt"


class Scripted:
    """A model that computes as ever and says the tokens of `script` from position `begin` on."""

    def __init__(self, model: Model, script: Sequence[int], begin: int) -> None:
        self._model, self._script, self._begin = model, script, begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, tokens: Sequence[int], state: State, every: bool = False, trace: bool = False) -> Any:
        """As of a model."""
        logits = self._model.forward(tokens, state, every, trace)
        rows = logits if every else logits[None]
        for i, row in enumerate(rows):
            at = state.position - len(rows) + 1 + i - self._begin
            if 0 <= at < len(self._script):
                row[self._script[at]] = 1000
        return logits


class Accurate:
    """Drafts what comes, each token wrong with a given chance."""

    def __init__(self, script: Sequence[int], begin: int, accuracy: float) -> None:
        self._script, self._begin, self._accuracy = script, begin, accuracy
        self._random = np.random.default_rng(0)
        self.forget()

    def read(self, tokens: Sequence[int]) -> None:
        """See `Drafter`."""
        self._read += len(tokens)

    def draft(self, last: int, most: int) -> Draft:
        """See `Drafter`."""
        at = self._read + 1 - self._begin
        right = self._random.random(most) < self._accuracy
        tokens = [t if ok else t ^ 1 for t, ok in zip(self._script[at : at + most], right, strict=False)]
        return Draft(tokens, [GRADES - 1] * len(tokens))

    def forget(self) -> None:
        """See `Drafter`."""
        self._read = 0


@dataclass
class Text:
    """A prompt and what is said after it."""

    name: str
    prompt: list[int]
    script: list[int]


def texts(model: Model, count: int) -> list[Text]:
    """The scripts, of so many tokens."""
    prose = model.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))
    passage, more = prose[: count + 50], prose[count + 50 : 2 * count + 50]
    noise = np.random.default_rng(0).integers(3, model.tokenizer.vocab_size, count).tolist()
    edited = [t if (i + 1) % 25 else more[i] for i, t in enumerate(passage[20 : 20 + count])]
    return [
        Text("the prompt's text again", passage, passage[20 : 20 + count]),
        Text("again, each 25th token new", passage, edited),
        Text("prose that goes on", passage, more),
        Text("random tokens", passage, noise),
    ]


def main() -> None:
    """Print speeds, plain and drafted, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(machine())
    with load(arguments.model, threads=arguments.threads) as model:
        for text in texts(model, arguments.tokens):
            scripted: Any = Scripted(model, text.script, len(text.prompt))
            compare(f"lookup, {text.name}", scripted, text, PromptLookup, arguments.rounds)
        for accuracy in (0.0, 0.5, 0.8, 0.9, 0.95, 1.0):
            compare(
                f"drafts {accuracy:.0%} right",
                scripted,
                text,
                lambda a=accuracy: Accurate(text.script, len(text.prompt), a),
                arguments.rounds,
            )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.gguf"
        convert(DEMO, [(path, "Q4_K_M")])
        with load(path, threads=1) as model:
            for text in texts(model, 2 * arguments.tokens)[:1]:
                compare("lookup, the demo model", model, text, PromptLookup, arguments.rounds)


def compare(name: str, model: Model, text: Text, drafter: Callable[[], Drafter], rounds: int) -> None:
    """Run plain and drafted in turn, and print a line."""
    ratios, plain_rates, told = list[float](), list[float](), ""
    same = True
    for _ in range(rounds):
        plain, drafted = (run(model, text, d) for d in (None, drafter))
        ratios.append(plain.decode_seconds / drafted.decode_seconds)
        plain_rates.append(plain.decode_rate)
        same &= plain.tokens == drafted.tokens
        told = f"{drafted.accepted} of {drafted.drafted} drafted right"
    print(
        f"{name:36} plain {median(plain_rates):7.2f} tokens/s, times {median(ratios):.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}), {told}, {'the same text' if same else 'ANOTHER TEXT'}",
        flush=True,
    )


def run(model: Model, text: Text, drafter: Callable[[], Drafter] | None) -> Generation:
    """One answer to its end."""
    speculation = None if drafter is None else Speculation(model, drafter())
    generation = generate(model, model.new_state(), text.prompt, GREEDY, len(text.script), speculation=speculation)
    for _ in generation:
        pass
    return generation


if __name__ == "__main__":
    main()
