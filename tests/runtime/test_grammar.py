"""Answers held to JSON: by Python's parser and by jsonschema, neither of which has anything to do with llguidance."""

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import jsonschema
import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from vocabularies import metadata_of, train

import griffin_gguf.cli
from griffin_gguf.convert.pipeline import convert
from griffin_gguf.runtime import Model, grammar, load
from griffin_gguf.runtime.chat import ChatTemplate, stop_tokens
from griffin_gguf.runtime.engine import Engine
from griffin_gguf.runtime.errors import BusyError, UnsupportedError
from griffin_gguf.runtime.generate import Finish, Terms, generate
from griffin_gguf.runtime.grammar import MAX_BYTES, MAX_DEPTH, JsonConstraint, json_constraint
from griffin_gguf.runtime.sampling import Sampling, pick
from griffin_gguf.runtime.tokenizer import Tokenizer

DEMO = Path(griffin_gguf.cli.__file__).with_name("demo_model")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["miller", "fox", "öre"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@cache
def tokenizer(space_prefix: bool = False) -> Tokenizer:
    return Tokenizer.from_gguf(Path("model.gguf"), metadata_of(train(space_prefix), space_prefix))


@cache
def stops() -> frozenset[int]:
    return stop_tokens({}, tokenizer())


def constraint(schema: Any = True) -> JsonConstraint:
    return json_constraint(tokenizer(), schema, stops())


def allowed(constraint: JsonConstraint, vocabulary: Tokenizer | None = None) -> NDArray[np.intp]:
    """The ids that may come next."""
    flat = np.zeros((vocabulary or tokenizer()).vocab_size, np.float32)
    masked = constraint.allow(flat)
    assert (flat == 0).all()
    assert np.isin(masked, (0, -np.inf)).all()
    return np.flatnonzero(masked == 0)


def spell(constraint: JsonConstraint, text: str, vocabulary: Tokenizer | None = None) -> None:
    """Accept `text`, which must be allowed, byte by byte; where a grammar forces bytes, as the token that is forced."""
    found, left = vocabulary or tokenizer(), text.encode()
    while left:
        pieces = {int(i): found.piece(int(i)) for i in allowed(constraint, found)}
        fitting = [i for i, piece in pieces.items() if piece and left.startswith(piece)]
        assert fitting, f"{left.decode(errors='replace')!r}: allowed are {sorted(set(pieces.values()))}"
        token = min(fitting, key=lambda i: (len(pieces[i]), found.name(i) != f"<0x{left[0]:02X}>"))
        constraint.accept(token)
        left = left[len(pieces[token]) :]


def said(tokens: Sequence[int]) -> str:
    """The text, whose bytes must be Unicode."""
    return b"".join(map(tokenizer().piece, tokens)).decode()


def wander(constraint: JsonConstraint, rng: np.random.Generator, most: int, closing: float = 1.0) -> list[int] | None:
    """Allowed tokens at random until the text ends, `closing` times as often those that close something.

    None where it did not end within `most` tokens.
    """
    weights = np.ones(tokenizer().vocab_size)
    weights[[i for i in range(weights.size) if tokenizer().piece(i) in (b'"', b"}", b"]")]] = closing
    weights[sorted(stops())] = closing**2
    tokens: list[int] = []
    for _ in range(most):
        ids = allowed(constraint)
        token = int(rng.choice(ids, p=weights[ids] / weights[ids].sum()))
        constraint.accept(token)
        if token in stops():
            return tokens
        tokens.append(token)
    return None


def check(text: str, schema: Any) -> Any:
    """Parse `text` and compare it with the schema; the value."""
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
    return value


# ---- which tokens may come


def test_stop_tokens_may_come_exactly_where_the_text_may_end() -> None:
    text = '{"a": [1, "}"], "b": {}}'
    for length in range(len(text) + 1):
        walk = constraint()
        spell(walk, text[:length])
        assert (set(allowed(walk)) & tokenizer().control_ids) == (stops() if length == len(text) else set()), length
    assert len(stops()) > 1


def test_an_end_that_is_not_among_the_stop_tokens_never_comes() -> None:
    turn = tokenizer().control_tokens["<end_of_turn>"]
    walk = json_constraint(tokenizer(), True, [turn])
    spell(walk, "{}")
    assert set(allowed(walk)) & tokenizer().control_ids == {turn}
    walk.accept(turn)


def test_a_stop_token_that_is_no_control_token_never_comes_within() -> None:
    word = next(i for i in range(tokenizer().vocab_size) if tokenizer().piece(i) == b"a")
    walk = json_constraint(tokenizer(), True, [word])
    spell(walk, '{"')
    assert word not in allowed(walk)
    spell(walk, '":0}')
    assert word in allowed(walk)


@pytest.mark.parametrize("space_prefix", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        '{"key": "the fox said nothing", "n": -12.5e-3, "flags": [true, false, null]}',
        '{\n  "größe": "日本語の文章, русский",\n  "😀": "\\"\\\\ \\n \\u0007 👩\u200d👧"\n}',
        "{}",
    ],
)
def test_json_is_reached_by_bytes_and_by_the_tokens_of_its_text(text: str, space_prefix: bool) -> None:
    vocabulary = tokenizer(space_prefix)
    json.loads(text)
    walk = json_constraint(vocabulary, True, {vocabulary.eos})
    spell(walk, text, vocabulary)
    assert vocabulary.eos in allowed(walk, vocabulary)
    if not space_prefix:  # with it, the first token of a text has a space in front, which no JSON here has
        walk = json_constraint(vocabulary, True, {vocabulary.eos})
        for token in vocabulary.encode(text, bos=False):
            assert token in allowed(walk, vocabulary), vocabulary.name(token)
            walk.accept(token)
        assert vocabulary.eos in allowed(walk, vocabulary)


