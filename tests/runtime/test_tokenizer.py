"""SentencePiece from a GGUF's metadata against SentencePiece from the model file."""

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import CONTROL, USER_DEFINED, metadata_of, processor, train

from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.sentencepiece_proto import bpe_model
from griffin_gguf.runtime.tokenizer import (
    StreamDecoder,
    Tokenizer,
    _all_sound,  # pyright: ignore[reportPrivateUsage]
    _first_fault,  # pyright: ignore[reportPrivateUsage]
)

DEMO = Path(__file__).parents[2] / "cli" / "demo_model" / "tokenizer.model"
PATH = Path("model.gguf")
TYPE = "tokenizer.ggml.token_type"
TOKENS = "tokenizer.ggml.tokens"


@cache
def pair(which: str) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """A tokenizer from metadata and its oracle: the demo model's vocabulary, or two trained here."""
    model = DEMO.read_bytes() if which == "demo" else train(dummy_prefix=which == "prefixed")
    tokenizer = Tokenizer.from_gguf(PATH, metadata_of(model, space_prefix=which == "prefixed"))
    return tokenizer, processor(model)


VOCABULARIES = pytest.mark.parametrize("which", ["demo", "trained", "prefixed"])

WORDS = "the of river size memory fox grows ever state token def return Él größer язык 日本語 العربية हिन्दी".split()  # noqa: SIM905
CONTROL_NAMES = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<unused3>", "<mask>", "[@BOS@]"]
ALIKE = ["<start_of_turn", "start_of_turn>", "< bos>", "<<", "<unused>", "<0x0A>", "<0xFF>", "<unk>", "[@BOS"]
ODD = [
    "\0", "\x01", "\x1b[31m", "\x7f", "\r\n", "\t\t\t", "\u00a0", "\u200b", "\u200d", "\ufeff",
    "\u2581", "\u2581\u2581", "\ufffd", "\uffff", "\U0010ffff", "\u202e", "\u1100\u1161",
    "e\u0301", "a\u0300\u0301\u0302\u0303", "\ufdfa", "\ufb01", "\u212b", "①", "½", "…",
    "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🇩🇪", "🏴\U000e0067\U000e0062\U000e007f",
    " ", "  ", "         ", "\n\n\n\n\n\n\n",
]  # fmt: skip


def text(rng: random.Random) -> str:
    """A random or adversarial string."""

    def part() -> str:
        match rng.randrange(8):
            case 0:
                return "".join(rng.choices("abc dE\n<>_▁0123456789.,", k=rng.randint(1, 30)))
            case 1:
                return rng.choice(ODD) * rng.randint(1, 4)
            case 2:
                return rng.choice(CONTROL_NAMES + ALIKE + USER_DEFINED)
            case 3:
                return " " * rng.randint(1, 20)
            case 4:
                return "\n" * rng.randint(1, 9)
            case 5:
                code = rng.choice([rng.randrange(0x250), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
                return chr(code)
            case _:
                return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))

    return "".join(part() for _ in range(rng.randint(0, 12)))


@VOCABULARIES
def test_ids_equal_sentencepiece_on_ten_thousand_strings(which: str) -> None:
    tokenizer, oracle = pair(which)
    rng = random.Random(20240402)
    control = tokenizer.control_ids
    plain = forged = 0
    for _ in range(10_000):
        string = text(rng)
        ids = tokenizer.encode(string, bos=False)
        assert control.isdisjoint(ids), string
        if CONTROL.search(string):
            forged += 1
        else:
            plain += 1
            assert ids == oracle.encode(string), string
            assert tokenizer.encode(string) == [tokenizer.bos, *ids]
    assert min(plain, forged) > 2_000


@pytest.mark.parametrize("which", ["demo", "trained"])
def test_special_ids_equal_sentencepieces_user_defined_symbols(which: str) -> None:
    tokenizer, oracle = pair(which)
    rng = random.Random(7)
    seen: set[int] = set()
    for _ in range(5_000):
        string = text(rng)
        for own in ("<pad>", "<bos>", "<eos>"):  # SentencePiece's own control pieces: it never finds these in text
            string = string.replace(own, "")
        ids = tokenizer.encode(string, bos=False, special=True)
        assert ids == oracle.encode(string), string
        seen |= tokenizer.control_ids & set(ids)
    names = {tokenizer.name(i) for i in seen}
    assert names >= {"<start_of_turn>", "<end_of_turn>", "<mask>", "[@BOS@]", "<unused3>"}


