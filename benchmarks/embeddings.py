"""What a model's vectors of texts are worth: whether two halves of a passage find each other.

python benchmarks/embeddings.py MODEL.gguf TEXT.txt [--tokens 256] [--passages 200] [--threads 1]

A text is cut into passages, each passage into halves. For every first half the second half is looked for among all of
them by the angle between vectors; how often it is the nearest, and among the nearest ten. Beside it the same by words
alone (tf-idf over tokens), and by chance.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from griffin_gguf.runtime import load


def by_words(halves: list[list[int]], vocab: int) -> NDArray[np.float64]:
    """Tf-idf over tokens, [n, V]."""
    counts = np.stack([np.bincount(half, minlength=vocab) for half in halves]).astype(np.float64)
    return np.log1p(counts) * np.log(len(halves) / np.maximum((counts > 0).sum(0), 1))


def found(vectors: NDArray[np.floating], most: int) -> float:
    """How often the right second half is among the `most` nearest; first halves come first, in the same order."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    count = len(unit) // 2
    near = unit[:count] @ unit[count:].T
    better = (near > near.diagonal()[:, None]).sum(1)
    return float((better < most).mean())


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    with load(wanted.model, threads=wanted.threads) as model:
        tokens, bos = model.tokenizer.encode(wanted.text.read_text(), bos=False), [model.tokenizer.bos]
        count = min(wanted.passages, len(tokens) // wanted.tokens)
        # Passages from all over the text, apart from each other as far as it allows.
        starts = np.linspace(0, len(tokens) - wanted.tokens, count).astype(int)
        half = wanted.tokens // 2
        halves = [tokens[s : s + half] for s in starts] + [tokens[s + half : s + 2 * half] for s in starts]
        rows = {
            "last vector": model.embed([bos + one for one in halves]),
            "words alone": by_words(halves, model.vocab),
        }
        rows["last vector, centred"] = rows["last vector"] - rows["last vector"].mean(0)
    print(f"{wanted.model.name}, {wanted.text.name}: {count} passages of {wanted.tokens} tokens")
    print(f"{'':22}{'nearest':>10}{'nearest 10':>12}")
    for name, vectors in rows.items():
        print(f"{name:22}{found(vectors, 1):10.1%}{found(vectors, 10):12.1%}")
    print(f"{'chance':22}{1 / count:10.1%}{min(1, 10 / count):12.1%}")


if __name__ == "__main__":
    main()
