"""How Ollama's API speaks of models: in the list of all, in that of those in memory, and one by one."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, cast

from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.server.models import Entry, Loaded
from griffin_gguf.runtime.server.ollama_messages import Details, Listed, Running, Shown, Tensor

#: Every name in Ollama has a tag; clients compare names with theirs, and add this one where there is none.
TAG = ":latest"

_LONGEST_ARRAY = 5  # of `model_info`; longer ones are null unless asked for, as in Ollama
_APART = ("general.name", "tokenizer.chat_template")  # keys of which `model_info` holds none
_FOR_EVER = 2**63 - 1  # ns ahead: where Ollama puts the end of what has none, which its programs know


def listed(entries: Sequence[Entry]) -> list[Listed]:
    """All models, the one that was changed last first."""
    return [
        Listed(e.name + TAG, e.name + TAG, timestamp(e.modified), e.size, digest(e), details(e))
        for e in sorted(entries, key=lambda e: e.modified, reverse=True)
    ]


def running(loaded: Sequence[Loaded]) -> list[Running]:
    """Those in memory, the one that stays longest first. All of it is main memory: `size_vram` is 0."""
    found = [
        Running(
            name=model.entry.name + TAG,
            model=model.entry.name + TAG,
            size=model.nbytes,
            digest=digest(model.entry),
            details=details(model.entry),
            expires_at=now(_FOR_EVER) if model.expires is None else timestamp(model.expires),
            size_vram=0,
            context_length=model.entry.context,
        )
        for model in loaded
    ]
    return sorted(found, key=lambda model: model.expires_at, reverse=True)


def shown(entry: Entry, verbose: bool) -> Shown:
    """All about a model; with `verbose` its whole vocabulary and its tensors too, which reads the file's header."""
    parameters = _parameters()
    template = "{{ .Prompt }}" if entry.template is None else entry.template.template
    return Shown(
        license=_license(entry.metadata),
        modelfile=f'FROM {entry.path.name}\nTEMPLATE """{template}"""\n'
        + "".join(f"PARAMETER {line}\n" for line in parameters),
        parameters="\n".join(parameters),
        template=template,
        system="",
        details=details(entry),
        model_info=_model_info(entry, verbose),
        tensors=_tensors(entry) if verbose else None,
        # A state that has read a document is no empty one, which an embedding begins with.
        capabilities=["completion", "embedding"] if entry.document is None else ["completion"],
        modified_at=timestamp(entry.modified),
    )


def details(entry: Entry) -> Details:
    """What a model is, in a few words; one with a document has the model itself as its parent."""
    parent = "" if entry.document is None else entry.name.rpartition("@")[0] + TAG
    family: str = entry.metadata["general.architecture"]
    return Details(parent, "gguf", family, [family], human(entry.parameters), entry.file_type)


def digest(entry: Entry) -> str:
    """64 hex digits that are another model's where answers are another's: some programs know models by these."""
    template = "" if entry.template is None else entry.template.template
    return hashlib.sha256("\n".join((entry.digest, entry.document or "", template)).encode()).hexdigest()


def human(count: int) -> str:
    """A number of parameters as Ollama writes it: 8.19M, 2.7B."""
    for unit, size, digits in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


def timestamp(moment: datetime) -> str:
    """RFC 3339, in UTC, with nanoseconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def now(ahead: int = 0) -> str:
    """The time so many nanoseconds from now, as `timestamp` writes it."""
    seconds, rest = divmod(time.time_ns() + ahead, 10**9)
    return datetime.fromtimestamp(seconds, UTC).strftime(f"%Y-%m-%dT%H:%M:%S.{rest:09d}Z")


def _parameters() -> list[str]:
    """The options of a request that has none, one a line, in Ollama's columns."""
    defaults = {field.name: field.default for field in fields(Sampling) if field.default is not None}
    return [f"{name:30} {value}" for name, value in defaults.items()]


def _license(metadata: Mapping[str, Any]) -> str:
    names = ("general.license", "general.license.name", "general.license.link")
    return "\n".join(str(metadata[name]) for name in names if metadata.get(name))


def _model_info(entry: Entry, verbose: bool) -> dict[str, Any]:
    """The file's keys, and the number of parameters, which Ollama counts too."""
    info = {key: value for key, value in entry.metadata.items() if key not in _APART}
    if not verbose:
        info |= {key: None for key, value in info.items() if _is_long(value)}
    return {**info, "general.parameter_count": entry.parameters}


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and len(cast("list[Any]", value)) > _LONGEST_ARRAY


def _tensors(entry: Entry) -> list[Tensor]:
    with GgufFile.open(entry.path) as file:
        return [Tensor(info.name, info.type.name, list(info.shape[::-1])) for info in file.tensors.values()]
