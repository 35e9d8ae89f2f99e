import json
import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from checkpoints import random_checkpoint, train_tokenizer
from fast_tokenizers import fast_tokenizer, tokenizer_json, write_tokenizer_json
from gguf import TokenType
from vocabularies import metadata_of, train

from griffin_gguf.convert.config import Config, read_config
from griffin_gguf.convert.sentencepiece_model import read_sentencepiece
from griffin_gguf.convert.vocab import tokenizer_metadata
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.tokenizer import Tokenizer

DEMO = (Path(__file__).parents[2] / "cli" / "demo_model" / "tokenizer.model").read_bytes()
TURNS = ("<start_of_turn>", "<end_of_turn>")
MODELS = {"gemma-like": train(), "small": train_tokenizer(384), "demo": DEMO}


@cache
def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config(random_checkpoint(tmp_path / "any") / "config.json")


def sized(config: Config, vocab: int) -> Config:
    return replace(config, hp=replace(config.hp, vocab=vocab))


def converted(folder: Path, config: Config, model: bytes | None = None, **settings: Any) -> dict[str, Any]:
    """Metadata as plain values; writes `model` and the settings first."""
    folder.mkdir(exist_ok=True)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
        config = sized(config, processor(model).vocab_size())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {name: value for name, (value, *_) in tokenizer_metadata(folder, config).items()}


@cache
def texts(longest_run: int = 9) -> list[str]:
    """4,000 random strings without the names of tokens: those differ on purpose."""
    rng = random.Random(5)
    words = [
        "the",
        "river",
        "baloke",
        "ingthe",
        "12",
        "2,048",
        "é",
        "ßé",
        "日本語",
        "def f(x):",
        "👍🏽",
        "\u2581",
        "<",
        ">",
        "0x0",
    ]
    gaps = [" ", "  ", "\n", "\n\n", "\t", "\t\t", "   ", " " * 9, "\n\n\n\n\n", "", "\r\n", "\u00a0"]
    gaps = [gap for gap in gaps if len(gap) <= longest_run]
    return ["".join(rng.choice(words) + rng.choice(gaps) for _ in range(rng.randint(0, 14))) for _ in range(4000)]


def encoded(metadata: dict[str, Any], longest_run: int = 9) -> list[list[int]]:
    tokenizer = Tokenizer.from_gguf(Path("m.gguf"), metadata)
    return [tokenizer.encode(text, bos=False) for text in texts(longest_run)]


# ---- tokenizer.model


@pytest.mark.parametrize("name", MODELS)
def test_ids_from_the_keys_are_sentencepieces(tmp_path: Path, config, name):
    model = MODELS[name]
    found = encoded(converted(tmp_path / "c", config, model))
    assert found == [processor(model).encode(text) for text in texts()]


def test_keys_equal_those_written_down_apart(tmp_path: Path, config):
    found, expected = converted(tmp_path / "c", config, train()), metadata_of(train())
    two_mass = found["tokenizer.ggml.tokens"].index("<2mass>")  # llama.cpp calls it a control token
    assert found["tokenizer.ggml.token_type"][two_mass] == TokenType.CONTROL
    expected["tokenizer.ggml.token_type"][two_mass] = TokenType.CONTROL
    expected["tokenizer.ggml.eot_token_id"] = processor(train()).piece_to_id("<end_of_turn>")
    shared = {name: value for name, value in expected.items() if name.startswith("tokenizer.")}
    assert found == shared


def test_a_space_prefix_is_kept(tmp_path: Path, config):
    model = train(dummy_prefix=True)
    metadata = converted(tmp_path / "c", config, model)
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    tokenizer = Tokenizer.from_gguf(Path("m.gguf"), metadata)
    assert tokenizer.encode("river", bos=False) == processor(model).encode("river")


