"""The patch of llama.cpp on a tree that has just its places, and the building with tools that only pretend.

scripts/test-llamacpp has the real ones.
"""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from llama_trees import FILES, archive, pretend, write_tree

from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.llamacpp import build, patch, source
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
    assert patch.unified_diff(patch.patched(tree)) == ""
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
    subprocess.run(tool, cwd=tree, input=diff, text=True, check=True, capture_output=True)
    assert contents(tree) == expected


@pytest.mark.parametrize("number", range(len(REGISTRATIONS)))
def test_a_tree_without_a_line_is_refused_by_that_line_and_stays_as_it_is(
    tree: Path, originals: Path, number: int
) -> None:
    row = REGISTRATIONS[number]
    path = tree / row.file
    path.write_text("".join(line for line in path.open() if line.split() != row.line.split()))
    before = contents(tree)
    with pytest.raises(FileFormatError) as refusal:
        patch.apply(tree, originals)
    assert refusal.value.path == path
    assert repr(row.line) in str(refusal.value)
    assert "of another age" in str(refusal.value)
    assert contents(tree) == before


def test_spaces_of_a_line_do_not_matter(tree: Path, originals: Path) -> None:
    for name in FILES:
        path = tree / name
        path.write_text("".join(f"\t{line.replace(' ', '   ')}" for line in path.open()))
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


def test_only_llama_cpp_is_unpacked(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.unpack(archive(tmp_path, monkeypatch, tree), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tree)


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
    assert "\n" not in str(refusal.value)


# -- building ---------------------------------------------------------------------------------------------


def built(into: Path, path: Path, *definitions: str) -> tuple[list[str], list[tuple[int, int]], list[Path]]:
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
    assert said == ["Unpacked llama.cpp", f"Patched {len(FILES) + 1} files"]
    assert counts == [(1, 4), (50, 100)]
    assert [path.name for path in programs] == list(build.PROGRAMS)
    assert (tmp_path / "into" / "llama.cpp" / SOURCE).exists()


def test_cmake_is_told_what_to_build(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/asked')
    built(tmp_path / "into", archive(tmp_path, monkeypatch, tree), "GGML_CUDA=ON")
    configuring, building = (tmp_path / "asked").read_text().splitlines()
    assert configuring.endswith("-DGGML_CUDA=ON")
    assert "-DCMAKE_BUILD_TYPE=Release" in configuring
    assert building.endswith("--parallel 3 --target " + " ".join(build.PROGRAMS))


def test_a_second_run_goes_on_from_the_first(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path / "bin", monkeypatch, "true")
    path = archive(tmp_path, monkeypatch, tree)
    built(tmp_path / "into", path)
    path.unlink()
    before = contents(tmp_path / "into" / "llama.cpp")
    said, _, _ = built(tmp_path / "into", path)
    assert said == ["The source is patched already"]
    assert contents(tmp_path / "into" / "llama.cpp") == before


def test_a_compiler_s_error_is_the_line_that_is_told(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path / "bin", monkeypatch, "echo first; echo 'a.cpp:1: error: no'; echo 'ninja: stopped'; exit 1")
    with pytest.raises(GriffinError, match=r"cmake: failed: a\.cpp:1: error: no \(all that it said: .*build\.log\)"):
        built(tmp_path / "into", archive(tmp_path, monkeypatch, tree))
    assert "first\n" in (tmp_path / "into" / "build.log").read_text()


def test_without_cmake_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GriffinError, match="cmake: is not on the PATH"):
        build.prepare(tmp_path / "into", None, lambda words: None)
    assert list(tmp_path.iterdir()) == []
