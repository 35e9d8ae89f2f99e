"""Trains the demo model: a small RecurrentGemma that writes Jane Austen's English and answers as a dictionary.

    python tools/train_demo.py --out cli/demo_model

fetches the text (Debian packages, by apt-get), trains the tokenizer and the model on the CPU, keeps the
weights that do best on the validation chapters, and prints the figures of the model's README.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_corpus
import numpy as np
import sentencepiece
import torch
from griffin_torch import CHUNK, Griffin, Shape
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

PAD, EOS, BOS, END_OF_TURN = 0, 1, 2, 107
ROW = 1024  # tokens a training row: four attention windows
ROWS = 4
BLOCK = 512  # tokens a block of the evaluation, each begun anew with <bos>
DIALOGUE_SHARE = 0.2  # of the rows
WARM_UP = 200
PEAK_RATE, FINAL_RATE = 2e-3, 5e-5
WEIGHT_DECAY = 0.1
DROPOUT = 0.1
VALIDATE_EVERY = 250
PROMPTS = (
    "It was a fine morning in May, and Elizabeth",
    "CHAPTER I\n\n",
    "<start_of_turn>user\nWhat is a cynic?<end_of_turn>\n<start_of_turn>model\n",
    "<start_of_turn>user\nWhat is a gentleman?<end_of_turn>\n<start_of_turn>model\n",
)

# Gemma's template, as google/gemma-2b-it and google/recurrentgemma-2b-it have it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


# ---- batches


@dataclass(frozen=True)
class Chapter:
    """A tokenized chapter."""

    tokens: np.ndarray  # <bos>-less, closed by <eos>
    starts: np.ndarray  # where paragraphs begin


class Batches:
    """Rows [ROW + 1] that all begin with <bos>: prose from a random paragraph on, or a conversation."""

    def __init__(self, corpus: demo_corpus.Corpus, tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokenizer = tokenizer
        self.chapters = [self._read(chapter) for chapter in corpus.chapters]
        self._places = [(i, s) for i, chapter in enumerate(self.chapters) for s in chapter.starts]
        self._dialogues = corpus.dialogues

    def _read(self, text: str) -> Chapter:
        paragraphs = [self._tokenizer.encode(p) for p in re.split(r"(?<=\n\n)", text)]
        starts = np.cumsum([0] + [len(p) for p in paragraphs[:-1]])
        return Chapter(np.concatenate([*paragraphs, [EOS]]), starts)

    def _prose(self) -> np.ndarray:
        index, start = self._random.choice(self._places)
        return self.chapters[index].tokens[start : start + ROW]

    def _conversation(self) -> np.ndarray:
        tokens: list[int] = []
        while len(tokens) < ROW:
            tokens += self._tokenizer.encode(demo_corpus.dialogue([self._random.choice(self._dialogues)]))
        return np.array(tokens[:ROW])

    def next(self) -> tuple[Tensor, Tensor]:
        """Draw inputs and targets [ROWS, ROW]; padding only follows a chapter's <eos>."""
        rows = np.full((ROWS, ROW + 1), PAD)
        rows[:, 0] = BOS
        for row in rows:
            tokens = self._conversation() if self._random.random() < DIALOGUE_SHARE else self._prose()
            row[1 : 1 + len(tokens)] = tokens
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


# ---- training


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up over steps, then a cosine over progress in 0..1."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / WARM_UP) * (FINAL_RATE + (PEAK_RATE - FINAL_RATE) * cosine)


def cross_entropy(model: Griffin, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Compare the model's prediction after each of inputs [B, T] with targets [B, T]; padding counts nothing."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction=reduction)


def optimizer_for(model: Griffin) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(model: Griffin, batches: Batches, validation: list[int], steps: int, minutes: float) -> Iterator[float]:
    """Trains until `steps` or `minutes` are used up; yields the validation loss after every VALIDATE_EVERY steps."""
    optimizer = optimizer_for(model)
    begun, recent = time.monotonic(), 0.0
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - begun) / (60.0 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        loss = cross_entropy(model, *batches.next())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += (loss.item() - recent) / (step % VALIDATE_EVERY + 1)
        last = step + 1 == steps or progress >= 1.0
        if last or (step + 1) % VALIDATE_EVERY == 0:
            held = block_loss(model, validation)
            elapsed = time.monotonic() - begun
            tokens = (step + 1) * ROWS * ROW
            print(f"step {step + 1}  {tokens / 1e6:.1f} M tokens  {elapsed / 60:.1f} min  "
                  f"training {recent:.4f}  validation {held:.4f}", flush=True)  # fmt: skip
            recent = 0.0
            yield held
        if last:
            return


# ---- figures


@torch.no_grad()
def block_loss(model: Griffin, tokens: list[int]) -> float:
    """Mean nats a token, in blocks of BLOCK tokens that each see <bos> and the block so far."""
    model.eval()
    total = 0.0
    for start in range(0, len(tokens), BLOCK):
        block = tokens[start : start + BLOCK]
        padded = block + [PAD] * (-len(block) % CHUNK)
        inputs, targets = torch.tensor([[BOS, *padded[:-1]]]), torch.tensor([padded])
        total += cross_entropy(model, inputs, targets, "sum").item()
    model.train()
    return total / len(tokens)


def unigram_loss(batches: Batches, tokens: list[int]) -> float:
    """Mean nats a token under the training prose's token counts, each one more than counted."""
    counts = np.ones(demo_corpus.VOCABULARY)
    for chapter in batches.chapters:
        counts += np.bincount(chapter.tokens, minlength=len(counts))
    return float(-np.log(counts / counts.sum())[tokens].mean())


@torch.no_grad()
def continuation(model: Griffin, tokens: list[int], temperature: float, limit: int = 120) -> list[int]:
    """Greedy at temperature 0; stops before <eos> or <end_of_turn>."""
    generator = torch.Generator().manual_seed(1)
    tokens, begun = [BOS, *tokens], len(tokens) + 1
    model.eval()
    while len(tokens) < begun + limit:
        logits = model(torch.tensor([tokens + [PAD] * (-len(tokens) % CHUNK)]))[0, len(tokens) - 1]
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator).item()
        else:
            chosen = logits.argmax().item()
        if chosen in (EOS, END_OF_TURN):
            break
        tokens.append(int(chosen))
    return tokens[begun:]


