"""Text that comes in, from files and from stdin, and text that goes into files."""

import codecs
import sys
from pathlib import Path


def read_text(path: Path) -> str:
    """A UTF-8 file, without a byte-order mark in front.

    Raises `FileFormatError` for other bytes, `OSError` where it cannot be read.
    """
    return _decode(str(path), path.read_bytes())


def read_stdin() -> str:
    """All of stdin, likewise."""
    return _decode("stdin", sys.stdin.buffer.read())


def argument(option: str, text: str) -> str:
    """What was given for an option. Raises `FileFormatError` where that was not UTF-8, which Python lets pass."""
    return _decode(option, text.encode("utf-8", "surrogateescape"))


def write_text(path: Path, text: str) -> None:
    """A file of that text, which appears when it is complete. Raises `GriffinError` naming it."""
    from griffin_gguf.runtime.atomic import atomic

    with atomic(path) as file:
        file.write(text.encode())
        file.sync()


def without_newline(text: str) -> str:
    """`text` less the newline that editors and `echo` put at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def _decode(name: str, raw: bytes) -> str:
    try:
        return raw.decode().removeprefix(codecs.BOM_UTF8.decode())
    except UnicodeDecodeError as error:
        from griffin_gguf.runtime.errors import FileFormatError

        raise FileFormatError(name, "text", f"is not UTF-8: {error.reason} at byte {error.start}") from None
