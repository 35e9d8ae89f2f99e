"""Tasks in lm-eval's format, of a few documents each, that need no network."""

from pathlib import Path

_SOURCE = Path(__file__).with_name("tasks")

#: One of each kind that lm-eval has. `local_choices` is a group of the first two.
NAMES = ("local_endings", "local_letters", "local_blanks", "local_words", "local_passages", "local_answers")


def local_tasks(folder: Path) -> Path:
    """Put them into `folder`, which must be there: lm-eval takes the paths of data from where a program was started."""
    for file in _SOURCE.iterdir():
        text = file.read_text(encoding="utf-8")
        (folder / file.name).write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    return folder
