"""Clients of a server under load: those that ask as they should, those that go away, are slow or talk nonsense.

What each sees goes into one `Tally`. An error is what no fault of the client explains: a status of 5xx, a refusal of
what was right, a connection that ends in the middle, an answer without its end, or one that is not the model's.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from load_jobs import Job, Jobs, Verdict

_PATIENCE = 300.0  # seconds for any one answer, waiting for a slot included
_KEPT = 50  # errors that are told in full

_Body = dict[str, Any]


@dataclass
class Tally:
    """What all clients have seen."""

    began: float = field(default_factory=time.monotonic)
    verdicts: dict[str, int] = field(default_factory=lambda: {verdict.value: 0 for verdict in Verdict})
    asked: dict[str, int] = field(default_factory=dict[str, int])  # complete answers, by the way of asking
    busy: int = 0  # 429, with Retry-After
    left: int = 0  # answers that a client left in the middle
    rejected: dict[str, int] = field(default_factory=dict[str, int])  # nonsense, by its kind
    errors: list[str] = field(default_factory=list[str])
    error_count: int = 0
    first: list[tuple[float, float]] = field(
        default_factory=list[tuple[float, float]]
    )  # when, seconds to the first piece
    whole: list[float] = field(default_factory=list[float])  # seconds of answers that are not streamed

    def error(self, what: str) -> None:
        """Note an error."""
        self.error_count += 1
        if len(self.errors) < _KEPT:
            self.errors.append(f"{time.monotonic() - self.began:.1f} s: {what}")

    def judge(self, job: Job, text: str, reach: int, how: str) -> None:
        """Note a complete answer."""
        verdict = job.judge(text, reach)
        self.verdicts[verdict.value] += 1
        self.asked[how] = self.asked.get(how, 0) + 1
        if verdict is Verdict.WRONG:
            self.error(f"{how}: expected {job.solos[0].text!r}, found {text!r}")


@dataclass(frozen=True)
class Way:
    """A way to ask: an endpoint, the request for a job, and how to read what comes back.

    `text` takes the text out of a whole answer or of a piece of a streamed one; `ended` says whether a line is the end.
    """

    name: str
    path: str
    body: Callable[[Job], _Body]
    text: Callable[[_Body], str]
    ended: Callable[[str], bool]


def _ollama(job: Job) -> _Body:
    return {"options": {"temperature": 0, "num_predict": job.limit}}


def _openai(job: Job) -> _Body:
    return {"temperature": 0, "max_tokens": job.limit}


def _openai_text(answer: _Body) -> str:
    choice = answer["choices"][0] if answer["choices"] else {}
    return choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def _last_of_ollama(line: str) -> bool:
    return json.loads(line).get("done") is True


def _last_of_openai(line: str) -> bool:
    return line == "[DONE]"


CHAT_WAYS = (
    Way("ollama chat", "/api/chat", lambda job: _ollama(job) | {"messages": job.messages},
        lambda answer: answer["message"]["content"], _last_of_ollama),
    Way("openai chat", "/v1/chat/completions", lambda job: _openai(job) | {"messages": job.messages},
        _openai_text, _last_of_openai),
)  # fmt: skip
TEXT_WAYS = (
    Way("ollama generate", "/api/generate", lambda job: _ollama(job) | {"prompt": job.text, "raw": True},
        lambda answer: answer["response"], _last_of_ollama),
    Way("openai completions", "/v1/completions", lambda job: _openai(job) | {"prompt": job.text},
        _openai_text, _last_of_openai),
)  # fmt: skip

#: Nonsense -> method, path, content; each has a status from 400 to 499 as its answer.
_NONSENSE: dict[str, tuple[str, str, bytes]] = {
    "no JSON": ("POST", "/api/chat", b"{'model': 1"),
    "nothing": ("POST", "/v1/chat/completions", b""),
    "no UTF-8": ("POST", "/api/generate", b'{"model": "\xff"}'),
    "a wrong type": ("POST", "/api/chat", b'{"model": "MODEL", "messages": "hello"}'),
    "a wrong role": (
        "POST",
        "/v1/chat/completions",
        b'{"model": "MODEL", "messages": [{"role": "king", "content": "x"}]}',
    ),
    "a value out of range": ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "x", "temperature": -5}'),
    "another model": ("POST", "/api/generate", b'{"model": "../../etc/passwd", "prompt": "x"}'),
    "deep nesting": ("POST", "/api/chat", b'{"model": ' + b"[" * 50_000),
    "another method": ("DELETE", "/api/chat", b""),
    "another path": ("GET", "/v1/%2e%2e/%2e%2e/etc/passwd", b""),
    "a long body": ("POST", "/api/generate", b'{"prompt": "' + b"x" * (5 << 20) + b'"}'),
    "a long header": ("GET", "/api/tags?" + "x" * 40_000, b""),
}


class Client:
    """One of many; `rng` decides what it does."""

    def __init__(self, url: str, model: str, jobs: Jobs, tally: Tally, rng: random.Random) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=_PATIENCE, trust_env=False, verify=False)
        self._model, self._jobs, self._tally, self._rng = model, jobs, tally, rng

    async def run(self, until: float) -> None:
        """Ask until that time (`time.monotonic`), one thing after the other."""
        kinds = [self.talk, self.write, self.leave, self.dawdle, self.babble]
        async with self._http:
            while time.monotonic() < until:
                (kind,) = self._rng.choices(kinds, (50, 25, 10, 5, 10))
                await kind()

    async def talk(self) -> None:
        """A conversation: a first turn, perhaps regenerated, perhaps a second one, perhaps with its message edited."""
        first, later = self._rng.choice(self._jobs.chats)
        stream = self._rng.random() < 0.6
        way = self._rng.choice(CHAT_WAYS)
        turns = [first] * self._rng.choice((1, 1, 2)) + self._rng.sample(later, self._rng.choice((0, 1, 2)))
        for job in turns:
            if not await self.ask(way, job, stream):
                return

    async def write(self) -> None:
        """A text that is gone on with."""
        await self.ask(self._rng.choice(TEXT_WAYS), self._rng.choice(self._jobs.texts), self._rng.random() < 0.6)

    async def dawdle(self) -> None:
        """Read an answer slowly: a piece in a while."""
        await self.ask(self._rng.choice(CHAT_WAYS), self._rng.choice(self._jobs.chats)[0], True, pause=0.1)

    async def leave(self) -> None:
        """Go away in the middle of an answer."""
        way, (job, _) = self._rng.choice(CHAT_WAYS), self._rng.choice(self._jobs.chats)
        stream, pieces = self._rng.random() < 0.5, self._rng.randint(0, 8)
        try:
            async with asyncio.timeout(self._rng.uniform(0.01, 3)):
                async with self._http.stream("POST", way.path, json=self._body(way, job, stream)) as response:
                    async for _ in response.aiter_lines():
                        pieces -= 1
                        if pieces < 0:
                            break
        except TimeoutError:
            pass
        except httpx.HTTPError as error:
            self._tally.error(f"{way.name}, to be left: {type(error).__name__} {error}")
        self._tally.left += 1

    async def babble(self) -> None:
        """Send what is no request."""
        name, (method, path, content) = self._rng.choice(list(_NONSENSE.items()))
        content = content.replace(b"MODEL", self._model.encode())
        try:
            response = await self._http.request(method, path, content=content)
        except httpx.HTTPError as error:
            self._tally.error(f"{name}: {type(error).__name__} {error}")
            return
        if not 400 <= response.status_code < 500:
            self._tally.error(f"{name}: status {response.status_code}")
        self._tally.rejected[name] = self._tally.rejected.get(name, 0) + 1

    async def ask(self, way: Way, job: Job, stream: bool, pause: float = 0) -> bool:
        """Ask for an answer, again and again where the server has no room, and judge it; False after an error."""
        how = f"{way.name}, streamed" if stream else way.name
        try:
            while (text := await self._answer(way, job, stream, pause)) is None:
                await asyncio.sleep(self._rng.uniform(0.5, 1.5))
        except (httpx.HTTPError, ValueError, KeyError, Unexpected) as error:
            self._tally.error(f"{how}: {type(error).__name__} {error}")
            return False
        self._tally.judge(job, text, self._jobs.reach, how)
        return True

    async def _answer(self, way: Way, job: Job, stream: bool, pause: float) -> str | None:
        """The answer's text; None where there is no room."""
        began = time.monotonic()
        async with self._http.stream("POST", way.path, json=self._body(way, job, stream)) as response:
            if response.status_code == 429:
                if "retry-after" not in response.headers:
                    raise Unexpected("429 without Retry-After")
                self._tally.busy += 1
                return None
            if response.status_code != 200:
                raise Unexpected(f"{response.status_code} {(await response.aread()).decode()}")
            if not stream:
                text = way.text(json.loads(await response.aread()))
                self._tally.whole.append(time.monotonic() - began)
                return text
            return await self._heard(way, _lines(response), began, pause)

    async def _heard(self, way: Way, lines: AsyncIterator[str], began: float, pause: float) -> str:
        """The text of a stream, which must have an end."""
        text, ended = "", False
        async for line in lines:
            if ended:
                raise Unexpected(f"{line!r} after the end")
            ended = way.ended(line)
            if line == "[DONE]":
                continue
            piece = json.loads(line)
            if "error" in piece:
                raise Unexpected(str(piece["error"]))
            found = way.text(piece)
            if found and not text:
                now = time.monotonic()
                self._tally.first.append((now - self._tally.began, now - began))
            text += found
            await asyncio.sleep(pause)
        if not ended:
            raise Unexpected("the stream has no end")
        return text

    def _body(self, way: Way, job: Job, stream: bool) -> _Body:
        return way.body(job) | {"model": self._model, "stream": stream}


class Unexpected(Exception):  # noqa: N818
    """What the server should not have said."""


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream that say something, without what marks them as events."""
    async for line in response.aiter_lines():
        if line:
            yield line.removeprefix("data: ")
