"""Turns over one state: what is read, and that every way back is the state that was there."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import done
from counting import Counting
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import rewritten
from served_models import CHECKPOINT

from griffin_gguf.runtime import load
from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.conversation import IN_MEMORY, Conversation, Shelf
from griffin_gguf.runtime.errors import GriffinError, UnsupportedError
from griffin_gguf.runtime.generate import Generation
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.speculate import PromptLookup, Speculation
from griffin_gguf.runtime.turns import Beginning, Settings

SHORT = Settings(Sampling(temperature=0), max_tokens=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """F32, so that rounding decides nothing."""
    folder = tmp_path_factory.mktemp("conversation")
    done("convert", CHECKPOINT, "-o", folder, "--type", "F32")
    return folder / "demo_model-F32.gguf"


@pytest.fixture(scope="module")
def loaded(path: Path) -> Iterator[Model]:
    with load(path, threads=1) as model:
        yield model


@pytest.fixture
def model(loaded: Model) -> Any:
    return Counting(loaded)


@pytest.fixture(scope="module")
def template(loaded: Model) -> ChatTemplate:
    found = ChatTemplate.from_gguf(loaded.path, loaded.file.metadata)
    assert found
    return found


def other_template(path: Path, folder: Path, template: str | None) -> Path:
    return rewritten(path, folder / "other.gguf", tokenizer__chat_template=template)


def say(conversation: Conversation, text: str) -> str:
    with conversation.ask(text) as generation:
        return "".join(generation)


def again(conversation: Conversation) -> str:
    with conversation.regenerate() as generation:
        return "".join(generation)


def edited(conversation: Conversation, text: str) -> str:
    with conversation.edit(text) as generation:
        return "".join(generation)


def left(conversation: Conversation) -> dict[str, Any]:
    """All that the state holds after the last turn."""
    snapshot = conversation.shelf.get(conversation.last.after)
    assert snapshot
    return {"position": np.array(snapshot.position), **snapshot.arrays}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_each_turn_feeds_only_what_is_new_and_all_of_it(model: Any, template: ChatTemplate) -> None:
    conversation = Conversation(model, SHORT)
    messages: list[dict[str, str]] = []
    for text in ("Hello.", "What is a hacker?", "Why?"):
        messages.append({"role": "user", "content": text})
        whole = template.render(messages)
        messages.append({"role": "assistant", "content": say(conversation, text)})
        fed = model.tokenizer.decode(model.fed, special=True)
        assert fed.startswith(whole)  # then this answer, so nothing was fed twice
    assert conversation.tokens_read == len(model.fed) == conversation.tokens - 1  # an answer that was cut: its last


def test_going_back_feeds_nothing_again(model: Any) -> None:
    conversation = Conversation(model, SHORT)
    say(conversation, "Hello.")
    before = model.since()
    first = say(conversation, "What is a hacker?")
    turn, fed = conversation.last, model.since()
    assert fed == [*conversation.turns[0].said[-1:], *turn.prompt, *turn.said[:-1]]

    assert again(conversation) == first
    assert model.since() == turn.said[:-1]  # the answer, and nothing of the prompt

    assert conversation.undo().user == "What is a hacker?"
    assert model.since() == []
    assert say(conversation, "What is a hacker?") == first
    assert model.since() == fed

    edited(conversation, "Why?")
    assert [turn.user for turn in conversation.turns] == ["Hello.", "Why?"]
    assert model.since() == [*conversation.turns[0].said[-1:], *conversation.last.prompt, *conversation.last.said[:-1]]

    conversation.clear()
    say(conversation, "Hello.")
    assert model.since() == before


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["Hello.", "Why?", "Go on."])),
    st.tuples(st.just("edit"), st.sampled_from(["Hello.", "Why?"])),
    st.tuples(st.sampled_from(["undo", "regenerate", "clear"]), st.none()),
)


@settings(max_examples=15)
@given(st.lists(STEPS, min_size=3, max_size=8))
def test_every_way_to_a_conversation_ends_in_the_same_state(loaded: Model, steps: list[tuple[str, Any]]) -> None:
    roundabout = Conversation(loaded, SHORT, Shelf(most=100))
    for step, text in [*steps, ("ask", "And?")]:
        if step == "ask":
            say(roundabout, text)
        elif step == "clear":
            roundabout.clear()
        elif roundabout.turns:
            {"edit": lambda c, t: edited(c, t), "undo": lambda c, _: c.undo(), "regenerate": lambda c, _: again(c)}[
                step
            ](roundabout, text)
    straight = Conversation(loaded, SHORT, Shelf(most=100))
    for turn in roundabout.turns:
        assert say(straight, turn.user) == turn.answer
    assert_same(left(roundabout), left(straight))


def test_with_a_seed_the_next_answer_is_drawn_by_the_next_seed(loaded: Model) -> None:
    def seeded(seed: int) -> Conversation:
        return Conversation(loaded, Settings(Sampling(temperature=1.5, seed=seed), max_tokens=12))

    conversation = seeded(7)
    answers = [say(conversation, "What is a hacker?"), again(conversation), again(conversation)]
    assert len(set(answers)) == 3
    assert answers == [say(seeded(seed), "What is a hacker?") for seed in (7, 8, 9)]


def test_a_conversation_of_any_length_keeps_a_few_snapshots(model: Any) -> None:
    shelf = Shelf()
    conversation = Conversation(model, SHORT, shelf)
    for i in range(20):
        say(conversation, f"Message {i}.")
        conversation.commit()
        assert sum(map(shelf.has, conversation.snapshots())) == min(2 * i + 2, IN_MEMORY)
    assert conversation.left_to_read() == 0


def test_what_no_snapshot_has_read_is_read_again_and_told_before(model: Any) -> None:
    conversation = Conversation(model, SHORT, Shelf(most=2))
    texts = ["Hello.", "What is a hacker?", "Why?"]
    answers = [say(conversation, text) for text in texts]
    conversation.undo()
    lost = [token for turn in conversation.turns for token in turn.prompt + turn.said]
    assert conversation.left_to_read() == len(lost)
    model.since()
    assert say(conversation, "Why?") == answers[2]
    assert model.since()[: len(lost)] == lost
    assert conversation.left_to_read() == 0


def test_a_stopped_answer_is_part_of_the_conversation(model: Any) -> None:
    conversation = Conversation(model, Settings(Sampling(temperature=0), 1000))
    with conversation.ask("Hello.") as generation:
        next(generation)
        generation.cancel()
        list(generation)
    say(conversation, "Go on.")
    fed = model.tokenizer.decode(model.fed, special=True)
    assert fed.count("Hello.") == 1
    assert f"{generation.text}<end_of_turn>\n<start_of_turn>user\nGo on.<end_of_turn>" in fed


def test_a_message_stopped_before_its_answer_never_was(loaded: Model) -> None:
    conversation, other = Conversation(loaded, SHORT), Conversation(loaded, SHORT)
    with conversation.ask("word " * 600) as generation:
        generation.cancel()
        assert list(generation) == []
    assert conversation.turns == []
    assert say(conversation, "Hello.") == say(other, "Hello.")
    assert say(conversation, "Why?") == say(other, "Why?")
    assert_same(left(conversation), left(other))


def test_a_turn_that_fails_leaves_the_conversation_whole(loaded: Model) -> None:
    conversation, other = Conversation(loaded, SHORT), Conversation(loaded, SHORT)
    say(conversation, "Hello.")
    for failing in (conversation.ask("Broken"), conversation.edit("Broken"), conversation.regenerate()):
        with pytest.raises(RuntimeError):
            break_in(failing)
    assert [turn.user for turn in conversation.turns] == ["Hello."]
    say(other, "Hello.")
    assert say(conversation, "Go on.") == say(other, "Go on.")
    assert_same(left(conversation), left(other))


def break_in(asking: AbstractContextManager[Generation]) -> None:
    with asking as generation:
        next(generation)
        raise RuntimeError


def test_at_the_beginning_there_is_no_way_back(loaded: Model) -> None:
    conversation = Conversation(loaded, SHORT)
    for back in (conversation.undo, lambda: again(conversation), lambda: edited(conversation, "x")):
        with pytest.raises(UnsupportedError, match="nothing has been said yet"):
            back()


def test_a_system_text_comes_once_and_again_where_it_was_taken_back(model: Any) -> None:
    conversation = Conversation(model, SHORT)
    conversation.system = "Be brief."
    say(conversation, "Hello.")
    say(conversation, "Why?")
    assert model.tokenizer.decode(model.since(), special=True).count("Be brief.") == 1
    conversation.system = "Be kind."
    say(conversation, "Go on.")
    fed = model.tokenizer.decode(model.since(), special=True)
    assert "Be kind." in fed
    assert "Be brief." not in fed
    conversation.undo()
    say(conversation, "Go on.")
    assert "Be kind." in model.tokenizer.decode(model.since(), special=True)
    conversation.clear()
    say(conversation, "Hello.")
    assert "user\nBe kind.\n\nHello." in model.tokenizer.decode(model.since(), special=True)


@pytest.mark.parametrize("later", ["{{ raise_exception('a system text comes first') }}", ""])
def test_a_template_with_a_place_for_a_system_text_in_front_alone(path: Path, tmp_path: Path, later: str) -> None:
    strict = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}" + later + "{% else %}"
        "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    )
    with load(other_template(path, tmp_path, strict), threads=1) as model:
        counting: Any = Counting(model)
        conversation = Conversation(counting, SHORT)
        conversation.system = "Be brief."
        say(conversation, "Hello.")
        assert model.tokenizer.decode(counting.since(), special=True).startswith("<bos>[system]Be brief.[user]Hello.")
        conversation.system = "Be kind."
        say(conversation, "Why?")
        assert "[user]Be kind.\n\nWhy?" in model.tokenizer.decode(counting.since(), special=True)
        say(conversation, "And?")
        assert "[user]And?" in model.tokenizer.decode(counting.since(), special=True)


def test_another_system_text_answers_anew(model: Any) -> None:
    conversation = Conversation(model, SHORT)
    say(conversation, "Hello.")
    conversation.system = "Be brief."
    model.since()
    again(conversation)
    assert "Be brief.\n\nHello." in model.tokenizer.decode(model.since(), special=True)


def test_a_template_that_hides_answers_has_all_of_it_read_anew(path: Path, tmp_path: Path) -> None:
    hiding = "{{ bos_token }}{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    with load(other_template(path, tmp_path, hiding), threads=1) as model:
        counting: Any = Counting(model)
        conversation = Conversation(counting, SHORT)
        first = say(conversation, "Hello.")
        counting.since()
        say(conversation, "Why?")
        assert model.tokenizer.decode(counting.since(), special=True).startswith("<bos>Hello.\nWhy?\n")
        conversation.undo()
        assert conversation.left_to_read() == 0
        assert again(conversation) == first


def test_without_a_template_the_text_goes_on(path: Path, tmp_path: Path) -> None:
    with load(other_template(path, tmp_path, None), threads=1) as model:
        counting: Any = Counting(model)
        conversation = Conversation(counting, SHORT)
        with pytest.raises(UnsupportedError, match="no place for a system text"):
            conversation.system = "Be brief."
        first = say(conversation, "The evening was")
        second = say(conversation, " and then")
        whole = model.tokenizer.decode(counting.fed, special=True)
        assert whole.startswith(f"<bos>The evening was{first} and then")
        assert (whole + second).count("<bos>") == 1


def test_the_end_of_an_answer_is_read_where_no_template_writes_it(path: Path, tmp_path: Path) -> None:
    text = "The evening was"
    with load(other_template(path, tmp_path, None), threads=1) as model:
        conversation = Conversation(model, SHORT)
        say(conversation, text)
        end = conversation.last.said[2]
    ended = rewritten(path, tmp_path / "end.gguf", tokenizer__chat_template=None, tokenizer__ggml__eot_token_id=end)
    with load(ended, threads=1) as model:
        counting: Any = Counting(model)
        conversation = Conversation(counting, SHORT)
        say(conversation, text)
        assert conversation.last.said[2:] == [end]
        counting.since()
        say(conversation, " fine")
        assert counting.since()[0] == end


@pytest.mark.parametrize("form", ["turn", "text"])
def test_it_begins_after_a_document_without_reading_it(model: Any, template: ChatTemplate, form: Any) -> None:
    text = "The fox of the river said that nothing under the moon grows for ever."
    opening = template.opening(model.tokenizer) if form == "turn" else [model.tokenizer.bos]
    read = [*opening, *model.tokenizer.encode(text, bos=False)]
    state = model.new_state()
    model.forward(read, state)
    beginning = Beginning("fox", form, state.snapshot())
    model.since()
    conversation = Conversation(model, SHORT, beginning=beginning)
    answer = say(conversation, "What grows?")
    fed = model.since()
    whole = model.tokenizer.decode([*read, *fed], special=True)
    if form == "turn":
        assert whole.startswith(f"<bos><start_of_turn>user\n{text}\n\nWhat grows?<end_of_turn>\n<start_of_turn>model\n")
    else:
        assert whole.startswith(f"<bos>{text}<start_of_turn>user\nWhat grows?<end_of_turn>\n<start_of_turn>model\n")
    assert whole.count("<bos>") == 1
    assert conversation.tokens == len(read) + len(fed) + 1
    conversation.clear()
    assert say(conversation, "What grows?") == answer
    assert model.since() == fed


def test_a_document_in_a_turn_needs_a_template(path: Path, tmp_path: Path) -> None:
    with load(other_template(path, tmp_path, None), threads=1) as model:
        beginning = Beginning("fox", "turn", model.new_state().snapshot())
        with pytest.raises(UnsupportedError, match="has no chat template, and fox was read in a turn of one"):
            Conversation(model, SHORT, beginning=beginning)


class Told(PromptLookup):
    """A drafter that remembers what it was told of the text."""

    def forget(self) -> None:
        super().forget()
        self.told: list[int] = []

    def read(self, tokens: Sequence[int]) -> None:
        super().read(tokens)
        self.told += tokens


def test_a_drafter_is_told_what_the_state_has_read(loaded: Model) -> None:
    drafter = Told()
    drafting = Conversation(loaded, SHORT, speculation=Speculation(loaded, drafter))
    plain = Conversation(loaded, SHORT)

    def check() -> None:
        said = [token for turn in drafting.turns for token in turn.prompt + turn.said]
        snapshot = drafting.shelf.get(drafting.last.after)
        assert snapshot
        assert drafter.told == said[: snapshot.position]
        assert drafting.last.answer == plain.last.answer

    for step in (
        lambda c: say(c, "Say it again."),
        lambda c: say(c, "Say it again."),
        again,
        lambda c: edited(c, "Say it again and again."),
        lambda c: (c.undo(), say(c, "Say it.")),
        lambda c: (c.clear(), say(c, "Say it again.")),
    ):
        step(drafting)
        step(plain)
        check()


def test_a_snapshot_of_something_else_is_refused(loaded: Model) -> None:
    conversation = Conversation(loaded, SHORT)
    say(conversation, "Hello.")
    state = loaded.new_state()
    loaded.forward([2] * 100, state)
    conversation.shelf._near[conversation.last.before] = state.snapshot()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(GriffinError, match="is of 100 tokens, and none of this conversation"):
        again(conversation)


@pytest.mark.parametrize(("field", "value"), [("max_tokens", 0), ("max_tokens", True), ("stop", ("",))])
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=field):
        Settings(**{field: value})
