"""Fetching from a hub, in a process of its own: huggingface_hub reads its environment when it is imported."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import random_checkpoint
from stand_in_hub import Hub, stand_in_hub

from griffin_gguf.convert import convert
from griffin_gguf.convert.hub import resolve
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.gguf_file import GgufFile

NAME = "griffins/tiny-griffin"
PROGRAM = """
import sys
from pathlib import Path
from griffin_gguf.convert import convert
from griffin_gguf.runtime.errors import GriffinError
try:
    convert(sys.argv[1], [(Path(sys.argv[2]), "F16")])
except GriffinError as error:
    sys.exit(f"one line: {error}")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = random_checkpoint(tmp_path / "origin", shards=2)
    (folder / "README.md").write_text("---\nlicense: gemma\n---\n# A griffin\n")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with stand_in_hub(NAME, folder) as running:
        yield running


def run(hub: Hub, tmp_path: Path, name: str = NAME) -> subprocess.CompletedProcess[str]:
    home = str(tmp_path / "home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, name, str(tmp_path / "m.gguf")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_of_the_hub_becomes_the_same_file_as_its_folder(hub, tmp_path: Path):
    done = run(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert not any("pytorch_model.bin" in path for path in hub.asked)
    convert(hub.folder, [(tmp_path / "local.gguf", "F16")])
    with GgufFile.open(tmp_path / "m.gguf") as fetched, GgufFile.open(tmp_path / "local.gguf") as local:
        own = {"general.name": "tiny-griffin", "general.source.huggingface.repository": NAME}
        assert fetched.metadata == local.metadata | own
        assert fetched.metadata["general.license"] == "gemma"
        for tensor in local.tensors:
            assert fetched.data(tensor).tobytes() == local.data(tensor).tobytes()


def test_what_is_in_the_cache_is_not_fetched_again(hub, tmp_path: Path):
    assert run(hub, tmp_path).returncode == 0
    hub.asked.clear()
    assert run(hub, tmp_path).returncode == 0
    assert not any(path.endswith(".safetensors") for path in hub.asked)


def test_failures_are_one_line_and_leave_no_file(hub, tmp_path: Path):
    absent = run(hub, tmp_path, "griffins/other")
    hub.gated = True
    gated = run(hub, tmp_path)
    hub.gated, hub.fail = False, 403
    broken = run(hub, tmp_path)
    for done, message in (
        (absent, "griffins/other: is neither a folder here nor a model on the hub"),
        (gated, f"{NAME}: access is granted on the model's page"),
        (broken, f"{NAME}: cannot be fetched from the hub: "),
    ):
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"one line: {message}"), done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_hub_that_cannot_be_reached(hub, tmp_path: Path):
    hub.server_close()
    done = run(hub, tmp_path)
    assert done.stderr.splitlines()[-1].startswith(f"one line: {NAME}: cannot be fetched from the hub: "), done.stderr


@pytest.mark.parametrize("name", ["absent", "a/b/c", "/absent/folder", "../absent", "a b/c", "./a/b", "-x/y"])
def test_what_is_neither_a_folder_nor_a_name(name):
    with pytest.raises(FileFormatError, match=r"checkpoint: no such folder, and no name on the hub \(org/name\)"):
        resolve(name)


def test_a_path_is_never_taken_for_a_name():
    with pytest.raises(FileFormatError, match="no such folder"):
        resolve(Path("org/name"))


def test_a_file_instead_of_a_folder(tmp_path: Path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(FileFormatError, match=r"m\.gguf: checkpoint: expected the folder .* found a file"):
        resolve(tmp_path / "m.gguf")