def test_bytes_that_are_no_unicode_are_not_allowed() -> None:
    names = {tokenizer().name(i): i for i in range(tokenizer().vocab_size)}
    walk = constraint({"type": "string"})
    spell(walk, '"')
    for never in ("<0xFF>", "<0xC0>", "<0x80>", "<0x0A>", "<0x00>"):
        assert names[never] not in allowed(walk)
    for name in ("<0xF0>", "<0x9F>"):
        walk.accept(names[name])
    assert {tokenizer().name(i) for i in allowed(walk)} == {f"<0x{byte:02X}>" for byte in range(0x80, 0xC0)}


@pytest.mark.parametrize("text", ["{", '{"a"', '{"a":', '{"a":0', '{"a":[', '{"a":[1,', "{}"])
def test_blanks_come_to_an_end(text: str) -> None:
    walk, blanks = constraint(), 0
    spell(walk, text)
    while ids := [i for i in allowed(walk) if not tokenizer().piece(i).strip() and tokenizer().piece(i)]:
        walk.accept(ids[-1])
        blanks += len(tokenizer().piece(ids[-1]))
        assert blanks <= 22
    assert blanks or text == "{}"


def test_a_schema_does_not_change_the_form_of_json() -> None:
    mine = {"item_separator": ";", "key_separator": "=", "whitespace_pattern": "[ ]+", "lenient": True}
    walk = constraint({"type": "object", "x-guidance": mine})
    spell(walk, '{"a":1,"b":2')
    assert not {";", "="} & {tokenizer().piece(i).decode(errors="replace") for i in allowed(walk)}
    spell(walk, " ")
    assert not any(tokenizer().piece(i) == b" " for i in allowed(walk))
    with pytest.raises(UnsupportedError, match="Unimplemented keys"):
        constraint({"not": {}, "x-guidance": mine})


def test_any_json_is_an_object_and_an_empty_schema_any_value() -> None:
    assert {tokenizer().piece(i)[:1] for i in allowed(constraint(True))} == {b"{"}
    firsts = {tokenizer().piece(i)[:1] for i in allowed(constraint({}))}
    assert firsts == {bytes([byte]) for byte in b'{["-0123456789tfn'}


