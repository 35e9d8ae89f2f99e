"""The automatic mix from end to end: costs measured, types chosen for a goal, the whole measured once more."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from griffin_gguf.quant.bench import Bench
from griffin_gguf.quant.evaluate import Divergence
from griffin_gguf.quant.file_types import FILE_TYPES, FileType
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.mix import Mix, Option, choose, smallest
from griffin_gguf.quant.quantizer import Settings, dry_run
from griffin_gguf.quant.sensitivity import TOKENS, Costs, Progress, measure_costs
from griffin_gguf.quant.writer import ALIGNMENT
from griffin_gguf.runtime.atomic import check_targets
from griffin_gguf.runtime.errors import UnsupportedError

_STEPS = 8  # mixes measured for a divergence; three or four are usual
_NEAR = 0.98  # of the divergence that is allowed: no smaller mix is looked for
_FINENESS = 1000  # sizes are told apart by a thousandth

#: A mix's recipe in its file, by the unit of its costs; of one length, on which the file's size depends.
_WORDS = {"nats": "automatic mix, by divergence", "estimate": "automatic mix, by importance"}


@dataclass(frozen=True)
class Goal:
    """What a mix has to keep; exactly one is given.

    `bits_per_weight` is of tensor data, as in `FilePlan`; `data_bytes` counts each tensor with its padding, as
    they lie in a file behind its header; `max_kl` is the mean divergence from the source, in nats a token.
    """

    bits_per_weight: float | None = None
    data_bytes: int | None = None
    max_kl: float | None = None


@dataclass(frozen=True)
class Found:
    """The mix, its measured divergence on the text (None without one), and the costs that it was chosen by."""

    mix: Mix
    divergence: Divergence | None
    costs: Costs


def find_mix(
    source: Path,
    goal: Goal,
    *,
    text: str | None,
    imatrix: ImportanceMatrix | None = None,
    tokens: int = TOKENS,
    threads: int | None = None,
    costs_file: Path | None = None,
    progress: Progress | None = None,
) -> Found:
    """Choose a type for each tensor of the GGUF `source`, to be given to `quantize` as `Settings.types`.

    `text` is what divergences are measured on, `tokens` of it; without one the choice goes by `imatrix` alone, and
    `max_kl` is no goal. Costs are kept in `costs_file`, or taken from it where it is there already. Raises
    `UnsupportedError` for a goal that no mix keeps, naming the smallest size, and for costs of another source, text
    or matrix; what `Bench` and its `divergence` raise; `FileFormatError` and `GriffinError` for the `costs_file`.
    """
    if text is None and imatrix is None:
        raise UnsupportedError(f"{source}: an automatic mix needs a text, an importance matrix, or best of all both")
    if text is None and goal.max_kl is not None:
        raise UnsupportedError(f"{source}: a divergence can only be kept where there is a text to measure it on")
    known = costs_file is not None and costs_file.is_file()
    if costs_file is not None and not known:
        check_targets([costs_file])
    with Bench(source, text, imatrix, tokens=tokens, threads=threads) as bench:
        if costs_file is not None and known:
            costs = Costs.load(costs_file, bench)
        else:
            costs = measure_costs(bench, progress)
            if costs_file is not None:
                costs.save(costs_file)
        if goal.max_kl is not None:
            mix, divergence = _within(bench, costs, goal.max_kl, progress)
        else:
            mix = sized_mix(costs, goal, bench.hp.parameters)
            divergence = _divergence(bench, mix, progress) if bench.text else None
        return Found(mix, divergence, costs)


def data_budget(source: Path, target: Path, size: int, settings: Settings) -> int:
    """Bytes that are left for tensors, for `Goal.data_bytes`, in a file `target` of `size` bytes in all.

    Exact where the file is not split; else a little less. Raises as `dry_run` does.
    """
    settings = replace(settings, recipe=_WORDS["nats"])
    whole = dry_run(source, _file_type(T.Q4_K), settings, target=target)  # any quantized type has the same keys
    return size - (whole.size - sum(row.nbytes + -row.nbytes % ALIGNMENT for row in whole.tensors))


def as_recipe(found: Found) -> tuple[FileType, str]:
    """What to hand to `quantize` beside the types: the file type that is nearest, and the words for the file's recipe.

    The nearest is named after the type that holds most weights.
    """
    weights: Counter[T] = Counter()
    for name, type in found.mix.types.items():
        own = found.costs.options[name][-1]
        block, size = GGML_QUANT_SIZES[own.type]
        weights[type] += own.nbytes // size * block
    defaults = {row.default for row in FILE_TYPES.values()}
    most = next(type for type, _ in weights.most_common() if type in defaults)
    return _file_type(most), _WORDS[found.costs.unit]


def _file_type(most: T) -> FileType:
    """The first file type of that default, without its rules: whoever chose each tensor's type knows what it costs."""
    nearest = next(row for row in FILE_TYPES.values() if row.default is most)
    return replace(nearest, rules={}, importance=frozenset())


