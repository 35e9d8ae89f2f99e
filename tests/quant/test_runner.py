from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from foreign import foreign
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from models import random_model
from splitting import split

from griffin_gguf.quant import runner
from griffin_gguf.quant.runner import GriffinRunner, open_runner
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import BackendError, FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.machine import compute_threads, usable_cores
from griffin_gguf.runtime.model import BackendName
from griffin_gguf.runtime.tuning import VARIABLE, Tuning, store

TEXT = "The fox of the river said <eos> that nothing grows for ever.\n"


@pytest.fixture(scope="module")
def griffin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("griffin"), "Q8_0")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign(tmp_path_factory.mktemp("llama") / "llama.gguf", half=True)


@pytest.mark.parametrize("backend", ["ggml", "numpy"])
def test_a_griffin_runs_in_our_runtime(griffin: Path, backend: BackendName) -> None:
    with open_runner(griffin, backend=backend, threads=1) as found, load(griffin, backend, 1) as model:
        assert isinstance(found, GriffinRunner)
        assert (found.name, found.architecture, found.type) == (backend, "recurrentgemma", "Q8_0")
        assert (found.vocab, found.context, found.parameters) == (model.hp.vocab, 8192, model.hp.parameters)
        assert found.file_size == griffin.stat().st_size
        assert found.weights_nbytes == sum(info.nbytes for info in model.file.tensors.values())
        assert (found.bos, found.state_nbytes) == (2, model.state_nbytes)
        tokens = found.encode(TEXT)
        assert tokens == model.tokenizer.encode(TEXT)
        assert b"".join(map(found.piece, tokens)).decode() == TEXT
        state, other = found.new_state(), model.new_state()
        logits = found.forward(tokens, state, every=True)
        np.testing.assert_array_equal(logits, model.forward(tokens, other, every=True))
        assert state.position == state.copy().position == len(tokens)


def test_a_griffin_runs_on_the_threads_asked_for_else_on_those_tuned_for(
    griffin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads(backend: BackendName = "ggml", asked: int | None = None) -> int:
        with open_runner(griffin, backend=backend, threads=asked) as found:
            return found.threads

    assert threads(asked=3) == 3
    assert threads() == compute_threads()
    assert threads("numpy") == usable_cores()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    with load(griffin, "numpy") as model:
        store(model.file, Tuning(threads=5))
    assert threads() == 5


def test_any_other_runs_in_llama_cpp(llama: Path) -> None:
    with open_runner(llama, threads=1, context=300) as found:
        assert (found.name, found.architecture, found.type) == ("llama.cpp", "llama", "F16")
        found.forward([5] * 300, found.new_state())
    with open_runner(llama) as found:
        assert found.threads == compute_threads()
    with pytest.raises(UnsupportedError, match="numpy runs recurrentgemma alone, found 'llama'"):
        open_runner(llama, backend="numpy")
    with pytest.raises(UnsupportedError, match="threads: expected 1 to"):
        open_runner(llama, threads=0)
    with pytest.raises(UnsupportedError, match="context: expected at least 1"):
        open_runner(llama, context=0)


def test_quantized_files_name_their_type(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    params: Any = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert llama_cpp.llama_model_quantize(str(llama).encode(), str(target).encode(), params) == 0
    with open_runner(llama, threads=1) as whole, open_runner(target, threads=1) as small:
        assert small.type == "Q4_K_M"
        assert small.parameters == whole.parameters
        assert small.weights_nbytes < 0.5 * whole.weights_nbytes
        tokens = small.encode(TEXT)
        wanted, got = (found.forward(tokens, found.new_state()) for found in (whole, small))
        assert np.abs(wanted - got).max() > 0.01
        assert np.corrcoef(wanted, got)[0, 1] > 0.8


def test_split_files_count_together(llama: Path, tmp_path: Path) -> None:
    first = split(llama, tmp_path, split_max_tensors=8)
    with open_runner(first, threads=1) as parts, open_runner(llama, threads=1) as whole:
        assert parts.file_size == sum(path.stat().st_size for path in tmp_path.iterdir())
        assert parts.weights_nbytes == whole.weights_nbytes
        tokens = whole.encode(TEXT)
        expected = whole.forward(tokens, whole.new_state())
        np.testing.assert_array_equal(parts.forward(tokens, parts.new_state()), expected)


def test_an_architecture_that_nothing_runs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "hyena")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError) as caught:
        open_runner(path)
    assert str(caught.value) == f"{path}: general.architecture: neither griffin nor llama.cpp runs 'hyena'"


@pytest.mark.parametrize(("value", "problem"), [(None, "is missing"), (7, "expected text, found 7")])
def test_a_file_must_say_its_architecture(tmp_path: Path, value: int | None, problem: str) -> None:
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_string("general.name", "odd")
    if value is not None:
        writer.add_uint32("general.architecture", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FileFormatError, match=f"general.architecture: {problem}"):
        open_runner(path)


def test_llama_cpp_never_sees_a_file_whose_header_is_not_sound(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", None)  # calling it would fail
    whole, path = llama.read_bytes(), tmp_path / "broken.gguf"
    length = runner.GgufFile.open(llama).data_offset

    @given(at=st.integers(0, length - 1), bit=st.integers(0, 7))
    def flipped(at: int, bit: int) -> None:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        if fault := _fault(path):
            with pytest.raises(FileFormatError) as caught:
                open_runner(path)
            assert str(caught.value) == fault

    flipped()
    for cut in (0, 3, 100, length, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError):
            open_runner(path)
    with pytest.raises(FileFormatError, match=r"no\.gguf: file: cannot be read"):
        open_runner(tmp_path / "no.gguf")


def _fault(path: Path) -> str | None:
    """What our own reader says against a file."""
    try:
        runner.GgufFile.open(path).close()
    except FileFormatError as error:
        return str(error)
    return None


def test_without_ggml_other_models_do_not_run(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BackendError("ggml: the package llama-cpp-python is not installed")

    monkeypatch.setattr(runner.abi, "load", fail)
    with pytest.raises(GriffinError, match="llama-cpp-python is not installed"):
        open_runner(llama)
