"""What recipes.py says of the recurrence, held against the demo model: tools/measure_recurrence.py in small."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant.evaluate import kl
from griffin_gguf.quant.file_types import FileType, Rule, file_type
from griffin_gguf.quant.quantizer import quantize
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.arch import Role

DEMO = Path(__file__).parents[2] / "cli" / "demo_model"
QUANTIZED = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q2_K")


@dataclass
class Laboratory:
    folder: Path
    reference: Model
    tokens: list[int]

    def distance(self, recipe: FileType) -> float:
        """Mean KL of a quantized demo model to the F32 one."""
        quantize(self.reference.path, self.folder / "variant.gguf", recipe)
        with load(self.folder / "variant.gguf", threads=1) as model:
            return kl(self.reference, model, self.tokens).mean


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("recurrence")
    convert(DEMO, [(folder / "f32.gguf", "F32")])
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    with load(folder / "f32.gguf", threads=1) as reference:
        yield Laboratory(folder, reference, reference.tokenizer.encode(text)[:513])


@pytest.fixture(scope="module")
def distances(laboratory: Laboratory) -> dict[str, float]:
    """Of every file type, as its recipe is."""
    return {name: laboratory.distance(file_type(name)) for name in ("BF16", *QUANTIZED)}


def gates_alone(type: T) -> FileType:
    """Nothing but the gates in another type than F32."""
    return replace(file_type("F32"), rules={Role.RECURRENT_GATE: (Rule(type),)})


def test_gates_in_q8_0_are_free(laboratory: Laboratory, distances: dict[str, float]) -> None:
    """By themselves they cost under a fiftieth of what each file costs in all; in Q3_K they would not."""
    alone = laboratory.distance(gates_alone(T.Q8_0))
    assert all(alone < distances[name] / 50 for name in QUANTIZED)
    crude = laboratory.distance(gates_alone(T.Q3_K))
    assert crude > distances["Q4_K_M"] / 50


def test_files_are_the_farther_off_the_smaller_they_are(distances: dict[str, float]) -> None:
    assert list(distances.values()) == sorted(distances.values())
    # The checkpoint is bf16 itself: what is left is that ggml rounds the other factor of a product as well.
    assert distances["BF16"] < 1e-5
