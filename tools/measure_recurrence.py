"""Measure at which precision the recurrence's matrices are free: the table in docs/gguf-format.md.

    python tools/measure_recurrence.py DEMO-F32.gguf HELDOUT.txt [--type Q4_K_M ...] [--tokens N]

Two questions for each file type; F32 shows what the varied type costs by itself. `gates`: everything else as the
recipe has it, the gate weights in one type after another. `linear`: the same for linear_x, linear_y and
linear_out. Each file is compared with the F32 file token by token; "over F32 there" is how much farther off it is
than the same file with the varied tensors in F32, with the standard error of that difference. The last quarter of
the text shows whether errors of the recurrence add up.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gguf import GGMLQuantizationType as T

from griffin_gguf.quant.evaluate import kl, mean_and_error, perplexity
from griffin_gguf.quant.quantizer import quantize
from griffin_gguf.quant.recipes import FileType, Rule, file_type
from griffin_gguf.runtime import load
from griffin_gguf.runtime.arch import Role

#: The first is what a tensor is compared with: nothing lost in it.
CANDIDATES = (T.F32, T.BF16, T.F16, T.Q8_0, T.Q6_K, T.Q5_K, T.Q4_K, T.Q3_K, T.Q2_K)
ROLES = {Role.RECURRENT_GATE: "gates", Role.RECURRENT_LINEAR: "linear"}


def variant(base: FileType, role: Role, type: T) -> FileType:
    """The recipe with that role's tensors in that type."""
    return replace(base, rules={**base.rules, role: (Rule(type),)})


def main() -> None:
    """Quantize, compare, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model as an F32 GGUF")
    parser.add_argument("text", type=Path, help="text it has not seen")
    parser.add_argument("--type", nargs="+", default=["F32", "Q8_0", "Q4_K_M", "Q2_K"], help="file types to vary")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    reference = load(arguments.source, threads=arguments.threads)
    tokens = reference.tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens + 1]
    base = perplexity(reference, tokens)
    print(
        f"F32: perplexity {base.value:.4f} ± {base.stderr:.4f} over {base.tokens} tokens. KL in millionths of a nat.\n"
    )
    print("| file type | varied | bits/weight | KL | over F32 there | KL, last quarter | same top-1 | Δ perplexity |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    with TemporaryDirectory() as folder:
        target = Path(folder) / "variant.gguf"
        for name in arguments.type:
            for role in ROLES:
                unvaried = None
                for type in CANDIDATES:
                    bits = quantize(arguments.source, target, variant(file_type(name), role, type)).bits_per_weight
                    with load(target, threads=arguments.threads) as model:
                        far, score = kl(reference, model, tokens), perplexity(model, tokens)
                    unvaried = far if unvaried is None else unvaried
                    cost, error = mean_and_error(far.values - unvaried.values)
                    late = far.values[-len(far.values) // 4 :].mean()
                    print(
                        f"| {name} | {ROLES[role]} {type.name} | {bits:.3f} | {1e6 * far.mean:.1f} "
                        f"| {1e6 * cost:+.1f} ± {1e6 * error:.1f} | {1e6 * late:.1f} | {far.top1:.2%} "
                        f"| {score.value - base.value:+.4f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
