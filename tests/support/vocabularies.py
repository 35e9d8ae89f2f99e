"""Vocabularies for tests: small SentencePiece models and the GGUF metadata that says the same.

`metadata_of` is written apart from convert/vocab.py, so that the two can be compared.
"""

import io
import re
from functools import cache
from typing import Any

import sentencepiece
from gguf import TokenType

CONTROL = re.compile(r"<pad>|<bos>|<eos>|<mask>|\[@BOS@\]|<unused\d+>|<start_of_turn>|<end_of_turn>")

#: As Gemma's: its control tokens, runs of newlines and spaces, tags (`</s>` is a tag there, not an end).
USER_DEFINED = (
    ["<mask>", "<2mass>", "[@BOS@]"]
    + [f"<unused{i}>" for i in range(12)]
    + ["<start_of_turn>", "<end_of_turn>"]
    + ["\n" * n for n in range(1, 5)]
    + ["\u2581" * n for n in range(2, 9)]
    + ["<table>", "</table>", "<b>", "</b>", "</s>", "\t\t"]
)

_CORPUS = """The fox of the river said that nothing under the moon grows for ever.
"What grows," asked the miller, "and what stays the same size?" A river, said the fox; it forgets.
In the beginning there were 12 windows, 2,048 keys and one long corridor; in the end, the same.
Él preguntó: ¿cuánto dura la memoria? Sie antwortete: so lange wie nötig – größer wird sie nicht.
def forward(tokens, state):  # returns logits
    for token in tokens:
        state = step(token, state)
Ελληνικά, русский язык, 日本語の文章, 中文字符, हिन्दी, العربية.
"""


@cache
def train(dummy_prefix: bool = False) -> bytes:
    """A SentencePiece model's bytes: BPE with byte fallback and Gemma's specials, from a few sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((_CORPUS * 4).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        unk_piece="<unk>",
        user_defined_symbols=USER_DEFINED,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece itself on a model's bytes: the oracle."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def metadata_of(model: bytes, space_prefix: bool = False) -> dict[str, Any]:
    """The GGUF metadata of a SentencePiece model with Gemma's specials, types as llama.cpp names them."""
    oracle = processor(model)
    ids = range(oracle.vocab_size())
    return {
        "general.architecture": "recurrentgemma",
        "recurrentgemma.vocab_size": len(ids),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(oracle.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": [_type(oracle, i) for i in ids],
        "tokenizer.ggml.bos_token_id": oracle.bos_id(),
        "tokenizer.ggml.eos_token_id": oracle.eos_id(),
        "tokenizer.ggml.unknown_token_id": oracle.unk_id(),
        "tokenizer.ggml.padding_token_id": oracle.pad_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


def _type(oracle: sentencepiece.SentencePieceProcessor, token: int) -> int:
    """SentencePiece's Python interface cannot tell user-defined pieces from normal ones; the list above can."""
    piece = oracle.id_to_piece(token)
    if oracle.is_unknown(token):
        return int(TokenType.UNKNOWN)
    if oracle.is_byte(token):
        return int(TokenType.BYTE)
    if oracle.is_control(token) or CONTROL.fullmatch(piece):
        return int(TokenType.CONTROL)
    return int(TokenType.USER_DEFINED if piece in USER_DEFINED else TokenType.NORMAL)
