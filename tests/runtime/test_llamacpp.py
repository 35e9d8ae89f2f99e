"""The patch of llama.cpp on a tree that has just its places, and the building with tools that only pretend.

scripts/test-llamacpp has the real ones.
"""

import errno
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from llama_trees import FILES, archive, pretend, write_tree

from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.llamacpp import build, patch, source, tools
from griffin_gguf.runtime.llamacpp.registrations import REGISTRATIONS, SOURCE, Registration


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "llama.cpp")


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """Where files are kept as they were."""
    return tmp_path / "originals"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_registration_stands_at_its_line(tree: Path, originals: Path) -> None:
    before = contents(tree)
    assert set(patch.apply(tree, originals)) == FILES | {SOURCE}
    after = contents(tree)
    for name in FILES:
        text = after[name].decode()
        for row in (row for row in REGISTRATIONS if row.file == name):
            line = f"    {row.line}\n"
            both = f"{line}{row.text}" if row.after else f"{row.text}{line}"
            assert both in text
            text = text.replace(both, line, 1)
        assert text == before[name].decode()  # and nothing else has changed
    assert "llama_model_recurrentgemma::load_arch_hparams" in after[SOURCE].decode()


def test_a_patched_tree_stays_as_it_is(tree: Path, originals: Path) -> None:
    patch.apply(tree, originals)
    before = contents(tree)
    assert patch.apply(tree, originals) == []
    assert patch.unified_diff(patch.patched(tree)) == b""
    assert contents(tree) == before


