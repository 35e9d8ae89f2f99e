"""llama.cpp's source tree, as the pinned llama-cpp-python carries it in its source distribution."""

import hashlib
import subprocess
import sys
import tarfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from griffin_gguf.runtime.errors import FileFormatError, GriffinError

PACKAGE = "llama-cpp-python"

#: The release that the patch was written against, its source distribution's checksum, and what a person is told of it.
RELEASE = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
DESCRIPTION = f"the sources of {PACKAGE} {RELEASE} (73 MiB)"

#: llama.cpp's commit in that release: a checkout of some weeks around it takes the patch too.
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"

#: Where llama.cpp lies in the archive, below the one folder that is its root.
_VENDORED = "vendor/llama.cpp/"


def download(folder: Path) -> Path:
    """Fetch the source distribution from the package index that pip uses, into `folder`; returns the archive.

    pip knows the user's index, proxy and certificates. It is held to the checksum, and compiles nothing.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={RELEASE} --hash=sha256:{SHA256}\n")
    command = (
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "download"),
        *("--no-deps", "--no-binary", PACKAGE, "--progress-bar", "off", "--require-hashes", "--dest", str(folder)),
        *("--requirement", str(requirement)),
    )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise GriffinError(f"{PACKAGE} {RELEASE}: its source distribution could not be fetched: {said[-1].strip()}")
    return archives[0]


def unpack(archive: Path, target: Path) -> None:
    """Put the llama.cpp of a source distribution at `target`, which must not be there.

    The archive is compared with the pinned checksum first. Raises `FileFormatError` naming it.
    """
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FileFormatError(
            archive, "SHA-256", f"expected {SHA256}, that of {PACKAGE} {RELEASE}'s source distribution, found {found}"
        )
    with _appearing(target) as folder, tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/")
            if name.startswith(_VENDORED) and name != _VENDORED + ".git":
                member.name = name.removeprefix(_VENDORED)
                tar.extract(member, folder, filter="data")


@contextmanager
def _appearing(target: Path) -> Generator[Path]:
    """A folder to fill, which gets its name when the block ends well."""
    with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        folder = Path(name) / target.name
        folder.mkdir()
        yield folder
        folder.replace(target)