def report(model: Griffin, batches: Batches, tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    """Print the perplexities on `text`, and what the model writes after each of PROMPTS."""
    tokens = tokenizer.encode(text)
    size = len(text.encode())
    for name, loss in (("unigram", unigram_loss(batches, tokens)), ("model", block_loss(model, tokens))):
        bits = loss * len(tokens) / size / math.log(2)
        print(f"{name:8} perplexity {math.exp(loss):8.2f} a token   {bits:.3f} bits a byte")
    print(f"held out: {len(tokens)} tokens, {size} bytes, {size / len(tokens):.2f} bytes a token")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            new = continuation(model, tokenizer.encode(prompt), temperature)
            print(f"\n--- temperature {temperature}\n{prompt}|{tokenizer.decode(new)}")


# ---- the folder


def config(shape: Shape) -> dict[str, object]:
    """config.json, with the published checkpoints' fields."""
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_window_size": shape.window,
        "block_types": ["recurrent", "recurrent", "attention"],
        "bos_token_id": BOS,
        "conv1d_width": shape.conv,
        "eos_token_id": EOS,
        "head_dim": shape.head,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.mlp,
        "logits_soft_cap": shape.soft_cap,
        "lru_width": shape.lru,
        "max_position_embeddings": ROW,
        "model_type": "recurrent_gemma",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": 1,
        "pad_token_id": PAD,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
        "w_init_variance_scale": 0.01,
    }


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json, with what Gemma's says."""
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return special | {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }


def write(path: Path, content: str | bytes) -> None:
    """Whole or not at all: readers may come at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def export_text(folder: Path, shape: Shape, vocabulary: bytes, held_out: str) -> None:
    """Write all of the folder but its weights and its README."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    documents = {"config": config(shape), "generation_config": ids, "tokenizer_config": tokenizer_config()}
    for name, document in documents.items():
        write(folder / f"{name}.json", json.dumps(document, indent=2) + "\n")
    write(folder / "tokenizer.model", vocabulary)
    write(folder / "heldout.txt", held_out)


def export_weights(folder: Path, model: Griffin) -> None:
    """All in bf16, under transformers' names; the tied head is not repeated."""
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    write(folder / "model.safetensors", save(tensors, {"format": "pt"}))


# ---- the command


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--corpus", type=Path, default=Path("build/demo_corpus"), help="where the packages are kept")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps at most; 0 exports random weights")
    parser.add_argument("--minutes", type=float, default=math.inf, help="training time at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="train nothing: print the figures of --out")
    return parser.parse_args()


def main() -> None:
    """Train, export and report, as the command line says."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    corpus = demo_corpus.load(options.corpus)
    shape = Shape(vocabulary=demo_corpus.VOCABULARY, dropout=DROPOUT)
    model = Griffin(shape)
    if not options.evaluate:
        export_text(options.out, shape, demo_corpus.train_tokenizer(corpus), corpus.held_out)
        export_weights(options.out, model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(options.out / "tokenizer.model"))
    batches = Batches(corpus, tokenizer, options.seed)
    if not options.evaluate:
        validation = tokenizer.encode("\n\n".join(corpus.validation))
        best = math.inf
        for loss in train(model, batches, validation, options.steps, options.minutes):
            if loss < best:
                best = loss
                export_weights(options.out, model)
    model.load_state_dict(load_file(options.out / "model.safetensors"))
    report(model, batches, tokenizer, corpus.held_out)


if __name__ == "__main__":
    main()
