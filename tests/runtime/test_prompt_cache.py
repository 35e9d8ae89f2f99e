"""Snapshots by token prefix: what is found, what goes first, and what comes back from a folder."""

import stat
import threading
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.runtime.errors import FileFormatError
from griffin_gguf.runtime.prompt_cache import PromptCache
from griffin_gguf.runtime.saved_state import load
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.snapshot_folder import SnapshotFolder

MODEL = "ab" * 32
F32 = np.dtype(np.float32)
SIZE = 100_000  # bytes, beside which a text's tokens are few
LAYOUT = {"blk.0.h": (F32, (SIZE // 4,))}


def snapshot(position: int, logits: bool = False) -> Snapshot:
    """`SIZE` bytes that say which it is."""
    array = np.full(SIZE // 4, position, np.float32)
    return Snapshot(MODEL, position, LAYOUT, {"blk.0.h": array}, np.zeros(3, np.float32) if logits else None)


def from_file(path: Path) -> Snapshot:
    saved = load(path, MODEL, {**LAYOUT, "logits": (F32, (3,))})
    return Snapshot(MODEL, saved.position, LAYOUT, saved.arrays, saved.logits)


def filled(texts: Sequence[Sequence[int]], nbytes: int = 1 << 30) -> PromptCache:
    cache = PromptCache(nbytes)
    for text in texts:
        cache.add(text, snapshot(len(text)))
    return cache


def longest(cache: PromptCache, text: Sequence[int]) -> int:
    """Tokens of the longest beginning that is found."""
    found = cache.find(text)
    return found[0] if found else 0


def counts(cache: PromptCache, text: Sequence[int], root: str = "") -> list[int]:
    """Lengths of the beginnings of `text` that are kept."""
    found: list[int] = []
    for end in range(1, len(text) + 1):
        hit = cache.find([*text[:end], -1], root)  # one more, so that logits do not matter
        if hit and hit[0] == end:
            found.append(end)
    return found


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12)


@given(TEXTS, st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_the_longest_beginning_is_found(kept: list[list[int]], text: list[int]) -> None:
    cache = filled(kept)
    expected = max((len(k) for k in kept if len(k) < len(text) and text[: len(k)] == k), default=None)
    found = cache.find(text)
    assert (found and found[0]) == expected
    if found:
        assert found[1].position == found[0]


def test_all_of_a_prompt_is_found_only_with_its_logits() -> None:
    cache = filled([[1, 2], [1, 2, 3]])
    assert longest(cache, [1, 2, 3]) == 2
    cache.add([1, 2, 3], snapshot(3, logits=True))
    assert longest(cache, [1, 2, 3]) == 3
    cache.add([1, 2, 3], snapshot(3))  # takes nothing away
    assert longest(cache, [1, 2, 3]) == 3
    assert cache.nbytes == 2 * SIZE + 12 + 8 + 12


def test_roots_are_texts_of_their_own() -> None:
    cache = PromptCache(10 * SIZE)
    cache.add([1, 2], snapshot(2), "a document")
    assert cache.find([1, 2, 3]) is None
    assert cache.find([1, 2, 3], "a document")
    cache.add([1], snapshot(1))
    cache.add([1, 2, 3, 4], snapshot(4))
    assert longest(cache, [1, 2, 3]) == 1


def test_the_densest_run_is_thinned_first() -> None:
    text = list(range(1000))
    cache = PromptCache(int(5.5 * SIZE))
    for end in (100, 200, 400, 410, 800):
        cache.add(text[:end], snapshot(end))
    cache.add(text[:990], snapshot(990))
    assert counts(cache, text) == [100, 200, 400, 800, 990]
    cache.add(text[:600], snapshot(600))  # between 400 and 800: 100 is worth least, being the oldest too
    assert counts(cache, text) == [200, 400, 600, 800, 990]


def test_a_dense_run_is_thinned_and_not_lost() -> None:
    text = list(range(1000))
    cache = PromptCache(20 * SIZE + 100_000)
    for end in range(10, 1000, 10):
        cache.add(text[:end], snapshot(end))
    kept = counts(cache, text)
    assert 15 <= len(kept) <= 20
    assert max(later - earlier for earlier, later in pairwise([0, *kept])) <= 400


def test_what_nobody_uses_fades() -> None:
    cache = PromptCache(int(3.5 * SIZE))
    old = [9] * 500
    cache.add(old, snapshot(500))
    for n in range(200):
        cache.add([n] * 50, snapshot(50))
    assert cache.find([*old, 1]) is None


def test_what_is_used_stays() -> None:
    cache = PromptCache(int(3.5 * SIZE))
    system = [9] * 500
    cache.add(system, snapshot(500))
    for n in range(200):
        cache.add([n] * 50, snapshot(50))
        assert cache.find([*system, n])


@given(TEXTS, st.integers(1, 8))
def test_memory_is_bounded_and_the_tree_stays_whole(kept: list[list[int]], room: int) -> None:
    cache = filled(kept, nbytes=room * SIZE + SIZE // 2)
    entries = cache._entries.values()
    assert cache.nbytes == sum(SIZE + 4 * len(entry.tokens) for entry in entries) <= room * SIZE + SIZE // 2
    assert min(room, len({tuple(k) for k in kept})) - 1 <= len(cache) <= room
    assert cache._lengths == Counter(len(entry.tokens) for entry in entries)
    for entry in entries:
        text = entry.tokens.tolist()
        before = [e for e in entries if len(e.tokens) < len(text) and text[: len(e.tokens)] == e.tokens.tolist()]
        assert entry.parent is max(before, key=lambda e: len(e.tokens), default=None)
        assert entry.children == {e for e in entries if e.parent is entry}


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = PromptCache(SIZE - 1)
    cache.add([1], snapshot(1))
    assert (len(cache), cache.nbytes) == (0, 0)


def test_answers_are_remembered_by_what_stands_before_them() -> None:
    cache = PromptCache(16 * 10_000)
    cache.remember([1, 2], "Hello", [7, 8])
    assert cache.said([1, 2], "Hello") == [7, 8]
    assert cache.said([1, 2], "Hello ") is None
    assert cache.said([1], "Hello") is None
    assert cache.said([1, 2], "Hello", "a document") is None
    for n in range(100):
        cache.remember([n], "", [n])
        assert cache.said([1, 2], "Hello") == [7, 8]  # what is used stays
    assert cache.said([0], "") is None
    assert cache.said([99], "") == [99]


def test_a_cache_without_room_remembers_nothing() -> None:
    cache = PromptCache(0)
    cache.add([1], snapshot(1))
    cache.remember([1, 2], "Hello", [7, 8])
    assert cache.find([1, 2]) is None
    assert cache.said([1, 2], "Hello") is None


def folder(path: Path, nbytes: int = 1 << 30) -> SnapshotFolder:
    return SnapshotFolder(path, nbytes, "ggml-abab", from_file)


def test_what_leaves_memory_goes_to_the_folder_and_comes_back(tmp_path: Path) -> None:
    cache = PromptCache(int(1.5 * SIZE), folder(tmp_path / "cache"))
    cache.add([1, 2], snapshot(2, logits=False))
    cache.add([3, 4, 5], snapshot(3))
    cache.close()
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    later = PromptCache(int(1.5 * SIZE), folder(tmp_path / "cache"))
    for text in ([1, 2, 9], [3, 4, 5, 9]):
        found = later.find(text)
        assert found
        assert found[0] == len(text) - 1
        assert found[1].arrays["blk.0.h"].tolist() == [len(text) - 1] * (SIZE // 4)
    assert later.find([1, 9]) is None


def test_the_folder_is_bounded_and_the_last_used_stay(tmp_path: Path) -> None:
    cache = PromptCache(1 << 30, folder(tmp_path))
    for n in range(6):
        cache.add([n, n], snapshot(2))
    cache.close()
    size = next(tmp_path.iterdir()).stat().st_size
    small = folder(tmp_path, 3 * size)
    later = PromptCache(1 << 30, small)
    assert later.find([0, 0, 9])  # used now
    later.add([7, 7], snapshot(2))
    later.close()
    kept = PromptCache(1 << 30, folder(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3
    assert [n for n in range(8) if kept.find([n, n, 9])] == [0, 5, 7]


def test_a_damaged_file_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PromptCache(1 << 30, folder(tmp_path))
    cache.add([1, 2], snapshot(2))
    cache.add([1], snapshot(1))
    cache.close()
    damaged = max(tmp_path.iterdir(), key=lambda path: "-2-" in path.name)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    later = PromptCache(1 << 30, folder(tmp_path))
    found = later.find([1, 2, 3])
    assert found
    assert found[0] == 1
    assert not damaged.exists()
    assert "cannot be used" in caplog.text
    with pytest.raises(FileFormatError):
        from_file(next(tmp_path.iterdir()).with_name("none"))


def test_files_of_others_are_let_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", "ggml-cdcd-1-" + "0" * 32 + ".state", "ggml-abab-x.state"):
        (tmp_path / name).write_text("mine")
    cache = PromptCache(1 << 30, folder(tmp_path, 0))
    cache.add([1], snapshot(1))
    cache.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_many_threads_at_once() -> None:
    cache = PromptCache(20 * SIZE)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 3, rng.integers(1, 12)).tolist() for _ in range(300)]
    wrong: list[object] = []

    def work(part: list[list[int]]) -> None:
        for text in part:
            cache.add(text, snapshot(len(text)))
            found = cache.find([*text, 5])
            if found and found[1].position != found[0]:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(texts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.nbytes <= 20 * SIZE
