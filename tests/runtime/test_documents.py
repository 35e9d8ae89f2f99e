"""Documents: read once, bit by bit the same however often interrupted; and nothing but a document passes for one."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_griffins import write_tiny
from vocabularies import metadata_of, train

from griffin_gguf.runtime import document_files, load, reading
from griffin_gguf.runtime.chat import ChatTemplate
from griffin_gguf.runtime.document_files import Checkpoint, Form, Place
from griffin_gguf.runtime.documents import delete, documents, expect, export, find, read, survey
from griffin_gguf.runtime.errors import BusyError, FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.places import VARIABLE
from griffin_gguf.runtime.reading import Part, Reading
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.state import CHUNK

DEMO = Path(__file__).parents[2] / "cli" / "demo_model"
WORDS = (DEMO / "heldout.txt").read_text(encoding="utf-8")[2000:5300].strip()  # five chunks
TOKENIZER = metadata_of(train()) | {
    "tokenizer.chat_template": json.loads((DEMO / "tokenizer_config.json").read_bytes())["chat_template"],
    "general.name": "tiny",
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    return tmp_path / "data" / "documents"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return write_tiny(folder / "tiny.gguf", "BF16", TOKENIZER)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with load(path, backend="ggml", threads=1) as found:
        yield found


@pytest.fixture
def fed(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every chunk that the model reads from here on."""
    chunks: list[list[int]] = []
    forward = model.forward

    def noted(tokens: list[int], *rest: Any) -> Any:
        chunks.append(list(tokens))
        return forward(tokens, *rest)

    monkeypatch.setattr(model, "forward", noted)
    return chunks


def part(text: str = WORDS, name: str = "words.txt") -> Part:
    return Part.text(name, text)


def ids_in_turn(model: Model, text: str) -> list[int]:
    """What stands before a user's text in the demo's template, written out, and the text."""
    names = model.tokenizer.control_tokens
    head = [model.tokenizer.bos, names["<start_of_turn>"], *model.tokenizer.encode("user\n", bos=False)]
    return head + model.tokenizer.encode(text, bos=False)


def state_after(model: Model, tokens: list[int]) -> Snapshot:
    state = model.new_state()
    for start in range(0, len(tokens), CHUNK):
        model.forward(tokens[start : start + CHUNK], state)
    return state.snapshot()


def bits(snapshot: Snapshot) -> dict[str, bytes]:
    logits: NDArray[np.float32] | None = snapshot.logits
    assert logits is not None
    arrays = {name: array.tobytes() for name, array in snapshot.whole().items()}
    return {"logits": logits.tobytes(), "position": str(snapshot.position).encode(), **arrays}


def interrupt(after: int) -> Callable[[int, int], None]:
    """A report that raises at the so-manieth chunk."""
    left = after

    def report(done: int, total: int) -> None:
        nonlocal left
        assert 0 < done <= total
        left -= 1
        if not left:
            raise KeyboardInterrupt

    return report


def test_a_text_in_a_turn_is_what_a_chat_would_have_read(model: Model) -> None:
    document = read(model, [part(f"\n \t{WORDS} \n\n")], "words")
    expected = ids_in_turn(model, WORDS)
    assert (document.tokens, document.form) == (len(expected), "turn")
    assert bits(document.snapshot(model)) == bits(state_after(model, expected))
    template = ChatTemplate.from_gguf(model.path, model.file.metadata)
    assert template
    behind = template.prompt(model.tokenizer, [{"role": "user", "content": "And then?"}], document=True)
    whole = template.encode(model.tokenizer, [{"role": "user", "content": f"{WORDS}\n\nAnd then?"}])
    assert expected + behind.tokens == whole


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_plain_text_is_what_generate_would_have_read(model: Model, ending: str) -> None:
    document = read(model, [part(f"  {WORDS}\n{ending}")], "words", "text")
    expected = model.tokenizer.encode(f"  {WORDS}" + ("\n" if ending else ""))
    assert expected[0] == model.tokenizer.bos
    assert (document.tokens, document.form) == (len(expected), "text")
    assert bits(document.snapshot(model)) == bits(state_after(model, expected))


