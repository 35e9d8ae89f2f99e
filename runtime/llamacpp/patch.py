"""llama.cpp with RecurrentGemma in it: our source file and the registrations, put into a tree or told as a diff."""

import difflib
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.llamacpp.registrations import REGISTRATIONS, SOURCE, Registration

#: What a tree of llama.cpp has at its top.
_MARK = Path("src/llama-arch.h")


def patched(tree: Path) -> dict[str, tuple[str, str]]:
    """What the patch makes of a tree of llama.cpp: file -> (text before, text after), names from the tree's root.

    A tree that is patched already comes out as it is. Raises `FileFormatError` naming the file and the line that a
    registration stands behind, where a tree does not have it: nothing is changed then.
    """
    if not (tree / _MARK).is_file():
        raise FileFormatError(tree, str(_MARK), "is not there; expected a source tree of llama.cpp")
    texts = {name: _edited(tree, name, list(rows)) for name, rows in groupby(REGISTRATIONS, lambda row: row.file)}
    ours = Path(__file__).with_name(Path(SOURCE).name).read_text(encoding="utf-8")
    there = tree / SOURCE
    return texts | {SOURCE: (_read(there) if there.exists() else "", ours)}


def apply(tree: Path) -> list[str]:
    """Patch a tree in place; returns the names of the files that changed. Raises as `patched`, before any change."""
    changed = {name: after for name, (before, after) in patched(tree).items() if after != before}
    for name, text in changed.items():
        with atomic(tree / name) as file:
            file.write(text.encode())
    return list(changed)


def unified_diff(texts: Mapping[str, tuple[str, str]]) -> str:
    """What `patched` gave, as `git apply` and `patch -p1` take it. Empty for a tree that is patched already."""
    return "".join(_diff(name, before, after) for name, (before, after) in sorted(texts.items()) if before != after)


def _diff(name: str, before: str, after: str) -> str:
    new = "" if before else "new file mode 100644\n"
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        f"a/{name}" if before else "/dev/null",
        f"b/{name}",
    )
    return f"diff --git a/{name} b/{name}\n{new}{''.join(lines)}"


def _edited(tree: Path, name: str, registrations: list[Registration]) -> tuple[str, str]:
    before = _read(tree / name)
    lines = before.splitlines(keepends=True)
    for registration in registrations:
        _insert(tree / name, lines, registration)
    return before, "".join(lines)


def _insert(path: Path, lines: list[str], registration: Registration) -> None:
    """Put a registration's text behind its line, unless it stands there."""
    start = _find(path, lines, registration.within, 0) + 1 if registration.within else 0
    place = _find(path, lines, registration.after, start) + 1
    ours = registration.text.splitlines(keepends=True)
    if lines[place : place + len(ours)] != ours:
        lines[place:place] = ours


def _find(path: Path, lines: list[str], wanted: str, start: int) -> int:
    """The index of the first line from `start` on that reads `wanted`."""
    words = wanted.split()
    for index in range(start, len(lines)):
        if lines[index].split() == words:
            return index
    where = f" behind line {start}" if start else ""
    problem = f"no line reads {wanted!r}{where}: this llama.cpp is of another age than the patch"
    raise FileFormatError(path, "registration", problem)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileFormatError(
            path, "registration", "is not there: this llama.cpp is of another age than the patch"
        ) from None
    except UnicodeDecodeError as error:
        raise FileFormatError(path, "text", f"is no UTF-8: {error}") from None
