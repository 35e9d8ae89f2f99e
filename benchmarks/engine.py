"""Sixteen answers at once against one chunk of sixteen tokens, on a file with true shapes.

python benchmarks/engine.py MODEL.gguf [--sequences 16] [--rounds 7] [--threads 2]

A step of sixteen answers computes what a chunk of sixteen tokens does, and logits for each of them; so the chunk is
timed with the logits of every token, and of the last alone beside that. All run in turn, so that a noisy machine
hits them alike.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from scale import machine
from timing import seconds

from griffin_gguf.runtime import Model, load
from griffin_gguf.runtime.engine import Engine
from griffin_gguf.runtime.sampling import Sampling

PROMPT = 48  # tokens of the shortest; each of the others has one more, so that no two texts are alike


def main() -> None:
    """Print the rate of each and its part of the chunk's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    print(machine())
    with load(arguments.model, threads=arguments.threads) as model:
        jobs = prepare(model, arguments.sequences)
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(arguments.rounds):
            for name, job in jobs.items():
                times[name].append(median(seconds(job) for _ in range(3)))
    chunk = times["chunk, every logit"]
    for name, found in times.items():
        ratios = [c / t for c, t in zip(chunk, found, strict=True)]
        print(
            f"{name:20} {arguments.sequences / median(found):7.2f} tokens/s, ratio {median(ratios):.3f} "
            f"(min {min(ratios):.3f}, max {max(ratios):.3f})"
        )


def prepare(model: Model, sequences: int) -> dict[str, Callable[[], object]]:
    """What is timed, each run once before: graphs are built and pages read."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, model.hp.vocab, PROMPT + i).tolist() for i in range(sequences)]
    chunk, state = prompts[0][:sequences], model.new_state()
    model.forward(prompts[-1], state)

    greedy, sampled = (running(model, prompts, Sampling(temperature=t, seed=0)) for t in (0, 0.8))
    states = [model.new_state() for _ in prompts]
    model.forward_batch(list(zip(prompts, states, strict=True)))
    batch = [(tokens[:1], state) for tokens, state in zip(prompts, states, strict=True)]
    print(greedy.memory)
    jobs: dict[str, Callable[[], object]] = {
        "chunk, last logits": lambda: model.forward(chunk, state),
        "chunk, every logit": lambda: model.forward(chunk, state, every=True),
        "batch": lambda: model.forward_batch(batch),
        "engine, greedy": greedy.step,
        "engine, sampled": sampled.step,
    }
    for job in jobs.values():
        job()
    return jobs


def running(model: Model, prompts: list[list[int]], sampling: Sampling) -> Engine:
    """An engine whose answers are all past their prompts."""
    engine = Engine(model, slots=len(prompts))
    requests = [engine.submit(tokens, sampling) for tokens in prompts]
    while not all(request.tokens for request in requests):
        engine.step()
    return engine


if __name__ == "__main__":
    main()
