import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import griffins
import pytest
import vocabularies
from gguf import GGUFValueType

from griffin_gguf.quant import measure as module
from griffin_gguf.quant.encode import encoder
from griffin_gguf.quant.evaluate import perplexity
from griffin_gguf.quant.file_types import FILE_TYPES, Metadata, file_type
from griffin_gguf.quant.measure import measure, type_name
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import BackendError, GriffinError

TEXT = "The fox of the river said that nothing under the moon grows for ever. " * 20


def with_type(value: Any) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    if isinstance(value, list):
        element = GGUFValueType.INT32 if isinstance(value[0], int) else GGUFValueType.get_type(value[0])
        return value, GGUFValueType.ARRAY, element
    kind = GGUFValueType.get_type(value)
    return value, GGUFValueType.UINT32 if kind is GGUFValueType.INT32 else kind, None


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = vocabularies.metadata_of(vocabularies.train())
    hp = griffins.tiny(vocab=tokenizer["recurrentgemma.vocab_size"])
    recipe = file_type("Q4_K_M")
    keys: Metadata = {name: with_type(value) for name, value in tokenizer.items()}
    path = tmp_path_factory.mktemp("measure") / "tiny.gguf"
    keys |= griffins.metadata(hp) | recipe.metadata
    write([Output(path, keys, plan(hp, recipe))], encoder(griffins.reader(griffins.weights(hp))))
    return path


def test_a_row_of_a_report(model_file: Path) -> None:
    progress: list[tuple[int, int]] = []
    row = measure(model_file, TEXT, tokens=50, threads=1, progress=lambda *step: progress.append(step))
    assert (row.path, row.type, row.backend, row.tokens) == (str(model_file), "Q4_K_M", "ggml", 50)
    assert row.file_size == model_file.stat().st_size
    assert progress == [(50, 50)]
    with load(model_file, threads=1) as model:
        ids = model.tokenizer.encode(TEXT)[:51]
        here = perplexity(model, ids)
        assert row.parameters == model.hp.parameters
        weights = sum(info.nbytes for info in model.file.tensors.values())
        assert row.bits_per_weight == 8 * weights / row.parameters
        assert row.bits_per_byte == pytest.approx(here.bits_per_byte(len(model.tokenizer.decode(ids[1:]).encode())))
    assert row.perplexity == pytest.approx(here.value, rel=1e-6)
    assert row.perplexity_stderr == pytest.approx(here.stderr, rel=1e-4)
    assert min(row.load_seconds, row.prefill_speed, row.decode_speed) > 0


def test_the_peak_is_the_measured_process_own(model_file: Path) -> None:
    """A child's ru_maxrss starts at its parent's, on Linux; ours must not."""
    ballast = bytearray(os.urandom(1 << 20)) * 400
    row = measure(model_file, TEXT, tokens=10, threads=1)
    assert 10 << 20 < row.peak_rss < len(ballast)
    if row.rss_anonymous is not None and row.rss_file is not None:
        assert row.rss_anonymous + row.rss_file <= row.peak_rss


def test_errors_come_back_with_their_message(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match=r"none\.gguf"):
        measure(tmp_path / "none.gguf", TEXT, tokens=50)
    with pytest.raises(GriffinError, match="a text of 0 tokens is too short to measure"):
        measure(model_file, "", tokens=50)
    with pytest.raises(GriffinError, match="threads: expected 1 to 512, found 0"):
        measure(model_file, TEXT, tokens=50, threads=0)


def test_a_process_that_dies_costs_its_row_only(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def dying(command: list[str], **options: Any) -> "subprocess.Popen[str]":
        code = "import os, sys; print('ggml_abort: no such luck', file=sys.stderr); sys.stderr.flush(); os.abort()"
        return start([sys.executable, "-c", code], **options)

    monkeypatch.setattr(module.subprocess, "Popen", dying)
    with pytest.raises(BackendError, match=r"tiny\.gguf: measuring it ended with status -6: ggml_abort: no such luck"):
        measure(model_file, TEXT, tokens=50)


def test_type_names() -> None:
    for name, recipe in FILE_TYPES.items():
        assert type_name({"general.file_type": int(recipe.id)}) == name
    assert type_name({}) == "unknown"
    assert type_name({"general.file_type": 999}) == "unknown"
