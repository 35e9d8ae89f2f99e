"""Measure what each precision of the recurrence costs: the table in docs/quantization.md.

    python tools/measure_recurrence.py DEMO-F32.gguf HELDOUT.txt [--type Q4_K_M ...] [--vary gates ...] [--tokens N]

For each file type everything else is as the recipe has it, and one part is written in one type after another; F32
shows what the varied part costs by itself. Parts: `gates`, the gate weights; `linear`, linear_x, linear_y and
linear_out; `conv`, the taps of the convolution; `decay`, -8·softplus(Λ). The last two are F32 in every file, so
their values are rounded to the type and stored as F32. Each file is compared with the F32 file token by token; "over
F32 there" is how much farther off it is than the same file with the varied part in F32, with the standard error of
that difference. The last quarter of the text shows whether errors of the recurrence add up.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize as decoded
from numpy.typing import NDArray

from griffin_gguf.quant.encode import encode, encoder
from griffin_gguf.quant.evaluate import Divergence, Perplexity, compare, mean_and_error, perplexity, stream
from griffin_gguf.quant.file_types import Metadata, file_type
from griffin_gguf.quant.recipes import Choices, plan
from griffin_gguf.quant.writer import Output, write
from griffin_gguf.runtime import load
from griffin_gguf.runtime.arch import CHECKSUMS, Role, Tensor, Transform
from griffin_gguf.runtime.gguf_file import GgufFile, dequantize

#: The first is what a part is compared with: nothing lost in it.
MATRIX_TYPES = (T.F32, T.BF16, T.F16, T.Q8_0, T.Q6_K, T.Q5_K, T.Q4_K, T.Q3_K, T.Q2_K)
VECTOR_TYPES = (T.F32, T.BF16, T.F16, T.Q8_0, T.Q5_0, T.Q4_0)

#: Part -> (whether a tensor belongs to it, the types to try).
PARTS: dict[str, tuple[Callable[[Tensor], bool], tuple[T, ...]]] = {
    "gates": (lambda tensor: tensor.role is Role.RECURRENT_GATE, MATRIX_TYPES),
    "linear": (lambda tensor: tensor.role is Role.RECURRENT_LINEAR, MATRIX_TYPES),
    "conv": (lambda tensor: tensor.role is Role.CONV, VECTOR_TYPES),
    "decay": (lambda tensor: tensor.spec.transform is Transform.DECAY, VECTOR_TYPES),
}


def rounded(type: T, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of the numbers after `type`, as one long row, its end padded with zeros to a whole block."""
    flat = np.zeros((1, -(-rows.size // 32) * 32), np.float32)
    flat[0, : rows.size] = rows.ravel()
    return decoded(encode(type, flat), type)[0, : rows.size].reshape(rows.shape)


def write_variant(source: Path, target: Path, name: str, part: str, type: T) -> float:
    """Write `source` in file type `name` with that part in `type`; returns bits per weight."""
    recipe, (belongs, _) = file_type(name), PARTS[part]
    with GgufFile.open(source) as file:
        hp = file.hyperparameters()
        as_matrix = {t.name: type for t in hp.tensors() if belongs(t) and t.role not in (Role.CONV, Role.VECTOR)}

        def read(tensor: Tensor, start: int, stop: int) -> NDArray[np.float32]:
            rows = dequantize(file.tensors[tensor.name], file.data(tensor.name), start, stop)
            return rounded(type, rows) if belongs(tensor) and tensor.name not in as_matrix else rows

        keys: Metadata = {key: (value, *file.types[key]) for key, value in file.metadata.items() if key != CHECKSUMS}
        planned = plan(hp, recipe, Choices(as_matrix))
        write([Output(target, keys | recipe.metadata, planned)], encoder(read))
        return 8 * sum(row.nbytes for row in planned) / hp.parameters


def main() -> None:
    """Quantize, compare, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model as an F32 GGUF")
    parser.add_argument("text", type=Path, help="text it has not seen")
    parser.add_argument("--type", nargs="+", default=["F32", "Q8_0", "Q4_K_M", "Q2_K"], help="file types to vary")
    parser.add_argument("--vary", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    reference = load(arguments.source, threads=arguments.threads)
    tokens = reference.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens + 1]
    base = perplexity(reference, tokens)
    print(f"F32: perplexity {base.value:.4f} ± {base.stderr:.4f} over {base.tokens} tokens. KL in millionths of a nat.")
    print("\n| file type | varied | bits/weight | KL | over F32 there | KL, last quarter | same top-1 | Δ perplexity |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with TemporaryDirectory() as folder:
        target = Path(folder) / "variant.gguf"
        for name in arguments.type:
            for part in arguments.vary:
                unvaried = None
                for type in PARTS[part][1]:
                    bits = write_variant(arguments.source, target, name, part, type)
                    with load(target, threads=arguments.threads) as model:
                        found = compare(reference, model, stream(tokens))
                    far, score = Divergence.of(found), Perplexity.of(found.scores)
                    unvaried = found.kl if unvaried is None else unvaried
                    cost, error = mean_and_error(found.kl - unvaried)
                    late = found.kl[-len(found.kl) // 4 :].mean()
                    print(
                        f"| {name} | {part} {type.name} | {bits:.3f} | {1e6 * far.mean:.1f} "
                        f"| {1e6 * cost:+.1f} ± {1e6 * error:.1f} | {1e6 * late:.1f} | {far.top1:.2%} "
                        f"| {score.value - base.value:+.4f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
