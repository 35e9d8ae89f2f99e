"""`griffin states`: the documents that were read."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin_gguf.cli.console import cell, clean, note, only_cut, out, print_json, size, table
from griffin_gguf.cli.options import Json, add_command

if TYPE_CHECKING:
    from griffin_gguf.runtime.documents import Document

_FORMS = {"turn": "in a turn", "text": "plain"}

#: Columns' widths where a terminal is narrow: a name's beginning, a word, and a date, the time below it.
_LEAST = {"model": 5, "form": 5, "created, UTC": 10}

Name = Annotated[str, typer.Argument(metavar="NAME", help="A document.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the command and those below it."""
    states = typer.Typer(
        name="states",
        help="Documents that griffin read has kept: list them, or show, delete and export one.",
        epilog="\n\n".join(
            (
                "[bold]Examples[/bold]",
                "griffin states",
                "griffin states show book",
                "griffin states delete book paper",
                "griffin states export book -o book.state",
            )
        ),
        invoke_without_command=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    states.callback()(_list)
    add_command(states, "show", show, "griffin states show book", "griffin states show book --json")
    add_command(states, "delete", delete, "griffin states delete book paper")
    add_command(states, "export", export, "griffin states export book -o book.state")
    app.add_typer(states, name="states")


def _list(ctx: typer.Context, as_json: Json = False) -> None:
    """List the documents, unless a command below this one says otherwise."""
    if ctx.invoked_subcommand is not None:
        return
    from griffin_gguf.runtime.document_files import folder
    from griffin_gguf.runtime.documents import survey

    found = survey()
    for problem in found.damaged:
        note(str(problem))
    for reading in found.unfinished:
        note(f"{reading.name}: an interrupted reading, {reading.tokens:,} tokens in; the same griffin read goes on")
    if as_json:
        print_json([_described(document) for document in found.documents])
        return
    if not found.documents:
        note(f"no documents in {clean(str(folder()))}; griffin read makes one")
        return
    rows = table("name", "model", "tokens", "size", "form", "created, UTC", right=("tokens", "size"))
    for document in found.documents:
        rows.add_row(
            document.name,
            cell(document.model),
            f"{document.tokens:,}",
            size(document.nbytes),
            _FORMS[document.form],
            _time(document),
        )
    only_cut(rows, "model", "form", "created, UTC")
    for column in rows.columns:
        column.min_width = _LEAST.get(str(column.header), column.min_width)
    page = out()
    # Three between two columns, two at each end. In less, rich would leave columns out; a terminal breaks the line.
    page.width = max(page.width, sum(column.min_width or 0 for column in rows.columns) + 3 * len(rows.columns) + 1)
    page.print(rows, crop=False)


def show(name: Name, as_json: Json = False) -> None:
    """Show what a document was made of, with which model, and where it lies."""
    from griffin_gguf.runtime.documents import find

    document = find(name)
    if as_json:
        print_json(_described(document))
        return
    lines = [
        ("document", f"{name}, {document.tokens:,} tokens, {_FORMS[document.form]}"),
        ("model", f"{document.model}, fingerprint {document.fingerprint[:12]}, read by {document.backend}"),
        ("created", f"{_time(document)} UTC"),
        ("file", f"{document.path} ({size(document.nbytes)})"),
    ]
    for source in document.sources:
        lines += [("text", f"{source.name} ({size(source.nbytes)})"), ("SHA-256", source.sha256)]
    for heading, line in lines:  # in one line each, which a terminal breaks: a path or a digest is for copying
        out().print(f"[bold]{heading:<8}[/bold]", cell(line), soft_wrap=True)


def delete(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Documents.", show_default=False)],
) -> None:
    """Delete documents, and what interrupted readings of these names have left."""
    from griffin_gguf.runtime.documents import delete as remove
    from griffin_gguf.runtime.documents import expect

    for name in names:  # none goes where one is misspelled
        expect(name)
    for name in dict.fromkeys(names):
        remove(name)
        out().print(f"deleted {name}", markup=False)


def export(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
) -> None:
    """Write a document's state to a file, for Model.load_state in Python (docs/state.md)."""
    from griffin_gguf.runtime.documents import export as write

    write(name, output)
    out().print(str(output), markup=False, soft_wrap=True)


def _described(document: "Document") -> dict[str, Any]:
    """All of it for JSON, the size along with it."""
    import msgspec

    found = asdict(document) | {"path": str(document.path), "nbytes": document.nbytes}
    return found | {"sources": [msgspec.to_builtins(source) for source in document.sources]}


def _time(document: "Document") -> str:
    """2030-01-31 12:00, in UTC."""
    return f"{document.created[:10]} {document.created[11:16]}"
