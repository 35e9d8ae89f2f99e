"""A text in pieces gives the ids of the whole, however it is cut, and takes no memory that grows with it."""

import tracemalloc
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import USER_DEFINED, metadata_of, train

from griffin_gguf.runtime import long_text
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.long_text import encode_pieces
from griffin_gguf.runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "cli" / "demo_model"
WORDS = (DEMO / "heldout.txt").read_text(encoding="utf-8")[5000:9000]
VOCABULARIES = pytest.mark.parametrize("which", ["demo", "trained", "prefixed"])
CONTROL = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<unused3>", "<mask>"]
ODD = [
    "\0",
    "\u2581",
    "\u2581\u2581",
    "\ufdd0",
    "e\u0301",
    "👍🏽",
    "日本語の文章",
    "العربية",
    "\r\n",
    "\u00a0",
    "<0x0A>",
]

#: What can go wrong at a cut: words, runs that are one token, names of control tokens, characters of several tokens.
PARTS = st.one_of(
    st.sampled_from(WORDS.split()),
    st.sampled_from([*CONTROL, *USER_DEFINED, *ODD]),
    st.text(" \n\t", max_size=20),
    st.text(max_size=5),
    st.integers(0, len(WORDS) - 60).map(lambda at: WORDS[at : at + 60]),
)
TEXTS = st.lists(PARTS, max_size=30).map("".join)


@cache
def tokenizer_of(which: str) -> Tokenizer:
    model = (DEMO / "tokenizer.model").read_bytes() if which == "demo" else train(dummy_prefix=which == "prefixed")
    return Tokenizer.from_gguf(Path("model.gguf"), metadata_of(model, space_prefix=which == "prefixed"))


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts})
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@VOCABULARIES
@settings(max_examples=200)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 400), max_size=12))
def test_ids_are_those_of_the_whole(which: str, text: str, cuts: list[int]) -> None:
    tokenizer = tokenizer_of(which)
    found = list(chain.from_iterable(encode_pieces(tokenizer, pieces_of(text, cuts))))
    assert found == tokenizer.encode(text, bos=False)


@VOCABULARIES
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_cut_everywhere_it_is_the_same(which: str, size: int) -> None:
    tokenizer = tokenizer_of(which)
    text = WORDS + "".join([*CONTROL, *USER_DEFINED, *ODD]) + " a  b\n\n\n\n c" * 20
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = list(encode_pieces(tokenizer, pieces))
    assert list(chain.from_iterable(parts)) == tokenizer.encode(text, bos=False)
    assert len(parts) > 50  # it has been cut


def test_a_run_without_a_place_to_cut_is_taken_whole() -> None:
    tokenizer = tokenizer_of("demo")
    for text in ("\n" * 3000, " " * 3000, "the" * 1000):
        pieces = [text[i : i + 100] for i in range(0, len(text), 100)]
        assert list(chain.from_iterable(encode_pieces(tokenizer, pieces))) == tokenizer.encode(text, bos=False)


@pytest.mark.parametrize("which", ["demo", "prefixed"])
def test_a_run_that_is_too_long_is_refused(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "LONGEST", 1000)
    tokenizer = tokenizer_of(which)
    for count, seen in ((900, False), (3000, True)):
        pieces = ["Words", " and"] * 2000 + [" " * 100] * (count // 100) + [" more"]
        found = encode_pieces(tokenizer, pieces)
        if seen:
            with pytest.raises(UnsupportedError, match=r"^text: 1,000 characters on end have no place to cut, from '"):
                list(found)
        else:
            assert list(chain.from_iterable(found)) == tokenizer.encode("".join(pieces), bos=False)


def test_no_text_has_no_ids() -> None:
    assert list(encode_pieces(tokenizer_of("demo"), [])) == []
    assert list(encode_pieces(tokenizer_of("demo"), ["", ""])) == []


def test_what_is_no_unicode_is_refused() -> None:
    with pytest.raises(GriffinError, match="lone surrogate"):
        list(encode_pieces(tokenizer_of("demo"), ["a \ud800 b"]))


def peak(count: int) -> int:
    """Bytes at most that Python allocates over `count` pieces of 4,000 characters."""

    def pieces() -> Iterator[str]:
        for _ in range(count):
            yield WORDS

    tracemalloc.start()
    tokens = sum(map(len, encode_pieces(tokenizer_of("demo"), pieces())))
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens > 900 * count
    return found


def test_memory_stays_the_same() -> None:
    peak(1)
    assert peak(200) < peak(20) + 50_000
