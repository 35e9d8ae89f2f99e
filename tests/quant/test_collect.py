from collections.abc import Callable, Mapping
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SHAPES
from gguf import GGUFReader
from models import random_model, transformers_logits
from numpy.typing import NDArray
from transformers import RecurrentGemmaForCausalLM

from griffin_gguf.quant import collect
from griffin_gguf.quant.collect import Collector, Text, fingerprint
from griffin_gguf.quant.imatrix import ImportanceMatrix, products
from griffin_gguf.runtime import load
from griffin_gguf.runtime.backends.observe import Observer
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile

BAR = 1e-4  # of the largest sum of a weight's inputs
WORDS = ["bake", "lomi", "nura", "the ting", "日本\n"]
TEXT = Text("words.txt", " ".join(np.random.default_rng(4).choice(WORDS, 1400)))


def transformers_sums(model: Path, windows: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
    """Sums of squared inputs by weight, f64 [inputs], of transformers' modules, each window in one forward pass."""
    reference = RecurrentGemmaForCausalLM.from_pretrained(model.with_name("checkpoint"), dtype=torch.float32).eval()
    sums: dict[str, NDArray[np.float64]] = {}

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1]).square().sum(0)
            sums[name] = sums.get(name, 0) + squares.numpy()

        return hook

    with GgufFile.open(model) as file:
        for tensor in products(file.hyperparameters()):
            head = tensor.name in ("token_embd.weight", "output.weight")
            gate = "_gate_weight" in tensor.source  # the module's input, before it is cut into blocks
            module = "lm_head" if head else tensor.source.rpartition(".")[0]
            assert gate == module.endswith("rg_lru")
            reference.get_submodule(module).register_forward_pre_hook(watch(tensor.name))
    with torch.no_grad():
        for window in windows:
            reference(torch.tensor(window)[None], use_cache=False)
    return sums


