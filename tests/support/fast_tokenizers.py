"""tokenizer.json files made from SentencePiece models, as transformers makes Gemma's."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_base import generate_merges


def fast_tokenizer(model: bytes, special: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """The tokenizers package's equal of a SentencePiece model; `special` besides the control pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocab)
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    fast = tokenizers.Tokenizer(bpe)
    fast.normalizer = normalizers.Replace(" ", "\u2581")  # pyright: ignore[reportAttributeAccessIssue]
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # pyright: ignore[reportAttributeAccessIssue]
    fast.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [vocab_piece for vocab_piece, i in vocab.items() if processor.is_control(i) or processor.is_unknown(i)]
    fast.add_special_tokens([*control, *special])
    return fast


def tokenizer_json(model: bytes, special: tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of that tokenizer's file."""
    return json.loads(fast_tokenizer(model, special).to_str())


def write_tokenizer_json(folder: Path, model: bytes, special: tuple[str, ...] = ()) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(model, special)))
    return path
