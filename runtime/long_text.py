"""Texts of any length as token ids, piece by piece: the ids that encoding all of it at once would give.

SentencePiece takes some 40 bytes of memory a character, which for 100 MB are 4 GB and, outside of the processor's
cache, several times the time. So a text is cut, but only where no token can reach across: between two characters that
stand side by side in no token of the vocabulary. BPE only ever joins neighbours to what is in the vocabulary, and looks
up user-defined tokens from the left: neither sees anything of the other side of such a cut.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from griffin_gguf.runtime.errors import UnsupportedError
from griffin_gguf.runtime.tokenizer import Tokenizer

#: Characters on end without a place to cut that are still read: SentencePiece takes some 700 MB for so many.
LONGEST = 1 << 24

_SPACE = "\u2581"  # how the vocabulary writes a space


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Ids that joined are `tokenizer.encode("".join(pieces), bos=False)`.

    At most one piece is held back, save where pieces on end have no place to cut. Raises as `Tokenizer.encode`, and
    `UnsupportedError` where those are too long.
    """
    inside, prefixed = _pairs(tokenizer), _prefixed(tokenizer)
    held, tail, size, first = list[str](), "", 0, True  # `tail` ends what is held: as much as decides about a cut

    def ids(part: str) -> list[int]:
        # Where every text is given a space in front, that one stands for the space at which it was cut.
        return tokenizer.encode(part if first or not prefixed else part[1:], bos=False)

    for piece in pieces:
        joint = tail + piece
        at = _last_cut(joint, max(len(tail) - prefixed, 1), inside, prefixed)
        held.append(piece)
        size += len(piece)
        if at:
            text = "".join(held)
            cut = size - len(joint) + at
            yield ids(text[:cut])
            held, size, first = [text[cut:]], size - cut, False
        if size > LONGEST:
            start = ascii("".join(held)[:20])
            raise UnsupportedError(f"text: {LONGEST:,} characters on end have no place to cut, from {start} on")
        tail = joint[-1 - prefixed :]
    if size:
        yield ids("".join(held))


def _last_cut(text: str, least: int, inside: frozenset[int], prefixed: bool) -> int:
    """The last index from `least` on at which `text` can be cut, not at its end; 0 where there is none."""
    for at in range(len(text) - 1 - prefixed, least - 1, -1):  # with a prefix, something must follow the space
        if (text[at] == " " or not prefixed) and _pair(text[at - 1], text[at]) not in inside:
            return at
    return 0


def _pair(one: str, other: str) -> int:
    return ord(_SPACE if one == " " else one) << 32 | ord(_SPACE if other == " " else other)


def _pairs(tokenizer: Tokenizer) -> frozenset[int]:
    """Every two characters that stand side by side in a token, as `_pair` has them."""
    # U+0000 is in no token: what stands beside it is no pair.
    text = "\0".join(map(tokenizer.name, range(tokenizer.vocab_size))).replace(" ", _SPACE)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
    return frozenset(np.unique(codes[:-1] << 32 | codes[1:]).tolist())


def _prefixed(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts a space in front of every text."""
    return b"".join(map(tokenizer.piece, tokenizer.encode("a", bos=False))) != b"a"
