"""What llama.cpp says through `LlamaRunner` is what llama-cpp-python's own class says, however it is asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from foreign import BERT, KINDS, foreign
from numpy.typing import NDArray

from griffin_gguf.quant import llama
from griffin_gguf.quant.llama import LlamaRunner
from griffin_gguf.quant.runner import open_runner
from griffin_gguf.runtime.errors import BackendError, FileFormatError, GriffinError, UnsupportedError

TEXT = (
    "The fox of the river said that nothing under the moon grows for ever.\n\n"
    'def forward(tokens, state):  # returns logits\n    "größer"; 日本語 <eos>\t\t'
) * 3

#: Of kinds: those without keys and values of every token.
FIXED = ("mamba", "rwkv7")

#: Logits are up to 10 in size. llama.cpp keeps keys and values in f16, and sums them up in f16 for single tokens.
CLOSE = {"atol": 0.1, "rtol": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return {kind: foreign(folder / f"{kind}.gguf", kind, bpe=kind == "qwen2") for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def runner(files: dict[str, Path], kind: str) -> Iterator[LlamaRunner]:
    with opened(files[kind]) as found:
        yield found


def opened(path: Path, context: int = 1024) -> LlamaRunner:
    found = open_runner(path, threads=1, context=context)
    assert isinstance(found, LlamaRunner)
    return found


def oracle(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Logits [T, V] by llama-cpp-python's own class."""
    model = llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=True, verbose=False
    )
    model.eval(tokens)
    found: Any = model.scores[: len(tokens)]
    model.close()
    return np.array(found, np.float32)


