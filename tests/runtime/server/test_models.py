"""Models by name, loaded and unloaded; and what of a prompt is read again, counted at the model's door."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from served_models import NAME, PLAIN, write_models

from griffin_gguf.runtime import documents, load
from griffin_gguf.runtime.chat import Message
from griffin_gguf.runtime.errors import BackendError, FileFormatError, UnsupportedError
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.places import VARIABLE
from griffin_gguf.runtime.reading import Part
from griffin_gguf.runtime.sampling import Sampling
from griffin_gguf.runtime.server.answers import Reply, Wish
from griffin_gguf.runtime.server.errors import ApiError
from griffin_gguf.runtime.server.models import Models, Served
from griffin_gguf.runtime.server.settings import Settings

GREEDY = Wish(Sampling(temperature=0), 12)
SYSTEM: Message = {
    "role": "system",
    "content": "You answer with a definition of the word, and with nothing else at all.",
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every token that any model is fed."""
    seen: list[int] = []
    forward_batch = Model.forward_batch

    def counting(self: Model, batch: Sequence[Any], *args: Any, **keys: Any) -> Any:
        for tokens, _ in batch:
            seen.extend(map(int, tokens))
        return forward_batch(self, batch, *args, **keys)

    monkeypatch.setattr(Model, "forward_batch", counting)
    return seen


def settings(**changes: Any) -> Settings:
    return Settings(threads=1, **changes)


@asynccontextmanager
async def serving(paths: Sequence[Path], **changes: Any) -> AsyncGenerator[Models]:
    models = Models(paths, settings(**changes))
    try:
        yield models
    finally:
        await models.close()


def served(paths: Sequence[Path], use: Callable[[Models], Awaitable[Any]], **changes: Any) -> None:
    async def run() -> None:
        async with serving(paths, **changes) as models:
            await use(models)

    asyncio.run(run())


async def say(one: Served, messages: Sequence[Message], wish: Wish = GREEDY) -> tuple[str, Reply]:
    async with one.answer(one.chat(messages), wish) as reply:
        text = "".join([piece.text async for piece in reply])
    assert text == reply.text
    return text, reply


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def test_names_are_those_of_the_files_and_nothing_else_is_a_model(paths: list[Path]) -> None:
    models = Models(paths, settings())
    assert [entry.name for entry in models.entries()] == [NAME, PLAIN]
    for name in (NAME, f"{NAME}:latest", NAME.upper()):
        assert models.find(name).path == paths[0]
    for name in ("", "x", f"{NAME}:other", f"../{NAME}", str(paths[0]), f"{NAME}@", f"{NAME}@../x", "\0", "x" * 10**6):
        with pytest.raises(ApiError, match="not found") as caught:
            models.find(name)
        assert caught.value.status == 404
        assert len(caught.value.message) < 500
    entry = models.find(NAME)
    assert (entry.file_type, entry.architecture, entry.context) == ("Q8_0", "recurrentgemma", 1024)
    assert entry.size == paths[0].stat().st_size


def test_two_files_of_one_name_and_files_that_are_none_are_refused(paths: list[Path], tmp_path: Path) -> None:
    other = tmp_path / f"{NAME.upper()}.gguf"
    other.write_bytes(paths[0].read_bytes())
    with pytest.raises(UnsupportedError, match="expected another one"):
        Models([paths[0], other], settings())
    with pytest.raises(UnsupportedError, match="expected no @"):
        Models([other.rename(tmp_path / "a@b.gguf")], settings())
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileFormatError):
        Models([tmp_path / "bad.gguf"], settings())


