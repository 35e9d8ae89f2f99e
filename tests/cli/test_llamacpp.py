import subprocess
from pathlib import Path

import pytest
from command import done, griffin, refused
from llama_trees import FILES, archive, pretend, write_tree

from griffin_gguf.runtime.llamacpp.build import PROGRAMS
from griffin_gguf.runtime.llamacpp.registrations import SOURCE

PATCHED = "Patched " + ", ".join([*sorted(FILES), SOURCE])


def test_the_patch_of_a_tree_is_one_that_git_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "llama.cpp")
    diff = done("llamacpp", "patch", "--source", tree)
    assert done("llamacpp", "patch", "--source", archive(tmp_path, monkeypatch, tree)) == diff
    subprocess.run(["git", "apply", "-p1"], cwd=tree, input=diff, text=True, check=True)
    assert "llama_model_recurrentgemma" in (tree / SOURCE).read_text()
    assert done("llamacpp", "patch", "--source", tree) == ""


def test_a_tree_of_another_age_is_refused_by_its_line(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "llama.cpp")
    (tree / "src/llama-hparams.h").write_text("nothing\n")
    line = refused("llamacpp", "patch", "--source", tree)
    assert line.startswith(f"{tree / 'src/llama-hparams.h'}: registration: no line reads ")


def test_build_tells_what_it_does_and_where_the_programs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path, monkeypatch, write_tree(tmp_path / "llama.cpp"))
    pretend(tmp_path / "tools", monkeypatch, "echo '[1/2] Building'")
    result = griffin("llamacpp", "build", "--into", tmp_path / "into", "--source", path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "into" / "build" / "bin" / name) for name in PROGRAMS]
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        "Unpacked llama.cpp",
        PATCHED,
        "Configuring",
        "Compiling",
        "How Ollama comes to run these",
    ]


def test_a_damaged_source_distribution_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llama_cpp_python-0.3.36.tar.gz"
    path.write_bytes(b"half of it")
    assert "SHA-256: expected 832db069" in refused("llamacpp", "build", "--into", tmp_path / "x", "--source", path)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("text", ["nonsense", "=1", "A B=1"])
def test_what_is_no_setting_is_a_usage_error(tmp_path: Path, text: str) -> None:
    line = refused("llamacpp", "build", "--into", tmp_path / "x", "-D", text, code=2)
    assert f"{text!r} is no setting; expected NAME=VALUE" in line
    assert not (tmp_path / "x").exists()


def test_a_tree_is_no_source_distribution(tmp_path: Path) -> None:
    line = refused("llamacpp", "build", "--into", tmp_path / "x", "--source", tmp_path)
    assert line == f"{tmp_path}: file: expected llama-cpp-python 0.3.36's source distribution, a .tar.gz"


def test_what_a_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path, monkeypatch, write_tree(tmp_path / "llama.cpp"))
    pretend(tmp_path / "tools", monkeypatch, "echo 'CMake Error: no CMAKE_CXX_COMPILER'; exit 1")
    result = griffin("llamacpp", "build", "--into", tmp_path / "into", "--source", path)
    assert result.exit_code == 1
    assert "griffin: error: cmake: failed: CMake Error: no CMAKE_CXX_COMPILER (all that it said: " in result.stderr