def windows_of(model: Path, text: Text, ctx: int, count: int | None = None) -> NDArray[np.int32]:
    with load(model, "numpy") as loaded:
        ids = loaded.tokenizer.encode(text.content)
        whole = np.array(ids[: len(ids) // ctx * ctx], np.int32).reshape(-1, ctx)[:count]
        whole[:, 0] = loaded.tokenizer.bos
    return whole


def run(model: Path, target: Path, text: Text = TEXT, **options: Any) -> ImportanceMatrix:
    with Collector(model, text, target, threads=1, **options) as collector:
        return collector.run()


def check(found: ImportanceMatrix, expected: Mapping[str, NDArray[np.float64]], tokens: int) -> None:
    assert found.entries.keys() == expected.keys()
    for name, entry in found.entries.items():
        assert entry.counts.tolist() == [tokens]
        assert np.abs(entry.sums.reshape(-1) - expected[name]).max() <= BAR * expected[name].max(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_transformers_modules(tmp_path: Path, shape: str) -> None:
    model = random_model(tmp_path, **SHAPES[shape])
    found = run(model, tmp_path / "m.gguf", ctx=61, chunks=3)
    check(found, transformers_sums(model, windows_of(model, TEXT, 61, 3)), 3 * 61)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (3, 61, ("words.txt",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("ctx", "score"), [(513, False), (1100, False), (1100, True)])
def test_a_window_of_several_passes_carries_the_state(model: Path, tmp_path: Path, ctx: int, score: bool) -> None:
    found = run(model, tmp_path / "m.gguf", ctx=ctx, chunks=2, score=score)
    check(found, transformers_sums(model, windows_of(model, TEXT, ctx, 2)), 2 * ctx)


def test_the_file_holds_what_was_returned(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "m.gguf", ctx=100, chunks=2)
    read = ImportanceMatrix.load(tmp_path / "m.gguf")
    with GgufFile.open(model) as file:
        hp = file.hyperparameters()
    assert read.missing(hp) == []
    for name in found.entries:
        expected, got = found.importance(name), read.fitted(hp).importance(name)
        assert expected is not None
        assert got is not None
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    names = {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert names == {f"{name}{suffix}" for name in found.entries for suffix in (".in_sum2", ".counts")}


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_models_of_other_types_run_as_well(model: Path, tmp_path: Path, kind: str) -> None:
    exact = run(model, tmp_path / "m.gguf", ctx=100, chunks=2)
    rounded = run(random_model(tmp_path, kind), tmp_path / "r.gguf", ctx=100, chunks=2)
    for name, entry in exact.entries.items():
        other = rounded.entries[name].sums
        assert not np.array_equal(entry.sums, other)
        assert np.abs(other - entry.sums).max() <= 0.1 * entry.sums.max(), name


@pytest.mark.parametrize("ctx", [40, 101, 1100])
def test_the_later_half_of_each_window_is_scored(model: Path, tmp_path: Path, ctx: int) -> None:
    windows = windows_of(model, TEXT, ctx, 2)
    scores: list[float] = []
    for window in windows:
        logits = transformers_logits(model.with_name("checkpoint"), window).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        scores += [-logits[i, window[i + 1]] for i in range(ctx // 2, ctx - 1)]
    found = run(model, tmp_path / "m.gguf", ctx=ctx, chunks=2, score=True).collection
    assert found
    assert found.perplexity
    assert found.scored == len(scores) == 2 * (ctx - ctx // 2 - 1)
    value, error = found.perplexity
    assert value == pytest.approx(exp(np.mean(scores)), rel=1e-4)
    assert error == pytest.approx(value * np.std(scores) / np.sqrt(len(scores) - 1), rel=1e-4)


def test_nothing_is_scored_unless_asked_for(model: Path, tmp_path: Path) -> None:
    found = run(model, tmp_path / "m.gguf", ctx=40, chunks=1).collection
    assert found
    assert found.perplexity is None


class Stop:
    """Progress that interrupts after so many windows, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, done: int, total: int) -> None:
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("score", [False, True])
def test_an_interrupted_collection_ends_in_the_same_bytes(model: Path, tmp_path: Path, score: bool) -> None:
    options: dict[str, Any] = {"ctx": 50, "chunks": 9, "score": score, "threads": 1}
    run(model, tmp_path / "whole.gguf", ctx=50, chunks=9, score=score)
    target = tmp_path / "parts.gguf"
    for done, more in ((0, 2), (2, 1), (3, 4)):
        with Collector(model, TEXT, target, **options) as collector:
            assert (collector.done, collector.total) == (done, 9)
            with pytest.raises(KeyboardInterrupt):
                collector.run(Stop(more))
        assert ImportanceMatrix.load(target).chunk_count == done + more
        assert not ImportanceMatrix.load(target).complete
    with Collector(model, TEXT, target, **options) as collector:
        calls: list[tuple[int, int]] = []
        collector.run(lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_work_is_saved_on_the_way(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_SAVE_EVERY", 3)
    target = tmp_path / "m.gguf"
    seen = []

    def look(done: int, total: int) -> None:
        seen.append(ImportanceMatrix.load(target).chunk_count if target.exists() else 0)

    with Collector(model, TEXT, target, ctx=40, chunks=8, threads=1) as collector:
        collector.run(look)
    assert seen == [0, 0, 3, 3, 3, 6, 6, 6]
    assert ImportanceMatrix.load(target).chunk_count == 8


def test_a_collection_that_is_complete_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.gguf"
    run(model, target, ctx=40, chunks=3)
    before = target.stat()
    with monkeypatch.context() as patch:
        patch.setattr(Observer, "run", None)
        again = run(model, target, ctx=40, chunks=3)
    assert target.stat() == before
    assert again.chunk_count == 3
    assert run(model, target, ctx=40, chunks=4).chunk_count == 4  # another one, and so begun anew


def test_more_or_fewer_windows_may_be_asked_for_when_it_goes_on(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "whole.gguf", ctx=40, chunks=6)
    target = tmp_path / "m.gguf"
    with Collector(model, TEXT, target, ctx=40, chunks=5, threads=1) as collector, pytest.raises(KeyboardInterrupt):
        collector.run(Stop(3))
    before = target.read_bytes()
    with pytest.raises(UnsupportedError, match="holds 3 windows already, more than the 2 asked for"):
        run(model, target, ctx=40, chunks=2)
    assert target.read_bytes() == before
    run(model, target, ctx=40, chunks=6)
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_an_unfinished_collection_of_something_else_is_kept(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with Collector(model, TEXT, target, ctx=40, threads=1) as collector, pytest.raises(KeyboardInterrupt):
        collector.run(Stop(2))
    before = target.read_bytes()
    other = random_model(tmp_path, seed=1)
    with pytest.raises(UnsupportedError, match="an unfinished matrix of another text; remove it"):
        run(model, target, Text("words.txt", TEXT.content[:-9]), ctx=40)
    with pytest.raises(UnsupportedError, match="of another window;"):
        run(model, target, ctx=41)
    with pytest.raises(UnsupportedError, match="of another model and window;"):
        run(other, target, ctx=41)
    assert target.read_bytes() == before


def test_a_finished_matrix_and_any_other_file_are_replaced(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    expected = run(model, target, ctx=40, chunks=2).entries
    run(model, target, ctx=41, chunks=3)
    assert ImportanceMatrix.load(target).chunk_size == 41
    target.write_text("some notes")
    run(model, target, ctx=40, chunks=2)
    found = ImportanceMatrix.load(target).entries
    assert all(np.allclose(found[name].sums.reshape(-1), expected[name].sums.reshape(-1)) for name in expected)


def test_others_are_joined_at_the_end(model: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "a.gguf", ctx=40, chunks=3)
    alone = run(model, tmp_path / "b.gguf", Text("b.txt", TEXT.content[500:]), ctx=40, chunks=2)
    joined = run(
        model, tmp_path / "c.gguf", Text("b.txt", TEXT.content[500:]), ctx=40, chunks=2,
        others=[ImportanceMatrix.load(tmp_path / "a.gguf")],
    )  # fmt: skip
    assert ImportanceMatrix.load(tmp_path / "c.gguf").chunk_count == joined.chunk_count == 5
    assert joined.datasets == ("words.txt", "b.txt")
    for name in joined.entries:
        sums = first.entries[name].sums + alone.entries[name].sums
        assert joined.importance(name) == pytest.approx(sums / 200, rel=1e-5)


def test_others_that_do_not_fit_are_found_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = run(model, tmp_path / "a.gguf", ctx=40, chunks=1)
    monkeypatch.setattr(Observer, "run", None)
    with pytest.raises(UnsupportedError, match=r"imatrix\.chunk_size: expected 40"):
        run(model, tmp_path / "b.gguf", ctx=41, others=[other])
    foreign = replace(other, entries={"x.weight": other.entries["token_embd.weight"]})
    with pytest.raises(FileFormatError, match=r"x\.weight: is no matrix product of this model"):
        run(model, tmp_path / "b.gguf", ctx=40, others=[foreign])
    assert not (tmp_path / "b.gguf").exists()


def test_inputs_that_are_not_finite_are_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Observer.run
    target = tmp_path / "m.gguf"
    calls = 0

    def broken(self: Observer, tokens: NDArray[np.int32], *, logits: bool = False) -> Any:
        nonlocal calls
        calls += 1
        sums, rows = plain(self, tokens, logits=logits)
        if calls == 3:
            sums["blk.2.attn_k.weight"] = sums["blk.2.attn_k.weight"] * np.inf
        return sums, rows

    monkeypatch.setattr(Observer, "run", broken)
    with pytest.raises(GriffinError, match=r"blk\.2\.attn_k\.weight: window 2: its inputs hold NaN or infinity"):
        run(model, target, ctx=40)
    assert ImportanceMatrix.load(target).chunk_count == 2  # what was fine is kept


def test_what_cannot_be_collected_is_refused(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedError, match=r"t\.txt: has \d tokens; expected at least a window of 512"):
        run(model, target, Text("t.txt", "bake"))
    with pytest.raises(UnsupportedError, match="ctx: expected at least 4 tokens, found 3"):
        run(model, target, ctx=3)
    with pytest.raises(GriffinError, match="is the input as well"):
        run(model, model)
    with pytest.raises(GriffinError, match="does not exist"):
        run(model, tmp_path / "no" / "m.gguf")
    with pytest.raises(FileFormatError, match="cannot be read"):
        run(tmp_path / "absent.gguf", target)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_tells_models_apart(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    prints = []
    for path in (model, copy, random_model(tmp_path, seed=1)):
        with GgufFile.open(path) as file:
            prints.append(fingerprint(file))
    assert prints[0] == prints[1] != prints[2]
