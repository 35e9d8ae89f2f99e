"""The exceptions of this project: one small tree, one line each.

A message names the file, the tensor or field at fault, what was expected and what was found. Whoever
catches `GriffinError` can print `str(error)` to a user as it is. Mistakes of our own are `assert`s.
"""

from pathlib import Path


class GriffinError(Exception):
    """Anything wrong with a file, a value or a machine that this project was given."""


class FileFormatError(GriffinError):
    """A GGUF or checkpoint file that is truncated, foreign, inconsistent or hostile.

    `path` is the file, `field` the key, tensor or header part at fault.
    """

    def __init__(self, path: Path | str, field: str, problem: str) -> None:
        super().__init__(f"{path}: {field}: {problem}")
        self.path = Path(path)
        self.field = field


class UnsupportedError(GriffinError):
    """A well-formed request or file that asks for something we do not have."""


class NoRoomError(UnsupportedError):
    """Less memory is free than is needed."""


class BusyError(GriffinError):
    """A request beyond what may wait: later there is room again."""


class BackendError(GriffinError):
    """ggml is absent, is of another version than declared, failed its self-test or lacks an operation."""