def test_what_the_document_says_of_itself(model: Model, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"One.\n")
    document = read(model, [Part.file(tmp_path / "one.txt"), part("Two.", "somewhere/two.txt")], "both", "text")
    assert [(s.name, s.nbytes, s.sha256) for s in document.sources] == [
        ("one.txt", 5, sha256(b"One.\n").hexdigest()),
        ("two.txt", 4, sha256(b"Two.").hexdigest()),
    ]
    assert (document.name, document.model, document.backend) == ("both", "tiny", "ggml")
    assert document.tokens == len(model.tokenizer.encode("One.\n\nTwo."))
    assert document.nbytes == document.path.stat().st_size > model.state_nbytes
    assert find("both") == document
    assert documents() == [document]


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_an_interrupted_reading_goes_on_to_the_same_bits(model: Model, fed: list[list[int]], chunks: int) -> None:
    whole = bits(read(model, [part()], "whole").snapshot(model))
    assert len(fed) == 5
    assert fed.pop(0)[:4] == ids_in_turn(model, WORDS)[:4]
    with pytest.raises(KeyboardInterrupt):
        read(model, [part()], "words", report=interrupt(chunks))
    assert survey().unfinished[0].tokens == CHUNK * chunks
    assert documents() == [find("whole")]
    fed.clear()
    with Reading(model, [part(name="elsewhere/words.txt")], "words", "turn") as going_on:
        assert (going_on.kept, going_on.notice) == (CHUNK * chunks, None)
        going_on.run()
    assert sum(map(len, fed)) == find("words").tokens - CHUNK * chunks
    assert bits(find("words").snapshot(model)) == whole
    assert {path.name for path in find("words").path.parent.iterdir()} == {
        "document.json", "lock", find("words").path.name,
    }  # fmt: skip


