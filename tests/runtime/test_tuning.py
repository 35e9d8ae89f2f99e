import json
import random
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import griffins
import numpy as np
import pytest
from damage import VALUES, damaged
from golden import ROOT
from hypothesis import given
from hypothesis import strategies as st

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.encode import encoder
from griffin_gguf.quant.file_types import file_type
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime import load, tuning
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.tokenizer import Tokenizer
from griffin_gguf.runtime.tuning import VARIABLE, Tuning, store, store_path, stored

CHOICE = Tuning(threads=3, buffers="repacked", attention="plain", chunk=128)


def model(path: Path, kind: str = "Q4_K_M", seed: int = 0, **overrides: Any) -> Path:
    hp = griffins.tiny(**overrides)
    output = Output(path, griffins.metadata(hp) | file_type(kind).metadata, plan(hp, file_type(kind)))
    write([output], encoder(griffins.reader(griffins.weights(hp, seed))))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufFile]:
    with GgufFile.open(model(tmp_path_factory.mktemp("model") / "a.gguf")) as opened:
        yield opened


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where choices are stored: in a folder that is not there yet."""
    path = tmp_path / "settings" / "tuning.json"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_what_is_stored_comes_back(file: GgufFile, kept: Path) -> None:
    assert stored(file) == (Tuning(), None)
    assert not kept.parent.exists()  # asking writes nothing
    assert store(file, CHOICE) == kept
    assert stored(file) == (CHOICE, None)
    assert store(file, Tuning()) == kept
    assert stored(file) == (Tuning(), None)
    assert [path.name for path in kept.parent.iterdir()] == ["tuning.json"]


def test_models_share_a_choice_where_shapes_and_types_are_the_same_and_only_there(
    file: GgufFile, kept: Path, tmp_path: Path
) -> None:
    store(file, CHOICE)
    with GgufFile.open(model(tmp_path / "other.gguf", seed=1)) as same:
        assert same.path.read_bytes() != file.path.read_bytes()
        assert stored(same) == (CHOICE, None)
    for kind, overrides in (("Q5_K_M", {}), ("Q4_K_M", {"mlp_width": 768}), ("Q4_K_M", {"window": 32})):
        with GgufFile.open(model(tmp_path / "other.gguf", kind, **overrides)) as different:
            assert stored(different) == (Tuning(), None)
            store(different, Tuning(chunk=7))
            assert stored(different)[0].chunk == 7
    assert stored(file) == (CHOICE, None)
    assert len(json.loads(kept.read_bytes())["choices"]) == 4


@pytest.mark.usefixtures("kept")
def test_another_machine_or_device_has_its_own_choice(file: GgufFile, monkeypatch: pytest.MonkeyPatch) -> None:
    store(file, CHOICE)
    store(file, Tuning(chunk=9), devices="Vulkan1")
    assert stored(file) == (CHOICE, None)
    assert stored(file, "Vulkan1") == (Tuning(chunk=9), None)
    assert stored(file, "Vulkan0") == (Tuning(), None)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 999)
    assert stored(file) == (Tuning(), None)
    assert "999 cores" in tuning.key(file)


def test_an_empty_variable_turns_stored_choices_off(
    file: GgufFile, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(file, CHOICE)
    monkeypatch.setenv(VARIABLE, "")
    assert store_path() is None
    assert stored(file) == (Tuning(), None)
    with pytest.raises(UnsupportedError, match=f"^{VARIABLE}: is empty"):
        store(file, Tuning())
    monkeypatch.setenv(VARIABLE, str(kept))
    assert stored(file) == (CHOICE, None)


def test_the_tests_themselves_run_without_stored_choices() -> None:
    assert store_path() is None


def test_without_the_variable_it_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = store_path()
    assert path is not None
    assert path.is_relative_to(tmp_path)
    assert path.parts[-2:] == ("griffin-gguf", "tuning.json")


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "no JSON"),
        (b"\x7fELF\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"format": 2, "choices": {}}', "format: expected 1, found 2"),
        (b'{"format": 1}', "choices: expected a JSON object"),
        (b" " * (1 << 20) + b"{}", "more than 1,048,576 bytes"),
    ],
    ids=["empty", "binary", "deep", "list", "newer", "no choices", "large"],
)
def test_a_damaged_file_is_told_ignored_and_replaced(file: GgufFile, kept: Path, raw: bytes, problem: str) -> None:
    kept.parent.mkdir()
    kept.write_bytes(raw)
    found, notice = stored(file)
    assert found == Tuning()
    assert notice is not None
    assert notice.startswith(f"{kept}: stored choices are ignored: ")
    assert problem in notice
    assert "\n" not in notice
    store(file, CHOICE)
    assert stored(file) == (CHOICE, None)


def test_a_file_that_cannot_be_read_or_written_is_told(file: GgufFile, kept: Path) -> None:
    kept.mkdir(parents=True)  # a folder of that name
    found, notice = stored(file)
    assert found == Tuning()
    assert notice is not None
    assert "it cannot be read: Is a directory" in notice
    with pytest.raises(GriffinError, match=r"tuning\.json: cannot be written"):
        store(file, CHOICE)
    kept.rmdir()
    kept.parent.rmdir()
    kept.parent.write_text("a file where the folder should be")
    with pytest.raises(GriffinError, match=r"tuning\.json: cannot be written"):
        store(file, CHOICE)


@given(seed=st.integers(0, 2**32))
def test_no_damage_of_the_file_is_worse_than_no_file(file: GgufFile, kept: Path, seed: int) -> None:
    kept.parent.mkdir(exist_ok=True)
    kept.unlink(missing_ok=True)
    store(file, CHOICE)
    store(file, CHOICE, devices="Vulkan0")
    kept.write_text(json.dumps(damaged(json.loads(kept.read_bytes()), random.Random(seed))), encoding="utf-8")
    found, notice = stored(file)
    assert isinstance(found, Tuning)
    assert notice is None or found == Tuning()


@pytest.mark.parametrize("field", [field.name for field in fields(Tuning)])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_is_checked_however_it_comes(file: GgufFile, kept: Path, field: str, value: Any) -> None:
    good = {"threads": (None, 1), "buffers": (), "attention": (), "chunk": (1,)}[field]
    # 1 == True, so types are compared too
    if any(value == other and type(value) is type(other) for other in good):
        assert asdict(Tuning(**{field: value}))[field] == value
        return
    with pytest.raises(UnsupportedError, match=f"^{field}: expected .*found"):
        Tuning(**{field: value})
    store(file, CHOICE)
    content = json.loads(kept.read_bytes())
    content["choices"][tuning.key(file)][field] = value
    kept.write_text(json.dumps(content), encoding="utf-8")
    assert stored(file)[0] == Tuning()
    assert f"{field}: expected" in (stored(file)[1] or "")


@pytest.mark.parametrize("change", [{"chunk": None}, {"speed": 1}], ids=["missing", "unknown"])
def test_a_choice_of_other_fields_is_ignored(file: GgufFile, kept: Path, change: dict[str, Any]) -> None:
    store(file, CHOICE)
    content = json.loads(kept.read_bytes())
    entry = content["choices"][tuning.key(file)] | change
    content["choices"][tuning.key(file)] = {name: value for name, value in entry.items() if value is not None}
    kept.write_text(json.dumps(content), encoding="utf-8")
    found, notice = stored(file)
    assert found == Tuning()
    assert "expected the fields threads, buffers, attention, chunk" in (notice or "")


def test_a_chunk_is_no_larger_than_the_rings_have_room_for() -> None:
    assert Tuning(chunk=512).chunk == 512
    with pytest.raises(UnsupportedError, match=r"^chunk: expected 1 to 512 tokens, found 513"):
        Tuning(chunk=513)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(ROOT / "cli" / "demo_model", [(path, "Q4_K_M")])
    return path


def tuning_of(model: Model) -> Tuning:
    assert isinstance(model._backend, GgmlBackend)
    return model._backend.tuning


def test_models_are_loaded_as_the_stored_choice_says(demo: Path, kept: Path) -> None:
    choice = Tuning(threads=1, attention="plain", chunk=128)
    with load(demo) as model:
        assert tuning_of(model) == Tuning()
    with GgufFile.open(demo) as opened:
        store(opened, choice)
    with load(demo) as model:
        assert tuning_of(model) == choice
        assert model.notice is None
    with load(demo, threads=2) as model:
        assert tuning_of(model) == replace(choice, threads=2)
    kept.write_text("damaged")
    with load(demo) as model:
        assert tuning_of(model) == Tuning()
        assert (model.notice or "").startswith(f"{kept}: stored choices are ignored: it is no JSON")


def logits(path: Path, tuned: Tuning) -> np.ndarray:
    """After each of 400 tokens, float32 [400, V]."""
    opened = GgufFile.open(path)
    with Model(opened, Tokenizer.from_gguf(path, opened.metadata), GgmlBackend(opened, tuned)) as model:
        return model.forward(np.random.default_rng(0).integers(0, 1000, 400), model.new_state(), every=True)


@pytest.mark.parametrize("choice", [{"attention": "plain"}, {"chunk": 100}, {"threads": 2}])
def test_no_choice_changes_what_a_model_says(tmp_path: Path, choice: dict[str, Any]) -> None:
    path = tmp_path / "exact.gguf"
    convert(ROOT / "cli" / "demo_model", [(path, "F32")])
    default = logits(path, Tuning(threads=1))
    assert np.abs(logits(path, Tuning(**{"threads": 1, **choice})) - default).max() < 1e-5 * np.abs(default).max()


def test_repacked_weights_say_the_same(demo: Path) -> None:
    default, repacked = logits(demo, Tuning(threads=1)), logits(demo, Tuning(threads=1, buffers="repacked"))
    # Inputs of a product are rounded to 8 bits: a last bit elsewhere can turn one of those.
    assert np.abs(repacked - default).max() < 0.04 * np.abs(default).max()
    assert (repacked.argmax(1) == default.argmax(1)).mean() > 0.95