def test_ids_of_the_vocabulary_beyond_the_tokenizer_are_padding(tmp_path: Path, config):
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer(384))
    metadata = converted(tmp_path, sized(config, 387))
    assert metadata["tokenizer.ggml.tokens"][383:] == [processor(train_tokenizer(384)).id_to_piece(383),
                                                       "[PAD384]", "[PAD385]", "[PAD386]"]  # fmt: skip
    assert metadata["tokenizer.ggml.token_type"][384:] == [TokenType.UNUSED] * 3
    with pytest.raises(FileFormatError, match=r"tokenizer\.model: vocabulary: holds 384 tokens, .* is 383"):
        converted(tmp_path, sized(config, 383))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "unigram"}, "model_type: only bpe .* found unigram"),
    ({"model_type": "char"}, "model_type: only bpe .* found char"),
    ({"byte_fallback": False}, "byte_fallback: only models with byte fallback"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalizer: 'nmt_nfkc' rewrites text"),
    ({"normalization_rule_name": "nfkc"}, "normalizer: 'nfkc' rewrites text"),
    ({"remove_extra_whitespaces": True}, "normalizer: remove_extra_whitespaces cannot be expressed"),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix: cannot be expressed"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_models_that_gguf_cannot_express_are_refused_by_name(tmp_path: Path, config, options, message):
    model = train_tokenizer(384, **options)
    with pytest.raises(UnsupportedError, match=rf"tokenizer\.model: {message}"):
        converted(tmp_path / "c", config, model)


@pytest.mark.parametrize(
    "raw", [b"", b"\x00", b"\xff" * 40, train_tokenizer(384)[:-400], train_tokenizer(384)[:3000], b"\x0a\x05\x0a\xff"]
)
def test_files_that_are_no_sentencepiece_model(tmp_path: Path, config, raw):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(GriffinError, match=r"tokenizer\.model: "):
        converted(tmp_path, config)


def test_truncation_and_flipped_bytes_never_do_more_than_raise(tmp_path: Path):
    raw, path = train_tokenizer(320), tmp_path / "tokenizer.model"
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(raw[: rng.randint(1, len(raw))] if rng.random() < 0.5 else raw)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_sentencepiece(path)
        except GriffinError as error:
            assert str(path) in str(error)  # noqa: PT017 - most, not all, are refused


def test_a_folder_without_a_tokenizer(tmp_path: Path, config):
    with pytest.raises(FileFormatError, match=r"tokenizer\.model: file: is missing"):
        converted(tmp_path, config)


def test_a_pointer_instead_of_the_tokenizer(tmp_path: Path, config):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(FileFormatError, match=r"tokenizer\.model: file: this is a Git LFS pointer"):
        converted(tmp_path, config)


# ---- tokenizer_config.json and the special ids


def test_added_tokens_get_their_types_and_places(tmp_path: Path, config):
    model = train_tokenizer(384)
    (tmp_path / "tokenizer.model").write_bytes(model)
    decoder = {
        "3": {"content": "<unk>", "special": True},
        "4": {"content": "<|im_start|>", "special": True},
        "385": {"content": "<tool>", "special": False},
        "15": {"content": "\t", "special": False},
    }
    assert processor(model).id_to_piece(15) == "<0x09>"
    settings = {"added_tokens_decoder": decoder, "extra_special_tokens": [processor(model).id_to_piece(300)]}
    metadata = converted(tmp_path, sized(config, 386), **settings)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (tokens[3], types[3]) == ("<unk>", TokenType.UNKNOWN)
    assert (tokens[4], types[4]) == ("<|im_start|>", TokenType.CONTROL)
    assert (tokens[385], types[385]) == ("<tool>", TokenType.USER_DEFINED)
    assert (tokens[15], types[15]) == ("<0x09>", TokenType.BYTE)
    assert types[300] == TokenType.CONTROL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"added_tokens_decoder": {"300": {"content": "<new>"}}},
            "added tokens: '<new>': its id 300 is .* in tokenizer.model",
        ),
        (
            {"added_tokens_decoder": {"9999": {"content": "<new>"}}},
            r"added tokens: '<new>' \(id 9999\) is not in the voc",
        ),
        ({"added_tokens_decoder": {"x": {"content": "<new>"}}}, "added_tokens_decoder: expected an id"),
        ({"added_tokens_decoder": {"4": {}}}, "added_tokens_decoder: expected an id"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected an object"),
        ({"additional_special_tokens": ["<absent>"]}, "added tokens: '<absent>' .* is not in the vocabulary"),
        ({"additional_special_tokens": [7]}, "additional_special_tokens: expected a list of tokens"),
        ({"extra_special_tokens": "x"}, "extra_special_tokens: expected a list of tokens"),
        ({"extra_special_tokens": 5}, "extra_special_tokens: expected a list of tokens"),
        ({"add_eos_token": True}, "add_eos_token: only false"),
        ({"chat_template": 7}, "chat_template: expected text"),
        ({"chat_template": [{"name": "tool_use", "template": "x"}]}, "chat_template: has no template named 'default'"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, config, settings, message):
    with pytest.raises(GriffinError, match=rf"tokenizer_config\.json: {message}"):
        converted(tmp_path / "c", config, train_tokenizer(384), **settings)


def test_special_ids_come_from_the_config_first(tmp_path: Path, config):
    changed = replace(config, bos=4, eos=5, pad=None)
    metadata = converted(tmp_path / "c", changed, train_tokenizer(384))
    names = ("bos", "eos", "padding", "unknown", "eot")
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in names] == [4, 5, 0, 3, 5]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False