# ---- texts at random


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def ranges(draw: st.DrawFn, low: int, high: int) -> tuple[int, int]:
    least = draw(st.integers(low, high))
    return least, draw(st.integers(least, high))


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(st.text('abé"\\😀 ', max_size=3), inner, max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    least, most = draw(ranges(0, 3))
    return {"type": "array", "items": draw(inner), "minItems": least, "maxItems": most}


schemas = st.recursive(
    st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string"}, {"type": "number"}, {}]),
        st.sampled_from(["^[a-c]{2,5}$", "^\\d{4}-\\d\\d$", "^x+y?$", "^(é|😀)*$"]).map(
            lambda pattern: {"type": "string", "pattern": pattern}
        ),
        ranges(0, 8).map(lambda r: {"type": "string", "minLength": r[0], "maxLength": r[1]}),
        ranges(-2000, 2000).map(lambda r: {"type": "integer", "minimum": r[0], "maximum": r[1]}),
        st.lists(json_values, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        json_values.map(lambda value: {"const": value}),
    ),
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    ),
    max_leaves=6,
)


@settings(max_examples=40)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_what_ends_satisfies_its_schema_and_what_is_cut_can_still(schema: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(3):
        walk, beginning = constraint(schema), []
        for _ in range(int(rng.integers(0, 30))):  # until max_tokens
            token = int(rng.choice(allowed(walk)))
            walk.accept(token)
            if token in stops():
                break
            beginning.append(token)
        else:
            rest = wander(walk, rng, 3000, closing=1000)
            assert rest is not None
            beginning += rest
        check(said(beginning), schema)


# ---- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(DEMO, [(path, "Q8_0")])
    with load(path, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def asked(model: Model) -> list[int]:
    template = ChatTemplate.from_gguf(model.path, model.file.metadata)
    assert template is not None
    return template.encode(model.tokenizer, [{"role": "user", "content": "What is a miller? Answer in JSON."}])


@pytest.fixture(scope="module")
def ends(model: Model) -> frozenset[int]:
    return stop_tokens(model.file.metadata, model.tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_models_finished_answers_satisfy_the_schema(
    model: Model, asked: list[int], ends: frozenset[int], temperature: float
) -> None:
    texts: set[str] = set()
    with Engine(model, slots=8) as engine:
        requests = [
            engine.ask(
                asked,
                Terms(
                    Sampling(temperature, top_k=0, top_p=1, seed=seed),
                    max_tokens=150,
                    stop_tokens=ends,
                    constraint=json_constraint(model.tokenizer, PERSON, ends),
                ),
            )
            for seed in range(24 if temperature else 1)
        ]
        for request in requests:
            texts.add(text := "".join(request))
            assert request.finish is Finish.STOP
            assert request.stop_token in ends
            check(text, PERSON)
    assert len(texts) == len(requests)


def test_an_answer_that_is_cut_can_be_gone_on_with(model: Model, asked: list[int], ends: frozenset[int]) -> None:
    for length in range(1, 30, 4):
        walk = json_constraint(model.tokenizer, PERSON, ends)
        cut = generate(model, model.new_state(), asked, Sampling(1.5, seed=7), length, ends, constraint=walk)
        beginning = "".join(cut)
        if cut.finish is Finish.STOP:
            check(beginning, PERSON)
            break
        rest = generate(model, model.new_state(), asked, Sampling(0), 200, ends, constraint=walk)
        list(rest)
        assert rest.finish is Finish.STOP
        check(b"".join(map(model.tokenizer.piece, cut.tokens + rest.tokens)).decode(), PERSON)


def test_the_likeliest_answer_is_the_likeliest_of_those_allowed(
    model: Model, asked: list[int], ends: frozenset[int]
) -> None:
    walk, reference = (json_constraint(model.tokenizer, PERSON, ends) for _ in range(2))
    found = generate(model, model.new_state(), asked, Sampling(0), 40, ends, constraint=walk)
    list(found)
    state, fed, greedy = model.new_state(), asked, Sampling(0)
    for token in found.tokens:
        logits = model.forward(fed, state)
        ids = allowed(reference, model.tokenizer)
        assert token == ids[pick(logits[ids], [], greedy, greedy.generator())]
        reference.accept(token)
        fed = [token]


def test_a_constrained_request_changes_no_other(model: Model, asked: list[int], ends: frozenset[int]) -> None:
    others = [model.tokenizer.encode(text) for text in ("The fox said", "It is a truth", "Once upon a time there was")]
    alone = [generate(model, model.new_state(), tokens, Sampling(0), 30, ends) for tokens in others]
    for generation in alone:
        list(generation)
    with Engine(model, slots=4) as engine:
        terms = Terms(Sampling(0), 150, ends, constraint=json_constraint(model.tokenizer, PERSON, ends))
        bound = engine.ask(asked, terms)
        free = [engine.submit(tokens, Sampling(0), 30, ends) for tokens in others]
        check("".join(bound), PERSON)
        assert [("".join(request), request.tokens) for request in free] == [(one.text, one.tokens) for one in alone]


def test_a_schema_that_becomes_too_much_ends_its_own_request_alone(
    model: Model, ends: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = {"type": "string", "pattern": "^.*a.{30}$"}
    json_constraint(model.tokenizer, schema, ends)  # it has been examined, and its beginnings were no trouble
    monkeypatch.setitem(grammar._LIMITS, "max_lexer_states", 60)
    tokens = model.tokenizer.encode("The fox said")
    with Engine(model, slots=2) as engine:
        walk = json_constraint(model.tokenizer, schema, ends)
        bound = engine.ask(tokens, Terms(Sampling(5.0, top_k=0, top_p=1, seed=1), 300, ends, constraint=walk))
        free = engine.submit(tokens, Sampling(0), 20)
        with pytest.raises(UnsupportedError, match=r"^schema: too much to follow: .*too many states"):
            list(bound)
        assert bound.finish is Finish.CANCELLED
        assert len(list(free)) > 3


# ---- schemas that are refused


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth // 2):
        schema = {"properties": {"a": schema}}
    return schema


def optional(count: int, name: str = "p") -> dict[str, Any]:
    """Of so many properties any may come next."""
    return {"type": "object", "properties": {f"{name}{i}": {"type": "integer"} for i in range(count)}}


def hostile() -> dict[str, tuple[Any, str]]:
    """Name -> a schema, and what its error says."""
    twice: Any = {"type": "string"}
    for _ in range(60):
        twice = {"anyOf": [twice, twice]}
    return {
        "false": (False, "schema: false allows nothing"),
        "refers to itself": ({"$ref": "#"}, "no text satisfies it"),
        "refers in a circle": (
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
            "no text satisfies it",
        ),
        "is its own part": (
            {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"},
            "circular",
        ),
        "from the network": ({"$ref": "https://example.com/schema.json"}, "does not fetch resources"),
        "from a file": ({"$ref": "file:///etc/passwd"}, "does not fetch resources"),
        "refers to nothing": ({"$ref": "#/$defs/none"}, "does not exist"),
        "nothing satisfies": ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable"),
        "unknown type": ({"type": "strin"}, "Invalid type: strin"),
        "keyword that is not followed": ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        "oneOf that overlaps": (
            {"oneOf": [{"type": "object", "properties": {name: {}}} for name in "ab"]},
            "oneOf constraints are not supported",
        ),
        "back reference": ({"type": "string", "pattern": r"^(a)\1$"}, "backreferences are not supported"),
        "look-around": ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
        "large": ({"enum": [f"value{i}" for i in range(MAX_BYTES // 10)]}, f"at most {MAX_BYTES} bytes"),
        "large before it is written": (twice, f"at most {MAX_BYTES} bytes"),
        "deep": (nested(MAX_DEPTH + 2), f"at most {MAX_DEPTH} values within values"),
        "many properties": (optional(901), "at most 900 properties that an object may leave out"),
        "many properties within": (
            {"type": "object", "properties": {"a": {"type": "array", "items": optional(901)}}},
            "at most 900 properties that an object may leave out",
        ),
        "many properties of several": ({"allOf": [optional(600), optional(600, "q")]}, " items; max is 4000"),
        "not a number": ({"const": float("nan")}, "is no JSON"),
        "no JSON": ({"const": {1, 2}}, "is no JSON"),
        "no Unicode": ({"const": "\ud800"}, "cannot be followed"),
        "a large divisor": ({"type": "integer", "multipleOf": 62615533}, "did not compile within a second"),
        "many patterns": (
            {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}"} for i in range(1, 40)]},
            "did not compile within a second",
        ),
    }


@pytest.mark.parametrize("name", hostile())
def test_a_schema_that_cannot_be_followed_is_one_line(name: str) -> None:
    schema, problem = hostile()[name]
    with pytest.raises(UnsupportedError) as caught:
        constraint(schema)
    assert str(caught.value).startswith("schema: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "array", "items": PERSON, "maxItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "object", "minProperties": 10**6},
        {"type": "string", "pattern": "^(((a{1,100}){1,100}){1,100}){1,100}$"},
        {"type": "string", "pattern": "^(x+x+)+y$"},
        {"enum": [f"value{i}" for i in range(5000)]},
        optional(500),
        optional(900) | {"additionalProperties": False},
        optional(1100) | {"required": [f"p{i}" for i in range(0, 1100, 2)]},
        nested(MAX_DEPTH - 2),
        {"$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i - 1}"}] * 2} for i in range(1, 40)} | {}, "type": "null"},
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
    ],
)
def test_what_only_looks_large_is_followed(schema: Any) -> None:
    walk, rng = constraint(schema), np.random.default_rng(0)
    for _ in range(50):
        token = int(rng.choice(allowed(walk)))
        walk.accept(token)
        if token in stops():
            break


def test_a_worker_that_fails_or_stands_still_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(grammar, "_WORKER", worker)
    worker.write_text("raise MemoryError", encoding="utf-8")
    with pytest.raises(UnsupportedError, match="took more memory than it may, or failed"):
        constraint({"const": "memory"})
    monkeypatch.setattr(grammar, "_WALL_SECONDS", 0.2)
    worker.write_text("import time; time.sleep(60)", encoding="utf-8")
    with pytest.raises(UnsupportedError, match=r"did not compile within 0\.2 s"):
        constraint({"const": "sleep"})


def test_a_flood_of_new_schemas_is_turned_away_and_known_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint({"const": "known"})
    room = BoundedSemaphore(2)
    monkeypatch.setattr(grammar, "_examiners", room)
    constraint({"const": "one"})
    assert room.acquire(blocking=False)
    assert room.acquire(blocking=False)  # it was given back
    with pytest.raises(BusyError, match=r"^schema: several others are being examined$"):
        constraint({"const": "two"})
    constraint({"const": "known"})
    room.release()
    constraint({"const": "two"})


def test_no_stop_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="stop_tokens: expected at least one"):
        json_constraint(tokenizer(), True, ())


# ---- llguidance itself


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"needs llguidance: pip install 'griffin-gguf\[server\]'$"):
        constraint()


def test_the_tables_of_a_vocabulary_are_made_once_and_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tokenizer] = []
    vocabulary: Callable[[Tokenizer], Any] = grammar._Vocabulary
    monkeypatch.setattr(grammar, "_Vocabulary", lambda tokenizer: made.append(tokenizer) or vocabulary(tokenizer))
    own = Tokenizer.from_gguf(Path("model.gguf"), metadata_of(train()))
    kept = len(grammar._tables)
    for schema in (True, {}, True):
        json_constraint(own, schema, {own.eos}).allow(np.zeros(own.vocab_size, np.float32))
    assert made == [own]
    assert len(grammar._tables) == kept + 1
    made.clear()
    del own
    gc.collect()
    assert len(grammar._tables) == kept


def test_unknown_and_unused_tokens_count_by_the_text_they_add() -> None:
    kinds = [i for i in range(tokenizer().vocab_size) if tokenizer()._types[i] == TokenType.UNKNOWN]
    walk = constraint({"type": "string"})
    spell(walk, '"')
    walk.accept(kinds[0])
    spell(walk, '"')
    assert check('"' + said(kinds) + '"', {"type": "string"}) == " \u2047 "