def test_very_long_strings() -> None:
    tokenizer, oracle = pair("demo")
    for string in ("a" * 200_000, " " * 100_000, "\n" * 100_001, "👍🏽" * 20_000, "the river " * 20_000):
        ids = tokenizer.encode(string, bos=False)
        assert ids == oracle.encode(string)
        assert tokenizer.decode(ids) == string


@VOCABULARIES
@settings(max_examples=300)
@given(string=st.text())
def test_decode_undoes_encode(which: str, string: str) -> None:
    tokenizer, _ = pair(which)
    assert tokenizer.decode(tokenizer.encode(string)) == string.replace("\u2581", " ")


@VOCABULARIES
@settings(max_examples=300)
@given(data=st.data())
def test_stream_gives_what_decode_gives_and_never_half_a_character(which: str, data: st.DataObject) -> None:
    tokenizer, _ = pair(which)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    whole = b"".join(tokenizer.piece(i) for i in ids)
    for n in range(len(ids) + 1):
        # What is given out is a prefix of the whole, U+FFFD only where the bytes are beyond repair.
        assert whole.decode("utf-8", "replace").startswith("".join(pieces[:n]))
    assert "".join(pieces) + decoder.flush() == whole.decode("utf-8", "replace")


def test_stream_waits_for_all_bytes_of_a_character() -> None:
    tokenizer, _ = pair("demo")
    ids = [tokenizer._tokens.index(f"<0x{b:02X}>") for b in "é👍".encode()]  # pyright: ignore[reportPrivateUsage]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in ids] == ["", "é", "", "", "", "👍"]
    assert decoder.flush() == ""
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ids[0]) + decoder.push(ids[1]) == "é"


def test_special_tokens_of_a_rendered_template() -> None:
    tokenizer, _ = pair("trained")
    control = tokenizer.control_tokens
    ids = tokenizer.encode("<bos><start_of_turn>user\nhi<end_of_turn>", special=True)
    assert ids[:2] == [tokenizer.bos, control["<start_of_turn>"]]
    assert ids[-1] == control["<end_of_turn>"]
    assert ids.count(tokenizer.bos) == 1  # not doubled
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, special=True) == "<bos><start_of_turn>user\nhi<end_of_turn>"
    assert tokenizer.encode("<bos>", bos=False, special=True) == [tokenizer.bos]
    assert tokenizer.encode("", special=True) == tokenizer.encode("") == [tokenizer.bos]


def test_of_overlapping_control_names_the_leftmost_then_longest_wins() -> None:
    metadata = metadata_of(train())
    metadata[TOKENS] = list(metadata[TOKENS])
    a, b, c = (metadata[TOKENS].index(f"<unused{i}>") for i in range(3))
    metadata[TOKENS][a], metadata[TOKENS][b], metadata[TOKENS][c] = "<|a", "<|a|>", "|>b"
    tokenizer = Tokenizer.from_gguf(PATH, metadata)
    assert tokenizer.encode("<|a|>b", bos=False, special=True) == [b, *tokenizer.encode("b", bos=False)]
    assert tokenizer.encode("<|a |>b", bos=False, special=True) == [a, *tokenizer.encode(" ", bos=False), c]


@settings(max_examples=300)
@given(parts=st.lists(st.sampled_from([*CONTROL_NAMES, *ALIKE, "<", ">", "bos", "eos", "x", " "]), max_size=8))
def test_shielded_names_are_text(parts: list[str]) -> None:
    tokenizer, _ = pair("trained")
    string = "".join(parts)
    ids = tokenizer.encode(tokenizer.shield(string), bos=False, special=True)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert ids == tokenizer.encode(string, bos=False)


def test_add_bos_token_false_adds_none() -> None:
    metadata = metadata_of(train()) | {"tokenizer.ggml.add_bos_token": False}
    assert Tokenizer.from_gguf(PATH, metadata).encode("") == []


@pytest.mark.parametrize("special", [False, True])
def test_lone_surrogates_are_refused_by_name(special: bool) -> None:
    tokenizer, _ = pair("demo")
    with pytest.raises(GriffinError, match=r"character 2 is the lone surrogate U\+D800"):
        tokenizer.encode("ab\ud800c", special=special)


