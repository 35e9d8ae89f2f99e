"""/set: an option's value from what a person typed."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from griffin_gguf.cli import options
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.turns import Settings


@dataclass(frozen=True)
class Option:
    """`parse` takes the typed text and raises `ValueError`; `expected` says what it takes."""

    help: str
    parse: Callable[[str], Any]
    expected: str


def _seed(text: str) -> int | None:
    return None if text == "none" else int(text)


def _stop(text: str) -> tuple[str, ...]:
    """Texts in JSON's quotes, one text without any, or "none"."""
    if text == "none":
        return ()
    if not text.startswith('"'):
        return (text,)
    found: list[str] = []
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        if not isinstance(value, str):
            raise ValueError(value)
        found.append(value)
        text = text[end:].lstrip()
    return tuple(found)


def _worded(annotated: Any) -> str:
    """The help of an option of the command line."""
    return annotated.__metadata__[0].help


_NUMBER, _WHOLE = "a number", "a whole number"

#: What /set takes: the fields of `Sampling`, then the others of `Settings`.
OPTIONS = {
    "temperature": Option(_worded(options.Temperature), float, _NUMBER),
    "top_k": Option(_worded(options.TopK), int, _WHOLE),
    "top_p": Option(_worded(options.TopP), float, _NUMBER),
    "min_p": Option(_worded(options.MinP), float, _NUMBER),
    "repeat_penalty": Option(_worded(options.RepeatPenalty), float, _NUMBER),
    "repeat_last_n": Option(_worded(options.RepeatLastN), int, _WHOLE),
    "presence_penalty": Option("Above 0 keeps the answer from what it has said already; 0: off.", float, _NUMBER),
    "frequency_penalty": Option("The same, as often as it has said it.", float, _NUMBER),
    "seed": Option(_worded(options.Seed), _seed, f"{_WHOLE}, or none"),
    "max_tokens": Option("The longest answer, in tokens.", int, _WHOLE),
    "stop": Option('End before this text; "\\n" "User:" for several; none.', _stop, 'a text, or "texts" "in quotes"'),
}


def value_of(settings: Settings, name: str) -> str:
    """An option's value as /set would take it."""
    value = settings.max_tokens if name == "max_tokens" else getattr(settings.sampling, name, None)
    if name == "stop":
        return " ".join(json.dumps(text, ensure_ascii=False) for text in settings.stop) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def changed(settings: Settings, name: str, text: str) -> Settings:
    """The settings with one option as typed. Raises `UnsupportedError` for a name or a value that is none."""
    option = OPTIONS.get(name)
    if option is None:
        raise UnsupportedError(f"{name}: is no option; expected one of {', '.join(OPTIONS)}")
    try:
        value = option.parse(text)
    except ValueError:
        raise UnsupportedError(f"{name}: expected {option.expected}, found {text!r}") from None
    return with_values(settings, {name: value})


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """The settings with some options of other values. Raises `UnsupportedError` for a value out of range."""
    own = {name: value for name, value in values.items() if name in ("max_tokens", "stop")}
    drawn = {name: value for name, value in values.items() if name not in own}
    return replace(settings, sampling=replace(settings.sampling, **drawn), **own)
