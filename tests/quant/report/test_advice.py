from dataclasses import replace
from math import log

import numpy as np
import pytest
import reports
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.quant.report.advice import best, choices, choose, drift, increase, pareto, sentence

GIB = 1 << 30


def test_pareto_is_what_no_other_beats() -> None:
    small, good = reports.row("small", "Q2_K", 5, 41.0, 0.05), reports.row("good", "BF16", 16, 38.0)
    beaten = reports.row("beaten", "Q4_0", 9, 42.0, 0.06)
    assert pareto([good, beaten, small, replace(good, windows=None)]) == [small, good]


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(30, 60)), min_size=1, max_size=12))
def test_pareto_by_its_definition(files: list[tuple[int, int]]) -> None:
    rows = [reports.row(str(i), "Q8_0", size, float(loss), 0.1) for i, (size, loss) in enumerate(files)]
    front = {(row.file_size, row.windows.perplexity) for row in pareto(rows) if row.windows}
    points = {(row.file_size, row.windows.perplexity) for row in rows if row.windows}
    assert front == {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}


def test_increase_is_a_ratio_of_perplexities_of_one_vocabulary() -> None:
    one, other = reports.row("a", "Q8_0", 8, 40.0, 0.1), reports.row("b", "BF16", 16, 38.0)
    assert one.windows
    assert other.windows
    real = [
        replace(row, windows=replace(row.windows, bits_per_byte=row.windows.tokens * log(p) / (40000 * log(2))))
        for row, p in ((one, 40.0), (other, 38.0))
        if row.windows
    ]
    assert increase(*real) == pytest.approx(40 / 38 - 1)


def test_the_fastest_of_the_good_ones_is_chosen_and_what_does_not_fit_is_not() -> None:
    rows = reports.typical().files
    assert choose(rows, 16 * GIB).row is rows[1]  # within a percent of BF16, and twice as fast
    assert choose(rows, 16 << 20).row is rows[2]  # needs 10 of the 12 MiB that a model may take there
    assert choose(rows, 8 << 20).row is None


def test_a_file_that_is_ahead_by_chance_is_not_the_best() -> None:
    base, lucky = reports.row("base", "BF16", 16, 38.0), reports.row("lucky", "Q8_0", 8, 37.9, 1e-4)
    assert best([lucky, base]) is base
    assert best([lucky]) is lucky
    assert "below that of base.gguf" in sentence(reports.report(base, lucky), 16 * GIB)


def test_advice_in_a_sentence() -> None:
    report = reports.typical()
    found = sentence(report, 16 * GIB)
    assert found.startswith("With 16 GiB of memory take base-Q8_0.gguf: it needs 16 MiB, its perplexity is ")
    assert found.endswith(" % above that of base-BF16.gguf, and it writes 2 times as fast.")
    assert sentence(report, 1 << 20) == (
        "With 1 MiB of memory none of these files runs well: the smallest, base-Q2_K.gguf, needs 10 MiB."
    )
    alone = reports.report(report.rows[0])
    assert sentence(alone, GIB).endswith("it needs 32 MiB, and none predicts the text better.")
    assert sentence(reports.report(replace(report.rows[0], windows=None)), GIB) == "Nothing has been measured yet."


def test_choices_name_a_size_only_where_the_choice_changes() -> None:
    rows = [
        replace(row, cost=reports.cost(needed, speed))
        for row, needed, speed in zip(
            reports.typical().files, (10 * GIB, 3 * GIB, GIB // 2), (1.0, 2.0, 3.0), strict=True
        )
    ]
    found = choices(rows)
    assert [(choice.memory // GIB, choice.row and choice.row.type) for choice in found] == [(1, "Q2_K"), (4, "Q8_0")]
    nothing = choices([replace(rows[0], cost=reports.cost(3 * GIB))])
    assert [(choice.memory // GIB, choice.row and choice.row.type) for choice in nothing] == [(1, None), (4, "BF16")]


def test_errors_that_gather_are_told_from_those_that_do_not() -> None:
    _, steady, _, rounded = reports.typical().rows
    flat = drift(steady, 512)
    assert [part.start for part in flat] == [512, 5632, 10752, 15872]
    assert all(part.ratio == pytest.approx(1) and part.stderr == pytest.approx(0, abs=1e-9) for part in flat)
    rising = drift(rounded, 512)
    assert rising[0].ratio < rising[1].ratio < rising[2].ratio < rising[3].ratio
    assert rising[3].ratio > 700
    assert all(part.stderr > 0 for part in rising)
    assert drift(reports.typical().rows[0], 512) == []


def test_a_file_that_equals_its_reference_has_no_drift() -> None:
    same = reports.row("a", "Q8_0", 8, 38.0, 0.0)
    assert drift(same, 512) == []


def test_only_what_is_true_is_said_of_the_reference() -> None:
    base, ahead = reports.row("base", "Q5_K_M", 6, 38.0), reports.row("ahead", "BF16", 16, 37.0, 1e-4)
    base = replace(base, cost=reports.cost(decode=999.0))
    found = sentence(reports.report(base, ahead), 16 * GIB)
    assert found.endswith("The others are compared with it; ahead.gguf predicts the text better.")


def test_the_error_of_a_ratio_counts_what_neighbouring_windows_share() -> None:
    """Windows whose error is carried on to the next: the standard error against the spread over many such texts."""
    rng, ratios, errors, naive = np.random.default_rng(1), [], [], []
    for _ in range(300):
        fresh = rng.gamma(4, 1, 4 * 200 + 1)
        noise = rng.normal(0, 0.3, len(fresh))
        for i in range(1, len(noise)):
            noise[i] += 0.6 * noise[i - 1]
        carried = fresh * (1.2 + noise)
        row = reports.row("a", "Q8_0", 8, 38.0, 1e-4)
        assert row.windows
        assert row.stream
        row = replace(
            row,
            windows=replace(row.windows, halves_kl=fresh.tolist()),
            stream=replace(row.stream, halves_kl=carried.tolist()),
        )
        last = drift(row, 512)[-1]
        ratios.append(last.ratio)
        errors.append(last.stderr)
        rest = (carried - last.ratio * fresh)[-200:]
        naive.append(rest.std(ddof=1) / (fresh[-200:].mean() * 200**0.5))
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.2)
    assert np.mean(naive) < 0.7 * np.std(ratios)  # as if windows were independent


def test_the_ratio_and_its_error_are_those_of_windows_drawn_anew() -> None:
    """The standard error against the spread over many such texts."""
    rng, ratios, errors = np.random.default_rng(0), [], []
    for _ in range(300):
        fresh = rng.gamma(4, 1, 401)
        carried = 1.2 * fresh * rng.gamma(50, 1 / 50, 401)
        row = reports.row("a", "Q8_0", 8, 38.0, 1e-4)
        assert row.windows
        assert row.stream
        row = replace(
            row,
            windows=replace(row.windows, halves_kl=fresh.tolist()),
            stream=replace(row.stream, halves_kl=carried.tolist()),
        )
        ratios.append(drift(row, 512)[-1].ratio)
        errors.append(drift(row, 512)[-1].stderr)
    assert np.mean(ratios) == pytest.approx(1.2, rel=0.02)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.2)
