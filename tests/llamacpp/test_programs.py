"""The patched programs on files of ours: copying, quantizing, perplexity, importance matrix, bench, chat."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from command import done
from llama_programs import held_out, run
from served_models import Alone

from griffin_gguf.quant.evaluate import Perplexity, score, windows
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.runner import open_runner
from griffin_gguf.quant.verify import verify
from griffin_gguf.runtime.gguf_file import GgufFile

pytestmark = pytest.mark.llamacpp

QUANTIZED = [name for name, type in FILE_TYPES.items() if type.quantized]


@pytest.mark.parametrize("name", FILE_TYPES)
def test_quantize_copies_every_file(programs: Path, demo: dict[str, Path], tmp_path: Path, name: str) -> None:
    """What `ollama create` runs on a file."""
    copy = tmp_path / "copy.gguf"
    run(programs / "llama-quantize", "--allow-requantize", demo[name], copy, "COPY")
    with GgufFile.open(demo[name]) as mine, GgufFile.open(copy) as theirs:
        assert mine.tensors.keys() == theirs.tensors.keys()
        for tensor, info in mine.tensors.items():
            assert theirs.tensors[tensor].type == info.type
            assert bytes(theirs.data(tensor)) == bytes(mine.data(tensor))
    assert verify(copy, sha256=True, threads=1).sound


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantize_gives_our_types_and_bytes(
    programs: Path, demo: dict[str, Path], imatrix: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "theirs.gguf"
    options = ("--imatrix", imatrix) if FILE_TYPES[name].needs_importance else ()
    run(programs / "llama-quantize", *options, demo["BF16"], target, name, "1")
    with GgufFile.open(demo[name]) as mine, GgufFile.open(target) as theirs:
        assert {t: i.type.name for t, i in theirs.tensors.items()} == {t: i.type.name for t, i in mine.tensors.items()}
        assert [t for t in mine.tensors if bytes(theirs.data(t)) != bytes(mine.data(t))] == []


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"])
def test_perplexity(programs: Path, demo: dict[str, Path], tmp_path: Path, name: str) -> None:
    text = held_out(tmp_path, 60_000)
    said = run(programs / "llama-perplexity", "-m", demo[name], "-f", text, "-c", "512", "-t", "1")
    found = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", said)
    assert found, said[-2000:]
    with open_runner(demo[name], threads=1, context=512) as runner:
        tokens = runner.encode(text.read_text())
        mine = Perplexity.of(score(runner, windows(tokens, 512, runner.bos)))
    assert float(found[1]) == pytest.approx(mine.value, rel=1e-3)
    assert float(found[2]) == pytest.approx(mine.stderr, rel=5e-2)


def test_imatrix_is_ours(imatrix: Path, demo: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "ours.gguf"
    done("imatrix", demo["BF16"], "-f", held_out(tmp_path, 40_000), "-o", target, "-c", "256", "-t", "1")
    theirs, mine = ImportanceMatrix.load(imatrix), ImportanceMatrix.load(target)
    assert theirs.entries.keys() == mine.entries.keys() - {"token_embd.weight"}  # as the head: --process-output
    for name, entry in theirs.entries.items():
        assert entry.means.shape == mine.entries[name].means.shape
        np.testing.assert_allclose(entry.means, mine.entries[name].means, rtol=0.02, err_msg=name)


def test_llama_cpp_s_own_test_of_architectures(programs: Path) -> None:
    """A small random model, saved and loaded again."""
    said = run(programs / "test-llama-archs", "-a", "recurrentgemma")
    assert "recurrentgemma" in said
    assert "all 1 test(s) passed" in said


def test_bench(programs: Path, demo: dict[str, Path]) -> None:
    options = ("-p", "600", "-n", "8", "-r", "1", "-t", "1", "-o", "json")
    bench = subprocess.run(
        [programs / "llama-bench", "-m", demo["Q4_K_M"], *options], capture_output=True, text=True, check=True
    )
    assert [row["model_type"].split()[0] for row in json.loads(bench.stdout)] == ["recurrentgemma"] * 2


def test_cli_answers(programs: Path, demo: dict[str, Path]) -> None:
    said = run(
        programs / "llama-cli",
        *("-m", demo["F32"], "-p", "What is a cynic?", "--single-turn", "--temp", "0", "-n", "12", "-t", "1"),
    )
    alone = Alone(demo["F32"])
    answer, _ = alone.answer(alone.chat_tokens(("user", "What is a cynic?")), 12)
    assert answer
    assert answer in said
