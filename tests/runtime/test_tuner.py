"""Duels with scripted times, and one real run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from golden import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import tuner
from griffin_gguf.runtime.errors import BackendError, FileFormatError
from griffin_gguf.runtime.ggml import device
from griffin_gguf.runtime.tuner import Speed, tune
from griffin_gguf.runtime.tuning import Tuning

#: Seconds of an exchange with a tuning, in the rounds one after the other (the last one holds from there on).
Times = Callable[[Tuning], Sequence[float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo.gguf"
    convert(ROOT / "cli" / "demo_model", [(path, "Q4_K_M")])
    return path


class Scripted:
    """Runners that take the times they are told."""

    def __init__(self, patch: pytest.MonkeyPatch, times: Times) -> None:
        self.alive: list[Tuning] = []
        self.most_alive = 0
        script = self

        class Runner:
            def __init__(self, _: object, tuning: Tuning) -> None:
                self.times = list(times(tuning))  # may raise, as a device may
                self.tuning, self.rounds = tuning, 0
                script.alive.append(tuning)
                script.most_alive = max(script.most_alive, len(script.alive))

            def turn(self) -> float:
                self.rounds += 1
                return self.times[min(self.rounds, len(self.times)) - 1]

            def forget(self) -> None:
                self.rounds = 0

            def speed(self) -> Speed:
                return Speed(1, 1, 1, 1, None)

            def close(self) -> None:
                if self.tuning in script.alive:
                    script.alive.remove(self.tuning)

            def __enter__(self) -> "Runner":
                return self

            def __exit__(self, *_: object) -> None:
                self.close()

        patch.setattr(tuner, "_Runner", Runner)
        patch.setattr(tuner, "compute_threads", lambda: 4)
        patch.setattr(tuner, "usable_cores", lambda: 8)


def factors(**wanted: float) -> Times:
    """1 s, times a factor for each of the values named threads_2 or attention_plain."""

    def times(tuning: Tuning) -> list[float]:
        seconds = 1.0
        for field in ("threads", "attention", "chunk", "buffers"):
            seconds *= wanted.get(f"{field}_{getattr(tuning, field)}", 1.0)
        return [seconds]

    return times


def test_where_nothing_is_faster_the_defaults_stay(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, factors())
    best, duels = tune(model)
    assert best == Tuning()
    tried = [(duel.field, duel.value) for duel in duels]
    assert tried == [
        ("threads", 8), ("threads", 3), ("threads", 2), ("threads", 1), ("attention", "plain"), ("chunk", 256),
        ("chunk", 128), ("buffers", "repacked"), ("buffers", "both"),
    ]  # fmt: skip
    assert not any(duel.won for duel in duels)
    assert script.most_alive == 2
    assert script.alive == []


def test_the_fastest_of_each_is_taken_and_kept_for_the_rest(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = factors(threads_8=0.95, threads_2=0.8, chunk_256=0.9, chunk_128=0.89, buffers_repacked=0.8)
    script = Scripted(monkeypatch, wanted)
    best, duels = tune(model)
    assert best == Tuning(threads=2, buffers="repacked", chunk=256)  # 128 is within the margin of 256
    assert [(d.best, d.value) for d in duels if d.won] == [(None, 8), (8, 2), (512, 256), ("mapped", "repacked")]
    assert [d.ratio for d in duels if d.won] == pytest.approx([0.95, 0.8 / 0.95, 0.9, 0.8])
    assert script.most_alive == 2
    assert script.alive == []


@pytest.mark.parametrize(
    ("repacked", "both", "buffers"),
    [(0.92, 0.96, "mapped"), (0.89, 0.9, "repacked"), (0.92, 0.94, "both"), (0.8, 0.7, "both")],
)
def test_repacked_weights_must_earn_their_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, repacked: float, both: float, buffers: str
) -> None:
    Scripted(monkeypatch, factors(buffers_repacked=repacked, buffers_both=both))
    assert tune(model)[0] == replace(Tuning(), buffers=buffers)


def test_what_is_faster_in_half_of_the_rounds_is_noise(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, lambda tuning: [0.5, 1.5, 0.5, 1.5, 0.5] if tuning.attention == "plain" else [1.0])
    best, duels = tune(model)
    assert best == Tuning()
    (duel,) = (duel for duel in duels if duel.field == "attention")
    assert (duel.won, duel.rounds) == (False, 4)  # with two rounds lost it cannot win the fifth


def test_what_is_hopeless_gets_one_round(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, factors(threads_1=5.0))
    _, duels = tune(model)
    assert {duel.value: duel.rounds for duel in duels if duel.field == "threads"} == {8: 2, 3: 2, 2: 2, 1: 1}


def test_what_the_device_refuses_is_told_and_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(tuning: Tuning) -> list[float]:
        if tuning.buffers != "mapped":
            raise BackendError("ggml: this device repacks nothing")
        return [1.0]

    script = Scripted(monkeypatch, times)
    best, duels = tune(model)
    assert best == Tuning()
    assert (duels[-1].problem, duels[-1].won, duels[-1].speed) == ("ggml: this device repacks nothing", False, None)
    assert script.alive == []


def test_a_copy_of_the_weights_is_not_made_where_there_is_no_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, factors(buffers_repacked=0.1))
    monkeypatch.setattr(tuner.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    best, duels = tune(model)
    assert best == Tuning()
    assert (duels[-1].problem or "").endswith("bytes, and 1,000 are free")
    assert script.most_alive == 2


def test_an_interruption_gives_everything_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, factors(threads_8=0.5))
    count = 0

    def interrupt(_: int, __: int) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, progress=interrupt)
    assert script.alive == []


@given(st.lists(st.floats(0.5, 1.5), min_size=5, max_size=5), st.sampled_from([0.02, 0.1]))
@example([0.5, 0.5, 0.5, 1.5, 0.5], 0.02)
def test_stopping_early_never_changes_the_outcome(ratios: list[float], margin: float) -> None:
    def won(found: list[float]) -> bool:
        return tuner._has_won(found, margin, len(ratios))

    for count in range(len(ratios) + 1):
        if won(ratios[:count]):
            assert won(ratios)
        if tuner._has_lost(ratios[:count], margin, len(ratios)):
            assert not won(ratios)
    assert won(ratios) is not tuner._has_lost(ratios, margin, len(ratios))
    if won(ratios):
        assert sorted(ratios)[2] < 1 - margin
        assert sorted(ratios)[3] < 1


def test_a_real_run_is_told_as_it_goes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: list[tuple[str, list[Any]]] = [("attention", ["plain"]), ("buffers", ["repacked"])]
    monkeypatch.setattr(tuner, "_fields", lambda: iter(fields))
    monkeypatch.setattr(device, "compute_threads", lambda: 1)
    told: list[tuple[int, int]] = []
    best, duels = tune(model, rounds=1, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (2, 2)
    assert told == sorted(told)
    assert [duel.field for duel in duels] == ["attention", "buffers"]
    for duel in duels:
        assert duel.problem is None
        assert duel.speed is not None
        assert min(duel.speed.prefill, duel.speed.decode, duel.speed.load) > 0
        # 512 tokens of prompt, 128 of answer
        assert duel.speed.seconds == pytest.approx(512 / duel.speed.prefill + 128 / duel.speed.decode)
        assert (duel.value == getattr(best, duel.field)) is duel.won


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileFormatError):
        tune(tmp_path / "no.gguf")