def test_another_version_of_the_patch_begins_from_the_original(
    tree: Path, originals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier one had other lines, one more file, and our source as it was."""
    before = contents(tree)
    (tree / "src/llama-graph.cpp").write_text("void f() {\n}\n")
    earlier = [replace(row, text=f"// {row.text}") for row in REGISTRATIONS[2:]]
    extra = Registration("src/llama-graph.cpp", after="void f() {", text="    // ours\n")
    monkeypatch.setattr(patch, "REGISTRATIONS", (*earlier, extra))
    patch.apply(tree, originals)
    (tree / SOURCE).write_text("// as it was\n")
    monkeypatch.setattr(patch, "REGISTRATIONS", REGISTRATIONS)
    patch.apply(tree, originals)
    found = contents(tree)
    assert found.pop("src/llama-graph.cpp") == b"void f() {\n}\n"
    for name, data in before.items():
        (tree / name).write_bytes(data)
    (tree / SOURCE).unlink()
    patch.apply(tree, tree.parent / "none")
    expected = contents(tree)
    expected.pop("src/llama-graph.cpp")
    assert found == expected


@pytest.mark.parametrize("tool", [["git", "apply", "-p1"], ["patch", "-p1", "--no-backup-if-mismatch"]])
def test_the_diff_makes_the_same_tree(tree: Path, tool: list[str]) -> None:
    diff = patch.unified_diff(patch.patched(tree))
    expected = {name: after.encode() for name, (_, after) in patch.patched(tree).items()}
    subprocess.run(tool, cwd=tree, input=diff, check=True, capture_output=True)
    assert contents(tree) == expected


def without(path: Path, line: str, within: str) -> None:
    """Take out a line, the one behind `within` if there are several."""
    lines = path.read_text().splitlines(keepends=True)
    start = next(i for i, other in enumerate(lines) if other.split() == within.split()) if within else 0
    index = next(i for i in range(start, len(lines)) if lines[i].split() == line.split())
    path.write_text("".join(lines[:index] + lines[index + 1 :]))


@pytest.mark.parametrize("number", range(len(REGISTRATIONS)))
def test_a_tree_without_a_line_is_refused_by_that_line_and_stays_as_it_is(
    tree: Path, originals: Path, number: int
) -> None:
    """Also where another function has such a line."""
    row = REGISTRATIONS[number]
    path = tree / row.file
    without(path, row.line, row.within)
    before = contents(tree)
    with pytest.raises(FileFormatError) as refusal:
        patch.apply(tree, originals)
    assert refusal.value.path == path
    assert f"no line reads {row.line!r}" in str(refusal.value)
    assert "of another age" in str(refusal.value)
    assert contents(tree) == before


def test_a_line_that_is_there_twice_is_refused(tree: Path, originals: Path) -> None:
    path = tree / "src/llama-hparams.h"
    path.write_text(path.read_text() * 2)
    with pytest.raises(FileFormatError, match=r"2 lines read 'uint32_t ssm_n_group = 0;'; expected one"):
        patch.apply(tree, originals)


def test_a_tree_with_another_patch_is_refused(tree: Path) -> None:
    path = tree / "src/llama-arch.h"
    path.write_text(path.read_text() + "    LLM_ARCH_RECURRENT_GEMMA,\n")
    with pytest.raises(FileFormatError, match="knows the architecture already, by another patch"):
        patch.patched(tree)


def test_a_tree_with_another_source_file_is_refused(tree: Path) -> None:
    (tree / SOURCE).parent.mkdir(parents=True, exist_ok=True)
    (tree / SOURCE).write_text("// theirs\n")
    with pytest.raises(FileFormatError, match=r"recurrentgemma\.cpp: file: is another than ours"):
        patch.patched(tree)


def test_what_lies_among_the_originals_by_chance_does_no_harm(tree: Path, originals: Path) -> None:
    patch.apply(tree, originals)
    (originals / "photo.txt").write_text("none of ours")
    (originals / "src" / ".llama-arch.h.0a0b0c0d.partial").write_text("half of it")
    assert patch.apply(tree, originals) == []


@pytest.mark.parametrize("tool", [["git", "apply", "-p1"], ["patch", "-p1", "--binary", "--no-backup-if-mismatch"]])
def test_a_tree_with_other_line_ends_keeps_them(tree: Path, tool: list[str]) -> None:
    """Those of Windows, a form feed, and a file without an end of its last line."""
    for name in FILES:
        path = tree / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").replace(b"other", b"ot\fher") + b"// the end")
    diff = patch.unified_diff(patch.patched(tree))
    expected = {name: after.encode() for name, (_, after) in patch.patched(tree).items()}
    subprocess.run(tool, cwd=tree, input=diff, check=True, capture_output=True)
    assert contents(tree) == expected
    assert all(b"\n" not in data.replace(b"\r\n", b"") for name, data in expected.items() if name != SOURCE)


def test_spaces_of_a_line_do_not_matter(tree: Path, originals: Path) -> None:
    for name in FILES:
        path = tree / name
        path.write_text(path.read_text().replace(" ", "\t "))
    patch.apply(tree, originals)
    assert all(row.text in (tree / row.file).read_text() for row in REGISTRATIONS)


def test_what_is_no_llama_cpp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"expected a source tree of llama\.cpp"):
        patch.patched(tmp_path)


def test_a_missing_file_is_named(tree: Path) -> None:
    (tree / "src/llama-quant.cpp").unlink()
    with pytest.raises(FileFormatError, match=r"src/llama-quant\.cpp"):
        patch.patched(tree)


# -- the source distribution ------------------------------------------------------------------------------


def test_the_release_is_the_one_that_griffin_runs_on() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"{source.PACKAGE}=={source.RELEASE}",' in project


def test_only_llama_cpp_is_unpacked(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / ".git").write_text("gitdir: ../../.git/modules/vendor/llama.cpp\n")
    source.unpack(archive(tmp_path, monkeypatch, tree), tmp_path / "out")
    found = contents(tmp_path / "out")
    assert found.pop(".griffin-source") == f"{source.SHA256}\n".encode()
    assert found == {name: data for name, data in contents(tree).items() if name != ".git"}
    assert source.is_ours(tmp_path / "out")
    assert not source.is_ours(tree)


def test_what_cannot_be_unpacked_leaves_nothing(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path, monkeypatch, tree)
    folder = tmp_path / "into"
    folder.mkdir()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(GriffinError, match=f"{re.escape(str(folder / 'llama.cpp'))}: No space left on device"):
        source.unpack(path, folder / "llama.cpp")
    assert list(folder.iterdir()) == []


def test_another_archive_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "other.tar.gz"
    path.write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match=f"SHA-256: expected {source.SHA256}"):
        source.unpack(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_what_pip_says_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(GriffinError) as refusal:
        source.download(tmp_path)
    assert str(refusal.value).startswith(f"llama-cpp-python {source.RELEASE}: its source distribution")
    assert "error" in str(refusal.value).lower()
    assert str(refusal.value).endswith("; --source FILE takes one that was fetched in another way")
    assert "\n" not in str(refusal.value)


@contextmanager
def index(folder: Path) -> Iterator[str]:
    """A package index on loopback with what lies in `folder`."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source distribution of that release in an index's folder, whose checksum is the pinned one from now on."""
    place = folder / "llama-cpp-python"
    place.mkdir(parents=True)
    path = place / f"llama_cpp_python-{source.RELEASE}.tar.gz"
    backend = f"""
def get_requires_for_build_wheel(settings=None): return []
def prepare_metadata_for_build_wheel(folder, settings=None):
    import pathlib
    info = pathlib.Path(folder, "llama_cpp_python-{source.RELEASE}.dist-info"); info.mkdir()
    text = "Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {source.RELEASE}\\n"
    (info / "METADATA").write_text(text)
    return info.name
def build_wheel(*arguments): raise SystemExit("was compiled")
"""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (
            ("pyproject.toml", project),
            ("backend.py", backend),
            ("PKG-INFO", "Metadata-Version: 2.1\n"),
        ):
            member = tarfile.TarInfo(f"llama_cpp_python-{source.RELEASE}/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(source, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_source_distribution_comes_from_the_index_that_pip_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published(tmp_path / "index", monkeypatch)
    (tmp_path / "got").mkdir()
    with index(tmp_path / "index") as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        found = source.download(tmp_path / "got")
    assert found.parent == tmp_path / "got"
    assert found.read_bytes() == path.read_bytes()


def test_another_file_from_the_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(tmp_path / "index", monkeypatch)
    monkeypatch.setattr(source, "SHA256", 64 * "0")
    (tmp_path / "got").mkdir()
    with index(tmp_path / "index") as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with pytest.raises(GriffinError, match=r"could not be fetched: ERROR: .*(HASHES|hashes)"):
            source.download(tmp_path / "got")
    assert not list((tmp_path / "got").glob("*.tar.gz"))


# -- building ---------------------------------------------------------------------------------------------


def built(into: Path, path: Path | None, *definitions: str) -> tuple[list[str], list[tuple[int, int]], list[Path]]:
    """Do what the command does: what was said, how far it was, the programs."""
    said: list[str] = []
    counts: list[tuple[int, int]] = []
    build.prepare(into, path, said.append)
    build.configure(into, definitions)
    programs = build.compile_programs(into, 3, lambda done, total: counts.append((done, total)))
    return said, counts, programs


def test_progress_is_what_the_tools_say(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path / "bin", monkeypatch, "echo '[1/4] Building a'; echo noise; echo '[ 50%] Building b'")
    said, counts, programs = built(tmp_path / "into", archive(tmp_path, monkeypatch, tree))
    assert said[0] == "Unpacked llama.cpp"
    assert set(said[1].removeprefix("Patched ").split(", ")) == FILES | {SOURCE}
    assert counts == [(1, 4), (50, 100)]
    assert [path.name for path in programs] == list(build.PROGRAMS)
    assert (tmp_path / "into" / "llama.cpp" / SOURCE).exists()


@pytest.mark.parametrize("ninja", [False, True])
def test_cmake_is_told_what_to_build(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool) -> None:
    pretend(tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/asked')
    found = {"cmake": str(tmp_path / "bin" / "cmake")} | ({"ninja": "/ninja"} if ninja else {})
    monkeypatch.setattr(tools, "find", found.get)
    built(tmp_path / "into", archive(tmp_path, monkeypatch, tree), "GGML_CUDA=ON")
    configuring, building = (tmp_path / "asked").read_text().splitlines()
    assert ("-G Ninja" in configuring) == ninja
    assert configuring.endswith("-DGGML_CUDA=ON")
    assert all(f"-D{name}=OFF" in configuring for name in ("LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI"))
    assert "-DCMAKE_BUILD_TYPE=Release" in configuring
    assert building.endswith("--parallel 3 --target " + " ".join(build.PROGRAMS))


def test_a_second_run_goes_on_from_the_first(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/into/build/CMakeCache.txt; echo said")
    path = archive(tmp_path, monkeypatch, tree)
    built(tmp_path / "into", path, "A=1")
    before = contents(tmp_path / "into" / "llama.cpp")
    said, _, _ = built(tmp_path / "into", None, "A=1")
    assert said == ["The source is patched already"]
    assert contents(tmp_path / "into" / "llama.cpp") == before
    assert (tmp_path / "into" / "build.log").read_text() == "said\nsaid\n"


def test_cmake_forgets_what_it_is_not_told_again(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "into" / "build" / "CMakeCache.txt"
    pretend(tmp_path / "bin", monkeypatch, f"ls {cache} >> {tmp_path}/seen 2> /dev/null; touch {cache}")
    path = archive(tmp_path, monkeypatch, tree)
    for definitions in (["A=1"], ["A=1"], []):
        (tmp_path / "seen").write_text("")
        build.prepare(tmp_path / "into", path, lambda words: None)
        build.configure(tmp_path / "into", definitions)
        kept = (tmp_path / "seen").read_text() != ""
        assert kept == (definitions == ["A=1"] and cache.with_name("again").exists())
        cache.with_name("again").touch()


def test_a_folder_of_somebody_else_is_refused_and_left_alone(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path / "bin", monkeypatch, "true")
    path = archive(tmp_path, monkeypatch, tree)
    before = contents(tree)
    with pytest.raises(GriffinError, match="is not empty, and holds no llama-cpp-python "):
        build.prepare(tmp_path, path, lambda words: None)
    assert contents(tree) == before


#: What cmake 3.25 says without a compiler.
NO_COMPILER = """\
-- The C compiler identification is unknown
CMake Error at CMakeLists.txt:2 (project):
  No CMAKE_CXX_COMPILER could be found.

  Tell CMake where to find the compiler.
Call Stack (most recent call first):
  nothing
-- Configuring incomplete, errors occurred!
"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("first\na.cpp:1:5: error: no\nninja: stopped\n", "a.cpp:1:5: error: no"),
        (
            NO_COMPILER,
            "CMake Error at CMakeLists.txt:2 (project): No CMAKE_CXX_COMPILER could be found. Tell CMake where to find "
            "the compiler.",
        ),
        ("one\ntwo\n", "two"),
        ("", "it gave no reason"),
    ],
)
def test_the_reason_is_told(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str) -> None:
    (tmp_path / "said").write_text(said)
    pretend(tmp_path / "bin", monkeypatch, f"cat {tmp_path}/said; exit 1")
    with pytest.raises(GriffinError) as refusal:
        built(tmp_path / "into", archive(tmp_path, monkeypatch, tree))
    log = tmp_path / "into" / "build.log"
    assert str(refusal.value) == f"cmake: failed: {told} (all that it said: {log})"
    assert log.read_text() == said


def test_programs_that_were_not_built_are_no_success(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path / "bin", monkeypatch, '[ "$1" = --build ] && exit 0')
    with pytest.raises(GriffinError, match="llama-server: was not built"):
        built(tmp_path / "into", archive(tmp_path, monkeypatch, tree))


def test_without_cmake_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", {}.get)
    with pytest.raises(GriffinError, match="cmake: is not on the PATH"):
        build.prepare(tmp_path / "into", None, lambda words: None)
    assert list(tmp_path.iterdir()) == []


def test_tools_beside_this_python_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "some-tool").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "some-tool").chmod(0o755)
    assert tools.find("some-tool") == str(tmp_path / "some-tool")
    said: list[str] = []
    tools.run(["sh", "-c", "some-tool"], said.append)
    assert said == ["found\n"]


def test_an_interrupted_tool_leaves_no_process(tmp_path: Path) -> None:
    """cmake starts ninja, and that compilers; an end of the first would leave those."""

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    script = f"sh -c 'sleep 300 & echo $! > {tmp_path}/pid; echo started; wait' & wait"
    with pytest.raises(KeyboardInterrupt):
        tools.run(["sh", "-c", script], interrupt)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.01)