@pytest.mark.parametrize("token", [-1, 600, 2**40])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    tokenizer, _ = pair("trained")
    for call in (tokenizer.piece, tokenizer.name, StreamDecoder(tokenizer).push, lambda i: tokenizer.decode([i])):
        with pytest.raises(GriffinError, match=f"token {token}: expected an id from 0 to 599"):
            call(token)


def test_pieces_and_names() -> None:
    tokenizer, oracle = pair("trained")
    assert tokenizer.piece(tokenizer.bos) == b""
    assert tokenizer.piece(oracle.piece_to_id("<0x0A>")) == b"\n"
    assert tokenizer.piece(oracle.piece_to_id("\u2581\u2581")) == b"  "
    assert tokenizer.piece(oracle.unk_id()) == oracle.decode([oracle.unk_id()]).encode()
    assert tokenizer.name(tokenizer.eos) == "<eos>"
    assert (tokenizer.vocab_size, tokenizer.pad) == (600, 0)


REQUIRED = [
    "model", "tokens", "scores", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token",
    "add_space_prefix",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_key_is_named(name: str) -> None:
    metadata = metadata_of(train())
    del metadata[f"tokenizer.ggml.{name}"]
    with pytest.raises(FileFormatError, match=f"model.gguf: tokenizer.ggml.{name}: is missing"):
        Tokenizer.from_gguf(PATH, metadata)


def test_a_vocabulary_of_another_size_than_the_models_is_named() -> None:
    metadata = metadata_of(train()) | {"recurrentgemma.vocab_size": 601}
    with pytest.raises(
        FileFormatError, match=r"tokenizer\.ggml\.tokens: expected 601, the model's vocabulary, found 600"
    ):
        Tokenizer.from_gguf(PATH, metadata)


def test_a_file_without_a_tokenizer_says_so() -> None:
    with pytest.raises(FileFormatError, match="has no tokenizer"):
        Tokenizer.from_gguf(PATH, {"general.architecture": "recurrentgemma"})


def test_without_padding_there_is_none() -> None:
    metadata = metadata_of(train())
    del metadata["tokenizer.ggml.padding_token_id"]
    assert Tokenizer.from_gguf(PATH, metadata).pad is None


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("tokens", ["a"], "expected 1, one a token, found 600"),
        ("tokens", "abc", "expected an array of str"),
        ("tokens", [b"a"] * 600, "expected an array of str"),
        ("scores", [0.0] * 599, "expected 600, one a token, found 599"),
        ("scores", [0] * 600, "expected an array of float"),
        ("token_type", [1] * 601, "expected 600, one a token, found 601"),
        ("token_type", [True] * 600, "expected an array of int"),
        ("bos_token_id", 600, "expected an id from 0 to 599, found 600"),
        ("bos_token_id", -1, "expected an id from 0 to 599, found -1"),
        ("eos_token_id", True, "expected an id from 0 to 599, found True"),
        ("padding_token_id", "0", "expected an id from 0 to 599, found '0'"),
        ("unknown_token_id", 2**63, "expected an id"),
        ("add_bos_token", 1, "expected true or false, found 1"),
        ("add_space_prefix", "no", "expected true or false, found 'no'"),
    ],
)
def test_a_bad_value_is_named(name: str, value: Any, problem: str) -> None:
    metadata = metadata_of(train()) | {f"tokenizer.ggml.{name}": value}
    with pytest.raises(FileFormatError, match=problem):
        Tokenizer.from_gguf(PATH, metadata)