def agree(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert abs(expected).max() > 2, "logits that say nothing prove nothing"


def test_logits_are_those_of_llama_cpp_python(runner: LlamaRunner) -> None:
    tokens = runner.encode(TEXT)
    expected = oracle(runner.path, tokens)
    found = runner.forward(tokens, runner.new_state(), every=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(runner.forward(tokens, runner.new_state()), expected[-1], atol=1e-4, rtol=0)


def test_how_a_text_is_cut_changes_nothing(runner: LlamaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = runner.encode(TEXT)
    whole = runner.forward(tokens, runner.new_state(), every=True)
    state = runner.new_state()
    parts = [runner.forward(tokens[a:b], state, every=True) for a, b in ((0, 1), (1, 80), (80, 81), (81, len(tokens)))]
    assert state.position == len(tokens)
    agree(np.concatenate(parts), whole)
    del state
    monkeypatch.setattr(runner, "_every", 7)  # as with a vocabulary of two million
    agree(runner.forward(tokens, runner.new_state(), every=True), whole)


def test_a_copy_goes_its_own_way(runner: LlamaRunner) -> None:
    tokens = runner.encode(TEXT)
    first, second, other = tokens[:90], tokens[90:], tokens[20:60]
    state = runner.new_state()
    runner.forward(first, state)
    copy = state.copy()
    expected = runner.forward(second, state)
    runner.forward(other, copy)
    assert (state.position, copy.position) == (len(tokens), 130)
    fresh = runner.new_state()
    agree(runner.forward(tokens, fresh), expected)
    del state, fresh  # what they alone had read is forgotten, what the copy shares is not
    again = copy.copy()
    alone = runner.new_state()
    agree(runner.forward(second, again), runner.forward([*first, *other, *second], alone))


def test_states_that_are_gone_leave_their_room(runner: LlamaRunner) -> None:
    tokens = runner.encode(TEXT)[:100]
    expected = runner.forward(tokens, runner.new_state())
    kept = runner.new_state()
    runner.forward(tokens, kept)
    for _ in range(25):  # 2,500 tokens through a context of 1,024
        state = kept.copy()
        np.testing.assert_allclose(runner.forward(tokens, runner.new_state()), expected, **CLOSE)
        runner.forward(tokens, state)


def test_pieces_make_the_text_again(runner: LlamaRunner) -> None:
    tokens = runner.encode(TEXT)
    assert b"".join(map(runner.piece, tokens)).decode() == TEXT
    assert max(tokens) < runner.vocab


@pytest.mark.parametrize("kind", ["gemma"])
def test_a_text_begins_with_bos_where_the_model_says_so(runner: LlamaRunner, files: dict[str, Path]) -> None:
    assert runner.bos == 2
    assert runner.encode(TEXT)[0] == 2
    assert runner.encode("") == [2]
    assert runner.piece(2) == b""
    assert 1 not in runner.encode("<eos>"), "the name of a special token is only text"
    with opened(files["qwen2"]) as other:
        assert other.bos is None
        assert other.encode("") == []
        assert len(other.encode("the river")) < 8, "merges apply"
        assert other.vocab - 1 not in other.encode("<|endoftext|>")


def test_what_a_header_says(runner: LlamaRunner, kind: str) -> None:
    model = llama_cpp.Llama(str(runner.path), verbose=False, vocab_only=False, n_ctx=64, n_threads=1)
    raw: Any = model.model
    assert runner.parameters == llama_cpp.llama_model_n_params(raw)
    assert runner.weights_nbytes == llama_cpp.llama_model_size(raw)
    model.close()
    assert runner.file_size == runner.path.stat().st_size > runner.weights_nbytes
    assert (runner.architecture, runner.type, runner.name) == (KINDS[kind].architecture, "F32", "llama.cpp")
    assert runner.context == (32768 if kind == "mistral" else 4096)
    assert runner.threads == 1


def test_only_what_is_fixed_has_a_size(runner: LlamaRunner, kind: str) -> None:
    size = runner.state_nbytes
    if kind not in FIXED:
        assert size is None
        return
    state = runner.new_state()
    runner.forward(runner.encode(TEXT), state)
    assert size is not None
    assert size == runner.state_nbytes
    # Per layer, in f32: Mamba's state and the convolution's tail; RWKV's matrix per head and two shifted tokens.
    numbers = {"mamba": 512 * 16 + 512 * 3, "rwkv7": 256 * 64 + 2 * 256}[kind]
    assert size == pytest.approx(2 * 4 * numbers, rel=0.01)


def test_a_context_that_is_full_is_said_before_anything_is_read(files: dict[str, Path], kind: str) -> None:
    with opened(files[kind], context=256) as runner:
        state = runner.new_state()
        runner.forward([5] * 200, state)
        copy = state.copy()
        runner.forward([6] * 30, copy)
        if kind in FIXED:
            runner.forward([7] * 300, state)
            assert state.position == 500
            return
        with pytest.raises(UnsupportedError, match="a context of 256 tokens cannot hold 27 beside 230"):
            runner.forward([7] * 27, state)
        assert state.position == 200
        runner.forward([7] * 26, state)
        with pytest.raises(UnsupportedError, match="cannot hold 1 beside 256"):
            runner.forward([7], copy)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_what_cannot_be_is_refused(runner: LlamaRunner, files: dict[str, Path], kind: str) -> None:
    state = runner.new_state()
    for tokens, problem in (([], "at least one"), ([0.5], "whole numbers"), ([-1], "-1"), ([5, 600], "600 is outside")):
        with pytest.raises(UnsupportedError, match=problem):
            runner.forward(tokens, state)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="600 is outside the vocabulary of 600"):
        runner.piece(600)
    with pytest.raises(GriffinError, match="lone surrogate at character 2"):
        runner.encode("ab\ud800")
    with opened(files[kind]) as other, pytest.raises(UnsupportedError, match="not made by this model"):
        other.forward([1], state)
    others = [runner.new_state() for _ in range(2)]
    with pytest.raises(UnsupportedError, match="3 states are in use"):
        state.copy()
    del others
    state.copy()
    runner.close()
    runner.close()
    for use in (lambda: runner.forward([1], state), runner.new_state, state.copy):
        with pytest.raises(UnsupportedError, match="the model is closed"):
            use()


def test_what_is_closed_is_forgotten_by_its_states(files: dict[str, Path]) -> None:
    runner = opened(files["llama"])
    state = runner.new_state()
    runner.close()
    del state, runner  # must not touch a context that is gone


def test_a_file_that_llama_cpp_cannot_load_names_why(tmp_path: Path) -> None:
    odd = foreign(tmp_path / "odd.gguf", "llama", attention__head_count=5)
    with pytest.raises(FileFormatError, match=r"odd\.gguf: model: llama\.cpp cannot load it \(.+\)"):
        open_runner(odd)


def test_what_predicts_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="'bert' does not predict a text's next token"):
        open_runner(foreign(tmp_path / "bert.gguf", BERT))
    path = foreign(tmp_path / "model.gguf")
    for name, value in (("has_encoder", True), ("has_decoder", False), ("is_diffusion", True)):
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, f"llama_model_{name}", lambda _, value=value: value)
            with pytest.raises(UnsupportedError, match="'llama' does not predict a text's next token"):
                open_runner(path)


def test_a_failure_of_llama_cpp_is_an_error(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(files["llama"]) as runner:
        state = runner.new_state()
        monkeypatch.setattr(llama_cpp, "llama_decode", lambda context, batch: -3)
        with pytest.raises(BackendError, match=r"llama\.cpp failed with status -3"):
            runner.forward([1, 2], state)
        assert state.position == 0
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda model, params: None)
    with pytest.raises(BackendError, match=r"cannot make room for 1,024 tokens"):
        opened(files["llama"])


def test_chunks_beyond_one_pass(files: dict[str, Path]) -> None:
    with opened(files["llama"]) as runner:
        tokens = (runner.encode(TEXT) * 8)[:900]
        assert len(tokens) > llama.CHUNK
        np.testing.assert_allclose(
            runner.forward(tokens, runner.new_state()), oracle(runner.path, tokens)[-1], atol=1e-4, rtol=0
        )
