import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from griffin_gguf.quant.recall import Mean, Point, Recall, Share
from griffin_gguf.quant.recall_plots import draw_recall
from griffin_gguf.quant.recall_tasks import TASKS
from griffin_gguf.runtime.errors import UnsupportedError


def point(task: str, distance: int) -> Point:
    share = Share(0.5, 0.4, 0.6) if TASKS[task].asks else None
    return Point(task, distance, distance / 256, distance / 1024, share, share, Mean(2 / distance, 1e-3), Mean(4, 0.1))


def recall(distances: Sequence[int], tasks: Sequence[str] = ("passkey", "phonebook", "passage")) -> Recall:
    points = [point(task, distance) for task in tasks for distance in distances]
    return Recall("folder/a$b_c$.gguf", "Q4_K_M", 256, 1024, "heldout.txt", 50, 0, False, points=points)


def test_a_plot_is_drawn_twice_the_same(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    found = recall([64, 128, 256, 512, 1024, 2048, 4096])
    first, second = draw_recall(found, tmp_path), draw_recall(found, tmp_path / "again")
    assert [path.name for path in first] == ["recall.svg", "recall.png"]
    assert first[1].read_bytes().startswith(b"\x89PNG")
    assert first[0].read_bytes() == second[0].read_bytes()
    svg = first[0].read_text(encoding="utf-8")
    # matplotlib writes every text as a comment before its outlines
    for text in ("passkey, greedy", "phonebook", "passage", "by chance", "a$b_c$.gguf (Q4_K_M), 50 trials", "4,096"):
        assert text in svg
    assert svg.count(" window -->") == svg.count(" length -->") == 2  # in both parts


@pytest.mark.parametrize("distances", [[300], [64, 65], [2**i for i in range(6, 22)]])
def test_a_plot_of_few_or_many_distances(tmp_path: Path, distances: list[int]) -> None:
    _, png = draw_recall(recall(distances, tuple(TASKS)), tmp_path)
    assert png.stat().st_size > 10_000


def test_a_plot_of_passages_has_no_answers(tmp_path: Path) -> None:
    svg = draw_recall(recall([64, 256], ("passage",)), tmp_path)[0].read_text(encoding="utf-8")
    assert "by chance" not in svg
    assert "nats a token" in svg


def test_without_matplotlib_plots_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"^plots need matplotlib"):
        draw_recall(recall([64]), tmp_path)
