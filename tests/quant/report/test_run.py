"""A report's run: real measurements of tiny models, each in its own process."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
from foreign import foreign
from tiny_griffins import CONTEXT, write_tiny

from griffin_gguf.quant import evaluate
from griffin_gguf.quant.report import run as module
from griffin_gguf.quant.report.advice import drift
from griffin_gguf.quant.report.data import Report, Settings
from griffin_gguf.quant.report.run import Run, Source, families
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import BackendError, FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.tuning import VARIABLE, Tuning, store

WORDS = "The fox of the river said that nothing under the moon grows for ever. " * 60
CTX = 32
SETTINGS = Settings(ctx=CTX, tokens=None, quick=False, backend="auto", threads=1)
QUICK = replace(SETTINGS, quick=True, tokens=200)


def sources(models: dict[str, Path], *names: str) -> list[Source]:
    return [Source.open(models[name], models[name].name) for name in names]


@pytest.fixture(scope="module")
def told() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def report(tiny_models: dict[str, Path], told: list[tuple[str, int, int]]) -> Report:
    made = Run(sources(tiny_models, "Q4_K_M", "BF16"), WORDS, "fox.txt", SETTINGS)
    return made.run(lambda *step: told.append(step))


def test_every_row_and_measure_is_there(report: Report) -> None:
    assert report.complete
    assert [(row.type, row.precision, row.reference) for row in report.rows] == [
        ("Q4_K_M", None, False),
        ("BF16", None, True),
        ("BF16", "h in F16", False),
        ("BF16", "h in BF16", False),
        ("BF16", "recurrence in BF16", False),
    ]
    for row in report.rows:
        assert row.windows
        assert row.stream
        assert (row.cost is None) == (row.precision is not None)
        assert (row.windows.distance is None) == row.reference
    assert report.text.tokens == 10 * CONTEXT
    assert Report.from_json(Path("x"), report.to_json().encode()) == report


def test_the_text_is_cut_where_the_tokens_end(report: Report, tiny_models: dict[str, Path]) -> None:
    with load(tiny_models["BF16"], threads=1) as model:
        ids = model.tokenizer.encode(WORDS)[: 10 * CONTEXT]
        assert report.text.nbytes == len(model.tokenizer.decode(ids[1:]).encode())


def test_losses_and_distances_are_those_of_evaluate(report: Report, tiny_models: dict[str, Path]) -> None:
    with load(tiny_models["BF16"], threads=1) as base, load(tiny_models["Q4_K_M"], threads=1) as small:
        text = WORDS.encode()[: report.text.nbytes].decode()
        ids = base.tokenizer.encode(text)
        for way, readings in (
            ("windows", evaluate.windows(ids, CTX, base.tokenizer.bos)),
            ("stream", evaluate.stream(ids)),
        ):
            found = evaluate.compare(base, small, readings)
            far, wanted = evaluate.Divergence.of(found), evaluate.Perplexity.of(found.scores)
            row, reference = (getattr(r, way) for r in report.rows[:2])
            assert (row.tokens, row.perplexity, row.stderr) == (wanted.tokens, *approx(wanted.value, wanted.stderr))
            for name in ("mean", "stderr", "median", "p99", "maximum", "top1", "rms_change", "log_ratio"):
                assert getattr(row.distance, name) == pytest.approx(getattr(far, name), rel=1e-6), name
            base_nll = float(found.reference_nll.mean())
            assert reference.nll == pytest.approx(base_nll, rel=1e-9)
            size = sum(len(base.tokenizer.piece(ids[i])) for i in found.at)
            assert row.nbytes == size
            assert row.bits_per_byte == pytest.approx(wanted.bits_per_byte(size))


def approx(*values: float) -> tuple[Any, ...]:
    return tuple(pytest.approx(value, rel=1e-9) for value in values)


def test_bins_and_halves_are_of_the_same_tokens(report: Report) -> None:
    row = report.rows[0]
    assert row.windows
    assert row.stream
    assert sum(b.tokens for b in row.stream.bins) == row.stream.tokens == 10 * CONTEXT - 1
    weighted = sum(b.tokens * b.nll for b in row.stream.bins) / row.stream.tokens
    assert weighted == pytest.approx(row.stream.nll, rel=1e-9)
    assert row.windows.halves_kl
    assert row.stream.halves_kl
    assert len(row.windows.halves_kl) == len(row.stream.halves_kl) == 10 * CONTEXT // CTX
    assert np.mean(row.windows.halves_kl) == pytest.approx(row.windows.distance and row.windows.distance.mean)
    # In the first window both ways have read the same.
    assert row.windows.halves_kl[0] == pytest.approx(row.stream.halves_kl[0], rel=0.02)


def test_costs(report: Report, tiny_models: dict[str, Path]) -> None:
    with load(tiny_models["Q4_K_M"], threads=1) as model:
        state = model.state_nbytes
    for row in report.files:
        assert row.cost
        assert row.cost.runs_on == "ggml"
        assert row.cost.state == state
        assert [at.position for at in row.cost.by_position] == [0, 512]
        speeds = [row.cost.prefill, row.cost.decode, *(at.decode for at in row.cost.by_position)]
        assert all(0 < speed.low <= speed.median <= speed.high for speed in speeds)
        memory = row.cost.memory
        assert 10 << 20 < memory.anonymous < memory.needed
        assert memory.peak <= memory.needed + (1 << 20)
        assert row.file_size == Path(row.path).stat().st_size


def test_progress_counts_up_to_everything(told: list[tuple[str, int, int]], report: Report) -> None:
    assert report.complete
    done, totals = [step[1] for step in told], {step[2] for step in told}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert told[0][0] == "[1/12] tiny-Q4_K_M.gguf: memory and speed"
    assert told[-1][0] == "[12/12] tiny-BF16.gguf, recurrence in BF16: the text in one pass"


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(module, "in_fresh_process", never)


def test_what_is_there_is_not_measured_again(
    report: Report, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    again = Run(sources(tiny_models, "Q4_K_M", "BF16"), WORDS, "fox.txt", SETTINGS, kept=report)
    assert (again.known, again.steps) == (12, 12)
    assert again.run().rows == report.rows


@pytest.mark.parametrize(
    ("words", "settings", "known"),
    [
        (WORDS.replace("moon", "sun"), SETTINGS, 0),
        (WORDS, replace(SETTINGS, ctx=48), 2),  # costs; by windows goes also what both ways of reading share
        (WORDS, replace(SETTINGS, threads=2), 0),
        (WORDS, QUICK, 0),
    ],
)
def test_a_measurement_depends_on_all_that_it_was_made_of(
    report: Report, tiny_models: dict[str, Path], words: str, settings: Settings, known: int
) -> None:
    run = Run(sources(tiny_models, "Q4_K_M", "BF16"), words, "fox.txt", settings, kept=report)
    assert run.known == known


def test_a_file_that_is_not_the_same_any_more_is_measured_again(
    tiny_models: dict[str, Path], tmp_path: Path, report: Report
) -> None:
    """Bytes in the middle of a tensor, which no look at its beginning would tell."""
    copy = tmp_path / "tiny-Q4_K_M.gguf"
    shutil.copy2(tiny_models["Q4_K_M"], copy)
    before = Source.open(copy, "copy").fingerprint
    assert before == Source.open(tiny_models["Q4_K_M"], "it").fingerprint
    raw = bytearray(copy.read_bytes())
    raw[len(raw) // 2] ^= 1
    copy.write_bytes(raw)
    assert Source.open(copy, "copy").fingerprint != before


def test_what_suits_the_machine_is_part_of_what_was_measured(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    with GgufFile.open(tiny_models["Q4_K_M"]) as file:
        store(file, Tuning(threads=1, chunk=16))
    run = Run(sources(tiny_models, "Q4_K_M", "BF16"), WORDS, "fox.txt", SETTINGS, kept=report)
    assert run.known == 9  # not the tuned file's: one cost and two qualities


def test_measurements_of_other_settings_are_kept(report: Report, tiny_models: dict[str, Path]) -> None:
    files = sources(tiny_models, "Q4_K_M", "BF16")
    saved: list[Report] = []
    Run(files[1:], WORDS, "fox.txt", QUICK, kept=report).run(save=saved.append)
    quick = saved[-1]
    assert len(quick.other_costs) == 2
    assert len(quick.other_qualities) == 10
    assert Report.from_json(Path("x"), quick.to_json().encode()) == quick
    again = Run(files, WORDS, "fox.txt", SETTINGS, kept=quick)
    assert again.known == again.steps == 12


@pytest.mark.parametrize("tokens", range(40, 56))
def test_a_text_is_cut_between_characters(tiny_models: dict[str, Path], tokens: int) -> None:
    words = "🦊 in the 河, 🌙 over it. " * 30
    run = Run(sources(tiny_models, "BF16"), words, "fox.txt", replace(QUICK, tokens=tokens))
    found = run.report.text
    assert tokens <= found.tokens <= tokens + 4
    assert words.encode()[: found.nbytes].decode() in words


def test_windows_longer_than_a_model_was_trained_on(tmp_path: Path) -> None:
    full, half = (foreign(tmp_path / f"{i}.gguf", "llama", half=bool(i), context_length=128) for i in range(2))
    files = [Source.open(path, path.name) for path in (full, half)]
    found = Run(files, WORDS, "fox.txt", replace(QUICK, ctx=200, tokens=600)).run()
    (stream,) = [row.stream for row in found.rows if not row.reference]
    assert stream
    assert stream.tokens == 127
    assert stream.halves_kl is None
    assert drift(found.rows[1], 200) == []


def test_an_interrupted_run_has_saved_what_it_measured(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls, saved = module.in_fresh_process, list[Any](), list[Report]()

    def interrupted(work: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(work)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(work, *arguments)

    monkeypatch.setattr(module, "in_fresh_process", interrupted)
    files = sources(tiny_models, "BF16", "Q4_K_M")
    with pytest.raises(KeyboardInterrupt):
        Run(files, WORDS, "fox.txt", QUICK).run(save=saved.append)
    kept = Report.from_json(Path("x"), saved[-1].to_json().encode())
    assert not kept.complete
    assert [len(row.measures) for row in kept.rows] == [3, 0]
    resumed = Run(files, WORDS, "fox.txt", QUICK, kept=kept)
    assert (resumed.known, resumed.steps) == (3, 6)
    found = resumed.run()
    assert found.complete
    assert found.rows[0] == kept.rows[0]
    assert len(calls) == 4 + 3


def test_the_reference_backend_has_no_lower_precisions(tiny_models: dict[str, Path]) -> None:
    run = Run(sources(tiny_models, "BF16"), WORDS, "fox.txt", replace(SETTINGS, backend="numpy"))
    assert [row.precision for row in run.report.rows] == [None]
    found = Run(sources(tiny_models, "BF16"), WORDS, "fox.txt", replace(QUICK, backend="numpy")).run()
    assert found.rows[0].cost
    assert found.rows[0].cost.runs_on == "numpy"


def test_files_of_several_models_have_references_of_their_own(tiny_models: dict[str, Path]) -> None:
    rows = families(sources(tiny_models, "Q4_K_M", "other", "BF16"))
    assert [(row.family, row.reference) for row in rows] == [(0, False), (1, True), (0, True)]
    chosen = families(sources(tiny_models, "Q4_K_M", "other", "BF16"), tiny_models["Q4_K_M"])
    assert [(row.family, row.reference) for row in chosen] == [(0, True), (1, True), (0, False)]


def test_models_of_one_shape_and_two_names_are_two_models(
    tiny_models: dict[str, Path], tokenizer: dict[str, Any], tmp_path: Path
) -> None:
    named = tokenizer | {"general.name": "a fine-tune"}
    other = Source.open(write_tiny(tmp_path / "tuned.gguf", "Q8_0", named), "tuned.gguf")
    files = [*sources(tiny_models, "BF16"), other]
    assert [(row.family, row.reference) for row in families(files)] == [(0, True), (1, True)]
    assert [(row.family, row.reference) for row in families(files, tiny_models["BF16"])] == [(0, True), (0, False)]


def test_a_reference_must_be_among_the_files(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"other-Q8_0\.gguf: reference: is none of the files to measure"):
        families(sources(tiny_models, "BF16"), tiny_models["other"])


def test_one_model_with_two_tokenizers_is_refused(
    tiny_models: dict[str, Path], tokenizer: dict[str, Any], tmp_path: Path
) -> None:
    tokens = list(tokenizer["tokenizer.ggml.tokens"])
    tokens[-1], tokens[-2] = tokens[-2], tokens[-1]
    other = write_tiny(tmp_path / "swapped.gguf", "Q8_0", tokenizer | {"tokenizer.ggml.tokens": tokens})
    files = [*sources(tiny_models, "BF16"), Source.open(other, "swapped.gguf")]
    with pytest.raises(UnsupportedError, match=r"swapped\.gguf: tokenizer\.ggml\.tokens: is another than in .*BF16"):
        Run(files, WORDS, "fox.txt", SETTINGS)


@pytest.mark.parametrize("words", ["", " \n", "The fox of the river."])
def test_a_text_shorter_than_a_window_is_refused(tiny_models: dict[str, Path], words: str) -> None:
    with pytest.raises(FileFormatError, match=r"^fox\.txt: text: has \d+ tokens; expected a window of 32 at least$"):
        Run(sources(tiny_models, "BF16"), words, "fox.txt", SETTINGS)


def test_what_fails_in_a_process_names_the_file(
    tiny_models: dict[str, Path], tmp_path: Path, tokenizer: dict[str, Any]
) -> None:
    broken = write_tiny(tmp_path / "gone.gguf", "Q8_0", tokenizer)
    run = Run([Source.open(broken, "gone.gguf")], WORDS, "fox.txt", QUICK)
    broken.unlink()
    with pytest.raises(GriffinError, match=r"gone\.gguf"):
        run.run()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF or not")
    with pytest.raises(FileFormatError, match=r"no\.gguf"):
        Source.open(tmp_path / "no.gguf", "no.gguf")


def test_a_crash_costs_one_measurement(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code that ends the process: what came before is saved, and the error names the file."""
    saved: list[Report] = []
    monkeypatch.setattr(module, "measure_quality", fresh.dying_quality)
    with pytest.raises(BackendError, match=r"tiny-BF16\.gguf: measuring it ended with status -6: ggml_abort"):
        Run(sources(tiny_models, "BF16"), WORDS, "fox.txt", QUICK).run(save=saved.append)
    assert saved[-1].rows[0].cost is not None
