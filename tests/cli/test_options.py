from dataclasses import asdict
from inspect import signature

import pytest

from griffin_gguf.cli import options
from griffin_gguf.cli.commands.chat import chat
from griffin_gguf.cli.commands.export_ollama import export_ollama
from griffin_gguf.cli.commands.generate import generate
from griffin_gguf.quant.recipes import FILE_TYPES
from griffin_gguf.runtime.sampling import Sampling


def test_help_names_the_types_there_are() -> None:
    assert tuple(FILE_TYPES) == options.TYPES


def test_types_are_canonical_and_each_there_once() -> None:
    assert options.parse_types(["q4_k_m", "BF16", "Q4_K_M"]) == ["Q4_K_M", "BF16"]


@pytest.mark.parametrize("command", [generate, chat, export_ollama])
def test_sampling_defaults_are_the_librarys(command: object) -> None:
    defaults = {name: p.default for name, p in signature(command).parameters.items()}  # type: ignore[arg-type]
    assert all(defaults[name] == value for name, value in asdict(Sampling()).items() if name in defaults)
    assert {"temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"} <= defaults.keys()
