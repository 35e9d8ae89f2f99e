"""`griffin read`: read a text once, and begin from it any number of times."""

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from griffin_gguf.cli.console import clean, note, out, size
from griffin_gguf.cli.options import Backend, DeviceNames, LayersOn, Model, Threads, add_command, parse_devices
from griffin_gguf.cli.progress import progress
from griffin_gguf.cli.running import load_model

if TYPE_CHECKING:
    from griffin_gguf.runtime.reading import Part, Reading

_STDIN = Path("-")
_BLOCK = 1 << 20  # bytes copied at once


def register(app: typer.Typer) -> None:
    """Add the command."""
    add_command(
        app,
        "read",
        read,
        "griffin read model.gguf book.txt --save book",
        "griffin chat model.gguf --from book",
        "griffin read model.gguf chapter-*.txt --save book --replace",
        "pdftotext paper.pdf - | griffin read model.gguf - --save paper",
    )


def read(
    path: Model,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Texts in UTF-8, a blank line between two; - is stdin.", show_default=False
        ),
    ],
    name: Annotated[str, typer.Option("--save", metavar="NAME", help="What the document will be called.")],
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Read it as it is, to be continued; not as part of a question, to be asked about."
        ),
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="In the place of a document of that name.")] = False,
    backend: Backend = "auto",
    threads: Threads = None,
    device: DeviceNames = None,
    layers_on: LayersOn = None,
) -> None:
    """Read texts of any length once and keep what the model makes of them: a document.

    [bold]chat --from NAME[/bold], [bold]generate --from NAME[/bold] and, in the APIs of [bold]serve[/bold], the model
    MODEL@NAME begin behind it at once, however long it is, any number of times. What they recall of it is what a
    memory of fixed size can hold.

    Ctrl-C keeps what was read so far, and the same command goes on from there. Where MODEL has a chat template, the
    texts are read as the beginning of a question, for what is asked afterwards; else, and with --plain, as they are.
    """
    from griffin_gguf.runtime.chat import ChatTemplate
    from griffin_gguf.runtime.document_files import Place
    from griffin_gguf.runtime.documents import find
    from griffin_gguf.runtime.reading import Reading

    if files.count(_STDIN) > 1:
        raise typer.BadParameter("-: stdin can be read only once")
    with ExitStack() as stack:
        folder = Place(name).path
        parts = [_part(file, folder, stack) for file in files]
        model = stack.enter_context(load_model(path, backend, threads, parse_devices(device, layers_on)))
        chats = ChatTemplate.from_gguf(model.path, model.file.metadata) is not None
        form = "turn" if chats and not plain else "text"
        reading = stack.enter_context(Reading(model, parts, name, form, replacing=replace))
        _run(reading, files[0].name if len(files) == 1 else f"{len(files)} texts")
    document = find(name)
    how = " in a turn" if document.form == "turn" else ""
    out().print(f"{name}: {document.tokens:,} tokens{how}, kept in {size(document.nbytes)}", markup=False)


def _run(reading: "Reading", what: str) -> None:
    """Read to the end, or to Ctrl-C, which may have to wait for a chunk."""
    if reading.notice:
        note(f"{reading.notice}; begins anew")
    elif reading.kept:
        note(f"going on after {reading.kept:,} tokens that an earlier run has read")
    try:
        with progress(f"Reading {clean('stdin' if what == '-' else what)}") as report, _stoppable(report) as checked:
            reading.run(checked)
    except KeyboardInterrupt:
        if reading.kept:
            note(f"{reading.kept:,} tokens are read and kept; the same command goes on from there")
        raise


@contextmanager
def _stoppable(report: Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
    """Let Ctrl-C wait until a chunk is read: in the midst of one the state is of no use. A second one does not wait."""
    before, stopped = signal.getsignal(signal.SIGINT), False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, before)

    def checked(done: int, total: int) -> None:
        report(done, total)
        if stopped:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield checked
    finally:
        signal.signal(signal.SIGINT, before)


def _part(path: Path, folder: Path, stack: ExitStack) -> "Part":
    """A text that can be read twice: of what is no regular file, a copy is."""
    from griffin_gguf.runtime.reading import Part

    if path == _STDIN:
        return Part("stdin", _Copy(sys.stdin.buffer, folder, stack).open)
    if path.is_file():
        return Part.file(path)
    return Part(str(path), _Copy(stack.enter_context(path.open("rb")), folder, stack).open)


class _Copy:
    """A pipe's bytes in a file without a name in the document's folder, where there is room for long texts.

    Made when it is first opened: by then the folder is there. The system removes it at the latest with this process.
    """

    def __init__(self, source: BinaryIO, folder: Path, stack: ExitStack) -> None:
        self._source, self._folder, self._stack = source, folder, stack
        self._file: BinaryIO | None = None

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """At its beginning. Raises `GriffinError` naming the folder where the copy cannot be written."""
        if self._file is None:
            self._file = self._copied()
        self._file.seek(0)
        yield self._file

    def _copied(self) -> BinaryIO:
        from griffin_gguf.runtime.atomic import PartialFile
        from griffin_gguf.runtime.errors import GriffinError

        try:
            raw = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  the stack closes it
        except OSError as error:
            raise GriffinError(f"{self._folder}: cannot be written: {error.strerror}") from error
        self._stack.enter_context(raw)
        target = PartialFile(self._folder, raw)
        while block := self._source.read(_BLOCK):
            target.write(block)
        return raw
