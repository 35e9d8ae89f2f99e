"""llama.cpp's source tree, as the pinned llama-cpp-python carries it in its source distribution."""

import hashlib
import sys
import tarfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.llamacpp import tools

PACKAGE = "llama-cpp-python"

#: The release that the patch was written against, its source distribution's checksum, and what a person is told of it.
RELEASE = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
DESCRIPTION = f"the sources of {PACKAGE} {RELEASE} (73 MiB)"

#: llama.cpp's commit in that release.
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"

#: Where llama.cpp lies in the archive, below the one folder that is its root.
_VENDORED = "vendor/llama.cpp/"

#: In a tree that was unpacked here: the checksum of its archive.
_STAMP = ".griffin-source"


def download(folder: Path) -> Path:
    """Fetch the source distribution from the package index that pip uses, into `folder`; returns the archive.

    pip knows the user's index, proxy and certificates, and is held to the checksum. It compiles nothing, but asks the
    package's build backend for its name and version, which it fetches for that.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={RELEASE} --hash=sha256:{SHA256}\n")
    command = (
        *(sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "download"),
        *("--no-deps", "--no-binary", PACKAGE, "--progress-bar", "off", "--require-hashes", "--dest", str(folder)),
        *("--requirement", str(requirement)),
    )
    try:
        tools.run(command, lambda line: None)
    except tools.ToolError as error:
        raise GriffinError(
            f"{PACKAGE} {RELEASE}: its source distribution could not be fetched: {error}; "
            f"--source FILE takes one that was fetched in another way"
        ) from None
    return next(folder.glob("*.tar.gz"))


def check(archive: Path) -> None:
    """Raise `FileFormatError` unless `archive` is the source distribution of that release, to the byte."""
    if not archive.is_file():
        raise FileFormatError(archive, "file", f"expected {PACKAGE} {RELEASE}'s source distribution, a .tar.gz")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FileFormatError(
            archive, "SHA-256", f"expected {SHA256}, that of {PACKAGE} {RELEASE}'s source distribution, found {found}"
        )


def unpack(archive: Path, target: Path) -> None:
    """Put the llama.cpp of a source distribution at `target`, which must not be there. Raises as `check`, before."""
    check(archive)
    with _appearing(target) as folder, tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/")
            if name.startswith(_VENDORED) and name != _VENDORED + ".git":
                member.name = name.removeprefix(_VENDORED)
                tar.extract(member, folder, filter="data")
        (folder / _STAMP).write_text(SHA256 + "\n")


def is_ours(tree: Path) -> bool:
    """Whether `unpack` has put this release's llama.cpp there."""
    stamp = tree / _STAMP
    return stamp.is_file() and stamp.read_text().strip() == SHA256


@contextmanager
def _appearing(target: Path) -> Generator[Path]:
    """A folder to fill, which gets its name when the block ends well. What the system refuses is told with the name."""
    try:
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            folder = Path(name) / target.name
            folder.mkdir()
            yield folder
            folder.replace(target)
    except OSError as error:
        raise GriffinError(f"{target}: {error.strerror or error}") from None
