"""What a server serves, by name: files that are loaded when they are asked for and unloaded when nobody does.

A model is called as its file, without `.gguf`; `NAME@DOCUMENT` is the same with a document read before every prompt.
Requests only choose among these names: nothing of a request becomes a path.
"""

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from time import monotonic, perf_counter_ns
from typing import Any

from gguf import LlamaFileType

from griffin_gguf.runtime import documents, load
from griffin_gguf.runtime.chat import ChatTemplate, Message, stop_tokens
from griffin_gguf.runtime.chat_prompt import ChatPrompt
from griffin_gguf.runtime.documents import Document
from griffin_gguf.runtime.engine import Engine
from griffin_gguf.runtime.errors import FileFormatError, GriffinError, UnsupportedError
from griffin_gguf.runtime.gguf_file import GgufFile
from griffin_gguf.runtime.model import Model
from griffin_gguf.runtime.prompt_cache import PromptCache
from griffin_gguf.runtime.saved_state import fingerprint
from griffin_gguf.runtime.server.answers import Ground, Reply, Wish
from griffin_gguf.runtime.server.errors import ApiError, EndingError, as_api_error
from griffin_gguf.runtime.server.settings import Settings
from griffin_gguf.runtime.snapshot import Snapshot
from griffin_gguf.runtime.snapshot_folder import SnapshotFolder

_log = logging.getLogger("griffin.server")

_ENDING = EndingError("the server is ending")
_LONGEST_STAY = 1e9  # seconds that a date can hold
_TAG = ":latest"  # what Ollama's clients put behind a name that has no tag
_MOMENT = 1.0  # seconds that the list of documents is taken for true
_DOCUMENTS = 4  # whose states a loaded model keeps in memory


