"""Options, durations and formats as Ollama's clients send them."""

from dataclasses import asdict
from datetime import timedelta
from typing import Any

import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.server import ollama_options
from griffin_gguf.runtime.server.ollama_options import OFF, SAMPLING, WITHOUT_EFFECT, keep_alive, options, schema

CONTEXT = 8192


def test_without_options_sampling_is_the_default_and_the_answer_bounded() -> None:
    for none in (None, {}, {"temperature": None, "stop": None, "num_predict": None}):
        found = options(none)
        assert found.sampling == Sampling()
        assert found.stop == ()
        assert found.max_tokens(100, CONTEXT) == 10 * CONTEXT


def test_every_option_of_ollamas_own_client_is_known_here() -> None:
    known = {*SAMPLING, *WITHOUT_EFFECT, *OFF, "num_predict", "stop"}
    assert known >= set(ollama.Options.model_fields)


def test_sampling_options_are_taken() -> None:
    wanted = Sampling(
        temperature=0, top_k=7, top_p=0.5, min_p=0.1, repeat_penalty=1.2, repeat_last_n=-1, seed=3, presence_penalty=0.5
    )
    given = asdict(wanted)
    assert set(given) == set(SAMPLING)
    assert options(given).sampling == wanted


@pytest.mark.parametrize(
    ("given", "field", "meant"),
    [
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 40.0}, "top_k", 40),
        ({"seed": -1}, "seed", None),
        ({"top_p": 1}, "top_p", 1),
    ],
)
def test_values_that_mean_the_same_here_by_another_number(given: dict[str, Any], field: str, meant: object) -> None:
    found = getattr(options(given).sampling, field)
    assert found == meant
    assert type(found) is type(meant)


def test_top_p_of_0_is_the_likeliest_token_alone() -> None:
    assert 0 < options({"top_p": 0}).sampling.top_p < 1e-300


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": -1}, "options.temperature: expected from 0 to 1000, found -1"),
        ({"temperature": "hot"}, "options.temperature: expected a number, found 'hot'"),
        ({"temperature": True}, "options.temperature: expected a number, found True"),
        ({"top_k": 4.5}, "options.top_k: expected a whole number, found 4.5"),
        ({"top_k": True}, "options.top_k: expected a whole number, found True"),
        ({"top_p": 1.5}, "options.top_p: expected above 0 and at most 1, found 1.5"),
        ({"repeat_penalty": 0}, "options.repeat_penalty: expected from 0.01 to 100, found 0"),
        ({"repeat_last_n": -2}, "options.repeat_last_n: expected a whole number of at least -1, found -2"),
        ({"seed": -7}, "options.seed: expected a whole number of at least 0, or none, found -7"),
        ({"num_predict": -3}, "options.num_predict: expected at least -2, found -3"),
        ({"num_ctx": "big"}, "options.num_ctx: expected a whole number, found 'big'"),
        ({"use_mmap": 1}, "options.use_mmap: expected true or false, found 1"),
        ({"mirostat": 2}, "options.mirostat: not supported here: expected 0, found 2"),
        ({"typical_p": 0.7}, "options.typical_p: not supported here: expected 1, found 0.7"),
        ({"presence_penalty": 2.5}, "options.presence_penalty: expected from -2 to 2, found 2.5"),
        ({"stop": 5}, "options.stop: expected a string or an array of strings"),
        ({"stop": ["a", 5]}, "options.stop: expected a string or an array of strings"),
        ({"stop": [""]}, "options.stop: expected no empty string"),
        ({"stop": ["a"] * 65}, "options.stop: expected at most 64 strings of at most 1024 characters"),
        ({"stop": "a" * 1025}, "options.stop: expected at most 64 strings of at most 1024 characters"),
        ({"temperature": "x" * 1000}, f"options.temperature: expected a number, found '{'x' * 59}…"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedError) as refused:
        options(given)
    assert str(refused.value) == said


def test_options_without_an_effect_change_nothing() -> None:
    examples: dict[type, Any] = {int: 2048, float: 5.0, bool: True}
    given = {name: examples[kind] for name, kind in WITHOUT_EFFECT.items()} | OFF | {"of_a_later_version": [1]}
    assert options(given) == options(None)


@pytest.mark.parametrize(
    ("given", "prompt", "tokens"),
    [(-1, 10, None), (0, 10, 0), (100, 10, 100), (-2, 10, CONTEXT - 10), (-2, CONTEXT, 1), (-2, 10 * CONTEXT, 1)],
)
def test_num_predict(given: int, prompt: int, tokens: int | None) -> None:
    assert options({"num_predict": given}).max_tokens(prompt, CONTEXT) == tokens


@pytest.mark.parametrize(("given", "stops"), [("\n", ("\n",)), ([], ()), (["a", "b"], ("a", "b"))])
def test_stop_is_a_string_or_several(given: Any, stops: tuple[str, ...]) -> None:
    assert options({"stop": given}).stop == stops


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None), (0, 0), (300, 300), (0.5, 0.5), (-1, -1), (-0.001, -1), ("5m", 300), ("1h30m", 5400), ("-1m", -1),
        ("1.5h", 5400), (".5s", 0.5), ("+2s", 2), ("0", 0), ("0s", 0), ("-0", 0), ("24h", 86400), ("250ms", 0.25),
    ],
)  # fmt: skip
def test_keep_alive(given: float | str | None, seconds: float | None) -> None:
    assert keep_alive(given) == (None if seconds is None else pytest.approx(seconds))


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=36500)))
def test_keep_alive_of_any_go_duration(wanted: timedelta) -> None:
    hours, rest = divmod(wanted, timedelta(hours=1))
    minutes, rest = divmod(rest, timedelta(minutes=1))
    seconds = wanted.total_seconds()
    assert keep_alive(f"{hours}h{minutes}m{rest.total_seconds():f}s") == pytest.approx(seconds, abs=1e-6)
    assert keep_alive(f"{hours}h{minutes}m{rest // timedelta(microseconds=1)}µs") == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    "given", ["", "5", "-1", "m", "5 m", "5m ", "5d", "1e3s", "٥m", "5m-1s", "forever", "1h,", ".", "1" * 10**6]
)
def test_what_is_no_duration_in_go_is_none_here(given: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^keep_alive: expected a duration"):
        keep_alive(given)


@given(st.text(max_size=20))
def test_no_text_breaks_keep_alive(given: str) -> None:
    try:
        found = keep_alive(given)
    except UnsupportedError as error:
        assert str(error).startswith("keep_alive: ")  # noqa: PT017
    else:
        assert found is not None
        assert found == -1 or found >= 0


@pytest.mark.parametrize("given", [1e300, 2**64, "9" * 400 + "h", "2562048h"])
def test_keep_alive_has_an_end(given: float | str) -> None:
    with pytest.raises(UnsupportedError, match=r"^keep_alive: expected at most 9223372037 seconds"):
        keep_alive(given)


@pytest.mark.parametrize(
    ("given", "meant"), [(None, None), ("", None), ("json", True), ({}, {}), ({"type": "object"}, {"type": "object"})]
)
def test_format(given: Any, meant: Any) -> None:
    assert schema(given) == meant


@pytest.mark.parametrize("given", ["yaml", True, 5, ["json"]])
def test_formats_that_are_none(given: Any) -> None:
    with pytest.raises(UnsupportedError, match=r'^format: expected "json" or a JSON schema, found '):
        schema(given)


def test_bounds_are_those_the_messages_name() -> None:
    assert options({"stop": ["a" * ollama_options.LONGEST_STOP] * ollama_options.MOST_STOPS}).stop
