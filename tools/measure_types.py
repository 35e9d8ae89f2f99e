"""Measure every file type with and without an importance matrix: the table in docs/quantization.md.

    python tools/measure_types.py SOURCE.gguf TEXT.txt [--type Q4_K_M ...] [--tokens 4096]

The importance matrix is collected over the first half of TEXT, the files are compared with SOURCE over the second
half: perplexity, mean KL and how often both put the same token first.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from griffin_gguf.quant.collect import Collector, Text
from griffin_gguf.quant.evaluate import Divergence, Perplexity, kl, perplexity
from griffin_gguf.quant.file_types import FILE_TYPES
from griffin_gguf.quant.imatrix import ImportanceMatrix
from griffin_gguf.quant.quantizer import Settings, dry_run, quantize
from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.errors import UnsupportedError


def main() -> None:
    """Collect, quantize, compare, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    quantized = [name for name, row in FILE_TYPES.items() if row.quantized]
    parser.add_argument("--type", nargs="+", default=quantized, dest="types")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    with TemporaryDirectory() as name, load(arguments.source, threads=arguments.threads) as reference:
        folder = Path(name)
        imatrix = collected(arguments.source, first, folder / "imatrix.gguf", arguments.threads)
        tokens = reference.tokenizer.encode(second)[: arguments.tokens + 1]
        print(
            f"{arguments.source.name}: perplexity {cell(perplexity(reference, tokens))} over {len(tokens) - 1} tokens\n"
        )
        print("| type | bits/weight | perplexity | with imatrix | KL | with imatrix | same top-1 | with imatrix |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for kind in arguments.types:
            target = folder / "quantized.gguf"
            bits = dry_run(arguments.source, kind, Settings(imatrix=imatrix), target=target).bits_per_weight
            pairs = []
            for matrix in (None, imatrix):
                try:
                    quantize(arguments.source, target, kind, Settings(imatrix=matrix), threads=arguments.threads)
                except UnsupportedError:
                    assert matrix is None
                    pairs.append(("—", "—", "—"))
                    continue
                pairs.append(compared(reference, target, tokens, arguments.threads))
            without, weighted = pairs
            cells = " | ".join(f"{a} | {b}" for a, b in zip(without, weighted, strict=True))
            print(f"| {kind} | {bits:.2f} | {cells} |", flush=True)


def collected(source: Path, text: str, path: Path, threads: int | None) -> ImportanceMatrix:
    """The importance matrix of `source` over `text`."""
    with Collector(source, Text("first half", text), path, threads=threads) as collector:
        return collector.run()


def compared(reference: Model, target: Path, tokens: list[int], threads: int | None) -> tuple[str, str, str]:
    """Perplexity, KL and agreement of the file, as cells."""
    with load(target, threads=threads) as model:
        far: Divergence = kl(reference, model, tokens)
        return cell(perplexity(model, tokens)), f"{far.mean:.5f}", f"{far.top1:.1%}"


def cell(found: Perplexity) -> str:
    """A perplexity without its error, which is of the text and the same for all."""
    return f"{found.value:.2f}"


if __name__ == "__main__":
    main()