@dataclass(frozen=True)
class Entry:
    """A model as the lists of models tell of it; `document` is read before every prompt, None: nothing."""

    name: str
    path: Path
    size: int  # bytes of its files
    digest: str  # 64 hex digits: the model's fingerprint (docs/state.md), so the same for the same weights
    modified: datetime  # UTC
    architecture: str
    parameters: int
    file_type: str  # "Q4_K_M"
    context: int  # tokens of the longest text it was trained on
    embedding: int  # numbers of an embedding
    metadata: Mapping[str, Any]
    template: ChatTemplate | None
    document: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in memory. `expires` is when it goes unless somebody asks again; None: never, or it is in use now."""

    entry: Entry
    expires: datetime | None
    nbytes: int  # weights, states and what a step needs
    running: int
    waiting: int
    cache_nbytes: int
    cache_snapshots: int


class _Running:
    """What is in memory of a model."""

    def __init__(self, entry: Entry, settings: Settings) -> None:
        self.model = load(entry.path, settings.backend, settings.threads, settings.devices)
        try:
            self.engine = Engine(self.model, settings.slots, waiting=settings.waiting)
            folder = None
            if settings.cache_folder is not None:
                room, read = settings.cache_folder_nbytes, self.model.load_snapshot
                folder = SnapshotFolder(settings.cache_folder, room, f"{self.model.backend}-{entry.digest[:16]}", read)
            self.cache = PromptCache(settings.cache_nbytes, folder)
        except BaseException:
            self.model.close()
            raise
        self.stops = stop_tokens(self.model.file.metadata, self.model.tokenizer)
        self.engine.start()
        self._documents = OrderedDict[str, Snapshot]()
        self._lock = Lock()

    def ground(self, document: Document | None) -> Ground:
        """What answers rest on that go on from `document`."""
        plain = Ground(self.engine, self.cache, self.stops)
        if document is None:
            return plain
        root = f"{document.name} {document.path.name}"  # a reading's file has a name of its own
        with self._lock:
            snapshot = self._documents.get(root) or document.snapshot(self.model)
            self._documents[root] = snapshot
            self._documents.move_to_end(root)
            if len(self._documents) > _DOCUMENTS:
                self._documents.popitem(last=False)
        return replace(plain, start=snapshot, root=root)

    def close(self) -> None:
        """End all answers, then release everything."""
        self.engine.close()
        self.cache.close()
        self.model.close()


class Served:
    """A loaded model as one request sees it; `load_ns` is what the request waited for its loading."""

    def __init__(
        self,
        entry: Entry,
        running: _Running,
        document: Document | None,
        load_ns: int,
        on_reply: Callable[[Reply], None],
    ) -> None:
        self.entry, self.template, self.load_ns = entry, entry.template, load_ns
        self.model: Model = running.model
        self._running, self._document, self._on_reply = running, document, on_reply
        self._ground = running.ground(document)

    def chat(self, messages: Sequence[Message]) -> ChatPrompt:
        """The tokens of a conversation. Raises `ApiError` where there is no template, or it refuses the messages.

        Takes some milliseconds, and up to seconds with a hostile template: nothing for an event loop.
        """
        if self.template is None:
            raise ApiError(400, f'"{self.entry.name}" has no chat template; it completes texts (generate, completions)')
        turn = self._document is not None and self._document.form == "turn"
        known, root, bos = self._running.cache.said, self._ground.root, self.model.tokenizer.bos
        begins = self._document is None or turn

        def said(before: Sequence[int], text: str) -> list[int] | None:
            return known(before if begins else _without(bos, before), text, root)

        try:
            prompt = self.template.prompt(self.model.tokenizer, messages, said, document=turn)
        except FileFormatError as error:
            raise as_api_error(error) from error
        except GriffinError as error:
            raise ApiError(400, str(error), param="messages") from error
        if begins:
            return prompt
        tokens = _without(bos, prompt.tokens)
        ahead = len(prompt.tokens) - len(tokens)
        return replace(prompt, tokens=tokens, marks=tuple(mark - ahead for mark in prompt.marks if mark > ahead))

    def text(self, text: str) -> ChatPrompt:
        """The tokens of a text to be continued."""
        return ChatPrompt(self.model.tokenizer.encode(text, bos=self._document is None), ())

    def answer(self, prompt: ChatPrompt, wish: Wish) -> Reply:
        """Ask for an answer: see `Reply`."""
        return Reply(self._ground, prompt, wish, self.load_ns, self._on_reply)


class Models:
    """All that is served; what is loaded belongs to the event loop that uses it.

    `on_reply(name, reply)` is called when an answer ends, complete or not. Raises `GriffinError` for a file that
    cannot be served, and for two of one name.
    """

    def __init__(self, paths: Sequence[Path], settings: Settings) -> None:
        self._settings = settings
        self.on_reply: Callable[[str, Reply], None] | None = None
        self._known, self._looked = list[Document](), -_MOMENT - 1
        self._places: dict[str, _Place] = {}
        for path in paths:
            entry = _entry(path)
            if "@" in entry.name:
                raise UnsupportedError(f"{path}: file name: expected no @, which names documents; rename the file")
            known = self._places.setdefault(entry.name.lower(), _Place(entry, settings.keep_alive))
            if known.entry is not entry:
                raise UnsupportedError(f"{path}: the name {entry.name} is {known.entry.path}'s; expected another one")

    def entries(self) -> list[Entry]:
        """A model after the other, each followed by its documents."""
        known = self._documents()
        return [
            entry
            for place in self._places.values()
            for entry in (place.entry, *(_with(place.entry, d) for d in known if d.fingerprint == place.entry.digest))
        ]

    def find(self, name: str) -> Entry:
        """The entry of that name, ":latest" behind it or not, in either case. Raises `ApiError` 404."""
        return self._find(name)[1]

    @asynccontextmanager
    async def use(self, name: str, keep_alive: float | None = None) -> AsyncGenerator[Served]:
        """A model to be used within the context; loaded first where it is not. Raises `ApiError`.

        It stays for `keep_alive` seconds after its last use, 0: not at all, below 0: for good; None: as it was told
        before, or the settings say.
        """
        place, entry, document = self._find(name)
        place.users += 1
        if keep_alive is not None:
            place.keep_alive = keep_alive
        place.stay()
        try:
            try:
                running, load_ns = await self._running(place)
                served = await asyncio.to_thread(
                    Served, entry, running, document, load_ns, partial(self._end, entry.name)
                )
            except Exception as error:
                raise as_api_error(error) from error
            yield served
        finally:
            place.users -= 1
            await self._rest(place)

    async def unload(self, name: str) -> None:
        """Let a model go as soon as nobody uses it. Raises `ApiError` 404."""
        place = self._find(name)[0]
        place.keep_alive = 0
        await self._rest(place)

    def loaded(self) -> list[Loaded]:
        """What is in memory."""
        return [place.told() for place in self._places.values() if place.running]

    def refuse_waiting(self) -> None:
        """End all requests that have no slot yet: the server is ending."""
        for place in self._places.values():
            if place.running:
                place.running.engine.refuse_waiting(_ENDING)

    def cancel_all(self) -> None:
        """End all answers after the step now in work."""
        self.refuse_waiting()
        for place in self._places.values():
            if place.running:
                place.running.engine.cancel_all()

    async def close(self) -> None:
        """Release everything."""
        for place in self._places.values():
            await self._unload(place)

    def _find(self, name: str) -> "tuple[_Place, Entry, Document | None]":
        wanted, at, behind = name.removesuffix(_TAG).partition("@")
        place = self._places.get(wanted.removesuffix(_TAG).lower())
        if place is not None and not at:
            return place, place.entry, None
        if place is not None:
            known = [d for d in self._documents() if d.fingerprint == place.entry.digest]
            exact = [d for d in known if d.name == behind] or [d for d in known if d.name.lower() == behind.lower()]
            if exact:
                return place, _with(place.entry, exact[0]), exact[0]
        raise ApiError(404, f"model {_short(name)} not found", code="model_not_found", param="model")

    def _documents(self) -> list[Document]:
        """All there are, or were a moment ago: many ask, and each time every document's folder is looked into."""
        now = monotonic()
        if now > self._looked + _MOMENT:
            self._known, self._looked = documents.documents(), now
        return self._known

    async def _running(self, place: "_Place") -> "tuple[_Running, int]":
        """What is in memory of a model, and the nanoseconds that this took."""
        began = perf_counter_ns()
        # Shielded: who goes away while it is loaded does not lose it for the others.
        running, was_there = await asyncio.shield(asyncio.ensure_future(self._load(place)))
        return running, 0 if was_there else perf_counter_ns() - began

    async def _load(self, place: "_Place") -> tuple[_Running, bool]:
        """What is in memory of a model, and whether it was before."""
        async with place.lock:
            if place.running is not None:
                return place.running, True
            _log.info("loading %s", place.entry.name)
            place.running = await asyncio.to_thread(_Running, place.entry, self._settings)
            _log.info("loaded %s: %s", place.entry.name, place.running.engine.memory)
            return place.running, False

    async def _rest(self, place: "_Place") -> None:
        """Begin to wait for the end of `keep_alive`, where nobody uses a model."""
        if place.users or place.running is None:
            return
        place.stay()
        if place.keep_alive == 0 or place.running.engine.broken:
            await self._unload(place)
        elif place.keep_alive > 0:
            place.expires = datetime.now(UTC) + timedelta(seconds=min(place.keep_alive, _LONGEST_STAY))
            loop = asyncio.get_running_loop()
            place.timer = loop.call_later(place.keep_alive, lambda: self._expire(place))

    def _expire(self, place: "_Place") -> None:
        self._expiring = asyncio.get_running_loop().create_task(self._unload(place, unused=True))

    async def _unload(self, place: "_Place", unused: bool = False) -> None:
        place.stay()
        async with place.lock:
            if place.running is not None and not (unused and place.users):
                running, place.running = place.running, None
                place.keep_alive = place.usual
                await asyncio.to_thread(running.close)
                _log.info("unloaded %s", place.entry.name)

    def _end(self, name: str, reply: Reply) -> None:
        if self.on_reply is not None:
            self.on_reply(name, reply)


