"""Automatic mixes against every fixed recipe on one model: the table and the plot of docs/quantization.md.

    python tools/plot_mix.py DEMO-BF16.gguf HELDOUT.txt FOLDER [--tokens N] [--threads N]

The first half of the text gives the importance matrix, which recipes and mixes both get, and the costs that mixes
are chosen by; divergences from the file are measured on the second half. Each recipe is set beside the mix of at
most its size. Writes mix.svg, mix.png and mix.md into the folder; the matrix and all measured numbers stay there,
as imatrix.gguf and mix.json. Needs matplotlib.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from gguf import GGMLQuantizationType as T
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from griffin_gguf.quant.automatic import Goal, sized_mix
from griffin_gguf.quant.bench import Bench
from griffin_gguf.quant.collect import Collector, Text
from griffin_gguf.quant.evaluate import mean_and_error
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.mix import smallest
from griffin_gguf.quant.recipes import plan
from griffin_gguf.quant.sensitivity import Costs, measure_costs
from griffin_gguf.runtime.arch import Role

#: Sizes at which the line of the automatic mixes is drawn beside those of the recipes, in bits per weight.
GRID = (2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.7, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5)

DARK, RED, BLUE = "#333333", "#c0392b", "#1f5fa8"

#: Where a recipe's name stands beside its point, in points: across, up, and which end of it is there.
LABELS: dict[str, tuple[int, int, Literal["left", "right"]]] = {
    "IQ1_S": (-6, 0, "right"),
    "IQ2_XS": (-6, -2, "right"),
    "IQ2_S": (6, 2, "left"),
    "IQ2_M": (-6, -2, "right"),
    "IQ3_XXS": (-6, -2, "right"),
    "IQ3_XS": (-6, 0, "right"),
    "Q3_K_S": (6, 5, "left"),
    "IQ3_S": (-6, 0, "right"),
    "IQ3_M": (-2, -10, "right"),
    "Q3_K_M": (-4, -10, "left"),
    "IQ4_XS": (-6, 0, "right"),
    "Q4_0": (6, 4, "left"),
    "IQ4_NL": (6, 0, "left"),
    "Q4_K_S": (-6, -3, "right"),
    "Q4_K_M": (-4, -10, "left"),
    "Q5_0": (6, 4, "left"),
    "Q5_K_S": (-6, 0, "right"),
    "Q5_K_M": (8, -11, "right"),
}


@dataclass(frozen=True)
class Row:
    """A recipe and the mix of at most its size: bits per weight, KL with its standard error in nats."""

    name: str
    bits: float
    kl: float
    stderr: float
    mix_bits: float
    mix_kl: float
    mix_stderr: float
    gain: float  # of the mix: how much less, token by token
    gain_stderr: float


def main() -> None:
    """Measure everything, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model as a BF16 GGUF")
    parser.add_argument("text", type=Path, help="text it has not seen")
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that divergences are measured on")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--keep-gates", action="store_true", help="gates in Q8_0 in the mixes too, as recipes have them"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = arguments.text.read_text(encoding="utf-8")
    learned, unseen = text[: len(text) // 2], text[len(text) // 2 :]
    collecting = Text(arguments.text.name, learned)
    with Collector(arguments.source, collecting, folder / "imatrix.gguf", threads=arguments.threads) as collector:
        imatrix = collector.run()
    with Bench(arguments.source, learned, imatrix, tokens=2048, threads=arguments.threads) as bench:
        costs = measure_costs(bench)
        if arguments.keep_gates:
            costs = with_gates_kept(costs, bench)
    with Bench(arguments.source, unseen, imatrix, tokens=arguments.tokens, threads=arguments.threads) as bench:
        rows = compare(bench, imatrix, costs)
        least = 8 * smallest(costs.options) / bench.hp.parameters
        line = sorted(
            [(row.mix_bits, row.mix_kl) for row in rows]
            + [measured(bench, costs, bits) for bits in GRID if bits > least]
        )
        tokens = len(bench.text) - 1
    content = {"tokens": tokens, "rows": [asdict(row) for row in rows], "line": line}
    (folder / "mix.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "mix.md").write_text(table(rows, tokens))
    draw(rows, line, folder)
    beaten = sum(row.mix_kl < row.kl for row in rows)
    print(f"the automatic mix is better than {beaten} of {len(rows)} recipes of its size or larger")


def with_gates_kept(costs: Costs, bench: Bench) -> Costs:
    """The same, but Q8_0 is the only choice for gates."""
    gates = {name for name, tensor in bench.tensors.items() if tensor.role is Role.RECURRENT_GATE}
    options = {
        name: tuple(o for o in found if o.type is T.Q8_0) if name in gates else tuple(found)
        for name, found in costs.options.items()
    }
    return replace(costs, options=options)


def compare(bench: Bench, imatrix: ImportanceMatrix, costs: Costs) -> list[Row]:
    """Measure every quantized file type, and the mix of at most its bytes."""
    rows: list[Row] = []
    for recipe in FILE_TYPES.values():
        if not recipe.quantized:
            continue
        planned = plan(bench.hp, recipe, imatrix=True)
        bits = 8 * sum(row.nbytes for row in planned) / bench.hp.parameters
        fixed = divergences(bench, {row.tensor.name: row.type for row in planned})
        mix = sized_mix(costs, Goal(bits_per_weight=bits), bench.hp.parameters)
        mixed = divergences(bench, mix.types)
        mix_bits = 8 * mix.nbytes / bench.hp.parameters
        figures = (*mean_and_error(fixed), mix_bits, *mean_and_error(mixed), *mean_and_error(fixed - mixed))
        rows.append(Row(recipe.name, bits, *figures))
        print(f"{recipe.name}: {bits:.3f} bits, KL {rows[-1].kl:.6f}, automatic {rows[-1].mix_kl:.6f}", flush=True)
    return rows


def divergences(bench: Bench, types: Mapping[str, T]) -> NDArray[np.float64]:
    """KL token by token, f64 [tokens]."""
    return bench.comparison({name: type for name, type in types.items() if name in bench.tensors}).kl


def measured(bench: Bench, costs: Costs, bits: float) -> tuple[float, float]:
    """Bits per weight and KL of the mix for that goal."""
    mix = sized_mix(costs, Goal(bits_per_weight=bits), bench.hp.parameters)
    return 8 * mix.nbytes / bench.hp.parameters, float(divergences(bench, mix.types).mean())


def table(rows: list[Row], tokens: int) -> str:
    """Markdown: the recipes from the largest to the smallest."""
    lines = [
        f"KL from the BF16 file in thousandths of a nat a token, over {tokens:,} tokens.",
        "",
        "| recipe | bits per weight | KL | automatic: bits per weight | KL | of the recipe's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: -row.bits):
        lines.append(
            f"| {row.name} | {row.bits:.3f} | {1e3 * row.kl:.3f} ± {1e3 * row.stderr:.3f} | {row.mix_bits:.3f} "
            f"| {1e3 * row.mix_kl:.3f} ± {1e3 * row.mix_stderr:.3f} | {row.mix_kl / row.kl:.0%} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], line: list[tuple[float, float]], folder: Path) -> None:
    """The curve: bits per weight against KL, recipes as points, automatic mixes as a line."""
    mpl.rcParams |= {"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "mix"}
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.09)
    axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=2, zorder=2)
    axes.scatter([row.bits for row in rows], [row.kl for row in rows], color=RED, s=22, zorder=3)
    for row in rows:
        across, up, side = LABELS.get(row.name, (6, 0, "left"))
        axes.annotate(
            row.name, (row.bits, row.kl), (across, up), textcoords="offset points", ha=side, va="center",
            fontsize=8, color=DARK,
        )  # fmt: skip
    middle = min(line, key=lambda point: abs(point[0] - 3.4))
    axes.annotate("automatic mix", middle, (-8, -10), textcoords="offset points", ha="right", color=BLUE, weight="bold")
    worst = max(rows, key=lambda row: row.kl)
    axes.annotate(
        "fixed recipes", (worst.bits, worst.kl), (-5, 14), textcoords="offset points", color=RED, weight="bold"
    )
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("KL divergence from the BF16 file, nats a token")
    axes.grid(visible=True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=DARK)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"mix.{suffix}", dpi=160, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    main()
