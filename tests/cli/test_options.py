from dataclasses import asdict
from inspect import signature

import pytest
import typer

from griffin_gguf.cli import options
from griffin_gguf.cli.commands.chat import chat
from griffin_gguf.cli.commands.export_ollama import export_ollama
from griffin_gguf.cli.commands.generate import generate
from griffin_gguf.runtime.sampling import Sampling


def test_types_are_canonical_and_each_there_once() -> None:
    assert options.parse_types(["q4_k_m", "BF16", "Q4_K_M"]) == ["Q4_K_M", "BF16"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4.5GB", 4_500_000_000), ("2GiB", 2 << 30), ("500M", 500_000_000), ("1k", 1000), ("77", 77), (" 1 b", 1)],
)
def test_sizes(text: str, expected: int) -> None:
    assert options.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "1T", "1.5.2M", "0", "1e9", "big"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"is no size; expected one such as 4\.5GB"):
        options.parse_size(text)


@pytest.mark.parametrize("command", [generate, chat, export_ollama])
def test_sampling_defaults_are_the_librarys(command: object) -> None:
    defaults = {name: p.default for name, p in signature(command).parameters.items()}  # type: ignore[arg-type]
    assert all(defaults[name] == value for name, value in asdict(Sampling()).items() if name in defaults)
    assert {"temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"} <= defaults.keys()


def test_devices_come_in_order_with_their_layers() -> None:
    assert options.parse_devices(None, None) == {}
    found = options.parse_devices("rpc:10.0.0.2:50052, CPU", ["CPU=3"])
    assert list(found.items()) == [("rpc:10.0.0.2:50052", None), ("CPU", 3)]
    assert options.parse_devices("rpc:a:1", ["rpc:a:1=26"]) == {"rpc:a:1": 26}


@pytest.mark.parametrize(
    ("device", "layers_on"),
    [("CPU,CPU", None), ("CPU,", None), (None, ["CPU=1"]), ("CPU", ["Metal=1"]), ("CPU", ["CPU"]), ("CPU", ["CPU=-1"]),
     ("CPU", ["CPU=1", "CPU=2"])],
)  # fmt: skip
def test_devices_that_cannot_be_meant(device: str | None, layers_on: list[str] | None) -> None:
    with pytest.raises(typer.BadParameter, match="expected"):
        options.parse_devices(device, layers_on)