class _Place:
    """A file that is served: what is in memory of it, who uses it, and how long it stays."""

    def __init__(self, entry: Entry, keep_alive: float) -> None:
        self.entry = entry
        self.running: _Running | None = None
        self.lock = asyncio.Lock()
        self.users = 0
        self.usual = self.keep_alive = keep_alive
        self.expires: datetime | None = None
        self.timer: asyncio.TimerHandle | None = None

    def stay(self) -> None:
        """Forget when it was to go."""
        if self.timer is not None:
            self.timer.cancel()
        self.expires = self.timer = None

    def told(self) -> Loaded:
        """What the list of loaded models says."""
        assert self.running is not None, "what is not loaded is not told of"
        engine, cache = self.running.engine, self.running.cache
        nbytes = self.entry.size + engine.memory.total
        return Loaded(self.entry, self.expires, nbytes, engine.running, engine.queued, cache.nbytes, len(cache))


def _entry(path: Path) -> Entry:
    """What is told of a file; raises `GriffinError` for one that is no sound GGUF of a Griffin."""
    with GgufFile.open(path) as file:
        hp, files = file.hyperparameters(), file.paths
        return Entry(
            name=path.name.removesuffix(".gguf"),
            path=path,
            size=sum(part.stat().st_size for part in files),
            digest=fingerprint(file),
            modified=datetime.fromtimestamp(path.stat().st_mtime, UTC),
            architecture=file.metadata["general.architecture"],
            parameters=sum(prod(tensor.shape) for tensor in file.tensors.values()),
            file_type=_file_type(file.metadata.get("general.file_type")),
            context=hp.context,
            embedding=hp.hidden,
            metadata=file.metadata,
            template=ChatTemplate.from_gguf(path, file.metadata),
        )


def _file_type(number: Any) -> str:
    """The name of a file type, "Q4_K_M"; "unknown" for a number that has none."""
    if number not in list(LlamaFileType):
        return "unknown"
    return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _with(entry: Entry, document: Document) -> Entry:
    """The same model with a document read."""
    identity = f"{entry.digest} {document.name} {document.path.name}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    modified = datetime.fromisoformat(document.created)
    return replace(
        entry, name=f"{entry.name}@{document.name}", digest=digest, modified=modified, document=document.name
    )


def _short(name: str) -> str:
    """A name in quotes, fit for one line."""
    shown = ascii(name[:100])
    return shown if len(name) <= 100 else f"{shown}…"


def _without(bos: int, tokens: Sequence[int]) -> list[int]:
    """A conversation that follows a plain text does not begin once more."""
    return list(tokens[1:] if tokens[:1] == [bos] else tokens)