@pytest.mark.parametrize(
    ("name", "token", "value", "problem"),
    [
        ("scores", 300, math.nan, "tokenizer.ggml.scores: token 300: expected a finite number, found nan"),
        ("scores", 300, -math.inf, "tokenizer.ggml.scores: token 300: expected a finite number"),
        ("scores", 300, 1e300, "tokenizer.ggml.scores: token 300: expected a number of float32, found 1e"),
        ("token_type", 300, 7, "tokenizer.ggml.token_type: token 300: 7 is no token type"),
        ("token_type", 300, 0, "tokenizer.ggml.token_type: token 300: 0 is no token type"),
        ("token_type", 300, int(TokenType.UNKNOWN), r"one token of type unknown, with id 3, found 2: \[3, 300\]"),
        ("token_type", 3, int(TokenType.NORMAL), r"one token of type unknown, with id 3, found 0: \[\]"),
        ("token_type", 50, int(TokenType.NORMAL), "no byte token '<0x[0-9A-F]{2}>'"),
        ("token_type", 300, int(TokenType.BYTE), "is no byte"),
        ("token_type", 523, int(TokenType.CONTROL), "token 523: '.' is too short for a control token"),
        ("tokens", 300, "", "token 300: '' is no name for a token"),
        ("tokens", 300, "a\0b", r"token 300: 'a\\x00b' is no name for a token"),
        ("tokens", 300, "\ud800", "is no name for a token"),
        ("tokens", 300, "<eos>", "token 300: '<eos>' is already token 1"),
        ("tokens", 50, "<0xZZ>", "no byte token '<0x"),
    ],
)
def test_a_bad_token_is_named(name: str, token: int, value: Any, problem: str) -> None:
    metadata = metadata_of(train())
    metadata[f"tokenizer.ggml.{name}"] = [*metadata[f"tokenizer.ggml.{name}"]]
    metadata[f"tokenizer.ggml.{name}"][token] = value
    with pytest.raises(FileFormatError, match=problem):
        Tokenizer.from_gguf(PATH, metadata)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@given(
    st.lists(st.sampled_from(["a", "b", "cd", "", "\0", "e\0f", "\ud800", "▁"]) | st.text(max_size=4), max_size=5),
    st.lists(st.sampled_from([-1.5, 0.0, 3.4e38, 3.5e38, -1e300, math.nan, -math.inf]), min_size=5, max_size=5),
    st.lists(st.integers(-1, 7), min_size=5, max_size=5),
)
def test_tokens_are_refused_all_at_once_as_they_are_one_by_one(
    some: list[str], scores: list[float], types: list[int]
) -> None:
    tokens = ["<unk>", *some]
    kinds = [int(TokenType.UNKNOWN), *(int(kind) for kind in types[: len(some)])]
    values = [0.0, *scores[: len(some)]]
    sound = (
        all(abs(score) < 3.45e38 for score in values)
        and all(1 <= kind <= 6 for kind in kinds)
        and all(token and "\0" not in token and token != "\ud800" for token in tokens)
        and len(set(tokens)) == len(tokens)
    )
    assert _all_sound(tokens, values, kinds) is sound
    if not sound:
        assert isinstance(_first_fault(PATH, tokens, values, kinds), FileFormatError)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
            | st.sampled_from(["x" * 127, "x" * 128, "▁" * 100, "👍" * 9]),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([1, 3, 4, 5]),
        ),
        max_size=20,
        unique_by=lambda entry: entry[0],
    ),
    st.integers(1, 300),
)
def test_sentencepiece_reads_what_was_put_together(entries: list[tuple[str, float, int]], at_once: int) -> None:
    entries = [("<unk>", 0.0, 2), *((name, 0.0, 6) for name in BYTES), *entries]
    tokens, scores, types = map(list, zip(*{entry[0]: entry for entry in entries}.values(), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("griffin_gguf.runtime.sentencepiece_proto._SLICE", at_once)
        oracle = processor(bpe_model(tokens, scores, types, space_prefix=False))
    ids = range(oracle.vocab_size())
    assert [oracle.id_to_piece(i) for i in ids] == tokens
    assert [oracle.get_score(i) for i in ids] == scores
    assert [oracle.is_unknown(i) for i in ids] == [kind == 2 for kind in types]
    assert [oracle.is_control(i) for i in ids] == [kind == 3 for kind in types]
    assert [oracle.is_unused(i) for i in ids] == [kind == 5 for kind in types]
    assert [oracle.is_byte(i) for i in ids] == [kind == 6 for kind in types]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "gpt2"),
        ("add_eos_token", True),
        ("remove_extra_whitespaces", True),
        ("precompiled_charsmap", [1, 2, 3]),
    ],
)
def test_another_kind_of_tokenizer_is_refused(name: str, value: Any) -> None:
    metadata = metadata_of(train()) | {f"tokenizer.ggml.{name}": value}
    with pytest.raises(UnsupportedError, match=f"model.gguf: tokenizer.ggml.{name}: only"):
        Tokenizer.from_gguf(PATH, metadata)
