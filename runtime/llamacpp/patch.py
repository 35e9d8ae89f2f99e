"""llama.cpp with RecurrentGemma in it: our source file and the registrations, put into a tree or told as a diff."""

import difflib
from collections.abc import Mapping
from pathlib import Path

from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.llamacpp.registrations import REGISTRATIONS, SOURCE, Registration

#: What a tree of llama.cpp has at its top.
_MARK = Path("src/llama-arch.h")


#: File, named from the tree's root -> its text before and after.
Texts = Mapping[str, tuple[str, str]]


def patched(tree: Path, originals: Path | None = None) -> Texts:
    """What the patch makes of a tree of llama.cpp.

    A tree that is patched already comes out as it is. `originals` has files as they were before an earlier patch, see
    `apply`. Raises `FileFormatError` naming the file and the line that a registration stands at, where a tree does
    not have it.
    """
    if not (tree / _MARK).is_file():
        raise FileFormatError(tree, str(_MARK), "is not there; expected a source tree of llama.cpp")
    texts: dict[str, tuple[str, str]] = {}
    for name in _touched(originals):
        path = tree / name
        kept = originals / name if originals and (originals / name).exists() else path
        texts[name] = _read(path), _edited(path, _read(kept), [row for row in REGISTRATIONS if row.file == name])
    ours = Path(__file__).with_name(Path(SOURCE).name).read_text(encoding="utf-8")
    there = tree / SOURCE
    return texts | {SOURCE: (_read(there) if there.exists() else "", ours)}


def apply(tree: Path, originals: Path) -> list[str]:
    """Patch a tree in place; returns the names of the files that changed. Raises as `patched`, before any change.

    Files are kept in the folder `originals` as they were, so that a later version of the patch begins from those.
    """
    changed = {name: texts for name, texts in patched(tree, originals).items() if texts[0] != texts[1]}
    for name, (before, after) in changed.items():
        if name != SOURCE and not (originals / name).exists():
            _write(originals / name, before)
        _write(tree / name, after)
    return list(changed)


def _touched(originals: Path | None) -> list[str]:
    """The files that this patch changes, or an earlier one has, in a fixed order."""
    kept = [str(path.relative_to(originals)) for path in originals.rglob("*") if path.is_file()] if originals else []
    return sorted({row.file for row in REGISTRATIONS} | set(kept))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(text.encode())


def unified_diff(texts: Texts) -> str:
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


def _edited(path: Path, text: str, registrations: list[Registration]) -> str:
    """The text of the file `path` with these registrations in it."""
    lines = text.splitlines(keepends=True)
    for registration in registrations:
        _insert(path, lines, registration)
    return "".join(lines)


def _insert(path: Path, lines: list[str], registration: Registration) -> None:
    """Put a registration's text at its line, unless it stands there."""
    start = _find(path, lines, registration.within, 0) + 1 if registration.within else 0
    ours = registration.text.splitlines(keepends=True)
    place = _find(path, lines, registration.line, start)
    if registration.after:
        place += 1
        there = lines[place : place + len(ours)]
    else:
        there = lines[max(0, place - len(ours)) : place]
    if there != ours:
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