def test_interrupted_behind_the_last_chunk_nothing_is_left_to_read(model: Model, fed: list[list[int]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(model, [part()], "words", report=interrupt(5))
    fed.clear()
    document = read(model, [part()], "words")
    assert not fed
    assert bits(document.snapshot(model)) == bits(state_after(model, ids_in_turn(model, WORDS)))


def test_progress_counts_the_bytes_that_are_left(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    read(model, [part(), part()], "twice", report=lambda *at: seen.append(at))
    assert seen[-1] == (2 * len(WORDS.encode()),) * 2
    assert seen == sorted(seen)
    with pytest.raises(KeyboardInterrupt):
        read(model, [part(), part()], "again", report=interrupt(5))
    rest: list[tuple[int, int]] = []
    read(model, [part(), part()], "again", report=lambda *at: rest.append(at))
    assert len(rest) == len(seen) - 5
    assert rest[-1][0] == rest[-1][1] == seen[-1][1] - seen[4][0]


def test_a_device_that_fails_loses_what_came_after_the_checkpoint(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bits(read(model, [part()], "whole").snapshot(model))
    forward, count = model.forward, 0

    def failing(tokens: list[int], state: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            state.torn = True
            raise RuntimeError("no more")
        return forward(tokens, state)

    for every, kept in ((0.0, 2 * CHUNK), (1e9, 0)):
        count = 0
        with monkeypatch.context() as patch, Reading(model, [part()], f"every{kept}", "turn") as torn:
            patch.setattr(model, "forward", failing)
            with pytest.raises(RuntimeError, match="no more"):
                torn.run(every=every)
            assert torn.kept == kept
        assert bits(read(model, [part()], f"every{kept}").snapshot(model)) == whole


_READING = """
import sys
from griffin_gguf.runtime import load
from griffin_gguf.runtime.reading import Part, Reading
text = sys.stdin.read()
with load(sys.argv[1], backend="ggml", threads=1) as model:
    with Reading(model, [Part.text("words.txt", text)], "words", "turn") as reading:
        reading.run(lambda *at: print(*at, flush=True), every=0)
"""


def test_killed_at_any_moment_it_goes_on(model: Model) -> None:
    whole = bits(read(model, [part(WORDS * 2)], "whole").snapshot(model))
    for lines in (1, 4):
        command = [sys.executable, "-c", _READING, str(model.path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin
            assert child.stdout
            child.stdin.write(WORDS * 2)
            child.stdin.close()
            for _ in range(lines):
                assert child.stdout.readline()
            child.kill()
        assert child.returncode == -signal.SIGKILL
    with Reading(model, [part(WORDS * 2)], "words", "turn") as going_on:
        assert going_on.kept >= 3 * CHUNK
        going_on.run()
    assert bits(find("words").snapshot(model)) == whole
    assert len(list(find("words").path.parent.iterdir())) == 3


def left_unfinished(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(model, [part()], "words", report=interrupt(2))


@pytest.mark.parametrize(
    ("text", "form", "why"),
    [
        (f"{WORDS}!", "turn", "the text is another one"),
        (WORDS.replace("a", "o", 1), "turn", "the text is another one"),
        (WORDS, "text", "it was in a turn of a chat"),
    ],
)
def test_another_reading_begins_anew_and_says_so(model: Model, text: str, form: Any, why: str) -> None:
    left_unfinished(model)
    with Reading(model, [part(text)], "words", form) as anew:
        assert (anew.kept, anew.notice) == (0, f"what an interrupted run has read is of no use: {why}")
        anew.run()
    ids = ids_in_turn(model, text) if form == "turn" else model.tokenizer.encode(text)
    assert bits(find("words").snapshot(model)) == bits(state_after(model, ids))
    assert not survey().unfinished


def test_another_model_backend_or_template_begins_anew(model: Model, folder: Path) -> None:
    left_unfinished(model)
    other = write_tiny(folder / "other.gguf", "Q8_0", TOKENIZER)
    template = TOKENIZER["tokenizer.chat_template"] + "{# other #}"
    renamed = write_tiny(folder / "renamed.gguf", "BF16", TOKENIZER | {"tokenizer.chat_template": template})
    for path, backend, why in (
        (other, "ggml", "it was for another model"),
        (renamed, "ggml", "it was for another model"),
        (model.path, "numpy", "it was by the backend ggml"),
    ):
        with load(path, backend=backend, threads=1) as second, Reading(second, [part()], "words", "turn") as anew:  # pyright: ignore[reportArgumentType]
            assert anew.notice == f"what an interrupted run has read is of no use: {why}"


def test_a_damaged_checkpoint_is_lost_and_it_says_so(model: Model, data: Path) -> None:
    for damage in (
        lambda place: (place / "reading.json").write_bytes(b"{"),
        lambda place: next(place.glob("*.state")).write_bytes(b"nothing"),
        lambda place: next(place.glob("*.state")).unlink(),
        lambda place: change(place / "reading.json", tokens=CHUNK),
    ):
        left_unfinished(model)
        damage(data / "words")
        with Reading(model, [part()], "words", "turn") as anew:
            assert anew.kept == 0
            assert anew.notice
            assert anew.notice.startswith(f"what an interrupted run has read is lost: {data}/words")
        delete("words")


def test_a_checkpoint_between_chunks_is_refused(model: Model, data: Path) -> None:
    left_unfinished(model)
    state = state_after(model, ids_in_turn(model, WORDS)[:600])
    state.save(next((data / "words").glob("*.state")))
    change(data / "words" / "reading.json", tokens=600)
    with pytest.raises(FileFormatError, match="expected whole chunks of 512, found 600"):
        read(model, [part()], "words")


def test_a_text_that_changes_while_it_is_read_is_refused(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 3)

    def report(done: int, total: int) -> None:
        path.write_text(WORDS * 2 + WORDS.replace("a", "o"))

    with pytest.raises(GriffinError, match=r"words\.txt: has changed while it was read$"):
        read(model, [Part.file(path)], "words", report=report)
    assert survey().unfinished == survey().documents == []
    read(model, [Part.file(path)], "words")


def test_what_exists_is_replaced_only_where_that_is_asked(model: Model) -> None:
    old = read(model, [part()], "words")
    with pytest.raises(UnsupportedError, match="document 'words': exists already; --replace reads it anew"):
        read(model, [part("Other words.")], "words")
    with pytest.raises(KeyboardInterrupt):
        read(model, [part(f"{WORDS} And more.")], "words", report=interrupt(2), replace=True)
    assert find("words") == old  # until the new one is there
    old.snapshot(model)
    with pytest.raises(UnsupportedError, match="exists already"):
        read(model, [part(f"{WORDS} And more.")], "words")
    new = read(model, [part(f"{WORDS} And more.")], "words", replace=True)
    assert find("words") == new != old
    assert not old.path.exists()


def test_every_start_has_the_same_bits_and_reads_only_what_is_new(model: Model, fed: list[list[int]]) -> None:
    document = read(model, [part()], "words")
    file = document.path.read_bytes()
    fed.clear()
    new, found = model.tokenizer.encode("\n\nAnd then?", bos=False), list[dict[str, bytes]]()
    for _ in range(3):
        state = model.new_state(document.snapshot(model))
        model.forward(new, state)
        found.append(bits(state.snapshot()))
    assert fed == [new] * 3
    assert found[0] == found[1] == found[2]
    state = model.new_state()
    for start in range(0, document.tokens, CHUNK):
        model.forward(ids_in_turn(model, WORDS)[start : start + CHUNK], state)
    model.forward(new, state)
    assert bits(state.snapshot()) == found[0]
    assert document.path.read_bytes() == file


def test_twenty_thousand_tokens_take_no_more_memory_than_two_thousand(model: Model) -> None:
    def peak(count: int) -> tuple[int, int, int]:
        text = part(f"{WORDS} " * count)
        tracemalloc.start()
        document = read(model, [text], "words", replace=True)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, document.tokens, document.nbytes

    read(model, [part(f"{WORDS} " * 10)], "words")  # so that every graph is there
    (least, few, short), (most, many, long) = peak(1), peak(10)
    assert (few < 2500, many > 20_000) == (True, True)
    # The text's bytes are the test's, twice where `Part.text` encodes them. Its tokens would take some 700 kB.
    assert most < least + 2 * 9 * len(f"{WORDS} ".encode()) + 30_000
    assert abs(long - short) < 16  # a digit more


def test_a_byte_order_mark_is_no_text(model: Model) -> None:
    raw = b"\xef\xbb\xbf" + WORDS.encode()
    for form in ("turn", "text"):
        plain = read(model, [part()], "plain", form, replace=True)
        marked = read(model, [Part("words.txt", lambda: BytesIO(raw))] * 2, "marked", form, replace=True)
        twice = read(model, [part(f"{WORDS}\n\n{WORDS}")], "twice", form, replace=True)
        assert bits(marked.snapshot(model)) == bits(twice.snapshot(model)) != bits(plain.snapshot(model))
        assert (marked.sources[0].nbytes, marked.sources[0].sha256) == (len(raw), sha256(raw).hexdigest())
    inside = read(model, [part("One.\ufeffTwo.")], "inside", "text")
    assert inside.tokens == len(model.tokenizer.encode("One.\ufeffTwo."))
    for raw, problem in (
        (b"\xef\xbb\xbfcaf\xe9 ", "at byte 6$"),
        (b"\xef\xbb\xbf \n", "found none$"),
        (b"\xef\xbb", "byte 0$"),
    ):
        with pytest.raises(FileFormatError, match=problem):
            read(model, [Part("words.txt", lambda raw=raw: BytesIO(raw))], "bad")


@given(st.text(" \t\n\r\ufeff\u3000ab.", max_size=12), st.integers(1, 5), st.integers(1, 5))
def test_white_space_is_left_out_at_the_ends_however_a_text_is_cut(text: str, first: int, second: int) -> None:
    content = text.removeprefix("\ufeff")
    forms: dict[Form, str] = {"turn": content.strip(), "text": content.removesuffix("\n").removesuffix("\r")}
    for form, wanted in forms.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "_SURVEYED", first)
            patch.setattr(reading, "_ENCODED", second)
            if content.strip():
                spans = [reading._survey(part(text), form)] * 2
                assert "".join(reading._Texts([part(text)] * 2, spans)) == f"{wanted}\n\n{wanted}"
            else:
                with pytest.raises(FileFormatError, match="expected some, found none"):
                    reading._survey(part(text), form)


def test_white_space_without_end_takes_no_memory(model: Model) -> None:
    raw = b" " * (8 << 20) + b"A few words." + b"\n" * (8 << 20)
    tracemalloc.start()
    document = read(model, [Part("words.txt", lambda: BytesIO(raw))], "words")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert document.tokens == len(ids_in_turn(model, "A few words."))
    assert most < 6 << 20  # of which 4 MiB are the pieces in which a text is surveyed


def test_texts_that_cannot_be_read(model: Model, data: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(WORDS.encode() + b" caf\xe9 " + b"and so on")
    (tmp_path / "cut.txt").write_bytes(WORDS.encode() + "é".encode()[:1])
    (tmp_path / "late.txt").write_bytes(b"a" * ((1 << 20) - 1) + "é".encode()[:1] + b"b" * (1 << 20))
    (tmp_path / "blank.txt").write_bytes(b" \n\t" * 10)
    for name, problem in {
        "latin1.txt": f"text: is not UTF-8: invalid continuation byte at byte {len(WORDS.encode()) + 4}",
        "cut.txt": f"text: is not UTF-8: unexpected end of data at byte {len(WORDS.encode())}",
        "late.txt": f"text: is not UTF-8: invalid continuation byte at byte {(1 << 20) - 1}",
        "blank.txt": "text: expected some, found none",
        "none.txt": "text: cannot be read: No such file or directory",
    }.items():
        with pytest.raises(FileFormatError) as caught:
            read(model, [part(), Part.file(tmp_path / name)], "words")
        assert str(caught.value) == f"{tmp_path / name}: {problem}"
    with pytest.raises(UnsupportedError, match="expected at least one text"):
        read(model, [], "words")
    assert list(data.iterdir()) == []


def test_without_a_template_there_is_only_plain_text(folder: Path, data: Path) -> None:
    plain = {name: value for name, value in TOKENIZER.items() if name != "tokenizer.chat_template"}
    with load(write_tiny(folder / "plain.gguf", "BF16", plain), backend="numpy") as model:
        with pytest.raises(UnsupportedError, match="has no chat template"):
            read(model, [part("A few words.")], "words")
        assert not data.exists()
        assert read(model, [part("A few words.")], "words", "text").form == "text"


def test_another_model_or_backend_cannot_go_on(model: Model, folder: Path) -> None:
    document = read(model, [part()], "words")
    with load(write_tiny(folder / "q8.gguf", "Q8_0", TOKENIZER), backend="ggml", threads=1) as other:
        with pytest.raises(UnsupportedError) as caught:
            document.snapshot(other)
        found = read(other, [part("Few words.")], "few").fingerprint
    text = f"document 'words': was read with another model, tiny ({document.fingerprint[:12]}); q8.gguf is {found[:12]}"
    assert str(caught.value) == text
    with (
        load(model.path, backend="numpy") as same,
        pytest.raises(UnsupportedError, match=r"was read by the backend ggml, and numpy cannot go on from that: .*F32"),
    ):
        document.snapshot(same)


def test_under_an_exact_file_backends_take_each_others(folder: Path) -> None:
    path = write_tiny(folder / "exact.gguf", "F32", TOKENIZER)
    with load(path, backend="numpy") as one, load(path, backend="ggml", threads=1) as other:
        document = read(one, [part(WORDS[:900])], "words")
        assert bits(document.snapshot(one)) == bits(document.snapshot(other))


BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "/etc",
    ".hidden",
    "-o",
    "_a",
    "a b",
    "a\0",
    "a\n",
    "é",
    "٣",
    "a" * 65,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_other_name_reaches_a_path(model: Model, name: str, data: Path, tmp_path: Path) -> None:
    for action in (
        find,
        delete,
        lambda name: export(name, tmp_path / "out"),
        lambda name: read(model, [part()], name),
    ):
        with pytest.raises(UnsupportedError) as caught:
            action(name)
        assert str(caught.value).startswith("document: expected 1 to 64 letters, digits, dots, hyphens")
        assert str(caught.value).isprintable()
    assert not data.exists()


@given(st.text(max_size=70) | st.text("ab./\\-_0~\n", max_size=8))
def test_names_are_plain_file_names(name: str) -> None:
    try:
        place = Place(name)
    except UnsupportedError:
        assert not (name.isascii() and name.isalnum() and len(name) <= 64)
    else:
        assert place.path.parent.name == "documents"
        assert place.path.name == name
        assert name not in (".", "..")
        assert name[0].isalnum()


def test_unknown_names_are_told_the_known(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="document 'x': there is none; griffin read makes one"):
        find("x")
    read(model, [part("Words.")], "b")
    read(model, [part("Words.")], "a")
    with pytest.raises(UnsupportedError, match="document 'x': there is none; known: a, b"):
        find("x")
    with pytest.raises(UnsupportedError, match="document 'x': there is none"):
        delete("x")


def test_all_is_for_its_owner_alone(model: Model, data: Path) -> None:
    before = os.umask(0)
    try:
        read(model, [part("Words.")], "done")
        left_unfinished(model)
    finally:
        os.umask(before)
    found = [data.parent, data, *data.rglob("*")]
    assert len(found) == 10
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_one_reader_at_a_time(model: Model, data: Path) -> None:
    with Reading(model, [part()], "words", "turn") as first:
        for action in (lambda: Reading(model, [part()], "words", "turn"), lambda: delete("words")):
            with pytest.raises(BusyError, match="document 'words': another process is reading into it"):
                action()
        first.run()
        find("words").snapshot(model)
    delete("words")
    assert list(data.iterdir()) == []


def test_a_lock_that_was_removed_meanwhile_is_none(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, flock = Place("words").locked(), fcntl.flock
    first.__enter__()

    def late(handle: int, how: int) -> None:  # the first is done between another's opening and locking
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with Place("words").locked():
        assert (data / "words" / "lock").exists()
        with pytest.raises(BusyError), Place("words").locked():
            pass
    assert list(data.iterdir()) == []


def test_a_folder_that_is_removed_before_its_lock_is_made_is_made_again(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = document_files._make_private

    def gone(path: Path) -> None:
        monkeypatch.setattr(document_files, "_make_private", make)
        make(path)
        path.rmdir()

    monkeypatch.setattr(document_files, "_make_private", gone)
    with Place("words").locked():
        assert (data / "words" / "lock").exists()
    (data / "words").mkdir()
    (data / "words" / "lock").symlink_to(data / "nowhere" / "lock")
    with pytest.raises(GriffinError, match="lock: Too many levels of symbolic links"), Place("words").locked():
        pass


def test_nobody_locks_what_is_being_deleted(model: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(model, [part("Words.")], "words")
    unlink, busy = Path.unlink, list[str]()

    def noted(self: Path, missing_ok: bool = False) -> None:
        if self.name != "lock":
            with pytest.raises(BusyError), Place("words").locked():
                pass
            busy.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    (data / "words" / "folder").mkdir()
    (data / "words" / "folder" / "file").write_bytes(b"")
    (data / "words" / "link").symlink_to(data)
    delete("words")
    assert {"document.json", "link"} < set(busy)
    assert list(data.iterdir()) == []


def test_what_could_be_deleted(model: Model) -> None:
    with pytest.raises(UnsupportedError, match="document 'words': there is none"):
        expect("words")
    left_unfinished(model)
    expect("words")


def test_a_deleted_document_is_gone(model: Model, data: Path) -> None:
    read(model, [part("Words.")], "words")
    left = read(model, [part("Words.")], "left")
    delete("words")
    assert documents() == [left]
    assert [path.name for path in data.iterdir()] == ["left"]


def test_an_exported_state_is_the_documents(model: Model, tmp_path: Path) -> None:
    document = read(model, [part()], "words")
    target = tmp_path / "words.state"
    export("words", target)
    assert bits(model.load_state(target).snapshot()) == bits(document.snapshot(model))
    with pytest.raises(GriffinError, match="does not exist"):
        export("words", tmp_path / "none" / "words.state")
    with pytest.raises(GriffinError, match="is the input as well"):
        export("words", document.path)


def test_a_full_disk_keeps_the_last_checkpoint(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    left_unfinished(model)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(GriffinError, match=r"\.state: cannot be written: No space left on device"):
            read(model, [part()], "words")
    with Reading(model, [part()], "words", "turn") as going_on:
        assert going_on.kept == 2 * CHUNK


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one away."""
    table = json.loads(path.read_bytes()) | fields
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))


SOURCE: dict[str, Any] = {"name": "a", "nbytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"state": "../../../etc/passwd"}, "Expected `str` matching regex"),
        ({"state": "0123456789abcdef.state\n"}, "Expected `str` matching regex"),
        ({"state": "document.json"}, "Expected `str` matching regex"),
        ({"state": None}, "Object missing required field `state`"),
        ({"fingerprint": "abc"}, "Expected `str` matching regex"),
        ({"fingerprint": 5}, "Expected `str`, got `int`"),
        ({"tokens": 0}, "Expected `int` >= 1"),
        ({"tokens": "5"}, "Expected `int`, got `str`"),
        ({"tokens": 1.5}, "Expected `int`, got `float`"),
        ({"tokens": 2**63}, "Expected `int` <= 9007199254740992"),
        ({"form": "poem"}, "Invalid enum value 'poem'"),
        ({"version": 2}, "Invalid enum value 2"),
        ({"created": "yesterday"}, "Expected `str` matching regex"),
        ({"sources": [SOURCE | {"nbytes": -1}]}, "Expected `int` >= 0"),
        ({"sources": [SOURCE | {"path": "/"}]}, "Object contains unknown field `path`"),
        ({"owner\n\x1b": "me"}, "Object contains unknown field `owner"),
    ],
)
def test_each_field_is_checked(model: Model, data: Path, fields: dict[str, Any], problem: str) -> None:
    path = read(model, [part("Words.")], "words").path.parent / "document.json"
    change(path, **fields)
    with pytest.raises(FileFormatError) as caught:
        find("words")
    text = str(caught.value)
    assert text.startswith(f"{path}: contents: {problem}")
    assert text.endswith("griffin states delete removes it")
    assert text.isprintable()
    sound = read(model, [part("Words.")], "sound")
    assert documents() == [sound]
    assert [str(error) for error in survey().damaged] == [text]
    delete("words")


def test_files_that_are_none(model: Model) -> None:
    path = read(model, [part("Words.")], "words").path.parent / "document.json"
    for make, problem in (
        (lambda: path.write_bytes(b"[" * (16 << 20) + b"["), "file: expected at most 16777216 bytes"),
        (lambda: path.write_bytes(b"[" * 100_000), "contents: "),
        (lambda: path.write_bytes(b"\xff"), "contents: "),
        (lambda: path.write_bytes(b'{"version": 1, "model": "\xff"}'), "contents: "),
        (lambda: path.write_bytes(b""), "contents: Input data was truncated"),
        (lambda: (path.unlink(), path.mkdir()), "file: is not a regular file"),
        (lambda: (path.rmdir(), os.mkfifo(path)), "file: is not a regular file"),
    ):
        make()
        with pytest.raises(FileFormatError) as caught:
            find("words")
        assert str(caught.value).startswith(f"{path}: {problem}")
    delete("words")


@given(st.binary(max_size=80) | st.tuples(st.integers(0, 400), st.integers(0, 255)))
def test_anything_else_is_one_line_or_a_document(tmp_path: Path, data: Path, found: bytes | tuple[int, int]) -> None:
    sound = json.dumps(
        {
            "version": 1, "form": "text", "fingerprint": "0" * 64, "model": "m", "backend": "ggml", "tokens": 5,
            "sources": [SOURCE], "created": "2030-01-01T00:00:00Z", "state": "0123456789abcdef.state",
        }
    ).encode()  # fmt: skip
    (data / "words").mkdir(parents=True, exist_ok=True)
    raw = bytearray(sound)
    if isinstance(found, bytes):
        raw = found
    else:
        raw[found[0] % len(raw)] = found[1]
    (data / "words" / "document.json").write_bytes(raw)
    try:
        document = find("words")
    except FileFormatError as error:
        problem = str(error)
    else:
        assert document.path.parent == data / "words"
        return
    assert problem.isprintable()
    assert len(problem) < len(str(tmp_path)) + 400


def test_a_damaged_state_is_refused(model: Model) -> None:
    document = read(model, [part()], "words")
    raw = document.path.read_bytes()
    document.path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(FileFormatError, match="the file is damaged"):
        document.snapshot(model)
    state_after(model, [5, 6, 7]).save(document.path)
    with pytest.raises(FileFormatError, match=f"expected {document.tokens} tokens"):
        document.snapshot(model)
    document.path.unlink()
    for action in (lambda: document.snapshot(model), lambda: document.nbytes):
        with pytest.raises(FileFormatError, match="cannot be read: No such file"):
            action()
    assert "cannot be read" in str(survey().damaged[0])


def test_checkpoints_come_so_often(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(reading, "monotonic", lambda: next(times))
    kept: list[int] = []
    keep = Place.keep

    def noted(self: Place, made: Checkpoint, before: str | None) -> None:
        keep(self, made, before)
        kept.append(made.tokens)
        assert [path.name for path in self.path.glob("*.state")] == [made.state]  # those before it are gone

    monkeypatch.setattr(Place, "keep", noted)
    read(model, [part(WORDS * 2)], "words")  # nine chunks, ten seconds each by this clock
    assert kept == [3 * CHUNK, 6 * CHUNK, find("words").tokens]