def sized_mix(costs: Costs, goal: Goal, parameters: int) -> Mix:
    """Choose for a goal of size, for a model of so many weights.

    Raises `UnsupportedError` for a size that is too small, naming the smallest.
    """
    if goal.bits_per_weight is not None:
        least = 8 * smallest(costs.options) / parameters
        if goal.bits_per_weight < least:
            raise UnsupportedError(f"no mix has {goal.bits_per_weight:g} bits per weight; the smallest has {least:.4f}")
        return choose(costs.options, int(goal.bits_per_weight * parameters / 8))
    assert goal.data_bytes is not None
    mix = choose(_padded(costs.options), goal.data_bytes)
    sizes = ({o.type: o.nbytes for o in costs.options[name]}[type] for name, type in mix.types.items())
    return replace(mix, nbytes=sum(sizes))


def _padded(options: Mapping[str, Sequence[Option]]) -> dict[str, list[Option]]:
    return {
        name: [replace(option, nbytes=option.nbytes + -option.nbytes % ALIGNMENT) for option in found]
        for name, found in options.items()
    }


def _divergence(bench: Bench, mix: Mix, progress: Progress | None) -> Divergence:
    watch = (lambda done, total: progress("measuring the mix", done, total)) if progress else None
    return bench.divergence({name: type for name, type in mix.types.items() if name in bench.tensors}, watch)


def _within(bench: Bench, costs: Costs, most: float, progress: Progress | None) -> tuple[Mix, Divergence]:
    """The smallest mix found whose measured divergence is at most `most`.

    How far a mix's costs were off says which costs to choose the next for. Ends in any case: the file's own types
    diverge by 0.
    """
    if not most > 0:
        raise UnsupportedError(f"a divergence of {most:g} cannot be kept; expected more than 0")
    aim, best, before = most, None, None
    for step in count(1):
        mix = _cheap_mix(costs, aim)
        found = _divergence(bench, mix, progress) if before is None or mix != before[0] else before[1]
        repeated, before = before is not None and mix == before[0], (mix, found)
        if found.mean <= most and (best is None or mix.nbytes < best[0].nbytes):
            best = mix, found
        settled = repeated or step >= _STEPS or found.mean == 0 or _NEAR * most <= found.mean <= most
        if best and (settled or mix.nbytes == smallest(costs.options)):
            return best
        aim *= most / found.mean if found.mean > 0 else 1.0
        if found.mean > most or repeated:
            aim *= _NEAR
    raise AssertionError


def _cheap_mix(costs: Costs, most: float) -> Mix:
    """The smallest mix of at most that cost."""
    low, high = smallest(costs.options), sum(max(o.nbytes for o in options) for options in costs.options.values())
    best = choose(costs.options, low)
    if best.cost <= most:
        return best
    best = choose(costs.options, high)
    while high - low > high // _FINENESS:
        middle = (low + high) // 2
        mix = choose(costs.options, middle)
        if mix.cost <= most:
            best, high = mix, mix.nbytes
        else:
            low = middle
    return best
