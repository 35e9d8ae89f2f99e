"""llama.cpp's programs, compiled from its source with RecurrentGemma in it, by cmake.

The folder that they are built in holds `llama.cpp`, the source; `original`, files of it as they were before the patch;
`build`, cmake's; and `build.log`, all that the tools said.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.llamacpp import patch, source, tools

#: What is built. Ollama runs the first two.
PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench", "llama-cli")

#: (done, total), as ninja and make count.
Report = Callable[[int, int], None]

_DEFINITIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_UI=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",  # else cmake fetches one
)

#: How far it is, as ninja and make say: "[12/345] Building ..." and "[ 12%] Building ...".
_COUNT = re.compile(r"\[\s*(\d+)/(\d+)\]|\[\s*(\d+)%\]")


def prepare(into: Path, archive: Path | None, say: Callable[[str], None]) -> None:
    """Put llama.cpp's source, patched, into the folder `into`, unless an earlier run has; `say` gets what is done.

    It is that of `archive`, llama-cpp-python's source distribution, or if None the package index's. Raises as `source`
    and `patch` do, and `GriffinError` for a folder that holds something else.
    """
    _cmake()
    if archive is not None:
        source.check(archive)
    into.mkdir(parents=True, exist_ok=True)
    tree = _tree(into)
    if not source.is_ours(tree):
        if any(into.iterdir()):
            raise GriffinError(
                f"{into}: is not empty, and holds no {source.PACKAGE} {source.RELEASE} that griffin llamacpp build put "
                f"there; expected a new folder"
            )
        with TemporaryDirectory(prefix=".griffin-", dir=into) as folder:
            if archive is None:
                say(f"Fetching {source.DESCRIPTION}")
                archive = source.download(Path(folder))
            source.unpack(archive, tree)
            say("Unpacked llama.cpp")
    changed = patch.apply(tree, into / "original")
    say(f"Patched {', '.join(changed)}" if changed else "The source is patched already")


def configure(into: Path, definitions: Sequence[str]) -> None:
    """Let cmake find the compilers; `definitions` are NAME=VALUE each. Raises `GriffinError` with its reason.

    cmake keeps what it was told before. Where `definitions` are others than the last time, it begins anew.
    """
    folder = into / "build"
    told, cache = folder / "definitions.txt", folder / "CMakeCache.txt"
    asked = "".join(f"{text}\n" for text in (*_DEFINITIONS, *definitions))
    if not told.exists() or told.read_text() != asked:
        cache.unlink(missing_ok=True)
    folder.mkdir(exist_ok=True)
    told.write_text(asked)
    _log(into).unlink(missing_ok=True)
    generator = ["-G", "Ninja"] if tools.find("ninja") and not cache.exists() else []
    flags = [f"-D{text}" for text in asked.splitlines()]
    _run(into, [_cmake(), "-S", str(_tree(into)), "-B", str(folder), *generator, *flags])


def compile_programs(into: Path, jobs: int, report: Report) -> list[Path]:
    """Compile `PROGRAMS`, `jobs` files at once; their paths. Raises `GriffinError` with the compiler's first error."""

    def count(line: str) -> None:
        if found := _COUNT.match(line):
            done, total, percent = found.groups()
            report(int(percent or done), int(total or 100))

    folder = into / "build"
    _run(into, [_cmake(), "--build", str(folder), "--parallel", str(jobs), "--target", *PROGRAMS], count)
    programs = [folder / "bin" / name for name in PROGRAMS]
    if missing := [path for path in programs if not path.is_file()]:
        raise GriffinError(f"{missing[0]}: was not built (all that cmake said: {_log(into)})")
    return programs


def _tree(into: Path) -> Path:
    return into / "llama.cpp"


def _log(into: Path) -> Path:
    return into / "build.log"


def _cmake() -> str:
    found = tools.find("cmake")
    if found is None:
        raise GriffinError("cmake: is not on the PATH; pip install cmake ninja, or the system's package, brings it")
    return found


def _run(into: Path, command: Sequence[str], read: Callable[[str], None] = lambda line: None) -> None:
    """Run cmake, its output into the log as well."""
    log = _log(into)
    with log.open("a", encoding="utf-8") as kept:

        def both(line: str) -> None:
            kept.write(line)
            read(line)

        try:
            tools.run(command, both)
        except tools.ToolError as error:
            raise GriffinError(f"cmake: failed: {error} (all that it said: {log})") from None
