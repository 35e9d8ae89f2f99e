"""Depth on a model that only counts, on the demo model, and its plots."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import griffins
import pytest
from golden import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GemmaConfig, MistralConfig

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant import depth as depths
from griffin_gguf.quant.depth import CACHES, Change, Depth, Point, measure_depth, rows
from griffin_gguf.quant.plots import draw_depth
from griffin_gguf.quant.wording import size_text
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.model import Model

TOKENS = [*range(100, 350)]


class Counting:
    """A model that keeps what it is fed, on a clock of its own, and grows by a byte a token."""

    def __init__(self, patch: pytest.MonkeyPatch, slower: float = 1.0) -> None:
        self.hp = replace(griffins.TWO_B, window=128)
        self.path, self.file = Path("counting.gguf"), SimpleNamespace(metadata={"general.file_type": 15})
        self.now, self.read, self.slower = 0.0, 0, slower
        self.states = list[State]()
        patch.setattr(depths, "perf_counter", lambda: self.now)
        patch.setattr(depths, "resident_bytes", lambda: (10_000 + self.read, self.read))

    def new_state(self) -> "State":
        self.states.append(State(self))
        return self.states[-1]

    def forward(self, tokens: Any, state: "State") -> None:
        state.fed.append([int(token) for token in tokens])
        state.position += len(tokens)
        self.read += len(tokens)
        self.now += len(tokens) * (self.slower if state.position > 4000 else 1.0) / 100


class State:
    """Everything it has been fed, call by call."""

    nbytes = 77

    def __init__(self, model: Counting) -> None:
        self.model, self.position, self.fed = model, 0, list[list[int]]()
        self.copies = list[State]()

    def copy(self) -> "State":
        other = State(self.model)
        other.position, other.fed = self.position, [*self.fed]
        self.copies.append(other)
        return other


def depth(model: Counting, positions: list[int], text: Sequence[int] = (), **options: Any) -> Depth:
    return measure_depth(cast(Model, model), positions, text, **options)


def test_caches_are_those_of_the_published_configs() -> None:
    gemma, llama, mistral = CACHES
    # transformers' defaults are Gemma-7B and Mistral-7B-v0.1
    for cache, config in ((gemma, GemmaConfig()), (mistral, MistralConfig())):
        width = config.head_dim or config.hidden_size // config.num_attention_heads
        assert (cache.layers, cache.kv_heads) == (config.num_hidden_layers, config.num_key_value_heads)
        assert cache.head_width == width
    assert mistral.window == MistralConfig().sliding_window
    # keys and values, two bytes a number, layer by layer
    assert gemma.nbytes(1) == 448 * 1024
    assert llama.nbytes(1) == 128 * 1024
    assert gemma.nbytes(1_000_000) == 1_000_000 * gemma.nbytes(1)
    assert mistral.nbytes(4096) == mistral.nbytes(1_000_000) == llama.nbytes(4096) == 512 << 20
    assert mistral.nbytes(4095) < mistral.nbytes(4096)


def test_rows_are_powers_of_two_the_beginning_and_the_end() -> None:
    assert rows(10_000, 3000) == [256, 512, 1024, 2048, 3000, 4096, 8192, 10_000]
    assert rows(8192, 3000) == [256, 512, 1024, 2048, 3000, 4096, 8192]
    assert rows(100, 3000) == [100]
    assert rows(1, 3000) == [1]


@settings(max_examples=40)
@given(
    positions=st.lists(st.integers(1, 3000), min_size=1, max_size=6, unique=True).map(sorted),
    decode=st.integers(1, 40),
)
def test_every_token_is_read_once_in_order_and_the_last_ones_alone(
    monkeypatch: pytest.MonkeyPatch, positions: list[int], decode: int
) -> None:
    model = Counting(monkeypatch)
    found = depth(model, positions, TOKENS, decode=decode)
    (state,) = model.states
    fed = state.fed
    assert [token for call in fed for token in call] == [TOKENS[i % len(TOKENS)] for i in range(positions[-1])]
    assert {len(call) for call in fed} <= {512, 64, 1}
    assert [point.position for point in found.points] == positions
    at = 0
    alone: list[bool] = []
    for call in fed:
        alone += [len(call) == 1] * len(call)
    for position in positions:
        assert all(alone[max(at, position - decode) : position])
        at = position
    assert found.change is None


def test_speed_memory_and_state_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Point] = []
    ways: list[tuple[int, int]] = []
    found = depth(
        Counting(monkeypatch, slower=2.0),
        [300, 8000],
        progress=lambda done, total: ways.append((done, total)),
        tell=told.append,
    )
    assert found.points == told
    assert [point.speed for point in told] == pytest.approx([100, 50])
    assert [(point.position, point.state) for point in told] == [(300, 77), (8000, 77)]
    assert told[1].rss - told[0].rss == 7700  # a byte a token
    assert [point.rss - (point.anonymous or 0) for point in told] == [10_000, 10_000]
    assert (found.path, found.type) == ("counting.gguf", "Q4_K_M")
    assert ways[-1] == (8000, 8000)
    assert ways == sorted(ways)


def test_the_end_is_compared_with_the_beginning_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting(monkeypatch, slower=1.25)
    found = depth(model, [3000, 9000], rounds=9)
    change = found.change
    assert change is not None
    assert (change.early, change.late, change.state) == (3000, 9000, 0)
    assert (change.speed, change.low, change.high) == pytest.approx((0.8, 0.8, 0.8))
    assert change.rss == change.anonymous == 6000  # since both states were there
    (state,) = model.states
    start = state.copies[-1]
    assert start.position - 3000 == state.position - 9000 > 9
    assert {len(call) for call in start.fed[-(start.position - 3000) :]} == {1}


@pytest.mark.parametrize("positions", [[3000, 5999], [2999, 9000], [9000]])
def test_there_is_no_comparison_without_a_beginning_and_twice_the_way(
    monkeypatch: pytest.MonkeyPatch, positions: list[int]
) -> None:
    assert depth(Counting(monkeypatch), positions).change is None


def test_the_beginning_is_where_the_rings_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting(monkeypatch)
    assert depths.early_position(cast(Model, model)) == 3000
    model.hp = replace(model.hp, window=4096)
    assert depths.early_position(cast(Model, model)) == 4096 + 512


@pytest.mark.parametrize("positions", [[], [0], [5, 5], [7, 3], [-1]])
def test_positions_that_do_not_rise_are_refused(monkeypatch: pytest.MonkeyPatch, positions: list[int]) -> None:
    with pytest.raises(UnsupportedError, match=r"^positions: expected whole numbers that rise"):
        depth(Counting(monkeypatch), positions)


def test_a_model_takes_the_bytes_of_the_formula_at_every_position(tmp_path: Path) -> None:
    path = tmp_path / "demo.gguf"
    convert(ROOT / "cli" / "demo_model", [(path, "Q4_K_M")])
    with load(path, backend="ggml", threads=1) as model:
        hp, found = model.hp, measure_depth(model, rows(6100, 3000), decode=4, rounds=3)
    # docs/gguf-format.md: 16 · W a recurrent layer, 4 · R · J an attention layer in f16
    attention = hp.layers - sum(hp.recurrent)
    formula = 16 * hp.lru_width * sum(hp.recurrent) + 4 * (hp.window + 512) * hp.kv_heads * hp.head_width * attention
    assert {point.state for point in found.points} == {formula}
    assert found.change is not None
    assert found.change.state == 0
    assert found.change.rss < 8 << 20  # a Transformer's keys of 3,100 tokens alone would be 25 MiB


DEPTH = Depth(
    "a$b_c$.gguf",
    "Q4_K_M",
    [Point(p, 15.0 + p % 2, 2 << 30, 1 << 28, 21_708_800) for p in rows(70_000, 3000)],
    Change(3000, 70_000, 0.997, 0.99, 1.01, 0, 0, 0),
)


def test_json_holds_the_points_and_the_caches_beside_them() -> None:
    found = json.loads(DEPTH.to_json())
    assert [Point(**point) for point in found["points"]] == DEPTH.points
    assert Change(**found["change"]) == DEPTH.change
    assert [cache["name"] for cache in found["caches"]] == ["Gemma-7B", "Llama-3-8B", "Mistral-7B-v0.1"]
    for cache, known in zip(found["caches"], CACHES, strict=True):
        assert cache["bytes"] == [known.nbytes(point.position) for point in DEPTH.points]
        assert cache["source"].startswith("https://huggingface.co/")


def test_a_plot_is_drawn_twice_the_same(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = draw_depth(DEPTH, tmp_path), draw_depth(DEPTH, tmp_path / "again")
    assert [path.name for path in first] == ["depth.svg", "depth.png"]
    assert first[1].read_bytes().startswith(b"\x89PNG")
    assert first[0].read_bytes() == second[0].read_bytes()
    svg = first[0].read_text(encoding="utf-8")
    # matplotlib writes every text as a comment before its outlines
    for text in ("Gemma-7B: 29.9 GiB", "Llama-3-8B: 8.54 GiB", "Mistral-7B-v0.1: 512 MiB", "state: 20.7 MiB"):
        assert text in svg
    assert "0.997 of the speed" in svg
    assert "a$b_c$" in svg


@pytest.mark.parametrize("positions", [[1], [5, 9], rows(4096, 3000), rows(2**24, 3000)])
def test_a_plot_of_few_or_many_rows(tmp_path: Path, positions: list[int]) -> None:
    points = [Point(position, 2000, 60 << 20, None, 835_584) for position in positions]
    svg, png = draw_depth(Depth("demo.gguf", "Q8_0", points, None), tmp_path)
    assert "of the speed" not in svg.read_text(encoding="utf-8")
    assert png.stat().st_size > 10_000


def test_labels_do_not_lie_on_each_other(tmp_path: Path) -> None:
    # Up to 4,096 tokens, Llama-3-8B and Mistral-7B-v0.1 keep as much.
    points = [Point(p, 15, 512 << 20, None, 21_708_800) for p in (1024, 4096)]
    svg = draw_depth(Depth("a.gguf", "Q8_0", points, None), tmp_path)[0].read_text(encoding="utf-8")
    lines = svg.splitlines()
    heights = sorted(
        float(lines[i + 1].split("translate(")[1].split(")")[0].split()[1])
        for i, line in enumerate(lines)
        if line.strip() in ("<!-- Llama-3-8B: 512 MiB -->", "<!-- Mistral-7B-v0.1: 512 MiB -->")
    )
    assert len(heights) == 2
    assert heights[1] - heights[0] > 9  # points; the letters are 9 high


def test_without_matplotlib_plots_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"^plots need matplotlib: pip install 'griffin-gguf\[report\]'$"):
        draw_depth(DEPTH, tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (835_584, "816 KiB"), (29 << 30, "29 GiB"), (3 << 50, "3072 TiB")],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert size_text(count) == text
