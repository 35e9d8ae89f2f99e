import functools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import griffins
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from griffin_gguf.quant import estimate as module
from griffin_gguf.quant.encode import NEEDS_IMPORTANCE, encode
from griffin_gguf.quant.estimate import Estimate, estimate, layout_of, layouts
from griffin_gguf.quant.file_types import file_type
from griffin_gguf.quant.footprint import Footprint, footprint, vocabulary
from griffin_gguf.quant.rates import Rates, measure_rates
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime.arch import Hyperparameters, Tensor
from griffin_gguf.runtime.backends.ggml import GgmlBackend
from griffin_gguf.runtime.backends.ggml_outline import Outline
from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.machine import resident_bytes
from griffin_gguf.runtime.published import NINE_B, TWO_B
from griffin_gguf.runtime.sentencepiece_proto import bpe_model
from griffin_gguf.runtime.tokenizer import PREFIX, Tokenizer
from griffin_gguf.runtime.tuning import Tuning

#: The widths of the 2B, 0.3 G weights.
LIKE_2B = replace(TWO_B, layers=3, recurrent=(True, True, False), vocab=32000)

#: Loads a file, reads a chunk of each of some texts, writes some tokens, and tells the peak of its resident memory.
RUN = """
import resource, sys
from pathlib import Path
import numpy as np
from griffin_gguf.runtime import load

model, batch = load(sys.argv[1], backend="ggml", threads=1), int(sys.argv[2])
model.reserve(batch)
states = [model.new_state() for _ in range(batch)]
prompt = np.random.default_rng(0).integers(0, model.hp.vocab, model.chunk // batch)
model.forward_batch([(prompt, state) for state in states])
for _ in range(8):
    model.forward_batch([([5], state) for state in states])
status = Path("/proc/self/status")
if status.exists():
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    print(int(fields["VmHWM"].split()[0]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@functools.cache
def tile(type: GGMLQuantizationType, negative: bool) -> NDArray[np.uint8]:
    random = np.random.default_rng(0).standard_normal((64, 256), np.float32) * np.float32(0.02)
    importance = np.ones(256, np.float32) if type in NEEDS_IMPORTANCE else None
    return encode(type, -abs(random) if negative else random, importance).reshape(-1)


def tiles(tensor: Tensor, start: int, stop: int, types: Sequence[GGMLQuantizationType]) -> list[NDArray[np.uint8]]:
    """An encoder for the writer: one encoded tile over and over."""
    found: list[NDArray[np.uint8]] = []
    for type in types:
        block, size = GGML_QUANT_SIZES[type]
        shape = (stop - start, tensor.shape[-1] // block * size)
        found.append(np.resize(tile(type, tensor.name.endswith("ssm_a")), shape))
    return found


def random_file(path: Path, hp: Hyperparameters, type: str) -> Path:
    kind = file_type(type)
    keys = griffins.metadata(hp) | kind.metadata | vocabulary(hp.vocab)
    write([Output(path, keys, plan(hp, kind, imatrix=kind.needs_importance))], tiles, threads=1)
    return path


def estimate_of(hp: Hyperparameters, type: str, batch: int = 1, tokens: int = 3000) -> Estimate:
    (found,) = estimate(hp, layouts(hp, [type]), tokens=tokens, batch=batch, bandwidth=1e11)
    return found


@dataclass(frozen=True)
class Fake:
    """A process of no size, and products at a rate of our own."""

    rates: Rates

    def __call__(self, *_: object) -> Rates:
        return self.rates


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "footprint", lambda vocab: Footprint(0, 0))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]


@pytest.fixture(scope="module")
def like_2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_file(tmp_path_factory.mktemp("estimate") / "like-2b.gguf", LIKE_2B, "Q4_K_M")


def peak(path: Path, batch: int) -> int:
    """Of a fresh process that runs it."""
    child = subprocess.run([sys.executable, "-c", RUN, str(path), str(batch)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return int(child.stdout)


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "type", ["F32", "BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_M", "Q2_K", "IQ2_XXS"]
)
def test_a_file_is_as_large_as_it_is_written(type: str, tmp_path: Path) -> None:
    hp = griffins.tiny()
    path = random_file(tmp_path / "model.gguf", hp, type)
    (found,) = layouts(hp, [type])
    # a conversion says a little more of a model than the keys of these files
    assert path.stat().st_size == pytest.approx(found.file_size, abs=200)
    with GgufFile.open(path) as file:
        as_it_is = layout_of(file)
        assert {row.tensor.name: row.type for row in found.rows} == {n: t.type for n, t in file.tensors.items()}
    assert (as_it_is.file_size, as_it_is.type) == (path.stat().st_size, type)
    assert as_it_is.rows == [replace(row, note="") for row in found.rows]


def test_types_of_one_call_are_as_large_as_alone() -> None:
    names = ["BF16", "Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K"]
    together = layouts(griffins.tiny(), names)
    assert [layout.type for layout in together] == names
    assert together == [layouts(griffins.tiny(), [name])[0] for name in names]
    with pytest.raises(UnsupportedError, match="'Q7' is no file type"):
        layouts(griffins.tiny(), ["Q7"])


def test_the_stand_in_is_a_vocabulary_as_large_as_gemmas() -> None:
    keys = {name: value for name, (value, *_) in vocabulary(256_000).items()}
    tokens: list[str] = keys[PREFIX + "tokens"]
    lengths = [len(token.encode()) for token in tokens]
    # Google's tokenizer.model has 4,241,003 bytes: of a token 5 for the score, 4 for tags and lengths, and its text
    assert sum(lengths) + 9 * len(tokens) == pytest.approx(4_241_003, rel=0.01)
    tokenizer = Tokenizer.from_gguf(Path("vocabulary"), keys)
    assert tokenizer.decode(tokenizer.encode("0000001ab", bos=False)) == "0000001ab"
    assert len(bpe_model(tokens, keys[PREFIX + "scores"], keys[PREFIX + "token_type"], False)) > 4_000_000


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("hp", "type", "bits"), [(TWO_B, "BF16", 16.007), (TWO_B, "Q4_K_M", 5.249), (NINE_B, "Q4_K_M", 5.005)]
)
def test_the_published_models(hp: Hyperparameters, type: str, bits: float) -> None:
    found = estimate_of(hp, type)
    assert found.parameters == hp.parameters
    assert found.bits_per_weight == pytest.approx(bits, abs=5e-4)
    # 6 MB of vocabulary and the descriptions of tensors come to the weights
    assert found.file_size == pytest.approx(hp.parameters * bits / 8 + 6.1e6, rel=2e-4)
    assert found.state == {TWO_B: 21_708_800, NINE_B: 33_161_216}[hp]  # docs/state.md


# -- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"untied": True}, {"attention_bias": True}, {"recurrent": (True,) * 5}])
@pytest.mark.parametrize("type", ["F32", "Q4_K_M"])
def test_buffers_and_states_are_those_of_the_backend(type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    hp = griffins.tiny(**overrides)
    with GgufFile.open(random_file(tmp_path / "model.gguf", hp, type)) as file:
        backend = GgmlBackend(file, Tuning(threads=1))
        with Outline(hp, {name: info.type for name, info in file.tensors.items()}) as outline:
            for texts in (1, 3):
                found = outline.buffers(texts)
                assert found.most == backend.buffers_nbytes(texts)
                states = [backend.new_state() for _ in range(texts)]
                for state in states:
                    state.position = 4 * hp.window  # its ring is full
                chunk = np.zeros(backend.chunk // texts, np.int32)
                backend.run([(chunk, state) for state in states], "last")
                backend.run([(chunk[:1], state) for state in states], "last")
                # several texts are measured as if they had one state, whose views keep values longer
                assert (0.95 if texts > 1 else 0.999) * found.values < backend.allocators[False].nbytes <= found.values
        assert backend.state_nbytes == estimate_of(hp, type).state
        backend.close()


def test_buffers_at_the_widths_of_the_2b(like_2b: Path) -> None:
    with GgufFile.open(like_2b) as file:
        backend = GgmlBackend(file, Tuning(threads=1))
        with Outline(LIKE_2B, {name: info.type for name, info in file.tensors.items()}) as outline:
            assert [outline.buffers(n).most for n in (1, 4)] == [backend.buffers_nbytes(n) for n in (1, 4)]
        backend.close()
        copied = GgmlBackend(file, Tuning(threads=1, buffers="both"))
        with Outline(LIKE_2B, {name: info.type for name, info in file.tensors.items()}) as outline:
            twice = {name for name, tensor in copied.weights.of(1).items() if tensor != copied.weights.of(512)[name]}
            assert outline.repacked() == sum(file.tensors[name].nbytes for name in twice)
        copied.close()


@pytest.mark.parametrize("batch", [1, 4])
def test_memory_is_the_peak_of_a_process_that_runs_it(like_2b: Path, batch: int) -> None:
    found = estimate_of(LIKE_2B, "Q4_K_M", batch)
    assert found.file_size == pytest.approx(like_2b.stat().st_size, rel=1e-5)
    memory, measured = found.memory, peak(like_2b, batch)
    assert memory.total == pytest.approx(measured, rel=0.02)
    assert measured < memory.most
    assert memory.states == batch * found.state
    assert memory.weights == found.file_size


@pytest.mark.slow
def test_memory_of_the_whole_2b(tmp_path: Path) -> None:
    path = random_file(tmp_path / "2b.gguf", TWO_B, "Q4_K_M")
    found = estimate_of(TWO_B, "Q4_K_M")
    assert found.file_size == pytest.approx(path.stat().st_size, rel=1e-5)
    assert found.memory.total == pytest.approx(peak(path, 1), rel=0.02)


def test_weights_larger_than_memory_are_no_trouble() -> None:
    hp = replace(NINE_B, layers=114, recurrent=NINE_B.recurrent * 3, vocab=1_000_000)  # 105 GB in F32
    before, _ = resident_bytes()
    with Outline(hp, {row.tensor.name: row.type for row in plan(hp, file_type("F32"))}) as outline:
        assert outline.buffers(1).values > 100 << 20
        after, _ = resident_bytes()
        assert sum(4 * prod(tensor.shape) for tensor in hp.tensors()) > 100e9
        assert after - before < 500 << 20  # a state of 190 MiB, and graphs


@pytest.mark.usefixtures("no_process")
def test_length_costs_nothing() -> None:
    hp = griffins.tiny(window=128)
    short, long = estimate_of(hp, "Q4_K_M", tokens=100), estimate_of(hp, "Q4_K_M", tokens=10**9)
    assert replace(short, read=0, decode=0.0) == replace(long, read=0, decode=0.0)
    assert short.read < long.read == estimate_of(hp, "Q4_K_M", tokens=128).read


def test_a_process_is_measured() -> None:
    small, large = footprint(300), footprint(64_300)
    assert 20 << 20 < small.program < 200 << 20
    assert small.program == pytest.approx(large.program, rel=0.02)
    # a token takes a string, a float, its places in lists, and what SentencePiece makes of it
    assert 100 < (large.vocabulary - small.vocabulary) / 64_000 < 1000
    with pytest.raises(
        UnsupportedError, match="vocab_size: expected at least 260, the 256 bytes among them, found 259"
    ):
        footprint(259)


# -- speed ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_process")
def test_a_bandwidth_bounds_the_speed() -> None:
    found = estimate_of(LIKE_2B, "Q4_K_M")
    weights = sum(row.nbytes for row in plan(LIKE_2B, file_type("Q4_K_M")))
    rings = 1 * 2 * 2048 * 256 * 2  # layers, k and v, window, width, f16
    recurrences = 2 * 2 * 4 * (2560 + 3 * 2560)  # layers, read and written, f32, h and tail
    assert found.read == weights + rings + recurrences
    assert found.decode == pytest.approx(1e11 / found.read)
    assert found.prefill is None
    four = estimate_of(LIKE_2B, "Q4_K_M", batch=4)
    assert four.read == weights + 4 * (rings + recurrences)
    assert four.decode == pytest.approx(4e11 / four.read)  # weights are read once for all of them


@pytest.mark.usefixtures("no_process")
def test_of_an_embedding_that_is_not_the_head_a_row_is_read() -> None:
    hp = griffins.tiny(vocab=5000)
    tied, untied = estimate_of(hp, "BF16"), estimate_of(replace(hp, untied=True), "BF16")
    assert tied.read == untied.read
    assert untied.file_size - tied.file_size > 2 * 5000 * hp.hidden
    # keys and values of an F32 file are F32
    assert estimate_of(hp, "F32").state > tied.state


@pytest.mark.usefixtures("no_process")
@settings(max_examples=10)
@given(slow=st.floats(1e-12, 1e-9), many=st.floats(1e-12, 1e-9), texts=st.sampled_from([1, 4, 512]))
def test_products_bound_the_speed(slow: float, many: float, texts: int) -> None:
    hp = griffins.tiny(vocab=4000)
    rows = plan(hp, file_type("Q8_0"))
    head = hp.vocab * hp.hidden
    matrices = sum(row.rows * row.columns for row in rows if row.type is GGMLQuantizationType.Q8_0) - head
    seconds = {(GGMLQuantizationType.Q8_0, count): slow for count in (1, 4)} | {(GGMLQuantizationType.Q8_0, 512): many}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_rates", Fake(Rates(seconds, 1e30)))
        (found,) = estimate(hp, layouts(hp, ["Q8_0"]), tokens=1, batch=texts)
    of_texts = many if texts == 512 else slow
    assert found.decode == pytest.approx(texts / ((matrices + head) * of_texts), rel=1e-6)
    assert found.prefill == pytest.approx(512 / (matrices * many + head * slow), rel=1e-6)


def test_products_of_every_type_are_measured() -> None:
    names = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "IQ2_XXS"]
    rows = [row for layout in layouts(griffins.tiny(), names) for row in layout.rows]
    rates = measure_rates(rows, [2, 64], threads=1)
    kinds = {row.type for row in rows}
    assert len(kinds) > 12
    assert set(rates.seconds) == {(kind, count) for kind in kinds for count in (1, 2, 64)}
    assert min(rates.seconds.values()) > 0
    fastest = max(GGML_QUANT_SIZES[k][1] / GGML_QUANT_SIZES[k][0] / rates.seconds[k, 1] for k in kinds)
    assert rates.bandwidth == pytest.approx(fastest)


@pytest.mark.parametrize("batch", [0, 513])
def test_more_texts_than_a_pass_can_take_are_refused(batch: int) -> None:
    with pytest.raises(UnsupportedError, match=f"batch: expected 1 to 512 texts, found {batch}"):
        estimate_of(griffins.tiny(), "Q8_0", batch)
