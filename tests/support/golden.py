"""Greedy text of the built-in model; run as a program, it writes the golden answers anew."""

import json
import tempfile
from pathlib import Path

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.runtime import Model, load

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "golden" / "demo.json"
COUNT = 64
PROMPTS = (
    "It was a fine morning in May, and Elizabeth",
    "<start_of_turn>user\nWhat is a cynic?<end_of_turn>\n<start_of_turn>model\n",
)


def greedy(model: Model, prompt: str) -> list[int]:
    """The `COUNT` likeliest tokens after `prompt`, one at a time, stop tokens and all."""
    state = model.new_state()
    logits = model.forward(model.tokenizer.encode(prompt, special=True), state)
    answer: list[int] = []
    while len(answer) < COUNT:
        answer.append(int(logits.argmax()))
        logits = model.forward(answer[-1:], state)
    return answer


def main() -> None:
    """Write the reference backend's answers."""
    answers: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        targets = [(Path(folder) / f"{name}.gguf", name) for name in FILE_TYPES]
        convert(ROOT / "cli" / "demo_model", targets)
        for path, name in targets:
            with load(path, backend="numpy") as model:
                answers[name] = {prompt: greedy(model, prompt) for prompt in PROMPTS}
    FILE.write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
