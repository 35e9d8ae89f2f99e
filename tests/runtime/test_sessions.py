"""Sessions: what is on the disk after each turn, after a crash, and after somebody else was there."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from command import done, start_python
from counting import Counting
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from rewriting import rewritten
from served_models import CHECKPOINT

from griffin_gguf.runtime import load, sessions
from griffin_gguf.runtime.conversation import Conversation
from griffin_gguf.runtime.errors import FileFormatError, GriffinError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.places import VARIABLE
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.session_record import read_record
from griffin_gguf.runtime.sessions import LEAST_TURNS, UNNAMED, Session, entries, keep
from griffin_gguf.runtime.turns import Beginning, Settings

SHORT = Settings(Sampling(temperature=0), max_tokens=3)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("sessions")
    done("convert", CHECKPOINT, "-o", folder, "--type", "Q8_0")
    with load(folder / "demo_model-Q8_0.gguf", threads=1) as model:
        yield model


@pytest.fixture
def model(loaded: Model) -> Any:
    return Counting(loaded)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data"


def say(conversation: Conversation, *texts: str) -> str:
    answer = ""
    for text in texts:
        with conversation.ask(text) as generation:
            answer = "".join(generation)
        conversation.commit()
    return answer


def begun(model: Any, name: str | None = "work", *texts: str, **options: Any) -> Conversation:
    conversation = Conversation(model, SHORT, Session.begin(model, name, **options))
    say(conversation, *texts)
    return conversation


def reopened(model: Any, name: str = "work") -> Conversation:
    session = Session.open(model, name)
    return session.conversation(session.settings())


def states(path: Path) -> set[str]:
    return {file.stem for file in path.glob("*.state")}


def place(conversation: Conversation) -> Path:
    assert isinstance(conversation.shelf, Session)
    return conversation.shelf.path


def test_a_session_goes_on_as_if_it_had_never_been_closed(model: Any) -> None:
    conversation = begun(model, "work", "Hello.", "What is a hacker?")
    conversation.system = "Be brief."
    conversation.settings = Settings(Sampling(temperature=0, repeat_penalty=1.1, seed=4), 4, ("\n", "#"))
    conversation.commit()
    conversation.shelf.close()
    model.since()

    found = reopened(model)
    assert (found.system, found.settings) == (conversation.system, conversation.settings)
    assert [msgspec.to_builtins(turn) for turn in found.turns] == [msgspec.to_builtins(t) for t in conversation.turns]
    answer = say(found, "Why?")
    last = found.turns[-2]
    assert model.since() == [*last.said[-1:], *found.last.prompt, *found.last.said[:-1]]

    other = Conversation(model, SHORT)
    say(other, "Hello.", "What is a hacker?")
    other.system, other.settings = conversation.system, conversation.settings
    assert answer == say(other, "Why?")
    one, two = found.shelf.get(found.last.after), other.shelf.get(other.last.after)
    assert one
    assert two
    assert all(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_going_back_after_reopening_feeds_nothing_again(model: Any) -> None:
    begun(model, "work", "Hello.", "What is a hacker?", "Why?").shelf.close()
    conversation = reopened(model)
    answer = conversation.turns[1].answer
    conversation.undo()
    conversation.commit()
    model.since()
    with conversation.regenerate() as generation:
        assert "".join(generation) == answer
    assert model.since() == conversation.last.said[:-1]


def test_only_the_owner_can_read_it(model: Any, data: Path) -> None:
    before = os.umask(0)
    try:
        path = place(begun(model, "work", "Hello."))
        keep(model, "copy", reopened_copy(model)).close()
    finally:
        os.umask(before)
    folders = [data / "sessions", path, data / "sessions" / "copy"]
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    files = [file for folder in folders[1:] for file in folder.iterdir()]
    assert {file.suffix for file in files} == {".state", ".json", ""}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def reopened_copy(model: Any) -> Conversation:
    """A conversation in memory alone."""
    conversation = Conversation(model, SHORT)
    say(conversation, "Hello.")
    return conversation


def test_snapshots_on_disk_are_bounded_and_the_oldest_go_first(model: Any) -> None:
    size = model.state_nbytes + 4 * model.vocab
    conversation = begun(model, "work", most_bytes=11 * size)
    for i in range(12):
        say(conversation, f"Message {i}.")
        assert states(place(conversation)) == set(conversation.snapshots()[:11])
    del conversation.turns[6:]
    conversation.commit()
    assert conversation.left_to_read() > 0
    lost = conversation.left_to_read()
    model.since()
    say(conversation, "And?")
    assert len(model.since()) == lost + len(conversation.last.prompt) + len(conversation.last.said) - 1


def test_the_latest_turns_stay_however_large_a_state_is(model: Any) -> None:
    conversation = begun(model, "work", *map(str, range(7)), most_bytes=1)
    assert states(place(conversation)) == set(conversation.snapshots()[: 2 * LEAST_TURNS])


def test_what_was_taken_back_is_deleted(model: Any) -> None:
    conversation = begun(model, "work", "Hello.", "Why?")
    conversation.undo()
    conversation.commit()
    assert states(place(conversation)) == set(conversation.snapshots())
    assert len(states(place(conversation))) == 2


@pytest.mark.parametrize("broken", ["write_record", "sweep"])
def test_a_crash_between_two_writes_loses_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    conversation = begun(model, "work", "Hello.")
    path = place(conversation)

    def crash(*_: Any) -> None:
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(sessions, broken, crash)
        with pytest.raises(OSError, match="crash"):
            say(conversation, "Why?")
    (path / ".0123.state.0a1b.partial").write_bytes(b"half")
    assert len(states(path)) == 4
    os.close(conversation.shelf._lock._file)  # pyright: ignore  what the end of a process does

    found = reopened(model)
    assert [turn.user for turn in found.turns] == (["Hello."] if broken == "write_record" else ["Hello.", "Why?"])
    assert found.left_to_read() == 0
    say(found, "Go on.")
    assert states(path) == set(found.snapshots())
    assert {file.name for file in path.iterdir()} == {"lock", "session.json", *(f"{s}.state" for s in states(path))}


def test_what_could_not_be_written_is_written_the_next_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = begun(model, "work", "Hello.")

    def full(*_: Any, **__: Any) -> None:
        raise GriffinError("session.json: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("griffin_gguf.runtime.snapshot.Snapshot.save", full)
        with pytest.raises(GriffinError, match="No space left"):
            say(conversation, "Why?")
    assert [turn.user for turn in read_record(place(conversation) / "session.json").turns] == ["Hello."]
    conversation.commit()
    assert states(place(conversation)) == set(conversation.snapshots())
    assert len(conversation.snapshots()) == 4


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_takes_no_room_and_goes_its_own_way(model: Any, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    conversation = begun(model, "work", "Hello.", "Why?", "And?")
    copy = keep(model, "copy", conversation)
    assert states(copy.path) == states(place(conversation))
    assert {file.stat().st_nlink for file in copy.path.glob("*.state")} == {2 if links else 1}
    copy.close()
    say(conversation, "Here.")
    model.since()
    other = reopened(model, "copy")
    say(other, "There.")
    assert len(model.since()) == 1 + len(other.last.prompt) + len(other.last.said) - 1
    assert [turn.user for turn in other.turns] == ["Hello.", "Why?", "And?", "There."]
    other.shelf.close()
    conversation.shelf.close()
    assert [turn.user for turn in reopened(model).turns] == ["Hello.", "Why?", "And?", "Here."]


def test_a_conversation_in_memory_can_be_kept(model: Any) -> None:
    conversation = Conversation(model, SHORT)
    say(conversation, "Hello.", "Why?")
    keep(model, "kept", conversation).close()
    model.since()
    found = reopened(model, "kept")
    say(found, "And?")
    assert len(model.since()) == 1 + len(found.last.prompt) + len(found.last.said) - 1


def test_a_document_is_the_sessions_own(model: Any) -> None:
    state = model.new_state()
    model.forward(model.tokenizer.encode("The fox of the river said nothing."), state)
    beginning = Beginning("fox", "text", state.snapshot())
    session = Session.begin(model, "work")
    conversation = Conversation(model, SHORT, session, beginning=beginning)
    answer = say(conversation, "Hello.")
    say(conversation, *map(str, range(6)))
    session.close()
    found = reopened(model)
    assert found.beginning
    assert (found.beginning.name, found.beginning.form) == ("fox", "text")
    found.clear()
    model.since()
    assert say(found, "Hello.") == answer
    assert len(model.since()) == len(found.last.prompt) + len(found.last.said) - 1


def after_a_document(model: Any, *texts: str) -> Conversation:
    state = model.new_state()
    model.forward(model.tokenizer.encode("The fox of the river said nothing."), state)
    beginning = Beginning("fox", "text", state.snapshot())
    conversation = Conversation(model, SHORT, Session.begin(model, "work"), beginning=beginning)
    say(conversation, *texts)
    return conversation


def full(*_: Any, **__: Any) -> None:
    raise GriffinError("x.state: cannot be written: No space left on device")


def test_a_documents_state_that_could_not_be_written_is_written_the_next_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = after_a_document(model)
    with monkeypatch.context() as patch:
        patch.setattr("griffin_gguf.runtime.snapshot.Snapshot.save", full)
        with pytest.raises(GriffinError, match="No space left"):
            conversation.commit()
    say(conversation, "Hello.")
    root = (states(place(conversation)) - set(conversation.snapshots())).pop()
    (place(conversation) / f"{root}.state").unlink()
    say(conversation, "Why?")
    conversation.shelf.close()
    found = reopened(model)
    assert [turn.user for turn in found.turns] == ["Hello.", "Why?"]
    assert states(place(found)) == {root, *found.snapshots()}


def test_without_its_documents_state_a_session_says_so(model: Any) -> None:
    conversation = after_a_document(model, "Hello.")
    path = place(conversation)
    (root,) = states(path) - set(conversation.snapshots())
    conversation.shelf.close()
    (path / f"{root}.state").unlink()
    with pytest.raises(GriffinError) as error:
        reopened(model)
    assert str(error.value) == "session work: the state of its document fox is missing"


def test_a_session_knows_whether_all_of_it_is_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = begun(model, None)
    session: Any = conversation.shelf
    assert session.saved
    for broken in ("griffin_gguf.runtime.snapshot.Snapshot.save", "griffin_gguf.runtime.sessions.write_record"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(GriffinError, match="No space left"):
                say(conversation, "Hello.")
        assert not session.saved
        conversation.commit()
        assert session.saved


def test_a_name_is_taken_once(model: Any) -> None:
    begun(model, "work", "Hello.").shelf.close()
    with pytest.raises(GriffinError, match="session work: is there already"):
        Session.begin(model, "work")
    with pytest.raises(GriffinError, match="session other: is not there; there are work"):
        Session.open(model, "other")


@pytest.mark.parametrize("name", ["", "../work", "a/b", ".hidden", "x" * 65, "ä"])
def test_a_name_leads_nowhere_else(model: Any, name: str) -> None:
    for what in (Session.begin, Session.open):
        with pytest.raises(GriffinError, match="expected a name of letters"):
            what(model, name)
    with pytest.raises(GriffinError, match="expected a name of letters"):
        sessions.delete(name)


def test_where_nothing_was_said_there_is_no_session(model: Any, data: Path) -> None:
    for name in ("work", None):
        begun(model, name).shelf.close()
    conversation = begun(model, None)
    conversation.commit()
    assert list((data / "sessions").iterdir()) == []


def test_a_session_is_open_once(model: Any) -> None:
    conversation = begun(model, "work", "Hello.")
    with pytest.raises(GriffinError, match=f"session work: is open already, in process {os.getpid()}"):
        Session.open(model, "work")
    with pytest.raises(GriffinError, match="is open already"):
        sessions.delete("work")
    say(conversation, "Why?")
    conversation.shelf.close()
    reopened(model).shelf.close()


def test_a_session_is_open_in_one_process_and_free_when_that_dies(model: Any, data: Path) -> None:
    begun(model, "work", "Hello.").shelf.close()
    holding = (
        "from griffin_gguf.runtime.session_folders import Lock, folder\n"
        "lock = Lock(folder() / 'work')\nprint('held', flush=True)\ninput()"
    )
    with start_python(holding) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(GriffinError, match=f"is open already, in process {process.pid}"):
            Session.open(model, "work")
        process.kill()
        process.wait()
    reopened(model)


def test_another_models_session_is_refused(model: Any, tmp_path: Path) -> None:
    begun(model, "work", "Hello.").shelf.close()
    other = random_model(tmp_path)
    with (
        load(other, threads=1) as foreign,
        pytest.raises(GriffinError, match="session work: is a conversation with another model, demo_model") as error,
    ):
        Session.open(foreign, "work")
    assert "\n" not in str(error.value)
    reopened(model).shelf.close()


def test_the_latest_is_that_of_this_model(model: Any, tmp_path: Path) -> None:
    with pytest.raises(GriffinError, match="holds no conversation with demo_model to go on with"):
        sessions.latest(model)
    begun(model, "first", "Hello.").shelf.close()
    begun(model, "second", "Hello.").shelf.close()
    assert sessions.latest(model) == "second"
    say(reopened(model, "first"), "Why?")
    assert sessions.latest(model) == "first"
    with load(random_model(tmp_path), threads=1) as foreign, pytest.raises(GriffinError, match="holds no conversation"):
        sessions.latest(foreign)


def test_of_unnamed_sessions_the_newest_stay_with_their_last_turn(model: Any) -> None:
    begun(model, "named", "Hello.", "Why?").shelf.close()
    made = [begun(model, None, "Hello.", "Why?") for _ in range(UNNAMED + 2)]
    in_use, names = made[1], [place(conversation).name for conversation in made]
    for conversation in made:
        if conversation is not in_use:
            conversation.shelf.close()
    last = begun(model, None, "Hello.", "Why?")
    found = {entry.name: len(states(sessions.folder() / entry.name)) for entry in entries()}
    stay = dict.fromkeys(names[-(UNNAMED - 1) :], 2)
    assert found == {"named": 4, place(last).name: 4, names[1]: 4, **stay}
    say(in_use, "And?")


def test_what_goes_on_while_it_is_tidied_stays_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begun(model, None, "Hello.")
    name, listed = place(first).name, entries
    first.shelf.close()

    def slow() -> list[sessions.Entry]:
        found = listed()
        other = reopened(model, name)  # as another process may, before it is locked here
        say(other, "Why?")
        other.shelf.close()
        return found

    monkeypatch.setattr(sessions, "entries", slow)
    begun(model, None, "Hello.")
    assert states(sessions.folder() / name) == set(reopened(model, name).snapshots())


def test_what_a_crash_in_a_first_turn_has_left_is_deleted_in_time(model: Any, data: Path) -> None:
    begun(model, None, "Hello.").shelf.close()
    for name in ("old", "young", "other"):
        folder = data / "sessions" / name
        folder.mkdir()
        (folder / f"{'0' * 16}.state").touch()
        (folder / "lock").touch()
    (data / "sessions" / "other" / "letter.txt").touch()
    for name in ("old", "other"):
        os.utime(data / "sessions" / name, (0, 0))
    begun(model, None, "Hello.").shelf.close()
    assert {path.name for path in (data / "sessions").iterdir() if not path.name.startswith("chat-")} == {
        "young",
        "other",
    }


def test_a_folder_that_no_session_can_have_is_no_hindrance(model: Any, data: Path) -> None:
    begun(model, "work", "Hello.").shelf.close()
    (data / "sessions" / "bad name").mkdir()
    (data / "sessions" / "bad name" / "session.json").write_text("{")
    assert sessions.names() == ["work"]
    assert sessions.latest(model) == "work"


def test_a_session_from_before_an_option_was_there_has_its_usual_value(model: Any) -> None:
    begun(model, "work", "Hello.").shelf.close()
    file = sessions.folder() / "work" / "session.json"
    record = json.loads(file.read_text())
    for name in ("presence_penalty", "frequency_penalty"):
        assert record["sampling"].pop(name) == 0
    file.write_text(json.dumps(record))
    assert reopened(model).settings == SHORT


def test_another_backends_session_says_which(model: Any) -> None:
    begun(model, "work", "Hello.").shelf.close()
    with load(model.path, backend="numpy") as other:
        session = Session.open(other, "work")
        with pytest.raises(FileFormatError, match=r"was kept by another backend than numpy; go on with --backend ggml"):
            session.conversation(session.settings())
        session.close()


SHORTEST: dict[str, Any] = {
    "format": 1, "model": "0" * 64, "model_name": "x", "changed": "2026-01-01T00:00:00+00:00", "unnamed": False,
    "system": "", "sampling": {}, "max_tokens": 5, "stop": [], "tokens_read": 0, "document": None, "turns": [],
}  # fmt: skip
TURN = {"user": "a", "answer": "b", "prompt": [1], "said": [2], "before": "0" * 16, "after": "1" * 16}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, r"format"),
        ({"more": 1}, r"unknown field `more`"),
        ({"tokens_read": -1}, r"tokens_read"),
        ({"turns": [TURN | {"before": "../../x"}]}, r"turns\[0\].before"),
        ({"turns": [TURN | {"after": "1" * 16 + "\n"}]}, r"turns\[0\].after"),
        ({"turns": [TURN | {"prompt": [-1]}]}, r"turns\[0\].prompt"),
        ({"turns": [TURN | {"prompt": [1.5]}]}, r"turns\[0\].prompt"),
        ({"turns": [TURN | {"said": [2560]}]}, r"turns\[0\].said: expected tokens below 2560, found 2560"),
        ({"document": {"name": "x", "form": "verse", "state": "0" * 16}}, r"document.form"),
        ({"max_tokens": 0}, r"max_tokens: expected a whole number of at least 1"),
        ({"stop": [""]}, r"stop: expected no empty text"),
        ({"sampling": {"heat": 1}}, r"sampling: expected some of temperature, top_k, .*, found heat"),
    ],
)
def test_a_session_that_is_not_right_is_refused(model: Any, change: dict[str, Any], problem: str) -> None:
    conversation = begun(model, "work", "Hello.")
    conversation.shelf.close()
    file = sessions.folder() / "work" / "session.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FileFormatError, match=problem) as error:
        Session.open(model, "work")
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("option", "value"), [("temperature", -1), ("top_k", 1.5), ("seed", -3), ("top_p", None)])
def test_a_setting_out_of_range_is_refused(model: Any, option: str, value: Any) -> None:
    begun(model, "work", "Hello.").shelf.close()
    file = sessions.folder() / "work" / "session.json"
    record = json.loads(file.read_text())
    record["sampling"][option] = value
    file.write_text(json.dumps(record))
    with pytest.raises(FileFormatError, match=option):
        Session.open(model, "work")


@settings(max_examples=40)
@given(st.data())
def test_no_damage_of_session_json_is_more_than_one_line(loaded: Model, data: st.DataObject) -> None:
    path = sessions.folder()
    if not (path / "work").exists():
        begun(loaded, "work", "Hello.").shelf.close()
    file = path / "work" / "session.json"
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from(
            [whole[:at], whole[:at] + b"\xff" + whole[at + 1 :], whole[:at] + b'"' + whole[at:], b"[" * 10**5]
        )
    )
    file.write_bytes(damaged)
    try:
        Session.open(loaded, "work").close()
    except GriffinError as error:
        assert "\n" not in str(error)  # noqa: PT017
    finally:
        file.write_bytes(whole)
    assert [entry.name for entry in entries()] == ["work"]


def test_a_damaged_session_is_in_the_list_and_can_be_deleted(model: Any) -> None:
    for name in ("bad", "good"):
        begun(model, name, "Hello.").shelf.close()
    (sessions.folder() / "bad" / "session.json").write_text("{")
    bad, good = entries()
    assert (good.name, good.problem) == ("good", None)
    assert (bad.name, bad.record) == ("bad", None)
    assert bad.problem
    with pytest.raises(FileFormatError, match=r"bad/session.json: file: is no conversation"):
        sessions.latest(model)  # it may be the one that is meant
    sessions.delete("bad")
    assert sessions.latest(model) == "good"


def test_a_damaged_state_is_an_error_and_a_missing_one_is_read_again(model: Any) -> None:
    conversation = begun(model, "work", "Hello.", "Why?")
    conversation.shelf.close()
    file = sessions.folder() / "work" / f"{conversation.last.after}.state"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    session = Session.open(model, "work")
    with pytest.raises(FileFormatError, match=r"the file is damaged: .*; delete this file, and its") as error:
        session.conversation(session.settings())
    assert str(error.value).startswith(str(file))
    session.close()
    file.unlink()
    model.since()
    found = reopened(model)
    assert found.left_to_read() == len(found.last.said)
    say(found, "And?")
    assert model.since()[: len(found.turns[1].said)] == found.turns[1].said


def test_the_template_is_no_part_of_the_model(model: Any, tmp_path: Path) -> None:
    begun(model, "work", "Hello.").shelf.close()
    plain = rewritten(model.path, tmp_path / "plain.gguf", tokenizer__chat_template=None)
    with load(plain, threads=1) as other:
        say(reopened(other), " and so")
