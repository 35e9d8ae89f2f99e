"""`griffin quantize` with a target in place of a type."""

import re
from pathlib import Path

import pytest
from command import done, griffin, refused

from griffin_gguf.runtime.gguf_file import GgufFile


@pytest.fixture(scope="module")
def text(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((checkpoint / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def costs(models: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Costs measured once by the command itself, on 100 tokens."""
    folder = tmp_path_factory.mktemp("costs")
    mix(models, folder / "m.gguf", text, folder / "costs.json", "--target-bpw", "4.5")
    return folder / "costs.json"


def mix(models: Path, target: Path, text: Path, costs: Path, *arguments: str) -> str:
    """Write a mix of the demo model; what was said on stderr."""
    result = griffin("quantize", models / "demo_model-BF16.gguf", target, "-f", text, "-n", "100", "-t", "1",
                     "--costs", costs, *arguments)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_a_mix_of_so_many_bits(models: Path, text: Path, costs: Path, tmp_path: Path) -> None:
    said = mix(models, tmp_path / "m.gguf", text, costs, "--target-bpw", "4.5")
    assert "Measuring the mix" in said
    assert said.count("Measuring") == said.count("Measuring the mix")  # the costs were there
    assert re.search(r"mean KL to the source 0\.\d+ ± \S+ over 100 tokens, the same token first in \d+\.\d%", said)
    with GgufFile.open(tmp_path / "m.gguf") as file:
        bits = 8 * sum(info.nbytes for info in file.tensors.values()) / file.hyperparameters().parameters
        assert 4.4 < bits <= 4.5
        assert len({info.type for info in file.tensors.values()}) > 3
        assert file.metadata["griffin.recipe"].startswith("automatic mix")
    assert "sound" in done("verify", tmp_path / "m.gguf", "--sha256")
    assert "automatic mix" in done("inspect", tmp_path / "m.gguf")
    assert done("generate", tmp_path / "m.gguf", "-p", "It was", "-n", "4", "--temp", "0", "-t", "1")


def test_a_mix_of_so_many_bytes(models: Path, text: Path, costs: Path, tmp_path: Path) -> None:
    mix(models, tmp_path / "m.gguf", text, costs, "--target-size", "5MB")
    assert 4_900_000 < (tmp_path / "m.gguf").stat().st_size <= 5_000_000


def test_a_mix_of_so_small_a_loss(models: Path, text: Path, costs: Path, tmp_path: Path) -> None:
    said = mix(models, tmp_path / "m.gguf", text, costs, "--max-kl", "0.05")
    found = re.search(r"mean KL to the source (\S+) ±", said)
    assert found
    assert 0.03 < float(found[1]) <= 0.05
    assert (tmp_path / "m.gguf").stat().st_size < (models / "demo_model-Q8_0.gguf").stat().st_size


def test_a_dry_run_of_a_mix(models: Path, text: Path, costs: Path, tmp_path: Path) -> None:
    source, target = models / "demo_model-BF16.gguf", tmp_path / "m.gguf"
    table = done("quantize", source, target, "--target-bpw", "5", "-f", text, "-n", "100", "-t", "1", "--costs", costs,
                 "--dry-run")  # fmt: skip
    assert "would have" in table
    assert not target.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("Q4_K_M", "--target-bpw", "4"),
        ("--target-bpw", "4", "--max-kl", "0.1"),
        ("Q4_K_M", "--costs", "c.json"),
        ("--target-bpw", "4", "--pure"),
        ("--target-bpw", "4", "--tensor-type", "ffn=Q8_0"),
    ],
)
def test_one_thing_is_asked_for(models: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    refused("quantize", models / "demo_model-BF16.gguf", tmp_path / "m.gguf", *arguments, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--target-bpw", "4"), "needs a text"),
        (("--max-kl", "0.1"), "needs a text"),
        (("--target-bpw", "1.1", "-f", "text"), "no mix has 1.1 bits per weight; the smallest has"),
        (("--target-size", "1M", "-f", "text"), "the smallest takes"),
        (("--max-kl", "0", "-f", "text"), "cannot be kept"),
        (("--target-bpw", "4", "-f", "none.txt"), "none.txt"),
    ],
)
def test_what_cannot_be_had(
    models: Path, text: Path, costs: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    words = [str(text) if word == "text" else word for word in arguments]
    known = ("-n", "100", "--costs", costs) if "text" in arguments else ()
    line = refused_at_last("quantize", models / "demo_model-BF16.gguf", tmp_path / "m.gguf", *words, *known, "-t", "1")
    assert problem in line
    assert not list(tmp_path.iterdir())


def refused_at_last(*arguments: str | Path) -> str:
    """The line of an error that comes after progress was shown."""
    result = griffin(*arguments)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("griffin: error: ")
    return last


def test_costs_of_another_model(models: Path, text: Path, costs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    done("quantize", models / "demo_model-BF16.gguf", other, "F16", "-t", "1")
    line = refused_at_last("quantize", other, tmp_path / "m.gguf", "--target-bpw", "5", "-f", text, "-n", "100",
                           "--costs", costs, "-t", "1")  # fmt: skip
    assert "costs are of another file, text or importance matrix" in line
