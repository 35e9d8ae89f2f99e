"""Costs held against measured divergences; automatic mixes against recipes, on text they were not chosen on."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from models import random_model

from griffin_gguf.convert.pipeline import convert
from griffin_gguf.quant import sensitivity
from griffin_gguf.quant.automatic import Found, Goal, as_recipe, data_budget, find_mix, sized_mix
from griffin_gguf.quant.bench import Bench
from griffin_gguf.quant.collect import Collector, Text
from griffin_gguf.quant.evaluate import kl
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.mix import Mix, smallest
from griffin_gguf.quant.quantizer import Settings, quantize
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.sensitivity import Costs, measure_costs
from griffin_gguf.runtime import load
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError

DEMO = Path(__file__).parents[2] / "cli" / "demo_model"

#: Those that are quick to encode.
QUICK = tuple(type for type in sensitivity.CANDIDATES if not type.name.startswith("IQ"))

AS_SHIPPED = {name: getattr(sensitivity, name) for name in ("_SAMPLE", "_GROUP_TOKENS", "CANDIDATES")}


@dataclass
class Laboratory:
    source: Path
    known: str
    unseen: str
    imatrix: ImportanceMatrix
    costs: Costs

    def find(self, goal: Goal, **arguments: object) -> Found:
        kept = self.source.with_name("costs.json")
        self.costs.save(kept)
        given = {"text": self.known, "imatrix": self.imatrix, "costs_file": kept} | arguments
        return find_mix(self.source, goal, tokens=256, threads=1, **given)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """The demo model; costs from few weights and few tokens, of types that are quick to encode."""
    folder = tmp_path_factory.mktemp("sensitivity")
    source = folder / "demo.gguf"
    convert(DEMO, [(source, "BF16")])
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    known, unseen = text[:100_000], text[-20_000:]
    with Collector(source, Text("known", known), folder / "imatrix.gguf", chunks=4, threads=1) as collector:
        imatrix = collector.run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "_SAMPLE", 1 << 14)
        patch.setattr(sensitivity, "_GROUP_TOKENS", 128)
        patch.setattr(sensitivity, "CANDIDATES", QUICK)
        with Bench(source, known, imatrix, tokens=256, threads=1) as bench:
            costs = measure_costs(bench)
        yield Laboratory(source, known, unseen, imatrix, costs)


@pytest.fixture(scope="module")
def thorough(laboratory: Laboratory) -> Laboratory:
    """The same with costs of all types, measured as they are for a person."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AS_SHIPPED.items():
            patch.setattr(sensitivity, name, value)
        with Bench(laboratory.source, laboratory.known, laboratory.imatrix, tokens=2048, threads=1) as bench:
            return replace(laboratory, costs=measure_costs(bench))


@pytest.fixture
def bench(laboratory: Laboratory) -> Iterator[Bench]:
    with Bench(laboratory.source, laboratory.known, laboratory.imatrix, tokens=256, threads=1) as made:
        yield made


def quantizable(bench: Bench, types: Mapping[str, T]) -> dict[str, T]:
    return {name: type for name, type in types.items() if name in bench.tensors}


def test_every_tensor_has_its_own_type_for_nothing_and_vectors_have_no_other(
    laboratory: Laboratory, bench: Bench
) -> None:
    assert list(laboratory.costs.options) == list(bench.file.tensors)
    for name, options in laboratory.costs.options.items():
        info = bench.file.tensors[name]
        assert (options[-1].type, options[-1].nbytes, options[-1].cost) == (info.type, info.nbytes, 0)
        assert all(o.cost > 0 and o.nbytes < info.nbytes for o in options[:-1])
        assert (len(options) == 1) == (name not in bench.tensors)


@pytest.mark.parametrize("types", [
    {"token_embd.weight": T.Q4_K},
    {"blk.0.ssm_x.weight": T.Q2_K},
    {"blk.3.ffn_down.weight": T.Q4_K},
    {"blk.1.ffn_up.weight": T.Q4_K, "blk.6.ssm_out.weight": T.Q3_K, "blk.0.ssm_gate_i.weight": T.Q2_K},
])  # fmt: skip
def test_costs_are_near_the_divergence_that_is_measured(
    laboratory: Laboratory, bench: Bench, types: dict[str, T]
) -> None:
    by_type = {name: {o.type: o.cost for o in laboratory.costs.options[name]} for name in types}
    expected = sum(by_type[name][type] for name, type in types.items())
    assert bench.divergence(types).mean == pytest.approx(expected, rel=0.4)


def test_a_bench_measures_what_the_file_would_diverge(laboratory: Laboratory, bench: Bench, tmp_path: Path) -> None:
    settings = Settings(imatrix=laboratory.imatrix)
    quantize(laboratory.source, tmp_path / "q.gguf", "Q4_0", settings, threads=1)
    types = {row.tensor.name: row.type for row in plan(bench.hp, FILE_TYPES["Q4_0"], imatrix=True)}
    with load(laboratory.source, threads=1) as reference, load(tmp_path / "q.gguf", threads=1) as model:
        wanted = kl(reference, model, bench.text)
    assert bench.divergence(quantizable(bench, types)).mean == pytest.approx(wanted.mean, rel=1e-4)
    assert bench.divergence({}).mean == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", ["Q6_K", "Q4_K_M"])
