"""llama.cpp with RecurrentGemma in it: our source file and the registrations, put into a tree or told as a diff."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from griffin_gguf.runtime.atomic import atomic
from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.llamacpp.registrations import REGISTRATIONS, SOURCE, Registration
from griffin_gguf.runtime.llamacpp.source import COMMIT

#: What a tree of llama.cpp has at its top.
_MARK = Path("src/llama-arch.h")

#: In every spelling, what only a tree that knows the architecture speaks of.
_NAME = "recurrentgemma"

#: File, named from the tree's root -> its text before and after.
Texts = Mapping[str, tuple[str, str]]


def patched(tree: Path, originals: Path | None = None) -> Texts:
    """What the patch makes of a tree of llama.cpp.

    A tree that is patched already comes out as it is. `originals` has files as they were before an earlier patch, see
    `apply`. Raises `FileFormatError` naming the file, and the line that a registration stands at where a tree does not
    have it, and for a tree that has the architecture by another patch.
    """
    if not (tree / _MARK).is_file():
        raise FileFormatError(tree, str(_MARK), "is not there; expected a source tree of llama.cpp")
    texts: dict[str, tuple[str, str]] = {}
    for name in _touched(tree, originals):
        path = tree / name
        kept = originals / name if originals and (originals / name).exists() else path
        texts[name] = _read(path), _edited(path, _read(kept), [row for row in REGISTRATIONS if row.file == name])
    ours = Path(__file__).with_name(Path(SOURCE).name).read_text(encoding="utf-8")
    there = tree / SOURCE
    before = _read(there) if there.exists() else ""
    if originals is None and before not in ("", ours):
        raise FileFormatError(there, "file", "is another than ours: this llama.cpp knows the architecture already")
    return texts | {SOURCE: (before, ours)}


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


def unified_diff(texts: Texts) -> bytes:
    """What `patched` gave, as `git apply` and `patch -p1` take it. Empty for a tree that is patched already."""
    diffs = (_diff(name, before, after) for name, (before, after) in sorted(texts.items()) if before != after)
    return "".join(diffs).encode()


def _diff(name: str, before: str, after: str) -> str:
    new = "" if before else "new file mode 100644\n"
    names = (f"a/{name}" if before else "/dev/null", f"b/{name}")
    lines = difflib.unified_diff(_lines(before), _lines(after), *names)
    whole = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return f"diff --git a/{name} b/{name}\n{new}{''.join(whole)}"


def _touched(tree: Path, originals: Path | None) -> list[str]:
    """The files that this patch changes, or an earlier one has, in a fixed order."""
    kept = [str(path.relative_to(originals)) for path in originals.rglob("*")] if originals else []
    return sorted({row.file for row in REGISTRATIONS} | {name for name in kept if (tree / name).is_file()})


def _edited(path: Path, text: str, registrations: Sequence[Registration]) -> str:
    """The text of the file `path` with these registrations in it."""
    lines = _lines(text)
    for registration in registrations:
        _insert(path, lines, registration)
    after = "".join(lines)
    if after != text and _NAME in text.lower().replace("_", ""):
        problem = "knows the architecture already, by another patch; expected a tree without it, or with this one"
        raise FileFormatError(path, "registration", problem)
    return after


def _insert(path: Path, lines: list[str], registration: Registration) -> None:
    """Put a registration's text at its line, unless it stands there; with the line ends of the file."""
    start, stop = 0, len(lines)
    if registration.within:
        start = _find(path, lines, registration.within, 0, stop) + 1
        stop = next((i for i in range(start, stop) if lines[i].startswith("}")), stop)
    place = _find(path, lines, registration.line, start, stop)
    end = "\r\n" if lines[place].endswith("\r\n") else "\n"
    ours = [line.replace("\n", end) for line in _lines(registration.text)]
    if registration.after:
        place += 1
        there = lines[place : place + len(ours)]
    else:
        there = lines[max(0, place - len(ours)) : place]
    if there != ours:
        lines[place:place] = ours


def _find(path: Path, lines: list[str], wanted: str, start: int, stop: int) -> int:
    """The index of the only line from `start` to `stop` that reads `wanted`."""
    words = wanted.split()
    found = [index for index in range(start, stop) if lines[index].split() == words]
    if len(found) == 1:
        return found[0]
    where = f" of lines {start + 1} to {stop}" if start else ""
    count = f"{len(found)} lines read" if found else "no line reads"
    problem = f"{count} {wanted!r}{where}; expected one: this llama.cpp is of another age than the patch ({COMMIT[:9]})"
    raise FileFormatError(path, "registration", problem)


def _lines(text: str) -> list[str]:
    """Lines with their ends, as git and patch tell them apart: str.splitlines knows more ends than they."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        problem = f"is not there: this llama.cpp is of another age than the patch ({COMMIT[:9]})"
        raise FileFormatError(path, "registration", problem) from None
    except UnicodeDecodeError as error:
        raise FileFormatError(path, "text", f"is no UTF-8: {error}") from None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(text.encode())
