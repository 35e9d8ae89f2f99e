"""llama.cpp's programs, compiled from its source with RecurrentGemma in it, by cmake."""

import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from griffin_gguf.runtime.errors import GriffinError
from griffin_gguf.runtime.llamacpp import patch, source

#: What is built. Ollama runs the first two.
PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity", "llama-imatrix", "llama-bench", "llama-cli")

#: (done, total), as ninja and make count.
Report = Callable[[int, int], None]

_DEFINITIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # else cmake fetches one
}

#: How far it is, as ninja and make say: "[12/345] Building ..." and "[ 12%] Building ...".
_COUNT = re.compile(r"\[\s*(\d+)/(\d+)\]|\[\s*(\d+)%\]")
_ERROR = re.compile(r"\b(?:error|undefined reference)\b", re.IGNORECASE)


def prepare(into: Path, archive: Path | None, say: Callable[[str], None]) -> None:
    """Put llama.cpp's source, patched, into the folder `into`, unless an earlier run has; `say` gets what is done.

    It is that of `archive`, llama-cpp-python's source distribution, or if None the package index's. Raises as `source`
    and `patch` do.
    """
    _cmake()
    into.mkdir(parents=True, exist_ok=True)
    tree = _tree(into)
    if not tree.exists():
        with TemporaryDirectory(prefix=".griffin-", dir=into) as folder:
            if archive is None:
                say(f"Fetching {source.DESCRIPTION}")
                archive = source.download(Path(folder))
            source.unpack(archive, tree)
            say("Unpacked llama.cpp")
    changed = patch.apply(tree, into / "original")
    say(f"Patched {len(changed)} files" if changed else "The source is patched already")


def configure(into: Path, definitions: Sequence[str]) -> None:
    """Let cmake find the compilers; `definitions` are NAME=VALUE each. Raises `GriffinError` with its reason."""
    folder, log = _folder(into), _log(into)
    log.unlink(missing_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists() else []
    flags = [f"-D{name}={value}" for name, value in _DEFINITIONS.items()] + [f"-D{text}" for text in definitions]
    _run([_cmake(), "-S", str(_tree(into)), "-B", str(folder), *generator, *flags], log, lambda line: None)


def compile_programs(into: Path, jobs: int, report: Report) -> list[Path]:
    """Compile `PROGRAMS`, `jobs` files at once; their paths. Raises `GriffinError` with the compiler's first error."""

    def count(line: str) -> None:
        if found := _COUNT.match(line):
            done, total, percent = found.groups()
            report(int(percent or done), int(total or 100))

    folder = _folder(into)
    _run([_cmake(), "--build", str(folder), "--parallel", str(jobs), "--target", *PROGRAMS], _log(into), count)
    return [folder / "bin" / name for name in PROGRAMS]


def _tree(into: Path) -> Path:
    return into / "llama.cpp"


def _folder(into: Path) -> Path:
    return into / "build"


def _log(into: Path) -> Path:
    """Where all is kept that the tools say."""
    return into / "build.log"


def _cmake() -> str:
    found = shutil.which("cmake")
    if found is None:
        raise GriffinError("cmake: is not on the PATH; pip install cmake ninja, or the system's package, brings it")
    return found


def _run(command: Sequence[str], log: Path, read: Callable[[str], None]) -> None:
    """Run a tool, its output into `log` and line by line to `read`."""
    recent: deque[str] = deque(maxlen=200)
    with (
        log.open("a", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                recent.append(line)
                read(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise GriffinError(f"{Path(command[0]).name}: failed: {_reason(recent)} (all that it said: {log})")


def _reason(lines: Iterator[str] | deque[str]) -> str:
    """The first of the last lines that speaks of an error, or the last one."""
    said = [line.strip() for line in lines if line.strip()] or ["it gave no reason"]
    return next((line for line in said if _ERROR.search(line)), said[-1])