def test_a_mix_beats_the_recipe_of_its_size_on_unseen_text(laboratory: Laboratory, name: str) -> None:
    beats(laboratory, name, tokens=512)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in FILE_TYPES.items() if row.quantized])
def test_a_mix_beats_every_recipe_of_its_size_on_unseen_text(thorough: Laboratory, name: str) -> None:
    beats(thorough, name, tokens=2048)


def beats(laboratory: Laboratory, name: str, tokens: int) -> None:
    with Bench(laboratory.source, laboratory.unseen, laboratory.imatrix, tokens=tokens, threads=1) as bench:
        planned = plan(bench.hp, FILE_TYPES[name], imatrix=True)
        nbytes = sum(row.nbytes for row in planned)
        mix = sized_mix(laboratory.costs, Goal(bits_per_weight=8 * nbytes / bench.hp.parameters), bench.hp.parameters)
        assert mix.nbytes <= nbytes
        fixed = bench.divergence(quantizable(bench, {row.tensor.name: row.type for row in planned}))
        assert bench.divergence(quantizable(bench, mix.types)).mean < fixed.mean


def test_a_size_of_a_file_is_kept_to_the_byte(laboratory: Laboratory, tmp_path: Path) -> None:
    target, settings = tmp_path / "mix.gguf", Settings(imatrix=laboratory.imatrix)
    found = laboratory.find(Goal(data_bytes=data_budget(laboratory.source, target, 5_000_000, settings)))
    kind, words = as_recipe(found)
    settings = replace(settings, types=found.mix.types, recipe=words)
    made = quantize(laboratory.source, target, kind, settings, threads=1)
    assert {row.tensor.name: row.type for row in made.tensors} == found.mix.types
    assert sum(row.nbytes for row in made.tensors) == found.mix.nbytes
    assert 4_999_000 < target.stat().st_size <= 5_000_000
    # The same budget to the byte: what the mix leaves unused is what the file lacks.
    padded = sum(row.nbytes + -row.nbytes % 32 for row in made.tensors)
    budget = data_budget(laboratory.source, target, 5_000_000, Settings(imatrix=laboratory.imatrix))
    assert 5_000_000 - target.stat().st_size == budget - padded


def test_a_mix_goes_by_the_name_of_the_type_that_most_weights_have(laboratory: Laboratory) -> None:
    options = laboratory.costs.options
    types = {name: T.Q4_K if T.Q4_K in {o.type for o in found} else T.F32 for name, found in options.items()}
    types |= {"blk.0.ssm_gate_i.weight": T.Q8_0, "token_embd.weight": T.Q6_K}
    kind, words = as_recipe(Found(Mix(types, 0, 0.0), None, laboratory.costs))
    assert kind.metadata["general.file_type"] == FILE_TYPES["Q4_K_M"].metadata["general.file_type"]
    assert words == "automatic mix, by divergence"


def test_types_that_a_recipe_would_refuse_can_be_written(laboratory: Laboratory, tmp_path: Path) -> None:
    """llama.cpp's policy wants an importance matrix for IQ3_XXS; the encoder does not."""
    types = {name: options[-1].type for name, options in laboratory.costs.options.items()}
    types["blk.0.ssm_x.weight"] = T.IQ3_XXS
    kind, words = as_recipe(Found(Mix(types, 0, 0.0), None, laboratory.costs))
    settings = Settings(types=types, recipe=words)
    made = quantize(laboratory.source, tmp_path / "mix.gguf", kind, settings, threads=1)
    assert {row.tensor.name: row.type for row in made.tensors} == types


def test_a_divergence_is_kept_by_a_mix_that_is_hardly_larger_than_must_be(laboratory: Laboratory) -> None:
    found = laboratory.find(Goal(max_kl=0.004))
    assert found.divergence
    assert 0.0036 < found.divergence.mean <= 0.004


def test_a_divergence_that_everything_keeps_gives_the_smallest_mix(laboratory: Laboratory) -> None:
    found = laboratory.find(Goal(max_kl=50.0))
    assert found.mix.nbytes == smallest(laboratory.costs.options)