def test_add_bos_token_is_kept(tmp_path: Path, config):
    metadata = converted(tmp_path / "c", config, train_tokenizer(384), add_bos_token=False)
    assert metadata["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("settings", "jinja", "expected"),
    [
        ({"chat_template": "A"}, None, "A"),
        ({"chat_template": "A"}, "B", "B"),
        ({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}, None, "D"),
        ({"bos_token": "<bos>"}, "ü", "ü"),
        ({"bos_token": {"content": "<bos>"}}, None, None),
    ],
)
def test_chat_template(tmp_path: Path, config, settings, jinja, expected):
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    metadata = converted(tmp_path, config, train_tokenizer(384), **settings)
    assert metadata.get("tokenizer.chat_template") == expected


# ---- tokenizer.json


@pytest.mark.parametrize("name", MODELS)
def test_ids_from_tokenizer_json_are_the_tokenizers_packages(tmp_path: Path, config, name):
    model = MODELS[name]
    write_tokenizer_json(tmp_path, model, TURNS)
    metadata = converted(tmp_path, sized(config, processor(model).vocab_size()))
    fast = fast_tokenizer(model, TURNS)
    assert encoded(metadata) == [fast.encode(text, add_special_tokens=False).ids for text in texts()]


@pytest.mark.parametrize("name", MODELS)
def test_ids_from_tokenizer_json_are_those_of_the_model_it_was_made_from(tmp_path: Path, config, name):
    """But for runs of spaces and newlines longer than a token, which the file's merges divide otherwise."""
    model = MODELS[name]
    write_tokenizer_json(tmp_path, model, TURNS)
    metadata = converted(tmp_path, sized(config, processor(model).vocab_size()))
    assert encoded(metadata, 1) == [processor(model).encode(text) for text in texts(1)]


def test_tokenizer_json_types_and_ids(tmp_path: Path, config):
    model = train()
    write_tokenizer_json(tmp_path, model, TURNS)
    metadata = converted(tmp_path, sized(config, processor(model).vocab_size()))
    oracle = converted(tmp_path / "c", config, model)
    types, expected = (m["tokenizer.ggml.token_type"] for m in (metadata, oracle))
    plain = {i for i, kind in enumerate(expected) if kind != TokenType.USER_DEFINED}  # no such list in the file
    assert {i: types[i] for i in plain} == {i: expected[i] for i in plain}
    for name in ("bos", "eos", "padding", "unknown", "eot"):
        assert metadata[f"tokenizer.ggml.{name}_token_id"] == oracle[f"tokenizer.ggml.{name}_token_id"]
    assert metadata["tokenizer.ggml.tokens"] == oracle["tokenizer.ggml.tokens"]


def test_ids_that_tokenizer_json_lacks_are_padding(tmp_path: Path, config):
    content = tokenizer_json(train_tokenizer(384))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 386, "content": "<tool>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    metadata = converted(tmp_path, sized(config, 388))
    assert metadata["tokenizer.ggml.tokens"][384:] == ["[PAD384]", "[PAD385]", "<tool>", "[PAD387]"]
    assert metadata["tokenizer.ggml.token_type"][384:] == [5, 5, TokenType.USER_DEFINED, 5]
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: vocabulary: holds 387 tokens, .* is 386"):
        converted(tmp_path, sized(config, 386))


def test_tokenizer_model_is_preferred(tmp_path: Path, config):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert converted(tmp_path, config, train_tokenizer(384))["tokenizer.ggml.model"] == "llama"


