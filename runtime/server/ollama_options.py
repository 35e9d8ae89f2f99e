"""What a request to Ollama's API may set: `options`, `keep_alive` and `format`, checked.

Ollama's options are of four kinds here. Those of `SAMPLING` choose tokens, under the same names as `Sampling`'s
fields. `num_predict` and `stop` end an answer. Those of `WITHOUT_EFFECT` shape a memory that grows with the text, or a
machine: a Griffin's memory has one size, and the machine was chosen when the server was started; programs send them
all the same, so they are taken. Those of `OFF` belong to samplers that are not here: only the value that turns such a
sampler off is taken. An option of any other name is ignored, as Ollama does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from sys import float_info
from typing import Any, cast

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sampling import Sampling

SAMPLING: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repeat_penalty": float,
    "repeat_last_n": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
}

WITHOUT_EFFECT: dict[str, type] = {
    "num_ctx": int, "num_keep": int, "num_batch": int, "num_gpu": int, "main_gpu": int, "num_thread": int,
    "use_mmap": bool, "use_mlock": bool, "low_vram": bool, "numa": bool, "f16_kv": bool, "logits_all": bool,
    "vocab_only": bool, "embedding_only": bool, "penalize_newline": bool,
    "mirostat_tau": float, "mirostat_eta": float,  # of mirostat, which is off
}  # fmt: skip

#: Option -> the value at which it changes nothing.
OFF: dict[str, float] = {
    "typical_p": 1.0,
    "tfs_z": 1.0,
    "mirostat": 0,
}

#: Stop strings: how many, and of how many characters each. Every token is compared with all of them.
MOST_STOPS = 64
LONGEST_STOP = 1024

#: Where a request sets no `num_predict`, an answer ends after so many times the tokens the model was trained on at
#: once: Ollama's own bound, against models that never end. An explicit -1 has none.
_TIMES_CONTEXT = 10

_FILL = -2  # as many tokens as fill the context, with the prompt

_NAMES = {float: "a number", int: "a whole number", bool: "true or false"}

#: Units of Go's durations, in seconds.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_DURATION = re.compile(rf"[-+]?(0|(?:{_PART.pattern})+)", re.ASCII)
_LONGEST = 2**63 * 1e-9  # seconds that Go's nanoseconds can count, some 292 years


@dataclass(frozen=True)
class Options:
    """The options of a request that have an effect."""

    sampling: Sampling
    num_predict: int | None  # None where the request has none
    stop: tuple[str, ...]

    def max_tokens(self, prompt: int, context: int) -> int | None:
        """Tokens that the answer to a prompt of `prompt` tokens may have; None: any number.

        `context` is how many tokens at once the model was trained on.
        """
        if self.num_predict is None:
            return _TIMES_CONTEXT * context
        if self.num_predict == _FILL:
            return max(1, context - prompt)
        return None if self.num_predict == -1 else self.num_predict


def options(given: Mapping[str, Any] | None) -> Options:
    """The options `given`; null stands for one that is not given.

    Raises `UnsupportedError` naming the option for a value of another type, out of range, or of a sampler that is not
    here.
    """
    named = given or {}
    for name, kind in WITHOUT_EFFECT.items():
        _typed(named, name, kind)
    for name, neutral in OFF.items():
        found = _typed(named, name, float)
        if found is not None and found != neutral:
            raise UnsupportedError(f"options.{name}: not supported here: expected {neutral:g}, found {found:g}")
    chosen = _sampling(named)
    try:
        sampling = Sampling(**chosen)
    except UnsupportedError as error:
        raise UnsupportedError(f"options.{error}") from error
    return Options(sampling, _num_predict(named), _stop(named))


def _sampling(named: Mapping[str, Any]) -> dict[str, Any]:
    """`Sampling`'s fields, of Ollama's values that mean the same by another number."""
    found = {name: value for name, kind in SAMPLING.items() if (value := _typed(named, name, kind)) is not None}
    if found.get("top_k", 0) < 0:
        found["top_k"] = 0  # all tokens
    if found.get("top_p") == 0:
        found["top_p"] = float_info.min  # the likeliest token alone
    if found.get("seed") == -1:
        del found["seed"]  # another one each time
    return found


def _num_predict(named: Mapping[str, Any]) -> int | None:
    found = _typed(named, "num_predict", int)
    if found is not None and found < _FILL:
        raise UnsupportedError(f"options.num_predict: expected at least {_FILL}, found {found}")
    return found


def _stop(named: Mapping[str, Any]) -> tuple[str, ...]:
    """Ollama takes a list; many programs give one string."""
    given = named.get("stop")
    try:
        return stop_strings(given)
    except UnsupportedError as error:
        raise UnsupportedError(f"options.{error}") from error


def stop_strings(given: Any) -> tuple[str, ...]:
    """The strings that end an answer: one, several, or null for none. Raises `UnsupportedError` for any other."""
    found = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(found, list):
        raise UnsupportedError("stop: expected a string or an array of strings")
    stops = cast("list[Any]", found)
    bound = f"stop: expected at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters"
    if len(stops) > MOST_STOPS:  # before each of them is looked at
        raise UnsupportedError(bound)
    if not all(isinstance(stop, str) for stop in stops):
        raise UnsupportedError("stop: expected a string or an array of strings")
    if not all(stops):
        raise UnsupportedError("stop: expected no empty string")
    if max(map(len, stops), default=0) > LONGEST_STOP:
        raise UnsupportedError(bound)
    return tuple(cast("list[str]", stops))


def _typed(named: Mapping[str, Any], name: str, kind: type) -> Any:
    """The option of that name, None where there is none. JSON knows no whole numbers: 40.0 is one."""
    value = named.get(name)
    if value is None:
        return None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or (kind is not bool and isinstance(value, bool)):
        raise UnsupportedError(f"options.{name}: expected {_NAMES[kind]}, found {_shown(value)}")
    return value


def keep_alive(value: float | str | None) -> float | None:
    """Seconds for which a model stays loaded after its last use: below 0 for ever, None as the server was told.

    A number counts seconds, a string is one of Go's durations, such as "5m" or "1h30m". Raises `UnsupportedError` for
    any other, and for more than 292 years, where Go's end.
    """
    if value is None:
        return None
    seconds = _duration(value) if isinstance(value, str) else value
    if seconds > _LONGEST:
        raise UnsupportedError(f"keep_alive: expected at most {_LONGEST:.0f} seconds, found {_shown(value)}")
    return -1.0 if seconds < 0 else seconds


def _duration(text: str) -> float:
    if not _DURATION.fullmatch(text):
        wanted = 'a duration such as "5m" or a number of seconds'
        raise UnsupportedError(f"keep_alive: expected {wanted}, found {_shown(text)}")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return -seconds if text.startswith("-") else seconds


def schema(given: Any) -> dict[str, Any] | bool | None:
    """What an answer's text must be by `format`: None any text, True any JSON, a dict JSON of that schema.

    Raises `UnsupportedError` for anything else; whether it is a schema shows when it is put to use.
    """
    if given is None or given == "":
        return None
    if given == "json":
        return True
    if isinstance(given, dict):
        return cast("dict[str, Any]", given)
    raise UnsupportedError(f'format: expected "json" or a JSON schema, found {_shown(given)}')


def _shown(value: object, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "…"