@pytest.mark.parametrize(("goal", "words"), [
    (Goal(bits_per_weight=0.9), r"no mix has 0.9 bits per weight; the smallest has \d\.\d+"),
    (Goal(data_bytes=1000), r"only 1,000 bytes of tensors; the smallest takes [\d,]+"),
    (Goal(max_kl=0.0), "a divergence of 0 cannot be kept"),
    (Goal(max_kl=float("nan")), "a divergence of nan cannot be kept"),
])  # fmt: skip
def test_a_goal_that_cannot_be_reached_is_refused(laboratory: Laboratory, goal: Goal, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        laboratory.find(goal)


def test_costs_can_be_kept_for_another_goal(laboratory: Laboratory, bench: Bench, tmp_path: Path) -> None:
    laboratory.costs.save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json", bench) == laboratory.costs


def test_costs_that_could_not_be_kept_are_not_measured(laboratory: Laboratory, tmp_path: Path) -> None:
    for kept, words in ((tmp_path / "none" / "costs.json", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(GriffinError, match=words):
            laboratory.find(Goal(bits_per_weight=5), costs_file=kept)


def test_costs_of_another_text_or_matrix_are_refused(laboratory: Laboratory, tmp_path: Path) -> None:
    laboratory.costs.save(tmp_path / "costs.json")
    for text, imatrix in ((laboratory.unseen, laboratory.imatrix), (laboratory.known, None)):
        with (
            Bench(laboratory.source, text, imatrix, tokens=256, threads=1) as other,
            pytest.raises(UnsupportedError, match="costs are of another file, text or importance matrix"),
        ):
            Costs.load(tmp_path / "costs.json", other)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"fingerprint": "", "unit": "nats", "options": {"a": [["Q9", 1, 2]]}}']
)
def test_files_that_hold_no_costs_are_refused(bench: Bench, tmp_path: Path, content: str) -> None:
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"costs\.json: costs: are not what this program writes"):
        Costs.load(tmp_path / "costs.json", bench)


def test_a_model_given_as_costs_is_told_in_a_short_line(laboratory: Laboratory, bench: Bench, tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, 1 << 40)  # a hole: whoever read all of it would run out of memory
    for path in (laboratory.source, large):
        with pytest.raises(FileFormatError, match=f"{path.name}: costs: are not what this program writes") as caught:
            Costs.load(path, bench)
        assert len(str(caught.value)) < len(str(path)) + 150


def test_without_a_text_roles_say_what_matters(laboratory: Laboratory) -> None:
    """A mix by roles is worse than one by measured costs, but not by much."""
    guessed = find_mix(
        laboratory.source, Goal(bits_per_weight=5), text=None, imatrix=laboratory.imatrix, tokens=256, threads=1
    )
    assert guessed.costs.unit == "estimate"
    assert guessed.divergence is None
    with Bench(laboratory.source, laboratory.unseen, laboratory.imatrix, tokens=256, threads=1) as bench:
        best = sized_mix(laboratory.costs, Goal(bits_per_weight=5), bench.hp.parameters)
        known, roles = (bench.divergence(quantizable(bench, mix.types)).mean for mix in (best, guessed.mix))
    assert known < roles < 2 * known


def test_neither_text_nor_matrix_is_refused(laboratory: Laboratory) -> None:
    with pytest.raises(UnsupportedError, match="needs a text, an importance matrix"):
        laboratory.find(Goal(bits_per_weight=4.5), text=None, imatrix=None)
    with pytest.raises(UnsupportedError, match="only be kept where there is a text"):
        laboratory.find(Goal(max_kl=0.1), text=None)


def test_a_text_too_short_is_refused(laboratory: Laboratory) -> None:
    with pytest.raises(UnsupportedError, match="is too short"):
        laboratory.find(Goal(bits_per_weight=4.5), text="")


def test_rows_of_any_length_have_types_that_fit(tmp_path: Path) -> None:
    """Rows of 64 and 96 take blocks of 32; gates of 16 columns take none."""
    source = random_model(tmp_path, "BF16")
    with Bench(source, None, tokens=64, threads=1) as bench:
        costs = measure_costs(bench)
        for name, tensor in bench.tensors.items():
            types = {option.type for option in costs.options[name]}
            blocks = {T.Q4_0, T.IQ4_NL, T.Q5_0, T.Q5_1, T.Q8_0}
            assert types == ({T.BF16} if tensor.shape[-1] % 32 else blocks | {T.BF16}), name


def test_types_that_need_an_importance_are_left_out_without(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "CANDIDATES", (T.IQ1_S, T.IQ2_XXS, T.IQ2_XS, T.Q2_K))
    with Bench(laboratory.source, None, tokens=64, threads=1) as bench:
        types = {option.type for options in measure_costs(bench).options.values() for option in options}
    assert types == {T.F32, T.BF16, T.Q2_K}


def test_tensors_of_large_models_are_measured_together(laboratory: Laboratory) -> None:
    """By name and quarter of the depth; of small ones each by itself."""
    with Bench(laboratory.source, None, tokens=64, threads=1) as bench:
        tensors = list(bench.tensors.values())
        alone = sensitivity.groups_of(tensors, bench.hp)
        large = replace(bench.hp, vocab=10**6)
        together = sensitivity.groups_of(tensors, large)
    assert alone == [[tensor.name] for tensor in tensors]
    assert ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"] in together
    assert ["token_embd.weight"] in together
    assert sorted(name for group in together for name in group) == sorted(bench.tensors)