def test_a_conversation_is_read_once(paths: list[Path], fed: list[int]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            turns = [SYSTEM, user("What is a hacker?")]
            for question in ("And a kludge?", "And a wizard?"):
                fed.clear()
                prompt = one.chat(turns).tokens
                answer, reply = await say(one, turns)
                new = len(prompt) - reply.cached_tokens
                # What is new of the prompt, and of the answer all but the last token or the one that ends it.
                assert len(fed) == new + reply.answer_tokens - 1
                assert fed[:new] == prompt[reply.cached_tokens :]
                turns += [assistant(answer), user(question)]
            assert one.template
            following = one.template.encode_next(one.model.tokenizer, turns[:4])
            assert following
            assert new <= len(following) + 1  # the last token of an answer that was cut is not fed

    served(paths, use)


def test_a_regenerated_answer_reads_nothing(paths: list[Path], fed: list[int]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            first, reply = await say(one, [user("What is a hacker?")])
            fed.clear()
            again, second = await say(one, [user("What is a hacker?")])
            assert again == first
            assert second.cached_tokens == second.prompt_tokens == reply.prompt_tokens
            assert len(fed) == second.answer_tokens - 1

    served(paths, use)


def test_an_edited_message_and_a_new_chat_read_what_is_theirs(paths: list[Path], fed: list[int]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            turns = [SYSTEM, user("What is a hacker, and what does one do all day long?")]
            answer, _ = await say(one, turns)
            turns += [assistant(answer), user("Who wrote this?")]
            await say(one, turns)
            _, edited = await say(one, [*turns[:-1], user("Who is the author of all this?")])
            before = len(one.chat(turns[:2]).tokens)
            assert edited.cached_tokens >= before
            _, other = await say(one, [SYSTEM, user("Name a colour.")])
            system = len(one.model.tokenizer.encode(SYSTEM["content"]))
            assert other.cached_tokens >= system
            fed.clear()
            _, last = await say(one, [SYSTEM, user("Name a river.")])
            assert len(fed) == last.prompt_tokens - last.cached_tokens + last.answer_tokens - 1

    served(paths, use)


def test_a_long_prompt_that_was_edited_is_read_from_near_the_edit(paths: list[Path]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            text = "The quick brown fox jumps over the lazy dog. " * 150
            async with one.answer(one.text(text + "And now?"), GREEDY) as reply:
                [piece async for piece in reply]
            async with one.answer(one.text(text + "And then?"), GREEDY) as reply:
                [piece async for piece in reply]
            assert reply.prompt_tokens > 1500
            assert reply.prompt_tokens - reply.cached_tokens < 512 + 256 + 8

    served(paths, use)


def test_answers_are_the_same_with_and_without_the_cache(paths: list[Path]) -> None:
    texts: list[list[str]] = []

    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            turns: list[Message] = [SYSTEM]
            said: list[str] = []
            for question in ("What is a hacker?", "What is a hacker?", "And a kludge?"):
                turns.append(user(question))
                answer, reply = await say(one, turns, Wish(Sampling(temperature=0.7, repeat_penalty=1.3, seed=7), 16))
                cached.append(reply.cached_tokens)
                turns.append(assistant(answer))
                said.append(answer)
            texts.append(said)

    cached: list[int] = []
    served(paths, use)
    assert all(cached[1:])
    cached.clear()
    served(paths, use, cache_nbytes=0)
    assert not any(cached)
    assert texts[0] == texts[1]


def test_the_cache_outlives_the_server_in_a_folder(paths: list[Path], tmp_path: Path) -> None:
    cached: list[int] = []

    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            _, reply = await say(one, [user("What is a hacker?")])
            cached.append(reply.prompt_tokens - reply.cached_tokens)

    for _ in range(2):
        served(paths, use, cache_folder=tmp_path / "cache")
    assert cached[0] > 0
    assert cached[1] == 0


def test_a_document_stands_before_every_prompt(paths: list[Path], fed: list[int]) -> None:
    with load(paths[0], threads=1) as model:
        documents.read(model, [Part.text("story.txt", "Call me Ishmael. " * 40)], "story")
    fed.clear()

    async def use(models: Models) -> None:
        assert [entry.name for entry in models.entries()] == [NAME, f"{NAME}@story", PLAIN, f"{PLAIN}@story"]
        async with models.use(f"{NAME}@story:latest") as one:
            first, reply = await say(one, [user("Who are you?")])
            document = documents.find("story").tokens
            assert reply.cached_tokens == document
            assert len(fed) == reply.prompt_tokens - document + reply.answer_tokens - 1
            again, second = await say(one, [user("Who are you?")])
            assert (again, second.cached_tokens) == (first, second.prompt_tokens)
        async with models.use(NAME) as plain:
            _, other = await say(plain, [user("Who are you?")])
            assert other.cached_tokens == 0
        with pytest.raises(ApiError, match="not found"):
            models.find(f"{PLAIN}@story" + "x")

    served(paths, use)


def test_a_conversation_behind_a_plain_document_is_read_once(paths: list[Path]) -> None:
    with load(paths[0], threads=1) as model:
        documents.read(model, [Part.text("story.txt", "Call me Ishmael. " * 40)], "story", "text")

    async def use(models: Models) -> None:
        async with models.use(f"{NAME}@story") as one:
            turns = [user("Who are you?")]
            for _ in range(3):
                answer, reply = await say(one, turns)
                before = one.chat(turns).tokens
                turns += [assistant(answer), user("And then?")]
                after = one.chat(turns).tokens
                assert after[: len(before)] == before
                assert after[len(before) :][: len(reply.tokens)] == reply.tokens
            _, last = await say(one, turns)
            assert last.prompt_tokens - last.cached_tokens <= 24

    served(paths, use)


def test_a_model_without_a_template_completes(paths: list[Path]) -> None:
    async def use(models: Models) -> None:
        async with models.use(PLAIN) as one:
            with pytest.raises(ApiError, match="has no chat template") as caught:
                one.chat([user("Hello")])
            assert caught.value.status == 400
            async with one.answer(one.text("The evening was"), GREEDY) as reply:
                assert "".join([piece.text async for piece in reply])

    served(paths, use)


def test_models_stay_as_long_as_they_are_told(paths: list[Path]) -> None:
    def names(models: Models) -> list[str]:
        return [one.entry.name for one in models.loaded()]

    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            assert one.load_ns > 0
            assert models.loaded()[0].expires is None
        assert models.loaded()[0].expires is not None
        async with models.use(NAME, 0) as one:
            assert one.load_ns == 0
            async with models.use(PLAIN, -1):
                pass
        assert names(models) == [PLAIN]
        assert models.loaded()[0].expires is None
        async with models.use(PLAIN, 0.2):
            await models.unload(PLAIN)
            assert names(models) == [PLAIN]  # in use
        assert names(models) == []
        async with models.use(NAME, 0.1):
            pass
        for _ in range(100):
            await asyncio.sleep(0.05)
            if not models.loaded():
                return
        raise AssertionError("the model stays")

    served(paths, use)


def test_a_model_that_is_pinned_stays_so(paths: list[Path]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME, -1):
            pass
        async with models.use(NAME):
            pass
        assert models.loaded()[0].expires is None
        await models.unload(NAME)
        async with models.use(NAME):
            pass
        assert models.loaded()[0].expires is not None

    served(paths, use)


def test_a_model_whose_device_has_failed_is_loaded_anew(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise BackendError("the device is gone")

    async def use(models: Models) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Model, "forward_batch", failing)
            async with models.use(NAME) as one:
                with pytest.raises(ApiError, match="the device is gone") as caught:
                    await say(one, [user("Hello")])
                assert caught.value.status == 500
        assert not models.loaded()
        async with models.use(NAME) as one:
            await say(one, [user("Hello")])

    served(paths, use)


def test_a_reader_who_leaves_frees_the_slot_within_a_step(paths: list[Path], fed: list[int]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            async with one.answer(one.text("Once upon"), Wish(Sampling(temperature=0))) as reply:
                async for _ in reply:
                    break
            said = len(reply.tokens)
            while models.loaded()[0].running:
                await asyncio.sleep(0.001)
            assert len(reply.tokens) <= said + 2
            assert reply.finish is None

    served(paths, use, slots=1)


def test_a_full_queue_is_told_with_a_time_to_come_back(paths: list[Path]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            endless = Wish(Sampling(temperature=0))
            async with one.answer(one.text("A"), endless), one.answer(one.text("B"), endless):
                with pytest.raises(ApiError) as caught:
                    async with one.answer(one.text("C"), endless):
                        pass
                assert (caught.value.status, caught.value.retry_after) == (429, 1)

    served(paths, use, slots=1, waiting=1)


def test_an_ending_server_refuses_who_waits_and_ends_who_runs(paths: list[Path]) -> None:
    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            endless = Wish(Sampling(temperature=0, seed=1))
            async with one.answer(one.text("A"), endless) as running, one.answer(one.text("B"), endless) as waiting:
                pieces = aiter(running)
                await anext(pieces)
                models.refuse_waiting()
                with pytest.raises(ApiError, match="ending") as caught:
                    await anext(aiter(waiting))
                assert caught.value.status == 503
                models.cancel_all()
                with pytest.raises(ApiError, match="ended this answer"):
                    async for _ in pieces:
                        pass

    served(paths, use, slots=1)


def test_json_of_a_schema(paths: list[Path]) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
    }
    schema["additionalProperties"] = False

    async def use(models: Models) -> None:
        async with models.use(NAME) as one:
            answer, reply = await say(one, [user("Count.")], Wish(Sampling(temperature=1, seed=3), 200, schema=schema))
            assert reply.finish == "stop"
            assert 0 <= json.loads(answer)["n"] <= 99

    served(paths, use)


def test_log_probabilities_come_with_the_pieces(paths: list[Path]) -> None:
    async def use(models: Models) -> None:
        async with (
            models.use(NAME) as one,
            one.answer(one.text("The"), Wish(Sampling(temperature=0), 10, ("zzz",), top_logprobs=2)) as reply,
        ):
            noted = [token async for piece in reply for token in piece.logprobs]
            assert [one.token for one in noted] == reply.tokens
            assert all(len(one.top) == 2 for one in noted)

    served(paths, use)