def test_a_tab_in_place_of_its_byte(tmp_path: Path, config):
    """As files made from Gemma's first models have it."""
    model = train_tokenizer(384)
    content = tokenizer_json(model)
    vocab = content["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_gguf(Path("m.gguf"), converted(tmp_path, sized(config, 384)))
    assert tokenizer.encode("a\tb", bos=False) == processor(model).encode("a\tb")


def test_merges_may_be_written_as_text(tmp_path: Path, config):
    content = tokenizer_json(train_tokenizer(384))
    path = write_tokenizer_json(tmp_path, train_tokenizer(384))
    expected = converted(tmp_path, sized(config, 384))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert converted(tmp_path, sized(config, 384)) == expected


def change(content: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        content = content[parent]
    content[last] = value


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("normalizer", None, "normalizer: only Gemma's .* found None"),
    ("normalizer", {"type": "NFKC"}, "normalizer: only Gemma's .* found 'NFKC'"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "NFC"}]},
     "normalizer: only Gemma's .* found 'Sequence' of 'Prepend', 'NFC'"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}, "pre_tokenizer: 'ByteLevel' cannot be"),
    ("model.type", "Unigram", "model.type: only 'BPE' .* found 'Unigram'"),
    ("model.type", "WordPiece", "model.type: only 'BPE' .* found 'WordPiece'"),
    ("model.byte_fallback", False, "model.byte_fallback: only True"),
    ("model.dropout", 0.1, "model.dropout: only None"),
    ("model.ignore_merges", True, "model.ignore_merges: only False"),
    ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix: only None"),
    ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix: only None"),
]  # fmt: skip
BROKEN: list[tuple[str, Any, str]] = [
    ("model", None, "model: is missing"),
    ("model.vocab", None, "model.vocab: expected an object"),
    ("model.vocab", {"a": -1}, "model.vocab: expected an object that maps tokens to ids"),
    ("model.vocab", {"a": 2**30}, "model.vocab: expected an object that maps tokens to ids"),
    ("model.vocab", {"a": 1, "b": 1}, "model.vocab: two tokens have the same id"),
    ("model.vocab", {"<unk>": 0}, "added_tokens: .* which the vocabulary contradicts"),
    ("model.vocab", {"x" * 251: 5}, "model.vocab: token 5 has more than 250 characters"),
    ("model.unk_token", None, "model.unk_token: expected a token of the vocabulary"),
    ("model.unk_token", "<absent>", "model.unk_token: expected a token of the vocabulary"),
    ("model.merges", None, "model.merges: expected a list"),
    ("model.merges", [["a"]], "model.merges: merge 0 makes no token"),
    ("model.merges", ["a b c"], "model.merges: merge 0 makes no token"),
    ("model.merges", [[1, 2]], "model.merges: merge 0 makes no token"),
    ("model.merges", [["qx", "zz"]], "model.merges: merge 0 makes no token"),
    ("added_tokens", [7], "added_tokens: expected tokens with id and content"),
    ("added_tokens", [{"id": 0, "content": "<other>"}], "added_tokens: '<other>' has id 0, which"),
    ("added_tokens", [{"id": 2**40, "content": "<other>"}], "added_tokens: '<other>' has id"),
]


@pytest.mark.parametrize(("name", "value", "message"), UNSUPPORTED + BROKEN)
def test_tokenizer_json_that_cannot_be_expressed_or_is_broken(tmp_path: Path, config, name, value, message):
    content = tokenizer_json(train_tokenizer(384))
    change(content, name, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    kind = UnsupportedError if (name, value, message) in UNSUPPORTED else FileFormatError
    with pytest.raises(kind, match=rf"tokenizer\.json: {message}") as caught:
        converted(tmp_path, sized(config, 384))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_change_the_text_around_them(tmp_path: Path, config, flag):
    content = tokenizer_json(train_tokenizer(384), TURNS)
    content["added_tokens"][-1][flag] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match=f"added_tokens: '<end_of_turn>': {flag} cannot be expressed"):
        converted(tmp_path, sized(config, 384))


def test_merges_that_scores_cannot_say(tmp_path: Path, config):
    content = tokenizer_json(train_tokenizer(384))
    merges = content["model"]["merges"]
    pieces = ["".join(pair) for pair in merges]
    twice = next(i for i in range(1, len(pieces)) if pieces[i] == pieces[i - 1])
    content["model"]["merges"] = merges[:twice] + merges[twice + 1 :] + [merges[twice]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match=r"model\.merges: merges that make .* lie apart"):
        converted(tmp_path, sized(config, 384))
    content["model"]["merges"] = merges[:twice] + merges[twice + 1 :]
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match=r"model\.merges: .* make the token .* but have no merge"):
        converted(tmp_path, sized(config, 384))


def test_a_missing_byte(tmp_path: Path, config):
    content = tokenizer_json(train_tokenizer(384))
    vocab = content["model"]["vocab"]
    vocab["zz"] = vocab.pop("<0x7F>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=r"model\.vocab: the byte token '<0x7F>' is missing"):
        converted(tmp_path, sized(config, 384))


def test_files_of_the_demo_model(tmp_path: Path, config):
    demo = Path(__file__).parents[2] / "cli" / "demo_model"
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(demo / name, tmp_path / name)
    metadata = converted(tmp_path, config, DEMO)
    assert metadata["tokenizer.ggml.eot_token_id"] == 107
    assert metadata["tokenizer.ggml.token_type"][:8] == [3, 3, 3, 2, 3, 3, 3, 3]
    assert "<start_of_turn>" in metadata["tokenizer.chat_template"]
