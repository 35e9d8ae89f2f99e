"""What scripts/test-llamacpp runs with: the programs of griffin llamacpp build, and the demo model in all types."""

import os
from pathlib import Path

import pytest
from llama_programs import held_out, run
from served_models import CHECKPOINT

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.quant.imatrix import ImportanceMatrix

_VARIABLE = "GRIFFIN_LLAMACPP"


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of llama.cpp's patched programs and libraries."""
    folder = Path(os.environ.get(_VARIABLE, ""), "build", "bin")
    assert (folder / "llama-server").exists(), f"{_VARIABLE} must name a folder that griffin llamacpp build has filled"
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model by file type, of those that need no importance matrix."""
    folder = tmp_path_factory.mktemp("demo")
    files = {name: folder / f"demo-{name}.gguf" for name, type in FILE_TYPES.items() if not type.needs_importance}
    convert(CHECKPOINT, [(path, name) for name, path in files.items()])
    return files


@pytest.fixture(scope="session")
def imatrix(programs: Path, plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An importance matrix of the demo model by llama-imatrix."""
    folder = tmp_path_factory.mktemp("imatrix")
    target = folder / "imatrix.gguf"
    text = held_out(folder, 40_000)
    run(programs / "llama-imatrix", "-m", plain["BF16"], "-f", text, "-o", target, "-c", "256", "-t", "1")
    return target


@pytest.fixture(scope="session")
def demo(plain: dict[str, Path], imatrix: Path) -> dict[str, Path]:
    """The demo model in all file types, those that need it with that importance matrix."""
    folder = imatrix.parent
    files = {name: folder / f"demo-{name}.gguf" for name, type in FILE_TYPES.items() if type.needs_importance}
    convert(CHECKPOINT, [(path, name) for name, path in files.items()], imatrix=ImportanceMatrix.load(imatrix))
    return plain | files
