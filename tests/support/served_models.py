"""The demo model as served in tests, and what it says without any server."""

import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from command import done
from rewriting import rewritten

import griffin_gguf.cli
from griffin_gguf.runtime import load
from griffin_gguf.runtime.chat import ChatTemplate, stop_tokens
from griffin_gguf.runtime.generate import generate
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.sampling import Sampling

CHECKPOINT = Path(griffin_gguf.cli.__file__).with_name("demo_model")
NAME, PLAIN, DOCUMENT = "demo_model-Q8_0", "plain", "demo_model-Q8_0@story"


@cache
def _converted() -> bytes:
    """The demo model as the command converts it, once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        done("convert", CHECKPOINT, "-o", folder, "--type", "Q8_0")
        return Path(folder, f"{NAME}.gguf").read_bytes()


def write_models(folder: Path) -> list[Path]:
    """`NAME`, and `PLAIN`, the same without a chat template."""
    model = folder / f"{NAME}.gguf"
    model.write_bytes(_converted())
    return [model, rewritten(model, folder / f"{PLAIN}.gguf", tokenizer__chat_template=None)]


def write_document(model: Path, data: Path) -> None:
    """`DOCUMENT`, for a server whose GRIFFIN_DATA is `data`."""
    with mock.patch.dict(os.environ, {"GRIFFIN_DATA": str(data)}):
        done("read", model, CHECKPOINT / "README.md", "--save", "story", "--threads", "1")


class Alone:
    """The model by itself, one text at a time: what a server's answers are to be."""

    def __init__(self, path: Path) -> None:
        self.model: Model = load(path, threads=1)
        metadata = self.model.file.metadata
        self.stops = stop_tokens(metadata, self.model.tokenizer)
        self.template = ChatTemplate.from_gguf(path, metadata)

    def chat_tokens(self, *messages: tuple[str, str]) -> list[int]:
        """A conversation's tokens."""
        assert self.template is not None
        turns = [{"role": role, "content": content} for role, content in messages]
        return self.template.encode(self.model.tokenizer, turns)

    def answer(self, tokens: Sequence[int], most: int, **sampling: Any) -> tuple[str, list[int]]:
        """Text and tokens of the answer; the likeliest token each time unless told otherwise."""
        values: dict[str, Any] = {"temperature": 0.0, **sampling}
        generation = generate(self.model, self.model.new_state(), tokens, Sampling(**values), most, self.stops)
        text = "".join(generation)
        return text, generation.tokens
