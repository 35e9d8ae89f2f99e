"""A tree of llama.cpp that has just the places of our patch, its source distribution, and a cmake that pretends."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from griffin_gguf.runtime.llamacpp import source
from griffin_gguf.runtime.llamacpp.registrations import REGISTRATIONS

FILES = {registration.file for registration in REGISTRATIONS}
NAMES = ("server", "quantize", "perplexity", "imatrix", "bench", "cli")


def write_tree(root: Path) -> Path:
    """Write every registration's lines, with other lines between them."""
    for name in FILES:
        lines = [f"// {name}"]
        for row in REGISTRATIONS:
            if row.file == name:
                lines += [row.within, "    something", f"    {row.line}", "    other", "}", ""]
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return root


def archive(folder: Path, monkeypatch: pytest.MonkeyPatch, tree: Path) -> Path:
    """A source distribution with `tree` in it, whose checksum is the pinned one from now on."""
    path = folder / "llama_cpp_python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tree, "llama_cpp_python/vendor/llama.cpp")
        tar.addfile(tarfile.TarInfo("llama_cpp_python/pyproject.toml"), io.BytesIO())
    monkeypatch.setattr(source, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `cmake` on the PATH that is this shell script, and makes the programs if told to compile."""
    making = 'mkdir -p "$2/bin"; for name in llama-' + " llama-".join(NAMES) + '; do touch "$2/bin/$name"; done'
    program = folder / "cmake"
    folder.mkdir()
    program.write_text(f'#!/bin/sh\n{script}\n[ "$1" = --build ] && {{ {making}; }}\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")
