"""A checkpoint by its name on the Hugging Face hub, or by its folder."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from griffin_gguf.runtime.errors import FileFormatError, GriffinError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: The files that a conversion reads; pickles are not among them.
PATTERNS = ("config.json", "tokenizer*", "*.safetensors", "model.safetensors.index.json", "chat_template.jinja",
            "README.md")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies and what it is called; `repository` is its name on the hub, None for a folder."""

    folder: Path
    name: str
    repository: str | None = None


def resolve(checkpoint: str | Path) -> Source:
    """Return the checkpoint at that path, or fetch `org/name` from the hub where no such path exists.

    Files come into huggingface_hub's cache, which keeps them and shares them with other programs; HF_ENDPOINT
    names another hub, HF_TOKEN lets gated models in. Raises `FileFormatError` for a path that is no folder,
    `GriffinError` for anything that goes wrong at the hub.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return Source(folder, folder_name(folder))
    if folder.exists():
        raise FileFormatError(folder, "checkpoint", "expected the folder of a Hugging Face checkpoint, found a file")
    name = str(checkpoint)
    if not isinstance(checkpoint, str) or not _NAME.fullmatch(name):
        raise FileFormatError(folder, "checkpoint", "no such folder, and no name on the hub (org/name)")
    return Source(_fetch(name), name.split("/")[1], name)


def folder_name(folder: Path) -> str:
    """A folder's own name, as text also where its bytes are none."""
    return os.fsencode(folder.resolve().name).decode("utf-8", "replace")


def _fetch(name: str) -> Path:
    """Download what a conversion needs; the folder it lies in."""
    from huggingface_hub import snapshot_download  # slow to import, and folders need it not
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except GatedRepoError as error:
        problem = "access is granted on the model's page; then log in or set HF_TOKEN"
        raise GriffinError(f"{name}: {problem}") from error
    except RepositoryNotFoundError as error:
        raise GriffinError(f"{name}: is neither a folder here nor a model on the hub") from error
    except Exception as error:  # whatever its HTTP client, its cache and its locks can raise
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise GriffinError(f"{name}: cannot be fetched from the hub: {reason}") from error
